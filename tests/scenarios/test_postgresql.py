# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The modules on PostgreSQL records, in real playbooks; and without psycopg, or without the server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.engines import require_postgresql
from support.engines import server as postgres_server
from support.story import task, writes


def test_a_sandbox_lives_on_records_in_postgresql(story: Any, server: Any) -> None:
    require_postgresql()
    uri = postgres_server().uri()
    made = {"name": "a1", "template": "debian-13", "ttl": "1h"}
    run = story(
        [
            task("tables", "agentlab_sandbox_info"),
            task("would be made", "agentlab_sandbox", state="present", check=True, diff=True, **made),
            task("nothing yet", "agentlab_sandbox_info"),
            task("made", "agentlab_sandbox", state="present", **made),
            task("made again", "agentlab_sandbox", state="present", **made),
            task("would renew", "agentlab_lease", vmid=1000, ttl="3h", check=True),
            task("renewed", "agentlab_lease", vmid=1000, ttl="3h"),
            task("disk", "agentlab_workspace", name="w1", size="1G", storage="local-lvm", state="present"),
            task("would stop", "agentlab_sandbox", vmid=1000, state="stopped", check=True),
            task("stopped", "agentlab_sandbox", vmid=1000, state="stopped"),
            task("would reconcile", "agentlab_reconcile", check=True),
            task("reconciled", "agentlab_reconcile"),
            task("would go", "agentlab_sandbox", vmid=1000, state="absent", check=True),
            task("gone", "agentlab_sandbox", vmid=1000, state="absent"),
            task("gone again", "agentlab_sandbox", vmid=1000, state="absent"),
            task("seen", "agentlab_sandbox_info", include_destroyed=True, events=100),
        ],
        more={"AGENTLAB_DATABASE": uri},
    )
    changed = ("would be made", "made", "would renew", "renewed", "would stop", "stopped", "would go", "gone")
    for name in changed:
        assert run.status(name) == "changed", name
    for name in ("made again", "gone again"):
        assert run.status(name) == "ok", name
    assert run["nothing yet"]["sandboxes"] == []
    assert run["seen"]["sandboxes"][0]["state"] == "DESTROYED"


def test_a_password_is_never_shown(story: Any) -> None:
    require_postgresql()
    uri = postgres_server().uri().replace("tester@", "tester:se%24cr3t-9q@")
    # Ansible itself quotes the lines of a playbook: a secret belongs into a variable.
    run = story(
        [
            task("option", "agentlab_sandbox_info", database="{{ lookup('env', 'TEST_RECORDS') }}"),
            task("wrong", "agentlab_sandbox_info", database="{{ lookup('env', 'TEST_NONE') }}", fails=True),
        ],
        args=("-vvv",),
        more={"TEST_RECORDS": uri, "TEST_NONE": uri.replace("/test", "/none")},
    )
    assert "cr3t-9q" not in run.output, "the password stands in the output"
    assert "database_password" not in str(run["wrong"]["msg"]) and "does not exist" in run["wrong"]["msg"]


def test_a_host_without_psycopg_is_told_which_package(story: Any, tmp_path: Path) -> None:
    (tmp_path / "hidden" / "psycopg").mkdir(parents=True)
    (tmp_path / "hidden" / "psycopg" / "__init__.py").write_text("raise ImportError('hidden by the test')\n")
    run = story(
        [task("asked", "agentlab_sandbox_info", fails=True)],
        more={
            "AGENTLAB_DATABASE": "postgresql://agentlab@127.0.0.1:1/agentlab",
            "PYTHONPATH": str(tmp_path / "hidden"),
        },
    )
    assert "need the Python library psycopg 3" in run["asked"]["msg"] and "python3-psycopg" in run["asked"]["msg"]


def test_without_the_server_there_is_one_sentence_and_no_request(story: Any, server: Any) -> None:
    require_postgresql()
    run = story(
        [task("asked", "agentlab_sandbox", name="a1", template="debian-13", ttl="1h", state="present", fails=True)],
        more={"AGENTLAB_DATABASE": "postgresql://agentlab@127.0.0.1:1/agentlab"},
    )
    assert run["asked"]["error"]["code"] == "store_unavailable"
    assert run["asked"]["msg"].startswith("database postgresql://agentlab@127.0.0.1:1/agentlab: cannot be reached")
    assert writes(run.requests["asked"]) == []
