"""Digests equal those of the previous release, so that its interrupted work resumes and is not refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smoothquant_kernels.search.result import fingerprint
from smoothquant_kernels.storage.digests import (
    file_entry,
    tensor_bytes,
    tensors_digest,
    write_pieces,
)
from smoothquant_kernels.storage.safetensors import join_safetensors, write_safetensors
from smoothquant_kernels.streaming.work import digest_of

BATCHES: list[dict[str, Tensor]] = [
    {
        "input_ids": torch.arange(6).reshape(2, 3),
        "attention_mask": torch.tensor([[True, True, False], [True, True, True]]),
    },
    {
        "pixel_values": torch.linspace(-1, 1, 5).to(torch.bfloat16),
        "empty": torch.empty(0, 3),
        "strided": torch.arange(6.0).reshape(2, 3).T,
        "scalar": torch.tensor(2.5, dtype=torch.float64),
    },
]


@pytest.fixture
def model() -> nn.Module:
    linear = nn.Linear(3, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.arange(6.0).reshape(2, 3))
        linear.bias.copy_(torch.tensor([0.5, -0.5]))
    return linear


def test_the_digest_of_calibration_data() -> None:
    expected = "73d5b958c3ece71da01afaff4cfffa6eeb105995ae63052d8365021364184e94"
    assert digest_of(BATCHES) == expected
    assert digest_of([dict(reversed(batch.items())) for batch in BATCHES]) == expected
    assert digest_of(BATCHES[::-1]) != expected


@pytest.mark.parametrize(
    ("batches", "settings", "expected"),
    [
        (
            BATCHES,
            {"b": [1, 2], "a": "\u00fc"},
            "5a59069d6e75406cd7931499e8f7e7bc161057fdd4fe3dea5566f6767fc7492c",
        ),
        ([], None, "8dce96f8d25f4c9c5aeaf96815fe03dbc5f8eaa97b60e8646d3279eef60acbee"),
    ],
)
def test_the_fingerprint_of_a_search(
    batches: list[dict[str, Tensor]], settings: Any, expected: str, model: nn.Module
) -> None:
    assert fingerprint(model, batches, settings) == expected


def test_the_digests_of_weight_files(tmp_path: Path) -> None:
    first, second, both = (tmp_path / name for name in ("first", "second", "both"))
    tensors = {
        "a": torch.arange(5, dtype=torch.int8),
        "b": torch.arange(32.0).reshape(4, 8).T,
        "e": torch.empty(0, 2),
        "s": torch.tensor(True),
    }
    for file, entry, expected in (
        (
            first,
            write_safetensors(first, tensors),
            (454, "f11f64c2ca2fa7447b0ec52317b41d2d50d3c3fb581d38adfca474eebac174a4"),
        ),
        (
            second,
            write_safetensors(second, {"z": torch.ones(3, dtype=torch.bfloat16)}, {"k": "v"}),
            (134, "06ba9c62f1d8fb2ebd6d9e057f17fe17aac564a114bbe03d4d5456c837877827"),
        ),
        (
            both,
            join_safetensors(both, [first, second]),
            (524, "5d05c5b08ac14b2d84834bb7c327b5a46df571c2d1ad5c13da8dc71b60e4c688"),
        ),
    ):
        assert (entry["size"], entry["sha256"]) == expected
        assert file_entry(file) == entry


def test_the_label_and_the_start_change_the_digest() -> None:
    one, empty = torch.ones(1), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert tensors_digest([]) == empty
    found = [tensors_digest(x, s) for x in ([("a", one)], [("b", one)]) for s in ("", "s")]
    assert len({*found, empty}) == 5


def test_bytes_of_a_tensor_are_its_elements_row_by_row() -> None:
    t = torch.arange(6, dtype=torch.int16).reshape(2, 3)
    assert tensor_bytes(t).tobytes() == b"".join(i.to_bytes(2, "little") for i in range(6))
    assert tensor_bytes(t.T).tobytes() == tensor_bytes(t.T.contiguous()).tobytes()
    assert tensor_bytes(t[:0]).nbytes == 0
    assert tensor_bytes(torch.ones(1, requires_grad=True)).nbytes == 4


def test_pieces_are_written_and_digested_in_order(tmp_path: Path) -> None:
    pieces = [
        b"ab",
        tensor_bytes(torch.empty(0)),
        tensor_bytes(torch.tensor([99], dtype=torch.uint8)),
    ]
    entry = write_pieces(tmp_path / "file", pieces)
    assert (tmp_path / "file").read_bytes() == b"abc"
    assert entry == file_entry(tmp_path / "file") and entry["size"] == 3
