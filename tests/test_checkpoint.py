"""Saved models come back bit for bit; damaged, foreign or half-written folders are refused."""

from __future__ import annotations

import ast
import copy
import errno
import hashlib
import json
import os
import pickle
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from smoothquant_kernels import (
    SmoothQuantConfig,
    SmoothQuantError,
    W8A8Linear,
    _folder,
    checkpoint,
    quantize_model,
    smooth_and_quantize,
    smooth_lm,
)
from smoothquant_kernels._manifest import MANIFEST, digest
from smoothquant_kernels._safetensors import write_safetensors
from smoothquant_kernels.checkpoint import load_quantized, save_quantized
from smoothquant_kernels.fold import SmoothedLinear

WEIGHTS = "smoothquant.safetensors"
SCHEMES = ("per_token", "per_tensor", "static")
VOCAB = 61


def token_ids(rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(5))


def common(**values: Any) -> dict[str, Any]:
    return {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **values}


def llama(tied: bool = False, **changed: Any) -> nn.Module:
    sizes = {"hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    values = common(**{**sizes, **heads, "tie_word_embeddings": tied, **changed})
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**values))


def gpt2() -> nn.Module:
    values = common(n_embd=48, n_layer=2, n_head=4, n_positions=64)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**values))


def opt() -> nn.Module:
    values = common(hidden_size=48, ffn_dim=72, num_hidden_layers=2, num_attention_heads=4)
    config = transformers.OPTConfig(**values, word_embed_proj_dim=48, max_position_embeddings=64)
    return transformers.OPTForCausalLM(config)


def bloom() -> nn.Module:
    values = common(hidden_size=48, n_layer=2, n_head=4)
    return transformers.BloomForCausalLM(transformers.BloomConfig(**values))


def gpt_neox() -> nn.Module:
    sizes = {"hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2}
    config = transformers.GPTNeoXConfig(**common(**sizes, num_attention_heads=4))
    return transformers.GPTNeoXForCausalLM(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "llama_tied": lambda: llama(tied=True),
    "opt": opt,
    "gpt2": gpt2,
    "bloom": bloom,
    "gpt_neox": gpt_neox,
}


def quantized(
    make: Callable[[], nn.Module] = llama,
    scheme: str = "static",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> nn.Module:
    torch.manual_seed(0)
    model = make().to(dtype).eval()
    config = SmoothQuantConfig(activation_scheme=scheme, **options)
    if dtype != torch.float32:
        config = config.replace(verify_tolerance=0.1)
    return smooth_and_quantize(model, [token_ids()], config, progress=False)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=token_ids(), use_cache=False).logits


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    wrong = (got != expected).nonzero()
    assert bool(expected.isfinite().all())
    first = tuple(wrong[0].tolist()) if len(wrong) else ()
    assert not len(wrong), f"{len(wrong)} differ, first at {first}: {got[first]}, {expected[first]}"


def assert_same_state(got: nn.Module, expected: nn.Module) -> None:
    """State, buffers outside it, and which names are one tensor."""
    for group in (
        lambda m: m.state_dict(),
        lambda m: dict(m.named_buffers(remove_duplicate=False)),
    ):
        a, b = group(got), group(expected)
        assert list(a) == list(b)
        for name, value in b.items():
            assert a[name].dtype == value.dtype, name
            assert torch.equal(a[name], value), name
            assert a[name].device.type == "cpu"
    parameters = dict(got.named_parameters(remove_duplicate=False))
    for name, p in expected.named_parameters(remove_duplicate=False):
        others = [n for n, o in expected.named_parameters(remove_duplicate=False) if o is p]
        assert all(parameters[o] is parameters[name] for o in others)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return quantized()


@pytest.fixture(scope="module")
def pristine(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_quantized(model, tmp_path_factory.mktemp("pristine") / "model")


@pytest.fixture
def saved(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "copy"))


def contents(folder: Path) -> dict[str, str]:
    files = [f for f in folder.rglob("*") if f.is_file()]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text())


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest and makes its digests right again, as one who wants to deceive would."""
    values = manifest_of(folder)
    for name in (WEIGHTS, "config.json"):
        data = (folder / name).read_bytes()
        values["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    change(values)
    del values["digest"]
    (folder / MANIFEST).write_text(json.dumps({**values, "digest": digest(values)}))


def refusal(call: Callable[[], object]) -> str:
    """The sentence: one line, one full stop at its end."""
    with pytest.raises(SmoothQuantError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and text.endswith("."), text
    return text


# ---------------------------------------------------------------------------------------- the trip


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
    assert not hasattr(after.config, "quantization_config")
    names = ("architectures", "dtype", "transformers_version", "_name_or_path")
    configs = [{k: v for k, v in m.config.to_dict().items() if k not in names}
               for m in (before, after)]  # fmt: skip
    assert configs[0] == configs[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
def test_half_precision(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    # .to(dtype) also rounds the rotary frequencies, which no state dict holds.
    before = quantized(MODELS[name], "per_token", dtype)
    after = load_quantized(save_quantized(before, tmp_path / "model"))
    assert after.dtype == after.config.dtype == dtype
    assert_same_state(after, before)
    assert_same_bits(logits(after), logits(before))
    linear = next(m for m in after.modules() if isinstance(m, W8A8Linear))
    assert linear.w_scale.dtype == torch.float32


@pytest.mark.parametrize("options", [{"folding": "never"}, {"weight_granularity": "tensor"}])
def test_options_of_the_layers(options: dict[str, Any], tmp_path: Path) -> None:
    before = quantized(scheme="per_token", **options)
    after = load_quantized(save_quantized(before, tmp_path / "model"))
    assert str(after) == str(before)
    assert ("smooth=True" in str(after)) == ("folding" in options)
    assert_same_bits(logits(after), logits(before))


def test_generation_is_the_same(tmp_path: Path) -> None:
    before: Any = quantized(MODELS["llama_tied"], "per_token")
    before.generation_config.max_new_tokens = 9
    before.generation_config.repetition_penalty = 1.3
    after: Any = load_quantized(save_quantized(before, tmp_path / "model"))
    assert after.generation_config.to_dict() == before.generation_config.to_dict()
    first, second = (m.generate(token_ids(1), do_sample=False) for m in (before, after))
    assert first.shape[1] > 12
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
    assert_same_bits(logits(loaded), logits(model))  # its old file is gone, its mapping is not
    assert_same_bits(logits(load_quantized(saved)), logits(model))


def test_changing_a_loaded_model_leaves_the_file(saved: Path, model: nn.Module) -> None:
    loaded = load_quantized(saved)
    with torch.no_grad():
        for tensor in loaded.state_dict().values():
            tensor.zero_()
    assert_same_bits(logits(load_quantized(saved)), logits(model))


def test_weights_are_mapped(tmp_path: Path) -> None:
    """A weight of the usual size is the file's memory; an odd one is a copy as aligned as torch's own."""
    model = quantized(lambda: llama(hidden_size=64, intermediate_size=128))
    loaded = load_quantized(save_quantized(model, tmp_path / "model"))
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    files = [m[0].split("-") for m in maps if m[-1] == str(tmp_path / "model" / WEIGHTS)]
    ranges = [(int(a, 16), int(b, 16)) for a, b in files]
    linears = [m for m in loaded.modules() if isinstance(m, W8A8Linear)]
    for linear in linears:
        assert any(a <= linear.w_q.data_ptr() < b for a, b in ranges)
    assert all(t.data_ptr() % 64 == 0 for t in (*loaded.parameters(), *loaded.buffers()))


def test_size(pristine: Path, model: nn.Module) -> None:
    linears = [m for m in model.modules() if isinstance(m, W8A8Linear)]
    weights = sum(m.in_features * m.out_features for m in linears)
    ids = {id(b) for m in linears for b in m.buffers()}
    others = sum(
        t.numel() * t.element_size()
        for t in model.state_dict(keep_vars=True).values()
        if id(t) not in ids
    )
    scales = sum(4 * (m.out_features + 1) for m in linears)  # w_scale and x_scale; no biases
    data = load_file(pristine / WEIGHTS)
    assert sum(t.numel() * t.element_size() for t in data.values()) == others + weights + scales
    header = (pristine / WEIGHTS).stat().st_size - others - weights - scales
    assert 0 < header < 150 * len(data) + 200  # a name, three small numbers and quotes each
    # A row of K float32 weights (4K bytes) became K bytes and one scale; 48 is the smallest K.
    assert weights + scales <= 4 * weights * (0.25 + 1 / 48 + 0.001)


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


def test_untied_by_hand_stays_untied(tmp_path: Path) -> None:
    before: Any = quantized(MODELS["llama_tied"])
    before.lm_head.weight = nn.Parameter(before.lm_head.weight * 2)
    after: Any = load_quantized(save_quantized(before, tmp_path / "model"))
    assert after.lm_head.weight is not after.model.embed_tokens.weight
    assert_same_bits(logits(after), logits(before))


def test_tokenizer_and_what_transformers_sees(model: nn.Module, tmp_path: Path) -> None:
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
    assert config.quantization_config["quant_method"] == "smoothquant_kernels"
    # It must not come up with random weights and a warning.
    with pytest.raises(OSError, match="no file named model"):
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
def test_a_module_of_ones_own(device: str, tmp_path: Path) -> None:
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
def test_another_architecture(make: Callable[[], nn.Module], expected: str, tmp_path: Path) -> None:
    _, folder = save_block(tmp_path)
    skeleton = make()
    before = copy.deepcopy(skeleton)
    assert expected in refusal(lambda: load_quantized(folder, model=skeleton))
    assert str(skeleton) == str(before)
    assert_same_state(skeleton, before)


def test_tensors_that_only_one_side_has(tmp_path: Path) -> None:
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


def test_a_skeleton_of_another_size(saved: Path) -> None:
    message = refusal(lambda: load_quantized(saved, model=llama(intermediate_size=80)))
    assert "maps 48 to 80 features" in message
    message = refusal(lambda: load_quantized(saved, model=llama(vocab_size=62)))
    assert "model.embed_tokens.weight has shape [62, 48], not [61, 48]" in message


def test_a_changed_transformers_model_needs_a_skeleton(tmp_path: Path) -> None:
    def widened() -> nn.Module:
        model: Any = llama()
        model.model.extra = nn.LayerNorm(48)
        return model

    before = quantized(widened)
    with pytest.warns(UserWarning, match=r"it has no tensor model\.extra\.weight"):
        folder = save_quantized(before, tmp_path / "model")
    assert "transformers cannot make" in refusal(lambda: load_quantized(folder))
    assert_same_bits(logits(load_quantized(folder, model=widened())), logits(before))


def test_smoothed_layers(tmp_path: Path) -> None:
    """Alone they are refused; beside quantised ones (left out by a pattern) they are kept."""
    torch.manual_seed(0)
    config = SmoothQuantConfig(folding="never")
    model = smooth_lm(llama().eval(), [token_ids()], config=config, progress=False)
    message = refusal(lambda: save_quantized(model, tmp_path / "model"))
    assert "(it is smoothed, but in float): run quantize_model on it first" in message
    assert list(tmp_path.iterdir()) == []
    quantize_model(model, config=config.replace(skip=("*.down_proj",)))
    assert any(isinstance(m, SmoothedLinear) for m in model.modules())
    after = load_quantized(save_quantized(model, tmp_path / "model"))
    assert_same_state(after, model)
    assert_same_bits(logits(after), logits(model))


def test_what_cannot_be_saved(model: nn.Module, tmp_path: Path) -> None:
    target = tmp_path / "model"
    message = refusal(lambda: save_quantized(llama(), target))
    assert "the model has no quantised layer: run quantize_model" in message
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


# ------------------------------------------------------------------------------ folders refused


def test_no_checkpoint(tmp_path: Path) -> None:
    assert "there is no folder" in refusal(lambda: load_quantized(tmp_path / "none"))
    message = refusal(lambda: load_quantized(tmp_path))
    assert f"is not a checkpoint of this package, it has no {MANIFEST}" in message
    for text, expected in (("{}", "not written by this package"), ("{", "not valid JSON")):
        (tmp_path / MANIFEST).write_text(text)
        assert expected in refusal(lambda: load_quantized(tmp_path))


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "generation_config.json"])
def test_a_damaged_file(name: str, saved: Path) -> None:
    path = saved / name
    data = path.read_bytes()
    for position in (0, len(data) // 2, len(data) - 1):
        flipped = bytearray(data)
        flipped[position] ^= 1
        path.write_bytes(flipped)
        message = refusal(lambda: load_quantized(saved))
        assert f"{path} is not what was saved (its SHA-256 differs): copy it again" in message
    path.write_bytes(data[:-1])
    message = refusal(lambda: load_quantized(saved))
    assert f"{path} has {len(data) - 1} bytes and was saved with {len(data)}" in message
    path.unlink()
    assert f"is incomplete, {name} is missing" in refusal(lambda: load_quantized(saved))
    path.write_bytes(data)
    load_quantized(saved)


def test_without_verification(saved: Path, model: nn.Module) -> None:
    path = saved / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_new_tokens": 3}))
    loaded: Any = load_quantized(saved, verify=False)
    assert loaded.generation_config.max_new_tokens == 3
    data = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(data[:-1])
    message = refusal(lambda: load_quantized(saved, verify=False))
    assert f"{saved / WEIGHTS} cannot be read" in message
    (saved / WEIGHTS).write_bytes(data)
    for text, expected in (
        ("[]", "cannot be read"),
        ('{"architectures": ["OPTForCausalLM"]}', "is for ['OPTForCausalLM'] and the weights are"),
        (
            '{"architectures": ["LlamaForCausalLM"], "hidden_size": "x"}',
            "config.json does not make a LlamaForCausalLM",
        ),
    ):
        (saved / "config.json").write_text(text)
        assert expected in refusal(lambda: load_quantized(saved, verify=False))


def test_an_altered_manifest(saved: Path) -> None:
    text = (saved / MANIFEST).read_text()
    for old, new in (
        ('"alpha": 0.8', '"alpha": 0.7'),
        ('"format_version": 1', '"format_version": 0'),
    ):
        assert old in text
        (saved / MANIFEST).write_text(text.replace(old, new))
        message = refusal(lambda: load_quantized(saved))
        assert f"{saved / MANIFEST} is damaged or was altered" in message
    # Other spacing and order are the same manifest.
    values = json.loads(text)
    (saved / MANIFEST).write_text(json.dumps(dict(reversed(values.items()))))
    load_quantized(saved)


def test_a_newer_format(saved: Path) -> None:
    values = {**manifest_of(saved), "format_version": 2, "something": "new"}
    (saved / MANIFEST).write_text(json.dumps(values))
    message = refusal(lambda: load_quantized(saved))
    assert "is in format 2 and this release reads up to 1" in message
    assert "pip install --upgrade smoothquant-kernels" in message


FIRST = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "a/../../b", "..\\secret", "."])
def test_a_path_that_leaves_the_folder(path: str, saved: Path) -> None:
    (saved.parent / "secret").write_text("x")
    entry = {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    rewrite(saved, lambda m: m["files"].update({path: entry}))
    message = refusal(lambda: load_quantized(saved))
    assert f"the path {path!r} leaves the folder" in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: m.pop("tied"), "the entries of the manifest are not the expected ones"),
        (lambda m: m.update(tied=[]), "tied of the manifest is of the wrong type"),
        (lambda m: m.update(tied={"a": "b"}), "a refers to nothing"),
        (lambda m: m.update(tied={"a": 1}), "a name is not a string"),
        (lambda m: m.update(non_persistent=["a"]), "non_persistent names no tensor"),
        (lambda m: m["modules"].update({FIRST: 3}), "the arguments of a module are not an object"),
        (lambda m: m["files"][WEIGHTS].update(size=True), "size of smoothquant.safetensors is of"),
        (lambda m: m["tensors"][f"{FIRST}.w_q"].update(shape=[-1]), "the shape of model.layers.0"),
        (lambda m: m["tensors"][f"{FIRST}.w_q"].update(file="x"), "the file of model.layers.0"),
        (lambda m: m["tensors"][f"{FIRST}.w_q"].update(shape=[1]), "has shape [48, 48], not [1]"),
        (lambda m: m["tensors"][f"{FIRST}.w_q"].update(dtype="int4"), "is torch.int8, not int4"),
        (lambda m: m["tensors"][f"{FIRST}.w_scale"].update(dtype="float16"), "not float16"),
        (lambda m: m["tensors"].pop(f"{FIRST}.w_q"), f"{FIRST}.w_q is not in the checkpoint"),
        (lambda m: m["modules"][FIRST].update(extra=1), f"arguments of {FIRST} are not understood"),
        (lambda m: m["modules"][FIRST].update({"class": "Linear"}), "are not understood"),
        (lambda m: m["modules"][FIRST].update(in_features=0), "in_features must be in [1,"),
        (lambda m: m["modules"][FIRST].update(in_features=47), "maps 48 to 48 features, not (47"),
        (lambda m: m["modules"][FIRST].update(smooth=True), "inv_smooth is not in the checkpoint"),
        (
            lambda m: m["modules"].update(x=m["modules"].pop(FIRST)),
            "it has no module x (and ",
        ),
        (lambda m: m["model"].update(name="OPTForCausalLM"), "is for ['LlamaForCausalLM'] and"),
    ],
)
def test_a_forged_manifest(
    change: Callable[[dict[str, Any]], object], expected: str, saved: Path
) -> None:
    rewrite(saved, change)
    assert expected in refusal(lambda: load_quantized(saved))


def retype(data: dict[str, torch.Tensor]) -> None:
    data[f"{FIRST}.w_q"] = data[f"{FIRST}.w_q"].short()


def not_a_number(data: dict[str, torch.Tensor]) -> None:
    data[f"{FIRST}.w_scale"][3] = float("nan")


def negative(data: dict[str, torch.Tensor]) -> None:
    data[f"{FIRST}.x_scale"].neg_()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda d: d.pop(f"{FIRST}.w_q"), f"does not match the manifest at {FIRST}.w_q"),
        (lambda d: d.update(more=torch.zeros(1)), "does not match the manifest at more"),
        (retype, f"{FIRST}.w_q is int16 [48, 48] in {WEIGHTS} and int8 [48, 48] in the manifest"),
        (not_a_number, f"{FIRST}.w_scale has a value that is NaN, infinite or not positive"),
        (negative, f"{FIRST}.x_scale has a value that is NaN, infinite or not positive"),
    ],
)
def test_forged_tensors(
    change: Callable[[dict[str, torch.Tensor]], object], expected: str, saved: Path
) -> None:
    data = {n: t.clone() for n, t in load_file(saved / WEIGHTS).items()}
    change(data)
    save_file(data, saved / WEIGHTS)
    rewrite(saved, lambda m: None)
    skeleton = llama()
    before = str(skeleton)
    for given in (None, skeleton):
        assert expected in refusal(lambda given=given: load_quantized(saved, model=given))
    assert str(skeleton) == before


def test_devices(saved: Path) -> None:
    assert "meta device" in refusal(lambda: load_quantized(saved, device="meta"))
    assert "'nonsense' cannot be used" in refusal(lambda: load_quantized(saved, device="nonsense"))
    if not torch.cuda.is_available():
        assert "'cuda' cannot be used" in refusal(lambda: load_quantized(saved, device="cuda"))


# ---------------------------------------------------------------------------------- no foreign code


def test_no_code_from_the_folder(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither pickle nor modules that config.json names, however the digests are."""
    config = json.loads((saved / "config.json").read_text())
    evil = "someone/kernel"
    for key in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
        config[key] = config["experts_implementation"] = evil
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}
    (saved / "config.json").write_text(json.dumps(config))
    marker = saved / "ran"
    (saved / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nraise SystemExit\n")
    rewrite(saved, lambda m: m["model"].update(attention=evil))

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("pickle was used")

    for owner, name in (
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
        (torch, "load"),
    ):
        monkeypatch.setattr(owner, name, refuse)
    loaded: Any = load_quantized(saved)
    assert loaded.config._attn_implementation == "sdpa"
    assert not marker.exists()


@pytest.mark.parametrize("name", ["Trainer", "PreTrainedModel", "utils", "__loader__", "No Such"])
def test_a_class_that_is_no_model(name: str, saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "architectures": [name]}))
    rewrite(saved, lambda m: m["model"].update(name=name))
    message = refusal(lambda: load_quantized(saved))
    assert f"has no model class {name}" in message or f"does not make a {name}" in message


def test_the_source_has_no_pickle() -> None:
    folder = Path(checkpoint.__file__).parent
    for name in ("checkpoint", "_manifest", "_folder", "_safetensors", "_skeleton"):
        tree = ast.parse((folder / f"{name}.py").read_text())
        imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        imported |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert not imported & {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
        called = {n.func.id for n in ast.walk(tree)
                  if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}  # fmt: skip
        assert not called & {"eval", "exec", "__import__"}
        assert "torch.load(" not in (folder / f"{name}.py").read_text()


# ---------------------------------------------------------------------------------- whole or not


def fail_at(number: int, error: BaseException) -> Callable[..., Any]:
    """`write_safetensors` that fails in the middle of its `number`-th file."""
    calls: Iterator[int] = iter(range(1, 100))

    def write(path: Path, tensors: dict[str, torch.Tensor]) -> Any:
        if next(calls) == number:
            path.write_bytes(b"half")
            raise error
        return write_safetensors(path, tensors)

    return write


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
DENIED = OSError(errno.EACCES, os.strerror(errno.EACCES))
INTERRUPTIONS = [
    (KeyboardInterrupt(), KeyboardInterrupt, ""),
    (FULL, SmoothQuantError, "is full, nothing was saved: free some space or save elsewhere"),
    (DENIED, SmoothQuantError, "cannot be written (Permission denied), nothing was saved"),
    (MemoryError(), MemoryError, ""),
]


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(("error", "kind", "text"), INTERRUPTIONS)
@pytest.mark.parametrize("where", ["second shard", "sync", "rename"])
def test_interrupted(
    where: str,
    error: BaseException,
    kind: type[BaseException],
    text: str,
    existing: bool,
    model: nn.Module,
    pristine: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = tmp_path / "parent" / "model"
    target.parent.mkdir()
    if existing:
        shutil.copytree(pristine, target)
    if where == "second shard":
        monkeypatch.setattr(checkpoint, "write_safetensors", fail_at(2, error))
    else:
        replace = os.replace

        def fail(source: Any, to: Any = None) -> None:
            # Renaming the old one away succeeds: what fails is giving the new one its name.
            if where == "rename" and not str(source).endswith(".tmp"):
                return replace(source, to)
            raise error

        monkeypatch.setattr(*((_folder, "_sync") if where == "sync" else (os, "replace")), fail)
    with pytest.raises(kind) as caught:
        save_quantized(model, target, overwrite=existing, max_shard_bytes=20_000)
    assert text in str(caught.value)
    assert [p.name for p in target.parent.iterdir()] == (["model"] if existing else [])
    monkeypatch.undo()
    if existing:
        assert contents(target) == contents(pristine)
        load_quantized(target)
    save_quantized(model, target, overwrite=existing)


def test_a_write_that_the_system_refuses(model: nn.Module, tmp_path: Path) -> None:
    """The same with a real limit instead of a stand-in: no file may grow beyond 30 kB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        message = refusal(lambda: save_quantized(model, tmp_path / "model"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be written (File too large), nothing was saved" in message
    assert list(tmp_path.iterdir()) == []


def test_existing_targets(saved: Path, model: nn.Module, tmp_path: Path) -> None:
    before = contents(saved)
    message = refusal(lambda: save_quantized(model, saved))
    assert f"{saved} exists already: pass overwrite=True" in message
    assert contents(saved) == before
    (saved / "stale.txt").write_text("x")
    save_quantized(model, saved, overwrite=True)
    assert not (saved / "stale.txt").exists()
    file, home, empty = tmp_path / "file", tmp_path / "home", tmp_path / "empty"
    file.write_text("x")
    home.mkdir()
    (home / "thesis.txt").write_text("x")
    for overwrite in (False, True):
        assert "is a file" in refusal(lambda: save_quantized(model, file, overwrite=overwrite))  # noqa: B023
    message = refusal(lambda: save_quantized(model, home, overwrite=True))
    assert "is not a checkpoint of this package and is not overwritten" in message
    assert (home / "thesis.txt").read_text() == "x"
    empty.mkdir()
    load_quantized(save_quantized(model, empty))
    link = tmp_path / "link"
    link.symlink_to(saved)
    save_quantized(model, link, overwrite=True)
    assert link.is_symlink() and not saved.is_symlink()
    load_quantized(link)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"copy", "file", "home", "empty", "link"}


def test_permissions_follow_the_umask(model: nn.Module, tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        folder = save_quantized(model, tmp_path / "new" / "model")
    finally:
        os.umask(old)
    assert folder.stat().st_mode & 0o777 == 0o750
    assert {f.stat().st_mode & 0o777 for f in folder.iterdir()} == {0o640}
