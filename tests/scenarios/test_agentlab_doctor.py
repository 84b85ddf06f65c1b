# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""agentlab_doctor in real playbooks; what it finds is tested one by one in tests/unit/doctor/."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from support.double import TOKEN_SECRET
from support.play import run_play
from support.story import task, writes, written

DOCTOR = "agentlab_doctor"


@pytest.mark.everyday
def test_it_looks_and_writes_nothing_but_the_bundle(
    story: Any, given: Any, env: Any, server: Any, tmp_path: Path
) -> None:
    given(2)
    server.pve.vm(9000).config["agent"] = "0"
    bundle = tmp_path / "bundle.json"
    before = written(env["AGENTLAB_DATABASE"])
    run = story(
        [
            task("look", DOCTOR),
            task("would write", DOCTOR, bundle=str(bundle), check=True, diff=True),
            task("there is none yet", "ansible.builtin.stat", path=str(bundle)),
            task("write", DOCTOR, bundle=str(bundle), diff=True),
            task("fail on a warning", DOCTOR, fail_on="warning", fails=True),
            task("no problem", DOCTOR, fail_on="problem"),
            task("a problem", DOCTOR, fail_on="problem", template="nowhere", fails=True),
            task("no folder", DOCTOR, bundle="/nonexistent/bundle.json", fails=True),
        ]
    )
    found = {one["check"]: one for one in run["look"]["findings"] if one["status"] != "ok"}
    assert run.status("look") == "ok" and run["look"]["status"] == "warning" and run["look"]["problems"] == 0
    assert found["template"]["advice"] == "install qemu-guest-agent in it, and: qm set 9000 --agent 1"
    assert run.status("would write") == "changed" and run["there is none yet"]["stat"]["exists"] is False
    assert run["would write"]["diff"] == run["write"]["diff"] == {"before": {}, "after": {"bundle": str(bundle)}}
    assert stat.S_IMODE(bundle.stat().st_mode) == 0o600 and json.loads(bundle.read_text())["findings"]
    assert TOKEN_SECRET not in bundle.read_text() and TOKEN_SECRET not in run.output
    assert "findings; the first: template: template 9000" in run["fail on a warning"]["msg"]
    assert run["a problem"]["findings"] and "'nowhere' does not exist" in run["a problem"]["msg"]
    assert run["no folder"]["msg"].startswith("bundle: /nonexistent/bundle.json: No such file or directory")
    assert written(env["AGENTLAB_DATABASE"]) == before and all(writes(made) == [] for made in run.requests.values())


def test_an_unreachable_proxmox_is_a_problem_and_an_empty_host_is_none(env: Any, tmp_path: Path) -> None:
    alone = {name: value for name, value in env.items() if not name.startswith("PROXMOX_")}
    alone["AGENTLAB_DATABASE"] = str(tmp_path / "none" / "agentlab.db")
    run = run_play([task("look", DOCTOR)], alone, tmp_path).ok()
    found = {one["check"]: one["status"] for one in run["look"]["findings"]}
    assert found["proxmox"] == "problem" and found["database"] == "ok" and not (tmp_path / "none").exists()
