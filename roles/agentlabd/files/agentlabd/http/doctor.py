# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Run the doctor for a client."""

from __future__ import annotations

from .answers import Answer
from .route import Call


def examine(call: Call) -> Answer:
    # Imported here because the doctor is large and seldom used.
    from agentlab_core.doctor import doctor

    examiner = doctor.Doctor(call.service.config)
    try:
        report = examiner.examine(doctor.Scope(template=call.query.get("template")))
        bundle = (
            doctor.make_bundle(examiner, report, hosts=call.query.get("bundle_hosts", False))
            if call.query.get("bundle")
            else None
        )
        return Answer({**doctor.redact_report(examiner, report), "bundle": bundle})
    finally:
        examiner.close()
