"""Attention to latents: against heads of keys and values, and through every cache."""

import copy
import io
import pickle

import pytest
import torch
from chunks import in_chunks
from latents import MODELS, ROTATED, STACK, make, make_seq2seq, prompts, with_heads
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    EncoderDecoderCache,
    StaticCache,
    Trainer,
    TrainingArguments,
)
from transformers.cache_utils import QuantizedCache

from mqa_hf import MQAConfig
from mqa_hf.cache_mqa import DecodeCache


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_latent_stands_for_keys_and_values_of_heads(name):
    model = make(MODELS[name])
    plain = with_heads(model)
    for arguments in (prompts(), {"input_ids": prompts(length=20)["input_ids"]}):
        seen = arguments.get("attention_mask", torch.ones_like(arguments["input_ids"])).bool()
        ours, theirs = (m(**arguments, use_cache=False).logits[seen] for m in (model, plain))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_other_attention_implementations_agree(name, implementation):
    model, arguments = make(MODELS[name]), prompts()
    seen = arguments["attention_mask"].bool()
    expected = model(**arguments).logits[seen]
    if implementation == "sdpa" and model.config.attention_softcap:
        with pytest.raises(ValueError, match=r"sdpa does not support attention_softcap; use mqa or eager$"):
            model.set_attn_implementation(implementation)
        return
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(model(**arguments).logits[seen], expected, rtol=0, atol=1e-9)


class OffloadedCache(DynamicCache):
    """As transformers has it; some versions (5.17) read on one stream what another has not written."""

    def prefetch(self, *arguments):
        torch.cuda.synchronize()
        super().prefetch(*arguments)


def caches(model, rows=3):
    one = {"dtype": model.dtype, "device": model.device}
    made = {"dynamic": DynamicCache(config=model.config), "static": StaticCache(model.config, max_cache_len=20)}
    if model.device.type == "cuda":
        made["offloaded"] = OffloadedCache(config=model.config, offloading=True)
    for keys in ("rebuilt", "expanded"):
        made[keys] = DecodeCache(model.config, rows, 4, keys=keys, **one)
        made[keys + ", twice as many rows"] = DecodeCache(model.config, 2 * rows, 20, keys=keys, **one)
    return made


where = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@where
@pytest.mark.parametrize(("implementation", "bits"), [("mqa", 16), ("mqa", 8), ("mqa", 4), ("eager", 16), ("sdpa", 4)])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_cache_gives_the_uncached_logits(name, bits, implementation, device):
    model = make(MODELS[name], device, bits)
    if implementation == "sdpa" and model.config.attention_softcap:
        pytest.skip("sdpa does not support caps")
    model.set_attn_implementation(implementation)
    ids, mask = prompts(device, length=13).values()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    seen = mask.bool()
    expected = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[seen]
    for kind, cache in caches(model).items():
        found = in_chunks(model, cache, ids, mask, positions)[seen]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9, msg=lambda m, kind=kind: f"{kind}: {m}")


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_positions_may_skip_in_every_cache(name):
    """A cache of latents alone knows where each of its tokens stands."""
    model = make(MODELS[name])
    ids, mask = prompts(length=13).values()
    positions = torch.tensor([[0, 1, 2, 7, 8, 9, 30, 31, 40, 41, 42, 43, 60]]).expand(3, -1) + torch.arange(3)[:, None]
    expected = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[mask.bool()]
    for cache in caches(model).values():
        found = in_chunks(model, cache, ids, mask, positions)[mask.bool()]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["rotary", "half of a head", "learned"])
@torch.no_grad()
def test_a_quantised_cache_of_transformers_is_near(name):
    pytest.importorskip("optimum.quanto")
    model = make(
        {
            **MODELS[name],
            "kv_latent_dim": 64,
            **({"qk_head_dim": 16, "rope_frequencies": [[0, 0, 1, 1] * 2] * 3} if name != "learned" else {}),
        }
    )
    ids, mask = prompts(length=13).values()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[mask.bool()]
    cache = QuantizedCache("quanto", model.config, nbits=4, q_group_size=16, residual_length=4)
    found = in_chunks(model, cache, ids, mask, positions)[mask.bool()]
    assert 0 < (found - expected).norm() / expected.norm() < 0.3


@where
@pytest.mark.parametrize(
    "own", [None, MODELS["rotary"], {**MODELS["relative"], "kv_latent_dim": 64}], ids=["heads", "rotary", "relative"]
)
@pytest.mark.parametrize("bits", [16, 8])
@torch.no_grad()
def test_latents_of_an_encoder_s_output(own, bits, device):
    model = make_seq2seq(own, device=device, bits=bits)
    source, target = prompts(device, length=11), prompts(device, length=10)["input_ids"]
    expected = model(**source, decoder_input_ids=target, use_cache=False).logits
    encoded = model.get_encoder()(**source)
    config, one = model.config.decoder, {"rows": 3, "capacity": 12, "dtype": torch.float64, "device": device}
    found = {
        "dynamic": EncoderDecoderCache(DynamicCache(config=config), DynamicCache()),
        "static": EncoderDecoderCache(StaticCache(config, 12), StaticCache(config, 11)),
        "ours": EncoderDecoderCache(DecodeCache(config, **one), DecodeCache(config, **one, cross=True)),
    }
    if device == "cuda":
        found["offloaded"] = EncoderDecoderCache(*(DynamicCache(offloading=True) for _ in range(2)))
    for kind, cache in found.items():
        parts = []
        for part in (target[:, :6], *target[:, 6:].split(1, dim=1)):
            output = model(
                encoder_outputs=encoded,
                attention_mask=source["attention_mask"],
                decoder_input_ids=part,
                past_key_values=cache,
            )
            parts.append(output.logits)
        torch.testing.assert_close(
            torch.cat(parts, dim=1), expected, rtol=0, atol=1e-8, msg=lambda m, kind=kind: f"{kind}: {m}"
        )


@torch.no_grad()
def test_attention_weights_of_both_ways_to_compute():
    model = make()
    ids = prompts()["input_ids"]
    whole = model(ids, output_attentions=True).attentions
    cache = DynamicCache(config=model.config)
    model(ids[:, :-1], past_key_values=cache)
    for found, expected in zip(model(ids[:, -1:], past_key_values=cache, output_attentions=True).attentions, whole):
        torch.testing.assert_close(found, expected[:, :, -1:], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_the_cache_takes_the_bytes_that_the_configuration_says(name, bits):
    config = make(MODELS[name], bits=bits).config
    cache = DecodeCache(config, rows=3, capacity=10, dtype=torch.bfloat16, device="cpu")
    assert sum(layer.nbytes for layer in cache.decode_layers) == 30 * config.kv_bytes_per_token
    beside = 0 if cache.positions is None else 4 * 30
    assert cache.nbytes == 30 * config.kv_bytes_per_token + beside
    assert (beside > 0) == (name in ROTATED)


@pytest.mark.parametrize("bits", [16, 4])
def test_so_do_those_of_cross_attention(bits):
    config = make_seq2seq(bits=bits).config.decoder
    cache = DecodeCache(config, rows=3, capacity=10, dtype=torch.bfloat16, device="cpu", cross=True)
    assert cache.nbytes == 30 * config.cross_kv_bytes_per_token


@torch.no_grad()
def test_a_cache_is_reordered_copied_and_emptied():
    model = make(bits=8)
    ids = prompts()["input_ids"]
    positions = torch.arange(9) + torch.tensor([[0], [20], [50]])
    cache = DecodeCache(model.config, rows=3, capacity=16, dtype=torch.float64, device="cpu")
    expected = model(ids, position_ids=positions).logits[:, -1]
    model(ids[:, :-1], position_ids=positions[:, :-1], past_key_values=cache)
    order = torch.tensor([2, 0, 0])
    other = pickle.loads(pickle.dumps(copy.deepcopy(cache)))
    other.reorder_cache(order)
    for held, rows in ((other, order), (cache, torch.arange(3))):
        found = model(ids[rows, -1:], position_ids=positions[rows, -1:], past_key_values=held).logits[:, -1]
        torch.testing.assert_close(found, expected[rows], rtol=0, atol=1e-8)
    cache.reset()
    assert cache.get_seq_length() == 0
    found = model(ids, position_ids=positions, past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kv_latent_heads": 0}, "kv_latent_heads must be a positive whole number, got 0"),
        ({"kv_latent_heads": -3}, "kv_latent_heads must be a positive whole number, got -3"),
        ({"kv_latent_heads": 2.0}, "kv_latent_heads must be a positive whole number, got 2.0"),
        ({"kv_latent_heads": 5}, "must be divisible by kv_latent_heads"),
        ({"kv_latent_dim": 0}, "kv_latent_dim must be a positive whole number, got 0"),
        ({"kv_latent_dim": [32, None, 32]}, "kv_latent_dim must be a positive whole number, got None"),
        ({"kv_latent_dim": "32"}, "kv_latent_dim must be a positive whole number, got '32'"),
        ({"kv_latent_dim": [32, 32]}, "kv_latent_dim has 2 entries for 3 layers"),
        ({"kv_latent_dim": 40, "kv_latent_bits": 4}, "a multiple of 32, got 40"),
        ({"kv_latent_bits": 5}, "kv_latent_bits must be 16, 8 or 4, got 5"),
        ({"num_key_value_heads": 2}, "num_key_value_heads must be 1 with kv_latent_dim.*got 2"),
        ({"cross_kv_latent_dim": 16}, "cross_num_key_value_heads must be 1 with cross_kv_latent_dim.*got None"),
        ({"qk_head_dim": 8}, "qk_head_dim of layer 0 must be twice the 6 pairs"),
        ({"rope_frequencies": None}, "kv_latent_dim needs rope_frequencies"),
    ],
    ids=str,
)
def test_configurations_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        MQAConfig(**{**STACK, **MODELS["rotary"], **fields})


def test_what_a_cache_of_latents_refuses():
    config, one = make().config, {"rows": 1, "capacity": 4, "device": "cpu"}
    with pytest.raises(ValueError, match=r"cannot be cached in float8.*kv_latent_bits=16"):
        DecodeCache(config, dtype=torch.float8_e4m3fn, **one)
    with pytest.raises(ValueError, match="keys must be one of rebuilt, expanded, got 'kept'"):
        DecodeCache(config, dtype=torch.float64, keys="kept", **one)
    cache = DecodeCache(config, dtype=torch.float64, **one)
    with pytest.raises(ValueError, match="this cache holds latents"):
        cache.update(torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 2, 8), 0)


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("name", ["rotary", "half of a head", "learned"])
def test_saving_and_loading(name, bits, tmp_path):
    model, arguments = make(MODELS[name], bits=bits), prompts()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    expected = model(**arguments).logits
    copies = {
        "loaded": loaded,
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.load(io.BytesIO(pickle.dumps(model))),
    }
    for other in copies.values():
        assert other.config.to_dict() == {
            **model.config.to_dict(),
            "_name_or_path": other.config._name_or_path,
            "architectures": other.config.architectures,
            "dtype": other.config.to_dict()["dtype"],
        }
        torch.testing.assert_close(other(**arguments).logits, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["rotary", "half of a head", "learned"])
def test_a_rounded_latent_has_a_gradient(name):
    model = make(MODELS[name], bits=4).train()
    ids = prompts()["input_ids"]
    model(ids, labels=ids).loss.backward()
    for parameter, gradient in ((n, p.grad) for n, p in model.named_parameters()):
        assert gradient is not None, parameter
        assert gradient.abs().sum() > 0, parameter


def test_the_trainer_trains_it(tmp_path):
    model = make(bits=8)
    ids = prompts(rows=8)["input_ids"]
    before = model(ids, labels=ids).loss.item()
    arguments = TrainingArguments(
        tmp_path, max_steps=20, learning_rate=1e-2, report_to="none", save_strategy="no", use_cpu=True
    )
    Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids]).train()
    assert model.eval()(ids, labels=ids).loss.item() < before / 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    model = make(MODELS["half of a head"], bits=8).train()
    ids = prompts()["input_ids"]
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)
