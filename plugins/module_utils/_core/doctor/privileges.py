# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""The privileges that our requests need, by path, and the ``pveum`` commands that grant them.

Proxmox VE's rules decide how the commands are written (pve-access-control 9, tried):

- A role on a deeper path replaces the roles that are inherited from the paths above it. So a role that we grant on
  a path has every privilege that is needed there, and every privilege that the login has there already.
- Roles on one path add up, and a pool's roles add to those of its VMs.
- A token that was made without ``--privsep 0`` holds only what both its user and the token itself are granted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..config import Config

# docs/safety.md lists the request that needs each privilege. Tests run the life of a sandbox with these and no others.
SEE = ("VM.Audit", "Sys.Audit")
RUN = (
    "VM.Allocate",
    "VM.Audit",
    "VM.PowerMgmt",
    "VM.Config.Options",
    "VM.Config.CPU",
    "VM.Config.Memory",
    "VM.Config.Disk",
    "VM.Config.Network",
    "VM.Config.Cloudinit",
    "VM.GuestAgent.Audit",
)
CLONE = ("VM.Clone", "VM.Audit")
DISK = ("Datastore.AllocateSpace",)
# A storage with workspaces or snippets: Datastore.Allocate shows and deletes every volume there.
KEEP = ("Datastore.Allocate", "Datastore.AllocateSpace", "Datastore.Audit")
NET = ("SDN.Use",)
# Useful, not necessary: the first tells the doctor whether the pool exists, the second how full the storage is.
EXTRA = {"AgentlabRun": ("Pool.Audit",), "AgentlabDisk": ("Datastore.Audit",)}
# Bridges that no SDN zone manages belong to this one.
ZONE = "/sdn/zones/localnetwork"
# Whoever has one of these on / is an administrator of the cluster.
ADMINISTRATOR = ("Permissions.Modify", "Sys.Modify", "Sys.PowerMgmt", "User.Modify", "Realm.Allocate")
# The prefixes of the privileges that have an effect on a path of each kind. Our role must keep those.
_STAY = {"vms": ("VM.",), "pool": ("VM.", "Pool."), "storage": ("Datastore.",), "sdn": ("SDN.",)}
_DEFAULT_USER, _DEFAULT_TOKEN = "agentlab@pve", "ansible"


@dataclass(slots=True)
class Standing:
    """The roles, users, pool and ACL entries of Proxmox VE that these credentials may read. None: not known."""

    roles: dict[str, set[str]] | None = None
    users: set[str] | None = None
    pool: bool | None = None
    # ACL entries as GET /access/acl lists them
    entries: list[dict[str, object]] | None = None
    # The privileges that the login has now, by path
    held: dict[str, set[str]] = field(default_factory=dict)


def list_needed_privileges(
    config: Config,
    *,
    template: int | None,
    storage: str | None,
    release: str = "",
    workspaces: Iterable[str] = (),
    snippets: str | None = None,
) -> dict[str, tuple[str, ...]]:
    """Return the least privileges by path. A path that is not known (no template, no storage) is left out.

    ``workspaces`` are the storages that hold workspaces; ``snippets`` is the storage for user data, where it is used.
    """
    needed = {"/": SEE, choose_run_path(config): RUN}
    if template is not None:
        needed[f"/vms/{template}"] = CLONE
    if storage is not None:
        needed[f"/storage/{storage}"] = DISK
    for name in workspaces:
        needed[f"/storage/{name}"] = KEEP
    if snippets is not None:
        needed[f"/storage/{snippets}"] = KEEP
    needed[ZONE] = NET
    return {path: tuple(spell_privilege(name, release) for name in names) for path, names in needed.items()}


def make_pveum_commands(
    config: Config,
    *,
    template: int | None,
    storage: str | None,
    release: str = "",
    workspaces: Iterable[str] = (),
    snippets: str | None = None,
    standing: Standing | None = None,
) -> list[str]:
    """Return the commands with which root makes a token with the least privileges on a node.

    Roles, users and pools that exist are not made again. A command is left out if its path is not known (no template,
    no storage).
    """
    now = standing or Standing()
    user, token = _choose_login(config, now)
    needed = list_needed_privileges(
        config, template=template, storage=storage, release=release, workspaces=workspaces, snippets=snippets
    )
    granted = {path: _choose_role(config, path, names) for path, names in needed.items()}
    commands = [*([] if now.pool else make_pool_commands(config)), *_make_role_commands(granted, now)]
    if now.users is None or user not in now.users:
        commands.append(f"pveum user add {user}")
    commands += [f"pveum acl modify {path} --users {user} --roles {role}" for path, (role, _names) in granted.items()]
    return [*commands, f"pveum user token add {user} {token} --privsep 0"]


def make_repair_commands(
    config: Config, missing: Iterable[str], standing: Standing, needed: Mapping[str, tuple[str, ...]]
) -> list[str]:
    """Return the commands with which root gives this login its missing privileges on these paths.

    The login keeps every privilege that it has there. ``missing`` are the paths; ``needed`` the privileges by path.
    """
    login = config.proxmox
    granted = {}
    for path in missing:
        prefixes = _STAY.get(path.split("/")[1], ("",))
        stay = sorted(name for name in standing.held.get(path, set()) if name.startswith(prefixes))
        granted[path] = _choose_role(config, path, needed[path], stay)
    # We may not know yet whether the pool exists. AgentlabRun has Pool.Audit, so the next examination can tell.
    commands = [
        *(make_pool_commands(config) if standing.pool is False else []),
        *_make_role_commands(granted, standing),
    ]
    holders = [f"--users {login.user}"]
    if login.token_name:
        own = None if standing.entries is None else any(entry.get("ugid") == login.login for entry in standing.entries)
        nothing = not any(standing.held.values())
        if nothing and not own and not login.user.endswith("@pam"):
            # Proxmox VE separates the privileges of a new token by default. The user is ours, so the token may have
            # all privileges of the user.
            commands.insert(0, f"pveum user token modify {login.user} {login.token_name} --privsep 0")
        elif own or own is None or nothing:
            holders.append(f"--tokens '{login.login}'")
    if login.user == "root@pam":
        # root@pam has every privilege, and no ACL.
        holders = [holder for holder in holders if holder.startswith("--tokens")]
    commands += [
        f"pveum acl modify {path} {holder} --roles {role}"
        for path, (role, _names) in granted.items()
        for holder in holders
    ]
    if not login.token_name:
        commands.append(f"pveum user token add {login.user} {_DEFAULT_TOKEN} --privsep 0")
    return commands


def make_pool_commands(config: Config) -> list[str]:
    """Return the command that makes the pool of the configuration."""
    return [f"pveum pool add {config.pool}"] if config.pool else []


def satisfies(privileges: set[str], privilege: str) -> bool:
    """Return whether these privileges include the privilege.

    Proxmox VE accepts VM.Config.Network in place of VM.Config.Cloudinit.
    """
    return privilege in privileges or (privilege == "VM.Config.Cloudinit" and "VM.Config.Network" in privileges)


def choose_run_path(config: Config) -> str:
    """Return the path for the privileges on sandboxes: the pool's, or that of all VMs."""
    return f"/pool/{config.pool}" if config.pool else "/vms"


def _choose_role(
    config: Config, path: str, names: Iterable[str], stay: Iterable[str] = ()
) -> tuple[str, tuple[str, ...]]:
    """Return the name of the role that we grant on the path, and its privileges."""
    names = tuple(names)
    if path == choose_run_path(config):
        role = "AgentlabRun"
    elif path.startswith("/vms/"):
        role = "AgentlabClone"
    elif path.startswith("/storage/"):
        role = "AgentlabVolumes" if "Datastore.Allocate" in names else "AgentlabDisk"
    else:
        role = {"/": "AgentlabSee", "/vms": "AgentlabSeeVMs"}.get(path, "AgentlabNet")
    return role, tuple(dict.fromkeys((*names, *EXTRA.get(role, ()), *stay)))


def _choose_login(config: Config, standing: Standing) -> tuple[str, str]:
    """Return user and token for the commands: the configured ones, unless they are root's or an administrator's."""
    login = config.proxmox
    administrator = set(ADMINISTRATOR) & standing.held.get("/", set())
    if "@" in login.user and not login.user.endswith("@pam") and not administrator:
        return login.user, login.token_name or _DEFAULT_TOKEN
    return (_DEFAULT_USER if login.user != _DEFAULT_USER else "sandboxes@pve"), _DEFAULT_TOKEN


def _make_role_commands(granted: Mapping[str, tuple[str, tuple[str, ...]]], standing: Standing) -> list[str]:
    roles: dict[str, tuple[str, ...]] = {}
    for role, names in granted.values():
        roles[role] = tuple(dict.fromkeys((*roles.get(role, ()), *names)))
    commands = []
    for role, names in roles.items():
        present = (standing.roles or {}).get(role)
        if present is None:
            # In single quotes: the double ones would get backslashes in the output of Ansible, which is JSON.
            commands.append(f"pveum role add {role} --privs '{' '.join(names)}'")
        elif not present.issuperset(names):
            # Other logins may use the role, too, so it keeps its privileges.
            commands.append(f"pveum role modify {role} --privs '{' '.join((*names, *sorted(present - set(names))))}'")
    return commands


def spell_privilege(name: str, release: str) -> str:
    """Return the name of a privilege in this release of Proxmox VE: 9 split VM.Monitor up."""
    return "VM.Monitor" if name.startswith("VM.GuestAgent.") and release.startswith("8.") else name
