"""A converted Whisper transcribes, translates and marks times as the source does."""

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
