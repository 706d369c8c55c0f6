"""SQK_TUNE_CACHE: a file of measured choices, written by the tuner, is used or causes one warning.

The tests describe GPUs and need none. test_gemm_measured.py tests how the library uses the choices.
"""

from __future__ import annotations

import ctypes
import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.tuner import choices
from smoothquant_kernels.backends import tuned_tiles
from tests.csrc.test_gemm_measured import taken
from tests.support import c_gemm, described

NAME = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def library(tmp_path: Path) -> ctypes.CDLL:
    """Its own copy of the library, without measured choices."""
    return c_gemm.declare_plans(described.copied(tmp_path))


# --- the file ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(name, SMs) of the GPUs that torch sees. CUDA starts at once; everything is restored afterwards."""
    here = [(NAME, 132)]
    monkeypatch.setattr(tuned_tiles, "_current", tuned_tiles.tune_cache())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(here))
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda i: SimpleNamespace(name=here[i][0], multi_processor_count=here[i][1]),
    )
    monkeypatch.setattr(torch.cuda, "_lazy_call", lambda function: function())
    return here


def contents(**changes: Any) -> dict[str, Any]:
    choice = {"n": 4096, "k": 4096, "m": 64, "tile": "128x128x128 stream-K", "splits": 1}
    whole = {"format": 1, "gpu": NAME, "sms": 132, "table": "sm90", "choices": [choice]}
    return whole | changes


def load(monkeypatch: pytest.MonkeyPatch, library: ctypes.CDLL, file: Path, data: Any) -> list[str]:
    """The warnings when a library is loaded while SQK_TUNE_CACHE names the file."""
    file.write_text(data if isinstance(data, str) else json.dumps(data))
    monkeypatch.setenv(tuned_tiles.VARIABLE, str(file))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tuned_tiles.load(lambda: described.library(library))
    return [str(warning.message) for warning in caught]


@pytest.mark.compiler
def test_a_file_is_used(
    library: ctypes.CDLL,
    gpus: list[tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    gpus.insert(0, ("NVIDIA RTX A2000", 26))  # the first GPU is another one
    assert taken(library, 64, 4096, 4096) != ("128x128x128 stream-K", 1)
    file = tmp_path / "tiles.json"
    assert load(monkeypatch, library, file, contents()) == []
    assert taken(library, 64, 4096, 4096) == ("128x128x128 stream-K", 1)
    state = tuned_tiles.tune_cache()
    assert (state.in_use, state.path, state.gpu, state.choices) == (True, str(file), NAME, 1)
    assert state.state == f"{file}: 1 measured choices of {NAME} come before the rules"


@pytest.mark.compiler
def test_the_gpus_are_not_queried_before_cuda_starts(
    library: ctypes.CDLL,
    gpus: list[tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    later: list[Any] = []
    monkeypatch.setattr(torch.cuda, "_lazy_call", later.append)
    rule = taken(library, 64, 4096, 4096)
    assert load(monkeypatch, library, tmp_path / "tiles.json", contents()) == []
    assert (
        not tuned_tiles.tune_cache().in_use and "waits until CUDA" in tuned_tiles.tune_cache().state
    )
    assert taken(library, 64, 4096, 4096) == rule
    (start,) = later
    start()
    assert tuned_tiles.tune_cache().in_use and taken(library, 64, 4096, 4096) == (
        "128x128x128 stream-K",
        1,
    )


def test_torch_has_the_function_that_waits_for_cuda() -> None:
    """A private function of torch; without it, a process would query the GPUs at once."""
    assert callable(torch.cuda._lazy_call)


def test_without_the_variable_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tuned_tiles.VARIABLE, raising=False)
    before = tuned_tiles.tune_cache()
    tuned_tiles.load(lambda: pytest.fail("the library was opened"))
    assert tuned_tiles.tune_cache() is before


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("{", "it is not JSON"),
        ("\x00", "it is not JSON"),
        ("[]", "its format is not given, this package reads 1"),
        (contents(format=2), "its format is 2, this package reads 1"),
        ({"machine": {}, "results": []}, "make a cache from it: python -m benchmarks.tuner --report"),
        (contents(gpu=None), "its 'gpu' is None, not str"),
        (contents(choices={}), "its 'choices' is {}, not list"),
        (contents(gpu="NVIDIA H200"), f"it is of NVIDIA H200 (132 SMs), the GPUs here: {NAME} (132 SMs)"),
        (contents(sms=114), f"it is of {NAME} (114 SMs), the GPUs here"),
        (contents(table="toy"), "it is for the table 'toy', the library has sm80, sm89, sm90"),
        (contents(choices=[{"n": 1}]), "it has no choice of a tile in {'n': 1}"),
        (contents(choices=[7]), "it has no choice of a tile in 7"),
        (contents(choices=[contents()["choices"][0] | {"m": 1.5}]), "it has no choice of a tile in"),
        (contents(choices=[contents()["choices"][0] | {"m": 0}]), "it has no choice of a tile in"),
        (
            contents(choices=[contents()["choices"][0] | {"tile": "128x192x128"}]),
            "its tile '128x192x128' is not in this library's table sm90: it is of another version, or "
            "of a build with SMOOTHQUANT_KERNELS_TUNING=1",
        ),
        (contents(choices=[contents()["choices"][0] | {"tile": ["a"]}]), "it has no choice of a tile"),
        (contents(choices=[contents()["choices"][0] | {"splits": 2}]), "the library refuses a choice"),
        (contents(choices=2 * contents()["choices"]), "two choices for one problem"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)  # fmt: skip
@pytest.mark.compiler
def test_a_wrong_file_is_one_warning_and_the_rules_stay(
    library: ctypes.CDLL,
    gpus: list[tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    data: Any,
    said: str,
) -> None:
    rule = taken(library, 64, 4096, 4096)
    file = tmp_path / "tiles.json"
    (message,) = load(monkeypatch, library, file, data)
    assert message.startswith(
        f"SQK_TUNE_CACHE={file} is not used, and GEMMs go by the shipped rules: "
    )
    assert said in message and "python -m benchmarks.tuner" in message
    assert message.endswith(". Or unset SQK_TUNE_CACHE.")
    assert not tuned_tiles.tune_cache().in_use and said in tuned_tiles.tune_cache().state
    assert taken(library, 64, 4096, 4096) == rule


def test_a_missing_file_or_description_is_a_warning(
    gpus: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def none() -> Any:
        raise ImportError("the module was not built for Python 3.99")

    monkeypatch.setenv(tuned_tiles.VARIABLE, str(tmp_path / "nowhere.json"))
    with pytest.warns(RuntimeWarning, match="it cannot be read .No such file"):
        tuned_tiles.load(none)
    (tmp_path / "tiles.json").write_text(json.dumps(contents()))
    monkeypatch.setenv(tuned_tiles.VARIABLE, str(tmp_path / "tiles.json"))
    with pytest.warns(
        RuntimeWarning, match="cannot take it .the module was not built for Python 3.99.; build"
    ):
        tuned_tiles.load(none)


# --- from measurements to choices -------------------------------------------------------------------------------------


def measured(
    m: int, times: list[tuple[int, int, float]], now: tuple[int, int, float]
) -> dict[str, Any]:
    names = ("tile", "splits", "us")
    return {
        "M": m, "N": 4096, "K": 4096, "not_timed": [], "dispatched": dict(zip(names, now, strict=True)),
        "times": [dict(zip(names, time, strict=True), rough=False) for time in times],
    }  # fmt: skip


@pytest.mark.compiler
def test_the_library_takes_what_the_tuner_measured(
    library: ctypes.CDLL,
    gpus: list[tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    table = {"name": "sm90", **c_gemm.tables(library)["sm90"]}
    results = [
        measured(64, [(9, 1, 10.0), (6, 1, 11.0)], (6, 1, 11.0)),
        measured(128, [(9, 1, 10.0), (7, 1, 10.05)], (7, 1, 10.05)),  # 0.5 % is noise
        measured(512, [(12, 1, 20.0), (8, 1, 30.0)], (8, 1, 30.0)),
        {"M": 2, "N": 4096, "K": 4096, "failed": "broken", "times": [], "not_timed": []},
    ]
    results[2]["not_timed"] = [
        {"tile": 12, "splits": 1, "what": "wrong", "why": "1 element differs"}
    ]
    results[0]["times"].append({"tile": 5, "splits": 1, "us": 1.0, "rough": True})
    data = {
        "machine": {"device": NAME, "sms": 132, "driver": "1"},
        "table": table,
        "results": results,
    }
    file = tmp_path / "tiles.json"
    choices.write_cache(file, data)
    found = json.loads(file.read_text())
    assert [(c["m"], c["tile"]) for c in found["choices"]] == [
        (64, table["tiles"][9]["name"]),
        (128, table["tiles"][7]["name"]),
        (512, table["tiles"][8]["name"]),
    ]
    assert load(monkeypatch, library, file, found) == []
    wanted = [table["tiles"][row]["name"] for row in (9, 7, 8)]
    assert [taken(library, m, 4096, 4096)[0] for m in (64, 128, 512)] == wanted


def test_the_cache_names_candidates_only_when_asked() -> None:
    tiles = [{"tile": 0, "name": "a"}, {"tile": 1, "name": "b", "candidate": True}]
    result = measured(64, [(0, 1, 10.0), (1, 1, 5.0)], (0, 1, 10.0))
    data = {
        "machine": {"device": NAME},
        "table": {"name": "sm90", "tiles": tiles},
        "results": [result],
    }
    assert [c["tile"] for c in choices.cache(data)["choices"]] == ["a"]
    assert [c["tile"] for c in choices.cache(data, True)["choices"]] == ["b"]
