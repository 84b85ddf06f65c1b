# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""The wiring of agentlab_lease."""

from __future__ import annotations

from typing import Any

from ansible.module_utils.basic import AnsibleModule

from . import _adapter
from ._core.context import Context, make_failure
from ._core.errors import AgentlabError
from ._core.model import Outcome, Sandbox
from ._core.sandboxes import lease


def run(module: AnsibleModule, context: Context) -> dict[str, Any]:
    """Check the options and look all ids up before anything is renewed; then item by item."""
    params = module.params
    ttl = context.config.parse_ttl(params["ttl"])
    min_remaining = lease.check_min_remaining(params["min_remaining"])
    sandboxes = [context.select_sandbox(**which) for which in _adapter.ids(module)]

    def renew(sandbox: Sandbox) -> Outcome:
        try:
            return lease.renew(
                context, sandbox, ttl, min_remaining=min_remaining, allow_shorten=params["allow_shorten"]
            )
        except AgentlabError as error:
            return make_failure(sandbox, error)

    return _adapter.answer(
        [renew(sandbox) for sandbox in sandboxes], single=params.get("vmids") is None, diff=module._diff
    )
