# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Read from a PostgreSQL server what the doctor checks."""

from __future__ import annotations

from typing import Any

from ..port import Engine
from . import schema as own_schema

# has_table_privilege with several privileges tests for any of them, so test each by itself.
_QUERY = f"""
WITH ours AS (
    SELECT schemaname, tablename, tableowner, format('%I.%I', schemaname, tablename) AS name FROM pg_tables
    WHERE schemaname = (SELECT schemaname FROM pg_tables WHERE tablename = 'sandboxes'
        AND schemaname = ANY (current_schemas(false)) ORDER BY array_position(current_schemas(false), schemaname)
        LIMIT 1)
    AND tablename IN ({own_schema.quote_tables()})
)
SELECT current_setting('server_version_num')::int AS version,
    current_setting('server_version') AS server,
    COALESCE((SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()), false) AS tls,
    COALESCE(inet_client_addr() << '127.0.0.0/8' OR host(inet_client_addr()) = '::1', true) AS local,
    pg_is_in_recovery() AS standby,
    current_setting('synchronous_commit') AS synchronous_commit,
    current_setting('fsync') AS fsync,
    (SELECT count(*) FROM pg_stat_replication)::int AS standbys,
    current_setting('synchronous_standby_names') <> '' AS synchronous_standbys,
    (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) AS superuser,
    (SELECT pg_has_role(current_user, tableowner, 'MEMBER') FROM ours WHERE tablename = 'sandboxes') AS owner,
    (SELECT COALESCE(string_agg(name, ', ' ORDER BY name), '') FROM ours WHERE NOT (
        has_table_privilege(name, 'SELECT') AND has_table_privilege(name, 'INSERT')
        AND has_table_privilege(name, 'UPDATE') AND has_table_privilege(name, 'DELETE'))) AS not_writable
"""


def examine(database: Engine) -> dict[str, Any]:
    """Return facts about the server, this connection and this role.

    Raises StoreError when the server does not answer.
    """
    facts = dict(database.read(_QUERY)[0])
    facts["clock_difference"] = int(database.read_clock_difference())
    facts["verified"] = _read_sslmode(database.path) == "verify-full"
    return facts


def _read_sslmode(uri: str) -> str:
    """Return the sslmode of connections with this URI. It may also come from PGSSLMODE."""
    from psycopg import conninfo, pq

    defaults = {option.keyword: option.val for option in pq.Conninfo.get_defaults()}
    return str(conninfo.conninfo_to_dict(uri).get("sslmode") or (defaults.get(b"sslmode") or b"").decode())
