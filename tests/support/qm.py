# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A stand-in for ``qm guest exec VMID --pass-stdin 1 --synchronous 0 -- ARG...`` on "node" pve1.

It speaks to the double.

As the source of qemu-server 9.2 says: input-data is read from standard input, at most 1 MiB; the answer is JSON on
several lines; a VM of another node is unknown here.
"""

from __future__ import annotations

import json
import sys

from pvesh import THIS_NODE, Double

LARGEST_INPUT = 1024 * 1024


def main() -> int:
    """Answer one call of qm, and return its exit status."""
    words = sys.argv[1:]
    if words[:2] != ["guest", "exec"] or words[3:8] != ["--pass-stdin", "1", "--synchronous", "0", "--"]:
        print(f"ERROR: unknown command 'qm {' '.join(words[:2])}'", file=sys.stderr)
        return 255
    vmid, argv, data = words[2], words[8:], sys.stdin.read(LARGEST_INPUT + 1)
    if len(data) > LARGEST_INPUT:
        print("Input to STDIN exceeds 1048576 bytes", file=sys.stderr)
        return 255
    values = {"command": argv, **({"input-data": data} if data else {})}
    status, reason, body = Double().ask("POST", f"/nodes/{THIS_NODE}/qemu/{vmid}/agent/exec", values)
    if status >= 400:
        print(str(body.get("message") or reason).strip(), file=sys.stderr)
        return 255
    print(json.dumps(body["data"], indent=3, sort_keys=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
