# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Look objects of AWX up by name and organization, and write them: what both plans need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ansible_collections.agentlab.proxmox.plugins.module_utils._awx_client import AwxError, Client, Refused
from ansible_collections.agentlab.proxmox.plugins.module_utils._awx_plan import (
    KINDS,
    DesiredObjects,
    Id,
    Later,
    Plan,
    Step,
    advise_on_refusal,
    has_our_mark,
    is_same_value,
    resolve_id,
)


class Planner:
    """Read AWX and plan. One object plans once."""

    def __init__(self, client: Client, desired: DesiredObjects) -> None:
        self.client = client
        self.desired = desired
        self.plan = Plan()
        self.organization = 0

    def find_only(self, path: str, name: str, option: str, **query: Any) -> dict[str, Any] | None:
        """Return the object of that name in the organization; note a problem when there is none or more than one."""
        rows = self.client.list_rows(f"{path}/", name=name, **query)
        if len(rows) == 1:
            return rows[0]
        where = f" in the organization {self.desired.organization}" if "organization" in query else ""
        if rows:
            self.plan.problems.append(
                f"{path} of AWX has {len(rows)} named {name}{where}; rename one of them, or name another with {option}"
            )
        else:
            elsewhere = self.client.list_rows(f"{path}/", name=name) if "organization" in query else []
            beside = f" ({self._describe_owners(elsewhere)}; that is not used)" if elsewhere else ""
            self.plan.problems.append(
                f"{path} of AWX has none named {name}{where} that this user may see{beside}; create it first, log in "
                f"as an administrator of the organization, or name another with {option}"
            )
        return None

    @staticmethod
    def _describe_owners(rows: list[dict[str, Any]]) -> str:
        """Return the clause that names the organizations of these objects, which all have the same name."""
        names = sorted(
            {
                str((row.get("summary_fields") or {}).get("organization", {}).get("name") or "no organization")
                for row in rows
            }
        )
        return f"one of that name belongs to {', '.join(names)}"

    def find(self, path: str, name: str, **query: Any) -> dict[str, Any] | None:
        """Return the first object of that name, or None."""
        rows = self.client.list_rows(f"{path}/", name=name, **query)
        return rows[0] if rows else None

    def add_step(
        self, action: str, kind: str, name: str, run: Callable[[], Any], fields: list[str] | None = None, **more: Any
    ) -> None:
        """Add a step to the plan: ``run`` sends its request. ``more`` are further fields of Step."""
        self.plan.steps.append(Step(action, kind, name, run, fields or [], **more))

    def note_kept(self, kind: str, row: dict[str, Any], why: str) -> None:
        """Note that the object is left as it is, and why."""
        self.plan.notes.append(f"{kind} {row['name']} (id {row['id']}) is kept: {why}")

    def send_change(self, method: str, path: str, kind: str, name: str, body: Any = None) -> Any:
        """Send one change and return the answer. Raises AwxError that names the object and the remedy for a refusal."""
        try:
            return self.client.write(method, path, body)
        except Refused as refused:
            raise AwxError(
                f"AWX at {self.client.host} refuses {path.split('/')[0]} {name} ({refused.status}): "
                f"{refused}{advise_on_refusal(kind, refused)}"
            ) from refused

    def _find_credential_type(self) -> dict[str, Any] | None:
        """Return our credential type, or None. Credential types belong to all organizations."""
        return self.find("credential_types", self.desired.credential_type["name"], kind="cloud")

    def _lacks_system_rights(self) -> bool:
        """Return whether this user is known to be no system administrator of AWX."""
        try:
            users = self.client.list_rows("me/")
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
        """Plan that the object gets the fields of ``body``; return its id.

        ``text`` is its description in release 1.0 (see has_our_mark). ``row`` is the object in AWX, None if it does not
        exist. ``create_path`` returns the path to create it at, otherwise ``path``. ``keep`` names fields that are only
        written when the object is created. ``shown`` replaces values in the diff. ``ours`` says whether the set-up made
        the object; None: by its mark.
        """
        kind, name = KINDS[path], body["name"]
        shown = {**body, **(shown or {})}
        if row is None:
            later = Later()

            def create() -> None:
                target = create_path() if create_path else f"{path}/"
                answer = self.send_change(
                    "POST", target, kind, name, {key: resolve_id(value) for key, value in body.items()}
                )
                later.id = int(answer["id"])

            after = {key: value for key, value in shown.items() if not isinstance(value, Later)}
            self.add_step("created", kind, name, create, after=after)
            return later
        number = int(row["id"])
        differing = [
            key for key, value in body.items() if key not in keep and not is_same_value(key, row.get(key), value)
        ]
        if not differing:
            return number
        ours = has_our_mark(row, text) if ours is None else ours
        if not ours and not self.desired.adopt:
            self.plan.foreign.append(f"{kind} {name} (id {number}; {', '.join(differing)} would be changed)")

        def change() -> None:
            self.send_change(
                "PATCH", f"{path}/{number}/", kind, name, {key: resolve_id(body[key]) for key in differing}
            )

        self.add_step(
            "changed" if ours else "adopted",
            kind,
            name,
            change,
            differing,
            before={key: row.get(key) for key in differing},
            after={key: shown[key] for key in differing if not isinstance(shown[key], Later)},
        )
        return number
