# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The set-up of AWX: the project and its sync."""

from __future__ import annotations

import pytest

from support.awx import Awx
from support.awx_setup import NAMES, PROJECT_URL, SetUp, list_writes, read_failure


def test_a_sync_that_fails_is_told_with_its_reason(awx: Awx, set_up: SetUp) -> None:
    """W1: no template is tried before, and the login in the address is not shown."""
    url = "https://me:hunter2@git.example.net/nowhere.git"
    awx.sync_failures[url] = f"fatal: repository '{url}' not found"
    run = set_up(awx_project_scm_url=url)
    message = read_failure(run)
    assert "project agentlab: its sync ended as failed: fatal: [localhost]" in message and "not found" in message
    assert "awx_project_scm_url" in message and "hunter2" not in run.output
    assert awx.objects["job_templates"] == []
    # Mended, the next run goes on.
    del awx.sync_failures[url]
    set_up(awx_project_scm_url=url).ok()
    assert len(awx.objects["job_templates"]) == len(NAMES)


def test_a_repository_without_our_playbooks_at_its_top_is_told(awx: Awx, set_up: SetUp) -> None:
    awx.repositories[PROJECT_URL] = ["awx/job.yml", "awx/prune.yml"]
    message = read_failure(set_up())
    assert (
        "sandbox_create.yml" in message
        and "not at the top of the repository" in message
        and awx.objects["job_templates"] == []
    )
    # A project that was there: the set-up syncs it once more before it says so.
    del awx.repositories[PROJECT_URL]
    awx.writes.clear()
    set_up().ok()
    assert "POST /api/v2/projects/N/update/" not in list_writes(awx)


def test_a_sync_that_does_not_end_is_given_up(awx: Awx, set_up: SetUp) -> None:
    awx.sync_reads = 10**6
    message = read_failure(set_up(awx_project_timeout=1))
    assert "its sync did not end within 1 s (awx_project_timeout; status running)" in message


@pytest.mark.parametrize("status", ["never updated", "failed", "running"])
def test_a_project_of_the_user_is_synced_first(awx: Awx, set_up: SetUp, status: str) -> None:
    number = awx.add("projects", name="mine", organization=1, scm_type="git", scm_url=PROJECT_URL, status=status)
    if status == "running":
        awx._start_sync(awx.find_row("projects", number))
    set_up(awx_project="mine", awx_project_scm_url=None).ok()
    assert (
        awx.find_row("projects", number)["status"] == "successful"
        and awx.find_row("projects", number)["description"] == ""
    )
    assert ("POST /api/v2/projects/N/update/" in list_writes(awx)) == (status != "running")


def test_the_cache_of_the_project_is_an_option(awx: Awx, set_up: SetUp) -> None:
    """W11"""
    set_up().ok()
    awx.writes.clear()
    set_up(awx_project_update_on_launch=False, awx_project_cache_timeout=86400).ok()
    project = awx.find_named("projects", "agentlab")
    assert (project["scm_update_on_launch"], project["scm_update_cache_timeout"]) == (False, 86400)
    assert list_writes(awx) == ["PATCH /api/v2/projects/N/"]
