# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""The two tables of the states: the transitions, and the states in which each operation is allowed.

Messages, documentation tables and the diagram are made from these two; nothing else in the code names a list of states.
"""

from __future__ import annotations

from .errors import StateConflict

REQUESTED = "REQUESTED"
PROVISIONING = "PROVISIONING"
BOOTING = "BOOTING"
READY = "READY"
RUNNING = "RUNNING"
SUSPENDED = "SUSPENDED"
COMPLETED = "COMPLETED"
FAILED = "FAILED"
TIMEOUT = "TIMEOUT"
STOPPED = "STOPPED"
DESTROYED = "DESTROYED"

TRANSITIONS: dict[str, tuple[str, ...]] = {
    REQUESTED: (PROVISIONING, FAILED, TIMEOUT, DESTROYED),
    PROVISIONING: (BOOTING, FAILED, TIMEOUT, DESTROYED),
    BOOTING: (READY, FAILED, TIMEOUT, DESTROYED),
    READY: (RUNNING, SUSPENDED, STOPPED, FAILED, TIMEOUT, DESTROYED),
    RUNNING: (SUSPENDED, COMPLETED, FAILED, TIMEOUT, STOPPED, DESTROYED),
    SUSPENDED: (READY, RUNNING, STOPPED, TIMEOUT, DESTROYED),
    COMPLETED: (STOPPED, DESTROYED),
    FAILED: (STOPPED, DESTROYED),
    TIMEOUT: (STOPPED, DESTROYED),
    STOPPED: (BOOTING, READY, RUNNING, DESTROYED),
    DESTROYED: (),
}

STATES: tuple[str, ...] = tuple(TRANSITIONS)


class StateRule:
    """The states in which one operation acts, and those in which it has nothing to do."""

    __slots__ = ("allowed", "phrase", "remedy", "satisfied")

    def __init__(
        self, phrase: str, allowed: tuple[str, ...], satisfied: tuple[str, ...] = (), remedy: str | None = None
    ) -> None:
        self.phrase = phrase
        self.allowed = allowed
        self.satisfied = satisfied
        self.remedy = remedy


OPERATIONS: dict[str, StateRule] = {
    "destroy": StateRule("destroy sandbox", (STOPPED,), (DESTROYED,), "force"),
    "force_destroy": StateRule("force destroy sandbox", tuple(s for s in STATES if s != DESTROYED), (DESTROYED,)),
    "renew_lease": StateRule("renew lease", (RUNNING,)),
    "stop": StateRule("stop sandbox", (READY, RUNNING, SUSPENDED, COMPLETED, FAILED, TIMEOUT), (STOPPED,)),
    "start": StateRule("start sandbox", (STOPPED, SUSPENDED), (READY, RUNNING)),
    "suspend": StateRule("suspend sandbox", (READY, RUNNING), (SUSPENDED,)),
    "complete": StateRule("report completed", (RUNNING,), (COMPLETED,)),
    "fail": StateRule("report failed", (RUNNING,), (FAILED,)),
    "exec": StateRule("run a command in sandbox", (READY, RUNNING)),
    "prune": StateRule("prune sandbox", (TIMEOUT,)),
    # A lease can run out in every live state that still has a transition to TIMEOUT.
    "expire": StateRule("expire sandbox", tuple(s for s, follow in TRANSITIONS.items() if TIMEOUT in follow)),
}

# States that prune looks at: TIMEOUT always, the others only where its ``states`` name them (docs/safety.md).
PRUNABLE: tuple[str, ...] = (TIMEOUT, COMPLETED, FAILED, STOPPED)
# The creation is running, or its run was killed.
CREATING: tuple[str, ...] = (REQUESTED, PROVISIONING, BOOTING)
# The VM is meant to run.
POWERED: tuple[str, ...] = (READY, RUNNING)


def can_follow(current: str, target: str) -> bool:
    """Return whether the table has a transition from ``current`` to ``target``."""
    return target in TRANSITIONS[current]


def make_conflict(operation: str, state: str) -> StateConflict:
    """Return the error for an operation in a state that does not allow it. The message names the valid states."""
    rule = OPERATIONS[operation]
    # "Valid states" are those in which the call succeeds; the seed lists DESTROYED for destroy and only RUNNING for
    # renew.
    valid = rule.allowed + rule.satisfied
    return StateConflict(
        f"cannot {rule.phrase} in {state} state. Valid states: {', '.join(valid)}",
        operation=operation,
        state=state,
        valid=valid,
        remedy=rule.remedy,
    )


def check_operation(operation: str, state: str) -> bool:
    """Return whether the operation has something to do. Raises StateConflict if the state forbids the operation."""
    rule = OPERATIONS[operation]
    if state in rule.allowed:
        return True
    if state in rule.satisfied:
        return False
    raise make_conflict(operation, state)
