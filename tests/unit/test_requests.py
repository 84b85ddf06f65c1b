# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How many requests the work costs: counts, never times; and what must not be saved on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import Kept
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.maintenance import reconcile
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.model import Sandbox
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.proxmox.client import ProxmoxClient
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.sandboxes import destroy
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.views import info

from support.double import EMPTY_CONFIG, TOKEN_ID
from support.lab import Lab
from support.proxmox_access import SANDBOX_PRIVS


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path)
    try:
        yield made
    finally:
        made.stop()


def see_everything(lab: Lab) -> None:
    """What docs/safety.md tells to grant: a token from which no VM is hidden."""
    lab.pve.grant(TOKEN_ID, "/", "VM.Audit", "Sys.Audit")
    lab.pve.grant(TOKEN_ID, "/vms", *SANDBOX_PRIVS)


def hide_something(lab: Lab) -> None:
    """Let one VM of somebody else be hidden from the token, so that no list proves an absence."""
    lab.pve.no_access.add("/vms/4711")


def timed_out(lab: Lab, count: int, *, there: bool = False) -> list[Sandbox]:
    """So many sandboxes in TIMEOUT, their VMs gone unless they are to be there."""
    made = [lab.create(name=f"a{number}") for number in range(count)]
    lab.context().database.write(lambda conn: conn.execute("UPDATE sandboxes SET state = 'TIMEOUT'") and None)
    for one in () if there else made:
        lab.pve.remove_vm(one.vmid)
    lab.pve.counted.clear()
    return made


@pytest.mark.parametrize(
    "way",
    [
        "entry",
        "pool",
        "pool of a pool",
        "audit only here",
        "not handed down",
        "no audit of the entries",
        "entries cut",
        "root entry",
    ],
)
def test_each_absence_is_asked_for_when_something_may_be_hidden_from_the_token(lab: Lab, way: str) -> None:
    made = timed_out(lab, 6, there=True)
    for one in made[:5]:
        lab.pve.remove_vm(one.vmid)
    hidden = made[5].vmid
    see_everything(lab)
    if way in ("entry", "no audit of the entries"):
        lab.pve.no_access.add(f"/vms/{hidden}")
    elif way in ("pool", "pool of a pool"):
        name = {"pool": "secret", "pool of a pool": "some/secret"}[way]
        lab.pve.pools[name] = {hidden}
        lab.pve.no_access.add(f"/pool/{name}")
    elif way == "root entry":
        lab.pve.pools["secret"] = {hidden}
        lab.pve.no_access |= {"/", "/pool/secret"}
        # Quorum may be read all the same; without that everything is kept.
        ordinary = lab.pve.allowed
        lab.pve.allowed = lambda user, path, priv: (path, priv) == ("/", "Sys.Audit") or ordinary(user, path, priv)
    elif way == "audit only here":
        lab.pve.acl = None
        lab.pve.grant(TOKEN_ID, "/", "Sys.Audit")
        for vmid in {9000, *(one.vmid for one in made[:5])}:
            lab.pve.grant(TOKEN_ID, f"/vms/{vmid}", *SANDBOX_PRIVS)
    if way == "no audit of the entries":
        real = lab.pve.allowed
        lab.pve.allowed = lambda user, path, priv: path != "/access" and real(user, path, priv)
    if way == "entries cut":
        lab.pve.no_access.add(f"/vms/{hidden}")
        lab.pve.fault("GET", "/access/acl", "answer", status=200, body='{"data":[]}', times=9)
    if way == "not handed down":
        lab.pve.no_access.add(f"/vms/{hidden}")
        body = json.dumps(
            {"data": {"/access": {"Sys.Audit": 1}, "/vms": {"VM.Audit": 0}, f"/vms/{hidden}": {"VM.Audit": 1}}}
        )
        lab.pve.fault("GET", "/access/permissions", "answer", status=200, body=body, times=9)
    report = lab.prune()
    assert [one.vmid for one in report.pruned] == [one.vmid for one in made[:5]]
    assert [one.reason for one in report.kept] == ["unknown"]
    assert [one.state for one in lab.records() if one.vmid == hidden] == ["TIMEOUT"]
    assert lab.pve.vm(hidden) is not None
    # What is not proven by the list is asked for, and that it may be incomplete is found out once.
    assert lab.pve.counted["GET /cluster/nextid"] >= 6 and lab.pve.counted["GET /access/acl"] == 1


def test_a_thousand_absences_cost_five_requests(lab: Lab) -> None:
    """Prune of many whose VMs are gone: quorum, the list, the two reads that show it to be whole, and one absence
    asked for in another way.
    """
    made = timed_out(lab, 8)
    see_everything(lab)
    lab.pve.ca_fingerprint = ProxmoxClient(lab.context().config.proxmox, lab.clock).read_trusted_authority()
    lab.context().records.set_meta(
        "cluster", json.dumps({"name": "other", "nodes": ["x"], "authority": lab.pve.ca_fingerprint})
    )
    wanted = {
        "GET /cluster/ha/status/current": 1,
        "GET /cluster/resources": 1,
        "GET /access/acl": 1,
        "GET /access/permissions": 1,
        "GET /cluster/nextid": 1,
    }
    assert lab.prune(dry_run=True).count == 8
    assert dict(lab.pve.counted) == wanted
    lab.pve.counted.clear()
    assert [one.reason for one in lab.prune().pruned] == ["vm_absent"] * len(made)
    assert dict(lab.pve.counted) == wanted


def test_a_cluster_of_another_authority_is_not_taken_for_ours(lab: Lab) -> None:
    timed_out(lab, 6)
    see_everything(lab)
    lab.context().records.set_meta("cluster", json.dumps({"name": "other", "nodes": ["x"], "authority": "00:11"}))
    assert [one.reason for one in lab.prune().kept] == ["unknown"] * 6


@pytest.mark.parametrize("whole", [True, False])
def test_a_bulk_destroy_reads_the_list_once_and_each_vm_once(lab: Lab, whole: bool) -> None:
    vmids = [lab.create(name=f"a{number}").vmid for number in range(8)]
    for vmid in vmids:
        lab.power("stop", vmid)
    if whole:
        see_everything(lab)
    else:
        hide_something(lab)
    lab.pve.counted.clear()
    assert {one.state for one in lab.destroy(*vmids)} == {"DESTROYED"}
    counted = lab.pve.counted
    one = "/nodes/{node}/qemu/{vmid}"
    assert counted[f"GET {one}/config"] == counted[f"PUT {one}/config"] == counted[f"DELETE {one}"] == 8
    assert counted["GET /cluster/ha/status/current"] == 1
    # Once to find them, once to see that they are gone: a proof only if no VM is hidden from the token, else each is
    # asked for by itself.
    assert counted["GET /cluster/resources"] == 2
    assert counted["GET /access/acl"] == counted["GET /access/permissions"] == 1
    assert counted["GET /cluster/nextid"] == (1 if whole else 8)


def test_a_vm_that_came_while_the_run_waited_is_not_proven_absent_by_the_list_from_before(lab: Lab) -> None:
    """The list a bulk run begins with proves the absence only of what nobody touched since."""
    made = timed_out(lab, 7)
    see_everything(lab)
    gone = made[0]
    ctx = lab.context()
    planned = [ctx.records.get(one.uuid) for one in made]
    ctx.cluster.survey([one.vmid for one in made])
    other = lab.context()
    claim = other.records.claim(gone.uuid, "reconcile")
    other.records.change(
        claim, other.records.get(gone.uuid), "reconcile", outcome="done", finish=True, node="pve1", ip="192.0.2.1"
    )
    lab.pve.counted.clear()
    assert {one.state for one in destroy.run(ctx, [(one, destroy.Request(force=True)) for one in planned])} == {
        "DESTROYED"
    }
    assert lab.pve.counted["GET /cluster/resources"] == 3


# ---- a daemon's reconcile knows what an earlier pass read ----

CONFIG = "GET /nodes/{node}/qemu/{vmid}/config"


def kinds_of_pass(lab: Lab, known_vms: reconcile.KnownVms | None, count: int) -> list[str]:
    """Return the kinds of drift of one pass, which reads the configurations of so many sandboxes."""
    lab.pve.counted.clear()
    drifts = reconcile.run(lab.context(), apply=True, known_vms=known_vms)
    # The template has the tag of sandboxes and no record, so each pass looks whose it is.
    assert lab.pve.counted.pop(CONFIG) == count + 1
    return [drift.kind for drift in drifts]


@pytest.fixture
def known(lab: Lab) -> reconcile.KnownVms:
    """What a pass learns of three sandboxes whose VMs have run for an hour and named their addresses."""
    for number in range(3):
        made = lab.create(f"a{number}")
        lab.context().records.amend(made, "test", ip="192.0.2.1", ip_seen_at=lab.clock.now() + 10**6)
        lab.pve.vm(made.vmid).started_at -= 3600
    see_everything(lab)
    known_vms = reconcile.KnownVms()
    assert kinds_of_pass(lab, known_vms, 3) == []
    return known_vms


def test_a_later_pass_reads_the_list_and_no_configuration(lab: Lab, known: reconcile.KnownVms) -> None:
    assert kinds_of_pass(lab, known, 0) == []
    assert lab.pve.counted["GET /cluster/resources"] == 1 and sum(lab.pve.counted.values()) <= 6
    # Whoever asks for a pass has every VM looked at.
    assert kinds_of_pass(lab, None, 3) == []


def test_a_vm_that_was_started_anew_is_read_again(lab: Lab, known: reconcile.KnownVms) -> None:
    """Only a VM that has run without a break is certain to be the same one."""
    vmid = lab.records()[0].vmid
    lab.swap(vmid, running=True)
    assert kinds_of_pass(lab, known, 1) == ["vmid_reused"]
    assert lab.record(vmid).state == "DESTROYED"
    # The stranger in our range has no record, so each pass looks whose it is.
    assert kinds_of_pass(lab, known, 1) == []


@pytest.mark.parametrize(
    "what", ["restarted just now", "uptime hidden", "stopped", "moved", "locked", "old", "unknown"]
)
def test_what_is_not_certain_is_read_again(what: str) -> None:
    sandbox = Sandbox(uuid="8a4e", vmid=1000, name="a1", state="RUNNING", node="pve1")
    row: dict[str, object] = {"type": "qemu", "status": "running", "node": "pve1", "uptime": 3600}
    at, now = 1000.0, 1900.0
    known_vms = reconcile.KnownVms()
    known_vms.note(sandbox, at)
    assert known_vms.covers(sandbox, row, now)
    changes: dict[str, dict[str, object]] = {
        "restarted just now": {"uptime": 900 + 59},
        "uptime hidden": {"uptime": None},
        "stopped": {"status": "stopped"},
        "moved": {"node": "pve2"},
        "locked": {"lock": "suspending"},
    }
    if what == "old":
        now = at + reconcile.KNOWN_SECONDS
        row["uptime"] = 10**6
    elif what == "unknown":
        known_vms.keep_only([])
    assert not known_vms.covers(sandbox, {**row, **changes.get(what, {})}, now)


def test_a_node_that_is_offline_is_told_of_known_vms_too(lab: Lab, known: reconcile.KnownVms) -> None:
    lab.pve.add_node("pve2", online=False)
    for sandbox in lab.records():
        lab.context().records.amend(sandbox, "test", node="pve2")
        lab.pve.vm(sandbox.vmid).node = "pve2"
    assert kinds_of_pass(lab, known, 0) == ["node_offline"] * 3


def test_a_run_that_the_records_alone_answer_loads_nothing_of_proxmox(tmp_path: Path) -> None:
    """Modules are sent as source and compiled on every run: what is not needed must not be loaded."""
    core = "ansible_collections.agentlab.proxmox.plugins.module_utils._core"
    code = f"""
import json, os, sys
from {core} import config
from {core}.sandboxes import lease
from {core}.views import info
from {core}.context import Context
ctx = Context(config.load({{"database": sys.argv[1]}}, {{"AGENTLAB_CONFIG": sys.argv[2]}}), actor="test")
assert info.show(ctx, info.Filter(), events=1)["count"] == 0
print(json.dumps(sorted(sys.modules)))
"""
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "agentlab.db"), EMPTY_CONFIG],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = json.loads(done.stdout)
    unwanted = {
        "proxmoxer",
        "requests",
        "urllib3",
        "ssl",
        "yaml",
        "http.client",
        "concurrent.futures",
        "subprocess",
    } & set(loaded)
    assert not unwanted, unwanted
    assert not [
        name
        for name in loaded
        if name.startswith((f"{core}.proxmox", f"{core}.vm.locate", f"{core}.sandboxes.destroy"))
    ]


def test_a_repeated_renewal_is_no_success_while_the_sandbox_is_being_destroyed(lab: Lab) -> None:
    made = lab.create(ttl=7200)
    ctx = lab.context()
    claim = ctx.records.claim(made.uuid, "destroy")
    ctx.records.write_journal(claim, "destroy", "verifying", {})
    with pytest.raises(Kept, match="it is being destroyed"):
        lab.renew(made.vmid, 3600, min_remaining=60)


@pytest.mark.parametrize("limit", [None, 2])
def test_requests_in_flight_to_one_node_are_limited(lab: Lab, limit: int | None) -> None:
    lab.pve.add_node("pve2")
    for number in range(12):
        lab.create(f"a{number}", node=f"pve{number % 2 + 1}")
    under_way: Counter[str] = Counter()
    most: Counter[str] = Counter()
    lock = threading.Lock()

    def before(method: str, path: str) -> None:
        node = path.removeprefix("/api2/json/").split("/")[1]
        with lock:
            under_way[node] += 1
            most[node] = max(most[node], under_way[node])

    def after(method: str, path: str) -> None:
        with lock:
            under_way[path.removeprefix("/api2/json/").split("/")[1]] -= 1

    lab.pve.slow_network(1.0)
    lab.pve.time_scale = 0.05
    lab.pve.before, lab.pve.after = before, after
    ctx = lab.context(connections=12, node_connections=limit)
    assert all(one["identity"] == "MATCH" for one in info.show(ctx, info.Filter(), verify=True)["sandboxes"])
    assert {most[node] > 2 for node in ("pve1", "pve2")} == {limit is None}, most


def test_absences_are_asked_for_side_by_side(lab: Lab) -> None:
    """As many at once as there are connections: a thousand of them are not a thousand round trips one after the
    other.
    """
    lab.create()
    hide_something(lab)
    under_way: list[int] = []
    most = 0
    lock = threading.Lock()

    def before(method: str, path: str) -> None:
        nonlocal most
        if path.endswith("/cluster/nextid"):
            with lock:
                under_way.append(1)
                most = max(most, len(under_way))

    def after(method: str, path: str) -> None:
        if path.endswith("/cluster/nextid"):
            with lock:
                under_way.pop()

    lab.pve.slow_network(1.0)
    lab.pve.time_scale = 0.05
    lab.pve.before, lab.pve.after = before, after
    found = lab.context(connections=4).cluster.prove_absent(range(1500, 1512))
    assert len(found) == 12 and all(one.absent for one in found.values())
    assert most > 1
