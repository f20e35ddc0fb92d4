"""Latents in the fast loop behind `generate()`, against transformers' own loop."""

import copy
import pickle

import pytest
import torch
from isolated import run_without_the_package
from latents import MODELS, ROPE, ROTATED, WINDOWS, make, make_seq2seq, prompts, with_heads
from stand_ins import use_references

from mqa_hf import kernel_latent_mqa, latent_mqa, latent_step_mqa, request_mqa
from mqa_hf.base.code import runtime_files
from mqa_hf.cache_mqa import KEYS, DecodeCache
from mqa_hf.kernel_append_mqa import naive_append
from mqa_hf.kernel_attend_mqa import naive_attend
from mqa_hf.kernel_latent_append_mqa import naive_append_latent
from mqa_hf.kernel_latent_mqa import naive_attend_latent

where = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
WAYS = [(name, keys) for name in MODELS for keys in (KEYS if name in ROTATED else KEYS[:1])]


def made(make, *arguments, device, **options):
    """In float32 on a CUDA device, where the kernels are."""
    return make(*arguments, device=device, dtype=torch.float64 if device == "cpu" else torch.float32, **options)


def both(model, keys="auto", **arguments):
    """Tokens of the fast loop and of transformers'; that the fast loop was taken is checked."""
    arguments = {"max_new_tokens": 24, "do_sample": False, **arguments}
    model.decoding.release()
    model.decoding.enabled, model.decoding.keys = True, keys
    torch.manual_seed(7)
    ours = model.generate(**arguments)
    engine = model.decoding.engine
    assert engine is not None
    assert keys in ("auto", engine.cache.keys) or engine.cache.positions is None
    if model.device.type == "cuda":
        assert engine.graph.captured is not None
    model.decoding.enabled = False
    torch.manual_seed(7)
    theirs = model.generate(**arguments)
    model.decoding.enabled = True
    return ours, theirs


@where
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize(("name", "keys"), WAYS)
def test_greedy_tokens_of_every_kind_of_model(name, keys, bits, device):
    model = made(make, MODELS[name], device=device, bits=bits)
    ours, theirs = both(model, keys, **prompts(device))
    assert ours.tolist() == theirs.tolist()
    assert len(set(ours[:, 9:].flatten().tolist())) > 3


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(("name", "keys"), WAYS)
def test_the_step_that_calls_kernels_gives_the_same(name, keys, beams, monkeypatch):
    """With the kernels' references in their place."""
    use_references(monkeypatch)
    monkeypatch.setattr(latent_step_mqa, "append", naive_append)
    monkeypatch.setattr(latent_step_mqa, "attend", naive_attend)
    monkeypatch.setattr(latent_step_mqa, "append_latent", naive_append_latent)
    monkeypatch.setattr(latent_step_mqa, "attend_latent", naive_attend_latent)
    exact = kernel_latent_mqa.latent_angles  # which knows no float64, and need not: angles are computed in float32
    monkeypatch.setattr(latent_step_mqa, "latent_angles", lambda cos, sin, dtype: exact(cos, sin, torch.float32))
    monkeypatch.setattr(kernel_latent_mqa, "unpacked_angles", lambda angles, dtype: angles)
    model, arguments = make(MODELS[name], bits=8), {**prompts(), "max_new_tokens": 12, "num_beams": beams}
    ours, theirs = both(model, keys, **arguments)
    assert ours.tolist() == theirs.tolist()
    engine = model.decoding.engine
    tables = engine.decode_step.kernel_tables
    before = [tables.angles, *tables.biases.values(), *tables.frequencies.values()]
    assert (len(before) > 1) == (name in ROTATED)
    assert model.generate(**arguments, do_sample=False).tolist() == theirs.tolist()
    assert model.decoding.engine is engine  # a graph would read everything where it was
    after = [tables.angles, *tables.biases.values(), *tables.frequencies.values()]
    assert all(a is b for a, b in zip(before, after))


def test_kernels_are_read_where_that_takes_less_time(monkeypatch):
    peft = pytest.importorskip("peft")
    monkeypatch.setattr(latent_step_mqa, "available", lambda device: True)
    monkeypatch.setattr(latent_step_mqa, "hopper", lambda device: True)
    monkeypatch.setattr(latent_step_mqa, "shared_memory", lambda device: 227 * 1024)

    def chosen(dtype=torch.bfloat16, **fields):
        base = {"num_hidden_layers": 1, "num_attention_heads": 32, "kv_latent_heads": 32, "hidden_size": 128}
        frequencies = [[c % 32 for c in range(fields["qk_head_dim"] // 2)]]
        rotary = {"head_dim": 64, "rope_parameters": ROPE, "rope_frequencies": frequencies}
        return make({**base, **rotary, **fields}, dtype=dtype)

    def kept(model, rows=64):
        return latent_step_mqa.keys_to_keep(model, {}, rows, 4096)

    assert kept(chosen(qk_head_dim=512, kv_latent_dim=256)) == "expanded"  # bound by 2rW operations
    assert kept(chosen(qk_head_dim=512, kv_latent_dim=256), rows=1) == "rebuilt"  # keys to write take longer
    assert kept(chosen(qk_head_dim=512, kv_latent_dim=128, kv_latent_bits=4)) == "rebuilt"
    assert kept(chosen(qk_head_dim=128, kv_latent_dim=128)) == "rebuilt"  # 256 bytes in place of 512
    assert kept(chosen(qk_head_dim=128, kv_latent_dim=96)) == "expanded"  # a width that is not made for Hopper
    assert kept(chosen(qk_head_dim=128, kv_latent_dim=128, dtype=torch.float32)) == "expanded"
    assert kept(chosen(qk_head_dim=1024, kv_latent_dim=256)) == "rebuilt"  # no kernel attends to keys so wide
    model = chosen(qk_head_dim=128, kv_latent_dim=128)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["k_proj"]))
    assert kept(model) == "expanded"
    model = chosen(qk_head_dim=128, kv_latent_dim=128)
    model.decoding.kernels = False
    assert kept(model) == "expanded"


@pytest.mark.parametrize(("name", "keys"), WAYS)
def test_they_are_those_of_the_model_with_heads(name, keys):
    model = make(MODELS[name])
    ours, _ = both(model, keys, **prompts())
    assert ours.tolist() == with_heads(model).generate(**prompts(), max_new_tokens=24, do_sample=False).tolist()


OPTIONS = [
    {"num_beams": 3},
    {"num_beams": 3, "num_return_sequences": 2, "eos_token_id": [11, 31, 53, 60], "early_stopping": True},
    {"num_beams": 2, "do_sample": True},
    {"do_sample": True, "top_k": 8, "num_return_sequences": 2},
    {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.2},
    {"prefill_chunk_size": 4},
    {"eos_token_id": [11, 31, 53, 60, 71]},
]


@where
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("name", ["rotary", "windows, half of a head", "alibi"])
def test_what_generate_offers(name, keys, options, device):
    if device == "cuda" and options.get("do_sample"):
        pytest.skip("a captured step draws other numbers")
    model = made(make, MODELS[name], device=device, bits=8 if device == "cpu" else 16)
    ours, theirs = both(model, keys, **prompts(device), **options)
    assert ours.tolist() == theirs.tolist()


@where
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 1, "num_return_sequences": 2}])
@pytest.mark.parametrize("own", [None, MODELS["rotary"], {**MODELS["half of a head"], **WINDOWS}, MODELS["learned"]])
def test_tokens_of_encoder_decoder_models(own, options, device):
    model = made(make_seq2seq, own, device=device, bits=8 if device == "cpu" else 16)
    arguments = prompts(device)
    arguments["attention_mask"] = arguments["attention_mask"].flip(1)
    for keys in KEYS:
        ours, theirs = both(model, keys, **arguments, **options)
        assert ours.tolist() == theirs.tolist()


@where
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("name", ["half of a head", "relative"])
def test_the_cache_grows(name, keys, beams, device, monkeypatch):
    monkeypatch.setattr(request_mqa, "ROOM", 8)
    model = made(make, MODELS[name], device=device)
    ours, theirs = both(model, keys, **prompts(device), max_new_tokens=140, num_beams=beams)
    assert ours.tolist() == theirs.tolist()
    assert model.decoding.engine.cache.capacity >= 128


@where
@pytest.mark.parametrize("capacity", [4, 64])
@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize(("name", "keys"), WAYS)
def test_a_cache_that_is_given_is_continued(name, keys, bits, capacity, device):
    """By both loops in turn, with rows that are padded."""
    model = made(make, MODELS[name], device=device, bits=bits)
    text = prompts(device)
    cache = DecodeCache(model.config, rows=3, capacity=capacity, dtype=model.dtype, device=device, keys=keys)
    for turn in range(4):
        model.decoding.enabled = turn != 2
        found = model.generate(**text, past_key_values=cache, max_new_tokens=10, do_sample=False)
        assert cache.get_seq_length() == found.shape[1] - 1
        model.decoding.enabled = False
        assert found.tolist() == model.generate(**text, max_new_tokens=10, do_sample=False).tolist()
        more = prompts(device, length=5)["input_ids"]
        longer = torch.cat((found, more), 1)
        mask = torch.nn.functional.pad(text["attention_mask"], (0, 15), value=1)
        text = {"input_ids": longer, "attention_mask": mask}


@pytest.mark.parametrize("attention", ["mqa", "eager"])
@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("name", ["rotary", "half of a head", "windows", "alibi"])
def test_keys_of_a_long_cache_are_rebuilt_a_few_rows_at_a_time(name, bits, attention, monkeypatch):
    model = make(MODELS[name], bits=bits)
    model.set_attn_implementation(attention)
    text, found = prompts(), []
    for at_once in (latent_mqa.AT_ONCE, 2 * 9 * 128, 1):  # all rows, a few, one
        monkeypatch.setattr(latent_mqa, "AT_ONCE", at_once)
        cache = DecodeCache(model.config, rows=3, capacity=16, dtype=model.dtype, device="cpu", keys="rebuilt")
        first = {"input_ids": text["input_ids"][:, :6], "attention_mask": text["attention_mask"][:, :6]}
        with torch.no_grad():
            model(**first, past_key_values=cache)
            found.append(
                model(
                    text["input_ids"][:, 6:],
                    attention_mask=text["attention_mask"],
                    past_key_values=cache,
                    output_attentions=attention == "eager",
                )
            )
    whole, *others = found
    for other in others:
        assert torch.allclose(other.logits, whole.logits, atol=1e-12)
        for one, same in zip(other.attentions or (), whole.attentions or ()):
            assert torch.allclose(one, same, atol=1e-12)


@pytest.mark.parametrize("keys", KEYS)
def test_a_decode_cache_serves_beams_of_transformers_loop(keys):
    model = make(MODELS["half of a head"], bits=8)
    model.decoding.enabled = False
    arguments = {**prompts(), "max_new_tokens": 10, "do_sample": False, "num_beams": 3}
    plain = model.generate(**arguments)
    cache = DecodeCache(model.config, rows=9, capacity=4, dtype=model.dtype, device="cpu", keys=keys)
    assert plain.tolist() == model.generate(**arguments, past_key_values=cache).tolist()


@pytest.mark.parametrize("seq2seq", [False, True])
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("name", ["rotary", "half of a head", "windows", "learned"])
def test_the_cache_that_is_returned_is_transformers_own(name, keys, seq2seq):
    model = make_seq2seq(MODELS[name]) if seq2seq else make(MODELS[name])
    options = {"num_return_sequences": 2, "do_sample": True, "top_k": 1} if seq2seq else {}
    ours, theirs = both(model, keys, **prompts(), return_dict_in_generate=True, **options)
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    caches = [ours.past_key_values, theirs.past_key_values]
    if seq2seq:
        caches = [part for cache in caches for part in (cache.self_attention_cache, cache.cross_attention_cache)]
        caches = [caches[:2], caches[2:]]
    for one, other in [caches] if not seq2seq else zip(*caches):
        for a, b in zip(one.layers, other.layers):
            # What a row of padding holds at its first positions is of no meaning, and differs.
            torch.testing.assert_close(a.keys[0], b.keys[0], rtol=0, atol=1e-9)
            torch.testing.assert_close(a.values[0], b.values[0], rtol=0, atol=1e-9)


@where
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("name", ["rotary", "half of a head", "windows", "relative"])
def test_graphs_and_kernels_have_switches(name, keys, graphs, device):
    model = made(make, MODELS[name], device=device)
    model.decoding.kernels, model.decoding.graphs, model.decoding.keys = False, graphs, keys
    for beams in (1, 3):
        arguments = {**prompts(device), "max_new_tokens": 24, "do_sample": False, "num_beams": beams}
        model.decoding.enabled = True
        ours = model.generate(**arguments)
        engine = model.decoding.engine
        assert not engine.decode_step.triton
        assert (engine.graph.captured is not None) == (graphs and device == "cuda")
        model.decoding.enabled = False
        assert ours.tolist() == model.generate(**arguments).tolist()


@where
def test_a_longer_text_in_the_same_buffers_has_its_own_positions(device):
    model = made(make, device=device)
    for keys in KEYS:
        for length, new in ((9, 20), (30, 40), (4, 5), (60, 60)):
            model.decoding.keys, found = keys, []
            for enabled in (True, False):
                model.decoding.enabled = enabled
                arguments = {**prompts(device, 3, length), "max_new_tokens": new, "do_sample": False}
                found.append(model.generate(**arguments).tolist())
            assert found[0] == found[1]


def skipping(mask):
    """Positions of rows that leave some out."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    positions[:, 7:] += 5
    return positions


@where
@pytest.mark.parametrize("name", ["rotary", "half of a head"])
def test_positions_that_skip_are_kept_with_their_keys(name, device):
    model = made(make, MODELS[name], device=device)
    arguments = prompts(device)
    positions = skipping(arguments["attention_mask"])
    model.decoding.keys = "rebuilt"
    ours = model.generate(**arguments, position_ids=positions, max_new_tokens=24, do_sample=False)
    assert model.decoding.engine.cache.keys == "expanded"
    model.decoding.enabled = False
    theirs = model.generate(**arguments, position_ids=positions, max_new_tokens=24, do_sample=False)
    assert ours.tolist() == theirs.tolist()
    model.decoding.enabled = True
    assert ours.tolist() != model.generate(**arguments, max_new_tokens=24, do_sample=False).tolist()
    assert model.decoding.engine.cache.keys == "rebuilt"  # padding has positions of its own and counts for nothing


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("name", ["rotary", "half of a head"])
def test_a_cache_whose_positions_skip_is_continued(name, keys):
    model = make(MODELS[name])
    ids = prompts()["input_ids"]
    positions = skipping(torch.ones_like(ids))
    cache = DecodeCache(model.config, rows=3, capacity=40, dtype=model.dtype, device="cpu", keys=keys)
    with torch.no_grad():
        model(ids[:, :-1], position_ids=positions[:, :-1], past_key_values=cache)
    options = {"position_ids": positions, "max_new_tokens": 24, "do_sample": False}
    found = model.generate(ids, past_key_values=cache, **options)
    assert (model.decoding.engine is None) == (keys == "rebuilt")
    model.decoding.enabled = False
    assert found.tolist() == model.generate(ids, **options).tolist()


@pytest.mark.parametrize("way", KEYS)
def test_adapters_are_trained_and_applied(way):
    peft = pytest.importorskip("peft")
    model = make(MODELS["half of a head"])
    names = ["q_proj", "kv_proj", "k_proj", "o_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=names, modules_to_save=["v_up"]))
    ids = prompts()["input_ids"]
    optimizer = torch.optim.Adam((p for p in adapted.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(30):
        losses.append(adapted(ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] / 2
    moved = {n.split(".lora_B")[0].split(".")[-1] for n, p in adapted.named_parameters() if "lora_B" in n and p.any()}
    assert moved == set(names)
    adapted.eval()
    model.decoding.keys = way
    arguments = {**prompts(), "max_new_tokens": 12, "do_sample": False}
    with adapted.disable_adapter():
        bare = adapted.generate(**arguments)
    ours = adapted.generate(**arguments)
    assert model.decoding.engine.cache.keys == way
    model.decoding.enabled = False
    assert ours.tolist() == adapted.generate(**arguments).tolist() != bare.tolist()
    with adapted.disable_adapter():
        assert bare.tolist() == adapted.generate(**arguments).tolist()
    model.decoding.enabled = True
    adapted.merge_adapter()
    assert ours.tolist() == adapted.generate(**arguments).tolist()


def test_copies_decode_alike():
    model = make(MODELS["half of a head"], bits=4)
    model.decoding.keys = "rebuilt"
    arguments = {**prompts(), "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(**arguments).tolist()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.decoding.keys == "rebuilt"
        assert other.decoding.engine is None
        assert other.generate(**arguments).tolist() == expected


def test_projections_become_views_of_one_tensor(tmp_path):
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.generate(**prompts(), max_new_tokens=3, do_sample=False)
    own = model.model.layers[1].self_attn
    assert own.q_proj.weight.untyped_storage().data_ptr() == own.kv_proj.weight.untyped_storage().data_ptr()
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_what_is_asked_for_must_be_known():
    model = make()
    with pytest.raises(ValueError, match="keys must be one of auto, rebuilt, expanded, got 'kept'"):
        model.decoding.keys = "kept"
    with pytest.raises(ValueError, match="got None"):
        type(model.decoding)(keys=None)
    model.decoding.cache_dtype = torch.float8_e4m3fn
    with pytest.raises(ValueError, match="kv_latent_bits=16; leave cache_dtype at None"):
        model.generate(**prompts(), max_new_tokens=3, do_sample=False)


def test_keys_are_kept_while_there_is_room(monkeypatch):
    model = make()
    size = (3 * 32 + 12 + 8 + 20) * 8 * 3 * 64  # latents and keys of three layers, three rows of 64 positions
    for free, kept in ((size + 1, "expanded"), (size, "rebuilt"), (float("inf"), "expanded")):
        monkeypatch.setattr(latent_step_mqa, "room", lambda model, free=free: free)
        model.generate(**prompts(), max_new_tokens=24, do_sample=False)
        assert model.decoding.engine.cache.keys == kept
    assert model.decoding.engine.cache.nbytes == size


PROBE = """
import json, torch
from transformers import AutoModelForCausalLM
directory, ids = json.loads(sys.argv[1])
model, info = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
tokens = {}
for keys in ("rebuilt", "expanded"):
    model.decoding.keys = keys
    tokens[keys] = model.eval().generate(torch.tensor(ids), max_new_tokens=8, do_sample=False).tolist()
    assert model.decoding.engine.cache.keys == keys
print(json.dumps(tokens))
"""


def test_it_loads_as_remote_code_where_the_package_is_not_importable(tmp_path):
    model = make(MODELS["half of a head"], bits=8)
    names = {path.name for path in runtime_files(model)}
    assert {"latent_mqa.py", "latent_step_mqa.py", "packing_mqa.py"} <= names
    model.save_pretrained(tmp_path / "model")
    ids = prompts()["input_ids"]
    found = run_without_the_package(PROBE, tmp_path / "model", ids.tolist(), scratch=tmp_path)
    assert found["rebuilt"] == found["expanded"] == model.generate(ids, max_new_tokens=8, do_sample=False).tolist()


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {
            "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 10,
            "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0],
        },
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
@pytest.mark.parametrize("bits", [16, 8])
def test_keys_keep_the_frequencies_of_their_time(rope, bits):
    """Where these depend on the length, which the text passes, every cache gives the tokens of transformers' own."""
    fields = {**MODELS["rotary"], "rope_parameters": {"rope_theta": 100.0, **rope}, "max_position_embeddings": 12}

    def tokens(**options):
        return make(fields, bits=bits).generate(**prompts(), max_new_tokens=20, do_sample=False, **options)

    expected = tokens()
    for keys in ("rebuilt", "expanded"):
        cache = DecodeCache(make(fields).config, 3, 4, torch.float64, "cpu", keys=keys)
        assert cache.keys == "expanded"
        assert torch.equal(tokens(past_key_values=cache), expected)
