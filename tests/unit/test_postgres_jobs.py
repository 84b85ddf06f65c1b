# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Jobs of several controllers on PostgreSQL: who does them on schedule, and that no two passes run at once."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import config, rules
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.context import Context
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import Busy, StoreUnavailable
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.maintenance import cleanup, reconcile
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.open import open_database

from support.double import EMPTY_CONFIG
from support.engines import require_postgresql, server


@pytest.fixture
def uri() -> str:
    require_postgresql()
    return server().uri()


@pytest.fixture
def connect() -> Iterator[Any]:
    """Open the records as one of several controllers."""
    opened: list[Any] = []

    def make(uri: str) -> Any:
        opened.append(open_database(uri))
        return opened[-1]

    yield make
    for database in opened:
        database.close()


def test_a_job_is_done_by_one_and_taken_over_when_its_session_ends(uri: str, connect: Any) -> None:
    first, second = connect(uri), connect(uri)
    assert first.lead("reconcile") and first.lead("reconcile")
    assert not second.lead("reconcile") and second.lead("cleanup")
    server().execute(f"SELECT pg_terminate_backend({first._leader.info.backend_pid})")
    deadline = time.monotonic() + 10
    while not second.lead("reconcile"):
        assert time.monotonic() < deadline, "not taken over within 10 seconds"
        time.sleep(0.1)
    with pytest.raises(StoreUnavailable):
        first.lead("reconcile")
    assert not first.lead("reconcile")


def test_no_two_controllers_run_a_pass_at_once(uri: str, connect: Any) -> None:
    first, second = connect(uri), connect(uri)
    host = socket.gethostname()
    # Other records on the same server have passes of their own. They are named nowhere.
    others = connect(f"{server().uri()}?application_name=elsewhere")
    with first.run_alone("reconcile", 0), others.run_alone("reconcile", 0):
        with pytest.raises(Busy) as busy, second.run_alone("reconcile", 0.3):
            raise AssertionError("two passes at once")
        assert busy.value.message == (
            f"reconcile is being run by another controller on {host} (127.0.0.1); wait until it has ended, then run "
            "again"
        )
        with second.run_alone("cleanup", 0):
            pass
        assert second.lead("reconcile"), "who does the job on schedule is another question"
    with second.run_alone("reconcile", 0):
        began = time.monotonic()
        threading.Timer(0.5, server().execute, [_CUT_PASSES]).start()
        with first.run_alone("reconcile", 20):
            assert time.monotonic() - began > 0.4, "it waited until the session of the other pass had ended"


_CUT_PASSES = (
    "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND objid BETWEEN 20 AND 29 AND granted"
)


@pytest.mark.parametrize("what", ["reconcile", "cleanup"])
def test_a_pass_that_a_person_asks_for_waits_for_another_controllers(
    uri: str, connect: Any, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    options = {"database": uri, "config_file": "", "claim_timeout": "1s", "api_host": "127.0.0.1"}
    ctx = Context(config.load(options, {"AGENTLAB_CONFIG": EMPTY_CONFIG}), actor="person")
    policy = rules.parse("auto_cleanup: {rules: []}", "rules")
    monkeypatch.setattr(reconcile, "_run_pass", lambda *_values: ["the pass"])
    monkeypatch.setattr(cleanup, "_run_rules", lambda *_values: ["the pass"])

    def ask(context: Context, apply: bool = True) -> Any:
        return reconcile.run(context, apply=apply) if what == "reconcile" else cleanup.run(context, policy)

    with connect(uri).run_alone(what, 0):
        with pytest.raises(Busy, match=f"^{what} is being run by another controller"):
            ask(ctx)
        assert ask(ctx.derive(actor="person", dry_run=True), apply=False) == ["the pass"], "a look waits for nobody"
    assert ask(ctx) == ["the pass"]
    ctx.close()
