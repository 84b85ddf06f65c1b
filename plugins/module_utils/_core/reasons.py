# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""The reasons for leaving a sandbox alone. Answers, metrics and documentation are made from this table."""

from __future__ import annotations

# Word of ``reason`` -> the next step for the user (Markdown).
KEPT: dict[str, str] = {
    "too_young": "wait, or lower `older_than`",
    "protected": "`agentlab sandbox unprotect VMID` (`protected: false`), or `qm set VMID --protection 0`; a VM that "
    "was made a template stays",
    "locked": "wait for the backup or clone; an administrator can `qm unlock VMID`",
    "hibernated": "start it to take it up again, or stop it by force, which throws its saved memory away",
    "node_offline": "bring the node back",
    "ambiguous": "look at the VM: only one of its marks is ours",
    "foreign": "nothing: the VM is somebody else's, the record is closed",
    "unknown": "the message says what could not be read",
    "workspace": "the VM still has a workspace: take the disk off",
    "workspace_in_snapshot": "a snapshot of the VM contains a workspace: delete the snapshot",
    "snippet": "its file with user data cannot be removed: the message names it",
    "busy": "another run works on it: wait, or run again",
    "changed": "somebody changed it or its VM meanwhile: run again",
    "denied": "a privilege is missing: the message names it",
    "rule": "nothing: a rule keeps it, or the next run of the rules decides",
    "clock_jumped": "set the clock right, and wait for `clock_jump_pause`",
    "restored": "the records are an older copy: look at them, renew what is needed, then `agentlab cleanup release`",
}
