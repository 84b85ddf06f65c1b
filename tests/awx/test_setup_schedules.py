# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The set-up of AWX: schedules and notifications."""

from __future__ import annotations

from support.awx import Awx
from support.awx_setup import SetUp, list_writes, read_failure, read_task_lines


def test_a_schedule_that_was_switched_off_stays_off(awx: Awx, set_up: SetUp) -> None:
    """W8"""
    set_up().ok()
    awx.find_named("schedules", "agentlab - nightly prune")["enabled"] = False
    awx.writes.clear()
    assert "changed=0" in set_up().ok().stdout
    # Another time is written, and it stays off.
    set_up(awx_prune_rrule="DTSTART:20260101T040000Z\nRRULE:FREQ=DAILY;INTERVAL=1").ok()
    nightly = awx.find_named("schedules", "agentlab - nightly prune")
    assert nightly["enabled"] is False and nightly["rrule"] == "DTSTART:20260101T040000Z RRULE:FREQ=DAILY;INTERVAL=1"
    assert list_writes(awx) == ["PATCH /api/v2/schedules/N/"]


def test_a_schedule_can_be_left_out(awx: Awx, set_up: SetUp) -> None:
    set_up(awx_prune_rrule="").ok()
    assert [row["name"] for row in awx.objects["schedules"]] == ["agentlab - reconcile"]
    assert "changed=0" in set_up(awx_prune_rrule="").ok().stdout
    run = set_up(awx_prune_rrule="", awx_reconcile_rrule="").ok()
    assert awx.objects["schedules"] == [] and "schedule agentlab - reconcile: deleted" in read_task_lines(run)
    # One that somebody else made under that name is left alone.
    template = awx.find_named("job_templates", "agentlab - prune")["id"]
    awx.add(
        "schedules", name="agentlab - nightly prune", unified_job_template=template, rrule="x", description="theirs"
    )
    assert "changed=0" in set_up(awx_prune_rrule="", awx_reconcile_rrule="").ok().stdout


def test_a_wrong_schedule_is_told_in_the_words_of_awx(awx: Awx, set_up: SetUp) -> None:
    message = read_failure(set_up(awx_prune_rrule="DTSTART:20260101T040000Z RRULE:FREQ=DAILY"))
    assert "refuses job_templates agentlab - nightly prune (400): {'rrule': ['INTERVAL required in rrule.']}" in message
    assert "they stay, and the next run goes on" in message


def test_failures_are_told_to_a_notification(awx: Awx, set_up: SetUp) -> None:
    number = awx.add("notification_templates", name="mail", organization=1)
    set_up(awx_notification="mail").ok()
    for row in awx.objects["job_templates"]:
        assert awx.related["job_templates", row["id"], "notification_templates_error"] == [number]
    assert "changed=0" in set_up(awx_notification="mail").ok().stdout
