"""Files and folders that appear complete or not at all, and checks of whether a folder may be written."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.storage import folder as folder_module
from smoothquant_kernels.storage.folder import (
    check_folder,
    check_writable,
    existing_parent,
    new_folder,
    occupant,
    replace_file,
    replace_folder,
)

FULL = OSError(errno.ENOSPC, "No space left on device")


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def usual_umask() -> Any:
    old = os.umask(0o022)
    yield
    os.umask(old)


# --- files ----------------------------------------------------------------------------------------


def test_a_file_is_replaced_when_the_new_one_is_complete(tmp_path: Path, usual_umask: Any) -> None:
    target = tmp_path / "file"
    for text in ("first", "second"):
        with replace_file(target) as part:
            part.write_text(text)
            assert part.parent == tmp_path
            assert not target.exists() or target.read_text() == "first"
        assert target.read_text() == text and names(tmp_path) == ["file"]
    assert target.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [KeyboardInterrupt(), FULL, MemoryError()])
@pytest.mark.parametrize("where", ["block", "sync", "rename"])
def test_an_interrupted_file_leaves_the_old_one(
    where: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    target = tmp_path / "file"
    target.write_text("old")
    if where != "block":
        monkeypatch.setattr(
            *((folder_module, "_sync") if where == "sync" else (os, "replace")), fail
        )
    with pytest.raises(type(error)) as caught, replace_file(target, sync=True) as part:
        part.write_text("half")
        if where == "block":
            fail()
    assert caught.value is error
    assert names(tmp_path) == ["file"] and target.read_text() == "old"


def test_a_temporary_file_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replace_file(tmp_path / "none" / "file") as part:
        part.write_text("x")
    with pytest.raises(OSError) as caught, replace_file(tmp_path / ("n" * 250)) as part:
        part.write_text("x")
    assert caught.value.errno == errno.ENAMETOOLONG
    assert names(tmp_path) == []


def test_a_temporary_file_in_another_folder(tmp_path: Path) -> None:
    (tmp_path / "done").mkdir()
    part = tmp_path / "part.tmp"
    part.write_text("left by a killed process, and longer")
    with replace_file(tmp_path / "done" / "file", part) as given:
        assert given == part
        given.write_text("new")
        assert names(tmp_path / "done") == []
    assert names(tmp_path) == ["done"]
    assert (tmp_path / "done" / "file").read_text() == "new"


@pytest.mark.parametrize("sync", [False, True])
def test_the_content_is_synced_before_the_rename(
    sync: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, done = tmp_path / "file", []

    def watch(path: str) -> None:
        done.append((Path(path).read_text(), target.exists()))

    monkeypatch.setattr(folder_module, "_sync", watch)
    with replace_file(target, sync=sync) as part:
        part.write_text("all")
    assert done == ([("all", False)] if sync else [])


# --- folders --------------------------------------------------------------------------------------


def test_a_folder_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "new" / "demo"
    with pytest.raises(KeyboardInterrupt), replace_folder(target, overwrite=True) as folder:
        (folder / "half").touch()
        raise KeyboardInterrupt
    assert list(target.parent.iterdir()) == []
    for content in ("first", "second"):
        with replace_folder(target, overwrite=True) as folder:
            (folder / content).touch()
        assert [p.name for p in target.iterdir()] == [content]
        assert names(target.parent) == ["demo"]


def test_an_interrupted_folder_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    (target / "old").touch()
    replace = os.replace

    def fail(source: Any, to: Any) -> None:
        if str(source).endswith(".tmp"):
            raise FULL
        replace(source, to)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError) as caught, replace_folder(target, overwrite=True) as folder:
        (folder / "new").touch()
    assert caught.value is FULL  # unchanged: only the caller knows what it wanted to write
    assert names(tmp_path) == ["folder"] and names(target) == ["old"]


def test_permissions_of_a_new_folder_follow_the_umask(tmp_path: Path, usual_umask: Any) -> None:
    with new_folder(tmp_path / "folder", markers=("m",), overwrite=False) as folder:
        (folder / "file").touch(0o600)
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "folder" / "file").stat().st_mode & 0o777 == 0o644
    with replace_folder(tmp_path / "other", overwrite=False) as folder:
        (folder / "file").touch(0o600)
    assert (tmp_path / "other").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "other" / "file").stat().st_mode & 0o777 == 0o600


# --- checks before writing ------------------------------------------------------------------------


def make(place: Path, what: str) -> Path:
    """Makes a file, or a folder with one file of that name."""
    if what == "file":
        place.touch()
    elif what:
        place.mkdir()
        if what != "empty":
            (place / what).touch()
    return place


@pytest.mark.parametrize(
    ("what", "found", "refused", "always"),
    [
        ("", None, None, None),
        ("empty", None, None, None),
        ("file", "file", "is a file: give", "is a file: give"),
        ("thesis", "other", "exists already, is not a", "exists already, is not a"),
        ("marker", "own", "exists already: pass overwrite=True to replace it, or give", None),
    ],
)
def test_occupied_targets(
    what: str, found: str | None, refused: str | None, always: str | None, tmp_path: Path
) -> None:
    target = make(tmp_path / "target", what)
    assert occupant(target, ("marker",)) == found
    for overwrite, words in ((False, refused), (True, always)):
        if words is None:
            check_folder(target, ("marker",), overwrite=overwrite)
        else:
            with pytest.raises(SmoothQuantError) as caught:
                check_folder(target, ("marker",), overwrite=overwrite)
            assert str(caught.value).startswith(f"{target} {words}")
    assert names(tmp_path) == (["target"] if what else [])


def test_a_folder_with_the_markers_name_is_not_a_marker(tmp_path: Path) -> None:
    (tmp_path / "marker").mkdir()
    assert occupant(tmp_path, ("marker",)) == "other"


def test_the_check_of_a_writable_place_leaves_no_files(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b" / "c")
    assert names(tmp_path) == []
    assert existing_parent(tmp_path / "a" / "b" / "c") == tmp_path
    assert existing_parent(tmp_path / "a") == tmp_path


def test_an_unwritable_place_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SmoothQuantError) as caught:
        check_writable(file / "q")
    assert str(caught.value) == (
        f"{file / 'q'} cannot be written: Not a directory ({file}); give another place."
    )

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", fail)
    with pytest.raises(SmoothQuantError, match=r"cannot be written: Read-only file system \("):
        check_writable(tmp_path / "q")
