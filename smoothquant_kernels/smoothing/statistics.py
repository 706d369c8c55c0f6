"""The statistics that calibration measures: collecting, merging across processes, saving and loading."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from smoothquant_kernels.config import SmoothQuantConfig
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.modeling.run import Batch, unpadded_rows
from smoothquant_kernels.smoothing.rows import Rows
from smoothquant_kernels.storage.folder import replace_file
from smoothquant_kernels.storage.safetensors import check_storable, write_safetensors

PEAK_TOKENS = 4096  # sizes kept per layer; enough for a median
_FORMAT = "smoothquant-kernels statistics"
_FORMAT_VERSION = 3


def shortage(tokens: int, asked: int) -> str | None:
    """Returns one sentence if the data ended before half of the requested tokens, else None."""
    if 2 * tokens >= asked:
        return None
    return (
        f"the calibration data ended after {tokens} of the {asked} tokens asked for (calibration_tokens): with so few, "
        "outliers may be missed; give more data."
    )


def warn_if_short(tokens: int, asked: int, *, stacklevel: int = 3) -> None:
    """Warns of a `shortage`. By default the warning points to the line that called the caller."""
    if (short := shortage(tokens, asked)) is not None:
        warnings.warn(short, stacklevel=stacklevel)


@dataclass
class ActivationStatistics:
    """Running statistics of the inputs of linear layers.

    Attributes:
        absmax: module name -> [K] float32 largest |x| per channel over all tokens except padding.
        square_sums: module name -> [K] float64 sum of the squares of each channel.
        counts: module name -> the number of those tokens.
        moments: module name -> [K, K] float32, X^T X over those tokens X, of the layers that `config` rounds by GPTQ.
        token_absmax: module name -> float32 largest |x| of each of the first few thousand tokens.
        rows: module name -> some tokens, from which the range of rotated inputs comes, for any factors and rotation.
        tokens: the number of tokens seen, without padding. A batch without text counts the positions that the model
            derives from it (image patches, sound frames): the most rows that one of the layers reads.
        sample: a small batch of the data, used to find the model's structure and to verify folds.
        watched: names of all measured layers, including those that no token reached (unused experts).
        asked: the calibration's `calibration_tokens`; 0 if unknown (statistics from a file).
        config: the configuration whose rotations decide which `rows` are kept, and whose formats and rounding decide
            which `moments`. `of_heads` makes it for a model with quantized output heads.
    """

    absmax: dict[str, Tensor] = field(default_factory=dict)
    square_sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)
    token_absmax: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Rows] = field(default_factory=dict)
    tokens: int = 0
    sample: Batch = field(default_factory=dict)
    watched: tuple[str, ...] = ()
    asked: int = 0
    config: SmoothQuantConfig = field(default_factory=SmoothQuantConfig)

    def update(self, name: str, x: Tensor, keep: Tensor | None, *, moments: bool = True) -> int:
        """Merges the input x [..., K] of one call and returns the number of merged rows.

        Args:
            keep: [rows] bool, False at padding, which is left out. None keeps all rows.
            moments: whether the layer can be rounded by GPTQ, which needs `moments`.
        """
        rows = unpadded_rows(x.detach(), keep)
        if not len(rows):
            return 0
        magnitude = rows.abs()
        absmax = self._add_channels(name, rows, magnitude)
        if moments and self.config.rounding_of(name) == "gptq":
            with torch.autocast(rows.device.type, enabled=False):
                whole = rows.float()
                products = whole.t() @ whole
            old = self.moments.get(name)
            self.moments[name] = products if old is None else old.add_(products)  # large: in place
        seen = self.token_absmax.get(name, absmax.new_empty(0))
        tokens = magnitude[: PEAK_TOKENS - len(seen)].amax(1).float()
        self.token_absmax[name] = torch.cat([seen, tokens])
        kept = self.rows.get(name, Rows.none(rows))
        self.rows[name] = kept.with_more(rows, self.absmax[name], self.rotation(name))
        return len(rows)

    def update_channels(self, name: str, rows: Tensor) -> None:
        """Merges rows [M, K] whose channels alone matter: no token of them is kept."""
        absmax = self._add_channels(name, rows, rows.abs())
        self.token_absmax.setdefault(name, absmax.new_empty(0))

    def _add_channels(self, name: str, rows: Tensor, magnitude: Tensor) -> Tensor:
        absmax = magnitude.amax(0).float()  # exact, because a maximum does not round
        old = self.absmax.get(name)
        self.absmax[name] = absmax if old is None else torch.maximum(old, absmax)
        squares = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float64).square()
        add_to(self.square_sums, name, squares)
        self.counts[name] = self.counts.get(name, 0) + len(rows)
        return absmax

    def kept(self, name: str) -> Tensor:
        """[rows, K]: the tokens that are kept of a layer's input.

        Raises:
            SmoothQuantError: statistics of an earlier release have no rows.
        """
        return self._kept(name).both()

    def norms(self, name: str, norm: str) -> Tensor:
        """The largest |x| (``"max"``) or the root mean square (``"rms"``) of each channel, [K] float32.

        Raises:
            SmoothQuantError: statistics of an earlier release have no squares.
        """
        if norm == "max":
            return self.absmax[name]
        if name not in self.square_sums:
            raise SmoothQuantError(
                f"the statistics have no squares of {name}, from which root mean squares come: calibrate again, or "
                "pass activation_norm='max' and rotation='none'."
            )
        return (self.square_sums[name] / self.counts[name]).sqrt().float()

    def range_of(self, name: str, smooth: Tensor | None = None, rotation: int = 0) -> float:
        """The largest |value| of a layer's input, smoothed and rotated. That of rotated values is among `rows`.

        Raises:
            SmoothQuantError: statistics of an earlier release have no rows.
        """
        if not rotation:
            absmax = self.absmax[name]
            return float((absmax if smooth is None else absmax / smooth).max())
        return float(self._kept(name).maxima(smooth, rotation).max())

    def peak(self, name: str, smooth: Tensor | None = None, rotation: int = 0) -> float:
        """The largest token of a layer's input over the median one, by their largest elements; 1 if all are zero.

        Of a rotated input, smoothed before. Without a rotation, the factors do not matter.
        """
        if not rotation:
            tokens, largest = self.token_absmax[name], self.absmax[name].max()
        else:
            tokens = self._kept(name).first_maxima(smooth, rotation)
            largest = tokens.new_tensor(self.range_of(name, smooth, rotation))
        median = tokens[tokens > 0].median() if bool((tokens > 0).any()) else tokens.new_ones(())
        return max(1.0, float(largest / median))

    def rotation(self, name: str) -> int:
        """The rotation of a layer; where there is none, that of the default, in case it is asked for later."""
        k = self.absmax[name].numel()
        return self.config.rotation_of(k, name) or SmoothQuantConfig().rotation_of(k)

    def _kept(self, name: str) -> Rows:
        if name not in self.rows:
            raise SmoothQuantError(
                f"the statistics have no rows of {name}, from which the range of rotated inputs comes: calibrate "
                "again, or pass rotation='none'."
            )
        return self.rows[name]

    def check_not_empty(self) -> None:
        """Raises SmoothQuantError if no input was seen."""
        if not self.absmax:
            raise SmoothQuantError(
                "the calibration data is empty: give at least one batch or string with tokens."
            )

    def shortage(self) -> str | None:
        """Returns one sentence if the data ended before half of the requested tokens, else None."""
        return shortage(self.tokens, self.asked)

    def check_finite(self) -> None:
        """Raises SmoothQuantError naming the first layer (in calling order) that saw NaN or Inf."""
        for name, absmax in self.absmax.items():
            bad = int((~absmax.isfinite()).sum())
            if bad:
                raise SmoothQuantError(
                    f"calibration found NaN or Inf in the input of layer {name} ({bad} of {absmax.numel()} channels); "
                    "check the checkpoint, or calibrate in a wider dtype (bfloat16 or float32)."
                )
        for name, moments in self.moments.items():
            if not bool(moments.isfinite().all()):
                raise SmoothQuantError(
                    f"the inputs of layer {name} are so large that their products overflow float32, and GPTQ needs "
                    "them: choose the weight rounding nearest."
                )

    def merge(self, other: ActivationStatistics) -> None:
        """Adds what `other` measured on more data, as if this object had seen that data after its own.

        Args:
            other: statistics of the same model; left unchanged.

        Raises:
            SmoothQuantError: the two measured different layers, or a layer's numbers of channels differ. Nothing
                changes then.

        Equivalent to:
            absmax = torch.maximum(absmax, other.absmax) for each layer; tokens += other.tokens
            square_sums += other.square_sums; moments += other.moments; counts += other.counts
        """
        from smoothquant_kernels.smoothing.ranks import check_alike, summary_of

        check_alike([summary_of(self), summary_of(other)], "statistics")
        for name, new in other.absmax.items():
            old = self.absmax.get(name)
            self.absmax[name] = new.clone() if old is None else old.maximum(new.to(old.device))
            if name in other.square_sums:
                add_to(self.square_sums, name, other.square_sums[name])
                self.counts[name] = self.counts.get(name, 0) + other.counts[name]
            if name in other.moments:
                add_to(self.moments, name, other.moments[name])
            seen = self.token_absmax.get(name, self.absmax[name].new_empty(0))
            more = other.token_absmax[name][: PEAK_TOKENS - len(seen)].to(seen.device)
            self.token_absmax[name] = torch.cat([seen, more])
            both = [s.rows[name] for s in (self, other) if name in s.rows]
            if both:
                self.rows[name] = Rows.merged(both, self.absmax[name], self.rotation(name))
        self.tokens += other.tokens
        self.asked += other.asked
        self.sample = self.sample or other.sample
        self.watched = self.watched or other.watched

    def all_reduce(self, group: Any = None) -> None:
        """Merges the statistics of all ranks of a process group in place. Each rank has seen a part of the data.

        Every rank of the group must call it. Afterwards all ranks hold the same bits: those of one process that saw
        the data of rank 0, then that of rank 1, and so on, except that `square_sums` and `moments` are added
        rank by rank. `sample` comes from the first rank that has one. `rows` are chosen from those that the ranks have
        kept.

        Args:
            group: a torch.distributed process group; None is the default one.

        Raises:
            SmoothQuantError: torch.distributed is not initialized; or the ranks measured different layers or numbers
                of channels, which every rank reports. Nothing changes then.

        Equivalent to:
            torch.distributed.all_reduce(absmax[name], torch.distributed.ReduceOp.MAX, group) for each layer
        """
        from smoothquant_kernels.smoothing.ranks import all_reduce

        all_reduce(self, group)

    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file, whole or not at all, so calibration can run once, or on another machine.

        Args:
            path: the file. An existing one is replaced once the new one is complete.

        Returns:
            The path.

        Raises:
            SmoothQuantError: there is nothing to save, or the file cannot be written.
        """
        self.check_not_empty()
        target = Path(path).expanduser()
        tensors = {f"absmax/{n}": t for n, t in self.absmax.items()}
        tensors |= {f"square_sums/{n}": t for n, t in self.square_sums.items()}
        tensors |= {f"moments/{n}": t for n, t in self.moments.items()}
        tensors |= {f"token_absmax/{n}": t for n, t in self.token_absmax.items()}
        tensors |= {f"rows/{n}": rows.both() for n, rows in self.rows.items()}
        tensors |= {f"sample/{n}": check_storable(n, t) for n, t in self.sample.items()}
        facts = {
            "format": _FORMAT,
            "format_version": _FORMAT_VERSION,
            "tokens": self.tokens,
            "layers": list(self.absmax),
            "counts": self.counts,
            "moments": list(self.moments),
            "rows": {n: len(rows.first) for n, rows in self.rows.items()},
            "sample": list(self.sample),
            "watched": list(self.watched),
        }
        try:
            with replace_file(target) as part:
                write_safetensors(part, tensors, {"statistics": json.dumps(facts)})
        except OSError as error:
            raise SmoothQuantError(
                f"{target} cannot be written ({error.strerror or error}), nothing was saved: save elsewhere."
            ) from error
        return target

    @classmethod
    def load(cls, path: str | Path) -> ActivationStatistics:
        """Reads a file that `save` wrote. The tensors are on the CPU.

        Raises:
            SmoothQuantError: the file does not exist, does not hold statistics, is damaged, or is from a newer release.
        """
        source = Path(path).expanduser()
        try:
            with safe_open(source, framework="pt", device="cpu") as data:
                facts = json.loads((data.metadata() or {})["statistics"])
                _check_facts(source, facts)
                result = cls(tokens=facts["tokens"], watched=tuple(facts["watched"]))
                for name in facts["layers"]:
                    result.absmax[name] = data.get_tensor(f"absmax/{name}").clone()
                    result.token_absmax[name] = data.get_tensor(f"token_absmax/{name}").clone()
                for name, count in facts.get("counts", {}).items():  # absent from version 2
                    if type(count) is not int or count < 1:
                        raise ValueError("its number of tokens is not a whole number")
                    result.counts[name] = count
                    result.square_sums[name] = data.get_tensor(f"square_sums/{name}").clone()
                for name in facts.get("moments", []):
                    result.moments[name] = data.get_tensor(f"moments/{name}").clone()
                for name, first in facts.get("rows", {}).items():  # absent from version 1
                    result.rows[name] = Rows.of(data.get_tensor(f"rows/{name}").clone(), first)
                result.sample = {n: data.get_tensor(f"sample/{n}").clone() for n in facts["sample"]}
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise SmoothQuantError(
                f"{source} does not hold statistics that ActivationStatistics.save wrote ({reason[:200]}): give "
                "another file, or calibrate again."
            ) from None
        vectors = [*result.absmax.values(), *result.token_absmax.values()]
        fitting = all(r.fits(len(result.absmax.get(n, ()))) for n, r in result.rows.items())
        sums = ((result.square_sums, torch.float64, 1), (result.moments, torch.float32, 2))
        for tensors, dtype, dims in sums:
            for name, found in tensors.items():
                shape = (len(result.absmax.get(name, ())),) * dims
                fitting &= found.shape == shape and found.dtype == dtype and bool(shape[0])
                fitting &= bool(found.isfinite().all())
        if not fitting or not all(t.dtype == torch.float32 and t.dim() == 1 for t in vectors):
            raise SmoothQuantError(
                f"{source} is damaged (its ranges must be float32 vectors, its sums float64): calibrate again."
            )
        return result


def _check_facts(source: Path, facts: Any) -> None:
    if not isinstance(facts, dict) or facts.get("format") != _FORMAT:
        raise ValueError("its metadata is of another kind")
    version = facts["format_version"]
    if type(version) is not int or version > _FORMAT_VERSION:
        raise SmoothQuantError(
            f"{source} is in format {version} and this release reads up to {_FORMAT_VERSION}: "
            "upgrade with `pip install --upgrade smoothquant-kernels`."
        )
    if type(facts["tokens"]) is not int:
        raise ValueError("its number of tokens is not a whole number")


def of_heads(config: SmoothQuantConfig, heads: Iterable[str]) -> SmoothQuantConfig:
    """The configuration for the statistics of a model with these quantized output heads, which have own settings."""
    for name in heads:
        config = config.for_head(name)
    return config


def add_to(sums: dict[str, Tensor], name: str, more: Tensor) -> None:
    """Adds to a layer's sum, or starts it with a copy."""
    sums[name] = sums[name] + more.to(sums[name].device) if name in sums else more.clone()
