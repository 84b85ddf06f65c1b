# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is the same for all modules: connection, credentials, configuration, records, secrets, names and what a run
costs.
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store import schema

from support.daemon import free_port
from support.double import TOKEN_SECRET
from support.play import run_adhoc, run_play
from support.story import task, writes

MODULES = ("agentlab_lease", "agentlab_prune", "agentlab_reconcile", "agentlab_sandbox", "agentlab_sandbox_info")


def test_a_wrong_connection_or_credential_is_one_sentence_that_names_it(
    story: Any, given: Any, tmp_path: Path, server: Any
) -> None:
    from fakepve.certs import make_cert

    given(1)
    (tmp_path / "other").mkdir()
    other_ca, _dummy, _dummy = make_cert(str(tmp_path / "other"), hosts=("127.0.0.1",))
    port = free_port()
    here = f"127.0.0.1:{server.pve.port}"
    cases = {
        "port": (
            {"api_port": port},
            f"127.0.0.1:{port} cannot be reached: Connection refused; check api_host, api_port and the network",
        ),
        "name": ({"api_host": "no-such-host.invalid"}, f"no-such-host.invalid:{server.pve.port} cannot be reached"),
        "CA": ({"ca_path": other_ca}, f"the certificate of {here} is not trusted"),
        "no CA": ({"ca_path": str(tmp_path / "missing.pem")}, f"ca_path: '{tmp_path}/missing.pem' does not exist"),
        "secret": (
            {"api_token_secret": "not-the-secret-of-that-token"},
            f"Proxmox on {here} refuses the credentials of agentlab@pve!tests (401",
        ),
        "token": (
            {"api_token_id": "agentlab@pve!nobody"},
            f"Proxmox on {here} refuses the credentials of agentlab@pve!nobody (401",
        ),
        "port number": ({"api_port": 70000}, "api_port: '70000' is not valid. Valid: a whole number from 1 to 65535"),
        "timeout": ({"api_timeout": 0}, "api_timeout: '0' is not valid"),
        # As YAML reads 012345, 12:30 and yes without quotes: the option's type would make another text of it.
        "octal": ({"api_password": 5349}, "api_password: YAML reads the value as a number"),
        "boolean": (
            {"api_token_secret": True},
            "api_token_secret: YAML reads the value as a number, a date or a boolean",
        ),
        "shipped": (
            {"api_password": 750, "keywords": {"vars": {"agentlab_in_place": False}}},
            "api_password: YAML reads the value as a number",
        ),
        "URL": (
            {"api_host": "http://127.0.0.1:8006"},
            "api_host: 'http://127.0.0.1:8006' does not begin with https://",
        ),
    }
    run = story([task(name, "agentlab_reconcile", fails=True, **options) for name, (options, _dummy) in cases.items()])
    wrong = {
        name: run[name]["msg"]
        for name, (_dummy, wanted) in cases.items()
        if wanted not in run[name]["msg"] or "\n" in run[name]["msg"]
    }
    assert not wrong, wrong
    assert all(run[name]["changed"] is False for name in cases)


def test_an_unusable_configuration_or_database_is_one_sentence_that_names_it(
    story: Any, given: Any, tmp_path: Path, env: Any
) -> None:
    given(1)
    for name, text in {
        "unknown": "templat: 9000\n",
        "broken": "template: [\n",
        "list": "- a\n",
        "range": "vmid_range: 5\n",
    }.items():
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "damaged.db").write_bytes(b"SQLite format 3\x00" + b"\xff" * 4096)
    (tmp_path / "text.db").write_text(
        "this is not a database, it is a text that is long enough to be looked at " * 20, encoding="utf-8"
    )
    with sqlite3.connect(tmp_path / "foreign.db") as conn:
        conn.execute("CREATE TABLE things (id)")
    conn.close()
    source = sqlite3.connect(env["AGENTLAB_DATABASE"])
    with sqlite3.connect(tmp_path / "newer.db") as conn:
        source.backup(conn)
        conn.execute("PRAGMA user_version = 99")
    conn.close()
    source.close()
    cases = {
        "unknown key": (
            {"config_file": f"{tmp_path}/unknown.yaml"},
            f"config_file: {tmp_path}/unknown.yaml has the unknown key 'templat'. Valid: api_host",
        ),
        "broken YAML": (
            {"config_file": f"{tmp_path}/broken.yaml"},
            f"config_file: {tmp_path}/broken.yaml is not valid YAML in line 2",
        ),
        "list": ({"config_file": f"{tmp_path}/list.yaml"}, f"config_file: {tmp_path}/list.yaml must be a mapping"),
        "range": ({"config_file": f"{tmp_path}/range.yaml"}, "vmid_range: '5' is not a range. Valid: FIRST-LAST"),
        "missing": (
            {"config_file": f"{tmp_path}/missing.yaml"},
            f"config_file: {tmp_path}/missing.yaml: No such file or directory",
        ),
        "damaged": ({"database": f"{tmp_path}/damaged.db"}, f"database {tmp_path}/damaged.db: "),
        "text": (
            {"database": f"{tmp_path}/text.db"},
            f"database {tmp_path}/text.db: file is not a database: the file is damaged or not an agentlab database",
        ),
        "foreign": (
            {"database": f"{tmp_path}/foreign.db"},
            f"database {tmp_path}/foreign.db: this is the SQLite file of another program",
        ),
        "newer": (
            {"database": f"{tmp_path}/newer.db"},
            f"database {tmp_path}/newer.db: its schema version 99 is newer than the {schema.VERSION} that this "
            "release knows",
        ),
        "folder": ({"database": str(tmp_path)}, f"database {tmp_path}: "),
    }
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.db")}
    run = story(
        [
            *(
                task(name, "agentlab_sandbox", name="x", fails=True, **options)
                for name, (options, _dummy) in cases.items()
            ),
            *(
                task(f"{name} in check mode", "agentlab_prune", check=True, fails=True, **cases[name][0])
                for name in ("unknown key", "text", "newer", "foreign")
            ),
        ]
    )
    wrong = {
        name: run[name]["msg"]
        for name, (_dummy, wanted) in cases.items()
        if not run[name]["msg"].startswith(wanted) or "\n" in run[name]["msg"]
    }
    wrong.update(
        {
            name: run[f"{name} in check mode"]["msg"]
            for name in ("unknown key", "text", "newer", "foreign")
            if not run[f"{name} in check mode"]["msg"].startswith(cases[name][1])
        }
    )
    assert not wrong, wrong
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.db")} == before
    assert all(not found for found in run.requests.values())


def test_records_that_cannot_be_written(story: Any, given: Any, env: Any, server: Any) -> None:
    given(1)
    if os.geteuid() != 0:
        pytest.skip("needs root, who may set the immutable flag")
    import subprocess

    if subprocess.run(["chattr", "+i", env["AGENTLAB_DATABASE"]], capture_output=True, check=False).returncode:
        pytest.skip("this file system has no immutable flag")
    try:
        run = story(
            [
                task("create", "agentlab_sandbox", name="second", fails=True),
                task("destroy", "agentlab_sandbox", vmid=1000, state="absent", force=True, fails=True),
            ]
        )
    finally:
        subprocess.run(["chattr", "-i", env["AGENTLAB_DATABASE"]], check=True)
    for name in ("create", "destroy"):
        assert (
            run[name]["msg"].startswith(f"database {env['AGENTLAB_DATABASE']}: ")
            and "mend the permissions" in run[name]["msg"]
        )
        assert writes(run.requests[name]) == []
    assert server.pve.vm(1000).status == "running"


@pytest.mark.everyday
def test_secrets_are_never_shown(given: Any, env: Any, tmp_path: Path, server: Any) -> None:
    given(1)
    secrets = {
        "option": "secret-as-option-1234",
        "file": "secret-in-the-file-5678",
        "password": "password-as-option-9012",
    }
    (tmp_path / "secret.yaml").write_text(
        f"template: debian-13\napi_token_secret: {secrets['file']}\n", encoding="utf-8"
    )
    (tmp_path / "broken.yaml").write_text(f"api_password: {secrets['password']}\n  x: [\n", encoding="utf-8")
    # Looked up, not written into the play: Ansible itself shows the lines of a play that fails.
    looked_up = {name: f"{{{{ lookup('ansible.builtin.env', 'TEST_{name.upper()}') }}}}" for name in secrets}
    env = {**env, **{f"TEST_{name.upper()}": value for name, value in secrets.items()}}
    without = {name: value for name, value in env.items() if name != "PROXMOX_TOKEN_SECRET"}
    run = run_play(
        [
            task("works", "agentlab_sandbox", name="mine"),
            task("info", "agentlab_sandbox_info", events=10, verify=True),
            task("wrong option", "agentlab_reconcile", api_token_secret=looked_up["option"], fails=True),
            task(
                "secret as name",
                "agentlab_sandbox",
                name="{{ lookup('ansible.builtin.env', 'PROXMOX_TOKEN_SECRET') }}",
                cores=0,
                fails=True,
            ),
            task("broken file", "agentlab_reconcile", config_file=f"{tmp_path}/broken.yaml", fails=True),
        ],
        env,
        tmp_path,
        args=("-vvv",),
    )
    again = run_play(
        [
            task("wrong in file", "agentlab_reconcile", config_file=f"{tmp_path}/secret.yaml", fails=True),
            task(
                "wrong password",
                "agentlab_reconcile",
                api_user="root@pam",
                api_token_id="",
                api_password=looked_up["password"],
                fails=True,
            ),
        ],
        without,
        tmp_path,
        args=("-vvv",),
    )
    assert run.rc == again.rc == 0 and not run.warnings and not again.warnings, run.warnings + again.warnings
    assert [
        one.status(name)
        for one, name in (
            (run, "works"),
            (run, "wrong option"),
            (run, "secret as name"),
            (run, "broken file"),
            (again, "wrong in file"),
            (again, "wrong password"),
        )
    ] == ["changed", *["failed"] * 5]
    records = Path(env["AGENTLAB_DATABASE"]).read_bytes().decode("latin-1")
    for secret in (*secrets.values(), TOKEN_SECRET):
        shown = [line for line in (run.output + again.output).splitlines() if secret in line]
        assert not shown and secret not in records, shown
        assert not any(secret in str(vm.config) for vm in server.pve.vms)


def test_short_names_ad_hoc_and_the_action_group(env: Any, tmp_path: Path, given: Any, server: Any) -> None:
    given(1, "TIMEOUT")
    would = run_adhoc("agentlab_prune", None, env, tmp_path, check=True)
    done = run_adhoc("agentlab_prune", "older_than=0 max_count=5", env, tmp_path)
    assert would.rc == done.rc == 0 and not would.warnings and not done.warnings, would.output + done.output
    assert (
        '"count": 1' in would.stdout
        and '"count": 1' in done.stdout
        and "CHANGED" in done.stdout
        and server.pve.vm(1000) is None
    )
    bare = {name: value for name, value in env.items() if not name.startswith("PROXMOX_TOKEN")}
    connection = {"api_token_id": env["PROXMOX_TOKEN_ID"], "api_token_secret": env["PROXMOX_TOKEN_SECRET"]}
    options = {"agentlab_lease": {"name": "short", "ttl": "2h"}, "agentlab_sandbox": {"name": "short"}}
    run = run_play(
        [
            {
                "hosts": "localhost",
                "gather_facts": False,
                "module_defaults": {"group/agentlab.proxmox.agentlab": connection},
                "tasks": [
                    {"name": "short", "agentlab_sandbox": {"name": "short", **connection}},
                    *(task(f"full {name}", name, **options.get(name, {})) for name in MODULES),
                ],
            }
        ],
        bare,
        tmp_path,
    )
    run.ok()
    assert run.status("short") == "changed" and run.status("full agentlab_sandbox") == "ok"


def test_a_run_that_changes_nothing_costs_at_most_two_requests(story: Any, given: Any) -> None:
    given(5)
    given(1, "STOPPED")
    every = list(range(1000, 1005))
    run = story(
        [
            task("present", "agentlab_sandbox", vmids=every),
            task("started", "agentlab_sandbox", vmids=every, state="started"),
            task("stopped", "agentlab_sandbox", vmid=1005, state="stopped"),
            task("absent", "agentlab_sandbox", vmid=1999, state="absent"),
            task("lease", "agentlab_lease", vmids=every, ttl="1h"),
            task("prune", "agentlab_prune"),
            task("info", "agentlab_sandbox_info"),
        ]
    )
    # A state of the world is looked at: the VM's power state and its configuration. The records answer everything else.
    looks = {"started": len(every), "stopped": 1}
    for name, asked in run.requests.items():
        assert sum(asked.values()) == 2 * looks.get(name, 0), (name, dict(asked))
        assert all(kind.startswith("GET ") for kind in asked), (name, dict(asked))
    assert all(run.status(name) == "ok" for name in run.requests)
