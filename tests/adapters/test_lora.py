"""LoRA adapters of peft on quantized layers: attached, loaded, run, switched, trained and removed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smoothquant_kernels import (
    SmoothQuantConfig,
    SmoothQuantError,
    W8A8Linear,
    load_quantized,
    quantize_model,
    register_transformers,
    save_quantized,
    smooth_and_quantize,
)
from smoothquant_kernels.schemes import ACTIVATION_SCHEMES
from tests.support.models import logits, make_model, token_batches

FAMILIES = ("llama", "gpt2", "opt", "qwen2")
IDS = token_batches(1, 9)[0]
#: Smooths every layer and folds nothing, so that every layer's input is that of the float model.
APART = SmoothQuantConfig(folding="never", only_where_better=False)


def config(**options: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"r": 4, "target_modules": "all-linear", **options})


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Gives adapters random values. peft's initial lora_B is zero, so a fresh adapter has no effect."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= 1.3
        elif "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


def float_adapter(model: nn.Module, folder: Path, **options: Any) -> Any:
    """The float model with a random adapter, which is also written to `folder`."""
    from peft import get_peft_model

    made = get_peft_model(copy.deepcopy(model), config(**options))
    randomize(made)
    made.save_pretrained(folder)
    return made


def quantized(model: nn.Module, **options: Any) -> nn.Module:
    made = copy.deepcopy(model)
    return smooth_and_quantize(
        made, token_batches(2, 16), config=APART.replace(**options), progress=False
    )


def relative(found: Tensor, right: Tensor) -> float:
    return float((found - right).norm() / right.norm())


def adapter_keys(model: nn.Module) -> list[tuple[str, torch.Size]]:
    from peft import get_peft_model_state_dict

    return sorted((name, t.shape) for name, t in get_peft_model_state_dict(model).items())


# --- adapters of the float model ------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # peft corrects it for GPT-2
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_of_the_float_model(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    from peft import PeftModel, get_peft_model

    model = make_model(family)
    right = float_adapter(model, tmp_path, **options)
    base = quantized(model)
    before, start = logits(base, IDS), logits(model, IDS)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    # The int8 layers move the logits by at most 2 % here, with or without the adapter, which moves them by some 100 %.
    assert relative(before, start) < 0.03
    assert relative(logits(right, IDS), start) > 0.3
    assert relative(logits(loaded, IDS), logits(right, IDS)) < 0.03
    assert adapter_keys(loaded) == adapter_keys(right)
    fresh = get_peft_model(quantize_model(make_model(family)), config(**options))
    assert adapter_keys(fresh) == adapter_keys(right)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded, IDS), before)
    assert torch.equal(logits(loaded.unload(), IDS), before)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_goes_back_to_the_float_model(family: str, tmp_path: Path) -> None:
    from peft import PeftModel, get_peft_model

    model = make_model(family)
    made = get_peft_model(quantized(model), config())
    randomize(made)
    made.save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    assert relative(logits(back, IDS), logits(made, IDS)) < 0.03
    assert relative(logits(back, IDS), logits(model, IDS)) > 0.3


@pytest.mark.parametrize("scheme", ACTIVATION_SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_layer_computes(scheme: str, dtype: torch.dtype) -> None:
    from peft import get_peft_model

    model = quantized(make_model("opt", dtype=dtype), activation_scheme=scheme)
    made = get_peft_model(model, config(r=3, lora_alpha=5, target_modules=["fc1"])).eval()
    randomize(made)
    layer = made.base_model.model.model.decoder.layers[1].fc1
    base, a, b = layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]
    assert isinstance(base, W8A8Linear) and a.weight.dtype == torch.float32
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = layer(x)
    right = (base(x) + b(a(x.float())) * (5 / 3)).to(dtype)
    assert found.dtype == dtype and torch.equal(found, right)
    # x itself reaches lora_A, which may matter to code that hands over more than a tensor
    seen: list[Any] = []
    a.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    layer(x)
    assert (seen[0] is x) == (dtype == torch.float32)


# --- several adapters --------------------------------------------------------------------------------------


def test_adapters_are_switched_and_mixed_in_a_batch(tmp_path: Path) -> None:
    from peft import PeftModel, get_peft_model

    model = make_model("llama")
    for seed, name in enumerate(("one", "two")):
        made = get_peft_model(copy.deepcopy(model), config())
        randomize(made, seed)
        made.save_pretrained(tmp_path / name)
    base = quantized(model)
    plain = logits(base, IDS)
    both = PeftModel.from_pretrained(base, tmp_path / "one", adapter_name="one")
    one = logits(both, IDS)
    both.load_adapter(tmp_path / "two", adapter_name="two")
    assert torch.equal(logits(both, IDS), one)
    both.set_adapter("two")
    two = logits(both, IDS)
    assert relative(two, one) > 0.3
    both.set_adapter("one")
    assert torch.equal(logits(both, IDS), one)
    with torch.no_grad():
        mixed = both(IDS, adapter_names=["two", "__base__"]).logits
    # The adapters' float products may add in another order for another number of rows.
    assert torch.allclose(mixed, torch.stack([two[0], plain[1]]), rtol=1e-3, atol=1e-3)
    both.delete_adapter("one")
    both.set_adapter("two")
    assert torch.equal(logits(both, IDS), two)


# --- whole models from files --------------------------------------------------------------------------------


def test_loaded_models_take_adapters(tmp_path: Path) -> None:
    import transformers
    from peft import PeftModel

    register_transformers()
    model = make_model("llama")
    float_adapter(model, tmp_path / "adapter")
    base = quantized(model)
    save_quantized(base, tmp_path / "model")
    right = logits(PeftModel.from_pretrained(base, tmp_path / "adapter"), IDS)
    for loaded in (
        load_quantized(tmp_path / "model"),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
    ):
        made = PeftModel.from_pretrained(loaded, tmp_path / "adapter")
        assert torch.equal(logits(made, IDS), right)


def test_load_adapter_of_transformers(tmp_path: Path) -> None:
    """It attaches without a wrapper."""
    from peft import PeftModel

    model = make_model("llama")
    float_adapter(model, tmp_path)
    right = logits(PeftModel.from_pretrained(quantized(model), tmp_path), IDS)
    other: Any = quantized(model)
    other.load_adapter(str(tmp_path))
    assert torch.equal(logits(other, IDS), right)


def test_a_model_with_its_adapter_is_saved(tmp_path: Path) -> None:
    from peft import get_peft_model

    made = get_peft_model(quantize_model(make_model("llama")), config())
    randomize(made)
    with pytest.warns(UserWarning, match="a float PeftModel"):
        save_quantized(made, tmp_path)
    loaded = load_quantized(tmp_path, model=get_peft_model(make_model("llama"), config()))
    assert torch.equal(logits(loaded, IDS), logits(made, IDS))


def test_a_model_quantized_below_its_adapter() -> None:
    from peft import get_peft_model

    made = get_peft_model(make_model("llama"), config())
    randomize(made)
    right = logits(made, IDS)
    quantize_model(made)
    found = logits(made, IDS)
    assert 0 < relative(found, right) < 0.03
    with pytest.raises(SmoothQuantError, match="14 int8 layers"):
        made.merge_adapter()
    assert torch.equal(logits(made, IDS), found)


def test_a_float_model_is_treated_as_before(tmp_path: Path) -> None:
    model = make_model("llama")
    made = float_adapter(model, tmp_path)
    before = logits(made, IDS)
    merged = logits(made.merge_and_unload(), IDS)
    assert torch.allclose(merged, before, rtol=1e-3, atol=1e-3)


# --- training -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_dropout": 0.1}], ids=str)
def test_an_adapter_is_trained(options: dict[str, Any]) -> None:
    from peft import get_peft_model, prepare_model_for_kbit_training

    base = quantized(make_model("llama"))
    state = {name: t.clone() for name, t in base.state_dict().items()}
    made = get_peft_model(prepare_model_for_kbit_training(base), config(**options)).train()
    trained = {n: p for n, p in made.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    optimizer = torch.optim.Adam(trained.values(), lr=1e-2)
    torch.manual_seed(0)
    losses = []
    for _ in range(8):
        loss = made(IDS, labels=IDS).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    left = made.unload().state_dict()
    assert all(torch.equal(left[name], t) for name, t in state.items())


def test_the_gradient_is_nearly_that_of_the_float_model(tmp_path: Path) -> None:
    from peft import PeftModel

    model = make_model("llama")
    right = float_adapter(model, tmp_path)
    made = PeftModel.from_pretrained(quantized(model), tmp_path, is_trainable=True)
    grads = []
    for each in (right, made):
        each.eval()(IDS, labels=IDS).loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in each.parameters() if p.grad is not None]))
    assert relative(grads[1], grads[0]) < 0.1


def test_compile_without_a_break() -> None:
    from peft import get_peft_model

    torch._dynamo.reset()
    made = get_peft_model(quantized(make_model("llama")), config()).eval()
    randomize(made)
    compiled = torch.compile(made, fullgraph=True, backend="eager")
    assert torch.equal(logits(compiled, IDS), logits(made, IDS))
