# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Describe the fields of requests, once for checking and for the OpenAPI document."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentlab_core import durations, patterns
from agentlab_core.errors import InvalidInput

# Durations that the document promises: minutes as a number, or d, h, m, s in that order. Longer ones are refused by the
# maximum. The core accepts more forms: fractions (1.5h), blanks and ms.
_DURATION = r"^(\d{1,5}|(?=\d)(\d{1,3}d)?(\d{1,4}h)?(\d{1,5}m)?(\d{1,6}s)?)$"
_NOT_ZERO = r"^(?=.*[1-9])" + _DURATION[1:]
_LONGEST_MINUTES = 5256000
# Depth and number of values of a body. No request needs more than a depth of three and some hundred values.
DEEPEST_BODY = 16
MOST_VALUES = 20000
# The parts of JSON that are counted: a text (even without an end), or a sign.
_STEP = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{},]', re.DOTALL)
# Single-line fields refuse newlines: multi-line text is usually a pasted key, and error messages quote the value.
_LINE = r"^[^\x00-\x1f\x7f]*$"

# Names of environment variables, the keys in an object of texts.
_VARIABLE = r"^[A-Za-z_][A-Za-z0-9_]{0,99}$"


@dataclass(frozen=True, slots=True)
class Field:
    """One key of a body or of a query.

    ``kind``: integer, string, boolean, duration. ``integers`` and ``strings`` are lists, ``texts`` is an object of
    texts.
    """

    kind: str
    text: str
    required: bool = False
    low: int | None = None
    high: int | None = None
    valid: Sequence[str] = ()
    longest: int = 1000
    most: int = 100
    pattern: str | None = None
    # The value may have several lines.
    lines: bool = False
    # For "strings": splits a text with several values (from a textarea or file), and each text in a list.
    split: Callable[[str, Any], list[str]] | None = None
    # Messages never quote the value.
    secret: bool = False
    # For "string": accept a whole number as its digits, where a VMID may take the place of a name.
    number: bool = False

    @property
    def _pattern(self) -> str | None:
        return self.pattern or (None if self.lines or self.split else _LINE)

    def compose_schema(self) -> dict[str, Any]:
        """Return this field as JSON schema."""
        schema: dict[str, Any]
        if self.kind in ("integer", "integers"):
            schema = {"type": "integer", "minimum": self.low, "maximum": self.high}
        elif self.kind in ("string", "strings", "texts"):
            schema = (
                {"type": "string", "enum": list(self.valid)}
                if self.valid
                else {"type": "string", "maxLength": self.longest, "pattern": self._pattern}
            )
            if self.number:
                schema = {name: value for name, value in schema.items() if value is not None}
                schema = {"anyOf": [{"type": "integer", "minimum": 0}, schema]}
        elif self.kind == "boolean":
            schema = {"type": "boolean"}
        else:
            low = 0 if self.low == 0 else 1
            schema = {
                "anyOf": [
                    {"type": "integer", "minimum": low, "maximum": _LONGEST_MINUTES},
                    {"type": "string", "pattern": _NOT_ZERO if low else _DURATION},
                ]
            }
        schema = {name: value for name, value in schema.items() if value is not None}
        if self.kind in ("integers", "strings"):
            schema = {"type": "array", "items": schema, "maxItems": self.most}
        elif self.kind == "texts":
            names = {"type": "string", "pattern": _VARIABLE}
            schema = {
                "type": "object",
                "propertyNames": names,
                "additionalProperties": schema,
                "maxProperties": self.most,
            }
        if self.kind in ("integers", "strings"):
            schema = {name: value for name, value in schema.items() if value is not None}
            if self.split:
                schema = {"anyOf": [schema, {"type": "string", "maxLength": self.longest * self.most}]}
        return {**schema, "description": self.text}

    def check(self, name: str, value: Any) -> Any:
        """Return the checked value. Raises InvalidInput with the key, the value and what is valid."""
        if self.split and isinstance(value, str):
            if len(value) > self.longest * self.most or not patterns.is_encodable(value):
                raise self._make_error(
                    name,
                    value,
                    f"a text of {self.longest * self.most} characters at most that UTF-8 can hold, or a list of texts",
                )
            return self.split(name, value)
        if self.kind in ("integers", "strings"):
            if not isinstance(value, list) or len(value) > self.most:
                raise self._make_error(
                    name,
                    value,
                    f"a list of {'whole numbers' if self.kind == 'integers' else 'texts'}, {self.most} at most",
                )
            items = [self._check_value(name, item) for item in value]
            return self.split(name, items) if self.split else items
        if self.kind == "texts":
            if not isinstance(value, dict) or len(value) > self.most:
                raise self._make_error(name, value, f"an object of texts, {self.most} at most")
            for key in value:
                if not _matches(_VARIABLE, key):
                    raise self._make_error(name, key, "names of letters, digits and _, no digit first")
            return {key: self._check_value(name, text) for key, text in value.items()}
        return self._check_value(name, value)

    def _check_value(self, name: str, value: Any) -> Any:
        if self.kind in ("integer", "integers"):
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            if (
                isinstance(value, bool)
                or not isinstance(value, int)
                or not (self.low or 0) <= value <= (self.high if self.high is not None else value)
            ):
                upper = "" if self.high is None else f" to {self.high}"
                quotes = ", without quotes" if isinstance(value, str) and value.strip().isdecimal() else ""
                raise self._make_error(name, value, f"a whole number from {self.low or 0}{upper}{quotes}")
        elif self.kind == "boolean":
            if not isinstance(value, bool):
                raise self._make_error(name, value, "true or false")
        elif self.kind in ("string", "strings", "texts"):
            if self.number and isinstance(value, int) and not isinstance(value, bool) and value >= 0:
                value = str(value)
            if not isinstance(value, str):
                or_number = "a whole number, or " if self.number else ""
                raise self._make_error(
                    name, value, f"{or_number}a text in quotes, of {self.longest} characters at most"
                )
            if len(value) > self.longest:
                raise self._make_error(name, value, f"a text of {self.longest} characters at most")
            if not patterns.is_encodable(value):
                raise self._make_error(name, value, "a text that UTF-8 can hold")
            if self._pattern and not _matches(self._pattern, value):
                raise self._make_error(name, value, self.text if self.pattern else "a text in one line")
            if self.valid and value not in self.valid:
                raise self._make_error(name, value, ", ".join(self.valid))
        elif isinstance(value, bool) or not isinstance(value, (int, float, str)) or not _matches(_LINE, str(value)):
            raise self._make_error(name, value, durations.VALID)
        return value

    def _make_error(self, name: str, value: Any, valid: str) -> InvalidInput:
        return InvalidInput(
            f"{name}: {'that value' if self.secret else patterns.quote_value(value)} is not valid. Valid: {valid}",
            option=name,
        )


def _matches(pattern: str, value: str) -> bool:
    """Return whether the value matches a pattern as JSON schema defines it.

    There "$" is the very end. In Python "$" also matches before a final newline.
    """
    return re.search(f"{pattern[:-1]}\\Z" if pattern.endswith("$") else pattern, value) is not None


# The form of a key. Any other text in its place may be a misplaced value, so messages do not quote it.
_KEY = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,39}", re.ASCII)


def _quote_key(name: str) -> str:
    """Return the key for a message, if it has the form of a key."""
    return name if _KEY.fullmatch(name) else "that key"


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object from its pairs. Raises for a repeated key, whose last value would silently win."""
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise InvalidInput(f"{_quote_key(name)}: is given twice. Give each key once", option=_quote_key(name))
        values[name] = value
    return values


def _refuse_unbounded(text: str) -> None:
    """Raise InvalidInput for a body that is deeper, or has more values, than any request needs."""
    depth = values = 0
    for step in _STEP.finditer(text):
        sign = text[step.start()]
        if sign in "[{":
            depth += 1
        elif sign in "]}":
            depth -= 1
        elif sign == '"':
            continue
        values += 1
        if depth > DEEPEST_BODY:
            raise InvalidInput(f"the body has lists or objects within one another more than {DEEPEST_BODY} deep")
        if values > MOST_VALUES:
            raise InvalidInput(f"the body holds more than {MOST_VALUES} values")


def parse_json(raw: bytes) -> Any:
    """Return the parsed body.

    Raises InvalidInput unless it is UTF-8 JSON within the bounds and without repeated keys.
    """
    try:
        text = raw.decode("utf-8-sig")
        _refuse_unbounded(text)
        return json.loads(text, object_pairs_hook=_refuse_duplicates)
    except (ValueError, RecursionError):
        raise InvalidInput("the body is not valid JSON") from None


def check_body(fields: Mapping[str, Field], body: Any) -> dict[str, Any]:
    """Return the values of the body. Null means the same as a missing key.

    Raises InvalidInput for unknown keys: a misspelt guard must not become a missing guard.
    """
    if not isinstance(body, dict):
        raise InvalidInput("the body must be a JSON object")
    unknown = sorted(set(body) - set(fields))
    if unknown:
        shown = _quote_key(unknown[0])
        raise InvalidInput(
            f"{shown}: unknown key. Valid: {', '.join(fields) or 'none, leave the body out'}", option=shown
        )
    values = {name: fields[name].check(name, value) for name, value in body.items() if value is not None}
    for name, field in fields.items():
        if field.required and name not in values:
            raise InvalidInput(f"{name} is required: {field.text}", option=name)
    return values


def check_query(fields: Mapping[str, Field], query: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return the values of the query. A list is a repeated key, or one value with commas."""
    values: dict[str, Any] = {}
    for name, text in query:
        field = fields.get(name)
        if field is None:
            raise InvalidInput(
                f"{_quote_key(name)}: unknown query parameter. Valid: {', '.join(fields) or 'none'}",
                option=_quote_key(name),
            )
        if field.kind == "strings":
            values.setdefault(name, []).extend(text.split(","))
        elif field.kind == "integer":
            values[name] = int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else text
        elif field.kind == "boolean":
            values[name] = {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
        else:
            values[name] = text
    for name, field in fields.items():
        if field.required and name not in values:
            raise InvalidInput(f"{name} is required: {field.text}", option=name)
    return {name: fields[name].check(name, value) for name, value in values.items()}


def compose_object_schema(fields: Mapping[str, Field]) -> dict[str, Any]:
    """Return a body as JSON schema. An optional key may also be null."""
    properties = {}
    for name, field in fields.items():
        schema = field.compose_schema()
        properties[name] = (
            schema
            if field.required
            else {
                "anyOf": [{k: v for k, v in schema.items() if k != "description"}, {"type": "null"}],
                "description": field.text,
            }
        )
    body_schema: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": False}
    required = [name for name, field in fields.items() if field.required]
    if required:
        body_schema["required"] = required
    return body_schema
