# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The inventory plugin agentlab.proxmox.sandboxes, by the real ansible-inventory on records that the core wrote."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from support import pages
from support.daemon import Daemon
from support.double import Server
from support.play import Run, run_command

PAGE = (pages.ROOT / "docs/inventory.md").read_text(encoding="utf-8")
CONSTRUCTED = {
    "groups": {"sandboxes": True, "running": "agentlab_state == 'RUNNING'"},
    "keyed_groups": [
        {"key": "agentlab_tags", "prefix": "tag"},
        {"key": "agentlab_owner", "prefix": "owner"},
        {"key": "agentlab_state", "prefix": "state"},
    ],
    "compose": {"ansible_user": "'debian'", "lease": "agentlab_lease_expires_at"},
}

Ask = Callable[..., Run]


@pytest.fixture
def ask(env: dict[str, str], tmp_path: Path) -> Ask:
    """ask(words..., option=...): what ansible-inventory answers for a file with these options."""

    def run(*words: str, file: str = "lab.agentlab.yml", more: dict[str, str] | None = None, **options: Any) -> Run:
        path = tmp_path / file
        path.write_text(yaml.safe_dump({"plugin": "agentlab.proxmox.sandboxes", **options}), encoding="utf-8")
        environment = {**env, "ANSIBLE_INVENTORY_ANY_UNPARSED_IS_FAILED": "true", **(more or {})}
        return run_command(["ansible-inventory", "-i", str(path), *(words or ("--list",))], environment, tmp_path)

    return run


def hosts(run: Run) -> dict[str, dict[str, Any]]:
    """The hosts with their variables, without the mark of text that is never a template."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return value["__ansible_unsafe"] if "__ansible_unsafe" in value else {k: plain(v) for k, v in value.items()}
        return [plain(item) for item in value] if isinstance(value, list) else value

    return {name: plain(values) for name, values in json.loads(run.ok().stdout)["_meta"]["hostvars"].items()}


def groups(run: Run) -> dict[str, list[str]]:
    return {name: group["hosts"] for name, group in json.loads(run.ok().stdout).items() if "hosts" in group}


@pytest.mark.everyday
def test_the_records_are_hosts_and_proxmox_is_asked_nothing(ask: Ask, given: Any, server: Server, context: Any) -> None:
    server.pve.agent_default = True
    (first,) = given(name="one", tags=["ci", "nightly"], wait_for_ip=True)
    (second,) = given(name="two", state="STOPPED")
    (gone,) = given(name="gone")
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core.sandboxes import destroy

    destroy.destroy_several(context(), [gone], True)
    first = context().records.get(first.uuid)
    assert first.ip
    server.pve.counted.clear()
    run = ask(**CONSTRUCTED)
    found = hosts(run)
    assert set(found) == {"one", "two"}
    one = found["one"]
    shown = first.public()
    for key in ("vmid", "state", "lease_expires_at", "profile", "tags", "node", "ip", "uuid", "created_at"):
        assert one[f"agentlab_{key}"] == shown[key], key
    assert one["agentlab_owner"] == "tester"
    assert one["ansible_host"] == first.ip and "ansible_connection" not in one
    assert one["ansible_user"] == "debian" and one["lease"] == shown["lease_expires_at"]
    # Without an address there is the way through the guest agent.
    two = found["two"]
    assert two["ansible_connection"] == "agentlab.proxmox.sandbox" and two["ansible_host"] == str(second.vmid)
    assert two["agentlab_ip"] is None and two["agentlab_profile"] is None
    told = groups(run)
    assert told["sandboxes"] == ["one", "two"] and told["running"] == ["one"]
    assert told["tag_ci"] == told["tag_nightly"] == ["one"] and told["state_STOPPED"] == ["two"]
    assert told["owner_tester"] == ["one", "two"]
    assert not server.pve.counted


def test_the_inventory_takes_a_connection_states_and_a_prefix(ask: Ask, given: Any, server: Server) -> None:
    server.pve.agent_default = True
    given(name="one", wait_for_ip=True)
    given(name="two", state="STOPPED")
    through = hosts(ask(connection="sandbox", states=["RUNNING"], host_prefix="sb-"))
    assert list(through) == ["sb-one"]
    assert through["sb-one"]["ansible_connection"] == "agentlab.proxmox.sandbox"
    assert through["sb-one"]["ansible_host"] == str(through["sb-one"]["agentlab_vmid"])
    plain = hosts(ask(connection="address"))
    assert "ansible_connection" not in plain["two"] and "ansible_host" not in plain["two"]
    wrong = ask(states=["RUNING"])
    assert wrong.rc != 0 and "RUNING" in wrong.output and "RUNNING" in wrong.output


def test_the_profile_may_say_how_tasks_get_inside(
    ask: Ask, given: Any, server: Server, env: dict[str, str], tmp_path: Path
) -> None:
    server.pve.agent_default = True
    (tmp_path / "profiles").mkdir()
    for name, way in (("inner", "agentlab.proxmox.sandbox"), ("outer", "ssh")):
        (tmp_path / f"profiles/{name}.yaml").write_text(f"connection: {way}\n", encoding="utf-8")
    with open(env["AGENTLAB_CONFIG"], "a", encoding="utf-8") as config:
        config.write(f"profiles_dir: {tmp_path}/profiles\n")
    for name in ("inner", "outer"):
        given(name=name, profile=name, wait_for_ip=True)
    found = hosts(ask())
    assert found["inner"]["ansible_connection"] == "agentlab.proxmox.sandbox"
    assert found["inner"]["ansible_host"] == str(found["inner"]["agentlab_vmid"])
    assert found["outer"]["ansible_connection"] == "ssh"
    assert found["outer"]["ansible_host"] == found["outer"]["agentlab_ip"]
    # The option wins.
    assert "ansible_connection" not in hosts(ask(connection="address"))["inner"]


def test_what_users_wrote_is_no_template(ask: Ask, given: Any, env: dict[str, str], tmp_path: Path) -> None:
    given(name="one")
    trap = "{{ lookup('pipe', 'touch " + str(tmp_path / "trapped") + "') }}"
    with sqlite3.connect(env["AGENTLAB_DATABASE"]) as conn:
        conn.execute("UPDATE sandboxes SET tags = ?, profile = ?", (json.dumps([trap]), trap))
        conn.execute("UPDATE events SET actor = ?", (trap,))
    conn.close()
    run = ask(
        compose={"copy": "agentlab_owner", "tag": "agentlab_tags[0]"},
        connection="address",
        keyed_groups=[{"key": "agentlab_profile", "prefix": "p"}, {"key": "agentlab_tags", "prefix": "t"}],
    )
    one = hosts(run)["one"]
    assert one["agentlab_owner"] == one["copy"] == one["tag"] == trap and one["agentlab_tags"] == [trap]
    debug = ["-m", "ansible.builtin.debug", "-a", "msg={{ agentlab_owner }}{{ agentlab_tags }}{{ copy }}"]
    shown = run_command(
        ["ansible", "-i", str(tmp_path / "lab.agentlab.yml"), "one", "-c", "local", *debug],
        env,
        tmp_path,
    ).ok()
    assert "lookup" in shown.stdout
    assert not (tmp_path / "trapped").exists()


def test_a_name_that_means_something_else_to_ansible_is_left_out(ask: Ask, given: Any) -> None:
    given(name="localhost")
    given(name="one")
    run = ask()
    assert run.rc == 0 and set(json.loads(run.stdout)["_meta"]["hostvars"]) == {"one"}
    assert "is named 'localhost'" in run.stderr and "host_prefix" in run.stderr
    assert set(hosts(ask(host_prefix="sb-"))) == {"sb-one", "sb-localhost"}


def test_strict_makes_an_error_of_an_unknown_variable(ask: Ask, given: Any) -> None:
    given(name="one")
    assert "x" not in hosts(ask(compose={"x": "no_such_variable"}))["one"]
    strict = ask(compose={"x": "no_such_variable"}, strict=True)
    assert strict.rc != 0 and "no_such_variable" in strict.output


def test_the_cache_answers_until_it_is_flushed(ask: Ask, given: Any, env: dict[str, str], tmp_path: Path) -> None:
    given(name="one", tags=["ci"])
    options: dict[str, Any] = {
        "cache": True,
        "cache_plugin": "ansible.builtin.jsonfile",
        "cache_connection": str(tmp_path / "cache"),
        **CONSTRUCTED,
    }
    fresh = hosts(ask(**options))
    given(name="two")
    assert hosts(ask(**options)) == fresh and groups(ask(**options))["tag_ci"] == ["one"]
    assert set(hosts(ask("--list", "--flush-cache", **options))) == {"one", "two"}
    # Another database has other sandboxes, whatever the cache holds.
    other = tmp_path / "other.db"
    with sqlite3.connect(env["AGENTLAB_DATABASE"]) as source, sqlite3.connect(other) as copy:
        source.backup(copy)
        copy.execute("DELETE FROM sandboxes WHERE name = 'one'")
    source.close()
    copy.close()
    assert set(hosts(ask(**options, database=str(other)))) == {"two"}
    # A cache that somebody damaged is read anew.
    for file in (tmp_path / "cache").iterdir():
        file.write_text(file.read_text().replace('"vmid"', '"number"'))
    assert set(hosts(ask(**options))) == {"one", "two"}


def test_the_daemon_answers_in_place_of_the_database(
    ask: Ask, given: Any, env: dict[str, str], tmp_path: Path, server: Server
) -> None:
    server.pve.agent_default = True
    given(name="one", tags=["ci"], wait_for_ip=True)
    direct = hosts(ask(**CONSTRUCTED))
    daemon = Daemon(tmp_path / "daemon", {name: env[name] for name in env if name.startswith(("PROXMOX", "AGENTLAB"))})
    try:
        daemon.start()
        without = {"AGENTLAB_DATABASE": "/nonexistent/agentlab.db"}
        assert hosts(ask(**CONSTRUCTED, socket=daemon.socket, more=without)) == direct
    finally:
        daemon.close()
    down = ask(socket=daemon.socket)
    assert down.rc != 0 and f"nothing listens on {daemon.socket}" in down.output.replace("\n", " ")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"socket": "/x", "database": "/y"}, ("socket: is set, and so is database", "Give socket alone")),
        ({"database": "missing.db"}, ("database: there is no file", "missing.db", "AGENTLAB_DATABASE")),
        ({"config_file": "missing.yaml"}, ("missing.yaml",)),
        ({"connection": "ssh"}, ("connection", "auto", "address", "sandbox")),
        ({"state": ["RUNNING"]}, ("state: is no option of this plugin", "states")),
        ({"states": ["running"]}, ("states", "Valid values are: REQUESTED")),
        ({"timeout": -1, "socket": "/x"}, ("timeout: -1 is no time to wait", "from 1 on")),
    ],
)
def test_errors_say_what_to_do(ask: Ask, given: Any, options: dict[str, Any], words: tuple[str, ...]) -> None:
    run = ask(**options)
    said = " ".join(run.output.split())
    assert run.rc != 0 and "Traceback" not in said
    for word in words:
        assert word in said, said


def test_another_programs_file_is_refused_and_nothing_is_created(ask: Ask, tmp_path: Path) -> None:
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as conn:
        conn.execute("CREATE TABLE things (x)")
    conn.close()
    before = sorted(os.listdir(tmp_path))
    run = ask(database="other.db")
    assert run.rc != 0 and "another program" in run.output
    missing = ask(database="none/agentlab.db")
    assert missing.rc != 0 and not (tmp_path / "none").exists()
    assert set(os.listdir(tmp_path)) - set(before) <= {"lab.agentlab.yml", "ansible-home"} | {
        name for name in os.listdir(tmp_path) if name.startswith("results-")
    }


def test_a_file_of_another_name_is_not_ours(ask: Ask, given: Any) -> None:
    given(name="one")
    assert ask(file="lab.yml").rc != 0
    assert set(hosts(ask(file="agentlab.yaml"))) == {"one"}


def test_the_files_of_the_page_work(ask: Ask, given: Any, tmp_path: Path, env: dict[str, str]) -> None:
    given(name="one", tags=["ci"])
    text = PAGE.split("<!-- sandboxes -->")[1].split("<!-- /sandboxes -->")[0]
    options = yaml.safe_load(text.strip().removeprefix("```yaml\n").removesuffix("```"))
    assert options.pop("plugin") == "agentlab.proxmox.sandboxes"
    run = ask(**options)
    assert set(hosts(run)) == {"one"}
    assert groups(run)["sandboxes"] == ["one"] == groups(run)["tag_ci"]


def test_the_examples_of_the_documentation_work(
    env: dict[str, str], tmp_path: Path, given: Any, request: pytest.FixtureRequest
) -> None:
    """The file as it stands, and the file of its comments, which asks a daemon."""
    from ansible_collections.agentlab.proxmox.plugins.inventory import sandboxes

    given(name="one", tags=["ci"])
    first, _line, second = sandboxes.EXAMPLES.partition("# Another file")
    texts = {"lab.agentlab.yml": first, "other.agentlab.yml": "\n".join(second.replace("\n# ", "\n").splitlines()[1:])}
    agentlabd = Daemon(
        tmp_path / "daemon", {name: env[name] for name in env if name.startswith(("PROXMOX", "AGENTLAB"))}
    )
    request.addfinalizer(agentlabd.close)
    agentlabd.start()
    for name, text in texts.items():
        text = text.replace("/run/agentlab/agentlabd.sock", str(agentlabd.socket)).replace("~/.cache", str(tmp_path))
        (tmp_path / name).write_text(text, encoding="utf-8")
        run = run_command(["ansible-inventory", "-i", str(tmp_path / name), "--list"], env, tmp_path)
        assert set(hosts(run)) == {"one"}, run.output
        if name == "lab.agentlab.yml":
            assert groups(run)["tag_ci"] == groups(run)["running"] == groups(run)["sandboxes"] == ["one"]
        else:
            assert hosts(run)["one"]["ansible_connection"] == "agentlab.proxmox.sandbox"
