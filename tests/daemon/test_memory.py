# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the daemon does not load, and that the soak (`make soak`) would tell if it grew."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support import soak
from support.daemon import FILES, PYTHON, Daemon
from support.lab import Lab

LOOK = """
import json, os, sys
from agentlabd import lean
lean.server()
lean.client()
print(json.dumps({"loaded": [name for name in ("aiohttp", "requests", "chardet", "charset_normalizer") if name in sys.modules],
                  "authorities": os.environ.get("SSL_CERT_FILE")}))
"""
# As releases of requests before 2.32 begin.
INSISTS = "try:\n    import chardet\nexcept ImportError:\n    import charset_normalizer as chardet\n"


def look(*path: Path, **environment: str) -> dict[str, Any]:
    own = {name: value for name, value in os.environ.items() if name != "SSL_CERT_FILE"}
    done = subprocess.run([PYTHON, "-W", "error", "-c", LOOK], capture_output=True, text=True, timeout=60, check=True,
                          env={**own, **environment, "PYTHONPATH": os.pathsep.join(map(str, (*path, FILES)))})
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("given", [{}, {"SSL_CERT_FILE": "/etc/ssl/some.pem"}])
def test_libraries_are_loaded_without_what_is_never_used(given: dict[str, str]) -> None:
    found = look(**given)
    if "requests" in found["loaded"]:
        assert found["loaded"] == ["aiohttp", "requests"]
    assert found["authorities"] == given.get("SSL_CERT_FILE"), "the environment is as it was"


def test_a_requests_that_insists_on_a_detector_gets_it_when_it_is_used(tmp_path: Path) -> None:
    (tmp_path / "requests").mkdir()
    (tmp_path / "requests" / "__init__.py").write_text(INSISTS)
    (tmp_path / "chardet.py").write_text("")
    assert look(tmp_path)["loaded"] == ["aiohttp"]
    code = "from agentlabd import lean; lean.client(); import requests; print(requests.chardet.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True,
                          env={**os.environ, "PYTHONPATH": f"{tmp_path}:{FILES}"})
    assert done.stdout == "chardet\n"


def test_the_daemon_itself_has_no_detector(daemon: Callable[..., Daemon], lab: Lab) -> None:
    lab.create("a1")
    one = daemon()
    one.wait_for(lambda: one.get("/v1/status").body["reconcile"]["last_run"], "the first reconcile is over", 20)
    assert one.process is not None
    mapped = Path(f"/proc/{one.process.pid}/maps").read_text()
    assert re.search("_http_parser|aiohttp", mapped) and not re.search("charset_normalizer|chardet", mapped)


def samples(resident: Callable[[int], int], database: int = 4000) -> list[soak.Sample]:
    return [soak.Sample(n, resident(n), 30000, 21, 36, database, 15, n, n) for n in range(60)]


def test_the_soak_tells_growth_from_warming_up() -> None:
    assert soak.judge(samples(lambda n: 50000 + min(n, 15) * 500)) == [], "what the first third takes is warm-up"
    assert soak.judge(samples(lambda n: 50000 + n % 7 * 500)) == [], "up and down is no growth"
    assert soak.judge(samples(lambda n: 50000 + n * 100)) == ["resident grew by 2700, more than 2048"]
