# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The command line ``agentlab``: it talks to the daemon over its socket, and imports neither the core nor the
daemon.
"""

__version__ = "1.0.0"
NAME = "agentlab"
# The variable with which a shell asks for completions.
COMPLETE_VARIABLE = "_AGENTLAB_COMPLETE"
