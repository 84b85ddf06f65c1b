# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Read and write durations: minutes as a number, or ``90s``, ``30m``, ``2h``, ``1.5h``, ``7d``, ``1d12h``."""

from __future__ import annotations

import re

from .errors import InvalidInput

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
# A number with a fraction, in the forms of Go's durations: upstream's command line sends 1.5h, .5h and 5.h.
_NUMBER = r"(\d{1,9}(?:\.\d{0,9})?|\.\d{1,9})"
_WHOLE = re.compile(rf"(?:{_NUMBER}d)?(?:{_NUMBER}h)?(?:{_NUMBER}m)?(?:{_NUMBER}s)?(?:{_NUMBER}ms)?", re.ASCII)
_MINUTES = re.compile(r"\d{1,9}", re.ASCII)
_NANOSECONDS = 10**9
# Upper bound. Anything longer is a typo, or seconds typed where minutes are meant.
MAX_SECONDS = 10 * 365 * 86400
VALID = "minutes as a number (120) or a duration such as 90s, 30m, 2h, 1d12h"
VALID_SECONDS = "seconds as a number (30) or a duration such as 90s, 30m"


def parse(value: object, option: str, *, maximum: int | None = None, zero: bool = False, valid: str = VALID) -> int:
    """Return the seconds of ``value``; a fraction of a second is rounded up.

    Raise InvalidInput, by the name of the option, for a value that is not a duration, not positive, or over ``maximum``
    seconds. A fraction needs its unit: 1.5 alone may mean minutes or hours.
    """
    text = str(value).strip()
    # "4 h" and "1 d 12 h" are durations; two numbers with a blank between them are not. Text that was copied from a web
    # page may have a no-break space as the blank.
    compact = re.sub(r"(?<=[\d.])[^\S\r\n]+(?=[dhms])|(?<=[dhms])[^\S\r\n]+(?=[\d.])", "", text)
    if isinstance(value, (bool, float)) and not (isinstance(value, float) and value.is_integer()):
        raise InvalidInput(f"{option}: {text!r} is not a duration. Valid: {valid}", option=option, value=text)
    if isinstance(value, float):
        text = str(int(value))
    if _MINUTES.fullmatch(text):
        seconds = int(text) * 60
    else:
        match = _WHOLE.fullmatch(compact)
        if not text or match is None:
            raise InvalidInput(f"{option}: {text!r} is not a duration. Valid: {valid}", option=option, value=text)
        *parts, milliseconds = match.groups()
        nanoseconds = sum(_parse_nanoseconds(part) * size for part, size in zip(parts, _UNITS.values(), strict=True))
        nanoseconds += _parse_nanoseconds(milliseconds) // 1000
        seconds = -(-nanoseconds // _NANOSECONDS)
    if seconds == 0 and not zero:
        raise InvalidInput(f"{option}: {text!r} is zero. Valid: more than zero, {valid}", option=option, value=text)
    limit = MAX_SECONDS if maximum is None else min(maximum, MAX_SECONDS)
    if seconds > limit:
        raise InvalidInput(f"{option}: {text!r} is longer than the maximum of {show(limit)}", option=option, value=text)
    return seconds


def _parse_nanoseconds(number: str | None) -> int:
    """Return a decimal number times 10**9, without the error of a float; 0 for None."""
    whole, _dot, fraction = (number or "").partition(".")
    return int(whole or 0) * _NANOSECONDS + int(fraction.ljust(9, "0") or 0)


def show(seconds: int) -> str:
    """Return the shortest exact spelling of a number of seconds, such as ``1d12h``; ``0s`` for none."""
    out = ""
    remainder = max(0, int(seconds))
    for unit, size in _UNITS.items():
        count, remainder = divmod(remainder, size)
        if count:
            out += f"{count}{unit}"
    return out or "0s"
