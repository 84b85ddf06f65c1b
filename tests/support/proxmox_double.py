# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A Proxmox VE cluster for tests: fakepve, corrected by what the real API was seen to do, with faults on demand.

ProxmoxDouble is the cluster, DoubleServer runs one over HTTPS on a thread of its own. State may be read and changed
from the test's thread; whatever has to happen at one moment goes through DoubleServer.call().
"""

from __future__ import annotations

import asyncio
import inspect
import tempfile
import threading
from collections.abc import Callable
from typing import Any

from fakepve import FakePve
from fakepve.certs import make_cert

from support.proxmox_access import AccessRules
from support.proxmox_agent import AgentRules
from support.proxmox_cluster import ClusterRules
from support.proxmox_config import ConfigRules
from support.proxmox_http import HttpRules
from support.proxmox_lifecycle import LifecycleRules
from support.proxmox_power import PowerRules
from support.proxmox_storage import StorageRules
from support.proxmox_tasks import TaskRules
from support.proxmox_vms import VmRules

HOST = "127.0.0.1"


class ProxmoxDouble(
    HttpRules,
    TaskRules,
    AccessRules,
    ClusterRules,
    PowerRules,
    ConfigRules,
    LifecycleRules,
    StorageRules,
    AgentRules,
    VmRules,
    FakePve,
):
    """FakePve with the real API's manners. What tests can set stands in each part, beside its default."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("host", HOST)
        kwargs.setdefault("port", 0)
        super().__init__(*args, **kwargs)
        self._reset_http()
        self._reset_tasks()
        self._reset_access()
        self._reset_cluster()
        self._reset_power()
        self._reset_config()
        self._reset_lifecycle()
        self._reset_storage()
        self._reset_agent()


class DoubleServer:
    """A ProxmoxDouble on loopback, on an event loop and thread of its own.

    Use as a context manager, or start() and stop().

    setup(pve) runs before it listens. The certificate in cafile is for the host and the further names.
    """

    def __init__(
        self,
        time_scale: float = 0.0,
        port: int = 0,
        setup: Callable[[ProxmoxDouble], Any] | None = None,
        double: type[ProxmoxDouble] = ProxmoxDouble,
        host: str = HOST,
        names: tuple[str, ...] = (),
    ) -> None:
        self.pve = double(host=host, port=port)
        self._names = (host, *names)
        self.pve.time_scale = time_scale
        self._setup = setup
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="proxmox-double", daemon=True)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.cafile = ""

    @property
    def url(self) -> str:
        """Return the address, such as https://127.0.0.1:41001."""
        return self.pve.url

    @property
    def port(self) -> int:
        """Return the port on which the double listens."""
        return self.pve.port

    @property
    def host(self) -> str:
        """Return the address of the interface on which the double listens."""
        return self.pve.host

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def start(self) -> DoubleServer:
        """Make a certificate, run setup(pve), and return this server when it listens."""
        self._folder = tempfile.TemporaryDirectory(prefix="proxmox-double-")
        self.cafile, keyfile, _der = make_cert(self._folder.name, hosts=self._names)
        if self._setup is not None:
            self._setup(self.pve)
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self.pve.start(self.cafile, keyfile), self._loop).result(30)
        except BaseException:
            self._halt()
            raise
        return self

    def stop(self) -> None:
        """Stop the double, its thread and its event loop."""
        try:
            asyncio.run_coroutine_threadsafe(self.pve.stop(), self._loop).result(30)
        finally:
            self._halt()

    def _halt(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        if not self._thread.is_alive():
            self._loop.close()
        if self._folder is not None:
            self._folder.cleanup()

    def __enter__(self) -> DoubleServer:
        return self.start()

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    def call(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a function (or coroutine function) on the server's thread, between requests; returns what it returns."""

        async def run() -> Any:
            value = fn(*args, **kwargs)
            return await value if inspect.isawaitable(value) else value

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(60)
