"""The tokens that checkpoints have in common, over which their distributions are compared."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mqa_hf.base.errors import MQAError
from mqa_hf.base.text import load_tokenizer

SHOWN = 3  # tokens in a note


@dataclass(frozen=True)
class Vocabulary:
    """The original's vocabulary compared with those of the checkpoints made from it.

    Attributes:
        tokenizer: the original's, used for all models.
        apart: by checkpoint name, the token ids that only it or only the original has, if any.
        note: how vocabularies differ; "" if they do not.
    """

    tokenizer: Any
    apart: dict[str, list[int]] = field(default_factory=dict)
    note: str = ""

    def check_common(self, ids: set[int]) -> None:
        """Raise MQAError if a text has tokens that a checkpoint does not have."""
        for name, apart in self.apart.items():
            used = sorted(ids & set(apart))
            if used:
                word = self.tokenizer.convert_ids_to_tokens(used[0])
                raise MQAError(
                    f"`text` has {word!r} (id {used[0]}), which the tokenizer of {name} does not have, so losses "
                    "cannot be compared; give a `text` without it"
                )


def common_vocabulary(names: Sequence[str], paths: Sequence[Path], configs: Sequence[Any]) -> Vocabulary:
    """Find the tokens that checkpoints have in common; the original comes first.

    Tokenizers may differ in added tokens (padding, chat markers), and models in the padding of embeddings.

    Raises:
        MQAError: if tokenizers differ in other tokens, or a model lacks tokens of the tokenizer.
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
                f"{path} has another tokenizer ({len(tokenizer)} tokens) than {paths[0]} ({len(first)} tokens): "
                f"{len(real)} tokens differ, such as {real[0]!r} ({' and '.join(reversed(list(places)))}), so losses "
                "cannot be compared; give `checkpoints` made from `original`"
            )
        apart[name] = sorted({found[word] for word in differing for found in (words, others) if word in found})
        common -= set(apart[name])
        shown = ", ".join(map(repr, differing[:SHOWN])) + (" and others" if len(differing) > SHOWN else "")
        notes.append(
            f"The tokenizers of {names[0]} and {name} differ in {len(differing)} added tokens ({shown}); KL and first "
            "choice leave them out."
        )
    return Vocabulary(first, apart, " ".join([*notes, *embeddings_note(names, configs, max(common, default=0))]))


def embeddings_note(names: Sequence[str], configs: Sequence[Any], most: int) -> list[str]:
    """Note that models have vocabularies of different sizes (embeddings padded to a multiple), if they do.

    Args:
        names, configs: of the models, the original first.
        most: the highest token id that all tokenizers have.

    Raises:
        MQAError: if a model does not have it.
    """
    sizes = [vocabulary_size(config) for config in configs]
    found = {name: size for name, size in zip(names, sizes) if size is not None}
    if len(set(found.values())) < 2 or names[0] not in found:
        return []
    said = ", ".join(f"{name} {size:,}" for name, size in found.items())
    if most >= min(found.values()):
        raise MQAError(
            f"the models have vocabularies of different sizes ({said}), but the tokenizer has ids up to {most:,}; "
            "give `checkpoints` with all tokens of the tokenizer"
        )
    return [
        f"The models have vocabularies of different sizes ({said}). Each loss is over the model's own vocabulary; KL "
        "and first choice are over the tokens shared with the original."
    ]


def vocabulary_size(config: Any) -> int | None:
    """Vocabulary size of a model, if its configuration gives one."""
    return getattr(config.get_text_config(decoder=True), "vocab_size", None)
