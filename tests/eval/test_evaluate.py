"""`mqa-hf evaluate`: numbers against independent ones, runs that are interrupted, what cannot be measured."""

import json
import math
import os
import re
import shutil
import subprocess
import sys

import jiwer
import numpy as np
import pytest
import sacrebleu
import soundfile
import torch
import yaml
from seq2seq_sources import BART, WHISPER, make_seq2seq
from tokenizer import write_tokenizer, write_whisper_processor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    LlamaConfig,
    LlamaForCausalLM,
)
from typer.testing import CliRunner

from mqa_hf import convert, evaluate
from mqa_hf.base.errors import MQAError
from mqa_hf.cli import app
from mqa_hf.eval import likelihood
from mqa_hf.eval.evaluate import Evaluation
from mqa_hf.eval.evaluation_record import EvaluationRecord, WritingRecord, read_lines
from mqa_hf.eval.evaluator import append
from mqa_hf.eval.held_out import held_out_text
from mqa_hf.eval.metrics import Continuations, NextTokens, WordErrors, bleu_above, ratio

SMALL = {
    "vocab_size": 93,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QUICK = {"prompts": 6, "prompt_tokens": 8, "new_tokens": 12}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """An original, the same with all its heads, and one with the mean of them; texts and pairs."""
    directory = tmp_path_factory.mktemp("quality")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(directory / "original")
    write_tokenizer(directory / "original")
    convert(directory / "original", directory / "same", kv_heads=4)
    convert(directory / "original", directory / "mean")
    words = np.random.default_rng(0).choice(["some", "words", "of", "a", "text", "that", "is", "read"], (20, 30))
    texts = [" ".join(row[: 4 + n]) for n, row in enumerate(words)]
    (directory / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    rows = [{"en": text, "de": " ".join(reversed(text.split()))} for text in texts]
    (directory / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def what(places, **options):
    """Options of an evaluation that is soon done."""
    return {"text": str(places / "text.jsonl"), "window": 16, **QUICK, **options}


def windows_of(directory, config, asked):
    return held_out_text(write_tokenizer(directory), config, Evaluation("original", **asked)).windows


def test_each_token_is_predicted_once_from_its_window(places, tmp_path):
    asked = what(places, stride=6, batch_tokens=60, tokens=700)
    found = evaluate(places / "original", [], output=tmp_path / "out", **asked).checkpoints[0]
    model = AutoModelForCausalLM.from_pretrained(places / "original").eval()
    tokenizer = write_tokenizer(tmp_path)
    texts = [json.loads(line)["text"] for line in (places / "text.jsonl").read_text().splitlines()]
    total, count, size, nats_by_context = 0.0, 0, 0, {}
    left = 700
    for index in torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist():
        ids = [1, *tokenizer(texts[index]).input_ids][: left + 1]
        left -= len(ids) - 1
        for t in range(1, len(ids)):
            # The first window that reaches the token: windows begin at multiples of 6 and read 16 tokens, the last
            # one of a document those before its end.
            begin = max(0, min(-(-(t - 16) // 6) * 6, len(ids) - 17))
            with torch.no_grad():
                log_p = model(torch.tensor([ids[begin:t]])).logits[0, -1].log_softmax(-1)
            nats = -float(log_p[ids[t]])
            total, count = total + nats, count + 1
            nats_by_context.setdefault(int(math.log2(t - begin)), []).append(nats)
        size += len(tokenizer.decode(ids[1:]).encode())
    numbers = found.next_token
    assert numbers.tokens == count == 700
    assert numbers.loss == pytest.approx(total / count, abs=1e-5)
    assert numbers.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    assert numbers.bits_per_byte == pytest.approx(total / math.log(2) / size, rel=1e-5)
    for row in found.loss_by_context:
        expected = nats_by_context[int(math.log2(row.first))]
        assert (row.loss, row.tokens) == (pytest.approx(np.mean(expected), abs=1e-5), len(expected))


def test_the_likelihood_is_that_of_lm_eval(places, tmp_path):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    texts = [json.loads(line)["text"] for line in (places / "text.jsonl").read_text().splitlines()]
    model = HFLM(pretrained=str(places / "mean"), max_length=16, batch_size=1, dtype="float32", device="cpu")
    asked = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    expected = -sum(model.loglikelihood_rolling(asked, disable_tqdm=True))
    found = evaluate(places / "mean", [], output=tmp_path / "out", **what(places, stride=16)).checkpoints[0].next_token
    assert found.loss * found.tokens == pytest.approx(expected, rel=1e-5)
    tokenizer = write_tokenizer(tmp_path)
    assert found.bytes == sum(len(tokenizer.decode(tokenizer(text).input_ids).encode()) for text in texts)


def test_a_model_with_all_its_heads_is_the_original_and_a_pooled_one_is_not(places, tmp_path):
    asked = what(places)
    others = [places / "same", places / "mean"]
    original, same, mean = evaluate(places / "original", others, output=tmp_path / "out", **asked).checkpoints
    for one in (original, same):
        assert abs(one.next_token.kl) < 1e-5
        assert one.next_token.same_first_choice == 1
        assert one.writing.identical == 1
        assert one.writing.agreeing_tokens == one.writing.length
    low, high = mean.next_token.loss_above_original_interval
    difference = mean.next_token.loss - original.next_token.loss
    assert low < mean.next_token.loss_above_original < high
    assert mean.next_token.loss_above_original == pytest.approx(difference)
    assert mean.next_token.kl > 0.01
    assert mean.next_token.same_first_choice < 1
    assert mean.writing.identical < 1
    assert original.kv_bytes_per_token == 4 * mean.kv_bytes_per_token

    models = [AutoModelForCausalLM.from_pretrained(places / name).eval() for name in ("original", "mean")]
    windows = windows_of(tmp_path, models[0].config, asked)
    total = 0.0
    for window in windows:
        with torch.no_grad():
            p, q = (model(torch.tensor([window.ids])).logits[0].double().log_softmax(-1) for model in models)
        seen = torch.tensor(window.labels) >= 0
        total += float(torch.nn.functional.kl_div(q[seen], p[seen], log_target=True, reduction="sum"))
    assert mean.next_token.kl * mean.next_token.tokens == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("padded", ["original", "checkpoint"])
def test_models_with_padded_embeddings_are_compared_over_the_words_that_both_have(places, tmp_path, padded):
    model = AutoModelForCausalLM.from_pretrained(places / "original")
    model.resize_token_embeddings(94, pad_to_multiple_of=32, mean_resizing=False)
    model.save_pretrained(tmp_path / "wide")
    write_tokenizer(tmp_path / "wide")
    convert(tmp_path / "wide", tmp_path / "wide-mean")
    pairs = {"original": ("wide", "mean"), "checkpoint": ("original", "wide-mean")}[padded]
    one, other = ((tmp_path if name.startswith("wide") else places) / name for name in pairs)
    found = evaluate(one, [other], output=tmp_path / "out", **what(places))
    sizes = {"original": "wide 96, mean 93", "checkpoint": "original 93, wide-mean 96"}[padded]
    assert f"vocabularies of different sizes ({sizes})" in found.note

    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (one, other)]
    nats, divergence, same, count = [0.0, 0.0], 0.0, 0, 0
    for window in windows_of(tmp_path, models[0].config, what(places)):
        with torch.no_grad():
            logits = [model(torch.tensor([window.ids])).logits[0].double() for model in models]
        labels = torch.tensor(window.labels)
        for i, x in enumerate(logits):
            nats[i] += float(torch.nn.functional.cross_entropy(x, labels, ignore_index=-100, reduction="sum"))
        p, q = (x[labels >= 0, :93].softmax(-1) for x in logits)
        divergence += float((p * (p / q).log()).sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += len(p)
    for i, checkpoint in enumerate(found.checkpoints):
        assert checkpoint.next_token.loss == pytest.approx(nats[i] / count, rel=1e-5)
    compared = found.checkpoints[1].next_token
    assert compared.kl == pytest.approx(divergence / count, rel=1e-4)
    assert compared.same_first_choice == pytest.approx(same / count)


def test_models_of_other_sizes_are_refused_where_the_tokenizer_has_words_beyond_one(places, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(places / "original")
    model.resize_token_embeddings(90)
    model.save_pretrained(tmp_path / "fewer")
    write_tokenizer(tmp_path / "fewer")
    with pytest.raises(MQAError, match=r"\(original 93, fewer 90\), but the tokenizer has ids up to 92"):
        evaluate(places / "original", [tmp_path / "fewer"], output=tmp_path / "out", **what(places))


def test_an_interrupted_run_goes_on_and_a_finished_one_is_not_run_again(places, tmp_path, monkeypatch):
    asked = what(places, batch_tokens=60)
    whole = evaluate(places / "original", [places / "mean"], output=tmp_path / "whole", **asked)
    seen = []
    plain = likelihood.compare

    def cut(*args):
        seen.append(1)
        if len(seen) == whole.settings.windows + 10:
            raise KeyboardInterrupt
        return plain(*args)

    monkeypatch.setattr(likelihood, "compare", cut)
    with pytest.raises(KeyboardInterrupt):
        evaluate(places / "original", [places / "mean"], output=tmp_path / "cut", **asked)
    assert not (tmp_path / "cut" / "evaluation.json").exists()
    (kept,) = (tmp_path / "cut" / "mean").glob("tokens-*")
    with kept.open("a") as file:
        file.write('{"id": 99999, "na')
    again = evaluate(places / "original", [places / "mean"], output=tmp_path / "cut", **asked)
    assert again.checkpoints == whole.checkpoints
    windows = whole.settings.windows
    assert len(seen) == 2 * windows + 1  # the one that was cut off
    assert evaluate(places / "original", [places / "mean"], output=tmp_path / "cut", **asked) == again
    assert len(seen) == 2 * windows + 1
    evaluate(places / "original", [places / "mean"], output=tmp_path / "cut", **{**asked, "stride": 4})
    assert len(seen) > 3 * windows


def test_two_processes_find_what_one_does(places, tmp_path):
    asked = [str(places / "original"), str(places / "mean"), "--text", str(places / "text.jsonl"), "--window", "16"]
    asked += ["--tokens", "300", "--prompts", "5", "--prompt-tokens", "4", "--new-tokens", "6"]
    words = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    words += ["-m", "mqa_hf", "evaluate", *asked, "--output", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    result = CliRunner().invoke(app, ["evaluate", *asked, "--output", str(tmp_path / "one")])
    assert result.exit_code == 0, result.output
    one, two = (json.loads((tmp_path / n / "evaluation.json").read_text())["checkpoints"] for n in ("one", "two"))
    assert {path.name for path in (tmp_path / "two" / "mean").glob("tokens-*")} == {"tokens-0.jsonl", "tokens-1.jsonl"}
    for ours, theirs in zip(one, two):
        for name in ("loss", "loss_interval", "kl", "bits_per_byte", "tokens", "documents"):
            assert ours["next_token"][name] == pytest.approx(theirs["next_token"][name], rel=1e-5, abs=1e-6), name
        # Rows of other batches are rounded differently, and a tie may fall the other way.
        same = ours["next_token"]["same_first_choice"], theirs["next_token"]["same_first_choice"]
        assert same[0] == pytest.approx(same[1], abs=0.02)
        assert ours["writing"]["texts"] == theirs["writing"]["texts"] == 5
        assert [s["prompt"] for s in ours["samples"]] == [s["prompt"] for s in theirs["samples"]]


def test_targets_and_translations_of_an_encoder_decoder_model(places, tmp_path):
    model = make_seq2seq("bart", {**BART, "eos_token_id": 2})
    model.save_pretrained(tmp_path / "original")
    write_tokenizer(tmp_path / "original")
    convert(tmp_path / "original", tmp_path / "same", kv_heads=6)
    convert(tmp_path / "original", tmp_path / "mean")
    asked = what(places, text=str(places / "pairs.jsonl"), columns=("en", "de"), window=40, beams=3)
    original, same, mean = evaluate(
        tmp_path / "original", [tmp_path / "same", tmp_path / "mean"], output=tmp_path / "out", **asked
    ).checkpoints
    assert abs(same.next_token.kl) < 1e-5
    assert same.greedy.chrf == original.greedy.chrf
    assert mean.next_token.kl > 1e-3

    tokenizer = write_tokenizer(tmp_path)
    rows = [json.loads(line) for line in (places / "pairs.jsonl").read_text().splitlines()]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    ours = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "mean").eval()
    total, count, texts, goals = 0.0, 0, {1: [], 3: []}, []
    for number, i in enumerate(order):
        ids = torch.tensor([tokenizer(rows[i]["en"]).input_ids[:40]])
        labels = torch.tensor([tokenizer(rows[i]["de"]).input_ids[:40]])
        with torch.no_grad():
            total += float(ours(input_ids=ids, labels=labels).loss) * labels.shape[1]
        count += labels.shape[1]
        if number < 6:
            goals.append(rows[i]["de"])
            for beams, said in texts.items():
                options = {"num_beams": beams, "do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
                said.append(tokenizer.decode(ours.generate(ids, **options)[0], skip_special_tokens=True))
    assert mean.next_token.loss == pytest.approx(total / count, rel=1e-5)
    for kind, beams in (("greedy", 1), ("beam", 3)):
        assert getattr(mean, kind).chrf == pytest.approx(sacrebleu.corpus_chrf(texts[beams], [goals]).score)
        assert getattr(mean, kind).bleu == pytest.approx(sacrebleu.corpus_bleu(texts[beams], [goals]).score)


def test_transcripts_of_a_speech_model(places, tmp_path):
    _, generation = write_whisper_processor(tmp_path / "original", mels=16, frames=40)
    vocabulary = generation.no_timestamps_token_id + 52
    tokens = {name: getattr(generation, name) for name in ("eos_token_id", "pad_token_id", "decoder_start_token_id")}
    model = make_seq2seq("whisper", {**WHISPER, "vocab_size": vocabulary, **tokens})
    model.generation_config = generation
    model.save_pretrained(tmp_path / "original")
    convert(tmp_path / "original", tmp_path / "mean")
    generator = np.random.default_rng(0)
    rows = [{"audio": f"{n}.wav", "text": "abcdef"[n:] + " words"} for n in range(4)]
    sounds = [generator.normal(0, 0.1, 3000 + 100 * n).astype(np.float32) for n in range(4)]
    for row, sound in zip(rows, sounds):
        soundfile.write(tmp_path / row["audio"], sound, 16000, subtype="FLOAT")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = what(places, text=str(tmp_path / "rows.jsonl"), beams=2)
    original, mean = evaluate(tmp_path / "original", [tmp_path / "mean"], output=tmp_path / "out", **asked).checkpoints
    assert mean.next_token.kl > 1e-3

    processor = AutoProcessor.from_pretrained(tmp_path / "mean")
    ours = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "mean").eval()
    total, count, errors, words = 0.0, 0, 0, 0
    for row, sound in zip(rows, sounds):
        features = processor(sound, sampling_rate=16000, return_tensors="pt").input_features
        labels = torch.tensor([processor.tokenizer(row["text"]).input_ids[1:]])
        with torch.no_grad():
            total += float(ours(input_features=features, labels=labels).loss) * labels.shape[1]
        count += labels.shape[1]
        written = ours.generate(features, max_new_tokens=12, do_sample=False, num_beams=1)[0]
        measured = jiwer.process_words(row["text"], processor.decode(written, skip_special_tokens=True))
        errors += measured.substitutions + measured.deletions + measured.insertions
        words += len(row["text"].split())
    assert mean.next_token.loss == pytest.approx(total / count, rel=1e-5)
    assert mean.greedy.word_error_rate == pytest.approx(errors / words)
    assert original.beam.texts == 4
    with pytest.raises(MQAError, match="no columns sound and text"):
        evaluate(tmp_path / "original", [], output=tmp_path / "out", **{**asked, "columns": ("sound", "text")})
    soundfile.write(tmp_path / "0.wav", np.zeros(9000, np.float32), 8000)
    with pytest.raises(MQAError, match=r"a recording of 1\.1 s is longer than"):
        evaluate(tmp_path / "original", [], output=tmp_path / "out", **asked)


def test_tasks_of_lm_eval(places, tmp_path):
    rows = [{"question": f"some {n}", "choices": ["words", "text"], "answer": n % 2} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "words",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "words.yaml").write_text(yaml.safe_dump(task))
    asked = what(places, tasks=("words",), include_path=tmp_path / "tasks", tokens=100, prompts=0)
    found = evaluate(places / "mean", [], output=tmp_path / "out", **asked).checkpoints[0]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(places / "mean").eval(), write_tokenizer(tmp_path)
    right = 0
    for row in rows:
        scores = []
        for choice in row["choices"]:
            start, ids = (tokenizer(text).input_ids for text in (row["question"], f"{row['question']} {choice}"))
            with torch.no_grad():
                log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(float(log_p[t - 1, ids[t]]) for t in range(len(start), len(ids))))
        right += int(np.argmax(scores)) == row["answer"]
    assert found.tasks.results["words"]["acc,none"] == pytest.approx(right / 6)
    with pytest.raises(MQAError, match="has no task nothing"):
        evaluate(places / "mean", output=tmp_path / "out", **{**asked, "tasks": ("nothing",)})


def test_intervals_are_those_of_a_normal_mean():
    generator = np.random.default_rng(1)
    values, lengths = generator.normal(3, 1, 4000), np.ones(4000)
    value, (low, high) = ratio(values, lengths)
    width = 1.96 * values.std() / math.sqrt(4000)
    assert value == pytest.approx(values.mean())
    assert (value - low, high - value) == (pytest.approx(width, rel=0.15), pytest.approx(width, rel=0.15))
    difference, (low, high) = ratio(values + 0.1, lengths, less=values)
    # paired: the spread of the documents is in both
    assert (low, difference, high) == tuple(pytest.approx(0.1) for _ in range(3))
    assert ratio([1.0], [2.0]) == (0.5, None)


def test_metrics_of_texts():
    found = Continuations().compute(predictions=[[1, 2, 3, 4], [5] * 8], references=[[1, 2, 9], [5] * 8])
    assert found["agreeing_tokens"] == (2 + 8) / 2
    assert found["identical"] == 0.5
    assert found["repetition"] == pytest.approx(4 / 6)
    goals = [f"the cat number {n} sat on the mat all day" for n in range(30)]
    texts = [text.replace("sat", "lay") if n % 3 else text for n, text in enumerate(goals)]
    other = [text.replace("all day", "at night") if n % 2 else text for n, text in enumerate(texts)]
    above, (low, high) = bleu_above(other, texts, goals)
    scores = [sacrebleu.corpus_bleu(said, [goals]).score for said in (other, texts)]
    assert above == pytest.approx(scores[0] - scores[1])
    assert low < above < high < 0
    assert bleu_above(texts, texts, goals) == (0, (0, 0))
    assert bleu_above(texts[:1], other[:1], goals[:1])[1] is None
    found = WordErrors().compute(predictions=["a cat sat", "dog"], references=["the cat sat", "the big dog"])
    assert found["word_error_rate"] == pytest.approx(3 / 6)
    found = NextTokens().compute(
        nats=[2.0, 4.0], original=[1.0, 4.0], divergence=[0.0, 1.0], same=[1, 3], tokens=[2, 4], bytes=[6, 9]
    )
    assert (found["loss"], found["same_first_choice"]) == (1.0, pytest.approx(4 / 6))


def test_what_cannot_be_measured_is_said(places, tmp_path):
    with pytest.raises(MQAError, match="missing"):
        evaluate(places / "missing", [], output=tmp_path / "out", **what(places))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(MQAError, match=r"`text` .*empty\.jsonl is empty"):
        evaluate(places / "original", [], output=tmp_path / "out", **what(places, text=str(tmp_path / "empty.jsonl")))
    (tmp_path / "none.txt").write_text("")
    with pytest.raises(MQAError, match="no document has two tokens"):
        evaluate(places / "original", [], output=tmp_path / "out", **what(places, text=str(tmp_path / "none.txt")))
    with pytest.raises(MQAError, match="got 16 and 17"):
        evaluate(places / "original", [], output=tmp_path / "out", **what(places, stride=17))
    with pytest.raises(MQAError, match="given twice"):
        evaluate(places / "mean", [places / "mean"], output=tmp_path / "out", **what(places))
    for name, value in (
        ("window", 0),
        ("stride", 0),
        ("prompt_tokens", -3),
        ("new_tokens", 0),
        ("beams", 0),
        ("seed", -1),
    ):
        with pytest.raises(MQAError, match=f"`{name}` must be .*at least .*got {value}"):
            evaluate(places / "mean", **what(places, **{name: value}))
    with pytest.raises(MQAError, match="`dtype` must be one of"):
        evaluate(places / "mean", **what(places, dtype="int8"))

    shutil.copytree(places / "mean", tmp_path / "other")
    words = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    words["model"]["vocab"]["new"] = len(words["model"]["vocab"])
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(MQAError, match=r"another tokenizer \(94 tokens\).*\(93 tokens\)"):
        evaluate(places / "original", [tmp_path / "other"], output=tmp_path / "out", **what(places))

    shutil.copytree(places / "mean", tmp_path / "cut")
    whole = (places / "mean" / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(whole[:1000])
    with pytest.raises(MQAError, match="cut cannot be loaded"):
        evaluate(places / "original", [tmp_path / "cut"], output=tmp_path / "out", **what(places))

    (tmp_path / "cut" / "model.safetensors").unlink()
    with pytest.raises(MQAError, match=r"cut has no weights \(\*\.safetensors or \*\.bin\)"):
        evaluate(places / "original", [tmp_path / "cut"], output=tmp_path / "early", **what(places))
    assert not (tmp_path / "early").exists()

    shutil.copytree(places / "mean", tmp_path / "broken")
    broken = AutoModelForCausalLM.from_pretrained(places / "mean")
    with torch.no_grad():
        broken.lm_head.weight[7] = 3e38  # a number, which its logits are not
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(MQAError, match="logits are not finite in document 0"):
        evaluate(places / "original", [tmp_path / "broken"], output=tmp_path / "out", **what(places))


def test_a_text_shorter_than_a_window_is_measured(places, tmp_path):
    (tmp_path / "short.txt").write_text("some words")
    asked = what(places, text=str(tmp_path / "short.txt"), window=512, prompt_tokens=4)
    found = evaluate(places / "original", [places / "mean"], output=tmp_path / "out", **asked).checkpoints[1]
    assert found.next_token.tokens == len(write_tokenizer(tmp_path)("some words").input_ids)
    assert found.next_token.loss_above_original_interval is None


def test_prompts_are_looked_for_beyond_the_text_that_is_predicted(places, tmp_path):
    tokenizer = write_tokenizer(tmp_path)
    config = LlamaConfig(**SMALL)
    asked = what(places, tokens=20, prompts=5)
    few = held_out_text(tokenizer, config, Evaluation("original", **asked))
    assert (len(few.prompts), sum(sum(x >= 0 for x in w.labels) for w in few.windows)) == (5, 20)
    none = Evaluation("original", **{**asked, "prompt_tokens": 10_000})
    assert held_out_text(tokenizer, config, none).prompts == []


def test_the_command(places, tmp_path):
    words = ["evaluate", str(places / "original"), str(places / "mean"), "--output", str(tmp_path / "out")]
    words += ["--text", str(places / "text.jsonl"), "--window", "16", "--tokens", "300", "--prompts", "2"]
    result = CliRunner().invoke(app, [*words, "--prompt-tokens", "8", "--new-tokens", "4"])
    assert result.exit_code == 0, result.output
    assert "perplexity" in result.stdout
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [c["name"] for c in found["checkpoints"]] == ["original", "mean"]
    assert found["settings"]["tokens"] == 300
    assert len(found["checkpoints"][1]["samples"]) == 2


def add_words(source, target, *words):
    """The same model with words that were added to it, and padded embeddings."""
    tokenizer = write_tokenizer(target)
    tokenizer.add_special_tokens({"additional_special_tokens": list(words)})
    tokenizer.save_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(source)
    model.resize_token_embeddings(96, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[93:].normal_(generator=torch.Generator().manual_seed(len(words)))
    model.save_pretrained(target)


def test_words_that_were_added_to_one_tokenizer_alone_are_left_out(places, tmp_path):
    add_words(places / "original", tmp_path / "original", "<one>")
    add_words(places / "mean", tmp_path / "mean", "<other>", "<more>")
    found = evaluate(tmp_path / "original", [tmp_path / "mean"], output=tmp_path / "out", **what(places))
    (words,) = re.findall(r"differ in 3 added tokens \((.*)\); KL and first choice leave them out", found.note)
    assert set(words.split(", ")) == {"'<one>'", "'<other>'", "'<more>'"}
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("original", "mean")]
    common = [*range(93), 95]  # what is padding in both is like what has no name in both
    nats, divergence, same, count = 0.0, 0.0, 0, 0
    for window in windows_of(tmp_path, models[0].config, what(places)):
        with torch.no_grad():
            logits = [model(torch.tensor([window.ids])).logits[0].double() for model in models]
        labels = torch.tensor(window.labels)
        nats += float(torch.nn.functional.cross_entropy(logits[1], labels, ignore_index=-100, reduction="sum"))
        p, q = (x[labels >= 0][:, common].softmax(-1) for x in logits)
        divergence += float((p * (p / q).log()).sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += len(p)
    numbers = found.checkpoints[1].next_token
    assert numbers.loss == pytest.approx(nats / count, rel=1e-5)
    assert numbers.kl == pytest.approx(divergence / count, rel=1e-4)
    assert numbers.same_first_choice == pytest.approx(same / count)
    assert found.checkpoints[0].next_token.kl == pytest.approx(0, abs=1e-6)

    (tmp_path / "marked.txt").write_text("some words <one> of a text")
    asked = what(places, text=str(tmp_path / "marked.txt"), prompts=0)
    with pytest.raises(MQAError, match=r"has '<one>' \(id 93\), which the tokenizer of mean does not have"):
        evaluate(tmp_path / "original", [tmp_path / "mean"], output=tmp_path / "marked", **asked)
    assert evaluate(tmp_path / "original", output=tmp_path / "alone", **asked).checkpoints[0].next_token.tokens > 9


def test_what_lies_in_the_output_and_is_no_measurement_is_left_alone(places, tmp_path):
    shutil.copytree(places / "original", tmp_path / "original")
    before = sorted(path.name for path in (tmp_path / "original").iterdir())
    with pytest.raises(
        MQAError, match=r"original has files that are not measurements \(chat_template\.jinja, config\.json"
    ):
        evaluate(tmp_path / "original", output=tmp_path, **what(places))
    assert sorted(path.name for path in (tmp_path / "original").iterdir()) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(MQAError, match="file is a file; give a directory"):
        evaluate(tmp_path / "original", output=tmp_path / "file", **what(places))
    with pytest.raises(MQAError, match=r"original is a checkpoint \(it has a config\.json\)"):
        evaluate(places / "original", output=tmp_path / "original", **what(places))
    assert sorted(path.name for path in (tmp_path / "original").iterdir()) == before
    for content, message in (
        ("{}", "is not a result of mqa-hf evaluate"),
        ("mine", r"evaluation\.json cannot be read"),
    ):
        (tmp_path / "evaluation.json").write_text(content)
        with pytest.raises(MQAError, match=message):
            evaluate(places / "original", output=tmp_path, **what(places))
        assert (tmp_path / "evaluation.json").read_text() == content


def test_checkpoints_of_another_kind_are_refused(places, tmp_path):
    make_seq2seq("bart", {**BART, "eos_token_id": 2}).save_pretrained(tmp_path / "bart")
    make_seq2seq("whisper", WHISPER).save_pretrained(tmp_path / "whisper")
    for one, other, message in (
        (places / "original", tmp_path / "bart", "bart is an encoder-decoder model, and .*original is a decoder-only"),
        (tmp_path / "bart", places / "original", "original is a decoder-only model, and .*bart is an encoder-decoder"),
        (tmp_path / "bart", tmp_path / "whisper", "whisper is a speech model, and .*bart is an encoder-decoder"),
    ):
        with pytest.raises(MQAError, match=message):
            evaluate(one, [other], output=tmp_path / "out", **what(places))
    assert not (tmp_path / "out").exists()


def test_measurements_that_are_none_are_said_and_cut_ones_are_made_again(places, tmp_path):
    asked = what(places, prompts=2)
    whole = evaluate(places / "original", output=tmp_path, **asked)
    (kept,) = (tmp_path / "original").glob("tokens-*")
    content = kept.read_bytes()
    kept.write_bytes(content[: len(content) // 2] + "ü".encode()[:1])  # killed within a character
    assert evaluate(places / "original", output=tmp_path, **asked).checkpoints == whole.checkpoints
    foreign = json.dumps({**json.loads(content.splitlines()[0]), "id": 10_000})
    for line in ("5", '{"id": 3}', "[]", foreign):
        kept.write_bytes(content + line.encode())
        with pytest.raises(MQAError, match=r"tokens-0\.jsonl, line \d+, is not a measurement; remove .*original"):
            evaluate(places / "original", output=tmp_path, **asked)
    kept.write_bytes(content)
    for damaged in ("", "5", '{"ch'):
        (tmp_path / "original" / "key.json").write_text(damaged)
        assert evaluate(places / "original", output=tmp_path, **asked).checkpoints == whole.checkpoints


def test_lines_end_only_where_they_were_ended(tmp_path):
    record = WritingRecord(id=0, tokens=[1], greedy="one\u2028line\x85", beam="")
    append(tmp_path / "writing-0.jsonl", "", [record], 1)
    assert read_lines(tmp_path, "writing", WritingRecord, 1) == [record]


def test_a_text_that_has_changed_is_measured_again(places, tmp_path):
    text = tmp_path / "text.txt"
    asked = what(places, text=str(text), prompts=0)
    text.write_text("some words of a text")
    first = evaluate(places / "original", output=tmp_path / "out", **asked)
    text.write_text("a text of other words")
    again = evaluate(places / "original", output=tmp_path / "out", **asked)
    fresh = evaluate(places / "original", output=tmp_path / "fresh", **asked)
    assert again.checkpoints == fresh.checkpoints != first.checkpoints


def test_numbers_that_are_none_survive_the_file(places, tmp_path):
    found = evaluate(places / "original", output=tmp_path, **what(places, prompts=0))
    found.checkpoints[0].next_token.perplexity = math.inf
    content = json.loads(found.to_json())
    content["checkpoints"][0]["next_token"]["bits_per_byte"] = None
    (tmp_path / EvaluationRecord.file).write_text(json.dumps(content))
    read = EvaluationRecord.read(tmp_path)
    assert not math.isfinite(read.checkpoints[0].next_token.perplexity)
    assert math.isnan(read.checkpoints[0].next_token.bits_per_byte)
    assert read.checkpoints[0].writing is None
    assert "writing" not in content["checkpoints"][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": None, "columns": ["text"]}, "`columns` needs `text`"),
        ({"limit": 3}, "`include_path` and `limit` need `tasks`"),
        ({"window": 8, "stride": 9}, "`window` must be at least as long as `stride`; got 8 and 9"),
        ({"tokens": float("nan")}, "`tokens` must be a whole number at least 1; got nan"),
        ({"columns": ["en", "de"]}, "has no column 'en', 'de' of text"),
        ({"columns": ["nothing"]}, "`text` .*has no column 'nothing' of text; its columns: text"),
        ({"tasks": ["some"], "include_path": "nowhere"}, "`include_path` nowhere is not a directory"),
    ],
)
def test_options_that_cannot_be_met_are_said(places, tmp_path, options, message):
    with pytest.raises(MQAError, match=message):
        evaluate(places / "original", output=tmp_path, **what(places, **{"tokens": 40, "prompts": 0, **options}))


def test_ctrl_c_says_how_to_go_on(places, tmp_path, monkeypatch):
    def cut(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(likelihood, "compare", cut)
    words = ["evaluate", str(places / "original"), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*words, "--text", str(places / "text.jsonl"), "--window", "16"])
    assert result.exit_code == 130
    said = " ".join(result.stderr.split())
    assert f"Results so far are kept in {tmp_path / 'out'}; run the same command to continue." in said
