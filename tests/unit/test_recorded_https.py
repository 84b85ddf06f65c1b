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
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import pytest

from support.proxmox_double import DoubleServer
from support.recorded_stage import SECRET, STAGE, put_guest, set_up, user_of

FOLDER = Path(__file__).parents[1] / "recorded"
ANSWERS: list[dict[str, Any]] = json.loads((FOLDER / "https.json").read_text(encoding="utf-8"))
TASKS: list[dict[str, Any]] = json.loads((FOLDER / "tasks.json").read_text(encoding="utf-8"))

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
        server.call(put_guest(5007, status="running"), server.pve)
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
