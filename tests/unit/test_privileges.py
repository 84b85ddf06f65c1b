# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Privileges by Proxmox VE's rules: what the pages grant is enough, and the doctor's commands mend what it finds.

The double takes the commands literally (tests/support/access.py). A command that makes something twice, or names what
is not there, fails.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import config
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.doctor import doctor
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import AgentlabError
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.workspaces import workspace

from support import pages
from support.access import AccessControl, Entry, Refused
from support.double import TOKEN_ID
from support.lab import Lab

USER = "agentlab@pve"


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path, pool="agentlab", profiles_dir=str(tmp_path / "profiles"))
    yield made
    made.stop()


@pytest.fixture
def access(lab: Lab) -> AccessControl:
    """Access control with root alone: no user, no token."""
    found: AccessControl = lab.pve.use_access()
    found.users = {"root@pam"}
    found.tokens.clear()
    return found


def run(lab: Lab, access: AccessControl, commands: list[str]) -> None:
    """Run the commands as printed; but the token has the name that the tests' secret belongs to."""
    for command in commands:
        access.pveum(lab.pve, re.sub(r"(token \w+ agentlab@pve) (ansible|daemon)\b", r"\1 tests", command))


def commands_of(page: str) -> list[str]:
    """The pveum commands of a page, one by one."""
    return [
        part
        for command in pages.commands(pages.ROOT / page)
        for part in command.split(" && ")
        if part.startswith("pveum")
    ]


def examine(lab: Lab, **options: Any) -> Any:
    found = config.load({**lab.options, "database": lab.database, **options}, lab.server.environment(lab.folder))
    one = doctor.Doctor(found, now=lab.clock)
    try:
        return one.examine()
    finally:
        one.close()


def wrong(report: Any, *checks: str) -> list[str]:
    """The meanings of what is not well."""
    return [
        f"{one.check}: {one.meaning}"
        for one in report.findings
        if one.status != "ok" and (not checks or one.check in checks)
    ]


def effective(lab: Lab, access: AccessControl) -> dict[str, set[str]]:
    paths = [
        "/",
        "/vms",
        "/vms/9000",
        "/vms/500",
        "/pool/agentlab",
        "/storage/local-lvm",
        "/storage/local",
        "/sdn/zones/localnetwork",
    ]
    return {path: access.held(TOKEN_ID, path) for path in paths}


def test_the_commands_of_the_readme_are_enough(lab: Lab, access: AccessControl) -> None:
    run(lab, access, commands_of("README.md"))
    lab.pass_whole_life()
    report = examine(lab)
    assert wrong(report, "privileges", "creation") == [] and report.pveum == []


def test_each_privilege_of_the_readme_is_needed_or_said_to_be_superfluous(lab: Lab, access: AccessControl) -> None:
    """Taken away one by one. The doctor finds each, or the life of a sandbox does without it and the page says so."""
    run(lab, access, commands_of("README.md"))
    page = (pages.ROOT / "docs/safety.md").read_text(encoding="utf-8")
    superfluous = set()
    for name in ("AgentlabSee", "AgentlabRun", "AgentlabClone", "AgentlabDisk", "AgentlabNet"):
        granted = set(access.roles[name])
        for privilege in sorted(granted):
            access.roles[name] = granted - {privilege}
            problems = [one for one in examine(lab).findings if one.check == "privileges" and one.status == "problem"]
            assert re.search(rf"{re.escape(privilege)}\b", page.replace(", .", ", VM.Config.")), privilege
            if not problems:
                superfluous.add((name, privilege))
        access.roles[name] = granted
    # Without VM.Audit the role on the template hides the template itself.
    superfluous.discard(("AgentlabClone", "VM.Audit"))
    assert superfluous == {
        # What / hands down stays in force beside a pool's roles.
        ("AgentlabRun", "VM.Audit"),
        # VM.Config.Network serves for it.
        ("AgentlabRun", "VM.Config.Cloudinit"),
        # Only the doctor asks for these.
        ("AgentlabRun", "Pool.Audit"),
        ("AgentlabDisk", "Datastore.Audit"),
    }


def test_a_template_that_is_hidden_is_not_told_to_be_missing(lab: Lab, access: AccessControl) -> None:
    """A role on /vms/9000 without VM.Audit takes away what / hands down."""
    run(lab, access, commands_of("README.md"))
    access.roles["AgentlabClone"] = {"VM.Clone"}
    message = (
        r"template: VM 9000 exists, but these credentials may not see it. Grant VM.Audit and VM.Clone on /vms/9000"
    )
    with pytest.raises(AgentlabError, match=message):
        lab.create(template="9000")
    with pytest.raises(AgentlabError, match=r"template: '9999' does not exist"):
        lab.create(template="9999")
    assert any(message[:20] in meaning for meaning in wrong(examine(lab, template="9000"), "template"))


@pytest.mark.parametrize("lag", [0, 60])
def test_a_vm_that_may_not_be_started_is_removed_without_a_stop(lab: Lab, access: AccessControl, lag: int) -> None:
    """A new VM is "unknown" in the list: whether there is something to stop is asked of the VM itself."""
    run(lab, access, commands_of("README.md"))
    access.roles["AgentlabRun"] = access.roles["AgentlabRun"] - {"VM.PowerMgmt"}
    lab.pve.listing_lag = lag
    with pytest.raises(AgentlabError, match=r"VM.PowerMgmt.*what was made for it has been removed"):
        lab.create()
    assert not any("/status/stop" in path for _method, path, *_rest in lab.pve.requests)


def test_the_commands_of_the_creation_page_are_enough_for_workspaces_too(lab: Lab, access: AccessControl) -> None:
    run(lab, access, commands_of("docs/creation.md"))
    lab.options["pool"] = None
    lab.pass_whole_life()
    made = lab.create()
    workspace.ensure_present(lab.context(), "w1", size="5G", storage="local-lvm")
    workspace.ensure_attached(lab.context(), "w1", lab.context().select_sandbox(made.vmid))
    lab.power("stop", made.vmid)
    workspace.ensure_detached(lab.context(), "w1")
    workspace.ensure_absent(lab.context(), "w1", force=True)
    report = examine(lab)
    assert wrong(report, "privileges") == [] and report.pveum == []


def separate(lab: Lab, access: AccessControl) -> None:
    """Proxmox VE's default: the token is separated from its user, and has nothing of its own."""
    run(lab, access, [command.replace(" --privsep 0", "") for command in commands_of("README.md")])


def only_disks_on_vms(lab: Lab, access: AccessControl) -> None:
    run(
        lab,
        access,
        [
            *commands_of("README.md"),
            'pveum role add Mine --privs "VM.Config.Disk"',
            f"pveum acl modify /vms --users {USER} --roles Mine",
        ],
    )


def only_allocate_on_the_storage(lab: Lab, access: AccessControl) -> None:
    run(lab, access, ['pveum role add Mine --privs "Datastore.Allocate"', *commands_of("README.md")])
    access.entries = [entry for entry in access.entries if not entry.path.startswith("/storage")]
    run(lab, access, [f"pveum acl modify /storage/local-lvm --users {USER} --roles Mine"])


def pool_removed(lab: Lab, access: AccessControl) -> None:
    run(lab, access, commands_of("README.md"))
    # Proxmox VE removes the entries of a pool with the pool.
    del lab.pve.pools["agentlab"], lab.pve.pool_info["agentlab"]
    access.entries = [entry for entry in access.entries if not entry.path.startswith("/pool")]


def own_entries(lab: Lab, access: AccessControl) -> None:
    """A token that is separated on purpose, and may see everything itself."""
    separate(lab, access)
    run(lab, access, [f"pveum acl modify / --tokens '{TOKEN_ID}' --roles AgentlabSee"])


def older_roles(lab: Lab, access: AccessControl) -> None:
    """The roles are there with fewer privileges, as an older release of this page made them."""
    run(lab, access, commands_of("README.md"))
    access.roles["AgentlabRun"] -= {"VM.PowerMgmt"}
    access.roles["AgentlabDisk"] = {"Datastore.Audit"}


def nothing_at_all(lab: Lab, access: AccessControl) -> None:
    run(lab, access, [f"pveum user add {USER}", f"pveum user token add {USER} ansible --privsep 0"])


@pytest.mark.parametrize(
    "setting",
    [separate, only_disks_on_vms, only_allocate_on_the_storage, pool_removed, own_entries, older_roles, nothing_at_all],
    ids=lambda setting: setting.__name__,
)
def test_the_commands_of_the_doctor_mend_what_it_finds(lab: Lab, access: AccessControl, setting: Any) -> None:
    setting(lab, access)
    before = effective(lab, access)
    report = examine(lab)
    assert [one.status for one in report.findings if one.check == "privileges"] == ["problem"], wrong(report)
    for _round in range(2):
        # Each is run as it is printed. What nobody could see before (the template) is found by the second examination.
        assert report.pveum and not re.search(r"[A-Z]{4,}", " ".join(report.pveum)), report.pveum
        for command in report.pveum:
            access.pveum(lab.pve, command)
        report = examine(lab)
        if not wrong(report, "privileges", "creation"):
            break
    assert wrong(report, "privileges", "creation") == [] and report.pveum == []
    after = effective(lab, access)
    # Sys.* counts on / alone.
    lost = {
        path: names
        for path in before
        if (names := {name for name in before[path] - after[path] if path == "/" or not name.startswith("Sys.")})
    }
    assert not lost, "a command took something away"
    lab.pass_whole_life()


def test_a_root_login_is_told_how_to_make_a_token(lab: Lab, access: AccessControl) -> None:
    access.tokens["root@pam!tests"] = False
    lab.pve.apitokens["root@pam!tests"] = lab.pve.apitokens[TOKEN_ID]
    report = examine(lab, api_token_id="root@pam!tests")
    assert any("may administer the whole cluster" in one for one in wrong(report, "privileges"))
    run(lab, access, report.pveum)
    lab.pass_whole_life()


def test_a_vm_that_is_hidden_is_told(lab: Lab, access: AccessControl) -> None:
    run(lab, access, commands_of("README.md"))
    access.entries.append(Entry("/vms/500", "user", USER, "AgentlabNet"))
    report = examine(lab)
    assert any("not proven to see every VM" in one for one in wrong(report, "privileges"))
    assert any("/vms/500" in str(one.advice) for one in report.findings)


def test_commands_can_be_copied_out_of_the_output_of_ansible(lab: Lab, access: AccessControl) -> None:
    """Ansible and AWX show texts as JSON, where a double quote gets a backslash that a shell would take literally."""
    commands = examine(lab).pveum
    assert any("VM.Audit" in command for command in commands)
    assert [json.dumps(command) for command in commands] == [f'"{command}"' for command in commands]


def test_what_the_double_takes_for_a_command_is_what_pveum_takes(lab: Lab, access: AccessControl) -> None:
    """Without this a test above could pass because the double refuses nothing."""
    run(lab, access, commands_of("README.md"))
    for line in (
        "pveum pool add agentlab",
        'pveum role add AgentlabNet --privs "SDN.Use"',
        "pveum user add agentlab@pve",
        "pveum user token add agentlab@pve tests --privsep 0",
        "pveum acl modify /vms/TEMPLATE --users agentlab@pve --roles AgentlabNet",
        "pveum acl modify / --users nobody@pve --roles AgentlabNet",
        'pveum role modify None --privs "SDN.Use"',
        'pveum role add Odd --privs "VM.Everything"',
    ):
        with pytest.raises(Refused):
            access.pveum(lab.pve, line)
    with pytest.raises(AgentlabError):
        access.entries.clear()
        lab.create()


# ---- workspaces: nothing is attached where a VM may be hidden ----


@pytest.mark.parametrize("way", ["/vms", "/vms/500", "NoAccess"])
def test_no_workspace_is_attached_or_deleted_where_a_vm_may_be_hidden(
    lab: Lab, access: AccessControl, way: str
) -> None:
    """Somebody has attached the volume to a VM of theirs by hand, and a deeper role hides that VM."""
    run(lab, access, commands_of("README.md"))
    commands = ['pveum role add Volumes --privs "Datastore.Allocate Datastore.AllocateSpace Datastore.Audit"']
    run(lab, access, [*commands, f"pveum acl modify /storage/local-lvm --users {USER} --roles Volumes"])
    made = lab.create()
    workspace.ensure_present(lab.context(), "w1", size="5G", storage="local-lvm")
    volume = workspace.select(lab.context(), "w1").volume
    lab.pve.vm(500).config["scsi1"] = f"{volume},size=5G"
    if way == "NoAccess":
        lab.pve.pools["theirs"] = {500}
        lab.pve.pool_info["theirs"] = {"comment": None, "storage": set()}
        access.entries.append(Entry("/pool/theirs", "user", USER, "NoAccess"))
        access.entries.append(Entry("/vms/500", "user", USER, "NoAccess"))
    else:
        access.roles["Mine"] = {"VM.Config.Disk"}
        access.entries.append(Entry(way, "user", USER, "Mine"))
    before = dict(lab.pve.vm(500).config)
    for work in (
        lambda: workspace.ensure_attached(lab.context(), "w1", lab.context().select_sandbox(made.vmid)),
        lambda: workspace.ensure_absent(lab.context(), "w1", force=True),
        lambda: lab.create(name="a2", workspace="w1"),
    ):
        with pytest.raises(AgentlabError, match="not proven to see every VM of the cluster"):
            work()
    assert lab.pve.vm(500).config == before and {vm.vmid for vm in lab.pve.vms} == {500, 1000, 9000}
    found = workspace.select(lab.context(), "w1")
    assert found.state == "DETACHED" and found.sandbox_uuid is None
    # With sight of everything the VM is named, and once the volume is taken off there, it is attached.
    access.entries = [entry for entry in access.entries if entry.role not in ("Mine", "NoAccess")]
    with pytest.raises(AgentlabError, match="VM 500 has its volume"):
        workspace.ensure_attached(lab.context(), "w1", lab.context().select_sandbox(made.vmid))
    del lab.pve.vm(500).config["scsi1"]
    assert workspace.ensure_attached(lab.context(), "w1", lab.context().select_sandbox(made.vmid)).outcome == "attached"
