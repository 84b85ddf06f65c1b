# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Check everything that a sandbox depends on, and advise how to mend it.

The doctor only reads: the configuration, the records, Proxmox VE and the daemon.

An error ends one check and not the examination: it becomes a finding with the status ``unknown``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..errors import AgentlabError
from . import capacity, cluster, commands, creation, daemon, host, rights, template
from .bundle import make_bundle, redact_report, write_bundle
from .daemon import fetch_resource
from .examination import Examination
from .findings import OK, UNKNOWN, Diagnosis, Finding, Scope
from .privileges import list_needed_privileges, make_pveum_commands

__all__ = [
    "Diagnosis",
    "Doctor",
    "Finding",
    "Scope",
    "fetch_resource",
    "list_needed_privileges",
    "make_bundle",
    "make_pveum_commands",
    "redact_report",
    "write_bundle",
]


Check = Callable[[Examination], Iterable[Finding]]


class Doctor(Examination):
    """Run all checks on one host's configuration."""

    def examine(self, given_scope: Scope | None = None) -> Diagnosis:
        """Run every check, and return all findings. A check may use data that an earlier check has read."""
        scope = given_scope or Scope()
        findings = [
            *self._run_check("configuration", host.check_configuration),
            *self._run_check("database", host.check_database),
            *self._run_check("work", host.check_work),
        ]
        reached = self._run_check("proxmox", cluster.check_proxmox)
        findings += reached
        checks: dict[str, Check] = {
            "cluster": cluster.check_cluster,
            "quorum": cluster.check_quorum,
            "template": lambda exam: template.check_template(exam, scope.template),
            "storage": template.check_storage,
            "creation": creation.check_creation,
            "placement": capacity.check_placement,
            "privileges": rights.check_privileges,
            "commands": commands.check_commands,
            "vmid_range": cluster.check_vmid_range,
            "clock": cluster.check_clock,
        }
        for name, check in checks.items():
            if reached[0].status != OK:
                findings.append(
                    Finding(name, UNKNOWN, "not checked, because Proxmox could not be asked", "see the finding proxmox")
                )
            else:
                findings += self._run_check(name, check)
        findings += self._run_check("daemon", daemon.check_daemon)
        return Diagnosis(findings, rights.make_token_commands(self) if self.pveum is None else self.pveum)

    def _run_check(self, name: str, check: Check) -> list[Finding]:
        findings: list[Finding] = []
        try:
            # extend() keeps the findings that the check yielded before an error.
            findings.extend(check(self))
        except (AgentlabError, OSError) as error:
            why = error.message if isinstance(error, AgentlabError) else f"{error.filename}: {error.strerror}"
            advice = "mend the problem in the message, then run again"
            findings.append(Finding(name, UNKNOWN, f"could not be looked at: {why}", advice))
        return findings
