"""The canonical model by itself: caches, training, and the ways in which transformers runs it."""

import copy

import pytest
import torch
from chunks import in_chunks
from transformers import DynamicCache, StaticCache, Trainer, TrainingArguments
from transformers.activations import ACT2CLS

from mqa_hf import MQAConfig, MQAForCausalLM, MQAModel

CONFIGS = {
    "rotary": {},
    "grouped": {"num_key_value_heads": 2},
    "learned, mask positions": {
        "position_embedding": "learned",
        "positions_from_mask": True,
        "norm_type": "layer_norm",
    },
    "windows": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 4},
    "all windows": {"layer_types": ["sliding_attention"] * 3, "sliding_window": 4},
    "alibi": {"position_embedding": "alibi", "alibi_slopes": [0.5, 0.25, 0.125, 0.06, 0.03, 0.01]},
    "alibi, windows": {
        "position_embedding": "alibi",
        "alibi_slopes": [0.5, 0.25, 0.125, 0.06, 0.03, 0.01],
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 4,
    },
    "relative": {"position_embedding": "relative", "relative_buckets": 8, "relative_max_distance": 12},
    "sinusoidal, scaled and normed embeddings": {
        "position_embedding": "sinusoidal",
        "embedding_scale": 3.0,
        "embedding_norm": True,
        "norm_type": "layer_norm",
        "norm_bias": False,
        "logit_scale": 0.3,
    },
    "wide keys, narrow values": {"qk_head_dim": 16, "v_head_dim": 4},
    "widths of each layer": {
        "qk_head_dim": [8, 14, 6],
        "v_head_dim": [4, 6, 10],
        "rope_frequencies": [[0, 0, 3], [1, 2], []],
    },
    "post-norm, projected": {"residual": "post_norm", "final_norm": False, "embedding_size": 20},
    "parallel, partial rotary": {
        "residual": "parallel_shared_norm",
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
    },
    "learned activation": {"hidden_act": "xielu", "gated_mlp": False},
}


def make(**fields) -> MQAForCausalLM:
    config = MQAConfig(
        **{
            "vocab_size": 89,
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "max_position_embeddings": 64,
            "bos_token_id": 1,
            "initializer_range": 0.3,
            **fields,
        }
    )
    return MQAForCausalLM(config).eval()


def padded(rows=3, length=13):
    ids = torch.randint(2, 89, (rows, length))
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : 4 * row] = 0
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_chunks_then_tokens_give_the_uncached_logits(fields, cache):
    model = make(**fields)
    ids, mask, positions = padded()
    expected = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    past = DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(model.config, max_cache_len=20)
    seen = mask.bool()
    found = in_chunks(model, past, ids, mask, positions)
    torch.testing.assert_close(found[seen], expected[seen], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("fields", [CONFIGS["rotary"], CONFIGS["grouped"], CONFIGS["windows"]])
@torch.no_grad()
def test_other_attention_implementations_agree(fields, implementation):
    model = make(**{**fields, "hidden_size": 96})
    ids, mask, positions = padded()
    expected = model(ids, attention_mask=mask, position_ids=positions).logits
    assert model.config._attn_implementation == "mqa"
    model.set_attn_implementation(implementation)
    output = model(ids, attention_mask=mask, position_ids=positions, output_attentions=implementation == "eager")
    torch.testing.assert_close(output.logits[mask.bool()], expected[mask.bool()], atol=2e-5, rtol=2e-5)
    if implementation == "eager":
        assert [w.shape for w in output.attentions] == [(3, 6, 13, 13)] * 3


@torch.no_grad()
def test_attention_weights_and_hidden_states_on_request():
    model = make()
    ids, _, _ = padded()
    output = model(ids, output_attentions=True, output_hidden_states=True)
    assert [w.shape for w in output.attentions] == [(3, 6, 13, 13)] * 3
    assert [h.shape for h in output.hidden_states] == [(3, 13, 48)] * 4
    torch.testing.assert_close(output.logits, model(ids).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_one_wide_head_with_all_components_is_multi_head_attention():
    """A head m = H times as wide holds all old heads side by side; each query looks at its own block."""
    many = make(num_key_value_heads=6)
    one = make(num_key_value_heads=1, qk_head_dim=48, v_head_dim=48)
    for wide, plain in zip(one.model.layers, many.model.layers):
        for name, parameter in plain.named_parameters():
            if "q_proj" not in name and "o_proj" not in name:
                wide.get_parameter(name).copy_(parameter)
        query = torch.zeros(6, 6, 8, 48)
        query[range(6), range(6)] = plain.self_attn.q_proj.weight.view(6, 8, 48)
        wide.self_attn.q_proj.weight.copy_(query.view(-1, 48))
        output = torch.zeros(48, 6, 6, 8)
        output[:, range(6), range(6)] = plain.self_attn.o_proj.weight.view(48, 6, 8)
        wide.self_attn.o_proj.weight.copy_(output.view(48, -1))
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        one.get_parameter(name).copy_(many.get_parameter(name))
    ids, mask, positions = padded()
    arguments = {"attention_mask": mask, "position_ids": positions}
    torch.testing.assert_close(
        one(ids, **arguments).logits[mask.bool()], many(ids, **arguments).logits[mask.bool()], atol=1e-4, rtol=1e-4
    )


def test_the_loss_is_the_mean_cross_entropy_of_the_next_token():
    model = make()
    ids, _, _ = padded()
    labels = ids.clone()
    labels[0, :5] = -100
    output = model(ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].reshape(-1, 89), labels[:, 1:].reshape(-1))
    torch.testing.assert_close(output.loss, expected)


def test_gradient_checkpointing_changes_no_gradient():
    model = make(num_key_value_heads=2).train()
    ids, _, _ = padded()
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert model.model.layers[0].gradient_checkpointing
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@torch.no_grad()
def test_packed_documents_do_not_see_each_other():
    model = make()
    one, two = torch.randint(2, 89, (1, 6)), torch.randint(2, 89, (1, 7))
    positions = torch.cat([torch.arange(6), torch.arange(7)])[None]
    packed = model(torch.cat([one, two], 1), position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed[:, 6:], model(two).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_full_graph_compilation_with_a_static_cache():
    model = make(num_key_value_heads=2)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    ids, _, _ = padded()
    caches = [StaticCache(model.config, max_cache_len=20) for _ in range(2)]
    for i, cache in enumerate(caches):
        model(ids, past_key_values=cache)
        runner = (model, compiled)[i]
        logits = runner(ids[:, :1], past_key_values=cache, position_ids=torch.full((3, 1), 13)).logits
        caches[i] = logits
    torch.testing.assert_close(caches[0], caches[1], atol=1e-5, rtol=1e-5)


def test_lora_on_the_standard_module_names():
    peft = pytest.importorskip("peft")
    model = make()
    ids, _, _ = padded()
    expected = model(ids).logits
    adapted = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    torch.testing.assert_close(adapted(ids).logits, expected)  # B starts at zero
    adapted(ids, labels=ids).loss.backward()
    trained = [name for name, p in adapted.named_parameters() if p.grad is not None]
    assert trained
    assert all("lora_" in name for name in trained)


def test_device_map_auto(tmp_path):
    pytest.importorskip("accelerate")
    model = make(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    ids, _, _ = padded()
    with torch.no_grad():
        loaded = MQAForCausalLM.from_pretrained(tmp_path, device_map="auto")
        torch.testing.assert_close(loaded(ids.to(loaded.device)).logits.cpu(), model(ids).logits)
        parts = ("model.embed_tokens", "model.layers.0", "model.layers.2", "model.norm", "model.rotary_emb", "lm_head")
        offloaded = MQAForCausalLM.from_pretrained(
            tmp_path,
            device_map={**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"},
            offload_folder=tmp_path / "offload",
        )
        torch.testing.assert_close(offloaded(ids).logits, model(ids).logits)


def test_base_model_loads_from_the_full_checkpoint(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    base, info = MQAModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    ids, _, _ = padded()
    with torch.no_grad():
        torch.testing.assert_close(model.lm_head(base(ids).last_hidden_state), model(ids).logits)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_key_value_heads": 4}, r"num_attention_heads \(6\) must be divisible by num_key_value_heads \(4\)"),
        ({"qk_head_dim": 12}, r"qk_head_dim \(12\) must be a multiple of head_dim \(8\)"),
        ({"qk_head_dim": [8]}, r"qk_head_dim has 1 entries for \d+ layers"),
        ({"rope_frequencies": [[0, 4]] * 3}, r"numbers below 4"),
        ({"v_head_dim": 0}, r"v_head_dim must be positive"),
        ({"residual": "none"}, "residual must be one of sequential, .* got 'none'"),
        ({"rope_layers": [True]}, "rope_layers has 1 entries for 3 layers"),
        ({"layer_types": ["sliding_attention"] * 3}, "sliding_window must be at least 2.*got None"),
    ],
)
def test_impossible_configurations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        make(**fields)


def test_trainer_smooths_the_labels_of_the_next_token(tmp_path):
    model = make()
    arguments = TrainingArguments(tmp_path, label_smoothing_factor=0.1, report_to="none", use_cpu=True)
    ids = torch.randint(3, 60, (2, 9))
    loss = Trainer(model=model, args=arguments).compute_loss(model, {"input_ids": ids, "labels": ids.clone()})
    logs = model(ids).logits[:, :-1].log_softmax(-1)
    expected = -(0.9 * logs.gather(-1, ids[:, 1:, None])[..., 0] + 0.1 * logs.mean(-1)).mean()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("implementation", ["mqa", "sdpa"])
def test_gradients_of_rows_that_are_padded_on_the_left_are_those_of_eager_attention(implementation):
    """With a bias in the mask, where the padding sees nothing."""
    model = make(**CONFIGS["alibi"]).train()
    ids = torch.randint(3, 60, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    found = []
    for name in ("eager", implementation):
        model.set_attn_implementation(name)
        model.zero_grad()
        model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
        found.append(model.model.embed_tokens.weight.grad.clone())
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_learned_activation_is_that_of_transformers(dtype):
    theirs = ACT2CLS["xielu"](dtype=dtype)
    ours = make(hidden_act="xielu", gated_mlp=False).model.layers[1].mlp.act_fn.to(dtype)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
    theirs.alpha_p.data.fill_(0.7), theirs.alpha_n.data.fill_(-0.3)
    ours.load_state_dict(theirs.state_dict())
    x = torch.linspace(-4, 4, 1001).to(dtype)
    assert torch.equal(ours(x), theirs(x))
