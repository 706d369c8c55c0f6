"""The int8 output head (`quantize_head`): its settings, its numbers, what wins over it, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor, nn

from smoothquant_kernels import (
    SmoothQuantConfig,
    SmoothQuantError,
    W8A8Linear,
    calibrate_model,
    quantize_model,
    reference,
    smooth_and_quantize,
    smooth_lm,
)
from smoothquant_kernels.modeling.view import ModelView
from smoothquant_kernels.nn.float_linear import pending_smooth
from smoothquant_kernels.schemes import ACTIVATION_SCHEMES
from tests.support.models import (
    HIDDEN,
    VOCAB,
    layers_of,
    logits,
    make_model,
    skip_reasons,
    small_t5,
    token_batches,
)
from tests.support.streams import family

DATA = token_batches()
ON = SmoothQuantConfig(quantize_head=True)


def quantized(model: nn.Module, config: SmoothQuantConfig = ON, data: Any = DATA) -> Any:
    return smooth_and_quantize(model, data, config, progress=False)


class TwoHeads(nn.Module):
    """One head is tied to the embedding and stands before the other one, which has a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.draft = nn.Module()
        self.draft.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.draft.lm_head.weight = self.embed.weight
        self.middle = nn.Linear(HIDDEN, HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.middle(self.embed(input_ids))
        return self.draft.lm_head(x), self.lm_head(x)


class ReadHead(TwoHeads):
    """Multiplies by the head's weight itself."""

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.middle(self.embed(input_ids))
        return self.draft.lm_head(x), nn.functional.linear(x, self.lm_head.weight)


def inputs_of(module: nn.Module) -> list[Tensor]:
    found: list[Tensor] = []
    module.register_forward_pre_hook(lambda _, args: found.append(args[0].detach().clone()))
    return found


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("scheme", ACTIVATION_SCHEMES)
@pytest.mark.parametrize("name", ["tied", "llama_gqa"])
def test_the_logits_are_those_of_the_reference(name: str, scheme: str, granularity: str) -> None:
    """Per token and per channel in every scheme, smoothed at run time and rotated, bit for bit."""
    model: Any = family(name)
    config = ON.replace(activation_scheme=scheme, weight_granularity=granularity)
    smooth_lm(model, DATA, config=config, progress=False)
    weight, smooth = model.lm_head.weight.detach().clone(), pending_smooth(model.lm_head)
    assert smooth is not None and smooth.shape == (HIDDEN,)
    quantize_model(model)
    head = model.lm_head
    assert (head.activation_scheme, head.weight_granularity) == ("per_token", "channel")
    rest = {m.activation_scheme for m in model.modules() if isinstance(m, W8A8Linear)}
    assert rest - {"per_token"} == {scheme} - {"per_token"}
    seen = inputs_of(head)
    got = logits(model, DATA[0])
    w_q, w_scale = reference.quantize_weight(reference.rotate_weight(weight * smooth, HIDDEN))
    x_q, x_scale = reference.quantize(seen[0], 1.0 / smooth, rotation=HIDDEN)
    expected = reference.gemm_s8(x_q, w_q, x_scale, w_scale, out_dtype=torch.float32)
    assert torch.equal(got, expected)
    assert layers_of(model)["lm_head"]["smoothing"] == "runtime"
    assert layers_of(model)["lm_head"]["alpha"] == 0.5


@pytest.mark.parametrize("name", ["tied", "llama_gqa", "opt", "gpt2"])
def test_the_other_layers_keep_their_bits(name: str) -> None:
    config = SmoothQuantConfig(activation_scheme="static")
    off, on = (quantized(family(name), config.replace(quantize_head=q)) for q in (False, True))
    assert type(off.get_output_embeddings()) is nn.Linear
    state = {n: v for n, v in on.state_dict().items() if not n.startswith("lm_head.")}
    expected = {n: v for n, v in off.state_dict().items() if not n.startswith("lm_head.")}
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(state[key], value), key
    assert skip_reasons(off) == {"lm_head": "output head: stays in float"}
    assert "lm_head" not in skip_reasons(on) and "lm_head" in layers_of(on)
    assert [la for la in on.smoothquant_info["layers"] if la["name"] != "lm_head"] == (
        off.smoothquant_info["layers"]
    )


def test_smoothing_and_rotation_of_the_head_help() -> None:
    """On activations with outliers, against the plain int8 head."""
    model: Any = family("tied")
    with torch.no_grad():
        model.model.norm.weight[[3, 17]] *= 40.0
        model.model.embed_tokens.weight[:, [3, 17]] /= 40.0
    expected = logits(model, DATA[0])
    skip = ("model.*",)
    errors = []
    for config in (ON, ON.replace(rotation="none"), ON.replace(smooth=False, rotation="none")):
        got = logits(quantized(copy.deepcopy(model), config.replace(skip=skip)), DATA[0])
        errors.append(float((got - expected).square().mean()))
    assert errors[0] < errors[1] < errors[2] and errors[0] < 0.2 * errors[2]


def test_the_head_follows_the_weight_rounding() -> None:
    nearest, gptq = (
        quantized(family("tied"), ON.replace(weight_rounding=r)).lm_head.w_q
        for r in ("nearest", "gptq")
    )
    assert (nearest != gptq).any() and (nearest.int() - gptq.int()).abs().max() <= 3


def test_a_head_can_be_quantized_alone_and_later() -> None:
    model = quantized(family("tied"), SmoothQuantConfig())
    body = model.model.layers[0].mlp.up_proj
    quantize_model(model, config=ON)
    assert type(model.lm_head) is W8A8Linear and model.model.layers[0].mlp.up_proj is body
    assert len(layers_of(model)) == 15 and not skip_reasons(model)
    alone = quantize_model(family("tied"), config=ON.replace(skip=("model.*",)))
    assert list(layers_of(alone)) == ["lm_head"]
    assert layers_of(alone)["lm_head"]["reason"] == "not smoothed"


# --- which layers are heads -------------------------------------------------------------------------------------------


def test_several_heads() -> None:
    model = TwoHeads().eval()
    quantized(model, ON.replace(activation_scheme="static"))
    schemes = {name: layer["activation_scheme"] for name, layer in layers_of(model).items()}
    heads = dict.fromkeys(("draft.lm_head", "lm_head"), "per_token")
    assert schemes == {**heads, "middle": "static"}
    assert list(schemes) == ["draft.lm_head", "middle", "lm_head"]
    assert type(model.embed) is nn.Embedding and model.embed.weight.dtype == torch.float32


def test_a_head_whose_weight_is_read_stays_in_float() -> None:
    model = ReadHead().eval()
    quantized(model)
    assert "reads its parameters from outside" in skip_reasons(model)["lm_head"]
    assert type(model.draft.lm_head) is W8A8Linear


def test_an_encoder_for_masked_words_and_an_encoder_decoder() -> None:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    bert: Any = t.BertForMaskedLM(t.BertConfig(vocab_size=VOCAB, hidden_size=HIDDEN, **sizes))
    quantized(bert.eval())
    assert type(bert.cls.predictions.decoder) is W8A8Linear
    t5: Any = small_t5().eval()
    quantized(t5, data=[{"input_ids": ids, "decoder_input_ids": ids} for ids in DATA])
    assert type(t5.lm_head) is W8A8Linear
    for model in (bert, t5):
        model.tie_weights()
        assert type(model.get_output_embeddings()) is W8A8Linear


@pytest.mark.parametrize("kind", ["BertModel", "BertForSequenceClassification"])
def test_a_model_without_a_head_is_refused_unchanged(kind: str) -> None:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    model: Any = getattr(t, kind)(t.BertConfig(vocab_size=VOCAB, hidden_size=HIDDEN, **sizes))
    before = copy.deepcopy(model.state_dict())
    for call in (
        lambda: quantized(model),
        lambda: quantize_model(model, config=ON),
        lambda: smooth_lm(model, DATA, config=ON, progress=False),
        lambda: calibrate_model(model, DATA, ON, progress=False),
    ):
        with pytest.raises(SmoothQuantError, match=f"quantize_head: {kind} has no output head"):
            call()
    assert not hasattr(model, "smoothquant_info")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    quantized(model, SmoothQuantConfig())  # a classifier is a linear like others
    if kind != "BertModel":
        assert type(model.classifier) is W8A8Linear


# --- other settings ---------------------------------------------------------------------------------------------------


def test_skip_wins() -> None:
    for pattern in ("lm_head", "*head"):
        model = quantized(family("tied"), ON.replace(skip=(pattern,)))
        assert type(model.lm_head) is nn.Linear
        assert skip_reasons(model) == {"lm_head": f"matches the skip pattern {pattern!r}"}


def test_patterns_of_schemes_do_not_reach_the_head_and_its_own_name_is_refused() -> None:
    model = quantized(family("tied"), ON.replace(schemes={"*": "static"}))
    assert model.lm_head.activation_scheme == "per_token"
    assert model.model.layers[0].mlp.up_proj.activation_scheme == "static"
    quantized(family("tied"), ON.replace(schemes={"lm_head": "per_token"}))
    model = family("tied")
    named = ON.replace(schemes={"lm_head": "static"})
    with pytest.raises(SmoothQuantError, match="schemes: 'lm_head' is static, but an int8 output"):
        quantized(model, named)
    assert not hasattr(model, "smoothquant_info") and type(model.lm_head) is nn.Linear
    quantized(model, named.replace(quantize_head=False))  # as before: without effect
    quantized(family("tied"), named.replace(skip=("lm_head",)))


def test_alpha_and_rotation_of_the_head() -> None:
    config = ON.replace(alphas={"lm_head": 0.25}, rotations={"lm_head": 8})
    model = quantized(family("tied"), config)
    layer = layers_of(model)["lm_head"]
    assert (layer["alpha"], layer["rotation"], model.lm_head.rotation) == (0.25, 8, 8)
    plain = quantized(family("tied"), ON.replace(smooth=False))
    assert plain.lm_head.inv_smooth is None and plain.lm_head.rotation == 0
    assert layers_of(plain)["lm_head"]["reason"] == "smoothing is switched off"


def test_statistics_must_have_the_head() -> None:
    model = family("tied")
    statistics = calibrate_model(model, DATA, SmoothQuantConfig(), progress=False)
    with pytest.raises(SmoothQuantError, match=r"collected without quantize_head=True, .* lm_head"):
        smooth_lm(model, statistics, config=ON)
    more = calibrate_model(model, DATA, ON, progress=False)
    assert more.counts["lm_head"] == sum(ids.numel() for ids in DATA)  # not only the last tokens
    one = smooth_lm(copy.deepcopy(model), statistics, config=SmoothQuantConfig())
    two = smooth_lm(copy.deepcopy(model), more, config=SmoothQuantConfig())
    assert one.smoothquant_info == two.smoothquant_info


def test_a_head_with_bad_weights_is_refused_and_nothing_changes() -> None:
    model: Any = make_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5, 5] = float("nan")
    with pytest.raises(SmoothQuantError, match="the weight of layer lm_head has NaN or Inf"):
        quantized(model)
    assert not hasattr(model, "smoothquant_info")
    quantized(model, SmoothQuantConfig())


def test_a_view_knows_its_int8_heads() -> None:
    model = TwoHeads()
    assert ModelView(model).int8_heads == frozenset()
    assert ModelView(model, ("draft.*",), True).int8_heads == {"lm_head"}
    assert list(ModelView(model, (), True).linears) == ["draft.lm_head", "middle", "lm_head"]
