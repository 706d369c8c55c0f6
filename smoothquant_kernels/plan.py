"""A plan: the format and the settings of each layer, as one JSON object.

    {
      "model.layers.0.*": {"format": "float"},
      "*.down_proj": {"format": "w8a8", "scheme": "per_token", "outliers": "static"},
      "*": {"format": "w4a8", "rotation": 128}
    }

A layer takes each setting from the entry of its own name, else from the first pattern that matches it and has the
setting, else from the configuration.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from smoothquant_kernels.config import SmoothQuantConfig
from smoothquant_kernels.errors import SmoothQuantError

#: The settings of an entry, and the fields of the configuration that hold them.
SETTINGS = {
    "format": "formats",
    "scheme": "schemes",
    "rotation": "rotations",
    "alpha": "alphas",
    "clip": "clips",
    "outliers": "outlier_layers",
}


def apply_plan(
    config: SmoothQuantConfig, plan: Mapping[str, Mapping[str, Any]]
) -> SmoothQuantConfig:
    """Gives layers the settings of a plan.

    Args:
        config: all other settings. Its own entries for layers count after those of the plan.
        plan: layer -> settings, any of ``format`` (``"w8a8"``, ``"w4a8"`` or ``"float"``), ``scheme``, ``rotation``,
            ``alpha``, ``clip`` and ``outliers``, with the values of the configuration's fields. A layer is given by its
            full name or by a shell-style pattern. Layers that read one tensor must agree on rotation and alpha.

    Returns:
        The configuration for `smooth_and_quantize`, `smooth_lm` and all others.

    Raises:
        SmoothQuantError: the plan has another form, or an unknown setting or value. A layer or pattern that matches
            nothing is refused when the configuration meets a model.

    Equivalent to:
        config.replace(formats={layer: entry["format"] for layer, entry in plan.items()}, ...)
    """
    if not isinstance(plan, Mapping):
        raise SmoothQuantError(f"a plan must map layers to settings; got {type(plan).__name__}.")
    maps: dict[str, dict[str, Any]] = {field: {} for field in SETTINGS.values()}
    for layer, entry in plan.items():
        if not isinstance(layer, str) or not isinstance(entry, Mapping):
            raise SmoothQuantError(
                f"a plan must map names or patterns of layers to objects of settings; got {layer!r}: {entry!r}."
            )
        for setting, value in entry.items():
            if setting not in SETTINGS:
                raise SmoothQuantError(
                    f"the plan gives {layer!r} an unknown setting {setting!r}; known are {', '.join(SETTINGS)}."
                )
            maps[SETTINGS[setting]][layer] = value
    # A name or pattern of both counts once, with the plan's value and in the plan's place.
    merged = {
        field: {**own, **_without(getattr(config, field), own)} for field, own in maps.items()
    }
    return config.replace(**merged)


def _without(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def read_plan(path: str | Path) -> dict[str, dict[str, Any]]:
    """Reads the JSON file of a plan.

    Raises:
        SmoothQuantError: the file cannot be read, or is not the JSON object of a plan.
    """
    path = Path(path).expanduser()
    try:
        plan = json.loads(path.read_text("utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        raise SmoothQuantError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:  # json's and Unicode's errors are ValueErrors
        raise SmoothQuantError(f"{path} is not the JSON of a plan: {error}.") from None
    try:
        apply_plan(SmoothQuantConfig(), plan)
    except SmoothQuantError as error:
        raise SmoothQuantError(f"{path}: {error}") from None
    return plan  # type: ignore[no-any-return]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuses a layer that stands twice, which Python's JSON reader would keep silent about."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands there twice")
    return values
