# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""docs/bounds.md says what the code bounds: numbers, keys and sentences."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from ansible_collections.agentlab.proxmox.plugins.module_utils._core import config, safe_yaml

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/bounds.md").read_text()
CORE = ROOT / "plugins/module_utils/_core"
DAEMON = ROOT / "roles/agentlabd/files/agentlabd"
UNIT = (ROOT / "roles/agentlabd/templates/agentlabd.service.j2").read_text()


def rows(name: str) -> list[list[str]]:
    """The cells of a table of the page, without its head."""
    text = PAGE.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0]
    return [
        [cell.strip() for cell in line.strip("| ").split("|")]
        if "||" in line
        else [cell.strip() for cell in line[1:-1].split("|")]
        for line in text.strip().splitlines()[2:]
    ]


def constants(file: str, folder: Path = DAEMON) -> dict[str, object]:
    """Return what the names in capitals of a file stand for, as far as that is arithmetic."""
    found: dict[str, object] = {}
    for node in ast.parse((folder / file).read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.isupper():
            try:
                found[node.targets[0].id] = eval(
                    compile(ast.Expression(node.value), file, "eval"), {"__builtins__": {}}, dict(found)
                )
            except (NameError, TypeError):
                continue
    return found


def test_the_bounds_on_clients_are_those_of_the_code() -> None:
    code, logs, spool = constants("connections.py"), constants("logs.py"), constants("http/spool.py")
    numbers = {row[0]: row[1] for row in rows("bounds")}
    connections = code["CONNECTIONS"]
    assert isinstance(connections, dict)
    expected = {
        "connections to the socket at once": connections["socket"],
        "connections to `listen` at once": connections["listen"],
        "connections to `metrics_listen` at once": connections["metrics_listen"],
        "descriptors kept for Proxmox VE, records and log": f"{code['_OWN_DESCRIPTORS']}, and two for each of "
        "`connections`",
        "time for the head of a request": f"{code['HEAD_SECONDS']:.0f} s",
        "time for its body": f"{code['BODY_SECONDS']:.0f} s",
        "time between two requests of a connection, and for reading an answer": f"{code['IDLE_SECONDS']:.0f} s",
        "bytes of a head, and of requests sent ahead": code["HEAD_BYTES"],
        "bytes that one read takes from a connection": f"{code['ONE_READ_BYTES']}",
        "bytes of a body": code["BODY_BYTES"],
        f"bytes of all bodies on their way, beyond the first {code['SMALL_BODY']} of each": code["BODIES_BYTES"],
        "bytes of all answers that their clients have not read": code["ANSWERS_BYTES"],
        "lines of a kind in the log that clients or libraries can cause": f"one in {logs['SELDOM_SECONDS']:.0f} s",
        "lines of requests that changed nothing, for each who asks": f"{logs['IDLE_LINES']} in "
        f"{logs['SELDOM_SECONDS']:.0f} s",
        "lists and objects within one another in a body": constants("http/fields.py")["DEEPEST_BODY"],
        "values in a body": constants("http/fields.py")["MOST_VALUES"],
        "threads for what asks Proxmox VE, and requests to it in flight": config.DEFAULTS["connections"],
        "commands and files inside sandboxes at once": constants("service.py")["GUESTS_AT_ONCE"],
        "seconds that one request waits for a command": constants("http/inside.py")["LONGEST_WAIT"],
        "files on their way at once": spool["FILES_AT_ONCE"],
        "bytes of a file": spool["FILE_BYTES"],
        "time for the next bytes of a file": f"{spool['STALL_SECONDS']:.0f} s",
        f"bytes a second of a file on average, beyond the first {spool['STALL_SECONDS']:.0f} s": spool["SLOWEST_BYTES"],
        "time for what is under way when the daemon stops": config.DEFAULTS["stop_timeout"].replace("s", " s"),
    }
    assert numbers == {name: str(value) for name, value in expected.items()}
    beyond = {row[0]: row[3] for row in rows("bounds")}
    assert f"at least {code['ANSWER_SECONDS']:.0f} s" in beyond["bytes of all answers that their clients have not read"]


def test_keys_and_sentences_are_those_of_the_code() -> None:
    texts = "".join(
        (DAEMON / f"{name}.py").read_text()
        for name in ("http/server", "http/fields", "http/inside", "http/spool", "connections")
    )
    for _what, _default, key, beyond in rows("bounds"):
        assert not key or key.strip("`") in config.DEFAULTS, key
        for sentence in re.findall(r"`([a-z][^`]{20,})`", beyond):
            pattern = re.sub(r"\d+", r"\\{[^}]+\\}", re.escape(sentence).replace(r"\ ", " "))
            assert re.search(pattern, texts), sentence


def test_the_bounds_of_the_unit_are_those_of_its_template() -> None:
    for name, value, beyond in rows("unit"):
        assert re.search(rf"^{name.strip('`')}={value}$", UNIT, re.M), name
        for other, its_value in re.findall(r"`(\w+Sec)` \((\w+)\)", beyond):
            assert f"\n{other}={its_value}\n" in UNIT


def test_the_bounds_on_files_are_those_of_the_code() -> None:
    bounds = (safe_yaml.LONGEST_FILE, safe_yaml.MAX_NODES, safe_yaml.MAX_EXPANDED, safe_yaml.MAX_DEPTH)
    assert [row[1] for row in rows("parsed")] == [str(number) for number in bounds]


def test_the_bounds_on_answers_are_those_of_the_code() -> None:
    proxmox, tasks = constants("proxmox/answers.py", CORE), constants("proxmox/tasks.py", CORE)
    address, guest = constants("vm/address.py", CORE), constants("guest/cloud_init.py", CORE)
    expected = {
        "time for a whole request, from the connection to the last byte": f"{config.DEFAULTS['api_timeout']} s",
        "bytes of an answer, unpacked": proxmox["LARGEST_ANSWER"],
        "lists and objects within one another in an answer": proxmox["DEEPEST_ANSWER"],
        "characters of a sentence of Proxmox VE's in a message": proxmox["_LONGEST_TEXT"],
        "lines of a failed task's log in a message": tasks["_LOG_LINES"],
        "characters of such a line": tasks["_LOG_LINE_CHARS"],
        "interfaces that a guest names": address["_MOST_INTERFACES"],
        "addresses of an interface": address["_MOST_ADDRESSES"],
        "characters of an address": address["_LONGEST_TEXT"],
        "guests that one pass over many sandboxes asks for addresses": address["MOST_LOOKS"],
        "time of one pass for that": f"{address['LOOK_SECONDS']:.0f} s",
        "bytes of cloud-init's result": guest["_LONGEST_RESULT"],
        "errors of cloud-init in a message": guest["_MOST_ERRORS"],
        "bytes of user data": guest["_LONGEST"],
    }
    assert {row[0]: row[1] for row in rows("answers")} == {name: str(value) for name, value in expected.items()}
    texts = "".join(path.read_text() for path in CORE.rglob("*.py"))
    # A sentence may go on in the next line of the code.
    texts = re.sub(r'"\s*f?"', "", texts)
    for _what, _default, key, beyond in rows("answers"):
        assert not key or key.strip("`") in config.DEFAULTS, key
        for sentence in re.findall(r"`([a-z][^`]{20,})`", beyond):
            pattern = re.sub(r"\d+", r"\\{[^}]+\\}", re.escape(sentence).replace(r"\ ", " "))
            assert re.search(pattern, texts), sentence


CLI = ROOT / "roles/agentlabd/files/agentlab_cli"
# Row of the page -> the folder, file and constant of the code that bounds it.
ELSEWHERE: dict[str, dict[str, tuple[Path, str, str]]] = {
    "guests": {
        "bytes of a command with its arguments, environment and folder": (CORE, "guest/command.py", "_LARGEST_WORK"),
        "bytes of a command's standard input": (CORE, "guest/command.py", "LARGEST_STDIN"),
        "bytes of its standard output, and of its standard error, that `max_output` may ask for": (
            CORE,
            "guest/command.py",
            "LARGEST_OUTPUT",
        ),
        "seconds that a command may take": (CORE, "guest/command.py", "LONGEST_TIMEOUT"),
        "bytes of each stream in one answer of the API": (DAEMON, "http/inside.py", "LARGEST_PART"),
        "bytes of a file that a module brings or fetches": (CORE, "guest/files.py", "LARGEST_FILE"),
        "bytes of a file's path": (CORE, "guest/files.py", "_LONGEST_PATH"),
        "bytes of the arguments of one request to the guest agent": (CORE, "guest/agent.py", "LARGEST_ARGUMENTS"),
        "bytes of the input of one request to the guest agent": (CORE, "guest/agent.py", "LARGEST_INPUT"),
        "attempts at a piece of a file": (CORE, "guest/files.py", "_TRIES"),
        "requests for the address of a single sandbox at once": (DAEMON, "http/lookup.py", "AT_ONCE"),
    },
    "repeats": {
        "repeats of a request to Proxmox VE that was not begun, and of a read whose answer was lost": (
            CORE,
            "proxmox/client.py",
            "_RETRIES",
        ),
        "handshakes for a new connection": (CORE, "proxmox/https.py", "_HANDSHAKES"),
        "attempts at a clone whose template is locked": (CORE, "sandboxes/refusals.py", "_CLONE_TRIES"),
        "attempts at a start, stop or suspend of a VM that is locked for a moment": (
            CORE,
            "vm/power.py",
            "_LOCK_TRIES",
        ),
        "attempts at a change of a configuration that others change": (CORE, "vm/locate.py", "_WRITE_TRIES"),
        "rounds of a destroy whose VM changes each time": (CORE, "sandboxes/removal.py", "_MARK_TRIES"),
        "attempts at a transaction on PostgreSQL that another one stands in the way of": (
            CORE,
            "store/postgres/engine.py",
            "_ATTEMPTS",
        ),
    },
    "records": {
        "time of a write for the lock of a SQLite file": (CORE, "store/sqlite/engine.py", "BUSY_SECONDS"),
        "time for a connection to PostgreSQL": (CORE, "store/postgres/engine.py", "_CONNECT_SECONDS"),
        "time of a write for a lock of PostgreSQL": (CORE, "store/postgres/engine.py", "_LOCK_SECONDS"),
        "time of a read for a lock of PostgreSQL": (CORE, "store/postgres/engine.py", "_READ_LOCK_SECONDS"),
        "time of a transaction whose process pauses": (CORE, "store/postgres/engine.py", "_IDLE_SECONDS"),
        "records that are forgotten in one transaction": (CORE, "maintenance/cleanup.py", "_FORGET_AT_ONCE"),
    },
    "values": {
        "characters of `description`": (CORE, "sandboxes/spec.py", "_LONGEST_DESCRIPTION"),
        "seconds of any duration": (CORE, "durations.py", "MAX_SECONDS"),
        "bytes of the token in `listen_token_file`": (DAEMON, "service.py", "_LONGEST_TOKEN"),
        "bytes of the first line of a request": (DAEMON, "http/server.py", "_LONGEST_LINE"),
        "refused connections at once that get a sentence": (DAEMON, "connections.py", "_MOST_EXPLAINED"),
        "sandboxes that one condition of the status names": (DAEMON, "conditions.py", "_MOST_NAMED"),
        "bytes of user data that the command line reads": (CLI, "sandbox.py", "_LONGEST_USER_DATA"),
        "bytes of public keys that the command line reads": (CLI, "sandbox.py", "_LONGEST_KEYS"),
        "bytes of a password that the command line reads": (CLI, "sandbox.py", "_LONGEST_PASSWORD"),
        "bytes of standard input that the command line sends to a command": (CLI, "inside.py", "_LARGEST_INPUT"),
        "seconds that the command line waits for an answer to a read": (CLI, "client.py", "READ_TIMEOUT"),
        "names of a node's certificate in a message": (CORE, "proxmox/certificate.py", "_MOST_NAMES"),
    },
}
# Constants that the tests above hold to the page.
TOLD_ABOVE = {
    "connections.py": "ONE_READ_BYTES HEAD_BYTES BODY_BYTES BODIES_BYTES ANSWERS_BYTES",
    "http/fields.py": "DEEPEST_BODY MOST_VALUES",
    "http/inside.py": "LONGEST_WAIT",
    "http/spool.py": "FILES_AT_ONCE FILE_BYTES SLOWEST_BYTES",
    "service.py": "GUESTS_AT_ONCE",
    "safe_yaml.py": "LONGEST_FILE MAX_NODES MAX_EXPANDED MAX_DEPTH",
    "proxmox/answers.py": "LARGEST_ANSWER DEEPEST_ANSWER _LONGEST_TEXT",
    "vm/address.py": "MOST_LOOKS _MOST_INTERFACES _MOST_ADDRESSES _LONGEST_TEXT",
    "guest/cloud_init.py": "_LONGEST _LONGEST_RESULT _MOST_ERRORS",
}
# Constants that look like a bound, and why nobody meets them.
NOT_MET = {
    "doctor/host.py": ("_FREE_BYTES", "the doctor warns below it"),
    "guest/access.py": ("_LONGEST_PAUSE _LONGEST_EXPECTED _LONGEST_HEADER", "pauses, and our own wrapper's header"),
    "guest/agent.py": ("_MOST_READ", "our own reads"),
    "guest/cloud_init.py": ("_LONGEST_ERROR", "a part of the result, which is bounded"),
    "guest/command.py": ("_LARGEST_UNSPLIT _LONGEST_LOGGED", "how input is sent; what the log quotes"),
    "guest/files.py": ("_LARGEST_PACKED", "a larger file goes unpacked"),
    "proxmox/identity.py": ("_LONGEST_DESCRIPTION", "Proxmox VE's own, for our note in the description"),
    "proxmox/tasks.py": ("LONGEST_POLL _LIST_LIMIT", "pauses; a task that a list leaves out is asked for by itself"),
    "safe_yaml.py": ("_LONGEST_NUMBER", "a longer number is a text"),
    "sandboxes/template.py": ("_MOST_READ", "our own reads"),
    "store/records.py": ("_LONGEST_FENCE _AT_ONCE", "the digits of an integer; rows of one statement, then the next"),
    "store/runs.py": ("_MOST_ACKS", "the rest goes along with the next request"),
    "connections.py": ("READ_BYTES ACCEPTED_AT_ONCE", "pieces of what is bounded"),
    "http/fields.py": ("_LONGEST_MINUTES", "the ten years of durations.py"),
    "http/spool.py": ("PART_BYTES", "pieces of what is bounded"),
}
_BOUND = re.compile(
    r"_?(LARGEST|LONGEST|MOST|DEEPEST|MAX)_\w+|_?LONGEST|_?(\w+_)?(TRIES|RETRIES|ATTEMPTS|AT_ONCE|HANDSHAKES)|"
    r"\w+_(BYTES|LIMIT)|READ_TIMEOUT"
)


def test_the_other_bounds_are_those_of_the_code() -> None:
    for table, bounds in ELSEWHERE.items():
        told = {row[0]: row[1].removesuffix(" s") for row in rows(table)}
        expected = {}
        for name, (folder, file, constant) in bounds.items():
            value = constants(file, folder)[constant]
            assert isinstance(value, (int, float)), constant
            expected[name] = f"{value:.0f}"
        assert told == expected
    texts = "".join(path.read_text() for folder in (CORE, DAEMON, CLI) for path in folder.rglob("*.py"))
    texts = re.sub(r'"\s*f?"', "", texts)
    for table in ELSEWHERE:
        for *_cells, beyond in rows(table):
            for sentence in re.findall(r"`([a-zE][^`]{14,})`", beyond):
                pattern = re.sub(r"\d+", r"\\{[^}]+\\}", re.escape(sentence).replace(r"\ ", " "))
                assert re.search(pattern, texts), sentence


def test_every_bound_of_the_code_stands_in_the_page() -> None:
    """A new constant that bounds something needs its row, or a reason why nobody meets it."""
    told = {(file, name) for bounds in ELSEWHERE.values() for _folder, file, name in bounds.values()}
    told |= {(file, name) for file, names in TOLD_ABOVE.items() for name in names.split()}
    told |= {(file, name) for file, (names, _why) in NOT_MET.items() for name in names.split()}
    code = {
        (str(path.relative_to(folder)), node.targets[0].id)
        for folder in (CORE, DAEMON, CLI)
        for path in folder.rglob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        if _BOUND.fullmatch(node.targets[0].id)
    }
    assert code - told == set()
    assert {pair for pair in told - code if _BOUND.fullmatch(pair[1])} == set()


def test_the_page_on_safety_leads_to_this_one() -> None:
    assert "[bounds.md](bounds.md)" in (ROOT / "docs/safety.md").read_text()
