# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the doctor asks a PostgreSQL server."""

from __future__ import annotations

from typing import Any

from ..port import Engine

_QUERY = """
SELECT current_setting('server_version_num')::int AS version,
    current_setting('server_version') AS server,
    COALESCE((SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()), false) AS tls,
    COALESCE(inet_client_addr() IS NULL OR host(inet_client_addr()) IN ('127.0.0.1', '::1'), true) AS local,
    current_setting('synchronous_commit') AS synchronous_commit,
    current_setting('fsync') AS fsync,
    (SELECT count(*) FROM pg_stat_replication)::int AS standbys,
    current_setting('synchronous_standby_names') <> '' AS synchronous_standbys,
    (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) AS superuser,
    (SELECT tableowner = current_user FROM pg_tables WHERE tablename = 'sandboxes'
        AND schemaname = ANY (current_schemas(false)) LIMIT 1) AS owner
"""


def examine(database: Engine) -> dict[str, Any]:
    """Return what the server says of itself, of this connection and of this role; StoreError when it does not
    answer.
    """
    facts = dict(database.read(_QUERY)[0])
    facts["clock_difference"] = int(database.clock_difference())
    facts["verified"] = "sslmode=verify-full" in database.path
    return facts
