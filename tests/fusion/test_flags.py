"""`optimize=True`, and what else may happen to an optimized model: saved, copied, pickled, moved, loaded into."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from smoothquant_kernels import (
    SmoothQuantConfig,
    W8A8Linear,
    fusion_info,
    fusion_spills,
    load_quantized,
    optimize_for_inference,
    quantize_model,
    register_transformers,
    save_quantized,
    smooth_and_quantize,
    undo_optimization,
)
from smoothquant_kernels.fusion import optimize
from smoothquant_kernels.fusion.record import fused_forwards
from tests.support import checkpoints, compressed_tensors
from tests.support.checkpoints import (
    IDS,
    assert_same_state,
    auto,
    contents,
    llama,
    logits,
    quantized,
    refusal,
)

CONFIG = SmoothQuantConfig(alpha=0.75)


@pytest.fixture(scope="module")
def plain() -> Any:
    return quantized(scheme="per_token")


@pytest.fixture(scope="module")
def optimized(plain: Any) -> Any:
    return optimize_for_inference(copy.deepcopy(plain))


def float_model() -> Any:
    torch.manual_seed(0)
    return llama()


def attention(model: Any) -> Any:
    return model.model.layers[0].self_attn


def is_merged(model: Any) -> bool:
    layers = attention(model)
    return len({m.w_q.untyped_storage().data_ptr() for m in (layers.q_proj, layers.k_proj)}) == 1


# --- optimize=True ----------------------------------------------------------------------------------------------------


def test_quantize_model_and_smooth_and_quantize(optimized: Any) -> None:
    both = smooth_and_quantize(float_model(), [IDS], CONFIG, progress=False, optimize=True)
    assert fusion_info(both) == fusion_info(optimized)
    assert any(layer.residual for layer in fusion_info(both))
    assert torch.equal(logits(both), logits(optimized))
    alone = quantize_model(float_model(), optimize=True)
    assert len(fusion_info(alone)) == len(fusion_info(both)) and is_merged(alone)


def test_a_checkpoint_does_not_tell_whether_the_model_was_optimized(
    plain: Any, optimized: Any, tmp_path: Path
) -> None:
    assert_same_state(optimized, plain)
    a, b = (save_quantized(m, tmp_path / n) for m, n in ((plain, "a"), (optimized, "b")))
    assert contents(a) == contents(b)
    loaded = load_quantized(b, optimize=True)
    assert fusion_info(loaded) == fusion_info(optimized) and is_merged(loaded)
    assert torch.equal(logits(loaded), logits(optimized))
    assert_same_state(loaded, plain)
    unchanged = load_quantized(b)
    assert not fusion_info(unchanged) and torch.equal(logits(unchanged), logits(plain))


@pytest.mark.skipif(checkpoints.RELEASE_4, reason="release 4 loads such folders another way")
def test_save_pretrained_writes_the_merged_weights(
    plain: Any, optimized: Any, tmp_path: Path
) -> None:
    for name, model in (("a", plain), ("b", optimized)):
        model.save_pretrained(tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    register_transformers()
    loaded = auto(tmp_path / "b")
    assert torch.equal(logits(loaded), logits(plain))
    assert torch.equal(logits(optimize_for_inference(loaded)), logits(optimized))


def test_a_folder_of_compressed_tensors(tmp_path: Path) -> None:
    config = compressed_tensors.quantization_config()
    model = compressed_tensors.llama()

    def scheme_of(name: str) -> tuple[str, str] | None:
        return None if name == "lm_head" else ("per_token", "channel")

    compressed_tensors.write(tmp_path, model, scheme_of, config)
    loaded = load_quantized(tmp_path, optimize=True)
    assert is_merged(loaded) and not loaded.training
    expected = optimize_for_inference(load_quantized(tmp_path))
    assert torch.equal(logits(loaded), logits(expected))


# --- a failure changes nothing ----------------------------------------------------------------------------------------


def attributes(model: nn.Module) -> dict[str, Any]:
    """Everything that a load or an optimization could change; tensors with their values."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            held = value if isinstance(value, dict) else {"": value}
            for leaf, v in held.items():
                found[f"{name}.{key}.{leaf}"] = (id(v), v.clone() if isinstance(v, Tensor) else v)
    return found


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = attributes(model)
    assert after.keys() == before.keys()
    for name, (identity, value) in before.items():
        new = after[name][1]
        if isinstance(value, Tensor):
            assert after[name][0] == identity and torch.equal(new, value), name
        else:
            assert new is value or new == value, name


CALLS: dict[str, Callable[[Any], object]] = {
    "quantize_model": lambda model: quantize_model(model, optimize=True),
    "smooth_and_quantize": lambda model: smooth_and_quantize(
        model, [IDS], CONFIG, progress=False, optimize=True
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_quantizing_is_undone_if_optimizing_fails(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimize, "MOST_CHANGE", -1.0)
    model = float_model()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    places, expected = attributes(model), logits(model)
    assert "would change the outputs" in refusal(lambda: CALLS[name](model))
    assert not any(isinstance(m, W8A8Linear) for m in model.modules())
    assert not fused_forwards(model) and not fusion_info(model)
    assert attributes(model).keys() == places.keys()
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    assert torch.equal(logits(model), expected)


def test_loading_into_a_model_is_undone_if_optimizing_fails(
    plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_quantized(plain, tmp_path / "q")
    model = float_model().train()
    before = attributes(model)
    with monkeypatch.context() as patch:
        patch.setattr(optimize, "MOST_CHANGE", -1.0)
        said = refusal(lambda: load_quantized(tmp_path / "q", model=model, optimize=True))
        assert "would change the outputs" in said
    assert_unchanged(model, before)
    assert getattr(model.config, "quantization_config", None) is None
    loaded = load_quantized(tmp_path / "q", model=model, optimize=True)
    assert loaded is model and fusion_info(model)


class Particular(nn.Module):
    """Accepts an argument that nobody can guess."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.linear = nn.Linear(16, 16)

    def forward(self, pair: Any) -> Tensor:
        if not isinstance(pair, tuple):
            raise TypeError("a pair, please")
        y: Tensor = self.linear(self.norm(pair[0] + pair[1]))
        return y


def test_a_model_without_a_sample_is_told_what_to_do(tmp_path: Path) -> None:
    said = refusal(lambda: quantize_model(Particular(), optimize=True))
    save_quantized(quantize_model(Particular()), tmp_path / "q")
    model = Particular()
    before = attributes(model)
    assert said == refusal(lambda: load_quantized(tmp_path / "q", model=model, optimize=True))
    assert said == (
        "no input was found that Particular accepts: pass `sample`, a dict of its arguments, to "
        "optimize_for_inference (load or quantize without optimize=True)."
    )
    assert_unchanged(model, before)


# --- an optimized model is a model like any other ---------------------------------------------------------------------


def test_a_copy_has_forwards_and_tensors_of_its_own(optimized: Any) -> None:
    copied = copy.deepcopy(optimized)
    modules = set(copied.modules())
    assert all(f.module in modules for f in fused_forwards(copied).values())
    assert fused_forwards(copied).keys() == fused_forwards(optimized).keys()
    expected = logits(optimized)
    attention(copied).q_proj.w_scale.mul_(2)  # in place: seen by the copy, not by the original
    assert not torch.equal(logits(copied), expected)
    assert torch.equal(logits(optimized), expected) and is_merged(copied)


def test_pickles(optimized: Any) -> None:
    buffer = io.BytesIO()
    torch.save(optimized, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert is_merged(loaded) and fusion_info(loaded) == fusion_info(optimized)
    assert torch.equal(logits(loaded), logits(optimized))
    assert_same_state(undo_optimization(loaded), optimized)


def test_another_type(plain: Any, optimized: Any) -> None:
    later = copy.deepcopy(optimized).to(torch.bfloat16)
    expected = optimize_for_inference(copy.deepcopy(plain).to(torch.bfloat16))
    got = logits(later)
    assert got.dtype == torch.bfloat16 and torch.equal(got, logits(expected))
    assert is_merged(later) and not fusion_spills(later)


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("scheme", ["per_token", "static"])
def test_another_state_is_loaded(scheme: str, assign: bool) -> None:
    torch.manual_seed(1)
    # Zero factors more or less would be another structure, so neither model has any.
    options = {"scheme": scheme, "smooth": False}
    other = quantized(lambda: llama(initializer_range=0.3), **options)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    model = optimize_for_inference(quantized(**options))
    before = logits(model)
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    assert_same_state(model, other)
    got = logits(model)
    assert not torch.equal(got, before) and not fusion_spills(model)
    assert torch.equal(got, logits(optimize_for_inference(other))) and is_merged(model)


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_a_state_whose_scales_forbid_the_merged_gemm_is_refused(assign: bool) -> None:
    other = quantized()
    attention(other).k_proj.x_scale.mul_(3)
    model = optimize_for_inference(quantized())
    state = copy.deepcopy(other.state_dict())
    model.load_state_dict(state, assign=assign)
    said = refusal(lambda: logits(model))
    assert "layers that optimize_for_inference made one GEMM" in said
    undo_optimization(model).load_state_dict(state, assign=assign)
    assert torch.equal(logits(model), logits(other))
    assert all(not m._load_state_dict_post_hooks for m in model.modules())


def test_training_mode_is_refused(optimized: Any) -> None:
    model = copy.deepcopy(optimized).train()
    said = refusal(lambda: model(input_ids=IDS))
    assert said.endswith("call model.eval(), or undo_optimization(model) before training.")
    undo_optimization(model)(input_ids=IDS)
    assert isinstance(model, transformers.LlamaForCausalLM)
