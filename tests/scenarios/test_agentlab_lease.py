# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""agentlab_lease in real playbooks: renewing, repeating, capping, refusing, losing against expiry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.play import REPO, run_play
from support.story import edit, task, writes, written

LEASE = "agentlab_lease"
PLAYBOOKS = REPO / "playbooks"


@pytest.mark.everyday
def test_a_lease_is_renewed_and_shortened_only_when_asked(story: Any, given: Any, env: Any, server: Any) -> None:
    given(3)
    seen: dict[str, Any] = {}

    def note(name: str) -> Any:
        return lambda: seen.update({name: written(env["AGENTLAB_DATABASE"])})

    run = story(
        [
            task("would renew", LEASE, vmid=1000, ttl="2h", check=True, diff=True, before=note("start")),
            task("renew", LEASE, vmid=1000, ttl="2h", diff=True, before=note("after check")),
            task("renew again", LEASE, vmid=1000, ttl="2h", diff=True, before=note("renewed")),
            task("never shorter", LEASE, vmid=1000, ttl="30m", before=note("again")),
            task("shorter when asked", LEASE, vmid=1000, ttl="30m", allow_shorten=True),
            task("enough left", LEASE, vmid=1000, ttl="4h", min_remaining="20m"),
            task("not enough left", LEASE, vmid=1000, ttl="4h", min_remaining="1h"),
            task("none", LEASE, vmids=[], ttl="2h"),
            task("one of many", LEASE, vmids=[1001], ttl=120),
            task("three", LEASE, vmids=[1000, 1001, 1002], ttl="300"),
            task("three again", LEASE, vmids=[1000, 1001, 1002], ttl="300"),
            task("unknown", LEASE, vmids=[1000, 1777], ttl="10h", fails=True),
            task("state as it was", "agentlab_sandbox_info", vmid=1000),
        ]
    )
    assert seen["start"] == seen["after check"] and seen["renewed"] == seen["again"] != seen["start"]
    assert sum(sum(found.values()) for found in run.requests.values()) == 0, (
        "the records answer everything about leases"
    )
    for name in ("would renew", "renew"):
        assert (
            run.status(name) == "changed"
            and run[name]["results"][0]["granted_seconds"] == 7200
            and run[name]["results"][0]["capped"] is False
        )
        before, after = (run[name]["diff"][side]["sandbox 1000"]["lease_expires_at"] for side in ("before", "after"))
        assert before < after == run[name]["results"][0]["lease_expires_at"]
    assert run["renew"]["sandbox"]["lease_expires_at"] == run["renew"]["results"][0]["lease_expires_at"]
    assert run["renew again"]["diff"] == {"before": {}, "after": {}}
    for name in ("renew again", "never shorter", "enough left", "none", "three again"):
        assert run.status(name) == "ok", name
    for name in ("shorter when asked", "not enough left", "one of many", "three"):
        assert run.status(name) == "changed", name
    for name in ("none", "one of many", "three", "renew"):
        assert {"changed", "sandboxes", "results", "failed_count"} <= set(run[name])
    assert [one["vmid"] for one in run["three"]["sandboxes"]] == [1000, 1001, 1002]
    assert "sandbox not found (vmid: 1777)" in run["unknown"]["msg"]
    assert (
        run["state as it was"]["sandboxes"][0]["lease_expires_at"] == run["three"]["sandboxes"][0]["lease_expires_at"]
    )


def test_what_is_refused(story: Any, given: Any, env: Any, tmp_path: Any) -> None:
    given(1, "TIMEOUT")
    given(2)
    given(1, "STOPPED")
    edit(env, [1001], lease_expires_at=1_700_000_000)
    with (tmp_path / "config.yaml").open("a", encoding="utf-8") as config:
        config.write("max_lifetime: 3h\nmax_ttl: 1d\n")
    cases = {
        "TIMEOUT": ({"vmid": 1000, "ttl": "2h"}, "cannot renew lease in TIMEOUT state. Valid states: RUNNING"),
        "STOPPED": ({"vmid": 1003, "ttl": "2h"}, "cannot renew lease in STOPPED state. Valid states: RUNNING"),
        "expired": (
            {"vmid": 1001, "ttl": "2h"},
            "cannot renew lease of sandbox 1001: it expired at 2023-11-14T22:13:20Z and is about to become TIMEOUT. "
            "Create a new sandbox",
        ),
        "not found": (
            {"vmid": 1500, "ttl": "2h"},
            "sandbox not found (vmid: 1500). A VM without a record is never touched",
        ),
        "ttl": (
            {"vmid": 1002, "ttl": "2 hours ago"},
            "ttl: '2 hours ago' is not a duration. Valid: minutes as a number (120) or a duration such as "
            "90s, 30m, 2h, 1d12h",
        ),
        "ttl zero": (
            {"vmid": 1002, "ttl": 0},
            "ttl: '0' is zero. Valid: more than zero, minutes as a number (120) or a duration such as 90s, 30m, 2h, "
            "1d12h",
        ),
        "ttl too long": ({"vmid": 1002, "ttl": "2d"}, "ttl: '2d' is longer than the maximum of 1d"),
        "min_remaining": (
            {"vmid": 1002, "ttl": "2h", "min_remaining": "soon"},
            "min_remaining: 'soon' is not a duration. Valid: minutes as "
            "a number (120) or a duration such as 90s, 30m, 2h, 1d12h",
        ),
        "no ttl": ({"vmid": 1002}, "missing required arguments: ttl"),
        "no id": ({"ttl": "2h"}, "one of the following is required: vmid, vmids, name"),
        "two ids": ({"vmid": 1002, "vmids": [1002], "ttl": "2h"}, "parameters are mutually exclusive: vmid|vmids|name"),
    }
    before = written(env["AGENTLAB_DATABASE"])
    run = story(
        [
            *(task(name, LEASE, fails=True, **options) for name, (options, _dummy) in cases.items()),
            task("mixed", LEASE, vmids=[1002, 1000], ttl="10h", fails=True),
        ]
    )
    assert {name: run[name]["msg"] for name in cases} == {name: wanted for name, (_dummy, wanted) in cases.items()}
    assert all(run[name]["changed"] is False for name in cases if "changed" in run[name])
    mixed = run["mixed"]
    assert (
        [one["outcome"] for one in mixed["results"]] == ["renewed", "failed"]
        and mixed["changed"]
        and mixed["failed_count"] == 1
    )
    assert mixed["results"][0]["capped"] is True and 10600 <= mixed["results"][0]["granted_seconds"] <= 10800
    assert (
        mixed["msg"] == "1 of 2 sandboxes failed; the first: cannot renew lease in TIMEOUT state. Valid states: RUNNING"
    )
    assert written(env["AGENTLAB_DATABASE"]) != before and all(not writes(found) for found in run.requests.values())


def test_the_playbook_takes_what_people_paste_and_guesses_nothing(given: Any, env: Any, tmp_path: Path) -> None:
    given(2)
    answers = {"agentlab_hosts": "localhost", "sandbox_vmids": "# both\r\n- 1000\r\n- 1001 # mine\r\n"}
    playbook = PLAYBOOKS / "lease_renew.yml"
    run = run_play(playbook, env, tmp_path, extra_vars={**answers, "sandbox_ttl": " 1.5 h "})
    assert run.rc == 0, run.output
    assert [item["granted_seconds"] for item in run["Renew the leases"]["results"]] == [5400, 5400]
    # Not twelve minutes.
    wrong = run_play(playbook, env, tmp_path, extra_vars={**answers, "sandbox_ttl": "1 2"})
    assert wrong["Renew the leases"]["msg"].startswith("ttl: '1 2' is not a duration. Valid: ")
