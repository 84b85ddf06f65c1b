# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Run the handler of one request in a worker thread: count it, log it, and answer its errors."""

from __future__ import annotations

import json
import logging
import time

from agentlab_core.errors import AgentlabError, make_host_error
from agentlab_core.model import Outcome

from ..logs import IDLE_LINES, log, log_seldom
from . import answers
from .answers import Answer
from .route import Call, Route

# The handlers of these operations count the sandboxes themselves.
_COUNTED = ("prune", "cleanup", "reconcile")
# The keys of a request's body that the log shows.
_LOGGED_KEYS = ("vmid", "name", "force", "dry_run", "apply", "max_count", "reason")
# Number of sandboxes of one request that the log names.
_LOGGED_OUTCOMES = 20


def perform_request(route: Route, call: Call) -> Answer:
    """Run the handler of one request and return its answer. Every error becomes an answer: no caller would catch it."""
    metrics = call.service.metrics
    counted_here = route.operation if route.operation not in _COUNTED else None
    began = time.monotonic()
    try:
        answer = route.handler(call)
        if counted_here:
            metrics.count_outcomes(counted_here, answer.outcomes)
    except AgentlabError as error:
        answer = answers.answer_error(error)
        if counted_here:
            metrics.count_refusal(counted_here, error)
        elif route.name == "renew_lease" and answer.status == 409:
            metrics.leases.labels("refused").inc()
    except Exception as error:
        known = make_host_error(error)
        if known:
            answer = answers.answer_error(known)
        else:
            # For an unforeseen error the client gets one sentence, and the log the traceback.
            log.exception("%s: internal error", route.name)
            message = f"internal error: {type(error).__name__}; the daemon's log says more. Please report this"
            answer = answers.compose_error(500, message, "internal")
        if route.operation:
            metrics.count_internal_error(route.operation)
    seconds = time.monotonic() - began
    if route.operation and answer.status not in (400, 404):
        metrics.durations.labels(route.operation).observe(seconds)
    if route.changes:
        _log_change(route, call, answer, seconds)
    return answer


def _describe_outcome(outcome: Outcome) -> str:
    """Return the outcome for one sandbox, with its reason if there is one."""
    return f"{outcome.vmid} {outcome.outcome}{f' ({outcome.message})' if outcome.message else ''}"


def _log_change(route: Route, call: Call, answer: Answer, seconds: float) -> None:
    """Log a request that may change something: the actor, the request and the outcome."""
    options = [f"{name}={json.dumps(call.body[name])}" for name in _LOGGED_KEYS if name in call.body]
    result = answer.body.get("error")
    if not result:
        shown = answer.outcomes[:_LOGGED_OUTCOMES]
        result = ", ".join(_describe_outcome(outcome) for outcome in shown) or "done"
        if len(answer.outcomes) > len(shown):
            result += f" and {len(answer.outcomes) - len(shown)} more"
    level = logging.WARNING if answer.status >= 500 else logging.INFO
    request = " ".join([call.describe(route), *options])
    line = ("%s by %s: %s (%s, %.1f s)", request, call.actor, result, answer.status, seconds)
    if any(outcome.changed for outcome in answer.outcomes) or (answer.status < 400 and not answer.outcomes):
        log.log(level, *line)
    else:
        # Such requests cost a client nothing, so limit their lines, or they could fill the disk.
        log_seldom(level, f"idle requests of {call.actor}", *line, allowed=IDLE_LINES)
