# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Open the records that the configuration names, with the engine for their address."""

from __future__ import annotations

from ..database_address import POSTGRESQL, parse
from ..errors import InvalidInput
from .port import Engine


def open_database(database: str, *, group_mode: bool = False, dry_run: bool = False) -> Engine:
    """Return the opened records; StoreError when they cannot be used, InvalidInput for an address without an engine."""
    address = parse(database)
    if address.engine == POSTGRESQL:
        raise InvalidInput(
            f"database: {address.text}: this release keeps records in a SQLite file only; give the path of a file",
            option="database",
            value=address.text,
        )
    from .sqlite.engine import Database

    return Database(address.text, group_mode=group_mode, dry_run=dry_run)


def sqlite_version() -> str:
    """Return the version of this host's SQLite library."""
    from .sqlite import engine

    return engine.LIBRARY
