# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""agentlabd: expires leases, cleans up, reconciles, and serves the HTTP API, on the same core as the modules."""

from __future__ import annotations

__version__ = "1.0.0"

# Logged at the end. systemd then starts the daemon again; after the last attempt this is the journal's last line.
LAST_WORD = (
    "agentlabd ends; the lines before say why. systemd tries again some times. When none of them holds, no lease ends "
    "and nothing is cleaned up: mend the cause, then run systemctl reset-failed agentlabd and systemctl start agentlabd"
)
