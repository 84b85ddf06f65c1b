# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""agentlab_awx_setup as a module: made, unchanged, changed, removed.

tests/awx/test_setup.py has the set-up's playbook.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.awx import TOKEN, Awx
from support.awx_setup import PROJECT_URL, add_prerequisites
from support.play import run_module

SETUP = "agentlab_awx_setup"


@pytest.mark.everyday
def test_made_unchanged_changed_and_removed(tmp_path: Path) -> None:
    awx = Awx()
    add_prerequisites(awx, 1)
    template = {"name": "reconcile", "description": "Let leases expire", "playbook": "reconcile.yml"}

    def run(check: bool = False, **options: Any) -> dict[str, Any]:
        args = {
            "host": awx.url, "token": TOKEN, "inventory": "proxmox", "project_scm_url": PROJECT_URL, "templates": [template],
            "credential_type": {"name": "x", "description": "y", "kind": "cloud", "inputs": {"fields": []}}, **options,
        }  # fmt: skip
        play = run_module(f"agentlab.proxmox.{SETUP}", args, {}, tmp_path, check=check, diff=True).ok()
        assert not play.warnings
        return play.result(f"agentlab.proxmox.{SETUP}")

    try:
        would = run(check=True)
        assert would["changed"] and awx.writes == []
        made = run()
        assert made["changed"] and [step["action"] for step in made["steps"]] == [
            step["action"] for step in would["steps"]
        ]
        assert not run()["changed"] and not run(check=True)["changed"]
        changed = run(hosts="pve1")
        assert changed["lines"] == ["job template agentlab - reconcile: changed (extra_vars)"]
        assert changed["diff"]["after"] == {
            "job template agentlab - reconcile": {"extra_vars": '{"agentlab_hosts": "pve1"}'}
        }
        assert run(state="absent")["changed"] and not run(state="absent")["changed"]
        assert awx.objects["job_templates"] == awx.objects["projects"] == []
    finally:
        awx.stop()
