"""A model in memory as the source or result of a conversion.

It reads the tensors that `save_pretrained` would write and makes the model that `from_pretrained` would load, so the
weights are the same as in a conversion of files.
"""

import copy
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from mqa_hf.base.errors import ConversionError, listing
from mqa_hf.base.text import load_processor, load_tokenizer

from .canonical import on_meta
from .checkpoint import TensorInfo, check_range, nonfinite_in
from .companions import load_parts, load_settings, loading, same_class
from .loading import check_loaded, quietly
from .source import Source, load_config, read_source


@dataclass(frozen=True)
class ModelSource:
    """A model in memory, in place of a [`Source`].

    Attributes:
        name: its name in messages and records.
        config, raw: as read from a checkpoint of the model.
        model: the model.
        tokenizer: its tokenizer or processor.
    """

    name: str
    config: PreTrainedConfig
    raw: dict[str, Any]
    model: PreTrainedModel
    tokenizer: Any = None
    revision: None = None
    directory: None = None

    def reader(self, allow_nonfinite: bool = False) -> "ModelReader":
        """Reader of the weights."""
        return ModelReader(self.name, saved_state(self.model), allow_nonfinite)


AnySource = Source | ModelSource


def open_model(model: Any, tokenizer: Any = None) -> ModelSource:
    """Use a loaded model as a source.

    Raises:
        ConversionError: if it is not a transformers model, if weights are on the meta device, quantised or sharded, or
            if the tokenizer is not one.
    """
    kind = type(model).__name__
    if getattr(model, "_hf_peft_config_loaded", False) or hasattr(model, "merge_and_unload"):
        raise ConversionError(f"this {kind} has a PEFT adapter; merge it first (merge_and_unload)")
    if not isinstance(model, PreTrainedModel):
        raise ConversionError(f"`source` must be a path, a hub id or a model of transformers; got a {kind}")
    if getattr(model, "hf_quantizer", None) is not None or getattr(model.config, "quantization_config", None):
        raise ConversionError(f"this {kind} is quantised; dequantise it (model.dequantize()) or convert the original")
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    meta = [name for name, tensor in tensors.items() if tensor.is_meta]
    if meta:
        raise ConversionError(
            f"{len(meta)} tensors of this {kind} are on the meta device ({listing(meta, 3)}); load it whole, "
            "without offloading"
        )
    spread = [name for name, t in tensors.items() if type(t.data) is not torch.Tensor]
    if spread:
        raise ConversionError(
            f"{len(spread)} tensors of this {kind} are quantised or spread over processes ({listing(spread, 3)}); "
            f"convert it before quantising or sharding"
        )
    check_tokenizer(tokenizer)
    config = copy.deepcopy(model.config)
    config.dtype, config.architectures = model.dtype, [kind]
    with tempfile.TemporaryDirectory() as directory:
        with loading(f"the configuration of this {kind}"):
            config.save_pretrained(directory)
        read = read_source(f"{kind} in memory", Path(directory), None)
    return ModelSource(read.name, read.config, read.raw, model, tokenizer)


def check_tokenizer(given: Any) -> None:
    """Raise ConversionError for anything but a tokenizer or a processor with one."""
    inner = getattr(given, "tokenizer", given)
    if given is not None and not (
        callable(inner) and hasattr(inner, "get_vocab") and callable(getattr(given, "save_pretrained", None))
    ):
        said = repr(given)[:40] if isinstance(given, str | int | float) else f"a {type(given).__name__}"
        raise ConversionError(f"`tokenizer` must be a loaded tokenizer or processor of transformers; got {said}")


def saved_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tensors that `save_pretrained` writes, by name; they share the model's memory."""
    state = model.state_dict()
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    return revert_weight_conversion(model, remove_tied_weights_from_state_dict(state, model))


class ModelReader:
    """The tensors of a model; a [`Reader`].

    Args:
        name: name of the model, for messages.
        state: the tensors.
        allow_nonfinite: read tensors with NaN or infinite entries too.
    """

    def __init__(self, name: str, state: Mapping[str, torch.Tensor], allow_nonfinite: bool = False):
        self.name, self.allow_nonfinite, self._state = name, allow_nonfinite, state
        self.tensors = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in state.items()}
        self.nonfinite: dict[str, int] = {}

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        found = {name: self._state[name].detach().cpu() for name in names}
        self.nonfinite |= nonfinite_in(
            found, self.allow_nonfinite, lambda name: f"{name} of the {self.name} are NaN or infinite;"
        )
        return found


class ModelWriter:
    """Keeps the tensors of a result; a [`Writer`].

    Args:
        tensors: name -> shape and dtype.
        allow_nonfinite: keep tensors with NaN or infinite entries too.

    Attributes:
        state: the tensors; they share no memory with the given ones.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo], allow_nonfinite: bool = False):
        self.total_bytes = sum(info.nbytes for info in tensors.values())
        self.nonfinite: dict[str, int] = {}
        self.allow_nonfinite, self._planned = allow_nonfinite, tensors
        self.state: dict[str, torch.Tensor] = {}

    def write(self, tensors: Mapping[str, torch.Tensor]) -> int:
        for name, tensor in tensors.items():
            info = self._planned[name]
            assert tuple(tensor.shape) == info.shape, f"{name}: {tuple(tensor.shape)} for {info.shape}"
            kept = self.state[name] = torch.empty(info.shape, dtype=info.dtype).copy_(tensor)
            if count := check_range(name, tensor, kept, self.allow_nonfinite):
                self.nonfinite[name] = count
        return sum(self._planned[name].nbytes for name in tensors)

    def finish(self) -> None:
        gone = set(self._planned) - set(self.state)
        assert not gone, f"planned but never written: {listing(gone)}"


def build(
    config: PreTrainedConfig,
    state: dict[str, torch.Tensor],
    generation: GenerationConfig,
    allow_nonfinite: bool = False,
) -> PreTrainedModel:
    """The model of a result, in evaluation mode, on the CPU."""
    kind: Any = type(on_meta(config))
    with quietly():
        model, found = kind.from_pretrained(
            None, config=config, state_dict=state, generation_config=generation, output_loading_info=True
        )
    check_loaded(model, found, f"of the {kind.__name__}", allow_nonfinite)
    model.config.name_or_path = model.name_or_path = ""
    return model.eval()


@dataclass(frozen=True)
class Given:
    """Companions of a model in memory: generation configuration and, if given, a tokenizer."""

    model: PreTrainedModel
    given: Any

    def carry_over(self, partial: Path) -> None:
        """Write the files beside the weights of a result."""
        with loading("the generation configuration of the model"):
            self.generation().save_pretrained(partial)
        if self.given is not None:
            with loading("the given `tokenizer`"):
                self.given.save_pretrained(partial)

    def check(self, partial: Path) -> None:
        """Load the written files; raises ConversionError if they load as another class."""
        load_settings(partial)
        for what, auto in load_parts(partial, load_config(partial)):
            given = getattr(self.given, "tokenizer", self.given) if what == "tokenizer" else self.given
            with loading(f"the {what} of the result"):
                ours = auto.from_pretrained(partial, trust_remote_code=False)
            if not same_class(ours, given):
                raise ConversionError(
                    f"the given {what}, a {type(given).__name__}, loads from the result as a different "
                    f"{type(ours).__name__}"
                )

    def doubts(self) -> list[str]:
        """What the result lacks, a sentence each."""
        return [] if self.given is not None else ["no `tokenizer` was given, so none was saved with the weights"]

    def generation(self) -> GenerationConfig:
        return copy.deepcopy(getattr(self.model, "generation_config", None) or GenerationConfig())

    def tokenizer(self) -> Any:
        """The tokenizer for calibration texts: the given one, or that of the checkpoint the model was loaded from.

        Raises:
            MQAError: if there is none.
        """
        if self.given is not None:
            return getattr(self.given, "tokenizer", self.given)
        if not self.model.name_or_path:
            raise ConversionError("calibration of a model in memory needs a tokenizer; pass `tokenizer`")
        return load_tokenizer(self.model.name_or_path)

    def processor(self) -> Any:
        """The processor for recordings, as [`Given.tokenizer`]."""
        if hasattr(self.given, "feature_extractor"):
            return self.given
        if self.given is not None or not self.model.name_or_path:
            raise ConversionError("a speech model in memory is fitted with its processor; pass it as `tokenizer`")
        return load_processor(self.model.name_or_path)

    @property
    def card(self) -> Path | None:
        """The directory of the model card to copy from."""
        return None
