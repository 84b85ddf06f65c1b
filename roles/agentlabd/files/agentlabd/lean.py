# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Loads libraries without what they bring along and the daemon never uses: it is there for months, so each megabyte counts."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

# What guesses the character set of an answer that does not name it: tables of some megabytes. Proxmox answers in UTF-8.
_DETECTORS = ("chardet", "charset_normalizer")


def server() -> None:
    """aiohttp's server without the HTTP client that its package loads first of all: 2 MB, and the certificate authorities of the host on top."""
    # Compiled, it is C++ and brings libstdc++: 1 MB for three short lists.
    os.environ.setdefault("FROZENLIST_NO_EXTENSIONS", "1")
    _within("aiohttp", "web")


def client() -> None:
    """requests, on which proxmoxer stands; releases that insist on a detector get theirs."""
    with _missing(_DETECTORS), contextlib.suppress(ImportError), warnings.catch_warnings():
        # It says that no detector was found.
        warnings.simplefilter("ignore")
        importlib.import_module("requests")


def _within(name: str, wanted: str) -> None:
    """Load a module of a package, and not what the package's own code loads. That code runs when somebody asks the package for one of its names."""
    found = importlib.util.find_spec(name)
    source = getattr(found.loader, "get_source", None) if found else None
    if found is None or found.loader is None or source is None:
        importlib.import_module(f"{name}.{wanted}")
        return
    load = found.loader.exec_module
    package = importlib.util.module_from_spec(found)
    said = re.search(r"""^__version__ = ["'](.+?)["']""", source(name) or "", re.M)
    # All that its modules ask it for, of the releases so far. (Its metadata would say it too, and read those of all that is installed.)
    vars(package)["__version__"] = said[1] if said else ""
    sys.modules[name] = package
    try:
        importlib.import_module(f"{name}.{wanted}")
    except (ImportError, AttributeError):
        # Another release: everything, in the usual order.
        load(package)
        importlib.import_module(f"{name}.{wanted}")
        return

    def rest(asked: str) -> Any:
        if asked.startswith("__"):
            raise AttributeError(asked)
        vars(package).pop("__getattr__", None)
        load(package)
        return getattr(package, asked)

    vars(package)["__getattr__"] = rest


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
