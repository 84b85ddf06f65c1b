# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What an operator reads when something outside fails: the same sentence from the command line, the log, the status
and a module.

Each failure is made twice, for the command line (with the daemon behind it) and for a module in a real play. What the
status says of the records, the clock and the token is in test_status.py.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.proxmox import answers

from support.canned import Canned
from support.cli import agentlab
from support.daemon import Make, free_port
from support.double import TOKEN_ID
from support.lab import Lab
from support.play import Run, play

CAUSE = "kvm: -drive file=/dev/pve/vm-1-disk-0: Could not open '/dev/pve/vm-1-disk-0': No such file or directory"
DESTROY = ("sandbox", "destroy", "--force")


@dataclass
class Row:
    """One failure: what goes wrong before sandbox ``vmid`` is asked for something, what is asked, and what is read
    then.
    """

    fail: Callable[[Lab, int], Any]
    sentence: str
    # Options of `agentlab sandbox new`, and of the module; None: the sandbox is there, and is destroyed by force.
    create: dict[str, str] | None = None
    # `agentlab status` says it, too.
    status: bool = False


def answer(lab: Lab, method: str, path: str, status: int) -> None:
    lab.pve.fault(method, path, "answer", status=status, body="<html>Bad Gateway</html>", type="text/html", times=9)


def hide(lab: Lab, vmid: int) -> None:
    for other in {9000, 500, *range(1000, 1040)} - {vmid}:
        lab.pve.grant(TOKEN_ID, f"/vms/{other}", "VM.Audit", "VM.Allocate", "VM.PowerMgmt", "VM.Config.Options")
    lab.pve.grant(TOKEN_ID, "/", "Sys.Audit")


def fail_start(lab: Lab, _vmid: int) -> None:
    lab.pve.next_task("qmstart", "fail", text="start failed: QEMU exited with code 1")
    rows = [{"n": 1, "t": CAUSE}, {"n": 2, "t": "TASK ERROR: start failed: QEMU exited with code 1"}]
    lab.pve.fault("GET", "/log", "answer", status=200, body=json.dumps({"data": rows}))


def delete_pool(lab: Lab, _vmid: int) -> None:
    lab.pve.fail("POST", "/qemu/9000/clone", 403, "Permission check failed (pool 'agents' does not exist)", times=1)


ROWS = {
    "a proxy answers 502": Row(
        lambda lab, vmid: answer(lab, "GET", f"/qemu/{vmid}/config", 502),
        r"a proxy between here and Proxmox answers 502.*; nothing was changed\. Look at pveproxy, then run again",
    ),
    "a proxy answers 503 to everything": Row(
        lambda lab, vmid: answer(lab, "GET", "", 503),
        r"a proxy between here and Proxmox answers 503.*; nothing was changed\. Look at pveproxy, then run again",
        status=True,
    ),
    "no answer in time": Row(
        lambda lab, vmid: lab.pve.fault("GET", "", "hang", seconds=2.0, times=9),
        r"no answer within 1 s \(api_timeout\); nothing was changed\. Look at pveproxy and at the load of the node, or "
        r"raise api_timeout",
        status=True,
    ),
    "the token lacks VM.Audit": Row(
        hide, r"these credentials may not see VM {vmid}: grant VM\.Audit on /vms or on its pool"
    ),
    "the storage is full": Row(
        lambda lab, vmid: lab.pve.next_task("qmclone", "fail", text="clone failed: No space left on device"),
        r"the storage is full: free space there, then run again, or give another storage with full_clone=true; what was "
        r"made for it has been removed",
        {},
    ),
    "the storage is not on that node": Row(
        lambda lab, vmid: None,
        r"storage: 'nas' is not a storage of node pve1 for disks of VMs\. Storages: local-lvm",
        {"storage": "nas"},
    ),
    "the start fails": Row(fail_start, rf"QEMU exited with code 1\. Its log ends: {re.escape(CAUSE)}", {}),
    "no quorum": Row(
        lambda lab, vmid: lab.pve.lose_quorum(),
        r"the cluster has no quorum, and takes no new VMs until it has \(pvecm status\)",
        {},
    ),
    "the clone's answer is lost": Row(
        lambda lab, vmid: lab.pve.fault("POST", "/qemu/9000/clone", "cut-before"),
        r"sandbox {vmid} \(PROVISIONING\): whether its clone was begun is not known; run again in 1 s, or reconcile "
        r"settles it",
        {},
    ),
    "the pool was deleted": Row(
        delete_pool,
        r"pool: 'agents' does not exist\. Make it \(pveum pool add agents\), or correct pool",
        {"pool": "agents"},
    ),
    "the VM is gone": Row(lambda lab, vmid: lab.pve.remove_vm(vmid), r"sandbox {vmid}: its VM was already gone"),
    "the VMID is somebody else's": Row(
        lambda lab, vmid: lab.pve.make_foreign(vmid),
        r"sandbox {vmid}: its VM was already gone; VMID {vmid} is somebody else's VM now, and was left alone",
    ),
}


def vmid_of(name: str, place: int) -> int:
    """A VMID for each row and place (0: the command line, 1: the module)."""
    return 1000 + list(ROWS).index(name) * 2 + place


def prepare(lab: Lab) -> None:
    for name, row in ROWS.items():
        if row.create is None:
            for place in (0, 1):
                lab.create(f"vm{vmid_of(name, place)}", vmid=vmid_of(name, place))


def begin(lab: Lab, name: str, place: int) -> None:
    lab.calm()
    lab.pve.clear_faults()
    ROWS[name].fail(lab, vmid_of(name, place))


def test_the_command_line_the_log_and_the_status_say_it(daemon: Make, lab: Lab) -> None:
    prepare(lab)
    one = daemon(api_timeout=1)
    one.wait_for(lambda: one.get("/v1/status").body["reconcile"]["last_run"], "the first reconcile is over", 30)
    missing: list[str] = []
    for name, row in ROWS.items():
        vmid = vmid_of(name, 0)
        begin(lab, name, 0)
        logged = len(one.log())
        if row.create is None:
            told = agentlab(*DESTROY, vmid, socket=one.socket)
        else:
            options = [word for key, value in row.create.items() for word in (f"--{key}", value)]
            told = agentlab("sandbox", "new", "--vmid", vmid, "--ttl", "2h", *options, socket=one.socket)
        sentence = row.sentence.replace("{vmid}", str(vmid))
        if row.status:
            told_status = agentlab("status", socket=one.socket).stdout
            if not re.search(sentence, re.sub(r"\s+", " ", told_status)):
                missing.append(f"{name}: the status says {told_status}")
        if not re.search(sentence, told.stderr):
            missing.append(f"{name}: the command line says {told.stdout}{told.stderr}")
        if not re.search(sentence, one.log()[logged:]):
            missing.append(f"{name}: the log says {one.log()[logged:]}")
    lab.calm()
    assert missing == []
    assert "Traceback" not in one.log()


def test_a_module_says_it(lab: Lab, tmp_path: Path) -> None:
    prepare(lab)
    tasks = []
    for name, row in ROWS.items():
        vmid = vmid_of(name, 1)
        values = {"vmid": vmid, **({"state": "absent", "force": True} if row.create is None else row.create)}
        tasks.append(
            {
                "name": name,
                "agentlab.proxmox.agentlab_sandbox": {"database": lab.database, "api_timeout": 1, **values},
                "ignore_errors": True,
                "before": lambda name=name: begin(lab, name, 1),
            }
        )
    (tmp_path / "config.yaml").write_text(
        "template: debian-13\ndoubt_window: 1s\nwait_timeout: 5s\nshutdown_timeout: 1s\n", encoding="utf-8"
    )
    environment = {**lab.server.environment(lab.folder), "AGENTLAB_CONFIG": str(tmp_path / "config.yaml")}
    run: Run = play(tasks, environment, tmp_path)
    lab.calm()
    missing = []
    for name, row in ROWS.items():
        result = run[name]
        told = f"{result.get('msg')} {[one.get('message') for one in result.get('results') or ()]}"
        if not re.search(row.sentence.replace("{vmid}", str(vmid_of(name, 1))), told):
            missing.append(f"{name}: the module says {told}")
    assert missing == []


def test_an_expired_certificate_is_told_with_its_day(daemon: Make, lab: Lab, tmp_path: Path) -> None:
    canned = Canned(tmp_path, lambda _sock, _head: None, days=-2)
    day = time.strftime("%Y-%m-%d", time.gmtime(time.time() - 2 * 86400))
    environment = {"PROXMOX_PORT": str(canned.port), "PROXMOX_CA_PATH": canned.cafile}
    one = daemon(environment=environment)
    sentence = (
        f"the certificate of 127.0.0.1:{canned.port} expired on {day}: renew it on the node (pvecm updatecerts -f), or "
        "check the date of this host"
    )
    told = agentlab("sandbox", "new", "--ttl", "2h", socket=one.socket)
    assert told.returncode == 1 and sentence in told.stderr, told
    assert sentence in one.log()
    assert sentence in re.sub(r"\s+", " ", agentlab("status", socket=one.socket).stdout)
    task = {
        "name": "new",
        "agentlab.proxmox.agentlab_sandbox": {"template": "debian-13"},
        "ignore_errors": True,
    }
    result = play([task], {**lab.server.environment(lab.folder), **environment}, tmp_path)["new"]
    assert sentence in result["msg"], result
    canned.stop()


def test_no_descriptor_left(daemon: Make, lab: Lab) -> None:
    """The daemon has no connection to Proxmox yet, and may open one file more: the connection of the client."""
    one = daemon(environment={"PROXMOX_PORT": str(free_port())}, reconcile_interval="1h")
    one.wait_for(lambda: one.get("/v1/status").body["reconcile"]["last_error"], "the first reconcile has failed", 60)
    process, sentence = one.process, "this process has no file descriptor left"
    assert process is not None
    hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)[1]

    def leave(room: int) -> None:
        """Leave the daemon so many descriptors, once it has closed what it is about to close."""
        time.sleep(0.5)
        used = {int(path.name) for path in Path(f"/proc/{process.pid}/fd").iterdir()}
        unused = [number for number in range(max(used) + 9) if number not in used]
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (unused[room], hard))

    for _attempt in range(10):
        leave(1)
        logged = len(one.log())
        told = agentlab("sandbox", "new", "--ttl", "2h", socket=one.socket)
        if sentence in told.stderr:
            break
    assert sentence in told.stderr and told.returncode == 1, told
    assert sentence in one.log()[logged:]
    # Reconcile tries again after fifteen seconds, and meets the same.
    leave(0)
    one.wait_for(lambda: f"reconcile: {sentence}" in one.log(), "reconcile meets it", 90)
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (hard, hard))
    told_status = re.sub(r"\s+", " ", agentlab("status", socket=one.socket).stdout)
    assert f"failed: {sentence}" in told_status, told_status
    assert "Traceback" not in one.log() and process.poll() is None
    assert sentence not in one.post("/v1/sandboxes", {"ttl": "2h"}).body["error"]


MODULE = """
import json, sys
from ansible.module_utils import basic
basic._ANSIBLE_ARGS, basic._ANSIBLE_PROFILE = sys.argv[1].encode(), "legacy"
from ansible_collections.agentlab.proxmox.plugins.modules import agentlab_sandbox
from ansible_collections.agentlab.proxmox.plugins.module_utils import _adapter
import resource, os
load = _adapter.core_config.load
def limit_and_load(*arguments):
    # Ansible's own part is over by now.
    used = set(map(int, os.listdir("/proc/self/fd")))
    limit = [number for number in range(400) if number not in used][int(sys.argv[2])]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    return load(*arguments)
_adapter.core_config.load = limit_and_load
def answer(self, **result):
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    print(json.dumps(result, default=str))
    sys.exit(0)
basic.AnsibleModule.fail_json = basic.AnsibleModule.exit_json = answer
agentlab_sandbox.main()
"""


@pytest.mark.parametrize("room", [0, 1, 2, 4])
def test_a_module_without_descriptors_ends_with_a_sentence(lab: Lab, room: int) -> None:
    options = {"vmid": 1000, "ttl": "2h", "template": "debian-13", "database": lab.database}
    arguments = json.dumps({"ANSIBLE_MODULE_ARGS": options})
    environment = {**os.environ, **lab.server.environment(lab.folder), "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(
        [sys.executable, "-c", MODULE, arguments, str(room)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Traceback" not in ended.stdout + ended.stderr, ended
    answer = json.loads(ended.stdout)
    assert "this process has no file descriptor left" in answer["msg"], answer


def obey_modes() -> list[str]:
    """Return the beginning of a command by which root, too, may read only what modes of files allow."""
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []


def test_records_that_this_user_may_not_read(daemon: Make, lab: Lab) -> None:
    """The log of a daemon that cannot start, and a module; there is no daemon that status could ask."""
    lab.create("a1")
    lab.close_contexts()
    closed = Path(lab.database)
    closed.chmod(0o200)
    sentence = (
        f"this user may not read {closed} (mode 0200, owner {pwd.getpwuid(closed.stat().st_uid).pw_name}); run as"
    )
    one = daemon(start=False)
    command = one.command()
    one.command = lambda *_arguments: [*obey_modes(), *command]  # type: ignore[method-assign]
    assert one.spawn().wait(60) == 1
    assert sentence in one.log() and "Traceback" not in one.log()
    told = agentlab("status", socket=one.socket)
    assert told.returncode == 3 and "journalctl -u agentlabd" in told.stderr, told
    arguments = json.dumps({"ANSIBLE_MODULE_ARGS": {"vmid": 1000, "state": "stopped", "database": lab.database}})
    environment = {**os.environ, **lab.server.environment(lab.folder), "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(
        [*obey_modes(), sys.executable, "-c", MODULE, arguments, "99"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    closed.chmod(0o600)
    assert sentence in json.loads(ended.stdout)["msg"], ended


def test_a_socket_that_is_gone(daemon: Make) -> None:
    one = daemon()
    one.stop()
    told = agentlab("sandbox", "list", socket=one.socket)
    assert told.returncode == 3
    assert f"there is no socket {one.socket}. If systemctl says that it is active, restart it" in told.stderr


@pytest.mark.parametrize(
    "text",
    [
        "clone failed: unable to create image: No space left on device",
        "qemu-img: error while writing at byte 0: No space left on device",
        'Volume group "pve" has insufficient free space (10 extents): 8192 required.',
        "Cannot create new thin volume, free space in thin pool pve/data reached threshold.",
        "cannot create 'rpool/data/vm-100-disk-0': out of space",
        "rbd: copy failed: (28) No space left on device",
        "qemu-img: Could not write: Disk quota exceeded",
    ],
)
def test_what_a_full_storage_says(text: str) -> None:
    assert answers.storage_full(text)
    assert not answers.storage_full("unable to create image: storage 'pool1' is not online")
