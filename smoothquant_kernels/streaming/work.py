"""The progress of a streamed quantization, kept on the disk so that the same call can resume."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.modeling.run import Batch
from smoothquant_kernels.storage.digests import FileEntry, file_entry, tensors_digest
from smoothquant_kernels.storage.folder import replace_file
from smoothquant_kernels.storage.safetensors import join_safetensors, shard_name, write_safetensors

_CALL, _LOCK = "call.json", "lock"


def digest_of(batches: Iterable[Batch]) -> str:
    """Returns the SHA-256 of the calibration data."""
    tensors = (item for batch in batches for item in sorted(batch.items()))
    return tensors_digest((f"{name} {t.dtype} {list(t.shape)}\n", t) for name, t in tensors)


class WorkFolder:
    """A folder beside the target with finished shards, the records of their blocks, and the next block's input.

    A block counts as finished when its record exists. The record is written last, so any file may be missing or
    half-written at any time.

    Attributes:
        checkpoint: the folder that becomes the target.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint = folder / "checkpoint"

    def _record(self, index: int) -> Path:
        return self.folder / f"block-{index:05}.json"

    def _hidden(self, index: int) -> Path:
        return self.folder / f"hidden-{index:05}.safetensors"

    def part(self, index: int) -> Path:
        """The weight file of a finished block. The index after the last block is for the weights outside the blocks."""
        return self.folder / f"block-{index:05}.safetensors"

    def join_parts(
        self, sizes: Sequence[int], limit: int, stem: str
    ) -> tuple[list[str], dict[str, FileEntry]]:
        """Joins the parts into the checkpoint's weight files, of at most `limit` bytes unless a part is larger.

        A file takes its name when it is complete, and then its parts are deleted. So an interrupted call resumes after
        it, and the disk never holds more than one file beyond the result.

        Returns:
            The file of each part, and the size and digest of each file.
        """
        groups = _groups(sizes, limit)
        names: list[str] = []
        entries: dict[str, FileEntry] = {}
        for number, group in enumerate(groups):
            name = shard_name(number, len(groups), stem)
            target, parts = self.checkpoint / name, [self.part(i) for i in group]
            if target.is_file():
                entries[name] = file_entry(target)
            else:
                with replace_file(target, self.folder / "shard.tmp", sync=True) as joined:
                    entries[name] = join_safetensors(joined, parts)
            for part in parts:
                part.unlink(missing_ok=True)
            names += [name] * len(group)
        return names, entries

    def records(self) -> list[dict[str, Any]]:
        """Reads the records of `finish_block`, from the first block up to the first gap."""
        found: list[dict[str, Any]] = []
        while self._record(len(found)).is_file():
            found.append(json.loads(self._record(len(found)).read_text("utf-8")))
        return found

    def finish_block(
        self, index: int, record: Mapping[str, Any], hidden: Mapping[str, Tensor]
    ) -> None:
        """Records that a block's shard is written, and stores the hidden states after the block."""
        part = self.folder / "hidden.tmp"
        with replace_file(self._hidden(index + 1), part, sync=True):
            write_safetensors(part, hidden)
        _write_text(self._record(index), json.dumps(record, allow_nan=False))
        self._hidden(index).unlink(missing_ok=True)

    def hidden(self, index: int) -> dict[str, Tensor]:
        """Loads the hidden states that a block reads."""
        try:
            return load_file(self._hidden(index))
        except (SafetensorError, OSError) as error:
            raise SmoothQuantError(
                f"{self._hidden(index)} cannot be read ({error}): pass resume=False to start anew."
            ) from None


def _groups(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Groups neighbors, as many as fit in `limit`."""
    groups: list[list[int]] = []
    used = 0
    for i, size in enumerate(sizes):
        if groups and used + size <= limit:
            groups[-1].append(i)
            used += size
        else:
            groups.append([i])
            used = size
    return groups


def partial_folder(target: Path) -> Path:
    """The folder for the unfinished work of a target."""
    return target.with_name(f".{target.name}.partial")


@contextmanager
def work_folder(target: Path, call: Mapping[str, Any], *, resume: bool) -> Iterator[WorkFolder]:
    """Yields the folder `.<name>.partial` beside the target, new or as an interrupted call left it.

    After an error, the folder stays if a block is finished.

    Args:
        call: everything that the result depends on, as JSON values.
        resume: continue existing work; False removes it.

    Raises:
        SmoothQuantError: existing work belongs to another call, or another process is using the folder.
    """
    folder = partial_folder(target)
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR)
    try:
        try:
            # The lock ends with the process, however that ends.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SmoothQuantError(
                f"another process is writing {target} (it works in {folder}): wait for it, or give another name."
            ) from None
        _start(folder, call, resume)
        work = WorkFolder(folder)
        try:
            yield work
        except BaseException:
            if not work.records():  # no finished block is lost
                remove(folder)
            raise
    finally:
        os.close(descriptor)


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _start(folder: Path, call: Mapping[str, Any], resume: bool) -> None:
    note = folder / _CALL
    wanted = json.loads(json.dumps(call))
    if resume and note.is_file():
        there = json.loads(note.read_text("utf-8"))
        different = [key for key in wanted if there.get(key) != wanted[key]]
        if different:
            raise SmoothQuantError(
                f"{folder} holds the unfinished work of a call with another {' and '.join(different)}: repeat that "
                "call to finish it, or pass resume=False to drop it and start anew."
            )
        return
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != _LOCK:
            entry.unlink()
    (folder / "checkpoint").mkdir()
    _write_text(note, json.dumps(wanted, indent=1))


def _write_text(path: Path, text: str) -> None:
    with replace_file(path, path.with_name(f"{path.name}.tmp"), sync=True) as part:
        part.write_text(text, "utf-8")
