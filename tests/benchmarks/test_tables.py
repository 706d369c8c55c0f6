"""The tables of the documentation and of reports have the numbers of the results files, and one line without them."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import accuracy
from benchmarks.pages import result_tables, tables
from tests.benchmarks.programs import python

MACHINE = {
    "device": "NVIDIA H100 80GB HBM3", "cpu": "a CPU", "cuda": "13.0", "driver": "580.1", "torch": "2.11.0",
    "max_sm_mhz": 1980.0, "sms": 132, "memory_gib": 79.6, "command": "python benchmarks/bench_gemm.py",
}  # fmt: skip
GPU_TABLES = [name for name in tables.TABLES if name.startswith("gpu_")]


def gemm_row(m: int, us: float, vs_fp16: float | None, **changes: Any) -> dict[str, Any]:
    return {
        "model": "LLaMA-7B", "layer": "up", "M": m, "N": 11008, "K": 4096, "data": "random", "us": us,
        "tops": 2 * m * 11008 * 4096 / us / 1e6, "gb_per_s": 1234.5, "tile": "128x128x128 /4",
        "fp16_us": vs_fp16 and vs_fp16 * us, "vs_fp16": vs_fp16, "vs_new": 0.5, "sm_mhz": 1700.0 + m / 2048,
    } | changes  # fmt: skip


GEMM = [
    gemm_row(2048, 100.25, 2.0),
    gemm_row(2048, 140.0, 1.0, model="OPT-13B", layer="fc1"),
    gemm_row(64, 30.0, 1.5, vs_new=None),
    gemm_row(64, 25.0, 1.7, data="real"),
    {"model": "LLaMA-7B", "layer": "o", "M": 64, "N": 4096, "K": 4096, "data": "random", "wrong": "y[0] is 1"},
]  # fmt: skip
QUANTIZE = [
    {"producer": "quantize", "smooth": False, "scheme": "per_token", "dtype": "float16", "M": m, "K": 4096,
     "us": us, "gb_per_s": 99.5, "vs_copy": copy, "vs_compiled": None}
    for m, us, copy in ((2048, 12.5, 0.96), (1, 3.25, 0.4))
]  # fmt: skip
LINEAR = [
    {"layer": "LLaMA-7B up", "N": 11008, "K": 4096, "M": 2048, "scheme": "per_token", "smooth": smooth,
     "int8_us": us, "gops": 1e6, "vs_float16": 1.75, "vs_bfloat16": 1.74, "host_us": 17.5}
    for smooth, us in ((False, 120.5), (True, 121.5))
]  # fmt: skip
BLOCK = [{"model": "LLaMA-7B", "phase": "decode", "M": 16, "us": 211.25, "vs_float16": 1.625}]


def write(folder: Path, name: str, rows: list[dict[str, Any]], **machine: Any) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(json.dumps({"machine": MACHINE | machine, "rows": rows}))
    return path


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    return tmp_path


def cells(text: str) -> list[list[str]]:
    """The cells of all lines of tables, the headers' too."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def table(name: str) -> str:
    text = tables.TABLES[name]()
    assert text is not None
    return text


#: The tables that were measured need no compiler, predictions do.
COMPILERS = ["none", pytest.param("g++", marks=pytest.mark.compiler)]


@pytest.mark.parametrize("compiler", COMPILERS)
def test_documented_tables_are_up_to_date(compiler: str) -> None:
    done = python("-m", "benchmarks.pages.tables", "--check", CXX=compiler)
    assert done.returncode == 0, done.stdout


def test_every_marked_table_is_known() -> None:
    marked = {m[2] for page in tables.pages() for m in tables.MARKED.finditer(page.read_text())}
    assert marked == set(tables.TABLES)


def test_without_results_every_table_is_one_line(results: Path) -> None:
    for name in tables.TABLES:
        if name not in (
            "gemm_h100",
            "gemm_a100",
            "gemm_l40s",
            "gemm_yardstick",
            "layers",
        ):  # arithmetic
            assert table(name) == "Not measured yet.\n", name


def test_a_rehearsal_is_no_gpu(results: Path) -> None:
    folder = results / "cpu_2099-01-01"
    for name in ("gemm", "quantize", "linear", "block", "model", "attention"):
        write(folder, f"{name}.json", GEMM, cuda=None, device="cpu (a rehearsal)")
    assert [table(name) for name in GPU_TABLES] == ["Not measured yet.\n"] * len(GPU_TABLES)


def test_the_newest_folder_counts(results: Path) -> None:
    for folder, us in (("z_2026-01-02", 1.0), ("a_2026-11-30", 3.0), ("b_2026-11-30", 2.0)):
        write(results / folder, "gemm.json", [gemm_row(64, us, 1.0)])
    path = tables.newest("gemm.json", gpu=True)
    assert path is not None and path.parent.name == "b_2026-11-30"
    write(results / "c_2026-12-01", "gemm.json", GEMM, cuda=None)
    assert tables.newest("gemm.json", gpu=True) == path
    assert tables.newest("gemm.json") != path


def test_a_caption_has_what_a_number_needs(results: Path) -> None:
    write(results / "h100_2026-11-30", "gemm.json", GEMM)
    caption = table("gpu_gemm").splitlines()[0]
    assert caption == (
        "NVIDIA H100 80GB HBM3, 1,700 to 1,701 MHz under load (at most 1,980), driver 580.1, CUDA 13.0, torch 2.11.0, "
        "2026-11-30; `python -m benchmarks.gemm`."  # the file has the script's old name
    )


def test_the_gemm_table_has_the_files_numbers(results: Path) -> None:
    write(results / "h100_2026-11-30", "gemm.json", GEMM)
    found = cells(table("gpu_gemm"))
    # means: of random data, the wrong case and the ratio that is missing left out; then the predictions' layers
    assert found[0] == ["M", "cases", "vs fp16", "vs new"]
    assert found[1:4] == [
        ["M 9-64", "1", "1.50x", "-"],
        ["M > 512", "2", f"{math.sqrt(2.0):.2f}x", "0.50x"],
        ["all", "3", f"{3.0 ** (1 / 3):.2f}x", "0.50x"],
    ]
    assert found[5:] == [
        ["LLaMA-7B up", "11008 x 4096", "128x128x128 /4", "2048", "100.2", f"{GEMM[0]['tops']:,.1f}", "1,234.5",
         "2.00x", "0.50x"],
        ["LLaMA-7B up", "11008 x 4096", "128x128x128 /4", "64", "30.0", f"{GEMM[2]['tops']:,.1f}", "1,234.5",
         "1.50x", "-"],
    ]  # fmt: skip


def test_the_targets_are_met_only_where_every_case_meets_them(results: Path) -> None:
    folder = results / "h100_2026-11-30"
    write(folder, "gemm.json", GEMM)
    found = {line[0]: line[1:] for line in cells(table("gpu_targets"))}
    assert found["GEMM, M >= 2048, vs FP16"] == ["no", "1.70x", "1.41x", "1.00x", "1 of 2"]
    # the wrong case counts, real data does not
    assert found["GEMM, M <= 64, vs FP16"] == ["no", "1.90x", "1.50x", "1.50x", "0 of 2"]
    assert found["quantizers, speed of a copy"] == ["not measured", "0.90x", "-", "-", "-"]
    tops = [row["tops"] for row in GEMM[:2]]
    mean = math.sqrt(tops[0] * tops[1])
    assert min(tops) < 1350 < 1800 < max(tops)  # so that both sides below mean something
    measured = [f"{mean:,.0f}", f"{min(tops):,.0f}", "2 of 2"]
    assert found["GEMM, M >= 2048, TOPS"] == ["yes", "1,300", *measured]
    write(folder, "linear.json", LINEAR)
    write(folder, "quantize.json", QUANTIZE)
    found = {line[0]: line[1:] for line in cells(table("gpu_targets"))}
    assert found["layer with its quantization, vs FP16"][0] == "yes"
    assert found["quantizers, speed of a copy"] == ["no", "0.90x", "0.62x", "0.40x", "1 of 2"]
    assert found["the same, M >= 2048 only"][0] == "yes"


def test_a_wrong_case_keeps_a_target_from_being_met() -> None:
    files = {"gemm": {"rows": [gemm_row(64, 30.0, 2.5), GEMM[-1]]}}
    found = {line[0]: line[1] for line in result_tables.targets(files).rows}
    assert found["GEMM, M <= 64, vs FP16"] == "on average"


def test_quantizers_layers_and_blocks(results: Path) -> None:
    folder = results / "h100_2026-11-30"
    for name, rows in (("quantize", QUANTIZE), ("linear", LINEAR), ("block", BLOCK), ("model", BLOCK)):  # fmt: skip
        write(folder, f"{name}.json", rows)
    assert cells(table("gpu_quantize"))[1:] == [
        ["quantize float16", "per_token", "1", "4096", "3.2", "99.5", "0.40x", "-"],
        ["quantize float16", "per_token", "2048", "4096", "12.5", "99.5", "0.96x", "-"],
    ]
    layers = cells(table("gpu_linear"))[1:]
    assert [line[2:] for line in layers] == [
        ["per_token", "2048", "120.5", "1,000.0", "1.75x", "1.74x", "17.5"],
        ["per_token+smooth", "2048", "121.5", "1,000.0", "1.75x", "1.74x", "17.5"],
    ]
    blocks = [["model", "phase", "M", "us", "vs float16"], ["LLaMA-7B", "decode", "16", "211.2", "1.62x"]]  # fmt: skip
    assert cells(table("gpu_block")) == cells(table("gpu_model")) == blocks


def test_a_cpu_says_so(results: Path) -> None:
    write(results / "epyc_2026-11-30", "model_cpu.json", BLOCK, cuda=None, threads=1)
    assert table("cpu_model").startswith("a CPU, 1 thread, torch 2.11.0, 2026-11-30; `python")
    assert table("gpu_model") == "Not measured yet.\n"
    row = BLOCK[0] | {"vs_float32": 2.875, "vs_unfused": 1.3125}
    write(results / "epyc_2026-11-30", "model_cpu_avx2.json", [row], cuda=None, threads=1, isa="avx2")  # fmt: skip
    assert table("cpu_model_avx2").startswith("a CPU, 1 thread, kept to AVX2, torch 2.11.0")
    assert cells(table("cpu_model_avx2"))[1][-2:] == ["2.88x", "1.31x"]
    assert table("cpu_model_avx512_vnni") == "Not measured yet.\n"


def cpu_row(m: int, **more: Any) -> dict[str, Any]:
    row = {"layer": "LLaMA-7B up", "N": 11008, "K": 4096, "M": m, "int8_us": 1234.5, "gops": 99.6}
    return row | {"vs_float32": 2.5, "vs_bfloat16": 1.25} | more


CPU_MACHINE = {"cuda": None, "capability": "AVX512", "int8_mode": "avx512_vnni", "threads": 1}


def test_layers_on_a_cpu_have_the_columns_that_the_file_has(results: Path) -> None:
    write(
        results / "epyc_2026-11-23", "linear_cpu.json", [cpu_row(1)], **CPU_MACHINE
    )  # an older file
    old = ["layer", "N x K", "M", "W8A8Linear us", "GOPS", "vs float32", "vs bfloat16"]
    values = ["LLaMA-7B up", "11008 x 4096", "1", "1,234", "100", "2.50x", "1.25x"]
    assert cells(table("cpu_linear")) == [old, values]
    assert "int8 mode `avx512_vnni`, 1 thread, torch 2.11.0; medians" in table("cpu_linear")
    assert table("cpu_linear_means") == "Not measured yet.\n"

    peers = {"vs_onnxruntime": 1.5, "vs_vllm_bfloat16": 1.75, "vs_best_peer": 1.5}
    new = [cpu_row(1, ghz=2.5, peak_share=0.125, **peers), cpu_row(16, vllm_missing="wrong")]
    path = write(
        results / "xeon_2026-12-01", "linear_cpu.json", new, isa="avx512_vnni",
        peers={"int8": "torch 2", "onnxruntime": "onnxruntime 1.32.0"}, missing={"vllm": "not here"},
        environment={"OMP_NUM_THREADS": "1"}, command="python -m a --python vllm=/b/python --json c", **CPU_MACHINE,
    )  # fmt: skip
    text = table("cpu_linear")
    assert (
        "kept to AVX512-VNNI, AMX refused, `OMP_NUM_THREADS=1`, 2.5 to 2.5 GHz in the run" in text
    )
    assert (
        "`python -m a --json c`. onnxruntime: onnxruntime 1.32.0. Not timed: vllm (not here)."
        in text
    )
    header, first, second = cells(text)
    assert header[5:8] == ["of the peak", "vs float32", "vs bfloat16"]
    assert header[8:] == ["vs onnxruntime", "vs vllm bfloat16", "vs the best peer"]
    assert first[5:] == ["12 %", "2.50x", "1.25x", "1.50x", "1.75x", "1.50x"]
    assert second[5:] == ["-", "2.50x", "1.25x", "-", "-", "-"]
    data = json.loads(path.read_text())
    data["geomeans"] = {"large, M = 1": {"cases": 1, "float32": 2.5, "best_peer": 1.5}}
    path.write_text(json.dumps(data))
    header, means = cells(table("cpu_linear_means"))
    assert means == ["large, M = 1", "1", "2.50x", "-", "-", "-", "1.50x"]
    assert header[-1] == "vs best peer"


def test_rotations_on_a_cpu(results: Path) -> None:
    more = {"dtype": "float32", "vs_eager": 2.0, "vs_unrotated": 0.75}
    rows = [row | more | {"rotation": rotation} for row in QUANTIZE for rotation in (0, 256)]
    write(results / "epyc_2026-11-30", "quantize_cpu.json", rows, cuda=None, threads=1)
    found = cells(table("cpu_quantize"))[1:]
    assert [line[:4] for line in found] == [["quantize float32", "4096", "256", m] for m in ("1", "2048")]  # fmt: skip
    assert [line[-3:] for line in found] == [["0.40x", "2.00x", "0.75x"], ["0.96x", "2.00x", "0.75x"]]  # fmt: skip


def test_an_unpredicted_gpu_has_no_prediction(results: Path) -> None:
    write(results / "x_2026-11-30", "gemm.json", GEMM, device="NVIDIA X1")
    if tables.planner.available():
        assert table("gpu_predicted") == "There is no prediction for NVIDIA X1.\n"


@pytest.mark.compiler
def test_a_prediction_is_held_against_what_was_measured(results: Path) -> None:
    if not tables.planner.available():
        pytest.skip("needs a C++ compiler")
    write(results / "h100_2026-11-30", "gemm.json", GEMM)
    found = cells(table("gpu_predicted"))
    assert found[0][:3] == ["M", "cases", "geometric mean"]
    assert [line[0] for line in found[1:]] == ["M 9-64", "M > 512", "all"]
    assert [line[1] for line in found[1:]] == ["1", "2", "3"]


def test_failures_are_named() -> None:
    rows = [*GEMM, gemm_row(1, 9.0, 1.0, tiles_wrong={"64x64": "y[1]"})]
    assert result_tables.failures(rows) == [
        "LLaMA-7B o M 64 N 4096 K 4096: wrong: y[0] is 1",
        "LLaMA-7B up M 1 N 11008 K 4096: tile 64x64 wrong: y[1]",
    ]


FACTS = {"model": "M", "torch": "2.13.0", "evaluation_tokens": 3072, "calibration_tokens": 4096}


def numbers(change: float) -> dict[str, Any]:
    return {
        "perplexity": 10 + change, "change_percent": change, "change_stderr": 0.5,
        "mean_kl": change / 100, "top1_agreement": 0.9,
    }  # fmt: skip


def row(name: str, change: float, **more: Any) -> dict[str, Any]:
    return {"model": name, **numbers(change), **more}


def test_both_kinds_of_text_stand_side_by_side() -> None:
    rows = [
        row("float32", 0.0, news=numbers(0.0)),
        row("SmoothQuant W8A8", 1.0, scheme="static", news=numbers(4.0)),
    ]
    text = tables.accuracy({"facts": {**FACTS, "other": "news"}, "schemes": rows}, "schemes")
    assert "and news, as many tokens of another kind" in text.splitlines()[0]
    header, first, second = (line[2:] for line in cells(text))
    same = ["change", "mean KL", "same top-1"]
    assert header == ["perplexity", *same, "perplexity on news", *same]
    assert first == ["10.000", "", "", "", "10.000", "", "", ""]
    assert second[:4] == ["11.000", "+1.00 ± 0.50 %", "0.0100", "90.0 %"]
    assert second[4:] == ["14.000", "+4.00 ± 0.50 %", "0.0400", "90.0 %"]


@pytest.mark.parametrize("facts", [FACTS, {**FACTS, "other": None}, {**FACTS, "other": "news"}])
def test_results_on_one_kind_of_text_have_its_columns_alone(facts: dict[str, Any]) -> None:
    rows = [row("SmoothQuant W8A8", 1.0, scheme="static")]
    assert "news" not in tables.accuracy({"facts": facts, "schemes": rows}, "schemes")


def test_the_articles_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / accuracy._ARTICLES
    file.parent.mkdir(parents=True)
    file.write_text("One article.\n\nAnother one.\n")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(accuracy, "find_spec", lambda name: spec if name == "gensim" else None)
    assert accuracy.news() == ["One article.", "Another one."]
    file.unlink()
    assert accuracy.news() is None
    monkeypatch.setattr(accuracy, "find_spec", lambda _: None)
    assert accuracy.news() is None


@pytest.mark.skipif(importlib.util.find_spec("gensim") is None, reason="needs gensim's data")
def test_the_real_articles() -> None:
    articles = accuracy.news()
    assert articles is not None and len(articles) == 300
    assert articles[0].startswith("Hundreds of people have been forced to vacate their homes")
