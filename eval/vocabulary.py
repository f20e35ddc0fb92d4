"""The words that checkpoints have in common, over which their distributions are compared."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mqa_hf.base.errors import MQAError
from mqa_hf.base.text import load_tokenizer

SHOWN = 3  # words in a note


@dataclass(frozen=True)
class Vocabulary:
    """The original's words beside those of what was made of it.

    Attributes:
        tokenizer: the original's, with which all read and write.
        apart: by name of a checkpoint, the ids that mean a word in it or in the original alone, where there are any.
        note: what to say of it; "" where all have the same words.
    """

    tokenizer: Any
    apart: dict[str, list[int]] = field(default_factory=dict)
    note: str = ""

    def check_common(self, ids: set[int]) -> None:
        """Raises MQAError where a text has words that a checkpoint does not."""
        for name, apart in self.apart.items():
            used = sorted(ids & set(apart))
            if used:
                word = self.tokenizer.convert_ids_to_tokens(used[0])
                raise MQAError(
                    f"`text` has {word!r} (id {used[0]}), which the tokenizer of {name} does not have, so that losses "
                    "cannot be compared; give a `text` without it"
                )


def common_vocabulary(names: Sequence[str], paths: Sequence[Path], configs: Sequence[Any]) -> Vocabulary:
    """The words that checkpoints have in common, the original first.

    Tokenizers may differ in words that were added to them (padding, marks of chats), and models in embeddings that are
    padded.

    Raises:
        MQAError: where tokenizers differ in other words, or a model does not have all words of the tokenizer.
    """
    tokenizers = [load_tokenizer(path) for path in paths]
    first, notes, apart = tokenizers[0], [], {}
    words = first.get_vocab()
    common = set(words.values())
    for name, path, tokenizer in zip(names[1:], paths[1:], tokenizers[1:]):
        others = tokenizer.get_vocab()
        if others == words:
            continue
        ids = {**others, **words}
        differing = [word for word in sorted(ids, key=lambda w: ids[w]) if words.get(word) != others.get(word)]
        added = first.get_added_vocab().keys() | tokenizer.get_added_vocab().keys()
        real = [word for word in differing if word not in added or (word in words and word in others)]
        if real:
            places = (f"id {found[real[0]]}" if real[0] in found else "none" for found in (words, others))
            raise MQAError(
                f"{path} has another tokenizer ({len(tokenizer)} words) than {paths[0]} ({len(first)} words): "
                f"{len(real)} words differ, such as {real[0]!r} ({' there, '.join(reversed(list(places)))} here), so "
                "that their losses cannot be compared"
            )
        apart[name] = sorted({found[word] for word in differing for found in (words, others) if word in found})
        common -= set(apart[name])
        shown = ", ".join(map(repr, differing[:SHOWN])) + (" and others" if len(differing) > SHOWN else "")
        notes.append(
            f"The tokenizers of {names[0]} and {name} differ in {len(differing)} added words ({shown}), over which KL "
            "and first choice do not go."
        )
    return Vocabulary(first, apart, " ".join([*notes, *embeddings_note(names, configs, max(common, default=0))]))


def embeddings_note(names: Sequence[str], configs: Sequence[Any], most: int) -> list[str]:
    """What to say where models have different numbers of words (embeddings padded to a multiple).

    Args:
        names, configs: of the models, the original first.
        most: the highest id of a word that all tokenizers have.

    Raises:
        MQAError: where one of them does not have it.
    """
    sizes = [vocabulary_size(config) for config in configs]
    found = {name: size for name, size in zip(names, sizes) if size is not None}
    if len(set(found.values())) < 2 or names[0] not in found:
        return []
    said = ", ".join(f"{name} {size:,}" for name, size in found.items())
    if most >= min(found.values()):
        raise MQAError(
            f"the models have different numbers of words ({said}), and the tokenizer gives ids up to {most:,}; they "
            "can be compared only where each has all of the tokenizer's words"
        )
    return [
        f"The models have different numbers of words ({said}). Each loss is over all words of its model; KL and first "
        "choice are over those that it has in common with the original."
    ]


def vocabulary_size(config: Any) -> int | None:
    """Words that a model writes, as far as its configuration says."""
    return getattr(config.get_text_config(decoder=True), "vocab_size", None)
