"""Norms of queries and keys, caps, sinks, orders of norms and rotations by layer type: in the fast loop, and in all
the ways in which transformers runs the model."""

import pytest
import torch
from attention_cases import ATTENTION_CASES, BY_TYPE, HALF
from chunks import in_chunks
from isolated import run_without_the_package
from latents import randomise
from stand_ins import use_references
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from mqa_hf import MQAConfig, MQAForCausalLM

STACK = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "eos_token_id": None,
    "pad_token_id": 0,
}
where = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
SOME = ("layer norms of all heads", "capped attention, windows", "sinks", "two rotations, wide heads",
        "scaled queries, caps and norms")  # fmt: skip
CASES = pytest.mark.parametrize("name", ATTENTION_CASES)


def make(name, device="cpu", dtype=torch.float64, **fields):
    torch.manual_seed(1)
    return randomise(MQAForCausalLM(MQAConfig(**{**STACK, **ATTENTION_CASES[name], **fields}))).to(device, dtype)


def padded(rows=3, length=13):
    """Token ids, mask and positions of left-padded rows."""
    ids = torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : 3 * row] = 0
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


def tokens(model, device="cpu", enabled=True, **options):
    ids, mask, _ = padded()
    model.decoding.enabled = enabled
    arguments = {"input_ids": ids.to(device), "attention_mask": mask.to(device), "max_new_tokens": 16}
    found = model.generate(**arguments, do_sample=False, **options).tolist()
    assert (model.decoding.engine is not None) or not enabled
    return found


@pytest.fixture
def references(monkeypatch):
    """The step that calls kernels, with their references in their place."""
    use_references(monkeypatch)


@where
@pytest.mark.parametrize("beams", [1, 3])
@CASES
def test_the_step_gives_the_tokens_of_transformers_loop(name, beams, device):
    model = make(name, device, torch.float64 if device == "cpu" else torch.float32)
    ours = tokens(model, device, num_beams=beams)
    if device == "cuda":
        assert model.decoding.engine.graph.captured is not None
        assert model.decoding.engine.decode_step.triton
    assert ours == tokens(model, device, enabled=False, num_beams=beams)
    assert len({token for row in ours for token in row[13:]}) > 3


@pytest.mark.parametrize("beams", [1, 3])
@CASES
def test_so_does_the_step_that_calls_kernels(name, beams, references):
    model = make(name)
    expected = tokens(model, enabled=False, num_beams=beams)
    assert tokens(model, num_beams=beams) == expected
    engine = model.decoding.engine
    joined = dict(engine.decode_step.norms.joined)
    assert engine.decode_step.triton
    assert sorted(joined) == ([0, 1, 2] if model.config.qk_norm and not model.config.query_maps else [])
    assert tokens(model, num_beams=beams) == expected
    assert model.decoding.engine is engine  # a graph would read the weights of norms where they were
    assert all(now is before for i in joined for now, before in zip(engine.decode_step.norms.joined[i], joined[i]))


@pytest.mark.parametrize("name", ["norms by head", "layer norms of all heads after the rotation", "sinks"])
def test_weights_that_were_changed_meanwhile_are_seen(name, references):
    model = make(name)
    before = tokens(model)
    engine = model.decoding.engine
    with torch.no_grad():
        for attention in (layer.self_attn for layer in model.model.layers):
            if attention.sinks is not None:
                attention.sinks += 2.0
            else:
                attention.q_norm.weight *= 1.5
                attention.k_norm.weight.neg_()
    after = tokens(model)
    assert model.decoding.engine is engine
    assert after == tokens(model, enabled=False) != before


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("name", ["norms by head", "layer norms of all heads after the rotation"])
def test_trained_copies_of_norms_are_applied(name, kernels, request):
    peft = pytest.importorskip("peft")
    if kernels:
        request.getfixturevalue("references")
    model = make(name)
    bare = tokens(model)
    options = {"target_modules": ["up_proj"], "modules_to_save": ["q_norm", "k_norm"]}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
    with torch.no_grad():
        for module, parameter in adapted.named_parameters():
            if "modules_to_save" in module:
                parameter.uniform_(0.5, 1.5)
    adapted.eval()
    assert tokens(model) == tokens(model, enabled=False) != bare
    with adapted.disable_adapter():
        assert tokens(model) == tokens(model, enabled=False) == bare
    assert tokens(model) != bare


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@CASES
@torch.no_grad()
def test_chunks_then_tokens_give_the_uncached_logits(name, cache):
    model = make(name)
    ids, mask, positions = padded()
    expected = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    past = DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(model.config, max_cache_len=20)
    seen = mask.bool()
    found = in_chunks(model, past, ids, mask, positions)
    torch.testing.assert_close(found[seen], expected[seen], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cache", [True, False])
@CASES
def test_a_static_cache_and_none_give_the_same_tokens(name, cache):
    model = make(name)
    options = {"cache_implementation": "static", "disable_compile": True} if cache else {"use_cache": False}
    assert tokens(model, enabled=False, **options) == tokens(model)


@pytest.mark.parametrize(
    "fields", [{}, HALF, {"qk_head_dim": [8, 16, 24]}, {"rope_layers": [True, False, True]}], ids=str
)
@torch.no_grad()
def test_two_rotations_that_are_alike_are_one(fields):
    ids, mask, _ = padded()
    found = []
    one = {"rope_type": "default", "rope_theta": 100.0, **fields.get("rope_parameters", {})}
    for rope in (one, {kind: dict(one) for kind in BY_TYPE["rope_parameters"]}):
        model = make("two rotations", **{**fields, "rope_parameters": rope})
        found.append((model(ids, attention_mask=mask).logits, tokens(model)))
    torch.testing.assert_close(found[1], found[0])


def takes_flex(config):
    """Whether flex attention runs a model: widths are powers of two there, and nothing but cap and sinks is added."""
    widths = (config.qk_head_dim, config.v_head_dim)
    return config.position_embedding == "rotary" and not any(isinstance(width, list) or width % 16 for width in widths)


@where
@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
@CASES
@torch.no_grad()
def test_other_attention_implementations_agree_or_are_refused(name, implementation, mask, device):
    model = make(name, device, torch.float32, **wide(name))
    ids, seen, positions = (x.to(device) for x in padded())
    given = {"attention_mask": seen, "position_ids": positions} if mask else {}
    expected = model(ids, **given).logits
    config = model.config
    field = "attention_softcap" if config.attention_softcap else "attention_sinks" if config.attention_sinks else ""
    if implementation == "sdpa" and field:
        with pytest.raises(ValueError, match=f"sdpa does not support {field}; use mqa or eager or flex_attention"):
            model.set_attn_implementation(implementation)
        return
    if implementation == "flex_attention" and not (takes_flex(config) and (device == "cuda" or name in SOME)):
        pytest.skip("flex attention does not take it, or compiles for long")
    model.set_attn_implementation(implementation)
    if implementation == "flex_attention" and config.attention_sinks and device == "cpu":
        with pytest.raises(ValueError, match="sinks cannot be run on CPU with flex attention"):
            model(ids, **given)
        return
    output = model(ids, **given, output_attentions=implementation == "eager")
    seen = seen.bool() if mask else torch.ones_like(seen).bool()
    torch.testing.assert_close(output.logits[seen], expected[seen], atol=1e-3, rtol=1e-3)


def wide(name):
    return {} if "qk_head_dim" in ATTENTION_CASES[name] or "v_head_dim" in ATTENTION_CASES[name] else {"head_dim": 16}


@pytest.mark.parametrize("implementation", ["mqa", pytest.param("flex_attention", marks=pytest.mark.gpu)])
@CASES
def test_gradients_are_those_of_eager_attention(name, implementation):
    flex = implementation == "flex_attention"
    device, dtype = ("cuda", torch.float32) if flex else ("cpu", torch.float64)
    model = make(name, device, dtype, **wide(name)).train()
    if flex and not takes_flex(model.config):
        pytest.skip("flex attention does not take it")
    ids, mask, positions = (x.to(device) for x in padded())
    labels = ids.masked_fill(mask.cumsum(1) < 2, -100)  # padding predicts nothing
    found = []
    for kind in ("eager", implementation):
        model.set_attn_implementation(kind)
        model.zero_grad()
        model(ids, attention_mask=mask, position_ids=positions, labels=labels).loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for n, gradient in found[0].items():
        assert gradient.norm() > 1e-5 or n.endswith("k_norm.bias")  # the same for all keys, if after the rotation
        relative, least = (2e-3, 1e-4) if flex else (1e-9, 1e-5)
        assert (found[1][n] - gradient).norm() <= relative * (gradient.norm() + least)


@CASES
def test_gradient_checkpointing_changes_no_gradient(name):
    model = make(name).train()
    ids, mask, _ = padded()
    found = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters()})
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("name", SOME)
@torch.no_grad()
def test_full_graph_compilation(name):
    torch.compiler.reset()
    model = make(name)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    ids, _, _ = padded()
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    found = []
    for runner in (model, compiled):
        cache = StaticCache(model.config, max_cache_len=20)
        model(ids, past_key_values=cache)
        found.append(runner(ids[:, :1], past_key_values=cache, position_ids=torch.full((3, 1), 13)).logits)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 0.02), (torch.bfloat16, 0.15)])
@CASES
@torch.no_grad()
def test_in_16_bits_it_is_as_near_as_eager_attention(name, dtype, bound):
    ids, mask, positions = padded()
    given = {"attention_mask": mask, "position_ids": positions}
    short = make(name, dtype=dtype)
    truth = make(name, dtype=dtype).double()(ids, **given).logits[mask.bool()]
    distances = []
    for implementation in ("mqa", "eager"):
        short.set_attn_implementation(implementation)
        distances.append(float((short(ids, **given).logits[mask.bool()] - truth).norm() / truth.norm()))
    assert 0 < distances[0] <= max(1.3 * distances[1], bound / 10)
    assert distances[0] < bound


@CASES
def test_a_saved_model_is_the_same(name, tmp_path):
    model = make(name, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.config.to_dict() == {**model.config.to_dict(), "_name_or_path": str(tmp_path)}
    ids, mask, _ = padded()
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)


PROBE = """
import json, torch
from transformers import AutoModelForCausalLM
found = []
directories, ids = json.loads(sys.argv[1])
for directory in directories:
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
    found.append(model.generate(torch.tensor(ids), max_new_tokens=8, do_sample=False).tolist())
    assert model.decoding.engine is not None
print(json.dumps(found))
"""


def test_they_load_as_remote_code_where_the_package_is_not_importable(tmp_path):
    names = ["layer norms of all heads after the rotation", "sinks and caps", "two rotations, chosen frequencies",
             "scaled queries, caps and norms"]  # fmt: skip
    ids, _, _ = padded()
    expected = []
    for name in names:
        model = make(name, dtype=torch.float32)
        model.save_pretrained(tmp_path / name)
        expected.append(model.generate(ids, max_new_tokens=8, do_sample=False).tolist())
    found = run_without_the_package(PROBE, [str(tmp_path / name) for name in names], ids.tolist(), scratch=tmp_path)
    assert found == expected


def test_latents_need_queries_that_are_normalised_before_they_are_rotated():
    latents = {"kv_latent_dim": 32, "qk_head_dim": 8, "rope_frequencies": [[0, 1, 2, 3]] * 3}
    assert MQAConfig(**{**STACK, **latents, "qk_norm": "head"}).latent
    with pytest.raises(ValueError, match="before they are rotated"):
        MQAConfig(**{**STACK, **latents, "qk_norm": "head", "qk_norm_after_rotation": True})
