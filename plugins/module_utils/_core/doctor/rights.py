# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Check the privileges of the configured login, and make the commands that grant what is missing."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ..errors import ApiError
from ..store import workspaces
from . import creation, privileges
from .examination import LOOK_AT, Examination
from .findings import OK, PROBLEM, WARNING, Finding, some
from .privileges import needs, pveum_commands


def new_token_commands(exam: Examination) -> list[str]:
    return pveum_commands(
        exam.config,
        template=exam.template[0] if exam.template else None,
        storage=exam.storage,
        release=exam.release,
        standing=exam.standing,
    )


def _workspace_storages(exam: Examination) -> list[str]:
    """Return the storages on which the records have workspaces."""
    return sorted({row.storage for row in workspaces.Workspaces(exam.context.records).find_all()})


def _read_standing(exam: Examination) -> None:
    """Read which roles and users there are, so that the commands make nothing twice."""
    client = exam.context.client
    try:
        exam.standing.roles = {
            str(row.get("roleid")): {name for name in str(row.get("privs") or "").split(",") if name}
            for row in client.get_list("access/roles")
        }
        exam.standing.users = {str(row.get("userid")) for row in client.get_list("access/users")}
    except ApiError:
        # Who may not read them is told commands that make them.
        return


def check_privileges(exam: Examination) -> Iterable[Finding]:
    _read_standing(exam)
    login = exam.config.proxmox.login
    if exam.config.proxmox.is_root:
        if exam.config.proxmox.api_host is None:
            yield Finding("privileges", OK, "pvesh on the node acts as root@pam: no privilege is missing")
        else:
            yield Finding(
                "privileges",
                WARNING,
                "root@pam may do everything on the whole cluster, and so may whoever gets its secret",
                "use a token with the least privileges: see the pveum commands",
                {"login": "root@pam"},
            )
        return
    needed = dict(
        needs(
            exam.config,
            template=exam.template[0] if exam.template else None,
            storage=exam.storage,
            release=exam.release,
            workspaces=_workspace_storages(exam),
            snippets=exam.config.snippets_storage if creation.user_data_is_used(exam) else None,
        )
    )
    # A role on /vms replaces what / hands down, and then VMs outside the pool are hidden.
    needed.setdefault("/vms", ("VM.Audit",))
    missing: dict[str, list[str]] = {}
    held = exam.standing.held
    for path, names in needed.items():
        # A right on the one bridge that is used serves as well as one on the whole zone.
        held[path] = _rights_on(exam, f"{path}/{_bridge_of_template(exam)}" if path == privileges.ZONE else path)
        lacking = [name for name in names if not privileges.satisfies(held[path], name)]
        if lacking and not (path == "/vms" and set(lacking) <= set(missing.get("/", ()))):
            missing[path] = lacking
    pool = privileges.run_path(exam.config)
    if pool != "/vms" and "VM.Audit" in held["/vms"] and pool in missing:
        # A pool's roles add to what / hands down to its VMs.
        missing[pool] = [name for name in missing[pool] if name != "VM.Audit"]
        if not missing[pool]:
            del missing[pool]
    creation.acl_entries(exam)
    facts: dict[str, Any] = {"login": login, "missing": missing}
    too_many = sorted(held.get("/", set()) & set(privileges.ADMINISTRATOR))
    # An administrator needs no repair, but a token of its own; None makes the commands for one.
    exam.pveum = None if too_many else privileges.pool_commands(exam.config) if exam.standing.pool is False else []
    if missing:
        exam.pveum = privileges.repair_commands(exam.config, missing, exam.standing, needed)
        lacking_text = "; ".join(f"{', '.join(names)} on {path}" for path, names in missing.items())
        yield Finding("privileges", PROBLEM, f"{login} lacks {lacking_text}", _repair_advice(exam), facts)
    elif not too_many and not exam.sees_everything():
        yield Finding(
            "privileges",
            WARNING,
            f"{login} is not proven to see every VM of the cluster: a role on /vms/N or NoAccess on a pool hides"
            " VMs, so workspaces are not attached, and each VMID is asked for by itself",
            "grant VM.Audit wherever another role stands below /vms, and Sys.Audit on / (paths:"
            f" {some(_hiding_paths(exam)) or 'not known'})",
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


def _repair_advice(exam: Examination) -> str:
    advice = (
        "run the pveum commands as root on a node, then the doctor again: they add what is missing and take nothing"
        " away"
    )
    if exam.config.proxmox.token_name and not any(exam.standing.held.values()):
        advice += (
            ". This token has no privilege at all: it was probably made without --privsep 0, and then has none of"
            " its user's"
        )
    return advice


def _hiding_paths(exam: Examination) -> list[str]:
    """Return the paths below /vms that have a role without VM.Audit for this login."""
    paths = {
        str(entry.get("path")) for entry in creation.acl_entries(exam) if str(entry.get("path")).startswith("/vms/")
    }
    return sorted(path for path in sorted(paths)[:LOOK_AT] if "VM.Audit" not in _rights_on(exam, path))


def _bridge_of_template(exam: Examination) -> str:
    bridge = re.search(r"bridge=([\w.-]+)", str(exam.template[2].get("net0")) if exam.template else "")
    return bridge[1] if bridge else "vmbr0"


def _rights_on(exam: Examination, path: str) -> set[str]:
    paths = exam.context.client.get_dict("access/permissions", path=path)
    return {str(name) for rights in paths.values() if isinstance(rights, dict) for name in rights}
