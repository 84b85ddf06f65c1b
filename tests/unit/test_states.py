# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Every state against every operation, from the tables of the specification, and the messages to the letter."""

from __future__ import annotations

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils import _adapter
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import states
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import StateConflict

# Written down here again, by hand: the table in the code must not be able to change by itself.
TRANSITIONS = {
    "REQUESTED": "PROVISIONING FAILED TIMEOUT DESTROYED",
    "PROVISIONING": "BOOTING FAILED TIMEOUT DESTROYED",
    "BOOTING": "READY FAILED TIMEOUT DESTROYED",
    "READY": "RUNNING SUSPENDED STOPPED FAILED TIMEOUT DESTROYED",
    "RUNNING": "SUSPENDED COMPLETED FAILED TIMEOUT STOPPED DESTROYED",
    "SUSPENDED": "READY RUNNING STOPPED TIMEOUT DESTROYED",
    "COMPLETED": "STOPPED DESTROYED",
    "FAILED": "STOPPED DESTROYED",
    "TIMEOUT": "STOPPED DESTROYED",
    "STOPPED": "BOOTING READY RUNNING DESTROYED",
    "DESTROYED": "",
}
ALL = tuple(TRANSITIONS)
# operation: (acts in, nothing to do in)
OPERATIONS = {
    "destroy": ("STOPPED", "DESTROYED"),
    "force_destroy": (" ".join(s for s in ALL if s != "DESTROYED"), "DESTROYED"),
    "renew_lease": ("RUNNING", ""),
    "stop": ("READY RUNNING SUSPENDED COMPLETED FAILED TIMEOUT", "STOPPED"),
    "start": ("STOPPED SUSPENDED", "READY RUNNING"),
    "suspend": ("READY RUNNING", "SUSPENDED"),
    "exec": ("READY RUNNING", ""),
    "complete": ("RUNNING", "COMPLETED"),
    "fail": ("RUNNING", "FAILED"),
    "prune": ("TIMEOUT", ""),
    "expire": ("REQUESTED PROVISIONING BOOTING READY RUNNING SUSPENDED", ""),
}


def test_every_state_and_every_operation_is_known() -> None:
    assert states.STATES == ALL
    assert set(states.OPERATIONS) == set(OPERATIONS)


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("current", ALL)
def test_a_state_follows_only_as_the_table_says(current: str, target: str) -> None:
    assert states.can_follow(current, target) == (target in TRANSITIONS[current].split())


@pytest.mark.parametrize("state", ALL)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_is_allowed_satisfied_or_refused_by_the_state(operation: str, state: str) -> None:
    allowed, satisfied = (part.split() for part in OPERATIONS[operation])
    if state in allowed:
        assert states.check_operation(operation, state) is True
    elif state in satisfied:
        assert states.check_operation(operation, state) is False
    else:
        with pytest.raises(StateConflict) as caught:
            states.check_operation(operation, state)
        message = caught.value.explain(_adapter.REMEDIES)
        assert f" in {state} state. Valid states: {', '.join(allowed + satisfied)}" in message
        assert message.endswith("Use force=true to bypass") == (operation == "destroy")
        assert caught.value.detail["state"] == state


@pytest.mark.parametrize("state", ALL)
def test_force_acts_in_every_live_state(state: str) -> None:
    assert states.check_operation("force_destroy", state) is (state != "DESTROYED")


@pytest.mark.parametrize("state", ALL)
def test_an_operation_leads_only_where_the_transitions_allow(state: str) -> None:
    leads = {
        "destroy": "DESTROYED",
        "force_destroy": "DESTROYED",
        "stop": "STOPPED",
        "start": "RUNNING",
        "suspend": "SUSPENDED",
        "complete": "COMPLETED",
        "fail": "FAILED",
        "prune": "DESTROYED",
        "expire": "TIMEOUT",
    }
    for operation, target in leads.items():
        if state in states.OPERATIONS[operation].allowed:
            assert states.can_follow(state, target), f"{operation} in {state}"


@pytest.mark.parametrize(
    ("operation", "state", "message"),
    [
        (
            "destroy",
            "TIMEOUT",
            "cannot destroy sandbox in TIMEOUT state. Valid states: STOPPED, DESTROYED. Use force=true to bypass",
        ),
        (
            "destroy",
            "RUNNING",
            "cannot destroy sandbox in RUNNING state. Valid states: STOPPED, DESTROYED. Use force=true to bypass",
        ),
        ("renew_lease", "TIMEOUT", "cannot renew lease in TIMEOUT state. Valid states: RUNNING"),
        (
            "stop",
            "BOOTING",
            "cannot stop sandbox in BOOTING state. Valid states: READY, RUNNING, SUSPENDED, COMPLETED, FAILED, "
            "TIMEOUT, STOPPED",
        ),
        ("start", "TIMEOUT", "cannot start sandbox in TIMEOUT state. Valid states: STOPPED, SUSPENDED, READY, RUNNING"),
        ("suspend", "STOPPED", "cannot suspend sandbox in STOPPED state. Valid states: READY, RUNNING, SUSPENDED"),
        ("complete", "READY", "cannot report completed in READY state. Valid states: RUNNING, COMPLETED"),
        ("fail", "READY", "cannot report failed in READY state. Valid states: RUNNING, FAILED"),
    ],
)
def test_a_refusal_names_state_and_valid_states_to_the_letter(operation: str, state: str, message: str) -> None:
    assert states.make_conflict(operation, state).explain(_adapter.REMEDIES) == message
