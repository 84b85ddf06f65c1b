# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Find a sandbox's address: ask the guest agent, choose one of the addresses in its answer, wait for the first one.

The guest writes the agent's answer, so this file trusts none of it: it checks types, bounds lengths, and uses nothing
but addresses.
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
from .locate import Located, match_if_readable, read_vm_and_state

Address = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]  # noqa: UP007 - ansible-test reads this as older Python

# Seconds to wait for DHCP to bring the IPv4 address after another address was seen.
GRACE_SECONDS = 5.0
# Seconds for which a stored address counts without asking the guest again.
FRESH_SECONDS = 300
# Seconds in one state after which a second-best address counts, because DHCP has had its time.
SETTLED_SECONDS = 30
# Guests that one pass over many sandboxes asks, and seconds that it asks for. A silent agent takes three seconds.
MOST_LOOKS = 64
LOOK_SECONDS = 10.0
# Bounds for the guest's answer. No real guest has more; the rest is ignored.
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
    """Waiting longer is useless, because the guest agent will not answer. The message says why and what to do."""

    code = "guest_agent"


@dataclass(frozen=True, slots=True)
class Choice:
    """The address to use. ``final`` is False while DHCP may still bring a better one on the same interface."""

    address: str
    final: bool


def choose_address(interfaces: object, config: dict[str, Any]) -> Choice | None:
    """Choose the sandbox's address from the answer to ``network-get-interfaces``; None without a usable one.

    ``config`` is the VM's configuration. The rule, which docs/inventory.md shows too:

    1. Only interfaces with the MAC address of ``net0`` count, and of these a VLAN interface last. If none has that MAC
       address, the others count: first those of the configuration's other NICs, then those that no container or tunnel
       program made, then all.
    2. Of their addresses: the static one of ``ipconfig0``; else the first IPv4 address; else the first IPv6 address
       that is valid outside the site; else any other. Loopback, link-local and multicast addresses never count.
    """
    known = _read_interfaces(interfaces)
    first = _read_mac(config.get("net0"))
    expected, ipv4_may_come = _read_ipconfig(config.get("ipconfig0"))
    # A VLAN or another interface on top of the NIC has the same MAC address; its name contains a dot or an @.
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
    """Return the best of the addresses. ``expected`` are the static addresses of the configuration."""
    for address in expected:
        if address in addresses:
            return Choice(str(address), True)
    for address in addresses:
        if address.version == 4:
            # If the configuration names another address, cloud-init may not have set it yet.
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
    """Return the address in a text; None for one that nobody outside the guest can use."""
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
    """Return the MAC address in a text, in small letters and with colons; None without one."""
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
    # cloud-init configures no IPv4 where only ip6 is given. Without ipconfig0 the image decides.
    return static, "ip" in parts or "ip6" not in parts


# ---- asking ----


def is_agent_on(config: dict[str, Any]) -> bool:
    """Return whether the VM's configuration gives the guest agent a channel (``agent: 1``)."""
    return _AGENT_ON.search(str(config.get("agent", "0"))) is not None


def ask_agent(ctx: Context, located: Located) -> Choice | None:
    """Ask the guest agent once, and choose one of its addresses; None when it names no usable one.

    Raises ProxmoxError when there is no answer. ApiError with status 500 comes from the guest agent, or says that there
    is no agent.
    """
    answer = ctx.client.get_dict(f"{located.path}/agent/network-get-interfaces")
    return choose_address(answer.get("result"), located.config)


def refuse_hopeless(sandbox: Sandbox, located: Located, error: ApiError, option: str) -> None:
    """Raise AgentUnusable if the error shows that waiting longer is useless.

    ``option``: the name of the option that asked to wait, for the message.
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
    # The running VM may still have a channel although the configuration says agent=0 by now. So the configuration
    # counts only once the agent has not answered.
    if "No QEMU guest agent configured" in error.text or not is_agent_on(located.config):
        raise AgentUnusable(
            f"{option}: the guest agent of VM {vmid} is switched off in its configuration (agent: "
            f"{str(located.config.get('agent', 'not set'))[:40]}), so it never answers. Set agent=1 on the template "
            "(qm set TEMPLATE --agent 1) and install qemu-guest-agent in it, or leave the option out",
            vmid=vmid,
        )


def wait_for_address(ctx: Context, sandbox: Sandbox, located: Located) -> str:
    """Wait at most ``wait_timeout`` seconds until the guest agent names an address, and return the address.

    A second-best address is taken if no better one comes within GRACE_SECONDS. Raises AgentUnusable as soon as waiting
    is useless, TaskTimeout when no address came, and AccessDenied.
    """
    deadline = ctx.clock.monotonic() + ctx.wait_timeout
    seen_since: float | None = None

    def look() -> str | None:
        nonlocal seen_since
        now = ctx.clock.monotonic()
        try:
            choice = ask_agent(ctx, located)
            if choice is None:
                seen_since = None
            else:
                seen_since = now if seen_since is None else seen_since
                patient = min(GRACE_SECONDS, max(0.0, deadline - now))
                # Waiting may have taken minutes. The answer counts only if the VM is still ours.
                if (choice.final or now - seen_since >= patient) and match_if_readable(ctx, sandbox):
                    return choice.address
        except AccessDenied:
            raise
        except ApiError as error:
            if error.status != 500:
                raise
            refuse_hopeless(sandbox, located, error, "wait_for_ip")
        except (Unreachable, OutcomeUnknown):
            # A single failed request does not end the wait, because the sandbox exists.
            pass
        return None

    ip = waiting.wait_for_result(ctx.clock, ctx.wait_timeout, look)
    if ip is None:
        raise TaskTimeout(
            f"sandbox {sandbox.vmid} runs, but its guest agent named no address within {ctx.wait_timeout} s "
            "(wait_timeout); is qemu-guest-agent in the template, and does the guest get an address? Run again to "
            "go on waiting",
            vmid=sandbox.vmid,
        )
    return ip


def refresh_address(ctx: Context, sandbox: Sandbox, *, patient: bool = True) -> Sandbox:
    """Find the address of a running sandbox, write it into the record, and return the record.

    ``patient``: wait for the address, and raise what ``wait_for_address`` raises. Otherwise ask once; an error then
    leaves the record unchanged. So does a VM that does not run.
    """
    located, vm_state = read_vm_and_state(ctx, sandbox)
    if vm_state != states.RUNNING:
        return sandbox
    ip: str | None
    if patient:
        ip = wait_for_address(ctx, sandbox, located)
    else:
        try:
            ip = look_up(ctx, sandbox, located)
        except ProxmoxError:
            ip = None
    return sandbox if ip is None else store_address(ctx, ctx.records.get(sandbox.uuid), ip)


def store_address(ctx: Context, sandbox: Sandbox, ip: str) -> Sandbox:
    """Write the address that the guest agent has just named into the record, and return the record."""
    if sandbox.ip == ip:
        return ctx.records.confirm_address(sandbox)
    return ctx.records.amend(sandbox, "address", ip=ip, ip_seen_at=ctx.clock.now())


def add_address(ctx: Context, outcome: Outcome, *, started: bool) -> Outcome:
    """Add the address of the outcome's sandbox to the record and the outcome, if the sandbox runs.

    Waits for the address if the record has none, if the sandbox was started since the last answer, and always with
    ``started``. Asks once for an address that is only old. Raises what ``wait_for_address`` raises. Check mode sends
    nothing.
    """
    sandbox = outcome.sandbox
    if sandbox is None or ctx.dry_run or sandbox.state not in states.POWERED:
        return outcome
    if not started and not is_due(sandbox, ctx.clock.now()):
        return outcome
    now = refresh_address(ctx, sandbox, patient=started or sandbox.ip is None or sandbox.ip_seen_at is None)
    if now.ip != sandbox.ip and not outcome.changed:
        outcome.outcome, outcome.changed, outcome.reason = "updated", True, "address"
    outcome.sandbox = now
    return outcome


# ---- asking once, without waiting ----


def is_due(sandbox: Sandbox, now: int) -> bool:
    """Return whether a running sandbox has no address, or one from long ago or from before its last start.

    ``now`` is in seconds since the epoch.
    """
    if sandbox.state not in states.POWERED:
        return False
    return sandbox.ip is None or sandbox.ip_seen_at is None or now - sandbox.ip_seen_at > FRESH_SECONDS


def look_up(ctx: Context, sandbox: Sandbox, located: Located, *, settled: bool | None = None) -> str | None:
    """Ask the guest agent once, and return the address that counts; None without one.

    ``settled``: whether a second-best address counts. None: it counts once the sandbox has been in its state for
    SETTLED_SECONDS. A new address counts only if the VM is still ours after the answer. Raises ProxmoxError when the
    agent did not answer, and Kept when the VM is not ours any more.
    """
    choice = ask_agent(ctx, located)
    if choice is None:
        return None
    if choice.address == sandbox.ip:
        return choice.address
    if settled is None:
        settled = ctx.clock.now() - (sandbox.state_changed_at or 0) > SETTLED_SECONDS
    return choice.address if (choice.final or settled) and match_if_readable(ctx, sandbox) else None


def compute_columns_after_start(ctx: Context, sandbox: Sandbox, located: Located) -> dict[str, Any]:
    """Return the address columns of a sandbox that was just started: DHCP may have given the guest another address.

    Asks the guest once, and only if the record has an address and the agent is on. Without an answer the recorded
    address stays and is marked as old.
    """
    ip = None
    if sandbox.ip is not None and is_agent_on(located.config):
        try:
            ip = look_up(ctx, sandbox, located, settled=False)
        except (ProxmoxError, Kept):
            # The guest is still booting. A start does not wait for it.
            pass
    return {"ip_seen_at": None} if ip is None else {"ip": ip, "ip_seen_at": ctx.clock.now()}


class Looks:
    """The requests of one pass to the guests of many sandboxes, bounded in number and time."""

    def __init__(self, ctx: Context, sandboxes: list[Sandbox]) -> None:
        now = ctx.clock.now()
        due = [sandbox.uuid for sandbox in sandboxes if is_due(sandbox, now)]
        # At random, so that guests that never answer do not keep the others waiting for ever.
        self._chosen = frozenset(due if len(due) <= MOST_LOOKS else random.sample(due, MOST_LOOKS))
        self._ctx = ctx
        self._ends: float | None = None
        self._named: list[tuple[Sandbox, str]] = []

    def has_chosen(self, sandbox: Sandbox) -> bool:
        """Return whether this pass asks the sandbox's guest."""
        return sandbox.uuid in self._chosen

    def look_up(self, sandbox: Sandbox, located: Located) -> str | None:
        """Return the address that the guest names; None if it is not asked, does not answer, or its VM does not run."""
        if not self.has_chosen(sandbox) or located.row.get("status") != "running" or not is_agent_on(located.config):
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

    def store_addresses(self) -> None:
        """Write first addresses into the records, and confirm those that the guests named again.

        A changed address is drift, which the caller handles.
        """
        named, self._named = self._named, []
        for sandbox, ip in named:
            # Leave a record that another run has changed meanwhile to the next pass.
            with contextlib.suppress(RecordChanged, NotFound):
                store_address(self._ctx, sandbox, ip)
