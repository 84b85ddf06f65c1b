# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""node: auto on a cluster of three nodes with different templates and storages, over the real API of the double."""

from __future__ import annotations

import platform
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import states
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import AgentlabError, CreationFailed
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.sandboxes import create
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.sandboxes.create import Spec
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store import placements

from support.double import Server
from support.story import task

GIB = 1024**3
SANDBOX = "agentlab_sandbox"


def figures(free: int, total: int = 64, cpus: int = 16) -> dict[str, Any]:
    return {"maxmem": total * GIB, "mem": (total - free) * GIB, "maxcpu": cpus}


@pytest.fixture
def cluster(server: Server) -> Any:
    """Three nodes: a template of one name on pve1 and pve2, on storages of their own; none on pve3."""
    pve = server.pve
    for name in ("pve2", "pve3"):
        pve.nodes[name] = {"online": True}
    pve.strict_targets = True
    pve.storages["fast"] = {"type": "lvmthin", "active": 1, "content": "images", "files": set(), "nodes": "pve2"}
    pve.add_template(9002, "debian-13", "fast", "pve2")
    for name, free in (("pve1", 10), ("pve2", 30), ("pve3", 50)):
        pve.node_figures[name] = figures(free)
    return pve


def spec(**values: Any) -> Spec:
    return Spec(**{"ttl": 3600, "template": "debian-13", **values})


def reasons(outcome: Any) -> dict[str, str]:
    return {row["node"]: row["reason"] for row in outcome.extra["placement"]["nodes"]}


def test_a_playbook_shows_which_node_was_chosen_and_why(story: Callable[..., Any], cluster: Any) -> None:
    run = story(
        [
            task("check", SANDBOX, name="a1", node="auto", check=True),
            task("create", SANDBOX, name="a1", node="auto"),
            task("again", SANDBOX, name="a1", node="auto"),
            task("default", SANDBOX, name="a2"),
            task("named", SANDBOX, name="a3", node="pve1"),
            task("too big", SANDBOX, name="a4", memory=60 * 1024, fails=True),
            task("absent", SANDBOX, vmids=[1000, 1001, 1002], state="absent", force=True),
        ]
    )
    planned = run["check"]["results"][0]["placement"]
    assert planned["node"] == "pve2" and planned == run["create"]["results"][0]["placement"]
    assert {row["node"]: (row["chosen"], row["reason"]) for row in planned["nodes"]} == {
        "pve1": (False, "less_suitable"),
        "pve2": (True, "chosen"),
        "pve3": (False, "template"),
    }
    assert run["create"]["sandbox"]["node"] == run["default"]["sandbox"]["node"] == "pve2"
    assert run["named"]["sandbox"]["node"] == "pve1" and run.status("again") == "ok"
    assert "placement" not in run["named"]["results"][0]
    told = run["too big"]["msg"]
    assert told.startswith("node: no node can take the sandbox, and nothing is left behind. pve1: ")
    assert "and the sandbox needs 60.0 GiB" in told
    assert cluster.vm(1000) is None


def test_the_load_of_the_nodes_in_the_answer_of_info(story: Callable[..., Any], cluster: Any) -> None:
    run = story(
        [
            task("create", SANDBOX, name="a1", node="pve1"),
            task("info", "agentlab_sandbox_info", nodes=True),
            task("without", "agentlab_sandbox_info"),
        ]
    )
    rows = {row["node"]: row for row in run["info"]["nodes"]}
    assert list(rows) == ["pve1", "pve2", "pve3"] and "nodes" not in run["without"]
    assert {name: row["sandboxes"] for name, row in rows.items()} == {"pve1": 1, "pve2": 0, "pve3": 0}
    assert rows["pve2"]["chosen"] and 0 < rows["pve2"]["free_memory"] <= 30 * 1024
    assert rows["pve3"]["reason"] == "template" and rows["pve3"]["message"]


def test_the_template_of_the_chosen_node_is_cloned(context: Callable[..., Any], cluster: Any) -> None:
    outcome = create.run(context(), spec())
    posts = [path for method, path, _body in cluster.requests if method == "POST" and path.endswith("/clone")]
    assert outcome.sandbox.node == "pve2" and [path.split("/")[-4:-1] for path in posts] == [["pve2", "qemu", "9002"]]
    cluster.node_figures["pve1"] = figures(40)
    second = create.run(context(), spec())
    assert second.sandbox.node == "pve1" and cluster.vm(second.vmid).node == "pve1"


def test_placement_costs_at_most_two_requests_more(context: Callable[..., Any], cluster: Any) -> None:
    def cost(**values: Any) -> int:
        cluster.counted.clear()
        create.run(context(), spec(**values))
        return cluster.count()

    cost(node="pve2")
    # pve3 has no template of its own, so one is read to see whether it lies on shared storage.
    assert cost() <= cost(node="pve2") + 1
    assert cost(bridge="vmbr0", memory=2048) <= cost(node="pve2", bridge="vmbr0", memory=2048) + 2


@pytest.mark.parametrize("kind", ["offline", "maintenance", "nodes", "bridge", "cores", "storage", "inactive"])
def test_a_node_is_passed_over(context: Callable[..., Any], cluster: Any, env: Any, kind: str) -> None:
    options: dict[str, Any] = {}
    if kind == "offline":
        cluster.set_node_offline("pve2")
    elif kind == "maintenance":
        cluster.maintenance.add("pve2")
    elif kind == "nodes":
        with open(env["AGENTLAB_CONFIG"], "a", encoding="utf-8") as file:
            file.write("placement: {nodes: [pve1, pve3]}\n")
    elif kind == "bridge":
        cluster.bridges["pve2"] = ["vmbr7"]
        options["bridge"] = "vmbr0"
    elif kind == "cores":
        cluster.node_figures["pve2"] = figures(30, cpus=4)
        options["cores"] = 8
    elif kind == "storage":
        options.update(storage="local-lvm", full_clone=True)
        cluster.storages["local-lvm"]["nodes"] = "pve1"
    else:
        cluster.storages["fast"]["active"] = 0
    outcome = create.run(context(), spec(**options))
    word = {"nodes": "not_allowed", "cores": "cpus", "inactive": "storage"}.get(kind, kind)
    assert outcome.sandbox.node == "pve1" and reasons(outcome)["pve2"] == word


RULES = {
    "prefer": "placement: {prefer: [{tag: gpu, nodes: [pve1]}]}",
    "avoid": "placement: {avoid: [{tag: gpu, nodes: [pve2]}]}",
    "max_per_node": "placement: {max_per_node: 1}",
    "anti_affinity": "placement: {anti_affinity: tag}",
    "pack": "placement: {strategy: pack}",
}


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_of_the_configuration_decides_the_node(
    context: Callable[..., Any], cluster: Any, env: Any, rule: str
) -> None:
    """Without the rule pve2 is chosen, which has the most free memory of those with the template."""
    if rule in ("max_per_node", "anti_affinity"):
        assert create.run(context(), spec(tags=["gpu"])).sandbox.node == "pve2"
    with open(env["AGENTLAB_CONFIG"], "a", encoding="utf-8") as file:
        file.write(RULES[rule] + "\n")
    assert create.run(context(), spec(tags=["gpu"])).sandbox.node == "pve1"


def test_a_workspace_on_local_storage_decides_the_node(story: Callable[..., Any], cluster: Any) -> None:
    run = story(
        [
            task("workspace", "agentlab_workspace", name="w1", size="1G", storage="local-lvm"),
            task("create", SANDBOX, name="a1", workspace="w1", node="auto"),
            task("elsewhere", SANDBOX, name="a2"),
        ]
    )
    assert run["workspace"]["workspace"]["node"] == "pve1" == run["create"]["sandbox"]["node"]
    rows = {row["node"]: row for row in run["create"]["results"][0]["placement"]["nodes"]}
    assert rows["pve2"]["reason"] == "workspace" and "lies on local storage of node pve1" in rows["pve2"]["message"]
    assert run["elsewhere"]["sandbox"]["node"] == "pve2"


def test_user_data_written_on_a_node_keeps_the_sandbox_on_that_node(
    context: Callable[..., Any], cluster: Any, tmp_path: Path
) -> None:
    """This host is a node, and its snippets storage is its own: another node would not see the file."""
    here = platform.node().partition(".")[0]
    cluster.nodes[here] = {"online": True}
    cluster.storages["mine"] = {"type": "lvmthin", "active": 1, "content": "images", "files": set(), "nodes": here}
    cluster.add_template(9003, "debian-13", "mine", here)
    cluster.node_figures[here] = figures(20)
    (tmp_path / "snippets").mkdir()
    cluster.hold_snippets(str(tmp_path / "snippets"), "local", here)
    ctx = context(snippets_dir=str(tmp_path / "snippets"), snippets_storage="local")
    outcome = create.run(ctx, spec(cloud_init_user_data="#cloud-config\n"))
    assert outcome.sandbox.node == here and reasons(outcome)["pve2"] == "snippets"
    assert create.run(context(), spec()).sandbox.node == "pve2"


def test_a_profile_may_say_auto(story: Callable[..., Any], cluster: Any, env: Any, tmp_path: Path) -> None:
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "ci.yaml").write_text("name: ci\ntemplate: debian-13\nnode: auto\n", encoding="utf-8")
    with open(env["AGENTLAB_CONFIG"], "a", encoding="utf-8") as file:
        file.write(f"profiles_dir: {tmp_path}/profiles\nnode: pve1\n")
    run = story([task("by profile", SANDBOX, name="a1", profile="ci"), task("without", SANDBOX, name="a2")])
    assert run["by profile"]["sandbox"]["node"] == "pve2" and run["without"]["sandbox"]["node"] == "pve1"


def test_allowed_nodes_that_do_not_exist_are_told(context: Callable[..., Any], cluster: Any, env: Any) -> None:
    with open(env["AGENTLAB_CONFIG"], "a", encoding="utf-8") as file:
        file.write("placement: {nodes: [pve8, pve9]}\n")
    message = (
        r"^placement.nodes: pve8, pve9: no node of this cluster has such a name. Nodes: pve1, pve2, pve3\. Correct"
    )
    with pytest.raises(CreationFailed, match=message) as caught:
        create.run(context(), spec())
    assert caught.value.detail["option"] == "placement.nodes"
    assert not any("/clone" in path for _method, path, *_rest in cluster.requests)


def test_a_template_on_shared_storage_reaches_every_node(context: Callable[..., Any], cluster: Any) -> None:
    cluster.storages["nfs"] = {"type": "nfs", "active": 1, "content": "images", "files": set(), "shared": 1}
    cluster.add_template(9100, "shared", "nfs", "pve1")
    outcome = create.run(context(), spec(template="shared"))
    assert outcome.sandbox.node == "pve3" and cluster.vm(outcome.vmid).node == "pve3"


@pytest.mark.parametrize("node", [None, "auto", "pve1"])
@pytest.mark.parametrize("template", ["9002", "9100"])
def test_a_template_on_an_offline_node_is_told_with_what_to_do(
    context: Callable[..., Any], cluster: Any, template: str, node: str | None
) -> None:
    cluster.storages["nfs"] = {"type": "nfs", "active": 1, "content": "images", "files": set(), "shared": 1}
    cluster.add_template(9100, "shared", "nfs", "pve2")
    cluster.set_node_offline("pve2")
    with pytest.raises(AgentlabError) as caught:
        create.run(context(wait_timeout=5), spec(template=template, node=node))
    assert caught.value.message == (
        f"template: {template} is on node pve2, which is offline, so it cannot be cloned. Wait until the node is back, "
        "or give a template of another node. Templates on the other nodes: 9000 (debian-13)"
    )


def test_a_burst_of_several_controllers_spreads_over_the_nodes(context: Callable[..., Any], cluster: Any) -> None:
    """All read the same figures, in which nothing of the others shows: the reservations count."""
    cluster.add_template(9003, "debian-13", "local-lvm", "pve3")
    for name in ("pve1", "pve2", "pve3"):
        cluster.node_figures[name] = figures(32)
    ready = threading.Barrier(3)
    failures: list[BaseException] = []

    def controller(number: int) -> None:
        ctx = context(actor=f"controller {number}")
        ctx.cluster.read_capacity()
        ready.wait(60)
        try:
            for _count in range(4):
                create.run(ctx, spec())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=controller, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert Counter(vm.node for vm in cluster.vms if not vm.template) == {"pve1": 4, "pve2": 4, "pve3": 4}


def test_reservations_end_with_failure_age_and_death(context: Callable[..., Any], cluster: Any) -> None:
    ctx = context()

    def counted() -> int:
        return len(placements.read_load(ctx.records, 600).reservations)

    outcome = create.run(ctx, spec())
    # A young sandbox counts until it has settled.
    assert counted() == 1
    ctx.database.write(lambda conn: conn.execute("UPDATE placements SET at = at - 601"))
    assert counted() == 0
    ctx.database.write(lambda conn: conn.execute("UPDATE placements SET at = at + 601"))
    uuid, states_of = outcome.sandbox.uuid, ctx.records
    ctx.database.write(lambda conn: conn.execute("UPDATE sandboxes SET state = 'PROVISIONING' WHERE uuid = ?", (uuid,)))
    claim = states_of.claim(uuid, "create")
    ctx.database.write(lambda conn: conn.execute("UPDATE placements SET at = at - 601"))
    # However long a creation takes, it counts while its run lives.
    assert counted() == 1
    ctx.database.write(
        lambda conn: conn.execute("UPDATE claims SET process = replace(process, '\"pid\": ', '\"pid\": 99')")
    )
    assert counted() == 0
    states_of.release(claim)
    ctx.database.write(lambda conn: conn.execute("UPDATE placements SET at = at + 601"))
    ctx.database.write(lambda conn: conn.execute("UPDATE sandboxes SET state = 'DESTROYED'"))
    assert counted() == 0


FAILURES = {
    "clone refused": ("POST", r"/qemu/9002/clone", 500, "can't lock file '/var/lock/x' - got timeout"),
    "clone not delivered": ("POST", r"/qemu/9002/clone", 595, ""),
    "configuration refused": ("PUT", r"/nodes/pve2/qemu/\d+/config", 500, "unable to open file - Permission denied"),
    "start refused": ("POST", r"/nodes/pve2/qemu/\d+/status/start", 500, "got no worker upid - start worker failed"),
}


@pytest.mark.parametrize("kind", [*FAILURES, "qmclone", "qmstart"])
def test_a_node_that_fails_is_left_for_the_next(context: Callable[..., Any], cluster: Any, kind: str) -> None:
    if kind in FAILURES:
        method, suffix, status, text = FAILURES[kind]
        cluster.fault(
            method,
            suffix,
            "answer",
            times=1 if method == "PUT" else 20,
            status=status,
            body=f'{{"data": null, "message": "{text}"}}',
        )
    else:
        cluster.next_task(kind, "fail", text="No space left on device")
    outcome = create.run(context(wait_timeout=5), spec(name="a1", tags=["ci"]))
    assert outcome.sandbox.node == "pve1" and outcome.sandbox.state == states.RUNNING
    assert reasons(outcome)["pve2"] == "failed"
    assert [text.startswith("node pve2 failed the creation and was left for pve1: ") for text in outcome.warnings] == [
        True
    ]
    assert [vm.node for vm in cluster.vms if not vm.template] == ["pve1"]


def test_when_every_node_fails_all_reasons_are_told(context: Callable[..., Any], cluster: Any) -> None:
    cluster.task_endings["qmstart"] = "start failed: QEMU exited with code 1"
    ctx = context(wait_timeout=5)
    with pytest.raises(CreationFailed) as caught:
        create.run(ctx, spec(name="a1"))
    told = caught.value.message
    assert "pve1: sandbox" in told and "pve2: sandbox" in told and "pve3: template debian-13" in told
    assert told.count("QEMU exited with code 1") == 2
    assert [vm.vmid for vm in cluster.vms if not vm.template] == []
    assert ctx.records.find_live_by_name("a1") is None


def test_what_every_node_would_refuse_is_tried_once(context: Callable[..., Any], cluster: Any) -> None:
    body = '{"data": null, "message": "cluster not ready - no quorum?"}'
    cluster.fault("POST", r"/clone", "answer", times=20, status=500, body=body)
    with pytest.raises(AgentlabError) as caught:
        create.run(context(wait_timeout=5), spec())
    assert "no quorum" in caught.value.message and len(cluster.faults) == 1 and cluster.faults[0]["times"] >= 17


STEPS = ("POST clone", "GET config", "PUT config", "POST start")


@pytest.mark.parametrize("step", STEPS)
def test_a_node_that_dies_at_any_step_loses_no_sandbox(context: Callable[..., Any], cluster: Any, step: str) -> None:
    """Either the next node takes the sandbox, and nothing is left; or what is on the dead node stays in the records."""
    method, word = step.split()
    step_path = "/nodes/pve2/qemu/9002" if word == "clone" else "/nodes/pve2/qemu/1"
    died = threading.Event()

    def before(asked: str, path: str) -> None:
        if not died.is_set() and asked == method and step_path in path and path.endswith(word):
            died.set()
            cluster.set_node_offline("pve2")

    cluster.before = before
    ctx = context(wait_timeout=3)
    told = ""
    try:
        outcome = create.run(ctx, spec(name="a1"))
    except AgentlabError as error:
        outcome = None
        told = error.message
    assert died.is_set()
    on_dead = [vm.vmid for vm in cluster.vms if not vm.template and vm.node == "pve2"]
    if outcome is not None:
        assert outcome.sandbox.node == "pve1" and on_dead == []
    else:
        record = ctx.records.find_live_by_name("a1")
        assert record is not None and record.node == "pve2" and str(record.vmid) in told


def test_without_figures_the_number_of_sandboxes_decides_the_node(context: Callable[..., Any], cluster: Any) -> None:
    figures_of = ("maxmem", "mem", "maxcpu", "cpu", "maxdisk", "disk", "uptime")
    cluster._node_row = lambda row, _user: {key: value for key, value in row.items() if key not in figures_of}
    placed = [create.run(context(), spec()) for _number in range(3)]
    assert [outcome.sandbox.node for outcome in placed] == ["pve1", "pve2", "pve1"]
    assert placed[0].extra["placement"]["by"] == "sandboxes"
    assert "Sys.Audit" in placed[0].extra["placement"]["nodes"][0]["message"]


def test_auto_can_stand_in_the_configuration(story: Callable[..., Any], cluster: Any, env: Any) -> None:
    with open(env["AGENTLAB_CONFIG"], "a", encoding="utf-8") as file:
        file.write("node: auto\n")
    run = story(
        [
            task("workspace", "agentlab_workspace", name="w1", size="1G", storage="local-lvm"),
            task("create", SANDBOX, name="a1"),
            # Whatever node it is on, that is a node that auto may choose.
            task("again", SANDBOX, name="a1", node="auto"),
        ]
    )
    assert run["workspace"]["workspace"]["node"] == "pve1" and run["create"]["sandbox"]["node"] == "pve2"
    assert "warnings" not in run["again"] and run.status("again") == "ok"
