"""A checkpoint appears complete or not at all, whatever interrupts the writing."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from smoothquant_kernels import SmoothQuantError
from smoothquant_kernels.checkpoint import save
from smoothquant_kernels.checkpoint.load import load_quantized
from smoothquant_kernels.checkpoint.save import save_quantized
from smoothquant_kernels.storage import folder as folder_module
from smoothquant_kernels.storage.safetensors import write_safetensors
from tests.support.checkpoints import contents, refusal

# ------------------------------------------------------------------------------ complete or absent


def fail_at(number: int, error: BaseException) -> Callable[..., Any]:
    """`write_safetensors` that fails in the middle of its `number`-th file."""
    calls: Iterator[int] = iter(range(1, 100))

    def write(path: Path, tensors: dict[str, torch.Tensor]) -> Any:
        if next(calls) == number:
            path.write_bytes(b"half")
            raise error
        return write_safetensors(path, tensors)

    return write


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
DENIED = OSError(errno.EACCES, os.strerror(errno.EACCES))
INTERRUPTIONS = [
    (KeyboardInterrupt(), KeyboardInterrupt, ""),
    (FULL, SmoothQuantError, "is full, nothing was saved: free some space or save elsewhere"),
    (DENIED, SmoothQuantError, "cannot be written (Permission denied), nothing was saved"),
    (MemoryError(), MemoryError, ""),
]


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(("error", "kind", "text"), INTERRUPTIONS)
@pytest.mark.parametrize("where", ["second shard", "sync", "rename"])
def test_an_interrupted_save_leaves_the_old_state(
    where: str,
    error: BaseException,
    kind: type[BaseException],
    text: str,
    existing: bool,
    model: nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = tmp_path / "parent" / "model"
    target.parent.mkdir()
    if existing:
        save_quantized(model, target)
        before = contents(target)
    if where == "second shard":
        monkeypatch.setattr(save, "write_safetensors", fail_at(2, error))
    else:
        replace = os.replace

        def fail(source: Any, to: Any = None) -> None:
            # Moving the old folder away succeeds. Renaming the new one fails.
            if where == "rename" and not str(source).endswith(".tmp"):
                return replace(source, to)
            raise error

        monkeypatch.setattr(
            *((folder_module, "_sync") if where == "sync" else (os, "replace")), fail
        )
    with pytest.raises(kind) as caught:
        save_quantized(model, target, overwrite=existing, max_shard_bytes=20_000)
    assert text in str(caught.value)
    assert [p.name for p in target.parent.iterdir()] == (["model"] if existing else [])
    monkeypatch.undo()
    if existing:
        assert contents(target) == before
        load_quantized(target)
    save_quantized(model, target, overwrite=existing)


def test_a_write_that_the_system_refuses_saves_nothing(model: nn.Module, tmp_path: Path) -> None:
    """As above, with a real limit instead of a mock: no file may grow beyond 30 kB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        message = refusal(lambda: save_quantized(model, tmp_path / "model"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be written (File too large), nothing was saved" in message
    assert list(tmp_path.iterdir()) == []


def test_existing_targets(saved: Path, model: nn.Module, tmp_path: Path) -> None:
    before = contents(saved)
    message = refusal(lambda: save_quantized(model, saved))
    assert f"{saved} exists already: pass overwrite=True" in message
    assert contents(saved) == before
    (saved / "stale.txt").write_text("x")
    save_quantized(model, saved, overwrite=True)
    assert not (saved / "stale.txt").exists()
    file, home, empty = tmp_path / "file", tmp_path / "home", tmp_path / "empty"
    file.write_text("x")
    home.mkdir()
    (home / "thesis.txt").write_text("x")
    for overwrite in (False, True):
        assert "is a file" in refusal(lambda: save_quantized(model, file, overwrite=overwrite))  # noqa: B023
    message = refusal(lambda: save_quantized(model, home, overwrite=True))
    assert "is not a checkpoint of this package and is not overwritten" in message
    assert (home / "thesis.txt").read_text() == "x"
    empty.mkdir()
    load_quantized(save_quantized(model, empty))
    link = tmp_path / "link"
    link.symlink_to(saved)
    save_quantized(model, link, overwrite=True)
    assert link.is_symlink() and not saved.is_symlink()
    load_quantized(link)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"model", "file", "home", "empty", "link"}


def test_permissions_follow_the_umask(model: nn.Module, tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        folder = save_quantized(model, tmp_path / "new" / "model")
    finally:
        os.umask(old)
    assert folder.stat().st_mode & 0o777 == 0o750
    assert {f.stat().st_mode & 0o777 for f in folder.iterdir()} == {0o640}
