"""A job is a frozen dataclass whose fields declare its options once.

    @dataclass(frozen=True)
    class Greeting(Job[str]):
        "Say hello."

        name: Annotated[str, Option("Who is greeted.")]
        _: KW_ONLY
        times: Annotated[int, Option("How often.", min=1)] = 1

        def run(self) -> str: ...

The command (`mqa_hf/cli.py`), the Python function ([`function`]), the steps of a recipe ([`Job.of`]), the recorded
command ([`Job.command`]) and the documentation are derived from it. Options that several jobs share are in a subclass
of [`Options`] that the jobs inherit from; its `panel` is the heading above them in `--help`.
"""

import dataclasses
import difflib
import inspect
import math
import numbers
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

from .errors import MQAError

if TYPE_CHECKING:
    from rich.console import Console

P = ParamSpec("P")
R = TypeVar("R")
J = TypeVar("J", bound="Options")

NUMBER_TYPES = ("float32", "float16", "bfloat16")
PLAIN = str | os.PathLike | numbers.Number | bytes | Mapping | None  # types that are not an object in memory


@dataclass(frozen=True)
class Option:
    """Declaration of an option, in addition to its name, type and default.

    Attributes:
        help: one or two sentences; other options are named in backticks.
        min, above, below: bounds of a number; `above` and `below` are exclusive.
        choices: allowed values.
        comma: whether a list is comma-separated on the command line; otherwise the option is repeated.
        recorded: whether the recorded command shows it: "changed" (if it is not the default), "always" or "never" (it
            does not change the result).
        metavar: placeholder for the value in `--help`.
        objects: whether Python callers may pass an object in memory, which is not checked: "also" or "only".
    """

    help: str
    min: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] | tuple[int, ...] = ()
    comma: bool = False
    recorded: Literal["changed", "always", "never"] = "changed"
    metavar: str | None = None
    objects: Literal["also", "only"] | None = None


@dataclass(frozen=True)
class Field:
    """An option together with the name, type and default of its dataclass field.

    Attributes:
        name: name of the field.
        kind: `bool`, `int`, `float`, `str` or `Path`; for a list, the type of its items.
        many: whether it is a list.
        optional: whether it may be `None`.
        default: its default; `MISSING` if it is required.
        positional: whether it is an argument of the command rather than an option.
        panel: heading in `--help`.
        option: its declaration.
    """

    name: str
    kind: type
    many: bool
    optional: bool
    default: Any
    positional: bool
    panel: str | None
    option: Option

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    def checked(self, value: Any) -> Any:
        """Convert a value to the type of the field; raises MQAError if it does not fit or is out of bounds."""
        if value is None:
            if not self.optional:
                raise MQAError(f"`{self.name}` must be {self.expected()}; got nothing")
            return None
        if not self.many:
            return self.item(value)
        if isinstance(value, str | os.PathLike):
            text = os.fspath(value)
            value = [part.strip() for part in text.split(",")] if self.option.comma else [text]
        if isinstance(value, numbers.Real) and not isinstance(value, bool):
            value = [value]
        if not isinstance(value, Sequence | set | frozenset) or (self.optional and not value):
            raise MQAError(f"`{self.name}` must be {self.expected()}; got {value!r}")
        return tuple(self.item(item) for item in value)

    def item(self, value: Any) -> Any:
        option, found = self.option, value
        try:
            if self.kind is bool:
                fits = isinstance(value, bool)
            elif self.kind in (int, float):
                fits = not isinstance(value, bool) and isinstance(value, numbers.Real | str)
                found = self.kind(value) if fits else value
                fits = fits and math.isfinite(found) and (isinstance(value, str) or found == value)
            else:
                number = isinstance(value, int | float) and not isinstance(value, bool) and not option.objects
                fits = isinstance(value, str | os.PathLike) or number
                found = (
                    self.kind(os.fspath(value) if isinstance(value, os.PathLike) else str(value)) if fits else value
                )
                fits = fits and "\0" not in str(found) and bool(str(value).strip())
        except (ValueError, OverflowError):
            fits = False
        fits = fits and not (
            (option.min is not None and found < option.min)
            or (option.above is not None and found <= option.above)
            or (option.below is not None and found >= option.below)
            or (option.choices and found not in option.choices)
        )
        if not fits:
            raise MQAError(f"`{self.name}` must be {self.expected()}; got {value!r}")
        return found

    def expected(self) -> str:
        """The values that it takes, in words."""
        option = self.option
        if option.choices:
            said = f"one of {', '.join(map(str, option.choices))}"
        else:
            bounds = [
                f"{word} {bound:g}" if abs(bound) < 1e6 else f"{word} 2**{math.log2(bound):g}"
                for word, bound in (("at least", option.min), ("above", option.above), ("below", option.below))
                if bound is not None
            ]
            kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path"}
            said = " ".join([kinds[self.kind], " and ".join(bounds)]).strip()
        if option.objects:
            said = "an object in memory" if option.objects == "only" else f"{said} or an object in memory"
        return f"a list, each {said}" if self.many else said

    def words(self, value: Any) -> list[str]:
        """Command-line words that set it to `value`."""
        if value is None or (self.many and not value):
            return []
        if self.kind is bool:
            return [self.flag if value else "--no-" + self.flag.removeprefix("--")]
        values = [",".join(map(str, value))] if self.many and self.option.comma else value if self.many else [value]
        texts = [f"{v:g}" if isinstance(v, float) and float(f"{v:g}") == v else str(v) for v in values]
        if self.positional:
            return texts
        return [
            word for text in texts for word in ((f"{self.flag}={text}",) if text[:1] == "-" else (self.flag, text))
        ]


@dataclass(frozen=True)
class Options:
    """A group of options, checked on construction. Fields are `Annotated[type, Option(...)]`."""

    panel: ClassVar[str | None] = None

    def __init_subclass__(cls, panel: str | None = None, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        cls.panel = panel

    def __post_init__(self) -> None:
        for field in options(type(self)):
            value = getattr(self, field.name)
            if field.option.objects and not isinstance(value, PLAIN):
                continue
            if field.option.objects == "only" and value is not None:
                raise MQAError(f"`{field.name}` must be {field.expected()}; got {value!r}")
            object.__setattr__(self, field.name, field.checked(value))

    @classmethod
    def of(cls: type[J], given: Mapping[str, Any]) -> J:
        """Build from options by name, as in a recipe, with underscores or hyphens.

        Raises:
            MQAError: if an option is unknown or missing, or a value does not fit.
        """
        known = {field.name: field for field in options(cls) if field.option.objects != "only"}
        named = {str(name).replace("-", "_"): value for name, value in given.items()}
        if len(named) < len(given):
            twice = next(name for name in named if {name, name.replace("_", "-")} <= given.keys() and "_" in name)
            raise MQAError(f"`{twice}` is given twice, with underscores and with hyphens; keep one of them")
        for name, value in named.items():
            if name not in known:
                close = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean `{close[0]}`?" if close else f"; use one of {', '.join(sorted(known))}"
                raise MQAError(f"unknown option `{name}`{hint}")
            if known[name].option.objects:
                known[name].checked(value)
        missing = [name for name, field in known.items() if field.required and named.get(name) is None]
        if missing:
            raise MQAError(f"`{missing[0]}` is missing: {known[missing[0]].option.help}")
        return cls(**named)


class Job(Options, Generic[R]):
    """A command with its checked options."""

    name: ClassVar[str]  # of its command

    def resolve(self: J) -> J:
        """Fill in all derived options."""
        return self

    def check(self) -> None:
        """Raise MQAError for options that contradict each other, without reading files, which may not exist yet."""
        self.resolve()

    def run(self) -> R:
        """Run the job."""
        raise NotImplementedError

    def show(self, result: R, console: "Console") -> None:
        """Print a summary of the result."""

    def dry_run(self) -> dict[str, Any]:
        """Return what would be read and written, by name, without running."""
        raise NotImplementedError

    def interrupted(self) -> str:
        """Say in a sentence what an interrupted job kept and how to resume it."""
        return ""

    def recorded(self) -> dict[str, Any]:
        """Options that decide the result, as JSON values."""
        found = {f.name: getattr(self, f.name) for f in options(type(self)) if f.option.recorded != "never"}
        return {
            name: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v
            for name, v in found.items()
        }

    def words(self) -> list[str]:
        """Words of the command that runs this job, without defaults."""
        arguments, flags, recorded = [], [], self.recorded()
        for field in options(type(self)):
            value = getattr(self, field.name)
            if field.positional:
                arguments += field.words(value)
            elif field.name in recorded and (field.option.recorded == "always" or value != field.default):
                flags += field.words(value)
        return [self.name, *arguments, *flags]

    def command(self) -> str:
        """The shell command that runs this job."""
        return shlex.join(["mqa-hf", *self.words()])


def refuse(contradictions: Iterable[tuple[bool, str]], error: type[MQAError] = MQAError) -> None:
    """Raise `error` with the first message whose condition holds."""
    for holds, said in contradictions:
        if holds:
            raise error(said)


def options(cls: type[Options]) -> tuple[Field, ...]:
    """The options of a class: arguments first, then by panel."""
    found = list(fields_of(cls))
    panels = list(dict.fromkeys(field.panel for field in found))
    return tuple(sorted(found, key=lambda field: (not field.positional, panels.index(field.panel))))


def fields_of(cls: type[Options]) -> Iterator[Field]:
    for field in dataclasses.fields(cls):
        kind, option = get_args(field.type)
        optional = many = False
        if get_origin(kind) in (Union, UnionType):
            parts = [part for part in get_args(kind) if part is not type(None)]
            optional = len(parts) < len(get_args(kind))
            kind = parts[0]
        if get_origin(kind) is not None:
            kind, many = get_args(kind)[0], True
            kind = get_args(kind)[0] if get_origin(kind) in (Union, UnionType) else kind
        if not isinstance(kind, type):  # a forward reference to a model in memory, or its path
            kind = str
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        owner = next(base for base in cls.__mro__ if field.name in inspect.get_annotations(base))
        panel = getattr(owner, "panel", None)
        yield Field(field.name, kind, many, optional, default, not field.kw_only, panel, option)


def function(job: Callable[P, Job[R]]) -> Callable[P, R]:
    """A function that builds a job from its arguments and runs it; its docstring lists all options."""

    assert isinstance(job, type)
    assert issubclass(job, Job)

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        check_keywords(job, kwargs)
        return job(*args, **kwargs).run()

    describe(run, job)
    return run


def check_keywords(job: type[Job], given: Mapping[str, Any]) -> None:
    """Raise TypeError, as Python does, for unknown keywords."""
    known = [field.name for field in options(job)]
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"{job.name}() got an unexpected keyword argument {name!r}{hint}")


def describe(run: Callable[..., Any], job: type[Job], **defaults: Any) -> None:
    """Give a function the name, signature and docstring of the job that it runs; `defaults` replace its defaults."""
    run.__name__ = run.__qualname__ = job.name
    run.__module__ = "mqa_hf"
    run.__doc__ = documentation(job)
    parameters = []
    for parameter in inspect.signature(job).parameters.values():
        kind = get_args(parameter.annotation)[0]
        parameters.append(
            parameter.replace(
                annotation=getattr(kind, "__forward_arg__", kind),
                default=defaults.get(parameter.name, parameter.default),
            )
        )
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]


def summary(job: type[Options]) -> str:
    """The docstring of a class up to its sections."""
    return inspect.cleandoc(job.__doc__ or "").partition("\n\nReturns:")[0].partition("\n\nRaises:")[0]


def documentation(job: type[Options]) -> str:
    """The docstring of a job's function: the docstring of the class plus its arguments."""
    arguments = "\n".join(f"    {field.name}: {field.option.help}" for field in options(job))
    head = summary(job)
    return f"{head}\n\nArgs:\n{arguments}{inspect.cleandoc(job.__doc__ or '').removeprefix(head)}\n"


def as_flags(message: str, cls: type[Options]) -> str:
    """Replace the options of `cls` in a message by their command-line flags."""
    known = {
        field.name: field.option.metavar or field.name.upper() if field.positional else field.flag
        for field in options(cls)
    }
    return re.sub(r"`(\w+)`", lambda m: known.get(m.group(1), m.group(0)), message)
