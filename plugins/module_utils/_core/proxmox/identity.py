# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Judge whether the VM at a VMID is ours, by two marks.

The marks are our UUID in the description, which the clone call itself sets, so the VM has it from its first moment, and
the SMBIOS UUID that Proxmox gave the clone. Name and tags prove nothing: a clone made by hand copies them, and the
description as well.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

MATCH = "MATCH"
FOREIGN = "FOREIGN"
AMBIGUOUS = "AMBIGUOUS"
UNBOUND = "UNBOUND"
UNKNOWN = "UNKNOWN"

# The tag is a hint for people and inventories, never a proof.
OUR_TAG = "agentlab"
_MARKER = re.compile(
    r"agentlab-sandbox: ([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})(?![0-9a-f-])",
    re.IGNORECASE | re.ASCII,
)
# The id of the database with the sandbox's record. Markers of older releases lack it.
_DATABASE = re.compile(r" \(database ([0-9a-f]{32})\)", re.IGNORECASE | re.ASCII)
_NOTE = "agentlab-delete:"
_SMBIOS = re.compile(r"(?:^|,)uuid=([0-9A-Fa-f-]{36})(?:,|$)")
_LONGEST_DESCRIPTION = 8192


@dataclass(slots=True)
class Verdict:
    """The verdict on one VM, with its evidence."""

    identity: str
    evidence: dict[str, Any]
    digest: str | None = None
    config: dict[str, Any] | None = None


def make_marker(uuid: str, database: str | None = None) -> str:
    """Return the description with which a sandbox's VM is cloned.

    ``database`` is the id of the database with the sandbox's record.
    """
    of = f" (database {database})" if database else ""
    return (
        f"agentlab-sandbox: {uuid}{of}\n"
        "Throw-away VM of agentlab.proxmox. Keep the line above: without it the VM is not recognised."
    )


def replace_text(config: dict[str, Any], text: str) -> str:
    """Return the description with ``text`` after its first empty line.

    The lines before that stay, because they contain our marker.
    """
    return f"{_read_head(config)}\n\n{text}" if text else _read_head(config)


def read_own_text(config: dict[str, Any]) -> str:
    """Return the description after its first empty line, without the note of a deletion."""
    text = str(config.get("description") or "").partition("\n\n")[2]
    return "\n".join(line for line in text.split("\n") if not line.startswith(_NOTE)).strip("\n")


def _read_head(config: dict[str, Any]) -> str:
    head = str(config.get("description") or "").partition("\n\n")[0]
    return "\n".join(line for line in head.splitlines() if not line.startswith(_NOTE)).strip("\n")


def is_ours(text: str) -> bool:
    """Return whether a text contains our marker or note, which only we may write into a description."""
    return _MARKER.search(text) is not None or any(line.startswith(_NOTE) for line in text.splitlines())


def read_markers(config: dict[str, Any]) -> set[str]:
    """Return the sandbox UUIDs in the markers of a VM's description."""
    return {uuid.lower() for uuid in _MARKER.findall(str(config.get("description") or ""))}


def read_other_databases(config: dict[str, Any], database: str | None) -> set[str]:
    """Return the databases named by the VM's markers, if every marker names one and none names ``database``.

    Otherwise return an empty set: the VM is then not known to belong to another database.
    """
    text = str(config.get("description") or "")
    named = set()
    for match in _MARKER.finditer(text):
        of = _DATABASE.match(text, match.end())
        if of is None:
            return set()
        named.add(of[1].lower())
    return set() if database is None or database in named else named


def read_smbios_uuid(config: dict[str, Any]) -> str | None:
    """Return the SMBIOS UUID of a VM's configuration in lower case, or None."""
    match = _SMBIOS.search(str(config.get("smbios1") or ""))
    return match[1].lower() if match else None


def judge(uuid: str, known_smbios: str | None, config: dict[str, Any]) -> Verdict:
    """Judge whose VM a configuration describes. ``uuid`` is the sandbox's, ``known_smbios`` the SMBIOS UUID on record.

    | verdict | the description carries | the SMBIOS UUID is | what callers do |
    |---|---|---|---|
    | MATCH | our marker alone | the one on record | act on the VM |
    | UNBOUND | our marker alone | not on record yet | bind it, if our own clone task ended well |
    | UNKNOWN | not our marker, or ours before binding | any, while a clone or restore runs | leave it, look again |
    | AMBIGUOUS | our marker or not | the other mark is ours | leave it, report it |
    | FOREIGN | not our marker | not ours | leave it; our own VM is gone |

    docs/safety.md has the same table for operators.
    """
    found_markers, found_smbios = read_markers(config), read_smbios_uuid(config)
    ours = found_markers == {uuid}
    evidence = {
        "marker": "ours" if ours else ("several" if uuid in found_markers else ("other" if found_markers else "none")),
        "smbios_uuid": found_smbios,
        "expected_smbios_uuid": known_smbios,
        "name": config.get("name"),
        "lock": config.get("lock"),
    }
    # While a clone or a restore runs, the configuration decides nothing: the VM may become our own clone, or be ours
    # again from its backup.
    unfinished = config.get("lock") in ("clone", "create")
    if known_smbios is not None and found_smbios == known_smbios.lower():
        identity = MATCH if ours else AMBIGUOUS
    elif unfinished and (known_smbios is None or uuid not in found_markers):
        identity = UNKNOWN
    elif ours and known_smbios is None:
        identity = UNBOUND
    else:
        identity = AMBIGUOUS if uuid in found_markers else FOREIGN
    return Verdict(identity, evidence, str(config.get("digest") or "") or None, config)


def add_deletion_note(config: dict[str, Any], operation: str, at: str | None) -> str:
    """Return the description with a line about the deletion: by which operation, and when. Replaces an earlier line."""
    lines = [line for line in str(config.get("description") or "").splitlines() if not line.startswith(_NOTE)]
    text = "\n".join([*lines, f"{_NOTE} {operation} {at}"])
    if len(text) > _LONGEST_DESCRIPTION:
        # Cut a long description, but never our own lines: put the lines with a marker first.
        text = "\n".join(sorted(text.splitlines(), key=lambda line: not _MARKER.search(line)))
    return text[:_LONGEST_DESCRIPTION]
