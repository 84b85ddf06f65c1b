# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Send requests over the https API, with proxmoxer (1.2 of Debian 12 and newer) and requests.

proxmoxer handles paths, tokens and JSON. This file adds:

- A deadline for the whole answer, and limits for its size and depth.
- A new connection instead of one that was idle for long: Proxmox may just be closing it.
- A retry when the TLS handshake of a new connection breaks: nothing has been sent yet.
- The error text from the answer's body: proxies drop the reason line that proxmoxer reads.
- A login by password that fails when Proxmox asks for a second factor.
- Addresses with a path prefix, and IPv6 addresses.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import ssl
import threading
import time
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

from ..config import ProxmoxSettings
from ..errors import AccessDenied, InvalidInput, OutcomeUnknown, ProxmoxError, Unreachable, is_out_of_descriptors
from . import answers

MISSING_LIBRARY: str | None = None
try:
    import proxmoxer
    import requests  # proxmoxer ends the process when requests is missing
    from requests.adapters import HTTPAdapter
    from urllib3.connection import HTTPSConnection
    from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
    from urllib3.exceptions import NewConnectionError
except ImportError as error:
    MISSING_LIBRARY = error.name
    # ansible-test imports this file without the libraries. The classes below then need other base classes.
    requests = SimpleNamespace(
        auth=SimpleNamespace(AuthBase=object), exceptions=SimpleNamespace(RequestException=Exception)
    )  # type: ignore[assignment]
    HTTPAdapter = HTTPSConnection = HTTPConnectionPool = HTTPSConnectionPool = object  # type: ignore[assignment,misc]

# Proxmox VE closes a connection after five idle seconds. If a request is sent at that moment, its outcome is unknown.
IDLE_SECONDS = 4.0
_HANDSHAKES = 3
# Seconds until a ticket is renewed. Proxmox ends it after two hours.
_TICKET_SECONDS = 3600
# TLS failures before any request was sent.
_TLS_REFUSED = re.compile(
    r"CERTIFICATE_VERIFY_FAILED|certificate verify failed|[Hh]ostname mismatch|IP address mismatch|doesn't match|"
    r"no appropriate (commonName|subjectAltName)"
)
# OpenSSL's error for a port that does not speak TLS, and for other data in the middle of a TLS connection.
_NO_TLS = "WRONG_VERSION_NUMBER"
_REASONS = re.compile(
    r"(Connection refused|Name or service not known|Temporary failure in name resolution|No route to host|"
    r"Network is unreachable|Connection reset by peer|Remote end closed connection|Read timed out|IncompleteRead|"
    r"TLS handshake broken)"
)
_NEVER_CONNECTED = (
    "NewConnectionError",
    "NameResolutionError",
    "ConnectTimeoutError",
    "Connection refused",
    "Name or service not known",
    "Failed to establish",
)


class Https:
    """One session with the API of a Proxmox host. Safe to use from several threads.

    The constructor logs in if the settings have a password. It raises InvalidInput without the Python libraries or
    credentials.
    """

    # Proxmox answers a write that starts a task at once.
    awaits_tasks = False

    def __init__(self, settings: ProxmoxSettings) -> None:
        if MISSING_LIBRARY is not None:
            raise InvalidInput(
                f"the Python library {MISSING_LIBRARY} is missing on this host: install python3-proxmoxer and"
                " python3-requests (Debian), or pip install proxmoxer requests",
                library=MISSING_LIBRARY,
            )
        settings.check_credentials()
        self._settings = settings
        verify: bool | str = (
            settings.ca_path if settings.validate_certs and settings.ca_path else settings.validate_certs
        )
        # ProxmoxAPI() sends no request if it gets a token. With a password, _Ticket logs in instead of proxmoxer.
        api = proxmoxer.ProxmoxAPI(
            "proxmox",
            user=settings.user,
            token_name=settings.token_name or "none",
            port=settings.api_port,
            token_value=settings.api_token_secret or "none",
            verify_ssl=verify,
            timeout=settings.api_timeout,
        )
        session = api._store["session"]
        host = f"[{settings.api_host}]" if ":" in str(settings.api_host) else settings.api_host
        api._store["base_url"] = self._url = f"https://{host}:{settings.api_port}{settings.api_path}/api2/json"
        # proxmoxer has no option for the size of the connection pool.
        session.mount("https://", _Adapter(settings))
        session.verify = verify
        self._api, self._session = api, session
        if settings.token_name is None:
            session.auth = _Ticket(self, settings, verify)
            session.auth.login()

    def send(self, method: str, path: str, params: dict[str, Any]) -> Any:
        """Send a request and return the answer's data. Raises AccessDenied, ApiError, Unreachable or OutcomeUnknown."""
        parts = [quote(part, safe=":!@-._~") for part in path.split("/")]
        values = {name.replace("_", "-"): value for name, value in params.items() if value is not None}

        def send_request() -> Any:
            return getattr(self._api(parts), method.lower())(**values)

        data = self._call(method, path, params, send_request)
        # proxmoxer returns {"errors": ...} for an answer that it cannot parse.
        if isinstance(data, (dict, list)) and answers.is_too_deep(data):
            raise self._make_nonsense_error(method, path, too_deep=True)
        if isinstance(data, dict) and set(data) == {"errors"}:
            raise self._make_nonsense_error(method, path)
        return data

    def ended_well(self, upid: str) -> bool:
        """Return False: Proxmox answers when the task has begun."""
        return False

    def shows_input(self, path: str) -> bool:
        """Return False: TLS encrypts the parameters."""
        return False

    def log_in(self, data: dict[str, Any]) -> Any:
        """Log in and return Proxmox's answer. Sends one request, because eight failures lock a second factor."""
        settings = self._settings

        def post() -> Any:
            return requests.Session.request(
                self._session,
                "POST",
                f"{self._url}/access/ticket",
                data=data,
                auth=_keep_request,
                verify=self._session.verify,
                timeout=settings.api_timeout,
            )

        response = self._call("POST", "access/ticket", {}, post)
        # proxmoxer would send the session's cookies instead of the new ticket, so remove them.
        self._session.cookies.clear()
        if response.status_code == 401:
            raise AccessDenied(
                f"Proxmox on {settings.where} refuses the login of {settings.user!r} (status 401); "
                "check api_user and api_password",
                status=401,
                method="POST",
                path="access/ticket",
            )
        if response.status_code >= 400:
            raise answers.make_error("POST", "access/ticket", settings, response.status_code, response.reason, {})
        try:
            answer = response.json()["data"]
            answer["ticket"], answer["CSRFPreventionToken"]
        except (KeyError, TypeError, ValueError, RecursionError):
            raise self._make_nonsense_error("POST", "access/ticket") from None
        return answer

    # ---- errors ----

    def _make_nonsense_error(self, method: str, path: str, *, too_deep: bool = False) -> OutcomeUnknown:
        if too_deep and answers.is_from_guest(path):
            return answers.make_guest_error(method, path, self._settings)
        return OutcomeUnknown(
            f"{method} /{path} on {self._settings.where}: the answer is not what Proxmox sends; check that api_host is "
            "a Proxmox node",
            method=method,
            path=path,
        )

    def _call(self, method: str, path: str, params: dict[str, Any], call: Any) -> Any:
        """Run one request, and turn every exception of the libraries into a ProxmoxError."""
        settings = self._settings
        where = f"{method} /{path} on {settings.where}"
        try:
            return call()
        except ProxmoxError:
            raise
        except proxmoxer.ResourceException as error:
            text = str(error.content or error.status_message or "")
            raise answers.make_error(method, path, settings, int(error.status_code), text, params) from None
        except requests.exceptions.ProxyError as error:
            raise self._make_proxy_error(path, error) from None
        except requests.exceptions.SSLError as error:
            raise self._make_tls_error(method, path, error) from None
        except requests.exceptions.ConnectTimeout:
            raise Unreachable(
                f"{settings.where} does not answer within {settings.api_timeout} s; check api_host, api_port and the "
                f"network{self._describe_proxy()}",
                path=path,
            ) from None
        except requests.exceptions.Timeout:
            raise answers.make_timeout_error(method, path, settings) from None
        except (requests.exceptions.InvalidSchema, requests.exceptions.InvalidURL) as error:
            raise self._make_schema_error(path, error) from None
        except requests.exceptions.ConnectionError as error:
            if "Read timed out" in str(error):
                raise answers.make_timeout_error(method, path, settings) from None
            if is_out_of_descriptors():
                raise answers.make_descriptor_error(path) from None
            if any(name in str(error) for name in _NEVER_CONNECTED):
                raise Unreachable(
                    f"{settings.where} cannot be reached: {_find_reason(error)}; check api_host, api_port and the "
                    f"network{self._describe_proxy()}",
                    path=path,
                ) from None
            raise OutcomeUnknown(
                f"{where}: the connection was cut before the answer: {_find_reason(error)}; "
                f"{answers.describe_outcome(method)}{self._describe_proxy()}",
                method=method,
                path=path,
                cut=True,
            ) from None
        except requests.exceptions.RequestException as error:
            if isinstance(error, _TooLarge) and answers.is_from_guest(path):
                raise answers.make_guest_error(method, path, settings) from None
            raise OutcomeUnknown(
                f"{where}: {_find_reason(error)}; {answers.describe_outcome(method)}",
                method=method,
                path=path,
                cut=isinstance(error, requests.exceptions.ChunkedEncodingError) or None,
            ) from None
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            # proxmoxer reads the key "data" of every answer, also of a list or a text.
            raise self._make_nonsense_error(method, path, too_deep=isinstance(error, RecursionError)) from None
        except OSError as error:
            if is_out_of_descriptors(error):
                raise answers.make_descriptor_error(path) from None
            # requests reads the file in ca_path before it connects.
            raise Unreachable(f"{where}: {error}; check ca_path", path=path) from None

    def _make_tls_error(self, method: str, path: str, error: Exception) -> ProxmoxError:
        """Return Unreachable for a refused certificate or a port without TLS; OutcomeUnknown for a cut connection."""
        text, settings = str(error), self._settings
        if is_out_of_descriptors():
            return answers.make_descriptor_error(path)
        harmless = method == "GET" or path == "access/ticket"
        if not (_TLS_REFUSED.search(text) or (_NO_TLS in text and harmless)):
            # The connection may have failed after the handshake, so the request may have been sent.
            return OutcomeUnknown(
                f"{method} /{path} on {settings.where}: the encrypted connection broke before the answer; "
                f"{answers.describe_outcome(method)}",
                method=method,
                path=path,
                cut=True,
            )
        if _NO_TLS in text:
            return Unreachable(
                f"{settings.where} does not speak TLS, so no request was sent; check api_host and api_port (Proxmox VE "
                f"listens on 8006){self._describe_proxy()}",
                path=path,
            )
        from . import certificate

        return Unreachable(
            certificate.explain(settings, text)
            or f"the certificate of {settings.where} is not trusted: {_find_tls_reason(error)}; set ca_path to its CA "
            "(/etc/pve/pve-root-ca.pem of the node), or correct api_host",
            path=path,
        )

    # ---- proxies of the environment ----

    def _find_proxy(self) -> tuple[str, str] | None:
        """Return (environment variable, proxy without user and password) for this host, or None without a proxy."""
        if requests.utils.should_bypass_proxies(self._url, no_proxy=None):
            return None
        for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
            if os.environ.get(name):
                return name, re.sub(r"^(\w+://)?[^/@]*@", r"\1", os.environ[name])
        return None

    def _describe_proxy(self) -> str:
        proxy = self._find_proxy()
        return f" (requests go through the proxy {proxy[1]} of {proxy[0]}; NO_PROXY makes exceptions)" if proxy else ""

    def _make_proxy_error(self, path: str, error: Exception) -> Unreachable:
        name, shown = self._find_proxy() or ("the environment", "")
        if is_out_of_descriptors():
            return answers.make_descriptor_error(path)
        refused = re.search(r"Tunnel connection failed: ([^'\"\\)]+)", str(error))
        problem = f"refuses ({refused[1].strip()})" if refused else f"cannot be reached ({_find_reason(error)})"
        return Unreachable(
            f"the proxy {shown} of {name} {problem}, so {self._settings.where} was not asked; correct the proxy, or "
            f"put {self._settings.api_host} into NO_PROXY",
            path=path,
        )

    def _make_schema_error(self, path: str, error: Exception) -> ProxmoxError:
        name, shown = self._find_proxy() or ("the environment", "")
        if "SOCKS" in str(error):
            return Unreachable(
                f"the proxy {shown} of {name} needs the Python library PySocks: install python3-socks (Debian) or pip "
                f"install PySocks, or put {self._settings.api_host} into NO_PROXY",
                path=path,
            )
        return Unreachable(
            f"the proxy {shown} of {name} cannot be used. Valid: http://HOST:PORT; correct {name}, or put "
            f"{self._settings.api_host} into NO_PROXY",
            path=path,
        )


def _keep_request(request: Any) -> Any:
    """Return the request unchanged. Without an ``auth`` function, requests would read a password from ~/.netrc."""
    return request


class _Ticket(requests.auth.AuthBase):
    """Log in by password, and renew the ticket every hour."""

    def __init__(self, https: Https, settings: ProxmoxSettings, verify: bool | str) -> None:
        # proxmoxer's session reads these four attributes of its authentication.
        self.verify_ssl, self.timeout, self.cert, self.proxies = verify, settings.api_timeout, None, None
        self._https = https
        self._settings = settings
        self._lock = threading.Lock()
        self._born = -math.inf
        self._ticket = self._token = ""

    def login(self) -> None:
        """Log in and keep the ticket. Raises AccessDenied for a refusal, and if Proxmox asks for a second factor."""
        settings = self._settings
        answer = self._https.log_in({"username": settings.user, "password": settings.api_password})
        if answer.get("NeedTFA"):
            raise AccessDenied(
                f"Proxmox on {settings.where} asks {settings.user!r} for a second factor, which no program can give; "
                "use an API token (api_token_id and api_token_secret)",
                status=401,
                method="POST",
                path="access/ticket",
                tfa=True,
            )
        self._ticket, self._token = answer["ticket"], answer["CSRFPreventionToken"]
        self._born = time.monotonic()

    def get_cookies(self) -> Any:
        jar = requests.cookies.RequestsCookieJar()
        jar.set("PVEAuthCookie", self._ticket)
        return jar

    def get_tokens(self) -> tuple[str, str]:
        return self._ticket, self._token

    def __call__(self, request: Any) -> Any:
        if time.monotonic() - self._born > _TICKET_SECONDS:
            with self._lock:
                if time.monotonic() - self._born > _TICKET_SECONDS:
                    self.login()
            request.headers["Cookie"] = f"PVEAuthCookie={self._ticket}"
        if request.method != "GET":
            request.headers["CSRFPreventionToken"] = self._token
        return request


class _TooLarge(requests.exceptions.RequestException):
    """The answer is larger than LARGEST_ANSWER."""


class _Adapter(HTTPAdapter):
    """Limit every answer in size and time, refuse redirects, and read an error's text from the body."""

    def __init__(self, settings: ProxmoxSettings) -> None:
        self._seconds = settings.api_timeout
        super().__init__(pool_connections=1, pool_maxsize=settings.connections, pool_block=True)
        self.poolmanager.pool_classes_by_scheme = {"http": HTTPConnectionPool, "https": _Pool}

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **options)
        manager.pool_classes_by_scheme = {"http": HTTPConnectionPool, "https": _Pool}
        return manager

    def send(self, request: Any, **options: Any) -> Any:  # type: ignore[override]
        # proxmoxer 1.2 (Debian 12) does not pass the timeout on.
        response = super().send(request, **{**options, "timeout": self._seconds})
        content = bytearray()
        for chunk in response.iter_content(65536):
            content += chunk
            if len(content) > answers.LARGEST_ANSWER:
                response.close()
                raise _TooLarge("the answer is larger than any answer of Proxmox", response=response)
        response._content = bytes(content)
        length = response.headers.get("Content-Length", "")
        if length.isdecimal() and "Content-Encoding" not in response.headers and len(content) < int(length):
            # urllib3 1.26 (Debian 12) accepts a truncated answer.
            raise requests.exceptions.ChunkedEncodingError("IncompleteRead", response=response)
        if 300 <= response.status_code < 400:
            # requests would follow a redirect with the token to another host, and turn a POST into a GET. A redirect
            # without a target would look like success with an empty answer.
            raise requests.exceptions.TooManyRedirects(
                "the request was redirected; set api_host to the Proxmox node itself", response=response
            )
        if response.status_code >= 400:
            response.reason = _read_sentence(response._content) or response.reason
            # proxmoxer appends the body's errors to its own message, differently in each release. So empty the body.
            response._content = b'{"data":null}'
        return response


def _read_sentence(body: bytes) -> str | None:
    """Return the text of an error's body: the message, then the parameters' errors by name; None without a text."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(answer, dict):
        return None
    message, errors = answer.get("message"), answer.get("errors")
    parts = [message.strip()] if isinstance(message, str) else []
    if isinstance(errors, dict):
        parts.append("; ".join(f"{name}: {text}" for name, text in errors.items()))
    return " ".join(parts) or None


class _Reader(io.RawIOBase):
    """Read a socket until a deadline. The socket's own timeout would start again with each byte that arrives."""

    def __init__(self, sock: Any, raw: Any, deadline: float) -> None:
        self._sock = sock
        self._raw = raw
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("timed out")
        self._sock.settimeout(remaining)
        return int(self._raw.readinto(buffer))

    def close(self) -> None:
        super().close()
        # http.client keeps the socket open until the raw reader is closed as well.
        self._raw.close()


class _Connection(HTTPSConnection):
    """One connection that retries a broken TLS handshake and holds each answer to a deadline."""

    deadline = math.inf

    def connect(self) -> None:
        for number in range(1, _HANDSHAKES + 1):
            # Set the deadline first: connect() may already read the answer of a proxy.
            self._set_deadline()
            try:
                super().connect()
                return
            except (ssl.SSLEOFError, ssl.SSLZeroReturnError, ConnectionResetError, BrokenPipeError):
                # pveproxy breaks a handshake once in some thousand connections, when it has just replaced a worker.
                # Nothing was sent yet.
                self.close()
                if number == _HANDSHAKES:
                    raise NewConnectionError(self, "TLS handshake broken") from None
                time.sleep(0.1 * number)

    def request(self, *arguments: Any, **options: Any) -> None:
        seconds = self._set_deadline()
        if self.sock is not None:
            # The socket still has the deadline of the last answer.
            self.sock.settimeout(seconds)
        super().request(*arguments, **options)

    def _set_deadline(self) -> float | None:
        """Set the deadline of the next answer, and return the seconds until then; None without a timeout."""
        seconds = self.timeout if isinstance(self.timeout, (int, float)) else None
        self.deadline = time.monotonic() + seconds if seconds else math.inf
        return seconds

    def response_class(self, sock: Any, *arguments: Any, **options: Any) -> Any:  # type: ignore[override]
        """Return http.client's response with a reader that stops at the deadline."""
        import http.client

        response = http.client.HTTPResponse(sock, *arguments, **options)
        if self.deadline < math.inf:
            response.fp = io.BufferedReader(_Reader(sock, response.fp.detach(), self.deadline))
        return response


class _Pool(HTTPSConnectionPool):
    """Close connections that were idle for too long. urllib3 detects only connections that are already closed."""

    ConnectionCls = _Connection

    def _put_conn(self, conn: Any) -> None:
        if conn is not None:
            conn.idle_since = time.monotonic()
        super()._put_conn(conn)

    def _get_conn(self, timeout: float | None = None) -> Any:
        conn: Any = super()._get_conn(timeout)
        if time.monotonic() - getattr(conn, "idle_since", math.inf) > IDLE_SECONDS:
            conn.close()
        return conn


def _find_reason(error: Exception) -> str:
    text = str(error)
    known = _REASONS.search(text)
    if known:
        return known[1]
    return text if isinstance(error, (_TooLarge, requests.exceptions.TooManyRedirects)) else type(error).__name__


def _find_tls_reason(error: Exception) -> str:
    known = re.search(r"certificate verify failed: ([^(\[]+)", str(error))
    return known[1].strip() if known else "TLS failed"
