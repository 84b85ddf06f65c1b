# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""The core: rules, records, the Proxmox client and the operations. Imports nothing of Ansible."""

from __future__ import annotations

# That of the collection (galaxy.yml): a test holds the two together.
__version__ = "1.0.0"
