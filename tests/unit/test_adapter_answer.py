# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a module answers about outcomes: check mode shows what a sandbox would be, and each remedy is in its words."""

from __future__ import annotations

from ansible_collections.agentlab.proxmox.plugins.module_utils import _adapter
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import Advice
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.model import Outcome, Sandbox

SANDBOX = Sandbox(
    uuid="u", vmid=1000, name="a1", state="RUNNING", created_at=0, updated_at=0, state_changed_at=0, tags=["ci"]
)


def test_check_mode_shows_the_tags_that_an_update_would_set() -> None:
    would = Outcome.of("would_update", SANDBOX, changed=True, extra={"after": {"tags": ["night"], "cores": 3}})
    shown = _adapter.answer([would], single=True, diff=False)["sandbox"]
    assert shown["tags"] == ["night"] and "cores" not in shown


def test_warnings_and_failures_end_with_the_remedy_of_modules() -> None:
    failed = Outcome.of(
        "failed", SANDBOX, message="no", remedy="force", failed=True, advice=[Advice("other", "update")]
    )
    answer = _adapter.answer([failed], single=True, diff=False)
    assert answer["msg"] == answer["results"][0]["message"] == "no. Use force=true to bypass"
    assert answer["warnings"] == ["other. Set update=true to apply it"]
