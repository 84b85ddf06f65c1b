# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""agentlab_exec in real playbooks, against guests that really run the commands."""

from __future__ import annotations

import base64
import sqlite3
import uuid
from typing import Any

import pytest

from support.story import edit, task, written

EXEC = "agentlab_exec"


def runs(env: dict[str, str]) -> list[tuple[Any, ...]]:
    conn = sqlite3.connect(env["AGENTLAB_DATABASE"])
    rows = conn.execute("SELECT program, state FROM runs ORDER BY started_at, id").fetchall()
    conn.close()
    return rows


@pytest.mark.everyday
def test_a_command_and_its_answers(story: Any, given: Any, env: Any, server: Any) -> None:
    name = given(1)[0].name
    guest = server.pve.machine(1000)
    seen: dict[str, Any] = {}
    marker = guest.folder / "run" / "made"

    def note(moment: str) -> Any:
        return lambda: seen.update({moment: (written(env["AGENTLAB_DATABASE"]), len(guest.started))})

    run = story(
        [
            task("would run", EXEC, vmid=1000, argv=["touch", str(marker)], check=True, before=note("start")),
            task("run", EXEC, vmid=1000, argv=["touch", str(marker)], before=note("after check")),
            task("once is enough", EXEC, vmid=1000, argv=["touch", "x"], creates=f"{marker}*"),
            task("not there", EXEC, vmid=1000, argv=["rm", "x"], removes="/nonsense/*"),
            task("by name", EXEC, name=name, cmd="echo out; cat; echo err >&2", stdin="in ä\n"),
            task("odd", EXEC, vmid=1000, argv=["printf", "%s|", "a b", "$HOME", "", "€'\""]),
            task("bytes", EXEC, vmid=1000, cmd="printf '\\377\\000'", encoding="base64"),
            task("folder", EXEC, vmid=1000, argv=["pwd"], chdir="/tmp", environment={"A": 1}),
            task("many", EXEC, vmid=1000, cmd="head -c 5000 /dev/zero | tr '\\0' x", max_output=100),
            task("three", EXEC, vmid=1000, cmd="echo no; exit 3", fails=True),
            task(
                "three is fine", EXEC, vmid=1000, cmd="exit 3", keywords={"register": "r", "failed_when": "r.rc != 3"}
            ),
            task("too long", EXEC, vmid=1000, cmd="echo begun; sleep 60", timeout="1s", kill_after=1, fails=True),
            task("by a signal", EXEC, vmid=1000, cmd="kill -15 $$", fails=True),
            task("nothing", EXEC, vmid=1000, fails=True),
            task("unknown", EXEC, vmid=1777, argv=["true"], fails=True),
            task("bad value", EXEC, vmid=1000, argv=["true"], user="a b", fails=True),
        ]
    )
    assert seen["start"] == seen["after check"], "check mode runs nothing and writes nothing"
    assert run["would run"]["changed"] and run["would run"]["state"] == "would_run"
    assert run["run"]["changed"] and run["run"]["rc"] == 0 and marker.exists()
    for name in ("once is enough", "not there"):
        assert run.status(name) == "ok" and run[name]["state"] == "skipped", name
    assert "exists" in run["once is enough"]["msg"] and "does not exist" in run["not there"]["msg"]
    answer = run["by name"]
    assert (answer["stdout_lines"], answer["stderr"]) == (["out", "in ä"], "err\n")
    assert run["odd"]["stdout"] == "a b|$HOME||€'\"|"
    assert base64.b64decode(run["bytes"]["stdout"]) == b"\xff\0"
    assert run["bytes"]["stdout_lines"] == [run["bytes"]["stdout"]], "in place as shipped"
    assert run["folder"]["stdout"] == "/tmp\n"
    assert run["many"]["truncated"] and run["many"]["stdout"] == "x" * 100
    assert (
        run["three"]["rc"] == 3 and run["three"]["msg"] == "non-zero return code" and run["three"]["stdout"] == "no\n"
    )
    assert run.status("three is fine") == "changed"
    assert run["too long"]["timed_out"] and run["too long"]["stdout"] == "begun\n"
    assert run["by a signal"]["signal"] == 15 and run["by a signal"]["rc"] == 143
    assert run["nothing"]["msg"].endswith("missing: argv, cmd")
    assert "sandbox not found" in run["unknown"]["msg"]
    assert run["bad value"]["msg"].startswith("user: 'a b' is no user name. Valid:")
    assert all(state == "ended" for _program, state in runs(env))


def test_a_run_that_goes_on_by_itself(story: Any, given: Any, env: Any, server: Any) -> None:
    given(1)
    first, second = str(uuid.uuid4()), str(uuid.uuid4())
    run = story(
        [
            task("begin", EXEC, vmid=1000, cmd="echo 1; sleep 12; echo 2", action="start", run_id=first, timeout=0),
            task(
                "begin again", EXEC, vmid=1000, cmd="echo 1; sleep 12; echo 2", action="start", run_id=first, timeout=0
            ),
            task("look", EXEC, vmid=1000, action="status", run_id=first),
            task("wait", EXEC, vmid=1000, action="wait", run_id=first, timeout="60s"),
            task("begin another", EXEC, vmid=1000, cmd="sleep 60", action="start", run_id=second, timeout="1h"),
            task("not so long", EXEC, vmid=1000, action="wait", run_id=second, timeout=0),
            task("end it", EXEC, vmid=1000, action="kill", run_id=second),
            task("no such run", EXEC, vmid=1000, action="wait", run_id=str(uuid.uuid4()), fails=True),
            task("no id", EXEC, vmid=1000, action="status", fails=True),
        ]
    )
    assert (
        run["begin"]["state"]
        == run["begin again"]["state"]
        == run["look"]["state"]
        == run["not so long"]["state"]
        == "running"
    )
    assert run["begin"]["run_id"] == run["begin again"]["run_id"] == uuid.UUID(first).hex
    assert (run["wait"]["rc"], run["wait"]["stdout"]) == (0, "1\n2\n")
    assert run["end it"]["rc"] == 143 and run["end it"]["state"] == "ended"
    assert "run not found" in run["no such run"]["msg"]
    begun = [data for _argv, data in server.pve.machine(1000).started if data.endswith("\nbegin")]
    assert len(begun) == 2, "a repeat of a run that is known to run only looks at it"


def test_a_secret_of_one_letter_hides_itself_and_nothing_else(story: Any, given: Any) -> None:
    """Ansible would replace it in every word and number, VMIDs and exit statuses included."""
    given(1)
    values = {"stdin": "a", "environment": {"DEBUG": "1", "ZERO": "0"}, "secret": True}
    run = story(
        [
            task("short", EXEC, vmid=1000, cmd="echo banana 10; exit 10", log_command=True, fails=True, **values),
            task("short and bad", EXEC, vmid=1001, cmd="true", fails=True, **values),
            task("password", "agentlab_sandbox_info", api_token_secret="1"),
        ],
        args=["-vvv"],
    )
    answer = run["short"]
    assert (answer["vmid"], answer["rc"], answer["stdout"]) == (1000, 10, "banana 10\n")
    assert "1001" in run["short and bad"]["msg"]
    assert run["password"]["count"] == 1 and run["password"]["sandboxes"][0]["vmid"] == 1000
    for name, secrets in (
        ("short", ("stdin", "environment")),
        ("short and bad", ("stdin", "environment")),
        ("password", ("api_token_secret",)),
    ):
        # From ansible-core 2.21 on a result has them only on request.
        options = run[name].get("invocation", {}).get("module_args", {})
        for option in secrets if options else ():
            told = options[option]
            assert set(told.values() if isinstance(told, dict) else [told]) == {
                "VALUE_SPECIFIED_IN_NO_LOG_PARAMETER"
            }, (name, option)


def test_secrets_are_nowhere(story: Any, given: Any, env: Any, server: Any) -> None:
    given(1)
    secret, other = "geheim-4711-stdin", "geheim-4712-umgebung"
    run = story(
        [
            task(
                "secret",
                EXEC,
                vmid=1000,
                cmd="cat; echo $T",
                stdin=secret,
                environment={"T": other},
                secret=True,
                log_command=True,
            )
        ],
        args=["-vvv"],
    )
    assert run["secret"]["rc"] == 0 and run["secret"]["stdout"].strip("*\n") == ""
    text = run.output + str(written(env["AGENTLAB_DATABASE"])[2]) + str(server.pve.history)
    assert secret not in text and other not in text


def test_a_stopped_sandbox_or_an_expired_lease_gets_no_command(story: Any, given: Any, env: Any, server: Any) -> None:
    given(1, state="STOPPED")
    given(1)
    edit(env, [1001], lease_expires_at=1)
    run = story(
        [
            task("stopped", EXEC, vmid=1000, argv=["true"], fails=True),
            task("over", EXEC, vmid=1001, argv=["true"], check=True, fails=True),
        ]
    )
    assert run["stopped"]["msg"] == (
        "cannot run a command in sandbox in STOPPED state. Valid states: READY, RUNNING. Start the sandbox first "
        "(state: started, or agentlab sandbox start 1000)"
    )
    assert "its lease expired" in run["over"]["msg"]
    assert server.pve.machine(1000).started == server.pve.machine(1001).started == []


@pytest.mark.parametrize("here", [True, False])
def test_shipped_and_in_place_answer_alike(story: Any, given: Any, env: Any, server: Any, here: bool) -> None:
    given(1)
    run = story(
        [task("run", EXEC, vmid=1000, argv=["echo", "x"], keywords={"vars": {"agentlab_in_place": here}})],
    )
    answer = run["run"]
    assert (answer["rc"], answer["stdout_lines"], answer["state"]) == (0, ["x"], "ended")
