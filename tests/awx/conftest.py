# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A double of AWX with what a user has before the set-up, and the set-up as a user runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.awx import TOKEN, Awx
from support.awx_setup import PROJECT_URL, PROXMOX, add_prerequisites
from support.double import TOKEN_SECRET
from support.play import Run, run_play


@pytest.fixture
def awx() -> Iterator[Awx]:
    double = Awx()
    add_prerequisites(double, 1)
    yield double
    double.stop()


@pytest.fixture
def set_up(awx: Awx, tmp_path: Path) -> Callable[..., Run]:
    """Run awx_setup; the secrets come from the environment, as the documentation says."""

    def run(
        *,
        check: bool = False,
        diff: bool = False,
        token: str = TOKEN,
        secret: str = TOKEN_SECRET,
        args: Any = (),
        **variables: Any,
    ) -> Run:
        env = {
            "ANSIBLE_PIPELINING": "1",
            "CONTROLLER_HOST": awx.url,
            "CONTROLLER_OAUTH_TOKEN": token,
            "PROXMOX_TOKEN_SECRET": secret,
        }
        answers = {
            "awx_inventory": "proxmox",
            "awx_machine_credential": "nodes",
            "awx_project_scm_url": PROJECT_URL,
            **PROXMOX,
            **variables,
        }
        return run_play(
            "agentlab.proxmox.awx_setup", env, tmp_path, check=check, diff=diff, args=args,
            extra_vars={key: value for key, value in answers.items() if value is not None},
        )  # fmt: skip

    return run
