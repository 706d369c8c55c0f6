"""Writing a streamed model: the tensors of each part as it is finished, and in the end the folder in its format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from smoothquant_kernels.checkpoint import skeleton as skeletons
from smoothquant_kernels.checkpoint.compressed_tensors import export as exports
from smoothquant_kernels.checkpoint.compressed_tensors.published import as_published
from smoothquant_kernels.checkpoint.manifest import MANIFEST
from smoothquant_kernels.checkpoint.save import (
    NATIVE,
    config_texts,
    constructed_again,
    make_manifest,
    non_persistent_buffers,
    write_other_files,
)
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.storage.safetensors import (
    OWN_STEM,
    TensorEntry,
    tensor_entries,
    unique,
    write_safetensors,
)
from smoothquant_kernels.streaming.source import IN_MEMORY
from smoothquant_kernels.streaming.work import WorkFolder


class Part(NamedTuple):
    """The tensors of a part of the model to write, and what the folder says about them (`Manifest`)."""

    tensors: dict[str, Tensor]
    tied: dict[str, str]
    modules: dict[str, dict[str, Any]]
    shared: dict[str, str]


class Writer:
    """Writes the parts of one model into a work folder."""

    def __init__(self, model: Any, work: WorkFolder, format: str, max_shard_bytes: int) -> None:
        self.model, self.work, self.max_shard_bytes = model, work, max_shard_bytes
        self.native = format == NATIVE

    def part(self, part: nn.Module) -> Part:
        """The tensors of a quantized part, whose modules have their full names, as the format names them."""
        modules, shared = skeletons.describe_modules(part)
        state = skeletons.layer_state(part)
        skeletons.check_scales(state, modules)
        if self.native:
            tensors, tied = unique(state)
        else:
            tensors, tied = unique(exports.export_state(part))
            tensors = as_published(self.model, tensors)
        return Part(tensors, tied, modules, shared)

    def write(self, index: int, view: nn.Module) -> dict[str, Any]:
        """Writes a finished block. Returns its record's entries, as JSON values."""
        part = self.part(view)
        entry = write_safetensors(self.work.part(index), part.tensors)
        return {**part._asdict(), "tensors": tensor_entries(part.tensors), "size": entry["size"]}

    def finish(
        self,
        records: Sequence[Mapping[str, Any]],
        rest: Part,
        blocks: Sequence[str],
        order: Sequence[str],
        tokenizer: Any,
    ) -> None:
        """Writes the rest's shard, the weight files, the configuration and the manifest, as `save_quantized` does.

        Args:
            records: what `write` returned for each block.
            rest: the part of the model outside the blocks.
            blocks: the names of the blocks, which the model has again, in float and without data.
            order: the names of the model's modules.
            tokenizer: its files are written too, unless it is None.
        """
        model = self.model
        modules, shared, tied = dict(rest.modules), dict(rest.shared), dict(rest.tied)
        for record in records:
            modules |= record["modules"]
            shared |= record["shared"]
            tied |= record["tied"]
        made = skeletons.make_modules(modules, shared)
        inside = tuple(f"{name}." for name in blocks)
        skeletons.install(model, {n: m for n, m in made.items() if n.startswith(inside)})
        texts = config_texts(model)
        again = constructed_again(model, texts)
        names = list(skeletons.layer_state(model))
        last, buffers, scheme = dict(rest.tensors), dict[str, Tensor](), dict[str, Any]()
        if self.native:
            buffers = non_persistent_buffers(model, again, set(names))
            last |= buffers
        else:
            scheme = exports.quantization_config(model, again)
            if again is not None and (own := exports.own_ties(tied, again)):
                name = min(own)
                raise SmoothQuantError(f"{name} shares its tensor with {own[name]}: {IN_MEMORY}.")
        entry = write_safetensors(self.work.part(len(records)), last)
        sizes = [*(record["size"] for record in records), entry["size"]]
        stem = OWN_STEM if self.native else exports.STEM
        shards, files = self.work.join_parts(sizes, self.max_shard_bytes, stem)
        entries: dict[str, TensorEntry] = {}
        parts = [*(record["tensors"] for record in records), tensor_entries(last)]
        for shard, tensors in zip(shards, parts, strict=True):
            entries |= {name: {**entry, "file": shard} for name, entry in tensors.items()}
        folder = self.work.checkpoint
        if not self.native:
            files_of = {name: entry["file"] for name, entry in entries.items()}
            exports.write_description(folder, model, scheme, texts, files_of, tokenizer)
            return
        manifest = make_manifest(
            model,
            again,
            modules={n: modules[n] for n in order if n in modules},
            shared=shared,
            tensors={n: entries[n] for n in [*names, *buffers] if n in entries},
            tied=tied,
            non_persistent=list(buffers),
        )
        manifest.files.update(files)
        write_other_files(folder, manifest, texts, tokenizer)
        (folder / MANIFEST).write_text(manifest.to_json(), "utf-8")
