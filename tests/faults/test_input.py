# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Anything a person or a program may write: no trace, no injection, only success or an error that names the option."""

from __future__ import annotations

import json
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import config
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.clock import SystemClock
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import AgentlabError, InvalidInput
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.proxmox import identity
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.proxmox.client import ProxmoxClient
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.sandboxes import create
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from support.double import EMPTY_CONFIG
from support.lab import Lab

pytestmark = pytest.mark.faults

# Whatever means something to a shell, to SQL, to YAML, to a path, to Proxmox's property strings or to an option parser.
NASTY = st.sampled_from(
    [
        "--purge",
        "-h",
        "'; DROP TABLE sandboxes; --",
        "$(reboot)",
        "`id`",
        "a,b=c",
        "a;b",
        "a\nb",
        "a\x00b",
        "../../etc/passwd",
        "%2e%2e/",
        "a/b",
        "{{ lookup('pipe', 'id') }}",
        "\u202eabc",
        "\u00e4",
        "\ud7ff",
        "a b",
        " a",
        "a ",
        "",
        ".",
        "..",
        "-",
        "a" * 64,
        "a" * 9000,
        "&x=1",
        "a?b",
        "#",
        "!!python/object:os.system",
        "*",
        "~",
        "0",
        "-1",
        "null",
        "A1",
        "1" * 40,
        "\u0661",
        "ip=dhcp\nagent: 1",
        "ip=dhcp,hookscript=x",
    ]
)
ANY = st.one_of(NASTY, st.text(max_size=80), st.from_regex(r"\A[ -~]{0,40}\Z"))
LOOSE = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
FEW = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    made = Lab(tmp_path_factory.mktemp("lab"))
    yield made
    made.stop()


# ---- the specification of a sandbox ----


@LOOSE
@example(option="pool", value="--purge")
@example(option="pool", value="a/--purge")
@example(option="pool", value="a/b")
@given(
    option=st.sampled_from(["name", "node", "storage", "pool", "bridge", "disk_size", "ip_config", "nameserver"]),
    value=ANY,
)
def test_what_a_check_lets_through_is_plain(option: str, value: str) -> None:
    try:
        create.Spec(**{option: value}).check()
    except InvalidInput as error:
        assert error.message.startswith(f"{option}: ") and error.detail["option"] == option
    else:
        assert value.isascii() and value.isprintable() and not value.startswith("-")
        assert not set(value) & set("\n\r\x00;&'\"`$\\|<>(){}?#%*"), value
        if option == "pool":
            # Pools may be nested.
            assert all(part and not part.startswith("-") for part in value.split("/")) and not set(value) & set(
                " ,="
            ), value
        elif option not in ("ip_config", "nameserver"):
            assert not set(value) & set(" ,=/"), value


@LOOSE
@given(tags=st.lists(ANY, max_size=4))
def test_tags_that_pass_are_single_tags(tags: list[str]) -> None:
    try:
        create.Spec(tags=tags).check()
    except InvalidInput as error:
        assert error.message.startswith("tags: ")
    else:
        assert all(
            tag and tag == tag.lower() and not set(tag) & set(";, \n-") - {"-"} and tag[0] not in "-+." for tag in tags
        )


@LOOSE
@given(key=ANY)
@example(key="ssh-ed25519 AAAA comment\nssh-ed25519 BBBB second")
def test_public_keys_that_pass_are_one_line(key: str) -> None:
    try:
        create.Spec(ssh_public_keys=[key]).check()
    except InvalidInput as error:
        assert error.message.startswith("ssh_public_keys: ")
    else:
        assert "\n" not in key.strip() and key.strip().startswith(("ssh-", "ecdsa-", "sk-"))


@LOOSE
@given(value=st.one_of(ANY, st.integers(), st.floats(), st.none(), st.booleans(), st.lists(st.integers(), max_size=2)))
def test_a_ttl_of_any_kind_is_read_or_refused_by_name(lab: Lab, value: Any) -> None:
    try:
        found = lab_context(lab).config.parse_ttl(value)
    except InvalidInput as error:
        assert error.message.startswith("ttl: ")
    else:
        assert 0 < found <= 30 * 86400


_kept: dict[str, Any] = {}


def lab_context(lab: Lab) -> Any:
    """One context for the many examples of a test (a reset of the lab closes those it has made)."""
    if lab.database not in _kept:
        _kept[lab.database] = lab.context()
    return _kept[lab.database]


@FEW
@given(
    name=ANY,
    tags=st.lists(ANY, max_size=2),
    bridge=st.one_of(st.none(), ANY),
    ip_config=st.one_of(st.none(), ANY),
    node=st.one_of(st.none(), ANY),
    template=st.one_of(st.none(), ANY),
    pool=st.one_of(st.none(), ANY),
)
@example(name="ok-1", tags=["x"], bridge="vmbr1", ip_config="ip=dhcp", node=None, template=None, pool=None)
@example(name="ok-2", tags=[], bridge=None, ip_config=None, node="../../x", template="' OR 1=1 --", pool=None)
def test_creation_with_any_values_is_success_or_an_error_and_leaves_nothing_behind(lab: Lab, **values: Any) -> None:
    lab.reset()
    try:
        made = create.run(lab.context(), create.Spec(ttl=60, **values)).sandbox
        assert made is not None and made.state == "RUNNING"
    except AgentlabError as error:
        assert error.message
        json.dumps(error.as_dict())
    lab.check_promises()
    assert lab.context().database.check_integrity() == "ok"
    for method, path, _dummy in lab.pve.requests:
        assert ".." not in path and method in ("GET", "POST", "PUT", "DELETE")
    assert {vm.vmid for vm in lab.pve.vms} <= {500, 9000, 1000}


@FEW
@given(name=ANY, tag=ANY, description=ANY)
def test_any_name_and_tags_on_the_cluster_are_only_data(lab: Lab, name: str, tag: str, description: str) -> None:
    lab.reset()
    ours = lab.timed_out()
    vm = lab.pve.add_vm(700, name, config={"tags": tag, "description": description})
    lab.reconcile()
    lab.info()
    lab.pve.vm(ours.vmid).config["description"] += "\n" + description
    found = lab.destroy(ours.vmid, force=True)[0]
    assert found.outcome == "destroyed" or found.reason == "ambiguous"
    assert vm in lab.pve.vms and lab.pve.touched(700) == []


@LOOSE
@given(description=ANY, uuid=st.uuids(version=4), operation=st.sampled_from(["destroy", "prune"]))
def test_the_note_before_a_delete_never_loses_the_marker(description: str, uuid: Any, operation: str) -> None:
    config_ = {"description": identity.make_marker(str(uuid)) + "\n" + description}
    note = identity.add_deletion_note(config_, operation, "2026-01-01T00:00:00Z")
    assert str(uuid) in identity.read_markers({"description": note}) and len(note) <= 8192


# ---- selecting ----


@LOOSE
@given(name=ANY)
def test_selecting_by_any_name_is_a_parameter_never_sql(lab: Lab, name: str) -> None:
    try:
        # One that another test made has a name of its own.
        assert lab_context(lab).select_sandbox(name=name).name == name
    except AgentlabError as error:
        assert "not found" in error.message


# ---- the configuration ----

KEYS = st.one_of(st.sampled_from(sorted(config.DEFAULTS)), ANY)
VALUES = st.recursive(
    st.one_of(ANY, st.integers(), st.floats(), st.booleans(), st.none()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)


@LOOSE
@given(content=st.one_of(st.dictionaries(KEYS, VALUES, max_size=4), VALUES))
def test_a_configuration_of_any_shape_is_read_or_refused_by_name(content: Any) -> None:
    import yaml

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8", errors="surrogatepass")
        try:
            config.load({"config_file": str(path)}, {})
        except InvalidInput as error:
            assert error.message


@LOOSE
@given(
    content=st.one_of(
        st.binary(max_size=200), st.text(alphabet="abc:-[]{}&*!|>'\"#%@` \n\t", max_size=100).map(str.encode)
    )
)
def test_a_configuration_of_any_bytes_is_read_or_refused_by_name(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_bytes(content)
        try:
            config.load({"config_file": str(path)}, {})
        except InvalidInput as error:
            assert str(path) in error.message or ": " in error.message


@LOOSE
@given(name=st.sampled_from(sorted(config.DEFAULTS)), value=VALUES)
def test_an_option_of_any_kind_is_read_or_refused_by_name(name: str, value: Any) -> None:
    try:
        config.load({name: value, "config_file": None}, {"AGENTLAB_CONFIG": EMPTY_CONFIG})
    except InvalidInput as error:
        assert error.message.startswith(f"{name}: ")


# ---- pvesh ----

PVESH = """#!{python}
import json, os, sys
with open(os.environ["PVESH_LOG"], "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
print(json.dumps({{"ok": 1}}))
"""


@pytest.fixture(scope="module")
def pvesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("bin")
    program = folder / "pvesh"
    program.write_text(PVESH.format(python=sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    old = dict(os.environ)
    os.environ.update(PATH=f"{folder}{os.pathsep}{os.environ['PATH']}", PVESH_LOG=str(folder / "log"))
    yield folder / "log"
    os.environ.clear()
    os.environ.update(old)


def argv_of(log: Path, method: str, path: str, **params: Any) -> list[str]:
    log.write_text("")
    client = ProxmoxClient(config.ProxmoxSettings(), SystemClock())
    getattr(client, method)(path, **params)
    lines = log.read_text().splitlines()
    assert len(lines) == 1
    found: list[str] = json.loads(lines[0])
    return found


def test_pvesh_gets_each_value_as_one_argument(pvesh: Path) -> None:
    argv = argv_of(pvesh, "put", "nodes/pve1/qemu/100/config", description="a b; rm -rf / $(x)", digest="d")
    assert argv[:2] == ["set", "/nodes/pve1/qemu/100/config"]
    assert argv[argv.index("--description") + 1] == "a b; rm -rf / $(x)"


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(value=ANY.filter(lambda text: "\x00" not in text))
@example(value="--purge")
@example(value="-h")
def test_no_value_becomes_an_option_of_pvesh(pvesh: Path, value: str) -> None:
    """Free text reaches pvesh only as descriptions and names: whatever it is, it is one argument behind its option."""
    try:
        create.Spec(name=value).check()
    except InvalidInput:
        name = "plain"
    else:
        name = value
    argv = argv_of(
        pvesh,
        "post",
        "nodes/pve1/qemu/9000/clone",
        newid=1000,
        name=name,
        description=identity.make_marker("u") + value,
    )
    assert argv[:2] == ["create", "/nodes/pve1/qemu/9000/clone"]
    assert argv[argv.index("--description") + 1] == identity.make_marker("u") + value
    assert argv[argv.index("--name") + 1] == name
    options = [one for position, one in enumerate(argv[2:]) if position % 2 == 0]
    assert set(options) <= {"--newid", "--name", "--description", "--output-format"}, argv


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(part=ANY.filter(lambda text: "\x00" not in text and text.strip()))
def test_no_part_of_a_path_leaves_its_place(pvesh: Path, part: str) -> None:
    """Node names come from answers of Proxmox: not even those lead to another path."""
    if part in (".", "..") or "/" in part:
        return
    try:
        argv = argv_of(pvesh, "get", f"nodes/{part}/qemu/100/config")
    except (AgentlabError, UnicodeEncodeError) as error:
        assert isinstance(error, AgentlabError)
        return
    assert (
        argv[0] == "get"
        and argv[1].startswith("/nodes/")
        and argv[1].endswith("/qemu/100/config")
        and argv[1].count("/") == 5
    )
