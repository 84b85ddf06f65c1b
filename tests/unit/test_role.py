# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The role agentlabd without a host: its variables, what it packs, and what it does with configuration and records."""

from __future__ import annotations

import atexit
import base64
import functools
import getpass
import io
import json
import os
import re
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import config
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store import schema
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.sqlite.engine import Database
from fakepve.certs import make_cert

ROOT = Path(__file__).resolve().parents[2]
ROLE = ROOT / "roles/agentlabd"
FILES = ROLE / "files"
# What the unit, the command and the role rely on, and what the role sets itself.
FIXED = {"socket", "cleanup_file", "profiles_dir", "ca_path"}
POLICY = "auto_cleanup: {enabled: true, rules: [{name: t, match: {states: [TIMEOUT]}, after: 1h, action: destroy}]}\n"


def _yaml(name: str) -> Any:
    return yaml.safe_load((ROLE / name).read_text())


SPECS = _yaml("meta/argument_specs.yml")["argument_specs"]
# Those of both entry points: the role's own, and the one that makes a PostgreSQL database.
OPTIONS = {**SPECS["database"]["options"], **SPECS["main"]["options"]}


# ---- variables ----


def test_every_key_of_the_configuration_has_a_variable() -> None:
    keys = set(_yaml("vars/main.yml")["agentlabd__keys"])
    assert keys == set(config.DEFAULTS) - FIXED
    assert {f"agentlabd_{key}" for key in keys} <= set(OPTIONS)


def test_defaults_are_those_of_the_argument_specs() -> None:
    defaults = _yaml("defaults/main.yml")
    documented = {name: option["default"] for name, option in OPTIONS.items() if "default" in option}
    # Too long to be said twice; argument_specs says in words what it is.
    documented["agentlabd_auto_cleanup"] = defaults["agentlabd_auto_cleanup"]
    assert defaults == documented


def test_every_variable_stands_in_the_readme_and_secrets_are_marked() -> None:
    readme = (ROLE / "README.md").read_text()
    assert set(re.findall(r"^\| `(agentlabd_\w+)`", readme, re.M)) == set(OPTIONS)
    secrets = {name for name, option in OPTIONS.items() if option.get("no_log")}
    assert secrets == {f"agentlabd_{key}" for key in (*config.SECRETS, "database_owner_password")}


# ---- what is installed ----


def _pack(what: str) -> str:
    return subprocess.run(
        [sys.executable, str(FILES / "pack.py"), what], capture_output=True, text=True, check=True
    ).stdout


@functools.cache
def _release() -> Path:
    """The files of a release, unpacked as the role unpacks them on a host."""
    folder = tempfile.TemporaryDirectory(prefix="agentlab-release-")
    atexit.register(folder.cleanup)
    _unpack(Path(folder.name))
    return Path(folder.name)


def _unpack(folder: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(base64.b64decode(_pack("archive")))) as archive:
        # Debian 12's Python 3.11.2 knows no filters; 3.14 would warn without one.
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))


def test_the_archive_is_what_the_manifest_says(tmp_path: Path) -> None:
    info = json.loads(_pack("info"))
    _unpack(tmp_path)
    subprocess.run(
        ["sha256sum", "--check", "--strict", "--quiet"], cwd=tmp_path, input=info["manifest"], text=True, check=True
    )
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {line.partition("  ")[2] for line in info["manifest"].splitlines()}
    assert {
        "agentlab_core/store/schema.py",
        "agentlabd/__main__.py",
        "agentlab_cli/__main__.py",
        "agentlab_install.py",
    } <= found
    assert not [name for name in found if "__pycache__" in name or name == "pack.py"]


def test_the_version_is_that_of_the_collection() -> None:
    galaxy = yaml.safe_load((ROOT / "galaxy.yml").read_text())
    assert json.loads(_pack("info"))["version"] == galaxy["version"]


# ---- configuration, judged before it replaces the one in force ----


def _judge(etc: Path, content: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    given = {
        "config.yaml": "api_host: pve1\napi_token_id: a@pve!t\napi_token_secret: made-up-secret\n",
        "cleanup.yaml": POLICY,
        "ca.pem": None,
        "profiles": {},
        "remove": [],
        **content,
    }
    return subprocess.run(
        [
            sys.executable,
            "-I",
            str(FILES / "agentlab_install.py"),
            "check",
            f"--release={_release()}",
            f"--etc={etc}",
            f"--user={getpass.getuser()}",
        ],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    made = tmp_path / "etc"
    (made / "profiles").mkdir(parents=True)
    return made


def test_what_is_good_is_accepted(etc: Path) -> None:
    done = _judge(etc, {"profiles": {"small": "resources: {cores: 1}\n"}})
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"restart": True}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"config.yaml": "default_ttl: whenever\n"}, ("default_ttl", "whenever")),
        ({"config.yaml": "no_such_key: 1\n"}, ("no_such_key",)),
        ({"cleanup.yaml": POLICY.replace("destroy", "obliterate")}, ("cleanup.yaml", "obliterate", "destroy")),
        ({"ca.pem": "no certificate\n"}, ("ca_path", "PEM")),
        ({"profiles": {"big": "resources: {cores: many}\n"}}, ("profiles/big.yaml", "cores", "many")),
    ],
)
def test_what_is_wrong_is_refused_by_its_real_name(etc: Path, content: dict[str, Any], words: tuple[str, ...]) -> None:
    done = _judge(etc, content)
    assert done.returncode == 1
    assert all(word in done.stderr for word in words), done.stderr
    assert "ERROR" not in done.stderr
    assert (
        "agentlab-check-" not in done.stderr and "Traceback" not in done.stderr and "made-up-secret" not in done.stderr
    )
    assert list(etc.rglob("*.yaml")) == []


def test_files_put_there_by_hand_count_unless_they_are_to_go(etc: Path) -> None:
    (etc / "profiles/old.yaml").write_text("resources: {cores: many}\n")
    assert "profiles/old.yaml" in _judge(etc, {}).stderr
    assert _judge(etc, {"remove": ["old.yaml"]}).returncode == 0


def test_only_what_is_read_at_the_start_asks_for_a_restart(etc: Path) -> None:
    before = "api_host: pve1\napi_token_id: a@pve!t\napi_token_secret: made-up-secret\n"
    (etc / "config.yaml").write_text(before)
    assert json.loads(_judge(etc, {"config.yaml": before + "default_ttl: 2h\n"}).stdout) == {"restart": False}
    assert json.loads(_judge(etc, {"config.yaml": before + "metrics_listen: 127.0.0.1:9821\n"}).stdout) == {
        "restart": True
    }


def test_the_ca_certificate_is_judged_before_it_has_its_place(etc: Path, tmp_path: Path) -> None:
    config = f"api_host: pve1\napi_token_id: a@pve!t\napi_token_secret: made-up-secret\nca_path: {etc}/ca.pem\n"
    assert f"{etc}/ca.pem" in _judge(etc, {"config.yaml": config}).stderr
    done = _judge(etc, {"config.yaml": config, "ca.pem": Path(make_cert(str(tmp_path))[0]).read_text()})
    assert (done.returncode, done.stderr) == (0, "")


# ---- what the daemon was told last ----


class Installed:
    """A host after the role ran there once."""

    def __init__(self, folder: Path) -> None:
        self.etc, self.lib, self.unit = folder / "etc", folder / "lib", folder / "agentlabd.service"
        (self.etc / "profiles").mkdir(parents=True)
        (self.lib / "releases/1").mkdir(parents=True)
        (self.lib / "current").symlink_to("releases/1")
        for path in (self.unit, self.lib / "current/MANIFEST", self.etc / "config.yaml", self.etc / "cleanup.yaml"):
            path.write_text("as it was\n")

    def settled(self, *arguments: str) -> dict[str, bool]:
        done = subprocess.run(
            [
                sys.executable,
                "-I",
                str(FILES / "agentlab_install.py"),
                "settled",
                f"--etc={self.etc}",
                f"--lib={self.lib}",
                f"--unit={self.unit}",
                *arguments,
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        found: dict[str, bool] = json.loads(done.stdout)
        return found


@pytest.fixture
def installed(tmp_path: Path) -> Installed:
    made = Installed(tmp_path)
    assert made.settled() == {"settled": False, "noted": False}
    assert made.settled("--note") == {"settled": False, "noted": True}
    assert made.settled("--note") == {"settled": True, "noted": False}
    return made


MANAGED = f"# {_yaml('vars/main.yml')['agentlabd__managed']}\n"


@pytest.mark.parametrize(
    "changed",
    [
        "etc/config.yaml",
        "etc/cleanup.yaml",
        "etc/ca.pem",
        "etc/profiles/new.yaml",
        "agentlabd.service",
        "agentlabd.service.d/10-local.conf",
        "lib/releases/1/MANIFEST",
    ],
)
def test_what_was_written_but_not_told_is_not_settled(installed: Installed, tmp_path: Path, changed: str) -> None:
    (tmp_path / changed).parent.mkdir(exist_ok=True)
    (tmp_path / changed).write_text(f"{MANAGED}other\n")
    assert installed.settled() == {"settled": False, "noted": False}
    assert installed.settled("--note")["noted"]
    assert installed.settled()["settled"]
    (tmp_path / changed).unlink()
    assert not installed.settled()["settled"]


def test_what_others_put_there_is_theirs_to_make_known(installed: Installed) -> None:
    (installed.etc / "profiles/mine.yaml").write_text("resources: {cores: 1}\n")
    assert installed.settled()["settled"]


def test_the_list_of_what_was_told_is_for_root_and_a_bare_host_needs_none(installed: Installed) -> None:
    assert (installed.lib / "settled").stat().st_mode & 0o777 == 0o600
    (installed.lib / "current").unlink()
    (installed.lib / "settled").unlink()
    assert installed.settled()["settled"]


# ---- records, when the release changes ----


class Records:
    def __init__(self, folder: Path) -> None:
        self.path = folder / "agentlab.db"
        self.backups = folder / "backups"
        self.backups.mkdir()
        Database(str(self.path)).close()

    def secure(self, *arguments: str, keep: int = 5, running: str = "1.0.0") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                sys.executable,
                "-I",
                str(FILES / "agentlab_install.py"),
                "records",
                f"--release={_release()}",
                f"--running={running}",
                f"--database={self.path}",
                f"--backups={self.backups}",
                f"--keep={keep}",
                *arguments,
            ],
            capture_output=True,
            text=True,
            check=False,
        )

    def note(self, key: str) -> None:
        conn = sqlite3.connect(self.path)
        with conn:
            conn.execute("INSERT INTO meta (key, value) VALUES (?, '')", (key,))
        conn.close()

    def notes(self) -> set[str]:
        conn = sqlite3.connect(self.path)
        found = {row[0] for row in conn.execute("SELECT key FROM meta")}
        conn.close()
        return found

    def set_schema(self, number: int) -> None:
        conn = sqlite3.connect(self.path)
        conn.execute(f"PRAGMA user_version = {number}")
        conn.close()


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return Records(tmp_path)


def test_a_copy_holds_what_stands_in_the_wal_and_is_nobody_elses(records: Records) -> None:
    writer = sqlite3.connect(records.path)
    writer.execute("INSERT INTO meta (key, value) VALUES ('in-the-wal', '')")
    writer.commit()
    answer = json.loads(records.secure().stdout)
    writer.close()
    copy = sqlite3.connect(f"file:{answer['backup']}?mode=ro", uri=True)
    assert copy.execute("SELECT 1 FROM meta WHERE key = 'in-the-wal'").fetchone()
    copy.close()
    assert os.stat(answer["backup"]).st_mode & 0o777 == 0o600
    assert [path.name for path in records.backups.iterdir()] == [Path(answer["backup"]).name]
    assert answer["restored"] is None and answer["schema"] == answer["known"] == schema.VERSION


def test_without_records_there_is_no_backup(records: Records) -> None:
    records.path.unlink()
    assert json.loads(records.secure().stdout)["backup"] is None
    assert not records.path.exists()


def test_newer_records_give_way_to_the_copy_from_before_and_are_kept(records: Records) -> None:
    records.note("before")
    first = json.loads(records.secure().stdout)
    records.note("after")
    records.set_schema(schema.VERSION + 1)
    os.chmod(records.path, 0o660)
    planned = json.loads(records.secure("--dry-run", running="2.0.0").stdout)
    assert records.notes() >= {"before", "after"} and planned["restored"] == first["backup"]
    done = json.loads(records.secure(running="2.0.0", keep=1).stdout)
    assert done["restored"] == first["backup"]
    assert "before" in records.notes() and "after" not in records.notes()
    assert os.stat(records.path).st_mode & 0o777 == 0o660
    kept = [path.name for path in records.backups.iterdir()]
    assert kept == [Path(done["backup"]).name] and kept[0].startswith(f"agentlab-2.0.0-schema{schema.VERSION + 1}-")


def test_newer_records_without_an_older_copy_are_left_alone(records: Records) -> None:
    records.note("after")
    records.set_schema(schema.VERSION + 1)
    refused = records.secure()
    assert refused.returncode == 1 and "holds no older copy" in refused.stderr
    assert "after" in records.notes() and list(records.backups.iterdir()) == []


def test_a_link_where_the_records_are_restored_is_not_followed(records: Records, tmp_path: Path) -> None:
    records.secure()
    records.set_schema(schema.VERSION + 1)
    other = tmp_path / "other"
    other.write_text("not ours\n")
    (tmp_path / ".agentlab.db.restored").symlink_to(other)
    assert json.loads(records.secure(running="2.0.0").stdout)["restored"]
    assert other.read_text() == "not ours\n"
    assert not records.path.is_symlink() and records.notes()


def test_the_local_backend_runs_in_the_group_that_pmxcfs_admits_and_its_socket_stays_with_the_operators() -> None:
    """pmxcfs refuses root in any other group; systemd would give the socket's folder to the group that the service
    runs in.
    """
    lines = (ROLE / "templates/local.conf.j2").read_text(encoding="utf-8").splitlines()
    assert {"User=root", "Group=root", "RuntimeDirectory=", "StateDirectory="} <= set(lines)
    assert "ExecStartPre=/usr/bin/install -d -o root -g agentlab -m 2750 /run/agentlab" in lines
    assert "ExecStopPost=/usr/bin/rm -rf /run/agentlab" in lines
    assert "'2750' if agentlabd_backend == 'local'" in _yaml("vars/main.yml")["agentlabd__state_mode"]


def test_the_local_backend_bounds_no_vm_and_no_task_that_pvesh_runs() -> None:
    """Tasks of pvesh are children of the daemon, at 100 MB each; a VM keeps the limit of open files.

    A directive of the unit must be answered.
    """
    local = dict(_settings("templates/local.conf.j2"))
    unit = dict(_settings("templates/agentlabd.service.j2"))
    for name in ("MemoryMax", "TasksMax"):
        assert name in unit and local[name] == "infinity"
    # Soft and hard: the daemon keeps its own, the hard one is systemd's default.
    assert local["LimitNOFILE"] == f"{unit['LimitNOFILE']}:524288"
    # No other bound of resources has come to the unit without an answer here.
    bounds = {
        name for name in unit if re.match(r"(Limit|Memory(Max|High|Swap)|Tasks|CPU|IO(?!Sched)|IPAddress|OOM)", name)
    }
    assert bounds <= set(local)


def _settings(name: str) -> list[tuple[str, str]]:
    return re.findall(r"^([A-Z]\w+)=(.*)$", (ROLE / name).read_text(encoding="utf-8"), re.M)
