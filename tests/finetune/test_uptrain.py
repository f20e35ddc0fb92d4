"""`mqa-hf uptrain`: a small job, whole."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from isolated import run_without_the_package
from safetensors.torch import load_file
from tokenizer import write_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from typer.testing import CliRunner
from uploads import record_uploads

from mqa_hf import convert
from mqa_hf.base.errors import MQAError
from mqa_hf.base.mixture import Part
from mqa_hf.cli import app
from mqa_hf.finetune import checkpoints, trainer, uptrainer
from mqa_hf.finetune.arguments import warmup_steps
from mqa_hf.finetune.card import with_datasets
from mqa_hf.finetune.checkpoints import last_checkpoint
from mqa_hf.finetune.data import training_rows
from mqa_hf.finetune.pretrain import pretrain
from mqa_hf.finetune.trainer import ends
from mqa_hf.finetune.uptrain import Uptraining, default_learning_rate, parse_losses, uptrain
from mqa_hf.finetune.uptrainer import without_dropout

SCHEDULE = {
    "tokens": 8 * 128,
    "sequence_length": 16,
    "batch_tokens": 128,
    "micro_batch": 4,
    "learning_rate": 3e-3,
    "save_every": 2,
    "log_every": 1,
    "report_to": "none",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A source that has learned a little, its conversion to one head, and text."""
    directory = tmp_path_factory.mktemp("home")
    text = directory / "text.jsonl"
    words = ["the query", "reads one key", "and one value", "for all heads", "of the layer"]
    rows = [" ".join(words[(i * k) % 5] for k in range(1, 9)) for i in range(120)]
    text.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=93,
            hidden_size=32,
            intermediate_size=48,
            num_attention_heads=4,
            num_hidden_layers=2,
            initializer_range=0.2,
            tie_word_embeddings=True,
            attention_dropout=0.1,
        )
    )
    model.save_pretrained(directory / "source")
    write_tokenizer(directory / "source")
    convert(directory / "source", directory / "student", dtype="float32")
    # The same without dropout, for what is to be the same in another split.
    shutil.copytree(directory / "student", directory / "plain")
    config = json.loads((directory / "plain" / "config.json").read_text())
    (directory / "plain" / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.0}))
    return directory


def job(home, output, student="student", **options):
    """An uptraining of a student in `home`, with dropout, whose noise is to be the same in each run."""
    given = {"dataset": str(home / "text.jsonl"), "teacher": str(home / "source"), "loss": "kl", "dropout": True}
    return Uptraining(home / student, output, **{**given, **SCHEDULE, **options})


def weights(directory):
    return load_file(Path(directory) / "model.safetensors")


def test_the_student_comes_nearer_to_its_teacher_and_loads_anywhere(home, tmp_path):
    validation = {"validation": str(home / "text.jsonl"), "validation_tokens": 320, "evaluate_every": 20}
    report = job(home, tmp_path / "out", tokens=40 * 128, **validation).run()
    before, after = report.validation.before, report.validation.after
    assert after["kl"] < 0.7 * before["kl"]
    assert report.tokens == 40 * 128
    assert not list(tmp_path.glob(".out*"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{after['kl']:.3f}" in card
    assert report.command.startswith("mqa-hf uptrain ")
    assert report.command.replace(f"{home}/", "").replace(f"{tmp_path}/", "") in card
    assert str(home) not in card
    assert "uptraining.png" in card
    assert (tmp_path / "out" / "uptraining.png").stat().st_size > 5000
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (home / "student" / "config.json").read_text()
    )
    evaluated = [line for line in report.log["main"] if "eval_kl" in line]
    assert [line["step"] for line in evaluated] == [0, 20, 40]
    program = """
import json, sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(json.loads(sys.argv[1])[0], trust_remote_code=True)
print(json.dumps(type(model).__name__))
"""
    assert run_without_the_package(program, tmp_path / "out", scratch=tmp_path) == "MQAForCausalLM"


def test_what_it_reports_is_the_loss_of_what_it_writes(home, tmp_path):
    """Against transformers' own loss of each document alone: packing lets nothing across."""
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": "ab" * n}) + "\n" for n in (5, 9, 4, 12, 7, 8)))
    validation = {"validation": str(tmp_path / "lines.jsonl"), "validation_tokens": 10**6}
    report = job(home, tmp_path / "out", sequence_length=32, **validation).run()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = write_tokenizer(tmp_path)
    rows = training_rows((Part(str(tmp_path / "lines.jsonl")),), tokenizer, 32, 10**6)
    total, count = 0.0, 0
    for row in rows:
        starts = [i for i, position in enumerate(row["position_ids"]) if position == 0] + [32]
        for start, end in itertools.pairwise(starts):
            ids = torch.from_numpy(row["input_ids"][start:end]).long()[None]
            if ids.shape[1] > 1:
                with torch.no_grad():
                    total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
                count += ids.shape[1] - 1
    assert count
    assert report.validation.after["lm"] == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "lm", "teacher": "none"},
        {"loss": "kl=0.5,hidden=2"},
        {"attention_tokens": 256},
        {"train": "attention"},
        {"train": "lora", "lora_rank": 4},
    ],
    ids=lambda options: ", ".join(options),
)
def test_every_way_of_training_changes_what_it_should(home, tmp_path, options):
    report = job(home, tmp_path / "out", **options).run()
    old, new = weights(home / "student"), weights(tmp_path / "out")
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    attention = {name for name in old if "self_attn" in name}
    if options.get("train") == "attention":
        assert changed == attention
    elif options.get("train") == "lora":
        assert changed == {name for name in old if "_proj" in name}
    else:
        assert changed == set(old)
    assert list(report.log) == (["attention", "main"] if "attention_tokens" in options else ["main"])
    first, last = report.log["main"][0]["loss"], report.log["main"][-2]["loss"]
    assert last < first


@pytest.mark.parametrize("train", ["all", "attention", "lora"])
def test_experts_and_maps_of_queries_are_trained(home, tmp_path, train):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=93, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_experts=4,
        num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=4, head_dim=8, num_hidden_layers=2,
        initializer_range=0.2,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "source")
    write_tokenizer(tmp_path / "source")
    fit = {"method": "shared", "calibration_tokens": 512, "sequence_length": 16, "dtype": "float32"}
    convert(tmp_path / "source", tmp_path / "student", **fit)
    options = {"teacher": str(tmp_path / "source"), "train": train, "learning_rate": 3e-3, "tokens": 40 * 128}
    report = job(home, tmp_path / "out", tmp_path / "student", **options).run()
    old, new = weights(tmp_path / "student"), weights(tmp_path / "out")
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    attention, experts = ({name for name in old if part in name} for part in (".self_attn.", ".experts."))
    assert {name.rpartition("self_attn.")[2] for name in attention} >= {"q_map.weight", "k_proj.bias"}
    expected = {
        "all": set(old),
        "attention": attention,
        "lora": {name for name in attention if name.endswith("_proj.weight")} | experts,
    }
    assert changed == expected[train]
    first, last = report.log["main"][0]["loss"], report.log["main"][-2]["loss"]
    assert last < first


@pytest.fixture(scope="module")
def latents(home):
    """The same source with latents at 4 bits in place of heads."""
    generator = np.random.default_rng(0)
    rows = ["".join(generator.choice(list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLM"), 60)) for _ in range(80)]
    (home / "letters.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    fit = {"method": "latent", "latent": 32, "key_width": 16, "latent_bits": 4, "fit_steps": 0, "dtype": "float32"}
    text = {"calibration": str(home / "letters.jsonl"), "calibration_tokens": 4096, "sequence_length": 16}
    convert(home / "source", home / "latents", **fit, **text)
    return "latents"


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "kl=0.5,hidden=2"},
        {"attention_tokens": 256},
        {"train": "attention"},
        {"train": "lora", "lora_rank": 4},
    ],
    ids=lambda options: ", ".join(options),
)
def test_students_with_latents_are_trained_in_every_way(home, latents, tmp_path, options):
    """Every map of a latent learns, adapters aside, and all that is cached stays as it was."""
    rate = 3e-3 if options.get("train") == "lora" else 1e-3
    report = job(home, tmp_path / "out", latents, learning_rate=rate, **options).run()
    old, new = weights(home / latents), weights(tmp_path / "out")
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    attention = {name for name in old if "self_attn" in name}
    maps = ("q_proj.weight", "kv_proj.weight", "k_proj.weight", "k_proj.bias", "query_factors", "v_up.weight")
    assert {f"model.layers.1.self_attn.{name}" for name in maps} <= attention
    if options.get("train") == "attention":
        assert changed == attention
    elif options.get("train") == "lora":
        assert changed == {name for name in old if "_proj.weight" in name}
    else:
        assert changed == set(old)
    assert list(report.log) == (["attention", "main"] if "attention_tokens" in options else ["main"])
    first, last = report.log["main"][0]["loss"], report.log["main"][-2]["loss"]
    assert last < first
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.kv_latent_dim, config.kv_latent_bits, config.qk_head_dim) == (32, 4, 16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.tensor([[5, 17, 3, 40]])
    given = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert given.shape[1] > 4


def test_a_student_with_latents_loads_where_the_package_is_not(home, latents, tmp_path):
    validation = {"validation": str(home / "text.jsonl"), "validation_tokens": 320}
    report = job(home, tmp_path / "out", latents, tokens=40 * 128, learning_rate=1e-3, **validation).run()
    assert report.validation.after["kl"] < 0.8 * report.validation.before["kl"]
    program = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(json.loads(sys.argv[1])[0], trust_remote_code=True).eval()
with torch.no_grad():
    print(json.dumps(model(torch.tensor([[5, 17, 3, 40]])).logits[0, -1].tolist()))
"""
    elsewhere = run_without_the_package(program, tmp_path / "out", scratch=tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        here = model(torch.tensor([[5, 17, 3, 40]])).logits[0, -1]
    torch.testing.assert_close(torch.tensor(elsewhere), here)


def test_what_training_a_student_with_latents_takes_is_said_before(home, latents, tmp_path):
    held = sum(t.numel() for t in weights(home / latents).values())
    for train, names in (("all", ""), ("attention", "self_attn")):
        found = job(home, tmp_path / "out", latents, train=train, attention_tokens=256).dry_run()
        assert found["parameters"] == held
        learnt = sum(t.numel() for n, t in weights(home / latents).items() if names in n)
        assert found["trained_parameters"] == learnt


def command(home, output, *more, student="student"):
    words = ["uptrain", str(home / student), str(output), "--dataset", str(home / "text.jsonl")]
    words += ["--tokens", "5120", "--sequence-length", "16", "--batch-tokens", "128", "--micro-batch", "4"]
    return [*words, "--save-every", "3", "--learning-rate", "3e-3", "--report-to", "none", "--dropout", *more]


def test_the_result_is_uploaded(home, tmp_path, monkeypatch):
    calls = record_uploads(monkeypatch)
    with pytest.raises(MQAError, match="`private` needs `push_to_hub`"):
        job(home, tmp_path / "trained", private=True).run()
    job(home, tmp_path / "trained", push_to_hub="me/trained").run()
    assert calls[0] == ("me/trained", {"private": False, "exist_ok": True})
    repo_id, message, names = calls[1]
    assert (repo_id, message) == ("me/trained", "Train with mqa-hf")
    assert {"config.json", "model.safetensors", "README.md", "uptraining.json"} <= names
    assert 'from_pretrained("me/trained", trust' in (tmp_path / "trained" / "README.md").read_text()


def test_the_card_names_the_data_sets_of_the_hub(tmp_path):
    local = tmp_path / "text.jsonl"
    local.write_text("")
    card = "---\ndatasets:\n- a/b\nlicense: mit\n---\n# Title\n"
    found = ModelCard(with_datasets(card, [str(local), "c/d:en[train]", "a/b"])).data
    assert (found.datasets, found.license) == (["a/b", "c/d"], "mit")
    assert ModelCard(with_datasets("---\ndatasets: a/b\n---\n", ["c/d"])).data.datasets == ["a/b", "c/d"]
    assert with_datasets("no metadata", [str(local)]) == "no metadata"
    broken = "---\n: [\n---\n"
    assert with_datasets(broken, ["c/d"]) == broken


def test_a_training_that_made_it_worse_is_said(home, tmp_path):
    held_out = ("--validation", str(home / "text.jsonl"), "--validation-tokens", "512", "--tokens", "256")
    result = CliRunner().invoke(app, command(home, tmp_path / "worse", *held_out, "--learning-rate", "0.15"))
    assert result.exit_code == 0, result.output
    before, after = json.loads((tmp_path / "worse" / "uptraining.json").read_text())["validation"].values()
    assert after["kl"] > before["kl"]
    assert "warning: kl on --validation is higher after training than before" in result.stderr
    result = CliRunner().invoke(app, command(home, tmp_path / "better", *held_out, "--learning-rate", "1e-3"))
    assert "warning: kl" not in result.stderr


def test_a_killed_run_ends_where_an_undisturbed_one_does(home, tmp_path):
    words = [sys.executable, "-m", "mqa_hf.cli", *command(home, tmp_path / "killed")]
    main = tmp_path / ".killed.uptrain" / "main"
    for step in (6, 18):
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not (main / f"checkpoint-{step}").exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (tmp_path / "killed").exists()
    result = CliRunner().invoke(app, command(home, tmp_path / "killed"))
    assert result.exit_code == 0, result.output
    assert "resumes from step" in result.stderr
    assert CliRunner().invoke(app, command(home, tmp_path / "whole")).exit_code == 0
    one, other = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_interruption_between_stages_is_no_loss(home, tmp_path, monkeypatch):
    job(home, tmp_path / "whole", attention_tokens=256).run()
    plain = trainer.LossTrainer.training_step
    steps = []

    def interrupted(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if len(steps) == 9:  # the first step of the second stage is at the fifth micro-batch
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(trainer.LossTrainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        job(home, tmp_path / "out", attention_tokens=256).run()
    job(home, tmp_path / "out", attention_tokens=256).run()
    one, other = weights(tmp_path / "out"), weights(tmp_path / "whole")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_checkpoint_that_is_not_whole_is_passed_over(tmp_path):
    for step, state in ((2, "{}"), (4, "{}"), (6, "{half"), (8, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert last_checkpoint(tmp_path / "nowhere") is None


def test_divergence_stops_and_keeps_the_last_good_checkpoint(home, tmp_path, monkeypatch):
    plain = trainer.LossTrainer.training_step

    def poisoned(self, model, *args, **kwargs):
        if self.state.global_step == 5:
            next(model.parameters()).data.fill_(float("nan"))
        return plain(self, model, *args, **kwargs)

    monkeypatch.setattr(trainer.LossTrainer, "training_step", poisoned)
    with pytest.raises(
        MQAError, match=r"diverged: at step 6 the loss is nan.*checkpoint-4 has the last finite weights"
    ):
        job(home, tmp_path / "out").run()
    assert not (tmp_path / "out").exists()
    assert last_checkpoint(tmp_path / ".out.uptrain" / "main").endswith("checkpoint-4")
    with pytest.raises(MQAError, match="diverged"):  # far above the start, though finite
        job(home, tmp_path / "high", learning_rate=30.0).run()


def test_the_ends_of_a_training_are_means_over_as_many_steps():
    logged = [(1, 8.0), (10, 2.0), (20, 3.0), (30, 5.0), (35, 7.0)]  # logged after the first step and each ten
    assert ends(logged, 1) == (8.0, 7.0)
    assert ends(logged, 10) == (pytest.approx((8 + 9 * 2) / 10), pytest.approx((5 * 7 + 10 * 5) / 15))
    assert ends(logged, 100) == (pytest.approx(ends(logged, 35)[0]),) * 2
    assert ends([(500, 4.0), (501, 5.0)], 1) == (4.0, 5.0)


def test_steps_of_longer_pairs_are_no_divergence(tmp_path, monkeypatch):
    """A model that has learnt short pairs by heart sees long ones, which nobody can know."""
    generator = np.random.default_rng(0)
    short, long = ({"en": "a", "de": "aa"}, {"en": "b", "de": "".join(generator.choice(list("cdefghijkl"), 20))})
    for name, rows in (("short", [short] * 64), ("both", [short] * 640 + [long] * 64)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stack = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = {"encoder": {**stack, "causal": False}, "decoder": {**stack, "cross_num_key_value_heads": 1}}
    how = {"tokens": 900, "sequence_length": 24, "batch_tokens": 24 * 16, "learning_rate": 1e-2, "log_every": 1}
    how |= {"columns": ("en", "de"), "report_to": "none"}
    config = {"model_type": "mqa_seq2seq", **config}
    pretrain(tmp_path / "model", config=config, dataset=str(tmp_path / "short.jsonl"), vocab_size=400, **how)
    more = {"dataset": str(tmp_path / "both.jsonl"), "teacher": "none", **how}
    report = uptrain(tmp_path / "model", tmp_path / "out", **more)
    losses = [line["loss"] for line in report.log["main"] if "loss" in line]
    share, plus = trainer.DIVERGED
    assert max(losses) > share * losses[0] + plus
    monkeypatch.setattr(trainer, "ends", lambda logged, window: ends(logged, 1))
    with pytest.raises(MQAError, match="diverged"):
        uptrain(tmp_path / "model", tmp_path / "again", **more)


def test_a_job_that_is_told_to_stop_saves_and_goes_on_from_there(home, tmp_path, monkeypatch):
    job(home, tmp_path / "whole").run()
    plain = trainer.LossTrainer.training_step

    def told(self, *args, **kwargs):
        if self.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(trainer.LossTrainer, "training_step", told)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        job(home, tmp_path / "out", save_every=100).run()
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) == before
    assert last_checkpoint(tmp_path / ".out.uptrain" / "main").endswith("checkpoint-5")
    job(home, tmp_path / "out", save_every=100).run()
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_training_leaves_out_cudnns_attention_and_lets_it_be_used_again(home, tmp_path, monkeypatch):
    plain, seen = trainer.LossTrainer.training_step, set()

    def watched(self, *args, **kwargs):
        seen.add(torch.backends.cuda.cudnn_sdp_enabled())
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(trainer.LossTrainer, "training_step", watched)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    job(home, tmp_path / "out").run()
    assert seen == {False}
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_another_command_does_not_go_on_with_a_run(home, tmp_path, monkeypatch):
    plain = trainer.LossTrainer.training_step

    def stop(self, *args, **kwargs):
        if self.state.global_step == last:
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(trainer.LossTrainer, "training_step", stop)
    for last in (0, 3):
        with pytest.raises(KeyboardInterrupt):
            job(home, tmp_path / "out", learning_rate=(last + 1) * 1e-3).run()
    monkeypatch.undo()
    with pytest.raises(MQAError, match=r"learning_rate was 0.004 and is 0.001.*`restart`"):
        job(home, tmp_path / "out", learning_rate=1e-3).run()
    report = job(home, tmp_path / "out", learning_rate=1e-3, restart=True).run()
    assert report.options["learning_rate"] == 1e-3


def test_a_student_that_has_changed_is_another_run(home, tmp_path, monkeypatch):
    shutil.copytree(home / "student", tmp_path / "student")
    plain = trainer.LossTrainer.training_step

    def stop(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(trainer.LossTrainer, "training_step", stop)
    with pytest.raises(KeyboardInterrupt):
        job(home, tmp_path / "out", tmp_path / "student").run()
    monkeypatch.undo()
    convert(home / "source", tmp_path / "student", method="first", dtype="float32", overwrite=True)
    with pytest.raises(MQAError, match="options: files of the student"):
        job(home, tmp_path / "out", tmp_path / "student").run()


def test_adapters_begin_where_the_seed_says(home, tmp_path):
    for name in ("one", "other"):
        job(home, tmp_path / name, train="lora", tokens=256).run()
    one, other = weights(tmp_path / "one"), weights(tmp_path / "other")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_logs_for_tensorboard_stay_with_the_result(home, tmp_path):
    job(home, tmp_path / "out", tokens=256, report_to="tensorboard").run()
    assert list((tmp_path / "out" / "runs" / "main").rglob("events.out.tfevents.*"))


def test_a_teacher_with_another_tokenizer_is_refused(home, tmp_path):
    shutil.copytree(home / "source", tmp_path / "teacher")
    path = tmp_path / "teacher" / "tokenizer.json"
    path.write_text(path.read_text().replace('"<s>"', '"<begin>"'))
    settings = tmp_path / "teacher" / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"<s>"', '"<begin>"'))
    with pytest.raises(MQAError, match="a different tokenizer"):
        job(home, tmp_path / "out", teacher=str(tmp_path / "teacher")).run()


def test_a_file_that_is_not_the_students_own_is_refused_before_training(home, tmp_path):
    shutil.copytree(home / "student", tmp_path / "student")
    (tmp_path / "secret.txt").write_text("a secret")
    (tmp_path / "student" / "NOTES").symlink_to("../secret.txt")
    with pytest.raises(MQAError, match=r"NOTES links to .*secret\.txt, outside of the checkpoint"):
        job(home, tmp_path / "out", tmp_path / "student").run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret.txt", "student"]


def test_a_full_disk_is_seen_before_training(home, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(MQAError, match=r"but .* has 1,000 free"):
        job(home, tmp_path / "out").run()


def test_two_processes_do_what_one_does(home, tmp_path):
    assert CliRunner().invoke(app, command(home, tmp_path / "one", "--tokens", "512", student="plain")).exit_code == 0
    words = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--rdzv-backend=c10d"]
    words += ["--rdzv-endpoint=localhost:0", "-m", "mqa_hf", "uptrain"]
    arguments = command(home, tmp_path / "two", "--tokens", "512", student="plain")[1:]
    done = subprocess.run(
        [sys.executable, *words, *arguments],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)


def test_accumulation_does_not_change_the_result(home, tmp_path):
    for micro in (2, 8):
        job(home, tmp_path / str(micro), "plain", micro_batch=micro, tokens=512).run()
    one, other = weights(tmp_path / "2"), weights(tmp_path / "8")
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)


def translation(directory, kv_heads=1, **config):
    """A source that translates, a conversion of it and pairs; returned is how the latter is trained."""
    torch.manual_seed(0)
    shape = {"vocab_size": 93, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(**shape, decoder_start_token_id=0, **config))
    model.save_pretrained(directory / "source")
    write_tokenizer(directory / "source")
    convert(directory / "source", directory / "student", dtype="float32", kv_heads=kv_heads)
    pairs = directory / "pairs.jsonl"
    rows = [{"en": f"word {i} of text", "de": f"Wort {i} im Text"} for i in range(60)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"dataset": str(pairs), "columns": ("en", "de"), "loss": "kl", **SCHEDULE}
    return Uptraining(directory / "student", directory / "out", teacher=str(directory / "source"), **given)


def test_a_translation_model_learns_from_its_teacher(tmp_path):
    validation = {"validation": str(tmp_path / "pairs.jsonl"), "validation_tokens": 320}
    job = replace(translation(tmp_path), loss="kl,hidden", attention_tokens=256, **validation)
    report = replace(job, tokens=2048, sequence_length=32).run()
    assert report.validation.after["kl"] < report.validation.before["kl"]
    assert 2048 <= report.tokens < 2048 + 128 * 2  # what the decoder writes, in whole steps
    with pytest.raises(MQAError, match="no sentinels"):
        replace(job, output=tmp_path / "no", columns=()).run()


def test_a_teacher_is_followed_without_dropout(tmp_path):
    """A student that is its teacher has no divergence from it: what is left is the noise of its own dropout."""
    job = replace(translation(tmp_path, kv_heads=4, dropout_rate=0.3), tokens=256, sequence_length=32)

    def first_divergence(name, dropout=None):
        report = replace(job, output=tmp_path / name, dropout=dropout).run()
        return report.log["main"][0]["kl"]

    assert first_divergence("quiet") == pytest.approx(0.0, abs=1e-5)
    assert first_divergence("noisy", dropout=True) > 1e-4
    config = AutoConfig.from_pretrained(tmp_path / "quiet")
    assert config.decoder.hidden_dropout == 0.3  # as the student has it
    assert without_dropout(config).decoder.hidden_dropout == without_dropout(config).encoder.hidden_dropout == 0.0


@pytest.mark.parametrize("config", [GPT2Config(), OPTConfig(layerdrop=0.1, attention_dropout=0.1), LlamaConfig()])
def test_no_dropout_is_left_under_any_name(config):
    left = vars(without_dropout(config)).items()
    assert not [name for name, value in left if "drop" in name and isinstance(value, float) and value]
    assert without_dropout(config).to_dict().keys() == config.to_dict().keys()


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        ((), False),
        (("--loss", "kl=1,lm=1"), False),
        (("--loss", "lm"), True),
        (("--teacher", "none"), True),
        (("--dropout",), True),
        (("--loss", "lm", "--no-dropout"), False),
    ],
)
def test_dropout_is_kept_unless_a_teacher_is_learnt_from(home, tmp_path, words, kept):
    said = [word for word in command(home, tmp_path / "out", "--tokens", "128") if word != "--dropout"]
    result = CliRunner().invoke(app, [*said, *words])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "uptraining.json").read_text())["options"]["dropout"] is kept


def test_a_stream_is_read_on_the_way(home, tmp_path):
    report = job(home, tmp_path / "out", streaming=True, tokens=400 * 16).run()
    assert report.tokens == 6400
    assert report.log["main"][-2]["loss"] < report.log["main"][0]["loss"]


def test_a_stream_without_a_whole_row_ends(home, tmp_path):
    (tmp_path / "short.jsonl").write_text(json.dumps({"text": "few"}) + "\n" + json.dumps({"text": None}) + "\n")
    with pytest.raises(MQAError, match="no row of 16 tokens"):
        job(home, tmp_path / "out", streaming=True, dataset=str(tmp_path / "short.jsonl")).run()


def test_a_native_student_is_trained_in_its_own_class(home, tmp_path):
    convert(home / "source", tmp_path / "native", target="native", dtype="float32")
    job(home, tmp_path / "out", tmp_path / "native").run()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.num_key_value_heads == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "pass --tokens, or --alpha"),
        (["--alpha", "0.05"], "--alpha with --pretraining-tokens"),
        (["--tokens", "500", "--loss", "mse"], "lm, kl, hidden, attention"),
        (["--tokens", "500", "--train", "half"], "all, attention, lora"),
        (["--tokens", "500", "--dataset", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--tokens", "500", "--columns", "body"], "no column 'body' of text"),
        (["--tokens", "500", "--teacher", "none", "--loss", "kl"], "needs a teacher"),
        (["--tokens", "500", "--attention-tokens", "600"], "must be below --tokens 500, got 600"),
        (["--tokens", "500", "--sequence-length", "4096"], "positions of the model"),
        (["--tokens", "500", "--learning-rate", "-1"], "above 0"),
        (["--tokens", "500", "--report-to", "paper"], "tensorboard, wandb, none"),
        (["--tokens", "500", "--validation-tokens", "0", "--validation", "TEXT"], "at least 1"),
        (["--tokens", "500", "--loss", "attention", "--train", "lora"], "--attention-tokens"),
        (["--tokens", "500", "--liger"], "needs a CUDA device"),
        (["--tokens", "500", "--batch-tokens", "10000000"], "a step takes"),
        (["--tokens", "500", "--micro-batch", "3", "--sequence-length", "16", "--batch-tokens", "128"], "must divide"),
    ],
)
def test_what_cannot_be_is_said_and_leaves_nothing(home, tmp_path, words, message):
    text = str(home / "text.jsonl")
    words = [text if word == "TEXT" else word for word in words]
    dataset = [] if "--dataset" in words else ["--dataset", text]
    result = CliRunner().invoke(app, ["uptrain", str(home / "student"), str(tmp_path / "out"), *dataset, *words])
    assert isinstance(result.exception, MQAError), result.output
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_names_and_defaults():
    assert parse_losses("kl=1,hidden=0.5") == {"kl": 1.0, "hidden": 0.5}
    assert Part.parse("a=0.3") == Part("a", 0.3)
    assert Part.parse("a=b.jsonl") == Part("a=b.jsonl")
    assert default_learning_rate("all", 4096) == pytest.approx(8.5e-5)
    assert default_learning_rate("all", 512) == default_learning_rate("all", 64) == pytest.approx(6.8e-4)
    assert default_learning_rate("all", 512, latent=True) == pytest.approx(1.7e-4)
    assert [warmup_steps(0.02, steps) for steps in (3, 19, 100, 2000)] == [1, 3, 10, 40]
    assert warmup_steps(0.0, 2000) == 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"train": "attention", "attention_tokens": 128},
        {"train": "lora", "lora_rank": 4},
        {"loss": "lm", "teacher": "none"},
    ],
    ids=lambda options: ", ".join(options) or "all",
)
def test_a_dry_run_says_what_the_run_takes(home, tmp_path, options, monkeypatch):
    seen = {}

    def watched(name, model, objective, run, text, directory, callbacks=()):
        parameters = list(model.parameters())
        learnt = [p for p in parameters if p.requires_grad]
        taught = [] if objective.teacher is None else list(objective.teacher.parameters())
        seen[name] = [sum(p.numel() for p in some) for some in (parameters, learnt, taught)]
        return plain(name, model, objective, run, text, directory, callbacks)

    plain = uptrainer.train
    said = job(home, tmp_path / "out", tokens=384, keep=3, **options).dry_run()
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(uptrainer, "train", watched)
    record = job(home, tmp_path / "out", tokens=384, keep=3, **options).run()
    held, learnt, taught = seen["uptraining"]
    assert (said["steps"], said["rows"], said["tokens_per_step"]) == (3, 24, 128)
    assert record.tokens == said["steps"] * said["tokens_per_step"]
    assert said["trained_parameters"] == learnt
    assert said["memory_bytes"] == 4 * (held + 3 * learnt + taught)  # gradients and two moments of what is trained
    saved = held - said["parameters"] if options.get("train") == "lora" else held
    if "attention_tokens" not in options:
        assert said["checkpoint_disk_bytes"] == 4 * (saved + 2 * learnt) * 4


def test_a_dry_run_prints_numbers_and_an_interrupted_run_says_how_to_go_on(home, tmp_path, monkeypatch):
    said = CliRunner().invoke(app, [*command(home, tmp_path / "out"), "--dry-run"])
    assert said.exit_code == 0, said.output
    assert "steps: 40" in said.stdout
    plain = trainer.LossTrainer.training_step

    def stop(self, *args, **kwargs):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(trainer.LossTrainer, "training_step", stop)
    for step, words, message in (  # noqa: B007
        (1, (), "No checkpoint was saved yet"),
        (4, (), "run the same command again to resume"),
        (4, ("--restart",), "run the same command again without --restart to resume"),
    ):
        stopped = CliRunner().invoke(app, [*command(home, tmp_path / "out"), *words])
        assert stopped.exit_code == 130
        assert f"interrupted. {message}" in stopped.stderr.replace(f"Checkpoints are in {tmp_path}/.out.uptrain; ", "")


@pytest.mark.parametrize("content", ["", "[1, 2]", '{"half', "\x00"])
def test_an_unfinished_run_of_which_nothing_is_known_is_not_gone_on_with(home, tmp_path, content):
    place = tmp_path / ".out.uptrain"
    (place / "main" / "checkpoint-2").mkdir(parents=True)
    (place / "options.json").write_text(content)
    job(home, tmp_path / "out", tokens=128).run()  # nothing to lose: it has no whole checkpoint
    shutil.rmtree(tmp_path / "out")
    (place / "main" / "checkpoint-2").mkdir(parents=True)
    (place / "main" / "checkpoint-2" / "trainer_state.json").write_text("{}")
    (place / "options.json").write_text(content)
    with pytest.raises(MQAError, match=r"without readable options \(options\.json\); start over with `restart`"):
        job(home, tmp_path / "out", tokens=128).run()


DAMAGED = {
    "no configuration": ("config.json", None, "it has no config.json"),
    "an empty configuration": ("config.json", "", r"config\.json cannot be read"),
    "another configuration": ("config.json", "[1]", "holds a list"),
    "an unknown type": ("config.json", '{"model_type": "nonesuch"}', "refuses"),
    "layers without end": (
        "config.json",
        '{"model_type": "llama", "num_hidden_layers": 9000000000}',
        "more layers than any model",
    ),
    "no language model": ("config.json", '{"model_type": "clip"}', "is not a language model"),
    "no tokenizer": ("tokenizer.json", None, "has no tokenizer that can be loaded"),
    "no weights": ("model.safetensors", None, "cannot be loaded"),
    "weights that are none": ("model.safetensors", "{}", "cannot be loaded"),
    "a broken report": ("conversion.json", "{", r"conversion\.json cannot be read"),
    "a report without a source": ("conversion.json", "{}", "has no source in conversion.json"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_student_that_is_none_is_said(home, tmp_path, damage):
    name, content, message = DAMAGED[damage]
    shutil.copytree(home / "student", tmp_path / "student")
    (tmp_path / "student" / name).unlink()
    if name == "tokenizer.json":
        (tmp_path / "student" / "tokenizer_config.json").unlink()
    if content is not None:
        (tmp_path / "student" / name).write_text(content)
    given = {"dataset": str(home / "text.jsonl"), "tokens": 128, "sequence_length": 16, "batch_tokens": 128}
    with pytest.raises(MQAError, match=message):
        uptrain(tmp_path / "student", tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()
