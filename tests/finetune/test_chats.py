"""Chats, prompts with completions and instructions: their text, the places of answers, and losses on answers only."""

import json

import pytest
from tokenizer import write_tokenizer
from tokenizers import processors
from transformers import LlamaConfig

from mqa_hf.base.chats import Form, as_text, encoded, form_of
from mqa_hf.base.errors import MQAError
from mqa_hf.base.mixture import Part
from mqa_hf.base.text import documents
from mqa_hf.eval.evaluate import Evaluation
from mqa_hf.eval.held_out import held_out_text
from mqa_hf.finetune.data import IGNORED, batches, collate_packed, mixture, packed, training_rows

CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Thoughts of all answers but the last are left out, as in Qwen3's template.
THINKING = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
# The prompt for an answer is the end of the question, as in Mistral's template.
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% else %}{{ m.content }}"
    "{{ eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {"ChatML": CHATML, "thinking": THINKING, "brackets": BRACKETS}
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2 and two"},
    {"role": "assistant", "content": "it is 4"},
]
SAID = {
    "ChatML": ["2<end>", "it is 4<end>"],
    "thinking": ["2<end>", "<think></think>it is 4<end>"],
    "brackets": ["2</s>", "it is 4</s>"],
}
ROWS = {
    "messages": {"messages": CHAT[1:]},
    "ShareGPT": {
        "conversations": [{"from": "human" if m["role"] == "user" else "gpt", "value": m["content"]} for m in CHAT[1:]]
    },
    "prompt and completion": {"prompt": "two and two", "completion": " it is 4"},
    "prompt and completion of messages": {"prompt": CHAT[1:4], "completion": CHAT[4:]},
    "instruction": {"instruction": "add", "input": "2 and two", "output": "it is 4"},
    "question": {"question": "2 and two", "answer": "it is 4"},
}
ANSWERS = {
    "messages": ["2<end>", "it is 4<end>"],
    "ShareGPT": ["2<end>", "it is 4<end>"],
    "prompt and completion": [" it is 4"],
}


@pytest.fixture
def tokenizer(tmp_path):
    made = write_tokenizer(tmp_path / "tokenizer")
    made.chat_template = CHATML
    return made


def cut(document):
    return [document.text[start:end] for start, end in document.answers]


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_are_what_the_template_writes_after_their_prompt(name, tokenizer):
    tokenizer.chat_template = TEMPLATES[name]
    chat = CHAT[1:] if name == "brackets" else CHAT
    document = as_text(chat, [m["role"] == "assistant" for m in chat], tokenizer)
    assert document.text == tokenizer.apply_chat_template(chat, tokenize=False)
    assert cut(document) == SAID[name]


def test_a_template_that_rewrites_what_was_said_is_refused(tokenizer):
    tokenizer.chat_template = "{{ messages | length }} messages: {{ messages[-1].content }}"
    with pytest.raises(MQAError, match="the chat template rewrites"):
        as_text(CHAT, [False, False, True, False, True], tokenizer)


@pytest.mark.parametrize("name", ROWS)
def test_the_same_text_and_answers_in_training_calibration_and_evaluation(name, tmp_path, tokenizer):
    """Columns are found without being named."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(ROWS[name]) + "\n" for _ in range(8)))
    source, expected = str(tmp_path / "rows.jsonl"), ANSWERS.get(name, ["it is 4<end>"])
    texts = documents(source, tokenizer=tokenizer)
    assert cut(texts.document(0)) == expected
    for streaming in (False, True):
        found = mixture([Part(source)], streaming=streaming, tokenizer=tokenizer, answers=True)
        (batch,) = batches(found)
        assert [document.text for document in batch] == list(texts)
        assert cut(batch[0]) == expected
    asked = Evaluation("x", text=source, loss_on="answers")
    windows = held_out_text(tokenizer, LlamaConfig(vocab_size=93), asked).windows
    said = tokenizer.decode([i for i in windows[0].labels if i != IGNORED])
    assert said.replace(" ", "") == "".join(expected).replace(" ", "")


def test_only_the_tokens_of_answers_are_predicted(tokenizer):
    """Each row is compared with the answers' tokens that are marked one by one."""
    document = as_text(CHAT, [m["role"] == "assistant" for m in CHAT], tokenizer)
    ((ids, marks),) = encoded([document], tokenizer, answers=True)
    letters = document.text.replace(" ", "")  # which the tokenizer leaves out; others are a token each
    assert len(ids) == len(letters)
    assert "".join(letter for letter, mark in zip(letters, marks) if mark) == "".join(SAID["ChatML"]).replace(" ", "")
    rows = list(packed(iter([[document] * 4]), tokenizer, 32, answers=True))
    batch = collate_packed(rows)
    whole = [*ids, tokenizer.eos_token_id] * 4
    kept = [*marks, True] * 4  # an eos after an answer is part of it
    places = {tuple(whole[i : i + 32]): i for i in range(0, len(whole) - 31, 32)}
    assert len(rows) == len([i for i in places.values() if any(kept[i + 1 : i + 32])])
    for ids_of_row, labels, positions in zip(batch["input_ids"], batch["labels"], batch["position_ids"]):
        start = places[tuple(ids_of_row.tolist())]
        for t in range(31):
            predicted = kept[start + t + 1] and positions[t + 1] != 0
            assert labels[t] == (whole[start + t + 1] if predicted else IGNORED)


def test_losses_on_answers_need_answers_and_places_of_tokens(tmp_path, tokenizer):
    (tmp_path / "text.jsonl").write_text('{"text": "words and words"}\n' * 8)
    (tmp_path / "rows.jsonl").write_text((json.dumps(ROWS["instruction"]) + "\n") * 8)
    part, chats = Part(str(tmp_path / "text.jsonl")), Part(str(tmp_path / "rows.jsonl"))
    with pytest.raises(MQAError, match="text holds texts, which have no answers; use `loss_on` all"):
        training_rows((part,), tokenizer, 8, 4, answers=True)
    with pytest.raises(MQAError, match="has no answers; use `loss_on` all"):
        held_out_text(tokenizer, LlamaConfig(vocab_size=93), Evaluation("x", text=part.source, loss_on="answers"))

    class Slow:
        is_fast = False

    with pytest.raises(MQAError, match=r"needs a fast tokenizer, .* not a Slow"):
        list(encoded([documents(chats.source, tokenizer=tokenizer).document(0)], Slow(), answers=True))


def test_a_mixture_of_forms_is_one_text(tmp_path, tokenizer):
    parts = []
    for i, row in enumerate(ROWS.values()):
        (tmp_path / f"{i}.jsonl").write_text((json.dumps(row) + "\n") * 8)
        parts.append(Part(str(tmp_path / f"{i}.jsonl")))
    rows = training_rows(parts, tokenizer, 16, 20, answers=True)
    assert len(rows) == 20
    labels = collate_packed([rows[i] for i in range(20)])["labels"]
    assert (labels != IGNORED).any(1).all()


def test_forms_are_known_from_columns():
    import datasets

    def features(row):
        return datasets.Dataset.from_list([row]).features

    assert form_of(features({"text": "a", "messages": CHAT})) == Form("text", ("text",))
    assert form_of(features({"a": "x", "b": "y"})) is None
    assert form_of(features({"a": "x", "b": "y"}), ["a", "b"]) == Form("instruction", ("a", "b"))
    assert form_of(features({"a": "x", "b": 3}), ["a", "b"]) is None
    assert form_of(features({"prompt": "x", "completion": CHAT})) is None
    assert form_of(features({"instruction": "x", "input": 3, "output": "y"})) is None
    assert form_of(features({"instruction": "x", "input": None, "output": "y"})) == Form(
        "instruction", ("instruction", "output")
    )


def test_a_column_is_not_guessed_among_several(tmp_path, tokenizer):
    (tmp_path / "rows.jsonl").write_text('{"title": "a", "body": "b"}\n' * 4)
    with pytest.raises(MQAError, match="several columns and none that is known by its name; name those to read; its"):
        documents(str(tmp_path / "rows.jsonl"), tokenizer=tokenizer)
    assert list(documents(str(tmp_path / "rows.jsonl"), ["body"])) == ["b"] * 4
    (tmp_path / "one.jsonl").write_text('{"number": 1, "body": "b"}\n' * 4)
    assert list(documents(str(tmp_path / "one.jsonl"))) == ["b"] * 4


def test_without_a_row_of_answers_there_is_nothing_to_train_on(tmp_path, tokenizer):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "word " * 40}]}) + "\n")
    part = Part(str(tmp_path / "rows.jsonl"))
    assert len(training_rows((part,), tokenizer, 8, 4)) == 4
    with pytest.raises(MQAError, match="no row of 8 tokens"):
        training_rows((part,), tokenizer, 8, 4, answers=True)


def test_a_text_needs_no_places_of_answers(tmp_path, tokenizer):
    """Templates whose prompt for an answer begins a thought, or that leave out earlier thoughts."""
    prompted = CHATML.replace("<assistant>{% endif %}", "<assistant><think>{% endif %}")
    tokenizer.chat_template = prompted
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    texts = documents(str(tmp_path / "rows.jsonl"), tokenizer=tokenizer)
    assert texts[0] == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert cut(texts.document(0)) == ["<assistant>2<end>", "<assistant>it is 4<end>"]
    tokenizer.chat_template = THINKING.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    thoughtful = [
        {**m, "content": f"<think>hm</think>{m['content']}"} if m["role"] == "assistant" else m for m in CHAT
    ]
    document = as_text(thoughtful, [m["role"] == "assistant" for m in CHAT], tokenizer)
    assert cut(document) == SAID["thinking"]


def test_an_eos_that_the_tokenizer_adds_ends_the_answer(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    document = as_text(CHAT, [m["role"] == "assistant" for m in CHAT], tokenizer)
    ((ids, marks),) = encoded([document], tokenizer, answers=True)
    assert (ids[-1], marks[-1]) == (tokenizer.eos_token_id, True)


@pytest.mark.parametrize("cell", [[None, CHAT[0]], ["hi"]], ids=str)
def test_messages_that_are_none_are_said(cell, tokenizer):
    with pytest.raises(MQAError, match="messages need role and content"):
        Form("chat", ("messages",)).read({"messages": cell}, tokenizer)


def test_columns_are_for_data_sets_of_a_mixture(tmp_path, tokenizer):
    (tmp_path / "rows.jsonl").write_text((json.dumps({"dialogue": CHAT}) + "\n") * 8)
    (tmp_path / "text.txt").write_text("word " * 200)
    parts = [Part(str(tmp_path / name)) for name in ("rows.jsonl", "text.txt")]
    assert len(training_rows([*parts, Part("builtin:verse")], tokenizer, 16, 8, columns=("dialogue",))) == 8


def test_evaluation_predicts_as_many_tokens_of_answers_as_it_is_asked_for(tmp_path, tokenizer):
    (tmp_path / "rows.jsonl").write_text((json.dumps({"messages": CHAT[1:]}) + "\n") * 40)
    asked = Evaluation(
        "x", text=str(tmp_path / "rows.jsonl"), loss_on="answers", tokens=12, prompt_tokens=8, prompts=6
    )
    found = held_out_text(tokenizer, LlamaConfig(vocab_size=93), asked)
    assert sum(label != IGNORED for window in found.windows for label in window.labels) == 12
    assert len(found.prompts) == 6
