"""Writing a folder so that it is there whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from smoothquant_kernels.errors import SmoothQuantError


@contextmanager
def new_folder(target: Path, *, marker: str, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name when the block ends well, and vanishes when it does not.

    Args:
        target: where the folder shall be; parents are made. An empty folder there is replaced.
        marker: the file by which a folder is known as one that may be overwritten.
        overwrite: replace an existing folder; it is lost only after the new one is complete.

    Raises:
        SmoothQuantError: `target` exists and may not be replaced, or the disk refuses (it is full, read-only, ...).
    """
    target = target.expanduser().resolve()  # a link stays, what it points to is replaced
    folder = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        check_target(target, marker, overwrite)
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
        yield folder
        seal(folder)
        put(folder, target, overwrite)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SmoothQuantError(
                f"the disk of {target.parent} is full, nothing was saved: free some space or save elsewhere."
            ) from error
        raise SmoothQuantError(
            f"{target} cannot be written ({error.strerror or error}), nothing was saved: save elsewhere."
        ) from error
    finally:  # whatever happened, Ctrl-C included; after success there is nothing left of that name
        shutil.rmtree(folder, ignore_errors=True)


def check_target(target: Path, marker: str, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise SmoothQuantError(f"{target} is a file: give the name of a folder.")
    if not target.exists() or not any(target.iterdir()):
        return
    if not (target / marker).is_file():
        raise SmoothQuantError(
            f"{target} exists already, is not a checkpoint of this package and is not overwritten: give another name."
        )
    if not overwrite:
        raise SmoothQuantError(
            f"{target} exists already: pass overwrite=True to replace it, or give another name."
        )


def seal(folder: Path) -> None:
    """Usual permissions for all files, and everything on the disk before the name appears."""
    for root, _, names in os.walk(folder, topdown=False):
        mode = stat.S_IMODE(os.stat(root).st_mode) & 0o666  # what the umask leaves
        for name in names:
            path = os.path.join(root, name)
            os.chmod(path, mode)
            _sync(path)
        _sync(root)


def put(folder: Path, target: Path, overwrite: bool) -> None:
    old = folder.with_name(folder.name.removesuffix(".tmp") + ".old")
    try:
        if overwrite and target.exists():
            os.replace(target, old)
        os.replace(folder, target)  # fails where another process has put a folder meanwhile
        _sync(str(target.parent))
    except BaseException:
        if old.exists() and not target.exists():
            os.replace(old, target)
        raise
    finally:
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
