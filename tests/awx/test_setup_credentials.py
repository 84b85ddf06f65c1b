# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The set-up of AWX: credentials, their type and their secrets."""

from __future__ import annotations

from typing import Any

import pytest

from support.awx import ORGANIZATION_TOKEN, Awx
from support.awx_setup import NAMES, SetUp, list_writes, read_failure, read_task_lines
from support.double import TOKEN_SECRET
from support.play import REPO


def test_the_credential_holds_all_fields_from_the_start(awx: Awx, set_up: SetUp) -> None:
    """W5: AWX changes no field of a type that is in use."""
    set_up(awx_proxmox_api_port=443, awx_proxmox_validate_certs=False).ok()
    kind = awx.find_named("credential_types", "agentlab Proxmox VE API")
    fields = {field["id"]: field for field in kind["inputs"]["fields"]}
    assert set(fields) == {
        *("api_host", "api_port", "api_user", "api_password", "api_token_id", "api_token_secret"),
        *("validate_certs", "ca_path", "database", "database_password"),
    }
    secret = {name for name, field in fields.items() if field.get("secret")}
    assert secret == {"api_password", "api_token_secret", "database", "database_password"}
    assert kind["injectors"]["env"]["AGENTLAB_API_PORT"] == "{{ api_port | default('') }}"
    variables = (REPO / "playbooks" / "vars" / "agentlab.yml").read_text(encoding="utf-8")
    injected = set(kind["injectors"]["env"])
    assert {name for name in injected if f"'{name}'" not in variables} == set()
    assert awx.find_named("credentials", "agentlab - Proxmox VE API")["inputs"] == {
        "api_host": "pve.example.net",
        "api_port": "443",
        "api_token_id": "agentlab@pve!awx",
        "api_token_secret": TOKEN_SECRET,
        "validate_certs": "false",
        "ca_path": "/etc/pve/pve-root-ca.pem",
    }


def test_a_type_in_use_with_other_fields_is_told_and_a_new_one_can_stand_beside_it(awx: Awx, set_up: SetUp) -> None:
    """W5: the type of an earlier release, used by a credential. Nothing is written before that is known."""
    set_up().ok()
    kind = awx.find_named("credential_types", "agentlab Proxmox VE API")
    kind["inputs"] = {"fields": [field for field in kind["inputs"]["fields"] if field["id"] != "api_port"]}
    awx.writes.clear()
    message = read_failure(set_up())
    assert "its fields differ (missing: api_port)" in message and "in use, here by agentlab - Proxmox VE API" in message
    assert "awx_credential_type_name" in message and awx.writes == []
    set_up(awx_credential_type_name="agentlab Proxmox VE API 2").ok()
    old, new = (
        row["id"]
        for row in sorted(awx.objects["credentials"], key=lambda row: row["id"])
        if row["name"].startswith("agentlab")
    )
    for row in awx.objects["job_templates"]:
        assert new in awx.attached[row["id"]] and old not in awx.attached[row["id"]]
    awx.writes.clear()
    assert "changed=0" in set_up(awx_credential_type_name="agentlab Proxmox VE API 2").ok().stdout
    # Unused, the fields of the old type may be changed.
    awx.objects["credentials"] = [row for row in awx.objects["credentials"] if row["id"] != old]
    set_up().ok()
    assert any(field["id"] == "api_port" for field in kind["inputs"]["fields"])


@pytest.mark.parametrize("option, value, field", [
    ("awx_proxmox_api_host", "other.example.net", "api_host"), ("awx_proxmox_ca_path", "/etc/ssl/other.pem", "ca_path"),
    ("awx_proxmox_api_port", "443", "api_port")])  # fmt: skip
def test_another_value_of_the_credential_is_written_and_the_secret_kept(
    awx: Awx, set_up: SetUp, option: str, value: str, field: str
) -> None:
    """W6: PATCH replaces all inputs; AWX keeps the secret for "$encrypted$"."""
    set_up().ok()
    awx.writes.clear()
    run = set_up(secret="", **{option: value}).ok()
    inputs = awx.find_named("credentials", "agentlab - Proxmox VE API")["inputs"]
    assert inputs[field] == value and inputs["api_token_secret"] == TOKEN_SECRET
    assert list_writes(awx) == [
        "PATCH /api/v2/credentials/N/"
    ] and "credential agentlab - Proxmox VE API: changed (inputs)" in read_task_lines(run)
    assert "changed=0" in set_up(secret="", **{option: value}).ok().stdout
    # Given anew with another host, the secret is written.
    set_up(secret="another-secret-5a5a", **{option: f"{value}x"}).ok()
    assert (
        awx.find_named("credentials", "agentlab - Proxmox VE API")["inputs"]["api_token_secret"]
        == "another-secret-5a5a"
    )


def test_another_secret_alone_is_told_and_written_when_asked(awx: Awx, set_up: SetUp) -> None:
    set_up().ok()
    awx.writes.clear()
    run = set_up(secret="another-secret-5a5a\n").ok()
    assert "awx_update_secrets" in read_task_lines(run) and awx.writes == [] and "another-secret" not in run.output
    changed = set_up(secret="another-secret-5a5a\n", awx_update_secrets=True, diff=True, args=("-vvv",)).ok()
    assert (
        awx.find_named("credentials", "agentlab - Proxmox VE API")["inputs"]["api_token_secret"]
        == "another-secret-5a5a"
    )
    assert "another-secret" not in changed.output and list_writes(awx) == ["PATCH /api/v2/credentials/N/"]


@pytest.mark.parametrize("variables, secret, message", [
    ({}, "", "awx_proxmox_api_token_secret: missing; awx_proxmox_api_token_id needs it. Set PROXMOX_TOKEN_SECRET"),
    ({"awx_proxmox_api_host": None}, TOKEN_SECRET, "awx_proxmox_api_host: missing"),
    ({"awx_proxmox_api_token_id": None}, TOKEN_SECRET, "awx_proxmox_api_token_id: missing"),
    ({"awx_proxmox_api_token_id": None, "awx_proxmox_api_user": "root@pam"}, "", "awx_proxmox_api_password: "
                                                                                 "missing")])  # fmt: skip
def test_half_a_login_is_refused_before_anything_is_written(
    awx: Awx, set_up: SetUp, variables: dict[str, Any], secret: str, message: str
) -> None:
    """W13"""
    for check in (True, False):
        assert message in read_failure(set_up(secret=secret, check=check, **variables))
    assert awx.writes == []


def test_another_token_needs_its_secret(awx: Awx, set_up: SetUp) -> None:
    set_up().ok()
    awx.writes.clear()
    message = read_failure(set_up(secret="", awx_proxmox_api_token_id="agentlab@pve!other"))
    assert "differs from the one in AWX, and another api_token_id has another secret" in message and awx.writes == []


def test_another_machine_credential_takes_the_place_of_the_first(awx: Awx, set_up: SetUp) -> None:
    """W7: AWX refuses a second one of a type."""
    set_up().ok()
    machine = awx.find_named("credential_types", "Machine")["id"]
    other = awx.add("credentials", name="others", credential_type=machine, organization=1)
    would = set_up(check=True, awx_machine_credential="others").ok()
    assert "credential nodes: would be detached from agentlab - create" in read_task_lines(would)
    set_up(awx_machine_credential="others").ok()
    for row in awx.objects["job_templates"]:
        assert (
            other in awx.attached[row["id"]]
            and awx.find_named("credentials", "nodes")["id"] not in awx.attached[row["id"]]
        )
    assert "changed=0" in set_up(awx_machine_credential="others").ok().stdout


def test_an_organization_administrator_can_set_up_without_a_token_in_awx(awx: Awx, set_up: SetUp) -> None:
    """W14: the type is made only when it is needed; who may not make it is message who may."""
    message = read_failure(set_up(token=ORGANIZATION_TOKEN))
    assert "credential type agentlab Proxmox VE API: it is not there yet, and only a system administrator" in message
    assert awx.writes == []
    set_up(token=ORGANIZATION_TOKEN, awx_proxmox_api_host=None, awx_proxmox_api_token_id=None).ok()
    assert not [row for row in awx.objects["credential_types"] if row["kind"] == "cloud"]
    assert len(awx.objects["job_templates"]) == len(NAMES)
    # Made once by a system administrator, it serves everybody.
    set_up().ok()
    awx.writes.clear()
    assert "changed=0" in set_up(token=ORGANIZATION_TOKEN).ok().stdout
