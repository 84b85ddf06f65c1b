# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The double of Proxmox VE: nodes, quorum, lists that lag, the certificate."""

from __future__ import annotations

import re
from typing import Any

import requests

from support.double_api import TOKEN, clone_template, refusal_of
from support.proxmox_double import ProxmoxDouble


def test_an_unknown_node_fails_by_its_host_name(api: Any) -> None:
    status, text = refusal_of(api.nodes("PVE1").qemu(9000).config.get)
    assert status == 500 and "hostname lookup 'PVE1' failed" in text


def test_nextid_tells_free_from_taken_on_offline_nodes_too(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_guest(101, node="pve2")
    pve.set_node_offline("pve2")
    assert api.cluster.nextid.get(vmid=102) == "102"
    status, text = refusal_of(lambda: api.cluster.nextid.get(vmid=101))
    assert status == 400 and "VM 101 already exists" in text


def test_offline_node_lists_its_vms_as_unknown_and_answers_595_without_body(
    api: Any, pve: ProxmoxDouble, agentlab_env: dict[str, str]
) -> None:
    pve.add_guest(101, node="pve2", status="running")
    pve.set_node_offline("pve2")
    listed = {vm["vmid"]: vm for vm in api.cluster.resources.get(type="vm")}
    assert listed[101]["status"] == "unknown" and "name" not in listed[101] and listed[9000]["name"] == "debian-13"
    assert refusal_of(api.nodes("pve2").qemu(101).config.get)[0] == 595
    found = requests.get(
        f"{pve.url}/api2/json/nodes/pve2/qemu/101/config",
        verify=agentlab_env["PROXMOX_CA_PATH"],
        timeout=5,
        headers={"Authorization": f"PVEAPIToken={TOKEN}={agentlab_env['PROXMOX_TOKEN_SECRET']}"},
    )
    assert (found.status_code, found.content) == (595, b"")
    pve.grant(TOKEN, "/vms/500", "VM.Audit")
    assert refusal_of(api.nodes("pve2").qemu(101).config.get)[0] == 403


# ---- configuration


def test_writes_without_quorum_are_refused(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_guest(101)
    pve.lose_quorum()
    status, text = refusal_of(lambda: api.nodes("pve1").qemu(101).config.put(description="x"))
    assert status == 500 and "Permission denied" in text
    for call in (api.nodes("pve1").qemu(101).status.start.post, lambda: clone_template(api, 102)):
        assert "no quorum" in refusal_of(call)[1]
    assert api.nodes("pve1").qemu(101).config.get()["name"] == "somebody-elses"


def test_the_told_quorum_can_differ_from_the_real_one(api: Any, pve: ProxmoxDouble) -> None:
    pve.lose_quorum()
    assert api.cluster.status.get()[0]["quorate"] == 0
    pve.stale_quorum = True
    assert api.cluster.status.get()[0]["quorate"] == 1
    pve.standalone = True
    assert [item["type"] for item in api.cluster.status.get()] == ["node"]


# ---- certificates, permissions, listing


def test_root_certificate_tells_clusters_apart(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_node("pve2")
    pve.grant(TOKEN, "/vms/500", "VM.Audit")
    roots = {
        cert["fingerprint"]
        for node in ("pve1", "pve2")
        for cert in api.nodes(node).certificates.info.get()
        if cert["filename"] == "pve-root-ca.pem"
    }
    assert roots == {pve.ca_fingerprint} and re.fullmatch(r"([0-9A-F]{2}:){31}[0-9A-F]{2}", pve.ca_fingerprint)
    assert ProxmoxDouble().ca_fingerprint != pve.ca_fingerprint


def test_new_vms_are_listed_late(api: Any, pve: ProxmoxDouble) -> None:
    pve.listing_lag = 60
    clone_template(api)
    found = next(vm for vm in api.cluster.resources.get(type="vm") if vm["vmid"] == 101)
    assert found["status"] == "unknown" and "name" not in found


# ---- quorum, nodes, lists


def test_the_quorum_row_is_live_and_cluster_status_a_cache(api: Any, pve: ProxmoxDouble) -> None:
    def quorate() -> tuple[int, int]:
        rows = {row["type"]: row for row in api.cluster.ha.status.current.get()}
        return rows["quorum"]["quorate"], next(
            row["quorate"] for row in api.cluster.status.get() if row["type"] == "cluster"
        )

    assert quorate() == (1, 1)
    pve.cached_quorate = 0
    assert quorate() == (1, 0)
    pve.lose_quorum()
    pve.cached_quorate = 1
    assert quorate() == (0, 1)
    assert api.cluster.ha.status.current.get()[0]["status"] == "No quorum on node 'pve1'!"
    pve.cached_quorate, pve.stale_quorum = None, True
    assert quorate() == (1, 1)
    pve.grant(TOKEN, "/vms", "VM.Audit")
    assert refusal_of(api.cluster.ha.status.current.get) == (403, "Permission check failed (/, Sys.Audit) ")


def test_the_list_lags_behind_the_power_state(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_guest(101)
    pve.status_lag = 60
    assert [row["status"] for row in api.cluster.resources.get(type="vm") if row["vmid"] == 101] == ["stopped"]
    api.nodes("pve1").qemu(101).status.start.post()
    pve.add_guest(102)
    listed = {row["vmid"]: row for row in api.cluster.resources.get(type="vm")}
    assert (
        listed[101]["status"] == "stopped"
        and listed[102]["status"] == "unknown"
        and not {"name", "template"} & set(listed[102])
    )
    assert api.nodes("pve1").qemu(101).status.current.get()["status"] == "running"
    pve.status_lag = 0
    assert [row["status"] for row in api.cluster.resources.get(type="vm") if row["vmid"] == 101] == ["running"]


def test_nodes_without_rights_have_no_figures(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_node("pve2")
    pve.maintenance.add("pve2")
    pve.grant(TOKEN, "/nodes/pve1", "Sys.Audit")
    for rows in (api.nodes.get(), api.cluster.resources.get(type="node")):
        with_figures = {row["node"]: "maxmem" in row for row in rows}
        assert with_figures == {"pve1": True, "pve2": False} and {row["status"] for row in rows} == {"online"}
    assert [row["hastate"] for row in api.cluster.resources.get(type="node")] == ["online", "maintenance"]
