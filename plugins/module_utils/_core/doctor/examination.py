# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""The state of one examination. The checks share it: a check may use data that an earlier check has read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .. import clock
from ..config import Config
from ..context import Context
from ..errors import StoreError
from . import privileges

# The doctor reads at most this many configurations of unknown VMs to search them for our marker.
LOOK_AT = 20


class Examination:
    """One examination of one host's configuration. It writes nothing: a write would go to a copy in memory."""

    def __init__(self, config: Config, *, now: clock.Clock | None = None) -> None:
        self.config = config
        self.store_error: StoreError | None = None
        try:
            self.context = Context(config, actor="doctor", dry_run=True, clock=now)
        except StoreError as error:
            # Check Proxmox VE nevertheless, with empty records.
            self.store_error = error
            self.context = Context(replace(config, database=":memory:"), actor="doctor", dry_run=True, clock=now)
        # The daemon's status; None: not read yet
        self.status: dict[str, Any] | None = None
        self.release = ""
        self.nodes: dict[str, bool] = {}
        self.local: str | None = None
        self.template: tuple[int, str, dict[str, Any]] | None = None
        self.storage: str | None = config.storage
        self.standing = privileges.Standing()
        # Whether no VM is hidden from these credentials; None: not asked yet
        self._whole: bool | None = None
        # The commands for root; None: not decided yet
        self.pveum: list[str] | None = None

    def sees_everything(self) -> bool:
        """Return whether no VM is hidden from these credentials. Proxmox VE is asked once for all checks."""
        if self._whole is None:
            self._whole = self.context.cluster.sees_everything()
        return self._whole

    def close(self) -> None:
        self.context.close()


def parse_properties(value: Any) -> dict[str, Any]:
    """Return a property string (a=1,b=2) or an object as a dict."""
    if isinstance(value, str):
        return dict(part.partition("=")[::2] for part in value.split(","))
    return value if isinstance(value, dict) else {}
