"""A saved and reloaded model is the same, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from smoothquant_kernels import SmoothQuantConfig, W8A8Linear, quantize_model, smooth_lm
from smoothquant_kernels.checkpoint.load import load_quantized
from smoothquant_kernels.checkpoint.save import save_quantized
from smoothquant_kernels.checkpoint.skeleton import QUANT_METHOD
from smoothquant_kernels.nn.float_linear import pending_smooth
from tests.support.checkpoints import (
    IDS,
    METHOD_MAPPINGS,
    WEIGHTS,
    assert_same_bits,
    assert_same_state,
    contents,
    llama,
    logits,
    manifest_of,
    quantized,
    refusal,
)
from tests.support.models import VOCAB, make_model

SCHEMES = ("per_token", "per_tensor", "static")
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "llama_tied": lambda: llama(tie_word_embeddings=True),
    **{f: lambda f=f: make_model(f) for f in ("opt", "gpt2", "bloom", "gpt_neox")},
}


# ------------------------------------------------------------------------------ save and load again


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MODELS)
def test_a_reloaded_model_is_the_same(name: str, scheme: str, tmp_path: Path) -> None:
    before = quantized(MODELS[name], scheme)
    target = tmp_path / "model"
    assert save_quantized(before, target) == target
    after = load_quantized(target)
    assert type(after) is type(before) and not after.training
    assert_same_state(after, before)
    assert_same_bits(logits(after), logits(before))
    assert after.smoothquant_info == before.smoothquant_info
    assert not any(t.is_meta for t in (*after.parameters(), *after.buffers()))
    replaced = [n for n, m in before.named_modules() if isinstance(m, W8A8Linear)]
    assert replaced == [n for n, m in after.named_modules() if isinstance(m, W8A8Linear)] != []
    described = [m.config.quantization_config.to_dict() for m in (before, after)]
    assert described[0] == described[1]
    names = ("architectures", "dtype", "transformers_version", "_name_or_path")
    configs = [{k: v for k, v in m.config.to_dict().items() if k not in names}
               for m in (before, after)]  # fmt: skip
    assert configs[0] == configs[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
def test_half_precision(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    # .to(dtype) also rounds the rotary frequencies, which no state dict holds.
    before = quantized(lambda: MODELS[name]().to(dtype), "per_token")
    after = load_quantized(save_quantized(before, tmp_path / "model"))
    assert after.dtype == after.config.dtype == dtype
    assert_same_state(after, before)
    assert_same_bits(logits(after), logits(before))
    linear = next(m for m in after.modules() if isinstance(m, W8A8Linear))
    assert linear.w_scale.dtype == torch.float32


@pytest.mark.parametrize(
    "options", [{"folding": "never", "only_where_better": False}, {"weight_granularity": "tensor"}]
)
def test_options_of_the_layers(options: dict[str, Any], tmp_path: Path) -> None:
    before = quantized(scheme="per_token", **options)
    after = load_quantized(save_quantized(before, tmp_path / "model"))
    assert str(after) == str(before)
    linears = [m for m in after.modules() if isinstance(m, W8A8Linear)]
    smooth = [m.inv_smooth is not None for m in linears]
    assert all(smooth) if "folding" in options else linears[0].w_scale.shape == (1,)
    assert_same_bits(logits(after), logits(before))


def test_generation_is_the_same(tmp_path: Path) -> None:
    before: Any = quantized(MODELS["llama_tied"], "per_token")
    before.generation_config.max_new_tokens = 9
    before.generation_config.repetition_penalty = 1.3
    after: Any = load_quantized(save_quantized(before, tmp_path / "model"))
    assert after.generation_config.to_dict() == before.generation_config.to_dict()
    first, second = (m.generate(IDS[:1], do_sample=False) for m in (before, after))
    assert first.shape[1] > IDS.shape[1]
    assert torch.equal(first, second)


def test_attention_and_random_numbers_are_kept(tmp_path: Path) -> None:
    before = quantized(lambda: llama(attn_implementation="eager"))
    save_quantized(before, tmp_path / "model")
    state = torch.random.get_rng_state()
    after: Any = load_quantized(tmp_path / "model")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert after.config._attn_implementation == "eager"
    assert_same_bits(logits(after), logits(before))


def test_a_loaded_model_can_be_saved_over_itself(saved: Path, model: nn.Module) -> None:
    first = contents(saved)
    loaded = load_quantized(saved)
    save_quantized(loaded, saved, overwrite=True)
    assert contents(saved)[WEIGHTS] == first[WEIGHTS]
    assert_same_bits(logits(loaded), logits(model))  # the old file is deleted but still mapped
    assert_same_bits(logits(load_quantized(saved)), logits(model))


def test_changing_a_loaded_model_leaves_the_file(saved: Path, model: nn.Module) -> None:
    loaded = load_quantized(saved)
    with torch.no_grad():
        for tensor in loaded.state_dict().values():
            tensor.zero_()
    assert_same_bits(logits(load_quantized(saved)), logits(model))


def test_weights_are_mapped(tmp_path: Path) -> None:
    """Weights of the usual sizes are mapped from the file. Others are copied, and aligned as torch aligns its own."""
    model = quantized(lambda: llama(hidden_size=64, intermediate_size=128))
    loaded = load_quantized(save_quantized(model, tmp_path / "model"))
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    files = [m[0].split("-") for m in maps if m[-1] == str(tmp_path / "model" / WEIGHTS)]
    ranges = [(int(a, 16), int(b, 16)) for a, b in files]
    linears = [m for m in loaded.modules() if isinstance(m, W8A8Linear)]
    for linear in linears:
        assert any(a <= linear.w_q.data_ptr() < b for a, b in ranges)
    assert all(t.data_ptr() % 64 == 0 for t in (*loaded.parameters(), *loaded.buffers()))


def test_size(tmp_path: Path) -> None:
    """The layers take a quarter of their float32 size plus a scale for each row. The file adds a header."""
    model = quantize_model(llama(hidden_size=128, intermediate_size=256))
    folder = save_quantized(model, tmp_path / "model")
    linears = [m for m in model.modules() if isinstance(m, W8A8Linear)]
    float32 = sum(4 * m.in_features * m.out_features for m in linears)
    scales = sum(4 * m.out_features for m in linears)
    others = sum(4 * p.numel() for p in model.parameters())
    data = load_file(folder / WEIGHTS)
    assert sum(t.numel() * t.element_size() for t in data.values()) == float32 / 4 + scales + others
    header = (folder / WEIGHTS).stat().st_size - float32 / 4 - scales - others
    assert 0 < header < 200 * (len(data) + 1)  # a name of some 50 characters, type, sizes, offsets
    assert scales <= float32 / 128  # the smallest K
    assert len(linears) == 14 and others < float32


def test_shards(model: nn.Module, tmp_path: Path) -> None:
    folder = save_quantized(model, tmp_path / "model", max_shard_bytes=20_000)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0].name == f"smoothquant-00001-of-{len(shards):05}.safetensors"
    for shard in shards:
        data = load_file(shard)
        assert sum(t.numel() * t.element_size() for t in data.values()) <= 20_000
    assert_same_bits(logits(load_quantized(folder)), logits(model))
    shards[1].unlink()
    assert f"is incomplete, {shards[1].name} is missing" in refusal(lambda: load_quantized(folder))
    one_each = save_quantized(model, tmp_path / "tiny", max_shard_bytes=1)
    assert len(list(one_each.glob("*.safetensors"))) == len(manifest_of(one_each)["tensors"])


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    folder = save_quantized(quantized(MODELS["llama_tied"]), tmp_path / "model")
    assert manifest_of(folder)["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in load_file(folder / WEIGHTS)
    loaded: Any = load_quantized(folder).double()
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_manually_untied_weights_stay_untied(tmp_path: Path) -> None:
    before: Any = quantized(MODELS["llama_tied"])
    before.lm_head.weight = nn.Parameter(before.lm_head.weight * 2)
    after: Any = load_quantized(save_quantized(before, tmp_path / "model"))
    assert after.lm_head.weight is not after.model.embed_tokens.weight
    assert_same_bits(logits(after), logits(before))


def test_transformers_reads_the_tokenizer_and_config(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
    folder = save_quantized(model, tmp_path / "model", tokenizer=tokenizer)
    again = transformers.AutoTokenizer.from_pretrained(folder)
    assert again("w5").input_ids == [5]
    assert {"tokenizer.json", "config.json", "generation_config.json", WEIGHTS} <= set(
        manifest_of(folder)["files"]
    )
    config = transformers.AutoConfig.from_pretrained(folder)
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.quantization_config["quant_method"] == QUANT_METHOD
    # transformers must fail, rather than warn and make random weights. Other tests of this process may have registered
    # the method.
    for known in METHOD_MAPPINGS:
        monkeypatch.delitem(known, QUANT_METHOD, raising=False)
    with pytest.raises(OSError, match=r"no file named (model|.*model\.safetensors)"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    message = refusal(lambda: save_quantized(model, tmp_path / "other", tokenizer="gpt2"))
    assert "tokenizer must have save_pretrained" in message


# ---------------------------------------------------------------------------------- other modules


class Block(nn.Module):
    def __init__(self, width: int = 24, wide: int = 40, bias: bool = True) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, wide, bias), nn.Linear(wide, width)
        self.again = self.down
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)
        self.register_buffer("empty", torch.zeros(0, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x))) * self.scale


X = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))


def save_block(folder: Path, skip: tuple[str, ...] = ()) -> tuple[nn.Module, Path]:
    torch.manual_seed(3)
    config = SmoothQuantConfig(skip=skip)
    block = quantize_model(Block().eval(), config=config)
    block.again = block.down
    block.scale.fill_(0.75)  # not what the constructor makes
    with pytest.warns(UserWarning, match="load_quantized will need model=, a float Block"):
        return block, save_quantized(block, folder / "block")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_custom_module(device: str, tmp_path: Path) -> None:
    before, folder = save_block(tmp_path)
    with torch.device(device):
        skeleton = Block()
    after = load_quantized(folder, model=skeleton)
    assert after is skeleton and after.again is after.down
    assert torch.equal(after(X), before(X))
    assert_same_state(after, before)
    assert "pass model= with a float model" in refusal(lambda: load_quantized(folder))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Block(wide=41), "up maps 24 to 41 features, not (24, 40)"),
        (lambda: Block(bias=False), "up has no bias"),
        (lambda: nn.Sequential(nn.Linear(24, 24)), "it is a Sequential"),
        (llama, "the checkpoint of a Block does not fit the model, it is a LlamaForCausalLM"),
    ],
)
def test_another_architecture_is_refused(
    make: Callable[[], nn.Module], expected: str, tmp_path: Path
) -> None:
    _, folder = save_block(tmp_path)
    skeleton = make()
    before = copy.deepcopy(skeleton)
    assert expected in refusal(lambda: load_quantized(folder, model=skeleton))
    assert str(skeleton) == str(before)
    assert_same_state(skeleton, before)


def test_missing_and_extra_tensors_are_refused(tmp_path: Path) -> None:
    _, folder = save_block(tmp_path)
    more, less = Block(), Block()
    more.extra = nn.LayerNorm(3)
    del less.empty
    message = refusal(lambda: load_quantized(folder, model=more))
    assert "extra.weight is not in the checkpoint (and 1 more)" in message
    assert "it has no tensor empty" in refusal(lambda: load_quantized(folder, model=less))
    lost = Block()
    lost.register_buffer("lost", torch.zeros(2, device="meta"), persistent=False)
    assert "buffer lost has no data" in refusal(lambda: load_quantized(folder, model=lost))


def test_a_skeleton_of_another_size_is_refused(saved: Path) -> None:
    message = refusal(lambda: load_quantized(saved, model=llama(intermediate_size=80)))
    assert "maps 32 to 80 features" in message
    message = refusal(lambda: load_quantized(saved, model=llama(vocab_size=VOCAB + 1)))
    assert "model.embed_tokens.weight has shape [132, 32], not [131, 32]" in message


def test_a_changed_transformers_model_needs_a_skeleton(tmp_path: Path) -> None:
    def widened() -> nn.Module:
        model: Any = llama()
        model.model.extra = nn.LayerNorm(32)
        return model

    before = quantized(widened)
    with pytest.warns(UserWarning, match=r"it has no tensor model\.extra\.weight"):
        folder = save_quantized(before, tmp_path / "model")
    assert "transformers cannot make" in refusal(lambda: load_quantized(folder))
    assert_same_bits(logits(load_quantized(folder, model=widened())), logits(before))


def test_smoothed_layers(tmp_path: Path) -> None:
    """A model with only smoothed layers is refused. Beside quantized layers, a skipped one is saved as a float one."""
    torch.manual_seed(0)
    config = SmoothQuantConfig(folding="never")
    model = smooth_lm(llama().eval(), [IDS], config=config, progress=False)
    message = refusal(lambda: save_quantized(model, tmp_path / "model"))
    assert "(it is smoothed, but in float): run quantize_model on it first" in message
    assert list(tmp_path.iterdir()) == []
    quantize_model(model, config=config.replace(skip=("*.down_proj",)))
    down = model.model.layers[0].mlp.down_proj
    assert isinstance(down, nn.Linear) and pending_smooth(down) is not None
    after = load_quantized(save_quantized(model, tmp_path / "model"))
    assert_same_state(after, model)
    assert_same_bits(logits(after), logits(model))


def test_unsavable_models_are_refused(model: nn.Module, tmp_path: Path) -> None:
    target = tmp_path / "model"
    message = refusal(lambda: save_quantized(llama(), target))
    assert "the model has no quantized layer: run quantize_model" in message
    assert "max_shard_bytes" in refusal(lambda: save_quantized(model, target, max_shard_bytes=0))
    broken = copy.deepcopy(model)
    next(m for m in broken.modules() if isinstance(m, W8A8Linear)).w_scale[1] = float("nan")
    message = refusal(lambda: save_quantized(broken, target))
    assert "q_proj.w_scale has a value that is NaN" in message
    broken = copy.deepcopy(model)
    broken.model.norm.to("meta")
    assert "model.norm.weight has no data" in refusal(lambda: save_quantized(broken, target))
    broken = copy.deepcopy(model)
    broken.smoothquant_info["x"] = float("nan")
    assert "plain finite JSON" in refusal(lambda: save_quantized(broken, target))
    assert list(tmp_path.iterdir()) == []
