"""Loading a checkpoint's model, with nothing in it that the checkpoint does not say.

`from_pretrained` initialises missing weights at random and passes over those that it has no place for, with no more
than a line in the log; what is trained or measured then is another model.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    PreTrainedModel,
)
from transformers.utils import logging

from mqa_hf.base.errors import ConversionError, listing
from mqa_hf.base.hub import check_no_adapter

from .checkpoint import count_nonfinite
from .families import FAMILIES
from .operations import Flatten, SinusoidTable
from .plan import template


def load_model(
    checkpoint: str | Path,
    *,
    config: Any = None,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
) -> PreTrainedModel:
    """A checkpoint's model with its head, in evaluation mode, on the CPU.

    Args:
        checkpoint: directory or hub id.
        config: in place of the checkpoint's own.
        dtype: of the weights; "auto": as the checkpoint has them.
        revision: branch, tag or commit of a hub id.

    Raises:
        ConversionError: where it cannot be loaded, or tensors are missing, have no place, have another shape, or hold
            NaN or infinity.
    """
    check_no_adapter(Path(checkpoint))
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what is said of tensors there is said below
    try:
        config = AutoConfig.from_pretrained(checkpoint, revision=revision) if config is None else config
        model, found = auto_class(config).from_pretrained(
            checkpoint,
            config=config,
            dtype=dtype,
            revision=revision,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are said by name below
        )
    except Exception as error:  # whatever reading a file that is no checkpoint's raises
        raise ConversionError(f"{checkpoint} cannot be loaded: {error}") from error
    finally:
        logging.set_verbosity(verbosity)
    missing = [name for name in found["missing_keys"] if not known_absent(name, config.model_type)]
    unused = [name for name in found["unexpected_keys"] if not known_unused(name, config.model_type)]
    damaged = [said for entry in model.named_parameters() if (said := _nonfinite(*entry))]
    problems = [
        f"{what}: {listing(names)}"
        for what, names in (
            ("tensors are missing", missing),
            ("tensors have no place in this configuration", unused),
            ("tensors have another shape", [_mismatch(*entry) for entry in found["mismatched_keys"]]),
            ("tensors hold NaN or infinity", damaged),
        )
        if names
    ]
    if problems:
        raise ConversionError(f"the weights in {checkpoint} do not make the model: {'; '.join(problems)}")
    return model.eval()


def auto_class(config: Any) -> Any:
    """The class of transformers that loads a model of this configuration with its head."""
    if getattr(config, "num_mel_bins", None):
        return AutoModelForSpeechSeq2Seq
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def known_unused(name: str, model_type: str) -> bool:
    """Whether a tensor is one that older files of a family hold and no class uses, such as a mask."""
    family = FAMILIES.get(model_type)
    if family is None:
        return False
    return any(template(name.removeprefix(prefix))[0] in family.ignored for prefix in ("", *family.prefixes))


def known_absent(name: str, model_type: str) -> bool:
    """Whether a tensor need not be in a file: the class computes it (sinusoids), or takes zeros (BART's bias)."""
    family = FAMILIES.get(model_type)
    if family is None:
        return False
    optional = {rule.source for rule in family.rules if isinstance(rule.operation, SinusoidTable | Flatten)}
    return any(template(name.removeprefix(prefix))[0] in optional for prefix in ("", *family.prefixes))


def _mismatch(name: str, found: Any, expected: Any) -> str:
    return f"{name} {list(found)} instead of {list(expected)}"


def _nonfinite(name: str, tensor: torch.Tensor) -> str | None:
    count = count_nonfinite(tensor.data)
    return f"{name} ({count:,} of {tensor.numel():,}, as {tensor.dtype})" if count else None
