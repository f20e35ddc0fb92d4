"""Load the model of a checkpoint, with exactly the weights of the checkpoint.

`from_pretrained` initialises missing weights at random and ignores unknown ones with no more than a line in the log.
Without a check, another model would be trained or measured.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging

from mqa_hf.base.errors import ConversionError, listing
from mqa_hf.base.hub import check_no_adapter

from .canonical import auto_class
from .checkpoint import count_nonfinite
from .matching import is_optional, is_unused


def load_model(
    checkpoint: str | Path,
    *,
    config: Any = None,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
) -> PreTrainedModel:
    """Load a checkpoint with its head, in evaluation mode, on the CPU.

    Args:
        checkpoint: directory or hub id.
        config: replaces the checkpoint's own.
        dtype: data type of the weights; "auto": as in the checkpoint.
        revision: branch, tag or commit of a hub id.

    Raises:
        ConversionError: if it cannot be loaded, or if tensors are missing, unknown, of another shape, or hold NaN or
            infinity.
    """
    check_no_adapter(Path(checkpoint))
    try:
        with quietly():
            config = AutoConfig.from_pretrained(checkpoint, revision=revision) if config is None else config
            model, found = auto_class(config).from_pretrained(
                checkpoint,
                config=config,
                dtype=dtype,
                revision=revision,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported by name below
            )
    except Exception as error:  # loaders raise any type
        raise ConversionError(f"{checkpoint} cannot be loaded: {error}") from error
    check_loaded(model, found, f"in {checkpoint}")
    return capped(model).eval()


def capped(model: PreTrainedModel) -> PreTrainedModel:
    """The model with an attention that caps its logits: older versions of transformers run Gemma 2 with sdpa, which
    ignores the cap."""
    text = model.config.get_text_config(decoder=True)
    if getattr(text, "attn_logit_softcapping", None) and text._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")
    return model


@contextmanager
def quietly() -> Iterator[None]:
    """Silence transformers' messages on tensors, which [`check_loaded`] reports."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def check_loaded(model: PreTrainedModel, found: dict[str, Any], where: str, allow_nonfinite: bool = False) -> None:
    """Raise ConversionError if a model differs from its weights.

    Args:
        model: the loaded model.
        found: the loading info of transformers.
        where: place of the weights, for the message.
        allow_nonfinite: whether tensors may hold NaN or infinity.
    """
    kind = model.config.model_type
    missing = [name for name in found["missing_keys"] if not is_optional(name, kind)]
    unused = [name for name in found["unexpected_keys"] if not is_unused(name, kind)]
    damaged = [] if allow_nonfinite else [said for entry in model.named_parameters() if (said := _nonfinite(*entry))]
    problems = [
        f"{what}: {listing(names)}"
        for what, names in (
            ("tensors are missing", missing),
            ("tensors are not in this configuration", unused),
            ("tensors have a different shape", [_mismatch(*entry) for entry in found["mismatched_keys"]]),
            ("tensors hold NaN or infinity", damaged),
        )
        if names
    ]
    if problems:
        raise ConversionError(f"the weights {where} do not fit the model: {'; '.join(problems)}")


def _mismatch(name: str, found: Any, expected: Any) -> str:
    return f"{name} {list(found)} instead of {list(expected)}"


def _nonfinite(name: str, tensor: torch.Tensor) -> str | None:
    count = count_nonfinite(tensor.data)
    return f"{name} ({count:,} of {tensor.numel():,}, as {tensor.dtype})" if count else None
