"""A dry run says what the conversion then reads and writes, and does nothing."""

import json

import pytest
from safetensors import safe_open
from seq2seq_sources import SEQ2SEQ_CASES, make_seq2seq
from sources import LLAMA, make_model, save
from tokenizer import write_tokenizer
from typer.testing import CliRunner

from mqa_hf import MQAError, convert
from mqa_hf.cli import app
from mqa_hf.conversion.convert import Conversion

FIT = {"method": "shared", "calibration_tokens": 512, "sequence_length": 16}
pytestmark = pytest.mark.filterwarnings("ignore::mqa_hf.ConversionWarning")


@pytest.fixture
def source(tmp_path):
    directory = save(make_model("llama", LLAMA), tmp_path / "source", max_shard_size="60KB")
    write_tokenizer(directory)
    return directory


def sizes(directory):
    """Files of weights, and bytes of the tensors in them."""
    paths = list(directory.glob("*.safetensors"))
    total = 0
    for path in paths:
        with safe_open(path, framework="pt") as file:
            total += sum(t.numel() * t.element_size() for t in map(file.get_tensor, file.keys()))
    return len(paths), total


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_heads": 2, "dtype": "bfloat16", "max_shard_size": "40KB"},
        {"target": "native"},
        {**FIT, "head_width": 1.5},
        {**FIT, "method": "latent", "latent": 32, "key_width": 16, "latent_bits": 4, "fit_steps": 2},
    ],
    ids=str,
)
def test_it_says_what_is_read_and_written(options, source, tmp_path):
    job = Conversion(source, tmp_path / "output", **options)
    said = job.dry_run()
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    record = job.run()
    assert (said["source_files"], said["read_bytes"]) == sizes(source)
    assert (said["output_files"], said["written_bytes"]) == sizes(tmp_path / "output")
    assert said["layers"] == len(record.layers) == 3
    assert said["kv_bytes_per_token"] == record.kv_bytes_per_token.after
    assert said["disk_bytes"] == said["written_bytes"] < said["free_bytes"]


@pytest.mark.parametrize("options", [{}, {"cache_budget": "50%"}], ids=str)
def test_sizes_of_latents_that_are_chosen_on_the_way(options, source, tmp_path):
    """The layers are read twice, and no more is written than is said."""
    job = Conversion(source, tmp_path / "output", **{**FIT, "method": "latent", "fit_steps": 2, **options})
    said = job.dry_run()
    record = job.run()
    assert said["read_bytes"] == 2 * sizes(source)[1]
    assert said["written_bytes"] >= sizes(tmp_path / "output")[1]
    assert said["kv_bytes_per_token"] == pytest.approx(record.kv_bytes_per_token.after, rel=0.3)


def test_an_encoder_decoder_model(tmp_path):
    source = make_seq2seq("t5", next(config for name, _, config in SEQ2SEQ_CASES if name == "t5"))
    write_tokenizer(save(source, tmp_path / "source"))
    job = Conversion(tmp_path / "source", tmp_path / "output", **FIT)
    said = job.dry_run()
    assert said["layers"] == len(job.run().layers)
    assert said["written_bytes"] == sizes(tmp_path / "output")[1]


def test_memory_is_that_of_the_largest_part_and_of_what_a_calibration_holds(source, tmp_path):
    output = tmp_path / "output"
    plain = Conversion(source, output).dry_run()["memory_bytes"]
    layer = 4 * sum(p.numel() for p in make_model("llama", LLAMA).model.layers[0].parameters())
    assert layer < plain < 6 * layer
    few, many = (
        Conversion(source, output, **{**FIT, "calibration_tokens": n}).dry_run()["memory_bytes"]
        for n in (2**14, 2**15)
    )
    states = 2 * 4 * 48 * 2**14  # of as many tokens more, and the outputs of their heads, in float32
    assert states <= many - few <= 1.1 * states
    assert few > plain + states


@pytest.mark.parametrize(
    "options",
    [
        {"latent": 32, "key_width": 48},
        {"latent": 32, "key_width": 16, "latent_bits": 4},
        {"latent": 24},
        {"cache_budget": "30%", "latent_bits": 8},
        {"cache_budget": "40%", "key_width": 16},
    ],
    ids=str,
)
def test_latents(options, source, tmp_path):
    """Sizes that are chosen on the way are at most those that are said."""
    job = Conversion(source, tmp_path / "output", **{**FIT, "method": "latent", "fit_steps": 0, **options})
    said = job.dry_run()
    cache = job.run().kv_bytes_per_token
    _, written = sizes(tmp_path / "output")
    chosen = "key_width" not in options or "cache_budget" in options
    assert said["read_bytes"] == (2 if chosen else 1) * sizes(source)[1]
    if chosen:
        assert 0.7 * written < said["written_bytes"] < 1.3 * written
        assert cache.after <= max(said["kv_bytes_per_token"], 0.4 * cache.before)
        assert said["kv_bytes_per_token"] <= 1.5 * cache.after
    else:
        assert (said["written_bytes"], said["kv_bytes_per_token"]) == (written, cache.after)
    assert said["memory_bytes"] > 8 * 48 * 48 * 6 * 24  # matrices of six heads


def test_a_budget_reads_twice_and_is_kept(source, tmp_path):
    job = Conversion(source, tmp_path / "output", **FIT, cache_budget="50%")
    said = job.dry_run()
    assert said["read_bytes"] == 2 * sizes(source)[1]
    before = job.run().kv_bytes_per_token.before
    assert 0.4 * before < said["kv_bytes_per_token"] <= 0.5 * before


def test_what_cannot_be_done_is_said(source, tmp_path):
    with pytest.raises(MQAError, match=r"`kv_heads` must divide .* got 4"):
        Conversion(source, tmp_path / "output", kv_heads=4).dry_run()
    convert(source, tmp_path / "output")
    with pytest.raises(MQAError, match="exists and is not empty"):
        Conversion(source, tmp_path / "output").dry_run()


def test_what_a_killed_run_left_is_not_cleared(source, tmp_path):
    (tmp_path / ".output.partial-abcd1234").mkdir()
    Conversion(source, tmp_path / "output").dry_run()
    assert (tmp_path / ".output.partial-abcd1234").is_dir()


def test_weights_that_are_not_fetched_are_not_fetched(source, tmp_path, monkeypatch):
    for path in source.glob("*.safetensors*"):
        path.unlink()
    monkeypatch.setattr("mqa_hf.conversion.source.locate", lambda *given, weights: (source, "0123abc"))
    with pytest.raises(
        MQAError, match="are not downloaded, and a dry run downloads nothing; download them first: hf download"
    ):
        Conversion("someone/tiny", tmp_path / "output").dry_run()


def test_the_command(source, tmp_path):
    words = ["convert", str(source), str(tmp_path / "output"), "--dry-run"]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0
    assert "written_bytes: 242,880" in shown.output
    assert json.loads(CliRunner().invoke(app, [*words, "--json"]).output)["layers"] == 3
    assert not (tmp_path / "output").exists()
