"""Renames that replace nothing, and the exchange of two folders in one step.

Linux has both as `renameat2` (since 3.15, by file system). Elsewhere a rename that replaces nothing
is made of `mkdir`, which fails if the name is taken, and of `rename`, which replaces only an empty
folder; an exchange is then not to be had.
"""

from __future__ import annotations

import ctypes
import errno
import os
from functools import cache
from pathlib import Path
from typing import Any

_HERE = -100  # AT_FDCWD: relative paths are the process's
_NO_REPLACE = 1  # RENAME_NOREPLACE
_EXCHANGE = 2  # RENAME_EXCHANGE
_NOT_SUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM)


def rename_new(source: Path, target: Path) -> None:
    """Rename a folder to a name that nothing has.

    Raises:
        FileExistsError: Something has the name; nothing was changed.
        OSError: It cannot be renamed.
    """
    if _renameat2(source, target, _NO_REPLACE):
        return
    try:
        os.mkdir(target)
        os.rename(source, target)
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            raise FileExistsError(errno.EEXIST, "File exists", str(target)) from None
        raise


def exchange(one: Path, other: Path) -> bool:
    """Give two folders each other's name in one step; False where the system cannot.

    Raises:
        OSError: One of them is not there, or may not be renamed.
    """
    return _renameat2(one, other, _EXCHANGE)


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    """Whether the system's call did it; False where there is none."""
    call = _system_call()
    if call is None:
        return False
    if call(_HERE, os.fsencode(source), _HERE, os.fsencode(target), flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NOT_SUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))


@cache
def _system_call() -> Any:
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return call
