# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The double answers as the real API did: 379 requests that were recorded on Proxmox VE 9.2, and what became of
their tasks.

``tests/recorded/https.json`` holds requests and answers in the order in which they were made, ``tasks.json`` the tasks
that they began.
One double is played all of them in that order. STAGE brings about what a person did between two requests. Compared are
the status, the reason, the error texts of parameters, the shape of the body (keys and types), and of each task its
type, its exit status and the keys of its status.

DIFFERENCES lists what the double answers otherwise, and why. An entry that no longer differs fails the test, as does a
difference that is not listed.
"""

from __future__ import annotations

import http.client
import json
import re
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import pytest

from support.proxmox_double import DoubleServer, ProxmoxDouble

FOLDER = Path(__file__).parents[1] / "recorded"
ANSWERS: list[dict[str, Any]] = json.loads((FOLDER / "https.json").read_text(encoding="utf-8"))
TASKS: list[dict[str, Any]] = json.loads((FOLDER / "tasks.json").read_text(encoding="utf-8"))
MIB = 1024**2
SECRET = "0d9f3b52-made-up-for-tests"
# Bodies in which the keys are what somebody once configured: only these are compared.
CONFIG_KEYS = {
    "digest",
    "lock",
    "description",
    "tags",
    "name",
    "vmstate",
    "runningmachine",
    "runningcpu",
    "parent",
    "snaptime",
    "memory",
    "smbios1",
}
# Keys that a row has or lacks by what was once configured.
OPTIONAL = {"tags", "pool", "lock"}


def name_of(answer: dict[str, Any]) -> str:
    return str(answer["case"])


# ---------------------------------------------------------------------- the stage


def user_of(who: str | None) -> str:
    """Return the token with which a recorded request was made."""
    return "root@pam!lab" if who is None else f"{who}@pve!rec"


def set_up(pve: ProxmoxDouble) -> None:
    """Build the cluster as it stood before the first request."""
    pve.add_node("pve2")
    pve.strict_targets = True
    del pve.storages["local-lvm"]
    local = pve.storages["local"]
    local.update({"content": "rootdir,images,iso,backup,snippets,vztmpl,import", "avail": 10**12, "total": 10**13})
    pve.storages["tiny"] = {
        "type": "dir",
        "active": 1,
        "content": "images",
        "path": "/srv/tiny",
        "avail": 40 * MIB,
        "files": set(),
    }
    pve.storages["fast"] = {
        "type": "dir",
        "active": 1,
        "content": "images",
        "path": "/srv/fast",
        "avail": 10**12,
        "files": set(),
    }
    pve.add_template(9050, "tpl-agent", storage="local")
    pve.add_template(9002, "tpl-raw", storage="local")
    pve.add_template(9003, "tpl-2", storage="local", node="pve2")
    pve.add_guest(9051, "no-template", storage="local")
    pve.add_guest(
        1153, "h1", node="pve2", storage="local", status="running", pool="agentlab", config={"tags": "agentlab"}
    )
    pve.pools["rec"] = set()
    pve.pool_info["rec"] = {"comment": None, "storage": set()}
    for who in ("none", "run", "ga1", "ga2", "ga3", "ga4", "disk", "tag"):
        pve.add_token(user_of(f"rec-{who}"), SECRET)
    pve.add_token("root@pam!lab", SECRET)
    run = user_of("rec-run")
    pve.grant(run, "/", "Sys.Audit", "VM.Audit")
    pve.grant(run, "/vms/9050", "VM.Audit", "VM.Clone")
    privs = (
        "VM.Audit",
        "VM.Allocate",
        "VM.PowerMgmt",
        "VM.Config.Options",
        "VM.Config.CPU",
        "VM.Config.Memory",
        "VM.Config.Disk",
    )
    pve.grant(
        run, "/pool/rec", *privs, "VM.Config.Network", "VM.Config.Cloudinit", "VM.Snapshot", "VM.GuestAgent.Audit"
    )
    pve.grant(run, "/storage/local", "Datastore.AllocateSpace")
    pve.grant(run, "/sdn/zones/localnetwork/vmbr0", "SDN.Use")
    for number, priv in enumerate(("Audit", "FileRead", "FileWrite", "Unrestricted"), 1):
        pve.grant(user_of(f"rec-ga{number}"), "/vms/5000", f"VM.GuestAgent.{priv}")
    pve.grant(user_of("rec-disk"), "/", "VM.PowerMgmt", "VM.Config.Disk", "VM.Audit")
    pve.grant(user_of("rec-tag"), "/", "Sys.Audit", "VM.Audit", "VM.Config.Options")


def guest(vmid: int, **values: Any) -> Callable[[ProxmoxDouble], None]:
    """Return a stage direction: this VM is there, as said, in place of whatever had its VMID."""

    def act(pve: ProxmoxDouble) -> None:
        pve.remove_vm(vmid)
        config = {
            "agent": "1",
            "serial0": "socket",
            "memory": "192",
            "meta": "creation-qemu=10.0.13,ctime=1",
            "net0": "virtio=BC:24:11:00:00:01,bridge=vmbr0",
        }
        # A copy: the recording may be played more than once in a process.
        more = {"name": f"rec-{vmid}", **values}
        pool = more.pop("pool", None)
        volume = pve._cloudinit_volume("local", vmid)
        config.update({"ide2": f"{volume},media=cdrom", **more.pop("config", {})})
        pve.add_guest(vmid, storage="local", config=config, **more)
        if pool:
            pve.pools[pool].add(vmid)
            pve.vm(vmid).pool = pool

    return act


def change(vmid: int, **values: Any) -> Callable[[ProxmoxDouble], None]:
    """Return a stage direction: attributes of a VM (config is merged)."""

    def act(pve: ProxmoxDouble) -> None:
        vm = pve.vm(vmid)
        vm.config.update(values.get("config", {}))
        for key, value in values.items():
            if key != "config":
                setattr(vm, key, value)

    return act


def each(*acts: Callable[[ProxmoxDouble], None]) -> Callable[[ProxmoxDouble], None]:
    def act(pve: ProxmoxDouble) -> None:
        for one in acts:
            one(pve)

    return act


def agent(vmid: int, **values: Any) -> Callable[[ProxmoxDouble], None]:
    """Return a stage direction: the VM runs and its agent answers."""

    def act(pve: ProxmoxDouble) -> None:
        vm = pve.vm(vmid)
        pve.power(vmid, "running")
        vm.lock = None
        vm.config.pop("lock", None)
        vm.agent = {
            "interfaces": [
                {"name": "lo", "hardware-address": "00:00:00:00:00:00", "ip-addresses": [], "statistics": {}}
            ],
            "os": {"machine": "x86_64", "kernel-version": "#1", "kernel-release": "6.1", "id": "debian"},
            "get-host-name": {"host-name": "(none)"},
            "files": {"/tmp/a": "hello\n", "/tmp/b": "\x00\xff\xc3\xa4", "/dev/null": ""},
            **values,
        }

    return act


def missing_quorum(pve: ProxmoxDouble) -> None:
    for vmid in (5000, 5004, 5005):
        guest(vmid)(pve)
    pve.power(5000, "running")
    pve.nodes["pve2"]["online"] = False
    pve.lose_quorum()


def quorum_back(pve: ProxmoxDouble) -> None:
    pve.regain_quorum()
    pve.cached_quorate = 0


def whole_again(pve: ProxmoxDouble) -> None:
    pve.cached_quorate = None
    pve.nodes["pve2"]["online"] = True
    guest(5050, status="running", config={"agent": "0"})(pve)


def snippet_missing(pve: ProxmoxDouble) -> None:
    change(5004, config={"cores": 1, "cicustom": "user=local:snippets/nope.yaml"}, start_error=None)(pve)


def abort_clone(pve: ProxmoxDouble) -> None:
    """Abort the clone as `DELETE` of its task does."""
    upid = pve.running_tasks("qmclone")[0]
    pve.kill_task(upid, "clone failed: copy failed: command '/usr/bin/qemu-img convert' failed: interrupted by signal")


def being_cloned(pve: ProxmoxDouble) -> None:
    pve.next_task("qmclone", "hang")


def join_pool(vmid: int) -> Callable[[ProxmoxDouble], None]:
    def act(pve: ProxmoxDouble) -> None:
        pve.pools["rec"].add(vmid)
        pve.vm(vmid).pool = "rec"

    return act


def raw_disk(pve: ProxmoxDouble) -> None:
    pve.vm(5060).config["scsi1"] = pve._disk("local", "5060/vm-5060-disk-1.raw", 5060, MIB) + ",size=1M"


# What a person did before a request, by the request's case.
STAGE: dict[str, Callable[[ProxmoxDouble], None]] = {
    "pools, one": lambda pve: None,
    "clone without any right": lambda pve: pve.remove_vm(5090) and None,
    "config": change(5000, config={"agent": "1", "serial0": "socket", "memory": "192"}),
    "config of a VM on a node whose proxy does not answer": lambda pve: (
        pve.fault("GET", "/qemu/5010/config", "hang", seconds=0.05) and None
    ),
    "config of a locked VM": guest(5003, lock="backup"),
    "start": change(5001, config={"cores": 1}),
    "config of a VM on the other node": guest(5010, name="rec-2", node="pve2"),
    "start of a VM on the other node": lambda pve: None,
    "start with more cores than the node has": each(
        guest(5004, config={"cores": 3}), lambda pve: pve.node_figures.update(pve1={"maxcpu": 2})
    ),
    "start, QEMU refuses its command line": change(
        5004, config={"cores": 1}, start_error="start failed: QEMU exited with code 1"
    ),
    "start, cicustom with a missing file": snippet_missing,
    "shutdown, guest answers": each(
        lambda pve: pve.power(5001, "running"), guest(5007, status="running"), change(5007, acpi=False)
    ),
    "shutdown, guest does not answer, forceStop": lambda pve: pve.power(5007, "running"),
    "suspend todisk": each(
        lambda pve: pve.power(5001, "running"),
        lambda pve: setattr(
            pve,
            "hibernation_error",
            "VM 5001 qmp command 'savevm-start' failed - The command savevm-start has not been found",
        ),
    ),
    "resize": guest(5002, size=64 * MIB),
    "DELETE, protected": change(5002, config={"protection": 1}),
    "DELETE, running": each(change(5002, config={"protection": 0}), lambda pve: pve.power(5002, "running")),
    "storage list of a node": each(guest(5005), guest(5006)),
    "config PUT, attach a foreign volume, VM.Config.Disk on the owner missing": join_pool(5006),
    "DELETE, a disk cannot be freed": lambda pve: pve.task_warnings.update(qmdestroy=1),
    "firewall options": lambda pve: pve.task_warnings.clear(),
    "no quorum: agent exec": guest(5051),
    "stop of a locked, running VM": lambda pve: pve.power(5003, "running"),
    "agent ping, VM stopped": lambda pve: pve.power(5000, "stopped"),
    "agent ping": agent(5000),
    "agent exec, VM paused": lambda pve: pve.power(5000, "paused"),
    "agent exec, VM with lock backup": each(lambda pve: pve.power(5000, "running"), change(5000, lock="backup")),
    "agent ping, agent: 0 written while the VM runs": each(
        change(5000, lock=None), lambda pve: pve.vm(5000).pending.update(agent="0")
    ),
    "agent ping, switched on again": lambda pve: pve.vm(5000).pending.clear(),
    "agent ping, not answering": lambda pve: pve.power(5007, "running"),
    "agent exec, blocked by the guest": change(5000, agent_blocks=("exec", "exec-status", "file-read", "file-write")),
    "snapshot create": guest(5060, config={"description": "before", "tags": "a"}),
    "snapshot create, a disk without the feature": raw_disk,
    "feature snapshot, yes": lambda pve: pve.vm(5060).config.pop("scsi1"),
    "config, hibernated": each(
        guest(5080, name="rec-hib", pool="rec"),
        lambda pve: pve.hibernate(5080),
        change(5080, start_error="start failed: QEMU exited with code 1"),
    ),
    "suspend todisk, no rights": each(agent(5000), change(5000, agent_blocks=())),
    "config PUT, tags not allowed (user-tag-access none)": each(
        guest(5082, config={"tags": "old"}), lambda pve: setattr(pve, "tag_access", "none")
    ),
    "cluster/options, user-tag-access: list": lambda pve: (
        setattr(pve, "tag_access", "list"),
        setattr(pve, "tag_allow_list", {"agentlab", "free1"}),
    )[0],
    "node status": lambda pve: setattr(pve, "tag_access", "free"),
    "cluster/resources type=node, a node in HA maintenance": lambda pve: pve.maintenance.add("pve2"),
    "cluster/ha/status/current, no rights": lambda pve: pve.maintenance.clear(),
    "no quorum: cluster/status": missing_quorum,
    "quorum regained by pvecm expected 1: cluster/status": quorum_back,
    "agent ping, started with agent: 0": whole_again,
    "agent ping, started without agent": lambda pve: pve.vm(5050).config.pop("agent"),
    "clone full, aborted afterwards": being_cloned,
    "status/current of a VM on the other node": lambda pve: (
        [pve.vm(5010).config.pop(key) for key in ("agent", "serial0")] and None
    ),
    "suspend todisk, unknown statestorage": each(lambda pve: pve.power(5000, "running"), abort_clone),
}


# ---------------------------------------------------------------------- asking


class Asker:
    """Plays recorded requests to the double, each on a connection of its own."""

    def __init__(self, server: DoubleServer) -> None:
        self._server = server
        self._where = urlsplit(server.url).netloc
        self._tls = ssl.create_default_context(cafile=server.cafile)
        # Ids and digests of the recording -> those of the double.
        self.upids: dict[str, str] = {}
        self.digests: dict[str, str] = {}
        self.pids: dict[int, int] = {}

    def ask(self, request: dict[str, Any], case: str = "") -> tuple[int, str, Any]:
        """Send a recorded request. Return status, reason and body ("" where there is none)."""
        path = request["path"]
        for recorded, own in self.upids.items():
            path = path.replace(recorded, own)
        values = [
            (key, item)
            for key, value in request["params"].items()
            for item in (value if isinstance(value, list) else [value])
        ]
        values = [(key, self.digests.get(str(value), value)) for key, value in values]
        values = [(key, self.pids.get(value, value) if key == "pid" else value) for key, value in values]
        values = [
            (key, re.sub(r"^\((\d+) characters\)$", lambda m: "x" * int(m[1]), str(value))) for key, value in values
        ]
        sent = urlencode(values)
        path = quote(path, safe="/:!@")
        headers = self._headers(request, case)
        connection = http.client.HTTPSConnection(self._where, timeout=20, context=self._tls)
        try:
            if request["method"] in ("GET", "DELETE"):
                connection.request(request["method"], f"{path}?{sent}" if sent else path, headers=headers)
            else:
                form = {"Content-Type": "application/x-www-form-urlencoded"}
                connection.request(request["method"], path, sent, {**headers, **form})
            answer = connection.getresponse()
            text = answer.read().decode()
        finally:
            connection.close()
        try:
            return answer.status, answer.reason, json.loads(text) if text else ""
        except ValueError:
            return answer.status, answer.reason, text

    def _headers(self, request: dict[str, Any], case: str) -> dict[str, str]:
        who = request.get("as")
        if "ticket" in case:
            ticket = (
                "nonsense" if "malformed" in case else self._server.call(self._server.pve.issue_ticket, "root@pam")[0]
            )
            return {"Cookie": f"PVEAuthCookie={ticket}"}
        tokens = {
            "wrong": "root@pam!lab=not-the-secret",
            "unknown": f"root@pam!unknown={SECRET}",
            "nouser": f"nobody@pve!rec={SECRET}",
            "malformed": "nonsense",
            "norealm": f"root!lab={SECRET}",
        }
        if who == "nobody":
            return {}
        return {"Authorization": "PVEAPIToken=" + tokens.get(str(who), f"{user_of(who)}={SECRET}")}


def play(server: DoubleServer) -> dict[str, dict[str, Any]]:
    """Play the whole recording. Return by case what was recorded and what the double said."""
    asker = Asker(server)
    recorded_tasks = {
        answer["body"]["data"]["upid"]: answer["body"]["data"]
        for answer in TASKS
        if answer["case"].endswith(": status") and answer["status"] == 200
    }
    played: dict[str, dict[str, Any]] = {}
    for answer in ANSWERS:
        case = name_of(answer)
        if case in STAGE:
            server.call(STAGE[case], server.pve)
        status, reason, body = asker.ask(answer["request"], case)
        if "exec-status" in case and status == answer["status"] == 200:
            # The recording asked when the command had ended; the double's guest really runs it.
            for _try in range(100):
                if body["data"]["exited"] == answer["body"]["data"]["exited"]:
                    break
                time.sleep(0.05)
                status, reason, body = asker.ask(answer["request"], case)
        said: dict[str, Any] = {"status": status, "reason": reason, "body": body}
        told = answer["body"]
        if status == 200 and isinstance(told, dict) and isinstance(body, dict):
            upid, own = told.get("data"), body.get("data")
            if isinstance(upid, str) and upid.startswith("UPID:") and isinstance(own, str):
                asker.upids[upid] = own
                said["recorded_task"] = recorded_tasks.get(upid)
                said["task"] = server.pve.tasks.get(own)
                said["view"] = asker.ask(
                    {"method": "GET", "path": f"/api2/json/nodes/{own.split(':')[1]}/tasks/{own}/status", "params": {}}
                )[2]
            if isinstance(upid, dict) and "pid" in upid and isinstance(own, dict) and "pid" in own:
                asker.pids[upid["pid"]] = own["pid"]
            if isinstance(upid, dict) and "digest" in upid and isinstance(own, dict) and "digest" in own:
                asker.digests[upid["digest"]] = own["digest"]
        played[case] = {"recorded": answer, "said": said}
    return played


# ---------------------------------------------------------------------- comparing


def plain(text: Any) -> str:
    """Return a text without what differs by nature: process ids, and line feeds at the end."""
    return re.sub(r"\.tmp\.\d+", ".tmp.N", str(text)).strip()


def type_of(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value)
    return "number" if isinstance(value, int | float) else type(value).__name__


def shape(value: Any, *, config: bool = False) -> Any:
    """Return keys and types of a value; rows of a list are taken together, by their `type` where they have one."""
    if isinstance(value, list):
        rows = [row for row in value if isinstance(row, dict)]
        if not rows:
            return sorted({type_of(row) for row in value})
        kinds: dict[str, dict[str, Any]] = {}
        for row in rows:
            kinds.setdefault(str(row.get("type", "")), {}).update(shape(row, config=config))
        return kinds
    if isinstance(value, dict):
        return {key: type_of(item) for key, item in sorted(value.items()) if not config or key in CONFIG_KEYS}
    return type_of(value)


def differences(played: dict[str, Any]) -> dict[str, str]:
    """Return what differs between the recorded answer and the double's, by what it is."""
    recorded, said = played["recorded"], played["said"]
    found: dict[str, str] = {}

    def differ(what: str, there: Any, here: Any) -> None:
        if there != here:
            found[what] = f"recorded {there!r}, double {here!r}"

    differ("status", recorded["status"], said["status"])
    differ("reason", plain(recorded["reason"]), plain(said["reason"]))
    there, here = recorded["body"], said["body"]
    if isinstance(there, dict) and isinstance(here, dict):
        differ(
            "errors",
            {key: plain(text) for key, text in (there.get("errors") or {}).items()},
            {key: plain(text) for key, text in (here.get("errors") or {}).items()},
        )
        if said["status"] == recorded["status"]:
            config = "/config" in recorded["request"]["path"] and recorded["request"]["method"] == "GET"
            compare_shapes(
                found,
                shape(there.get("data"), config=config),
                shape(here.get("data"), config=config),
                str(recorded.get("note", "")),
            )
    else:
        differ("body", type_of(there), type_of(here))
    task, own = said.get("recorded_task"), said.get("task")
    if task is not None:
        differ("task type", task["type"], (own or {}).get("type"))
        differ("task exit status", plain(task.get("exitstatus")), plain((own or {}).get("exitstatus")))
        if own is not None and own["status"] == "stopped" and said["view"]["data"].get("status") == "stopped":
            compare_keys(found, "task", shape(task), shape(said["view"]["data"]), "")
    return found


def compare_shapes(found: dict[str, str], there: Any, here: Any, note: str) -> None:
    """Compare keys and types. A list or an object that was cut in the recording is compared in what is left of it."""
    if (
        isinstance(there, dict)
        and isinstance(here, dict)
        and there
        and here
        and all(isinstance(item, dict) for item in [*there.values(), *here.values()])
    ):
        for kind in sorted(set(there) & set(here)):
            compare_keys(found, f"rows {kind}".strip(), there[kind], here[kind], note)
        only = set(there) ^ set(here)
        if only and "kept" not in note:
            found["kinds of rows"] = f"recorded {sorted(there)}, double {sorted(here)}"
        return
    if isinstance(there, dict) and isinstance(here, dict):
        compare_keys(found, "data", there, here, note)
    elif there != here and [] not in (there, here) and {} not in (there, here):
        found["data"] = f"recorded {there!r}, double {here!r}"
    elif there != here and (there in ([], {})) != (here in ([], {})):
        found["empty"] = f"recorded {there!r}, double {here!r}"


def compare_keys(found: dict[str, str], what: str, there: dict[str, str], here: dict[str, str], note: str) -> None:
    missing, more = sorted(set(there) - set(here)), sorted(set(here) - set(there))
    if missing:
        found[f"{what}: missing"] = ", ".join(missing)
    more = [key for key in more if key not in OPTIONAL]
    if more and "cut" not in note and "kept" not in note:
        found[f"{what}: more"] = ", ".join(more)
    wrong = sorted(
        f"{key} is {there[key]}, double {here[key]}" for key in set(there) & set(here) if there[key] != here[key]
    )
    if wrong:
        found[f"{what}: types"] = ", ".join(wrong)


@pytest.fixture(scope="module")
def played() -> Iterator[dict[str, dict[str, Any]]]:
    with DoubleServer(setup=set_up) as server:
        yield play(server)


# ---------------------------------------------------------------------- the test


def test_the_recording_can_be_played_again_in_the_same_process() -> None:
    """A worker that is handed tests of this module in two lots sets up `played` twice."""
    stories = []
    for _time in range(2):
        with DoubleServer(setup=set_up) as server:
            stories.append({case: differences(answer) for case, answer in play(server).items()})
    assert stories[0] == stories[1]


AGENT = "the double tells that refusal in other words than the agent"
# Case -> (what differs, why the double may answer otherwise).
DIFFERENCES: dict[str, tuple[set[str], str]] = {
    "cluster/resources wrong type": ({"status", "reason", "errors"}, "the product asks for vm, node and storage only"),
    "node that does not exist": ({"reason"}, "the end of the text is the resolver's own and differs from host to host"),
    "clone full, format of its own": (
        {"task exit status"},
        "the text names the command that failed; the double runs none",
    ),
    "config PUT, parameter errors": (
        {"errors"},
        "texts of nested formats differ by release; the names of the parameters agree",
    ),
    "status/current after a failed hibernation": (
        {"data: more"},
        "recorded in the first second of a start, before the guest's figures",
    ),
    "storage content, of one VMID": (
        {"rows: types"},
        "a linked clone's parent is not told by the double; the product does not read it",
    ),
    "storage alloc, full storage": (
        {"status", "reason"},
        "a directory takes a sparse image of any size; in the double storages can be full",
    ),
    "storage alloc, on the other node": (
        {"status", "reason"},
        "the double keeps one set of volume names for all nodes of a local storage",
    ),
    "firewall groups of the cluster": ({"empty"}, "the cluster of the recording had a group from before"),
    "snapshot config": ({"data: more"}, "fakepve adds a digest"),
    "clone linked of a snapshot, qcow2 directory": (
        {"reason"},
        "the double's names of linked volumes lack the base volume",
    ),
    "node status": ({"data: missing"}, "the product reads memory and CPUs only"),
    "clone full, aborted afterwards": (
        {"task exit status"},
        "the text names the files of the copy; the double copies none",
    ),
    "agent exec, no such program": ({"status", "reason", "body"}, AGENT),
    "agent file-write, blocked by the guest": ({"reason"}, AGENT),
}


def test_the_list_of_differences_names_recorded_cases() -> None:
    assert set(DIFFERENCES) <= {name_of(answer) for answer in ANSWERS}
    assert set(STAGE) <= {name_of(answer) for answer in ANSWERS}
    assert all(why for _what, why in DIFFERENCES.values()) and len({name_of(answer) for answer in ANSWERS}) == len(
        ANSWERS
    )


@pytest.mark.parametrize("case", [name_of(answer) for answer in ANSWERS])
def test_the_double_answers_as_the_real_api_did(played: dict[str, dict[str, Any]], case: str) -> None:
    found = differences(played[case])
    listed = DIFFERENCES.get(case, (set(), ""))[0]
    unexpected = {what: text for what, text in found.items() if what not in listed}
    assert not unexpected, unexpected
    assert set(found) == listed, f"no longer differs: {listed - set(found)}; take it off the list"


# ---------------------------------------------------------------------- tasks

TASK_CASES = [
    answer for answer in TASKS if not re.search(r": (status|log)$", answer["case"]) and "later" not in answer["case"]
]
RUNNING = "UPID:pve1:000079BC:000E0D84:6B0A6443:qmshutdown:5007:root@pam!lab:"
TASK_DIFFERENCES: dict[str, tuple[set[str], str]] = {
    "running: in the list of all": ({"rows qmshutdown: missing"}, "older tasks of that VM were in the list"),
    "list: errors only": ({"kinds of rows"}, "other tasks had failed before"),
}


@pytest.fixture(scope="module")
def tasks_played() -> Iterator[dict[str, dict[str, Any]]]:
    """A shutdown that hangs, asked for, aborted, and looked up again."""
    with DoubleServer(setup=set_up) as server:
        server.call(guest(5007, status="running"), server.pve)
        server.pve.next_task("qmshutdown", "hang")
        asker = Asker(server)
        began = asker.ask({"method": "POST", "path": "/api2/json/nodes/pve1/qemu/5007/status/shutdown", "params": {}})
        asker.upids[RUNNING] = began[2]["data"]
        played = {}
        for answer in TASK_CASES:
            request = dict(answer["request"])
            request["params"] = {
                key: value for key, value in request["params"].items() if key not in ("since", "until")
            }
            status, reason, body = asker.ask(request)
            played[name_of(answer)] = {"recorded": answer, "said": {"status": status, "reason": reason, "body": body}}
        yield played


@pytest.mark.parametrize("case", [name_of(answer) for answer in TASK_CASES])
def test_the_double_speaks_of_tasks_as_the_real_api_did(tasks_played: dict[str, dict[str, Any]], case: str) -> None:
    found = differences(tasks_played[case])
    listed = TASK_DIFFERENCES.get(case, (set(), ""))[0]
    assert {what: text for what, text in found.items() if what not in listed} == {} and set(found) == listed
