# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Users, tokens, roles and ACL entries as Proxmox VE keeps them, and its command pveum.

The double uses them, and so do tests of commands that we print.

The rules are those of the real pve-access-control: a role on a deeper path replaces what is inherited, roles on one
path add up, a pool's roles add to those of its VMs, and a token with privilege separation has what both it and its user
have.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

_PATH = re.compile(r"/|/vms|/(access|nodes|pool|storage)(/[\w.-]+)?|/vms/\d+|/sdn(/zones(/[\w.-]+){0,3})?")
# Privileges that the product knows; Administrator has them all, and these besides.
ADMINISTRATOR = {"Permissions.Modify", "Sys.Modify", "Sys.PowerMgmt", "User.Modify", "Realm.Allocate"}


class Refused(Exception):
    """What pveum prints when it does nothing."""


@dataclass(slots=True)
class Entry:
    """One line of the ACL."""

    path: str
    kind: str
    who: str
    role: str

    def public(self) -> dict[str, Any]:
        """Return the entry as the API lists it."""
        return {"path": self.path, "type": self.kind, "ugid": self.who, "roleid": self.role, "propagate": 1}


@dataclass
class AccessControl:
    """What /etc/pve/user.cfg holds. ``tokens`` says of each whether it is separated from its user."""

    privileges: Iterable[str]
    roles: dict[str, set[str]] = field(default_factory=dict)
    users: set[str] = field(default_factory=lambda: {"root@pam"})
    tokens: dict[str, bool] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.roles.setdefault("Administrator", {*self.privileges, *ADMINISTRATOR})
        self.roles.setdefault("NoAccess", set())

    # ---- who may do what ----

    def held(self, who: str, path: str, pools: Iterable[str] = ()) -> set[str]:
        """Return the privileges in force for a user or token on a path.

        ``pools`` are those that the VM of the path is in.
        """
        user = who.partition("!")[0]
        if who == "root@pam":
            return set(self.roles["Administrator"])
        own = set(self.roles["Administrator"]) if user == "root@pam" else self._granted(user, path, pools)
        if self.tokens.get(who):
            return own & self._granted(who, path, pools)
        return own

    def _granted(self, who: str, path: str, pools: Iterable[str]) -> set[str]:
        roles = self._on(who, path)
        for pool in pools:
            roles = roles | self._on(who, f"/pool/{pool}")
        return roles

    def _on(self, who: str, path: str) -> set[str]:
        parts = [part for part in path.split("/") if part]
        roles: set[str] = set()
        for depth in range(len(parts) + 1):
            here = {
                entry.role for entry in self.entries if entry.who == who and entry.path == "/" + "/".join(parts[:depth])
            }
            if here:
                roles = here
        return set() if "NoAccess" in roles else set().union(*(self.roles.get(role, set()) for role in roles))

    # ---- pveum ----

    def pveum(self, pve: Any, line: str) -> None:
        """Do what the command line says, as root's shell would; Refused in Proxmox VE's words."""
        program, kind, *words = shlex.split(line)
        if program != "pveum":
            raise Refused(f"{program}: not pveum")
        if kind == "user" and words[0] == "token":
            kind, words = "token", words[1:]
        verb, *words = words
        options = {words[index][2:]: words[index + 1] for index in range(len(words)) if words[index].startswith("--")}
        names = [
            word
            for index, word in enumerate(words)
            if not word.startswith("--") and (not index or not words[index - 1].startswith("--"))
        ]
        getattr(self, f"_{kind}")(pve, verb, names, options)

    def _pool(self, pve: Any, verb: str, names: list[str], _options: dict[str, str]) -> None:
        if verb != "add" or names[0] in pve.pools:
            raise Refused(f"create pool failed: pool '{names[0]}' already exists")
        pve.pools[names[0]] = set()
        pve.pool_info[names[0]] = {"comment": None, "storage": set()}

    def _role(self, _pve: Any, verb: str, names: list[str], options: dict[str, str]) -> None:
        if verb == "add" and names[0] in self.roles:
            raise Refused(f"create role failed: role '{names[0]}' already exists")
        if verb == "modify" and names[0] not in self.roles:
            raise Refused(f"role '{names[0]}' does not exist")
        wanted = set(options["privs"].split())
        unknown = wanted - set(self.privileges)
        if unknown:
            raise Refused(f"invalid privilege '{sorted(unknown)[0]}'")
        self.roles[names[0]] = wanted

    def _user(self, _pve: Any, verb: str, names: list[str], _options: dict[str, str]) -> None:
        if verb != "add" or names[0] in self.users:
            raise Refused(f"create user failed: user '{names[0]}' already exists")
        self.users.add(names[0])

    def _token(self, _pve: Any, verb: str, names: list[str], options: dict[str, str]) -> None:
        token = f"{names[0]}!{names[1]}"
        if names[0] not in self.users:
            raise Refused(f"no such user ('{names[0]}')")
        if (verb == "add") == (token in self.tokens):
            raise Refused(
                "400 Parameter verification failed. tokenid: Token already exists"
                if verb == "add"
                else f"no such token '{names[1]}'"
            )
        self.tokens[token] = (
            options.get("privsep", "1" if verb == "add" else str(int(self.tokens.get(token, True)))) == "1"
        )

    def _acl(self, _pve: Any, verb: str, names: list[str], options: dict[str, str]) -> None:
        path = names[0]
        if verb != "modify" or not _PATH.fullmatch(path):
            raise Refused(f"400 Parameter verification failed. path: invalid ACL path '{path}'")
        for role in options["roles"].split(","):
            if role not in self.roles:
                raise Refused(f"role '{role}' does not exist")
            for kind, known in (("users", self.users), ("tokens", self.tokens)):
                for who in filter(None, options.get(kind, "").split(",")):
                    if who not in known:
                        raise Refused(f"no such {kind[:-1]} '{who}'")
                    entry = Entry(path, kind[:-1], who, role)
                    if entry not in self.entries:
                        self.entries.append(entry)
