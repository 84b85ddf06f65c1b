# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The quickstart of docs/daemon.md as a script: its files are written, its commands are run, in the order in which
they stand.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[3] / "docs/daemon.md"


def main() -> int:
    part = PAGE.read_text().split("<!-- quickstart -->")[1].split("<!-- /quickstart -->")[0]
    print("set -euxo pipefail")
    name = ""
    # A paragraph that begins with a name, or a block.
    for found, kind, text in re.findall(r"^`([\w.]+)`|^```(\w+)\n(.*?)^```$", part, re.M | re.S):
        if found:
            name = found
        elif kind == "yaml":
            print(f"cat > {name} <<'END-OF-FILE'\n{text}END-OF-FILE")
        else:
            for line in text.splitlines():
                if not line.startswith("# "):
                    sys.exit(f"{line!r} is no command")
                print(line.removeprefix("# "))
    return 0


if __name__ == "__main__":
    sys.exit(main())
