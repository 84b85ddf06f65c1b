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
        "time for what is under way when the daemon stops": config.DEFAULTS["stop_timeout"].replace("s", " s"),
    }
    assert numbers == {name: str(value) for name, value in expected.items()}
    beyond = {row[0]: row[3] for row in rows("bounds")}
    assert f"at least {code['ANSWER_SECONDS']:.0f} s" in beyond["bytes of all answers that their clients have not read"]


def test_keys_and_sentences_are_those_of_the_code() -> None:
    texts = "".join(
        (DAEMON / name).read_text() for name in ("http/server.py", "http/fields.py", "http/inside.py", "connections.py")
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


def test_the_page_on_safety_leads_to_this_one() -> None:
    assert "[bounds.md](bounds.md)" in (ROOT / "docs/safety.md").read_text()
