# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What an operator reads when something outside fails: the same sentence in each of four places.

The places are a module (in a real play), the command line (with the daemon behind it), the daemon's log, and
``agentlab status``. ``KINDS`` has each kind of failure, and for each place the test that holds its sentence or the
reason why that kind cannot be met there.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import resource
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store import holders

from support.canned import Canned, Shape
from support.cli import agentlab
from support.daemon import Make, free_port
from support.failures import ROWS, Row, hide, lose_quorum
from support.lab import Lab
from support.play import Run, play

IN_TABLE = "test_the_command_line_the_log_and_the_status_say_it"
PLAY = "test_a_module_says_it"
JOBS = "test_the_log_and_the_status_say_it_of_the_daemons_own_work"
ONCE = "the request is over with its answer: nothing rests, waits or fails afterwards"
# Kind -> place -> the test of this file that holds the sentence there (or another file, and a text in it), or why the
# sentence cannot be met there.
KINDS = {
    "certificate": dict.fromkeys(
        ("module", "command line", "log", "status"), "test_a_certificate_that_cannot_be_used_is_told_with_its_cause"
    ),
    "descriptors": {
        "module": "test_a_module_without_descriptors_ends_with_a_sentence",
        **dict.fromkeys(("command line", "log", "status"), "test_no_descriptor_left"),
    },
    "proxy": {"module": PLAY, **dict.fromkeys(("command line", "log", "status"), IN_TABLE)},
    "slow": {"module": PLAY, **dict.fromkeys(("command line", "log", "status"), IN_TABLE)},
    "audit": {"module": PLAY, **dict.fromkeys(("command line", "log"), IN_TABLE), "status": JOBS},
    "full": {"module": PLAY, **dict.fromkeys(("command line", "log"), IN_TABLE), "status": f"no: {ONCE}"},
    "storage": {"module": PLAY, **dict.fromkeys(("command line", "log"), IN_TABLE), "status": f"no: {ONCE}"},
    "start": {"module": PLAY, **dict.fromkeys(("command line", "log"), IN_TABLE), "status": f"no: {ONCE}"},
    "quorum": {"module": PLAY, **dict.fromkeys(("command line", "log"), IN_TABLE), "status": JOBS},
    "clone": {
        "module": PLAY,
        **dict.fromkeys(("command line", "log"), IN_TABLE),
        "status": "no: the doctor names it from the first minute, the status once nobody finished it for an hour",
    },
    "pool": {"module": PLAY, **dict.fromkeys(("command line", "log"), IN_TABLE), "status": f"no: {ONCE}"},
    "gone": {"module": PLAY, **dict.fromkeys(("command line", "log"), IN_TABLE), "status": f"no: {ONCE}"},
    "unreadable": {
        "module": "test_records_that_this_user_may_not_read",
        "command line": "no: the daemon does not start; the command line names the commands that show its log",
        "log": "test_records_that_this_user_may_not_read",
        "status": "no: the daemon does not start",
    },
    "locked": {
        "module": "test_records_that_another_process_holds",
        "command line": "test_records_that_another_process_holds",
        "log": "test_records_that_another_process_holds",
        "status": 'test_status.py: told["condition"] == "waits" and f"process {os.getpid()}" in told["why"]',
    },
    "clock": {
        "module": "test_a_clock_that_jumped_as_modules_and_command_line_say_it",
        "command line": "test_a_clock_that_jumped_as_modules_and_command_line_say_it",
        "log": "test_a_clock_that_jumped_as_modules_and_command_line_say_it",
        "status": "test_status.py: expiry and cleanup rest until 20",
    },
    "socket": {
        "module": "no: modules use no socket",
        "command line": "test_a_socket_that_is_gone",
        "log": "test_bounds.py: was deleted; it was made anew",
        "status": "test_a_socket_that_is_gone",
    },
}


def test_every_kind_has_a_test_or_a_reason_for_each_place() -> None:
    here = Path(__file__)
    tests = set(re.findall(r"^def (test_\w+)", here.read_text(encoding="utf-8"), re.M))
    for kind, places in KINDS.items():
        assert set(places) == {"module", "command line", "log", "status"}, kind
        for place, holder in places.items():
            file, _colon, text = holder.partition(": ")
            held = file == "no" or file in tests or text in here.with_name(file).read_text(encoding="utf-8")
            assert held, f"{kind}, {place}: {holder}"
    assert {row.kind for row in ROWS.values()} == {kind for kind, places in KINDS.items() if places["module"] == PLAY}
    assert {row.kind for row in ROWS.values() if row.status} == {
        kind for kind, places in KINDS.items() if places["status"] == IN_TABLE
    }


def vmid_of(name: str, place: int) -> int:
    """Return a VMID for each row and place (0: the command line, 1: the module)."""
    return 1000 + list(ROWS).index(name) * 2 + place


def prepare(lab: Lab, place: int) -> None:
    for name, row in ROWS.items():
        if row.ask not in ("new", "workspace"):
            lab.create(f"vm{vmid_of(name, place)}", vmid=vmid_of(name, place))


def begin(lab: Lab, name: str, place: int) -> None:
    lab.calm()
    lab.pve.clear_faults()
    ROWS[name].fail(lab, vmid_of(name, place))


def sentence_of(name: str, vmid: int) -> str:
    return ROWS[name].sentence.replace("{vmid}", str(vmid))


def words(row: Row, vmid: int) -> list[object]:
    """Return the words of the command line for a row."""
    options = [word for key, value in row.options.items() for word in (f"--{key}", value)]
    return {
        "new": ["sandbox", "new", "--vmid", vmid, "--ttl", "2h", *options],
        "workspace": ["workspace", "new", "--size", "1G", *options, f"disk{vmid}"],
        "destroy": ["sandbox", "destroy", "--force", vmid],
    }.get(row.ask, ["sandbox", row.ask, vmid])


def task_of(row: Row, vmid: int) -> dict[str, Any]:
    """Return the task of a play for a row, without its name."""
    if row.ask == "workspace":
        return {"agentlab.proxmox.agentlab_workspace": {"name": f"disk{vmid}", "size": "1G", **row.options}}
    state = {"new": "present", "destroy": "absent", "start": "started", "stop": "stopped"}[row.ask]
    force = {"force": True} if row.ask == "destroy" else {}
    return {"agentlab.proxmox.agentlab_sandbox": {"vmid": vmid, "state": state, **force, **row.options}}


def test_the_command_line_the_log_and_the_status_say_it(daemon: Make, lab: Lab) -> None:
    prepare(lab, 0)
    one = daemon(api_timeout=1, reconcile_interval="1h")
    one.wait_for(lambda: one.get("/v1/status").body["reconcile"]["last_run"], "the first reconcile is over", 30)
    missing: list[str] = []
    for name, row in ROWS.items():
        vmid = vmid_of(name, 0)
        begin(lab, name, 0)
        logged = len(one.log())
        told = agentlab(*words(row, vmid), socket=one.socket)
        sentence = sentence_of(name, vmid)
        if row.status:
            told_status = agentlab("status", socket=one.socket).stdout
            if not re.search(sentence, re.sub(r"\s+", " ", told_status)):
                missing.append(f"{name}: the status says {told_status}")
        if not re.search(sentence, told.stderr) or told.returncode != (0 if row.succeeds else 1):
            missing.append(f"{name}: the command line says {told.returncode} {told.stdout}{told.stderr}")
        if not re.search(sentence, one.log()[logged:]):
            missing.append(f"{name}: the log says {one.log()[logged:]}")
    lab.calm()
    assert not missing, "\n".join(missing)
    assert "Traceback" not in one.log()


def test_a_module_says_it(lab: Lab, tmp_path: Path) -> None:
    prepare(lab, 1)
    tasks = [
        {
            "name": name,
            **task_of(row, vmid_of(name, 1)),
            "ignore_errors": True,
            "before": lambda name=name: begin(lab, name, 1),
        }
        for name, row in ROWS.items()
    ]
    (tmp_path / "config.yaml").write_text(
        "template: debian-13\ndoubt_window: 1s\nwait_timeout: 5s\nshutdown_timeout: 1s\napi_timeout: 1\n",
        encoding="utf-8",
    )
    environment = {
        **lab.server.environment(lab.folder),
        "AGENTLAB_CONFIG": str(tmp_path / "config.yaml"),
        "AGENTLAB_DATABASE": lab.database,
    }
    run: Run = play(tasks, environment, tmp_path)
    lab.calm()
    missing = []
    for name, row in ROWS.items():
        result = run[name]
        told = f"{result.get('msg')} {[one.get('message') for one in result.get('results') or ()]}"
        if not re.search(sentence_of(name, vmid_of(name, 1)), told) or (run.status(name) == "failed") is row.succeeds:
            missing.append(f"{name}: the module says {told}")
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("kind", ["audit", "quorum"])
def test_the_log_and_the_status_say_it_of_the_daemons_own_work(daemon: Make, lab: Lab, kind: str) -> None:
    """A rule destroys a sandbox whose lease is over."""
    vmid = lab.timed_out("a1").vmid
    {"audit": hide, "quorum": lose_quorum}[kind](lab, vmid)
    name = {"audit": "the token lacks VM.Audit", "quorum": "no quorum at a destroy"}[kind]
    rules = (
        "auto_cleanup:\n  enabled: true\n  interval: 1h\n  jitter: 0s\n  rules:\n"
        "    - {name: timeouts, match: {states: [TIMEOUT]}, after: 1s, action: destroy}\n"
    )
    one = daemon(cleanup=rules, reconcile_interval="1h")
    one.wait_for(lambda: one.get("/v1/status").body["reconcile"]["last_run"], "the first reconcile is over", 30)
    one.post("/v1/cleanup/run", {})
    sentence = sentence_of(name, vmid)
    assert re.search(sentence, re.sub(r"\s+", " ", agentlab("status", socket=one.socket).stdout))
    one.wait_for(lambda: re.search(sentence, one.log()), "the log says it", 30)


CERTIFICATES = {
    "it expired": (Shape(end=-2), "expired on {end}: renew it on the node (pvecm updatecerts -f), or check the date"),
    "it is not valid yet": (Shape(begin=3), "is not valid before {begin}: check the date of this host (timedatectl)"),
    "its authority expired": (
        Shape(authority_days=-2),
        "cannot be verified: the CA certificate in {ca} expired on {authority_end}. Copy the present",
    ),
    "it is for another address": (
        Shape(address="192.0.2.7"),
        "is not for 127.0.0.1, but for 192.0.2.7: set api_host to a name that is in it",
    ),
    "it is its own authority": (Shape(end=60), "is not trusted: {reason}; set ca_path to its CA"),
}


@pytest.mark.parametrize("kind", CERTIFICATES)
def test_a_certificate_that_cannot_be_used_is_told_with_its_cause(
    daemon: Make, lab: Lab, tmp_path: Path, kind: str
) -> None:
    shape, sentence = CERTIFICATES[kind]
    canned = Canned(tmp_path, lambda _sock, _head: None, shape=shape)
    environment = {"PROXMOX_PORT": str(canned.port), "PROXMOX_CA_PATH": canned.cafile}
    if "{reason}" in sentence:
        # The CA of the laboratory's own node, which has not signed it.
        environment.pop("PROXMOX_CA_PATH")
    sentence = f"the certificate of 127.0.0.1:{canned.port} {sentence}".format(
        ca=canned.cafile, reason="REASON", **canned.dates()
    )
    pattern = re.escape(sentence).replace("REASON", "[a-z -]+")
    one = daemon(environment=environment)
    told = agentlab("sandbox", "new", "--ttl", "2h", socket=one.socket)
    assert told.returncode == 1 and re.search(pattern, told.stderr), told
    assert re.search(pattern, one.log())
    assert re.search(pattern, re.sub(r"\s+", " ", agentlab("status", socket=one.socket).stdout))
    options = {
        "template": "debian-13",
        "vmid": 1000,
        "api_port": canned.port,
        "ca_path": environment.get("PROXMOX_CA_PATH"),
    }
    answer = run_module(lab, MODULE, options)
    assert re.search(pattern, answer["msg"]), answer
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


def run_module(lab: Lab, code: str, options: dict[str, Any], room: int = 99, begin: tuple[str, ...] = ()) -> Any:
    """Return what agentlab_sandbox answers in a process of its own, which may open ``room`` files more.

    ``begin``: the beginning of its command.
    """
    arguments = json.dumps({"ANSIBLE_MODULE_ARGS": {"database": lab.database, **options}})
    environment = {**os.environ, **lab.server.environment(lab.folder), "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(
        [*begin, sys.executable, "-c", code, arguments, str(room)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Traceback" not in ended.stdout + ended.stderr, ended
    return json.loads(ended.stdout)


@pytest.mark.parametrize("room", [0, 1, 2, 4])
def test_a_module_without_descriptors_ends_with_a_sentence(lab: Lab, room: int) -> None:
    options = {"vmid": 1000, "ttl": "2h", "template": "debian-13", "database": lab.database}
    answer = run_module(lab, MODULE, options, room)
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
    answer = run_module(lab, MODULE, {"vmid": 1000, "state": "stopped"}, begin=tuple(obey_modes()))
    closed.chmod(0o600)
    assert sentence in answer["msg"], answer


@pytest.mark.parametrize("words", [("status",), ("sandbox", "list")])
def test_a_socket_that_is_gone(daemon: Make, words: tuple[str, ...]) -> None:
    one = daemon()
    one.stop()
    told = agentlab(*words, socket=one.socket)
    assert told.returncode == 3
    assert f"there is no socket {one.socket}. If systemctl says that it is active, restart it" in told.stderr


def lock_records(lab: Lab) -> sqlite3.Connection:
    """Return a connection that keeps every other writer waiting until it is closed."""
    held = sqlite3.connect(lab.database, isolation_level=None, check_same_thread=False)
    held.execute("BEGIN IMMEDIATE")
    return held


def test_records_that_another_process_holds(daemon: Make, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait of a minute is two seconds here."""
    lab.create("a1")
    lab.close_contexts()
    one = daemon(start=False)
    shorter = (
        "import sys; from agentlab_core.store.sqlite import engine; engine.BUSY_SECONDS = 2.0; "
        "from agentlabd.__main__ import main; sys.exit(main())"
    )
    command = one.command()
    monkeypatch.setattr(one, "command", lambda *_arguments: [command[0], "-c", shorter, *command[3:]])
    one.start()
    one.wait_for(lambda: one.get("/v1/status").body["reconcile"]["last_run"], "the first reconcile is over", 30)
    sentence = (
        f"another process has kept it locked for 2 seconds (process {os.getpid()}, {{name}}); nothing was written. End "
        "that process, or wait until it has done, then run again"
    ).format(name=Path("/proc/self/comm").read_text().strip())
    with contextlib.closing(lock_records(lab)):
        told = agentlab("sandbox", "stop", "1000", socket=one.socket)
        assert told.returncode == 1 and sentence in told.stderr, told
        one.wait_for(lambda: sentence in one.log(), "the log says it", 20)
        code = MODULE.replace(
            "import resource, os\n",
            "import resource, os\n"
            "from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.sqlite import engine\n"
            "engine.BUSY_SECONDS = 2.0\n",
        )
        assert sentence in run_module(lab, code, {"vmid": 1000, "state": "stopped"})["msg"]


def test_a_clock_that_jumped_as_modules_and_command_line_say_it(daemon: Make, lab: Lab, tmp_path: Path) -> None:
    lab.timed_out("a1")
    boot = time.clock_gettime(time.CLOCK_BOOTTIME)
    note = {
        "boot": json.loads(holders.describe_process())["boot"],
        "offset": time.time() - boot - 600,
        "until": 0,
        "seen": boot,
        "wall": int(time.time()),
    }
    lab.context().records.set_meta(f"clock:{holders.read_host_name()}", json.dumps(note))
    lab.close_contexts()
    one = daemon()
    one.wait_for(lambda: "expiry and cleanup rest until 20" in one.log(), "the log says it", 30)
    sentence = r"the wall clock jumped by more than a minute; expiry and prune rest for another .* \(clock_jump_pause\)"
    told = agentlab("sandbox", "prune", socket=one.socket)
    assert re.search(sentence, told.stdout + told.stderr), told
    task = {"name": "prune", "agentlab.proxmox.agentlab_prune": {"database": lab.database}, "ignore_errors": True}
    result = play([task], lab.server.environment(lab.folder), tmp_path)["prune"]
    assert re.search(sentence, json.dumps(result)), result
