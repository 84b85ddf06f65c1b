# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Serve the health check and the daemon's status."""

from __future__ import annotations

from agentlab_core.store import history

from . import upstream
from .answers import Answer
from .route import Call


def healthz(call: Call) -> Answer:
    return Answer({"status": "ok"})


def status(call: Call) -> Answer:
    service = call.service
    events = history.read_events(service.base.database, tail=upstream.EVENTS_LOOKED_THROUGH)
    return Answer(
        upstream.describe_status(service.compose_status(), events, metrics=service.config.metrics_listen is not None)
    )
