# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The HTTP server: open sockets, identify clients, and pass requests to worker threads, which do all blocking work."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import functools
import hmac
import os
import pwd
import socket
import stat
import struct
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, cast

from aiohttp import web
from aiohttp.client_exceptions import ClientError
from aiohttp.http_exceptions import PayloadEncodingError

from agentlab_core import patterns
from agentlab_core.errors import AgentlabError, ConfigError, InvalidInput, make_host_error
from agentlab_core.escapes import escape_controls

from .. import connections
from ..connections import BODY_BYTES, BODY_SECONDS, IDLE_SECONDS, Listener
from ..logs import log, log_seldom
from ..service import Service
from . import answers, spool
from .fields import check_body, check_query, parse_json
from .perform import perform_request
from .route import Call, Route
from .table import ROUTES

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
# A query with many states and tags is a single line.
_LONGEST_LINE = 65536
# Seconds for answers in transit when the sockets close.
_LAST_ANSWERS = 2.0


def _make_response(answer: answers.Answer) -> web.Response:
    return web.Response(
        status=answer.status,
        body=answer.encode_body(),
        content_type="application/json",
        charset="utf-8",
        headers=answer.headers,
    )


def _make_closing_response(status: int, message: str, code: str) -> web.Response:
    """Return the answer to a request that was not read completely. It closes the connection."""
    response = _make_response(answers.compose_error(status, message, code))
    response.force_close()
    return response


class _RequestRefused(Exception):
    """The request is refused before it is read completely. ``args``: status, sentence and code of the answer."""


class _ClientGone(Exception):
    """The client closed the connection before its request was complete."""


def _make_stopping_response() -> web.Response:
    return _make_response(
        answers.compose_error(503, "agentlabd is stopping: this was not begun; ask again when it runs", "stopping")
    )


@functools.lru_cache(256)
def _look_up_user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return "unknown"


def _read_peer(request: web.Request) -> int | None:
    """Return the user id at the other end of the unix socket, as the kernel reports it; None for TCP."""
    connection = request.transport.get_extra_info("socket") if request.transport else None
    if connection is None or connection.family != socket.AF_UNIX:
        return None
    uid: int = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))[
        1
    ]
    return uid


def _name_actor(uid: int | None, remote: str | None) -> str:
    return f"token via API ({remote})" if uid is None else f"{_look_up_user(uid)} (uid {uid}) via API"


def _read_vmid(text: str) -> int:
    return patterns.read_vmid("vmid", text)


def _parse_body(route: Route, raw: bytes) -> dict[str, Any]:
    if route.body is None:
        if raw.strip():
            raise InvalidInput(f"{route.method} {route.path} takes no body")
        return {}
    if not raw.strip():
        return check_body(route.body, {})
    return check_body(route.body, parse_json(raw))


class Api:
    """Serve the routes on the sockets."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._runners: list[web.AppRunner] = []
        self._lock_file: int | None = None
        self._bodies = connections.Bodies()
        self._unread = connections.UnreadAnswers()
        self._places = spool.Places()
        # Listener option -> maximum number of connections.
        self._share: dict[str, int] = {}
        # Listeners and servers by the option with their address.
        self._listeners: dict[str, Listener] = {}
        self._servers: dict[str, asyncio.AbstractServer] = {}
        # Device and inode of the socket file that this daemon created.
        self._socket_file: tuple[int, int] | None = None

    # ---- requests ----

    def make_application(self, option: str) -> web.Application:
        """Return the application for the listener ``option`` (socket, listen).

        Over TCP each request needs the token.
        """

        @web.middleware
        async def check_access(request: web.Request, handler: Handler) -> web.StreamResponse:
            try:
                token = self.service.token if option == "listen" else None
                if option == "listen" and not (token and _is_authorised(request, token)):
                    refused = answers.compose_error(401, "a valid bearer token is required", "unauthorised")
                    refused.headers["WWW-Authenticate"] = "Bearer"
                    return _make_response(refused)
                if self.service.stopping.is_set() and request.path != "/v1/healthz":
                    return _make_stopping_response()
                return await handler(request)
            except web.HTTPException as error:
                return _make_response(_answer_http_error(request, error))
            except InvalidInput as error:
                return _make_response(answers.answer_error(error))
            except _RequestRefused as refused:
                return _make_closing_response(*refused.args)
            except _ClientGone:
                log.debug(
                    "%s %s: the client ended the connection before its request was complete",
                    request.method,
                    request.path[:200],
                )
                return _make_closing_response(400, "the request is not complete", "incomplete")
            except Exception as error:  # every request gets an answer
                known = make_host_error(error)
                if known:
                    log_seldom(60, "host", "%s", known.message)
                    return _make_response(answers.answer_error(known))
                log.exception("internal error in %s %s", request.method, request.path[:200])
                return _make_response(
                    answers.compose_error(
                        500, "internal error; the daemon's log says more. Please report this", "internal"
                    )
                )

        app = web.Application(
            middlewares=[self._make_progress_middleware(option), check_access], client_max_size=BODY_BYTES
        )
        # Only digits are a VMID, so that GET /v1/sandboxes/prnue is 404 and not "prnue is not a VMID".
        for route in ROUTES:
            app.router.add_route(route.method, route.path.replace("{vmid}", "{vmid:[0-9]+}"), self._make_handler(route))
        return app

    def _make_progress_middleware(self, option: str) -> Any:
        """Return a middleware that reports the progress of each request to the gate of its connection."""

        @web.middleware
        async def report_progress(request: web.Request, handler: Handler) -> web.StreamResponse:
            gate = self._listeners[option].note_complete_head(request.protocol)
            if gate is None:
                return await handler(request)
            request["gate"] = gate
            if not request.body_exists:
                gate.note_body_read()
            try:
                return await handler(request)
            finally:
                self._bodies.release_bytes(request.get("size", 0))
                gate.note_answer(request.content.is_eof())

        return report_progress

    async def _receive_body(self, request: web.Request) -> bytes:
        """Return the whole body.

        Raises HTTPRequestEntityTooLarge for a body that is too large, _RequestRefused for one that is too slow or while
        too many are in transit, _ClientGone, and InvalidInput for a broken one.
        """
        if not request.body_exists:
            return b""
        if request.headers.get("Content-Encoding", "identity").lower() != "identity":
            # The unpacked size of a compressed body is unknown before unpacking.
            raise InvalidInput("the body cannot be read: its Content-Encoding or chunks are broken; send it as it is")
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while chunk := await request.content.readany():
                    if size + len(chunk) > BODY_BYTES:
                        raise web.HTTPRequestEntityTooLarge(BODY_BYTES, size + len(chunk))
                    if not self._bodies.reserve_bytes(size, size + len(chunk)):
                        raise _RequestRefused(
                            503, "too many large bodies are on their way at once; ask again in some seconds", "too_much"
                        )
                    size += len(chunk)
                    parts.append(chunk)
            return b"".join(parts)
        except TimeoutError:
            raise _RequestRefused(
                408, f"the body of the request was not complete within {BODY_SECONDS:.0f} s", "too_slow"
            ) from None
        except (web.RequestPayloadError, PayloadEncodingError, ConnectionError, ClientError) as error:
            # Tell a client that went away from a client that sends nonsense.
            if request.transport is None or request.transport.is_closing():
                raise _ClientGone from error
            raise InvalidInput(
                "the body cannot be read: its Content-Encoding or chunks are broken; send it as it is"
            ) from None
        finally:
            # Count the body until its request is answered, because it stays in memory until then.
            request["size"] = size

    def _choose_pool(self, route: Route) -> ThreadPoolExecutor:
        """Return the threads that handle requests of the route."""
        service = self.service
        if route.quick:
            return service.records_pool
        if route.inside:
            return service.guest_pool
        return service.doctor_pool if route.apart else service.work_pool

    async def _receive_file(self, request: web.Request) -> BinaryIO:
        """Return the body as a file on the disk.

        Raises _RequestRefused for a body that is too large, or that stops arriving, _ClientGone, and InvalidInput.
        """
        gate = request.get("gate")
        try:
            return await spool.receive_file(
                request.content, gate.extend_body_deadline if gate else lambda _seconds: None
            )
        except spool.TooSlow as slow:
            raise _RequestRefused(408, str(slow), "too_slow") from None
        except spool.TooLarge:
            raise _RequestRefused(413, f"the file is larger than {spool.FILE_BYTES} bytes", "too_large") from None
        except (web.RequestPayloadError, PayloadEncodingError, ConnectionError, ClientError) as error:
            if request.transport is None or request.transport.is_closing():
                raise _ClientGone from error
            raise InvalidInput("the body cannot be read: its chunks are broken; send it as it is") from None

    def _make_handler(self, route: Route) -> Handler:
        """Return aiohttp's handler for a route: check the request, then pass it to a thread and wait."""

        async def handle(request: web.Request) -> web.StreamResponse:
            if not (route.receives_file or route.sends_file):
                return await answer_request(request, None)
            if not self._places.take_place():
                raise _RequestRefused(
                    503, f"{spool.FILES_AT_ONCE} files are on their way already; ask again in some seconds", "too_much"
                )
            try:
                file = await self._receive_file(request) if route.receives_file else None
                try:
                    return await answer_request(request, file)
                finally:
                    if file is not None:
                        file.close()
            finally:
                self._places.give_place_back()

        async def answer_request(request: web.Request, upload: BinaryIO | None) -> web.StreamResponse:
            vmid = _read_vmid(request.match_info["vmid"]) if "vmid" in request.match_info else None
            query = check_query(route.query, list(request.query.items()))
            body = {} if upload is not None else _parse_body(route, await self._receive_body(request))
            if "gate" in request:
                request["gate"].note_body_read()
            uid, remote = _read_peer(request), request.remote

            call = Call(self.service, "", vmid, request.match_info.get("id", ""), query, body, upload)

            def perform_call() -> tuple[answers.Answer, bytes]:
                # In the thread: looking up a user may ask a directory service, and encoding a long answer takes time.
                call.actor = _name_actor(uid, remote)
                performed = perform_request(route, call)
                return performed, b"" if performed.file else performed.encode_body()

            service = self.service
            if service.stopping.is_set() and not route.quick:
                # The client was still sending the request when the stop began.
                return _make_stopping_response()
            begun = service.begin_work(self._choose_pool(route), perform_call, call.describe(route))
            try:
                # Work that was started goes on even if the client goes away.
                performed, raw = await asyncio.shield(begun)
            except asyncio.CancelledError:
                if not begun.cancelled():
                    raise
                return _make_stopping_response()
            if performed.file is not None:
                with performed.file:
                    return await spool.send_file(request, performed.file, performed.headers)
            return web.Response(
                status=performed.status,
                body=raw,
                content_type="application/json",
                charset="utf-8",
                headers=performed.headers,
            )

        return handle

    # ---- sockets ----

    async def open_sockets(self) -> None:
        """Open the configured listeners: the unix socket, and TCP on loopback if configured."""
        config = self.service.config
        self._share = connections.divide_connections(connections.raise_descriptors(), config.proxmox.connections)
        asyncio.get_running_loop().set_exception_handler(_log_loop_error)
        self._claim_socket(config.socket)
        await self._set_up_listener("socket", self.make_application("socket"))
        await self._bind_socket()
        if config.listen:
            await self._set_up_listener("listen", self.make_application("listen"))
            await self._bind_tcp("listen", config.listen)
        if config.metrics_listen:
            app = web.Application(middlewares=[self._make_progress_middleware("metrics_listen")])
            app.router.add_get("/metrics", self._serve_metrics)
            await self._set_up_listener("metrics_listen", app)
            await self._bind_tcp("metrics_listen", config.metrics_listen)

    async def _bind_socket(self) -> None:
        """Listen on the unix socket, for its owner and group only. Raises ConfigError if that is not possible."""
        path = self.service.config.socket
        # No other user may connect, not even between bind and chmod.
        before = os.umask(0o117)
        try:
            self._servers["socket"] = await asyncio.get_running_loop().create_unix_server(
                self._listeners["socket"], path, backlog=connections.ACCEPTED_AT_ONCE
            )
        except OSError as error:
            raise ConfigError(
                f"socket: {path}: {error.strerror or error}; correct socket or the folder's permissions"
            ) from None
        finally:
            os.umask(before)
        _lengthen_queue(self._servers["socket"])
        os.chmod(path, 0o660)
        self._socket_file = _identify_file(path)

    async def restore_socket(self) -> str | None:
        """Create the socket file again if it was deleted. Return why that is not possible, or None."""
        path = self.service.config.socket
        present_file = _identify_file(path)
        if present_file == self._socket_file:
            return None
        if present_file is not None:
            return (
                f"{path} is not this daemon's socket any more: something else was put in its place. Remove it; the "
                "socket is made anew by itself"
            )
        # The old socket listens until the new one does: a folder that was moved away may come back with its file.
        old = self._servers["socket"]
        try:
            await self._bind_socket()
        except (AgentlabError, OSError) as error:
            # The folder may be missing. The next check tries again.
            return f"{path} was deleted and cannot be made anew: {error}. Restart agentlabd"
        old.close()
        log.warning("%s was deleted; it was made anew", path)
        return None

    async def _serve_metrics(self, request: web.Request) -> web.Response:
        where = self.service.config.metrics_listen
        if where is not None and not _names_address(request.headers.get("Host"), where):
            # A web page whose name was made to resolve to loopback (DNS rebinding) must not read the metrics.
            return web.Response(
                status=421,
                text=f"this address serves requests for its own host only. Valid: {where[0]}:{where[1]}, "
                f"localhost:{where[1]}\n",
            )
        try:
            text = await asyncio.get_running_loop().run_in_executor(
                self.service.records_pool, self.service.metrics.render
            )
        except AgentlabError as error:
            log_seldom(30, "metrics", "metrics: %s", error.message)
            return web.Response(status=503, text=f"{error.message}\n")
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _set_up_listener(self, option: str, app: web.Application) -> None:
        """Set up aiohttp for a listener."""
        runner = web.AppRunner(
            app,
            handle_signals=False,
            access_log=None,
            max_line_size=_LONGEST_LINE,
            read_bufsize=connections.READ_BYTES,
            keepalive_timeout=IDLE_SECONDS,
            auto_decompress=False,
        )
        await runner.setup()
        self._runners.append(runner)
        assert runner.server is not None
        self._listeners[option] = Listener(option, runner.server, self._share[option], self._unread)

    async def _bind_tcp(self, option: str, where: tuple[str, int]) -> None:
        """Listen on a TCP address. Raises ConfigError if that is not possible."""
        try:
            self._servers[option] = await asyncio.get_running_loop().create_server(
                self._listeners[option], *where, backlog=connections.ACCEPTED_AT_ONCE
            )
            _lengthen_queue(self._servers[option])
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise ConfigError(
                f"{option}: {where[0]}:{where[1]}: {reason}; give another address or port, or end what uses it"
            ) from None

    def _claim_socket(self, path: str) -> None:
        """Lock the socket's path for this daemon, and remove the file that a killed daemon left. Raises ConfigError."""
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
        """Close all sockets. Wait at most ``_LAST_ANSWERS`` seconds for answers in transit; the work is over by now."""
        for server in self._servers.values():
            server.close()
        for runner in self._runners:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(runner.cleanup(), _LAST_ANSWERS)
        path = self.service.config.socket
        if self._socket_file is not None and _identify_file(path) == self._socket_file:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def _lengthen_queue(server: asyncio.AbstractServer) -> None:
    """Lengthen the kernel's queue beyond the number of connections that asyncio accepts at one time.

    The kernel refuses a client at once when the queue is full.
    """
    for listening in cast(asyncio.Server, server).sockets:
        with contextlib.closing(socket.socket(fileno=os.dup(listening.fileno()))) as same:
            same.listen(connections.QUEUE)


def _identify_file(path: str) -> tuple[int, int] | None:
    """Return device and inode of the file at a path, or None without a file."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _names_address(host: str | None, where: tuple[str, int]) -> bool:
    """Return whether a Host header names the listening address. HTTP/1.0 has no Host header."""
    if host is None:
        return True
    name, colon, port = host.strip().lower().rpartition(":")
    if not colon or not port.isdecimal():
        name = host.strip().lower()
    return name.removeprefix("[").removesuffix("]") in (where[0], "localhost", "127.0.0.1", "::1")


def _log_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log an error that the event loop cannot hand to any caller, at most once a minute."""
    error = context.get("exception")
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        log_seldom(
            40,
            "no descriptor",
            "no file descriptor is left for connections of clients (%s); they wait. Raise LimitNOFILE of the unit",
            error.strerror,
        )
    elif isinstance(error, ConnectionError):
        log.debug("a client ended its connection: %s", error)
    else:
        loop.default_exception_handler(context)


def _is_authorised(request: web.Request, token: str) -> bool:
    scheme, _blank, credential = request.headers.get("Authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(
        credential.strip().encode("utf-8", "surrogateescape"), token.encode()
    )


def _answer_http_error(request: web.Request, error: web.HTTPException) -> answers.Answer:
    """Return the answer for a request that aiohttp itself refuses."""
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        answer = answers.compose_error(
            405, f"{error.method} is not allowed for {request.path}. Valid: {allowed}", "method_not_allowed"
        )
        answer.headers["Allow"] = allowed
        return answer
    if error.status == 404:
        return answers.compose_error(
            404,
            f"no such path: {escape_controls(request.path[:200], '')}; GET /v1/openapi.json lists what there is",
            "no_such_path",
        )
    if error.status == 413:
        return answers.compose_error(413, f"the body is larger than {BODY_BYTES} bytes", "too_large")
    return answers.compose_error(error.status, error.reason, "http")
