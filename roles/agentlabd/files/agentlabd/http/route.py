# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Define a route of the API and a checked request, which table, handlers and document share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO

from agentlab_core.context import Context

from .answers import Answer
from .fields import Field

if TYPE_CHECKING:
    from ..service import Service


@dataclass(slots=True)
class Call:
    """One checked request: who asks, and for what."""

    service: Service
    actor: str
    vmid: int | None = None
    # Id or name of a workspace.
    ident: str = ""
    query: dict[str, Any] = field(default_factory=dict)
    body: dict[str, Any] = field(default_factory=dict)
    # The uploaded file, positioned at its beginning.
    upload: BinaryIO | None = None

    def describe(self, route: Route) -> str:
        """Return the request in words for the log."""
        targets = [self.vmid, self.ident or None, *self.body.get("vmids", ())[:20]]
        return " ".join([route.name, *(str(target) for target in targets if target is not None)])

    def make_context(self, dry_run: bool = False) -> Context:
        """Return a context for this request, with the client as the actor."""
        return self.service.make_context(self.actor, dry_run=dry_run)


@dataclass(frozen=True, slots=True)
class Route:
    """One kind of request. ``quick`` ones read only the records. The others ask Proxmox and have their own threads."""

    method: str
    path: str
    name: str
    summary: str
    handler: Callable[[Call], Answer]
    answers: Mapping[int, str]
    quick: bool = False
    # The request has a thread of its own, however many others wait for Proxmox.
    apart: bool = False
    # The request waits for a guest. Such requests have their own threads, so that they block no other work.
    inside: bool = False
    # The body of the request, or of its answer, is a file instead of JSON.
    receives_file: bool = False
    sends_file: bool = False
    # The name of the operation in the metrics.
    operation: str | None = None
    query: Mapping[str, Field] = field(default_factory=dict)
    body: Mapping[str, Field] | None = None
    # Conditions between the fields, as JSON schema. The handler refuses the rest.
    together: Mapping[str, Any] = field(default_factory=dict)

    @property
    def changes(self) -> bool:
        return self.method != "GET"
