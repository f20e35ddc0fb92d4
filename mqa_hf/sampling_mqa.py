"""Token buffers on the device, and the choice of the next token: greedy or sampled.

B rows, T tokens of the prompt, V vocabulary, W columns of the buffer
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .request_mqa import Request
from .rules_mqa import LogitsRule, among


class Text:
    """B rows of tokens, and where they end; subclasses choose the next tokens.

    Attributes:
        ranks: those among which the model is divided, if it is; they choose the same tokens.
        tokens: [B, W]; columns from `cursor` on hold `request.fill`.
        newest: [B], the tokens of the last written column.
        cursor: [1], number of written columns.
        ended: [1], the cursor at which all rows had ended, or 0.
        host_ended: `ended` as known to the host, one or more steps late.
    """

    def __init__(self, request: Request, rules: Sequence[LogitsRule], width: int, device: torch.device, ranks: Any):
        self.request, self.rules, self.ranks = request, rules, ranks
        self.on_device = device.type == "cuda"
        self.eos = None if request.eos is None else torch.tensor(request.eos, device=device)
        self.tokens = torch.zeros(request.rows, width, dtype=torch.long, device=device)
        self.newest = torch.zeros(request.rows, dtype=torch.long, device=device)
        self.cursor = torch.zeros(1, dtype=torch.long, device=device)
        self.ended = torch.zeros(1, dtype=torch.long, device=device)
        self.host_ended = torch.zeros(1, dtype=torch.long, pin_memory=True) if self.on_device else self.ended

    def start(self, prompt: torch.Tensor, limit: int, longest: int) -> None:
        """Begin a text of at most `limit` tokens, the prompt [B, T] included.

        Beam search uses the length `longest` to bound the scores of running beams.
        """
        T = prompt.shape[1]
        self.tokens.fill_(self.request.fill)
        self.tokens[:, :T] = prompt
        self.cursor.fill_(T)
        self.ended.zero_()
        self.host_ended.zero_()

    def grow(self, width: int) -> None:
        """Make room for `width` columns."""
        self.tokens = self.widened(self.tokens, width)

    def widened(self, tokens: torch.Tensor, width: int) -> torch.Tensor:
        return nn.functional.pad(tokens, (0, width - tokens.shape[-1]), value=self.request.fill)

    def next(self, logits: torch.Tensor) -> None:
        """Choose the next token of each row from logits [B, V], and update the buffers."""
        self.choose(logits)
        if self.on_device:
            self.host_ended.copy_(self.ended, non_blocking=True)

    def choose(self, logits: torch.Tensor) -> None:
        """Write the next tokens to `tokens` and `newest`, move `cursor`, and call [`Text.end`]."""
        raise NotImplementedError

    def ruled(self, scores: torch.Tensor) -> torch.Tensor:
        """Apply the logits processors to scores [B, V]."""
        for rule in self.rules:
            scores = rule(scores, self.tokens, self.cursor)
        return scores

    def end(self, now: torch.Tensor) -> None:
        """Record the cursor the first time that `now` [] is true."""
        self.ended.copy_(torch.where((self.ended == 0) & now, self.cursor, self.ended))

    def end_soon(self) -> bool:
        """End the text early; return whether that takes one more step, the last."""
        return False

    def result(self, length: int, found: int) -> torch.Tensor:
        """Copy the first `length` tokens of each row, or the best `found` beams of each prompt."""
        return self.tokens[:, :length].clone()


class Sampler(Text):
    """Chooses the token with the largest logit, or samples from the softmax of the logits.

    Attributes:
        unfinished: [B], which rows have not ended.
    """

    def __init__(self, request: Request, rules: Sequence[LogitsRule], width: int, device: torch.device, ranks: Any):
        super().__init__(request, rules, width, device, ranks)
        self.pad = None if request.pad is None else torch.tensor(request.pad, device=device)
        self.unfinished = torch.ones(request.rows, dtype=torch.bool, device=device)

    def start(self, prompt: torch.Tensor, limit: int, longest: int) -> None:
        super().start(prompt, limit, longest)
        self.unfinished.fill_(True)

    def choose(self, logits: torch.Tensor) -> None:
        if self.rules or self.request.sample:  # greedy choice is the same in any type
            logits = logits.float()
        logits = self.ruled(logits)
        token = draw(logits, self.ranks).argmax(-1) if self.request.sample else logits.argmax(-1)
        if self.eos is not None:
            token = torch.where(self.unfinished, token, self.pad)  # type: ignore[arg-type]
            self.unfinished &= ~among(token, self.eos)
        self.newest.copy_(token)
        self.tokens.index_copy_(1, self.cursor, token[:, None])
        self.cursor += 1
        if self.eos is not None:
            self.end(~self.unfinished.any())


def draw(scores: torch.Tensor, ranks: Any = None) -> torch.Tensor:
    """Random numbers, the same on all ranks; the places of the largest are a sample without replacement from
    softmax(scores).
    """
    probabilities = scores.softmax(-1)
    noise = torch.empty_like(probabilities).exponential_()
    if ranks is not None:
        dist.broadcast(noise, dist.get_global_rank(ranks, 0), group=ranks)
    return probabilities / noise
