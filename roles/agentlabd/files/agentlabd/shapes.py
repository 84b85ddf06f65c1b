# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a request may hold: one description for checking it, and for the OpenAPI document."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentlab_core.errors import InvalidInput

# A duration as the core reads it: minutes as a number, or d, h, m, s in that order; what is longer than this allows is refused, or nearly.
_DURATION = r"^(\d{1,5}|(?=\d)(\d{1,3}d)?(\d{1,4}h)?(\d{1,5}m)?(\d{1,6}s)?)$"
_NOT_ZERO = r"^(?=.*[1-9])" + _DURATION[1:]
_LONGEST_MINUTES = 5256000


@dataclass(frozen=True, slots=True)
class Field:
    """One key of a body or of a query. ``kind``: integer, string, boolean, integers, strings (lists), duration."""

    kind: str
    text: str
    required: bool = False
    low: int | None = None
    high: int | None = None
    valid: Sequence[str] = ()
    longest: int = 1000
    most: int = 100
    pattern: str | None = None
    # Its value is never quoted.
    secret: bool = False

    def schema(self) -> dict[str, Any]:
        """This field as JSON schema."""
        one: dict[str, Any]
        if self.kind in ("integer", "integers"):
            one = {"type": "integer", "minimum": self.low, "maximum": self.high}
        elif self.kind in ("string", "strings"):
            one = {"type": "string", "enum": list(self.valid)} if self.valid else {"type": "string", "maxLength": self.longest, "pattern": self.pattern}
        elif self.kind == "boolean":
            one = {"type": "boolean"}
        else:
            low = 0 if self.low == 0 else 1
            one = {"anyOf": [{"type": "integer", "minimum": low, "maximum": _LONGEST_MINUTES}, {"type": "string", "pattern": _NOT_ZERO if low else _DURATION}]}
        one = {name: value for name, value in one.items() if value is not None}
        if self.kind in ("integers", "strings"):
            one = {"type": "array", "items": one, "maxItems": self.most, "minItems": 1 if self.required else None}
            one = {name: value for name, value in one.items() if value is not None}
        return {**one, "description": self.text}

    def check(self, name: str, value: Any) -> Any:
        """The value, or InvalidInput naming the key, the value and what is valid."""
        if self.kind in ("integers", "strings"):
            if not isinstance(value, list) or len(value) > self.most or (self.required and not value):
                raise _refused(name, value, f"a list of {'whole numbers' if self.kind == 'integers' else 'texts'}, {self.most} at most")
            return [self._one(name, item) for item in value]
        return self._one(name, value)

    def _one(self, name: str, value: Any) -> Any:
        if self.kind in ("integer", "integers"):
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            if isinstance(value, bool) or not isinstance(value, int) or not (self.low or 0) <= value <= (self.high if self.high is not None else value):
                upper = "" if self.high is None else f" to {self.high}"
                raise _refused(name, value, f"a whole number from {self.low or 0}{upper}")
        elif self.kind == "boolean":
            if not isinstance(value, bool):
                raise _refused(name, value, "true or false")
        elif self.kind in ("string", "strings"):
            if not isinstance(value, str) or len(value) > self.longest:
                raise _refused(name, "that value" if self.secret else value, f"a text of {self.longest} characters at most")
            if self.pattern and not re.search(self.pattern, value):
                raise _refused(name, value, self.text)
            if self.valid and value not in self.valid:
                raise _refused(name, value, ", ".join(self.valid))
        elif isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise _refused(name, value, "minutes as a number (120) or a duration such as 90s, 30m, 2h, 1d12h")
        return value


def _refused(name: str, value: Any, valid: str) -> InvalidInput:
    return InvalidInput(f"{name}: {str(value)[:80]!r} is not valid. Valid: {valid}", option=name)


def check_body(fields: Mapping[str, Field], body: Any) -> dict[str, Any]:
    """The body's values; null is the same as leaving a key out. Unknown keys are refused: a misspelt guard must not be a missing guard."""
    if not isinstance(body, dict):
        raise InvalidInput("the body must be a JSON object")
    unknown = sorted(set(body) - set(fields))
    if unknown:
        raise InvalidInput(f"{unknown[0][:80]}: unknown key. Valid: {', '.join(fields) or 'none, leave the body out'}", option=unknown[0][:80])
    found = {name: fields[name].check(name, value) for name, value in body.items() if value is not None}
    for name, one in fields.items():
        if one.required and name not in found:
            raise InvalidInput(f"{name} is required: {one.text}", option=name)
    return found


def check_query(fields: Mapping[str, Field], query: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The query's values; a list is given by repeating the key, or with commas."""
    found: dict[str, Any] = {}
    for name, text in query:
        one = fields.get(name)
        if one is None:
            raise InvalidInput(f"{name[:80]}: unknown query parameter. Valid: {', '.join(fields) or 'none'}", option=name[:80])
        if one.kind == "strings":
            found.setdefault(name, []).extend(text.split(","))
        elif one.kind == "integer":
            found[name] = int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else text
        elif one.kind == "boolean":
            found[name] = {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
        else:
            found[name] = text
    return {name: fields[name].check(name, value) for name, value in found.items()}


def object_schema(fields: Mapping[str, Field]) -> dict[str, Any]:
    """A body as JSON schema; whatever is not required may also be null."""
    properties = {}
    for name, one in fields.items():
        schema = one.schema()
        properties[name] = schema if one.required else {"anyOf": [{k: v for k, v in schema.items() if k != "description"}, {"type": "null"}],
                                                        "description": one.text}
    found: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": False}
    required = [name for name, one in fields.items() if one.required]
    if required:
        found["required"] = required
    return found
