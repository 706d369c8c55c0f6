"""The manifest of a checkpoint folder: its contents as JSON, which is checked before use."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypedDict, get_origin, get_type_hints

from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.modeling.record import ModelRecord
from smoothquant_kernels.storage.digests import FileEntry, digest, file_entry
from smoothquant_kernels.storage.safetensors import TensorEntry

MANIFEST = "smoothquant.json"
#: What was done to each layer, in a folder of another format that this package wrote.
RECORD = "smoothquant_record.json"
#: A folder with one of these files is ours and may be overwritten.
MARKERS = (MANIFEST, RECORD)
FORMAT = "smoothquant-kernels"
FORMAT_VERSION = 1
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
#: Maps tensors to weight files. `from_pretrained` reads it if there are several weight files.
INDEX = "smoothquant.safetensors.index.json"


class ModelEntry(TypedDict):
    """The model's class. `rebuild` says whether transformers makes the same modules from config.json."""

    name: str
    module: str
    rebuild: bool
    attention: str


@dataclass(frozen=True)
class Manifest:
    """Everything in smoothquant.json except the format, its version and the digest.

    Attributes:
        model: the model's class.
        info: `model.smoothquant_info`.
        modules: name of each replaced module -> its class and constructor arguments.
        shared_modules: another name of such a module -> its name in `modules`.
        tensors: name in the state dict -> file, dtype and shape.
        tied: another name of a tensor -> its name in `tensors`.
        non_persistent: names in `tensors` that the state dict does not have.
        files: path relative to the folder -> size and digest, for all files except the manifest.
        package_version: the writer's version. It is for people, and nothing depends on it.
    """

    model: ModelEntry
    info: dict[str, Any]
    modules: dict[str, dict[str, Any]]
    shared_modules: dict[str, str]
    tensors: dict[str, TensorEntry]
    tied: dict[str, str]
    non_persistent: list[str]
    files: dict[str, FileEntry]
    package_version: str

    def to_json(self) -> str:
        """Returns JSON text with the format's name, its version and the digest of everything else.

        Raises:
            SmoothQuantError: `info` holds something that JSON cannot represent.
        """
        body = {"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        try:
            return json.dumps({**body, "digest": digest(body)}, indent=1, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise SmoothQuantError(
                f"model.smoothquant_info must hold plain finite JSON values to be saved: {error}."
            ) from None


def is_checkpoint(path: Path) -> bool:
    """Whether `save_quantized` wrote this folder, judged by its manifest."""
    return (path / MANIFEST).is_file()


def read_info(folder: Path) -> dict[str, Any]:
    """The `smoothquant_info` in a folder of any format that this package wrote.

    Raises:
        SmoothQuantError: the file that holds it is damaged.
    """
    if is_checkpoint(folder):
        return read_manifest(folder).info
    try:
        info: dict[str, Any] = json.loads((folder / RECORD).read_text("utf-8"))["info"]
        record = ModelRecord.from_dict(info)
        record.to_dict()  # fails for a verification that is none
        words = [word for a in record.layers for word in (a.name, a.reason)]
        words += [word for a in record.skipped for word in (a.name, a.reason)]
        if not all(isinstance(word, str) for word in words):
            raise ValueError("a name or a reason is not a string")
        return info
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SmoothQuantError(
            f"{folder / RECORD} cannot be read ({error!r:.200}): copy it again, or delete it, because only reports "
            "need it."
        ) from None


def read_config(folder: Path) -> tuple[str, dict[str, Any]]:
    """The text of config.json and its values; raises SmoothQuantError unless it holds a JSON object."""
    try:
        text = (folder / CONFIG).read_text("utf-8")
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("it is not a JSON object")
        return text, values
    except (OSError, ValueError, RecursionError) as error:
        raise SmoothQuantError(
            f"{folder / CONFIG} cannot be read ({error}): copy it again."
        ) from None


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a checkpoint folder. Every value has the right type, every path stays inside the folder.

    Raises:
        SmoothQuantError: there is no such folder, it is not a checkpoint, a newer release wrote it, or the manifest
            was altered.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise SmoothQuantError(
            f"there is no folder {folder}: give a folder that save_quantized wrote."
        )
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        described = _described(folder)
        if "weights" in described:
            raise SmoothQuantError(
                f"{folder} is incomplete, {MANIFEST} is missing: copy it again."
            ) from None
        if described:
            raise SmoothQuantError(
                f"{folder} was written by save_pretrained: load it by from_pretrained of transformers, after "
                "smoothquant_kernels.register_transformers()."
            ) from None
        raise SmoothQuantError(
            f"{folder} is not a checkpoint of this package, it has no {MANIFEST}: give a folder that "
            "save_quantized wrote."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SmoothQuantError(f"{path} cannot be read: {error}.") from None
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        raise _damaged(path, "it is not valid JSON") from None
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise SmoothQuantError(
            f'{path} was not written by this package: its "format" is not "{FORMAT}".'
        )
    # The version comes before the digest, because a later format may compute the digest in another way.
    version = body.pop("format_version", None)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise _damaged(path, f"its format_version is {version!r}")
    if version > FORMAT_VERSION:
        raise SmoothQuantError(
            f"{folder} is in format {version} and this release reads up to {FORMAT_VERSION}: "
            "upgrade with `pip install --upgrade smoothquant-kernels`."
        )
    expected = body.pop("digest", None)
    try:
        actual = digest({**body, "format_version": version})
    except (ValueError, RecursionError):
        raise _damaged(path, "it holds NaN or is nested too deep") from None
    if expected != actual:
        raise _damaged(path, "its digest does not match its content")
    del body["format"]
    return _parse(body, lambda what: _damaged(path, what))


def has_int8_config(folder: Path) -> bool:
    """Whether config.json says that this package quantized the model, even if no manifest lies beside it."""
    return bool(_described(folder))


def _described(folder: Path) -> Mapping[str, Any]:
    """What config.json says of int8 layers, with `weights` if `save_quantized` wrote it. Empty if it says nothing."""
    try:
        described = read_config(folder)[1].get("quantization_config")
    except SmoothQuantError:
        return {}
    return described if isinstance(described, dict) and "modules" in described else {}


def check_files(folder: Path, manifest: Manifest, *, verify: bool) -> None:
    """Checks that the files exist and, with `verify`, that they are byte for byte what was saved.

    Raises:
        SmoothQuantError: a file is missing or differs. The message names the first one.
    """
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise SmoothQuantError(f"{folder} is incomplete, {name} is missing: copy it again.")
        if not verify:
            continue
        size = path.stat().st_size
        if size != entry["size"]:
            raise SmoothQuantError(
                f"{path} has {size} bytes and was saved with {entry['size']}: copy it again."
            )
        if file_entry(path)["sha256"] != entry["sha256"]:
            raise SmoothQuantError(
                f"{path} is not what was saved (its SHA-256 differs): copy it again, or pass verify=False if you "
                "changed it on purpose."
            )


def _damaged(path: Path, what: str) -> SmoothQuantError:
    return SmoothQuantError(f"{path} is damaged or was altered ({what}): copy it again.")


def _parse(body: dict[str, Any], fail: Callable[[str], SmoothQuantError]) -> Manifest:
    """Makes the dataclass from parsed JSON. A digest does not prove the origin, so every value is checked."""
    _check_record(body, Manifest, "the manifest", fail)
    _check_record(body["model"], ModelEntry, "model", fail)
    for field, entry in (("files", FileEntry), ("tensors", TensorEntry)):
        for name, value in body[field].items():
            _check_record(value, entry, name, fail)
    check_modules(body["modules"], body["shared_modules"], fail)
    if not all(type(name) is str for name in [*body["tied"].values(), *body["non_persistent"]]):
        raise fail("a name is not a string")
    manifest = Manifest(**body)
    for name in manifest.files:
        path = PurePosixPath(name)
        if path.is_absolute() or not path.parts or ".." in path.parts or "\\" in name:
            raise fail(f"the path {name!r} leaves the folder")
    for name, tensor in manifest.tensors.items():
        if tensor["file"] not in manifest.files:
            raise fail(f"the file of {name} is not listed")
        if not all(type(size) is int and size >= 0 for size in tensor["shape"]):
            raise fail(f"the shape of {name} is wrong")
    _check_aliases(manifest.tied, set(manifest.tensors), fail)
    if not set(manifest.non_persistent) <= set(manifest.tensors):
        raise fail("non_persistent names no tensor")
    return manifest


def check_modules(modules: Any, shared: Any, fail: Callable[[str], SmoothQuantError]) -> None:
    """Raises unless these are dicts of the form that `skeleton.describe_modules` returns."""
    if type(modules) is not dict or not all(
        type(arguments) is dict for arguments in modules.values()
    ):
        raise fail("the arguments of a module are not an object")
    if type(shared) is not dict or not all(type(name) is str for name in shared.values()):
        raise fail("a name is not a string")
    _check_aliases(shared, set(modules), fail)


def _check_aliases(
    aliases: dict[str, str], targets: set[str], fail: Callable[[str], SmoothQuantError]
) -> None:
    for alias, target in aliases.items():
        if target not in targets or alias in targets:
            raise fail(f"{alias} refers to nothing")


def _check_record(
    value: object, record: type, where: str, fail: Callable[[str], SmoothQuantError]
) -> None:
    """Raises unless an object has exactly the fields of a dataclass or TypedDict, each of the right type."""
    hints = get_type_hints(record)
    if not isinstance(value, dict) or value.keys() != hints.keys():
        raise fail(f"the entries of {where} are not the expected ones")
    for key, hint in hints.items():
        kind = dict if hint is ModelEntry else get_origin(hint) or hint
        if type(value[key]) is not kind:  # isinstance would accept True as a size
            raise fail(f"{key} of {where} is of the wrong type")
