"""Files and folders that appear whole or not at all, and checks whether a folder may be written."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from smoothquant_kernels.errors import SmoothQuantError


@contextmanager
def new_folder(target: Path, *, markers: tuple[str, ...], overwrite: bool) -> Iterator[Path]:
    """Yields a temporary folder beside `target`, which takes its name on success and is deleted on failure.

    Args:
        target: the final path. Missing parents are created. An empty folder there is replaced.
        markers: a folder with one of these files may be overwritten.
        overwrite: replace an existing folder, which is lost only after the new one is complete.

    Raises:
        SmoothQuantError: `target` exists and may not be replaced, or the disk refuses (it is full, read-only, ...).
    """
    target = target.expanduser().resolve()  # keeps a link and replaces its target
    try:
        check_folder(target, markers, overwrite=overwrite)
        with replace_folder(target, overwrite=overwrite) as folder:
            yield folder
            seal(folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SmoothQuantError(
                f"the disk of {target.parent} is full, nothing was saved: free some space or save elsewhere."
            ) from error
        raise SmoothQuantError(
            f"{target} cannot be written ({error.strerror or error}), nothing was saved: save elsewhere."
        ) from error


@contextmanager
def replace_folder(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yields a temporary folder like `new_folder`, but checks nothing and does not convert the system's errors."""
    folder = _beside(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
        yield folder
        put(folder, target, overwrite)
    finally:  # Ctrl-C included; after success, nothing has this name anymore
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def replace_file(target: Path, part: Path | None = None, *, sync: bool = False) -> Iterator[Path]:
    """Yields a temporary file, which takes the name of `target` on success and is deleted on failure.

    Args:
        target: the final path. An existing file is lost only after the new one is complete.
        part: the temporary file. The default is beside `target`, under a name that no other process uses.
        sync: write the content to the disk before the name appears.
    """
    part = part or _beside(target)
    try:
        yield part
        if sync:
            _sync(str(part))
        os.replace(part, target)
    finally:
        with contextlib.suppress(OSError):  # the disk may have refused the name itself
            part.unlink(missing_ok=True)


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")


def occupant(target: Path, markers: tuple[str, ...]) -> Literal["file", "own", "other"] | None:
    """What exists at the path of a new folder. An "own" folder has a marker. An empty folder counts as nothing."""
    if target.exists() and not target.is_dir():
        return "file"
    if not target.exists() or not any(target.iterdir()):
        return None
    return "own" if any((target / marker).is_file() for marker in markers) else "other"


def check_folder(target: Path, markers: tuple[str, ...], *, overwrite: bool) -> None:
    """Raises SmoothQuantError if `target` exists and may not be replaced. Takes the arguments of `new_folder`."""
    found = occupant(target, markers)
    if found == "file":
        raise SmoothQuantError(f"{target} is a file: give the name of a folder.")
    if found == "other":
        raise SmoothQuantError(
            f"{target} exists already, is not a checkpoint of this package and is not overwritten: give another name."
        )
    if found and not overwrite:
        raise SmoothQuantError(
            f"{target} exists already: pass overwrite=True to replace it, or give another name."
        )


def check_writable(target: Path) -> None:
    """Raises SmoothQuantError if no folder can be made at `target`. Leaves nothing there."""
    parent = existing_parent(target)
    try:
        # Checking permissions is not enough, because a read-only file system grants them to root.
        with tempfile.TemporaryDirectory(dir=parent):
            pass
    except OSError as error:
        raise SmoothQuantError(
            f"{target} cannot be written: {error.strerror} ({parent}); give another place."
        ) from error


def existing_parent(target: Path) -> Path:
    """The nearest folder above `target` that exists."""
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return parent


def seal(folder: Path) -> None:
    """Gives all files the usual permissions and syncs everything to the disk before the final name appears."""
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
        os.replace(folder, target)  # fails if another process has made a folder there
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
