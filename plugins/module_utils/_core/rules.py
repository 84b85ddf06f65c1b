# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Read the file of cleanup rules, and find the first rule that matches a sandbox.

This file is pure: it asks Proxmox VE nothing, and changes nothing.

An unknown key, state, action or duration makes the whole file invalid, and the error names the line: a misspelt rule
must not be a missing rule.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from . import durations, patterns, safe_yaml, states
from .errors import ConfigError, InvalidInput
from .model import Sandbox

KEEP, DESTROY, FAIL = "keep", "destroy", "fail"
ENFORCE, SHADOW = "enforce", "shadow"
# The states that a rule with each action may name. A lease ends a living sandbox, not a rule.
_STATES_OF = {KEEP: states.STATES, DESTROY: states.PRUNABLE, FAIL: states.CREATING}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", re.ASCII)


@dataclass(frozen=True, slots=True)
class CleanupRule:
    """One rule: the sandboxes that it matches, the time in seconds that their state must last, and the action.

    A sandbox must fit every given list (states, tags, profiles), each by one item.
    """

    name: str
    action: str
    states: Sequence[str] = ()
    tags: Sequence[str] = ()
    profiles: Sequence[str] = ()
    after: int = 0

    def matches(self, sandbox: Sandbox) -> bool:
        return (
            (not self.states or sandbox.state in self.states)
            and (not self.tags or bool(set(self.tags) & set(sandbox.tags)))
            and (not self.profiles or sandbox.profile in self.profiles)
        )


@dataclass(frozen=True, slots=True)
class Policy:
    """The content of the file. Durations are in seconds. Without a file cleanup is off."""

    enabled: bool = False
    mode: str = ENFORCE
    interval: int = 900
    jitter: int = 120
    # A run that would destroy more sandboxes than this number, or than this share of the live ones, does nothing and
    # freezes cleanup.
    guard_count: int = 50
    guard_percent: int = 50
    rules: Sequence[CleanupRule] = ()
    keep_destroyed: int | None = None

    def find_rule(self, sandbox: Sandbox) -> CleanupRule | None:
        """Return the first rule that matches, even if its time has not come. Later rules do not count."""
        return next((rule for rule in self.rules if rule.matches(sandbox)), None)


@dataclass(slots=True)
class _RuleReader:
    """A reader for the values of a YAML file. Its errors name the line."""

    file: str
    loader: Any

    def make_error(self, node: Any, problem: str) -> ConfigError:
        return ConfigError(
            f"cleanup_file: {self.file} line {node.start_mark.line + 1}: {problem}; nothing of it was used",
            file=self.file,
            line=node.start_mark.line + 1,
        )

    def read_mapping(
        self, node: Any, where: str, known: dict[str, Callable[[Any, str], Any]], required: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Return the values of a mapping. ``known`` has the keys, each with the function that reads its value."""
        import yaml

        if not isinstance(node, yaml.MappingNode):
            raise self.make_error(node, f"{where} must be a mapping. Valid keys: {', '.join(known)}")
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
            if key not in known:
                raise self.make_error(
                    key_node, f"unknown key {safe_yaml.show_key(key)} in {where}. Valid: {', '.join(known)}"
                )
            if key in values:
                raise self.make_error(key_node, f"{key!r} is given twice in {where}")
            values[key] = known[key](value_node, key)
        for key in required:
            if key not in values:
                raise self.make_error(node, f"{key!r} is missing in {where}")
        return values

    def read_scalar(self, node: Any, key: str, valid: str) -> Any:
        import yaml

        if not isinstance(node, yaml.ScalarNode):
            raise self.make_error(node, f"{key} must be one value. Valid: {valid}")
        try:
            return self.loader.construct_object(node)
        except (yaml.YAMLError, ValueError):
            raise self.make_error(node, f"{key}: {str(node.value)[:80]!r} is not valid. Valid: {valid}") from None

    def read_flag(self, node: Any, key: str) -> bool:
        value = self.read_scalar(node, key, "true or false")
        if not isinstance(value, bool):
            raise self.make_error(node, f"{key}: {str(node.value)[:80]!r} is not valid. Valid: true or false")
        return value

    def read_whole(self, node: Any, key: str, low: int, high: int) -> int:
        value = self.read_scalar(node, key, f"a whole number from {low} to {high}")
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.make_error(
                node, f"{key}: {str(node.value)[:80]!r} is not valid. Valid: a whole number from {low} to {high}"
            )
        return value

    def read_choice(self, node: Any, key: str, choices: Sequence[str]) -> str:
        value = self.read_scalar(node, key, ", ".join(choices))
        if value not in choices:
            raise self.make_error(node, f"{key}: {str(node.value)[:80]!r} is not valid. Valid: {', '.join(choices)}")
        return str(value)

    def read_duration(self, node: Any, key: str, *, zero: bool = False) -> int:
        value = self.read_scalar(node, key, durations.VALID)
        try:
            # YAML reads 1:30 as a number of base 60, so parse the written text.
            return durations.parse(value if isinstance(value, bool) else node.value, key, zero=zero)
        except InvalidInput as error:
            raise self.make_error(node, error.message) from None

    def read_words(self, node: Any, key: str, choices: Sequence[str] | None = None) -> tuple[str, ...]:
        import yaml

        if not isinstance(node, yaml.SequenceNode) or not node.value:
            raise self.make_error(node, f"{key} must be a list, such as [{(choices or ('web',))[0]}]")
        if choices is not None:
            return tuple(self.read_choice(word, key, choices) for word in node.value)
        pattern, valid = patterns.TAG if key == "tags" else patterns.WORD
        for word in node.value:
            # Check the written text: YAML reads 1.10 as a number, and on as true. A word that cannot be a name would
            # make a rule that never matches.
            if not isinstance(word, yaml.ScalarNode) or not pattern.fullmatch(
                word.value.lower() if key == "tags" else word.value
            ):
                raise self.make_error(
                    word, f"{key}: {str(getattr(word, 'value', ''))[:80]!r} is not valid. Valid: {valid}"
                )
        # Proxmox VE stores tags in lower case.
        return tuple(str(word.value).lower() if key == "tags" else str(word.value) for word in node.value)


def parse(text: str, file: str) -> Policy:
    """Return the policy in the text of a file.

    Raises ConfigError with line and reason when any part of the text cannot be used.
    """
    try:
        import yaml  # noqa: F401 - safe_yaml needs it
    except ImportError:
        raise ConfigError(
            f"cleanup_file: {file} cannot be read without the Python library yaml; install python3-yaml", file=file
        ) from None
    try:
        loader, root = safe_yaml.compose(text)
    except safe_yaml.Refused as error:
        place = f" line {error.line}" if error.line else ""
        raise ConfigError(
            f"cleanup_file: {file}{place}: {error.reason.removeprefix('is ')}; nothing of it was used", file=file
        ) from None
    if root is None:
        return Policy()
    reader = _RuleReader(file, loader)
    known = {
        "enabled": reader.read_flag,
        "mode": lambda node, key: reader.read_choice(node, key, (ENFORCE, SHADOW)),
        "interval": reader.read_duration,
        "jitter": lambda node, key: reader.read_duration(node, key, zero=True),
        "guard": lambda node, key: reader.read_mapping(
            node,
            key,
            {
                "count": lambda number, name: reader.read_whole(number, name, 1, 1000000),
                "percent": lambda number, name: reader.read_whole(number, name, 1, 100),
            },
        ),
        "rules": lambda node, key: _read_rules(reader, node),
        "retention": lambda node, key: reader.read_mapping(node, key, {"destroyed_records": reader.read_duration}),
    }
    values = reader.read_mapping(
        root, "the file", {"auto_cleanup": lambda node, key: reader.read_mapping(node, key, known)}, ("auto_cleanup",)
    )["auto_cleanup"]
    default = Policy()
    guard = values.get("guard", {})
    return Policy(
        enabled=values.get("enabled", True),
        mode=values.get("mode", ENFORCE),
        interval=values.get("interval", default.interval),
        jitter=values.get("jitter", default.jitter),
        guard_count=guard.get("count", default.guard_count),
        guard_percent=guard.get("percent", default.guard_percent),
        rules=values.get("rules", ()),
        keep_destroyed=values.get("retention", {}).get("destroyed_records"),
    )


def _read_rules(reader: _RuleReader, node: Any) -> tuple[CleanupRule, ...]:
    import yaml

    if not isinstance(node, yaml.SequenceNode):
        raise reader.make_error(node, "rules must be a list of rules")
    accepted: list[CleanupRule] = []
    for item in node.value:
        rule = _read_rule(reader, item)
        if any(rule.name == other.name for other in accepted):
            raise reader.make_error(item, f"name: {rule.name!r} is the name of an earlier rule")
        accepted.append(rule)
    return tuple(accepted)


def _read_rule(reader: _RuleReader, node: Any) -> CleanupRule:
    def read_name(part: Any, key: str) -> str:
        value = str(reader.read_scalar(part, key, "a name"))
        if not _NAME.fullmatch(value):
            raise reader.make_error(
                part,
                f"{key}: {value[:80]!r} is not valid. Valid: letters, digits, dot, hyphen and underscore, 63 at most",
            )
        return value

    def read_match(filter_node: Any, key: str) -> dict[str, Any]:
        values = reader.read_mapping(
            filter_node,
            key,
            {
                "states": lambda part, word: reader.read_words(part, word, states.STATES),
                "tags": reader.read_words,
                "profiles": reader.read_words,
            },
        )
        if not values:
            raise reader.make_error(
                filter_node,
                "match: names nothing; a rule for everything is not a rule. Valid keys: states, tags, profiles",
            )
        return values

    options = reader.read_mapping(
        node,
        "a rule",
        {
            "name": read_name,
            "match": read_match,
            "after": lambda part, key: reader.read_duration(part, key, zero=True),
            "action": lambda part, key: reader.read_choice(part, key, (KEEP, DESTROY, FAIL)),
        },
        ("name", "match", "action"),
    )
    rule = CleanupRule(options["name"], options["action"], after=options.get("after", 0), **options["match"])
    allowed = _STATES_OF[rule.action]
    wrong = [state for state in rule.states if state not in allowed]
    if wrong or (rule.action != KEEP and not rule.states):
        problem = f"{wrong[0]} may not be named" if wrong else "states are missing in match"
        raise reader.make_error(
            node, f"rule {rule.name!r} with action {rule.action}: {problem}. Valid: {', '.join(allowed)}"
        )
    if rule.action == KEEP and "after" in options:
        raise reader.make_error(node, f"rule {rule.name!r}: after means nothing with action keep")
    if rule.action != KEEP and "after" not in options:
        raise reader.make_error(
            node, f"rule {rule.name!r}: after is missing; say how long the state must last (0s for no time at all)"
        )
    return rule


def load(path: str) -> Policy:
    """Return the policy in a file. Without a file cleanup is off. Raises ConfigError for a file that cannot be used."""
    if os.path.islink(path) and not os.path.exists(path):
        raise ConfigError(
            f"cleanup_file: {path} is a link to {os.readlink(path)}, which cannot be followed; mount or create its "
            "target, or remove the link",
            file=path,
        )
    if not os.path.exists(path):
        return Policy()
    try:
        text = safe_yaml.read_text(path)
    except safe_yaml.Refused as error:
        raise ConfigError(f"cleanup_file: {path} {error.reason}; nothing of it was used", file=path) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cleanup_file: {path}: {getattr(error, 'strerror', None) or 'not UTF-8'}; correct cleanup_file or its "
            "permissions",
            file=path,
        ) from None
    return parse(text, path)
