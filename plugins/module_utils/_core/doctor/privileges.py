# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""The privileges that our requests need, by path, and the ``pveum`` commands that grant them.

Proxmox VE's rules decide how the commands are written (pve-access-control 9, tried):

- A role on a deeper path replaces the roles that are inherited from the paths above it. So a role that we grant on
  a path holds everything that is needed there, and everything that the login holds there already.
- Roles on one path add up, and a pool's roles add to those of its VMs.
- A token that was made without ``--privsep 0`` holds only what both its user and the token itself are granted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..config import Config

# docs/safety.md says for which request each is needed. Tests run the life of a sandbox with these and no others.
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
# Privileges that count on a path of that kind, and so have to stay there.
_STAY = {"vms": ("VM.",), "pool": ("VM.", "Pool."), "storage": ("Datastore.",), "sdn": ("SDN.",)}
_DEFAULT_USER, _DEFAULT_TOKEN = "agentlab@pve", "ansible"


@dataclass(slots=True)
class Standing:
    """What Proxmox VE has already, as far as these credentials may read it. None: not known."""

    roles: dict[str, set[str]] | None = None
    users: set[str] | None = None
    pool: bool | None = None
    # ACL entries as GET /access/acl lists them
    entries: list[dict[str, object]] | None = None
    # What the login holds now, by path
    held: dict[str, set[str]] = field(default_factory=dict)


def needs(
    config: Config,
    *,
    template: int | None,
    storage: str | None,
    release: str = "",
    workspaces: Iterable[str] = (),
    snippets: str | None = None,
) -> dict[str, tuple[str, ...]]:
    """Return the least privileges by path. Paths that are not known (no template, no storage) are left out.

    ``workspaces`` are the storages that hold workspaces; ``snippets`` is the storage for user data, where it is used.
    """
    needed = {"/": SEE, run_path(config): RUN}
    if template is not None:
        needed[f"/vms/{template}"] = CLONE
    if storage is not None:
        needed[f"/storage/{storage}"] = DISK
    for name in workspaces:
        needed[f"/storage/{name}"] = KEEP
    if snippets is not None:
        needed[f"/storage/{snippets}"] = KEEP
    needed[ZONE] = NET
    return {path: tuple(spell(name, release) for name in names) for path, names in needed.items()}


def pveum_commands(
    config: Config,
    *,
    template: int | None,
    storage: str | None,
    release: str = "",
    workspaces: Iterable[str] = (),
    snippets: str | None = None,
    standing: Standing | None = None,
) -> list[str]:
    """Return what root runs on a node to make a token with the least privileges.

    What there is already is not made again. Commands whose names are not known (no template, no storage) are left out.
    """
    now = standing or Standing()
    user, token = _new_login(config, now)
    needed = needs(
        config, template=template, storage=storage, release=release, workspaces=workspaces, snippets=snippets
    )
    granted = {path: _role(config, path, names) for path, names in needed.items()}
    commands = [*([] if now.pool else pool_commands(config)), *_role_commands(granted, now)]
    if now.users is None or user not in now.users:
        commands.append(f"pveum user add {user}")
    commands += [f"pveum acl modify {path} --users {user} --roles {role}" for path, (role, _names) in granted.items()]
    return [*commands, f"pveum user token add {user} {token} --privsep 0"]


def repair_commands(
    config: Config, missing: Iterable[str], standing: Standing, needed: Mapping[str, tuple[str, ...]]
) -> list[str]:
    """Return what root runs on a node so that this login gets what it lacks on these paths, and loses nothing there."""
    login = config.proxmox
    granted = {}
    for path in missing:
        prefixes = _STAY.get(path.split("/")[1], ("",))
        stay = sorted(name for name in standing.held.get(path, set()) if name.startswith(prefixes))
        granted[path] = _role(config, path, needed[path], stay)
    # Whether the pool exists may not be known yet; AgentlabRun has Pool.Audit, so the next examination tells.
    commands = [*(pool_commands(config) if standing.pool is False else []), *_role_commands(granted, standing)]
    holders = [f"--users {login.user}"]
    if login.token_name:
        own = None if standing.entries is None else any(entry.get("ugid") == login.login for entry in standing.entries)
        nothing = not any(standing.held.values())
        if nothing and not own and not login.user.endswith("@pam"):
            # Proxmox VE's default for a new token. Its user is ours, so the token may have all that the user has.
            commands.insert(0, f"pveum user token modify {login.user} {login.token_name} --privsep 0")
        elif own or own is None or nothing:
            holders.append(f"--tokens '{login.login}'")
    if login.user == "root@pam":
        # root@pam holds everything and has no ACL.
        holders = [holder for holder in holders if holder.startswith("--tokens")]
    commands += [
        f"pveum acl modify {path} {holder} --roles {role}"
        for path, (role, _names) in granted.items()
        for holder in holders
    ]
    if not login.token_name:
        commands.append(f"pveum user token add {login.user} {_DEFAULT_TOKEN} --privsep 0")
    return commands


def pool_commands(config: Config) -> list[str]:
    """Return the command that makes the pool of the configuration."""
    return [f"pveum pool add {config.pool}"] if config.pool else []


def satisfies(privileges: set[str], privilege: str) -> bool:
    """Return whether these privileges serve for that one.

    Proxmox VE takes VM.Config.Network in place of VM.Config.Cloudinit.
    """
    return privilege in privileges or (privilege == "VM.Config.Cloudinit" and "VM.Config.Network" in privileges)


def run_path(config: Config) -> str:
    """Return the path on which sandboxes are worked on: the pool's, or that of all VMs."""
    return f"/pool/{config.pool}" if config.pool else "/vms"


def _role(config: Config, path: str, names: Iterable[str], stay: Iterable[str] = ()) -> tuple[str, tuple[str, ...]]:
    """Return the name of the role that we grant on the path, and its privileges."""
    names = tuple(names)
    if path == run_path(config):
        role = "AgentlabRun"
    elif path.startswith("/vms/"):
        role = "AgentlabClone"
    elif path.startswith("/storage/"):
        role = "AgentlabVolumes" if "Datastore.Allocate" in names else "AgentlabDisk"
    else:
        role = {"/": "AgentlabSee", "/vms": "AgentlabSeeVMs"}.get(path, "AgentlabNet")
    return role, tuple(dict.fromkeys((*names, *EXTRA.get(role, ()), *stay)))


def _new_login(config: Config, standing: Standing) -> tuple[str, str]:
    """Return user and token for the commands: the configured ones, unless they are root's or an administrator's."""
    login = config.proxmox
    administrator = set(ADMINISTRATOR) & standing.held.get("/", set())
    if "@" in login.user and not login.user.endswith("@pam") and not administrator:
        return login.user, login.token_name or _DEFAULT_TOKEN
    return (_DEFAULT_USER if login.user != _DEFAULT_USER else "sandboxes@pve"), _DEFAULT_TOKEN


def _role_commands(granted: Mapping[str, tuple[str, tuple[str, ...]]], standing: Standing) -> list[str]:
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
            # Others may have the role, too: what it has stays.
            commands.append(f"pveum role modify {role} --privs '{' '.join((*names, *sorted(present - set(names))))}'")
    return commands


def spell(name: str, release: str) -> str:
    """Return a privilege as this release of Proxmox VE calls it: 9 split VM.Monitor up."""
    return "VM.Monitor" if name.startswith("VM.GuestAgent.") and release.startswith("8.") else name
