# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""The findings of an examination, and the diagnosis, which has all of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

OK, WARNING, PROBLEM, UNKNOWN = "ok", "warning", "problem", "unknown"
# A condition in the daemon's status: the part does not do its work.
FAILS = "fails"
# Worst first. The worst status of a finding is the status of the diagnosis.
STATUSES = (PROBLEM, UNKNOWN, WARNING, OK)


@dataclass(slots=True)
class Finding:
    """The result of one check.

    ``check`` is a stable word for programs. ``meaning`` states a fact and its consequence, ``advice`` the next step.
    """

    check: str
    status: str
    meaning: str
    advice: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def public(self) -> dict[str, Any]:
        return {
            "check": self.check,
            "status": self.status,
            "meaning": self.meaning,
            "advice": self.advice,
            "facts": self.facts,
        }


@dataclass(slots=True)
class Scope:
    """The things to check beside those that the configuration names."""

    template: str | None = None


@dataclass(slots=True)
class Diagnosis:
    """All findings, in the order of the checks, and the commands for a token with the least privileges."""

    findings: list[Finding]
    pveum: list[str]

    @property
    def status(self) -> str:
        statuses = {finding.status for finding in self.findings}
        return next(status for status in STATUSES if status in statuses or status == OK)

    def list_failing(self, limit: str) -> list[Finding]:
        """Return the findings that fail a run, worst first.

        ``limit``: ``problem``; ``warning``, which counts problems and unknowns too; ``never``.
        """
        statuses = {"problem": (PROBLEM,), "warning": (PROBLEM, UNKNOWN, WARNING)}.get(limit, ())
        return sorted(
            (finding for finding in self.findings if finding.status in statuses),
            key=lambda finding: STATUSES.index(finding.status),
        )

    def public(self) -> dict[str, Any]:
        return {
            "status": self.status,
            "problems": sum(finding.status == PROBLEM for finding in self.findings),
            "findings": [finding.public() for finding in self.findings],
            "pveum": self.pveum,
        }


def shorten_list(values: Iterable[Any]) -> str:
    """Return the first five values as one text, each once."""
    unique = list(dict.fromkeys(values))
    return ", ".join(map(str, unique[:5])) + (", ..." if len(unique) > 5 else "")
