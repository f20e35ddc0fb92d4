"""The page shows the numbers that were measured, and needs nothing but itself."""

import json
import re
import shutil
from io import StringIO

import pytest
import torch
from huggingface_hub import ModelCard
from rich.console import Console
from tokenizer import write_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from mqa_hf import MQAForCausalLM, convert
from mqa_hf.base.errors import MQAError
from mqa_hf.cli import app
from mqa_hf.conversion.families import canonical_config
from mqa_hf.eval.benchmark import Benchmark
from mqa_hf.eval.evaluate import Evaluation, evaluate
from mqa_hf.eval.evaluation_record import EvaluationRecord
from mqa_hf.eval.latent_choices import with_latent
from mqa_hf.eval.report import report
from mqa_hf.eval.report_charts import PICTURES, front, layer_errors, trade
from mqa_hf.eval.report_data import ConversionSummary, Results, read_results

STEPLESS = {
    **{"tokens": 5, "log": {"main": [{}]}, "options": {}},
    **{"validation": None, "versions": {}, "command": None},
}

TIMELESS = {
    **{"shape": "x", "model": "x", "engine": "mqa-hf", "device": "cpu", "batch": 1, "context": 1},
    **{"time_per_token_ms": 0, "tokens_per_sec": 5},
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    directory = tmp_path_factory.mktemp("report")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=93,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_hidden_layers=2,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(directory / "original")
    write_tokenizer(directory / "original")
    convert(directory / "original", directory / "<b>mean")
    (directory / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"words {n} of text"}) + "\n" for n in range(30))
    )
    asked = {"text": str(directory / "text.jsonl"), "window": 16, "prompts": 3, "prompt_tokens": 4, "new_tokens": 6}
    evaluate(directory / "original", [directory / "<b>mean"], output=directory / "evaluation", **asked)
    for name in ("original", "<b>mean"):
        words = ["benchmark", str(directory / name), "--kv-heads", "original", "--engines", "mqa-hf", "--rounds", "1"]
        words += ["--cells", "1x16,2x16,1x32", "--tokens", "4", "--prefill-limit", "0", "--device", "cpu"]
        result = CliRunner().invoke(app, [*words, "--output", str(directory / "times.jsonl")])
        assert result.exit_code == 0, result.output
    return directory


def test_the_page_holds_the_numbers_and_nothing_from_elsewhere(measured, tmp_path):
    words = ["report", str(measured / "evaluation"), "--benchmark", str(measured / "times.jsonl")]
    result = CliRunner().invoke(app, [*words, "--output", str(tmp_path / "report")])
    assert result.exit_code == 0, result.output
    page = (tmp_path / "report" / "index.html").read_text()
    found = json.loads((measured / "evaluation" / "evaluation.json").read_text())["checkpoints"]
    for checkpoint in found:
        for name, form in (("loss", ".3f"), ("kl", ".3f"), ("perplexity", ".2f")):
            value = checkpoint["next_token"][name]
            assert f'<td data-value="{float(value)!r}">{format(value, form)}' in page
        low, high = checkpoint["next_token"]["loss_interval"]
        assert f"<small>{low:.3f} to {high:.3f}</small>" in page
    times = [json.loads(line) for line in (measured / "times.jsonl").read_text().splitlines()]
    shown = [r["time_per_token_ms"] for r in times if (r["batch"], r["context"]) == (1, 16)]
    assert shown
    assert all(f'<td data-value="{time!r}">{time:.2f}<' in page for time in shown)
    assert not re.search(r"(src|href)=\"(?!#)", page.replace("xlink:", ""))
    assert "&lt;b&gt;mean" in page
    assert "<b>mean" not in page.replace("&lt;b&gt;mean", "").split('<script type="application/json"')[0]
    assert re.search("mqa-hf evaluate .*&lt;b&gt;mean", page)
    kept = json.loads(page.split('id="data">')[1].split("</script>")[0].replace("<\\/", "</"))
    assert kept["evaluation"]["checkpoints"] == found
    assert kept == json.loads((tmp_path / "report" / "report.json").read_text())
    drawn = {path.stem for path in (tmp_path / "report").glob("*.png")}
    assert drawn == {"quality-time", "quality-cache", "time-context", "tokens-batch", "context-loss", "layers"}
    assert page.count("<svg") == len(drawn)
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_no_text_ends_the_page_and_its_remarks_are_shown(measured, tmp_path):
    said = json.loads((measured / "evaluation" / "evaluation.json").read_text())
    sample = "<!--<script> </script> --> &lt;"
    said["checkpoints"][0]["samples"][0]["text"] = sample
    (tmp_path / "evaluation.json").write_text(json.dumps({**said, "note": "other <words>"}))
    page = report(tmp_path / "evaluation.json", output=tmp_path / "report").read_text()
    begin = page.index('<script type="application/json"')
    data, rest = page[begin:].split(">", 1)[1].split("</script>", 1)
    assert "<" not in data
    assert rest.split() == ["</body>", "</html>"]
    assert json.loads(data)["evaluation"]["checkpoints"][0]["samples"][0]["text"] == sample
    assert "other &lt;words&gt;" in page[:begin]
    assert "<!--" not in page[:begin].split("</style>")[1].split("<svg")[0]


def test_times_are_those_of_the_checkpoint_itself(measured, tmp_path):
    lines = [json.loads(line) for line in (measured / "times.jsonl").read_text().splitlines()]
    found = read_results(measured / "evaluation", [measured / "times.jsonl"])
    cell = lines[0]["batch"], lines[0]["context"]
    fewer = [{**line, "original": False, "kv_heads": 1, "time_per_token_ms": 1e-9} for line in lines]
    failed = [{**line, "error": "out of memory"} for line in lines if "<b>" in line["shape"]]
    kept = [line for line in lines if "<b>" not in line["shape"]]
    (tmp_path / "fewer.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines + fewer))
    (tmp_path / "failed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept + failed))
    assert read_results(measured / "evaluation", [tmp_path / "fewer.jsonl"]).step_times(cell) == found.step_times(cell)
    assert len(found.step_times(cell)) == 2
    assert list(read_results(measured / "evaluation", [tmp_path / "failed.jsonl"]).step_times(cell)) == ["original"]


def test_a_checkpoint_with_latents_is_evaluated_timed_and_shown(measured, tmp_path):
    """Latents of 32 numbers at 4 bits in two layers, beside four heads of 8 at 16."""
    source = json.loads((measured / "original" / "config.json").read_text())
    config = with_latent(canonical_config(LlamaConfig(**source), source), 32, 16, 4)
    torch.manual_seed(0)
    MQAForCausalLM(config).save_pretrained(tmp_path / "latents")
    write_tokenizer(tmp_path / "latents")
    asked = {"text": str(measured / "text.jsonl"), "window": 16, "prompts": 3, "prompt_tokens": 4, "new_tokens": 6}
    job = Evaluation(measured / "original", [tmp_path / "latents"], output=tmp_path / "evaluation", **asked)
    found = job.run()
    first, latents = found.checkpoints
    assert (first.kv_bytes_per_token, first.latent) == (2 * 4 * 2 * 8 * 2, None)
    assert latents.kv_bytes_per_token == 2 * (16 + 4)
    assert latents.latent.in_words() == "one latent of 32 numbers at 4 bits, 16 rebuilt key components"
    written = StringIO()
    job.show(found, Console(file=written, width=250))
    assert "latent 32 at 4 bits, keys 16" in written.getvalue()
    how = {"cells": "1x16", "tokens": 4, "rounds": 1, "engines": ["mqa-hf"], "device": "cpu", "prefill_limit": 0}
    times = tmp_path / "times.jsonl"
    Benchmark([measured / "original"], kv_heads=["original"], output=times, **how).run()
    records = Benchmark([tmp_path / "latents"], keys=["rebuilt", "expanded"], output=times, **how).run()
    results = read_results(tmp_path / "evaluation", [times])
    assert results.step_times((1, 16))["latents"] == min(r.time_per_token_ms for r in records)
    labels = ["original", "latents, rebuilt keys", "latents, expanded keys"]
    assert [timing.label for timing in results.timings] == labels
    page = report(tmp_path / "evaluation", benchmark=[times], output=tmp_path / "report").read_text()
    assert "6.4× smaller; latent 32 at 4 bits, keys 16" in page


def test_checkpoints_of_the_hub_are_known_by_their_ids(measured, tmp_path):
    said = json.loads((measured / "evaluation" / "evaluation.json").read_text())
    said["checkpoints"][0]["given"] = "someone/original"
    (tmp_path / "evaluation.json").write_text(json.dumps(said))
    lines = [json.loads(line) for line in (measured / "times.jsonl").read_text().splitlines()]
    (tmp_path / "times.jsonl").write_text(json.dumps({**lines[0], "shape": "someone/original"}) + "\n")
    assert read_results(tmp_path, [tmp_path / "times.jsonl"]).timings[0].name == "original"


def test_a_second_report_leaves_no_pictures_of_the_first(measured, tmp_path):
    report(measured / "evaluation", benchmark=[measured / "times.jsonl"], output=tmp_path)
    (tmp_path / "index.html").unlink()  # as one that was killed leaves it
    report(measured / "evaluation" / "evaluation.json", output=tmp_path)
    assert {path.stem for path in tmp_path.glob("*.png")} == {"quality-cache", "context-loss", "layers"}
    assert len(PICTURES) == len({name for name, *_ in PICTURES})


def test_model_cards_get_the_numbers_as_the_hub_reads_them(measured, tmp_path):
    shutil.copytree(measured, tmp_path / "here")
    here = tmp_path / "here"
    said = json.loads((here / "evaluation" / "evaluation.json").read_text())
    for checkpoint in said["checkpoints"]:
        checkpoint["checkpoint"] = str(here / checkpoint["name"])
    (here / "evaluation" / "evaluation.json").write_text(json.dumps(said))
    for _ in range(2):
        report(here / "evaluation", output=tmp_path / "report", cards=True)
    card = ModelCard.load(here / "<b>mean" / "README.md")
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found["perplexity"] == said["checkpoints"][1]["next_token"]["perplexity"]
    assert card.text.count("## Quality and speed") == 1
    assert card.text.count("## Use") == 1
    assert "![quality against cache](quality-cache.png)" in card.text
    assert (here / "<b>mean" / "quality-cache.png").stat().st_size > 1000
    assert not (here / "original" / "README.md").exists()


def test_the_front_is_what_nothing_else_is_better_than():
    points = [(3.0, 1.0), (1.0, 3.0), (2.0, 2.5), (2.0, 4.0), (4.0, 1.0), (2.5, 2.6)]
    kept = front(points)
    better = [p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)]
    assert kept == sorted(better)


def test_what_is_no_result_is_said(measured, tmp_path):
    with pytest.raises(MQAError, match="nowhere cannot be read"):
        report(measured / "nowhere", output=tmp_path)
    with pytest.raises(MQAError, match=r"text\.jsonl, line 1, is not a valid benchmark\.jsonl"):
        report(measured / "evaluation", benchmark=[measured / "text.jsonl"], output=tmp_path)


def without(content, *path):
    """The same without what stands at a path."""
    inside = content = json.loads(json.dumps(content))
    for part in path[:-1]:
        inside = inside[part]
    del inside[path[-1]]
    return content


def with_cache(said, size):
    """The same, where the cache of the second checkpoint has another size."""
    return json.dumps(
        {**said, "checkpoints": [said["checkpoints"][0], {**said["checkpoints"][1], "kv_bytes_per_token": size}]}
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda said: json.dumps(said)[: len(json.dumps(said)) // 2], "evaluation.json cannot be read: "),
        (lambda said: "", "evaluation.json cannot be read: Expecting value"),
        (lambda said: json.dumps([said]), "evaluation.json holds a list, not an object with fields"),
        (lambda said: json.dumps({**said, "checkpoints": []}), "checkpoints: list should have at least 1 item"),
        (lambda said: json.dumps({**said, "checkpoints": {}}), "checkpoints: input should be a valid list"),
        (lambda said: json.dumps({**said, "settings": []}), "settings: input should be a valid dictionary"),
        (lambda said: json.dumps({**said, "version": 2}), "evaluation.json has version 2, but this mqa-hf reads 1"),
        (lambda said: json.dumps(without(said, "settings")), "is not a valid evaluation.json: settings: field"),
        (lambda said: json.dumps(without(said, "versions")), "versions: field required"),
        (
            lambda said: json.dumps(without(said, "checkpoints", 1, "next_token")),
            r"checkpoints\.1\.next_token: field required",
        ),
        (
            lambda said: json.dumps(without(said, "checkpoints", 0, "next_token", "loss")),
            r"next_token\.loss: field required",
        ),
        (lambda said: json.dumps(without(said, "checkpoints", 0, "name")), r"checkpoints\.0\.name: field required"),
        (lambda said: with_cache(said, 0), r"kv_bytes_per_token: input should be greater than 0"),
        (lambda said: with_cache(said, 10**400), r"kv_bytes_per_token: input should be less than 9223372036854775808"),
    ],
)
def test_what_an_evaluation_lacks_is_said(measured, tmp_path, change, message):
    said = json.loads((measured / "evaluation" / "evaluation.json").read_text())
    (tmp_path / "evaluation.json").write_text(change(said))
    with pytest.raises(MQAError, match=message):
        report(tmp_path, output=tmp_path / "report")
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("conversion.json", '{"source": ', r"conversion\.json cannot be read"),
        ("conversion.json", "[]", r"conversion\.json holds a list, not an object"),
        ("conversion.json", '{"layers": [5]}', r"is not a valid conversion\.json: layers\.0"),
        ("uptraining.json", "[1]", r"uptraining\.json holds a list, not an object"),
        ("uptraining.json", "{}", r"is not a valid uptraining\.json: .*tokens: field required"),
        ("uptraining.json", json.dumps(STEPLESS), r"uptraining\.json: a line of its log has no step"),
        ("config.json", "[]", r"config\.json holds a list, not an object"),
        ("times.jsonl", "5\n", r"times\.jsonl is not a result file of mqa-hf benchmark: line 1 is not an object"),
        ("times.jsonl", '{"shape": "x"', r"times\.jsonl is not a result file of mqa-hf benchmark: "),
        ("times.jsonl", json.dumps(TIMELESS), r"time_per_token_ms: input should be greater than 0"),
        ("times.jsonl", f'{{"batch": {10**400}}}', r"batch: input should be less than 9223372036854775808"),
        ("times.jsonl", '{"shape": "x"}', r"times\.jsonl, line 1, .*: batch: field required"),
    ],
)
def test_what_a_file_beside_a_checkpoint_lacks_is_said(measured, tmp_path, name, content, message):
    said = json.loads((measured / "evaluation" / "evaluation.json").read_text())
    shutil.copytree(measured / "<b>mean", tmp_path / "mean")
    said["checkpoints"][1]["checkpoint"] = str(tmp_path / "mean")
    (tmp_path / "evaluation.json").write_text(json.dumps(said))
    (tmp_path / ("times.jsonl" if name == "times.jsonl" else f"mean/{name}")).write_text(content)
    with pytest.raises(MQAError, match=message):
        report(tmp_path, benchmark=[tmp_path / name] if name == "times.jsonl" else [], output=tmp_path / "report")


def results(checkpoints, **known):
    """Results with nothing but what is given."""
    numbers = dict.fromkeys(
        ("loss", "perplexity", "bits_per_byte", "loss_above_original", "kl", "same_first_choice"), 1
    )
    next_token = {**numbers, "loss_interval": None, "tokens": 5, "documents": 1}
    found = [{"checkpoint": "", "next_token": next_token, "loss_by_context": [], **c} for c in checkpoints]
    content = {"settings": {"text": None, "beams": 4}, "versions": {}, "checkpoints": found}
    conversions = {name: ConversionSummary.of(said, name) for name, said in known.items()}
    return Results(EvaluationRecord.of(content, "here"), [], {}, conversions, {})


def test_translations_are_compared_by_bleu_of_which_more_is_better():
    found = results(
        {"name": name, "beam": {"bleu": bleu, "bleu_interval": [bleu - 1, bleu + 2]}}
        for name, bleu in (("original", 30.0), ("mean", 10.0), ("shared", 28.0), ("wide", 27.0))
    )
    quality = found.quality()
    assert (quality.values["mean"], quality.title, quality.sign) == ((10.0, 9.0, 12.0), "BLEU, beam 4", -1)
    costs = {"original": 8.0, "mean": 1.0, "shared": 2.0, "wide": 3.0}
    chart = trade(found, costs, "bytes", "{:.0f} bytes".format)
    assert chart.finding == (
        "original: BLEU 30.0 at 8 bytes. The best of the 3 checkpoints that cost less is shared: BLEU 28.0 at 2 "
        "bytes, 4.0 times less. On the Pareto front: original, mean, shared."
    )
    (axes,) = chart.figure.axes
    line = axes.lines[0]
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1, 2, 8], [10, 28, 30])  # not the wide one


def test_layers_of_each_stack_are_lines_of_their_own():
    part = {"key_error": 0.5, "value_error": 0.6}
    encoder = [{"layer": i, "stack": "encoder", "key_error": 0.0, "value_error": 0.0} for i in range(3)]
    decoder = [
        {"layer": i, "stack": "decoder", **part, "cross_key_error": 0.7, "cross_value_error": 0.8} for i in range(2)
    ]
    known = {
        "mean": {"layers": encoder + decoder},
        "all": {"layers": [{**layer, **part} for layer in encoder + decoder]},
    }
    chart = layer_errors(results([{"name": "mean"}, {"name": "all"}], **known))
    drawn = {
        (axes.get_title(loc="left"), line.get_label()): len(line.get_xdata())
        for axes in chart.figure.axes
        for line in axes.lines
    }
    titles = ("keys", "values", "keys, cross-attention", "values, cross-attention")
    assert drawn == {(f"Error of {title}", name): 2 for name in ("mean", "all") for title in titles} | {
        ("Error of keys, encoder", "all"): 3,
        ("Error of values, encoder", "all"): 3,
    }
    assert "Mean error of keys, encoder: 0.50 (all)." in chart.finding


def test_what_is_no_report_is_left_alone(measured, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("mine")
    with pytest.raises(MQAError, match=r"has a page \(index\.html\) that is no report of mqa-hf"):
        report(measured / "evaluation", output=tmp_path / "site")
    assert (tmp_path / "site" / "index.html").read_text() == "mine"
    with pytest.raises(MQAError, match=r"index\.html is a file; give a directory"):
        report(measured / "evaluation", output=tmp_path / "site" / "index.html")
    with pytest.raises(MQAError, match="the report cannot be written"):
        report(measured / "evaluation", output=tmp_path / "site" / "index.html" / "report")
    (tmp_path / "site" / "report.json").write_text("mine")
    with pytest.raises(MQAError, match=r"has a page \(index\.html\) that is no report of mqa-hf"):
        report(measured / "evaluation", output=tmp_path / "site")
    (tmp_path / "site" / "index.html").unlink()
    with pytest.raises(MQAError, match="site has files in it and no report of mqa-hf; give another `output`"):
        report(measured / "evaluation", output=tmp_path / "site")
    assert (tmp_path / "site" / "report.json").read_text() == "mine"


def test_an_evaluation_that_is_not_finished_is_said(measured, tmp_path):
    shutil.copytree(measured / "evaluation", tmp_path / "evaluation")
    (tmp_path / "evaluation" / "evaluation.json").unlink()
    with pytest.raises(MQAError, match="the evaluation is not finished; give the same mqa-hf evaluate command again"):
        report(tmp_path / "evaluation", output=tmp_path / "report")


def test_an_evaluation_of_an_older_layout_is_shown(measured, tmp_path):
    """Without a version, and with only the interval that reports always read."""
    said = json.loads((measured / "evaluation" / "evaluation.json").read_text())
    for name in ("version", "note"):
        del said[name]
    for checkpoint in said["checkpoints"]:
        numbers = checkpoint["next_token"]
        checkpoint["next_token"] = {
            name: value for name, value in numbers.items() if name == "loss_interval" or "interval" not in name
        }
        del checkpoint["samples"]
    said["checkpoints"][0]["next_token"]["bits_per_byte"] = float("inf")
    (tmp_path / "evaluation.json").write_text(json.dumps(said))
    page = report(tmp_path, output=tmp_path / "report").read_text()
    kl = said["checkpoints"][1]["next_token"]["kl"]
    assert f'<td data-value="{kl!r}">{kl:.3f}</td>' in page
    assert '<td data-value="Infinity">inf</td>' in page
