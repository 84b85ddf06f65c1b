# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A pooler before the server: one by session works with our settings, one by transaction is refused before anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.clock import SystemClock
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import StoreError
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.open import open_database
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.records import Records

from support.engines import require_postgresql, server
from support.pooler import Pooler


@pytest.fixture
def uri() -> str:
    require_postgresql()
    return server().uri()


@pytest.fixture
def pool(uri: str) -> Iterator[Callable[[str], str]]:
    """Start a pooler of a mode, and return the URI that leads through it."""
    poolers: list[Pooler] = []

    def start(mode: str) -> str:
        poolers.append(Pooler(server().port, server().user, mode))
        return uri.replace(f":{server().port}/", f":{poolers[-1].port}/")

    yield start
    for pooler in poolers:
        pooler.close()


@pytest.mark.parametrize("made", [False, True])
def test_a_pooler_by_transaction_is_refused_before_anything_is_written(
    uri: str, pool: Callable[[str], str], made: bool
) -> None:
    if made:
        open_database(uri).close()
    before = server().execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'", uri.rpartition("/")[2])
    through = pool("transaction")
    with pytest.raises(StoreError) as caught:
        open_database(through)
    assert caught.value.message == (
        f"database {through}: a pooler before the server gives each transaction another session (transaction pooling), "
        "which loses the locks of controllers. Let it pool by session (pgbouncer: pool_mode = session), or name the "
        "server itself in the URI. Nothing was written"
    )
    after = server().execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'", uri.rpartition("/")[2])
    assert before == after


def test_a_pooler_by_session_that_drops_our_settings_gets_them_again(uri: str, pool: Callable[[str], str]) -> None:
    through = pool("session")
    first, second = open_database(through), open_database(through)
    settings = "SELECT current_setting('idle_in_transaction_session_timeout'), current_setting('lock_timeout')"
    assert [tuple(row) for row in first.read(settings)] == [("15s", "5s")], "readers wait for a lock less long"
    inside = first.write(lambda conn: tuple(conn.execute(settings).fetchone()))
    assert inside == ("15s", "1min"), "each session has them"
    records = Records(first, SystemClock(), "tester")
    for number in range(12):
        # From the sixth time on psycopg prepares the statement.
        records.set_meta("k", str(number))
        assert Records(second, SystemClock(), "tester").read_meta("k") == str(number)
    assert first.lead("reconcile") and not second.lead("reconcile")
    for database in (first, second):
        database.close()


def test_settings_of_the_database_are_not_taken_for_ours(uri: str, pool: Callable[[str], str]) -> None:
    """A transaction of a paused process would never be ended."""
    server().execute(f"ALTER DATABASE {uri.rpartition('/')[2]} SET lock_timeout = '7s'")
    database = open_database(pool("session"))
    settings = "SELECT current_setting('idle_in_transaction_session_timeout'), current_setting('lock_timeout')"
    assert database.write(lambda conn: tuple(conn.execute(settings).fetchone())) == ("15s", "1min")
    database.close()


def test_a_setting_of_the_uri_counts_and_is_not_taken_for_a_dropped_one(uri: str) -> None:
    database = open_database(f"{uri}?options=-clock_timeout%3D0%20-cidle_in_transaction_session_timeout%3D0")
    assert not database._settings_dropped  # type: ignore[attr-defined]
    database.close()


def test_a_direct_connection_is_told_its_settings_once(uri: str) -> None:
    database = open_database(uri)
    assert not database._settings_dropped  # type: ignore[attr-defined]
    setting = "SELECT current_setting('default_transaction_isolation'), current_setting('lock_timeout')"
    assert database.write(lambda conn: tuple(conn.execute(setting).fetchone())) == ("read committed", "1min")
    database.close()
