# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Open the records that the configuration names, with the engine for their address."""

from __future__ import annotations

from ..database_address import POSTGRESQL, parse
from ..errors import InvalidInput
from .database import Database


def open_database(database: str, *, group_mode: bool = False, dry_run: bool = False) -> Database:
    """Return the opened records; StoreError when they cannot be used, InvalidInput for an address without an engine."""
    address = parse(database)
    if address.engine == POSTGRESQL:
        raise InvalidInput(
            f"database: {address.text}: this release keeps records in a SQLite file only; give the path of a file",
            option="database",
            value=address.text,
        )
    return Database(address.text, group_mode=group_mode, dry_run=dry_run)
