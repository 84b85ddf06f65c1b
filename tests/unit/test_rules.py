# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Cleanup rules: the file of the documentation, the first match, and every way to get a file wrong, with its line."""

from __future__ import annotations

from pathlib import Path

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import rules, states
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import ConfigError
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.model import Sandbox

EXAMPLE = """\
auto_cleanup:
  enabled: true
  mode: enforce            # or shadow: report what would have been done
  interval: 15m
  jitter: 2m
  guard: {count: 50, percent: 50}
  rules:                   # first match wins; what matches none is kept
    - {name: debug,    match: {tags: [debug]}, action: keep}
    - {name: timeouts, match: {states: [TIMEOUT]},   after: 24h, action: destroy}
    - {name: done,     match: {states: [COMPLETED]}, after: 2h,  action: destroy}
    - {name: failed,   match: {states: [FAILED]},    after: 72h, action: destroy}
    - {name: stopped,  match: {states: [STOPPED]},   after: 7d,  action: destroy}
    - {name: stuck,    match: {states: [REQUESTED, PROVISIONING, BOOTING]}, after: 30m, action: fail}
  retention: {destroyed_records: 90d}
"""


def sandbox(state: str, *tags: str, profile: str | None = None) -> Sandbox:
    return Sandbox(uuid="u", vmid=1000, name="a", state=state, tags=list(tags), profile=profile)


def rule(text: str) -> str:
    return "auto_cleanup:\n  rules:\n    - " + text + "\n"


def test_the_documented_example_is_read_to_its_values() -> None:
    found = rules.parse(EXAMPLE, "f")
    assert (found.enabled, found.mode, found.interval, found.jitter, found.guard_count, found.guard_percent) == (
        True,
        "enforce",
        900,
        120,
        50,
        50,
    )
    assert found.keep_destroyed == 90 * 86400
    assert [(one.name, one.action, one.after) for one in found.rules] == [
        ("debug", "keep", 0),
        ("timeouts", "destroy", 86400),
        ("done", "destroy", 7200),
        ("failed", "destroy", 72 * 3600),
        ("stopped", "destroy", 7 * 86400),
        ("stuck", "fail", 1800),
    ]


@pytest.mark.parametrize("state", states.STATES)
def test_the_first_match_wins_and_what_matches_none_is_kept(state: str) -> None:
    policy = rules.parse(EXAMPLE, "f")
    names = {
        "TIMEOUT": "timeouts",
        "COMPLETED": "done",
        "FAILED": "failed",
        "STOPPED": "stopped",
        "REQUESTED": "stuck",
        "PROVISIONING": "stuck",
        "BOOTING": "stuck",
    }
    found = policy.find_rule(sandbox(state))
    assert (found.name if found else None) == names.get(state)
    kept = policy.find_rule(sandbox(state, "web", "debug"))
    assert kept is not None and kept.name == "debug"


def test_all_that_is_given_must_fit_and_any_one_of_a_list() -> None:
    policy = rules.parse(
        rule(
            "{name: a, match: {states: [TIMEOUT, FAILED], tags: [ci, web], profiles: [small]}, after: 0s, action: "
            "destroy}"
        ),
        "f",
    )
    assert policy.find_rule(sandbox("FAILED", "web", profile="small"))
    for other in (
        sandbox("STOPPED", "web", profile="small"),
        sandbox("FAILED", "db", profile="small"),
        sandbox("FAILED", "web", profile="big"),
    ):
        assert policy.find_rule(other) is None


def test_what_is_left_out_and_what_is_not_there(tmp_path: Path) -> None:
    assert rules.load(str(tmp_path / "none.yaml")) == rules.Policy() == rules.parse("", "f")
    assert rules.Policy().enabled is False
    found = rules.parse("auto_cleanup: {}", "f")
    assert (found.enabled, found.mode, found.guard_count, found.guard_percent, found.keep_destroyed, found.rules) == (
        True,
        "enforce",
        50,
        50,
        None,
        (),
    )
    assert rules.parse("auto_cleanup: {guard: {count: 3}}", "f").guard_percent == 50, (
        "one guard given leaves the other on"
    )


def test_tags_and_profiles_are_what_is_written() -> None:
    """YAML reads these as a number, a boolean and an octal number."""
    policy = rules.parse(rule("{name: a, match: {tags: [1.10, on, 010], profiles: [1.0]}, action: keep}"), "x")
    assert (policy.rules[0].tags, policy.rules[0].profiles) == (("1.10", "on", "010"), ("1.0",))


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("cleanup: {}", 1, "unknown key 'cleanup' in the file. Valid: auto_cleanup"),
        ("auto_cleanup:\n  intervall: 5m", 2, "unknown key 'intervall' in auto_cleanup. Valid: enabled, mode"),
        ("auto_cleanup:\n  enabled: maybe", 2, "enabled: 'maybe' is not valid. Valid: true or false"),
        ("auto_cleanup:\n  enabled: true\n  mode: shadows", 3, "mode: 'shadows' is not valid. Valid: enforce, shadow"),
        ("auto_cleanup:\n  interval: 0m", 2, "interval: '0m' is zero"),
        ("auto_cleanup:\n  interval: 5x", 2, "interval: '5x' is not a duration"),
        ("auto_cleanup:\n  interval: 1:30", 2, "interval: '1:30' is not a duration"),
        ("auto_cleanup:\n  interval: [5m]", 2, "interval must be one value"),
        ("auto_cleanup:\n  mode: shadow\n  mode: enforce", 3, "'mode' is given twice in auto_cleanup"),
        ("auto_cleanup:\n  guard:\n    count: 0", 3, "count: '0' is not valid. Valid: a whole number from 1"),
        ("auto_cleanup:\n  guard:\n    percentage: 10", 3, "unknown key 'percentage' in guard. Valid: count, percent"),
        (
            "auto_cleanup:\n  guard: {percent: 101}",
            2,
            "percent: '101' is not valid. Valid: a whole number from 1 to 100",
        ),
        ("auto_cleanup:\n  guard: false", 2, "guard must be a mapping"),
        ("auto_cleanup:\n  retention: {destroyed_records: -1d}", 2, "destroyed_records: '-1d' is not a duration"),
        ("auto_cleanup:\n  rules: {}", 2, "rules must be a list"),
        (
            rule("{name: a, match: {state: [TIMEOUT]}, after: 1h, action: destroy}"),
            3,
            "unknown key 'state' in match. Valid: states, tags, profiles",
        ),
        (
            rule("{name: a, match: {states: [TIMEOUTS]}, after: 1h, action: destroy}"),
            3,
            "states: 'TIMEOUTS' is not valid. Valid: REQUESTED",
        ),
        (rule("{name: a, match: {states: TIMEOUT}, after: 1h, action: destroy}"), 3, "states must be a list"),
        (
            rule("{name: a, match: {states: [TIMEOUT]}, after: 1h, action: delete}"),
            3,
            "action: 'delete' is not valid. Valid: keep, destroy, fail",
        ),
        (
            rule("{name: a, match: {states: [TIMEOUT]}, after: soon, action: destroy}"),
            3,
            "after: 'soon' is not a duration",
        ),
        (rule("{name: a, match: {states: [TIMEOUT]}, action: destroy}"), 3, "rule 'a': after is missing"),
        (
            rule("{name: a, match: {states: [RUNNING]}, after: 1h, action: destroy}"),
            3,
            "rule 'a' with action destroy: RUNNING may not be named. Valid: TIMEOUT",
        ),
        (
            rule("{name: a, match: {tags: [x]}, after: 1h, action: destroy}"),
            3,
            "rule 'a' with action destroy: states are missing in match",
        ),
        (
            rule("{name: a, match: {states: [TIMEOUT]}, after: 1h, action: fail}"),
            3,
            "rule 'a' with action fail: TIMEOUT may not be named. Valid: REQUESTED",
        ),
        (rule("{name: a, match: {}, action: keep}"), 3, "match: names nothing"),
        (
            rule("{name: a, match: {tags: [x]}, after: 1h, action: keep}"),
            3,
            "rule 'a': after means nothing with action keep",
        ),
        (rule("{match: {tags: [x]}, action: keep}"), 3, "'name' is missing in a rule"),
        (rule("{name: 'a b', match: {tags: [x]}, action: keep}"), 3, "name: 'a b' is not valid"),
        (
            rule("{name: a, match: {tags: [x]}, action: keep}\n    - {name: a, match: {tags: [y]}, action: keep}"),
            4,
            "'a' is the name of an earlier rule",
        ),
        (
            rule("{name: a, match: {tags: [-debug]}, action: keep}"),
            3,
            "tags: '-debug' is not valid. Valid: lower-case letters",
        ),
        (rule("{name: a, match: {tags: [[x]]}, action: keep}"), 3, "tags: "),
        (
            rule("{name: a, match: {profiles: ['a b']}, action: keep}"),
            3,
            "profiles: 'a b' is not valid. Valid: letters, digits",
        ),
        ("auto_cleanup:\n  rules: [", 2, "not valid YAML"),
    ],
)
def test_a_file_that_is_wrong_is_refused_as_a_whole_with_line_and_reason(text: str, line: int, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rules.parse(text, "/etc/agentlab/cleanup.yaml")
    message = caught.value.message
    assert message.startswith(f"cleanup_file: /etc/agentlab/cleanup.yaml line {line}: "), message
    assert reason in message and "nothing of it was used" in message
