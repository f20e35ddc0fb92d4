"""Run jobs in order, each once: finished steps are skipped, unfinished ones resume.

A record file beside the results lists the finished steps with the words of their commands. Paths under its directory
are relative to it, so that the whole can be moved.
"""

import json
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .console import NORMAL, say, stderr, verbosity
from .errors import MQAError
from .files import read_json, write_whole
from .options import Job

BEGUN = "begun"  # key of started steps in the record


@dataclass(frozen=True)
class Step:
    """A job and its result.

    Attributes:
        job: the job. One with a costly result has the option `overwrite`.
        result: the file that exists once it is done.
        needs: steps whose results it reads.
        costly: whether the result takes long to make, so that it is replaced only on request.
    """

    job: Job[Any]
    result: Path
    needs: tuple[str, ...] = ()
    costly: bool = False

    def words(self, record: Path) -> list[str]:
        """The words of its command, which identify it; paths under the record's directory are relative to it."""
        return [word.removeprefix(f"{record.parent}{os.sep}") for word in self.job.words()]

    def run(self, overwrite: bool) -> None:
        """Run the job, and show its result on standard error, because standard output is for that of all steps."""
        job: Any = self.job
        job = replace(job, overwrite=True) if overwrite else job
        result, console = job.run(), stderr()
        console.quiet = verbosity() < NORMAL
        job.show(result, console)


def read_record(record: Path) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The commands of finished and of started steps, by step; none if the record is missing or truncated.

    Raises:
        MQAError: if the file is not a valid record.
    """
    try:
        json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}, {}
    done = read_json(record)
    begun = done.pop(BEGUN, {})
    for steps in (done, begun):
        if not isinstance(steps, dict) or not all(
            isinstance(words, list) and all(isinstance(word, str) for word in words) for words in steps.values()
        ):
            raise MQAError(f"{record} is not a valid list of finished steps; remove it to start over")
    return done, begun


def write_record(record: Path, done: dict[str, list[str]], begun: dict[str, list[str]]) -> None:
    """Write the record; raises MQAError if that fails."""
    try:
        write_whole(record, json.dumps({**done, **({BEGUN: begun} if begun else {})}, indent=2) + "\n")
    except OSError as error:
        raise MQAError(f"{record} cannot be written: {error}") from error


def forget(new: Sequence[Path]) -> None:
    """Remove an empty record and the directories made for it, as far as they are empty.

    Args:
        new: the record and its directories, the innermost first.
    """
    with suppress(OSError):
        new[0].unlink(missing_ok=True)
        for directory in new[1:]:
            directory.rmdir()


def unfinished(steps: Mapping[str, Step], record: Path) -> list[str]:
    """Steps whose results are missing or were made by another job."""
    done, _ = read_record(record)
    return [
        name for name, step in steps.items() if not (step.result.is_file() and done.get(name) == step.words(record))
    ]


def run_steps(
    steps: Mapping[str, Step], record: Path, name: str, overwrite: bool = False, keep_going: bool = False
) -> None:
    """Run jobs whose results are missing, in order, and show each result.

    Args:
        steps: by name.
        record: file beside the results that lists finished steps.
        name: name of the whole, for messages.
        overwrite: rerun a step that has changed and those that need it.
        keep_going: after a failure, run the steps that do not need the failed one, then raise the first error.

    Raises:
        MQAError: if a step has changed and `overwrite` is false; and whatever the jobs raise.
    """
    new = [path for path in (record, *record.parents) if not path.exists()]
    done, begun = read_record(record)
    failed: dict[str, Exception] = {}
    for step, what in steps.items():
        there, words = what.result.is_file(), what.words(record)
        if set(what.needs) & set(failed):
            continue
        # A costly result appears atomically, maybe just before its run was killed.
        if there and words in (done.get(step), begun.get(step)):
            say(f"{step}: already done")
            if step not in done:
                done |= {step: begun.pop(step)}
                write_record(record, done, begun)
            continue
        replaced = there and what.costly
        try:
            if replaced and not overwrite:
                made = f" ({shlex.join(done[step])})" if step in done else ""
                raise MQAError(
                    f"{what.result} was made by another command{made} or from inputs that have changed since; give "
                    f"{name} another output, or pass `overwrite` to rerun this step and those that depend on it"
                )
            if there and not what.costly:
                what.result.unlink()
            stay = {n for n, other in steps.items() if n != step and step not in other.needs}
            done, begun = ({n: kept for n, kept in said.items() if n in stay} for said in (done, begun))
            if what.costly and not there:
                begun[step] = words
            write_record(record, done, begun)
            say(f"{step}: {what.job.command()}")
            start = time.monotonic()
            what.run(replaced)
        except Exception as error:
            if record in new and not done and not what.result.is_file():
                forget(new)
            if not keep_going:
                raise
            stderr().print(f"{step}: {type(error).__name__}: {error}")
            failed[step] = error
            continue
        say(f"{step}: done in {time.monotonic() - start:.0f} s")
        done[step] = words
        begun.pop(step, None)
        write_record(record, done, begun)
    if failed:
        raise next(iter(failed.values()))
