"""Compatibility with versions of transformers.

A checkpoint carries this code, which may run with versions of transformers that did not exist when it was written.
Anything unknown is therefore reported:

- a transformers that is too old raises an error; one newer than the tested versions gives a warning and, on the first
  call of `generate()`, a self-check;
- an argument of `forward` that nothing reads raises an error ([`refuse_unread`]);
- private names that the fast loop relies on are looked up once; if one is missing or has another signature,
  transformers' loop is used (`rules_mqa.py`).
"""

import inspect
import re
import sys
from collections.abc import Callable
from functools import cache as remembered
from typing import Any

import torch
import transformers
from transformers.utils import logging

# A fixed name: a checkpoint's code is loaded twice, for configuration and model, and should warn only once.
logger = logging.get_logger("mqa_hf.compat_mqa")

OLDEST, NEWEST = (5, 17), (5, 24)  # tested versions of transformers, and those between

# Arguments of `forward` that attention functions, the loss or transformers' decorators read, or that have no effect.
KNOWN_ARGUMENTS = frozenset(
    {
        # read by transformers around `forward`
        "output_attentions", "output_hidden_states", "return_dict",
        # read by the loss
        "ignore_index", "num_items_in_batch", "shift_labels",
        # read by attention functions: packed rows, paged caches, vLLM's layers
        "attention_instances", "block_table", "cu_seq_lens_k", "cu_seq_lens_q", "is_causal", "max_length_k",
        "max_length_q", "max_seqlen_k", "max_seqlen_q", "read_index", "write_index",
        # read by nothing here, and without effect for these models
        "cache_position", "logits_indices", "logits_processor_args", "logits_to_keep", "output_router_logits",
        "seq_idx", "tokenizer",
    }
)  # fmt: skip


def version_of(text: str) -> tuple[int, int]:
    """(5, 24) of "5.24.0.dev0"."""
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found.group(1)), int(found.group(2))) if found else NEWEST


def dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def check_version(installed: str) -> bool:
    """Whether this version of transformers is tested; warns if it is newer.

    Raises:
        ImportError: if it is too old.
    """
    version = version_of(installed)
    if version < OLDEST:
        raise ImportError(
            f"This model needs transformers {dotted(OLDEST)} or newer, found {installed}; upgrade with: "
            f"pip install -U 'transformers>={dotted(OLDEST)}'"
        )
    if version > NEWEST:
        logger.warning_once(
            f"transformers {installed} is newer than the versions that this model was tested with ({dotted(OLDEST)} "
            f"to {dotted(NEWEST)}); the first call of generate() checks that its results are correct"
        )
    return version <= NEWEST


TESTED = check_version(transformers.__version__)


@remembered
def cache_name() -> str:
    """The argument by which transformers passes the cache to models and layers: `cache` from 5.24 on, before that
    `past_key_values`.
    """
    from transformers import GenerationMixin

    prepared = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return "cache" if "cache" in prepared else "past_key_values"


def one_cache(past_key_values: Any, cache: Any) -> Any:
    """The cache, given under either name."""
    if past_key_values is not None and cache is not None:
        raise ValueError("got both `cache` and `past_key_values`; pass one of them")
    return cache if past_key_values is None else past_key_values


def refuse_unread(where: str, arguments: dict[str, Any], attention: Callable) -> None:
    """Raise TypeError for arguments that are set but read by neither this code, transformers nor `attention`.

    An ignored argument, such as a cache under a new name, would silently make the result wrong.
    """
    unread = [name for name, value in arguments.items() if value is not None and name not in KNOWN_ARGUMENTS]
    if unread:  # attention functions of other packages may read further arguments
        read = inspect.signature(attention).parameters
        unread = [name for name in unread if name not in read]
    if unread:
        raise TypeError(
            f"{where} got unknown arguments: {', '.join(sorted(unread))}. If they come from transformers "
            f"{transformers.__version__}, install a version from {dotted(OLDEST)} to {dotted(NEWEST)}"
        )


def close(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[bool, float]:
    """Whether logits agree up to rounding, and their largest difference relative to the largest logit."""
    difference = float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max().clamp(min=1e-6))
    return difference <= (1e-3 if theirs.dtype in (torch.float32, torch.float64) else 5e-2), difference


@torch.no_grad()
def self_check(model: Any) -> None:
    """Compare the logits of a few tokens with and without a cache, in transformers' loop.

    Raises:
        RuntimeError: if they differ, or if a buffer that checkpoints do not hold was not set after loading.
    """
    from transformers import GenerationConfig, GenerationMixin

    advice = f"install a version from {dotted(OLDEST)} to {dotted(NEWEST)}"
    gone = [name for name in model.relies_on if not hasattr(GenerationMixin, name)]
    if gone:
        raise RuntimeError(f"transformers {transformers.__version__} no longer has {', '.join(gone)}; {advice}")
    wrong = [name for name, module in model.named_modules() if not getattr(module, "as_computed", lambda: True)()]
    if wrong:
        raise RuntimeError(
            f"transformers {transformers.__version__} loaded this model without setting up "
            f"{', '.join(wrong[:4])}; {advice}"
        )
    places = {parameter.device for parameter in model.parameters()} - {torch.device("meta")}
    device = next(iter(places), torch.device("cpu"))  # hooks of an offloaded model move the inputs
    tokens = torch.tensor([[1, 2]], device=device)
    source: dict[str, Any] = {} if model.config.is_encoder_decoder else {"input_ids": tokens}
    if getattr(model.config, "num_mel_bins", None):
        shape = (1, model.config.num_mel_bins, 2 * model.config.max_source_positions)
        source["input_features"] = torch.zeros(shape, device=device, dtype=model.dtype)
    elif not source:
        source["input_ids"] = tokens
    options = GenerationConfig(
        max_new_tokens=2, do_sample=False, num_beams=1, use_cache=True, output_logits=True, pad_token_id=0,
        return_dict_in_generate=True, decoder_start_token_id=1,
    )  # fmt: skip
    training, enabled = model.training, model.decoding.enabled
    model.decoding.enabled = False
    model.eval()
    try:
        found = GenerationMixin.generate(model, **source, generation_config=options)
        read = found.sequences[:, :-1]
        text = {"decoder_input_ids": read, **source} if model.config.is_encoder_decoder else {"input_ids": read}
        whole = model(**text, use_cache=False).logits[:, -len(found.logits) :]
    finally:
        model.decoding.enabled = enabled
        model.train(training)
    agree, difference = close(torch.stack(found.logits, 1), whole)
    if not agree:
        raise RuntimeError(
            f"transformers {transformers.__version__} is newer than the tested versions and does not run this model "
            f"correctly: logits with and without a cache differ by {difference:.2g} of the largest; {advice}"
        )


def offer_default_targets() -> None:
    """Tell PEFT, if it is imported, which projections adapters change by default: those that it takes for Llama, and
    that of latents."""
    constants = sys.modules.get("peft.utils.constants")
    for name, table in vars(constants).items() if constants is not None else ():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict) and "llama" in table:
            targets = [*table["llama"], *(["kv_proj"] if "v_proj" in table["llama"] else [])]
            for model_type in ("mqa", "mqa_seq2seq"):
                table.setdefault(model_type, targets)
