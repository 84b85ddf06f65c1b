# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""The version of the collection.

It stands in a file of its own: ansible-test up to 2.17 wants ``__init__.py`` empty.
"""

from __future__ import annotations

# That of galaxy.yml: a test holds the two together.
__version__ = "1.0.0"
