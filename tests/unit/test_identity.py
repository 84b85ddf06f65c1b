# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The judge's table: which marker and which SMBIOS UUID make which verdict."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.proxmox import identity

from tests.support.pages import ROOT

OURS, OTHER = "0b54ae1c-0d4e-4d8c-9f34-111111111111", "0b54ae1c-0d4e-4d8c-9f34-222222222222"
SMBIOS, STRANGE = "aaaaaaaa-0d4e-4d8c-9f34-333333333333", "bbbbbbbb-0d4e-4d8c-9f34-444444444444"
MINE, THEIRS = identity.make_marker(OURS), identity.make_marker(OTHER)


def config(description: str | None, smbios: str | None, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"name": "x", "digest": "d1", **more}
    if description is not None:
        found["description"] = description
    if smbios is not None:
        found["smbios1"] = f"uuid={smbios}"
    return found


@pytest.mark.parametrize(
    ("description", "smbios", "verdict"),
    [
        (MINE, SMBIOS, identity.MATCH),
        (MINE, SMBIOS.upper(), identity.MATCH),
        ("a note\n" + MINE + "\nanother note", SMBIOS, identity.MATCH),
        (MINE, STRANGE, identity.AMBIGUOUS),
        (MINE, None, identity.AMBIGUOUS),
        (MINE + "\n" + THEIRS, SMBIOS, identity.AMBIGUOUS),
        (MINE + "\n" + THEIRS, STRANGE, identity.AMBIGUOUS),
        (THEIRS, SMBIOS, identity.AMBIGUOUS),
        (None, SMBIOS, identity.AMBIGUOUS),
        ("", SMBIOS, identity.AMBIGUOUS),
        (THEIRS, STRANGE, identity.FOREIGN),
        (None, STRANGE, identity.FOREIGN),
        (None, None, identity.FOREIGN),
        ("agentlab-sandbox:", STRANGE, identity.FOREIGN),
        (f"agentlab-sandbox: {OURS}0", STRANGE, identity.FOREIGN),
        (OURS, STRANGE, identity.FOREIGN),
    ],
)
def test_both_marks_decide_about_a_bound_record(description: str | None, smbios: str | None, verdict: str) -> None:
    assert identity.judge(OURS, SMBIOS, config(description, smbios)).identity == verdict


@pytest.mark.parametrize(
    ("description", "smbios", "more", "verdict"),
    [
        (MINE, SMBIOS, {}, identity.UNBOUND),
        (MINE, None, {}, identity.UNBOUND),
        (MINE + "\n" + THEIRS, SMBIOS, {}, identity.AMBIGUOUS),
        (THEIRS, SMBIOS, {}, identity.FOREIGN),
        (None, SMBIOS, {}, identity.FOREIGN),
        ("clone of VM 9000", SMBIOS, {"lock": "clone"}, identity.UNKNOWN),
        (None, None, {"lock": "create"}, identity.UNKNOWN),
        (MINE, SMBIOS, {"lock": "clone"}, identity.UNKNOWN),
        (MINE, SMBIOS, {"lock": "backup"}, identity.UNBOUND),
    ],
)
def test_the_marker_decides_about_an_unbound_record(
    description: str | None, smbios: str | None, more: dict[str, str], verdict: str
) -> None:
    assert identity.judge(OURS, None, config(description, smbios, **more)).identity == verdict


def test_name_and_tags_are_no_proof() -> None:
    assert identity.judge(OURS, SMBIOS, config(None, STRANGE, name="a1", tags="agentlab")).identity == identity.FOREIGN


@pytest.mark.parametrize(
    "smbios1", ["", "uuid=", "uuid=x", f"xuuid={SMBIOS}", f"uuid={SMBIOS}0", "manufacturer=a", 5, None]
)
def test_an_smbios_that_cannot_be_read_matches_nothing(smbios1: object) -> None:
    verdict = identity.judge(OURS, SMBIOS, {"description": MINE, "smbios1": smbios1})
    assert verdict.identity == identity.AMBIGUOUS and verdict.digest is None


def test_the_uuid_is_read_among_other_smbios_values() -> None:
    assert identity.read_smbios_uuid({"smbios1": f"base64=1,uuid={SMBIOS},serial=MQ=="}) == SMBIOS


def test_verdict_carries_digest_and_evidence() -> None:
    verdict = identity.judge(OURS, SMBIOS, config(THEIRS, STRANGE))
    assert verdict.digest == "d1"
    assert (
        verdict.evidence["marker"] == "other"
        and verdict.evidence["smbios_uuid"] == STRANGE
        and verdict.evidence["expected_smbios_uuid"] == SMBIOS
    )


def test_deletion_note_keeps_the_marker_and_does_not_grow() -> None:
    once = identity.add_deletion_note({"description": MINE}, "prune", "2026-01-01T00:00:00Z")
    assert (
        identity.read_markers({"description": once}) == {OURS} and "agentlab-delete: prune 2026-01-01T00:00:00Z" in once
    )
    twice = identity.add_deletion_note({"description": once}, "destroy", "2026-01-01T00:00:01Z")
    assert twice.count("agentlab-delete:") == 1 and len(twice.splitlines()) == len(once.splitlines())


def test_deletion_note_of_the_longest_description_still_carries_marker_and_note() -> None:
    note = identity.add_deletion_note({"description": MINE + "\n" + "x" * 8100}, "destroy", "2026-01-01T00:00:00Z")
    assert len(note) <= 8192 and identity.read_markers({"description": note}) == {OURS}
    # The marker need not stand first: text of somebody's own in front of it may not push it out.
    note = identity.add_deletion_note({"description": "x" * 8050 + "\n" + MINE}, "destroy", "2026-01-01T00:00:00Z")
    assert len(note) <= 8192 and identity.read_markers({"description": note}) == {OURS}


def test_the_judge_takes_markers_with_and_without_a_database() -> None:
    for database in (None, "a" * 32, "b" * 32):
        mark = identity.make_marker(OURS, database)
        assert identity.judge(OURS, SMBIOS, config(mark, SMBIOS)).identity == identity.MATCH
        assert identity.read_markers({"description": mark}) == {OURS} and identity.is_ours(mark)


@pytest.mark.parametrize(
    ("description", "others"),
    [
        (identity.make_marker(OURS, "a" * 32), set()),
        (identity.make_marker(OURS, "b" * 32), {"b" * 32}),
        (identity.make_marker(OURS, "b" * 32).upper(), {"b" * 32}),
        (identity.make_marker(OURS), set()),
        (identity.make_marker(OURS, "b" * 32) + "\n" + identity.make_marker(OTHER), set()),
        (identity.make_marker(OURS, "b" * 32) + "\n" + identity.make_marker(OTHER, "a" * 32), set()),
        (identity.make_marker(OURS, "b" * 32) + "\n" + identity.make_marker(OTHER, "c" * 32), {"b" * 32, "c" * 32}),
        (f"agentlab-sandbox: {OURS} (database abc)", set()),
        ("", set()),
    ],
)
def test_a_vm_is_another_databases_only_if_each_marker_says_so(description: str, others: set[str]) -> None:
    assert identity.read_other_databases({"description": description}, "a" * 32) == others
    assert identity.read_other_databases({"description": description}, None) == set()


def test_the_page_on_safety_has_the_table_of_the_judge() -> None:
    """Exactly one row of docs/safety.md fits each combination of marker, SMBIOS UUID and lock, and says the verdict."""
    page = (ROOT / "docs/safety.md").read_text(encoding="utf-8")
    table = page.partition("<!-- verdicts -->")[2].partition("<!-- /verdicts -->")[0]
    rows = re.findall(r"^\| ([A-Z]+) \| (.+) \| (.+) \| (.+) \|$", table, re.M)
    markers = {"ours alone": MINE, "several": MINE + "\n" + THEIRS, "other": THEIRS, "missing": None}
    uuids = {
        "as in the record": (SMBIOS, SMBIOS),
        "not as in the record": (SMBIOS, STRANGE),
        "none in the record": (None, STRANGE),
    }
    locks = {"yes": ("clone", "create"), "no": (None, "backup")}
    for marker, uuid, lock in itertools.product(markers, uuids, locks):
        verdicts = [
            verdict
            for verdict, row_markers, row_uuid, row_locks in rows
            if (row_markers == "any" or marker in re.split(r", | or ", row_markers))
            and uuid == row_uuid
            and lock in row_locks.split(" or ")
        ]
        known, present = uuids[uuid]
        judged = [
            identity.judge(OURS, known, config(markers[marker], present, lock=value)).identity for value in locks[lock]
        ]
        assert verdicts * 2 == judged, (marker, uuid, lock)
