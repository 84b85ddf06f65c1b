# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""The one door to the Proxmox API: two ways to it (``https.py``, ``pvesh.py``), typed errors, limits, and what is
repeated.

Which request is sent again, and by whom:

| request | what came back | again? | why |
|---|---|---|---|
| any | new connection broken in the TLS handshake | up to 3 times (``https.py``) | nothing was sent yet |
| any | connection idle for over 4 s | on a new one, before sending | Proxmox closes it after 5 s |
| any, password login | 401 | once, after a new login | a ticket ends after two hours; 401 is not carried out |
| login | second factor asked, any refusal | no | eight failures lock a second factor |
| read | answer lost (cut, 408, 502-504, 596-599) | up to 3 times within api_timeout | a read changes nothing |
| read | no answer within api_timeout | no | it would take api_timeout once more |
| any but power, delete | "start worker failed", lock not got | up to 3 times | Proxmox says that it did not begin |
| start, stop, suspend, delete | the same | by ``power.py``, ``removal.py`` | the VM is judged anew before |
| clone task | the same, and absence is proven | by ``create.py`` | nothing was made |
| any | not delivered (595, refused, unknown name, ssh) | no | it may take long; nothing was done |
| config write | connection cut | no; the configuration is read once | what was written tells what became of it |
| other write | answer lost | no | OutcomeUnknown: the caller looks before it asks again |
| any | any other refusal | no | the answer would be the same |
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from ..clock import Clock
from ..config import ProxmoxSettings
from ..errors import AccessDenied, ApiError, OutcomeUnknown, ProxmoxError, Unreachable
from .answers import not_begun, template_of

_RETRIES = 3
_NODE_AUTHORITY = "/etc/pve/pve-root-ca.pem"
# A refused login is not tried again for so long: threads and later requests would lock the user out.
_REFUSAL_SECONDS = 60
# Asked for again only by whoever judges the VM anew: there is no digest that would stop the second try.
_UNGUARDED = re.compile(r"/qemu/\d+(/status/\w+)?$")
_KINDS = {
    "proxmox_api": "api",
    "proxmox_access": "access",
    "proxmox_unreachable": "unreachable",
    "proxmox_outcome_unknown": "unknown",
}


class Transport(Protocol):
    """A way to the API: a path and parameters in, the answer's data or a typed error out."""

    awaits_tasks: bool

    def send(self, method: str, path: str, params: dict[str, Any]) -> Any:
        """Return the answer's data."""

    def ended_well(self, upid: str) -> bool:
        """Return True if an answer has told that this task ended with ``OK``."""

    def shows_input(self, path: str) -> bool:
        """Return True where other users of the host could see the parameters of a request to this path."""


class Statistics:
    """What became of the requests: counted by ``METHOD template`` and by kind of error, and the last failure to
    reach Proxmox at all.
    """

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        # None until the first request.
        self.reachable: bool | None = None
        self.last_error: str | None = None
        # The last refusal of the credentials themselves (401), or None since a request was accepted.
        self.refused: str | None = None

    def failed(self, error: ProxmoxError) -> None:
        self.errors[_KINDS.get(error.code, "task")] += 1
        if isinstance(error, (Unreachable, OutcomeUnknown)):
            self.reachable, self.last_error = False, error.message
        elif isinstance(error, ApiError):
            # A refusal is an answer, too.
            self.reachable, self.last_error = True, None
            if error.status == 401:
                self.refused = error.message

    def answered(self) -> None:
        """Proxmox was reached; what it said may still be a refusal."""
        self.reachable, self.last_error, self.refused = True, None, None


class ProxmoxClient:
    """Requests to one Proxmox host or cluster; safe to use from several threads."""

    def __init__(self, settings: ProxmoxSettings, clock: Clock, statistics: Statistics | None = None) -> None:
        self.settings = settings
        self.clock = clock
        self.statistics = statistics or Statistics()
        self.requests = self.statistics.requests
        # Called directly before a request that changes something; what it raises ends the request unsent.
        self.before_change: Callable[[], None] | None = None
        self._api: Transport | None = None
        # The last refusal of a login, and when it came.
        self._refusal: tuple[AccessDenied | None, float] = None, 0.0
        self._lock = threading.Lock()
        # Node -> the requests that may be in flight to it; and to all of them.
        self._turns: dict[str, threading.Semaphore] = {}
        self._places = threading.Semaphore(settings.connections)
        # Of each thread: how many requests it has sent, and whether it holds a place.
        self._mine = threading.local()

    # ---- connecting ----

    def _connect(self) -> Transport:
        with self._lock:
            if self._api is None:
                refusal, at = self._refusal
                if refusal is not None and self.clock.monotonic() - at < _REFUSAL_SECONDS:
                    # An object of its own: callers add to the detail.
                    raise AccessDenied(refusal.message, **refusal.detail)
                try:
                    self._api = self._open()
                except AccessDenied as error:
                    self._refusal = error, self.clock.monotonic()
                    raise
            return self._api

    def _open(self) -> Transport:
        # Imported here: most of what a module has to load is one of these.
        if self.settings.api_host is None:
            from .pvesh import Pvesh

            return Pvesh(self.settings)
        from .https import Https

        return Https(self.settings)

    @property
    def awaits_tasks(self) -> bool:
        """Whether a write returns only when the task that it started has ended."""
        return self._connect().awaits_tasks

    def ended_well(self, upid: str) -> bool:
        """Return True, once, if the answer to the write that started this task told that it has ended with ``OK``."""
        return self._connect().ended_well(upid)

    def shows_input(self, path: str) -> bool:
        """Return True where a request to this path would show its parameters in a process list (pvesh, another
        node).
        """
        return self._connect().shows_input(path)

    def trusted_authority(self) -> str | None:
        """Return the SHA-256 fingerprint (as Proxmox writes it) of the one authority whose cluster answers; None if
        more could.

        Over https it is the certificate of ca_path. pvesh asks the node's own cluster, whose authority is a file there.
        """
        settings = self.settings
        if settings.api_host is None:
            path = _NODE_AUTHORITY
        elif settings.validate_certs and settings.ca_path:
            path = settings.ca_path
        else:
            return None
        import hashlib
        import ssl

        try:
            with open(path, encoding="ascii") as file:
                text = file.read()
            if text.count("-----BEGIN ") != 1:
                return None
            return hashlib.sha256(ssl.PEM_cert_to_DER_cert(text.strip())).digest().hex(":").upper()
        except (OSError, ValueError):
            return None

    # ---- requests ----

    def get(self, path: str, /, **params: Any) -> Any:
        """Return what a read answers. A lost answer is asked for again (see the table above), a time-out is not."""
        return self._request("GET", path, params)

    def post(self, path: str, /, **params: Any) -> Any:
        return self._request("POST", path, params)

    def put(self, path: str, /, **params: Any) -> Any:
        return self._request("PUT", path, params)

    def delete(self, path: str, /, **params: Any) -> Any:
        return self._request("DELETE", path, params)

    def get_list(self, path: str, /, **params: Any) -> list[dict[str, Any]]:
        """Read a list of objects; anything else is OutcomeUnknown, never an empty list."""
        found = self.get(path, **params)
        if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
            raise OutcomeUnknown(
                f"GET /{path}: the answer is not a list, so nothing is known; is api_host a Proxmox node?", path=path
            )
        return found

    def get_dict(self, path: str, /, **params: Any) -> dict[str, Any]:
        """Read an object; anything else is OutcomeUnknown."""
        found = self.get(path, **params)
        if not isinstance(found, dict):
            raise OutcomeUnknown(
                f"GET /{path}: the answer is not an object, so nothing is known; is api_host a Proxmox node?", path=path
            )
        return found

    def _request(self, method: str, path: str, params: dict[str, Any]) -> Any:
        try:
            api = self._connect()
        except ProxmoxError as error:
            self.statistics.failed(error)
            raise
        attempt = 0
        logins = 0
        began = self.clock.monotonic()
        while True:
            attempt += 1
            self.requests[f"{method} {template_of(path)}"] += 1
            self._mine.asked = self.asked + 1
            try:
                with self._place(path):
                    if self.before_change is not None and method != "GET":
                        self.before_change()
                    answer = api.send(method, path, params)
                self.statistics.answered()
                return answer
            except ProxmoxError as error:
                if not (isinstance(error, ApiError) and path == "cluster/nextid"):
                    # That a VMID is taken is an answer.
                    self.statistics.failed(error)
                if self._ticket_ended(error) and not logins:
                    # A ticket lives for two hours, less when the node's key is renewed. 401 means not carried out: log
                    # in again, once.
                    logins += 1
                    with self._lock:
                        if self._api is api:
                            self._api = None
                    api = self._connect()
                    continue
                if method == "PUT" and error.detail.get("cut") and self._was_written(path, params):
                    return None
                pause = 0.2 * 2**attempt
                if attempt > _RETRIES or not _may_retry(method, path, error):
                    raise
                if method == "GET" and self.clock.monotonic() - began + pause > self.settings.api_timeout:
                    raise
            self.clock.sleep(pause)

    def _ticket_ended(self, error: ProxmoxError) -> bool:
        by_password = self.settings.api_host is not None and self.settings.token_name is None
        return by_password and isinstance(error, AccessDenied) and error.status == 401

    @property
    def asked(self) -> int:
        """How many requests this thread has sent: two looks at it tell whether something was asked in between."""
        return int(getattr(self._mine, "asked", 0))

    @contextlib.contextmanager
    def reserve_place(self, path: str) -> Iterator[float]:
        """Wait for a place now, and keep it: what this thread asks within, one request directly after the other,
        queues behind nobody. Gives the
        seconds that were waited.
        """
        began = self.clock.monotonic()
        with self._place(path):
            before, self._mine.held = getattr(self._mine, "held", False), True
            try:
                yield self.clock.monotonic() - began
            finally:
                self._mine.held = before

    @contextlib.contextmanager
    def _place(self, path: str) -> Iterator[None]:
        """Wait until there are no more than ``connections`` requests of ours in flight, and to the node that the
        path leads to no more than
        ``node_connections``; each ends within api_timeout.
        """
        if getattr(self._mine, "held", False):
            yield
            return
        # The node's first: who waits for a slow node takes no place from the others.
        with self._turn(path), self._places:
            yield

    def _turn(self, path: str) -> contextlib.AbstractContextManager[Any]:
        limit, parts = self.settings.node_connections, path.split("/", 2)
        if limit is None or parts[0] != "nodes" or len(parts) < 2:
            return contextlib.nullcontext()
        with self._lock:
            return self._turns.setdefault(parts[1], threading.Semaphore(limit))

    def _was_written(self, path: str, params: dict[str, Any]) -> bool:
        """Return True when the configuration has what a write without an answer was to write.

        pveproxy was seen to cut the connection of a write that it carried out (with a ticket, never with a token).
        """
        if not path.endswith("/config") or "revert" in params:
            return False
        try:
            config = self.get_dict(path)
        except ProxmoxError:
            return False
        removed = [name for name in str(params.get("delete") or "").split(",") if name]
        return (
            config.get("digest") != params.get("digest")
            and not any(name in config for name in removed)
            and all(
                _parts(config.get(name)) == _parts(value)
                for name, value in params.items()
                if value is not None and name not in ("digest", "delete")
            )
        )


def _parts(value: Any) -> list[str]:
    # Proxmox writes the parts of a property string in its own order, and ends descriptions with a line feed.
    return sorted(str(value).rstrip("\n").split(","))


def _may_retry(method: str, path: str, error: ProxmoxError) -> bool:
    """Return True when the same request may be sent again at once; the table at the top of this file says why.

    ``error`` is what the last try came to. A refusal is repeated only where Proxmox says by it that it did not begin,
    and where the request cannot meet another VM by then: power and delete have no digest, so their callers judge the VM
    anew first. A lost answer is repeated only for a read, and not after a time-out, which would double the wait.
    """
    if isinstance(error, ApiError):
        return not_begun(error.text) and (method == "GET" or not _UNGUARDED.search(path))
    if method != "GET":
        return False
    return isinstance(error, OutcomeUnknown) and not error.detail.get("timed_out")
