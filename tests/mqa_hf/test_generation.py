"""Everything that `generate()` offers, on the canonical model, against the plain loop or the source's class."""

import copy

import pytest
import torch
from sources import LLAMA, make_model, save
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, pipeline

from mqa_hf import MQAConfig, MQAForCausalLM, convert


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A grouped Llama and the same model in our class."""
    root = tmp_path_factory.mktemp("pair")
    theirs = make_model("llama", {**LLAMA, "num_key_value_heads": 2, "max_position_embeddings": 256})
    convert(save(theirs, root / "source"), root / "ours", kv_heads=2)
    ours = AutoModelForCausalLM.from_pretrained(root / "ours").eval()
    for model in (ours, theirs):
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    return ours, theirs


def prompts(rows=2, length=9):
    ids = torch.randint(3, 100, (rows, length), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1:, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"num_beams": 4},
        {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"prefill_chunk_size": 4},
        {"cache_implementation": "static", "disable_compile": True},
    ],
    ids=str,
)
def test_the_tokens_are_the_source_classes(pair, options):
    generated = [m.generate(**prompts(), max_new_tokens=50, do_sample=False, **options) for m in pair]
    torch.testing.assert_close(*generated)


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.8, "temperature": 0.7}, {"min_p": 0.1}], ids=str)
def test_sampling_draws_what_the_source_class_draws(pair, options):
    generated = []
    for model in pair:
        torch.manual_seed(11)
        generated.append(
            model.generate(**prompts(), max_new_tokens=20, do_sample=True, num_return_sequences=2, **options)
        )
    torch.testing.assert_close(*generated)


def single():
    return {name: tensor[:1] for name, tensor in prompts().items()}


def test_assisted_decoding_and_prompt_lookup_change_no_token(pair):
    ours, theirs = pair
    plain = ours.generate(**single(), max_new_tokens=30, do_sample=False)
    assisted = ours.generate(**single(), max_new_tokens=30, do_sample=False, assistant_model=theirs)
    assisting = theirs.generate(**single(), max_new_tokens=30, do_sample=False, assistant_model=ours)
    lookup = ours.generate(**single(), max_new_tokens=30, do_sample=False, prompt_lookup_num_tokens=3)
    for other in (assisted, assisting, lookup):
        torch.testing.assert_close(other, plain)


def test_a_prefix_cache_is_reused(pair):
    ours, _ = pair
    ids = single()["input_ids"]
    plain = ours.generate(ids, max_new_tokens=12, do_sample=False)
    cache = DynamicCache(config=ours.config)
    with torch.no_grad():
        ours(ids[:, :6], past_key_values=cache)
    torch.testing.assert_close(ours.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False), plain)


def test_the_cache_holds_the_reduced_heads_and_no_more(pair):
    ours, _ = pair
    output = ours.generate(**prompts(), max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    for layer in output.past_key_values.layers:
        assert layer.keys.shape == layer.values.shape == (2, 2, 13, 8)


def test_a_quantised_cache(tmp_path):
    pytest.importorskip("optimum.quanto")
    theirs = make_model("llama", {**LLAMA, "hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3})
    convert(save(theirs, tmp_path / "source"), tmp_path / "ours")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    arguments = {**single(), "max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    quantised = ours.generate(
        **arguments,
        cache_implementation="quantized",
        cache_config={"backend": "quanto", "nbits": 4, "q_group_size": 16, "residual_length": 4},
    )
    assert quantised.shape == ours.generate(**arguments).shape


def test_continuous_batching(pair):
    ours, _ = pair
    # Continuous batching takes the accelerator that there is, wherever the model lies.
    ours = copy.deepcopy(ours).to("cuda" if torch.cuda.is_available() else "cpu")
    requests = [[5, 9, 17, 30], [44, 3, 8], [60, 61, 62, 63, 64, 65]]
    batched = ours.generate_batch(
        inputs=requests,
        generation_config=GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0),
    )
    assert ours.config._attn_implementation == "mqa"
    generated = {tuple(output.prompt_ids): output.generated_tokens for output in batched.values()}
    for request in requests:
        alone = ours.generate(torch.tensor([request], device=ours.device), max_new_tokens=8, do_sample=False)[
            0, len(request) :
        ]
        assert generated[tuple(request)] == alone.tolist()


STACK = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip


@pytest.mark.parametrize("widths", [{"qk_head_dim": 16}, {"v_head_dim": [8, 24]}], ids=str)
def test_continuous_batching_refuses_widths_that_its_cache_does_not_hold(widths):
    model = MQAForCausalLM(MQAConfig(**STACK, **widths))
    with pytest.raises(ValueError, match="stores heads of width 8 alone"):
        model.generate_batch(inputs=[[5, 9, 17]])
    assert model.config._attn_implementation == "mqa"


def test_the_text_generation_pipeline(tmp_path):
    from tokenizer import write_tokenizer

    source = save(make_model("llama", LLAMA), tmp_path / "source")
    write_tokenizer(source)
    convert(source, tmp_path / "ours")
    generator = pipeline("text-generation", model=str(tmp_path / "ours"), trust_remote_code=True)
    (result,) = generator("the quick brown", max_new_tokens=5, do_sample=False)
    assert result["generated_text"].startswith("the quick brown")
