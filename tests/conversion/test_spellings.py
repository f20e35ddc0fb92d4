"""`config.json` of native results: old and new spellings that say the same."""

import json
import warnings

import pytest
from native_sources import BASE, CONFIGS, installed_types
from sources import CASES, IDS, LLAMA, MIXED, make_model, need, rope, save
from transformers import AutoConfig

from mqa_hf import convert
from mqa_hf.base.errors import ConversionWarning
from mqa_hf.conversion.families import FAMILIES
from mqa_hf.conversion.spellings import both_spellings, lost_in_transformers4

KINDS = {
    **{name: (kind, config) for name, (kind, _, config) in zip(IDS, CASES) if FAMILIES[kind].native},
    **{kind: (kind, {**BASE, **config}) for kind, config in CONFIGS.items() if kind in installed_types()},
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 5e5}
DEFAULT = {"rope_type": "default", "rope_theta": 1e4}
LONG = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}


def configuration(kind, fields):
    need(kind)
    return AutoConfig.for_model(kind, **json.loads(json.dumps(fields)), dtype="float32")


def written(kind, **fields):
    return both_spellings(configuration(kind, {**(BASE | CONFIGS[kind] if kind in CONFIGS else LLAMA), **fields}))


def lost(kind, **fields):
    return lost_in_transformers4(
        configuration(kind, {**(BASE | CONFIGS[kind] if kind in CONFIGS else LLAMA), **fields})
    )


@pytest.mark.parametrize("what", KINDS)
def test_both_spellings_are_read_as_the_new_one_alone(what):
    kind, fields = KINDS[what]
    config = configuration(kind, fields)
    both = json.dumps(both_spellings(config))
    again = AutoConfig.for_model(**json.loads(both))
    read = again.to_diff_dict()
    alone = type(config).from_dict(json.loads(json.dumps(config.to_diff_dict()))).to_diff_dict()
    for name in {"partial_rotary_factor", "original_max_position_embeddings"} - set(type(config).__dataclass_fields__):
        read.pop(name, None), alone.pop(name, None)  # some versions keep them beside rope_parameters, without effect
    if "longrope" in what:  # what follows from the factor is written out; Phi-3's class asks for rope_type's old name
        read["rope_parameters"].pop("type" if kind == "phi3" else "attention_factor")
    assert read == alone


@pytest.mark.parametrize(
    ("kind", "fields", "old"),
    [
        ("llama", {}, {"rope_theta": 1e4, "rope_scaling": None, "torch_dtype": "float32"}),
        ("apertus", rope("default"), {"rope_scaling": None}),  # which scales by default
        ("qwen3", {"rope_parameters": YARN}, {"rope_theta": 5e5, "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}}),
        ("phi", rope("default", partial_rotary_factor=0.4), {"partial_rotary_factor": 0.4, "rope_scaling": None}),
        ("phi3", {**rope("longrope", **LONG), "original_max_position_embeddings": 32}, {
            "rope_scaling": {"type": "longrope", **LONG}, "original_max_position_embeddings": 32}),
        ("gemma3_text", {"rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": DEFAULT}},
         {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
        ("olmo3", {"rope_parameters": {"full_attention": YARN, "sliding_attention": {**DEFAULT, "rope_theta": 5e5}}},
         {"rope_theta": 5e5, "rope_scaling": {
             "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}}),
        ("granitemoehybrid", {}, {"layer_types": ["mamba", "attention", "attention"]}),
        ("qwen3_moe", {}, {"num_experts": 4, "num_local_experts": 4}),
    ],
)  # fmt: skip
def test_what_transformers_4_reads_is_written(kind, fields, old):
    found = written(kind, **fields)
    assert {name: found[name] for name in old} == old


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("nemotron", rope("linear", factor=2.0), "its nemotron has no rope_type 'linear'"),
        ("llama4_text", {"rope_parameters": YARN}, "its llama4_text has no rope_type 'yarn'"),
        ("gemma3_text", {"rope_parameters": {"full_attention": DEFAULT, "sliding_attention": YARN}},
         "scales no positions of sliding_attention"),
        ("olmo3", {"rope_parameters": {"full_attention": YARN, "sliding_attention": DEFAULT}}, "one rope_theta"),
        ("phi3", {**rope("longrope", **LONG, attention_factor=1.1), "original_max_position_embeddings": 32},
         "only short_factor and long_factor of longrope"),
        ("gemma2", {"use_bidirectional_attention": True}, "has no switch use_bidirectional_attention, which is True"),
        ("gpt_oss", {"swiglu_limit": 3.0}, "has no switch swiglu_limit"),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
         "applies windows to other layers"),
        ("dbrx", {"attn_config": {**CONFIGS["dbrx"]["attn_config"], "rope_theta": 5e5}}, "attn_config"),
    ],
)  # fmt: skip
def test_what_transformers_4_cannot_read_is_said(kind, fields, message):
    (said,) = lost(kind, **fields)
    assert said.startswith("transformers 4 refuses the result or computes something else")
    assert message in said


@pytest.mark.parametrize("kind", sorted(installed_types() & set(CONFIGS)))
def test_nothing_is_said_where_transformers_4_reads_all(kind):
    assert not lost(kind)


def test_a_conversion_says_what_transformers_4_loses(tmp_path):
    nested = {"rope_parameters": {"full_attention": DEFAULT, "sliding_attention": YARN}}
    model = make_model("gemma3_text", {**LLAMA, **MIXED, **nested})
    with pytest.warns(ConversionWarning, match=r"^transformers 4 .*gemma3_text scales no positions") as caught:
        report = convert(save(model, tmp_path / "source"), tmp_path / "native", target="native")
    assert report.warnings == [str(one.message) for one in caught if one.category is ConversionWarning]
    assert json.loads((tmp_path / "native" / "conversion.json").read_text())["warnings"] == report.warnings
    assert "rope_theta" not in json.loads((tmp_path / "native" / "config.json").read_text())
    plain = make_model("gemma3_text", {**LLAMA, **MIXED})
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConversionWarning)
        report = convert(save(plain, tmp_path / "plain"), tmp_path / "read", target="native")
    assert report.warnings == []
