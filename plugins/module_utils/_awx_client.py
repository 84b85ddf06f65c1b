# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Requests to the API of AWX: lists with all their pages, and refusals in AWX's own words."""

from __future__ import annotations

import http.client
import json
import re
import time
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode, urlsplit

from ansible.module_utils.urls import open_url

# AWX answers with 502 and 503 while its web pods are restarted; a read may be repeated.
RETRIED_STATUSES = (502, 503, 504)
READ_ATTEMPTS = 3


class AwxError(Exception):
    """AWX cannot be reached, or refuses a request. The text is for the user."""


class Refused(AwxError):
    """AWX answered with an error. ``status`` is the HTTP status, ``answer`` the body as AWX sent it."""

    def __init__(self, message: str, status: int, answer: Any) -> None:
        super().__init__(message)
        self.status = status
        self.answer = answer


def format_answer(answer: Any) -> str:
    """Return the answer of AWX as a text of one line, for a message."""
    text = answer if isinstance(answer, str) else str(answer)
    if re.match(r"\s*<", text):
        return "a web page instead of JSON"
    return " ".join(text.split())[:1000]


class Client:
    """AWX under one address. ``timeout`` is in seconds, for each request."""

    def __init__(
        self,
        host: str,
        api_path: str = "/api/v2",
        token: str = "",
        username: str = "",
        password: str = "",
        validate_certs: bool = True,
        timeout: int = 30,
    ) -> None:
        self.host = host.strip().rstrip("/")
        parts = urlsplit(self.host)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise AwxError(
                f"awx_host: {host!r} is not an address with its scheme. Write it as https://awx.example.net "
                "(with the port and the path, if AWX has any)."
            )
        if parts.username or parts.password:
            raise AwxError(
                "awx_host: the address holds a user or password. Give them as awx_username and awx_password."
            )
        self.api_path = "/" + api_path.strip().strip("/")
        self._headers = {"Accept": "application/json"}
        self._login: dict[str, Any] = {}
        if token.strip():
            self._headers["Authorization"] = f"Bearer {token.strip()}"
        elif username and password:
            self._login = {"url_username": username, "url_password": password, "force_basic_auth": True}
        else:
            raise AwxError(
                "Nobody is logged in to AWX: set CONTROLLER_OAUTH_TOKEN, or CONTROLLER_USERNAME and "
                "CONTROLLER_PASSWORD."
            )
        self.validate_certs = validate_certs
        self.timeout = timeout

    def _build_url(self, path: str, query: dict[str, Any] | None) -> str:
        # The path of a next page comes from AWX and begins at the root of the host.
        if path.startswith("/"):
            parts = urlsplit(self.host)
            url = f"{parts.scheme}://{parts.netloc}{path}"
        else:
            url = f"{self.host}{self.api_path}/{path}"
        return f"{url}?{urlencode(query)}" if query else url

    def send(self, method: str, path: str, body: Any = None, query: dict[str, Any] | None = None) -> tuple[int, Any]:
        """Send one request; return the status and the answer: parsed JSON, otherwise its text.

        Raises AwxError without an answer, and for a redirect.
        """
        url = self._build_url(path, query)
        headers = dict(self._headers)
        data = None
        if body is not None:
            data = json.dumps(body)
            headers["Content-Type"] = "application/json"
        try:
            answer = open_url(
                url,
                data=data,
                headers=headers,
                method=method,
                validate_certs=self.validate_certs,
                timeout=self.timeout,
                follow_redirects="none",
                **self._login,
            )
            status, raw = answer.getcode(), answer.read()
        except HTTPError as error:
            # Reading may fail when the connection breaks off; the status is known all the same.
            try:
                raw = error.read()
            except (OSError, http.client.HTTPException):
                raw = b""
            status = error.code
            if 300 <= status < 400:
                target = error.headers.get("Location", "another address")
                raise AwxError(
                    f"AWX at {self.host} redirects to {target}. Give that address as awx_host, and its path as "
                    "awx_api_path."
                ) from error
        except (URLError, OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise AwxError(f"AWX at {self.host} cannot be reached: {reason}{_advise_on_reason(str(reason))}") from error
        text = raw.decode("utf-8", "replace") if isinstance(raw, bytes) else str(raw)
        if not text.strip():
            return status, None
        try:
            return status, json.loads(text)
        except ValueError:
            return status, text

    def get(self, path: str, **query: Any) -> Any:
        """Return the answer to a read, which is repeated while AWX restarts. Raises Refused for every error of AWX."""
        for attempt in range(READ_ATTEMPTS):
            status, answer = self.send("GET", path, query=query)
            if status not in RETRIED_STATUSES or attempt == READ_ATTEMPTS - 1:
                break
            time.sleep(1)
        kind = path.strip("/").removeprefix(self.api_path.strip("/")).strip("/").split("/")[0]
        if status != 200:
            raise Refused(
                f"AWX at {self.host} answers {status} for {kind}: {format_answer(answer)}"
                f"{self._advise_on_status(status)}",
                status,
                answer,
            )
        return answer

    def _advise_on_status(self, status: int) -> str:
        if status == 401:
            return ". Check CONTROLLER_OAUTH_TOKEN (or CONTROLLER_USERNAME and CONTROLLER_PASSWORD)"
        if status == 404:
            return f". The API is looked for under {self.api_path}; awx_api_path names another path"
        return ""

    def list_rows(self, path: str, **query: Any) -> list[dict[str, Any]]:
        """Return all rows of a list, from all of its pages."""
        rows: list[dict[str, Any]] = []
        answer = self.get(path, **query)
        while True:
            if not isinstance(answer, dict) or "results" not in answer:
                raise AwxError(
                    f"AWX at {self.host} answers {format_answer(answer)} for {path}, which is no list of AWX. "
                    f"Check awx_host and awx_api_path ({self.api_path})."
                )
            rows += answer["results"]
            if not answer.get("next"):
                return rows
            answer = self.get(answer["next"])

    def write(self, method: str, path: str, body: Any = None) -> Any:
        """Send a request that changes something; return the answer. Raises Refused with AWX's text."""
        status, answer = self.send(method, path, body)
        if status not in (200, 201, 202, 204):
            raise Refused(format_answer(answer), status, answer)
        return answer


def _advise_on_reason(reason: str) -> str:
    if "CERTIFICATE_VERIFY_FAILED" in reason or "certificate" in reason.lower():
        return (
            ". Its certificate is not trusted here: add its CA to this machine (or set SSL_CERT_FILE), "
            "or set awx_validate_certs to false"
        )
    if "WRONG_VERSION_NUMBER" in reason or "record layer" in reason:
        return ". It does not speak TLS there: write http://, or give another port"
    return ". Check awx_host and its port"
