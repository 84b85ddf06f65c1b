# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Parts of the daemon by themselves, on real records and a real Proxmox double: what would take weeks, or cannot be
seen from outside.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from support.daemon import CODE
from support.lab import Lab


@pytest.fixture
def service(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    for folder in CODE:
        monkeypatch.syspath_prepend(str(folder))
    from agentlabd.service import Service, load_config

    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({**lab.options, "cleanup_file": str(tmp_path / "cleanup.yaml")}), encoding="utf-8")
    environment = {
        **lab.server.environment(lab.folder),
        "AGENTLAB_CONFIG": str(path),
        "AGENTLAB_DATABASE": lab.database,
    }
    return Service(*load_config(str(path), environment), environment, str(path))


def test_a_thousand_reloads_leave_nothing_behind(service: Any, lab: Lab) -> None:
    for _dummy in range(1200):
        service.reload()
    assert service.make_context("somebody").client.get("version")


def test_expiry_rests_while_a_renewal_is_refused(service: Any, lab: Lab) -> None:
    """Its destroy is under way, or its end is not known: looking again at once would take the records' lock twenty
    times a second.
    """
    made = lab.create("a1")
    from agentlabd.scheduler import Scheduler

    ctx = lab.context()
    claim = ctx.records.claim(made.uuid, "destroy", wait=0)
    ctx.records.write_journal(claim, "destroy", "waiting", {})
    ctx.records.release(claim)
    ctx.database.write(
        lambda conn: conn.execute(
            "UPDATE sandboxes SET keepalive = 1, lease_expires_at = 1 WHERE uuid = ?", (made.uuid,)
        )
    )

    async def pauses() -> list[float]:
        one = Scheduler(service)
        return [one._expire_leases() for _dummy in range(3)]

    assert min(asyncio.run(pauses())) >= 1.0
    assert lab.record(made).state == "RUNNING" and lab.record(made).lease_expires_at == 1
