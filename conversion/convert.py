"""`mqa-hf convert`: from a pretrained checkpoint to a multi-query one."""

import os
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, ParamSpec, Protocol, TypeVar, overload

from mqa_hf.base.errors import ConversionError
from mqa_hf.base.options import NUMBER_TYPES, Job, Option, Options, check_keywords, describe, options, refuse

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .record import ConversionRecord


@dataclass(frozen=True)
class Heads(Options):
    """Which heads a conversion makes."""

    _: KW_ONLY
    kv_heads: Annotated[
        int,
        Option(
            "Key/value heads of the result, a divisor of the source's. The source's own number changes no weight.",
            min=1,
            recorded="always",
        ),
    ] = 1
    method: Annotated[
        str,
        Option(
            "How heads become one: mean, first or random (arXiv 2305.13245, section 3.2); shared: heads fitted to "
            "what the layers see of a calibration text; latent: one vector a token, fitted likewise, from which "
            "values are read and keys rebuilt.",
            choices=("mean", "first", "random", "shared", "latent"),
            recorded="always",
        ),
    ] = "mean"
    seed: Annotated[int, Option("Seed of `method` random, shared and latent.", min=0, below=2**64)] = 0
    attention: Annotated[
        Sequence[str] | None,
        Option(
            "Of an encoder-decoder model, the attentions that get fewer heads. Default: decoder (self-attention) and "
            "cross.",
            choices=("decoder", "cross", "encoder"),
            comma=True,
        ),
    ] = None
    window: Annotated[
        int | None,
        Option(
            "Positions that the decoder's self-attention sees, the current one included (arXiv 1911.02150, section "
            "4.1, has 32), which also bounds its cache. Needs training afterwards. Default: all.",
            min=2,
            below=2**31,
        ),
    ] = None
    ignore_switch: Annotated[
        Sequence[str],
        Option("An unknown switch in config.json that does not change the model's function; may be repeated."),
    ] = ()


@dataclass(frozen=True)
class Fit(Options, panel="Fitting (--method shared, latent)"):
    """How heads or latents, and output projections, are fitted to a calibration text."""

    _: KW_ONLY
    calibration: Annotated[
        str | os.PathLike[str] | Sequence[str] | None,
        Option(
            "Text file, JSON lines, parquet, or an id of the Hub's datasets; in Python also a list of texts. Default: "
            "Python's reference manual.",
            objects="also",
        ),
    ] = None
    calibration_tokens: Annotated[int, Option("Tokens to fit on.", min=1)] = 131_072
    sequence_length: Annotated[int, Option("Tokens of a sequence.", min=4)] = 512
    calibration_columns: Annotated[
        Sequence[str],
        Option(
            "Column of the text; for encoder-decoder models also two, such as en,de: read and written. Default: text, "
            "or a translation's two languages.",
            comma=True,
        ),
    ] = ()
    head_width: Annotated[float, Option("Width of a new head in units of an old one.", above=0)] = 1.0
    key_width: Annotated[
        float | None,
        Option(
            "The same, of keys alone. Default: `head_width`. Of a latent: numbers of rotated keys that are rebuilt "
            "from it. Default: so many in each layer that those left out cost less than what the latent leaves out.",
            above=0,
        ),
    ] = None
    value_width: Annotated[float | None, Option("The same, of values alone. Default: `head_width`.", above=0)] = None
    cache_budget: Annotated[
        str | None,
        Option(
            "In place of widths or `latent`: cache bytes per token, or a share of the source's such as 25%. The sizes "
            "of each layer are chosen so that the least is lost; `key_width` is then that of a latent on average."
        ),
    ] = None
    latent: Annotated[
        int | None,
        Option("Numbers of a token's latent in each layer. Default: as many as one key and one value have.", min=1),
    ] = None
    latent_bits: Annotated[
        int,
        Option(
            "Bits of a stored number of the latent. With 8 and 4, each latent has a scale and an offset of 16 bits "
            "besides.",
            choices=(16, 8, 4),
        ),
    ] = 16
    fit_steps: Annotated[
        int | None,
        Option(
            "Steps of training of each layer's latent on the layer's own output, after the closed form. Default: 200 "
            "with `method` latent.",
            min=0,
        ),
    ] = None
    refit: Annotated[
        bool | None,
        Option(
            "Whether output projections are refitted on the calibration text. Default: with `method` shared, latent.",
        ),
    ] = None
    device: Annotated[str, Option("Where layers run.")] = "cpu"


@dataclass(frozen=True)
class Weights(Options, panel="Output"):
    """What the result is, wherever it goes."""

    _: KW_ONLY
    target: Annotated[
        str,
        Option(
            "mqa: this package's class, as remote code. native: a class of transformers, where one can hold the "
            "model.",
            choices=("mqa", "native"),
        ),
    ] = "mqa"
    dtype: Annotated[str | None, Option("Of the weights. Default: as in the source.", choices=NUMBER_TYPES)] = None
    allow_nonfinite: Annotated[
        bool, Option("Convert weights that hold NaN or infinity too, and count them in the report.")
    ] = False


@dataclass(frozen=True)
class Written(Options, panel="Output"):
    """How the result is written."""

    _: KW_ONLY
    max_shard_size: Annotated[str, Option("Largest file of weights.")] = "5GB"
    overwrite: Annotated[bool, Option("Replace the checkpoint at `output`.", recorded="never")] = False


@dataclass(frozen=True)
class Hub(Options, panel="Hub"):
    """Where a source comes from."""

    _: KW_ONLY
    revision: Annotated[str | None, Option("Branch, tag or commit of a hub id.")] = None


@dataclass(frozen=True)
class Upload(Options, panel="Hub"):
    """Where a result goes to."""

    _: KW_ONLY
    push_to_hub: Annotated[str | None, Option("Repository to upload the result to.", recorded="never")] = None
    private: Annotated[bool, Option("Make a new repository private.", recorded="never")] = False


@dataclass(frozen=True)
class ConversionOptions(Hub, Weights, Fit, Heads):
    """What a conversion makes, wherever its result goes."""

    _: KW_ONLY
    tokenizer: Annotated[
        Optional["PreTrainedTokenizerBase"],
        Option(
            "Tokenizer or processor that goes with a model in memory. Default: none is written, and calibration "
            "takes that of where the model was loaded from.",
            recorded="never",
            objects="only",
        ),
    ] = None

    @property
    def calibrated(self) -> bool:
        """Whether layers look at a calibration text."""
        return self.method in FITTED or bool(self.refit)

    @property
    def width_factors(self) -> tuple[float, float]:
        """Widths of a new head's keys and values in units of an old one."""
        key, value = self.key_width, self.value_width
        return self.head_width if key is None else key, self.head_width if value is None else value


FIT_STEPS = 200  # of training of each latent, where nothing else is said
FITTED = ("shared", "latent")  # methods that look at a calibration text
SOURCE = Option("Directory or hub id of the checkpoint; in Python also a loaded model.", objects="also")
C = TypeVar("C", bound=ConversionOptions)


def settled(job: C) -> C:
    """With `refit` filled in; raises ConversionError for options that contradict each other."""
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
        (latent and job.kv_heads != 1, f"a latent is one for all heads; `kv_heads` must be 1, not {job.kv_heads}"),
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
            not job.calibrated and (job.calibration is not None or bool(job.calibration_columns)),
            f"calibration text is for `method` shared and latent, and for `refit`; `method` {job.method} reads none",
        ),
        (
            job.calibrated and job.allow_nonfinite,
            "`allow_nonfinite` is for methods without calibration: nothing is fitted to NaN",
        ),
        (
            job.calibrated and job.window is not None,
            f"`window` and `method` {job.method} do not go together: what is fitted looks at all that heads see",
        ),
        (
            budget and any(widths),
            "`cache_budget` chooses widths; give either it or `head_width`, `key_width`, `value_width`",
        ),
        (
            budget and job.target == "native",
            "`cache_budget` is for `target` mqa: native heads have the source's width",
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
class FileOptions(Upload, Written, ConversionOptions):
    """What a conversion makes, and how it is written."""


@dataclass(frozen=True)
class Conversion(FileOptions, Job["ConversionRecord"]):
    """Convert a checkpoint, or a model in memory, to fewer key/value heads.

    Returns:
        What `conversion.json` says, as a `ConversionRecord`. Where `output` is `None`, the model instead, in
        evaluation mode; nothing is written then.

    Raises:
        MQAError: for anything wrong with the request, and as a `ConversionError` with the source. `output` is then
            as it was.
    """

    name = "convert"

    source: Annotated["str | os.PathLike[str] | PreTrainedModel", SOURCE]
    output: Annotated[Path | str, Option("Directory to write. It appears only when it is whole.")]

    @property
    def in_memory(self) -> bool:
        """Whether it was asked for with something in memory, which no command has."""
        texts = self.calibration is None or isinstance(self.calibration, str | os.PathLike)
        return not (isinstance(self.source, str | os.PathLike) and texts)

    def recorded(self) -> dict[str, Any]:
        fit = {field.name for field in fields(Fit)} - {"refit"}
        unread = {"source", "output"} | (set() if self.calibrated else fit)
        found = {name: value for name, value in super().recorded().items() if name not in unread}
        texts = found.get("calibration")
        if texts is not None and not isinstance(texts, str):
            found["calibration"] = f"{len(texts):,} texts in memory"
        return found

    def call(self) -> str:
        """The Python call that does this, where no command can."""
        changed = {"kv_heads", "method", *(f.name for f in options(type(self)) if getattr(self, f.name) != f.default)}
        said = {name: repr(value) for name, value in self.recorded().items() if name in changed}
        if "calibration" in said and not isinstance(self.calibration, str):
            said["calibration"] = "texts"
        if self.tokenizer is not None:
            said["tokenizer"] = "tokenizer"
        source = repr(str(self.source)) if isinstance(self.source, str | os.PathLike) else "model"
        return f"mqa_hf.convert({', '.join([source, repr('OUTPUT'), *(f'{k}={v}' for k, v in said.items())])})"

    def resolve(self) -> "Conversion":
        """With `refit` settled; raises ConversionError for options that contradict each other."""
        if self.private and not self.push_to_hub:
            raise ConversionError("`private` is about the repository of `push_to_hub`, which is missing")
        return settled(self)

    def run(self) -> "ConversionRecord":
        from .converter import carry_out

        return carry_out(self.resolve())

    def dry_run(self) -> dict[str, Any]:
        from .forecast import forecast

        return forecast(self.resolve())

    def interrupted(self) -> str:
        return "Nothing was kept; `output` is as it was."

    def show(self, record: "ConversionRecord", console: "Console") -> None:
        """Say in a line what became of the heads and the cache."""
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
    """Both ways of [`convert`] for type checkers: with an output and without."""

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
    """The function of a conversion, whose options are those of these classes."""

    def run(source: Any, output: Path | str | None = None, **given: Any) -> Any:
        check_keywords(Conversion, given)
        if output is not None:
            return Conversion(source, output, **given).run()
        known = {field.name for field in options(ModelConversion)}
        for name in given.keys() & ({field.name for field in options(Conversion)} - known):
            raise ConversionError(f"`{name}` is about files, and there is no `output`")
        return ModelConversion(source, **given).run()

    describe(run, Conversion, output=None)
    return run  # type: ignore[return-value]


convert = both(FileOptions, ConversionOptions)
