"""Rows of data sets as text: chats, prompts with completions, and instructions, with the places of the answers.

Chats become text by the chat template of the tokenizer. A prompt and its completion are joined as they are, as in TRL.
An instruction and its output are a chat of two turns.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from .errors import MQAError

CHATS = ("messages", "conversations", "conversation")
PROMPTS = ("prompt", "completion")
INSTRUCTIONS, INPUTS, OUTPUTS = ("instruction", "question"), ("input", "context"), ("output", "response", "answer")
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}  # of ShareGPT
ANSWER = "assistant"
PIECE = 2**19  # characters that are tokenised at once
AROUND, TRIES = 256, 8  # characters on both sides that decide whether a text can be cut; line breaks to try
LOSS_ON = ("all", "answers")  # choices of the option `loss_on`

Spans = list[tuple[int, int]]


class Document(NamedTuple):
    """A text, and the beginning and end of each answer in it, in characters; `None`: it has no answers. A piece of a
    document may be without its beginning or its end."""

    text: str
    answers: Spans | None = None
    begins: bool = True
    ends: bool = True


@dataclass(frozen=True)
class Form:
    """How the rows of a data set hold text.

    Attributes:
        kind: "text"; "chat"; "completion", a prompt and its completion, both texts or both messages; "instruction", an
            instruction, perhaps an input, and an output.
        columns: their columns, in this order.
    """

    kind: str
    columns: tuple[str, ...]

    def read(self, row: Mapping[str, Any], tokenizer: Any, answers: bool = True) -> Document:
        """The text of a row, "" if it has none; `tokenizer` has the template of chats. Without `answers`, their places
        in chats are not sought.

        Raises:
            MQAError: if there is no template, or it does not accept the messages.
        """
        cells = [row[name] for name in self.columns]
        if self.kind == "text":
            return Document(cells[0] or "")
        if self.kind == "chat":
            said = messages(cells[0])
            return as_text(said, [answers and message["role"] == ANSWER for message in said], tokenizer)
        if not cells[0] or not cells[-1]:
            return Document("", [])
        if self.kind == "instruction":
            asked = "\n\n".join(cell for cell in cells[:-1] if cell)
            said = [{"role": "user", "content": asked}, {"role": ANSWER, "content": cells[-1]}]
            return as_text(said, [False, answers], tokenizer)
        if isinstance(cells[0], str):
            return Document(cells[0] + cells[1], [(len(cells[0]), len(cells[0]) + len(cells[1]))])
        before, after = map(messages, cells)
        own = [False] * len(before) + [answers and message["role"] == ANSWER for message in after]
        return as_text([*before, *after], own, tokenizer)


def form_of(features: Mapping[str, Any], columns: Sequence[str] = ()) -> Form | None:
    """How rows with these columns hold text; `None` if they do not.

    Args:
        features: columns and their types.
        columns: a column of texts or chats, or a prompt, perhaps an input, and an answer. Default: "text", chats in
            one of `CHATS`, "prompt" and "completion", or an instruction with its output.
    """
    kinds = {name: "text" if holds_text(f) else "chat" if holds_chats(f) else None for name, f in features.items()}
    if len(columns) == 1:
        kind = kinds.get(columns[0])
        return None if kind is None else Form(kind, tuple(columns))
    if columns:
        found = {kinds.get(name) for name in columns}
        if len(columns) == 2 and (found == {"chat"} or (tuple(columns) == PROMPTS and found == {"text"})):
            return Form("completion", tuple(columns))
        return Form("instruction", tuple(columns)) if found == {"text"} else None
    if kinds.get("text") == "text":
        return Form("text", ("text",))
    chat = next((name for name in CHATS if kinds.get(name) == "chat"), None)
    if chat is not None:
        return Form("chat", (chat,))
    if None is not kinds.get(PROMPTS[0]) == kinds.get(PROMPTS[1]):
        return Form("completion", PROMPTS)
    there = [name for name, feature in features.items() if getattr(feature, "dtype", None) != "null"]
    named = [next((n for n in names if n in there), None) for names in (INSTRUCTIONS, INPUTS, OUTPUTS)]
    read = tuple(name for name in named if name)
    if named[0] and named[2] and all(kinds[name] == "text" for name in read):
        return Form("instruction", read)
    return None


def holds_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def holds_chats(feature: Any) -> bool:
    """Whether it is a list of messages with `role` and `content` or `from` and `value`, or of objects of different
    types."""
    inner = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
    if type(inner).__name__ == "Json":
        return True
    return isinstance(inner, dict) and ({"role", "content"} <= set(inner) or {"from", "value"} <= set(inner))


def messages(cell: Any) -> list[dict[str, Any]]:
    """Messages with `role` and `content`; `None` is an empty chat."""
    found = []
    for message in cell or ():
        # `datasets` fills with null.
        given = message.items() if isinstance(message, Mapping) else ()
        said = {name: value for name, value in given if value is not None}
        if "from" in said:
            said = {"role": ROLES.get(said["from"], said["from"]), "content": said.get("value", "")}
        if "role" not in said:
            raise MQAError(f"the chat template does not accept {str(cell)[:80]} ...: messages need role and content")
        found.append(said)
    return found


def as_text(said: Sequence[dict[str, Any]], answered: Sequence[bool], tokenizer: Any) -> Document:
    """A chat as the template writes it, and its answers: from the prompt for an answer up to the next message.

    Args:
        said: the messages.
        answered: which of them are answers.
        tokenizer: of transformers, with a chat template.
    """
    if not said:
        return Document("", [])
    text = rendered(said, tokenizer)
    answers = []
    for i, message in enumerate(said):
        if not answered[i]:
            continue
        # Some templates begin answers with a thought only where they are asked for one.
        prompts = (rendered(said[:i], tokenizer, prompt=prompt) if i else "" for prompt in (True, False))
        before = next((prompt for prompt in prompts if text.startswith(prompt)), None)
        after, content = rendered(said[: i + 1], tokenizer), str(message.get("content") or "")
        content = content.rpartition("</think>")[2].strip()  # templates leave out thoughts of earlier answers
        if before is None:
            raise MQAError(f"the chat template rewrites what precedes the answer {content[:60]!r} when a chat goes on")
        end = len(after)
        if not text.startswith(after):
            at, own = text.find(content, len(before)), after.rfind(content)
            if at < 0 or own < 0 or not content:
                raise MQAError(f"the chat template rewrites the answer {content[:60]!r} when a chat goes on")
            end, closing = at + len(content), after[own + len(content) :]
            end += len(closing) if text.startswith(closing, end) else 0
        answers.append((len(before), end))
    shift = len(text) - len(without_bos(text, tokenizer))
    return Document(text[shift:], [(max(start - shift, 0), end - shift) for start, end in answers])


def rendered(said: Sequence[dict[str, Any]], tokenizer: Any, prompt: bool = False) -> str:
    """The template's text of messages; `prompt`: with the beginning of an answer.

    Raises:
        MQAError: if the tokenizer has no template, or the template does not accept these messages.
    """
    try:
        return tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=prompt)
    except Exception as error:  # templates raise any type
        raise MQAError(f"the chat template does not accept {str(said)[:80]} ...: {error}") from error


def without_bos(text: str, tokenizer: Any) -> str:
    """The text without the bos that the tokenizer adds itself."""
    bos = tokenizer.bos_token
    if bos and text.startswith(bos) and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]:
        return text.removeprefix(bos)
    return text


def in_pieces(batch: Sequence[Document], tokenizer: Any) -> Iterator[list[Document]]:
    """The documents in batches of about `PIECE` characters, so that the first tokens of a long text are there at once
    and the tokenizer has several texts to work on. Documents are cut where it changes no token."""
    ready: list[Document] = []
    size = 0
    for document in batch:
        for piece in cut(document, tokenizer):
            ready.append(piece)
            size += len(piece.text)
            if size >= PIECE:
                yield ready
                ready, size = [], 0
    if ready:
        yield ready


def cut(document: Document, tokenizer: Any) -> Iterator[Document]:
    """A document without answers in pieces of about `PIECE / 8` characters, cut at line breaks."""
    text, start, least = document.text, 0, PIECE // 8
    while document.answers is None and len(text) - start > 2 * least:
        breaks = (found.start() for found in re.compile("\n").finditer(text, start + least))
        sides = ((i, text[max(i - AROUND, start) : i], text[i : i + AROUND]) for i in islice(breaks, TRIES))
        at = next((i for i, left, right in sides if separable(left, right, tokenizer)), None)
        if at is None:
            break
        yield Document(text[start:at], None, start == 0, False)
        start = at
    yield Document(text[start:], document.answers, start == 0)


def separable(left: str, right: str, tokenizer: Any) -> bool:
    """Whether two texts have the same tokens apart as together."""
    both, one, other = tokenizer([left + right, left, right], verbose=False).input_ids
    return both == one + other


def encoded(
    batch: Sequence[Document], tokenizer: Any, answers: bool = False
) -> Iterator[tuple[list[int], list[bool]]]:
    """The token ids of each document, and with `answers`, whether each token is part of an answer.

    Raises:
        MQAError: for answers, if the tokenizer does not know the places of tokens.
    """
    texts = [document.text for document in batch]
    if not answers:
        for ids in tokenizer(texts, verbose=False).input_ids:
            yield ids, []
        return
    if not tokenizer.is_fast:
        raise MQAError(
            f"`loss_on` answers needs a fast tokenizer, which knows the places of tokens, not a "
            f"{type(tokenizer).__name__}"
        )
    found = tokenizer(texts, verbose=False, return_offsets_mapping=True)
    for document, ids, places in zip(batch, found.input_ids, found.offset_mapping):
        spans = document.answers or []
        marks = [any(start < end and begin <= start < stop for begin, stop in spans) for start, end in places]
        if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and places[-1][0] == places[-1][1]:
            marks[-1] = marks[-2]  # an eos that the tokenizer adds ends the answer
        yield ids, marks
