# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Options and words that people type: every option of new, key files, power, words of other programs, workspaces."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.cli import StandIn, agentlab, sandbox
from support.cli_answers import event, workspace


def test_new_sends_every_option(daemon: StandIn, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("ssh-ed25519 AAAA a@b\n\n# mine\nssh-rsa BBBB c@d\n")
    (tmp_path / "data").write_text("#cloud-config\n")
    daemon.replies["POST", "/v1/sandboxes"] = (201, sandbox(1000))
    found = agentlab(
        "sandbox",
        "new",
        "--name",
        "agent-1",
        "--profile",
        "p",
        "--template",
        "9000",
        "--vmid",
        1000,
        "--ttl",
        "2h",
        "--keepalive",
        "--workspace",
        "w-1",
        "--node",
        "pve1",
        "--pool",
        "a",
        "--storage",
        "s",
        "--full-clone",
        "--cores",
        4,
        "--memory",
        8192,
        "--disk-size",
        "+10G",
        "--bridge",
        "vmbr1",
        "--no-firewall",
        "--ip-config",
        "ip=dhcp",
        "--nameserver",
        "192.0.2.1",
        "--ssh-public-keys",
        tmp_path / "keys",
        "--ssh-public-keys",
        "-",
        "--cloud-init-user-data",
        tmp_path / "data",
        "--tag",
        "a",
        "--tag",
        "b",
        "--protected",
        "--wait-for-ip",
        "--wait-for-cloud-init",
        socket=daemon.path,
        stdin="ssh-rsa CCCC\n",
    )
    assert (found.returncode, found.stderr) == (0, "")
    assert (
        found.stdout
        == "sandbox 1000 created (name=agent-1000, state=RUNNING, ip=192.0.2.10, lease until 2126-01-30T02:45:00Z)\n"
    )
    assert daemon.posted() == [
        (
            "/v1/sandboxes",
            {
                "name": "agent-1",
                "profile": "p",
                "template": "9000",
                "vmid": 1000,
                "ttl": "2h",
                "keepalive": True,
                "workspace_id": "w-1",
                "node": "pve1",
                "pool": "a",
                "storage": "s",
                "full_clone": True,
                "cores": 4,
                "memory": 8192,
                "disk_size": "+10G",
                "bridge": "vmbr1",
                "firewall": False,
                "ip_config": "ip=dhcp",
                "nameserver": "192.0.2.1",
                "ssh_public_keys": ["ssh-ed25519 AAAA a@b", "ssh-rsa BBBB c@d", "ssh-rsa CCCC"],
                "cloud_init_user_data": "#cloud-config\n",
                "tags": ["a", "b"],
                "protected": True,
                "wait_for_ip": True,
                "wait_for_cloud_init": True,
            },
        )
    ]
    agentlab("sandbox", "new", "--ttl", "120", socket=daemon.path)
    assert daemon.posted()[-1][1] == {"ttl_minutes": 120}, "what is not given is not sent"


@pytest.mark.parametrize("text", ["", "\n \n", "# none yet\n"])
def test_a_key_file_without_a_key_is_refused(daemon: StandIn, tmp_path: Path, text: str) -> None:
    (tmp_path / "keys").write_text(text)
    refused = agentlab("sandbox", "new", "--ssh-public-keys", tmp_path / "keys", socket=daemon.path)
    assert refused.returncode == 2 and "holds no key" in refused.stderr and daemon.posted() == []


def test_a_key_file_with_many_keys_is_sent_key_by_key(daemon: StandIn, tmp_path: Path) -> None:
    """One text of the list may have 10,000 characters; a file of keys has more than that soon."""
    (tmp_path / "keys").write_text("".join(f"ssh-rsa {'A' * 370} key-{number}\n" for number in range(60)))
    daemon.replies["POST", "/v1/sandboxes"] = (201, sandbox(1000))
    assert agentlab("sandbox", "new", "--ssh-public-keys", tmp_path / "keys", socket=daemon.path).returncode == 0
    assert len(daemon.posted()[-1][1]["ssh_public_keys"]) == 60


def test_power_commands_say_the_new_state(daemon: StandIn) -> None:
    for name, state in (("start", "RUNNING"), ("stop", "STOPPED"), ("suspend", "SUSPENDED")):
        daemon.replies["POST", f"/v1/sandboxes/1000/{name}"] = (200, sandbox(1000, state))
        found = agentlab("sandbox", name, 1000, socket=daemon.path)
        assert (found.returncode, found.stdout, found.stderr) == (0, f"sandbox 1000 is {state}\n", "")
    for name in ("start", "resume"):
        daemon.replies["POST", f"/v1/sandboxes/1000/{name}"] = (200, sandbox(1000, "RUNNING"))
        waited = agentlab("sandbox", name, "--wait-for-ip", 1000, socket=daemon.path)
        assert (waited.returncode, waited.stdout) == (0, f"sandbox 1000 is RUNNING at {sandbox(1000)['ip']}\n")
        assert daemon.posted()[-1] == (f"/v1/sandboxes/1000/{name}", {"wait_for_ip": True})


def test_words_of_other_programs_are_understood(daemon: StandIn) -> None:
    daemon.replies["GET", "/v1/sandboxes"] = (200, {"sandboxes": []})
    daemon.replies["GET", "/v1/sandboxes/1000/events?tail=3"] = (
        200,
        {"events": [event(7, "start", None, "RUNNING")], "last_id": 7},
    )
    daemon.replies["GET", "/v1/workspaces"] = (200, {"workspaces": []})
    for action, state in (("suspend", "SUSPENDED"), ("resume", "RUNNING")):
        daemon.replies["POST", f"/v1/sandboxes/1000/{action}"] = (200, sandbox(1000, state))
    daemon.replies["POST", "/v1/sandboxes"] = (201, sandbox(1000))

    def run(*args: object) -> str:
        found = agentlab(*args, socket=daemon.path)
        assert (found.returncode, found.stderr) == (0, ""), args
        return found.stdout

    assert run("sandbox", "ls") == "no sandboxes\n" and run("workspace", "ls") == "no workspaces\n"
    assert run("sandbox", "pause", 1000) == "sandbox 1000 is SUSPENDED\n"
    assert run("sandbox", "resume", 1000) == "sandbox 1000 is RUNNING\n"
    assert run("sandbox", "create", "--name", "a1").startswith("sandbox 1000 created")
    assert (
        run("logs", 1000, "--tail", 3)
        == run("sandbox", "logs", "--tail", 3, 1000)
        == run("sandbox", "events", "--tail", 3, 1000)
    )
    assert run("version") == run("--version") == run("--version", "--json") and run("version").startswith("agentlab ")
    assert run("help") == run("--help") and run("help", "sandbox", "lease", "renew").startswith(
        "Usage: agentlab sandbox lease renew"
    )


def test_flags_may_have_a_value(daemon: StandIn) -> None:
    daemon.replies["POST", "/v1/sandboxes"] = (201, sandbox(1000))
    sent = {
        "--keepalive=true": {"keepalive": True},
        "--keepalive=false": {},
        "--firewall=false": {"firewall": False},
        "--firewall=TRUE": {"firewall": True},
        "--json=true": {},
        # The daemon judges it, with the sentence that modules have.
        "--ttl=1.5h": {"ttl": "1.5h"},
        "--ttl=1.5": {"ttl": "1.5"},
        "--ttl=2x.5": {"ttl": "2x.5"},
    }
    for word, body in sent.items():
        found = agentlab("sandbox", "new", word, socket=daemon.path)
        assert (found.returncode, found.stderr) == (0, ""), word
        assert (daemon.posted()[-1][1] or {}) == body, word
        assert found.stdout.startswith("{") == (word == "--json=true")
    wrong = agentlab("sandbox", "new", "--keepalive=perhaps", socket=daemon.path)
    assert wrong.returncode == 2 and "--keepalive" in wrong.stderr


@pytest.mark.parametrize(
    ("typed", "sent"),
    [
        ("10", "10G"),
        ("10G", "10G"),
        ("10g", "10G"),
        ("10GB", "10G"),
        ("10GiB", "10G"),
        ("512m", "512M"),
        ("1tb", "1T"),
        ("much", "much"),
        ("10.5", "10.5"),
    ],
)
def test_a_workspace_takes_its_size_and_name_in_every_form(daemon: StandIn, typed: str, sent: str) -> None:
    made = {**workspace("w1"), "outcome": "created"}
    daemon.replies["POST", "/v1/workspaces"] = (201, made)
    for args in (["new", "w1"], ["create", "--name", "w1"], ["create", "--name=w1"]):
        assert agentlab("workspace", *args, "--size", typed, socket=daemon.path).returncode == 0
        assert daemon.posted()[-1][1] == {"name": "w1", "size": sent}


def test_workspaces_are_attached_and_shown(daemon: StandIn) -> None:
    daemon.replies["POST", "/v1/workspaces/w1/attach"] = (200, {**workspace("w1"), "vmid": 1000})
    for args in (["w1", 1000], ["--vmid", 1000, "w1"], ["w1", "--vmid", 1000]):
        found = agentlab("workspace", "attach", *args, socket=daemon.path)
        assert (found.returncode, found.stdout) == (0, "workspace w1 attached to sandbox 1000 as scsi1\n")
        assert daemon.posted()[-1] == ("/v1/workspaces/w1/attach", {"vmid": 1000})
    daemon.replies["GET", "/v1/workspaces/w1"] = daemon.replies["GET", "/v1/workspaces/7b1f"] = (200, workspace("w1"))
    shown = agentlab("workspace", "show", "w1", socket=daemon.path).stdout
    assert re.search(r"^size +10G$", shown, re.M) and "volid" not in shown
    daemon.replies["GET", "/v1/sandboxes/1000"] = (200, sandbox(1000, workspace_id="7b1f"))
    shown = agentlab("sandbox", "show", 1000, socket=daemon.path).stdout
    assert re.search(r"^workspace +w1$", shown, re.M) and re.search(r"^time left +\d+d", shown, re.M)


def test_protect_and_keepalive_say_what_holds_now(daemon: StandIn) -> None:
    for action in ("protect", "unprotect", "keepalive"):
        daemon.replies["POST", f"/v1/sandboxes/1000/{action}"] = (200, {**sandbox(1000), "changed": True})
    for args, said in (
        (["protect"], "is protected"),
        (["unprotect"], "is not protected"),
        (["keepalive", "on"], "has keepalive on"),
        (["keepalive", "off"], "has keepalive off"),
    ):
        found = agentlab("sandbox", *args, 1000, socket=daemon.path)
        assert (found.returncode, found.stdout, found.stderr) == (0, f"sandbox 1000 {said}\n", "")
    assert [body for _target, body in daemon.posted()] == [None, None, {"keepalive": True}, {"keepalive": False}]


def test_stop_all_says_what_was_stopped_and_what_failed(daemon: StandIn) -> None:
    results = [
        {"vmid": 1000, "name": "a", "profile": None, "state": "STOPPED", "result": "stopped", "error": None},
        {"vmid": 1001, "name": "b", "profile": None, "state": "RUNNING", "result": "failed", "error": "it is locked"},
    ]
    daemon.replies["POST", "/v1/sandboxes/stop_all"] = (
        207,
        {"total": 3, "stopped": 1, "skipped": 1, "failed": 1, "results": results},
    )
    found = agentlab("sandbox", "stop", "--all", socket=daemon.path)
    assert (found.returncode, found.stdout, found.stderr) == (
        4,
        "stopped 1 sandbox(es), 1 did not run\n",
        "Error: sandbox 1001: it is locked\n",
    )


@pytest.mark.parametrize("option", ["--cloud-init-user-data", "--ssh-public-keys", "--cloud-init-password"])
def test_a_file_without_end_or_of_the_wrong_kind_is_named_with_its_option(
    daemon: StandIn, tmp_path: Path, option: str
) -> None:
    (tmp_path / "large").write_text("x" * 2_000_000)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path, words in (
        ("/dev/zero", "is larger than"),
        (tmp_path / "large", "is larger than"),
        (tmp_path / "binary", "cannot be read as text"),
    ):
        found = agentlab("sandbox", "new", option, path, socket=daemon.path)
        assert (
            found.returncode in (1, 2)
            and f"{option}: {path} {words}" in found.stderr
            and "Traceback" not in found.stderr
        )
    assert daemon.posted() == []


def test_an_empty_key_file_is_refused(daemon: StandIn, tmp_path: Path) -> None:
    for text in ("", "\n \n", "# only a comment\n"):
        (tmp_path / "keys").write_text(text)
        found = agentlab("sandbox", "new", "--ssh-public-keys", tmp_path / "keys", socket=daemon.path)
        assert found.returncode == 2 and f"--ssh-public-keys: {tmp_path}/keys holds no key" in found.stderr
    assert daemon.posted() == []
