# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""One request that the API serves, and one that was asked: what the table, the handlers and the document share."""

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
    """One request, checked: who asks, and what for."""

    service: Service
    actor: str
    vmid: int | None = None
    # Of a workspace: its id or name.
    ident: str = ""
    query: dict[str, Any] = field(default_factory=dict)
    body: dict[str, Any] = field(default_factory=dict)
    # The file that was sent, at its beginning.
    upload: BinaryIO | None = None

    def described(self, route: Route) -> str:
        """What is asked, for the log."""
        which = [self.vmid, self.ident or None, *self.body.get("vmids", ())[:20]]
        return " ".join([route.name, *(str(one) for one in which if one is not None)])

    def context(self, dry_run: bool = False) -> Context:
        return self.service.context(self.actor, dry_run=dry_run)


@dataclass(frozen=True, slots=True)
class Route:
    """One request: ``quick`` ones are answered from the records alone, the others ask Proxmox and have threads of
    their own.
    """

    method: str
    path: str
    name: str
    summary: str
    handler: Callable[[Call], Answer]
    answers: Mapping[int, str]
    quick: bool = False
    # It has a thread of its own, however many others wait for Proxmox.
    apart: bool = False
    # It waits for a guest: such requests have threads of their own, so that they hold up no other work.
    inside: bool = False
    # Its body, or the body of its answer, is a file and not JSON.
    receives_file: bool = False
    sends_file: bool = False
    # What it is counted as.
    operation: str | None = None
    query: Mapping[str, Field] = field(default_factory=dict)
    body: Mapping[str, Field] | None = None
    # What the body's fields must be to each other, as JSON schema; the handler refuses the rest.
    together: Mapping[str, Any] = field(default_factory=dict)

    @property
    def changes(self) -> bool:
        return self.method != "GET"
