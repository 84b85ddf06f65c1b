# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A test whose program is missing is skipped on a user's machine, and fails in CI, which installs all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.programs import require_program

RUN = Path(__file__).resolve().parents[2] / ".ci/run"


@pytest.mark.parametrize("in_ci", [True, False])
def test_a_missing_program_is_skipped_at_home_and_fails_in_ci(monkeypatch: pytest.MonkeyPatch, in_ci: bool) -> None:
    monkeypatch.delenv("AGENTLAB_REQUIRE_PROGRAMS", raising=False)
    if in_ci:
        monkeypatch.setenv("AGENTLAB_REQUIRE_PROGRAMS", "1")
    with pytest.raises(pytest.fail.Exception if in_ci else pytest.skip.Exception, match="apt-get install package"):
        require_program("no-such-program-of-agentlab", "package")


def test_ci_installs_what_tests_of_guests_need_and_skips_none_of_them() -> None:
    if not RUN.is_file():
        pytest.skip("an installed collection has no .ci")
    text = RUN.read_text(encoding="utf-8")
    assert "AGENTLAB_REQUIRE_PROGRAMS=1" in text
    for package in ("qemu-guest-agent", "busybox-static", "sudo"):
        assert f"missing+=({package})" in text
