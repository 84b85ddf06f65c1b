# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Access rules of the Proxmox double: access control lists, tokens and the cluster's tag policy.

How a test switches each of them on (``pve`` is the double):

- ``pve.grant(user, path, *privileges)`` gives a role on a path. As in Proxmox VE, a role on a deeper path REPLACES
  every role that is inherited from above; several grants on one path add up; the roles of a pool add to those of its
  VMs and storages. ``pve.grant(user, path, ..., propagate=False)`` counts for that path alone.
- ``pve.no_access.add(path)`` gives everybody but root@pam the role NoAccess there.
- ``pve.add_token("agentlab@pve!ci", secret, privsep=True)`` makes a token with privilege separation: it holds what
  both its user and the token itself are granted. Without ``privsep`` grants for the user and for the token count
  alike.
- ``pve.use_access()`` returns users, roles and entries as Proxmox VE keeps them (support/access.py), with ``pveum``
  commands; then ``grant()`` no longer counts.
- ``pve.tag_access = "none"`` (or ``free``, ``existing``, ``list`` with ``pve.tag_allow_list = {...}``) and
  ``pve.registered_tags = {"reserved1"}`` restrict tags. They bind every user without Sys.Modify on ``/``, also before
  the first ``grant()``. `GET /cluster/options` tells `allowed-tags`.
"""

from __future__ import annotations

import re
from typing import Any

from aiohttp import web
from fakepve import FakePve, PveError
from fakepve import schema as pve_schema
from fakepve.server import USER
from fakepve.shapes import PRIVILEGES

from support.access import AccessControl, Entry

Grant = tuple[Any, ...]  # (path, privileges) or (path, privileges, propagate)
CLOUDINIT_KEY = re.compile(
    r"(ciuser|cipassword|citype|ciupgrade|cicustom|sshkeys|nameserver|searchdomain|ipconfig\d+)$"
)
CONFIG_PRIVS = (
    "VM.Config.Disk",
    "VM.Config.CDROM",
    "VM.Config.CPU",
    "VM.Config.Memory",
    "VM.Config.Network",
    "VM.Config.HWType",
    "VM.Config.Options",
    "VM.Config.Cloudinit",
)
# What the product needs on its own VMs; the template, the storage and the bridge come beside it.
SANDBOX_PRIVS = (
    "VM.Audit",
    "VM.Allocate",
    "VM.PowerMgmt",
    "VM.Config.Options",
    "VM.Config.Cloudinit",
    "VM.Config.CPU",
    "VM.Config.Memory",
    "VM.Config.Disk",
    "VM.Config.Network",
    "VM.Snapshot",
    "VM.Snapshot.Rollback",
    "VM.GuestAgent.Audit",
)


# Since Proxmox VE 8 everybody who is logged in may read (a part of) the cluster's options.
pve_schema.load().paths["/cluster/options"]["GET"]["permissions"] = {"user": "all"}


def split_tags(text: Any) -> list[str]:
    """Return the tags in a tags option, as written."""
    return [tag for tag in re.split(r"[;,\s]+", str(text or "")) if tag]


class AccessRules(FakePve):
    """Who may do what on the double. The module's docstring says how tests use it."""

    acl: dict[str, list[Grant]] | None
    apitokens: dict[str, str]
    pools: dict[str, set[int]]
    pool_info: dict[str, dict[str, Any]]
    vms: list[Any]

    def _reset_access(self) -> None:
        """Set everything that tests switch in this part."""
        # Paths on which everybody but root@pam has the role NoAccess.
        self.no_access: set[str] = set()
        # Tokens with privilege separation.
        self.separated: set[str] = set()
        # datacenter.cfg: user-tag-access (free, none, existing, or list, which is tag_allow_list) and registered-tags.
        self.tag_access = "free"
        self.tag_allow_list: set[str] = set()
        self.registered_tags: set[str] = set()
        # Users, roles and ACL entries, see use_access(). None: what grant() says counts.
        self.access: AccessControl | None = None

    # ------------------------------------------------------------------ access control lists

    def add_token(self, userid_tokenid: str, secret: str, privsep: bool = False) -> None:
        """Add an API token, e.g. add_token('agentlab@pve!test', secret). It may do anything until the first grant()."""
        if "!" not in userid_tokenid:
            raise ValueError("user@realm!name expected")
        self.apitokens[userid_tokenid] = secret
        (self.separated.add if privsep else self.separated.discard)(userid_tokenid)

    def grant(self, user: str, path: str, *privs: str, propagate: bool = True) -> None:
        """Give a user or token these privileges on a path ('/', '/vms', '/vms/100', '/pool/name', ...)."""
        if self.acl is None:
            self.acl = {}
        self.acl.setdefault(user, []).append((path.rstrip("/") or "/", set(privs), propagate))

    def grant_least(
        self,
        user: str,
        template: int = 9000,
        pool: str | None = None,
        vmids: tuple[int, ...] = (),
        storage: str = "local-lvm",
        bridge: str = "vmbr0",
    ) -> None:
        """Grant a user or token what the product needs and no more: on /vms, on a pool (made here), or on single VMIDs.

        Permissions count for everybody from now on.
        """
        if pool is not None and pool not in self.pools:
            self.pools[pool] = set()
            self._pool_meta(pool)
        where = [f"/pool/{pool}"] if pool else [f"/vms/{vmid}" for vmid in vmids] or ["/vms"]
        for path in where:
            self.grant(user, path, *SANDBOX_PRIVS)
        if pool:
            self.grant(user, f"/pool/{pool}", "Pool.Audit")
        self.grant(user, f"/vms/{template}", "VM.Audit", "VM.Clone")
        self.grant(user, f"/storage/{storage}", "Datastore.AllocateSpace", "Datastore.Audit")
        self.grant(user, f"/sdn/zones/localnetwork/{bridge}", "SDN.Use")

    def allowed(self, user: str, path: str, priv: str) -> bool:
        """Return whether a user or token holds a privilege on a path."""
        if self.access is None and user.split("!")[0] == "root@pam":
            return True
        if priv == "VM.Config.Cloudinit" and "VM.Config.Network" in self.privileges(user, path):
            return True
        return priv in self.privileges(user, path)

    def privileges(self, user: str, path: str) -> set[str]:
        """Return every privilege that a user or token holds on a path."""
        if self.access is not None:
            return self.access.held(user, path, [pool.removeprefix("/pool/") for pool in self._list_pool_paths(path)])
        if user.split("!")[0] == "root@pam":
            return set(PRIVILEGES)
        owner = user.split("!")[0]
        if user in self.separated:
            return self._add_up_grants((owner,), path) & self._add_up_grants((user,), path)
        return self._add_up_grants(tuple(dict.fromkeys((user, owner))), path)

    def _add_up_grants(self, names: tuple[str, ...], path: str) -> set[str]:
        """Return the privileges that grants for these names give on a path: its own roles, then those of its pools."""
        if self.acl is None:
            return set() if self.no_access & {path, *self._list_pool_paths(path)} else set(PRIVILEGES)
        held = self._walk_path(names, path)
        if held is None:
            return set()
        for pool in self._list_pool_paths(path):
            added = self._walk_path(names, pool)
            if added is None:
                return set()
            held = held | added
        return held

    def _walk_path(self, names: tuple[str, ...], path: str) -> set[str] | None:
        """Walk a path from the root: the deepest grant replaces all above it. Return None where that is NoAccess."""
        parts = [part for part in path.split("/") if part]
        steps = ["/", *("/" + "/".join(parts[: n + 1]) for n in range(len(parts)))]
        held: set[str] | None = set()
        for step in steps:
            here = [
                entry
                for name in names
                for entry in (self.acl or {}).get(name, ())
                if entry[0] == step and (step == steps[-1] or len(entry) < 3 or entry[2])
            ]
            if step in self.no_access:
                held = None
            elif here:
                held = set().union(*(set(entry[1]) for entry in here))
        return held

    def _list_pool_paths(self, path: str) -> list[str]:
        """Return the paths of the pools that the VM or the storage of a path belongs to."""
        kind, _slash, name = path.strip("/").partition("/")
        if kind == "vms" and name.isdigit():
            return [f"/pool/{pool}" for pool, vmids in self.pools.items() if int(name) in vmids]
        if kind == "storage" and name:
            return [f"/pool/{pool}" for pool, meta in self.pool_info.items() if name in (meta.get("storage") or ())]
        return []

    def revoke(self, user: str, path: str | None = None) -> None:
        """Take a user's grants away again (on one path)."""
        acl = self.acl or {}
        acl[user] = [entry for entry in acl.get(user, []) if path not in (None, entry[0])]
        self.acl = acl

    def use_access(self) -> AccessControl:
        """Let users, roles and ACL entries count from now on. Tokens that are known keep their secrets."""
        self.access = AccessControl(PRIVILEGES, tokens=dict.fromkeys(self.apitokens, True))
        self.access.users |= {token.partition("!")[0] for token in self.apitokens}
        self.acl = {}
        return self.access

    def _config_priv(self, key: str) -> str:
        return "VM.Config.Cloudinit" if CLOUDINIT_KEY.match(key) else super()._config_priv(key)

    def _vm(self, request: web.Request, priv: str | None = None) -> Any:
        """Return the VM; the caller's rights are checked first.

        Without the rights a VM that does not exist is answered with 403 as well.
        """
        path = "/vms/" + request.match_info["vmid"]
        if request.match_info["vmid"].isdigit():
            if priv:
                self.require(request[USER], path, priv)
            elif not any(self.allowed(request[USER], path, name) for name in CONFIG_PRIVS):
                raise PveError(403, f"Permission check failed ({path}, {'|'.join(CONFIG_PRIVS)})")
        return super()._vm(request, priv)

    def _routes_access(self) -> list[Any]:
        return [
            ("GET", "/access/permissions", self._permissions),
            ("GET", "/access/acl", self._acl),
            ("GET", "/access/roles", self._roles),
            ("GET", "/access/users", self._users),
            ("GET", "/cluster/options", self._cluster_options),
        ]

    async def _users(self, _values: dict[str, Any], user: str) -> list[dict[str, Any]]:
        """Return the users whose groups the caller may audit; without that right, the caller alone."""
        everybody = sorted(self.access.users) if self.access else []
        audit = self.allowed(user, "/access/groups", "Sys.Audit")
        return [{"userid": name, "enable": 1} for name in everybody if name == user or audit]

    async def _permissions(self, values: dict[str, Any], user: str) -> dict[str, dict[str, int]]:
        """Return what is in force on the paths that Proxmox VE knows, that have an entry, or that a pool has.

        Paths on which the user holds nothing are left out.
        Proxmox VE answers for a path that is asked for even where the user holds nothing there, and where nothing is.
        """
        who = values.get("userid") or user
        if values.get("path") is not None:
            return {values["path"]: dict.fromkeys(sorted(self._list_privileges(who, values["path"])), 1)}
        paths = {
            "/",
            "/access",
            "/access/groups",
            "/nodes",
            "/pool",
            "/sdn",
            "/storage",
            "/vms",
            *(entry["path"] for entry in self._list_entries()),
        }
        paths |= {f"/vms/{vmid}" for vmids in self.pools.values() for vmid in vmids}
        paths |= {f"/storage/{sid}" for meta in self.pool_info.values() for sid in meta.get("storage") or ()}
        held = {path: dict.fromkeys(sorted(self._list_privileges(who, path)), 1) for path in sorted(paths)}
        return {path: privs for path, privs in held.items() if privs}

    def _list_privileges(self, user: str, path: str) -> set[str]:
        """Return the privileges as Proxmox VE lists them."""
        # VM.Config.Network serves for cloud-init keys in the double's checks; Proxmox VE lists only what was granted.
        return {priv for priv in self.privileges(user, path) if priv in PRIVILEGES}

    async def _acl(self, _values: dict[str, Any], user: str) -> list[dict[str, Any]]:
        """Return everybody's entries to who has Sys.Audit on /access.

        To others none; Proxmox VE returns those whose rights the user may modify.
        """
        return self._list_entries() if self.allowed(user, "/access", "Sys.Audit") else []

    def _list_entries(self) -> list[dict[str, Any]]:
        """Return the entries of the ACL as the API lists them."""
        if self.access is not None:
            return [entry.public() for entry in self.access.entries]
        if self.acl is None and not self.no_access:
            # Everybody may do everything, so somebody has granted that: the real list is never empty for a user.
            return [Entry("/", "user", "agentlab@pve", "Administrator").public()]
        made = [
            {
                "path": entry[0],
                "type": "token" if "!" in user else "user",
                "ugid": user,
                "roleid": f"Role{number}",
                "propagate": int(len(entry) < 3 or bool(entry[2])),
            }
            for user, grants in (self.acl or {}).items()
            for number, entry in enumerate(grants)
        ]
        return made + [
            {"path": path, "type": "user", "ugid": "agentlab@pve", "roleid": "NoAccess", "propagate": 1}
            for path in sorted(self.no_access)
        ]

    async def _roles(self, _values: dict[str, Any], _user: str) -> list[dict[str, Any]]:
        """Return all roles. Every user that is logged in may read them."""
        roles: dict[str, set[str]] = {"Administrator": set(PRIVILEGES), "NoAccess": set()}
        if self.access is not None:
            roles = self.access.roles
        else:
            roles.update(
                {
                    f"Role{number}": set(entry[1])
                    for grants in (self.acl or {}).values()
                    for number, entry in enumerate(grants)
                }
            )
        return [
            {"roleid": name, "privs": ",".join(sorted(privs)), "special": int(name in ("Administrator", "NoAccess"))}
            for name, privs in sorted(roles.items())
        ]

    # ------------------------------------------------------------------ tags

    def _modifies_cluster(self, user: str) -> bool:
        """Return whether the tag policy does not bind a user. Before the first grant() it binds all but root@pam."""
        return user == "root@pam" or (self.acl is not None and self.allowed(user, "/", "Sys.Modify"))

    def _list_allowed_tags(self, user: str) -> set[str]:
        """Return `allowed-tags` of /cluster/options for a user."""
        privileged = self._modifies_cluster(user)
        kind = self.tag_access
        allowed: set[str] = set()
        if kind != "none" or privileged:
            allowed |= set(self.tag_allow_list)
        if kind in ("free", "existing") or privileged:
            for vm in self.vms:
                if self.allowed(user, f"/vms/{vm.vmid}", "VM.Audit"):
                    allowed |= set(split_tags(vm.config.get("tags")))
        return allowed | self.registered_tags if privileged else allowed - self.registered_tags

    def _check_tags(self, user: str, before: Any, after: Any) -> None:
        """Refuse a change of tags as Proxmox VE does. Only tags that change count, and they are compared as written."""
        if self._modifies_cluster(user):
            return
        allowed, free = self._list_allowed_tags(user), self.tag_access == "free"
        for tag in sorted(set(split_tags(before)) ^ set(split_tags(after))):
            if tag in self.registered_tags or not (free or tag in allowed):
                raise PveError(403, f"Permission check failed (/, Sys.Modify for modifying tag '{tag}')")

    async def _cluster_options(self, _values: dict[str, Any], user: str) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if self.allowed(user, "/", "Sys.Audit"):
            options = {"description": "", "mac_prefix": "BC:24:11"}
            if self.tag_access != "free":
                options["user-tag-access"] = {"user-allow": self.tag_access}
            if self.tag_allow_list:
                options.setdefault("user-tag-access", {})["user-allow-list"] = sorted(self.tag_allow_list)
            if self.registered_tags:
                options["registered-tags"] = sorted(self.registered_tags)
        return {**options, "allowed-tags": sorted(self._list_allowed_tags(user))}
