# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Check values of a job with the rules of the modules that get them later: ``check_job_values.py VALUES``.

VALUES is a JSON object of ``job_ttl`` and ``job_workspace_size``; an empty text is no value. Prints a JSON object:
``{"problem": "..."}`` with one sentence that begins with the variable, or ``{"problem": ""}``. The playbook runs it on
the controller with the Python of Ansible.
"""

from __future__ import annotations

import json
import os
import sys

FOLDER = os.path.dirname(os.path.realpath(__file__))


def check(values: dict[str, str]) -> str:
    """Return what is wrong with the first value that is wrong, "" when all are right."""
    from _core import durations
    from _core.errors import InvalidInput
    from _core.workspaces import workspace

    try:
        if values.get("job_ttl"):
            durations.parse(values["job_ttl"], "job_ttl")
        if values.get("job_workspace_size"):
            workspace.parse_size(values["job_workspace_size"], "job_workspace_size")
    except InvalidInput as error:
        return error.message
    return ""


if __name__ == "__main__":
    # The core imports nothing of Ansible, so that a path to it is enough.
    sys.path.insert(0, os.path.join(FOLDER, "..", "..", "plugins", "module_utils"))
    print(json.dumps({"problem": check(json.loads(sys.argv[1]))}))
