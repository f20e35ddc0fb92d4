"""The tokenizer of a model trained from scratch: an existing one, or one trained on the text."""

import itertools
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mqa_hf.base.text import load_tokenizer

from .data import mixture, read_batches
from .options import Data

END, PAD = "<|endoftext|>", "<|pad|>"
SENTINELS = [f"<extra_id_{n}>" for n in range(100)]
TOKENIZER_TEXTS = 200_000  # maximum number of documents to train the tokenizer on


def train_tokenizer(texts: Iterable[str], size: int, pairs: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (arXiv 1508.07909) with `size` entries, the end of a document among them; for an
    encoder-decoder model also padding and T5's sentinels, and each text is ended."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END, PAD, *SENTINELS] if pairs else [END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if pairs:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 0)])
    pad = PAD if pairs else END
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=pad)


def trained_tokenizer(data: Data, size: int, directory: Path, pairs: bool, seed: int) -> PreTrainedTokenizerBase:
    """Load the tokenizer in `directory`, or train one with `size` entries on the text and save it there."""
    if not (directory / "tokenizer.json").is_file():
        rows = (
            row
            for batch in read_batches(mixture(data.parts, data.columns, data.streaming, seed, pairs=pairs))
            for row in zip(*batch.values())
        )
        texts = (text for row in itertools.islice(rows, TOKENIZER_TEXTS) for text in row if text)
        train_tokenizer(texts, size, pairs).save_pretrained(directory)
    return load_tokenizer(directory)
