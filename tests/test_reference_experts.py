"""The order of the choices by expert in plain loops, and the weighted sum in fractions."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from smoothquant_kernels import reference
from tests.support import cases
from tests.support.compare import assert_all_bitwise_equal, assert_bitwise_equal


def sorted_by_expert(chosen: list[list[int]], experts: int) -> tuple[list[int], list[int]]:
    """`order` and `offsets`: every expert takes its choices in turn, and what nobody takes comes last."""
    flat = list(itertools.chain(*chosen))
    order: list[int] = []
    offsets = [0]
    for e in range(experts):
        order += [i for i, choice in enumerate(flat) if choice == e]
        offsets.append(len(order))
    return order + [i for i, choice in enumerate(flat) if not 0 <= choice < experts], offsets


def check_sort(chosen: Tensor, experts: int) -> None:
    order, position, offsets = reference.sort_by_expert(chosen, experts)
    wanted_order, wanted_offsets = sorted_by_expert(chosen.tolist(), experts)
    assert {t.dtype for t in (order, position, offsets)} == {torch.int32}
    assert order.tolist() == wanted_order and offsets.tolist() == wanted_offsets
    assert position.shape == chosen.shape
    # A choice stands where `order` has it.
    assert order[position.flatten().long()].tolist() == list(range(chosen.numel()))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("tokens", "choices", "experts"), [
    (0, 2, 3), (1, 1, 1), (1, 8, 64), (7, 3, 1), (40, 2, 3), (33, 8, 256), (5, 1, 1024),
])  # fmt: skip
def test_choices_are_sorted_by_expert_and_stay_in_order(
    tokens: int, choices: int, experts: int, dtype: torch.dtype
) -> None:
    g = cases.generator(tokens + experts)
    check_sort(torch.randint(0, experts, (tokens, choices), generator=g, dtype=dtype), experts)
    # Choices of experts elsewhere: far below 0, -1, E and far above.
    elsewhere = torch.tensor([-(2**31), -1, experts, 2**31 - 1]).to(dtype)
    names = torch.cat([torch.arange(experts, dtype=dtype), elsewhere])
    check_sort(names[torch.randint(0, len(names), (tokens, choices), generator=g)], experts)


def test_equal_choices_of_a_large_batch_stay_in_order() -> None:
    """Beyond the sizes below which a sort might be stable without being asked."""
    chosen = torch.randint(0, 3, (5000, 4), generator=cases.generator(1))
    check_sort(chosen, 3)


def test_all_choices_may_be_elsewhere() -> None:
    order, position, offsets = reference.sort_by_expert(torch.tensor([[3, -1], [9, 3]]), 3)
    assert order.tolist() == [0, 1, 2, 3] and position.tolist() == [[0, 1], [2, 3]]
    assert offsets.tolist() == [0, 0, 0, 0]


def test_views_are_sorted() -> None:
    check_sort(torch.arange(12).view(3, 4).t() % 3, 3)


def test_one_graph_serves_every_number_of_tokens() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        reference.sort_by_expert, fullgraph=True, backend=counter, dynamic=True
    )
    for tokens in (5, 9, 40):
        chosen = torch.randint(-1, 7, (tokens, 3), generator=cases.generator(tokens))
        assert_all_bitwise_equal(compiled(chosen, 6), reference.sort_by_expert(chosen, 6))
    assert counter.frame_count == 1


def test_meta_tensors_have_the_real_shapes() -> None:
    found = reference.sort_by_expert(torch.empty(7, 3, dtype=torch.int64, device="meta"), 4)
    assert [tuple(t.shape) for t in found] == [(21,), (7, 3), (5,)]
    assert all(t.is_meta and t.dtype == torch.int32 for t in found)


# --- the weighted sum ---------------------------------------------------------------------------


def nearest(value: Fraction) -> float:
    """The float32 nearest to a fraction, of two equally near ones that with an even significand."""
    if value == 0:
        return 0.0
    exponent = max(math.frexp(float(value))[1] - 24, -149)
    step = Fraction(2) ** exponent
    return float(round(value / step) * step)  # `round` takes the even of two


def combined(y: Tensor, position: Tensor, weights: Tensor) -> Tensor:
    rows, found = y.double().tolist(), torch.empty(len(position), y.shape[1])
    for t, (places, factors) in enumerate(
        zip(position.tolist(), weights.double().tolist(), strict=True)
    ):
        for n in range(y.shape[1]):
            total = 0.0
            for place, factor in zip(places, factors, strict=True):
                total = nearest(Fraction(factor) * Fraction(rows[place][n]) + Fraction(total))
            found[t, n] = total
    return found.to(y.dtype)


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("weights_dtype", cases.FLOATS)
@pytest.mark.parametrize("choices", [1, 2, 5])
def test_the_weighted_sum_is_rounded_once_for_each_choice(
    dtype: torch.dtype, weights_dtype: torch.dtype, choices: int
) -> None:
    g = cases.generator(choices)
    y = cases.activations(30, 11, dtype, choices)
    position = torch.randint(0, 30, (9, choices), generator=g, dtype=torch.int32)
    weights = torch.rand(9, choices, generator=g).to(weights_dtype)
    found = reference.combine_experts(y, position, weights)
    assert_bitwise_equal(found, combined(y, position, weights))


def test_the_order_of_the_choices_shows() -> None:
    """Large, small, large again: the small one survives only as the last."""
    y, one = torch.tensor([[1e8], [1.0], [-1e8]]), torch.ones(1, 3)
    for order, expected in (([0, 1, 2], 0.0), ([0, 2, 1], 1.0)):
        position = torch.tensor([order], dtype=torch.int32)
        assert reference.combine_experts(y, position, one).item() == expected


def test_products_are_not_rounded() -> None:
    """(1 + 2^-12)^2 - 1 - 2^-11 is 2^-24 with a fused multiply-add, and 0 with two roundings."""
    near_one = 1 + 2**-12
    y = torch.tensor([[-1.0 - 2**-11], [near_one]])
    weights = torch.tensor([[1.0, near_one]])
    position = torch.tensor([[0, 1]], dtype=torch.int32)
    assert reference.combine_experts(y, position, weights).item() == 2**-24


def test_zeros_keep_their_sign_and_nan_and_inf_stay() -> None:
    y = torch.tensor([[-0.0, 0.0, torch.nan, torch.inf, torch.inf], [-0.0, -0.0, 1, 1, -torch.inf]])
    position = torch.tensor([[0, 1], [0, 0]], dtype=torch.int32)
    found = reference.combine_experts(y, position, torch.tensor([[1.0, 1.0], [1.0, 0.0]]))
    nan, inf = torch.nan, torch.inf
    wanted = torch.tensor([[-0.0, 0.0, nan, inf, nan], [-0.0, 0.0, nan, nan, nan]])
    assert_bitwise_equal(found, wanted)
