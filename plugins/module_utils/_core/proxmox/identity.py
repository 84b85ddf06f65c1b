# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Judge whether the VM at a VMID is ours, by two marks.

- The marker: our UUID in the description. The clone request sets the description, so the VM has the marker from the
  beginning.
- The SMBIOS UUID. Proxmox generates a new one for each clone.

Name and tags prove nothing, because a clone made by hand copies them. Such a clone copies the marker as well, so the
marker alone proves nothing either.
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

# People and inventories use the tag. The tag proves nothing: a clone made by hand copies it.
OUR_TAG = "agentlab"
_MARKER = re.compile(
    r"agentlab-sandbox: ([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})(?![0-9a-f-])",
    re.IGNORECASE | re.ASCII,
)
# The id of the database that has the sandbox's record. Markers of older releases lack the id.
_DATABASE = re.compile(r" \(database ([0-9a-f]{32})\)", re.IGNORECASE | re.ASCII)
_NOTE = "agentlab-delete:"
_SMBIOS = re.compile(r"(?:^|,)uuid=([0-9A-Fa-f-]{36})(?:,|$)")
_LONGEST_DESCRIPTION = 8192


@dataclass(slots=True)
class Verdict:
    """The verdict on one VM: ``identity`` (see judge()), the evidence, and the configuration that was judged."""

    identity: str
    evidence: dict[str, Any]
    digest: str | None = None
    config: dict[str, Any] | None = None


def make_marker(uuid: str, database: str | None = None) -> str:
    """Return the description for the clone of a sandbox: its marker, and a sentence for people.

    ``uuid`` is the sandbox's UUID, ``database`` the id of the database that has the sandbox's record.
    """
    of = f" (database {database})" if database else ""
    return (
        f"agentlab-sandbox: {uuid}{of}\n"
        "Throw-away VM of agentlab.proxmox. Keep the line above: without it the VM is not recognised."
    )


def replace_text(config: dict[str, Any], text: str) -> str:
    """Return the VM's description with ``text`` after its first empty line.

    The lines before the empty line contain our marker, so they stay.
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
    """Return whether a text contains our marker or our note of a deletion. A user's text may contain neither."""
    return _MARKER.search(text) is not None or any(line.startswith(_NOTE) for line in text.splitlines())


def read_markers(config: dict[str, Any]) -> set[str]:
    """Return the sandbox UUIDs in the markers of a VM's description."""
    return {uuid.lower() for uuid in _MARKER.findall(str(config.get("description") or ""))}


def read_other_databases(config: dict[str, Any], database: str | None) -> set[str]:
    """Return the ids of other databases if the VM is known to belong to them; otherwise an empty set.

    Every marker of the VM must name a database, and no marker may name ``database``, our own id.
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
    """Judge whose VM a configuration describes, and return the verdict with its evidence.

    ``uuid`` is the sandbox's UUID, ``known_smbios`` the SMBIOS UUID in its record, None before the VM is bound.

    | verdict | action of the caller |
    |---|---|
    | MATCH | act on the VM |
    | UNBOUND | bind the VM, if our own clone task ended well; else treat it as AMBIGUOUS |
    | UNKNOWN | leave the VM and look again: a clone or a restore is not finished |
    | AMBIGUOUS | leave the VM, report it |
    | FOREIGN | leave the VM; our own VM is gone |

    docs/safety.md, "What each verdict means", has the table of marker, SMBIOS UUID and lock behind each verdict.
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
    # While a clone or a restore runs, the configuration is not complete: the VM may become our clone, or our own VM
    # restored from its backup.
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
    """Return the VM's description with one line about its deletion: the operation, and its time ``at``."""
    lines = [line for line in str(config.get("description") or "").splitlines() if not line.startswith(_NOTE)]
    text = "\n".join([*lines, f"{_NOTE} {operation} {at}"])
    if len(text) > _LONGEST_DESCRIPTION:
        # Put the lines with a marker first, so that the cut never removes them.
        text = "\n".join(sorted(text.splitlines(), key=lambda line: not _MARKER.search(line)))
    return text[:_LONGEST_DESCRIPTION]
