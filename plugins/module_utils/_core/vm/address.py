# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Find a sandbox's address: ask the guest agent, choose one of the addresses it names, wait for the first one.

What the guest agent answers is written by the guest, so it is data: types are checked, lengths are bounded, and
nothing of it is taken for more than an address.
"""

from __future__ import annotations

import contextlib
import ipaddress
import random
import re
from dataclasses import dataclass
from typing import Any, Union

from .. import states, waiting
from ..context import Context
from ..errors import (
    AccessDenied,
    AgentlabError,
    ApiError,
    Kept,
    NotFound,
    OutcomeUnknown,
    ProxmoxError,
    RecordChanged,
    TaskTimeout,
    Unreachable,
)
from ..model import Outcome, Sandbox
from .locate import Located, look, match_if_readable

Address = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]  # noqa: UP007 - ansible-test reads this as older Python

# Seconds that DHCP gets to bring the IPv4 address after another address was seen.
GRACE_SECONDS = 5.0
# Seconds for which an address counts without another look.
FRESH_SECONDS = 300
# Seconds in one state after which an address counts that is only second best: DHCP has had its time.
SETTLED_SECONDS = 30
# How many guests one pass over many sandboxes asks, and for how many seconds. A silent agent takes three seconds.
MOST_LOOKS = 64
LOOK_SECONDS = 10.0
# No guest has more; what comes after is not looked at.
_MOST_INTERFACES = 256
_MOST_ADDRESSES = 256
_LONGEST_TEXT = 64
_MAC = re.compile(r"([0-9A-Fa-f]{2}(?:[:-][0-9A-Fa-f]{2}){5})")
_UNIQUE_LOCAL = ipaddress.ip_network("fc00::/7")
# Interfaces that programs in the guest make for themselves: nobody outside reaches their addresses.
_INNER = re.compile(
    r"(docker|podman|br-|virbr|lxcbr|lxdbr|veth|cni|flannel|cali|cilium|vxlan|kube|nerdctl|incusbr|vmnet|vboxnet|tap|tun|wg"
    r"|tailscale|zt|dummy|weave|ovs|antrea|crio|lxc|bridge|nodelocaldns|azure|gre|ipip|sit|ip6tnl)"
)
# Proxmox VE takes the keys of the option in any order: fstrim_cloned_disks=1,enabled=1.
_AGENT_ON = re.compile(r"(?:^|,)(?:enabled=)?(?:1|yes|on|true)(?:,|$)", re.IGNORECASE)
_BLOCKED = re.compile(r"[Cc]ommand '?(guest-[a-z-]+)'? has been disabled")
# QEMU's words for a command that this agent was not built with: an old one, or that of another system.
_UNKNOWN = re.compile(r"[Cc]ommand '?(guest-[a-z-]+)'? has not been found|command is not currently supported")


class AgentUnusable(AgentlabError):
    """The guest agent will not answer, however long one waits; the message says why and what to do."""

    code = "guest_agent"


@dataclass(frozen=True, slots=True)
class Choice:
    """The address to use. ``final`` is False while a better one of the same interface may still come (DHCP)."""

    address: str
    final: bool


def choose(interfaces: object, config: dict[str, Any]) -> Choice | None:
    """Choose the sandbox's address from what ``network-get-interfaces`` answers, or None.

    ``config`` is the VM's configuration. The rule (docs/inventory.md has it, too):

    1. Only interfaces with the MAC address of ``net0`` count, those of a VLAN on it last. Others count if none has
       it: first those of the configuration's other NICs, then those that no container or tunnel program made, then all.
    2. Of their addresses: the static one of ``ipconfig0``; else the first IPv4 address; else the first IPv6 address
       that is valid outside the site; else any other. Loopback, link-local and multicast addresses never count.
    """
    known = _read_interfaces(interfaces)
    first = _read_mac(config.get("net0"))
    expected, ipv4_may_come = _read_ipconfig(config.get("ipconfig0"))
    # A VLAN or another interface on top of the NIC has its MAC address, too; its name has a dot or an @.
    own = [
        addresses
        for name, mac, addresses in sorted(known, key=lambda interface: re.search(r"[.@]", interface[0]) is not None)
        if first is not None and mac == first
    ]
    if own:
        return _choose_best([address for addresses in own for address in addresses], expected, ipv4_may_come)
    macs = {_read_mac(value) for key, value in config.items() if re.fullmatch(r"net\d+", key)} - {None}
    ranked = (
        [addresses for _name, mac, addresses in known if mac in macs],
        [addresses for name, _mac, addresses in known if not _INNER.match(name)],
        [addresses for _name, _mac, addresses in known],
    )
    for rank in ranked:
        choice = _choose_best([address for addresses in rank for address in addresses], expected, ipv4_may_come)
        if choice is not None:
            # The NIC of the configuration may be missing only because the guest is still booting.
            return Choice(choice.address, choice.final and first is None)
    return None


def _choose_best(addresses: list[Address], expected: list[Address], ipv4_may_come: bool) -> Choice | None:
    for address in expected:
        if address in addresses:
            return Choice(str(address), True)
    for address in addresses:
        if address.version == 4:
            # The configuration names another one: cloud-init may not have set it yet.
            return Choice(str(address), not expected)
    outside = [address for address in addresses if address not in _UNIQUE_LOCAL]
    for address in outside or addresses:
        return Choice(str(address), bool(outside) and not ipv4_may_come and not expected)
    return None


def _read_interfaces(answer: object) -> list[tuple[str, str | None, list[Address]]]:
    """Return (name, MAC address in small letters, usable addresses) of each interface that has the right shape."""
    result = []
    for interface in answer[:_MOST_INTERFACES] if isinstance(answer, list) else []:
        if not isinstance(interface, dict):
            continue
        name, listed = interface.get("name"), interface.get("ip-addresses")
        addresses = [
            address
            for entry in (listed[:_MOST_ADDRESSES] if isinstance(listed, list) else [])
            if isinstance(entry, dict) and (address := _read_usable(entry.get("ip-address"))) is not None
        ]
        result.append((name if isinstance(name, str) else "", _read_mac(interface.get("hardware-address")), addresses))
    return result


def _read_usable(text: object) -> Address | None:
    if not isinstance(text, str) or len(text) > _LONGEST_TEXT:
        return None
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if address.version == 6 and (address.scope_id or address.ipv4_mapped):
        return None
    if address.is_loopback or address.is_link_local or address.is_unspecified or address.is_multicast:
        return None
    return None if str(address) == "255.255.255.255" else address


def _read_mac(value: object) -> str | None:
    match = _MAC.search(value[:1000]) if isinstance(value, str) else None
    return match[1].lower().replace("-", ":") if match else None


def _read_ipconfig(value: object) -> tuple[list[Address], bool]:
    """Return the static addresses of an ``ipconfigN`` value, IPv4 first, and whether an IPv4 address may come."""
    parts = dict(part.partition("=")[::2] for part in str(value or "").split(",") if part)
    static = []
    for name in ("ip", "ip6"):
        address = _read_usable(parts.get(name, "").partition("/")[0])
        if address is not None:
            static.append(address)
    # cloud-init configures no IPv4 where only ip6 is given; without ipconfig0 the image decides.
    return static, "ip" in parts or "ip6" not in parts


# ---- asking ----


def is_agent_on(config: dict[str, Any]) -> bool:
    """Return whether the VM's configuration gives the guest agent a channel (``agent: 1``)."""
    return _AGENT_ON.search(str(config.get("agent", "0"))) is not None


def ask(ctx: Context, located: Located) -> Choice | None:
    """Ask the guest agent once and choose; None where it names no usable address.

    Raises ProxmoxError when it did not answer. ApiError with status 500 is the guest agent's, or that there is none.
    """
    answer = ctx.client.get_dict(f"{located.path}/agent/network-get-interfaces")
    return choose(answer.get("result"), located.config)


def refuse_hopeless(sandbox: Sandbox, located: Located, error: ApiError, option: str) -> None:
    """Raise AgentUnusable if the answer says that the guest agent will not answer however long one waits.

    ``option`` is the option that waits, and for what it waits.
    """
    vmid = sandbox.vmid
    blocked = _BLOCKED.search(error.text)
    if blocked:
        raise AgentUnusable(
            f"{option}: the guest agent of sandbox {vmid} refuses {blocked[1]} (it is blocked in the guest, by "
            "block-rpcs or allow-rpcs of /etc/qemu/qemu-ga.conf or its service). Allow it in the template, or leave "
            "the option out",
            vmid=vmid,
        )
    unknown = _UNKNOWN.search(error.text)
    if unknown:
        raise AgentUnusable(
            f"{option}: the guest agent of sandbox {vmid} has no {unknown[1] or 'such command'} (it is too old, or "
            "that of another system). Install a newer qemu-guest-agent in the template, or leave the option out",
            vmid=vmid,
        )
    if re.search(r"VM \d+ is not running|VM \d+ not running", error.text):
        raise AgentUnusable(
            f"{option}: VM {vmid} does not run any more, so its guest agent cannot answer. Look at why the guest "
            "switched itself off, start the sandbox, then wait again",
            vmid=vmid,
        )
    # The configuration may say agent=0 while the running VM still has a channel: only an agent that is silent is
    # absent.
    if "No QEMU guest agent configured" in error.text or not is_agent_on(located.config):
        raise AgentUnusable(
            f"{option}: the guest agent of VM {vmid} is switched off in its configuration (agent: "
            f"{str(located.config.get('agent', 'not set'))[:40]}), so it never answers. Set agent=1 on the template "
            "(qm set TEMPLATE --agent 1) and install qemu-guest-agent in it, or leave the option out",
            vmid=vmid,
        )


def wait(ctx: Context, sandbox: Sandbox, located: Located) -> str:
    """Ask until the guest agent names an address that is worth having, at most ``wait_timeout`` seconds; return it.

    An address that is only second best is taken when no better one comes within GRACE_SECONDS.
    Raises AgentUnusable at once when nothing can come, TaskTimeout when nothing came.
    """
    deadline = ctx.clock.monotonic() + ctx.wait_timeout
    seen_since: float | None = None

    def look() -> str | None:
        nonlocal seen_since
        now = ctx.clock.monotonic()
        try:
            choice = ask(ctx, located)
            if choice is None:
                seen_since = None
            else:
                seen_since = now if seen_since is None else seen_since
                patient = min(GRACE_SECONDS, max(0.0, deadline - now))
                # Waiting may have taken minutes: the answer counts only if this is still the machine that was asked.
                if (choice.final or now - seen_since >= patient) and match_if_readable(ctx, sandbox):
                    return choice.address
        except AccessDenied:
            raise
        except ApiError as error:
            if error.status != 500:
                raise
            refuse_hopeless(sandbox, located, error, "wait_for_ip")
        except (Unreachable, OutcomeUnknown):
            # A single look that failed does not end the wait: the sandbox is there.
            pass
        return None

    ip = waiting.until(ctx.clock, ctx.wait_timeout, look)
    if ip is None:
        raise TaskTimeout(
            f"sandbox {sandbox.vmid} runs, but its guest agent named no address within {ctx.wait_timeout} s "
            "(wait_timeout); is qemu-guest-agent in the template, and does the guest get an address? Run again to "
            "go on waiting",
            vmid=sandbox.vmid,
        )
    return ip


def refresh(ctx: Context, sandbox: Sandbox, *, patient: bool = True) -> Sandbox:
    """Find out the address of a sandbox that runs, and write it into the record; return the record.

    With ``patient`` the address is waited for; otherwise there is one look, and what fails leaves the record as it
    is. Raises what ``wait`` raises. A sandbox whose VM does not run is returned as it is.
    """
    located, vm_state = look(ctx, sandbox)
    if vm_state != states.RUNNING:
        return sandbox
    ip: str | None
    if patient:
        ip = wait(ctx, sandbox, located)
    else:
        try:
            ip = look_up(ctx, sandbox, located)
        except ProxmoxError:
            ip = None
    return sandbox if ip is None else remember(ctx, ctx.records.get(sandbox.uuid), ip)


def remember(ctx: Context, sandbox: Sandbox, ip: str) -> Sandbox:
    """Write the address that the guest agent named just now into the record; return the record."""
    if sandbox.ip == ip:
        return ctx.records.confirm_address(sandbox)
    return ctx.records.amend(sandbox, "address", ip=ip, ip_seen_at=ctx.clock.now())


def add_address(ctx: Context, outcome: Outcome, *, started: bool) -> Outcome:
    """Add the address of the outcome's sandbox to the record and the outcome, if the sandbox runs.

    It is waited for where there is none, where the sandbox was started since, and always with ``started``. One that is
    only old is looked up once. Raises what ``wait`` raises. Check mode asks nothing.
    """
    sandbox = outcome.sandbox
    if sandbox is None or ctx.dry_run or sandbox.state not in states.POWERED:
        return outcome
    if not started and not is_due(sandbox, ctx.clock.now()):
        return outcome
    now = refresh(ctx, sandbox, patient=started or sandbox.ip is None or sandbox.ip_seen_at is None)
    if now.ip != sandbox.ip and not outcome.changed:
        outcome.outcome, outcome.changed, outcome.reason = "updated", True, "address"
    outcome.sandbox = now
    return outcome


# ---- one look, without waiting ----


def is_due(sandbox: Sandbox, now: int) -> bool:
    """Return whether a sandbox that runs has no address, or one that was named long ago or before its last start."""
    if sandbox.state not in states.POWERED:
        return False
    return sandbox.ip is None or sandbox.ip_seen_at is None or now - sandbox.ip_seen_at > FRESH_SECONDS


def look_up(ctx: Context, sandbox: Sandbox, located: Located, *, settled: bool | None = None) -> str | None:
    """Ask the guest agent once and return the address that counts; None where it names none.

    ``settled`` says whether an address that is only second best counts. Without it, it counts once the sandbox has been
    in its state for SETTLED_SECONDS. A new address counts only if the VM is still ours after the answer.
    Raises ProxmoxError when the agent did not answer, and Kept when the VM is not ours any more.
    """
    choice = ask(ctx, located)
    if choice is None:
        return None
    if choice.address == sandbox.ip:
        return choice.address
    if settled is None:
        settled = ctx.clock.now() - (sandbox.state_changed_at or 0) > SETTLED_SECONDS
    return choice.address if (choice.final or settled) and match_if_readable(ctx, sandbox) else None


def compute_columns_after_start(ctx: Context, sandbox: Sandbox, located: Located) -> dict[str, Any]:
    """Return the address columns of a sandbox that was just started: DHCP may have given the guest another address.

    One look, only where an address is on record and the agent is on. Otherwise the address on record stays, as an old
    one.
    """
    ip = None
    if sandbox.ip is not None and is_agent_on(located.config):
        try:
            ip = look_up(ctx, sandbox, located, settled=False)
        except (ProxmoxError, Kept):
            # The guest still boots: nothing is waited for here.
            pass
    return {"ip_seen_at": None} if ip is None else {"ip": ip, "ip_seen_at": ctx.clock.now()}


class Looks:
    """The looks of one pass over many sandboxes, bounded in number and time."""

    def __init__(self, ctx: Context, sandboxes: list[Sandbox]) -> None:
        now = ctx.clock.now()
        due = [sandbox.uuid for sandbox in sandboxes if is_due(sandbox, now)]
        # By chance, so that guests which never answer do not keep the others waiting for ever.
        self._chosen = frozenset(due if len(due) <= MOST_LOOKS else random.sample(due, MOST_LOOKS))
        self._ctx = ctx
        self._ends: float | None = None
        self._named: list[tuple[Sandbox, str]] = []

    def chose(self, sandbox: Sandbox) -> bool:
        """Return whether this pass is to ask the sandbox's guest."""
        return sandbox.uuid in self._chosen

    def look_up(self, sandbox: Sandbox, located: Located) -> str | None:
        """Return the address that the guest names; None if it is not asked, does not answer, or its VM does not run."""
        if not self.chose(sandbox) or located.row.get("status") != "running" or not is_agent_on(located.config):
            return None
        now = self._ctx.clock.monotonic()
        if self._ends is None:
            self._ends = now + LOOK_SECONDS
        if now > self._ends:
            return None
        try:
            ip = look_up(self._ctx, sandbox, located)
        except (ProxmoxError, Kept):
            return None
        if ip is not None and sandbox.ip in (None, ip):
            self._named.append((sandbox, ip))
        return ip

    def remember(self) -> None:
        """Write first addresses, and those that the guests named again, into the records.

        Another address is a drift.
        """
        named, self._named = self._named, []
        for sandbox, ip in named:
            # A record that another run changed meanwhile waits for the next pass.
            with contextlib.suppress(RecordChanged, NotFound):
                remember(self._ctx, sandbox, ip)
