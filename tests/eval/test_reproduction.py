"""The papers' experiments: recipes, the queue of chains, and the page made of what was measured."""

import copy
import fcntl
import json
import lzma
import math
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from mqa_hf import MQAConfig, MQAForCausalLM, MQAForConditionalGeneration, MQASeq2SeqConfig
from mqa_hf.base.errors import MQAError
from mqa_hf.eval.reproduction.__main__ import app, chains_of
from mqa_hf.eval.reproduction.cost import MODELS, paper_config
from mqa_hf.eval.reproduction.experiments import Experiment
from mqa_hf.eval.reproduction.page import filled, picture, quality, read, spread
from mqa_hf.eval.reproduction.recipe import FIRST, Heads, configured, read_recipe
from mqa_hf.finetune.architecture import widened
from mqa_hf.finetune.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]
RECIPES = sorted(p.name for p in (files("mqa_hf.eval.reproduction") / "recipes").iterdir())


def shipped(name):
    return yaml.safe_load((files("mqa_hf.eval.reproduction") / "recipes" / name).read_text())


@pytest.fixture
def small(tmp_path):
    """The recipe for translation with tiny models, and pairs."""
    recipe = shipped("translation.yaml")
    for stack in (recipe["shape"]["encoder"], recipe["shape"]["decoder"]):
        stack |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    recipe["models"] = {FIRST: {}, "multi-query": {"kv_heads": 1}}
    recipe["convert"] = {name: recipe["convert"][name] for name in ("shared", "original")}
    recipe |= {"seeds": [3], "tokens": 4000, "vocab_size": 400, "shares": [0.05]}
    recipe["train"] = {"sequence-length": 16, "batch-tokens": 256, "validation-tokens": 64, "save-every": 2}
    recipe["calibrate"] = {"calibration-tokens": 1024, "sequence-length": 16}
    recipe["evaluate"] |= {"prompts": 4, "tokens": 64, "new-tokens": 4}
    recipe["times"] = {"cells": "2x8", "tokens": 8, "rounds": 1}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(recipe))
    (tmp_path / "text").mkdir()
    for split in ("train", "validation", "test"):
        rows = [{"en": f"{split} word {i} and {i + 1}", "de": f"{split} Wort {i} und {i + 1}"} for i in range(60)]
        (tmp_path / "text" / f"{split}.jsonl.xz").write_bytes(
            lzma.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
        )
    return path


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_experiments_run_in_pieces_and_fill_the_page(tmp_path, small):
    work, said = tmp_path / "work", f"{small}={tmp_path / 'text'}"
    first = run("run", work, said, "--limit", "4")
    assert first.exit_code == 0
    assert "4 of 4 chains are not done" in first.output
    with pytest.raises(MQAError, match="these chains need small/seed-3/multi-head, not run yet"):
        raise run("run", work, said, "--only", "from-shared").exception
    with pytest.raises(MQAError, match="matches no chain"):
        raise run("run", work, said, "--only", "from shared").exception
    with pytest.raises(MQAError, match="is not a regular expression"):
        raise run("run", work, said, "--only", "from-(").exception
    second = run("run", work, said, "--per-device", "2", "--only", "multi-(head|query)$")
    assert second.exit_code == 0, second.output
    assert "0 of 2 chains are not done" in second.output
    assert run("run", work, said, "--per-device", "2").exit_code == 0
    assert run("times", work, said).exit_code == 0
    results = read(work / "results.jsonl")
    models = {r["model"]: r for r in results if r["table"] == "models"}
    assert set(models) == {FIRST, "multi-query"}
    assert abs(models["multi-query"]["parameters"] / models[FIRST]["parameters"] - 1) < 0.02
    assert models["multi-query"]["intermediate_size"] > 64 == models[FIRST]["intermediate_size"]
    converted = {(r["model"], r["share"]): r for r in results if r["table"] == "conversions"}
    assert set(converted) == {(name, share) for name in ("shared", "original") for share in (0.0, 0.05)}
    # With all its heads a conversion is the original.
    assert converted["original", 0.0]["loss"] == pytest.approx(models[FIRST]["loss"], abs=1e-5)
    assert converted["original", 0.0]["test_bleu_greedy"] == models[FIRST]["test_bleu_greedy"]
    assert 8 * converted["shared", 0.0]["cache_bytes"] == models[FIRST]["cache_bytes"]
    assert converted["shared", 0.05]["tokens"] > 0
    shapes = {r["model"]: r["models"] for r in results if r["table"] == "times"}
    assert shapes == {FIRST: [FIRST, "original"], "shared": ["shared"]}

    recipe = yaml.safe_load(small.read_text())
    small.write_text(yaml.safe_dump({**recipe, "tokens": 5000}))
    changed = run("run", work, said, "--only", "multi-query")
    assert isinstance(changed.exception, MQAError)  # what was made by another recipe is not taken for done
    assert "1 of 1 chains are not done" in changed.output
    assert {r["table"] for r in read(work / "results.jsonl")} == {"times"}  # and its numbers not for the new ones
    small.write_text(yaml.safe_dump({**recipe, "vocab_size": 500}))
    with pytest.raises(MQAError, match=r"is the tokenizer of .*400.*, not of .*500"):
        raise run("run", work, said).exception
    small.write_text(yaml.safe_dump(recipe))
    again = run("run", work, said)
    assert "0 of 4 chains are not done" in again.output
    assert read(work / "results.jsonl") == results

    (work / "cost.jsonl").write_text((ROOT / "docs" / "reproduction" / "cost.jsonl").read_text())
    page = "<!-- quality small -->\n<!-- end -->\n\n<!-- conversions small -->\n<!-- end -->\nprose\n"
    made = filled(page, work)
    assert f"{models[FIRST]['loss']:.3f}" in made
    assert f"{converted['shared', 0.05]['loss'] - models[FIRST]['loss']:+.3f}" in made
    assert filled(made, work) == made
    for kind in ("share", "cache", "time"):
        picture(results, kind, tmp_path / f"{kind}.png")
        assert (tmp_path / f"{kind}.png").stat().st_size > 1000


def test_a_chain_that_fails_is_named_with_what_it_said(tmp_path, small):
    recipe = yaml.safe_load(small.read_text())
    recipe["models"] = {FIRST: {}}
    recipe["convert"] = {"shared": recipe["convert"]["shared"]}
    recipe["train"]["batch-tokens"] = 10**6  # more rows than there are
    small.write_text(yaml.safe_dump(recipe))
    work = tmp_path / "work"
    result = run("run", work, f"{small}={tmp_path / 'text'}")
    assert isinstance(result.exception, MQAError)
    assert "chains failed: small/seed-3/multi-head" in str(result.exception)
    assert "2 of 2 chains are not done" in result.output
    assert "a step takes" in result.output
    assert not (work / "small" / "seed-3" / "multi-head" / "model").exists()


@pytest.mark.parametrize("name", RECIPES)
def test_models_of_a_recipe_have_the_heads_that_they_say_and_equal_parameters(name):
    recipe = shipped(name)
    tokenizer = train_tokenizer(["some text"], 400, "columns" in recipe)
    first = configured(recipe["shape"])
    counts = {}
    for model, options in recipe["models"].items():
        fields = configured(recipe["shape"], Heads(**options))
        fields = fields if model == FIRST else widened(fields, first, tokenizer)
        several = "decoder" in fields
        made = {k: v for k, v in copy.deepcopy(fields).items() if k != "model_type"}
        config = MQASeq2SeqConfig(**made) if several else MQAConfig(**made)
        with torch.device("meta"):
            counts[model] = (MQAForConditionalGeneration if several else MQAForCausalLM)(config).num_parameters()
        for stack in (config.encoder, config.decoder) if several else (config,):
            assert stack.num_attention_heads == options.get("heads", 8)
            assert stack.num_key_value_heads == options.get("kv_heads", stack.num_attention_heads)
            if "head_dim" in options:  # one head's width in all
                assert stack.num_attention_heads * stack.head_dim == stack.hidden_size // 8
            if stack.cross_num_key_value_heads:
                assert stack.cross_num_key_value_heads == stack.num_key_value_heads
        windows = {stack.sliding_window for stack in (config.encoder, config.decoder)} if several else {None}
        assert windows == ({None, 32} if "window" in options else {None})
    assert max(counts.values()) / min(counts.values()) < 1.005


def test_the_timed_shape_has_the_parameters_of_the_paper():
    for name in MODELS:
        fields = {k: v for k, v in paper_config(name).items() if k != "model_type"}
        with torch.device("meta"):
            model = MQAForConditionalGeneration(MQASeq2SeqConfig(**fields))
        assert model.num_parameters() == pytest.approx(211e6, rel=0.005)


def test_costs_are_timed_for_each_model(tmp_path):
    result = run("cost", tmp_path, *["--batch", "2", "--length", "8", "--rows", "2", "--steps", "6", "--scale", "16"])
    assert result.exit_code == 0, result.output
    found = read(tmp_path / "cost.jsonl")
    assert [(r["model"], r["beams"]) for r in found] == [(name, beams) for name in MODELS for beams in (1, 4)]
    for record in found:
        for field in ("time_per_token_ms", "encoder_sec", "training_us_per_token", "floor_ms"):
            assert record[field] > 0


def test_chains_run_models_first_and_one_seed_after_another(tmp_path, small):
    recipe = yaml.safe_load(small.read_text()) | {"seeds": [3, 10]}
    small.write_text(yaml.safe_dump(recipe))
    names = [c.name for c in chains_of([Experiment.parse(f"{small}={tmp_path / 'text'}", tmp_path, "cpu")])]
    kinds = ("multi-head", "multi-query", "from-original", "from-shared")
    wanted = [f"small/seed-{seed}/{kind}" for part in (kinds[:2], kinds[2:]) for seed in (3, 10) for kind in part]
    assert names == wanted


def test_a_table_says_where_seeds_or_parameters_differ():
    records = [
        {"task": "t", "table": "models", "model": model, "seed": seed, "loss": 2.0 + seed / 10, "parameters": size}
        | {"intermediate_size": 64}
        for model, seed, size in ((FIRST, 0, 999), (FIRST, 1, 999), ("multi-query", 0, 1001))
    ]
    made = quality(records, "t")
    assert "2.000 (1)" in made
    assert "Seeds 0, 1; 999 to 1,001 parameters each." in made


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("translation", "'translation' is not RECIPE=TEXT"),
        ("nonesuch=text", "'nonesuch' is not a recipe; give a YAML file or one of language, translation"),
        ("missing.yaml=text", r"'missing\.yaml' is not a recipe"),
    ],
)
def test_what_is_no_recipe_is_said(tmp_path, said, message):
    with pytest.raises(MQAError, match=message):
        Experiment.parse(said, tmp_path, "cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"evalute": {}}, "evalute: a recipe has shape"),
        ({"models": {"multi-query": {"kv_heads": 1}}}, "needs a model called multi-head"),
        ({"tokens": None}, None),
        ({"tokens": "many"}, "tokens: input should be a valid integer"),
        ({"seeds": []}, "seeds: list should have at least 1 item"),
        ({"models": {FIRST: {"kv-heads": 1}}}, "models.multi-head.kv-heads: extra inputs are not permitted"),
        ({"convert": {"mean": {"method": "mean"}}}, "convert.mean.loss: field required"),
        ({"calibrate": None}, "has convert and also needs shares and calibrate"),
    ],
)
def test_a_recipe_that_says_what_is_not_understood_is_refused(tmp_path, small, change, message):
    recipe = yaml.safe_load(small.read_text()) | change
    small.write_text(yaml.safe_dump({key: value for key, value in recipe.items() if value is not None}))
    with pytest.raises(MQAError, match=message or "needs shape, vocab_size, models, seeds, tokens, train"):
        Experiment.parse(f"{small}={tmp_path / 'text'}", tmp_path, "cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"sequence-lenth": 16}}, "small, pretrain: unknown option `sequence_lenth`; did you mean"),
        ({"pretrain": {"warmup": 2}}, "small, pretrain: `warmup` must be a number at least 0 and below 1"),
        ({"convert": {"mean": {"method": "median", "loss": "lm"}}}, "small, convert: `method` must be one of mean"),
        ({"evaluate": {"beams": 0}}, "small, evaluate: `beams` must be a whole number at least 1"),
    ],
)
def test_options_that_a_recipe_gets_wrong_are_named(tmp_path, small, change, message):
    recipe = yaml.safe_load(small.read_text()) | change
    small.write_text(yaml.safe_dump(recipe))
    with pytest.raises(MQAError, match=message):
        chains_of([Experiment.parse(f"{small}={tmp_path / 'text'}", tmp_path, "cpu")])


@pytest.mark.parametrize("name", RECIPES)
def test_the_jobs_of_a_recipe_are_those_of_its_options(name):
    experiment = Experiment(name, read_recipe(name.removesuffix(".yaml")), "text/text", Path("work"), "cpu")
    chains = {chain.name: chain for chain in experiment.chains()}
    seeds, made = experiment.recipe.seeds, (*experiment.recipe.models, *experiment.recipe.convert)
    assert len(chains) == len(seeds) * len(made)
    chain = chains[f"{name}/seed-0/from-shared"]
    convert, train = chain.steps["convert"].job, chain.steps["train 0.05"].job
    assert convert.words()[:3] == ["convert", f"work/{name}/seed-0/multi-head/model", str(chain.place / "converted")]
    assert (convert.method, convert.seed, convert.calibration) == ("shared", 0, ("text/text",))
    assert (train.tokens, train.loss, train.teacher) == (round(0.05 * experiment.recipe.tokens), "kl", None)
    assert chains[f"{name}/seed-0/from-mean"].steps["train 0.01"].job.teacher == "none"
    assert experiment.shapes[0] == [FIRST, "original"]


def test_a_text_that_is_not_there_is_said(tmp_path, small):
    with pytest.raises(MQAError, match="is neither a directory nor a dataset id"):
        Experiment.parse(f"{small}={tmp_path / 'nowhere'}", tmp_path, "cpu")
    (tmp_path / "text" / "test.jsonl.xz").unlink()
    with pytest.raises(MQAError, match=r"lacks texts .*test\.jsonl\.xz"):
        Experiment.parse(f"{small}={tmp_path / 'text'}", tmp_path, "cpu")


def test_a_chain_that_is_running_is_not_started_again(tmp_path, small):
    said = f"{small}={tmp_path / 'text'}"
    place = tmp_path / "work" / "small" / "seed-3" / "multi-head"
    place.mkdir(parents=True)
    with (place / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(MQAError, match="there is no chain small/none; there are small/seed-3/multi-head"):
            raise run("chain", tmp_path / "work", said, "small/none").exception
        with pytest.raises(MQAError, match="another process is running small/seed-3/multi-head"):
            raise run("chain", tmp_path / "work", said, "small/seed-3/multi-head").exception
    with pytest.raises(MQAError, match="recipes need different names; got small, small"):
        raise run("run", tmp_path / "work", said, said).exception


def test_texts_of_the_hub_have_their_splits(tmp_path):
    experiment = Experiment.parse("translation=wmt/wmt14:de-en", tmp_path, "cpu")
    assert [experiment.split(s) for s in ("train", "test")] == ["wmt/wmt14:de-en", "wmt/wmt14:de-en[test]"]


def test_an_interval_over_seeds_is_students():
    middle, half = spread([1.0, 2.0, 3.0])
    assert middle == 2
    assert half == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert spread([1.5]) == (1.5, None)


def test_the_page_shows_what_was_measured():
    page = (ROOT / "docs" / "reproduction.md").read_text()
    assert filled(page, ROOT / "docs" / "reproduction") == page
