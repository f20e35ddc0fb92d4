"""Mixtures, packing and pairs."""

import itertools
import json

import numpy as np
import pytest
import torch
from tokenizer import write_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from mqa_hf.base import chats
from mqa_hf.base.chats import Document, Form
from mqa_hf.base.console import QUIET
from mqa_hf.base.errors import MQAError
from mqa_hf.base.mixture import Part
from mqa_hf.base.text import documents, load
from mqa_hf.eval.evaluate import Evaluation
from mqa_hf.eval.held_out import held_out_text
from mqa_hf.finetune.data import IGNORED, CollatePairs, batches, collate_packed, mixture, packed, training_rows
from mqa_hf.finetune.options import Schedule
from mqa_hf.finetune.order import in_order
from mqa_hf.finetune.tokenizer import train_tokenizer


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Part(str(path))


@pytest.fixture
def tokenizer(tmp_path):
    return write_tokenizer(tmp_path / "tokenizer")


def batched(*batches):
    return iter([[Document(text) for text in batch] for batch in batches])


def test_packing_keeps_every_token_and_counts_positions_within_documents(tokenizer):
    texts = ["abc", "defghijk", "l", "mnopqrstuvw"]
    rows = list(packed(batched(texts[:2], texts[2:]), tokenizer, 5))
    flat = [i for ids in tokenizer(texts).input_ids for i in [*ids, tokenizer.eos_token_id]]
    assert np.concatenate([row["input_ids"] for row in rows]).tolist() == flat[: len(rows) * 5]
    assert len(rows) == len(flat) // 5
    starts = np.cumsum([0] + [len(text) + 1 for text in texts])
    for r, row in enumerate(rows):
        for i, position in enumerate(row["position_ids"]):
            begun = max(start for start in starts if start <= r * 5 + i)
            assert position == r * 5 + i - max(begun, r * 5)


def test_labels_are_the_next_token_of_the_same_document(tokenizer):
    row = next(packed(batched(["abc", "defg"]), tokenizer, 8))
    batch = collate_packed([row])
    ids = batch["input_ids"][0].tolist()
    assert batch["labels"][0].tolist() == [*ids[1:4], IGNORED, *ids[5:8], IGNORED]


@pytest.mark.parametrize("positions", ["rotary", "learned", "alibi"])
def test_packed_documents_do_not_see_each_other(tokenizer, tmp_path, positions):
    from mqa_hf import MQAConfig, MQAForCausalLM

    config = {"vocab_size": 93, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 1, "initializer_range": 0.3}
    slopes = {"alibi_slopes": [0.5, 0.25, 0.125, 0.0625]} if positions == "alibi" else {}
    model = MQAForCausalLM(MQAConfig(**config, position_embedding=positions, **slopes)).eval()
    row = next(packed(batched(["abcd", "efghijk", "lm"]), tokenizer, 16))
    batch = collate_packed([row])
    given = {name: batch[name] for name in ("input_ids", "position_ids")}
    with torch.no_grad():
        together = model(**given, use_cache=False).logits[0]
        alone = torch.cat([model(ids).logits[0] for ids in batch["input_ids"][:, :16].split((5, 8, 3), dim=1)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_a_mixture_follows_its_weights(tmp_path):
    one = write(tmp_path / "one.jsonl", [{"text": "a"}] * 3000)
    two = write(tmp_path / "two.jsonl", [{"text": "b"}] * 3000)
    for streaming in (False, True):
        rows = mixture([Part(one.source, 3), Part(two.source, 1)], streaming=streaming)
        texts = [row["text"] for _, row in zip(range(2000), rows)]
        assert texts.count("a") == pytest.approx(1500, abs=80)
    with pytest.raises(MQAError, match="weights above 0"):
        mixture([Part(one.source, 0)])


def test_rows_are_made_once_and_again_when_the_text_changes(tmp_path, tokenizer):
    part = write(tmp_path / "text.jsonl", [{"text": f"row number {i}"} for i in range(50)])
    first = training_rows((part,), tokenizer, 8, 20)
    assert len(first) == 20
    assert training_rows((part,), tokenizer, 8, 20).cache_files == first.cache_files
    other = training_rows((part,), tokenizer, 8, 20, seed=1)
    assert not np.array_equal(first[:]["input_ids"], other[:]["input_ids"])
    write(tmp_path / "text.jsonl", [{"text": f"something else {i}"} for i in range(50)])
    assert training_rows((part,), tokenizer, 8, 20).cache_files != first.cache_files


def test_a_stream_gives_the_same_rows_and_does_not_end(tmp_path, tokenizer):
    part = write(tmp_path / "text.jsonl", [{"text": f"row number {i}"} for i in range(20)])
    stream = iter(training_rows((part,), tokenizer, 8, 5, streaming=True))
    rows = [next(stream) for _ in range(100)]
    assert all(len(row["input_ids"]) == 8 for row in rows)


def test_pairs_are_tokenised_once_however_many_are_wanted(tmp_path, tokenizer):
    part = write(tmp_path / "pairs.jsonl", [{"en": "ab" * n, "de": "cde" * n} for n in range(1, 9)])
    options = {"columns": ("en", "de"), "pairs": True}
    few, all_of_them, more = (training_rows((part,), tokenizer, 32, count, **options) for count in (3, 8, 500))
    assert (len(few), len(all_of_them), len(more)) == (3, 8, 8)
    assert more.cache_files == all_of_them.cache_files != few.cache_files


def test_pairs_are_padded_and_shifted(tmp_path, tokenizer):
    part = write(tmp_path / "pairs.jsonl", [{"translation": {"en": "ab" * n, "de": "cde" * n}} for n in (1, 2, 3)])
    rows = list(training_rows((part,), tokenizer, 32, 3, columns=("en", "de"), pairs=True))
    batch = CollatePairs(pad=0, start=1)(rows)
    assert batch["input_ids"].shape == (3, 8)
    assert batch["labels"].shape == (3, 16)
    for row, ids, mask, labels, written in zip(
        rows, *(batch[n] for n in ("input_ids", "attention_mask", "labels", "decoder_input_ids"))
    ):
        assert ids[mask.bool()].tolist() == row["input_ids"]
        assert labels[labels != IGNORED].tolist() == row["labels"]
        assert written[: len(row["labels"])].tolist() == [1, *row["labels"][:-1]]


def test_the_pairs_of_a_step_are_of_like_length_and_each_comes_once_a_pass(tmp_path, tokenizer):
    lengths = np.random.default_rng(0).integers(2, 30, 400)
    part = write(tmp_path / "pairs.jsonl", [{"en": "a" * n, "de": "b" * n} for n in lengths.tolist()])
    rows = training_rows((part,), tokenizer, 64, 400, columns=("en", "de"), pairs=True)
    schedule = Schedule(tokens=800, sequence_length=2, batch_tokens=32)
    assert (schedule.rows, schedule.steps(1.0)) == (16, 50)
    size = np.array([len(row["labels"]) for row in in_order(rows, schedule, 50)])
    assert sorted(size.tolist()) == sorted(2 * [len(row["labels"]) for row in rows])
    longest = size.reshape(50, 16).max(1)
    assert size.sum() > 0.9 * 16 * longest.sum()  # in any order it is little above a half
    assert abs(np.corrcoef(longest, np.arange(50))[0, 1]) < 0.4  # short and long ones take turns


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_text_file_is_read_in_the_encoding_that_its_mark_names(tmp_path, encoding):
    (tmp_path / "text.txt").write_bytes("W\xf6rter\r\nund mehr".encode(encoding))
    assert documents(tmp_path / "text.txt") == ["W\xf6rter\nund mehr"]


@pytest.mark.parametrize("name", ["nosuch.txt", "nosuch.jsonl.gz", "./nosuch", "one/two/three", "/nosuch/text"])
def test_a_file_that_is_not_there_is_no_id_of_the_hub(name):
    with pytest.raises(MQAError, match=f"`calibration` {name} does not exist"):
        load(name)


def test_a_quiet_reader_shows_no_bars(tmp_path, capsys, monkeypatch):
    import datasets

    part = write(tmp_path / "text.jsonl", [{"text": "words"}] * 20)
    monkeypatch.setattr("mqa_hf.base.text.verbosity", lambda: QUIET)
    try:
        load(part.source)
    finally:
        datasets.enable_progress_bars()
    assert "Generating" not in capsys.readouterr().err


def test_half_a_character_is_said():
    with pytest.raises(MQAError, match=r"text 1 has a lone surrogate at 2"):
        documents(["words", "ab\ud800"])


def test_an_id_of_the_hub_may_name_a_configuration_and_a_split(monkeypatch):
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **more: asked.append((*given, more["split"])))
    for source in ("wmt/wmt14:de-en[validation]", "wmt/wmt14:de-en", "org/texts[test]", "org/texts"):
        load(source)
    assert asked == [
        ("wmt/wmt14", "de-en", "validation"),
        ("wmt/wmt14", "de-en", "train"),
        ("org/texts", None, "test"),
        ("org/texts", None, "train"),
    ]


def test_parts_of_a_mixture_may_differ_and_have_gaps(tmp_path, tokenizer):
    one = write(tmp_path / "one.jsonl", [{"text": "words here"}, {"text": None}] * 20)
    two = write(tmp_path / "two.jsonl", [{"text": None}] * 20)
    assert len(training_rows((one, two), tokenizer, 8, 10)) == 10
    both = write(tmp_path / "pairs.jsonl", [{"translation": {"en": "a b c", "de": "d e f"}}] * 5)
    with pytest.raises(MQAError, match="translations in en, de, not en and fr"):
        training_rows((both,), tokenizer, 8, 10, columns=("en", "fr"), pairs=True)


def test_chats_are_the_text_that_the_template_makes_of_them(tmp_path, tokenizer):
    """The same for training, streamed or not, for calibration and for evaluation."""
    chats = [[{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a" * n}] for n in range(1, 30)]
    rows = [{"messages": chat} for chat in chats] + [{"messages": None}]
    rows[3]["messages"][0]["name"] = "x"  # a field that the others have not
    part = write(tmp_path / "chats.jsonl", rows)
    expected = [f"<user>q{n}<assistant>{'a' * n}" for n in range(1, 30)]
    assert sorted(documents(part.source, ["messages"], tokenizer=tokenizer)) == sorted([*expected, ""])
    for streaming in (False, True):
        found = mixture([part], ["messages"], streaming, tokenizer=tokenizer)
        assert sorted(document.text for batch in batches(found) for document in batch) == sorted(expected)
    assert len(training_rows((part,), tokenizer, 16, 5, columns=("messages",))) == 5
    config = LlamaConfig(vocab_size=93)
    asked = Evaluation("original", text=part.source, columns=("messages",))
    windows = held_out_text(tokenizer, config, asked).windows
    said = [tokenizer.decode([window.ids[0], *window.labels])[3:] for window in windows]
    assert sorted(text.removeprefix("<s>") for text in said) == sorted(expected)


def test_a_template_that_begins_with_bos_gives_it_once(tokenizer):
    chat = {"messages": [{"role": "user", "content": "q"}]}
    form = Form("chat", ("messages",))
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    assert form.read(chat, tokenizer).text == "<s><user>q"  # this tokenizer puts none before a text
    begins = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.backend_tokenizer.post_processor = begins
    ids = tokenizer(form.read(chat, tokenizer).text).input_ids
    assert (ids[0], ids.count(1)) == (1, 1)


def test_a_template_that_is_not_there_or_does_not_take_a_chat_is_said(tmp_path, tokenizer):
    part = write(tmp_path / "chats.jsonl", [{"messages": [{"role": "user", "content": "q"}]}] * 9)
    tokenizer.chat_template = "{{ raise_exception('roles must take turns') }}"
    for options in ({}, {"streaming": True}):
        with pytest.raises(MQAError, match=r"chat template does not accept .*roles must take turns"):
            next(iter(training_rows((part,), tokenizer, 4, 2, columns=("messages",), **options)))
    other = write(tmp_path / "other.jsonl", [{"messages": [{"from": "user"}, {"value": n}]} for n in (1, "a")])
    with pytest.raises(MQAError, match=r"messages need role and content|has no column 'messages' of text"):
        documents(other.source, ["messages"], tokenizer=tokenizer)[0]
    tokenizer.chat_template = None
    with pytest.raises(MQAError, match="chat template does not accept"):
        documents(part.source, ["messages"], tokenizer=tokenizer)[0]


def test_texts_that_the_tokenizer_ends_are_ended_once(tmp_path):
    from mqa_hf.finetune.tokenizer import train_tokenizer

    ends = train_tokenizer(["abc def"], 400, pairs=True)
    row = next(packed(batched(["abc", "def"] * 5), ends, 12))
    ids = row["input_ids"].tolist()
    assert (ends.eos_token_id, ends.eos_token_id) not in itertools.pairwise(ids)


def test_text_files_and_named_columns_are_read(tmp_path, tokenizer):
    (tmp_path / "plain.txt").write_text("all work and no play " * 20)
    assert len(training_rows((Part(str(tmp_path / "plain.txt")),), tokenizer, 16, 5)) == 5
    part = write(tmp_path / "named.jsonl", [{"body": "some words here", "other": 1}] * 20)
    assert len(training_rows((part,), tokenizer, 16, 5, columns=("body",))) == 5
    with pytest.raises(MQAError, match=r"its columns: body \(string\), other \(int64\)"):
        training_rows((part,), tokenizer, 16, 5)
    numbers = write(tmp_path / "numbers.jsonl", [{"text": 1}] * 20)
    with pytest.raises(MQAError, match=r"has no column of text; its columns: text \(int64\)"):
        documents(numbers.source)
    with pytest.raises(MQAError, match="cannot be read"):
        training_rows((Part("no/such-data-set"),), tokenizer, 16, 5)


@pytest.mark.parametrize("kind", ["bytes", "words"])
def test_a_long_document_is_tokenised_in_pieces_without_a_trace(kind, monkeypatch):
    """Where a tokenizer marks the beginning of every text (`words`), documents stay whole."""
    monkeypatch.setattr(chats, "PIECE", 400)
    generator = np.random.default_rng(0)
    words = [*"abcdefgh", "\n", "\n\n", ".\n", ". ", "  ", "\n  "]
    texts = ["".join(generator.choice(words, 3000)), "one\ntwo", "".join(generator.choice(words, 900))]
    tokenizer = train_tokenizer(texts, 300)
    if kind == "words":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.train_from_iterator(texts, trainers.BpeTrainer(special_tokens=["</s>"], show_progress=False))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    pieces = list(chats.in_pieces([Document(text) for text in texts], tokenizer))
    assert (len(pieces) > 5) == (kind == "bytes")
    assert "".join(piece.text for batch in pieces for piece in batch) == "".join(texts)
    rows = list(packed(batched(texts), tokenizer, 16))
    monkeypatch.setattr(chats, "PIECE", 10**9)
    whole = list(packed(batched(texts), tokenizer, 16))
    assert len(rows) == len(whole)
    for one, other in zip(rows, whole):
        assert all((one[name] == other[name]).all() for name in other)
