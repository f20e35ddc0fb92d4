"""transformers' module for ExecuTorch, for caches of any widths:

from mqa_hf.serving.executorch import ExportableDecoder

exported = ExportableDecoder(model, batch_size=1, max_cache_len=256).export(input_ids=..., cache_position=...)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel, StaticCache
from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM


class ExportableDecoder(TorchExportableModuleForDecoderOnlyLM):
    """`TorchExportableModuleForDecoderOnlyLM` with a cache as the model writes it.

    transformers allocates keys and values of `config.head_dim` components. Wide heads, widths by layer and latents
    have others. Arguments and methods are those of transformers' class.
    """

    def __init__(self, model: PreTrainedModel, *args: Any, **kwargs: Any):
        with caches_of(model):
            super().__init__(model, *args, **kwargs)


@contextmanager
def caches_of(model: PreTrainedModel) -> Iterator[None]:
    """Within it, static caches are allocated early with the shapes that `model` writes."""
    plain = StaticCache.early_initialization

    def by_writing(cache: StaticCache, batch_size: int, *shape: Any, **others: Any) -> None:
        token = torch.zeros(batch_size, 1, dtype=torch.long, device=model.device)
        with torch.no_grad():
            model(token, past_key_values=cache, use_cache=True)
        cache.reset()

    StaticCache.early_initialization = by_writing  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        StaticCache.early_initialization = plain  # type: ignore[method-assign]
