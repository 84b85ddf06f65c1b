# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Look objects of AWX up by name and organization, and write them: what both plans need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ansible_collections.agentlab.proxmox.plugins.module_utils._awx_client import AwxError, Client, Refused
from ansible_collections.agentlab.proxmox.plugins.module_utils._awx_plan import (
    NAMES,
    DesiredObjects,
    Id,
    Later,
    Plan,
    Step,
    advice,
    known,
    made_here,
    same,
)


class Planner:
    """Read AWX and plan. One object plans once."""

    def __init__(self, client: Client, desired: DesiredObjects) -> None:
        self.client = client
        self.desired = desired
        self.plan = Plan()
        self.organization = 0

    def only(self, path: str, name: str, option: str, **query: Any) -> dict[str, Any] | None:
        """Return the object of that name in the organization; note a problem when there is none or more than one."""
        rows = self.client.rows(f"{path}/", name=name, **query)
        if len(rows) == 1:
            return rows[0]
        where = f" in the organization {self.desired.organization}" if "organization" in query else ""
        if rows:
            self.plan.problems.append(
                f"{path} of AWX has {len(rows)} named {name}{where}; rename one of them, or name another with {option}"
            )
        else:
            elsewhere = self.client.rows(f"{path}/", name=name) if "organization" in query else []
            beside = f" ({self._owners(elsewhere)}; that is not used)" if elsewhere else ""
            self.plan.problems.append(
                f"{path} of AWX has none named {name}{where} that this user may see{beside}; create it first, log in "
                f"as an administrator of the organization, or name another with {option}"
            )
        return None

    @staticmethod
    def _owners(rows: list[dict[str, Any]]) -> str:
        names = sorted(
            {
                str((row.get("summary_fields") or {}).get("organization", {}).get("name") or "no organization")
                for row in rows
            }
        )
        return f"one of that name belongs to {', '.join(names)}"

    def find(self, path: str, name: str, **query: Any) -> dict[str, Any] | None:
        rows = self.client.rows(f"{path}/", name=name, **query)
        return rows[0] if rows else None

    def add(
        self, action: str, kind: str, name: str, run: Callable[[], Any], fields: list[str] | None = None, **more: Any
    ) -> None:
        self.plan.steps.append(Step(action, kind, name, run, fields or [], **more))

    def keep(self, kind: str, row: dict[str, Any], why: str) -> None:
        """Note that the object is left as it is, and why."""
        self.plan.notes.append(f"{kind} {row['name']} (id {row['id']}) is kept: {why}")

    def write(self, method: str, path: str, kind: str, name: str, body: Any = None) -> Any:
        """Send one change; a refusal becomes a message that names the object, and what to do."""
        try:
            return self.client.write(method, path, body)
        except Refused as refused:
            raise AwxError(
                f"AWX at {self.client.host} refuses {path.split('/')[0]} {name} ({refused.status}): "
                f"{refused}{advice(kind, refused)}"
            ) from refused

    def _credential_type_row(self) -> dict[str, Any] | None:
        # Credential types belong to all organizations.
        return self.find("credential_types", self.desired.credential_type["name"], kind="cloud")

    def _lacks_system_rights(self) -> bool:
        try:
            users = self.client.rows("me/")
        except AwxError:
            return False
        return bool(users) and users[0].get("is_superuser") is False

    def ensure(
        self,
        path: str,
        body: dict[str, Any],
        text: str,
        row: dict[str, Any] | None,
        create_path: Callable[[], str] | None = None,
        keep: tuple[str, ...] = (),
        shown: dict[str, Any] | None = None,
        ours: bool | None = None,
    ) -> Id:
        """Plan that the object is as ``body`` says; return its id.

        ``keep`` names fields that are only written when the object is created. ``shown`` replaces values in the diff.
        """
        kind, name = NAMES[path], body["name"]
        shown = {**body, **(shown or {})}
        if row is None:
            later = Later()

            def create() -> None:
                target = create_path() if create_path else f"{path}/"
                answer = self.write("POST", target, kind, name, {key: known(value) for key, value in body.items()})
                later.id = int(answer["id"])

            after = {key: value for key, value in shown.items() if not isinstance(value, Later)}
            self.add("created", kind, name, create, after=after)
            return later
        number = int(row["id"])
        differing = [key for key, value in body.items() if key not in keep and not same(key, row.get(key), value)]
        if not differing:
            return number
        ours = made_here(row, text) if ours is None else ours
        if not ours and not self.desired.adopt:
            self.plan.foreign.append(f"{kind} {name} (id {number}; {', '.join(differing)} would be changed)")

        def change() -> None:
            self.write("PATCH", f"{path}/{number}/", kind, name, {key: known(body[key]) for key in differing})

        self.add(
            "changed" if ours else "adopted",
            kind,
            name,
            change,
            differing,
            before={key: row.get(key) for key in differing},
            after={key: shown[key] for key in differing if not isinstance(shown[key], Later)},
        )
        return number
