# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The HTTP side of the Proxmox double: requests are noted and counted, and connections break where a test wants it.

How a test uses it (``pve`` is the double):

- **What was asked**: ``pve.history`` has every request, ``pve.counted`` and ``pve.count()`` their number,
  ``pve.touched(vmid)`` those that may have changed a VM.
- **What goes wrong**: ``pve.fault(method, path, kind)`` spoils the next requests, ``pve.clear_faults()`` ends that.
- **What happens meanwhile**: ``pve.before`` and ``pve.after`` are called with each request's method and path.
"""

from __future__ import annotations

import asyncio
import inspect
import re
import threading
from collections import Counter
from typing import Any

from aiohttp import web
from fakepve import FakePve, PveError, settle
from fakepve.server import API, EXTJS, USER
from fakepve.server import params as request_params

from support.proxmox_guest import BrokenPipe


class HttpRules(FakePve):
    """How the double answers over HTTP. The module's docstring says how tests use it."""

    def _reset_http(self) -> None:
        """Set everything that tests switch in this part."""
        self.loop: asyncio.AbstractEventLoop | None = None
        self.loop_thread: int | None = None
        # Called with (method, path) before a request is handled, and after it was, on the server's thread; may be
        # coroutine functions. Paths begin with /api2/json.
        self.before: Any = None
        self.after: Any = None
        self.hook_errors: list[BaseException] = []
        # Real seconds before a wrong token is told so (Proxmox: 3).
        self.auth_delay = 0.0
        # Every request: {method, path, template, params, status, user}; status None: not answered.
        self.history: list[dict[str, Any]] = []
        self._guard = threading.RLock()
        # `METHOD /path template` -> requests since reset_count(), or since a test cleared it.
        self.counted: Counter[str] = Counter()
        self.faults: list[dict[str, Any]] = []
        self._stopping: asyncio.Event | None = None

    # ------------------------------------------------------------------ what was asked

    def count(self) -> int:
        """Return the number of all requests since ``counted`` was cleared."""
        with self._guard:
            return sum(self.counted.values())

    def reset_count(self) -> None:
        """Forget all requests so far."""
        with self._guard:
            self.counted.clear()
            self.requests.clear()
            self.history.clear()

    def touched(self, vmid: int) -> list[str]:
        """Return `METHOD /path` of each handled request that names the VM in its path and may change something.

        Oldest first, since ``requests`` was cleared.
        """
        return [
            f"{method} {path}"
            for method, path, _body in list(self.requests)
            if method != "GET" and re.search(rf"/qemu/{vmid}(/|$)", path)
        ]

    # ------------------------------------------------------------------ faults of the connection

    def fault(self, method: str, suffix: str, kind: str, *, times: int = 1, **values: Any) -> dict[str, Any]:
        """Spoil the next requests whose path ends with ``suffix`` (a pattern), or whose template is ``suffix``.

        Kinds: `cut-before` cuts the connection before the request is handled, `cut-after` after it was carried out,
        `truncate` in the middle of the answer. `answer` says exactly this (status, body, type, headers); the request is
        handled, and its real answer dropped, only with carry_out. `hang` says nothing for real seconds. With carry_out
        False the request is never handled, and 596 in the end; True: handled at once; "late": handled after them.

        Returns the fault, whose ``times`` says how many are left.
        """
        known = {"cut-before": set(), "cut-after": set(), "truncate": set(), "hang": {"seconds", "carry_out"}}
        known["answer"] = {"status", "body", "type", "headers", "carry_out"}
        if not set(values) <= known.get(kind, set()) or kind not in known:
            raise ValueError(f"{kind}: {values}")
        fault = {"method": method, "suffix": suffix, "kind": kind, "times": times, **values}
        with self._guard:
            self.faults.append(fault)
        return fault

    def clear_faults(self) -> None:
        """Forget every fault that has not happened yet: of connections, tasks and fail()."""
        with self._guard:
            self.faults.clear()
            self._outcomes.clear()
        self.failures.clear()

    def _take_fault(self, method: str, path: str, template: str) -> dict[str, Any] | None:
        """Return the first fault that fits the request, and count it down."""
        with self._guard:
            for fault in self.faults:
                suffix = fault["suffix"]
                if fault["method"] == method and (template == suffix or re.search(suffix + "$", path)):
                    fault["times"] -= 1
                    if fault["times"] <= 0:
                        self.faults.remove(fault)
                    return fault
        return None

    # ------------------------------------------------------------------ the server

    async def start(self, certfile: str, keyfile: str) -> None:
        """Serve with this certificate, and remember the thread that serves."""
        self.loop = asyncio.get_running_loop()
        self.loop_thread = threading.get_ident()
        self._stopping = asyncio.Event()
        await super().start(certfile, keyfile)
        # Requests that hang on purpose must not keep a test from ending.
        self.runner._shutdown_timeout = 0.5

    async def stop(self) -> None:
        """End all guests, tasks and requests that wait, then the server."""
        self.close_machines()
        if self._stopping is not None:
            self._stopping.set()
        for running in list(self._running.values()):
            running.cancel()
        await settle()
        await super().stop()

    async def _sleep(self, seconds: float) -> None:
        """Wait for real seconds, or until the server stops."""
        if seconds <= 0:
            return
        try:
            await asyncio.wait_for(self._stopping.wait(), seconds) if self._stopping else await asyncio.sleep(seconds)
        except TimeoutError:
            pass

    def _build_app(self) -> web.Application:
        app = super()._build_app()
        app.middlewares.insert(0, self._watch_request)
        return app

    @web.middleware
    async def _watch_request(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """Note each request, call the hooks, and spoil what a test wants spoiled.

        This middleware is round all others, so that refused requests count too.
        """
        prefix = EXTJS if request.path.startswith(EXTJS + "/") else API
        path = request.path[len(prefix) :] if request.path.startswith(prefix) else request.path
        match = self.resolve(request, API)
        template = match.template if match else path
        try:
            values = await request_params(request)
        except Exception:  # malformed bodies get their 400 from the handler
            values = {}
        entry = {
            "method": request.method,
            "path": path,
            "template": template,
            "params": values,
            "status": None,
            "user": None,
        }
        self._note_request(entry)
        self._renew_broadcast()
        if not await self._call_hook(self.before, request.method, path):
            return web.json_response({"data": None, "message": "the test's hook before failed"}, status=500)
        fault = self._take_fault(request.method, path, template)

        async def handle() -> web.StreamResponse:
            response = await self._answer_as_sent(request, handler)
            entry["status"], entry["user"] = response.status, request.get(USER)
            await self._call_hook(self.after, request.method, path)
            return response

        return await (self._answer_spoiled(request, fault, handle) if fault else handle())

    def _note_request(self, entry: dict[str, Any]) -> None:
        """Count a request and add it to the history."""
        with self._guard:
            self.counted[f"{entry['method']} {entry['template']}"] += 1
            self.history.append(entry)

    async def _call_hook(self, hook: Any, method: str, path: str) -> bool:
        """Call a test's hook, and return whether it worked. An exception of the hook is kept in hook_errors."""
        if hook is None:
            return True
        try:
            waited = hook(method, API + path)
            if inspect.isawaitable(waited):
                await waited
        except Exception as error:  # kept for the test, which would otherwise see a 500 of unknown origin
            self.hook_errors.append(error)
            return False
        return True

    async def _answer_as_sent(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """Return the answer with the status, reason and body that Proxmox VE's own servers send."""
        try:
            response = await handler(request)
        except web.HTTPNotFound:
            response = web.Response(status=404)
        except BrokenPipe:
            return web.Response(status=596, reason="Broken pipe")
        if response.status == 404 and not self.resolve(request, API) and request.path.startswith(API):
            response = _answer_not_implemented(request.method, request.path[len(API) :])
        elif response.status == 501:
            response = _answer_not_implemented(request.method, request.path.removeprefix(API))
        if response.status == 401:
            await self._sleep(self.auth_delay)
        login = request.path == API + "/access/ticket"
        if response.status in (401, 595, 596) and request.path.startswith(API) and not login:
            # These come from the daemon in front of the API: a reason, no body.
            response = web.Response(status=response.status, reason=response.reason)
        return response

    def _authenticate(self, request: web.Request) -> Any:
        """Return the user, or refuse with the reason that Proxmox VE has: one for every wrong token or ticket."""
        try:
            return super()._authenticate(request)
        except PveError as error:
            if "csrf" in error.message:
                raise
            presented = request.headers.get("Authorization") or request.cookies.get("PVEAuthCookie")
            raise PveError(401, "Authentication failed!" if presented else "No ticket") from None

    async def _answer_spoiled(self, request: web.Request, fault: dict[str, Any], handle: Any) -> web.StreamResponse:
        """Answer one request as its fault says."""
        kind, carry_out = fault["kind"], fault.get("carry_out", False)
        if kind == "cut-before":
            return _drop_connection(request)
        if kind in ("cut-after", "truncate"):
            response = await handle()
            return _drop_connection(request) if kind == "cut-after" else await _send_half(request, response)
        if kind == "hang":
            response = await handle() if carry_out is True else None
            await self._sleep(fault["seconds"])
            if carry_out == "late":
                response = await handle()
            return response or web.Response(status=596, reason="Connection timed out")
        if carry_out:
            await handle()
        body = fault.get("body", "")
        return web.Response(
            status=fault["status"],
            body=body.encode() if isinstance(body, str) else body,
            headers={"Content-Type": fault.get("type", "application/json"), **fault.get("headers", {})},
        )

    async def _answer(
        self, request: web.Request, handler: Any, generic: Any, path_node: str | None
    ) -> web.StreamResponse:
        """Refuse unknown nodes, and requests to offline nodes for which the caller has no right; pass on the rest."""
        match = generic or self.resolve(request, API)
        if path_node and path_node not in self.nodes:
            text = (
                f"hostname lookup '{path_node}' failed - failed to get address info for: {path_node}: Name or service "
                "not known"
            )
            return _answer_error(PveError(500, text))
        if path_node and not self.nodes[path_node].get("online", True) and match and request.method in match.methods:
            # Permissions are checked where the request arrives, before it is passed on to the node.
            try:
                values = dict(await request_params(request), **match.params)
                self.check_permissions(request[USER], match.methods[request.method].get("permissions"), values)
            except PveError as error:
                return _answer_error(error)
        return await super()._answer(request, handler, generic, path_node)


def _answer_not_implemented(method: str, path: str) -> web.Response:
    """Return the answer to a path or method that the API does not have."""
    text = f"Method '{method} {path}' not implemented"
    return web.json_response({"data": None, "message": text}, status=501, reason=text)


def _answer_error(error: PveError) -> web.Response:
    """Return the answer to a request that was refused."""
    body = {"data": None, "message": error.message + "\n"}
    if error.errors:
        body["errors"] = error.errors
    return web.json_response(body, status=error.status, reason=error.message.splitlines()[0][:200])


def _drop_connection(request: web.Request) -> web.StreamResponse:
    """Cut the connection before a byte of the answer is sent."""
    if request.transport is not None:
        request.transport.abort()
    return _NoAnswer()


async def _send_half(request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
    """Send headers that promise the whole body, and half of the body."""
    body = response.body if isinstance(response, web.Response) and isinstance(response.body, bytes) else b"{}"
    if request.transport is not None:
        head = (
            f"HTTP/1.1 {response.status} {response.reason}\r\nContent-Type: application/json;charset=UTF-8\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        request.transport.write(head.encode() + body[: len(body) // 2])
        request.transport.close()
    return _NoAnswer()


class _NoAnswer(web.StreamResponse):
    """An answer that was sent already, or never will be."""

    async def prepare(self, request: web.BaseRequest) -> Any:
        """Send no headers, and close the connection."""
        self.force_close()
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        """Send nothing."""
        return None
