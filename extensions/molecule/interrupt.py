# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""interrupt.py TASK COMMAND...: run ansible-playbook, and kill it when it comes to that task.

Exit status 1 when it never does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys


def main(task: str, command: list[str]) -> int:
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    assert run.stdout is not None
    reached = False
    for line in run.stdout:
        print(line, end="", flush=True)
        # All hosts are done with the task before when this line is written.
        if line.startswith("TASK [") and line.partition("]")[0].endswith(f" : {task}"):
            reached = True
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
