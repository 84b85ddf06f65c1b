#!/usr/bin/python
# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: agentlab_exec
short_description: Run a command in a sandbox
version_added: 1.0.0
description:
  - Runs a command in a sandbox through the QEMU guest agent. The sandbox needs no address, no network and no SSH.
  - Before and after the command, the module proves that the VM belongs to the sandbox. The sandbox must be READY or
    RUNNING, with a lease that is not over.
  - A command runs once. If an answer is lost the module repeats the request, which never starts the command again.
  - The guest needs C(qemu-guest-agent) and a POSIX shell with coreutils and util-linux, or busybox. Windows guests
    are not supported.
options:
  vmid:
    description: VMID of the sandbox.
    type: int
  name:
    description: Name of the sandbox.
    type: str
  argv:
    description: The program and its arguments. No shell reads them. Arguments may have any characters but NUL.
    type: list
    elements: str
  cmd:
    description: A command for C(/bin/sh) in the guest.
    type: str
  stdin:
    description: Standard input of the command, in the form that O(encoding) names. No line feed is added. Without this
      option, the input is empty.
    type: str
  chdir:
    description: Folder in which the command runs. Without this option, the home of the user.
    type: str
  environment:
    description: Environment variables, in addition to the few that the guest agent sets (such as E(PATH)).
    type: dict
  user:
    description: Name or id of the user in the guest who runs the command. Without this option, the user of the guest
      agent (C(root)).
    type: str
  creates:
    description: Path or pattern. If it exists in the guest, the command does not run.
    type: str
  removes:
    description: Path or pattern. If it does not exist in the guest, the command does not run.
    type: str
  timeout:
    description:
      - Seconds, or a duration (V(90s), V(10m), V(2h)), after which the command and its process group get the signal
        C(TERM), then C(KILL).
      - V(0) sets no limit. The command then ends with the sandbox at the latest.
    type: str
    default: "60"
  kill_after:
    description: Seconds between C(TERM) and C(KILL).
    type: int
    default: 5
  max_output:
    description: Bytes of standard output to return, and as many bytes of standard error. Further output is dropped,
      and RV(truncated) is V(true).
    type: int
    default: 1048576
  encoding:
    description:
      - Encoding of O(stdin) and of the output. Bytes that are not valid in the encoding become C(U+FFFD).
      - With V(base64), O(stdin) is base64, and the output is returned as base64, byte for byte.
    type: str
    choices: [utf-8, latin-1, base64]
    default: utf-8
  secret:
    description:
      - Whether O(stdin) and the values of O(environment) are secret. Ansible then neither shows nor logs them. The
        output is also cleared of the secrets, and of each line of eight characters or more in a secret.
      - A value of fewer than four characters is hidden only in the options. Such a value is part of many words and
        numbers, and hiding it in the output would damage them.
      - Other output is returned and shown. To hide all output, set C(no_log) of the task.
      - Without O(api_host), the module refuses a secret command if the VM is on another node, because C(pvesh) would
        show the secret in the process list.
    type: bool
    default: false
  log_command:
    description: Whether the event in the record contains the whole command. Otherwise it contains only the name of the
      program.
    type: bool
    default: false
  wait_for_agent:
    description: Seconds to wait for a guest agent that does not answer yet, for example just after a start.
    type: int
    default: 0
  action:
    description:
      - V(run) runs the command and waits for its end.
      - V(start) starts the command and does not wait. The command runs for at most O(timeout), so set that option.
      - V(status) returns the state of the run O(run_id) and its output so far. V(wait) waits for its end, at most
        O(timeout). V(kill) ends it.
    type: str
    choices: [run, start, status, wait, kill]
    default: run
  run_id:
    description:
      - UUID of the run. Required with O(action=status), O(action=wait) and O(action=kill).
      - With O(action=run) and O(action=start), a run with this id that was started before is not started again. The
        module returns its result.
    type: str
extends_documentation_fragment:
  - agentlab.proxmox.common
  - agentlab.proxmox.common.attributes
attributes:
  check_mode:
    description: Checks whether the sandbox can be used, and runs nothing.
    support: full
  diff_mode:
    description: A command has no difference to show.
    support: none
"""

EXAMPLES = r"""
- name: Run a program
  agentlab.proxmox.agentlab_exec:
    vmid: 1000
    argv: [git, clone, https://example.org/project.git, /srv/project]
    creates: /srv/project/.git

- name: Run a command as a user, with a secret on standard input
  agentlab.proxmox.agentlab_exec:
    name: agent-1
    cmd: ./login --password-stdin && make test
    chdir: /srv/project
    user: agent
    stdin: "{{ password }}"
    secret: true
    timeout: 20m

- name: Start a command that runs for hours
  agentlab.proxmox.agentlab_exec:
    vmid: 1000
    argv: [/usr/local/bin/agent, --task, "{{ task }}"]
    action: start
    timeout: 6h
  register: agent

- name: Wait for the end of the command
  agentlab.proxmox.agentlab_exec:
    vmid: 1000
    action: wait
    run_id: "{{ agent.run_id }}"
    timeout: 6h
"""

RETURN = r"""
rc:
  description: Exit status of the command. If a signal ended the command, 128 plus the number of the signal.
  returned: when the command has ended
  type: int
signal:
  description: Number of the signal that ended the command, if the guest's shell can tell it from an exit status.
  returned: always
  type: int
stdout:
  description: Standard output.
  returned: always
  type: str
stderr:
  description: Standard error.
  returned: always
  type: str
stdout_lines:
  description: Lines of the standard output.
  returned: always
  type: list
  elements: str
stderr_lines:
  description: Lines of the standard error.
  returned: always
  type: list
  elements: str
truncated:
  description: Whether the command wrote more output than O(max_output).
  returned: always
  type: bool
timed_out:
  description: Whether O(timeout) ended the command.
  returned: always
  type: bool
duration_ms:
  description: Run time of the command in the guest, in milliseconds.
  returned: always
  type: int
run_id:
  description: UUID of the run.
  returned: always
  type: str
state:
  description: V(ended), V(running), or V(skipped) because of O(creates) or O(removes). In check mode V(would_run).
  returned: always
  type: str
vmid:
  description: VMID of the sandbox.
  returned: always
  type: int
"""

from ansible_collections.agentlab.proxmox.plugins.module_utils import _adapter


class SecretModule(_adapter.AnsibleModule):
    """An AnsibleModule that collects the secrets in options before its constructor logs the options."""

    def _log_invocation(self):
        from ansible_collections.agentlab.proxmox.plugins.module_utils import _exec

        params = self.params
        self.no_log_values.update(_exec.find_secrets(params))
        self.params = _exec.hide_options(params)
        super()._log_invocation()
        self.params = params


ARGUMENT_SPEC = {
    "vmid": {"type": "int"},
    "name": {"type": "str"},
    "argv": {"type": "list", "elements": "str"},
    "cmd": {"type": "str"},
    "stdin": {"type": "str"},
    "chdir": {"type": "str"},
    "environment": {"type": "dict"},
    "user": {"type": "str"},
    "creates": {"type": "str"},
    "removes": {"type": "str"},
    "timeout": {"type": "str", "default": "60"},
    "kill_after": {"type": "int", "default": 5},
    "max_output": {"type": "int", "default": 1048576},
    "encoding": {"type": "str", "choices": ["utf-8", "latin-1", "base64"], "default": "utf-8"},
    "secret": {"type": "bool", "default": False, "no_log": False},
    "log_command": {"type": "bool", "default": False},
    "wait_for_agent": {"type": "int", "default": 0},
    "action": {"type": "str", "choices": ["run", "start", "status", "wait", "kill"], "default": "run"},
    "run_id": {"type": "str"},
}


def run_module(module, context):
    from ansible_collections.agentlab.proxmox.plugins.module_utils import _exec

    return _exec.run(module, context)


def main(module_class=SecretModule):
    _adapter.run(
        ARGUMENT_SPEC,
        run_module,
        module_class=module_class,
        mutually_exclusive=[("argv", "cmd")],
        required_one_of=[("vmid", "name")],
        required_if=[
            ("action", "run", ("argv", "cmd"), True),
            ("action", "start", ("argv", "cmd"), True),
            ("action", "status", ("run_id",)),
            ("action", "wait", ("run_id",)),
            ("action", "kill", ("run_id",)),
        ],
    )


if __name__ == "__main__":
    main()
