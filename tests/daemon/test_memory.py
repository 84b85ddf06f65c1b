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

import pytest

from support import soak
from support.daemon import FILES, PYTHON, Daemon
from support.lab import Lab

LOOK = """
import json, sys
from agentlabd import lean
lean.server()
lean.client()
print(json.dumps([name for name in ("aiohttp", "aiohttp.client", "requests", "chardet", "charset_normalizer") if name in sys.modules]))
"""
# A client that is asked for after all, of the package whose server is loaded already.
ASK = """
import sys
from agentlabd import lean
lean.server()
from aiohttp import web
import aiohttp
print(*(name for name in ("aiohttp.client",) if name in sys.modules))
print(aiohttp.__version__, hasattr(aiohttp, "__warningregistry__"), "aiohttp.client" in sys.modules and "early")
print(aiohttp.ClientSession.__module__, aiohttp.web is web, hasattr(aiohttp, "nothing"))
"""
# As releases of requests before 2.32 begin.
INSISTS = "try:\n    import chardet\nexcept ImportError:\n    import charset_normalizer as chardet\n"


def run(code: str, *path: Path) -> str:
    return subprocess.run([PYTHON, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60, check=True,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*path, FILES)))}).stdout


def look(*path: Path) -> list[str]:
    found: list[str] = json.loads(run(LOOK, *path))
    return found


def test_libraries_are_loaded_without_what_is_never_used() -> None:
    assert look() in (["aiohttp", "requests"], ["aiohttp"])


def test_the_client_of_aiohttp_is_there_when_it_is_asked_for() -> None:
    early, package, asked = run(ASK).splitlines()
    assert not early
    assert re.fullmatch(r"\d+\.\d+\S* False False", package)
    assert asked == "aiohttp.client True False"


@pytest.mark.parametrize("needs", ["from . import DEFAULT", "import aiohttp\naiohttp.DEFAULT"])
def test_an_aiohttp_whose_server_needs_more_of_its_package_gets_all_of_it(tmp_path: Path, needs: str) -> None:
    folder = tmp_path / "aiohttp"
    folder.mkdir()
    (folder / "__init__.py").write_text('__version__ = "4.0"\nDEFAULT = 1\nfrom .client import ClientSession\n')
    (folder / "client.py").write_text("from . import http\nclass ClientSession: ...\n")
    (folder / "http.py").write_text(f"{needs}\n")
    (folder / "web.py").write_text("from . import http\n")
    assert run(ASK, tmp_path).splitlines() == ["aiohttp.client", "4.0 False early", "aiohttp.client True False"]


def test_a_requests_that_insists_on_a_detector_gets_it_when_it_is_used(tmp_path: Path) -> None:
    (tmp_path / "requests").mkdir()
    (tmp_path / "requests" / "__init__.py").write_text(INSISTS)
    (tmp_path / "chardet.py").write_text("")
    assert look(tmp_path) == ["aiohttp"]
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
