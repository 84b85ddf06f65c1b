# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The documentation says what the code does: tables are made from the rules, quoted messages and named tests exist."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import config, reasons, rules, states

from support import pages
from support.cli import environment
from support.daemon import in_daemon

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
CODE = "".join(path.read_text() for path in sorted((ROOT / "plugins").rglob("*.py")))


def between(text: str, name: str) -> str:
    return text.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0].strip()


def transition_table() -> str:
    """The transitions as a Markdown table."""
    rows = ["| from | to |", "|---|---|"]
    rows += [f"| {state} | {', '.join(follow) or 'none: terminal'} |" for state, follow in states.TRANSITIONS.items()]
    return "\n".join(rows)


def operation_table() -> str:
    """The operations as a Markdown table: what each is allowed in, and where there is nothing to do."""
    rows = ["| operation | allowed in | nothing to do in |", "|---|---|---|"]
    for name, rule in states.OPERATIONS.items():
        rows.append(f"| {name.replace('_', ' ')} | {', '.join(rule.allowed)} | {', '.join(rule.satisfied) or '-'} |")
    return "\n".join(rows)


def state_table() -> str:
    """For the README: every state, and what can be done in it."""
    rows = ["| state | what can be done in it |", "|---|---|"]
    for state in states.STATES:
        verbs = [name.replace("_", " ") for name, rule in states.OPERATIONS.items() if state in rule.allowed]
        rows.append(f"| {state} | {', '.join(verbs) or 'nothing: terminal'} |")
    return "\n".join(rows)


def test_tables_are_made_from_the_rules() -> None:
    assert between((ROOT / "docs/architecture.md").read_text(), "transitions") == transition_table()
    assert between(README, "states") == state_table()
    assert between(README, "operations") == operation_table()


def test_the_diagram_of_the_states_is_current() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/state_diagram.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_picture_of_the_rooms_is_current() -> None:
    script = str(ROOT / "scripts/room_diagram.py")
    result = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_architecture_page_describes_every_room() -> None:
    spec = importlib.util.spec_from_file_location("import_tables", ROOT / "tests/repository/test_imports.py")
    assert spec and spec.loader
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    rows = re.findall(
        r"^\| (core|daemon): `(\w+)` \| .+ \|$", between((ROOT / "docs/architecture.md").read_text(), "rooms"), re.M
    )
    assert rows == [
        *(("core", room) for room in tables.CORE_ROOMS),
        *(("daemon", room) for room in tables.DAEMON_ROOMS),
    ]


def test_the_readme_of_the_tests_names_every_folder_and_real_files() -> None:
    page = (ROOT / "tests/README.md").read_text()
    tests = ROOT / "tests"
    folders = {path.name for path in tests.iterdir() if path.is_dir() and path.name[0] not in "._"} - {"output"}
    folders |= {
        str(path.parent.relative_to(tests)) for folder in folders for path in (tests / folder).rglob("test_*.py")
    }
    assert set(re.findall(r"^\| `([\w/]+)/` \|", page, re.M)) == folders
    for name in re.findall(r"`([\w/]+/test_\w+\.py)`", page):
        assert (ROOT / "tests" / name).is_file(), name


def test_the_diagram_draws_what_the_tables_say(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("state_diagram", ROOT / "scripts/state_diagram.py")
    assert spec and spec.loader
    diagram = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(diagram)
    with monkeypatch.context() as other:
        other.setitem(diagram.states.TRANSITIONS, "FAILED", ("DESTROYED",))
        with pytest.raises(SystemExit, match="not in the table: .*'FAILED', 'STOPPED'"):
            diagram.draw()
    with monkeypatch.context() as other:
        other.setitem(diagram.states.TRANSITIONS, "DESTROYED", ("REQUESTED",))
        with pytest.raises(SystemExit, match="not drawn: .*'DESTROYED', 'REQUESTED'"):
            diagram.draw()


def test_the_map_of_the_folders_is_complete_and_true() -> None:
    said = between((ROOT / "docs/architecture.md").read_text(), "map")
    named = set(re.findall(r"\b(\w+\.py)\b", said))
    files = ROOT / "roles/agentlabd/files"
    there = {
        path.name
        for folder in (
            ROOT / "plugins/module_utils",
            ROOT / "plugins/doc_fragments",
            files / "agentlabd",
            files / "agentlab_cli",
        )
        for path in folder.rglob("*.py")
    } | {path.name for path in files.glob("*.py")}
    assert named == there - {"__init__.py"}
    # A folder stands at the beginning of a line as it is found from the one above it.
    for folder in re.findall(r"^((?:\w+/)+) ", said, re.M):
        assert (ROOT / folder).is_dir(), folder
    for name in {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")} - {
        "build",
        "LICENSES",
        "changelogs",
        "meta",
    }:
        assert re.search(rf"\b{name}/", said), name


def imported(path: Path) -> set[str]:
    """The modules that a file imports, relative ones as they are written (.errors, ..store.records)."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {one.name for one in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            found |= {base + one.name for one in node.names} if base.strip(".") == "" else {base}
    return found


def test_the_core_knows_no_ansible_and_the_command_line_no_core() -> None:
    core, files = ROOT / "plugins/module_utils/_core", ROOT / "roles/agentlabd/files"
    for path in core.rglob("*.py"):
        names = imported(path)
        assert not any(
            name.split(".")[0] in ("ansible", "ansible_collections", "agentlabd", "agentlab_cli") for name in names
        ), path
    for path in (files / "agentlab_cli").glob("*.py"):
        assert not any(name.split(".")[0] in ("agentlab_core", "agentlabd") for name in imported(path)), path


def test_every_configuration_key_is_documented_with_its_default() -> None:
    rows = dict(
        re.findall(
            r"^\| `(\w+)` \| ([^|]+) \|", between((ROOT / "docs/configuration.md").read_text(), "configuration"), re.M
        )
    )
    assert set(rows) == set(config.DEFAULTS)
    for key, default in config.DEFAULTS.items():
        if default is not None:
            shown = str(default).lower() if isinstance(default, bool) else str(default)
            assert rows[key].strip() == shown, key


def anchors(page: Path) -> set[str]:
    """What can stand after # in a link to the page, as GitHub makes it from the headings."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize(
    "page",
    [*pages.PAGES, ROOT / "SECURITY.md", ROOT / "CODE_OF_CONDUCT.md"],
    ids=lambda page: f"{page.parent.name}-{page.name}",
)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target, _hash, anchor in re.findall(r"\]\(([^)#]*)(#?)([^)]*)\)", page.read_text()):
        if not target.startswith("http"):
            found = (page.parent / target).resolve() if target else page
            assert found.exists(), target
            assert not anchor or anchor in anchors(found), f"{target}#{anchor}"


SAFETY = (ROOT / "docs/safety.md").read_text()


def test_every_test_that_safety_names_exists() -> None:
    named = re.findall(r"`(tests/[\w/.]+)(?:::(\w+))?`", SAFETY)
    assert len(named) > 30
    for path, function in named:
        assert (ROOT / path).exists(), path
        if function:
            assert re.search(rf"^def {function}\(", (ROOT / path).read_text(), re.M), f"{path}::{function}"


# Run in a process of its own, as `make faults-everyday` is: prints the way and the test of everything that the marker
# selects.
_COLLECT = """
import sys, pytest
class Show:
    def pytest_collection_finish(self, session):
        for item in session.items:
            print("selected", *{mark.args[0] for mark in item.iter_markers("way")}, item.nodeid.partition("[")[0])
sys.exit(pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", "-m", "way", "tests/faults"], plugins=[Show()]))
"""


def test_the_everyday_run_shows_each_of_the_thirteen_ways() -> None:
    """Every test of the table is selected by its marker under the number of its row, and every test that is selected
    stands in the table.
    """
    rows = re.findall(r"^\| (\d+) \|.*\| (.+) \|$", SAFETY, re.M)
    table = {(int(number), name) for number, tests in rows for name in re.findall(r"`([^`]+)`", tests)}
    assert [int(number) for number, _tests in rows] == list(range(1, 14)) == sorted({number for number, _name in table})
    done = subprocess.run(
        [sys.executable, "-c", _COLLECT], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    selected = {(int(number), name) for number, name in re.findall(r"^selected (\d+) (\S+)$", done.stdout, re.M)}
    assert selected == table
    recipe = re.search(r"^faults-everyday:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    assert recipe is not None and "tests/faults -m way" in recipe[1]
    assert "faults-everyday" in re.findall(r"^test:(.*?)##", (ROOT / "Makefile").read_text(), re.M)[0].split()


TROUBLESHOOTING = (ROOT / "docs/troubleshooting.md").read_text()
# Written over several lines where the page's lines would be too long.
MESSAGES = re.findall(r"\*\*`(.+?)`\*\*", re.sub(r"(?<=\S)\n(?=\S)", " ", TROUBLESHOOTING))


@pytest.mark.parametrize("message", MESSAGES)
def test_every_message_quoted_in_troubleshooting_is_in_the_code(message: str) -> None:
    assert pages.said(message), f"no text of the code is {message!r}"


@pytest.mark.parametrize(
    "invented",
    [
        "sandbox ... is a purple elephant",
        "the daemon did not respond within ...",
        "its guest agent named no IP within ... s (wait_timeout)",
        "the disk is nearly full; free some space and run again (nothing was written)",
        "job_tasks: missing; give the path of a playbook",
    ],
)
def test_a_message_that_the_code_does_not_say_is_found_out(invented: str) -> None:
    assert not pages.said(invented)


def test_refusals_are_quoted_to_the_letter() -> None:
    code = (
        "import json; from agentlab_core import states; from agentlabd.http.answers import REMEDIES; "
        "print(json.dumps([states.make_conflict(operation, state).explain(REMEDIES) for operation in states.OPERATIONS "
        "for state in states.STATES]))"
    )
    said = set(in_daemon(code))
    quoted = [message for message in MESSAGES if message.startswith("cannot ") and " state. " in message]
    assert len(quoted) == 2 and set(quoted) <= said


def test_every_reason_for_keeping_is_explained() -> None:
    table = [
        "| kept because | what to do |",
        "|---|---|",
        *(f"| `{word}` | {advice} |" for word, advice in reasons.KEPT.items()),
    ]
    assert between(TROUBLESHOOTING, "kept").splitlines() == table
    used = set(re.findall(r'Kept\(\s*"([a-z_]+)"', CODE)) | {"too_young", "restored", "clock_jumped", "denied", "rule"}
    assert used <= set(reasons.KEPT), used - set(reasons.KEPT)


def test_the_sections_that_were_asked_for_are_there() -> None:
    assert re.findall(r"^## (.+)$", TROUBLESHOOTING, re.M) == [
        "Sandbox operations",
        "Creation and jobs",
        "Database",
        "Networking",
        "Proxmox VE",
        "The daemon and its command line",
        "Getting help",
        "Maintenance",
        "Performance",
    ]


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: f"{page.parent.name}-{page.name}")
def test_each_row_of_a_table_has_the_cells_of_its_head(page: Path) -> None:
    cells = 0
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        # A pipe within code or behind a backslash separates no cells.
        row = re.sub(r"`[^`]*`|\\\|", "", line).count("|") if line.startswith("|") else 0
        assert not (row and cells) or row == cells, (
            f"{page.name}, line {number}: {row - 1} cells in place of {cells - 1}"
        )
        cells = row


# Programs of the node and the host: they are not run (there is no Proxmox VE here), and each is named on purpose.
NOT_RUN = {
    "qm",
    "pveum",
    "pvesm",
    "pve-firewall",
    "journalctl",
    "systemctl",
    "apt-get",
    "wget",
    "git",
    "openssl",
    "sudo",
    "curl",
    "export",
    "tar",
}
# Tested as they stand: the restore by tests/daemon/test_restore.py,
# the role's quickstart by molecule, sqlite3 by tests/scenarios/test_pages.py, the archive by scripts/installed.sh.
ELSEWHERE = {"ansible-galaxy", "sqlite3", "pg_dump", "pg_restore", "psql", "mkdir", "mv", "cp", "chown", "echo"}
CHECKED = {"agentlab", "agentlabd", "ansible", "ansible-playbook", "ansible-inventory", "cd", "pre-commit"}


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: f"{page.parent.name}-{page.name}")
def test_every_command_in_a_page_is_one_that_is_checked(page: Path) -> None:
    """``agentlab`` below and in tests/daemon/test_pages.py, ``ansible`` and ``ansible-playbook`` in
    tests/scenarios/test_pages.py, ``make`` here.
    """
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for command in pages.commands(page):
        for part in command.split(" && "):
            program, *rest = pages.words(part)
            behind_pipes = {rest[i + 1] for i, word in enumerate(rest) if word == "|"}
            assert behind_pipes <= NOT_RUN | ELSEWHERE | CHECKED, command
            if program == "make":
                assert {word for word in rest if "=" not in word} <= targets, command
            elif program.startswith((".venv/bin/", "scripts/")):
                path = program.replace(".venv/bin/", "")
                assert (ROOT / path).exists() or path in {"pytest", "python", "ansible-playbook", "pre-commit"}, command
            else:
                assert program in NOT_RUN | ELSEWHERE | CHECKED, command


def test_privileges_that_pages_grant_exist() -> None:
    known = set(
        re.findall(r"\b(?:VM|Sys|Datastore|SDN|Pool)(?:\.[A-Z]\w+)+", (ROOT / "docs/safety.md").read_text() + CODE)
    )
    for page in pages.PAGES:
        for command in pages.commands(page):
            if " --privs " in command:
                words = pages.words(command)
                assert set(words[words.index("--privs") + 1].split()) <= known | {
                    "VM.Config.CPU",
                    "VM.Config.Memory",
                    "VM.Config.Disk",
                    "VM.Config.Cloudinit",
                }


_ASK_ALL = """
import json, sys
from agentlab_cli.app import main
statuses = {}
for command, words in json.load(sys.stdin).items():
    sys.argv[1:] = words
    try:
        main()
    except SystemExit as ended:
        statuses[command] = ended.code
print(json.dumps(statuses))
"""
PLACEHOLDERS = {"VMID": "1000", "TEXT": "text"}


def test_every_agentlab_command_in_the_pages_is_understood() -> None:
    """By the real command line, which then finds no daemon (3). What it does not understand it answers with 2."""
    found = {
        one
        for page in pages.PAGES
        for one in [*pages.commands(page), *pages.inline(page, "agentlab")]
        if one.startswith("agentlab ")
    }
    assert len(found) > 30
    # One process for all: starting one for each takes a minute.
    asked = json.dumps(
        {command: [PLACEHOLDERS.get(word, word) for word in pages.words(command)][1:] for command in sorted(found)}
    )
    done = subprocess.run(
        [sys.executable, "-c", _ASK_ALL],
        input=asked,
        env=environment("/nonexistent/agentlabd.sock"),
        text=True,
        capture_output=True,
        check=True,
    )
    statuses = json.loads(done.stdout.splitlines()[-1])
    wrong = {
        command: status
        for command, status in statuses.items()
        if status != (0 if command.startswith("agentlab completion ") else 3)
    }
    assert not wrong


def test_every_variable_of_the_awx_page_is_one_of_the_playbook() -> None:
    play = yaml.safe_load((ROOT / "playbooks/awx_setup.yml").read_text())[0]
    # Put together from the two before it.
    wanted = {name for name in play["vars"] if name.startswith("awx_")} - {"awx_api"}
    documented = {
        name
        for row in re.findall(r"^\| (`awx_.+?) \|", (ROOT / "docs/awx.md").read_text(), re.M)
        for name in re.findall(r"awx_\w+", row)
    }
    assert documented == wanted
    given = {name for command in pages.commands(ROOT / "docs/awx.md") for name in re.findall(r"-e (awx_\w+)=", command)}
    assert given and given <= wanted


def test_fragments_of_the_changelog_are_rst() -> None:
    """The markup of module documentation, such as C(x), would stand in the changelog as it is."""
    for path in (ROOT / "changelogs/fragments").glob("*.yml"):
        assert not re.search(r"\b[A-Z]\([^)]", path.read_text()), path


def test_each_entry_of_the_changelog_is_text() -> None:
    """A colon and a blank in an entry make a mapping of it, or no YAML at all."""
    paths = sorted((ROOT / "changelogs/fragments").glob("*.yml"))
    assert paths
    for path in paths:
        for section, entries in yaml.safe_load(path.read_text()).items():
            assert isinstance(entries, str) or all(isinstance(entry, str) for entry in entries), (path, section)


def test_the_cleanup_rules_of_the_page_are_understood() -> None:
    text = (
        between((ROOT / "docs/configuration.md").read_text(), "cleanup").removeprefix("```yaml\n").removesuffix("```")
    )
    policy = rules.parse(text, "page")
    assert policy.enabled and len(policy.rules) == 6 and policy.keep_destroyed == 90 * 86400
    default = rules.Policy()
    for name in ("mode", "interval", "jitter", "guard_count", "guard_percent"):
        assert getattr(policy, name) == getattr(default, name), f"{name} is shown with its default"


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: f"{page.parent.name}-{page.name}")
def test_every_block_of_yaml_is_yaml(page: Path) -> None:
    for block in pages.blocks(page, "yaml"):
        assert yaml.safe_load(block) is not None


DAEMON = (ROOT / "docs/daemon.md").read_text()


def daemon_code(name: str) -> str:
    return (ROOT / "roles/agentlabd/files/agentlabd" / f"{name}.py").read_text()


def test_every_key_of_the_daemon_stands_in_its_page_with_when_a_change_counts() -> None:
    rows = re.findall(r"^\| (`.+?) \| (.+?) \|$", between(DAEMON, "keys"), re.M)
    said = {key: when for keys, when in rows for key in re.findall(r"`(\w+)`", keys)}
    assert set(said) <= set(config.DEFAULTS)
    assert {key for key, when in said.items() if when == "with the next start"} == set(config.FIXED)
    # Whatever the daemon's own code reads of the configuration, but for where Proxmox is.
    read = set(
        re.findall(
            r"config\.(\w+)", "".join(daemon_code(name) for name in ("http/server", "daemon", "scheduler", "service"))
        )
    ) & set(config.DEFAULTS)
    assert read and read <= set(said), read - set(said)


def test_the_requests_of_the_daemons_page_are_routes() -> None:
    routes = {
        (method, re.sub(r"\{\w+\}", "[^/]+", path))
        for method, path in re.findall(r'Route\(\s*"(GET|POST)",\s*f?"([^"]+)"', daemon_code("http/table"))
    }
    # start, stop and suspend are made by one line.
    routes |= {("POST", f"/v1/sandboxes/[^/]+/{verb}") for verb in ("start", "stop", "suspend")}
    found = re.findall(r"^\$ curl (.+?)'?http://[^/]+(/v1/[^?'\s]+)", DAEMON, re.M)
    assert len(found) == 17
    for options, path in found:
        method = "POST" if "--json" in options or "--request POST" in options else "GET"
        assert any(method == one and re.fullmatch(pattern, path) for one, pattern in routes), (method, path)


def test_numbers_and_names_of_the_daemons_page_are_those_of_the_code() -> None:
    scheduler, statuses_code, api, service = (
        daemon_code(name) for name in ("scheduler", "statuses", "http/server", "service")
    )
    retry = re.search(r"^_FIRST_RETRY = (\d+)", scheduler, re.M)
    assert retry and f"after a failure after {retry[1]} s" in DAEMON
    jobs = re.search(r"service\.jobs = \{(.+)\}", scheduler)
    assert jobs and set(re.findall(r"^\| (\w+) \| .+ \| .+ \| .+ \|$", DAEMON, re.M)) - {"job"} == set(
        re.findall(r'"(\w+)"', jobs[1])
    )
    statuses = {int(number) for number in re.findall(r"\b([45]\d\d) ", DAEMON.split("An error is")[1].split("###")[0])}
    assert {int(number) for number in re.findall(r": (\d{3}),", statuses_code)} | {
        405,
        408,
        409,
        413,
        421,
        431,
    } == statuses | {500}
    shortest = re.search(r"^_SHORTEST_TOKEN = (\d+)", service, re.M)
    assert shortest and f"at least {shortest[1]} characters" in DAEMON
    for metric in re.findall(r"`agentlab_(\w+)`", DAEMON):
        assert f'"{metric}"' in daemon_code("metrics") or metric in ("operators",), metric
    for words in ("via API", "token via API (", "agentlabd (cleanup rule"):
        assert words in DAEMON
    assert 'f"token via API ({remote})"' in api and 'via API"' in api
    assert (
        re.search(r"GUARD_FROM = 5\b", (ROOT / "plugins/module_utils/_core/maintenance/cleanup.py").read_text())
        and "(from five on)" in DAEMON
    )
