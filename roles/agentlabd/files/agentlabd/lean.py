# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Loads libraries without what they bring along and the daemon never uses: it is there for months, so each megabyte counts."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import warnings
from collections.abc import Iterator

# What guesses the character set of an answer that does not name it: tables of some megabytes. Proxmox answers in UTF-8.
_DETECTORS = ("chardet", "charset_normalizer")


def server() -> None:
    """aiohttp. Its HTTP client, which comes with it and is not used here, reads all certificate authorities of the host when it is loaded."""
    before = os.environ.get("SSL_CERT_FILE")
    os.environ["SSL_CERT_FILE"] = os.devnull
    try:
        importlib.import_module("aiohttp.web")
    finally:
        if before is None:
            del os.environ["SSL_CERT_FILE"]
        else:
            os.environ["SSL_CERT_FILE"] = before


def client() -> None:
    """requests, on which proxmoxer stands; releases that insist on a detector get theirs."""
    with _missing(_DETECTORS), contextlib.suppress(ImportError), warnings.catch_warnings():
        # It says that no detector was found.
        warnings.simplefilter("ignore")
        importlib.import_module("requests")


@contextlib.contextmanager
def _missing(names: tuple[str, ...]) -> Iterator[None]:
    """Modules that cannot be imported for the moment, as if they were not installed."""
    hidden = [name for name in names if name not in sys.modules]
    # None in this place is Python's own word for it.
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
