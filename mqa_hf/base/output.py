"""Write the output directory beside its place and move it there once it is complete.

While an output NAME is written, these are beside it:

.NAME.lock          held by the process that writes, for as long as it lives
.NAME.partial-*     what is written; in the end what was replaced, until it is removed
.NAME.old-*         where two names cannot be swapped at once: what is being replaced, whole

A killed process leaves them behind without the lock. The next process for the same output then restores what was being
replaced and removes the rest.
"""

import ctypes
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from .console import say
from .errors import MQAError, listing
from .files import REPORT_FILE

try:
    import fcntl
except ImportError:  # not available on this system
    fcntl = None  # type: ignore[assignment]


def resolve_output(
    output: str | os.PathLike, source: Path | None, overwrite: bool, mark: str = REPORT_FILE, recover: bool = True
) -> Path:
    """Resolve the path of the output and clear what a killed process left there.

    Args:
        output: directory to write.
        source: directory that is read, if any.
        overwrite: whether an existing output may be replaced.
        mark: file that an existing output must contain to be replaced.
        recover: whether to clear the leftovers of a killed process.

    Raises:
        MQAError: if writing there would lose data or is impossible.
    """
    try:
        here, there = Path(output).resolve(), None if source is None else source.resolve()
        if here == there:
            raise MQAError(f"source and output are the same directory: {here}")
        if there is not None and (here in there.parents or there in here.parents):
            raise MQAError(f"source {there} and output {here} must not contain each other")
        if here in (Path.cwd(), *Path.cwd().parents):
            raise MQAError(f"the working directory is {here} or is inside it; give another output")
        if here.is_mount():
            raise MQAError(f"{here} is a mount point, which cannot be replaced; give a directory in it")
        if recover and _left_over(here):
            with suppress(BlockingIOError), _locked(here) as alone:
                if alone:
                    _recover(here)
        _check_free(here, overwrite, mark)
    except MQAError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # the latter two for loops of links and impossible names
        raise MQAError(f"cannot write {str(output)!r}: {error}") from error
    return here


def _check_free(output: Path, overwrite: bool, mark: str) -> None:
    if not output.exists():
        return
    if not output.is_dir():
        raise MQAError(f"{output} is a file; give a directory to write")
    if any(output.iterdir()):
        if not overwrite:
            raise MQAError(f"{output} exists and is not empty; pass `overwrite` to replace it")
        if not (output / mark).is_file():
            raise MQAError(
                f"{output} was not written by a {Path(mark).stem} (no {mark}), so `overwrite` does not replace it; "
                "remove it first, or give another output"
            )


@contextmanager
def written_beside(output: Path, size: int, overwrite: bool, mark: str = REPORT_FILE) -> Iterator[Path]:
    """A directory beside `output` that is renamed to it at the end, or removed on errors.

    Args:
        output: as [`resolve_output`] gives it; `overwrite` and `mark` as there.
        size: its size in bytes.

    Raises:
        MQAError: if the disk is too small or not writable, or another process writes the same output.
    """
    new_parents = [parent for parent in output.parents if not parent.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with _locked(output) as alone:
            if alone:
                _recover(output)
            free = shutil.disk_usage(output.parent).free
            if free < size:
                raise MQAError(f"the result needs {size:,} bytes, but {output.parent} has {free:,} free")
            partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
            try:
                partial.chmod(0o777 & ~_umask())
                yield partial
                _check_free(output, overwrite, mark)  # again, as a conversion takes a while
                _take_place(partial, output)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except BlockingIOError as error:
        raise MQAError(f"another process is writing {output}; wait for it, end it, or give another output") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MQAError(f"no space left for {size:,} bytes beside {output}; nothing was kept") from error
        raise MQAError(f"{output} was not written: {error}") from error
    finally:
        for parent in new_parents:
            with suppress(OSError):  # not empty, if all went well
                parent.rmdir()


@contextmanager
def _locked(output: Path) -> Iterator[bool]:
    """Hold the lock of the output; yields false if the file system has no locks.

    Raises:
        BlockingIOError: if another process holds it.
    """
    path = output.with_name(f".{output.name}.lock")
    while True:
        with path.open("a") as file:
            alone = fcntl is not None
            if alone:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise
                except OSError:
                    alone = False
            if alone and not _stands(path, file):  # the previous holder has just removed the file
                continue
            try:
                yield alone
            finally:
                with suppress(OSError):  # some systems cannot unlink open files
                    path.unlink()
            return


def _stands(path: Path, file: IO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _left_over(output: Path) -> list[Path]:
    """Temporary directories of processes that write or wrote `output`."""
    name = re.compile(rf"\.{re.escape(output.name)}\.(partial|old)-\w{{8}}")
    return sorted(path for path in output.parent.glob(".*") if name.fullmatch(path.name))


def _recover(output: Path) -> None:
    """Restore what a killed process was replacing and remove its leftovers. Needs the lock."""
    left, done = _left_over(output), []
    old = [path for path in left if path.name.startswith(f".{output.name}.old-")]
    if old and not output.exists():
        last = max(old, key=lambda path: path.stat().st_mtime)
        last.replace(output)
        left.remove(last)
        done.append("restored the previous content")
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    removed = [path.name for path in left if not path.exists()]
    if removed:
        done.append(f"removed {listing(removed)}")
    if done:
        say(f"{output}: an earlier run was killed; {', '.join(done)}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _take_place(partial: Path, output: Path) -> None:
    """Rename `partial` to `output`; swap them if `output` is a directory with content."""
    if not output.exists() or not any(output.iterdir()):
        partial.replace(output)  # fails if content has appeared meanwhile
        return
    if _swap(partial, output):
        return
    old = partial.with_name(partial.name.replace(".partial-", ".old-"))
    try:
        output.replace(old)
        partial.replace(output)
    except BaseException:
        if old.exists() and not output.exists():
            old.replace(output)
        raise
    old.replace(partial)  # `old` names may be restored; this one must be removed


def _swap(one: Path, other: Path) -> bool:
    """Swap two names atomically; returns false if the system or file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or a C library older than glibc 2.28
        return False
    at_working_directory, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    places = at_working_directory, os.fsencode(one), at_working_directory, os.fsencode(other)
    return renameat2(*places, exchange) == 0
