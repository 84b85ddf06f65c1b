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
  - Runs a command in a sandbox through the QEMU guest agent. Needs neither an address nor a network nor SSH.
  - The VM is proven to be the sandbox's before and after the command. The sandbox must be READY or RUNNING, with a
    lease that is not over.
  - A command runs once. A request whose answer was lost is repeated, which never begins the command again.
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
    description: The program and its arguments. No shell is involved; arguments may have any characters but NUL.
    type: list
    elements: str
  cmd:
    description: A command for C(/bin/sh) of the guest.
    type: str
  stdin:
    description: Standard input of the command, written as O(encoding) says (no line feed is added). Empty unless set.
    type: str
  chdir:
    description: Folder to change to first. The home of the user unless set.
    type: str
  environment:
    description: Environment variables, beside the few that the guest agent has (such as E(PATH)).
    type: dict
  user:
    description: Name or id of the user of the guest who runs the command. The user of the guest agent (C(root))
      unless set.
    type: str
  creates:
    description: Path or pattern. Where it exists in the guest the command is not run.
    type: str
  removes:
    description: Path or pattern. Where it does not exist in the guest the command is not run.
    type: str
  timeout:
    description:
      - Seconds, or a duration (V(90s), V(10m), V(2h)), after which the command and its process group are ended
        (C(TERM), then C(KILL)).
      - V(0) sets no limit; the command ends with the sandbox then.
    type: str
    default: "60"
  kill_after:
    description: Seconds between C(TERM) and C(KILL).
    type: int
    default: 5
  max_output:
    description: Bytes of standard output, and as many of standard error, that are kept. What is beyond is dropped,
      and RV(truncated) says so.
    type: int
    default: 1048576
  encoding:
    description:
      - How O(stdin) is read, and how the output becomes text. Bytes that are no such text become C(U+FFFD).
      - With V(base64) O(stdin) is base64, and the output is returned as base64, byte for byte.
    type: str
    choices: [utf-8, latin-1, base64]
    default: utf-8
  secret:
    description:
      - Whether O(stdin) and the values of O(environment) are secret. They are kept out of what Ansible shows and logs
        then, also where the output holds them, or a line of them of eight characters or more.
      - A value of fewer than four characters is hidden in the options alone. Half of all words and numbers contain
        it, so that hiding it in the output would hide those.
      - Other output is returned and shown. C(no_log) of the task hides all of it.
      - Without O(api_host) such a command is refused where the VM is on another node, because C(pvesh) would show
        it in the process list.
    type: bool
    default: false
  log_command:
    description: Whether the event in the record has the whole command. It has the name of the program only unless set.
    type: bool
    default: false
  wait_for_agent:
    description: Seconds to wait for a guest agent that does not answer yet, such as just after a start.
    type: int
    default: 0
  action:
    description:
      - With V(run) the command is run, and its end is waited for.
      - With V(start) the command is begun, and goes on by itself until O(timeout), which should be set.
      - V(status) tells the state of the run O(run_id) and its output so far, V(wait) waits for its end (at most
        O(timeout)), V(kill) ends it.
    type: str
    choices: [run, start, status, wait, kill]
    default: run
  run_id:
    description:
      - UUID of the run. Needed with O(action=status), O(action=wait) and O(action=kill).
      - With O(action=run) and O(action=start) a run of that id which was begun before is not begun again; its
        result is returned.
    type: str
extends_documentation_fragment:
  - agentlab.proxmox.common
  - agentlab.proxmox.common.attributes
attributes:
  check_mode:
    description: Looks whether the sandbox may be used, and runs nothing.
    support: full
  diff_mode:
    description: A command has no difference to tell.
    support: none
"""

EXAMPLES = r"""
- name: Run a program
  agentlab.proxmox.agentlab_exec:
    vmid: 1000
    argv: [git, clone, https://example.org/project.git, /srv/project]
    creates: /srv/project/.git

- name: Run a command as a user, with a secret by standard input
  agentlab.proxmox.agentlab_exec:
    name: agent-1
    cmd: ./login --password-stdin && make test
    chdir: /srv/project
    user: agent
    stdin: "{{ password }}"
    secret: true
    timeout: 20m

- name: Begin something that runs for hours
  agentlab.proxmox.agentlab_exec:
    vmid: 1000
    argv: [/usr/local/bin/agent, --task, "{{ task }}"]
    action: start
    timeout: 6h
  register: agent

- name: Wait for its end
  agentlab.proxmox.agentlab_exec:
    vmid: 1000
    action: wait
    run_id: "{{ agent.run_id }}"
    timeout: 6h
"""

RETURN = r"""
rc:
  description: Exit status of the command; 128 and the number of a signal that ended it.
  returned: when the command has ended
  type: int
signal:
  description: Number of the signal that ended the command, where the guest's shell tells it apart from an exit status.
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
  description: Standard output by lines.
  returned: always
  type: list
  elements: str
stderr_lines:
  description: Standard error by lines.
  returned: always
  type: list
  elements: str
truncated:
  description: Whether there was more output than O(max_output).
  returned: always
  type: bool
timed_out:
  description: Whether O(timeout) ended the command.
  returned: always
  type: bool
duration_ms:
  description: Milliseconds that the command took in the guest.
  returned: always
  type: int
run_id:
  description: Id of the run.
  returned: always
  type: str
state:
  description: C(ended), C(running), or C(skipped) because of O(creates) or O(removes). C(would_run) in check mode.
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
