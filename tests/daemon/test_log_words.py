# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The log of a daemon's whole life, the good days and the bad ones, has sentences and no objects of Python."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from support.cli import agentlab
from support.daemon import Daemon, free_port
from support.double import TOKEN_SECRET
from support.lab import Lab

Make = Callable[..., Daemon]
# What Python prints for functions, objects, classes, paths, and for the absence of a value.
OBJECTS = re.compile(
    r"<[\w.]*(lambda|locals|function|method|class|object|module|coroutine|generator|Task|Future|Thread|Condition)\b[^>]*>"
    r"|\b0x[0-9a-f]{6,}|functools\.partial|\w+Error\(|\w+Path\(|dict_(keys|values|items)|Namespace\(|\bsqlite3\.|Traceback"
    r"|\b(None|True|False|nan|inf)\b|\[\]|\{\}|\('|\['|\{'|set\(|b'"
)
RULES = (
    "auto_cleanup:\n  enabled: true\n  interval: 1h\n  jitter: 0s\n  rules:\n"
    "    - {name: timeouts, match: {states: [TIMEOUT]}, after: 1s, action: destroy}\n"
)


def odd_words(text: str) -> list[str]:
    return [f"{found[0]!r} in {line}" for line in text.splitlines() for found in [OBJECTS.search(line)] if found]


@pytest.mark.parametrize(
    "line", ["stopping: waiting for <lambda>", "x: <bound method A.b of <A object at 0x7f12345678>>", "frozen by None"]
)
def test_the_look_at_the_log_sees_objects(line: str) -> None:
    assert odd_words(line)


def test_the_log_of_a_whole_life_has_no_objects_of_python(daemon: Make, lab: Lab) -> None:
    lab.create("orphan")
    lab.pve.vm(1000).config["description"] = "edited"
    locked = lab.create("locked")
    lab.pve.vm(locked.vmid).config["lock"] = "backup"
    one = daemon(
        cleanup=RULES,
        expire_interval="1s",
        stop_timeout="1s",
        metrics_listen=f"127.0.0.1:{free_port()}",
    )
    one.wait_for(lambda: one.get("/v1/status").body["reconcile"]["last_run"], "the first reconcile is over", 30)
    lab.force_state(locked.vmid, "RUNNING", lease_expires_at=int(time.time()) - 1)
    vmid = one.good("POST", "/v1/sandboxes", {"name": "a1", "ttl": "1h", "tags": ["x"]}, 201)["vmid"]
    for path, body in (
        (f"/v1/sandboxes/{vmid}/stop", None),
        (f"/v1/sandboxes/{vmid}/lease/renew", {"ttl_minutes": 5}),
        (f"/v1/sandboxes/{vmid}/start", None),
        ("/v1/sandboxes/destroy", {"vmids": [vmid, 1777]}),
        ("/v1/sandboxes", {"name": None, "vmid": True, "tags": {}}),
        ("/v1/sandboxes", b"{"),
        ("/v1/workspaces", {"name": "w1", "size": "1G", "storage": "local-lvm"}),
        ("/v1/cleanup/run", {}),
        ("/v1/sandboxes/prune", {"older_than": "0s"}),
    ):
        one.post(path, body)
    one.wait_for(lambda: "was not stopped" in one.log(), "an expiry fails", 30)
    # Damaged notes of the records, a broken file, and a Proxmox VE that refuses, answers nonsense, and hangs.
    for key, value in (("cleanup_frozen", "["), ("cleanup_last_run", "x"), ("reconcile_last_pass", "y")):
        lab.context().records.set_meta(key, value)
    one.post("/v1/cleanup/run", {})
    shown = agentlab("status", socket=one.socket).stdout
    assert "frozen" in shown.lower() and "None" not in shown, shown
    assert "cleanup is frozen since an unknown time" in one.log()
    one.write_config(nonsense=1)
    one.reload()
    one.wait_for(lambda: "not reloaded" in one.log(), "the broken file is told", 30)
    one.write_config(nonsense=None)
    one.reload()
    one.wait_for(lambda: "reloaded;" in one.log(), "the good file is told", 30)
    for body, status in (("[[[", 200), ('{"data": 5}', 200), ("no", 502), ("{}", 401)):
        lab.pve.fault("GET", "", "answer", status=status, body=body, times=40)
        one.post("/v1/sandboxes/reconcile", {"apply": True})
        one.get("/v1/doctor")
        lab.pve.clear_faults()
    lab.pve.real_secs["qmdestroy"] = 30.0
    lab.pve.vm(vmid).config.pop("lock", None)
    with ThreadPoolExecutor(1) as pool:
        bulk = pool.submit(one.post, "/v1/sandboxes/destroy", {"vmids": [vmid], "force": True})
        one.wait_for(lambda: lab.pve.counted["DELETE /nodes/{node}/qemu/{vmid}"] >= 1, "a delete was sent", 30)
        assert one.stop() == 0
        with pytest.raises(OSError):
            bulk.result(30)
    assert "did not end within stop_timeout" in one.log()
    one.start()
    one.stop()
    assert odd_words(one.log()) == []
    assert TOKEN_SECRET not in one.log()
