"""A converted Whisper transcribes, translates and marks times as the source does."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from seq2seq_sources import WHISPER, make_seq2seq
from sources import save
from tokenizer import write_whisper_processor
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, pipeline

from mqa_hf import convert
from mqa_hf.base import sound
from mqa_hf.base.errors import MQAError
from mqa_hf.finetune.uptrain import Uptraining

SECONDS = 2.5


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The directories of a tiny Whisper and of its conversion with all heads."""
    root = tmp_path_factory.mktemp("speech")
    _, generation = write_whisper_processor(root / "source", mels=16, frames=40)
    vocabulary = generation.no_timestamps_token_id + 52
    tokens = {name: getattr(generation, name) for name in ("eos_token_id", "pad_token_id", "decoder_start_token_id")}
    model = make_seq2seq("whisper", {**WHISPER, "vocab_size": vocabulary, **tokens})
    model.generation_config = generation
    save(model, root / "source")
    convert(root / "source", root / "ours", kv_heads=6)
    return root / "source", root / "ours"


@pytest.fixture(scope="module")
def audio():
    return np.random.default_rng(0).normal(0, 0.1, int(16000 * SECONDS)).astype(np.float32)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"language": "de", "task": "translate"},
        {"return_timestamps": True},
        {"num_beams": 4},
        {"return_timestamps": True, "condition_on_prev_tokens": True, "return_segments": True},
    ],
    ids=str,
)
def test_it_generates_what_the_source_does(options, pair, audio):
    processor = AutoProcessor.from_pretrained(pair[1])
    long = "return_timestamps" in options
    arguments = processor(
        audio if long else audio[:12000],
        sampling_rate=16000,
        return_tensors="pt",
        truncation=not long,
        return_attention_mask=True,
        padding="longest" if long else "max_length",
    )
    if long and arguments.input_features.shape[-1] <= 40:
        raise AssertionError("the audio is not longer than what the encoder hears at once")
    results = []
    for directory in pair:
        model = AutoModelForSpeechSeq2Seq.from_pretrained(directory).eval()
        found = model.generate(**arguments, **{"language": "en", "max_new_tokens": 30, **options})
        results.append(found["sequences"] if isinstance(found, dict) else found)
    torch.testing.assert_close(*results)


PROMPT = {"suppress_tokens": [7, 9], "begin_suppress_tokens": [5]}


PLACES = ("config.json", "generation_config.json", "both", "neither")
ASKED: tuple[dict, ...] = ({}, {"language": "de"}, {"task": "translate"}, {"return_timestamps": True})


@pytest.mark.parametrize(
    ("place", "options"),
    # Without a `generation_config.json`, as in 2022, the class takes no languages, tasks and timestamps.
    [*((place, options) for place in PLACES for options in ASKED), ("config.json alone", {})],
    ids=str,
)
def test_the_prompt_is_found_wherever_a_checkpoint_has_it(place, options, pair, audio, tmp_path):
    """Checkpoints of 2022 have language and task in `config.json`, later ones in `generation_config.json`."""
    source, ours = tmp_path / "source", tmp_path / "ours"
    shutil.copytree(pair[0], source)
    config, generation = (json.loads((source / n).read_text()) for n in ("config.json", "generation_config.json"))
    languages, tasks = generation["lang_to_id"], generation["task_to_id"]
    prompt = {**PROMPT, "forced_decoder_ids": [[1, languages["<|de|>"]], [2, tasks["translate"]]]}
    other = {**PROMPT, "forced_decoder_ids": [[1, languages["<|en|>"]], [2, tasks["transcribe"]]]}
    if place == "config.json alone":
        (source / "generation_config.json").unlink()
    elif place in ("generation_config.json", "both"):
        (source / "generation_config.json").write_text(json.dumps(generation | other))
    if place.startswith("config.json") or place == "both":
        (source / "config.json").write_text(json.dumps(config | prompt))
    convert(source, ours, kv_heads=6)
    processor = AutoProcessor.from_pretrained(source)
    arguments = processor(audio[:12000], sampling_rate=16000, return_tensors="pt", return_attention_mask=True)
    results = []
    for directory in (source, ours):
        model = AutoModelForSpeechSeq2Seq.from_pretrained(directory).eval()
        with torch.no_grad():
            found = model.generate(**arguments, max_new_tokens=12, **options)
        results.append(found["sequences"] if isinstance(found, dict) else found)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("options", [{}, {"return_timestamps": True}, {"return_timestamps": "word"}], ids=str)
def test_the_pipeline_gives_what_it_gives_for_the_source(options, pair, audio):
    if options.get("return_timestamps") == "word":
        options = {**options, "generate_kwargs": {"language": "en", "max_new_tokens": 20}}
    else:
        options = {**options, "generate_kwargs": {"language": "en", "max_new_tokens": 30}}
    texts = []
    for directory in pair:
        recognise = pipeline("automatic-speech-recognition", model=str(directory), trust_remote_code=True)
        texts.append(recognise({"raw": audio[:15000], "sampling_rate": 16000}, **options))
    assert texts[0]["text"]
    assert texts[0] == texts[1]


def test_an_encoder_s_output_and_an_assistant_are_taken_as_by_the_source(pair, audio):
    arguments = AutoProcessor.from_pretrained(pair[1])(audio[:12000], sampling_rate=16000, return_tensors="pt")
    options, found = {"language": "en", "max_new_tokens": 12}, []
    for directory, other in (pair, pair[::-1]):  # loaded anew, since an assistant is marked as one for good
        model, assistant = (AutoModelForSpeechSeq2Seq.from_pretrained(path).eval() for path in (directory, other))
        with torch.no_grad():
            heard = model.get_encoder()(arguments.input_features)
        found.append([model.generate(encoder_outputs=heard, **options), model.generate(**arguments, **options)])
        found[-1].append(model.generate(**arguments, assistant_model=assistant, **options))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[1][0], found[1][1])


def test_a_trained_model_with_its_feature_extractor_alone_is_converted(pair, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(pair[0] / name, source)
    AutoProcessor.from_pretrained(pair[0]).feature_extractor.save_pretrained(source)
    convert(source, tmp_path / "ours")
    assert (tmp_path / "ours" / "preprocessor_config.json").is_file()


def write_sounds(directory, count=40, seconds=0.9):
    """Recordings of a rising or falling tone, and a word that says which."""
    import soundfile

    directory.mkdir()
    generator = np.random.default_rng(0)
    time = np.arange(int(16000 * seconds)) / 16000
    rows = []
    for n in range(count):
        low, rise = generator.uniform(100, 900), generator.choice([-1, 1])
        samples = np.sin(2 * np.pi * (low + 400 * rise * time) * time) + generator.normal(0, 0.1, len(time))
        soundfile.write(directory / f"{n}.wav", 0.3 * samples, 16000)
        rows.append({"audio": f"{n}.wav", "file_name": f"{n}.wav", "text": f"tone {'rises' if rise > 0 else 'falls'}"})
    (directory / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    return write_sounds(tmp_path_factory.mktemp("sounds") / "tones")


def outputs(directory, sounds):
    """Logits of what is said in the first recordings."""
    import soundfile

    processor = AutoProcessor.from_pretrained(directory)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(directory).eval()
    heard = [soundfile.read(sounds / f"{n}.wav", dtype="float32")[0] for n in range(4)]
    features = processor(heard, sampling_rate=16000, return_tensors="pt").input_features
    ids = torch.tensor(processor.tokenizer(["tone rises"] * 4).input_ids)
    with torch.no_grad():
        return model(input_features=features, decoder_input_ids=ids).logits


def test_fitted_on_recordings_nothing_is_lost_at_full_width(pair, sounds, tmp_path):
    options = {"method": "shared", "head_width": 6, "calibration_tokens": 1500}
    report = convert(pair[0], tmp_path / "ours", calibration=str(sounds), **options)
    expected, found = outputs(pair[0], sounds), outputs(tmp_path / "ours", sounds)
    assert float((found - expected).abs().max()) <= 5e-3 * float(expected.abs().max())
    assert report.held_out_loss.after == pytest.approx(report.held_out_loss.before, abs=1e-2)
    assert report.held_out_loss.text == str(sounds)


@pytest.mark.parametrize(
    "options", [{"method": "shared"}, {"method": "latent", "latent": 12, "fit_steps": 20}], ids=str
)
def test_what_is_fitted_on_recordings_is_nearer_than_the_mean(options, pair, sounds, tmp_path):
    expected = outputs(pair[0], sounds)
    convert(pair[0], tmp_path / "mean")
    convert(pair[0], tmp_path / "fitted", calibration=str(sounds), calibration_tokens=1500, **options)
    mean, fitted = (float((outputs(tmp_path / name, sounds) - expected).norm()) for name in ("mean", "fitted"))
    assert fitted < 0.9 * mean


def test_recordings_come_from_folders_files_and_columns_and_are_transcribed_if_need_be(pair, sounds, tmp_path):
    """The same fit from a folder with transcripts and from the columns of a file."""
    options = {"method": "shared", "calibration_tokens": 2500}
    convert(pair[0], tmp_path / "folder", calibration=str(sounds), **options)
    shutil.copytree(sounds, tmp_path / "rows")
    shutil.copy(sounds / "metadata.jsonl", tmp_path / "rows" / "rows.jsonl")
    file = str(tmp_path / "rows" / "rows.jsonl")
    convert(pair[0], tmp_path / "file", calibration=file, **options)
    convert(pair[0], tmp_path / "columns", calibration=file, calibration_columns=("audio", "text"), **options)
    one, other = (outputs(tmp_path / name, sounds) for name in ("file", "columns"))
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    (tmp_path / "rows" / "metadata.jsonl").unlink()
    convert(pair[0], tmp_path / "silent", calibration=str(tmp_path / "rows"), **options)
    assert torch.isfinite(outputs(tmp_path / "silent", sounds)).all()


@pytest.mark.parametrize(
    ("calibration", "match"),
    [
        ("./nothing", "nothing does not exist"),
        ("empty", "empty has no recordings"),
        ("broken", "broken/x.wav cannot be read"),
        ("notes", "metadata.jsonl needs lines with file_name and text"),
        ("text.jsonl", "has no columns audio and text; its columns are words"),
        ("long", "is longer than the model's input of 1.0 s; split it"),
        ("one", "gives 1 recordings; give at least two"),
    ],
)
def test_what_is_no_recording_is_said(calibration, match, pair, tmp_path, monkeypatch):
    import soundfile

    for name in ("empty", "broken", "notes", "long", "one"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "x.wav").write_text("no sound")
    (tmp_path / "text.jsonl").write_text('{"words": "a"}\n' * 9)
    for name, seconds in (("notes", 0.5), ("long", 3.0), ("one", 0.5)):
        soundfile.write(tmp_path / name / "x.wav", np.zeros(int(16000 * seconds)), 16000)
        (tmp_path / name / "metadata.jsonl").write_text('{"file_name": "x.wav", "text": "a"}\n')
    (tmp_path / "notes" / "metadata.jsonl").write_text('{"file_name": "x.wav", "text": 3}\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MQAError, match=match):
        convert(pair[0], tmp_path / "ours", method="shared", calibration=calibration)
    assert not (tmp_path / "ours").exists()


def test_without_recordings_speech_is_synthesised_or_its_program_is_named(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(sound.shutil, "which", lambda name: None)
    with pytest.raises(MQAError, match=r"name some with `calibration`, or install espeak-ng"):
        convert(pair[0], tmp_path / "ours", method="shared")


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs espeak-ng")
def test_sentences_of_several_languages_are_spoken():
    spoken = list(itertools.islice(sound.recordings(sound.SPEECH, (), 16000, "`calibration`"), 6))
    assert len({recording.language for recording in spoken}) > 2
    assert all(0.5 < len(recording.samples) / 16000 < 120 and recording.text for recording in spoken)


def test_a_converted_whisper_is_trained_on_recordings(pair, sounds, tmp_path):
    """Its divergence from the source falls; a dry run says what it takes; wrong recordings end in one line."""
    convert(pair[0], tmp_path / "mean")
    how = {"tokens": 1200, "batch_tokens": 8 * 16, "sequence_length": 16, "learning_rate": 3e-3, "report_to": "none"}
    data = {"dataset": str(sounds), "validation": str(sounds), "validation_tokens": 100}
    job = Uptraining(tmp_path / "mean", tmp_path / "out", **data, **how)
    assert job.dry_run()["tokens_per_step"] > 0
    measured = job.run().validation
    assert measured.after["kl"] < 0.8 * measured.before["kl"]
    before, after, expected = (outputs(path, sounds) for path in (tmp_path / "mean", tmp_path / "out", pair[0]))
    assert float((after - expected).norm()) < float((before - expected).norm())
    (tmp_path / "silent").mkdir()
    shutil.copy(sounds / "0.wav", tmp_path / "silent")
    with pytest.raises(MQAError, match="silent: training needs a transcript for each recording"):
        Uptraining(tmp_path / "mean", tmp_path / "none", dataset=str(tmp_path / "silent"), **how).run()
