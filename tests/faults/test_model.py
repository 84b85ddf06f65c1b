# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A model of sandboxes, their leases and what people do: hypothesis chooses the steps, and the
promises hold after each.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import config
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import states as rules
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.context import Context
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import AgentlabError, Kept
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.maintenance import prune, reconcile
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.sandboxes import create, destroy, lease
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.vm import power
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from faults.crash_support import BYSTANDER, REQUEST_FAULTS, TASK_FAULTS, Rig
from support.engines import require_postgresql

pytestmark = pytest.mark.faults


class Life(RuleBasedStateMachine):
    """Two names; what a user may do with them, faults in between.

    The model knows what must be so, whatever Proxmox answers.
    """

    def __init__(self, engine: str) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="agentlab-model-"))
        self.rig = Rig(self.folder, time_scale=0, engine=engine)
        self.rig.foreign(BYSTANDER, name="bystander", running=True, tags="agentlab")
        (self.folder / "config.yaml").write_text(
            "template: debian-13\nclaim_timeout: 1s\ndoubt_window: 0s\nwait_timeout: 2s\napi_timeout: 2\n"
            "shutdown_timeout: 1s\n",
            encoding="utf-8",
        )
        # What was there before each step: a state never moves against the table, DESTROYED never ends.
        self.before: dict[str, str] = {}

    def teardown(self) -> None:
        try:
            self.rig.well()
            for _dummy in range(3):
                self._context(lambda ctx: reconcile.run(ctx, apply=True))
            live = [row["vmid"] for row in self.rig.records() if row["state"] != "DESTROYED"]
            done = self._context(
                lambda ctx: destroy.run(ctx, [(ctx.select_sandbox(vmid), destroy.Request(force=True)) for vmid in live])
            )
            assert not isinstance(done, AgentlabError), done
            assert not [one.message for one in done if one.failed], [one.message for one in done]
            wrong = self.rig.broken()
            assert not wrong, wrong
            assert sorted(vm.vmid for vm in self.rig.pve.vms if not vm.template) == [*sorted(self.rig.bystanders)]
        finally:
            self.rig.stop()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _context(self, work: Any) -> Any:
        ctx = Context(config.load({}, self.rig.env), actor="model")
        try:
            return work(ctx)
        except AgentlabError as error:
            return error
        finally:
            ctx.close()

    def _live(self, name: str) -> dict[str, Any] | None:
        return next((row for row in self.rig.records() if row["name"] == name and row["state"] != "DESTROYED"), None)

    @initialize()
    def begin(self) -> None:
        self._context(lambda ctx: create.run(ctx, create.Spec(name="one", ttl=600)))

    names = st.sampled_from(["one", "two"])

    @rule(name=names)
    def create(self, name: str) -> None:
        done = self._context(lambda ctx: create.run(ctx, create.Spec(name=name, ttl=600)))
        if not isinstance(done, AgentlabError):
            assert self._live(name) is not None

    @rule(name=names, operation=st.sampled_from(["stop", "start", "suspend", "complete", "fail"]))
    def power(self, name: str, operation: str) -> None:
        was = self._live(name)
        if was is None:
            return
        done = self._context(lambda ctx: power.run(ctx, ctx.select_sandbox(name=name), operation))
        if was["state"] not in rules.OPERATIONS[operation].allowed + rules.OPERATIONS[operation].satisfied:
            # A VM that is not ours (any more) is told before the state is.
            assert isinstance(done, Kept) or (isinstance(done, AgentlabError) and done.message.startswith("cannot ")), (
                done
            )
        if not isinstance(done, AgentlabError) and done.changed:
            assert self._live(name)["state"] == power.TARGETS[operation]  # type: ignore[index]

    @rule(name=names, force=st.booleans())
    def destroy(self, name: str, force: bool) -> None:
        was = self._live(name)
        if was is None:
            return
        done = self._context(
            lambda ctx: destroy.run(ctx, [(ctx.select_sandbox(name=name), destroy.Request(force=force))])[0]
        )
        assert not isinstance(done, AgentlabError), done
        now = self.rig.sql("SELECT * FROM sandboxes WHERE uuid = ?", was["uuid"])[0]
        assert (now["state"] == "DESTROYED") == (not done.failed), done
        left = was["state"] not in rules.OPERATIONS["destroy"].allowed
        if left and not force and not done.failed:
            # Only a destroy that was begun rightly may be finished without force.
            events = self.rig.sql("SELECT * FROM events WHERE sandbox_uuid = ? AND operation = 'destroy'", was["uuid"])
            assert len(events) > 1, f"destroyed in {was['state']} without force"

    @rule(name=names, ttl=st.sampled_from([300, 1200, 7200]))
    def renew(self, name: str, ttl: int) -> None:
        was = self._live(name)
        if was is None:
            return
        done = self._context(lambda ctx: lease.renew(ctx, ctx.select_sandbox(name=name), ttl))
        now = self._live(name)
        assert now is not None and now["lease_expires_at"] >= was["lease_expires_at"]
        if was["state"] != "RUNNING":
            assert isinstance(done, AgentlabError)

    @rule(name=names)
    def lease_ends(self, name: str) -> None:
        self.rig.sql(
            "UPDATE sandboxes SET lease_expires_at = ? WHERE name = ? AND state <> 'DESTROYED'",
            int(time.time()) - 1,
            name,
        )
        done = self._context(lease.expire)
        assert not isinstance(done, AgentlabError), done
        now = self._live(name)
        assert now is None or now["state"] not in rules.OPERATIONS["expire"].allowed

    @rule()
    def prune(self) -> None:
        timed_out = [row["uuid"] for row in self.rig.records() if row["state"] == "TIMEOUT"]
        others = {row["uuid"]: row["state"] for row in self.rig.records() if row["state"] != "TIMEOUT"}
        done = self._context(lambda ctx: prune.run(ctx, prune.Selection()))
        assert {row["uuid"]: row["state"] for row in self.rig.records() if row["uuid"] in others} == others
        if not isinstance(done, AgentlabError):
            assert len(done.pruned) + len(done.kept) + len(done.failed) == len(timed_out)

    @rule()
    def reconcile(self) -> None:
        self._context(lambda ctx: reconcile.run(ctx, apply=True))

    @rule(which=st.sampled_from(REQUEST_FAULTS))
    def fault(self, which: Any) -> None:
        method, suffix, how = which
        if isinstance(how, int):
            self.rig.in_loop(
                lambda: self.rig.pve.fault(
                    method, suffix, "answer", status=how, body='{"data": null, "message": "made up"}'
                )
            )
        else:
            self.rig.in_loop(lambda: self.rig.pve.fault(method, suffix, how))

    @rule(which=st.sampled_from(TASK_FAULTS))
    def task_fails(self, which: Any) -> None:
        self.rig.spoil(*which)

    @rule()
    def all_is_well_again(self) -> None:
        self.rig.well()

    @rule(name=names)
    @precondition(lambda self: len(self.rig.bystanders) < 3)
    def replaced_by_somebody_elses(self, name: str) -> None:
        was = self._live(name)
        if was is not None and was["smbios_uuid"] and was["vmid"] not in self.rig.bystanders:
            self.rig.foreign(was["vmid"], name=name, running=True, tags="agentlab")
            self.rig.in_loop(self.rig.pve.requests.clear)

    @rule(name=names)
    def removed_by_hand(self, name: str) -> None:
        was = self._live(name)
        vm = self.rig.pve.vm(was["vmid"]) if was else None
        if was and vm and was["smbios_uuid"] and was["vmid"] not in self.rig.bystanders:
            self.rig.in_loop(lambda: self.rig.pve.vms.remove(vm))

    @invariant()
    def promises_hold(self) -> None:
        wrong = self.rig.broken(settled=False)
        assert not wrong, wrong
        now = {row["uuid"]: row["state"] for row in self.rig.records()} if self.rig.is_made() else {}
        for uuid, state in self.before.items():
            assert state != "DESTROYED" or now.get(uuid) == "DESTROYED", f"{uuid} was DESTROYED and is {now.get(uuid)}"
        self.before = now


@pytest.mark.parametrize(("engine", "examples"), [("sqlite", 30), ("postgresql", 10)])
def test_any_sequence_of_operations_and_faults_keeps_the_promises(engine: str, examples: int) -> None:
    if engine == "postgresql":
        require_postgresql()
    run_state_machine_as_test(
        functools.partial(Life, engine),
        settings=settings(
            max_examples=examples,
            stateful_step_count=15,
            deadline=None,
            print_blob=True,
            derandomize=False,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
