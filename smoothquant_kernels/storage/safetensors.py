"""Safetensors files whose tensors can be used in place when the file is mapped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.storage.digests import FileEntry, tensor_bytes, write_pieces

# torch's allocator aligns to 64 bytes. With another alignment, a float GEMM may add in another order, and a reloaded
# model would not be bit-identical. Aligned vector loads are also faster.
ALIGNMENT = 64
_PIECE = 8 << 20  # bytes copied at a time
#: How the weight files of our own format begin. Not "model", because loaders that look for that name would take the
#: rest for a float model.
OWN_STEM = "smoothquant"

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class TensorEntry(TypedDict):
    """A tensor's safetensors file, its `torch.dtype` without the prefix, and its shape."""

    file: str
    dtype: str
    shape: list[int]


def check_storable(name: str, value: object) -> Tensor:
    """Returns the tensor if the format can store it.

    Raises:
        SmoothQuantError: it is not a tensor, is sparse, has no data (meta device), or has a type that `NAMES` lacks.
    """
    if not isinstance(value, Tensor):
        raise SmoothQuantError(
            f"the state {name} is a {type(value).__name__}, only tensors can be saved."
        )
    if value.is_meta:
        raise SmoothQuantError(f"{name} has no data (meta device): load the whole model first.")
    if value.layout != torch.strided or value.dtype not in NAMES:
        raise SmoothQuantError(
            f"{name} is {value.layout}, {value.dtype}: only dense tensors of a safetensors type can be saved."
        )
    return value


def size_of(tensor: Tensor) -> int:
    """The bytes that a tensor takes in the file."""
    return tensor.numel() * tensor.element_size()


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> FileEntry:
    """Writes one file and returns its size and digest. Copies at most one tensor at a time.

    `safetensors.torch.save_file` aligns the data to 8 bytes. Here the data starts at a multiple of 64, and tensors
    whose size is a multiple of 64 come first, so that all of these are aligned when the file is mapped.

    Equivalent to:
        safetensors.torch.save_file(tensors, path, {"format": "pt"})
    """
    names = sorted(tensors, key=lambda name: size_of(tensors[name]) % ALIGNMENT != 0)
    return write_pieces(path, _parts(names, tensors, metadata or {}))


def _parts(
    names: Iterable[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name in names:
        start, end = end, end + size_of(tensors[name])
        header[name] = {
            "dtype": NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    yield _header_bytes(header)
    for name in names:
        yield tensor_bytes(tensors[name])


def join_safetensors(path: Path, parts: Iterable[Path]) -> FileEntry:
    """Writes the tensors of several files into one, a piece at a time, in the order of `write_safetensors`."""
    found = [
        (p, begin, *item) for p in parts for e, begin in [read_header(p)] for item in e.items()
    ]
    sizes = [entry["data_offsets"][1] - entry["data_offsets"][0] for *_, entry in found]
    order = sorted(range(len(found)), key=lambda i: sizes[i] % ALIGNMENT != 0)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for i in order:
        *_, name, entry = found[i]
        header[name] = {**entry, "data_offsets": [end, end + sizes[i]]}
        end += sizes[i]

    def pieces() -> Iterator[bytes]:
        yield _header_bytes(header)
        for i in order:
            part, begin, _, entry = found[i]
            with part.open("rb") as source:
                source.seek(begin + entry["data_offsets"][0])
                left = sizes[i]
                while left:
                    piece = source.read(min(left, _PIECE))
                    if not piece:
                        raise OSError(f"{part} ends too early")
                    yield piece
                    left -= len(piece)

    return write_pieces(path, pieces())


def _header_bytes(header: Mapping[str, object]) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def aligned(tensor: Tensor) -> Tensor:
    """Returns the tensor, or a copy if it is not aligned, as a mapped one may be."""
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


def align_tensors(model: torch.nn.Module) -> None:
    """Copies the CPU tensors that are not aligned, so that a reloaded model adds in the same order.

    transformers maps the files of a checkpoint. A float product of few tokens depends on the address of its weight.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"
        if plain and tensor.data_ptr() % ALIGNMENT:
            tensor.data = aligned(tensor.data)


def unique(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns each tensor once, and the other names of tensors that have several (other name -> first name)."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    for name, value in state.items():
        t = check_storable(name, value)
        key = (t.device, t.data_ptr(), t.dtype, t.shape, t.stride())
        if t.numel() and first.setdefault(key, name) != name:
            tied[name] = first[key]
        else:
            tensors[name] = t
    return tensors, tied


def assign_files(tensors: Mapping[str, Tensor], limit: int, stem: str = OWN_STEM) -> dict[str, str]:
    """Assigns the tensors to files, in order, as many to a file as fit in `limit` bytes."""
    numbers: dict[str, int] = {}
    number = used = 0
    for name, tensor in tensors.items():
        if used and used + size_of(tensor) > limit:
            number, used = number + 1, 0
        used += size_of(tensor)
        numbers[name] = number
    return {n: shard_name(i, number + 1, stem) for n, i in numbers.items()}


def shard_name(number: int, count: int, stem: str = OWN_STEM) -> str:
    """The name of a checkpoint's weight file, counted from 0."""
    if count == 1:
        return f"{stem}.safetensors"
    return f"{stem}-{number + 1:05}-of-{count:05}.safetensors"


def read_header(file: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Returns the entries of a safetensors file's tensors, and the byte where the data begin.

    The format is eight bytes with the header's length, the header in JSON, and the data.

    Raises:
        SmoothQuantError: the file is not a safetensors file, or it is truncated.
    """
    try:
        with file.open("rb") as data:
            length = int.from_bytes(data.read(8), "little")
            end = file.stat().st_size
            if not 2 <= length <= min(end - 8, 100_000_000):
                raise ValueError("its header has no possible length")
            header = json.loads(data.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        if wrong := [name for name, entry in entries.items() if not _is_entry(entry)]:
            raise ValueError(f"its entry of {wrong[0]!a:.200} is none")
        last = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if 8 + length + last > end:
            raise ValueError(f"it has {end} bytes and should have {8 + length + last}")
        return entries, 8 + length
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SmoothQuantError(
            f"{file} cannot be read ({error}): copy or download it again."
        ) from None


def _is_entry(entry: Mapping[str, Any]) -> bool:
    """Whether an entry of a header has a type, a shape and the place of the data; others may raise."""
    start, end = entry["data_offsets"]
    numbers = (start, end, *entry["shape"])
    plain = all(type(n) is int and n >= 0 for n in numbers)
    return isinstance(entry["dtype"], str) and plain and start <= end


def stored_sizes(files: Iterable[Path]) -> dict[str, int]:
    """The bytes of each tensor in some files, from their headers."""
    spans = {n: e["data_offsets"] for file in files for n, e in read_header(file)[0].items()}
    return {name: end - start for name, (start, end) in spans.items()}


def check_headers(folder: Path) -> None:
    """Raises SmoothQuantError, which names the file, unless every safetensors file of a folder is whole."""
    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        read_header(file)


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def tensor_entries(
    tensors: Mapping[str, Tensor], files: Mapping[str, str] | None = None
) -> dict[str, TensorEntry]:
    """Returns the manifest's entries of tensors. Without `files` (name -> file), the file names stay empty."""
    return {
        name: {
            "file": "" if files is None else files[name],
            "dtype": dtype_name(t),
            "shape": list(t.shape),
        }
        for name, t in tensors.items()
    }


def read(folder: Path, entries: Mapping[str, TensorEntry]) -> dict[str, Tensor]:
    """Maps the tensors and checks that each is as the manifest describes it."""
    tensors: dict[str, Tensor] = {}
    for file in sorted({entry["file"] for entry in entries.values()}):
        names = {name for name, entry in entries.items() if entry["file"] == file}
        try:
            with safe_open(folder / file, framework="pt", device="cpu") as data:
                if found := names.symmetric_difference(data.keys()):
                    raise SmoothQuantError(
                        f"{folder / file} does not match the manifest at {min(found)}: copy it again."
                    )
                tensors |= {name: data.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise SmoothQuantError(
                f"{folder / file} cannot be read ({error}): copy it again."
            ) from None
    for name, entry in entries.items():
        t = tensors[name]
        if list(t.shape) != entry["shape"] or dtype_name(t) != entry["dtype"]:
            raise SmoothQuantError(
                f"{name} is {dtype_name(t)} {list(t.shape)} in {entry['file']} and {entry['dtype']} {entry['shape']} "
                "in the manifest: copy the checkpoint again."
            )
    return tensors
