"""Generated text: continuations of the beginnings of texts, or translations of an encoder's input."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .evaluation_record import WritingRecord
from .held_out import HeldOut
from .likelihood import by_length


@dataclass(frozen=True)
class Writer:
    """Generates texts.

    Attributes:
        held_out: provides the prompts.
        tokenizer: provides the padding token.
        new_tokens: maximum number of tokens to generate.
        beams: of beam search, for encoder-decoder models.
        batch_tokens: tokens per batch, prompts and new tokens together.
    """

    held_out: HeldOut
    tokenizer: Any
    new_tokens: int
    beams: int
    batch_tokens: int

    @torch.no_grad()
    def tokens(self, model: Any, chosen: Sequence[int], beams: int) -> Iterator[tuple[int, list[int]]]:
        """Generate tokens after the chosen prompts, up to eos, with the index of each prompt."""
        prompts = self.held_out.prompts
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        ends = model.generation_config.eos_token_id
        stops = set(ends if isinstance(ends, list) else [ends])
        options = {"max_new_tokens": self.new_tokens, "do_sample": False, "num_beams": beams, "pad_token_id": pad}
        cost = self.batch_tokens // max(1, beams)
        for batch in by_length(chosen, lambda i: len(prompts[i]) + self.new_tokens, cost):
            given = {name: value.to(model.device) for name, value in self.held_out.ask(batch).items()}
            written = model.generate(**given, **options).cpu()
            written = written[:, 1 if model.config.is_encoder_decoder else len(prompts[batch[0]]) :]
            for i, row in zip(batch, written.tolist()):
                end = next((n for n, token in enumerate(row) if token in stops), len(row))
                yield i, row[:end]

    def continuations(self, model: Any, chosen: Sequence[int]) -> Iterator[WritingRecord]:
        """Continue the beginnings of texts with a language model."""
        for i, tokens in self.tokens(model, chosen, 1):
            yield WritingRecord(id=i, tokens=tokens)

    def translations(self, model: Any, chosen: Sequence[int]) -> Iterator[WritingRecord]:
        """Generate with an encoder-decoder model, greedily and with beam search."""
        searched = dict(self.tokens(model, chosen, self.beams))
        for i, tokens in self.tokens(model, chosen, 1):
            greedy, beam = (self.tokenizer.decode(row, skip_special_tokens=True) for row in (tokens, searched[i]))
            yield WritingRecord(id=i, tokens=tokens, greedy=greedy, beam=beam)
