# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Durations as people write them: minutes as a number, or ``90s``, ``30m``, ``2h``, ``7d``, ``1d12h``."""

from __future__ import annotations

import re

from .errors import InvalidInput

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_WHOLE = re.compile(r"(?:(\d{1,9})d)?(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9})s)?", re.ASCII)
_MINUTES = re.compile(r"\d{1,9}", re.ASCII)
# Upper bound. Anything longer is a typo, or seconds typed where minutes are meant.
MAX_SECONDS = 10 * 365 * 86400
VALID = "minutes as a number (120) or a duration such as 90s, 30m, 2h, 1d12h"
VALID_SECONDS = "seconds as a number (30) or a duration such as 90s, 30m"


def parse(value: object, option: str, *, maximum: int | None = None, zero: bool = False, valid: str = VALID) -> int:
    """Seconds of ``value``; refuses by the name of the option what is not a duration, not positive, or over
    ``maximum`` seconds.
    """
    text = str(value).strip()
    # "4 h" and "1 d 12 h" mean what they say; two numbers with a blank between them do not.
    compact = re.sub(r"(?<=\d)[ \t]+(?=[dhms])|(?<=[dhms])[ \t]+(?=\d)", "", text)
    if isinstance(value, (bool, float)) and not (isinstance(value, float) and value.is_integer()):
        raise InvalidInput(f"{option}: {text!r} is not a duration. Valid: {valid}", option=option, value=text)
    if isinstance(value, float):
        text = str(int(value))
    if _MINUTES.fullmatch(text):
        seconds = int(text) * 60
    else:
        found = _WHOLE.fullmatch(compact)
        if not text or found is None:
            raise InvalidInput(f"{option}: {text!r} is not a duration. Valid: {valid}", option=option, value=text)
        seconds = sum(int(part) * size for part, size in zip(found.groups(), _UNITS.values(), strict=True) if part)
    if seconds == 0 and not zero:
        raise InvalidInput(f"{option}: {text!r} is zero. Valid: more than zero, {valid}", option=option, value=text)
    limit = MAX_SECONDS if maximum is None else min(maximum, MAX_SECONDS)
    if seconds > limit:
        raise InvalidInput(f"{option}: {text!r} is longer than the maximum of {show(limit)}", option=option, value=text)
    return seconds


def show(seconds: int) -> str:
    """The shortest exact spelling, such as ``1d12h``; ``0s`` for nothing."""
    out = ""
    rest = max(0, int(seconds))
    for unit, size in _UNITS.items():
        count, rest = divmod(rest, size)
        if count:
            out += f"{count}{unit}"
    return out or "0s"
