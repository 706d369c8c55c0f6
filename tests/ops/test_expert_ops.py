"""The ops for experts on every path of a CPU: each level of the compiled kernels, oneDNN, and the reference."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from smoothquant_kernels import ops, reference
from smoothquant_kernels.backends import cpu_native
from smoothquant_kernels.backends import reference as fallbacks
from smoothquant_kernels.ops import registry
from tests.support import backends, cases
from tests.support.compare import assert_bitwise_equal

PATHS = [*cpu_native.levels_here(), "onednn", "fallback"]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What serves the ops."""
    with contextlib.ExitStack() as stack:
        if request.param in cpu_native.LEVELS:
            stack.enter_context(backends.at_level(request.param))
        else:
            stack.enter_context(backends.kernels_in_python())
        if request.param == "fallback":
            monkeypatch.setattr(registry, "_CPU_KERNELS", {})
            importlib.reload(fallbacks)
        yield request.param


def one_by_one(
    e: cases.ExpertGemm, offsets: Tensor, rows: Tensor | None, x_scale: Tensor, **options: Any
) -> Tensor:
    """One `gemm_s8` for each expert, of rows that are gathered first."""
    s = len(e.x_q) if rows is None else len(rows)
    y = torch.zeros(s, e.w_q.shape[1], dtype=options["out_dtype"])
    bias = options.pop("bias", None)
    for i, (first, last) in enumerate(itertools.pairwise(offsets.tolist())):
        x = (e.x_q if rows is None else e.x_q[rows.long()])[first:last].contiguous()
        scale = x_scale if len(x_scale) == 1 else x_scale[first:last]
        y[first:last] = ops.gemm_s8(
            x, e.w_q[i], scale, e.w_scale[i], bias=None if bias is None else bias[i], **options
        )
    return y


def check(
    e: cases.ExpertGemm,
    *,
    offsets: Tensor | None = None,
    rows: Tensor | None = None,
    x_scale: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    bias: Tensor | None = None,
) -> Tensor:
    offsets = e.offsets if offsets is None else offsets
    x_scale = e.x_scale if x_scale is None else x_scale
    given = (e.x_q, e.w_q, x_scale, e.w_scale, offsets)
    y = ops.grouped_gemm_s8(*given, rows=rows, bias=bias, out_dtype=out_dtype)
    assert_bitwise_equal(y, reference.grouped_gemm_s8(*given, rows, bias, out_dtype))
    assert_bitwise_equal(
        y, one_by_one(e, offsets, rows, x_scale, bias=bias, out_dtype=out_dtype), "one by one"
    )
    return y


#: Rows of each expert.
COUNTS = ((0,), (1,), (0, 1, 7, 129, 0), (1,) * 8, (0, 0, 300), (300, 0, 0), (17, 16, 15, 33))


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 18), (48, 64), (37, 129), (130, 320)])
def test_each_expert_multiplies_its_own_rows(
    path: str, counts: Sequence[int], n: int, k: int
) -> None:
    e = cases.expert_operands(0, len(counts), n, k, choices=1, counts=counts, elsewhere=3)
    y = check(e, rows=e.rows, bias=e.bias)
    assert not y[sum(counts) :].any() and len(y) == sum(counts) + 3
    # Rows as they come, and a bias for some calls only.
    assert_bitwise_equal(check(e._replace(x_q=e.x_q[e.rows.long()]), bias=e.bias), y)
    check(e, rows=e.rows)


@pytest.mark.parametrize(("experts", "tokens"), [
    (1, 0), (1, 1), (2, 40), (64, 1), (256, 40), (reference.MAX_EXPERTS, 1),
])  # fmt: skip
def test_any_number_of_experts(path: str, experts: int, tokens: int) -> None:
    e = cases.expert_operands(tokens, experts, 6, 20, choices=4, elsewhere=min(tokens, 9))
    check(e, rows=e.rows, bias=e.bias, out_dtype=torch.bfloat16)
    check(e._replace(x_q=e.x_q[e.rows.long()]), out_dtype=torch.float16)


@pytest.mark.parametrize("out_dtype", cases.FLOATS)
@pytest.mark.parametrize("bias_dtype", [*cases.FLOATS, None])
@pytest.mark.parametrize("static", [False, True])
def test_types(
    path: str, out_dtype: torch.dtype, bias_dtype: torch.dtype | None, static: bool
) -> None:
    e = cases.expert_operands(13, 4, 33, 70, choices=2)
    bias = None if bias_dtype is None else e.bias.to(bias_dtype)
    x_scale = torch.tensor([0.003]) if static else e.x_scale
    check(e, rows=e.rows, x_scale=x_scale, bias=bias, out_dtype=out_dtype)


def test_rows_before_and_after_all_experts_are_zeros(path: str) -> None:
    """Also where the memory held something else before."""
    e = cases.expert_operands(60, 3, 700, 24, choices=2)
    offsets = torch.tensor([50, 53, 53, 71], dtype=torch.int32)
    full = torch.full((120, 700), torch.nan)
    del full  # the next tensor of this size may get its memory
    y = check(e, offsets=offsets, rows=e.rows, bias=e.bias)
    assert not y[:50].any() and not y[71:].any() and bool(y[50:71].any(1).all())
    assert not check(e, offsets=offsets * 0 + 7, rows=e.rows, bias=e.bias).any()


def test_a_row_of_x_may_serve_several_results_or_none(path: str) -> None:
    e = cases.expert_operands(9, 2, 7, 65, choices=3)
    rows = torch.tensor([0, 0, 0, 8, 8, 5, 5, 0] + [8] * 19, dtype=torch.int32)
    check(e, rows=rows, bias=e.bias)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 0.0])
def test_scales_and_biases_that_are_not_finite(path: str, value: float) -> None:
    e = cases.expert_operands(11, 3, 20, 32, choices=2)
    for name in ("x_scale", "w_scale", "bias"):
        changed = getattr(e, name).clone()
        changed.view(-1)[::3] = value
        other = e._replace(**{name: changed})
        for out_dtype in cases.FLOATS:
            check(other, rows=e.rows, bias=other.bias, out_dtype=out_dtype)


def test_long_sums_are_exact(path: str) -> None:
    """-128 times -128, as often as fits int32."""
    e = cases.expert_operands(2, 2, 3, reference.MAX_K, choices=1)
    e.x_q.fill_(-128)
    e.w_q.fill_(-128)
    offsets = torch.tensor([0, 1, 2], dtype=torch.int32)
    y = check(e, offsets=offsets, x_scale=torch.ones(1))
    assert_bitwise_equal(y, (2.0**14 * reference.MAX_K) * e.w_scale)


def sliced(t: Tensor) -> Tensor:
    """The same numbers in every second element of larger memory."""
    wide = torch.zeros([2 * size for size in t.shape], dtype=t.dtype)
    view = wide[tuple(slice(0, None, 2) for _ in t.shape)]
    return view.copy_(t)


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_views_and_strides(path: str, offset: int) -> None:
    e = cases.expert_operands(19, 3, 34, 67, choices=2)
    y = check(e, rows=e.rows, bias=e.bias)
    views = e._make(map(sliced, e))
    assert_bitwise_equal(check(views, rows=views.rows, bias=views.bias), y)
    # Rows and experts apart, elements adjacent, at any address.
    x_memory = torch.zeros(offset + 19 * 80, dtype=torch.int8)
    x_q = x_memory.as_strided((19, 67), (80, 1), offset).copy_(e.x_q)
    w_memory = torch.zeros(offset + 3 * 3000, dtype=torch.int8)
    w_q = w_memory.as_strided((3, 34, 67), (3000, 80, 1), offset).copy_(e.w_q)
    transposed = e.bias.t().contiguous().t()
    others = e._replace(x_q=x_q, w_q=w_q)
    assert_bitwise_equal(check(others, rows=e.rows, bias=transposed), y)
    # One weight for all experts, and one row for all results.
    check(e._replace(w_q=e.w_q[:1].expand(3, 34, 67)), rows=e.rows)
    check(e._replace(x_q=e.x_q[:1].expand(38, 67)))


def test_the_order_of_the_rows_of_an_expert_does_not_show(path: str) -> None:
    """Bits of a row depend on nothing but that row: neither on the others nor on how many they are."""
    e = cases.expert_operands(0, 2, 48, 96, choices=1, counts=(40, 23))
    y = check(e, rows=e.rows, bias=e.bias)
    for row in (0, 17, 39, 40, 62):
        own = int(row >= 40)
        alone = ops.gemm_s8(
            e.x_q[e.rows[row : row + 1].long()], e.w_q[own], e.x_scale[row : row + 1], e.w_scale[own],
            bias=e.bias[own], out_dtype=torch.float32,
        )  # fmt: skip
        assert_bitwise_equal(y[row : row + 1], alone)


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_do_not_show(threads: int) -> None:
    operands = [
        cases.expert_operands(tokens, experts, n, k, choices=4, elsewhere=tokens // 2)
        for tokens, experts, n, k in ((2, 8, 96, 128), (1, 1, 5, 9), (300, 16, 70, 200))
    ]
    before = torch.get_num_threads()

    def results() -> list[Tensor]:
        made = []
        for e in operands:
            y = ops.grouped_gemm_s8(*e[:5], rows=e.rows, bias=e.bias, out_dtype=torch.bfloat16)
            made += [y, ops.combine_experts(y, e.position, e.weights)]
        return made

    try:
        torch.set_num_threads(1)
        expected = results()
        torch.set_num_threads(threads)
        for found, one_thread in zip(results(), expected, strict=True):
            assert_bitwise_equal(found, one_thread)
    finally:
        torch.set_num_threads(before)


# --- combine_experts ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("weights_dtype", cases.FLOATS)
@pytest.mark.parametrize(("tokens", "choices", "n"), [
    (0, 2, 5), (1, 1, 1), (3, 8, 7), (17, 2, 64), (5, 3, 1031), (2, 70, 2050),
])  # fmt: skip
def test_weighted_sums(
    path: str, tokens: int, choices: int, n: int, dtype: torch.dtype, weights_dtype: torch.dtype
) -> None:
    g = cases.generator(tokens)
    y = cases.activations(tokens * choices + 3, n, dtype, 2)
    position = torch.randint(0, len(y), (tokens, choices), generator=g, dtype=torch.int32)
    weights = (torch.rand(tokens, choices, generator=g) - 0.2).to(weights_dtype)
    if tokens > 1:
        y[position[1, 0]] = torch.nan
        weights[0] = torch.inf
        y[position[0, 0]] = -0.0
    found = ops.combine_experts(y, position, weights)
    assert_bitwise_equal(found, reference.combine_experts(y, position, weights))
    views = (sliced(y), sliced(position), sliced(weights))
    assert_bitwise_equal(ops.combine_experts(*views), found, "views")


def test_a_sum_of_negative_zeros_is_one(path: str) -> None:
    y, position = torch.full((2, 9), -0.0), torch.tensor([[0, 1]], dtype=torch.int32)
    assert_bitwise_equal(ops.combine_experts(y, position, torch.ones(1, 2)), y[:1])


# --- values that a CPU can refuse, tracers, and a choice of the environment ---------------------------


@pytest.mark.parametrize(("name", "values", "sentence"), [
    ("offsets", [-1, 3, 8], "offsets must ascend from 0 or more to at most 8, got -1 after 0."),
    ("offsets", [0, 5, 4], "offsets must ascend from 0 or more to at most 8, got 4 after 5."),
    ("offsets", [0, 3, 9], "offsets must ascend from 0 or more to at most 8, got 9 after 3."),
    ("rows", [0, 1, 2, 3, 3, 2, -1, 0], "rows must be in [0, 4), got -1."),
    ("rows", [0, 1, 2, 4, 3, 2, -1, 0], "rows must be in [0, 4), got 4."),
    ("position", [[0, 1], [2, 8]], "position must be in [0, 8), got 8."),
    ("position", [[0, -1], [2, 8]], "position must be in [0, 8), got -1."),
])  # fmt: skip
def test_values_out_of_range_are_refused(
    path: str, name: str, values: list[Any], sentence: str
) -> None:
    e = cases.expert_operands(4, 2, 5, 6)
    wrong = torch.tensor(values, dtype=torch.int32)
    error = RuntimeError if path in cpu_native.LEVELS else ValueError
    with pytest.raises(error) as caught:
        if name == "position":
            ops.combine_experts(torch.ones(8, 3), wrong, torch.ones(2, 2))
        else:
            changed = e._replace(**{name: wrong})
            ops.grouped_gemm_s8(*changed[:5], rows=changed.rows)
    op = "combine_experts" if name == "position" else "grouped_gemm_s8"
    assert str(caught.value).splitlines()[0] == f"{op}: {sentence}"


def layer(
    x: Tensor, chosen: Tensor, weights: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor
) -> Tensor:
    """A layer of experts, from its input to the sum of its results."""
    order, position, offsets = reference.sort_by_expert(chosen, w_q.shape[0])
    x_q, x_scale = ops.quantize(x)
    rows = order // chosen.shape[1]
    y = ops.grouped_gemm_s8(
        x_q, w_q, x_scale[rows], w_scale, offsets, rows=rows, bias=bias, out_dtype=x.dtype
    )
    return ops.combine_experts(y, position, weights)


def layer_arguments(tokens: int) -> tuple[Tensor, ...]:
    e = cases.expert_operands(tokens, 6, 14, 26, choices=3)
    chosen = torch.randint(-1, 8, (tokens, 3), generator=cases.generator(tokens))
    x = cases.activations(tokens, 26, torch.bfloat16)
    return x, chosen, e.weights.bfloat16(), e.w_q, e.w_scale, e.bias


@pytest.mark.parametrize("compiled_kernels", [True, False])
def test_one_graph_serves_every_number_of_tokens(compiled_kernels: bool) -> None:
    torch._dynamo.reset()
    serving = contextlib.nullcontext() if compiled_kernels else backends.kernels_in_python()
    with serving:
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
        for tokens in (7, 11, 33, 2):
            arguments = layer_arguments(tokens)
            assert_bitwise_equal(compiled(*arguments), layer(*arguments), f"{tokens} tokens")
        assert counter.frame_count == 1
        for tokens in (0, 1):
            arguments = layer_arguments(tokens)
            assert_bitwise_equal(compiled(*arguments), layer(*arguments), f"{tokens} tokens")


def test_a_layer_equals_one_token_at_a_time(path: str) -> None:
    arguments = layer_arguments(13)
    y = layer(*arguments)
    for t in range(13):
        own = (*(a[t : t + 1] for a in arguments[:3]), *arguments[3:])
        assert_bitwise_equal(layer(*own), y[t : t + 1], f"token {t}")


SAVES = """
import sys, torch
from tests.ops.test_expert_ops import layer, layer_arguments
from smoothquant_kernels.backends import cpu_native
torch.save((cpu_native.level(), layer(*layer_arguments(29))), sys.argv[1])
"""


@pytest.mark.parametrize("choice", ["portable", "onednn"])
def test_the_environments_choices_give_the_same_bits(choice: str, tmp_path: Path) -> None:
    if choice == "portable" and choice not in cpu_native.levels_here():
        pytest.skip("no CPU library")
    file = tmp_path / "y.pt"
    done = subprocess.run(
        [sys.executable, "-c", SAVES, str(file)], capture_output=True, text=True,
        env={**os.environ, "SMOOTHQUANT_KERNELS_CPU": choice}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    level, y = torch.load(file)
    assert level == ("" if choice == "onednn" else choice)
    assert_bitwise_equal(y, layer(*layer_arguments(29)))
