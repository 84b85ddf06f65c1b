# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Check the privileges of the configured login, and make the commands that grant the missing ones."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ..errors import ApiError
from ..store import workspaces
from . import creation, privileges
from .examination import LOOK_AT, Examination
from .findings import OK, PROBLEM, WARNING, Finding, shorten_list
from .privileges import list_needed_privileges, make_pveum_commands


def make_token_commands(exam: Examination) -> list[str]:
    return make_pveum_commands(
        exam.config,
        template=exam.template[0] if exam.template else None,
        storage=exam.storage,
        release=exam.release,
        standing=exam.standing,
    )


def _list_workspace_storages(exam: Examination) -> list[str]:
    """Return the storages on which the records have workspaces."""
    return sorted({row.storage for row in workspaces.Workspaces(exam.context.records).find_all()})


def _read_standing(exam: Examination) -> None:
    """Read the roles and users of Proxmox VE, so that the commands make nothing twice."""
    client = exam.context.client
    try:
        exam.standing.roles = {
            str(row.get("roleid")): {name for name in str(row.get("privs") or "").split(",") if name}
            for row in client.get_list("access/roles")
        }
        exam.standing.users = {str(row.get("userid")) for row in client.get_list("access/users")}
    except ApiError:
        # These credentials may not read them. Then the commands make all of them.
        return


def check_privileges(exam: Examination) -> Iterable[Finding]:
    """Compare the privileges of the login with those that are needed, and make the commands that mend them."""
    _read_standing(exam)
    login = exam.config.proxmox.login
    if exam.config.proxmox.is_root:
        if exam.config.proxmox.api_host is None:
            yield Finding("privileges", OK, "pvesh on the node acts as root@pam: no privilege is missing")
        else:
            yield Finding(
                "privileges",
                WARNING,
                "root@pam may do everything on the whole cluster: a thief of its secret may, too",
                "use a token with the least privileges: see the pveum commands",
                {"login": "root@pam"},
            )
        return
    needed = dict(
        list_needed_privileges(
            exam.config,
            template=exam.template[0] if exam.template else None,
            storage=exam.storage,
            release=exam.release,
            workspaces=_list_workspace_storages(exam),
            snippets=exam.config.snippets_storage if creation.is_user_data_used(exam) else None,
        )
    )
    # A role on /vms replaces the roles that are inherited from /. Without VM.Audit in it, VMs outside the pool are
    # hidden.
    needed.setdefault("/vms", ("VM.Audit",))
    missing: dict[str, list[str]] = {}
    held = exam.standing.held
    for path, names in needed.items():
        # A privilege on the template's bridge is enough; the whole zone is not needed.
        held[path] = _read_rights(exam, f"{path}/{_read_template_bridge(exam)}" if path == privileges.ZONE else path)
        lacking = [name for name in names if not privileges.satisfies(held[path], name)]
        if lacking and not (path == "/vms" and set(lacking) <= set(missing.get("/", ()))):
            missing[path] = lacking
    pool = privileges.choose_run_path(exam.config)
    if pool != "/vms" and "VM.Audit" in held["/vms"] and pool in missing:
        # The VMs of a pool have the roles of the pool, and those that they inherit from /.
        missing[pool] = [name for name in missing[pool] if name != "VM.Audit"]
        if not missing[pool]:
            del missing[pool]
    creation.read_acl_entries(exam)
    facts: dict[str, Any] = {"login": login, "missing": missing}
    too_many = sorted(held.get("/", set()) & set(privileges.ADMINISTRATOR))
    # An administrator needs no repair, but a token with fewer privileges. None makes the commands for that token.
    exam.pveum = None if too_many else privileges.make_pool_commands(exam.config) if exam.standing.pool is False else []
    if missing:
        exam.pveum = privileges.make_repair_commands(exam.config, missing, exam.standing, needed)
        lacking_text = "; ".join(f"{', '.join(names)} on {path}" for path, names in missing.items())
        yield Finding("privileges", PROBLEM, f"{login} lacks {lacking_text}", _explain_repair(exam), facts)
    elif not too_many and not exam.sees_everything():
        yield Finding(
            "privileges",
            WARNING,
            f"{login} is not proven to see every VM of the cluster: a role on /vms/N or NoAccess on a pool hides"
            " VMs, so workspaces are not attached, and each VMID is asked for by itself",
            "grant VM.Audit wherever another role stands below /vms, and Sys.Audit on / (paths:"
            f" {shorten_list(_find_hiding_paths(exam)) or 'not known'})",
            facts,
        )
    else:
        yield Finding("privileges", OK, f"{login} has every privilege that is needed", None, facts)
    if too_many:
        yield Finding(
            "privileges",
            WARNING,
            f"{login} may administer the whole cluster ({', '.join(too_many)} on /)",
            "use a token with the least privileges: see the pveum commands",
            {"login": login},
        )


def _explain_repair(exam: Examination) -> str:
    advice = (
        "run the pveum commands as root on a node, then the doctor again: they add the missing privileges and take"
        " none away"
    )
    if exam.config.proxmox.token_name and not any(exam.standing.held.values()):
        advice += (
            ". This token has no privilege at all: it was probably made without --privsep 0, and then has none of"
            " its user's"
        )
    return advice


def _find_hiding_paths(exam: Examination) -> list[str]:
    """Return the paths below /vms that have a role without VM.Audit for this login."""
    paths = {
        str(entry.get("path"))
        for entry in creation.read_acl_entries(exam)
        if str(entry.get("path")).startswith("/vms/")
    }
    return sorted(path for path in sorted(paths)[:LOOK_AT] if "VM.Audit" not in _read_rights(exam, path))


def _read_template_bridge(exam: Examination) -> str:
    bridge = re.search(r"bridge=([\w.-]+)", str(exam.template[2].get("net0")) if exam.template else "")
    return bridge[1] if bridge else "vmbr0"


def _read_rights(exam: Examination, path: str) -> set[str]:
    paths = exam.context.client.get_dict("access/permissions", path=path)
    return {str(name) for rights in paths.values() if isinstance(rights, dict) for name in rights}
