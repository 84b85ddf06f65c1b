# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Open the configured records with the engine for their address."""

from __future__ import annotations

from ..database_address import POSTGRESQL, parse
from .port import Engine
from .rehearsal import Rehearsal


def open_database(
    database: str, *, password: str | None = None, group_mode: bool = False, dry_run: bool = False
) -> Engine:
    """Return the opened records. Raises StoreError when they cannot be used."""
    address = parse(database)
    if address.engine == POSTGRESQL:
        from .postgres.engine import PostgresDatabase

        server = PostgresDatabase(address.text, password or address.password, dry_run=dry_run)
        return Rehearsal(server, owner=True) if dry_run else server
    from .sqlite.engine import Database

    return Database(address.text, group_mode=group_mode, dry_run=dry_run)


def read_sqlite_version() -> str:
    """Return the version of this host's SQLite library."""
    from .sqlite import engine

    return engine.LIBRARY
