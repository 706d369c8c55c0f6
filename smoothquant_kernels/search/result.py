"""The result of a search, and the JSON file that stores it and lets an interrupted search resume."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from smoothquant_kernels.config import SmoothQuantConfig
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.modeling.run import Batch
from smoothquant_kernels.storage.digests import tensors_digest
from smoothquant_kernels.storage.folder import replace_file

FORMAT = "smoothquant_kernels.search"
FORMAT_VERSION = 2


@dataclass(frozen=True)
class Choice:
    """One candidate for a group, and its cost.

    Attributes:
        scheme: activation scheme.
        alpha: migration strength; None without smoothing.
        clip: part of the calibrated range that a static scale covers.
        rotation: the size of the groups of channels that are rotated; 0 for none.
        cost: estimated KL divergence at the model's output, in nats per prediction, if only this group is quantized.
    """

    scheme: str
    alpha: float | None
    clip: float
    rotation: int
    cost: float


@dataclass(frozen=True)
class GroupResult:
    """All tried candidates for the linears that read one tensor."""

    linears: tuple[str, ...]
    tried: tuple[Choice, ...]

    @property
    def rotation(self) -> int:
        """The rotation that the searched configuration gives the group. The candidates with it come first."""
        return self.tried[0].rotation

    def best(self, scheme: str) -> Choice:
        """Returns the cheapest candidate of a scheme; the first of equals, so the result is deterministic."""
        return min((c for c in self.tried if c.scheme == scheme), key=lambda c: c.cost)

    def at(self, scheme: str, alpha: float | None) -> Choice | None:
        """Returns the candidate with the group's rotation and no clipping, or None if it was not tried."""
        wanted = (scheme, alpha, 1.0, self.rotation)
        return next(
            (c for c in self.tried if (c.scheme, c.alpha, c.clip, c.rotation) == wanted), None
        )


@dataclass(frozen=True)
class Validation:
    """The whole quantized model, measured on tokens that neither set the ranges nor decided between candidates.

    Attributes:
        tokens: the number of compared predictions.
        fixed_kl, searched_kl: mean KL divergence from the float model, in nats.
        difference, stderr: mean and standard error of searched minus fixed, paired; no error for fewer than four.
    """

    tokens: int
    fixed_kl: float
    searched_kl: float
    difference: float
    stderr: float | None

    @property
    def worse(self) -> bool:
        """Whether the searched settings are worse by more than the standard error."""
        bound = self.stderr if self.stderr is not None else 0.0
        return not self.difference <= bound


@dataclass(frozen=True)
class SearchResult:
    """The result of `search_config`.

    Attributes:
        config: for `smooth_lm` or `smooth_and_quantize`.
        kept: ``"searched"``, or ``"fixed"`` if the validation favored the fixed settings.
        fixed_alpha: the single alpha of least cost, which the search was compared with; None if the alpha or the
            defaults of the given configuration did better.
        fixed_cost, searched_cost: sums of the groups' costs, with the best single alpha or the defaults, and with the
            searched settings.
        groups: every tried candidate, group by group.
        validation: None if there was no data for it.
    """

    config: SmoothQuantConfig
    kept: str
    fixed_alpha: float | None
    fixed_cost: float
    searched_cost: float
    groups: tuple[GroupResult, ...]
    validation: Validation | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values that JSON can store."""
        return {**dataclasses.asdict(self), "config": self.config.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SearchResult:
        """Rebuilds the result from `to_dict`."""
        validation = values["validation"]
        return cls(
            **{
                **values,
                "config": SmoothQuantConfig.from_dict(values["config"]),
                "groups": tuple(_group(g) for g in values["groups"]),
                "validation": None if validation is None else Validation(**validation),
            }
        )

    @classmethod
    def load(cls, path: str | Path) -> SearchResult:
        """Reads the file of a finished search.

        Raises:
            SmoothQuantError: the file cannot be read, is not a search file, or holds an unfinished search.
        """
        content = _read(Path(path).expanduser())
        if content["result"] is None:
            raise SmoothQuantError(
                f"the search in {path} was interrupted: run it again with this path, it goes on from there."
            )
        return cls.from_dict(content["result"])


def _group(values: dict[str, Any]) -> GroupResult:
    return GroupResult(tuple(values["linears"]), tuple(Choice(**c) for c in values["tried"]))


def _read(path: Path) -> dict[str, Any]:
    """Returns the file's content after a check that its groups and result can be parsed."""
    try:
        content: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if content["format"] != FORMAT or content["version"] != FORMAT_VERSION:
            raise ValueError(f"it is {content['format']!r} {content['version']!r}")
        for values in content["groups"]:
            _group(values)
        if content["result"] is not None:
            SearchResult.from_dict(content["result"])
        if not isinstance(content["digest"], str):
            raise ValueError("its digest is no text")
    except OSError as error:
        raise SmoothQuantError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SmoothQuantError(
            f"{path} is not the file of a search of this release ({type(error).__name__}: {error}); "
            "delete it or give another name."
        ) from None
    return content


@dataclass
class SearchFile:
    """The finished groups, stored in a file if there is a path."""

    path: Path | None
    digest: str
    groups: dict[tuple[str, ...], GroupResult] = field(default_factory=dict)
    result: SearchResult | None = None

    @classmethod
    def open(cls, path: str | Path | None, digest: str) -> SearchFile:
        """Reads the progress of an earlier run of the same search, if there is any.

        Raises:
            SmoothQuantError: the file is not a search file, belongs to another model, other data or other settings, or
                cannot be written.
        """
        file = cls(None if path is None else Path(path).expanduser(), digest)
        if file.path is not None and os.path.lexists(file.path):
            content = _read(file.path)
            if content["digest"] != digest:
                raise SmoothQuantError(
                    f"{path} holds the search of another model, other data or settings; "
                    "delete it or give another name."
                )
            file.groups = {g.linears: g for g in map(_group, content["groups"])}
            if content["result"] is not None:
                file.result = SearchResult.from_dict(content["result"])
        file.save()  # fails now, not after minutes, if the path cannot be written
        return file

    def add(self, group: GroupResult) -> None:
        self.groups[group.linears] = group
        self.save()

    def finish(self, result: SearchResult) -> SearchResult:
        self.result = result
        self.save()
        return result

    def save(self) -> None:
        """Writes the file, whole or not at all."""
        if self.path is None:
            return
        content = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "digest": self.digest,
            "groups": [dataclasses.asdict(g) for g in self.groups.values()],
            "result": None if self.result is None else self.result.to_dict(),
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replace_file(self.path) as part:
                part.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        except OSError as error:
            raise SmoothQuantError(
                f"{self.path} cannot be written: {error.strerror}; give another place."
            ) from error


def fingerprint(model: nn.Module, batches: Sequence[Batch], settings: Any) -> str:
    """Returns a digest that identifies a search: all of the model's values, the data and the settings."""
    tensors = [item for part in (model.state_dict(), *batches) for item in part.items()]
    labeled = ((f"{name} {tuple(t.shape)} {t.dtype}", t) for name, t in tensors)
    return tensors_digest(labeled, json.dumps(settings, sort_keys=True))
