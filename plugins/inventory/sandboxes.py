# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Make a host of every live sandbox in the records. Sends no request to Proxmox VE."""

from __future__ import annotations

DOCUMENTATION = r"""
name: sandboxes
short_description: Sandboxes of agentlab as hosts, from its records
description:
  - Makes a host of every live sandbox, with its state, lease, owner, profile and tags as variables.
  - Reads the records, from their database or from the daemon. It asks Proxmox VE nothing and changes nothing.
  - The name of the file must end in C(agentlab.yml) or C(agentlab.yaml), such as C(lab.agentlab.yml).
version_added: 1.0.0
author:
  - agentlab.proxmox contributors (@agentlab)
options:
  plugin:
    description: The name of this plugin.
    type: str
    required: true
    choices: [agentlab.proxmox.sandboxes]
  database:
    description:
      - The records of the controller, as the option O(database) of the modules. A relative path begins in the folder
        of the inventory file.
      - The environment variable E(AGENTLAB_DATABASE) is used when neither this nor O(socket) is set, then the
        configuration file, then V(/var/lib/agentlab/agentlab.db).
    type: str
  database_password:
    description: Password of a PostgreSQL database.
    type: str
    env:
      - name: AGENTLAB_DATABASE_PASSWORD
  socket:
    description:
      - Socket of the daemon C(agentlabd) on this host, such as V(/run/agentlab/agentlabd.sock). The daemon is asked
        instead of the database.
      - For users of the group C(agentlab), who may use the socket and not read the database.
    type: str
  config_file:
    description:
      - Configuration file of agentlab that names the database. A relative path begins in the folder of the inventory
        file.
      - The environment variable E(AGENTLAB_CONFIG) is used when the option is not set, then
        V(/etc/agentlab/config.yaml).
    type: str
  timeout:
    description: Seconds that the daemon may take to answer.
    type: int
    default: 30
  states:
    description: Only sandboxes in these states. Every live sandbox unless set.
    type: list
    elements: str
    choices: [REQUESTED, PROVISIONING, BOOTING, READY, RUNNING, SUSPENDED, COMPLETED, FAILED, TIMEOUT, STOPPED]
  connection:
    description:
      - How tasks get into a sandbox.
      - V(address) sets C(ansible_host) to the address in the record. A sandbox without an address is reached by its
        name.
      - V(sandbox) sets C(ansible_connection) to C(agentlab.proxmox.sandbox) and C(ansible_host) to the VMID. That
        needs neither network nor SSH.
      - V(auto) takes what C(connection) of the sandbox's profile says; without that the address where the record has
        one, and the connection plugin otherwise.
    type: str
    choices: [auto, address, sandbox]
    default: auto
  host_prefix:
    description:
      - Text before the name of every host. Whoever creates a sandbox chooses its name.
      - A prefix keeps sandboxes apart from hosts of the same name in other inventory sources, whose variables they
        would share.
    type: str
    default: ''
extends_documentation_fragment:
  - constructed
  - inventory_cache
requirements:
  - python >= 3.11
  - PyYAML
notes:
  - "Variables of a host: C(agentlab_vmid), C(agentlab_uuid), C(agentlab_state), C(agentlab_lease_expires_at),
    C(agentlab_owner) (who created the sandbox), C(agentlab_profile), C(agentlab_tags), C(agentlab_node),
    C(agentlab_ip), C(agentlab_ip_seen_at), C(agentlab_workspace_id), C(agentlab_protected), C(agentlab_keepalive),
    C(agentlab_created_at).
    Times are in UTC. What the record does not have is null."
  - Text that users wrote (names, tags, owners) is never taken for a template.
  - A tag or a name proves nothing. To stop, change or destroy sandboxes use the modules, which prove first whose VM
    it is.
seealso:
  - module: agentlab.proxmox.agentlab_sandbox_info
"""

EXAMPLES = r"""
# lab.agentlab.yml: every live sandbox of the records on this host
plugin: agentlab.proxmox.sandboxes
groups:
  sandboxes: true
  running: agentlab_state == 'RUNNING'
keyed_groups:
  - {key: agentlab_tags, prefix: tag}
  - {key: agentlab_profile, prefix: profile}
  - {key: agentlab_owner, prefix: owner}
compose:
  ansible_user: "'debian'"

# Another file: ask the daemon, keep the answer for a minute, and use neither network nor SSH
# plugin: agentlab.proxmox.sandboxes
# socket: /run/agentlab/agentlabd.sock
# states: [RUNNING]
# connection: sandbox
# cache: true
# cache_plugin: ansible.builtin.jsonfile
# cache_connection: ~/.cache/agentlab
# cache_timeout: 60
"""

import hashlib
import http.client
import json
import os
import socket
from collections.abc import Callable, Mapping
from typing import Any

from ansible.errors import AnsibleParserError
from ansible.plugins.inventory import BaseInventoryPlugin, Cacheable, Constructable
from ansible.utils.path import unfrackpath

from ..module_utils._core import config as core_config
from ..module_utils._core.context import Context
from ..module_utils._core.errors import AgentlabError
from ..module_utils._core.views import info

make_unsafe: Callable[[Any], Any]
try:
    from ansible.utils.unsafe_proxy import wrap_var as make_unsafe
except ImportError:

    def make_unsafe(value: Any) -> Any:
        """Return the value unchanged: from ansible-core 2.19 on, text from a plugin is never a template."""
        return value


# ansible_host, and the variables with text from a user, a guest or Proxmox VE.
_OF_OTHERS = ("agentlab_owner", "agentlab_tags", "agentlab_profile", "agentlab_node", "agentlab_ip", "ansible_host")
_VARIABLES = (
    "vmid",
    "uuid",
    "state",
    "lease_expires_at",
    "owner",
    "profile",
    "tags",
    "node",
    "ip",
    "ip_seen_at",
    "workspace_id",
    "protected",
    "keepalive",
    "created_at",
)
_THROUGH_AGENT = "agentlab.proxmox.sandbox"
# Names of Ansible's own hosts and groups.
_RESERVED = ("localhost", "all", "ungrouped")
_LARGEST_ANSWER = 64 * 1024 * 1024


class _DaemonConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str, timeout: int) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class InventoryModule(BaseInventoryPlugin, Constructable, Cacheable):
    """Make a host of each sandbox in the records."""

    NAME = "agentlab.proxmox.sandboxes"

    def verify_file(self, path: str) -> bool:
        """Return whether the file name has one of this plugin's endings."""
        return bool(super().verify_file(path)) and path.endswith(("agentlab.yml", "agentlab.yaml"))

    def parse(self, inventory: Any, loader: Any, path: str, cache: bool = True) -> None:
        """Add a host for each sandbox of the chosen states. Raises AnsibleParserError, which says what to change."""
        super().parse(inventory, loader, path, cache)
        unknown = sorted(set(map(str, self._read_config_data(path))) - set(self.get_options()) - {"plugin"})
        if unknown:
            raise AnsibleParserError(
                f"{unknown[0]}: is no option of this plugin. Valid: {', '.join(sorted(self.get_options()))}"
            )
        if self.get_option("timeout") < 1:
            raise AnsibleParserError(
                f"timeout: {self.get_option('timeout')} is no time to wait. Valid: a number of seconds from 1 on"
            )
        read, source = self._choose_source(os.path.dirname(os.path.abspath(path)))
        chosen_states = self.get_option("states")
        for sandbox in self._load_sandboxes(path, source, read, cache):
            if not chosen_states or sandbox["state"] in chosen_states:
                self._add_host(sandbox)

    def _choose_source(self, folder: str) -> tuple[Callable[[], list[dict[str, Any]]], str]:
        """Return the function that reads the sandboxes, and the name of its source."""
        path = self.get_option("socket")
        if path:
            if self.get_option("database") or self.get_option("config_file"):
                raise AnsibleParserError(
                    "socket: is set, and so is database or config_file; the daemon has one database of its own. "
                    "Give socket alone, or leave it out"
                )
            path = _make_absolute(path, folder)
            return lambda: self._ask_daemon(path), f"socket {path}"
        options = {name: _make_absolute(self.get_option(name), folder) for name in ("database", "config_file")}
        options["database_password"] = self.get_option("database_password")
        try:
            config = core_config.load(options, os.environ)
        except AgentlabError as error:
            raise AnsibleParserError(error.message) from None
        return lambda: _read_records(config), f"database {config.database}"

    def _load_sandboxes(
        self, path: str, source: str, read: Callable[[], list[dict[str, Any]]], cache: bool
    ) -> list[dict[str, Any]]:
        """Return the sandboxes, from the cache if one is in use and has them."""
        if not self.get_option("cache"):
            return read()
        # The source is part of the key, so that data of another database is never used for this one.
        key = f"{self.get_cache_key(path)}_{hashlib.sha256(source.encode()).hexdigest()[:10]}"
        self.load_cache_plugin()
        if cache:
            try:
                kept = self._cache[key]
            except KeyError:
                kept = None
            if _are_sandboxes(kept):
                return kept
        sandboxes = read()
        self._cache[key] = sandboxes
        return sandboxes

    def _ask_daemon(self, path: str) -> list[dict[str, Any]]:
        """Return the sandboxes in the daemon's list. Raises AnsibleParserError."""
        connection = _DaemonConnection(path, self.get_option("timeout"))
        try:
            connection.request("GET", "/v1/sandboxes?owner=true", headers={"Accept": "application/json"})
            response = connection.getresponse()
            text = response.read(_LARGEST_ANSWER + 1)
        except (OSError, http.client.HTTPException) as error:
            raise AnsibleParserError(_explain_failure(path, error)) from None
        finally:
            connection.close()
        answer: Any = None
        if len(text) <= _LARGEST_ANSWER:
            try:
                answer = json.loads(text)
            except ValueError:
                pass
        if not isinstance(answer, dict):
            answer = {}
        if response.status == 400 and "owner" in str(answer.get("error")):
            raise AnsibleParserError(
                f"socket: the daemon behind {path} is older than this collection and cannot tell the owners of "
                "sandboxes; upgrade it with the role agentlab.proxmox.agentlabd"
            )
        if response.status != 200 and isinstance(answer.get("error"), str):
            raise AnsibleParserError(f"socket: the daemon behind {path} answers {response.status}: {answer['error']}")
        if response.status != 200 or not _are_sandboxes(answer.get("sandboxes")):
            raise AnsibleParserError(
                f"socket: the answer of {path} (status {response.status}) is no list of sandboxes; give the socket of "
                f"agentlabd, {core_config.DEFAULTS['socket']} unless configured otherwise"
            )
        sandboxes: list[dict[str, Any]] = answer["sandboxes"]
        return sandboxes

    def _add_host(self, sandbox: Mapping[str, Any]) -> None:
        """Add the host of one sandbox with its variables, and apply keyed_groups, groups and compose."""
        name = f"{self.get_option('host_prefix')}{sandbox['name']}"
        if name in _RESERVED:
            self.display.warning(
                f"sandbox {sandbox['vmid']} is named {sandbox['name']!r}, which means something else to Ansible; "
                "it is left out of the inventory. Set host_prefix to have it as a host"
            )
            return
        variables = {f"agentlab_{key}": sandbox.get(key) for key in _VARIABLES}
        way = self.get_option("connection")
        profile = sandbox.get("connection") if way == "auto" else None
        if way == "sandbox" or profile == _THROUGH_AGENT or (way == "auto" and not profile and not sandbox.get("ip")):
            variables["ansible_connection"] = _THROUGH_AGENT
            variables["ansible_host"] = str(sandbox["vmid"])
        else:
            if profile:
                variables["ansible_connection"] = profile
            if sandbox.get("ip"):
                variables["ansible_host"] = sandbox["ip"]
        for key in _OF_OTHERS:
            if variables.get(key) is not None:
                variables[key] = make_unsafe(variables[key])
        self.inventory.add_host(name)
        for key, value in variables.items():
            self.inventory.set_variable(name, key, value)
        strict = self.get_option("strict")
        self._set_composite_vars(self.get_option("compose"), variables, name, strict=strict)
        self._add_host_to_composed_groups(self.get_option("groups"), variables, name, strict=strict)
        self._add_host_to_keyed_groups(self.get_option("keyed_groups"), variables, name, strict=strict)


def _make_absolute(path: str | None, folder: str) -> str | None:
    """Return the path, relative to the inventory file's folder. A URL stays unchanged."""
    if not path or "://" in path:
        return path
    return str(unfrackpath(os.path.join(folder, os.path.expanduser(path)), follow=False))


def _read_records(config: core_config.Config) -> list[dict[str, Any]]:
    """Return the live sandboxes in the records. Creates, migrates and writes nothing."""
    if "://" not in config.database and not os.path.exists(config.database):
        raise AnsibleParserError(
            f"database: there is no file {config.database}; name the database of the controller with the option "
            "database or AGENTLAB_DATABASE, or set socket to ask the daemon. The first sandbox creates the file"
        )
    try:
        context = Context(config, actor="inventory", dry_run=True)
        try:
            sandboxes: list[dict[str, Any]] = info.show(context, info.Filter(), owner=True)["sandboxes"]
            return sandboxes
        finally:
            context.close()
    except AgentlabError as error:
        raise AnsibleParserError(error.message) from None


def _are_sandboxes(value: Any) -> bool:
    """Return whether the value is a list of sandboxes in the API's form."""
    return isinstance(value, list) and all(
        isinstance(sandbox, dict)
        and isinstance(sandbox.get("vmid"), int)
        and isinstance(sandbox.get("name"), str)
        and sandbox["name"]
        and isinstance(sandbox.get("state"), str)
        for sandbox in value
    )


def _explain_failure(path: str, error: Exception) -> str:
    """Return why the daemon did not answer, and what to do."""
    if isinstance(error, PermissionError):
        return f"socket: this user may not use {path}; add the user to the group agentlab and log in again"
    if isinstance(error, (FileNotFoundError, NotADirectoryError, ConnectionRefusedError)):
        return (
            f"socket: nothing listens on {path}; start the daemon (systemctl start agentlabd), correct the path, "
            "or leave socket out to read the database"
        )
    if isinstance(error, TimeoutError):
        return f"socket: the daemon behind {path} did not answer in time; see journalctl -u agentlabd, or raise timeout"
    return f"socket: no answer from {path} ({error or error.__class__.__name__}); see journalctl -u agentlabd"
