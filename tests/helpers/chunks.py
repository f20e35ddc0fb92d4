"""Left-padded rows of 13 tokens in pieces: two chunks, then single tokens."""

import torch


@torch.no_grad()
def in_chunks(model, cache, ids, mask, positions):
    """The logits [B, 13, vocabulary] of a model that continues its cache after each piece."""
    logits = []
    for start, end in [(0, 5), (5, 8), *((i, i + 1) for i in range(8, 13))]:
        output = model(
            ids[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
        )
        logits.append(output.logits)
    return torch.cat(logits, 1)
