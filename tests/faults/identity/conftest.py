# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A laboratory that ends with a check of the promises."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.lab import Lab


@pytest.fixture
def lab(one_lab: Lab) -> Iterator[Lab]:
    one_lab.reset()
    yield one_lab
    one_lab.check_promises()
    one_lab.reset()
