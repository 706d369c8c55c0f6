"""Merged statistics of several processes equal those of one process bit for bit. Statistics survive a file."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch

from smoothquant_kernels import SmoothQuantConfig, smooth_and_quantize, smooth_lm
from smoothquant_kernels.smoothing import statistics as statistics_module
from smoothquant_kernels.smoothing.calibrate import calibrate_model
from smoothquant_kernels.smoothing.rows import KEPT
from smoothquant_kernels.smoothing.statistics import ActivationStatistics
from tests.support.checkpoints import assert_same_state, refusal
from tests.support.compare import assert_bitwise_equal
from tests.support.models import make_model, token_batches
from tools.build.plan import ROOT

BATCHES = token_batches(6)


def measured(batches: Any) -> ActivationStatistics:
    """With all that any configuration keeps."""
    config = SmoothQuantConfig(weight_rounding="gptq")
    return calibrate_model(make_model("llama"), batches, config, progress=False)


def assert_equal(got: ActivationStatistics, expected: ActivationStatistics) -> None:
    assert (got.tokens, got.watched) == (expected.tokens, expected.watched)
    for name in ("absmax", "token_absmax", "sample"):
        a, b = getattr(got, name), getattr(expected, name)
        assert list(a) == list(b), name
        assert all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in b), name


def assert_equal_sums(got: ActivationStatistics, expected: ActivationStatistics) -> None:
    """Bit for bit: both have added the same values in the same order."""
    assert got.counts == expected.counts and list(got.square_sums) == list(expected.square_sums)
    for name, sums in expected.square_sums.items():
        assert_bitwise_equal(got.square_sums[name], sums, name)
    assert list(got.moments) == list(expected.moments) == list(expected.absmax)
    for name, moments in expected.moments.items():
        assert_bitwise_equal(got.moments[name], moments, name)


def assert_equal_rows(got: ActivationStatistics, expected: ActivationStatistics) -> None:
    assert list(got.rows) == list(expected.rows)
    for name, rows in expected.rows.items():
        assert_bitwise_equal(got.rows[name].first, rows.first, name)
        assert_bitwise_equal(got.rows[name].largest, rows.largest, name)


@pytest.mark.parametrize("bound", [4096, 150])
def test_merged_parts_equal_the_whole(monkeypatch: pytest.MonkeyPatch, bound: int) -> None:
    """The second part reaches a bound below the number of tokens (288)."""
    monkeypatch.setattr(statistics_module, "PEAK_TOKENS", bound)
    whole, parts = measured(BATCHES), [measured(BATCHES[:2]), measured(BATCHES[2:])]
    parts[0].merge(parts[1])
    assert_equal(parts[0], whole)
    assert parts[0].counts == whole.counts == dict.fromkeys(whole.watched, 288)
    for name, sums in whole.square_sums.items():
        # At most six additions in float64 differ in their order.
        torch.testing.assert_close(parts[0].square_sums[name], sums, rtol=6 * 2**-53, atol=0)
    for (
        name,
        rows,
    ) in whole.rows.items():  # the same first tokens; the largest by factors that had seen less
        merged = parts[0].rows[name]
        assert_bitwise_equal(merged.first, rows.first)
        ratio = parts[0].range_of(name, None, 8) / whole.range_of(name, None, 8)
        assert 0.9 < ratio < 1.1 and len(merged.largest) == KEPT
    assert len(next(iter(whole.token_absmax.values()))) == min(288, bound)


def test_root_mean_squares_are_those_of_the_inputs() -> None:
    """Of all tokens but padding, also where their squares overflow float32."""
    x = torch.randn(3, 17, 8, dtype=torch.float64) * 10.0 ** torch.arange(-20.0, 20.0, 5.0)
    keep = torch.rand(51) < 0.7
    statistics = ActivationStatistics()
    for part, kept in ((x[:1], keep[:17]), (x[1:], keep[17:])):
        statistics.update("x", part.float(), kept)
    expected = x.float().double().reshape(51, 8)[keep].square().mean(0).sqrt().float()
    # Rounded to float32 once, after float64 sums.
    torch.testing.assert_close(statistics.norms("x", "rms"), expected, rtol=2**-23, atol=0)
    assert statistics.norms("x", "max") is statistics.absmax["x"]


def test_statistics_without_squares_say_what_to_do() -> None:
    """Files of earlier releases have none; plain SmoothQuant does not need them."""
    statistics = measured(BATCHES[:1])
    statistics.square_sums.clear()
    statistics.counts.clear()
    why = refusal(lambda: smooth_lm(make_model("llama"), statistics, progress=False))
    assert "no squares of model.layers.0" in why and "activation_norm='max'" in why
    for config in ({"rotation": "none"}, {"activation_norm": "max"}):
        smooth_lm(
            make_model("llama"), statistics, config=SmoothQuantConfig(**config), progress=False
        )


def test_merging_refuses_another_model() -> None:
    one, other = measured(BATCHES[:1]), measured(BATCHES[1:])
    before = copy.deepcopy(one)
    name = next(iter(other.absmax))
    other.watched = other.watched[1:]
    assert f"different layers (1 differ, first {name})" in refusal(lambda: one.merge(other))
    other.watched = one.watched
    other.absmax[name] = torch.ones(5)
    assert f"layer {name} has" in refusal(lambda: one.merge(other))
    assert_equal(one, before)


@pytest.mark.parametrize("lacking", ["moments", "counts"])
def test_merging_refuses_a_part_that_lacks_sums(lacking: str) -> None:
    """Else the sums would be those of a part of the data only."""
    one, other = measured(BATCHES[:1]), measured(BATCHES[1:])
    getattr(other, lacking).clear()
    before = copy.deepcopy(one)
    assert f"statistics 1 lack {lacking}" in refusal(lambda: one.merge(other))
    assert f"statistics 0 lack {lacking}" in refusal(lambda: other.merge(one))
    assert_equal_sums(one, before)


def test_merging_refuses_moments_of_other_layers() -> None:
    """Each part lacks those of some layer, so none has all."""
    parts = [measured(BATCHES[:1]), measured(BATCHES[1:])]
    first, second, *_ = parts[0].watched
    del parts[0].moments[first], parts[1].moments[first], parts[1].moments[second]
    assert "statistics 1 lack moments" in refusal(lambda: parts[0].merge(parts[1]))
    del parts[0].moments[second]
    parts[0].merge(parts[1])
    assert set(parts[0].moments) == set(parts[0].watched) - {first, second}


def test_damaged_sums_are_refused(tmp_path: Path) -> None:
    name = measured(BATCHES[:1]).watched[0]
    for part, value in (
        ("counts", {name: 0}),
        ("counts", {name: 3.5}),
        ("counts", {name: None}),
        ("moments", {"unknown": torch.eye(4)}),
        ("moments", {name: torch.full((32, 32), torch.nan)}),
        ("square_sums", {name: torch.zeros(31, dtype=torch.float64)}),
    ):
        statistics = measured(BATCHES[:1])
        getattr(statistics, part).update(value)
        path = statistics.save(tmp_path / "damaged")
        assert "calibrate again" in refusal(lambda path=path: ActivationStatistics.load(path))


def test_a_layer_that_only_one_part_called() -> None:
    """All experts were watched, but not all of them were reached."""
    whole, one, other = measured(BATCHES), measured(BATCHES[:3]), measured(BATCHES[3:])
    name = one.watched[-1]
    parts: tuple[dict[str, Any], ...] = one.absmax, one.token_absmax, one.square_sums, one.counts
    for part in (*parts, one.moments):
        del part[name]
    one.merge(other)
    assert one.counts[name] == other.counts[name]
    assert_bitwise_equal(one.square_sums[name], other.square_sums[name])
    assert torch.equal(one.absmax[name], other.absmax[name])
    assert torch.equal(one.absmax[one.watched[0]], whole.absmax[one.watched[0]])


def test_statistics_survive_a_file(tmp_path: Path) -> None:
    statistics = measured(BATCHES)
    path = statistics.save(tmp_path / "ranges.safetensors")
    assert_equal(ActivationStatistics.load(path), statistics)
    assert_equal_rows(ActivationStatistics.load(path), statistics)
    assert_equal_sums(ActivationStatistics.load(path), statistics)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    one, two = (
        smooth_and_quantize(make_model("llama"), s, progress=False)
        for s in (statistics, ActivationStatistics.load(path))
    )
    assert_same_state(one, two)
    data = path.read_bytes()
    for damaged in (
        data[:-9],
        data[:40],
        b"",
        data.replace(b"kernels statistics", b"kernels statistisc"),
    ):
        path.write_bytes(damaged)
        assert "give another file" in refusal(lambda: ActivationStatistics.load(path))
    path.write_bytes(data.replace(b'format_version\\": 3', b'format_version\\": 4'))
    assert "upgrade" in refusal(lambda: ActivationStatistics.load(path))
    assert "give another file" in refusal(lambda: ActivationStatistics.load(tmp_path / "none"))
    assert "cannot be written" in refusal(lambda: statistics.save(tmp_path / "none" / "x"))
    assert "empty" in refusal(lambda: ActivationStatistics().save(tmp_path / "x"))


# --- processes --------------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
import torch
import torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from tests.smoothing.test_statistics import BATCHES, measured
from smoothquant_kernels import SmoothQuantError
from smoothquant_kernels.smoothing import statistics as statistics_module
rank, folder = int(sys.argv[3]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
for bound in (4096, 150):
    statistics_module.PEAK_TOKENS = bound
    statistics = measured(BATCHES[:2] if rank == 0 else BATCHES[2:])
    statistics.all_reduce()
    statistics.save(f"{folder}/{bound}-{rank}")
statistics = measured(BATCHES[:1])
name = next(iter(statistics.absmax))
if rank == 1:
    statistics.absmax[name][0] = float("nan")
statistics.all_reduce()
assert statistics.absmax[name][0].isnan() and not statistics.absmax[name][1:].isnan().any()
statistics = measured(BATCHES[:1])
if rank == 1:
    statistics.watched = (*statistics.watched, "another")
try:
    statistics.all_reduce()
except SmoothQuantError as error:
    print(error)
dist.barrier()  # both processes are still alive
"""


def test_two_gloo_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", SCRIPT, str(ROOT), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [*command, str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed = [process.communicate(timeout=600) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [p.returncode for p in running] == [0, 0], printed
    said = [out.strip().splitlines()[-1] for out, _ in printed]
    assert said[0] == said[1]
    assert said[0].startswith("ranks 0 and 1 measured different layers (1 differ, first another)")
    for bound in (4096, 150):
        monkeypatch.setattr(statistics_module, "PEAK_TOKENS", bound)
        whole = measured(BATCHES)
        merged = measured(BATCHES[:2])
        merged.merge(measured(BATCHES[2:]))
        for rank in range(2):
            found = ActivationStatistics.load(tmp_path / f"{bound}-{rank}")
            assert_equal(found, whole)
            assert_equal_rows(found, merged)
            assert_equal_sums(found, merged)


def test_all_reduce_needs_a_group() -> None:
    assert "init_process_group" in refusal(measured(BATCHES[:1]).all_reduce)


# --- accelerate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "places",
    [
        {"": "cpu"},
        {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model": "cpu", "lm_head": "cpu"},
    ],
    ids=["one", "several"],
)
def test_a_dispatched_model_is_quantized_as_usual(places: dict[str, str]) -> None:
    """accelerate's hooks on the modules do not change the result."""
    plain = smooth_and_quantize(make_model("llama"), BATCHES, progress=False)
    model = accelerate.dispatch_model(
        make_model("llama"), places, main_device="cpu", force_hooks=True
    )
    assert any(hasattr(m, "_hf_hook") for m in model.modules())
    assert_same_state(smooth_and_quantize(model, BATCHES, progress=False), plain)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_models_are_refused(tmp_path: Path, where: str) -> None:
    model = make_model("llama")
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    text = refusal(lambda: calibrate_model(model, BATCHES, progress=False))
    assert "quantize_streamed" in text and "meta" in text
    text = refusal(lambda: smooth_lm(model, BATCHES, progress=False))
    assert "quantize_streamed" in text and "meta" in text
