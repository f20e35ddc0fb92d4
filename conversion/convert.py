"""`mqa-hf convert`: convert a pretrained checkpoint to a multi-query one."""

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, ParamSpec, Protocol, TypeVar, overload

from mqa_hf.base.errors import ConversionError
from mqa_hf.base.mixture import DEFAULT, Part
from mqa_hf.base.options import NUMBER_TYPES, Job, Option, Options, check_keywords, describe, options, refuse
from mqa_hf.base.upload import Upload

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .record import ConversionRecord


@dataclass(frozen=True)
class Heads(Options):
    """Which key/value heads a conversion makes."""

    _: KW_ONLY
    kv_heads: Annotated[
        int,
        Option(
            "Number of key/value heads of the result; must divide the source's number. The source's own number leaves "
            "the weights unchanged.",
            min=1,
            recorded="always",
        ),
    ] = 1
    method: Annotated[
        str,
        Option(
            "How heads are merged: mean, first or random (arXiv 2305.13245, section 3.2); shared: heads fitted on a "
            "calibration text; latent: one vector per token, fitted on the same text, from which values are read and "
            "keys rebuilt.",
            choices=("mean", "first", "random", "shared", "latent"),
            recorded="always",
        ),
    ] = "mean"
    seed: Annotated[int, Option("Random seed of `method` random, shared and latent.", min=0, below=2**64)] = 0
    attention: Annotated[
        Sequence[str] | None,
        Option(
            "Attentions of an encoder-decoder model to convert. Default: decoder (self-attention) and cross.",
            choices=("decoder", "cross", "encoder"),
            comma=True,
        ),
    ] = None
    window: Annotated[
        int | None,
        Option(
            "Positions that the decoder's self-attention sees, including the current one (32 in arXiv 1911.02150, "
            "section 4.1); also bounds its cache. Needs training afterwards. Default: all.",
            min=2,
            below=2**31,
        ),
    ] = None
    ignore_switch: Annotated[
        Sequence[str],
        Option("Unknown switch in config.json to accept, as it does not change the outputs; may be repeated."),
    ] = ()


@dataclass(frozen=True)
class Fit(Options, panel="Fitting (--method shared, latent)"):
    """How heads, latents and output projections are fitted on a calibration text."""

    _: KW_ONLY
    calibration: Annotated[
        Sequence[str] | None,
        Option(
            "Calibration text: a text, JSON lines or parquet file, the id of a data set on the Hub, or "
            "builtin:manual, builtin:languages, builtin:code or builtin:verse. Repeat it to mix several by weight. "
            "Default: these four, 4:3:2:1.",
            metavar="SOURCE[=WEIGHT]",
        ),
    ] = None
    texts: Annotated[
        Sequence[str] | None,
        Option("Calibration texts in memory, instead of `calibration`.", recorded="never", objects="only"),
    ] = None
    calibration_tokens: Annotated[int, Option("Number of tokens to fit on.", min=1)] = 131_072
    sequence_length: Annotated[int, Option("Tokens per calibration sequence.", min=4)] = 512
    calibration_columns: Annotated[
        Sequence[str],
        Option(
            "Column of the text or of chats, or columns of a prompt and an answer; for encoder-decoder models two, "
            "such as en,de: encoder and decoder input. Default: text, messages, prompt and completion, instruction "
            "and output, or the two languages of a translation.",
            comma=True,
        ),
    ] = ()
    head_width: Annotated[float, Option("Width of a new head as a multiple of the source's.", above=0)] = 1.0
    key_width: Annotated[
        float | None,
        Option(
            "The same for keys only. Default: `head_width`. With `method` latent: number of rotated key components "
            "that are rebuilt from the latent. Default: chosen per layer, so that the omitted components cost less "
            "than what the latent leaves out.",
            above=0,
        ),
    ] = None
    value_width: Annotated[float | None, Option("The same for values only. Default: `head_width`.", above=0)] = None
    cache_budget: Annotated[
        str | None,
        Option(
            "Instead of widths or `latent`: cache bytes per token, or a share of the source's such as 25%. Sizes are "
            "chosen per layer to lose the least; with `method` latent, `key_width` is then an average over layers."
        ),
    ] = None
    latent: Annotated[
        int | None,
        Option("Latent width per token and layer. Default: that of one key and one value together.", min=1),
    ] = None
    latent_bits: Annotated[
        int,
        Option(
            "Bits per stored number of the latent. At 8 and 4 bits, each latent also stores a 16-bit scale and a "
            "16-bit offset.",
            choices=(16, 8, 4),
        ),
    ] = 16
    fit_steps: Annotated[
        int | None,
        Option(
            "Training steps that refine the latent of each layer on the layer's own output, after the closed form. "
            "Default: 200 with `method` latent.",
            min=0,
        ),
    ] = None
    refit: Annotated[
        bool | None,
        Option(
            "Refit output projections on the calibration text. Default: with `method` shared and latent.",
        ),
    ] = None
    device: Annotated[str, Option("Device that layers run on.")] = "cpu"


@dataclass(frozen=True)
class Weights(Options, panel="Output"):
    """Class and weights of the result."""

    _: KW_ONLY
    target: Annotated[
        str,
        Option(
            "mqa: this package's class, saved as remote code. native: a transformers class, if one fits the model.",
            choices=("mqa", "native"),
        ),
    ] = "mqa"
    dtype: Annotated[str | None, Option("Data type of weights. Default: the source's.", choices=NUMBER_TYPES)] = None
    allow_nonfinite: Annotated[
        bool, Option("Convert weights that contain NaN or infinity, and count them in the report.")
    ] = False


@dataclass(frozen=True)
class Written(Options, panel="Output"):
    """How the result is written."""

    _: KW_ONLY
    max_shard_size: Annotated[str, Option("Maximum size of a weight file.")] = "5GB"
    overwrite: Annotated[bool, Option("Replace the checkpoint at `output`.", recorded="never")] = False


@dataclass(frozen=True)
class Hub(Options, panel="Hub"):
    """Where the source comes from."""

    _: KW_ONLY
    revision: Annotated[str | None, Option("Branch, tag or commit of a hub id.")] = None


@dataclass(frozen=True)
class Named(Options, panel="Hub"):
    """What the model card says of the original."""

    _: KW_ONLY
    base_model: Annotated[
        str | None, Option("Hub id of the original, for the card. Default: the source, or what its card names.")
    ] = None
    license: Annotated[
        str | None,
        Option("Licence for the card, such as apache-2.0. Default: that of the source's card."),
    ] = None


@dataclass(frozen=True)
class ConversionOptions(Hub, Weights, Fit, Heads):
    """Options of a conversion, whether its result is saved or stays in memory."""

    _: KW_ONLY
    tokenizer: Annotated[
        Optional["PreTrainedTokenizerBase"],
        Option(
            "Tokenizer or processor of a model in memory. Default: none is written, and calibration uses the one of "
            "the checkpoint that the model was loaded from.",
            recorded="never",
            objects="only",
        ),
    ] = None

    @property
    def calibrated(self) -> bool:
        """Whether a calibration text is read."""
        return self.method in FITTED or bool(self.refit)

    @property
    def calibration_parts(self) -> tuple[Part, ...]:
        """The mixture that heads are fitted on."""
        return tuple(map(Part.parse, self.calibration or ())) or DEFAULT

    @property
    def calibration_text(self) -> str:
        """The names of the texts that heads are fitted on."""
        if self.texts is not None:
            return f"{len(self.texts):,} texts in memory"
        return ", ".join(part.source for part in self.calibration_parts)

    @property
    def width_factors(self) -> tuple[float, float]:
        """Widths of a new head's keys and values, as multiples of the source's."""
        key, value = self.key_width, self.value_width
        return self.head_width if key is None else key, self.head_width if value is None else value


FIT_STEPS = 200  # default of `fit_steps` for latents
FITTED = ("shared", "latent")  # methods that read a calibration text
SOURCE = Option("Directory or hub id of the checkpoint; in Python also a loaded model.", objects="also")
C = TypeVar("C", bound=ConversionOptions)


def settled(job: C) -> C:
    """Fill in `refit` and `fit_steps`; raises ConversionError for options that contradict each other."""
    job = replace(job, refit=job.method in FITTED if job.refit is None else job.refit)
    if job.method == "latent" and job.fit_steps is None:
        job = replace(job, fit_steps=FIT_STEPS)
    latent, key_width = job.method == "latent", job.key_width
    widths = (job.head_width != 1, key_width is not None and not latent, job.value_width is not None)
    budget = job.cache_budget is not None
    contradictions = (
        (
            job.method not in FITTED and (any(widths) or budget),
            f"widths and `cache_budget` are for `method` shared and latent, not {job.method}",
        ),
        (
            latent and (job.head_width != 1 or job.value_width is not None),
            "`head_width` and `value_width` are for `method` shared; `latent` and `key_width` are a latent's sizes",
        ),
        (
            latent and key_width is not None and (key_width % 2 != 0),
            f"`key_width` of a latent must be an even number, as components are rotated in pairs; got {key_width}",
        ),
        (latent and job.kv_heads != 1, f"all heads share one latent; `kv_heads` must be 1, got {job.kv_heads}"),
        (
            not latent and (job.latent is not None or job.latent_bits != 16 or job.fit_steps is not None),
            f"`latent`, `latent_bits` and `fit_steps` are for `method` latent, not {job.method}",
        ),
        (
            latent and budget and job.latent is not None,
            "`cache_budget` chooses the latents; give either it or `latent`",
        ),
        (latent and job.target == "native", "no class of transformers holds a latent; use `target` mqa"),
        (
            not job.calibrated and (bool(job.calibration) or job.texts is not None or bool(job.calibration_columns)),
            f"calibration text is for `method` shared and latent, and for `refit`; `method` {job.method} reads none",
        ),
        (
            bool(job.calibration) and job.texts is not None,
            "`calibration` and `texts` both name the calibration text; pass one of them",
        ),
        (
            bool(job.calibration_columns) and not job.calibration,
            f"`calibration_columns` {','.join(job.calibration_columns)} needs `calibration`",
        ),
        (
            not all(0 < part.weight < math.inf for part in job.calibration_parts),
            f"`calibration` needs weights above 0; got {[part.weight for part in job.calibration_parts]}",
        ),
        (
            job.calibrated and job.allow_nonfinite,
            "`allow_nonfinite` is for methods without calibration; nothing can be fitted to NaN",
        ),
        (
            job.calibrated and job.window is not None,
            f"`window` cannot be combined with `method` {job.method}, which is fitted on attention to all positions",
        ),
        (
            budget and any(widths),
            "`cache_budget` chooses widths; give either it or `head_width`, `key_width`, `value_width`",
        ),
        (
            budget and job.target == "native",
            "`cache_budget` is for `target` mqa; native heads have the source's width",
        ),
    )
    refuse(contradictions, ConversionError)
    return job


@dataclass(frozen=True)
class ModelConversion(ConversionOptions, Job["PreTrainedModel"]):
    """Convert to a model in memory."""

    name = "convert"

    source: Annotated["str | os.PathLike[str] | PreTrainedModel", SOURCE]

    def resolve(self) -> "ModelConversion":
        return settled(self)

    def run(self) -> "PreTrainedModel":
        from .converter import converted

        return converted(self.resolve())


@dataclass(frozen=True)
class FileOptions(Upload, Named, Written, ConversionOptions):
    """Options of a conversion and of the files it writes."""


@dataclass(frozen=True)
class Conversion(FileOptions, Job["ConversionRecord"]):
    """Convert a checkpoint, or a model in memory, to fewer key/value heads.

    Returns:
        The content of `conversion.json` as a `ConversionRecord`. If `output` is `None`, nothing is written and the
        model is returned instead, in evaluation mode.

    Raises:
        MQAError: if the request is invalid; a `ConversionError` if the source is. `output` is left as it was.
    """

    name = "convert"

    source: Annotated["str | os.PathLike[str] | PreTrainedModel", SOURCE]
    output: Annotated[Path | str, Option("Directory to write. It appears only once it is complete.")]

    @property
    def in_memory(self) -> bool:
        """Whether the source or the texts are objects in memory, which no command can name."""
        return not isinstance(self.source, str | os.PathLike) or self.texts is not None

    def recorded(self) -> dict[str, Any]:
        fit = {field.name for field in fields(Fit)} - {"refit"}
        unread = {"source", "output"} | (set() if self.calibrated else fit)
        return {name: value for name, value in super().recorded().items() if name not in unread}

    def call(self) -> str:
        """The Python call of this conversion, for those that no command can express."""
        changed = {"kv_heads", "method", *(f.name for f in options(type(self)) if getattr(self, f.name) != f.default)}
        said = {name: repr(value) for name, value in self.recorded().items() if name in changed}
        if self.texts is not None:
            said["texts"] = "texts"
        if self.tokenizer is not None:
            said["tokenizer"] = "tokenizer"
        source = repr(str(self.source)) if isinstance(self.source, str | os.PathLike) else "model"
        return f"mqa_hf.convert({', '.join([source, repr('OUTPUT'), *(f'{k}={v}' for k, v in said.items())])})"

    def resolve(self) -> "Conversion":
        """Fill in `refit` and `fit_steps`; raises MQAError for options that contradict each other."""
        self.check_upload()
        if self.base_model is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.base_model):
            raise ConversionError(f"`base_model` takes a hub id such as name/model, got {self.base_model!r}")
        return settled(self)

    def run(self) -> "ConversionRecord":
        from .converter import carry_out

        return carry_out(self.resolve())

    def dry_run(self) -> dict[str, Any]:
        from .forecast import forecast

        return forecast(self.resolve())

    def interrupted(self) -> str:
        return "Nothing was kept; `output` is unchanged."

    def show(self, record: "ConversionRecord", console: "Console") -> None:
        """Print heads and cache before and after, in a line."""
        cache, cross = record.kv_bytes_per_token, record.cross_kv_bytes_per_token
        latents = record.latents
        heads = ", ".join(
            (f"{n.before} key/value heads -> {latents[name].in_words()}" if name in latents else
             f"{n.before} -> {n.after} key/value heads") + (f" ({name})" if len(record.attentions) > 1 else "")
            for name, n in record.attentions.items()
        )  # fmt: skip
        source_tokens = f", {cross.before:,} -> {cross.after:,} per source token" if cross.before else ""
        console.print(
            f"{self.output}: {heads}; {cache.before:,} -> {cache.after:,} cache bytes per token{source_tokens}",
            soft_wrap=True,
        )


P = ParamSpec("P")
Q = ParamSpec("Q")


class Convert(Protocol[P, Q]):
    """Signatures of [`convert`] for type checkers, with and without `output`."""

    @overload
    def __call__(
        self, source: "str | os.PathLike[str] | PreTrainedModel", output: Path | str, *args: P.args, **kwargs: P.kwargs
    ) -> "ConversionRecord": ...

    @overload
    def __call__(
        self,
        source: "str | os.PathLike[str] | PreTrainedModel",
        output: None = None,
        *args: Q.args,
        **kwargs: Q.kwargs,
    ) -> "PreTrainedModel": ...


def both(written: Callable[P, FileOptions], kept: Callable[Q, ConversionOptions]) -> Convert[P, Q]:
    """Make [`convert`] from the options with and without `output`."""

    def run(source: Any, output: Path | str | None = None, **given: Any) -> Any:
        check_keywords(Conversion, given)
        if output is not None:
            return Conversion(source, output, **given).run()
        known = {field.name for field in options(ModelConversion)}
        for name in given.keys() & ({field.name for field in options(Conversion)} - known):
            raise ConversionError(f"`{name}` needs `output`, the directory to write")
        return ModelConversion(source, **given).run()

    describe(run, Conversion, output=None)
    return run  # type: ignore[return-value]


convert = both(FileOptions, ConversionOptions)
