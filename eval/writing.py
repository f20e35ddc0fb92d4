"""What models write: after the beginnings of texts, or of what an encoder has read."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .evaluation_record import WritingRecord
from .held_out import HeldOut
from .likelihood import by_length


@dataclass(frozen=True)
class Writer:
    """How texts are written.

    Attributes:
        held_out: has the prompts.
        tokenizer: has the padding.
        new_tokens: to write, at most.
        beams: of beam search, for encoder-decoder models.
        batch_tokens: read and written at once.
    """

    held_out: HeldOut
    tokenizer: Any
    new_tokens: int
    beams: int
    batch_tokens: int

    @torch.no_grad()
    def tokens(self, model: Any, chosen: Sequence[int], beams: int) -> Iterator[tuple[int, list[int]]]:
        """Tokens that follow the chosen prompts, up to eos, with the number of each prompt."""
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
        """What a language model writes after the beginnings of texts."""
        for i, tokens in self.tokens(model, chosen, 1):
            yield WritingRecord(id=i, tokens=tokens)

    def translations(self, model: Any, chosen: Sequence[int]) -> Iterator[WritingRecord]:
        """What an encoder-decoder model writes, greedily and with beams."""
        searched = dict(self.tokens(model, chosen, self.beams))
        for i, tokens in self.tokens(model, chosen, 1):
            greedy, beam = (self.tokenizer.decode(row, skip_special_tokens=True) for row in (tokens, searched[i]))
            yield WritingRecord(id=i, tokens=tokens, greedy=greedy, beam=beam)
