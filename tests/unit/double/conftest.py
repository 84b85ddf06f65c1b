# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The API of the double, asked through proxmoxer over HTTPS."""

from __future__ import annotations

from typing import Any

import pytest

from support.double_api import login
from support.proxmox_double import ProxmoxDouble


@pytest.fixture
def api(pve: ProxmoxDouble, agentlab_env: dict[str, str]) -> Any:
    return login(agentlab_env)
