# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Split pasted paths as the modules split their lists: ``split_paths.py VALUE``.

VALUE is a text or a list of texts, as JSON. Prints the paths as a JSON list. The playbook runs it on the controller
with the Python of Ansible.
"""

from __future__ import annotations

import json
import os
import sys

FOLDER = os.path.dirname(os.path.realpath(__file__))

if __name__ == "__main__":
    # The core imports nothing of Ansible, so that a path to it is enough.
    sys.path.insert(0, os.path.join(FOLDER, "..", "..", "plugins", "module_utils"))
    from _core.patterns import split_lines

    print(json.dumps(split_lines(json.loads(sys.argv[1]))))
