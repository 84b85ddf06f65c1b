# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The command line ``agentlab``. It talks to the daemon over its socket, and imports neither core nor daemon."""

__version__ = "1.0.0"
NAME = "agentlab"
# A shell sets this variable to ask for completions.
COMPLETE_VARIABLE = "_AGENTLAB_COMPLETE"
