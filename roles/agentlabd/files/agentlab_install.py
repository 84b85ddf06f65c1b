# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Judge a configuration before it is installed, back up the records, and check which files the daemon has read.

The role runs this on the host. ``check`` judges a configuration. ``records`` protects the records when the release
changes. ``settled`` tells whether the daemon has read the files on the disk. Every command prints one JSON object. Exit
status 1 with a line on standard error means: refused, and nothing was changed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import pwd
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# The first line of each file that the role writes (agentlabd__managed).
MANAGED = b"# Managed by the role agentlab.proxmox.agentlabd"
BACKUP = re.compile(r"agentlab-(?P<version>.+)-schema(?P<schema>\d+)-(?P<at>\d{8}T\d{6}Z)\.db$")


class Refused(Exception):
    """The reason why nothing was done."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="agentlab_install", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser(
        "check", help="judge configuration, rules and profiles, given as JSON on standard input"
    )
    check.add_argument("--release", type=Path, required=True)
    check.add_argument("--etc", type=Path, required=True)
    check.add_argument("--user", required=True)
    records = commands.add_parser(
        "records", help="back the records up, and restore older ones when the release does not know their schema"
    )
    records.add_argument("--release", type=Path, required=True)
    records.add_argument("--running", default="none", help="version that is being replaced")
    records.add_argument("--database", type=Path, required=True)
    records.add_argument("--backups", type=Path, required=True)
    records.add_argument("--keep", type=int, required=True)
    records.add_argument("--dry-run", action="store_true")
    settled = commands.add_parser(
        "settled", help="tell whether the daemon was last started or reloaded with the present files"
    )
    settled.add_argument("--etc", type=Path, required=True)
    settled.add_argument("--lib", type=Path, required=True)
    settled.add_argument("--unit", type=Path, required=True)
    settled.add_argument("--note", action="store_true", help="the daemon has just been started or reloaded with them")
    arguments = parser.parse_args()
    actions = {"check": judge_configuration, "records": back_up_records, "settled": check_settled}
    print(json.dumps(actions[arguments.command](arguments), sort_keys=True))
    return 0


# ---- configuration ----


def judge_configuration(arguments: argparse.Namespace) -> dict[str, Any]:
    """Judge a configuration as a whole, by the release that is to run, and as the user that it is to run as.

    Standard input is {"config.yaml": text, "cleanup.yaml": text, "ca.pem": text or null, "profiles": {name: text},
    "remove": file names}, with the files as they would stand in ``etc``. Returns {"restart": whether a reload is not
    enough}. Raises Refused.
    """
    import yaml

    texts: dict[str, Any] = json.load(sys.stdin)
    user = pwd.getpwnam(arguments.user)
    # In memory, so that a secret never reaches the disk before its file has the right owner.
    with tempfile.TemporaryDirectory(prefix="agentlab-check-", dir="/run" if os.geteuid() == 0 else None) as temporary:
        folder = Path(temporary)
        # Profiles that a person put there count too, unless they are about to be replaced.
        profiles = arguments.etc / "profiles"
        (folder / "profiles").mkdir()
        for path in sorted(profiles.glob("*.yaml")) if profiles.is_dir() else []:
            (folder / "profiles" / path.name).write_bytes(path.read_bytes())
        for name in texts["remove"]:
            (folder / "profiles" / name).unlink(missing_ok=True)
        for name, text in texts["profiles"].items():
            (folder / "profiles" / f"{name}.yaml").write_text(text, encoding="utf-8")
        (folder / "cleanup.yaml").write_text(texts["cleanup.yaml"], encoding="utf-8")
        config = yaml.safe_load(texts["config.yaml"]) or {}
        staged = {**config, "cleanup_file": f"{folder}/cleanup.yaml", "profiles_dir": f"{folder}/profiles"}
        defaults = _import_core(arguments.release, "config").DEFAULTS
        staged = {name: value for name, value in staged.items() if name in defaults or name in config}
        if texts["ca.pem"] is not None:
            (folder / "ca.pem").write_text(texts["ca.pem"], encoding="utf-8")
            staged["ca_path"] = f"{folder}/ca.pem"
        (folder / "config.yaml").write_text(yaml.safe_dump(staged), encoding="utf-8")
        # Change the folder last: until then the user cannot replace a file by a link.
        for path in (*sorted(folder.rglob("*"), reverse=True), folder):
            path.chmod(0o700 if path.is_dir() else 0o600)
            os.chown(path, user.pw_uid, user.pw_gid, follow_symlinks=False)
        become: dict[str, Any] = (
            {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if os.geteuid() == 0 else {}
        )
        check = subprocess.run(
            [sys.executable, "-Ps", "-m", "agentlabd", "--config", f"{folder}/config.yaml", "--check"],
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
            **become,
            env={
                "PYTHONPATH": str(arguments.release),
                "PYTHONDONTWRITEBYTECODE": "1",
                "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
                "LC_ALL": "C.UTF-8",
            },
        )
    if check.returncode:
        # Keep only the message, without the time and level of the log.
        message = re.sub(r"(?m)^[-\d]+ [\d:,]+ [A-Z]+ (Error: )?", "", (check.stderr or check.stdout).strip()).replace(
            temporary, str(arguments.etc)
        )
        raise Refused(message or f"agentlabd --check ended with {check.returncode}")
    return {"restart": _needs_restart(arguments, config)}


def _needs_restart(arguments: argparse.Namespace, config: dict[str, Any]) -> bool:
    """Return whether a key has changed that the daemon reads only at its start. A damaged file counts as changed."""
    import yaml

    try:
        present = yaml.safe_load((arguments.etc / "config.yaml").read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return True
    return not isinstance(present, dict) or any(
        present.get(name) != config.get(name) for name in _import_core(arguments.release, "config").FIXED
    )


def _import_core(release: Path, module: str) -> Any:
    import importlib

    if str(release) not in sys.path:
        sys.path.insert(0, str(release))
    return importlib.import_module(f"agentlab_core.{module}")


# ---- records ----


def back_up_records(arguments: argparse.Namespace) -> dict[str, Any]:
    """Back up the records before a change of release, and restore a backup when the records are too new for it.

    Returns {"schema", "known", "backup", "restored"}: the schema of the records, the schema of the release, the new
    backup, the restored backup. The daemon must not run.
    """
    known = _import_core(arguments.release, "store.schema").VERSION
    answer: dict[str, Any] = {"schema": None, "known": known, "backup": None, "restored": None}
    if not arguments.database.exists() or not arguments.database.stat().st_size:
        return answer
    answer["schema"] = _read_schema(arguments.database)
    older = None
    if answer["schema"] > known:
        older = next((path for path, schema in _list_backups(arguments.backups) if schema <= known), None)
        if older is None:
            raise Refused(
                f"the records {arguments.database} have schema {answer['schema']}, this release knows {known}, and "
                f"{arguments.backups} holds no older copy; run a newer release, or move the records away to begin with "
                "none"
            )
        answer["restored"] = str(older)
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    backup = arguments.backups / f"agentlab-{arguments.running}-schema{answer['schema']}-{stamp}.db"
    answer["backup"] = str(backup)
    if arguments.dry_run:
        return answer
    _copy_records(arguments.database, backup)
    if older is not None:
        _restore_records(older, arguments.database)
    for path, _schema_number in _list_backups(arguments.backups)[arguments.keep :]:
        path.unlink()
    return answer


def _read_schema(path: Path) -> int:
    with contextlib.closing(sqlite3.connect(path, timeout=60)) as conn:
        return int(conn.execute("PRAGMA user_version").fetchone()[0])


def _list_backups(folder: Path) -> list[tuple[Path, int]]:
    """Return the backups, newest first, each with its schema."""
    backups = [
        (match["at"], path, int(match["schema"]))
        for path in folder.glob("agentlab-*.db")
        if (match := BACKUP.match(path.name))
    ]
    return [(path, schema) for _at, path, schema in sorted(backups, reverse=True)]


def _copy_records(source: Path, target: Path) -> None:
    """Copy the records with SQLite's backup function, which includes the WAL. Sync the copy before it gets its name."""
    draft = target.with_suffix(".part")
    draft.unlink(missing_ok=True)
    os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    with (
        contextlib.closing(sqlite3.connect(source, timeout=60)) as conn,
        contextlib.closing(sqlite3.connect(draft)) as copy,
    ):
        conn.backup(copy)
        # The copy is a single file, without a WAL.
        copy.execute("PRAGMA journal_mode = DELETE")
        if copy.execute("PRAGMA quick_check").fetchone()[0] != "ok":
            raise Refused(f"the copy of {source} is damaged, and so may be the records; nothing was changed")
    _sync_to_disk(draft)
    draft.rename(target)
    _sync_to_disk(target.parent)


def _restore_records(copy: Path, database: Path) -> None:
    """Replace the records by a copy. Keep the owner and mode of the records."""
    replaced = database.stat()
    draft = database.with_name(f".{database.name}.restored")
    draft.unlink(missing_ok=True)
    # We are root, and the folder belongs to the daemon. So never write through a link in it.
    with (
        copy.open("rb") as source,
        open(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o600), "wb") as target,
    ):
        shutil.copyfileobj(source, target)
        os.fchown(target.fileno(), replaced.st_uid, replaced.st_gid)
        os.fchmod(target.fileno(), replaced.st_mode & 0o777)
        target.flush()
        os.fsync(target.fileno())
    # The old WAL belongs to the replaced file.
    for suffix in ("-wal", "-shm"):
        database.with_name(database.name + suffix).unlink(missing_ok=True)
    draft.rename(database)
    _sync_to_disk(database.parent)


# ---- what the daemon has read ----


def check_settled(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return {"settled", "noted"}: whether the daemon has read the present files.

    A run that is interrupted between writing a file and telling the daemon leaves the two different, and the next run
    changes no file. The note of what the daemon was last told is beside the releases, readable for root only, because
    it contains a hash of the file with the secret.
    """
    note = arguments.lib / "settled"
    present = _fingerprint_files(arguments)
    noted_before = note.read_text(encoding="utf-8") if note.exists() else ""
    # Before the first start there is no daemon that could be behind.
    answer = {
        "settled": present == noted_before or not (arguments.lib / "current").is_symlink(),
        "noted": arguments.note and present != noted_before,
    }
    if answer["noted"]:
        draft = note.with_suffix(".part")
        draft.unlink(missing_ok=True)
        with open(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="utf-8") as file:
            file.write(present)
        _sync_to_disk(draft)
        draft.rename(note)
    return answer


def _fingerprint_files(arguments: argparse.Namespace) -> str:
    """Return a fingerprint of the files that the role writes. Files of other people do not count."""
    profiles = [
        path for path in sorted((arguments.etc / "profiles").glob("*.yaml")) if path.read_bytes().startswith(MANAGED)
    ]
    dropins = sorted(arguments.unit.with_name(f"{arguments.unit.name}.d").glob("10-local.conf"))
    files = [
        arguments.unit,
        *dropins,
        arguments.lib / "current/MANIFEST",
        *(arguments.etc / name for name in ("config.yaml", "cleanup.yaml", "ca.pem")),
        *profiles,
    ]
    return "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path}\n" for path in files if path.exists())


def _sync_to_disk(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Refused as refused:
        print(refused, file=sys.stderr)
        sys.exit(1)
    except (OSError, sqlite3.Error) as error:
        print(f"{error}; nothing was changed", file=sys.stderr)
        sys.exit(1)
