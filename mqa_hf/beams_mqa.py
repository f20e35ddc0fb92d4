"""Beam search with the arithmetic of transformers' `_beam_search` and constant shapes.

P prompts, k beams per prompt, n candidate continuations per prompt, V vocabulary, W columns of the token buffer
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.generation import GenerationMixin

from .request_mqa import Request
from .rules_mqa import LogitsRule, among, mentions
from .sampling_mqa import Text, draw

LEAST = -1.0e9  # the score of candidates that must not be chosen
# Whether sampled continuations are sorted by their likelihood (transformers 5.24).
SORTS_SAMPLES = mentions(GenerationMixin, "_get_top_k_continuations", "sort")


def gather_beams(beams: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """[P, k, W] and [P, n] -> [P, n, W]."""
    return beams.gather(1, index[..., None].expand(-1, -1, beams.shape[-1]))


class BeamSearch(Text):
    """k running beams per prompt, which are the rows of `tokens`, and the k best finished beams.

    Args:
        reorder: called with [P, k], which beam of its prompt each beam continues.

    Attributes:
        scores: [P, k], the summed log-probabilities of the running beams.
        done_tokens, done_scores, done_lengths: [P, k, W], [P, k], [P, k], of the finished beams.
        done: [P, k], whether the slot holds a finished beam.
        open: [P, 1], whether a running beam may still become one of the k best.
    """

    def __init__(
        self,
        request: Request,
        rules: Sequence[LogitsRule],
        width: int,
        device: torch.device,
        ranks: Any,
        reorder: Callable[[torch.Tensor], None],
    ):
        super().__init__(request, rules, width, device, ranks)
        assert request.beams is not None
        self.options, self.reorder = request.beams, reorder
        P, k = request.rows // request.copies, request.copies
        self.limit = torch.zeros(1, dtype=torch.long, device=device)
        self.prompt = torch.zeros(1, dtype=torch.long, device=device)
        self.scores = torch.zeros(P, k, device=device)
        self.done_tokens = torch.zeros(P, k, width, dtype=torch.long, device=device)
        self.done_scores = torch.zeros(P, k, device=device)
        self.done_lengths = torch.zeros(P, k, dtype=torch.long, device=device)
        self.done = torch.zeros(P, k, dtype=torch.bool, device=device)
        self.open = torch.ones(P, 1, dtype=torch.bool, device=device)
        self.penalties = torch.ones(width + 1, device=device)  # divisor of the score of n new tokens
        self.longest = torch.ones(1, device=device)  # same, for the longest text

    @property
    def hypotheses(self) -> torch.Tensor:
        """Tokens of the running beams, [P, k, W]."""
        return self.tokens.view(*self.scores.shape, -1)

    def penalty(self, new: int) -> float:
        return float(new) ** self.options.length_penalty

    def start(self, prompt: torch.Tensor, limit: int, longest: int) -> None:
        super().start(prompt, limit, longest)
        T = prompt.shape[1]
        self.limit.fill_(limit)
        self.prompt.fill_(T)
        self.scores.fill_(LEAST)[:, 0] = 0  # all beams start equal, so only one of them counts
        self.done_tokens.copy_(self.hypotheses)
        self.done_scores.fill_(LEAST)
        self.done_lengths.fill_(T)
        self.done.fill_(False)
        self.open.fill_(True)
        self.penalties.copy_(torch.tensor([1.0, *map(self.penalty, range(1, len(self.penalties)))]))
        self.longest.fill_(self.penalty(max(longest - T, 1)))

    def grow(self, width: int) -> None:
        super().grow(width)
        self.done_tokens = self.widened(self.done_tokens, width)
        more = self.penalties.new_tensor([*map(self.penalty, range(len(self.penalties), width + 1))])
        self.penalties = torch.cat((self.penalties, more))

    def choose(self, logits: torch.Tensor) -> None:
        scores, parents, tokens = self.candidates(logits)
        hits = (self.cursor + 1 >= self.limit).expand_as(tokens)
        if self.eos is not None:
            hits = hits | among(tokens, self.eos)
        self.finish(scores, parents, tokens, hits)
        self.proceed(scores, parents, tokens, hits)
        self.judge(hits)

    def candidates(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits [P·k, V] -> the n best (or n sampled) continuations of each prompt: their scores, the beams that they
        continue, and their tokens, each [P, n].
        """
        P, k = self.scores.shape
        V = logits.shape[-1]
        logs = self.ruled(logits.float().log_softmax(-1))
        n = max(2, 1 + (0 if self.eos is None else len(self.eos))) * k
        if not self.request.sample:  # the best of each beam, then the best of those
            few = min(n, V)
            best, tokens = logs.topk(few)
            scores, chosen = (best.view(P, k, few) + self.scores[:, :, None]).view(P, -1).topk(n)
            return scores, chosen // few, tokens.view(P, -1).gather(1, chosen)
        logs = (logs.view(P, k, V) + self.scores[:, :, None]).view(P, -1)
        chosen = draw(logs, self.ranks).topk(n).indices
        scores = logs.gather(1, chosen)
        if SORTS_SAMPLES:
            scores, order = scores.sort(-1, descending=True)
            chosen = chosen.gather(1, order)
        return scores, chosen // V, chosen % V

    def finish(self, scores: torch.Tensor, parents: torch.Tensor, tokens: torch.Tensor, hits: torch.Tensor) -> None:
        """Keep the k best of the finished beams and of the candidates [P, n] that end now, until the search is over.
        Only the first k candidates may end.
        """
        k = self.scores.shape[1]
        ends = hits & (torch.arange(hits.shape[1], device=hits.device) < k)
        final = scores / self.penalties[self.cursor + 1 - self.prompt]
        if self.options.early_stopping is True:
            final += self.done.all(-1, keepdim=True).float() * LEAST
        final += (~self.open).float() * LEAST
        final += (~ends).float() * LEAST

        merged = torch.cat((self.done_scores, final), 1)
        best = merged.topk(k).indices
        old, new = best.clamp(max=k - 1), (best - k).clamp(min=0)
        was, over = best < k, self.ended != 0
        fresh = gather_beams(self.hypotheses, parents.gather(1, new))
        fresh.index_copy_(2, self.cursor, tokens.gather(1, new)[..., None])
        fresh = torch.where(was[..., None], gather_beams(self.done_tokens, old), fresh)
        lengths = torch.where(was, self.done_lengths.gather(1, old), self.cursor + 1)
        for held, now in (
            (self.done_tokens, fresh),
            (self.done_lengths, lengths),
            (self.done_scores, merged.gather(1, best)),
            (self.done, torch.cat((self.done, ends), 1).gather(1, best)),
        ):
            held.copy_(torch.where(over, held, now))

    def proceed(self, scores: torch.Tensor, parents: torch.Tensor, tokens: torch.Tensor, hits: torch.Tensor) -> None:
        """Make the k best candidates [P, n] that do not end the running beams."""
        running = scores + hits.float() * LEAST
        kept = running.topk(self.scores.shape[1]).indices
        parents, tokens = parents.gather(1, kept), tokens.gather(1, kept)
        self.scores.copy_(running.gather(1, kept))
        self.hypotheses.copy_(gather_beams(self.hypotheses, parents).index_copy_(2, self.cursor, tokens[..., None]))
        self.newest.copy_(tokens.view(-1))
        self.reorder(parents)
        self.cursor += 1

    def judge(self, hits: torch.Tensor) -> None:
        """End the search if no running beam can become one of the k best, or all candidates have ended."""
        early = self.options.early_stopping
        never = early == "never" and self.options.length_penalty > 0.0
        possible = self.scores[:, :1] / (self.longest if never else self.penalties[self.cursor - self.prompt])
        worst = torch.where(self.done, self.done_scores.min(1, keepdim=True).values, LEAST)
        self.open &= (possible > worst).any(-1, keepdim=True)
        going = self.open.any() & ~hits.all()
        if early is True:
            going &= ~self.done.all()
        self.end(~going)

    def end_soon(self) -> bool:
        self.limit.zero_()  # all beams end with the next step
        return True

    def result(self, length: int, found: int) -> torch.Tensor:
        end = int(self.done_lengths[:, :found].max())
        return self.done_tokens[:, :found, :end].clone().flatten(0, 1)
