# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a creation does after Proxmox VE refused its clone: the judgement alone, as a table. Which texts say that a
storage is full.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import ApiError, TaskFailed
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.proxmox import answers
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.sandboxes.refusals import (
    Attempt,
    Judgement,
    Step,
    judge_refusal,
)

# The first attempt of a run that chose the VMID itself, and what it may learn.
REQUESTED = Attempt(tries=1, vmid_given=False, doubtful=False, has_task=False)
ACCEPTED = replace(REQUESTED, has_task=True)
VM_EXISTS = "unable to create VM 1000: config file already exists"
VOLUME_EXISTS = "clone failed: lvcreate: vm-1000-disk-0 already exists"
LOCKED = "can't lock file '/var/lock/qemu-server/lock-9000.conf' - got timeout"


def refused(text: str, status: int = 500) -> ApiError:
    return ApiError(f"POST: {status} {text}", status=status, text=text)


def failed(exitstatus: str) -> TaskFailed:
    return TaskFailed(f"clone: {exitstatus}", exitstatus=exitstatus)


@pytest.mark.parametrize(
    ("error", "attempt", "step", "nothing_made"),
    [
        # The template is locked for a moment.
        (failed(LOCKED), ACCEPTED, Step.PROVE_ABSENCE, False),
        (failed(LOCKED), replace(ACCEPTED, vmid_is_free=True), Step.WAIT, True),
        (failed(LOCKED), replace(ACCEPTED, vmid_is_free=False), Step.GIVE_UP, False),
        (failed(LOCKED), replace(ACCEPTED, tries=2, vmid_given=True), Step.PROVE_ABSENCE, False),
        (failed(LOCKED), replace(ACCEPTED, tries=2, vmid_given=True, vmid_is_free=True), Step.WAIT, True),
        (failed(LOCKED), replace(ACCEPTED, tries=3), Step.GIVE_UP, False),
        (refused(LOCKED), REQUESTED, Step.GIVE_UP, True),
        # Another VM has the VMID.
        (refused(VM_EXISTS), REQUESTED, Step.TAKE_ANOTHER_VMID, True),
        (refused(VM_EXISTS), replace(REQUESTED, tries=7), Step.TAKE_ANOTHER_VMID, True),
        (refused(VM_EXISTS), replace(REQUESTED, vmid_given=True), Step.REFUSE_VMID, True),
        (
            failed("unable to create VM 1000 - VM 1000 already exists on node 'pve2'"),
            ACCEPTED,
            Step.TAKE_ANOTHER_VMID,
            True,
        ),
        (failed("CT 1000 already exists"), replace(ACCEPTED, vmid_given=True), Step.REFUSE_VMID, True),
        (failed("open '/etc/pve/qemu-server/1000.conf' failed: File exists"), ACCEPTED, Step.TAKE_ANOTHER_VMID, True),
        # It may be the clone of an earlier run whose answer was lost.
        (refused(VM_EXISTS), replace(REQUESTED, doubtful=True), Step.LOOK_AGAIN, False),
        (refused(VM_EXISTS), replace(REQUESTED, doubtful=True, vmid_given=True), Step.LOOK_AGAIN, False),
        (failed("VM 1000 already exists"), replace(ACCEPTED, doubtful=True), Step.LOOK_AGAIN, False),
        # A leftover volume has the name: the task may have begun to make the VM.
        (failed(VOLUME_EXISTS), ACCEPTED, Step.PROVE_ABSENCE, False),
        (failed(VOLUME_EXISTS), replace(ACCEPTED, doubtful=True), Step.PROVE_ABSENCE, False),
        (failed(VOLUME_EXISTS), replace(ACCEPTED, vmid_is_free=True), Step.TAKE_ANOTHER_VMID, True),
        (failed(VOLUME_EXISTS), replace(ACCEPTED, vmid_is_free=False), Step.GIVE_UP, False),
        (failed(VOLUME_EXISTS), replace(ACCEPTED, vmid_given=True), Step.GIVE_UP, False),
        # Neither time nor another VMID would help.
        (refused("storage 'fast' does not exist"), REQUESTED, Step.GIVE_UP, True),
        (refused("storage 'fast' does not exist"), replace(REQUESTED, doubtful=True), Step.GIVE_UP, True),
        (failed("clone failed: no space left on device"), ACCEPTED, Step.GIVE_UP, False),
        # The status of the task could not be read. That says nothing about what the task made.
        (refused("no such task", 500), ACCEPTED, Step.GIVE_UP, False),
    ],
)
def test_a_refused_clone_leads_to_one_step(
    error: ApiError | TaskFailed, attempt: Attempt, step: Step, nothing_made: bool
) -> None:
    assert judge_refusal(error, attempt) == Judgement(step, nothing_made)


@pytest.mark.parametrize("error", [refused(VM_EXISTS), failed(VM_EXISTS), failed(VOLUME_EXISTS), failed(LOCKED)])
@pytest.mark.parametrize("tries", [1, 2, 3, 50])
@pytest.mark.parametrize("vmid_given", [True, False])
@pytest.mark.parametrize("doubtful", [True, False])
@pytest.mark.parametrize("vmid_is_free", [True, False])
def test_no_question_is_asked_twice(
    error: ApiError | TaskFailed, tries: int, vmid_given: bool, doubtful: bool, vmid_is_free: bool
) -> None:
    """Each answer to a question leads on, so the loop that obeys these decisions ends."""
    attempt = Attempt(tries, vmid_given, doubtful, isinstance(error, TaskFailed))
    asked = []
    while (judgement := judge_refusal(error, attempt)).step in (Step.PROVE_ABSENCE, Step.LOOK_AGAIN):
        assert not judgement.nothing_made
        asked.append(judgement.step)
        if judgement.step is Step.PROVE_ABSENCE:
            attempt = replace(attempt, vmid_is_free=vmid_is_free)
        else:
            attempt = replace(attempt, doubtful=False)
    assert len(asked) == len(set(asked))


@pytest.mark.parametrize("error", [refused(VM_EXISTS), failed(VM_EXISTS), failed(VOLUME_EXISTS), failed(LOCKED)])
@pytest.mark.parametrize("vmid_is_free", [None, True, False])
def test_a_given_vmid_is_never_exchanged(error: ApiError | TaskFailed, vmid_is_free: bool | None) -> None:
    attempt = replace(ACCEPTED, vmid_given=True, vmid_is_free=vmid_is_free)
    assert judge_refusal(error, attempt).step is not Step.TAKE_ANOTHER_VMID


FULL = {
    "dir": "clone failed: unable to create image: No space left on device",
    "dir, qemu-img": "qemu-img: error while writing at byte 0: No space left on device",
    "dir, quota": "qemu-img: Could not write: Disk quota exceeded",
    "LVM": 'Volume group "pve" has insufficient free space (10 extents): 8192 required.',
    "LVM, extents": "Insufficient suitable allocatable extents for logical volume vm-1000-disk-0: 512 more required",
    "LVM-thin": "Cannot create new thin volume, free space in thin pool pve/data reached threshold.",
    "LVM-thin, data": "device-mapper: thin pool pve-data-tpool is out of data space",
    "LVM-thin, metadata": "Thin pool pve-data-tpool metadata is full",
    "LVM-thin, growing": "Insufficient free space: 2560 extents needed, but only 12 available",
    "ZFS": "cannot create 'rpool/data/vm-100-disk-0': out of space",
    "ZFS, clone": "zfs error: cannot create 'rpool/data/vm-1000-disk-0': out of space",
    "ZFS, volsize": "cannot set property for 'rpool/data/vm-1000-disk-0': size is greater than available space",
    "ZFS, quota": "zfs error: cannot create 'rpool/data/vm-1000-disk-0': dataset quota exceeded",
    "Ceph": "rbd: copy failed: (28) No space left on device",
    "Ceph, quota": "rbd: create error: (122) Disk quota exceeded",
    "Ceph, pool": "pool 'vms' is full (reached quota's max_bytes: 10 GiB)",
    "Ceph, OSD": "HEALTH_ERR 1 full osd(s): osd.3 is full at 95%",
}
# What a clone on LVM-thin warns of in its log, however much room there is, and other words that look like it.
NOT_FULL = (
    "WARNING: You have not turned on protection against thin pools running out of space.",
    "WARNING: Set activation/thin_pool_autoextend_threshold below 100 to trigger automatic extension of thin pools "
    "before they get full.",
    "WARNING: Sum of all thin volume sizes (64.00 GiB) exceeds the size of thin pool pve/data and the size of whole "
    "volume group (<50.00 GiB).",
    'Logical volume "vm-1000-disk-0" created in thin pool pve/data successfully',
    "osd.3: map 44 fetched successfully",
    "create full clone of drive scsi0 (local-lvm:vm-9000-disk-0)",
    "unable to create image: storage 'pool1' is not online",
)


@pytest.mark.parametrize("kind", FULL)
def test_what_a_full_storage_says(kind: str) -> None:
    assert answers.is_storage_full(FULL[kind])
    # Warnings of LVM stand in the same log.
    assert answers.is_storage_full(" | ".join([*NOT_FULL, FULL[kind]]))
    assert answers.is_storage_full(f"{FULL[kind]}. Its log ends: {' | '.join(NOT_FULL)}")


@pytest.mark.parametrize("text", NOT_FULL)
def test_what_a_storage_with_room_says(text: str) -> None:
    assert not answers.is_storage_full(text)
    assert not answers.is_storage_full(f"clone failed: interrupted by signal. Its log ends: {' | '.join(NOT_FULL)}")
