# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A file of this host that ``agentlab sandbox cp`` writes: complete at its place, or not there at all."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from typing import IO, Any

from .errors import Problem
from .text import join_lines


@contextlib.contextmanager
def report_errors(path: str | None = None) -> Iterator[None]:
    """Turn errors of a local file into Problem, so that they are not taken for errors of the connection."""
    try:
        yield
    except OSError as error:
        name = "the file here" if path is None else join_lines(path)
        raise Problem(f"{name}: {error.strerror or error}; nothing was copied") from None


class Replacement:
    """New content for ``target``. Use it as a context manager: what is not installed by its end is removed.

    Where the file system can (Linux: ext4, xfs, btrfs, tmpfs), the content is in a file without a name. So nothing of
    it is left when this process is killed. A link stays, and the file that it leads to is replaced. A device or a pipe
    is written to.
    """

    def __init__(self, target: str) -> None:
        self._target = target
        self._place = os.path.realpath(target)
        self._folder = os.path.dirname(self._place)
        self._fresh = os.path.join(self._folder, f".agentlab-{os.urandom(8).hex()}")
        self._stack = contextlib.ExitStack()
        self._is_special = self._is_named = False
        self.file: IO[bytes]

    def __enter__(self) -> Replacement:
        with report_errors(self._target):
            try:
                self._open_file()
            except BaseException:
                self._stack.close()
                raise
        return self

    def __exit__(self, *_exception: object) -> None:
        # Closing a file writes what is buffered, and the disk may be full.
        with report_errors(self._target):
            self._stack.close()

    def _open_file(self) -> None:
        """Open the special file, or a new file for the content, without a name where that is possible."""
        self._is_special = _is_special(self._target)
        if self._is_special:
            # O_CREAT and O_TRUNC are left out, so that no file is created or emptied if the target changes meanwhile.
            self.file = self._stack.enter_context(os.fdopen(os.open(self._target, os.O_WRONLY), "wb"))
            return
        self._stack.enter_context(_raise_at_signals())
        self._stack.callback(_remove_file, self._fresh)
        try:
            handle = os.open(self._folder, os.O_TMPFILE | os.O_RDWR, 0o600)
        except (OSError, AttributeError):
            # The file system, or the system (macOS), has no files without a name.
            handle = self._create_fresh()
            self._is_named = True
        self.file = self._stack.enter_context(os.fdopen(handle, "w+b"))

    def _create_fresh(self) -> int:
        """Create the hidden file beside the target, for its owner alone, and return its descriptor."""
        return os.open(self._fresh, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)

    def install(self, mode: int) -> None:
        """Put the content in the place of the target in one step, with the bits of ``mode`` that umask allows."""
        with report_errors(self._target):
            self.file.flush()
            if self._is_special:
                return
            umask = os.umask(0o077)
            os.umask(umask)
            os.fchmod(self.file.fileno(), mode & 0o777 & ~umask)
            if not self._is_named:
                self._name_file(mode & 0o777 & ~umask)
            os.replace(self._fresh, self._place)

    def _name_file(self, mode: int) -> None:
        """Give the file without a name the name of the fresh file; copy it where the file system cannot."""
        import shutil

        number = self.file.fileno()
        try:
            # The path is absolute, so src_dir_fd does not matter. But with it Python calls linkat with
            # AT_SYMLINK_FOLLOW, which links the file itself and not the symbolic link in /proc.
            os.link(f"/proc/self/fd/{number}", self._fresh, src_dir_fd=number, follow_symlinks=True)
        except (OSError, NotImplementedError):
            self.file.seek(0)
            with os.fdopen(self._create_fresh(), "wb") as copy:
                shutil.copyfileobj(self.file, copy)
                os.fchmod(copy.fileno(), mode)


def _is_special(path: str) -> bool:
    """Return whether the path is a device, a pipe or a socket."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _remove_file(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


@contextlib.contextmanager
def _raise_at_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP, unless they are ignored, end the process by an exception, which removes its files."""
    import signal

    def end_process(number: int, _frame: Any) -> None:
        raise SystemExit(128 + number)

    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, end_process)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
