# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The HTTP side: sockets, who is asking, and passing requests to worker threads. Everything that blocks happens in those."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import hmac
import json
import os
import pwd
import socket
import stat
import struct
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import PayloadEncodingError

from agentlab_core.errors import AgentlabError, ConfigError, InvalidInput

from . import answers
from .logs import log
from .routes import ROUTES, Call, Route
from .service import Service
from .shapes import check_body, check_query

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
MAX_BODY = 1024 * 1024
_SHORTEST_TOKEN = 16
# A query with many states and tags is one line.
_LONGEST_LINE = 65536
# Seconds for answers that are on their way when the sockets close.
_LAST_ANSWERS = 2.0


def _response(answer: answers.Answer) -> web.Response:
    return web.Response(status=answer.status, body=answer.encoded(), content_type="application/json", charset="utf-8", headers=answer.headers)


def _stopping() -> web.Response:
    return _response(answers.failed(503, "agentlabd is stopping: this was not begun; ask again when it runs", "stopping"))


@functools.lru_cache(256)
def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return "unknown"


def _peer(request: web.Request) -> int | None:
    """The user id at the other end of the socket, from the kernel; None for TCP."""
    connection = request.transport.get_extra_info("socket") if request.transport else None
    if connection is None or connection.family != socket.AF_UNIX:
        return None
    uid: int = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))[1]
    return uid


def _actor(uid: int | None, remote: str | None) -> str:
    return f"token via API ({remote})" if uid is None else f"{_user(uid)} (uid {uid}) via API"


def _vmid(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or len(text) > 9 or not 100 <= int(text) <= 999999999:
        raise InvalidInput(f"vmid: {text[:80]!r} is not a VMID. Valid: 100 to 999999999", option="vmid")
    return int(text)


def _body(route: Route, raw: bytes) -> dict[str, Any]:
    if route.body is None:
        if raw.strip():
            raise InvalidInput(f"{route.method} {route.path} takes no body")
        return {}
    if not raw.strip():
        return check_body(route.body, {})
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        raise InvalidInput("the body is not valid JSON") from None
    return check_body(route.body, found)


class Api:
    """The routes on their sockets."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._runners: list[web.AppRunner] = []
        self._lock_file: int | None = None
        # The socket at the path is ours.
        self._serves = False

    # ---- requests ----

    def application(self, *, token: str | None = None) -> web.Application:
        """The API; with a token every request must bring it."""

        @web.middleware
        async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
            try:
                if token is not None and not _authorised(request, token):
                    refused = answers.failed(401, "a valid bearer token is required", "unauthorised")
                    refused.headers["WWW-Authenticate"] = "Bearer"
                    return _response(refused)
                if self.service.stopping.is_set() and request.path != "/v1/healthz":
                    return _stopping()
                return await handler(request)
            except web.HTTPException as error:
                return _response(_http_error(request, error))
            except InvalidInput as error:
                return _response(answers.of_error(error))
            except Exception:  # nothing that a client can cause goes unanswered
                log.exception("internal error in %s %s", request.method, request.path[:200])
                return _response(answers.failed(500, "internal error; the daemon's log says more. Please report this", "internal"))

        app = web.Application(middlewares=[guard], client_max_size=MAX_BODY)
        # A word that is a path of its own is no VMID: so the methods it does not have are answered with 405.
        words = sorted({route.path.split("/")[3] for route in ROUTES if route.path.startswith("/v1/sandboxes/") and "{" not in route.path})
        for route in ROUTES:
            app.router.add_route(route.method, route.path.replace("{vmid}", f"{{vmid:(?!(?:{'|'.join(words)})$)[^/]+}}"), self._handler(route))
        return app

    def _handler(self, route: Route) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            vmid = _vmid(request.match_info["vmid"]) if "vmid" in request.match_info else None
            query = check_query(route.query, list(request.query.items()))
            try:
                raw = await request.read()
            except (web.RequestPayloadError, PayloadEncodingError):
                raise InvalidInput("the body cannot be read: its Content-Encoding or chunks are broken; send it as it is") from None
            body = _body(route, raw)
            uid, remote = _peer(request), request.remote

            call = Call(self.service, "", vmid, request.match_info.get("id", ""), query, body)

            def work() -> tuple[int, bytes, dict[str, str]]:
                # In the thread: looking a user up may ask a directory service.
                call.actor = _actor(uid, remote)
                return self.service.perform(route, call)

            service = self.service
            if service.stopping.is_set() and not route.quick:
                # It was still being sent when the stop began.
                return _stopping()
            pool = service.records_pool if route.quick else service.doctor_pool if route.apart else service.work_pool
            begun = service.begin(pool, work, call.described(route))
            try:
                # The client may go away; what was begun goes on.
                status, raw, headers = await asyncio.shield(begun)
            except asyncio.CancelledError:
                if not begun.cancelled():
                    raise
                return _stopping()
            return web.Response(status=status, body=raw, content_type="application/json", charset="utf-8", headers=headers)

        return handle

    # ---- sockets ----

    async def listen(self) -> None:
        """Open what the configuration names: the socket, and TCP on loopback if asked for."""
        config = self.service.config
        self._claim_socket(config.socket)
        runner = await self._runner(self.application())
        # Nobody else may connect, not even between bind and chmod.
        before = os.umask(0o117)
        try:
            await web.UnixSite(runner, config.socket).start()
        except OSError as error:
            raise ConfigError(f"socket: {config.socket}: {error.strerror or error}; correct socket or the folder's permissions") from None
        finally:
            os.umask(before)
        self._serves = True
        os.chmod(config.socket, 0o660)
        if config.listen:
            token = read_token(config.listen_token_file)
            await self._tcp("listen", await self._runner(self.application(token=token)), config.listen)

        if config.metrics_listen:
            app = web.Application()
            app.router.add_get("/metrics", self._metrics)
            await self._tcp("metrics_listen", await self._runner(app), config.metrics_listen)

    async def _metrics(self, request: web.Request) -> web.Response:
        try:
            text = await asyncio.get_running_loop().run_in_executor(self.service.records_pool, self.service.metrics.text)
        except AgentlabError as error:
            log.warning("metrics: %s", error.message)
            return web.Response(status=503, text=f"{error.message}\n")
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _runner(self, app: web.Application) -> web.AppRunner:
        runner = web.AppRunner(app, handle_signals=False, access_log=None, max_line_size=_LONGEST_LINE)
        await runner.setup()
        self._runners.append(runner)
        return runner

    @staticmethod
    async def _tcp(option: str, runner: web.AppRunner, where: tuple[str, int]) -> None:
        try:
            await web.TCPSite(runner, *where).start()
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise ConfigError(f"{option}: {where[0]}:{where[1]}: {reason}; give another address or port, or end what uses it") from None

    def _claim_socket(self, path: str) -> None:
        """Make sure that no other daemon serves this socket, and remove what a killed one left."""
        try:
            self._lock_file = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"socket: {path}: {error.strerror}; create the folder, or set another socket") from None
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"socket: {path} is served by another agentlabd; stop that first") from None
        try:
            if stat.S_ISSOCK(os.lstat(path).st_mode):
                os.unlink(path)
            else:
                raise ConfigError(f"socket: {path} exists and is no socket; it was left alone")
        except FileNotFoundError:
            pass

    async def close(self) -> None:
        """Close all sockets; requests under way have had their time, and one that is still being sent is waited for no longer than it takes to say no."""
        for runner in self._runners:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(runner.cleanup(), _LAST_ANSWERS)
        if self._serves:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.service.config.socket)


def _authorised(request: web.Request, token: str) -> bool:
    scheme, _blank, given = request.headers.get("Authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), token.encode())


def _http_error(request: web.Request, error: web.HTTPException) -> answers.Answer:
    """What aiohttp itself refuses, in our words."""
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        answer = answers.failed(405, f"{error.method} is not allowed for {request.path}. Valid: {allowed}", "method_not_allowed")
        answer.headers["Allow"] = allowed
        return answer
    if error.status == 404:
        return answers.failed(404, f"no such path: {request.path[:200]}; GET /v1/openapi.json lists what there is", "no_such_path")
    if error.status == 413:
        return answers.failed(413, f"the body is larger than {MAX_BODY} bytes", "too_large")
    return answers.failed(error.status, error.reason, "http")


def read_token(path: str | None) -> str:
    """The bearer token of the TCP listener; the file must not be readable for others."""
    if path is None:
        raise ConfigError("listen_token_file: missing, but listen is set; give a file with a token (openssl rand -hex 32)", option="listen_token_file")
    try:
        with open(path, encoding="ascii") as file:
            mode = os.fstat(file.fileno()).st_mode
            token = file.read(4096).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"listen_token_file: {path}: {getattr(error, 'strerror', None) or 'not a token'}", option="listen_token_file") from None
    if mode & 0o007:
        raise ConfigError(f"listen_token_file: {path} can be read by every user; chmod 0640 it, and make a new token", option="listen_token_file")
    if len(token) < _SHORTEST_TOKEN or not token.isprintable() or " " in token:
        raise ConfigError(f"listen_token_file: {path} must hold one token of at least {_SHORTEST_TOKEN} characters", option="listen_token_file")
    return token
