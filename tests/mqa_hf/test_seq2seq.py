"""The canonical encoder-decoder model by itself."""

import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedTokenizerFast,
)
from transformers.models.t5.modeling_t5 import T5Attention

from mqa_hf import MQAConfig, MQAForConditionalGeneration, MQAModel, MQASeq2SeqConfig, MQASeq2SeqModel
from mqa_hf.modeling_mqa import relative_bucket

CONFIGS = {
    "relative": {"position_embedding": "relative"},
    "a relative bias for each layer": {"position_embedding": "relative", "relative_per_layer": True},
    "rotary": {},
    "sinusoidal, post-norm": {"position_embedding": "sinusoidal", "residual": "post_norm", "final_norm": False},
    "local": {
        "position_embedding": "relative",
        "decoder": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4},
    },
}


def make(**fields) -> MQAForConditionalGeneration:
    top = {name: fields.pop(name) for name in ("share_embeddings", "tie_word_embeddings") if name in fields}
    decoder = fields.pop("decoder", {})
    stack = {
        "vocab_size": 89,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        **fields,
    }
    config = MQASeq2SeqConfig(
        encoder={**stack, "causal": False, "num_key_value_heads": 6},
        decoder={**stack, "cross_num_key_value_heads": 2, **decoder},
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        **top,
    )
    return MQAForConditionalGeneration(config).eval()


def batch():
    ids, target = torch.randint(2, 89, (3, 11)), torch.randint(2, 89, (3, 10))
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, -3:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}, target


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_tokens_through_the_cache_give_the_uncached_logits(fields):
    model = make(**fields)
    source, target = batch()
    expected = model(**source, decoder_input_ids=target, use_cache=False).logits
    encoded = model.get_encoder()(**source)
    cache = EncoderDecoderCache(DynamicCache(config=model.config.decoder), DynamicCache())
    parts = []
    for part in (target[:, :6], *target[:, 6:].split(1, dim=1)):
        output = model(
            encoder_outputs=encoded,
            attention_mask=source["attention_mask"],
            decoder_input_ids=part,
            past_key_values=cache,
        )
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=2e-5)
    assert cache.cross_attention_cache.layers[0].keys.shape == (3, 2, 11, 8)


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_padding_of_the_source_changes_nothing(fields):
    model = make(**fields)
    source, target = batch()
    logits = model(**source, decoder_input_ids=target).logits[2]
    alone = model(input_ids=source["input_ids"][2:, :-3], decoder_input_ids=target[2:]).logits[0]
    torch.testing.assert_close(logits, alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_other_attention_implementations_agree(fields, implementation):
    model = make(**fields)
    source, target = batch()
    expected = model(**source, decoder_input_ids=target).logits
    model.set_attn_implementation(implementation)
    found = model(**source, decoder_input_ids=target).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_the_buckets_are_those_of_t5(causal):
    distance = torch.arange(-300, 301)
    for buckets, furthest in ((32, 128), (8, 20), (64, 500)):
        expected = T5Attention._relative_position_bucket(distance, not causal, buckets, furthest)
        torch.testing.assert_close(relative_bucket(distance, buckets, furthest, causal), expected)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_each_tie_has_its_own_switch_and_survives_saving(shared, tied, tmp_path):
    model = make(share_embeddings=shared, tie_word_embeddings=tied, dtype="float32")
    model.save_pretrained(tmp_path / "one")
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "one")
    for one in (model, loaded):
        weights = {one.model.encoder.embed_tokens.weight.data_ptr(), one.lm_head.weight.data_ptr()}
        weights.add(one.model.decoder.embed_tokens.weight.data_ptr())
        assert len(weights) == 3 - shared - tied
    torch.testing.assert_close(dict(loaded.state_dict()), dict(model.state_dict()))
    loaded.save_pretrained(tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    base = MQASeq2SeqModel.from_pretrained(tmp_path / "one")
    assert (base.encoder.embed_tokens.weight is base.decoder.embed_tokens.weight) == shared


def test_resizing_the_embedding_resizes_every_copy():
    model = make()
    model.resize_token_embeddings(100)
    assert model.lm_head.weight.shape == model.model.encoder.embed_tokens.weight.shape == (100, 48)
    assert model.config.decoder.vocab_size == model.config.encoder.vocab_size == 100
    source, target = batch()
    assert model(**source, decoder_input_ids=target).logits.shape[-1] == 100


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(fields, reentrant):
    model = make(**fields).train()
    source, target = batch()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        model(**source, labels=target).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


def test_the_collator_makes_the_decoder_s_input():
    from tokenizers import Tokenizer, models

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "a": 2})), pad_token="<pad>"
    )
    model = make()
    rows = [{"input_ids": [5, 6, 7], "labels": [8, 9]}, {"input_ids": [5], "labels": [8, 9, 10]}]
    features = DataCollatorForSeq2Seq(tokenizer, model=model, return_tensors="pt")(rows)
    assert features["decoder_input_ids"].tolist() == [[0, 8, 9], [0, 8, 9]]
    assert torch.isfinite(model(**features).loss)


def test_attentions_and_hidden_states_on_request():
    model = make()
    source, target = batch()
    output = model(**source, decoder_input_ids=target, output_attentions=True, output_hidden_states=True)
    assert [a.shape for a in output.cross_attentions] == [(3, 6, 10, 11)] * 2
    assert [a.shape for a in output.encoder_attentions] == [(3, 6, 11, 11)] * 2
    assert [a.shape for a in output.decoder_attentions] == [(3, 6, 10, 10)] * 2
    assert (len(output.encoder_hidden_states), len(output.decoder_hidden_states)) == (3, 3)
    torch.testing.assert_close(output.cross_attentions[0].sum(-1), torch.ones(3, 6, 10))


def test_prompt_lookup_and_assisted_decoding_give_the_greedy_tokens():
    model = make(position_embedding="relative")
    source, _ = batch()
    one = {name: value[:1] for name, value in source.items()}
    expected = model.generate(**one, max_new_tokens=20, do_sample=False)
    assistant = make(position_embedding="relative")
    found = model.generate(**one, max_new_tokens=20, do_sample=False, assistant_model=assistant)
    torch.testing.assert_close(found, expected)


def test_lora_on_the_standard_module_names():
    from peft import LoraConfig, TaskType, get_peft_model

    model = make()
    source, target = batch()
    adapted = get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_2_SEQ_LM, target_modules=["q_proj", "v_proj"]))
    adapted(**source, labels=target).loss.backward()
    assert any(p.grad is not None for name, p in adapted.named_parameters() if "cross_attn.q_proj.lora_B" in name)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"decoder": {"vocab_size": 90}}, "share_embeddings needs one vocabulary"),
        ({"decoder": {"cross_num_key_value_heads": None}}, "cross-attention"),
        ({"decoder": {"cross_num_key_value_heads": 4}}, "divisible by cross_num_key_value_heads"),
        ({"decoder": {"hidden_size": 60}}, "must have the same width"),
    ],
)
def test_stacks_that_do_not_fit(fields, match):
    with pytest.raises(ValueError, match=match):
        make(**fields)


@pytest.mark.parametrize("implementation", ["flex_attention", "flash_attention_2"])
def test_implementations_without_a_place_for_a_bias_are_refused(implementation):
    with pytest.raises((ValueError, ImportError), match=r"bias on the attention logits|flash|Flash"):
        make(position_embedding="relative").model.decoder.set_attn_implementation(implementation)
    with pytest.raises((ValueError, ImportError), match=r"bias on the attention logits|flash|Flash"):
        MQAModel._from_config(
            MQAConfig(position_embedding="alibi", alibi_slopes=[0.5] * 8), attn_implementation=implementation
        )


def test_labels_without_a_start_token():
    model = make()
    model.config.decoder_start_token_id = None
    source, target = batch()
    with pytest.raises(ValueError, match="decoder_start_token_id"):
        model(**source, labels=target)
