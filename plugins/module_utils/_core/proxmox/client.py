# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""One door to the Proxmox API: proxmoxer underneath, typed errors above, and a count of what was asked.

Retried are reads, and writes that Proxmox says it did not begin (no worker, a lock not got). Nothing else: a write whose answer was lost is
OutcomeUnknown, and whoever asked looks before asking again.
"""

from __future__ import annotations

import contextlib
import math
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any
from urllib.parse import quote

from ..clock import Clock
from ..config import ProxmoxSettings
from ..errors import AccessDenied, ApiError, InvalidInput, OutcomeUnknown, ProxmoxError, Unreachable

# Proxmox says "not begun" in these; asking again is safe (facts: start worker failed, locks held for a moment).
_NOT_BEGUN = ("start worker failed", "got no worker upid", "can't lock file", "unable to acquire lock")
_NOT_DELIVERED = (595,)
# 596-599 come from Proxmox's own proxy; 502-504 from one in front of it: the request may still be carried out.
_UNKNOWN = (408, 502, 503, 504, 596, 597, 598, 599)
_RETRIES = 3
# Proxmox VE closes a connection that was idle for five: what is sent just then is cut off, and nobody knows whether it was carried out.
_IDLE_SECONDS = 4.0
_SSH = re.compile(r"ssh: connect to host|closed by|Broken pipe|client_loop|Connection reset|Connection timed out")
# TLS failures before any request was sent.
_TLS_REFUSED = re.compile(r"CERTIFICATE_VERIFY_FAILED|certificate verify failed|[Hh]ostname mismatch|doesn't match")
# No TLS at that port; or what took the place of the answer in the middle of a connection.
_NO_TLS = "WRONG_VERSION_NUMBER"
# Asked for again only by whoever judges the VM anew: there is no digest that would stop the second try.
_UNGUARDED = re.compile(r"/qemu/\d+(/status/\w+)?$")
_KINDS = {"proxmox_api": "api", "proxmox_access": "access", "proxmox_unreachable": "unreachable", "proxmox_outcome_unknown": "unknown"}
# What each kind of request needs, for answers that do not say it.
_NEEDS = {
    "GET cluster/status": "Sys.Audit on /",
    "GET cluster/ha/status/current": "Sys.Audit on /",
    "GET nodes/{node}/qemu/{vmid}/config": "VM.Audit on the VM or its pool",
    "GET nodes/{node}/qemu/{vmid}/status/current": "VM.Audit on the VM or its pool",
    "GET nodes/{node}/qemu/{vmid}/agent/file-read": "VM.GuestAgent.FileRead or VM.GuestAgent.Unrestricted (Proxmox VE 9), VM.Monitor (8) on the VM or its pool",
    "POST nodes/{node}/qemu/{vmid}/clone": "VM.Clone on the template, VM.Allocate on the pool (or /vms), Datastore.AllocateSpace on the storage",
    "PUT nodes/{node}/qemu/{vmid}/config": "VM.Config.Options, .CPU, .Memory, .Network and .Cloudinit on the pool (or /vms)",
    "PUT nodes/{node}/qemu/{vmid}/resize": "VM.Config.Disk on the pool (or /vms)",
    "DELETE nodes/{node}/qemu/{vmid}": "VM.Allocate on the pool (or /vms)",
}


class Statistics:
    """What became of the requests: counted by ``METHOD template`` and by kind of error, and the last failure to reach Proxmox at all."""

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        # None until the first request.
        self.reachable: bool | None = None
        self.last_error: str | None = None

    def failed(self, error: ProxmoxError) -> None:
        self.errors[_KINDS.get(error.code, "task")] += 1
        if isinstance(error, (Unreachable, OutcomeUnknown)):
            self.reachable, self.last_error = False, error.message

    def answered(self) -> None:
        """Proxmox was reached; what it said may still be a refusal."""
        self.reachable, self.last_error = True, None


class ProxmoxClient:
    """Requests to one Proxmox host or cluster; safe to use from several threads."""

    def __init__(self, settings: ProxmoxSettings, clock: Clock, statistics: Statistics | None = None) -> None:
        self.settings = settings
        self.clock = clock
        self.statistics = statistics or Statistics()
        self.requests = self.statistics.requests
        self._api: Any = None
        self._lock = threading.Lock()
        # Node -> the requests that may be in flight to it; and to all of them.
        self._turns: dict[str, threading.Semaphore] = {}
        self._places = threading.Semaphore(settings.connections)
        # Of each thread: how many requests it has sent, and whether it holds a place.
        self._mine = threading.local()

    # ---- connecting ----

    def _connect(self) -> Any:
        with self._lock:
            if self._api is None:
                self._api = self._local() if self.settings.api_host is None else self._https()
            return self._api

    def _local(self) -> Any:
        import shutil

        proxmoxer = _import_proxmoxer()
        if shutil.which("pvesh") is None:
            raise InvalidInput("api_host: not set, and this host has no pvesh; run on a Proxmox node, or set api_host and a token", option="api_host")
        try:
            # pvesh runs a task in the foreground: one request lasts as long as its task.
            return proxmoxer.ProxmoxAPI(backend="local", timeout=max(self.settings.api_timeout, self.settings.task_timeout))
        except NotImplementedError:
            raise InvalidInput("api_host: not set, and this proxmoxer is too old for pvesh; install proxmoxer 2 or newer (Debian 13 has it; on Debian 12 "
                               "use pip), or set api_host and a token (which works with Debian 12's)", option="api_host") from None

    def _https(self) -> Any:
        proxmoxer = _import_proxmoxer()
        from requests.adapters import HTTPAdapter

        found = self.settings
        found.check_credentials()
        verify: bool | str = found.ca_path if found.validate_certs and found.ca_path else found.validate_certs
        login: dict[str, Any] = {"user": found.user}
        if found.token_name:
            login.update(token_name=found.token_name, token_value=found.api_token_secret)
        else:
            login.update(password=found.api_password)
        api = self._guard("POST", "access/ticket",
                          lambda: proxmoxer.ProxmoxAPI(found.api_host, port=found.api_port, verify_ssl=verify, timeout=found.api_timeout, **login))
        session = api._store["session"]
        # proxmoxer has no setting for the pool; one connection a request in flight, and no more than that.
        adapter = HTTPAdapter(pool_connections=1, pool_maxsize=found.connections, pool_block=True)
        adapter.poolmanager.pool_classes_by_scheme = {"https": _pool()}
        session.mount("https://", adapter)
        # A redirect would turn a POST into a GET of some other host, token included.
        session.max_redirects = 0
        session.hooks["response"].append(_refuse_redirect)
        return api

    def trusted_authority(self) -> str | None:
        """The SHA-256 fingerprint (as Proxmox writes it) of the one certificate authority that the connection accepts; None for any but one."""
        found = self.settings
        if found.api_host is None or not found.validate_certs or not found.ca_path:
            return None
        import hashlib
        import ssl

        try:
            with open(found.ca_path, encoding="ascii") as file:
                text = file.read()
            if text.count("-----BEGIN ") != 1:
                return None
            return hashlib.sha256(ssl.PEM_cert_to_DER_cert(text.strip())).digest().hex(":").upper()
        except (OSError, ValueError):
            return None

    # ---- requests ----

    def get(self, path: str, /, **params: Any) -> Any:
        """Read; retried when it could not be delivered."""
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
            raise OutcomeUnknown(f"GET /{path}: the answer is not a list, so nothing is known; is api_host a Proxmox node?", path=path)
        return found

    def get_dict(self, path: str, /, **params: Any) -> dict[str, Any]:
        """Read an object; anything else is OutcomeUnknown."""
        found = self.get(path, **params)
        if not isinstance(found, dict):
            raise OutcomeUnknown(f"GET /{path}: the answer is not an object, so nothing is known; is api_host a Proxmox node?", path=path)
        return found

    def _request(self, method: str, path: str, params: dict[str, Any]) -> Any:
        try:
            api = self._connect()
        except ProxmoxError as error:
            self.statistics.failed(error)
            raise
        attempt = 0
        logins = 0
        while True:
            attempt += 1
            self.requests[f"{method} {_template(path)}"] += 1
            self._mine.asked = self.asked + 1
            try:
                with self._place(path):
                    answer = self._guard(method, path, partial(_send, api, method, path, params, local=self.settings.api_host is None))
                self.statistics.answered()
                return self._read_back(path, params, answer) if isinstance(answer, _Unspoken) else answer
            except ProxmoxError as error:
                if not (isinstance(error, ApiError) and path == "cluster/nextid"):
                    # That a VMID is taken is an answer.
                    self.statistics.failed(error)
                if isinstance(error, AccessDenied) and error.status == 401 and self.settings.token_name is None and self.settings.api_host and not logins:
                    # A ticket lives for two hours, less when the node's key is renewed. 401 means not carried out: log in again, once.
                    logins += 1
                    with self._lock:
                        if self._api is api:
                            self._api = None
                    api = self._connect()
                    continue
                if attempt > _RETRIES or not _may_retry(method, path, error):
                    raise
            self.clock.sleep(0.2 * 2**attempt)

    @property
    def asked(self) -> int:
        """How many requests this thread has sent: two looks at it tell whether something was asked in between."""
        return int(getattr(self._mine, "asked", 0))

    @contextlib.contextmanager
    def held(self, path: str) -> Iterator[float]:
        """Wait for a place now, and keep it: what this thread asks within, one request directly after the other, queues behind nobody. Gives the
        seconds that were waited."""
        began = self.clock.monotonic()
        with self._place(path):
            before, self._mine.held = getattr(self._mine, "held", False), True
            try:
                yield self.clock.monotonic() - began
            finally:
                self._mine.held = before

    @contextlib.contextmanager
    def _place(self, path: str) -> Iterator[None]:
        """Wait until there are no more than ``connections`` requests of ours in flight, and to the node that the path leads to no more than
        ``node_connections``; each ends within api_timeout."""
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

    def _read_back(self, path: str, params: dict[str, Any], answer: _Unspoken) -> None:
        """What became of a config write through pvesh: it says nothing that tells success from failure, the configuration does."""
        config = self.get_dict(path)
        missing = [name for name, value in params.items() if value is not None and name not in ("digest", "delete", "revert")
                   and _parts(config.get(name)) != _parts(value)]
        missing += [name for name in str(params.get("delete") or "").split(",") if name and name in config]
        if missing:
            text = answer.text or f"{', '.join(missing)} not written"
            raise ApiError(f"PUT /{path} on {self.settings.where}: not carried out: {text}", status=500, text=text, method="PUT", path=path)

    def _guard(self, method: str, path: str, call: Any) -> Any:
        """Run one request and turn whatever comes back into data or one of our errors. Secrets are never part of a message."""
        import requests
        from proxmoxer import ResourceException
        from proxmoxer.backends.https import AuthenticationError

        where = f"{method} /{path} on {self.settings.where}"
        try:
            return call()
        except ResourceException as error:
            raise self._api_error(method, path, where, error) from None
        except AuthenticationError as error:
            code = re.search(r"code: (\d+)", str(error))
            raise AccessDenied(f"Proxmox on {self.settings.where} refuses the login of {self.settings.user!r} (status {code[1] if code else '401'}); "
                               "check api_user and api_password", status=401, method=method, path=path) from None
        except requests.exceptions.SSLError as error:
            text = str(error)
            harmless = method == "GET" or path == "access/ticket"
            if not (_TLS_REFUSED.search(text) or (_NO_TLS in text and harmless)):
                # Perhaps after the handshake: the request may have been sent.
                raise OutcomeUnknown(f"{where}: the encrypted connection broke before the answer", method=method, path=path) from None
            raise Unreachable(f"the certificate of {self.settings.where} is not trusted: {_tls_reason(error)}; set ca_path to its CA "
                              "(/etc/pve/pve-root-ca.pem of the node), or correct api_host", path=path) from None
        except requests.exceptions.ConnectTimeout:
            raise Unreachable(f"{self.settings.where} does not answer within {self.settings.api_timeout} s; check api_host, api_port and the network",
                              path=path) from None
        except requests.exceptions.Timeout:
            raise OutcomeUnknown(f"{where}: no answer within {self.settings.api_timeout} s (api_timeout)", method=method, path=path) from None
        except requests.exceptions.TooManyRedirects:
            raise OutcomeUnknown(f"{where}: redirected elsewhere; set api_host to the Proxmox node itself", method=method, path=path) from None
        except requests.exceptions.ConnectionError as error:
            if _never_connected(error):
                raise Unreachable(f"{self.settings.where} cannot be reached: {_reason(error)}; check api_host, api_port and the network",
                                  path=path) from None
            raise OutcomeUnknown(f"{where}: the connection was cut before the answer: {_reason(error)}", method=method, path=path) from None
        except requests.exceptions.RequestException as error:
            raise OutcomeUnknown(f"{where}: {_reason(error)}", method=method, path=path) from None
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
            # proxmoxer looks for "data" in whatever was sent; not there means that this is no Proxmox answer.
            raise OutcomeUnknown(f"{where}: the answer is not what Proxmox sends; is api_host a Proxmox node?", method=method, path=path) from None
        except OSError as error:
            if self._api is not None:
                raise OutcomeUnknown(f"{where}: {error}", method=method, path=path) from None
            raise Unreachable(f"{where}: {error}; is ca_path right?", path=path) from None
        except Exception as error:
            # subprocess.TimeoutExpired of the local backend, without importing subprocess for it
            if type(error).__name__ == "TimeoutExpired":
                raise OutcomeUnknown(f"{where}: pvesh did not end within {self.settings.api_timeout} s (api_timeout)", method=method, path=path) from None
            raise

    def _api_error(self, method: str, path: str, where: str, error: Any) -> ProxmoxError:
        status = int(error.status_code)
        text = " ".join(str(error.content or error.status_message or "").split())
        errors = error.errors if isinstance(error.errors, dict) and not isinstance(error.errors.get("errors"), bytes) else None
        if errors:
            text = f"{text} {'; '.join(f'{name}: {value}' for name, value in errors.items())}".strip()
        for secret in (self.settings.api_password, self.settings.api_token_secret):
            # What quotes a request may quote its header. A value this short would be found in half of all words.
            if secret and len(secret) > 3:
                text = text.replace(secret, "(secret)")
        text = text[:1000]
        facts = {"status": status, "text": text, "method": method, "path": path}
        if status == 401:
            return AccessDenied(f"Proxmox on {self.settings.where} refuses the credentials of {self.settings.login} ({status} {text}); "
                                "check api_user, api_token_id and api_token_secret (and whether the token has expired)", **facts)
        if status == 403:
            # Proxmox does not always name the privilege.
            named = re.search(r"\b(VM|SDN|Sys|Datastore|Pool)\.\w+", text)
            advice = "the privilege named there" if named else _NEEDS.get(f"{method} {_template(path)}", "the missing privilege")
            return AccessDenied(f"{where}: {self.settings.login} may not do that ({status} {text}); grant {advice}", **facts)
        if self.settings.api_host is None and _SSH.search(text):
            # pvesh reaches other nodes by ssh; its end tells nothing of the request's.
            if "connect to host" in text:
                return Unreachable(f"{where}: the node does not answer ({text})", **facts)
            return OutcomeUnknown(f"{where}: whether it was carried out is not known ({text})", **facts)
        if status in _NOT_DELIVERED:
            return Unreachable(f"{where}: the node does not answer ({status} {text or 'no route to the node'})", **facts)
        if status in _UNKNOWN:
            return OutcomeUnknown(f"{where}: whether it was carried out is not known ({status} {text})", **facts)
        return ApiError(f"{where}: {status} {text}", **facts)


def _refuse_redirect(response: Any, **_: Any) -> None:
    """A redirect without a target would be taken for success with an empty answer."""
    if 300 <= response.status_code < 400:
        import requests

        raise requests.exceptions.TooManyRedirects("redirected", response=response)


def _import_proxmoxer() -> Any:
    try:
        import proxmoxer
        import requests  # noqa: F401 - proxmoxer ends the process when it is missing
    except ImportError as error:
        raise InvalidInput(f"the Python library {error.name} is missing on this host: install python3-proxmoxer and python3-requests "
                           "(Debian), or pip install proxmoxer requests", library=error.name) from None
    return proxmoxer


def _pool() -> type:
    from urllib3.connectionpool import HTTPSConnectionPool

    class Pool(HTTPSConnectionPool):
        """Sends nothing over a connection that was idle for too long; urllib3 only knows those that are closed already."""

        def _put_conn(self, conn: Any) -> None:
            if conn is not None:
                conn.idle_since = time.monotonic()
            super()._put_conn(conn)

        def _get_conn(self, timeout: float | None = None) -> Any:
            conn: Any = super()._get_conn(timeout)
            if time.monotonic() - getattr(conn, "idle_since", math.inf) > _IDLE_SECONDS:
                conn.close()
            return conn

    return Pool


class _Unspoken:
    """What pvesh printed where no JSON was to be had: a method that returns nothing prints its log, or nothing at all."""

    def __init__(self, text: str) -> None:
        self.text = " ".join(text.split())[:1000]


def _parts(value: Any) -> list[str]:
    # Proxmox writes the parts of a property string in its own order, and ends descriptions with a line feed.
    return sorted(str(value).rstrip("\n").split(","))


def _send(api: Any, method: str, path: str, params: dict[str, Any], *, local: bool) -> Any:
    parts = [quote(part, safe=":!@-._~") for part in path.split("/")]
    found = getattr(api(parts), method.lower())(**{name.replace("_", "-"): value for name, value in params.items() if value is not None})
    # proxmoxer hands out what it could not parse (and what pvesh printed) as {"errors": ...}: never take that for data.
    if isinstance(found, dict) and set(found) == {"errors"}:
        if local and method == "PUT" and path.endswith("/config"):
            return _Unspoken(str(found["errors"]))
        raise ValueError("not JSON")
    return found


def changed(text: str) -> bool:
    """True when Proxmox says by this that the configuration is not the one of the digest any more; some releases write it with two s."""
    return re.search("checksum miss?match", text) is not None


def not_begun(text: str) -> bool:
    """True when Proxmox says by this that it did not begin: no worker, or a lock not got."""
    return any(part in text for part in _NOT_BEGUN)


def _may_retry(method: str, path: str, error: ProxmoxError) -> bool:
    if isinstance(error, ApiError):
        return not_begun(error.text) and (method == "GET" or not _UNGUARDED.search(path))
    if method != "GET":
        return False
    return isinstance(error, OutcomeUnknown) and "no answer within" not in error.message


def _template(path: str) -> str:
    """The kind of a request, for counting: names and numbers replaced."""
    path = re.sub(r"/tasks/[^/]+", "/tasks/{upid}", path)
    path = re.sub(r"^nodes/[^/]+", "nodes/{node}", path)
    return re.sub(r"/qemu/\d+", "/qemu/{vmid}", path)


def _never_connected(error: Exception) -> bool:
    text = str(error)
    return any(name in text for name in ("NewConnectionError", "NameResolutionError", "ConnectTimeoutError", "Connection refused",
                                         "Name or service not known", "Failed to establish"))


def _reason(error: Exception) -> str:
    text = str(error)
    found = re.search(r"(Connection refused|Name or service not known|Temporary failure in name resolution|No route to host|"
                      r"Network is unreachable|Connection reset by peer|Remote end closed connection|Read timed out|IncompleteRead)", text)
    return found[1] if found else type(error).__name__


def _tls_reason(error: Exception) -> str:
    found = re.search(r"certificate verify failed: ([^(\[]+)|(Hostname mismatch[^.]*)|(hostname \S+ doesn't match)|(WRONG_VERSION_NUMBER)", str(error))
    return next((part.strip() for part in found.groups() if part), "TLS failed") if found else "TLS failed"
