# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Run Ansible tasks inside a sandbox through its guest agent, without network or SSH.

Works only for a sandbox whose VM is proven to be ours.
"""

from __future__ import annotations

DOCUMENTATION = r"""
name: sandbox
short_description: Run tasks inside a sandbox through its guest agent
description:
  - Runs any task inside a sandbox of agentlab without network and without SSH, through the QEMU guest agent of its VM.
  - Before and after each command and each file the VM is proven to be the sandbox's. A sandbox whose lease is over, or
    that does not run, is unreachable.
  - Commands run as root unless O(remote_user) names another user of the guest.
  - Works where the records are, on the host that runs Ansible - with the database of a daemon there, or with records on
    PostgreSQL.
version_added: 1.0.0
author:
  - agentlab.proxmox contributors (@agentlab)
options:
  remote_addr:
    description:
      - Name or VMID of the sandbox. The name of the host in the inventory unless C(ansible_host) is set.
    type: str
    default: inventory_hostname
    vars:
      - name: inventory_hostname
      - name: ansible_host
      - name: ansible_agentlab_host
  vmid:
    description: VMID of the sandbox, in place of O(remote_addr). Set by the inventory plugin of the collection.
    type: int
    vars:
      - name: agentlab_vmid
  uuid:
    description:
      - UUID of the sandbox. With it another sandbox that got the same name or VMID since is refused.
      - Set by the inventory plugin of the collection.
    type: str
    vars:
      - name: agentlab_uuid
  remote_user:
    description: User of the guest that commands run as; root unless set.
    type: str
    vars:
      - name: ansible_user
    keyword:
      - name: remote_user
  executable:
    description: Shell of the guest that runs commands.
    type: str
    default: /bin/sh
    ini:
      - {section: agentlab, key: executable}
    env:
      - name: AGENTLAB_CONNECTION_EXECUTABLE
    vars:
      - name: ansible_agentlab_executable
  agent_timeout:
    description: Seconds to wait for a guest agent that does not answer, as that of a guest that boots.
    type: int
    default: 10
    ini:
      - {section: agentlab, key: agent_timeout}
    env:
      - name: AGENTLAB_CONNECTION_AGENT_TIMEOUT
    vars:
      - name: ansible_agentlab_agent_timeout
  command_timeout:
    description:
      - Seconds that one command may take. It is ended in the guest then, and the task fails. V(0) for no limit but
        the lease.
      - The keyword C(timeout) of a task ends the task only, and the command goes on in the guest.
    type: int
    default: 0
    ini:
      - {section: agentlab, key: command_timeout}
    env:
      - name: AGENTLAB_CONNECTION_COMMAND_TIMEOUT
    vars:
      - name: ansible_agentlab_command_timeout
  max_output:
    description: Bytes of standard output, and of standard error, that a command may write. More makes the task fail.
    type: int
    default: 67108864
    ini:
      - {section: agentlab, key: max_output}
    env:
      - name: AGENTLAB_CONNECTION_MAX_OUTPUT
    vars:
      - name: ansible_agentlab_max_output
  pipelining:
    description:
      - Send a module to the guest's Python as standard input. Without it each task copies the module into a file first,
        and the guest keeps nothing of it for the next task.
      - Ansible copies a file all the same for C(async) tasks, with C(become_method=su), for modules that are not in
        Python, and with E(ANSIBLE_KEEP_REMOTE_FILES).
      - It is on whatever the section C(connection) of C(ansible.cfg) says. Only the places below switch it off.
    type: bool
    default: true
    ini:
      - {section: agentlab, key: pipelining}
    env:
      - name: ANSIBLE_PIPELINING
    vars:
      - name: ansible_pipelining
      - name: ansible_agentlab_pipelining
  config_file:
    description: Configuration file of agentlab on the host that runs Ansible; V(/etc/agentlab/config.yaml) unless set.
    type: path
    ini:
      - {section: agentlab, key: config_file}
    env:
      - name: AGENTLAB_CONFIG
    vars:
      - name: ansible_agentlab_config_file
  database:
    description: The records, as the option O(database) of the modules.
    type: str
    ini:
      - {section: agentlab, key: database}
    env:
      - name: AGENTLAB_DATABASE
      - name: AGENTLAB_RECORDS
    vars:
      - name: ansible_agentlab_database
  database_password:
    description: Password of a PostgreSQL database.
    type: str
    env:
      - name: AGENTLAB_DATABASE_PASSWORD
    vars:
      - name: ansible_agentlab_database_password
  api_host:
    description: Node of Proxmox VE. Without it C(pvesh) of this host is used, which must be a node then.
    type: str
    ini:
      - {section: agentlab, key: api_host}
    env:
      - name: PROXMOX_HOST
      - name: AGENTLAB_API_HOST
    vars:
      - name: ansible_agentlab_api_host
  api_port:
    description: Port of the API; V(8006) unless set.
    type: int
    ini:
      - {section: agentlab, key: api_port}
    env:
      - name: PROXMOX_PORT
      - name: AGENTLAB_API_PORT
    vars:
      - name: ansible_agentlab_api_port
  api_user:
    description: User with realm; V(root@pam) unless set.
    type: str
    ini:
      - {section: agentlab, key: api_user}
    env:
      - name: PROXMOX_USER
      - name: AGENTLAB_API_USER
    vars:
      - name: ansible_agentlab_api_user
  api_password:
    description: Password of O(api_user). A token is better.
    type: str
    env:
      - name: PROXMOX_PASSWORD
      - name: AGENTLAB_API_PASSWORD
    vars:
      - name: ansible_agentlab_api_password
  api_token_id:
    description: Name of an API token, as V(name) or as V(user@realm!name).
    type: str
    ini:
      - {section: agentlab, key: api_token_id}
    env:
      - name: PROXMOX_TOKEN_ID
      - name: AGENTLAB_API_TOKEN_ID
    vars:
      - name: ansible_agentlab_api_token_id
  api_token_secret:
    description: Secret of O(api_token_id).
    type: str
    env:
      - name: PROXMOX_TOKEN_SECRET
      - name: AGENTLAB_API_TOKEN_SECRET
    vars:
      - name: ansible_agentlab_api_token_secret
  validate_certs:
    description: Whether the certificate of the API is verified; V(true) unless set.
    type: bool
    ini:
      - {section: agentlab, key: validate_certs}
    env:
      - name: PROXMOX_VALIDATE_CERTS
      - name: AGENTLAB_API_VALIDATE_CERTS
    vars:
      - name: ansible_agentlab_validate_certs
  ca_path:
    description: CA certificate to verify the API with.
    type: path
    ini:
      - {section: agentlab, key: ca_path}
    env:
      - name: PROXMOX_CA_PATH
      - name: AGENTLAB_API_CA_PATH
    vars:
      - name: ansible_agentlab_ca_path
  api_timeout:
    description: Seconds that one request may take; V(30) unless set.
    type: int
    ini:
      - {section: agentlab, key: api_timeout}
    env:
      - name: PROXMOX_API_TIMEOUT
    vars:
      - name: ansible_agentlab_api_timeout
  actor:
    description: Who acts, for the events of the sandbox. The user who runs Ansible unless set.
    type: str
    vars:
      - name: agentlab_actor
notes:
  - The privilege VM.GuestAgent.Unrestricted (Proxmox VE 8 - VM.Monitor) is needed.
  - The guest needs a POSIX shell for raw commands and files, and Python for modules, as with any other connection.
  - Where C(remote_user) is not root and the become method asks for a password, only C(sudo) works. As root no become
    method asks for one.
"""

EXAMPLES = r"""
# A play that creates a sandbox and works inside it
- name: Create a sandbox
  hosts: localhost
  gather_facts: false
  tasks:
    - name: A sandbox for two hours
      agentlab.proxmox.agentlab_sandbox:
        name: agent-1
        template: debian-13
        ttl: 2h
        state: present

    - name: The sandbox becomes a host
      ansible.builtin.add_host:
        name: agent-1
        ansible_connection: agentlab.proxmox.sandbox
        ansible_python_interpreter: /usr/bin/python3

- name: Work inside the sandbox, without network and SSH
  hosts: agent-1
  gather_facts: false
  tasks:
    - name: Wait for the guest agent of a guest that boots
      ansible.builtin.wait_for_connection:
        timeout: 120

    - name: Copy a file
      ansible.builtin.copy:
        content: "Read this first.\n"
        dest: /srv/task.md
        mode: "0644"

    - name: Run a command
      ansible.builtin.command: cat /srv/task.md
      changed_when: false

# boxes.yml: sandboxes that exist, as hosts by name and by VMID
# all:
#   hosts:
#     agent-1:
#     build:
#       ansible_host: 1001
#   vars:
#     ansible_connection: agentlab.proxmox.sandbox
#     ansible_python_interpreter: /usr/bin/python3
#
# ansible -i boxes.yml all -m ansible.builtin.ping
"""

import contextlib
import os
import secrets
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from typing import IO, Any, TypeVar

from ansible.errors import AnsibleConnectionFailure, AnsibleError, AnsibleFileNotFound
from ansible.module_utils.common.text.converters import to_bytes, to_text
from ansible.plugins.connection import ConnectionBase
from ansible.utils.display import Display

from ..module_utils import _adapter
from ..module_utils._core import config as core_config
from ..module_utils._core.context import Context
from ..module_utils._core.errors import AgentlabError, NotFound
from ..module_utils._core.guest import command, files
from ..module_utils._core.model import Sandbox

display = Display()
Self = TypeVar("Self", bound="Connection")

_CORE_OPTIONS = tuple(name for name in _adapter.COMMON_ARGS if name != "actor")
# Errors that prove that nothing was run. Ansible then marks the host as unreachable, and the next task may retry.
_UNREACHABLE = ("guest_agent", "not_found", "state_conflict", "busy", "proxmox_unreachable", "proxmox_access")
# Gives sudo the become password, only if sudo asks for it. The password comes in the environment of this shell, which
# sudo does not pass on. printf is part of the shell, so no process list shows the password.
_WITH_PASSWORD = """\
secret=$AGENTLAB_BECOME; unset AGENTLAB_BECOME
if {check} >/dev/null 2>&1 </dev/null; then {command}
else {{ printf '%s\\n' "$secret"; cat; }} | {{ unset secret; {command}; }}
fi"""


class Connection(ConnectionBase):
    """A connection to a sandbox through the guest agent of its VM."""

    transport = "agentlab.proxmox.sandbox"
    has_pipelining = True
    has_tty = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._context: Context | None = None
        self._sandbox: Sandbox | None = None

    # ---- the interface of a connection plugin ----

    def _connect(self: Self) -> Self:
        """Find the sandbox in the records. Sends no request to the guest."""
        if not self._connected:
            with _as_ansible_errors():
                options = {name: self.get_option(name) for name in _CORE_OPTIONS}
                config = core_config.load(options, os.environ)
                actor = _adapter.name_actor(self.get_option("actor"), f"connection {self.transport}")
                self._context = Context(config, actor=actor)
                self._sandbox = self._find_sandbox(self._context)
            display.vvv(f"SANDBOX {self._sandbox.vmid} ({self._sandbox.name})", host=self._host)
            self._connected = True
        return self

    def exec_command(self, cmd: str, in_data: bytes | None = None, sudoable: bool = True) -> tuple[int, bytes, bytes]:
        """Run a command in the guest's shell. Return its exit status, standard output and standard error.

        For a command ended by a signal the status is 128 plus the number of the signal, as in a shell.
        """
        super().exec_command(cmd, in_data=in_data, sudoable=sudoable)
        context, sandbox = self._require_connection()
        text, environment = self._add_password(to_text(cmd, errors="surrogate_or_strict"), sudoable)
        display.vvv(f"EXEC {cmd!r}", host=self._host)
        spec = command.CommandSpec(
            argv=[self.get_option("executable"), "-c", text.encode("utf-8", "surrogateescape")],
            stdin=in_data or b"",
            environment=environment,
            user=self._user,
            timeout=self.get_option("command_timeout"),
            max_output=self.get_option("max_output"),
            secret=bool(in_data or environment),
            wait_for_agent=self.get_option("agent_timeout"),
        )
        with _as_ansible_errors():
            result = command.run_command(context, sandbox, spec)
        if result.timed_out:
            raise AnsibleError(
                f"the command did not end within {self.get_option('command_timeout')} s (command_timeout) and was "
                f"ended in sandbox {sandbox.vmid}; raise ansible_agentlab_command_timeout, or use async for long "
                f"work. It had written: {_quote_tail(result.stdout + result.stderr)}"
            )
        if result.truncated and result.message:
            raise AnsibleError(result.message)
        if result.truncated:
            raise AnsibleError(
                f"the command wrote more than {self.get_option('max_output')} bytes (max_output); raise "
                "ansible_agentlab_max_output, or let it write to a file and fetch that"
            )
        status = result.rc if result.rc is not None else 128 + (result.signal or 0)
        if result.refusal is not None:
            raise AnsibleConnectionFailure(self._explain_refusal(sandbox, result.refusal))
        if status and sudoable and environment:
            # The output of a module may contain the same words.
            self._check_password(result.stderr)
        return status, result.stdout, result.stderr

    def put_file(self, in_path: str, out_path: str) -> None:
        """Copy a file into the guest byte for byte, completely or not at all."""
        super().put_file(in_path, out_path)
        context, sandbox = self._require_connection()
        display.vvv(f"PUT {in_path} TO {out_path}", host=self._host)
        if not os.path.exists(to_bytes(in_path, errors="surrogate_or_strict")):
            raise AnsibleFileNotFound(f"there is no file {in_path!r} to copy into the sandbox")
        target = to_text(out_path, errors="surrogate_or_strict")
        with _as_ansible_errors(), open(to_bytes(in_path, errors="surrogate_or_strict"), "rb") as source:
            files.put_file(context, sandbox, source, target, owner=self._user)

    def fetch_file(self, in_path: str, out_path: str) -> None:
        """Copy a file out of the guest byte for byte.

        A file at ``out_path`` is replaced once all bytes have arrived.
        """
        super().fetch_file(in_path, out_path)
        context, sandbox = self._require_connection()
        display.vvv(f"FETCH {in_path} TO {out_path}", host=self._host)
        target = to_text(out_path, errors="surrogate_or_strict")
        # The file has no name yet, so nothing of it stays when Ansible ends this process in the middle of the copy.
        with _as_ansible_errors(), _open_unnamed(target) as file:
            files.fetch_file(context, sandbox, to_text(in_path, errors="surrogate_or_strict"), file)
            file.flush()
            _replace_file(target, file)

    def reset(self) -> None:
        """Close the connection, so that the next task looks the sandbox up again."""
        self.close()

    def close(self) -> None:
        """Close the records."""
        if self._context is not None:
            self._context.close()
        self._context = self._sandbox = None
        self._connected = False

    # ---- the sandbox ----

    @property
    def _host(self) -> str:
        return str(self.get_option("remote_addr"))

    @property
    def _user(self) -> str | None:
        return self.get_option("remote_user") or None

    def _explain_refusal(self, sandbox: Sandbox, refusal: str) -> str:
        """Return why the guest refuses the user of the connection.

        The host then counts as unreachable, as with SSH. The result of a failed command would not help, because
        wait_for_connection does not show it.
        """
        if refusal == "no_user":
            return (
                f"sandbox {sandbox.vmid} has no user {self._user}; name one that it has (ansible_user, job_user), or "
                "none for root"
            )
        return (
            f"the guest agent of sandbox {sandbox.vmid} does not run as root, so nothing can run as {self._user}; "
            "leave the user out (ansible_user, job_user), or run the agent as root"
        )

    def _require_connection(self) -> tuple[Context, Sandbox]:
        """Connect if need be, and return the context and the sandbox. Raises AnsibleConnectionFailure."""
        self._connect()
        if self._context is None or self._sandbox is None:
            raise AnsibleConnectionFailure("the connection to the sandbox was closed; run again")
        return self._context, self._sandbox

    def _find_sandbox(self, context: Context) -> Sandbox:
        """Return the record of the configured sandbox. Raises NotFound, or AnsibleError with what is wrong."""
        vmid, uuid, name = self.get_option("vmid"), self.get_option("uuid"), self._host
        if uuid:
            sandbox = context.records.get(uuid)
            if vmid is not None and sandbox.vmid != vmid:
                raise AnsibleError(
                    f"agentlab_vmid: {vmid} is not the VMID of the sandbox with agentlab_uuid {uuid}, which has "
                    f"{sandbox.vmid}; read the inventory anew (--flush-cache)"
                )
            return sandbox
        if vmid is None and name.isascii() and name.isdecimal() and len(name) < 10:
            vmid = int(name)
        return context.select_sandbox(vmid=vmid) if vmid is not None else context.select_sandbox(name=name)

    # ---- become ----

    def _add_password(self, cmd: str, sudoable: bool) -> tuple[str, dict[str, str]]:
        """Return the command and its environment, with the become password if the become method may ask for it."""
        password = self.become.get_option("become_pass") if self.become is not None and sudoable else None
        # root needs no password to become another user.
        if self.become is None or not password or self._user in (None, "root"):
            return cmd, {}
        if self.become.name.rpartition(".")[2] != "sudo":
            raise AnsibleError(
                f"become_method: {self.become.name} asks user {self._user} for a password on a terminal, and there is "
                "none. Use sudo, or leave ansible_user out: root needs no password"
            )
        user = self.become.get_option("become_user") or "root"
        check = f"sudo -n -u {shlex.quote(user)} {shlex.quote(self.get_option('executable'))} -c :"
        return _WITH_PASSWORD.format(check=check, command=cmd), {"AGENTLAB_BECOME": to_text(password)}

    def _check_password(self, output: bytes) -> None:
        """Raise AnsibleError if the output says that the become password is wrong."""
        if self.become is None:
            return
        if self.become.check_incorrect_password(output) or b"incorrect password attempt" in output:
            raise AnsibleError(f"become_password: {self.become.name} of the guest refuses it for user {self._user}")


@contextlib.contextmanager
def _as_ansible_errors() -> Iterator[None]:
    """Turn errors of the core into Ansible's.

    Unreachable: certainly nothing was run, or the guest went down while a command ran. The latter is what SSH says,
    and what ansible.builtin.reboot expects. Otherwise the task fails.
    """
    try:
        yield
    except AgentlabError as error:
        message = error.message
        if isinstance(error, NotFound):
            message += ". Give the name or the VMID of a sandbox as the host's name or as ansible_host"
        is_unreachable = error.code in _UNREACHABLE or error.detail.get("guest_ended")
        raise (AnsibleConnectionFailure if is_unreachable else AnsibleError)(message) from None
    except OSError as error:
        raise AnsibleError(f"{error.filename or 'file'}: {error.strerror or error}; mend path or permissions") from None


def _is_special(path: str) -> bool:
    """Return whether the path is a device, a pipe or a socket."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def _open_unnamed(target: str) -> IO[bytes]:
    """Return a new file without a name, open for reading and writing, in the folder of ``target``.

    For a device or a pipe the folder is that of temporary files: only root may make files in /dev. Raises OSError.
    """
    folder = None if _is_special(target) else os.path.dirname(os.path.realpath(target))
    try:
        if folder is None:
            return tempfile.TemporaryFile()
        # Not tempfile: it adds O_EXCL, and such a file can never get a name.
        return os.fdopen(os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600), "w+b")
    except (OSError, AttributeError):
        # The file system, or the system (macOS), has no files without a name.
        return tempfile.TemporaryFile(dir=folder)


def _replace_file(target: str, source: IO[bytes]) -> None:
    """Replace ``target`` by a file without a name, in one step. Write to a device or a pipe instead.

    A link stays, and the file that it leads to is replaced. Raises OSError.
    """
    if _is_special(target):
        source.seek(0)
        with os.fdopen(os.open(target, os.O_WRONLY), "wb") as special:
            shutil.copyfileobj(source, special)
        return
    target = os.path.realpath(target)
    # The source is readable for its owner only. Give it the mode of the old file, or else of a new file by the umask.
    umask = os.umask(0o077)
    os.umask(umask)
    mode = os.stat(target).st_mode & 0o7777 if os.path.exists(target) else 0o666 & ~umask
    os.fchmod(source.fileno(), mode)
    fresh = os.path.join(os.path.dirname(target), f".agentlab-{secrets.token_hex(8)}")
    try:
        try:
            # The path is absolute, so src_dir_fd does not matter. But with it Python calls linkat with
            # AT_SYMLINK_FOLLOW, which links the file itself and not the symbolic link in /proc.
            os.link(f"/proc/self/fd/{source.fileno()}", fresh, src_dir_fd=source.fileno(), follow_symlinks=True)
        except (OSError, NotImplementedError):
            # Some file systems cannot give a name to a file without one. Then copy the file.
            source.seek(0)
            with os.fdopen(os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as copy:
                shutil.copyfileobj(source, copy)
                os.fchmod(copy.fileno(), mode)
        os.replace(fresh, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(fresh)
        raise


def _quote_tail(output: bytes) -> str:
    """Return the end of the output for a message."""
    return repr(output[-500:].decode("utf-8", "replace"))
