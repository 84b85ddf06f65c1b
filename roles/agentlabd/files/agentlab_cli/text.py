# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Text for people: harmless for their terminal, durations and ages as they would write them, tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_WHOLE = re.compile(r"(?:(\d{1,9})d)?(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9})s)?", re.ASCII)
# Names, addresses and messages may come from inside a guest: nothing in them may steer the terminal (C0, DEL, C1).
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def clean(text: object) -> str:
    """Text without control characters; line feeds and tabs stay."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", str(text))


def cell(value: object) -> str:
    """One value on one line: lists with commas, nothing as a hyphen."""
    if value is None or value in ("", []):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(cell(one) for one in value)
    if isinstance(value, dict):
        return ", ".join(f"{name}={cell(one)}" for name, one in value.items())
    return " ".join(clean(value).split())


def seconds(text: str) -> int:
    """Seconds of ``30`` (seconds), ``90s``, ``5m``, ``1h30m``; ValueError for anything else, and for nothing."""
    if text.isascii() and text.isdecimal():
        found = int(text)
    else:
        parts = _WHOLE.fullmatch(text)
        if parts is None:
            raise ValueError(text)
        found = sum(int(part) * size for part, size in zip(parts.groups(), _UNITS.values(), strict=True) if part)
    if not 0 < found < 10**9:
        raise ValueError(text)
    return found


def span(length: float) -> str:
    """A length of time, at most two units: ``1d4h``, ``3m``, ``12s``."""
    rest, out = max(0, int(length)), []
    for unit, size in _UNITS.items():
        count, rest = divmod(rest, size)
        if count:
            out.append(f"{count}{unit}")
    return "".join(out[:2]) or "0s"


def until(value: object, now: datetime | None = None) -> str:
    """How long until a moment of an answer: ``1h58m``, ``over`` when it has passed, a hyphen when there is none."""
    moment = _moment(value)
    if moment is None:
        return cell(value)
    left = (moment - (now or datetime.now(UTC))).total_seconds()
    return span(left) if left > 0 else "over"


def since(value: object, now: datetime | None = None) -> str:
    """How long ago a moment of an answer was."""
    moment = _moment(value)
    return cell(value) if moment is None else span(((now or datetime.now(UTC)) - moment).total_seconds())


def _moment(value: object) -> datetime | None:
    try:
        return datetime.strptime(str(value), "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    except ValueError:
        return None


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns for people; nothing in a cell breaks its line."""
    from tabulate import tabulate

    text: str = tabulate([[cell(value) for value in row] for row in rows], headers=list(headers), tablefmt="plain", disable_numparse=True)
    return "\n".join(line.rstrip() for line in text.splitlines())


def pairs(rows: Iterable[tuple[str, Any]]) -> str:
    """Names and values, one pair a line."""
    shown = [(name, cell(value)) for name, value in rows]
    width = max((len(name) for name, _value in shown), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in shown)
