"""`--method shared`: fitted heads through the whole conversion."""

import itertools
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from calibrated_sources import CHOSEN, NORMALISED, SEQ2SEQ, SMALL, load, load_seq2seq, make, make_pair_source
from isolated import run_without_the_package
from safetensors.torch import load_file
from seq2seq_sources import T5, make_seq2seq, seq2seq_difference
from sources import CASES, IDS, LLAMA, batch, largest_difference, make_model, save
from tokenizer import write_tokenizer

from mqa_hf import convert
from mqa_hf.base.errors import ConversionWarning, MQAError
from mqa_hf.base.text import documents
from mqa_hf.base.tokens import corrupt_spans
from mqa_hf.conversion import states
from mqa_hf.conversion.calibration import on_tensor_cores
from mqa_hf.conversion.widths import Curves, choose_widths


@pytest.mark.parametrize("what", [*CHOSEN, "granite_swa: two rotations, a layer without", "gpt_oss: experts"])
def test_at_full_width_nothing_is_lost(what, tmp_path):
    source, theirs = make(what, tmp_path)
    heads = load_heads(source, tmp_path)
    report = convert(source, tmp_path / "wide", method="shared", head_width=heads, **SMALL)
    ours = load(tmp_path / "wide")
    assert ours.config.num_key_value_heads == 1
    assert ours.config.qk_head_dim == heads * ours.config.head_dim
    difference, size = largest_difference(ours, theirs)
    # The refit towards the old projection is a ridge regression, and float32 weights have been multiplied.
    assert difference <= 2e-3 * size
    assert max(layer.attention_error for layer in report.layers) < 1e-3
    assert max(layer.discarded_key_energy for layer in report.layers) < 1e-6
    assert report.held_out_loss.after == pytest.approx(report.held_out_loss.before, abs=1e-3)


def load_heads(source, tmp_path):
    return convert(source, tmp_path / "probe", method="first").num_key_value_heads.before


@pytest.mark.parametrize("what", [*CHOSEN, "gpt_oss: experts"])
def test_a_fitted_head_is_nearer_than_the_mean(what, tmp_path):
    source, theirs = make(what, tmp_path)
    ids = batch(8)[0]
    with torch.no_grad():
        expected = theirs(ids).logits
        distances = []
        for options in (
            {"method": "mean"},
            {"method": "shared", "refit": False, **SMALL},
            {"method": "shared", **SMALL},
        ):
            convert(source, tmp_path / "ours", overwrite=True, **options)
            distances.append(float((load(tmp_path / "ours")(ids).logits - expected).norm()))
    assert distances[2] < distances[0]
    assert distances[1] < 1.1 * distances[0]


@pytest.mark.parametrize("what", NORMALISED)
def test_heads_are_fitted_to_normalised_queries_and_keys(what, tmp_path):
    """Nearer than the mean; at full width exact but for what no linear map of the input gives; both loops agree."""
    source, theirs = make(what, tmp_path)
    ids, mask = batch()
    with torch.no_grad():
        expected = theirs(ids).logits

        def distance():
            return float((load(tmp_path / "ours")(ids).logits - expected).norm())

        report = convert(source, tmp_path / "ours", method="mean")
        mean, heads = distance(), report.num_key_value_heads.before
        convert(source, tmp_path / "ours", method="shared", overwrite=True, **SMALL)
        narrow = distance()
        # The text is too short to refit the output projection of heads that are as wide as all.
        wide = {"method": "shared", "head_width": heads, "refit": False, **SMALL}
        report = convert(source, tmp_path / "ours", overwrite=True, **wide)
    assert distance() < 0.7 * mean
    assert narrow < mean
    first = report.layers[0]
    assert 1e-6 < first.unexplained_key_energy < 0.5
    assert first.discarded_key_energy < 1e-6
    assert first.attention_error < 0.15
    ours = load(tmp_path / "ours")
    found = []
    for enabled in (False, True):
        ours.decoding.enabled = enabled
        given = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        found.append(ours.generate(ids, **given).tolist())
    assert found[0] == found[1]
    with pytest.raises(MQAError, match="already a converted checkpoint"):
        convert(tmp_path / "ours", tmp_path / "again")
    with pytest.raises(MQAError, match=r"`target` native.*maps of queries"):
        convert(source, tmp_path / "native", method="shared", target="native", **SMALL)


def test_one_seed_gives_one_checkpoint(tmp_path):
    source, _ = make("llama: grouped", tmp_path)
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        convert(source, tmp_path / name, method="shared", seed=seed, **SMALL)
    one, same, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "same", "other"))
    torch.testing.assert_close(one, same, rtol=0, atol=0)
    name = "model.layers.1.self_attn.k_proj.weight"
    assert not torch.equal(one[name], other[name])


def test_the_native_target_holds_a_fitted_head_of_the_old_width(tmp_path):
    source, _ = make("llama: grouped", tmp_path)
    manual = {"method": "shared", "calibration": "builtin:manual", **SMALL}  # by which all frequencies are chosen once
    convert(source, tmp_path / "ours", **manual)
    convert(source, tmp_path / "native", target="native", **manual)
    assert largest_difference(load(tmp_path / "native"), load(tmp_path / "ours"))[0] <= 1e-4
    with pytest.raises(MQAError, match="`target` native"):
        convert(source, tmp_path / "wide", method="shared", target="native", head_width=2, **SMALL)


def test_calibration_text_from_files(tmp_path):
    source, _ = make("llama: grouped", tmp_path)
    (tmp_path / "text.txt").write_text("all work and no play makes a dull model. " * 60)
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"n": 1, "text": "no play " * 30}) for _ in range(20)))
    for name in ("text.txt", "text.jsonl"):
        report = convert(source, tmp_path / f"from-{name}", method="shared", calibration=str(tmp_path / name), **SMALL)
        assert report.options["calibration"] == [str(tmp_path / name)]
        assert f"--calibration {tmp_path / name}" in report.command
    card = (tmp_path / "from-text.txt" / "README.md").read_text()
    assert "the loss went from" in card


def test_the_default_text_is_there_without_a_network():
    texts = documents(None)
    assert sum(map(len, texts)) > 400_000


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"head_width": 7}, "`key_width` 7 is more than the 6 old heads"),
        ({"head_width": 0}, "`head_width` must be a number above 0"),
        ({"window": 4}, "`window` cannot be combined with `method` shared"),
        ({"device": "warp"}, "`device` warp: "),
        (
            {"method": "mean", "head_width": 2},
            "widths and `cache_budget` are for `method` shared and latent, not mean",
        ),
        ({"calibration": "/nowhere.txt"}, "`calibration` /nowhere.txt does not exist"),
        ({"calibration_tokens": 10}, "`calibration_tokens` must be at least two sequences of 32 tokens, got 10"),
    ],
)
def test_requests_that_cannot_be(options, match, tmp_path):
    source, _ = make("llama: multi-head", tmp_path)
    with pytest.raises(MQAError, match=match):
        convert(source, tmp_path / "ours", **{"method": "shared", **SMALL, **options})
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("model_type", SEQ2SEQ)
def test_all_attentions_of_an_encoder_decoder_model_are_fitted(model_type, tmp_path):
    source, _, text = make_pair_source(model_type, tmp_path)
    heads = convert(source, tmp_path / "probe", method="first").num_key_value_heads.before
    options = {"method": "shared", "attention": ["decoder", "cross", "encoder"], **text, **SMALL}
    report = convert(source, tmp_path / "wide", head_width=heads, **options)
    difference, size = seq2seq_difference(load_seq2seq(tmp_path / "wide"), load_seq2seq(source))
    assert difference <= 2e-3 * size
    assert report.held_out_loss.after == pytest.approx(report.held_out_loss.before, abs=1e-3)
    assert {layer.stack for layer in report.layers} == {"encoder", "decoder"}
    assert all(layer.cross_attention_error < 1e-3 for layer in report.layers if layer.stack == "decoder")
    errors = {}
    for method in ("mean", "shared"):
        report = convert(source, tmp_path / "ours", overwrite=True, **{**options, "method": method, "refit": True})
        found = [
            value for layer in report.layers for name, value in layer.errors().items() if "attention_error" in name
        ]
        errors[method] = sum(found)
    assert errors["shared"] < errors["mean"]


def test_one_attention_alone_and_a_budget_for_both_caches(tmp_path):
    source, _, text = make_pair_source("bart", tmp_path)
    convert(source, tmp_path / "cross", method="shared", attention=["cross"], head_width=6, **text, **SMALL)
    difference, size = seq2seq_difference(load_seq2seq(tmp_path / "cross"), load_seq2seq(source))
    assert difference <= 2e-3 * size  # the biases of the other attention's values have moved with them
    report = convert(source, tmp_path / "half", method="shared", cache_budget="50%", **text, **SMALL)
    for name in ("kv_bytes_per_token", "cross_kv_bytes_per_token"):
        assert 0.4 < getattr(report, name).after / getattr(report, name).before <= 0.5
    with pytest.raises(MQAError, match="must be a share"):
        convert(source, tmp_path / "bytes", method="shared", cache_budget="640", **text, **SMALL)


def test_one_text_for_an_encoder_decoder_model(tmp_path):
    source, _, _ = make_pair_source("bart", tmp_path)
    report = convert(source, tmp_path / "ours", method="shared", **SMALL)
    assert report.held_out_loss.after > 0


def test_span_corruption_hides_spans_and_tells_them():
    ids = list(range(10, 110))
    source, target = corrupt_spans(ids, range(1000, 1100), torch.Generator().manual_seed(0))
    hidden, told = {}, {}
    for row, spans in ((source, hidden), (target, told)):
        last = None
        for token in row:
            if token >= 1000:
                last = token
            spans.setdefault(last, []).append(token)
    rebuilt = hidden.get(None, [])
    for sentinel, rest in hidden.items():
        if sentinel is not None:
            rebuilt = rebuilt + told[sentinel][1:] + rest[1:]
    assert rebuilt == ids
    assert 5 < len(ids) - sum(token < 1000 for token in source) < 35


def test_a_budget_goes_where_it_is_needed_and_is_kept(tmp_path):
    source, _ = make("llama: multi-head", tmp_path)
    report = convert(source, tmp_path / "ours", method="shared", cache_budget="0.5", **SMALL)
    assert 0.4 < report.kv_bytes_per_token.after / report.kv_bytes_per_token.before <= 0.5
    ours = load(tmp_path / "ours")
    widths = [layer.self_attn.k_proj.out_features for layer in ours.model.layers]
    assert widths == ours.config.qk_head_dim
    ids = batch(4)[0]
    cache = ours(ids, use_cache=True).past_key_values
    assert [layer.keys.shape[-1] for layer in cache.layers] == widths
    # Token by token with the cache is the same as at once, and a static cache the same as a growing one.
    expected = ours.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False)
    for options in ({}, {"cache_implementation": "static"}):
        found = ours.generate(ids, max_new_tokens=8, do_sample=False, **options)
        assert torch.equal(found, expected)
    for wrong, match in (("0", "neither"), ("lots", "neither"), ("16", "need at least")):
        with pytest.raises(MQAError, match=match):
            convert(source, tmp_path / "no", method="shared", cache_budget=wrong, **SMALL)


def test_the_greedy_choice_of_widths_is_the_best():
    steps = torch.rand(4, 5, dtype=torch.float64).sort(1, descending=True).values
    left = torch.cat((steps.sum(1, keepdim=True), steps.sum(1, keepdim=True) - steps.cumsum(1)), 1)
    left = left / left[:, :1]
    costs = [1.0, 0.2, 3.0, 0.7]
    curves = [Curves(left[2 * i], left[2 * i + 1], 1, 1, costs[2 * i], costs[2 * i + 1]) for i in range(2)]

    def error(widths):
        return sum(cost * left[i, w] / left[i, 1] for i, (cost, w) in enumerate(zip(costs, widths)))

    keys, values = choose_widths(curves, 10, step=1)
    found = [keys[0], values[0], keys[1], values[1]]
    best = min(error(w) for w in itertools.product(range(1, 6), repeat=4) if sum(w) <= 10)
    assert sum(found) == 10
    assert float(error(found)) == pytest.approx(float(best))


def test_keys_and_values_of_different_widths(tmp_path):
    source, _ = make("gpt_neox: parallel, quarter rotary", tmp_path)
    convert(source, tmp_path / "ours", method="shared", key_width=1.5, value_width=0.5, **SMALL)
    config = load(tmp_path / "ours").config
    assert (config.qk_head_dim, config.v_head_dim) == (1.5 * config.head_dim, 0.5 * config.head_dim)


@pytest.mark.parametrize("case", ["llama: biases", "olmo2: biases"])
def test_refitted_mean_heads_are_nearer_than_the_mean(case, tmp_path):
    source, theirs = make(case, tmp_path)
    ids = batch(8)[0]
    with torch.no_grad():
        expected = theirs(ids).logits
        distances = []
        for options in ({}, {"refit": True, **SMALL}):
            report = convert(source, tmp_path / "ours", overwrite=True, method="mean", **options)
            distances.append(float((load(tmp_path / "ours")(ids).logits - expected).norm()))
    assert distances[1] < distances[0]
    assert "--refit" in report.command


def test_large_states_lie_in_a_file_and_change_nothing(tmp_path, monkeypatch):
    source, _ = make("llama: grouped", tmp_path)
    convert(source, tmp_path / "one", method="shared", **SMALL)
    monkeypatch.setattr(states, "MAPPED_ABOVE", 0)
    convert(source, tmp_path / "two", method="shared", **SMALL)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    assert not list(tmp_path.glob(".states-*"))


def test_doubtful_fits_are_warned_of(tmp_path):
    model_type, _, config = CASES[IDS.index("llama: multi-head")]
    theirs = make_model(model_type, config)
    width = theirs.config.head_dim
    theirs.model.layers[0].self_attn.q_proj.weight.data[:width] = 0
    source = save(theirs, tmp_path / "source")
    write_tokenizer(source)
    few = {"calibration": "builtin:manual", "calibration_tokens": 96, "sequence_length": 32}
    with pytest.warns(ConversionWarning, match="few for a hidden size") as caught:
        report = convert(source, tmp_path / "ours", method="shared", **few)
    assert any("1 in self_attn of layer 0" in str(w.message) for w in caught)
    assert len(report.warnings) == 2


def test_what_it_is_not_for(tmp_path):
    source = save(make_seq2seq("t5", T5), tmp_path / "t5")
    with pytest.raises(MQAError, match="tokenizer"):
        convert(source, tmp_path / "ours", method="shared")
    bare = save(make_model("llama", LLAMA), tmp_path / "bare")
    with pytest.raises(MQAError, match="tokenizer"):
        convert(bare, tmp_path / "ours", method="shared")


def test_widths_of_each_layer_load_as_remote_code(tmp_path):
    source, _ = make("llama: multi-head", tmp_path)
    convert(source, tmp_path / "ours", method="shared", cache_budget="0.5", **SMALL)
    program = """
import json
import torch
from transformers import AutoModelForCausalLM
(directory, ids) = json.loads(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
with torch.no_grad():
    print(json.dumps(model(torch.tensor(ids)).logits[0, -1].tolist()))
"""
    ids = [[5, 6, 7, 8, 9]]
    found = run_without_the_package(program, tmp_path / "ours", ids, scratch=tmp_path)
    with torch.no_grad():
        expected = load(tmp_path / "ours")(torch.tensor(ids)).logits[0, -1]
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-5, atol=1e-5)


def test_parts_of_a_mixture_keep_their_names_and_tiny_ones_get_nothing(tmp_path):
    source, _ = make("llama: grouped", tmp_path)
    for name, words in (("a", "all work "), ("b", "no play "), ("c", "dull model ")):
        (tmp_path / f"{name}.txt").write_text(words * 400)
    parts = [f"{tmp_path / 'a.txt'}=100", f"{tmp_path / 'b.txt'}=1", f"{tmp_path / 'c.txt'}=50"]
    options = {"method": "shared", "sequence_length": 16}
    report = convert(source, tmp_path / "mixed", calibration=parts, calibration_tokens=1024, **options)
    assert set(report.held_out_loss.parts) == {str(tmp_path / "a.txt"), str(tmp_path / "c.txt")}
    twice = convert(source, tmp_path / "twice", calibration=[parts[0], parts[0]], calibration_tokens=1024, **options)
    once = convert(source, tmp_path / "once", calibration=parts[0], calibration_tokens=512, **options)
    assert twice.held_out_loss.tokens == 2 * once.held_out_loss.tokens
    few = convert(source, tmp_path / "few", calibration=[parts[0], parts[2]], calibration_tokens=32, **options)
    assert few.held_out_loss.tokens == 15
    assert all(layer.attention_error > 0 for layer in few.layers)


def test_products_of_a_fit_are_in_tf32_on_a_gpu_alone():
    @on_tensor_cores
    def precision(fit):
        return torch.get_float32_matmul_precision()

    before = torch.get_float32_matmul_precision()
    fits = {name: SimpleNamespace(device=torch.device(name)) for name in ("cpu", "cuda")}
    assert precision(fits["cpu"]) == before
    assert precision(fits["cuda"]) == "high"
    assert torch.get_float32_matmul_precision() == before


def test_the_switches_of_a_process_for_tf32_stay():
    """PyTorch has two sets of switches, and reading one after the other was set is an error."""
    program = """
import torch
from types import SimpleNamespace
from mqa_hf.conversion.calibration import on_tensor_cores

torch.backends.fp32_precision = "tf32"
for device in ("cpu", "cuda"):
    on_tensor_cores(lambda fit: None)(SimpleNamespace(device=torch.device(device)))
print(torch.backends.fp32_precision)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "tf32", done.stderr[-2000:]
