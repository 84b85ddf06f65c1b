# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The stage of the recording: the double as the real cluster was, and what a person did before some requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from support.proxmox_double import ProxmoxDouble

MIB = 1024**2
SECRET = "0d9f3b52-made-up-for-tests"


def user_of(who: str | None) -> str:
    """Return the token with which a recorded request was made."""
    return "root@pam!lab" if who is None else f"{who}@pve!rec"


def set_up(pve: ProxmoxDouble) -> None:
    """Build the cluster as it stood before the first request."""
    pve.add_node("pve2")
    pve.strict_targets = True
    del pve.storages["local-lvm"]
    local = pve.storages["local"]
    local.update({"content": "rootdir,images,iso,backup,snippets,vztmpl,import", "avail": 10**12, "total": 10**13})
    pve.storages["tiny"] = {
        "type": "dir",
        "active": 1,
        "content": "images",
        "path": "/srv/tiny",
        "avail": 40 * MIB,
        "files": set(),
    }
    pve.storages["fast"] = {
        "type": "dir",
        "active": 1,
        "content": "images",
        "path": "/srv/fast",
        "avail": 10**12,
        "files": set(),
    }
    pve.add_template(9050, "tpl-agent", storage="local")
    pve.add_template(9002, "tpl-raw", storage="local")
    pve.add_template(9003, "tpl-2", storage="local", node="pve2")
    pve.add_guest(9051, "no-template", storage="local")
    pve.add_guest(
        1153, "h1", node="pve2", storage="local", status="running", pool="agentlab", config={"tags": "agentlab"}
    )
    pve.pools["rec"] = set()
    pve.pool_info["rec"] = {"comment": None, "storage": set()}
    for who in ("none", "run", "ga1", "ga2", "ga3", "ga4", "disk", "tag"):
        pve.add_token(user_of(f"rec-{who}"), SECRET)
    pve.add_token("root@pam!lab", SECRET)
    run = user_of("rec-run")
    pve.grant(run, "/", "Sys.Audit", "VM.Audit")
    pve.grant(run, "/vms/9050", "VM.Audit", "VM.Clone")
    privs = (
        "VM.Audit",
        "VM.Allocate",
        "VM.PowerMgmt",
        "VM.Config.Options",
        "VM.Config.CPU",
        "VM.Config.Memory",
        "VM.Config.Disk",
    )
    pve.grant(
        run, "/pool/rec", *privs, "VM.Config.Network", "VM.Config.Cloudinit", "VM.Snapshot", "VM.GuestAgent.Audit"
    )
    pve.grant(run, "/storage/local", "Datastore.AllocateSpace")
    pve.grant(run, "/sdn/zones/localnetwork/vmbr0", "SDN.Use")
    for number, priv in enumerate(("Audit", "FileRead", "FileWrite", "Unrestricted"), 1):
        pve.grant(user_of(f"rec-ga{number}"), "/vms/5000", f"VM.GuestAgent.{priv}")
    pve.grant(user_of("rec-disk"), "/", "VM.PowerMgmt", "VM.Config.Disk", "VM.Audit")
    pve.grant(user_of("rec-tag"), "/", "Sys.Audit", "VM.Audit", "VM.Config.Options")


def put_guest(vmid: int, **values: Any) -> Callable[[ProxmoxDouble], None]:
    """Return a stage direction: this VM is there, as said, in place of whatever had its VMID."""

    def act(pve: ProxmoxDouble) -> None:
        pve.remove_vm(vmid)
        config = {
            "agent": "1",
            "serial0": "socket",
            "memory": "192",
            "meta": "creation-qemu=10.0.13,ctime=1",
            "net0": "virtio=BC:24:11:00:00:01,bridge=vmbr0",
        }
        # A copy: the recording may be played more than once in a process.
        more = {"name": f"rec-{vmid}", **values}
        pool = more.pop("pool", None)
        volume = pve.add_cloudinit_volume("local", vmid)
        config.update({"ide2": f"{volume},media=cdrom", **more.pop("config", {})})
        pve.add_guest(vmid, storage="local", config=config, **more)
        if pool:
            pve.pools[pool].add(vmid)
            pve.vm(vmid).pool = pool

    return act


def change_vm(vmid: int, **values: Any) -> Callable[[ProxmoxDouble], None]:
    """Return a stage direction: attributes of a VM (config is merged)."""

    def act(pve: ProxmoxDouble) -> None:
        vm = pve.vm(vmid)
        vm.config.update(values.get("config", {}))
        for key, value in values.items():
            if key != "config":
                setattr(vm, key, value)

    return act


def take_steps(*acts: Callable[[ProxmoxDouble], None]) -> Callable[[ProxmoxDouble], None]:
    """Return a step that takes all of these steps."""

    def act(pve: ProxmoxDouble) -> None:
        for step in acts:
            step(pve)

    return act


def put_agent(vmid: int, **values: Any) -> Callable[[ProxmoxDouble], None]:
    """Return a stage direction: the VM runs and its agent answers."""

    def act(pve: ProxmoxDouble) -> None:
        vm = pve.vm(vmid)
        pve.power(vmid, "running")
        vm.lock = None
        vm.config.pop("lock", None)
        vm.agent = {
            "interfaces": [
                {"name": "lo", "hardware-address": "00:00:00:00:00:00", "ip-addresses": [], "statistics": {}}
            ],
            "os": {"machine": "x86_64", "kernel-version": "#1", "kernel-release": "6.1", "id": "debian"},
            "get-host-name": {"host-name": "(none)"},
            "files": {"/tmp/a": "hello\n", "/tmp/b": "\x00\xff\xc3\xa4", "/dev/null": ""},
            **values,
        }

    return act


def lose_quorum_and_node(pve: ProxmoxDouble) -> None:
    """Add three VMs, start one of them, and take node pve2 and the quorum away."""
    for vmid in (5000, 5004, 5005):
        put_guest(vmid)(pve)
    pve.power(5000, "running")
    pve.nodes["pve2"]["online"] = False
    pve.lose_quorum()


def regain_quorum_late(pve: ProxmoxDouble) -> None:
    """Give the quorum back, while the cache of the cluster's status lags."""
    pve.regain_quorum()
    pve.cached_quorate = 0


def bring_all_back(pve: ProxmoxDouble) -> None:
    """Let the cluster's status tell the quorum as it is, bring pve2 back, and add VM 5050."""
    pve.cached_quorate = None
    pve.nodes["pve2"]["online"] = True
    put_guest(5050, status="running", config={"agent": "0"})(pve)


def name_missing_snippet(pve: ProxmoxDouble) -> None:
    """Let VM 5004 name a snippet that does not exist."""
    change_vm(5004, config={"cores": 1, "cicustom": "user=local:snippets/nope.yaml"}, start_error=None)(pve)


def abort_clone(pve: ProxmoxDouble) -> None:
    """Abort the clone as `DELETE` of its task does."""
    upid = pve.running_tasks("qmclone")[0]
    pve.kill_task(upid, "clone failed: copy failed: command '/usr/bin/qemu-img convert' failed: interrupted by signal")


def hang_next_clone(pve: ProxmoxDouble) -> None:
    """Let the next clone go on until it is released."""
    pve.next_task("qmclone", "hang")


def join_pool(vmid: int) -> Callable[[ProxmoxDouble], None]:
    """Return a step that adds a VM to the pool rec."""

    def act(pve: ProxmoxDouble) -> None:
        pve.pools["rec"].add(vmid)
        pve.vm(vmid).pool = "rec"

    return act


def add_raw_disk(pve: ProxmoxDouble) -> None:
    """Give VM 5060 a second disk in the format raw."""
    pve.vm(5060).config["scsi1"] = pve.add_disk("local", "5060/vm-5060-disk-1.raw", 5060, MIB) + ",size=1M"


# What a person did before a request, by the request's case.
STAGE: dict[str, Callable[[ProxmoxDouble], None]] = {
    "pools, one": lambda pve: None,
    "clone without any right": lambda pve: pve.remove_vm(5090) and None,
    "config": change_vm(5000, config={"agent": "1", "serial0": "socket", "memory": "192"}),
    "config of a VM on a node whose proxy does not answer": lambda pve: (
        pve.fault("GET", "/qemu/5010/config", "hang", seconds=0.05) and None
    ),
    "config of a locked VM": put_guest(5003, lock="backup"),
    "start": change_vm(5001, config={"cores": 1}),
    "config of a VM on the other node": put_guest(5010, name="rec-2", node="pve2"),
    "start of a VM on the other node": lambda pve: None,
    "start with more cores than the node has": take_steps(
        put_guest(5004, config={"cores": 3}), lambda pve: pve.node_figures.update(pve1={"maxcpu": 2})
    ),
    "start, QEMU refuses its command line": change_vm(
        5004, config={"cores": 1}, start_error="start failed: QEMU exited with code 1"
    ),
    "start, cicustom with a missing file": name_missing_snippet,
    "shutdown, guest answers": take_steps(
        lambda pve: pve.power(5001, "running"), put_guest(5007, status="running"), change_vm(5007, acpi=False)
    ),
    "shutdown, guest does not answer, forceStop": lambda pve: pve.power(5007, "running"),
    "suspend todisk": take_steps(
        lambda pve: pve.power(5001, "running"),
        lambda pve: setattr(
            pve,
            "hibernation_error",
            "VM 5001 qmp command 'savevm-start' failed - The command savevm-start has not been found",
        ),
    ),
    "resize": put_guest(5002, size=64 * MIB),
    "DELETE, protected": change_vm(5002, config={"protection": 1}),
    "DELETE, running": take_steps(change_vm(5002, config={"protection": 0}), lambda pve: pve.power(5002, "running")),
    "storage list of a node": take_steps(put_guest(5005), put_guest(5006)),
    "config PUT, attach a foreign volume, VM.Config.Disk on the owner missing": join_pool(5006),
    "DELETE, a disk cannot be freed": lambda pve: pve.task_warnings.update(qmdestroy=1),
    "firewall options": lambda pve: pve.task_warnings.clear(),
    "no quorum: agent exec": put_guest(5051),
    "stop of a locked, running VM": lambda pve: pve.power(5003, "running"),
    "agent ping, VM stopped": lambda pve: pve.power(5000, "stopped"),
    "agent ping": put_agent(5000),
    "agent exec, VM paused": lambda pve: pve.power(5000, "paused"),
    "agent exec, VM with lock backup": take_steps(
        lambda pve: pve.power(5000, "running"), change_vm(5000, lock="backup")
    ),
    "agent ping, agent: 0 written while the VM runs": take_steps(
        change_vm(5000, lock=None), lambda pve: pve.vm(5000).pending.update(agent="0")
    ),
    "agent ping, switched on again": lambda pve: pve.vm(5000).pending.clear(),
    "agent ping, not answering": lambda pve: pve.power(5007, "running"),
    "agent exec, blocked by the guest": change_vm(
        5000, agent_blocks=("exec", "exec-status", "file-read", "file-write")
    ),
    "snapshot create": put_guest(5060, config={"description": "before", "tags": "a"}),
    "snapshot create, a disk without the feature": add_raw_disk,
    "feature snapshot, yes": lambda pve: pve.vm(5060).config.pop("scsi1"),
    "config, hibernated": take_steps(
        put_guest(5080, name="rec-hib", pool="rec"),
        lambda pve: pve.hibernate(5080),
        change_vm(5080, start_error="start failed: QEMU exited with code 1"),
    ),
    "suspend todisk, no rights": take_steps(put_agent(5000), change_vm(5000, agent_blocks=())),
    "config PUT, tags not allowed (user-tag-access none)": take_steps(
        put_guest(5082, config={"tags": "old"}), lambda pve: setattr(pve, "tag_access", "none")
    ),
    "cluster/options, user-tag-access: list": lambda pve: (
        setattr(pve, "tag_access", "list"),
        setattr(pve, "tag_allow_list", {"agentlab", "free1"}),
    )[0],
    "node status": lambda pve: setattr(pve, "tag_access", "free"),
    "cluster/resources type=node, a node in HA maintenance": lambda pve: pve.maintenance.add("pve2"),
    "cluster/ha/status/current, no rights": lambda pve: pve.maintenance.clear(),
    "no quorum: cluster/status": lose_quorum_and_node,
    "quorum regained by pvecm expected 1: cluster/status": regain_quorum_late,
    "agent ping, started with agent: 0": bring_all_back,
    "agent ping, started without agent": lambda pve: pve.vm(5050).config.pop("agent"),
    "clone full, aborted afterwards": hang_next_clone,
    "status/current of a VM on the other node": lambda pve: (
        [pve.vm(5010).config.pop(key) for key in ("agent", "serial0")] and None
    ),
    "suspend todisk, unknown statestorage": take_steps(lambda pve: pve.power(5000, "running"), abort_clone),
}
