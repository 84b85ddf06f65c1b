# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The command line as users have it: a process of its own, a real agentlabd, a Proxmox double behind it.

Every example of the seed among it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from support.cli import PYTHON, ROOT, agentlab, environment, on_terminal, start
from support.daemon import PYTHONPATH, Make
from support.lab import Lab

WHEN = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"


def test_a_protected_sandbox_is_refused_in_the_words_of_the_command_line(daemon: Make, lab: Lab) -> None:
    agentlabd = daemon()
    vmids = [lab.create(f"p{number}", protected=True).vmid for number in range(2)]
    told = agentlab("sandbox", "destroy", "--force", vmids[0], socket=agentlabd.socket)
    advice = "is protected. Run agentlab sandbox unprotect first (--force does not skip this)"
    assert (told.returncode, told.stderr) == (1, f"Error: sandbox {vmids[0]} {advice}\n")
    many = agentlab("sandbox", "destroy", "--force", *vmids, socket=agentlabd.socket)
    assert many.stderr == "".join(f"Error: sandbox {vmid} {advice}\n" for vmid in vmids)
    assert agentlabd.post(f"/v1/sandboxes/{vmids[0]}/destroy", {"force": True}).body["remedy"] == "unprotect"
    assert agentlab("sandbox", "unprotect", vmids[0], socket=agentlabd.socket).returncode == 0
    assert agentlab("sandbox", "destroy", "--force", vmids[0], socket=agentlabd.socket).returncode == 0


def test_fixed_sentences_are_printed_to_the_letter(daemon: Make, lab: Lab) -> None:
    one = daemon()
    lab.timed_out("orphan", vmid=1009)

    def run(*args: object) -> tuple[int, str, str]:
        found = agentlab("sandbox", *args, socket=one.socket)
        return found.returncode, found.stdout, found.stderr

    assert run("lease", "renew", "--ttl", "120", "1009") == (
        1,
        "",
        "Error: cannot renew lease in TIMEOUT state. Valid states: RUNNING\n",
    )
    assert run("lease", "renew", "1009") == (
        2,
        "",
        "Usage: agentlab sandbox lease renew --ttl <ttl> <vmid>\n"
        "Note: Flags must come before vmid argument (e.g., --ttl 120 1009)\n"
        "ttl is required. Flags must come before vmid (e.g., --ttl 120 1009)\n",
    )
    assert run("destroy", "1009") == (
        1,
        "",
        "Error: cannot destroy sandbox in TIMEOUT state. Valid states: STOPPED, DESTROYED. Use --force to bypass\n",
    )
    assert lab.pve.vm(1009) is not None
    assert run("destroy", "--force", "1009") == (0, "sandbox 1009 destroyed (state=TIMEOUT)\n", "")
    assert lab.pve.vm(1009) is None
    for number in range(5):
        lab.timed_out(f"o{number}")
        lab.pve.remove_vm(1000 + number)
    assert run("prune") == (0, "pruned 5 sandbox(es)\n", "")
    assert run("prune") == (0, "pruned 0 sandbox(es)\n", "")
    # Section 10: several at once, by age, and the dry run.
    for vmid in (1009, 1010, 1011):
        lab.timed_out(f"b{vmid}", vmid=vmid)
    code, out, err = run("prune", "--dry-run")
    assert (code, out.splitlines()[0], err) == (0, "would prune 3 sandbox(es)", "")
    code, out, err = run("prune", "--older-than", "24h")
    assert (code, out) == (0, "pruned 0 sandbox(es)\n")
    assert [line.partition(":")[0] for line in err.splitlines()] == ["kept 1009", "kept 1010", "kept 1011"]
    assert "too_young" in err
    assert run("destroy", "--force", "1009", "1010", "1011") == (
        0,
        "".join(f"sandbox {vmid} destroyed (state=TIMEOUT)\n" for vmid in (1009, 1010, 1011)),
        "",
    )


def test_a_sandbox_lives_from_creation_to_absence_by_commands(daemon: Make, lab: Lab, tmp_path: Path) -> None:
    one = daemon()
    keys = tmp_path / "id.pub"
    keys.write_text("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ a@b\n")

    def run(*args: object) -> str:
        found = agentlab("sandbox", *args, socket=one.socket)
        assert (found.returncode, found.stderr) == (0, "")
        return found.stdout

    assert run("list") == "no sandboxes\n"
    made = run(
        "new",
        "--name",
        "a1",
        "--template",
        "debian-13",
        "--ttl",
        "2h",
        "--cores",
        2,
        "--memory",
        2048,
        "--ip-config",
        "ip=dhcp",
        "--ssh-public-keys",
        keys,
        "--tag",
        "ci",
        "--keepalive",
        "--firewall",
        "--wait-for-ip",
    )
    assert re.fullmatch(rf"sandbox 1000 created \(name=a1, state=RUNNING, ip=\S+, lease until {WHEN}\)\n", made)
    assert "was there already" in run("new", "--name", "a1")
    assert re.search(
        r"1000 +a1 +RUNNING +\S+ +\S+ +- +1h59m\S* \(keepalive\) +\d+s +ci",
        run("list", "--tag", "ci", "--state", "running"),
    )
    assert re.fullmatch(rf"sandbox 1000 lease renewed until {WHEN}\n", run("lease", "renew", "1000", "--ttl", "240"))
    assert re.search(r"^state +RUNNING$", run("show", 1000), re.M)
    assert run("suspend", 1000) == "sandbox 1000 is SUSPENDED\n"
    assert run("start", 1000) == "sandbox 1000 is RUNNING\n"
    assert run("stop", 1000) == "sandbox 1000 is STOPPED\n"
    assert run("reconcile") == "no drift: the records and Proxmox VE agree\n"
    assert run("destroy", 1000) == "sandbox 1000 destroyed (state=STOPPED)\n"
    assert run("list") == "no sandboxes\n"
    assert "DESTROYED" in run("list", "--all")
    lines = run("events", 1000).splitlines()
    assert re.match(rf"{WHEN}  create ", lines[0])
    assert any("-> DESTROYED" in line for line in lines)
    assert len(run("events", "--tail", 1, 1000).splitlines()) == 1
    assert json.loads(run("events", 1000, "--json")) == one.good("GET", "/v1/sandboxes/1000/events")


def test_bulk_destroy_looks_everything_up_first(daemon: Make, lab: Lab) -> None:
    one = daemon()
    lab.timed_out("a1", vmid=1000)
    lab.create("a2", vmid=1001)
    found = agentlab("sandbox", "destroy", "--force", 1000, 1001, 1999, socket=one.socket)
    assert (found.returncode, found.stdout, found.stderr) == (
        1,
        "",
        "Error: sandbox not found (vmid 1999); nothing was destroyed\n",
    )
    assert lab.pve.vm(1000) is not None
    lab.power("stop", 1001)
    found = agentlab("sandbox", "destroy", 1000, 1001, socket=one.socket)
    assert (found.returncode, found.stdout) == (4, "sandbox 1001 destroyed (state=STOPPED)\n")
    assert (
        found.stderr
        == "Error: sandbox 1000: cannot destroy sandbox in TIMEOUT state. Valid states: STOPPED, DESTROYED. Use "
        "--force to bypass\n"
    )


def test_a_strangers_vm_stops_no_prune_and_survives_it(daemon: Make, lab: Lab) -> None:
    one = daemon()
    one.wait_for(lambda: one.get("/v1/status").body["reconcile"]["last_run"], "the first reconcile is over", 20)
    lab.timed_out("a1", vmid=1000)
    stranger = lab.swap(1000)
    assert agentlab("sandbox", "prune", socket=one.socket).stdout == "pruned 1 sandbox(es)\n"
    lab.untouched(stranger)


def test_refusals_are_passed_on(daemon: Make, lab: Lab) -> None:
    one = daemon()
    lab.create("a1", vmid=1000)
    lab.pve.fault("GET", "/qemu/1000/config", "answer", times=20, status=500)
    found = agentlab("sandbox", "stop", 1000, socket=one.socket)
    assert (found.returncode, found.stdout) == (1, "")
    assert re.match(
        r"Error: sandbox 1000: its VM cannot be read: GET /nodes/pve1/qemu/1000/config on \S+ 500 ", found.stderr
    )
    found = agentlab("sandbox", "new", "--name", "a2", "--template", "none-such", socket=one.socket)
    assert found.returncode == 1
    assert re.match(r"Error: template: 'none-such' does not exist\. Templates: ", found.stderr)
    for wrong, part in (("0", "is zero"), ("soon", "is not a duration"), ("99999d", "longer than the maximum")):
        found = agentlab("sandbox", "lease", "renew", "--ttl", wrong, 1000, socket=one.socket)
        assert (found.returncode, found.stdout) == (1, "")
        assert found.stderr.startswith("Error: ttl: ") and part in found.stderr


def test_status_counts_the_sandboxes_of_each_state(daemon: Make, lab: Lab) -> None:
    one = daemon()
    lab.create("a1")
    found = agentlab("status", socket=one.socket)
    assert (found.returncode, found.stderr) == (0, "")
    assert "RUNNING=1" in found.stdout
    told = agentlab("status", "--json", socket=one.socket)
    assert json.loads(told.stdout)["database"] == one.good("GET", "/v1/status")["database"]


RULES = """
auto_cleanup:
  enabled: false
  guard: {count: 1, percent: 100}
  rules:
    - {name: debug, match: {tags: [debug]}, action: keep}
    - {name: timeouts, match: {states: [TIMEOUT]}, after: 5s, action: destroy}
"""


def test_cleanup_runs_freezes_and_is_released(daemon: Make, lab: Lab) -> None:
    one = daemon(cleanup=RULES)

    def run(*args: object) -> tuple[int, str, str]:
        found = agentlab("cleanup", *args, socket=one.socket)
        return found.returncode, found.stdout, found.stderr

    lab.create("kept", tags=["debug"], vmid=1000)
    for vmid in (1001, 1002):
        lab.timed_out(f"a{vmid}", vmid=vmid)
    code, out, err = run("run", "--dry-run")
    assert (code, err) == (0, "")
    assert out.startswith("would clean up 2 sandbox(es)\nThe guard would stop it: 2 sandboxes")
    assert re.search(r"^destroy +1001 +a1001 +TIMEOUT ", out, re.M) and re.search(
        r"^keep +1000 +kept +RUNNING +rule - rule 'debug' keeps sandbox 1000$", out, re.M
    )
    code, out, err = run("run")
    assert (code, out) == (1, "")
    assert re.match(
        r"Error: 2 sandboxes would be destroyed at once, more than guard count=1; nothing was destroyed, and cleanup is frozen",
        err,
    )
    status = agentlab("status", socket=one.socket).stdout
    assert "The scheduled cleanup is FROZEN since " in status and "agentlab cleanup release" in status
    assert run("release") == (0, "cleanup released\n", "")
    assert agentlab("sandbox", "destroy", "--force", 1001, socket=one.socket).returncode == 0
    assert run("run") == (0, "cleaned up 1 sandbox(es), kept 1\n", "")
    assert run("freeze", "--reason", "maintenance") == (0, "cleanup frozen: maintenance\n", "")
    code, out, err = run("run")
    assert (code, out) == (1, "") and "cleanup is frozen since" in err and "(maintenance)" in err


def test_profiles(daemon: Make, lab: Lab, tmp_path: Path) -> None:
    assert (
        agentlab("profile", "list", socket=daemon(profiles_dir=str(tmp_path / "none")).socket).stdout == "no profiles\n"
    )


def test_every_field_of_the_api_has_an_option() -> None:
    code = (
        "import json; from agentlabd.http.table import CREATION, ROUTES; "
        "print(json.dumps({'new': list(CREATION), **{one.name: [*(one.body or ()), *one.query] for one in ROUTES}}))"
    )
    env = {**os.environ, "PYTHONPATH": PYTHONPATH}
    fields = json.loads(
        subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    )
    named = {
        "workspace_id": "workspace",
        "tags": "tag",
        "states": "state",
        "ttl_minutes": "ttl",
        "include_destroyed": "all",
        "include_deleted": "all",
    }
    for command, route in (
        (("sandbox", "new"), "new"),
        (("sandbox", "prune"), "prune_sandboxes"),
        (("sandbox", "reconcile"), "reconcile_sandboxes"),
        (("sandbox", "list"), "list_sandboxes"),
        (("sandbox", "lease", "renew"), "renew_lease"),
        (("cleanup", "run"), "run_cleanup"),
        (("cleanup", "freeze"), "freeze_cleanup"),
    ):
        shown = agentlab(*command, "--help").stdout
        # Only the inventory plugin asks for owners.
        for field in set(fields[route]) - {"owner"}:
            assert f"--{named.get(field, field).replace('_', '-')}" in shown, (command, field)


def test_events_are_followed_as_they_happen(daemon: Make, lab: Lab) -> None:
    one = daemon()
    lab.create("a1")
    running = start("sandbox", "events", 1000, "--follow", "--tail", 1, socket=one.socket)
    assert running.stdout is not None
    assert running.stdout.readline()
    assert agentlab("sandbox", "destroy", "--force", 1000, socket=one.socket).returncode == 0
    out, err = running.communicate(timeout=20)
    assert (running.returncode, err) == (0, "")
    assert "-> DESTROYED" in out.splitlines()[-1]


def test_a_daemon_that_is_killed_while_it_works(daemon: Make, lab: Lab) -> None:
    one = daemon()
    lab.create("a1")
    reached = threading.Event()
    lab.pve.fault("DELETE", "/qemu/1000", "hang", seconds=20)
    lab.pve.before = lambda method, _path: reached.set() if method == "DELETE" else None
    running = start("sandbox", "destroy", "--force", 1000, socket=one.socket)
    assert reached.wait(20)
    one.kill()
    out, err = running.communicate(timeout=20)
    assert (running.returncode, out) == (3, "")
    assert err.startswith("Error: the daemon ended the connection before it answered")
    assert "What it had begun it finishes when it runs again" in err
    found = agentlab("sandbox", "list", socket=one.socket)
    assert found.returncode == 3
    assert "nothing listens on the socket" in found.stderr and "systemctl start agentlabd" in found.stderr
    lab.pve.clear_faults()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_is_refused_and_told_what_to_do(daemon: Make, lab: Lab, tmp_path: Path) -> None:
    one = daemon()
    # The checkout may lie where that user may not look: the code is copied beside the socket.
    code = Path(one.socket).parent / "agentlab_cli"
    shutil.copytree(ROOT / "roles/agentlabd/files/agentlab_cli", code)
    become = (
        "import os, agentlab_cli.app as app, agentlab_cli.client, http.client, encodings.idna; os.setgroups([]); "
        "os.setgid(65534); os.setuid(65534); app.main()"
    )
    found = subprocess.run(
        [PYTHON, "-c", become, "sandbox", "list"],
        capture_output=True,
        text=True,
        check=False,
        env={**environment(one.socket), "PYTHONPATH": str(code.parent)},
    )
    assert (found.returncode, found.stdout) == (3, "")
    assert re.match(
        rf"Error: nobody may not use the socket {one.socket}\. Add the user to the group agentlab and log in again:\n"
        r"  sudo usermod -aG agentlab nobody\n$",
        found.stderr,
    )


def test_a_terminal_shows_the_progress_of_a_prune(daemon: Make, lab: Lab) -> None:
    for vmid in range(1000, 1006):
        lab.timed_out(f"a{vmid}", vmid=vmid)
    one = daemon()
    lab.pve.time_scale = 0.3
    status, shown = on_terminal("sandbox", "prune", socket=one.socket)
    assert status == 0, shown
    assert re.search(r"\rpruning: \d of 6 done \(\d+s\)\x1b\[K", shown), shown
    assert shown.endswith("\r\x1b[Kpruned 6 sandbox(es)\r\n")


def test_vmids_of_a_real_daemon_are_completed(daemon: Make, lab: Lab) -> None:
    one = daemon()
    lab.create("a1", vmid=1000)
    lab.create("a2", vmid=1234)
    found = agentlab(
        socket=one.socket,
        env={"_AGENTLAB_COMPLETE": "bash_complete", "COMP_WORDS": "agentlab sandbox stop 12", "COMP_CWORD": "3"},
    )
    assert found.stdout == "plain,1234\n"


def test_a_workspace_lives_from_creation_to_absence_by_commands(daemon: Make, lab: Lab) -> None:
    path = daemon().socket

    def ws(*arguments: object) -> str:
        found = agentlab("workspace", *arguments, socket=path)
        return found.stdout if found.returncode == 0 else found.stderr

    assert ws("list") == "no workspaces\n"
    assert (
        ws("new", "--size", "2G", "--storage", "local-lvm", "w1")
        == "workspace w1 created (2G on local-lvm, DETACHED)\n"
    )
    assert agentlab("sandbox", "new", "--name", "a1", "--workspace", "w1", socket=path).returncode == 0
    assert ws("list").splitlines()[1].split()[:7] == ["w1", "ATTACHED", "2G", "local-lvm", "pve1", "1000", "(a1)"]
    lab.create("a2")
    assert "Error: workspace 'w1' is ATTACHED to sandbox 1000 (a1)" in ws("attach", "--vmid", 1001, "w1")
    assert ws("new", "--size", "3G", "w1") == "workspace w1 grown (3G on local-lvm, ATTACHED)\n"
    assert ws("detach", "w1") == "workspace w1 detached\n"
    assert "workspace w1 attached to sandbox 1001 as /dev/disk/by-id/scsi-0QEMU_QEMU_HARDDISK_agentlab-" in ws(
        "attach", "--vmid", 1001, "--ttl", "30", "w1"
    )
    assert re.search(r"^vmid +1001$", ws("show", "w1"), re.M)
    assert agentlab("sandbox", "destroy", "--force", "1000", "1001", socket=path).returncode == 0
    assert "would be lost. Use --force to delete it" in ws("destroy", "w1")
    assert ws("destroy", "--force", "w1") == "workspace w1 destroyed\n"
    assert ws("show", "w1") == (
        "Error: workspace not found\nThere is no workspace 'w1'. Workspaces: none. See 'agentlab workspace list "
        "--all'\n"
    )
