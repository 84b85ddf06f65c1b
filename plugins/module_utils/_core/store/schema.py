# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""The database schema as numbered steps. A released step is never edited: each change is a new step."""

from __future__ import annotations

# "alab": distinguishes our file from any other SQLite file before the first write.
APPLICATION_ID = 0x616C6162

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID""",
        """CREATE TABLE sandboxes (
            uuid TEXT PRIMARY KEY,
            vmid INTEGER NOT NULL CHECK (vmid BETWEEN 100 AND 999999999),
            name TEXT NOT NULL,
            state TEXT NOT NULL,
            generation INTEGER NOT NULL DEFAULT 0,
            profile TEXT,
            node TEXT,
            ip TEXT,
            workspace_id TEXT,
            tags TEXT NOT NULL DEFAULT '[]',
            protected INTEGER NOT NULL DEFAULT 0,
            keepalive INTEGER NOT NULL DEFAULT 0,
            ttl_seconds INTEGER NOT NULL DEFAULT 0,
            lease_expires_at INTEGER,
            created_at INTEGER NOT NULL,
            updated_at INTEGER NOT NULL,
            state_changed_at INTEGER,
            smbios_uuid TEXT,
            absent_seen_at INTEGER,
            reason TEXT
        ) WITHOUT ROWID""",
        # VMIDs and names are unique among live records, not over history: Proxmox hands VMIDs out again.
        "CREATE UNIQUE INDEX live_vmid ON sandboxes (vmid) WHERE state <> 'DESTROYED'",
        "CREATE UNIQUE INDEX live_name ON sandboxes (name) WHERE state <> 'DESTROYED'",
        # Partial indexes stay small with a long history: listing, prune and expiry never read destroyed records.
        "CREATE INDEX live_state ON sandboxes (state, state_changed_at) WHERE state <> 'DESTROYED'",
        "CREATE INDEX live_lease ON sandboxes (lease_expires_at) WHERE state <> 'DESTROYED'",
        "CREATE INDEX gone_vmid ON sandboxes (vmid, state_changed_at) WHERE state = 'DESTROYED'",
        "CREATE INDEX gone_age ON sandboxes (state_changed_at) WHERE state = 'DESTROYED'",
        """CREATE TABLE events (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            at INTEGER NOT NULL,
            sandbox_uuid TEXT NOT NULL REFERENCES sandboxes (uuid) ON DELETE CASCADE,
            vmid INTEGER NOT NULL,
            from_state TEXT,
            to_state TEXT,
            operation TEXT NOT NULL,
            actor TEXT NOT NULL,
            reason TEXT,
            evidence TEXT NOT NULL DEFAULT '{}',
            upids TEXT NOT NULL DEFAULT '[]',
            duration_ms INTEGER,
            outcome TEXT NOT NULL
        )""",
        "CREATE INDEX events_of ON events (sandbox_uuid, id)",
        "CREATE INDEX events_vmid ON events (vmid, id)",
        """CREATE TABLE claims (
            sandbox_uuid TEXT PRIMARY KEY REFERENCES sandboxes (uuid) ON DELETE CASCADE,
            fence INTEGER NOT NULL,
            operation TEXT NOT NULL,
            holder TEXT NOT NULL,
            process TEXT NOT NULL,
            acquired_at INTEGER NOT NULL,
            expires_at INTEGER NOT NULL
        ) WITHOUT ROWID""",
        """CREATE TABLE operations (
            id INTEGER PRIMARY KEY,
            sandbox_uuid TEXT NOT NULL REFERENCES sandboxes (uuid) ON DELETE CASCADE,
            kind TEXT NOT NULL,
            phase TEXT NOT NULL,
            detail TEXT NOT NULL DEFAULT '{}',
            actor TEXT NOT NULL,
            started_at INTEGER NOT NULL,
            updated_at INTEGER NOT NULL
        )""",
        # One unfinished operation for each sandbox. Finished operations remain as events.
        "CREATE UNIQUE INDEX operation_of ON operations (sandbox_uuid)",
        "INSERT INTO meta (key, value) VALUES ('fence', '0')",
    ),
    # Profiles: the maximum lease that the sandbox's profile grants.
    ("ALTER TABLE sandboxes ADD COLUMN lease_max_seconds INTEGER",),
    # Cloud-init: the path of the snippet to remove with the sandbox.
    ("ALTER TABLE sandboxes ADD COLUMN snippet TEXT",),
    # Workspaces: disks that outlive sandboxes.
    (
        """CREATE TABLE workspaces (
            id TEXT PRIMARY KEY,
            name TEXT NOT NULL,
            state TEXT NOT NULL,
            generation INTEGER NOT NULL DEFAULT 0,
            storage TEXT NOT NULL,
            node TEXT,
            owner_vmid INTEGER NOT NULL CHECK (owner_vmid BETWEEN 100 AND 999999999),
            volume TEXT NOT NULL,
            size INTEGER NOT NULL,
            sandbox_uuid TEXT REFERENCES sandboxes (uuid),
            slot TEXT,
            lease_expires_at INTEGER,
            created_at INTEGER NOT NULL,
            updated_at INTEGER NOT NULL,
            state_changed_at INTEGER NOT NULL,
            reason TEXT
        ) WITHOUT ROWID""",
        "CREATE UNIQUE INDEX workspace_name ON workspaces (name) WHERE state <> 'DELETED'",
        "CREATE UNIQUE INDEX workspace_owner ON workspaces (owner_vmid) WHERE state <> 'DELETED'",
        # A sandbox has at most one workspace.
        "CREATE UNIQUE INDEX workspace_sandbox ON workspaces (sandbox_uuid) WHERE sandbox_uuid IS NOT NULL",
        """CREATE TABLE workspace_events (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            at INTEGER NOT NULL,
            workspace_id TEXT NOT NULL REFERENCES workspaces (id) ON DELETE CASCADE,
            sandbox_uuid TEXT,
            from_state TEXT,
            to_state TEXT NOT NULL,
            operation TEXT NOT NULL,
            actor TEXT NOT NULL,
            reason TEXT,
            evidence TEXT NOT NULL DEFAULT '{}',
            upids TEXT NOT NULL DEFAULT '[]',
            outcome TEXT NOT NULL
        )""",
        "CREATE INDEX workspace_events_of ON workspace_events (workspace_id, id)",
    ),
    # Time when the guest agent last reported the address; NULL if that was before the last start.
    ("ALTER TABLE sandboxes ADD COLUMN ip_seen_at INTEGER",),
    # The id of these records in the marker of their VMs, because several databases may use one cluster.
    ("INSERT OR IGNORE INTO meta (key, value) VALUES ('database_id', lower(hex(randomblob(16))))",),
    # Commands in sandboxes. A run is written before it is sent, so that it never starts twice.
    (
        """CREATE TABLE runs (
            id TEXT PRIMARY KEY,
            sandbox_uuid TEXT NOT NULL REFERENCES sandboxes (uuid) ON DELETE CASCADE,
            state TEXT NOT NULL,
            fingerprint TEXT NOT NULL,
            program TEXT NOT NULL,
            actor TEXT NOT NULL,
            detached INTEGER NOT NULL DEFAULT 0,
            acked INTEGER NOT NULL DEFAULT 0,
            started_at INTEGER NOT NULL,
            updated_at INTEGER NOT NULL,
            detail TEXT NOT NULL DEFAULT '{}'
        ) WITHOUT ROWID""",
        "CREATE INDEX runs_of ON runs (sandbox_uuid, started_at)",
    ),
    # Placement: memory and disk of a new sandbox on its node, in bytes, until Proxmox VE's figures show them.
    (
        """CREATE TABLE placements (
            sandbox_uuid TEXT PRIMARY KEY REFERENCES sandboxes (uuid) ON DELETE CASCADE,
            memory INTEGER NOT NULL,
            storage TEXT,
            disk INTEGER NOT NULL,
            at INTEGER NOT NULL
        ) WITHOUT ROWID""",
        "CREATE INDEX live_node ON sandboxes (node) WHERE state <> 'DESTROYED'",
    ),
    # The host that wrote the snippet. NULL when an earlier release wrote it.
    ("ALTER TABLE sandboxes ADD COLUMN snippet_host TEXT",),
)

VERSION = len(MIGRATIONS)
