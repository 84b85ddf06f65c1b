# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What docs/daemon.md says of a member of the group agentlab, tried as another user in the socket's group alone."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from support.daemon import Daemon, UnixConnection, ask
from support.lab import Lab

Make = Callable[..., Daemon]
NOBODY = 65534
# A group that the test's user is no member of.
GROUP = 64123

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def as_user(groups: Sequence[int], work: Callable[[], Any]) -> Any:
    """Return what the function returns as an unprivileged user in these groups, through JSON."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # From Python 3.12 on: other threads do not run in the child. The child needs none of them.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            os.setgroups(list(groups))
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            answer = work()
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(writing, json.dumps(answer).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, encoding="utf-8") as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text)


@pytest.fixture
def one(daemon: Make, lab: Lab) -> Daemon:
    made = daemon(api_vmid_range_only=True, api_templates=["other"], api_pools=["spare"])
    os.chown(made.socket, -1, GROUP)
    return made


def call(one: Daemon, method: str, path: str, body: Any = None, *, groups: Sequence[int] = (GROUP,)) -> Any:
    """Ask as a member; the answer is (status, body)."""

    def work() -> Any:
        answer = ask(UnixConnection(one.socket), method, path, body)
        return [answer.status, answer.body]

    return as_user(groups, work)


def test_who_is_no_member_is_not_answered(one: Daemon) -> None:
    assert call(one, "GET", "/v1/healthz", groups=()).startswith("PermissionError")
    assert call(one, "GET", "/v1/healthz") == [200, {"status": "ok"}]


def test_a_member_reads_neither_the_configuration_nor_the_records(one: Daemon, lab: Lab) -> None:
    one.config_file.chmod(0o600)
    for path in (lab.database, str(one.config_file)):
        told = as_user((GROUP,), lambda path=path: os.close(os.open(path, os.O_RDONLY)))
        assert str(told).startswith(("PermissionError", "FileNotFoundError")), (path, told)


def test_no_way_round_the_limits(one: Daemon, lab: Lab) -> None:
    before = len(lab.pve.history)
    for named in (
        {"vmid": 5000},
        {"vmid": 999},
        {"template": "debian-13"},
        {"template": 9000},
        {"template": " 9000 "},
        {"template": "09000"},
        {"pool": "agents"},
        {"pool": ""},
        {"pool": "SPARE"},
        {"name": "x", "vmid": 1100, "template": "9000", "update": True},
    ):
        for body in (named, {**named, "dry_run": True}):
            status, answer = call(one, "POST", "/v1/sandboxes", body)
            assert status == 400, (body, answer)
        plan = call(one, "POST", "/v1/sandboxes/validate-plan", named)[1]
        assert plan.get("errors") or plan.get("error"), (named, plan)
    assert lab.ours() == {} and lab.records() == []
    assert not [entry for entry in lab.pve.history[before:] if entry["method"] != "GET"]


def test_a_member_may_do_the_rest_and_is_named(one: Daemon, lab: Lab) -> None:
    others = [lab.create(f"others-{number}") for number in range(2)]
    protected = lab.create("protected", protected=True)
    assert call(one, "POST", "/v1/sandboxes", {"name": "mine", "vmid": 1500})[0] == 201
    assert call(one, "POST", f"/v1/sandboxes/{others[0].vmid}/lease/renew", {"ttl": "3h"})[0] == 200
    assert call(one, "POST", f"/v1/sandboxes/{others[0].vmid}/stop")[0] == 200
    assert call(one, "POST", f"/v1/sandboxes/{others[1].vmid}/destroy", {"force": True})[0] == 200
    assert call(one, "POST", f"/v1/sandboxes/{protected.vmid}/destroy", {"force": True})[0] == 409
    # The bystander has no record.
    assert call(one, "POST", "/v1/sandboxes/500/destroy", {"force": True})[0] == 404
    assert call(one, "POST", "/v1/cleanup/freeze", {"reason": "mine"})[0] == 200
    assert call(one, "POST", "/v1/cleanup/release")[0] == 200
    assert call(one, "POST", "/v1/sandboxes/prune", {})[0] == 200
    actors = {event["actor"] for event in lab.events(others[1]) if event["operation"] == "destroy"}
    assert len(actors) == 1 and f"(uid {NOBODY}) via API" in actors.pop()
    assert f"(uid {NOBODY}) via API" in one.log()
