# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Split pasted paths as the modules split their lists: ``split_paths.py VALUE``.

VALUE is a text or a list of texts, as JSON. Prints the paths as a JSON list. The playbook runs it on the controller
with the Python of Ansible. A path may hold blanks and commas. So these separate paths only where the next word begins
as an absolute path does, and only in lines of a text: the items of a list are paths already.
"""

from __future__ import annotations

import json
import os
import re
import sys
from typing import Any

FOLDER = os.path.dirname(os.path.realpath(__file__))


def split(value: Any) -> list[str]:
    """Return the paths of a text or of a list of texts."""
    from _core.patterns import split_lines

    lines = split_lines(value)
    if not isinstance(value, str) or value.strip().startswith("["):
        return lines
    words = (word.strip().rstrip(",;") for line in lines for word in re.split(r"(?:[,;]\s*|\s+)(?=[\"']?~?/)", line))
    return [path for word in words if word for path in split_lines(word)]


if __name__ == "__main__":
    # The core imports nothing of Ansible, so that a path to it is enough.
    sys.path.insert(0, os.path.join(FOLDER, "..", "..", "plugins", "module_utils"))
    print(json.dumps(split(json.loads(sys.argv[1]))))
