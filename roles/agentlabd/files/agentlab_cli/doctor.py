# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The command ``agentlab doctor``: examine everything, and write the bundle for a bug report."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import click

from .errors import REFUSED, Problem
from .framework import Command, Settings, settings
from .progress import Progress
from .text import format_cell, join_lines


@click.command(
    cls=Command,
    usage="[--template <template>] [--bundle <file>]",
    examples=(
        "agentlab doctor",
        "agentlab doctor --json | jq '.findings[] | select(.status != \"ok\")'",
        "agentlab doctor --bundle agentlab-bundle.json",
    ),
    notes=(
        "The doctor only reads. The exit status is 1 if there is a problem. A",
        "warning, or a check that could not be made, is not a problem.",
        "The bundle for a bug report has the findings, the configuration, the",
        "sandboxes and the last events. It has no passwords or secrets, and only you",
        "can read the file (mode 0600).",
    ),
)
@click.option(
    "--template", metavar="<template>", help="VMID or name of the template to check. Default: the configured template."
)
@click.option(
    "--bundle",
    metavar="<file>",
    type=click.Path(dir_okay=False),
    help="Write a bundle for a bug report to this file. An existing file is replaced.",
)
@click.option(
    "--bundle-hosts", is_flag=True, help="Keep the names and addresses of hosts, nodes and VMs in the bundle."
)
@settings
def doctor(to: Settings, template: str | None, bundle: str | None, bundle_hosts: bool) -> None:
    """Check configuration, records, Proxmox VE and daemon.

    For each problem, print what to do next.
    """
    if bundle_hosts and not bundle:
        raise click.UsageError("--bundle-hosts is for --bundle")
    with Progress(lambda: "checking configuration, records, Proxmox VE and daemon", enabled=not to.json):
        answer = to.client.get_patiently(
            "doctor",
            template=template,
            bundle="true" if bundle else None,
            bundle_hosts="true" if bundle_hosts else None,
        )
    to.show_answer(answer, _format_findings)
    if bundle:
        _write_private_file(bundle, answer.data["bundle"])
        click.echo(f"bundle written to {bundle}; look through it before you send it", err=True)
    if answer.data["problems"]:
        sys.stdout.flush()
        sys.exit(REFUSED)


def _format_findings(data: dict[str, Any]) -> str:
    findings = data["findings"]
    width = max((len(str(finding["check"])) for finding in findings), default=0)
    lines = []
    for finding in findings:
        lines.append(
            f"{format_cell(finding['status']):<7}  {format_cell(finding['check']):<{width}}  "
            f"{format_cell(finding['meaning'])}"
        )
        if finding["advice"] and finding["status"] != "ok":
            lines.append(f"{'':<7}  {'':<{width}}  -> {format_cell(finding['advice'])}")
    if data["pveum"] and any(
        finding["status"] != "ok" and finding["check"] in ("configuration", "privileges", "proxmox", "creation")
        for finding in findings
    ):
        lines += [
            "",
            "A token with the least privileges, made as root on a node:",
            *(f"  {format_cell(line)}" for line in data["pveum"]),
        ]
    return "\n".join(lines)


def _write_private_file(path: str, content: Any) -> None:
    """Write the file completely or not at all, readable for its owner only. Replace a link instead of following it."""
    fresh = f"{path}.{os.getpid()}.new"
    try:
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2, ensure_ascii=False)
            file.write("\n")
        os.replace(fresh, path)
    except OSError as error:
        raise Problem(
            f"--bundle {join_lines(path)}: {error.strerror}; give a file in a folder that you may write to"
        ) from error
