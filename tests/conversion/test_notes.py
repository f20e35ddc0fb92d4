"""Notes in `config.json` that no class reads, and switches that only look like them."""

import json

import pytest
from native_sources import make_native
from sources import GPT, LLAMA, make_model, save
from transformers import PreTrainedConfig

from mqa_hf import convert, inspect
from mqa_hf.base.errors import MQAError

# What published files hold beside the switches of their class.
NOTES = {
    "an Unsloth export": {"unsloth_fixed": True, "unsloth_version": "2025.3.19"},
    "Llama of 2023": {"max_sequence_length": 2048},
    "Vicuna with 16k": {"max_sequence_length": 16384, "model_max_length": 16384},
    "a language model of LLaVA": {"tokenizer_model_max_length": 2048, "tokenizer_padding_side": "right"},
    "texts of tokens": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
    "attention": {"attn_implementation": "flash_attention_2", "_attn_implementation_autoset": True},
    "older attention": {"_attn_implementation": "flash_attention_2", "_flash_attn_2_enabled": True},
    "a dequantised model": {"quantization_config": None, "_pre_quantization_dtype": "float16"},
    "switches of other classes": {
        "attention_bias": False,
        "head_dim": None,
        "mlp_bias": False,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    # All that transformers 4 wrote of its base class, how to generate included.
    "to_dict() of transformers 4": {
        "add_cross_attention": False,
        "bad_words_ids": None,
        "begin_suppress_tokens": None,
        "bos_token_id": None,
        "chunk_size_feed_forward": 0,
        "cross_attention_hidden_size": None,
        "decoder_start_token_id": None,
        "diversity_penalty": 0.0,
        "do_sample": False,
        "early_stopping": False,
        "encoder_no_repeat_ngram_size": 0,
        "exponential_decay_length_penalty": None,
        "finetuning_task": None,
        "forced_bos_token_id": None,
        "forced_eos_token_id": None,
        "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
        "is_decoder": True,
        "is_encoder_decoder": False,
        "label2id": {"LABEL_0": 0, "LABEL_1": 1},
        "length_penalty": 1.0,
        "max_length": 20,
        "min_length": 0,
        "no_repeat_ngram_size": 0,
        "num_beam_groups": 1,
        "num_beams": 1,
        "num_return_sequences": 1,
        "output_attentions": False,
        "output_hidden_states": False,
        "output_scores": False,
        "prefix": None,
        "problem_type": None,
        "pruned_heads": {},
        "remove_invalid_values": False,
        "repetition_penalty": 1.0,
        "return_dict": True,
        "return_dict_in_generate": False,
        "sep_token_id": None,
        "suppress_tokens": None,
        "task_specific_params": None,
        "temperature": 1.0,
        "tf_legacy_loss": False,
        "tie_encoder_decoder": False,
        "tokenizer_class": None,
        "top_k": 50,
        "top_p": 1.0,
        "torchscript": False,
        "typical_p": 1.0,
        "use_bfloat16": False,
    },
}


def with_switches(directory, model, switches):
    path = save(model, directory) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **switches}))
    return directory


@pytest.mark.parametrize("what", NOTES)
@pytest.mark.parametrize(("kind", "config"), [("llama", LLAMA), ("gpt2", GPT)])
def test_notes_that_no_class_reads_are_let_through(kind, config, what, tmp_path):
    source = with_switches(tmp_path / "source", make_model(kind, config), NOTES[what])
    assert inspect(source)["convertible"], inspect(source)["reason"]
    for target in ("mqa", "native"):
        convert(source, tmp_path / target, target=target)


def test_a_kernel_that_is_not_installed_matters_to_no_conversion(tmp_path):
    source = with_switches(tmp_path / "source", make_native("falcon_h1"), NOTES["attention"])
    convert(source, tmp_path / "native", target="native")
    assert "attn_implementation" not in json.loads((tmp_path / "native" / "config.json").read_text())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("switch", "value"),
    [
        ("add_cross_attention", True),
        ("attention_sink_size", 4),
        ("attention_sink_size", None),
        ("cross_attention_hidden_size", 64),
        ("pruned_heads", {"0": [1]}),
        ("quantization", {"bits": 4, "group_size": 64}),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("sliding_window", 5),
        ("use_sliding_window", True),
        ("unsloth", True),
    ],
)
def test_a_switch_that_may_change_the_function_stays_an_error(kind, switch, value, tmp_path):
    assert switch not in PreTrainedConfig().to_dict()
    source = with_switches(tmp_path / "source", make_model(kind, LLAMA if kind == "llama" else GPT), {switch: value})
    assert not inspect(source)["convertible"]
    with pytest.raises(MQAError, match=switch):
        convert(source, tmp_path / "output")
