# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Clone the template to a new VM, or resume the clone of a killed run, and bind the record to that VM.

``judge_refusal`` of refusals.py decides what a refused clone means; this file asks Proxmox and acts. Phases in the
journal: "cloning" before the request is sent; "waiting", with the task id, afterwards; "reserved" again as soon as it
is certain that Proxmox made nothing at the VMID.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from .. import states, waiting
from ..context import Context
from ..errors import ApiError, Kept, OutcomeUnknown, ProxmoxError, TaskFailed, TaskUnknown, Unreachable
from ..model import Sandbox
from ..proxmox import identity
from ..proxmox.answers import LOCK_PAUSE
from ..store import journal
from ..store.journal import CreationNote
from ..store.records import Claim
from ..vm import binding
from ..vm.locate import Located, locate
from . import refusals, update
from . import template as templates
from .refusals import Attempt, Step
from .spec import Spec

# Seconds to look for a clone whose answer was cut. Proxmox VE lists a new VM within a second of the request.
_CUT_SECONDS = 5.0


@dataclass(slots=True)
class Creation:
    """One creation under way: its claim, the desired sandbox, and the steps done so far."""

    ctx: Context
    claim: Claim
    spec: Spec
    # The record as last written.
    sandbox: Sandbox
    note: CreationNote = field(default_factory=CreationNote)
    # Tasks that this run started, and their warnings.
    upids: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def journal(self, phase: str) -> None:
        """Write the next phase to the journal."""
        self.ctx.records.write_journal(self.claim, "create", phase, self.note.format_detail())


def note_request(note: CreationNote, ctx: Context, spec: Spec, template: templates.Template, node: str | None) -> None:
    """Note what this run, or a later one, needs to send the clone request."""
    note.template, note.template_name, note.template_node = template.vmid, template.name, template.node
    note.node = node
    note.full, note.storage = templates.choose_clone_mode(ctx, spec, template)
    note.knows_mode = True


def make_vm(creation: Creation) -> Located | None:
    """Clone the template, or resume the clone of a killed run, and bind the record to the new VM.

    Returns the VM with its verdict from after the clone task; None when an earlier run sent the clone request, or when
    its answer was lost. Raises CreationFailed for a given VMID that another VM has, Kept for a VM that may be the clone
    or not, and the refusal itself where neither time nor another VMID would help.
    """
    ctx, spec, note, unfinished = creation.ctx, creation.spec, creation.note, creation.claim.interrupted
    if note.template is None:
        template = templates.find(ctx, spec.template or ctx.config.template, creation.sandbox.node)
        note_request(note, ctx, spec, template, creation.sandbox.node)
    earlier = replace(
        note,
        phase=unfinished.phase if unfinished else journal.RESERVED,
        at=unfinished.updated_at if unfinished else 0,
    )
    resumed = earlier.clone_sent
    # An earlier run sent a clone request and lost the answer: Proxmox may still carry the clone out.
    doubt = earlier if resumed and not note.upid else None
    tries = 0
    occupied: set[int] = set(ctx.named_vmids)
    while True:
        if resumed and not note.upid:
            if _bind_earlier_clone(creation, doubt or note):
                return None
            resumed = False
        try:
            _send_and_wait(creation)
        except OutcomeUnknown as error:
            # pveproxy sometimes cuts the answers of a password login, but still carries the request out.
            if not error.detail.get("cut") or not _bind_cut_clone(creation):
                raise
            return None
        except TaskUnknown as error:
            if creation.upids:
                raise
            # The result of an earlier run's task is lost. Decide by the VM that stands at the VMID now.
            if _bind_lost_clone(creation, earlier, error):
                return None
            resumed = False
        except (ApiError, TaskFailed) as error:
            tries += 1
            attempt = Attempt(tries, spec.vmid is not None, doubt is not None, bool(note.upid))
            judgement = refusals.judge_refusal(error, attempt)
            while judgement.step in (Step.PROVE_ABSENCE, Step.LOOK_AGAIN):
                if judgement.step is Step.PROVE_ABSENCE:
                    attempt = replace(attempt, vmid_is_free=_is_vmid_free(creation))
                else:
                    # The VMID may be taken by our own earlier clone, whose answer was lost.
                    if _bind_earlier_clone(creation, doubt or note, vmid_taken=True):
                        return None
                    doubt, attempt = None, replace(attempt, doubtful=False)
                judgement = refusals.judge_refusal(error, attempt)
            if judgement.nothing_made:
                _forget_request(creation)
            if judgement.step is Step.GIVE_UP:
                raise
            if judgement.step is Step.REFUSE_VMID:
                raise refusals.make_occupied_error(
                    creation.sandbox.vmid, "one that these credentials may not see, or a container"
                ) from None
            if judgement.step is Step.WAIT:
                ctx.clock.sleep(LOCK_PAUSE)
            else:
                occupied |= {creation.sandbox.vmid, *ctx.cluster.list_vms(fresh=True)}
                creation.sandbox = ctx.records.renumber(
                    creation.claim, creation.sandbox, vmid_range=ctx.config.vmid_range, occupied=occupied
                )
        else:
            return _bind_new_vm(creation)


def _send_and_wait(creation: Creation) -> None:
    """Send the clone request unless the journal has its task, and wait for the task."""
    ctx, sandbox = creation.ctx, creation.sandbox
    upid = creation.note.upid
    if not upid:
        upid = _send_clone(creation)
        creation.upids.append(upid)
    creation.warnings += ctx.tasks.wait(
        upid, f"clone template {creation.note.template} to VM {sandbox.vmid}", ctx.wait_timeout
    )


def _is_vmid_free(creation: Creation) -> bool:
    vmid = creation.sandbox.vmid
    return creation.ctx.cluster.prove_absent([vmid])[vmid].absent is True


def _forget_request(creation: Creation) -> None:
    """Write to the journal that no clone request of ours is under way."""
    creation.note.upid = None
    creation.journal(journal.RESERVED)


def _bind_earlier_clone(creation: Creation, doubt: CreationNote, *, vmid_taken: bool = False) -> bool:
    """Bind the record to the VM if that is the clone that an earlier run asked for. Return whether it is.

    ``vmid_taken``: Proxmox says that some VM has the VMID, so a VMID without a visible VM is no proof. Raises Kept for
    a VM that may be the clone or not.
    """
    located = _await_doubt(creation, doubt)
    if located.match:
        creation.sandbox = creation.ctx.records.get(creation.sandbox.uuid)
        return True
    foreign = located.verdict is not None and located.verdict.identity == identity.FOREIGN
    no_verdict = located.node is None or located.verdict is None
    if not foreign and (vmid_taken or not no_verdict):
        raise Kept(
            "ambiguous",
            f"sandbox {creation.sandbox.vmid}: whether VM {creation.sandbox.vmid} is the clone that was begun is not "
            "certain; it was left alone. Look at it, and remove it by hand if it is to go",
        ) from None
    return False


def _bind_lost_clone(creation: Creation, earlier: CreationNote, error: TaskUnknown) -> bool:
    """Bind the record to the VM if an earlier run's clone task, whose result is lost, made it. Return whether it did.

    Otherwise forget the request. Raises Kept when neither is certain.
    """
    ctx, sandbox = creation.ctx, creation.sandbox
    located = binding.locate_unbound(ctx, sandbox, creation.claim, earlier)
    if located.match:
        creation.sandbox = ctx.records.get(sandbox.uuid)
        return True
    foreign = located.verdict is not None and located.verdict.identity == identity.FOREIGN
    if not foreign and (located.node is not None or not _is_vmid_free(creation)):
        raise Kept(
            "ambiguous",
            f"sandbox {sandbox.vmid}: {error.message}. Whether VM {sandbox.vmid} is its clone is not certain, "
            "so it was left alone",
            vmid=sandbox.vmid,
            remedy="remove",
        ) from None
    _forget_request(creation)
    return False


def _bind_new_vm(creation: Creation) -> Located | None:
    """Bind the record to the VM that the clone task made. Returns the VM; None when an earlier run sent the request."""
    ctx, sandbox = creation.ctx, creation.sandbox
    # Look on the clone's node first. Reading the VM list would cost one more request.
    ctx.cluster.add_vm(sandbox.vmid, sandbox.node)
    located = locate(ctx, sandbox)
    if located.node is None:
        raise Kept(
            "unknown",
            f"sandbox {sandbox.vmid}: the clone ended well, but no VM with that VMID is to be seen (removed "
            "meanwhile, or hidden from these credentials?)",
            remedy="remove",
        )
    smbios = identity.read_smbios_uuid(located.config)
    if located.verdict is None or located.verdict.identity != identity.UNBOUND or smbios is None:
        raise Kept(
            "ambiguous",
            f"sandbox {sandbox.vmid}: the clone ended well, but the VM now at that VMID does not carry its marker; it "
            "was left alone",
            remedy="remove",
            evidence=located.verdict.evidence if located.verdict else None,
        )
    ctx.cluster.note_own_vm(sandbox.vmid)
    creation.sandbox = bound = binding.bind(ctx, creation.claim, sandbox, smbios, located)
    # Judge the same configuration again, now against the SMBIOS UUID that the record has just stored.
    located.verdict = identity.judge(bound.uuid, bound.smbios_uuid, located.config)
    return located if creation.upids else None


def _send_clone(creation: Creation) -> str:
    """Write "cloning" to the journal, send the clone request, and write its task id. Returns the task id."""
    ctx, spec, note = creation.ctx, creation.spec, creation.note
    if creation.sandbox.state == states.REQUESTED:
        creation.sandbox = ctx.records.change(
            creation.claim,
            creation.sandbox,
            "create",
            to=states.PROVISIONING,
            outcome="decided",
            reason="clone",
            evidence={
                "template": note.template,
                "template_name": note.template_name,
                "options": update.select_remembered(spec),
            },
            journal=(journal.CLONING, note.format_detail()),
        )
    else:
        creation.journal(journal.CLONING)
    if not note.knows_mode:
        # Journals of earlier releases lack these fields.
        template = templates.find(ctx, str(note.template), creation.sandbox.node)
        note_request(note, ctx, spec, template, creation.sandbox.node)
    try:
        upid = _post_clone(creation)
    except ApiError as error:
        if "Linked clone feature is not supported" not in error.text or note.full is not None or not ctx.config.storage:
            raise
        # Proxmox made nothing. The configured storage is the template's own, and that storage supports full clones
        # only.
        note.full, note.storage = True, ctx.config.storage
        creation.journal(journal.CLONING)
        upid = _post_clone(creation)
    except Unreachable:
        # The connection was refused, so the request was certainly not carried out.
        creation.journal(journal.RESERVED)
        raise
    if not isinstance(upid, str):
        raise OutcomeUnknown(
            f"clone to VM {creation.sandbox.vmid}: Proxmox answered without a task id; run again to find out what "
            "became of it"
        )
    note.upid = upid
    creation.journal(journal.WAITING)
    return upid


def _post_clone(creation: Creation) -> Any:
    """Send the clone request, and return Proxmox VE's answer."""
    ctx, spec, sandbox, note = creation.ctx, creation.spec, creation.sandbox, creation.note
    return ctx.client.post(
        f"nodes/{note.template_node}/qemu/{note.template}/clone",
        newid=sandbox.vmid,
        name=sandbox.name,
        description=identity.replace_text(
            {"description": identity.make_marker(sandbox.uuid, ctx.records.read_database_id())}, spec.description or ""
        ),
        pool=spec.pool or ctx.config.pool,
        storage=note.storage,
        target=sandbox.node if sandbox.node != note.template_node else None,
        full=None if note.full is None else int(note.full),
    )


def _bind_cut_clone(creation: Creation) -> bool:
    """Wait for the clone whose answer was just cut, and bind the record to it. Return whether it appeared.

    Waits _CUT_SECONDS, and longer while a VM is being cloned to that VMID. False leaves the outcome unknown, as after a
    killed run: Proxmox VE may still carry the request out.
    """
    ctx, sandbox = creation.ctx, creation.sandbox
    request = replace(creation.note, phase=journal.CLONING, at=ctx.clock.now())
    patience = min(_CUT_SECONDS, ctx.config.doubt_window / 4)
    deadline = ctx.clock.monotonic() + patience

    def look() -> bool | None:
        nonlocal deadline
        row: dict[str, Any] = {}
        try:
            row = ctx.cluster.list_vms(fresh=True).get(sandbox.vmid) or {}
            if row and binding.locate_unbound(ctx, sandbox, creation.claim, request).match:
                creation.sandbox = ctx.records.get(sandbox.uuid)
                return True
        except (Kept, ProxmoxError):
            # The VM is being cloned, or cannot be read at the moment.
            pass
        now = ctx.clock.monotonic()
        if row.get("lock"):
            deadline = now + patience
        return False if now > deadline else None

    return waiting.wait_for_result(ctx.clock, ctx.wait_timeout, look, pause=min(0.5, patience), longest=0.5) or False


def _await_doubt(creation: Creation, doubt: CreationNote) -> Located:
    """Wait until it is certain whether Proxmox carried out the clone of a killed run, and return the VM.

    ``doubt``: what that run noted.
    """
    ctx, sandbox = creation.ctx, creation.sandbox
    last_refusal: Kept | None = None

    def look() -> Located | None:
        nonlocal last_refusal
        last_refusal = None
        ctx.cluster.list_vms(fresh=True)
        try:
            located = binding.locate_unbound(ctx, sandbox, creation.claim, doubt)
        except Kept as error:
            if error.reason not in ("unknown", "locked"):
                raise
            last_refusal = error
            return None
        return None if located.verdict and located.verdict.identity == identity.UNKNOWN else located

    located = waiting.wait_for_result(ctx.clock, ctx.wait_timeout, look, pause=1.0, longest=1.0)
    if located is not None:
        return located
    raise last_refusal or Kept(
        "locked",
        f"sandbox {sandbox.vmid}: the clone that an earlier run began has not ended within {ctx.wait_timeout} "
        "s (wait_timeout)",
    )
