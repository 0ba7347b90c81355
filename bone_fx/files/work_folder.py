"""A folder that a run works in: marked and locked, so that a later run clears what a dead one left.

The mark is a file in the folder, and the lock is the system's on that file: it ends with the
process, however that ends, and it is seen from other containers, where process ids mean nothing.
Where a file system has no locks nothing is cleared.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, so nothing is cleared
    fcntl = None  # type: ignore[assignment]

MARK = "bone_fx_run.json"
_RANDOM_BYTES = 4
_CAREFUL = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
"""No link is followed, and a pipe does not block."""
NAME_OVERHEAD = len(".") + len(".staging-") + 2 * _RANDOM_BYTES
"""So many bytes the folder's name has more than the name that it is made for."""


@dataclass
class WorkFolder:
    """A folder that this process has marked and locked.

    Attributes:
        path: The folder.
    """

    path: Path
    _lock: int

    def remove(self) -> None:
        """Remove the folder with all that is in it, if it is there, and give up the lock."""
        try:
            for name in os.listdir(self.path):
                if name != MARK:
                    _remove(self.path / name)
            _remove(self.path)  # the mark goes last: what is left if this dies is still known
        except OSError:
            return
        finally:
            self.release()

    def release(self) -> None:
        """Give up the lock; the folder stays."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def make_work_folder(parent: Path, name: str) -> WorkFolder:
    """A new folder `.NAME.staging-<random>`, with the permissions that the umask leaves.

    Raises:
        OSError: It cannot be made.
    """
    while True:
        path = parent / f"{_prefix(name)}{secrets.token_hex(_RANDOM_BYTES)}"
        try:
            path.mkdir()
        except FileExistsError:
            continue
        try:
            lock = os.open(path / MARK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileNotFoundError:
            continue  # another run took the empty folder for a dead one's
        except OSError:
            path.rmdir()
            raise
        folder = WorkFolder(path, lock)
        try:
            if not _try_lock(lock) or not _is_at(lock, path / MARK):
                folder.release()
                continue
            os.write(
                lock, json.dumps({"tool": "bone_fx", "for": name, "pid": os.getpid()}).encode()
            )
        except OSError:
            folder.remove()
            raise
        return folder


def dead_work_folders(parent: Path, name: str) -> Iterator[WorkFolder]:
    """The folders that dead runs made for a name and left, locked; the caller clears them."""
    prefix = _prefix(name)
    try:
        names = sorted(name for name in os.listdir(parent) if name.startswith(prefix))
    except OSError:
        return
    for path in (parent / name for name in names):
        if len(path.name) != len(prefix) + 2 * _RANDOM_BYTES or not _is_folder(path):
            continue
        try:
            lock = os.open(path / MARK, os.O_RDWR | _CAREFUL)
        except FileNotFoundError:
            _remove_empty(path)
            continue
        except OSError:
            continue
        if fcntl is not None and _try_lock(lock) and _is_mark(lock, path, name):
            yield WorkFolder(path, lock)
        else:
            os.close(lock)


def _prefix(name: str) -> str:
    return f".{name}.staging-"


def _try_lock(descriptor: int) -> bool:
    """Lock a file; False if another process has it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # No locks here. Whoever makes a folder works on; whoever looks for dead ones is refused by
        # `_is_mark`, which wants the mark to say that it was locked.
        return True
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        status = os.fstat(descriptor)
        return stat.S_ISREG(status.st_mode) and os.path.samestat(status, os.lstat(path))
    except OSError:
        return False


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _is_mark(descriptor: int, folder: Path, name: str) -> bool:
    """Whether a locked file is the mark of a run for this name that is over."""
    if not _is_at(descriptor, folder / MARK) or not _has_locks(folder / MARK):
        return False
    text = os.pread(descriptor, 4096, 0)
    if not text:  # it died before it wrote
        return len(os.listdir(folder)) == 1
    try:
        content = json.loads(text)
    except ValueError:
        return False
    if not isinstance(content, dict):
        return False
    return content.get("tool") == "bone_fx" and content.get("for") == name


def _has_locks(locked: Path) -> bool:
    """Whether the file system locks: it must refuse a second lock on a file."""
    try:
        other = os.open(locked, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(other)
    return False


def _remove(path: Path) -> None:
    if _is_folder(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _remove_empty(path: Path) -> None:
    try:
        path.rmdir()
    except OSError:
        return
