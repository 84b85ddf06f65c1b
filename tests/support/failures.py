# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Failures outside of the product: how each is made in the laboratory, what is asked then, and what operators read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from support.double import TOKEN_ID
from support.lab import Lab

CAUSE = "kvm: -drive file=/dev/pve/vm-1-disk-0: Could not open '/dev/pve/vm-1-disk-0': No such file or directory"
NO_SPACE = "clone failed: unable to create image: No space left on device"
THIN = (
    "clone failed: lvcreate error: Cannot create new thin volume, free space in thin pool pve/data reached threshold."
)
READ_ONLY = "unable to open file '/etc/pve/nodes/pve1/qemu-server/1.conf.tmp.4711' - Permission denied"
# The sentences.
PROXY = r"a proxy between here and Proxmox answers {status} [A-Z][\w ]+; "
UNCHANGED = r"nothing was changed\. Look at pveproxy, then run again"
UNKNOWN = r"whether it was carried out is not known\. Look at pveproxy, then run again"
SLOW = (
    r"no answer within 1 s \(api_timeout\); {fate}\. Look at pveproxy and at the load of the node, or raise api_timeout"
)
CLONE_LOST = (
    r"sandbox {vmid} \(PROVISIONING\): whether its clone was begun is not known; run again in 1 s, or reconcile "
    r"settles it"
)
FULL = (
    r"the storage is full: free space there, then run again, or give another storage with full_clone=true; what was "
    r"made for it has been removed"
)
NO_POOL = r"pool: 'agents' does not exist\. Make it \(pveum pool add agents\), or correct pool"
NO_STORAGE = r"storage: '{storage}' is not a storage of node pve1 for disks of VMs\. Storages: local-lvm"


@dataclass
class Row:
    """One way in which a kind of failure comes about.

    ``fail`` makes it go wrong, ``sentence`` is what operators read. ``ask``: an operation on sandbox ``vmid``, which is
    there; "new" makes it, with ``options``; "workspace" makes a workspace.
    """

    kind: str
    fail: Callable[[Lab, int], Any]
    sentence: str
    ask: str = "destroy"
    options: dict[str, str] = field(default_factory=dict)
    # `agentlab status` says it as long as it lasts.
    status: bool = False
    # The answer is a success that the command line tells on standard output, with this sentence after it.
    succeeds: bool = False


def answer(method: str, path: str, status: int) -> Callable[[Lab, int], Any]:
    """Return a fault: a proxy answers in the place of Proxmox VE. ``{vmid}`` stands for the sandbox's VMID."""

    def fail(lab: Lab, vmid: int) -> None:
        lab.pve.fault(
            method,
            path.replace("{vmid}", str(vmid)),
            "answer",
            status=status,
            body="<html>Bad Gateway</html>",
            type="text/html",
            times=9,
        )

    return fail


def hang(method: str, path: str) -> Callable[[Lab, int], Any]:
    """Return a fault: nothing is answered to these requests for two seconds."""
    return lambda lab, vmid: lab.pve.fault(method, path.replace("{vmid}", str(vmid)), "hang", seconds=2.0, times=9)


def refuse(method: str, path: str, status: int, text: str) -> Callable[[Lab, int], Any]:
    """Return a fault: Proxmox VE refuses these requests with this status and text."""
    return lambda lab, vmid: lab.pve.fail(method, path.replace("{vmid}", str(vmid)), status, text, times=9)


def cut(kind: str) -> Callable[[Lab, int], Any]:
    """Return a fault: the connection of the clone is cut, as ``kind`` says."""
    return lambda lab, _vmid: lab.pve.fault("POST", "/qemu/9000/clone", kind)


def hide(lab: Lab, vmid: int) -> None:
    """Take the right to see VM ``vmid`` away, and leave the rights on all others."""
    for other in {9000, 500, *range(1000, 1100)} - {vmid}:
        lab.pve.grant(TOKEN_ID, f"/vms/{other}", "VM.Audit", "VM.Allocate", "VM.PowerMgmt", "VM.Config.Options")
    lab.pve.grant(TOKEN_ID, "/", "Sys.Audit")


def fail_task(kind: str, text: str, *log: str) -> Callable[[Lab, int], Any]:
    """Return a fault: the next task of that kind fails with this text, and with these lines in its log."""

    def fail(lab: Lab, _vmid: int) -> None:
        lab.pve.next_task(kind, "fail", text=text)
        if log:
            lines = [*log, f"TASK ERROR: {text}"]
            rows = [{"n": number, "t": line} for number, line in enumerate(lines, 1)]
            lab.pve.fault("GET", "/log", "answer", status=200, body=json.dumps({"data": rows}))

    return fail


def stop_first(then: Callable[[Lab, int], Any]) -> Callable[[Lab, int], Any]:
    """Return a fault that happens to a sandbox that was stopped before."""

    def fail(lab: Lab, vmid: int) -> None:
        lab.power("stop", vmid)
        then(lab, vmid)

    return fail


def lose_quorum(lab: Lab, _vmid: int) -> None:
    """Let the cluster lose its quorum."""
    lab.pve.lose_quorum()


ROWS = {
    "a proxy answers 502 to a read": Row(
        "proxy", answer("GET", "/qemu/{vmid}/config", 502), PROXY.format(status=502) + UNCHANGED
    ),
    "a proxy answers 503 to everything": Row(
        "proxy", answer("GET", "", 503), PROXY.format(status=503) + UNCHANGED, status=True
    ),
    "a proxy answers 504 to a start": Row(
        "proxy", stop_first(answer("POST", "/status/start", 504)), PROXY.format(status=504) + UNKNOWN, "start"
    ),
    "a proxy answers 503 to a stop": Row(
        "proxy", answer("POST", "/status/shutdown", 503), PROXY.format(status=503) + UNKNOWN, "stop"
    ),
    "a proxy answers 502 to a delete": Row(
        "proxy", answer("DELETE", "/qemu/{vmid}", 502), PROXY.format(status=502) + UNKNOWN
    ),
    "a proxy answers 502 to the configuration of a new VM": Row(
        "proxy", answer("PUT", "/qemu/{vmid}/config", 502), PROXY.format(status=502) + UNKNOWN, "new"
    ),
    "no answer in time to a read": Row("slow", hang("GET", ""), SLOW.format(fate="nothing was changed"), status=True),
    "no answer in time to a stop": Row(
        "slow", hang("POST", "/status/shutdown"), SLOW.format(fate="whether it was carried out is not known"), "stop"
    ),
    "the token lacks VM.Audit": Row(
        "audit", hide, r"these credentials may not see VM {vmid}: grant VM\.Audit on /vms or on its pool"
    ),
    "the token lacks VM.Audit, start": Row(
        "audit",
        stop_first(hide),
        r"these credentials may not see VM {vmid}: grant VM\.Audit on /vms or on its pool",
        "start",
    ),
    "a directory is full": Row("full", fail_task("qmclone", NO_SPACE), FULL, "new"),
    "a thin pool is full": Row("full", fail_task("qmclone", THIN), FULL, "new"),
    "ZFS is full, in the log only": Row(
        "full",
        fail_task("qmclone", "clone failed: exit code 1", "cannot create 'rpool/data/vm-1-disk-0': out of space"),
        FULL,
        "new",
    ),
    "Ceph is full": Row(
        "full", fail_task("qmclone", "clone failed: rbd: copy failed: (28) No space left on device"), FULL, "new"
    ),
    "the storage is full at a start": Row(
        "full",
        stop_first(fail_task("qmstart", "start failed: unable to write '/var/lib/vz/x': No space left on device")),
        r"No space left on device; the storage is full: free space there, then run again",
        "start",
    ),
    "the storage is not on that node": Row(
        "storage", lambda lab, vmid: None, NO_STORAGE.format(storage="nas"), "new", {"storage": "nas"}
    ),
    "the storage holds no disks": Row(
        "storage", lambda lab, vmid: None, NO_STORAGE.format(storage="local"), "new", {"storage": "local"}
    ),
    "the storage of a workspace is not on that node": Row(
        "storage", lambda lab, vmid: None, NO_STORAGE.format(storage="nas"), "workspace", {"storage": "nas"}
    ),
    "the start of a new VM fails": Row(
        "start",
        fail_task("qmstart", "start failed: QEMU exited with code 1", CAUSE),
        rf"QEMU exited with code 1\. Its log ends: {re.escape(CAUSE)}",
        "new",
    ),
    "a start fails": Row(
        "start",
        stop_first(fail_task("qmstart", "start failed: QEMU exited with code 1", CAUSE)),
        rf"QEMU exited with code 1\. Its log ends: {re.escape(CAUSE)}",
        "start",
    ),
    "no quorum at a creation": Row(
        "quorum", lose_quorum, r"the cluster has no quorum, and takes no new VMs until it has \(pvecm status\)", "new"
    ),
    "no quorum at the configuration of a new VM": Row(
        "quorum",
        refuse("PUT", "/qemu/{vmid}/config", 500, READ_ONLY),
        r"the cluster takes no changes, most likely because it has no quorum\. Look at pvecm status, then run again",
        "new",
    ),
    "no quorum at a start": Row(
        "quorum",
        stop_first(lose_quorum),
        r"sandbox {vmid} was not started: the cluster has no quorum, and Proxmox VE starts nothing without it; bring "
        r"the other nodes back \(pvecm status\), then run again",
        "start",
    ),
    "no quorum at the start of a new VM": Row(
        "quorum",
        refuse("POST", "/qemu/{vmid}/status/start", 500, "cluster not ready - no quorum?"),
        r"the cluster has no quorum, and takes no new VMs until it has \(pvecm status\)",
        "new",
    ),
    "no quorum at a destroy": Row(
        "quorum",
        lose_quorum,
        r"the cluster has no quorum; until it has, nothing is deleted and no VM counts as gone\. Look at pvecm status",
    ),
    "the clone's connection is cut": Row("clone", cut("cut-before"), CLONE_LOST, "new"),
    "a proxy answers the clone": Row("clone", answer("POST", "/qemu/9000/clone", 504), CLONE_LOST, "new"),
    "the clone is not answered in time": Row("clone", hang("POST", "/qemu/9000/clone"), CLONE_LOST, "new"),
    "the pool was deleted, root asks": Row(
        "pool",
        refuse("POST", "/qemu/9000/clone", 403, "Permission check failed (pool 'agents' does not exist)"),
        NO_POOL,
        "new",
        {"pool": "agents"},
    ),
    "the pool was deleted, a token asks": Row(
        "pool",
        refuse("POST", "/qemu/9000/clone", 403, "Permission check failed"),
        r"pool: 'agents' does not exist, or \S+ may not see it\. Make it \(pveum pool add agents\), correct pool, or",
        "new",
        {"pool": "agents"},
    ),
    "the pool was deleted during the clone": Row(
        "pool", fail_task("qmclone", "clone failed: pool 'agents' does not exist"), NO_POOL, "new", {"pool": "agents"}
    ),
    "the VM is gone": Row(
        "gone", lambda lab, vmid: lab.pve.remove_vm(vmid), r"sandbox {vmid}: its VM was already gone", succeeds=True
    ),
    "the VMID is somebody else's": Row(
        "gone",
        lambda lab, vmid: lab.pve.make_foreign(vmid),
        r"sandbox {vmid}: its VM was already gone; VMID {vmid} is somebody else's VM now, and was left alone",
        succeeds=True,
    ),
}
