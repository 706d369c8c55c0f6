"""The protocol between cache and attention: who reads int8, who reads floats, and what must never be silently wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor, nn

from smoothquant_kernels import (
    Int8KVCache,
    SmoothQuantError,
    register_transformers,
    use_int8_attention,
)
from smoothquant_kernels.kv_cache import attention
from smoothquant_kernels.kv_cache.module_source import changes_keys, has_sdpa
from smoothquant_kernels.kv_cache.step import ATTENTION, STEP
from tests.support.compare import assert_bitwise_equal
from tests.support.kv_cache import LAYERS, Module, attend, make_layer, mask_of, tokens
from tests.support.models import make_model


def filled(name: str = "dynamic", count: int = 6) -> Any:
    layer = make_layer(name)
    k, v, q = (tokens(count, seed=n) for n in range(3))
    attend(layer, q, k, v, None)
    assert layer.direct
    return layer


def new(count: int = 1, dim: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    q = tokens(count, heads=4, dim=dim, seed=5)
    return q, tokens(count, dim=dim, seed=6), tokens(count, dim=dim, seed=7)


def test_a_prompt_reads_its_own_floats() -> None:
    q, k, v = new(5)
    y = attend(make_layer("dynamic"), q, k, v, None)
    expected = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert_bitwise_equal(y, expected.transpose(1, 2).contiguous())


@pytest.mark.parametrize("attention_name", ["sdpa", "eager"])
def test_other_attention_gets_all_tokens(attention_name: str) -> None:
    layer = make_layer("dynamic", attention=attention_name)
    kwargs: dict[str, Any] = {}
    for total in (3, 4):
        k = tokens(3 if total == 3 else 1)
        assert layer.update(k, k, kwargs=kwargs)[0].shape[2] == total
    assert not kwargs
    assert filled().update(*new()[1:])[0].shape[2] == 7  # no kwargs: who knows what comes next


def test_a_layer_that_was_filled_unseen_stays_plain() -> None:
    """Only first tokens can tell what a module does with its keys without a risk."""
    layer = make_layer("dynamic")
    _, k, v = new(4)
    layer.update(k, v)
    kwargs: dict[str, Any] = {}
    assert layer.update(k, v, kwargs=kwargs)[0].shape[2] == 8 and not kwargs


def test_a_step_that_nobody_takes_is_an_error() -> None:
    layer = filled()
    kwargs: dict[str, Any] = {}
    _, k, v = new()
    assert layer.update(k, v, kwargs=kwargs)[0] is k and STEP in kwargs
    with pytest.raises(SmoothQuantError, match="layer 0 did not read the cache at the last step"):
        layer.update(k, v, kwargs={})


def test_first_tokens_that_nobody_takes_make_the_layer_plain() -> None:
    """The first tokens are all there are, so nothing has gone wrong yet."""
    layer = make_layer("dynamic")
    _, k, v = new(4)
    layer.update(k, v, kwargs={})
    kwargs: dict[str, Any] = {}
    assert layer.update(k, v, kwargs=kwargs)[0].shape[2] == 8 and not kwargs


@pytest.mark.parametrize("change", ["key", "value", "mask", "position_bias"])
def test_a_module_that_changes_its_first_keys_makes_the_layer_plain(change: str) -> None:
    layer = make_layer("dynamic")
    q, k, v = new(4)
    kwargs: dict[str, Any] = {}
    key, value = layer.update(k, v, kwargs=kwargs)
    mask = mask_of(make_layer("dynamic"), 4)
    if change == "key":
        key = key * 2
    elif change == "value":
        value = value + 1
    elif change == "mask":
        mask = torch.zeros(1, 1, 4, 4).masked_fill(~mask, -torch.inf)
    else:
        kwargs["position_bias"] = torch.zeros(1, 4, 4, 4)
    attention.int8_attention(Module(), q, key, value, mask, **kwargs)
    assert layer.direct is False
    assert layer.update(k, v, kwargs={})[0].shape[2] == 8


def test_a_module_that_changes_later_keys_is_an_error() -> None:
    layer = filled()
    q, k, v = new()
    kwargs: dict[str, Any] = {}
    key, value = layer.update(k, v, kwargs=kwargs)
    with pytest.raises(SmoothQuantError, match="Module changed keys or values between"):
        attention.int8_attention(Module(), q, key * 1, value, None, **kwargs)


def compare(
    layer: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **more: Any
) -> Tensor:
    """Attention that must not run the kernel: it equals SDPA on what the plain cache returns."""
    plain = make_layer("dynamic", attention="sdpa")
    plain.tokens, plain.length = layer.tokens, layer.length
    plain.quantizer, plain.is_initialized, plain.device = layer.quantizer, True, layer.device
    all_k, all_v = plain.update(k, v)
    y = attend(layer, q, k, v, mask, **more)
    expected = nn.functional.scaled_dot_product_attention(
        q, all_k, all_v, attn_mask=mask, enable_gqa=True, scale=more.get("scaling")
    )
    torch.testing.assert_close(y, expected.transpose(1, 2), rtol=0, atol=1e-6)
    return y


@pytest.fixture
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the kernel ran")

    monkeypatch.setattr("smoothquant_kernels.ops.decode_attention_s8", fail)


@pytest.mark.usefixtures("no_kernel")
def test_what_the_kernel_cannot_do_reads_floats() -> None:
    q, k, v = new(9)
    compare(filled(), q, k, v, mask_of(filled(), 9))  # more than 8 tokens
    q, k, v = new()
    compare(filled(), q, k, v, torch.randn(2, 4, 1, 7))  # a float mask
    q, k, v = new(3)
    both_ways = torch.ones(1, 1, 3, 9, dtype=torch.bool)
    compare(filled(), q, k, v, both_ways)  # tokens that see later ones, as those of an image
    q.requires_grad_()
    y = compare(filled(), q, k, v, mask_of(filled(), 3))
    assert y.requires_grad


@pytest.mark.usefixtures("no_kernel")
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("count", [2, 3])
def test_a_mask_that_shows_one_later_token(name: str, count: int) -> None:
    """The kernel would hide it."""
    layer, plain = filled(name), filled(name)
    q, k, v = new(count)
    mask = mask_of(layer, count)
    first = mask.shape[3] - count if name in ("dynamic", "sliding") else 6
    mask[..., 0, first + 1] = True
    assert mask[0, 0, 0].sum() == first + 2
    plain.attention.config._attn_implementation = "sdpa"
    keys, values = plain.update(k, v)
    expected = nn.functional.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)
    y = attend(layer, q, k, v, mask)
    torch.testing.assert_close(y, expected.transpose(1, 2), rtol=0, atol=1e-6)


@pytest.mark.usefixtures("no_kernel")
@pytest.mark.parametrize("name", LAYERS)
def test_no_mask_is_a_causal_mask(name: str) -> None:
    """9 new tokens, too many for the kernel, to 6 old ones. The window is so wide that it hides nothing."""
    layers = [make_layer(name, sliding_window=40) for _ in range(2)]
    for layer in layers:
        attend(layer, tokens(6), tokens(6, seed=1), tokens(6, seed=2), None)
    q, k, v = new(9)
    masks = [None, mask_of(layers[0], 9)]
    one, other = (attend(x, q, k, v, m) for x, m in zip(layers, masks, strict=True))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("no_kernel")
def test_several_tokens_without_a_mask() -> None:
    """No mask of transformers is that of tokens that see all earlier ones, or all, if attention is not causal."""
    for module, mask in ((Module(), mask_of(filled(), 9)), (Module(), None)):
        module.is_causal = mask is not None
        q, k, v = new(9)
        y, expected = (attend(filled(), q, k, v, m, module) for m in (None, mask))
        if mask is None:
            ones = torch.ones(1, 1, 9, 15, dtype=torch.bool)
            expected = attend(filled(), q, k, v, ones, module)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)


def test_the_scale_and_its_default() -> None:
    q, k, v = new()
    y = attend(filled(), q, k, v, None)
    assert_bitwise_equal(attend(filled(), q, k, v, None, scaling=0.25), y)
    assert not torch.equal(attend(filled(), q, k, v, None, scaling=1.0), y)


def test_dropout_reads_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def sdpa(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, dropout: float, **rest: Any
    ) -> Any:
        seen.append(dropout)
        assert k.shape[2] == 7
        return q.transpose(1, 2), None

    from transformers.integrations import sdpa_attention

    layer = filled()
    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", sdpa)
    attend(layer, *new(), None, dropout=0.5)
    assert seen == [0.5]


def test_a_mask_is_asked_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = new(2)
    mask = mask_of(filled(), 2)
    asked: list[int] = []
    original = attention._causal
    monkeypatch.setattr(attention, "_causal", lambda *a: (asked.append(1), original(*a))[1])
    layers = [filled() for _ in range(3)]
    for index, layer in enumerate(layers):
        layer.quantizer.layer = index
        attend(layer, q, k, v, mask)
    assert len(asked) == 1
    attend(
        filled(), q, k, v, mask
    )  # the first layer of another forward pass, which may have changed it
    assert len(asked) == 2
    attend(layers[1], q, k, v, torch.cat([mask, mask[..., :2]], 3).clone())
    assert len(asked) == 3


def test_modules_that_read_keys_on_the_way() -> None:
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextAttention
    from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
    from transformers.models.llama.modeling_llama import LlamaAttention
    from transformers.models.t5.modeling_t5 import T5Attention

    def of(kind: type) -> Any:
        return kind.__new__(kind)

    assert changes_keys(of(Gemma4TextAttention))  # shares them with other layers
    assert changes_keys(of(T5Attention))  # measures their length
    assert not changes_keys(of(LlamaAttention))
    assert not changes_keys(of(GPT2Attention))  # passes them to another attention function
    assert not changes_keys(Module())  # no forward of its own


def test_which_files_may_run_sdpa() -> None:
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention
    from transformers.models.llama.modeling_llama import LlamaAttention

    assert has_sdpa(LlamaAttention.__new__(LlamaAttention))
    assert not has_sdpa(GptOssAttention.__new__(GptOssAttention))
    assert has_sdpa(Module())


def test_a_module_without_eager_attention_is_refused() -> None:
    layer = filled()
    with pytest.raises(
        SmoothQuantError, match="needs the eager_attention_forward of Module, which"
    ):
        attend(layer, *new(), None, softcap=30.0)


def test_use_int8_attention() -> None:
    model = make_model("llama")
    assert use_int8_attention(model) is model
    assert model.config._attn_implementation == ATTENTION
    use_int8_attention(model)
    with pytest.raises(SmoothQuantError, match="needs a model of transformers, got Linear"):
        use_int8_attention(nn.Linear(2, 2))
    with pytest.raises(SmoothQuantError, match="BloomForCausalLM has its own attention"):
        use_int8_attention(make_model("bloom"))


def test_without_a_cache_it_is_sdpa() -> None:
    ids = torch.arange(24).view(2, 12)
    model = make_model("llama_gqa")
    assert model.config._attn_implementation == "sdpa"
    expected = model(ids, use_cache=False).logits
    assert_bitwise_equal(use_int8_attention(model)(ids, use_cache=False).logits, expected)
    assert_bitwise_equal(
        model(ids, past_key_values=t.DynamicCache(config=model.config)).logits, expected
    )


def test_from_pretrained_knows_the_name(tmp_path: Any) -> None:
    make_model("llama").save_pretrained(tmp_path)
    register_transformers()
    model = t.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=ATTENTION)
    assert model.config._attn_implementation == ATTENTION
    cache = Int8KVCache(model)
    model.generate(torch.arange(4)[None], cache=cache, max_new_tokens=3, do_sample=False)
    assert [layer.direct for layer in cache.int8_layers] == [True, True]


def test_the_attention_can_change_between_steps() -> None:
    """sdpa after int8 attention reads the same cache."""
    model = use_int8_attention(make_model("llama_gqa"))
    cache = Int8KVCache(model)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        model(ids, cache=cache)
        model(ids[:, :1], cache=cache)
        model.set_attn_implementation("sdpa")
        assert model(ids[:, :1], cache=cache).logits.isfinite().all()
        model.set_attn_implementation(ATTENTION)
        model(ids[:, :1], cache=cache)
    assert cache.get_seq_length() == 11


@pytest.mark.parametrize("size", [{}, {"max_cache_len": 40}])
@pytest.mark.parametrize("at_first", [False, True])
def test_a_reset_after_an_exception_in_attention(
    monkeypatch: pytest.MonkeyPatch, size: dict[str, int], at_first: bool
) -> None:
    """As after the first generation: the next ones read int8, and not float copies from then on."""
    model = use_int8_attention(make_model("llama_gqa"))
    prompt, token = torch.arange(5)[None], torch.tensor([[3]])
    cache, fresh = Int8KVCache(model, **size), Int8KVCache(model, **size)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    with torch.no_grad():
        if not at_first:
            model(prompt, cache=cache)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setitem(t.AttentionInterface._global_mapping, ATTENTION, interrupted)
            model(prompt, cache=cache)
        if not at_first:
            with pytest.raises(SmoothQuantError, match=r"start again with cache.reset\(\)"):
                model(token, cache=cache)
        cache.reset()
        if at_first:  # what is not known yet, a reset asks again
            assert [layer.direct for layer in cache.int8_layers] == [None, None]
        for ids in (prompt, token):
            y = model(ids, cache=cache).logits
            assert_bitwise_equal(y, model(ids, cache=fresh).logits)
        assert all(layer.direct for layer in cache.int8_layers)


def test_a_reset_of_a_layer_whose_first_tokens_nobody_took() -> None:
    layer = make_layer("dynamic")
    k = tokens(4)
    for _ in range(2):
        layer.update(k, k, kwargs={})
    assert layer.direct is False
    layer.reset()
    attend(layer, tokens(4, heads=4), k, k, None)
    assert layer.direct


def test_another_thread_that_asks_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer for its mask is no answer for this one."""
    layer = filled()
    layer.quantizer.layer = 1
    _, k, v = new(2)
    kwargs: dict[str, Any] = {}
    layer.update(k, v, kwargs=kwargs)
    mask = torch.ones(1, 1, 2, 8, dtype=torch.bool)  # sees later tokens

    def interleaved() -> Tensor:
        monkeypatch.setattr(attention, "_asked", (lambda: None, 0, True))
        return mask

    monkeypatch.setattr(attention, "_asked", (interleaved, 0, False))
    assert not attention._hides_later_tokens(kwargs[STEP], mask)
