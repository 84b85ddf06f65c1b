# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The double of Proxmox VE: what a test tells it to do wrong, and what it counts."""

from __future__ import annotations

import time
from typing import Any

import pytest
import requests

from support.double_api import clone_template, exit_status, login, refusal_of
from support.proxmox_double import DoubleServer, ProxmoxDouble


def test_requests_are_counted_by_method_and_path(api: Any, pve: ProxmoxDouble) -> None:
    clone_template(api)
    pve.reset_count()
    vm = api.nodes("pve1").qemu(101)
    vm.config.get()
    vm.config.get()
    vm.config.put(description="x")
    vm.status.start.post()
    assert pve.count() == 4 and pve.counted == {
        "GET /nodes/{node}/qemu/{vmid}/config": 2,
        "PUT /nodes/{node}/qemu/{vmid}/config": 1,
        "POST /nodes/{node}/qemu/{vmid}/status/start": 1,
    }
    assert pve.touched(101) == [
        "PUT /api2/json/nodes/pve1/qemu/101/config",
        "POST /api2/json/nodes/pve1/qemu/101/status/start",
    ]
    assert pve.touched(9000) == [] and [entry["status"] for entry in pve.history] == [200] * 4


@pytest.mark.parametrize(("kind", "done"), [("cut-before", False), ("cut-after", True), ("truncate", True)])
def test_a_connection_is_cut_before_or_after_the_request_is_done(
    api: Any, pve: ProxmoxDouble, kind: str, done: bool
) -> None:
    pve.add_guest(101)
    pve.fault("POST", "/qemu/101/status/start", kind)
    with pytest.raises(requests.exceptions.RequestException):
        api.nodes("pve1").qemu(101).status.start.post()
    assert (pve.vm(101).status == "running") is done
    assert api.nodes("pve1").qemu(101).config.get()["name"] == "somebody-elses"


def test_a_fault_that_does_not_exist_is_refused(pve: ProxmoxDouble) -> None:
    with pytest.raises(ValueError, match="cut-off"):
        pve.fault("GET", "/version", "cut-off")
    with pytest.raises(ValueError, match="state"):
        pve.fault("GET", "/version", "answer", state=502)
    assert pve.faults == []


def test_an_answer_can_be_any_bytes(api: Any, pve: ProxmoxDouble) -> None:
    pve.fault("GET", "/version", "answer", status=200, body='{"data": {"vers')
    assert set(api.version.get()) == {"errors"}
    pve.fault("GET", "/version", "answer", status=502, body="<html>bad gateway</html>", type="text/html")
    assert refusal_of(api.version.get)[0] == 502
    assert "version" in api.version.get()


@pytest.mark.parametrize(
    ("carry_out", "at_once", "later"), [(False, False, False), (True, True, True), ("late", False, True)]
)
def test_a_hanging_request_is_carried_out_as_the_test_says(
    api: Any, pve: ProxmoxDouble, agentlab_env: dict[str, str], carry_out: bool | str, at_once: bool, later: bool
) -> None:
    pve.add_guest(101)
    pve.fault("POST", "/nodes/{node}/qemu/{vmid}/status/start", "hang", seconds=0.5, carry_out=carry_out)
    with pytest.raises(requests.exceptions.ReadTimeout):
        login(agentlab_env, timeout=0.2).nodes("pve1").qemu(101).status.start.post()
    assert (pve.vm(101).status == "running") is at_once
    time.sleep(0.5)
    assert (pve.vm(101).status == "running") is later


def test_a_vm_can_be_swapped_just_before_its_deletion(api: Any, pve: ProxmoxDouble) -> None:
    clone_template(api)
    seen = []

    def swap(method: str, path: str) -> None:
        if method == "DELETE":
            pve.make_foreign(101, same_name=True, copy_description=True, running=True)

    pve.before = swap
    pve.after = lambda method, path: seen.append((method, path, pve.history[-1]["params"]))
    assert "is running" in refusal_of(lambda: api.nodes("pve1").qemu(101).delete(purge=1))[1]
    assert seen == [("DELETE", "/api2/json/nodes/pve1/qemu/101", {"purge": "1"})]


def test_a_foreign_vm_resembles_ours_as_far_as_told(api: Any, pve: ProxmoxDouble) -> None:
    clone_template(api)
    old = dict(pve.vm(101).config, tags="mine")
    pve.vm(101).config = dict(old)
    new = pve.make_foreign(101, same_name=True, same_tags=True, copy_description=True)
    assert (
        all(new.config[key] == old[key] for key in ("name", "tags", "description"))
        and new.config["smbios1"] != old["smbios1"]
    )
    new = pve.make_foreign(101, smbios=False, template=True)
    assert not {"smbios1", "tags", "description"} & set(new.config) and new.template and new.name == "somebody-elses"
    assert pve.volumes_of(101) == ["local-lvm:base-101-disk-0"]
    assert pve.make_foreign(700, lock="backup", protection=True).config["lock"] == "backup"


def test_call_runs_between_requests(pve_server: DoubleServer, pve: ProxmoxDouble) -> None:
    pve.add_guest(101, status="running")

    async def migrate() -> str:
        return str(await pve.migrate(101, "pve2"))

    assert pve_server.call(migrate).startswith("UPID:pve1:") and pve.vm(101).node == "pve2"
    assert pve_server.call(lambda: 7) == 7


def test_many_clones_at_once_all_succeed(api: Any, pve: ProxmoxDouble, agentlab_env: dict[str, str]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    pve.time_scale = 0.01
    with ThreadPoolExecutor(12) as pool:
        ends = list(
            pool.map(
                lambda newid: exit_status(login(agentlab_env), clone_template(login(agentlab_env), newid)),
                range(101, 125),
            )
        )
    assert ends == ["OK"] * 24
    assert len({pve.vm(vmid).config["smbios1"] for vmid in range(101, 125)}) == 24
