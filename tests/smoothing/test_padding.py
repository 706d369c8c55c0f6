"""Padding: a mask excludes rows only in the layers that read its positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor, nn

from smoothquant_kernels import calibrate_model
from smoothquant_kernels.modeling.run import evaluating, run
from smoothquant_kernels.modeling.view import ModelView
from smoothquant_kernels.smoothing.padding import OUTPUT, Padding
from tests.support.models import LLAMA_LIKE, VOCAB, make_model, small_t5

ROWS, LENGTH = 3, 16
SMALL: dict[str, Any] = {**LLAMA_LIKE, "num_hidden_layers": 1, "max_position_embeddings": LENGTH}
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


def ids(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCAB, (ROWS, LENGTH), generator=generator)


def mask(padding: int, *, left: bool = False, length: int = LENGTH) -> Tensor:
    """A mask with no padding in the first row and this much in the others."""
    result = torch.ones(ROWS, length, dtype=torch.long)
    result[1:, slice(0, padding) if left else slice(length - padding, length)] = 0
    return result


def by_hand(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The input of every linear."""
    seen: dict[str, Tensor] = {}
    linears = ModelView(model).linears

    def hook(name: str) -> Any:
        return lambda _, args: seen.update({name: args[0].detach()})

    handles = [m.register_forward_pre_hook(hook(n)) for n, m in linears.items()]
    with evaluating(model):
        model(**batch)
    for handle in handles:
        handle.remove()
    return seen


def absmax(x: Tensor, keep: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return (rows if keep is None else rows[keep.flatten().bool()]).abs().amax(0)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_each_text_of_an_encoder_decoder_has_its_own_mask(left: bool, own: bool) -> None:
    """Source and target are equally long. Keys and values of the cross attention read the source."""
    model, source, target = small_t5(), mask(7, left=left), mask(4, left=left)
    batch = {"input_ids": ids(), "attention_mask": source, "decoder_input_ids": ids(1)}
    batch |= {"decoder_attention_mask": target} if own else {}
    got = calibrate_model(model, [batch], progress=False).absmax
    inputs = by_hand(model, batch)
    for name, x in inputs.items():
        reads_source = name.startswith("encoder.") or name.endswith(
            ("EncDecAttention.k", "EncDecAttention.v")
        )
        keep = source if reads_source else (target if own else None)
        assert torch.equal(got[name], absmax(x, keep)), name


def bert(kind: Any, config: Any, **more: Any) -> nn.Module:
    return kind(config(**{**SMALL, **more}))  # type: ignore[no-any-return]


def esm() -> nn.Module:
    """A model whose embeddings of padding are zero."""
    more = {"pad_token_id": 0, "token_dropout": True, "mask_token_id": 5}
    return bert(t.EsmModel, t.EsmConfig, max_position_embeddings=LENGTH + 1, **more)


def roberta() -> nn.Module:
    """A model that never uses two positions of its table, so a longer text does not fit."""
    return bert(t.RobertaModel, t.RobertaConfig, max_position_embeddings=LENGTH + 2, pad_token_id=1)


def xlnet() -> nn.Module:
    """A model whose tensors have positions first and batch rows second."""
    config = t.XLNetConfig(vocab_size=VOCAB, d_model=32, n_layer=1, n_head=4, d_inner=48)
    return t.XLNetLMHeadModel(config)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(
    ("make", "others"),
    [
        (lambda: make_model("llama"), set()),
        (lambda: make_model("opt"), set()),
        (lambda: make_model("gpt2"), set()),
        (lambda: bert(t.BertModel, t.BertConfig), {"pooler.dense"}),
        (esm, {"pooler.dense"}),
        (roberta, {"pooler.dense"}),
        (xlnet, set()),
    ],
    ids=["llama", "opt", "gpt2", "bert", "esm", "roberta", "xlnet"],
)
def test_models_that_read_one_text(make: Any, others: set[str], left: bool) -> None:
    model = make()
    batch = {"input_ids": ids(), "attention_mask": mask(6, left=left)}
    got = calibrate_model(model, [batch], progress=False).absmax
    assert got.keys() & others == others & set(got)
    for name, x in by_hand(model, batch).items():
        keep = batch["attention_mask"]
        keep = keep.t() if isinstance(model, t.XLNetLMHeadModel) else keep
        assert torch.equal(got[name], absmax(x, None if name in others else keep)), name


def test_images_with_as_many_patches_as_tokens_are_not_masked() -> None:
    text = t.CLIPTextConfig(**{**SMALL, "max_position_embeddings": 10}, eos_token_id=2)
    # 9 patches and the class token
    vision = t.CLIPVisionConfig(**TOWER, image_size=24, patch_size=8)
    config = t.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    model = t.CLIPModel(config)
    batch = {
        "input_ids": ids()[:, :10],
        "attention_mask": mask(4, length=10),
        "pixel_values": torch.randn(ROWS, 3, 24, 24),
    }
    got = calibrate_model(model, [batch], progress=False).absmax
    for name, x in by_hand(model, batch).items():
        masked = name.startswith("text_model.")
        assert torch.equal(got[name], absmax(x, batch["attention_mask"] if masked else None)), name


def test_patches_have_their_own_mask() -> None:
    text = t.Siglip2TextConfig(**SMALL)
    vision = t.Siglip2VisionConfig(**TOWER, patch_size=4, num_patches=LENGTH)
    model = t.Siglip2Model(
        t.Siglip2Config(text_config=text.to_dict(), vision_config=vision.to_dict())
    )
    batch = {
        "input_ids": ids(),
        "attention_mask": mask(6),
        "pixel_values": torch.randn(ROWS, LENGTH, 48),
        "pixel_attention_mask": mask(4),
        "spatial_shapes": torch.tensor([[4, 4], [3, 4], [3, 4]]),
    }
    got = calibrate_model(model, [batch], progress=False).absmax
    name = "encoder.layers.0.mlp.fc1"
    inputs = by_hand(model, batch)
    for tower, own in (("text_model", "attention_mask"), ("vision_model", "pixel_attention_mask")):
        layer = f"{tower}.{name}"
        assert torch.equal(got[layer], absmax(inputs[layer], batch[own]))


def test_sound_at_another_rate_is_not_masked() -> None:
    """The mask covers samples, but the layers read frames."""
    config = t.Wav2Vec2Config(
        **TOWER, vocab_size=32, conv_dim=(32, 32), conv_stride=(5, 2), conv_kernel=(10, 3),
        num_feat_extract_layers=2, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
    )  # fmt: skip
    model = t.Wav2Vec2Model(config)
    batch = {"input_values": torch.randn(ROWS, 400), "attention_mask": mask(100, length=400)}
    statistics = calibrate_model(model, [batch], progress=False)
    inputs = by_hand(model, batch)
    assert all(torch.equal(statistics.absmax[n], absmax(x, None)) for n, x in inputs.items())
    assert statistics.tokens == max(x.numel() // x.shape[-1] for x in inputs.values())


def learned(model: nn.Module, batch: dict[str, Tensor]) -> Padding:
    linears = ModelView(model).linears
    padding = Padding(model, linears)
    with evaluating(model):
        padding.start(batch, lambda b: run(model, b))
    return padding


def test_the_output_follows_the_decoder() -> None:
    batch = {"input_ids": ids(), "attention_mask": mask(7), "labels": ids(1)}
    assert learned(small_t5(), batch).keep(OUTPUT, torch.zeros(ROWS, LENGTH, VOCAB)) is None
    padding = learned(make_model("llama"), {"input_ids": ids(), "attention_mask": mask(7)})
    keep = padding.keep(OUTPUT, torch.zeros(ROWS, LENGTH, VOCAB))
    assert keep is not None and int(keep.sum()) == int(mask(7).sum())


class Routed(nn.Module):
    """Both experts read every token, sorted by a score of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8)
        self.gate = nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = self.gate(self.embed(input_ids)).flatten(0, 1)
        order = h[:, 0].argsort()
        return sum((expert(h[order]) for expert in self.experts), torch.zeros(()))


def test_rows_that_a_router_reordered_are_all_measured() -> None:
    model, batch = Routed(), {"input_ids": ids(), "attention_mask": mask(6)}
    got = calibrate_model(model, [batch], progress=False).absmax
    inputs = by_hand(model, batch)
    assert torch.equal(got["gate"], absmax(inputs["gate"], batch["attention_mask"]))
    assert torch.equal(got["experts.0"], absmax(inputs["experts.0"], None))


def test_an_additive_mask_is_not_padding() -> None:
    model = make_model("llama")
    zeros = torch.zeros(ROWS, LENGTH)
    zeros[1:, 5:] = -1e9
    padding = Padding(model, {})
    padding.start({"input_ids": ids(), "attention_mask": zeros}, lambda b: run(model, b))
    assert padding.keep("any", torch.zeros(ROWS, LENGTH, 8)) is None
