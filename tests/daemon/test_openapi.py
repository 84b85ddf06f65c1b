# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The OpenAPI document is true: schemathesis asks a real daemon what the document promises, and what it forbids."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.workspaces import workspace

from support.daemon import PYTHONPATH, Daemon, free_port
from support.lab import Lab

TOKEN = "a-long-token-of-the-tests-5d1f"
# Whether a template, a node or a storage exists is not for a schema to say.
CREATE = "/v1/sandboxes"
NEW = "/v1/workspaces"
REBIND = "/v1/workspaces/{id}/rebind"
# It answers 200 to a plan that makes no sense, and says so.
PLAN = "/v1/sandboxes/validate-plan"
ONE_SANDBOX = '[parameters]\n"path.vmid" = 1000\n'
# So many arguments that all of them together are larger than a body may be are refused as that.
TOO_LARGE = '[checks]\nnegative_data_rejection.expected-statuses = ["400", "404", "405", "409", "413", "415", "5xx"]\n'
RUNS = {
    "any": [
        "--exclude-path-regex",
        "exec|files",
        "--exclude-path",
        CREATE,
        "--exclude-path",
        NEW,
        "--exclude-path",
        REBIND,
        "--exclude-path",
        PLAN,
    ],
    # Of a sandbox that is there.
    "1000": ["--include-path-regex", "{vmid}", "--exclude-path-regex", "exec|files"],
    # What happens inside it: whether a program or a file of that name is there is not for a schema to say.
    "inside": ["--include-path-regex", "exec|files", "--exclude-checks", "positive_data_acceptance"],
    # Of a workspace that is there.
    "w1": ["--include-path-regex", "{id}", "--exclude-path", REBIND],
    "create": [
        "--include-path",
        CREATE,
        "--include-path",
        NEW,
        "--include-path",
        REBIND,
        "--exclude-checks",
        "positive_data_acceptance",
    ],
    "plan": ["--include-path", PLAN, "--exclude-checks", "positive_data_acceptance,negative_data_rejection"],
}


@pytest.mark.parametrize("run", RUNS)
def test_the_document_is_true(daemon: Callable[..., Daemon], lab: Lab, tmp_path: Path, run: str) -> None:
    for name in ("a1", "a2"):
        lab.create(name)
    workspace.ensure_present(lab.context(), "w1", size="1G", storage="local-lvm")
    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    port = free_port()
    daemon(listen=f"127.0.0.1:{port}", listen_token_file=str(token), max_ttl="3650d")
    settings = tmp_path / "schemathesis.toml"
    settings.write_text(
        {
            "1000": ONE_SANDBOX,
            "inside": ONE_SANDBOX + TOO_LARGE,
            "w1": '[parameters]\n"path.id" = "w1"\n',
        }.get(run, "")
    )
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("schemathesis")),
            "--config-file",
            str(settings),
            "run",
            f"http://127.0.0.1:{port}/v1/openapi.json",
            "-H",
            f"Authorization: Bearer {TOKEN}",
            "--phases",
            "coverage,fuzzing",
            "-c",
            "all",
            "--max-examples",
            "15",
            "--seed",
            "7",
            "--generation-database",
            "none",
            "--continue-on-failure",
            "--suppress-health-check",
            "all",
            *RUNS[run],
        ],
        check=False,
        capture_output=True,
        text=True,
        timeout=400,
        cwd=tmp_path,
        env={**os.environ, "NO_COLOR": "1"},
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert "passed" in done.stdout


def test_every_creation_option_of_the_core_is_in_the_document() -> None:
    code = (
        "from agentlabd.http.creation import CREATION; from agentlab_core.sandboxes import wanted;"
        "assert set(CREATION) == {'vmid', 'name', 'ttl_minutes', 'workspace_id', *wanted.OPTIONS}, set(CREATION)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": PYTHONPATH}, timeout=30)


def test_a_body_without_which_the_daemon_refuses_is_required_in_the_document() -> None:
    """Where one of several fields is needed, no single one is required, but a body is."""
    code = (
        "from agentlabd.http import openapi, table;"
        "paths = openapi.compose_document(table.ROUTES)['paths'];"
        "operations = [o for path in paths.values() for o in path.values()];"
        "needed = {o['operationId'] for o in operations if o.get('requestBody', {}).get('required')};"
        "assert {'renew_lease', 'run_command'} <= needed, needed;"
        "assert not {'destroy_sandbox', 'prune_sandboxes'} & needed, needed"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": PYTHONPATH}, timeout=30)
