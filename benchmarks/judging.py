# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Rows of the table: what was measured, judged against its target.

The keys of a row are those of results.json: ``row`` (its number), ``what``, ``target`` and ``measured`` as the table
shows them, ``used`` (the share of what the target allows; the target is met up to 1), ``met`` and ``values`` (the
single values).
"""

from __future__ import annotations

import statistics
from typing import Any

Row = dict[str, Any]


def divide_medians(numerators: list[float], denominators: list[float]) -> float:
    """Return the median of the numerators divided by that of the denominators, both in the same unit."""
    return statistics.median(numerators) / statistics.median(denominators)


def subtract_each(seconds: list[float], base: list[float]) -> list[float]:
    """Return each of the seconds minus the base that was measured in the same round.

    Raises ValueError when the two have different lengths.
    """
    return [whole - part for whole, part in zip(seconds, base, strict=True)]


def make_row(number: str, what: str, target: str, measured: str, used: float, values: dict[str, Any]) -> Row:
    """Return a row of the table.

    ``number`` is that of the row. ``what``, ``target`` and ``measured`` are the texts of the table. ``used``: the share
    of what the target allows; the row is met up to 1. ``values``: the single values, by name.
    """
    return {
        "row": number,
        "what": what,
        "target": target,
        "measured": measured,
        "used": round(used, 4),
        "met": used <= 1,
        "values": values,
    }


def make_at_least_row(
    number: str, what: str, target: float, measured: float, unit: str, values: dict[str, Any], shipped: float
) -> Row:
    """Return a row that is met when the measured number is at least the target.

    ``target`` and ``measured`` are in ``unit``, a text that follows the number. ``shipped``: the same ratio measured
    with the module shipped, which the row shows but does not judge. The others are as for ``make_row``.
    """
    return make_row(
        number,
        what,
        f"at least {target:g}{unit}",
        f"{measured:.1f}{unit} ({shipped:.1f}x shipped)",
        target / measured,
        values,
    )


def make_at_most_row(
    number: str,
    what: str,
    target: float,
    measured: float,
    unit: str,
    values: dict[str, Any],
    shipped: float | None = None,
) -> Row:
    """Return a row that is met when the measured number is at most the target.

    The arguments are as for ``make_at_least_row``. ``shipped=None``: the row shows no such ratio.
    """
    number_text = f"{measured:.2f}" if isinstance(measured, float) else str(measured)
    shipped_text = "" if shipped is None else f" ({shipped:.2f}x shipped)"
    return make_row(
        number,
        what,
        f"at most {f'{target:.2f}' if isinstance(target, float) else target}{unit}",
        f"{number_text}{unit}{shipped_text}",
        measured / target,
        values,
    )
