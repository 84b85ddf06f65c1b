# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Explain why the certificate of a node was refused: its dates, the dates of its CA, or its names.

The error of the TLS library shows neither dates nor names. This module is imported only after a refusal.
"""

from __future__ import annotations

import re
import socket
import ssl
import time
from datetime import UTC, datetime
from typing import Any

from ..config import ProxmoxSettings

# Timeout of a connection that reads the certificate again.
_SECONDS = 5
# Names of the certificate to quote in a message.
_MOST_NAMES = 6
# Error texts of OpenSSL (3 and 1.1) and of urllib3 1.26 (Debian 12).
_DATES = re.compile(r"has expired|not yet valid")
_NAMES = re.compile(
    r"[Hh]ostname mismatch|IP address mismatch|doesn't match|no appropriate (commonName|subjectAltName)"
)
# The validity is a sequence of two times (UTCTime until 2049, GeneralizedTime afterwards).
_TIME = rb"(?:\x17\x0d(\d{12})|\x18\x0f(\d{14}))Z"
_VALIDITY = re.compile(_TIME + _TIME)
_PEM = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)


def explain(settings: ProxmoxSettings, text: str) -> str | None:
    """Return the message for a refused certificate, or None when neither dates nor names are the cause.

    ``text`` is the error of the TLS library. The certificate is read again, over a new connection.
    """
    of_node = f"the certificate of {settings.where}"
    if _NAMES.search(text):
        names = _read_names(settings)
        told = f", but for {', '.join(names)}" if names else ""
        return (
            f"{of_node} is not for {settings.api_host}{told}: set api_host to a name that is in it, or renew it on the "
            "node (pvecm updatecerts -f)"
        )
    if not _DATES.search(text):
        return None
    problem = _find_date_problem(_read_certificate(settings))
    if problem is not None and problem.startswith("is not valid"):
        return (
            f"{of_node} {problem}: check the date of this host (timedatectl); where that is right, set the date of "
            "the node, then renew the certificate there (pvecm updatecerts -f)"
        )
    if problem is None:
        for authority in _read_authorities(settings.ca_path):
            problem = _find_date_problem(authority)
            if problem is not None:
                return (
                    f"{of_node} cannot be verified: the CA certificate in {settings.ca_path} {problem}. Copy the "
                    "present /etc/pve/pve-root-ca.pem of the node there, or check the date of this host"
                )
    expired = "is not yet valid" if "not yet valid" in text else "expired"
    return (
        f"{of_node} {problem or expired}: renew it on the node (pvecm updatecerts -f), or check the date of this host"
    )


def _find_date_problem(certificate: bytes) -> str | None:
    """Return "expired on DATE" or "is not valid before DATE" for a certificate (DER), or None when it is valid now."""
    dates = _VALIDITY.search(certificate)
    if dates is None:
        return None
    begin, end = (
        datetime.strptime((b"20" + short if short else long).decode(), "%Y%m%d%H%M%S").replace(tzinfo=UTC)
        for short, long in (dates.group(1, 2), dates.group(3, 4))
    )
    now = time.time()
    if end.timestamp() < now:
        return f"expired on {end:%Y-%m-%d}"
    return f"is not valid before {begin:%Y-%m-%d}" if begin.timestamp() > now else None


def _read_certificate(settings: ProxmoxSettings) -> bytes:
    """Return the certificate of the node (DER), unchecked; b"" when it cannot be read."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        where = (str(settings.api_host), settings.api_port)
        with socket.create_connection(where, timeout=_SECONDS) as plain, context.wrap_socket(plain) as sock:
            return sock.getpeercert(binary_form=True) or b""
    except (OSError, ValueError):
        return b""


def _read_names(settings: ProxmoxSettings) -> list[str]:
    """Return the names in the certificate of the node; [] when it cannot be read or its CA is not trusted."""
    try:
        context = ssl.create_default_context(cafile=settings.ca_path)
        # getpeercert() returns the names of a verified certificate only. So verify the CA, but not the name.
        context.check_hostname = False
        where = (str(settings.api_host), settings.api_port)
        with socket.create_connection(where, timeout=_SECONDS) as plain, context.wrap_socket(plain) as sock:
            certificate: dict[str, Any] = dict(sock.getpeercert() or {})
    except (OSError, ValueError):
        return []
    names = certificate.get("subjectAltName", ())
    return [str(value) for kind, value in names if kind in ("DNS", "IP Address")][:_MOST_NAMES]


def _read_authorities(path: str | None) -> list[bytes]:
    """Return the certificates (DER) in a PEM file; [] when it cannot be read."""
    try:
        with open(path or "", encoding="ascii") as file:
            return [ssl.PEM_cert_to_DER_cert(text) for text in _PEM.findall(file.read())]
    except (OSError, ValueError):
        return []
