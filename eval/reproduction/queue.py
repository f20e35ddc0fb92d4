"""Chains of commands on all GPUs of a machine, several at a time on each, for a while.

Each chain is a separate process that works through its steps. To continue after an interruption, run the same command
again: finished steps are not repeated, and a training continues from its last checkpoint.
"""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from .experiments import Chain

POLL = 0.5  # seconds
STOP = 30.0  # seconds that a chain has for stopping
THREADS = ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")


@dataclass
class Running:
    """A chain's process on a GPU (`None`: on the CPU); its output is in `log` from `start` on."""

    chain: Chain
    gpu: str | None
    process: subprocess.Popen
    begun: float
    log: Path
    start: int


def gpus() -> list[str | None]:
    """Names of the GPUs as in CUDA_VISIBLE_DEVICES; `None` for the CPU if there are none."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return [*(visible or map(str, range(torch.cuda.device_count())))][: torch.cuda.device_count()] or [None]


def run_chains(
    chains: Sequence[Chain], command: Sequence[str], per_device: int, deadline: float, done: set[str]
) -> tuple[list[str], list[str]]:
    """Run chains until all are done or the time is up.

    Args:
        chains: in the order in which to start them.
        command: words that run a chain when followed by its name.
        per_device: chains at once per GPU.
        deadline: `time.monotonic` at which all are stopped.
        done: names of finished chains, in `chains` or not.

    Returns:
        Names of the unfinished chains, and of those that failed.
    """
    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    places = Counter(dict.fromkeys(gpus(), per_device))
    threads = max(1, (os.cpu_count() or 1) // places.total())
    waiting = [chain for chain in chains if chain.name not in done]
    console.print(f"{len(chains) - len(waiting)} of {len(chains)} chains are done; {places.total()} at a time")
    running: list[Running] = []
    failed: list[str] = []

    def reap() -> None:
        for job in [r for r in running if r.process.poll() is not None]:
            running.remove(job)
            name, seconds = job.chain.name, time.monotonic() - job.begun
            if job.chain.done:
                done.add(name)
                console.print(
                    f"{len(chains) - len(waiting) - len(running) - len(failed)}/{len(chains)}  {name}  {seconds:.0f} s"
                )
            elif job.process.returncode not in (-signal.SIGTERM, 128 + signal.SIGTERM):
                failed.append(name)
                said = job.log.read_bytes()[job.start :].decode(errors="replace").strip().splitlines()
                lines = "\n  ".join(said[-3:])
                console.print(f"failed ({job.process.returncode})  {name}  {seconds:.0f} s\n  {lines}")

    try:
        while (waiting or running) and time.monotonic() < deadline:
            for chain in [c for c in waiting if set(c.needs) <= done]:
                here = Counter(r.gpu for r in running)
                gpu = min(places, key=lambda g: here[g])
                if here[gpu] == per_device:
                    break
                waiting.remove(chain)
                running.append(start(chain, command, gpu, threads))
            if not running:
                break  # the rest needs unfinished chains
            time.sleep(POLL)
            reap()
    finally:
        stop([r.process for r in running])
        reap()
    return [chain.name for chain in chains if chain.name not in done], failed


def start(chain: Chain, command: Sequence[str], gpu: str | None, threads: int) -> Running:
    """Start the process of a chain; its output goes to `log.txt` in its directory."""
    chain.place.mkdir(parents=True, exist_ok=True)
    environment = {**dict.fromkeys(THREADS, str(threads)), **os.environ}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    log = chain.place / "log.txt"
    with log.open("ab") as file:
        begin = file.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", *command, chain.name],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that data workers stop with it
        )
    return Running(chain, gpu, process, time.monotonic(), log, begin)


def stop(processes: Sequence[subprocess.Popen]) -> None:
    """Let processes clean up, and kill those that take too long, with their children."""
    for process in processes:
        process.terminate()
    end = time.monotonic() + STOP
    for process in processes:
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
