# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Turn outcomes and errors of the core into HTTP answers: a status, and a body for people and programs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from agentlab_core import config as core_config
from agentlab_core.errors import AgentlabError, CreationFailed, Kept, NotFound
from agentlab_core.model import Outcome

from ..statuses import get_status

# Seconds after which a client may ask again (Retry-After of a 503).
RETRY_AFTER = 10
# Remedies of errors in the words of the API and the command line.
REMEDIES: dict[str, str] = {
    "force": "Use --force to bypass",
    "remove": "To give the sandbox up, destroy it with --force",
    "unprotect": "Run agentlab sandbox unprotect first (--force does not skip this)",
    "discard_memory": "Stop it with --force to throw the saved memory away",
    "delete_workspace": "Use --force to delete it",
    "allow_restart": "Set --allow-restart, which stops and starts it, or stop it first",
    "update": "Set --update to apply it",
    "renew_lease": "Renew its lease with agentlab sandbox lease renew",
    "attach_workspace": "Attach it with agentlab workspace attach",
}


@dataclass(slots=True)
class Answer:
    """A JSON body and its status. ``outcomes`` are counted by the metrics and logged.

    With ``file``, the file is sent instead of the body, and closed afterwards.
    """

    body: dict[str, Any]
    status: int = 200
    outcomes: list[Outcome] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    file: BinaryIO | None = None

    def encode_body(self) -> bytes:
        return json.dumps(self.body, separators=(",", ":")).encode() + b"\n"


def answer_error(error: AgentlabError) -> Answer:
    """Return the answer for an error: {"error", "code", facts}."""
    code = error.code
    if isinstance(error, CreationFailed):
        cause = error.detail.get("cause") or {}
        status = get_status(str(cause.get("code") or code))
    else:
        # A wrong option in the daemon's own configuration is not the client's fault.
        status = 500 if error.detail.get("option") in core_config.ENVIRONMENT else get_status(code)
    message = error.explain(REMEDIES)
    if isinstance(error, NotFound) and "run_id" not in error.detail:
        message = "workspace not found" if "workspace" in error.detail else "sandbox not found"
    facts = {name: value for name, value in error.detail.items() if value is not None and name not in ("error", "code")}
    if isinstance(error, Kept):
        facts["reason"] = error.reason
    return compose_error(status, message, code, **facts)


def answer_failed_item(outcome: Outcome) -> Answer:
    """Return the answer for a single item that failed."""
    reason = outcome.reason or "error"
    answer = compose_error(
        get_status(reason),
        outcome.explain(REMEDIES) or reason,
        reason,
        vmid=outcome.vmid,
        state=outcome.state,
        upids=outcome.upids or None,
        remedy=outcome.remedy,
    )
    answer.outcomes = [outcome]
    return answer


def compose_error(status: int, message: str, code: str, /, **facts: Any) -> Answer:
    """Return the answer for an error. ``facts`` may have any names except "error" and "code"."""
    body = {"error": message, "code": code, **{name: value for name, value in facts.items() if value is not None}}
    return Answer(
        json.loads(json.dumps(body, default=str)),
        status,
        headers={"Retry-After": str(RETRY_AFTER)} if status == 503 else {},
    )


def answer_item(outcome: Outcome, status: int = 200) -> Answer:
    """Return the answer for a single item: the sandbox in its present state, and the outcome."""
    if outcome.failed or outcome.sandbox is None:
        return answer_failed_item(outcome)
    body = {
        **outcome.sandbox.public(),
        "previous_state": outcome.previous_state,
        "outcome": outcome.outcome,
        "changed": outcome.changed,
        "reason": outcome.reason,
        "message": outcome.explain(REMEDIES),
        "upids": list(outcome.upids),
        "warnings": outcome.explain_warnings(REMEDIES),
    }
    if "placement" in outcome.extra:
        body["placement"] = outcome.extra["placement"]
    return Answer(body, status, [outcome])


def answer_items(outcomes: list[Outcome]) -> Answer:
    """Return the answer for several items: one outcome each. The status is 207 when some failed."""
    count = sum(outcome.failed for outcome in outcomes)
    return Answer(
        {"results": [outcome.public(REMEDIES) for outcome in outcomes], "failed_count": count},
        207 if count else 200,
        outcomes,
    )
