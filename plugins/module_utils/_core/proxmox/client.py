# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Send all requests to Proxmox, over https (``https.py``) or through pvesh (``pvesh.py``), with limits and retries.

Which request is retried:

| request | result | retried? | reason |
|---|---|---|---|
| any | TLS handshake of a new connection broken | up to 3 times (``https.py``) | nothing was sent yet |
| any | connection idle for over 4 s | sent on a new connection | Proxmox closes idle connections after 5 s |
| any, password login | 401 | once, after a new login | a ticket ends after two hours; Proxmox did nothing |
| login | second factor asked, any refusal | no | eight failures lock a second factor |
| read | answer lost (cut, 408, 502-504, 596-599) | up to 3 times within api_timeout | a read changes nothing |
| read of a guest agent | too large or too deep | no | the guest would answer the same |
| read | no answer within api_timeout | no | the retry would take api_timeout again |
| any but power, delete | "start worker failed", no lock | up to 3 times | Proxmox says that it did not begin |
| start, stop, suspend, delete | "start worker failed", no lock | by the caller | it must judge the VM again before |
| clone task | "start worker failed", no lock | by ``create.py``, if absence is proven | nothing was created |
| any | not delivered (595, refused, unknown name, ssh) | no | nothing was done; the node may be away for long |
| config write | connection cut | no; the configuration is read once | its values show whether Proxmox wrote them |
| other write | answer lost | no | OutcomeUnknown: the caller checks the result first |
| any | any other refusal | no | the answer would be the same |

The callers that retry start, stop, suspend and delete are ``power.py`` and ``removal.py``.
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
from .answers import is_from_guest, is_not_begun, name_kind

_RETRIES = 3
_NODE_AUTHORITY = "/etc/pve/pve-root-ca.pem"
# Seconds between a refused login and the next attempt. Repeated attempts could lock the user out.
_REFUSAL_SECONDS = 60
# Requests without a digest. Only a caller that judges the VM again may repeat them.
_UNGUARDED = re.compile(r"/qemu/\d+(/status/\w+)?$")
_KINDS = {
    "proxmox_api": "api",
    "proxmox_access": "access",
    "proxmox_unreachable": "unreachable",
    "proxmox_outcome_unknown": "unknown",
}


class Transport(Protocol):
    """A way to the API: https or pvesh."""

    awaits_tasks: bool

    def send(self, method: str, path: str, params: dict[str, Any]) -> Any:
        """Send one request and return the answer's data. Raises a ProxmoxError for everything else."""

    def ended_well(self, upid: str) -> bool:
        """Return whether an answer has already reported the task's end with ``OK``."""

    def shows_input(self, path: str) -> bool:
        """Return whether other users of the host could see the parameters of a request to this path."""


class Statistics:
    """Counts of requests by method and kind of path, of errors by kind, and the last failure to reach Proxmox."""

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        # None until the first request.
        self.reachable: bool | None = None
        self.last_error: str | None = None
        # The last refusal of the credentials themselves (401); None once a request was accepted.
        self.refused: str | None = None

    def count_failure(self, error: ProxmoxError) -> None:
        """Count an error, and record whether it shows that Proxmox cannot be reached or refuses the credentials."""
        self.errors[_KINDS.get(error.code, "task")] += 1
        if isinstance(error, (Unreachable, OutcomeUnknown)):
            self.reachable, self.last_error = False, error.message
        elif isinstance(error, ApiError):
            # A refusal is an answer too, so Proxmox is reachable.
            self.reachable, self.last_error = True, None
            if error.status == 401:
                self.refused = error.message
            elif error.status == 403:
                # A privilege is missing, so the credentials themselves were accepted.
                self.refused = None

    def note_answer(self) -> None:
        """Record that Proxmox was reached, even if the answer is a refusal."""
        self.reachable, self.last_error, self.refused = True, None, None


class ProxmoxClient:
    """Send requests to one Proxmox host or cluster. Safe to use from several threads."""

    def __init__(self, settings: ProxmoxSettings, clock: Clock, statistics: Statistics | None = None) -> None:
        self.settings = settings
        self.clock = clock
        self.statistics = statistics or Statistics()
        self.requests = self.statistics.requests
        # Called directly before each request that changes something. If it raises, the request is not sent.
        self.before_change: Callable[[], None] | None = None
        self._api: Transport | None = None
        # The last refusal of a login, and its monotonic time.
        self._refusal: tuple[AccessDenied | None, float] = None, 0.0
        self._lock = threading.Lock()
        # One semaphore for each node limits the requests in flight to it; another limits those to all nodes.
        self._turns: dict[str, threading.Semaphore] = {}
        self._places = threading.Semaphore(settings.connections)
        # For each thread: the number of requests that it has sent, and whether it holds a place.
        self._mine = threading.local()

    # ---- connecting ----

    def _connect(self) -> Transport:
        """Return the transport; the first call opens it, and logs in.

        Raises AccessDenied for a refused login, and without asking Proxmox again for _REFUSAL_SECONDS after one.
        """
        with self._lock:
            if self._api is None:
                refusal, at = self._refusal
                if refusal is not None and self.clock.monotonic() - at < _REFUSAL_SECONDS:
                    # Make a new exception for each caller, because callers add to its detail.
                    raise AccessDenied(refusal.message, **refusal.detail)
                try:
                    self._api = self._open_transport()
                except AccessDenied as error:
                    self._refusal = error, self.clock.monotonic()
                    raise
            return self._api

    def _open_transport(self) -> Transport:
        # Import late: both modules are large, and an Ansible module ships only the code that it imports.
        if self.settings.api_host is None:
            from .pvesh import Pvesh

            return Pvesh(self.settings)
        from .https import Https

        return Https(self.settings)

    @property
    def awaits_tasks(self) -> bool:
        """Return whether a write returns only after the task that it started has ended."""
        return self._connect().awaits_tasks

    def ended_well(self, upid: str) -> bool:
        """Return True, once, if the answer to the write that started this task has reported its end with ``OK``."""
        return self._connect().ended_well(upid)

    def shows_input(self, path: str) -> bool:
        """Return whether a request to this path would show its parameters in a process list (pvesh, another node)."""
        return self._connect().shows_input(path)

    def read_trusted_authority(self) -> str | None:
        """Return the fingerprint of the only certificate authority that this connection trusts, or None.

        The fingerprint is SHA-256 in Proxmox's form (``AB:CD:...``). Over https the authority is the certificate in
        ca_path. pvesh always asks the node's own cluster, whose authority is /etc/pve/pve-root-ca.pem. Returns None if
        several authorities are trusted, or the file cannot be read.
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
        """Read, and return the answer's data. The table at the top says which errors are retried."""
        return self._request("GET", path, params)

    def post(self, path: str, /, **params: Any) -> Any:
        """Send a POST request and return the answer's data, often a task id."""
        return self._request("POST", path, params)

    def put(self, path: str, /, **params: Any) -> Any:
        """Send a PUT request and return the answer's data; None if a cut config write turns out to be written."""
        return self._request("PUT", path, params)

    def delete(self, path: str, /, **params: Any) -> Any:
        """Send a DELETE request and return the answer's data, often a task id."""
        return self._request("DELETE", path, params)

    def get_list(self, path: str, /, **params: Any) -> list[dict[str, Any]]:
        """Read a list of objects. Raises OutcomeUnknown for any other answer, so an empty list is never a guess."""
        rows = self.get(path, **params)
        if not isinstance(rows, list) or not all(isinstance(item, dict) for item in rows):
            raise OutcomeUnknown(
                f"GET /{path}: the answer is not a list, so nothing is known; check that api_host is a Proxmox node",
                path=path,
            )
        return rows

    def get_dict(self, path: str, /, **params: Any) -> dict[str, Any]:
        """Read an object. Raises OutcomeUnknown for any other answer."""
        answer = self.get(path, **params)
        if not isinstance(answer, dict):
            raise OutcomeUnknown(
                f"GET /{path}: the answer is not an object, so nothing is known; check that api_host is a Proxmox node",
                path=path,
            )
        return answer

    def _request(self, method: str, path: str, params: dict[str, Any]) -> Any:
        """Send a request, retry it as the table at the top says, and return the answer's data."""
        try:
            api = self._connect()
        except ProxmoxError as error:
            self.statistics.count_failure(error)
            raise
        attempt = 0
        logins = 0
        began = self.clock.monotonic()
        while True:
            attempt += 1
            self.requests[f"{method} {name_kind(path)}"] += 1
            self._mine.requests_sent = self.requests_sent + 1
            try:
                with self._hold_place(path):
                    if self.before_change is not None and method != "GET":
                        self.before_change()
                    answer = api.send(method, path, params)
                self.statistics.note_answer()
                return answer
            except ProxmoxError as error:
                if _is_answer(path, error):
                    self.statistics.note_answer()
                else:
                    self.statistics.count_failure(error)
                if self._is_ticket_ended(error) and not logins:
                    # A ticket is valid for two hours, or until the node's key is renewed. Proxmox does not carry out a
                    # request that it answers with 401. So log in again and retry once.
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

    def _is_ticket_ended(self, error: ProxmoxError) -> bool:
        """Return whether the error is a 401 for a ticket. A token does not end, so its 401 is final."""
        by_password = self.settings.api_host is not None and self.settings.token_name is None
        return by_password and isinstance(error, AccessDenied) and error.status == 401

    @property
    def requests_sent(self) -> int:
        """Return how many requests this thread has sent. Two equal readings prove that the thread sent none between."""
        return int(getattr(self._mine, "requests_sent", 0))

    @contextlib.contextmanager
    def reserve_place(self, path: str) -> Iterator[float]:
        """Reserve a place among the requests in flight until the block ends, and yield the seconds of waiting.

        Inside the block the thread's requests wait for no other thread.
        """
        began = self.clock.monotonic()
        with self._hold_place(path):
            before, self._mine.has_place = getattr(self._mine, "has_place", False), True
            try:
                yield self.clock.monotonic() - began
            finally:
                self._mine.has_place = before

    @contextlib.contextmanager
    def _hold_place(self, path: str) -> Iterator[None]:
        """Wait for one of the ``connections`` places, and for one of the ``node_connections`` places of the node.

        Each request ends within api_timeout, so the wait is bounded.
        """
        if getattr(self._mine, "has_place", False):
            yield
            return
        # Take the node's place first. A thread that waits for a slow node then takes no place from other nodes.
        with self._find_turn(path), self._places:
            yield

    def _find_turn(self, path: str) -> contextlib.AbstractContextManager[Any]:
        """Return the semaphore of the node in the path; a null context if the path or the settings have none."""
        limit, parts = self.settings.node_connections, path.split("/", 2)
        if limit is None or parts[0] != "nodes" or len(parts) < 2:
            return contextlib.nullcontext()
        with self._lock:
            return self._turns.setdefault(parts[1], threading.Semaphore(limit))

    def _was_written(self, path: str, params: dict[str, Any]) -> bool:
        """Return whether the VM's configuration contains the values of a config write without an answer.

        After a login by password, pveproxy sometimes cuts the connection of a write that it carries out.
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
                _split_value(config.get(name)) == _split_value(value)
                for name, value in params.items()
                if value is not None and name not in ("digest", "delete")
            )
        )


def _is_answer(path: str, error: ProxmoxError) -> bool:
    """Return whether an error shows that Proxmox works, so that the statistics count no failure.

    Three errors do: "this VMID is taken" (``cluster/nextid``), a guest agent that does not answer (500), and an answer
    of a guest agent that cannot be read.
    """
    if error.detail.get("guest"):
        return True
    if not isinstance(error, ApiError) or isinstance(error, AccessDenied):
        return False
    return path == "cluster/nextid" or (error.status == 500 and is_from_guest(path))


def _split_value(value: Any) -> list[str]:
    """Return a value's parts in a comparable order: Proxmox reorders them, and ends descriptions with a line feed."""
    return sorted(str(value).rstrip("\n").split(","))


def _may_retry(method: str, path: str, error: ProxmoxError) -> bool:
    """Return whether the same request may be sent again at once, after ``error``. See the table at the top.

    A refusal is retried only if Proxmox did not begin. Power requests and delete are not retried: they take no digest,
    and the VMID may belong to another VM by then. A lost answer is retried only for a read. A timeout is not retried,
    because the retry would double the wait.
    """
    if isinstance(error, ApiError):
        return is_not_begun(error.text) and (method == "GET" or not _UNGUARDED.search(path))
    if method != "GET":
        return False
    return isinstance(error, OutcomeUnknown) and not error.detail.get("timed_out") and not error.detail.get("guest")
