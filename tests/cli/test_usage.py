# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Wrong usage, help, manual and version, and what a command loads before it runs."""

from __future__ import annotations

import os
import re
import subprocess

import pytest

from support import cli_page
from support.cli import PYTHON, ROOT, StandIn, agentlab, environment


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["sandbox", "show", "abc"], "'abc' is not a VMID. Valid: a number from 100 to 999999999"),
        (["sandbox", "show", "99"], "'99' is not a VMID"),
        (["sandbox", "show", "１０００"], "is not a VMID"),
        (["sandbox", "show"], "Missing argument '<vmid>'"),
        (["sandbox", "destroy"], "Missing argument"),
        (["sandbox", "destroy", "--forse", "1009"], "No such option"),
        (["sandbox", "lease", "renew", "--ttl", "120"], "<vmid> is missing"),
        (["sandbox", "lst"], "there is no command 'lst'. Did you mean list?"),
        (["sandboxes"], "there is no command 'sandboxes'. Did you mean sandbox?"),
        (["xyzzy"], "there is no command 'xyzzy'. Commands: sandbox, "),
        # What belongs behind sandbox is told as the whole line.
        (["ls"], "there is no command 'ls'. Use: agentlab sandbox list"),
        (["stop", "1009"], "there is no command 'stop'. Use: agentlab sandbox stop"),
        (["pause", "1009"], "Use: agentlab sandbox suspend"),
        (["rm", "1009"], "there is no command 'rm'. Use: agentlab sandbox destroy <vmid>"),
        (["sandbox", "restart", "1009"], "Use: agentlab sandbox stop <vmid>, then agentlab sandbox start <vmid>"),
        (["sandbox", "shutdown", "1009"], "Use: agentlab sandbox stop <vmid>"),
        (["sandbox", "renew", "1009"], "Use: agentlab sandbox lease renew --ttl <ttl> <vmid>"),
        (["sandbox", "console", "1009"], "Use: agentlab sandbox exec <vmid> -- <command>, or agentlab sandbox ssh"),
        (["exec", "1009"], "there is no command 'exec'. Use: agentlab sandbox exec"),
        (["profile", "show", "x"], "Use: agentlab profile list"),
        # Nor to what takes the protection away.
        (["sandbox", "inprotect", "1009"], "there is no command 'inprotect'. Did you mean protect?"),
        # No likeness leads to what destroys.
        (["sandbox", "prun"], "there is no command 'prun'. Commands: list, "),
        (["sandbox", "destry"], "there is no command 'destry'. Commands: list, "),
        (["sandbox", "rm", "1009"], "there is no command 'rm'. Use: agentlab sandbox destroy <vmid>"),
        (["workspace", "rm", "w1"], "Use: agentlab workspace destroy --force <workspace>"),
        (["sandbox", "stop"], "which sandbox? Give <vmid>, or --all"),
        (["sandbox", "stop", "--all", "1009"], "which sandbox? Give <vmid>, or --all"),
        (["workspace", "attach", "w1"], "which sandbox? Give <vmid> once"),
        (["workspace", "attach", "--vmid", "1000", "w1", "1001"], "which sandbox? Give <vmid> once"),
        (["workspace", "new", "--size", "1G"], "which workspace? Give its name once"),
        (["help", "nothing"], "there is no command 'nothing'"),
        (["cleanup", "freeze"], "--reason"),
        (["completion", "csh"], "csh"),
    ],
)
def test_wrong_usage_is_refused_with_what_was_meant(daemon: StandIn, args: list[str], part: str) -> None:
    found = agentlab(*args, socket=daemon.path)
    assert found.returncode == 2
    assert found.stdout == ""
    assert part in found.stderr
    assert "Error: " in found.stderr
    assert "Usage: agentlab" in found.stderr
    assert daemon.asked == []


def test_a_group_without_a_command_shows_its_help() -> None:
    for args in ([], ["sandbox"], ["sandbox", "lease"], ["cleanup"]):
        found = agentlab(*args)
        assert (found.returncode, found.stdout) == (2, "")
        assert found.stderr.startswith("Usage: agentlab ")
        assert "Commands:" in found.stderr


def test_version_is_that_of_the_collection() -> None:
    version = re.search(r"^version: (\S+)$", (ROOT / "galaxy.yml").read_text(), re.M)
    assert version is not None
    assert agentlab("--version").stdout == f"agentlab {version[1]}\n"


def test_it_imports_neither_core_nor_daemon_and_little_to_start() -> None:
    code = (
        "import sys; sys.argv = ['agentlab', '--version']; import agentlab_cli.app as app; "
        "app.root.main(standalone_mode=False); print(*sorted(sys.modules))"
    )
    found = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, env=environment(None), check=True)
    loaded = set(found.stdout.split())
    assert not {
        name
        for name in loaded
        if name.partition(".")[0] in ("agentlab_core", "agentlabd", "ansible", "ansible_collections")
    }
    assert not loaded & {"http.client", "ssl", "tabulate", "email", "asyncio"}
    for path in (ROOT / "roles/agentlabd/files/agentlab_cli").glob("*.py"):
        assert not re.search(r"^\s*(from|import) +(agentlab_core|agentlabd|ansible)", path.read_text(), re.M), path


def test_no_usage_line_names_its_options_twice() -> None:
    assert "[OPTIONS] [OPTIONS]" not in cli_page.written()


def test_the_manual_says_what_help_says() -> None:
    assert cli_page.written() == cli_page.reference(), "run: .venv/bin/python tests/support/cli_page.py"


def test_the_manual_lists_every_exit_status() -> None:
    table = cli_page.PAGE.read_text().split("<!-- statuses -->")[1].split("<!-- /statuses -->")[0]
    told = {int(number) for number in re.findall(r"^\| (\d+) \|", table, re.M)}
    source = (ROOT / "roles/agentlabd/files/agentlab_cli/errors.py").read_text()
    assert told == {0, *(int(number) for number in re.findall(r"^[A-Z]+ = (\d+)$", source, re.M))}


@pytest.mark.skipif("AGENTLAB_TEST_CLI_LIBRARIES" not in os.environ, reason="runs with the libraries of .venv")
def test_it_really_runs_with_the_libraries_given() -> None:
    libraries = os.environ["AGENTLAB_TEST_CLI_LIBRARIES"]
    code = "import click; print(click.__file__)"
    printed = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, env=environment(None), check=True)
    assert printed.stdout.startswith(libraries)


def test_the_version_loads_no_library() -> None:
    code = (
        "import sys; sys.argv = ['agentlab', '--version']; from agentlab_cli.app import main; main(); "
        "print(*sorted(sys.modules))"
    )
    found = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, env=environment(None), check=True)
    assert not set(found.stdout.split()) & {"click", "json", "socket", "agentlab_cli.framework"}


@pytest.mark.parametrize(
    ("args", "unneeded"),
    [
        (["status"], {"agentlab_cli.sandbox", "agentlab_cli.workspace", "agentlab_cli.doctor"}),
        (["sandbox", "list"], {"agentlab_cli.workspace", "agentlab_cli.status", "agentlab_cli.doctor"}),
    ],
)
def test_a_command_loads_what_it_needs(args: list[str], unneeded: set[str]) -> None:
    code = (
        f"import sys; sys.argv = ['agentlab', '--socket', '/nonexistent', *{args!r}]; from agentlab_cli.app import "
        "main\ntry: main()\nexcept SystemExit: pass\nprint(*sorted(sys.modules))"
    )
    found = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, env=environment(None), check=True)
    loaded = set(found.stdout.split())
    assert not loaded & {*unneeded, "tabulate", "difflib"} and "click" in loaded
