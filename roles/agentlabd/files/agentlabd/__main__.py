# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""``python3 -m agentlabd``: start the daemon, or check its files."""

from __future__ import annotations

import argparse
import os
import sys

from agentlab_core.config import Config
from agentlab_core.errors import AgentlabError, StoreError, StoreUnavailable, make_host_error

from . import LAST_WORD, __version__, logs


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return the exit status: 0 ended as asked, 1 could not start or failed."""
    parser = argparse.ArgumentParser(
        prog="agentlabd", description="Daemon of agentlab.proxmox: ends leases, cleans up, reconciles, serves the API."
    )
    parser.add_argument(
        "--config", metavar="FILE", help="configuration (default: AGENTLAB_CONFIG, then /etc/agentlab/config.yaml)"
    )
    parser.add_argument("--check", action="store_true", help="check the configuration and the cleanup rules, and end")
    parser.add_argument(
        "--cleanup-file",
        metavar="FILE",
        help="with --check: the cleanup rules to check, instead of those of the configuration",
    )
    parser.add_argument(
        "--copy-records",
        nargs=2,
        metavar=("FROM", "TO"),
        help="copy all records from one database (a path or postgresql://…) into another, empty one, and end",
    )
    parser.add_argument(
        "--migrate-records",
        action="store_true",
        help="make or update the tables of the records with the role of the configured database, and end",
    )
    parser.add_argument(
        "--password-stdin",
        action="store_true",
        help="with --migrate-records or --copy-records: read the password of the PostgreSQL role from standard input",
    )
    parser.add_argument("--verbose", action="store_true", help="log more")
    parser.add_argument("--version", action="version", version=f"agentlabd {__version__}")
    options = parser.parse_args(arguments)
    if options.cleanup_file and not options.check:
        parser.error("--cleanup-file is for --check; set cleanup_file in the configuration")
    once = [name for name in ("check", "migrate_records", "copy_records") if getattr(options, name)]
    if len(once) > 1:
        parser.error("--check, --migrate-records and --copy-records exclude each other; give one of them")
    if options.password_stdin and not (options.migrate_records or options.copy_records):
        parser.error("--password-stdin is for --migrate-records and --copy-records")
    password = read_password() if options.password_stdin else None
    if password == "":
        parser.error(
            "--password-stdin: standard input is empty. Write the password of the PostgreSQL role to it, or leave the "
            "option out"
        )
    logs.set_up_logging(options.verbose)
    from .service import check_files, load_config

    try:
        if options.copy_records:
            source, target = options.copy_records
            return copy_and_report(source, target, password)
        config, path = load_config(options.config, os.environ)
        if options.cleanup_file:
            config.cleanup_file = options.cleanup_file
        if options.check:
            check_files(config)
            print("agentlabd: the configuration can be used")
            return 0
        if options.migrate_records:
            return migrate_records(config, password)
        from . import daemon

        return daemon.run(config, path, os.environ, options.config)
    except AgentlabError as error:
        logs.log.error("Error: %s", error.message)
    except Exception as error:  # the outermost edge: a reader of the journal needs a sentence after the traceback
        if known := make_host_error(error):
            logs.log.error("Error: %s", known.message)
        else:
            logs.log.critical("internal error: %s. Please report this", type(error).__name__, exc_info=True)
    if not once:
        # Only the daemon is started again by systemd.
        logs.log.error("%s", LAST_WORD)
    return 1


def read_password() -> str:
    """Return the first line of standard input; a terminal does not show what is typed."""
    if sys.stdin.isatty():
        import getpass

        return getpass.getpass("Password of the PostgreSQL role: ")
    return sys.stdin.readline().rstrip("\n")


def copy_and_report(source: str, target: str, password: str | None) -> int:
    """Copy records between databases, print the counts and checksums of both sides, and return the exit status.

    ``password`` is for the PostgreSQL side; with None libpq looks for it (PGPASSWORD, a passfile).
    """
    from agentlab_core.database_address import parse
    from agentlab_core.errors import InvalidInput
    from agentlab_core.store.transfer import copy_records

    for side, address in (("FROM", source), ("TO", target)):
        if parse(address).password is not None:
            raise InvalidInput(
                f"--copy-records: {side} has a password, which every user of this host sees in the list of processes; "
                "nothing was copied. Give it on standard input with --password-stdin, in PGPASSWORD or in a passfile, "
                "and replace it: it may have been seen"
            )
    copied = copy_records(source, target, (password, password))
    print(f"copied {parse(source).text} to {parse(target).text}")
    for table, count in copied.counts.items():
        print(f"{table}: {count}")
    print(f"checksum of the source: {copied.source_checksum}")
    print(f"checksum of the copy:   {copied.target_checksum}")
    return 0


def migrate_records(config: Config, password: str | None) -> int:
    """Create or migrate the tables of the records; return the exit status. ``password`` replaces the configured one."""
    from agentlab_core.store import schema
    from agentlab_core.store.open import open_database

    try:
        database = open_database(
            config.database, password=password or config.database_password, group_mode=config.database_group_access
        )
    except StoreUnavailable as error:
        fate = "the tables are changed as a whole or not at all"
        raise StoreError(f"--migrate-records: {error.explain_once(fate)}") from error
    before = "" if database.migrated else ", as before"
    database.close()
    print(f"agentlabd: the records have schema {schema.VERSION}{before}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
