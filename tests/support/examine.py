# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The doctor, as its tests ask it."""

from __future__ import annotations

from typing import Any

from ansible_collections.agentlab.proxmox.plugins.module_utils._core import config
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.doctor import doctor, findings

from support.lab import Lab


def examine(lab: Lab, *, bundle: bool | None = None, template: str | None = None, **options: Any) -> Any:
    """Return the findings by check (those that are not ok first), or the bundle: with hosts (True) or without."""
    settings = config.load({**lab.options, "database": lab.database, **options}, lab.server.environment(lab.folder))
    examiner = doctor.Doctor(settings, now=lab.clock)
    try:
        report = examiner.examine(doctor.Scope(template=template))
        if bundle is not None:
            return doctor.make_bundle(examiner, report, hosts=bundle)
    finally:
        examiner.close()
    assert all(finding.advice for finding in report.findings if finding.status != "ok"), "a finding without advice"
    by_check: dict[str, Any] = {}
    for finding in sorted(report.findings, key=lambda each: findings.STATUSES.index(each.status)):
        by_check.setdefault(finding.check, finding)
    by_check["report"] = report
    return by_check


def list_bad_findings(lab: Lab, check: str, **options: Any) -> list[tuple[str, str]]:
    """Return status and meaning of the findings of one check that are not ok."""
    report = examine(lab, **options)["report"]
    return [
        (finding.status, finding.meaning)
        for finding in report.findings
        if finding.check == check and finding.status != "ok"
    ]
