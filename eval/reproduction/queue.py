"""Chains of commands on all GPUs of a machine, several at a time on each, for a while.

Each chain is a process of its own that works through its steps. Whatever is interrupted goes on when the same
command is given again: a step whose result is there is not run again, a training goes on from its last checkpoint.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from .experiments import Chain

POLL = 0.5  # seconds
STOP = 30.0  # seconds that a chain has to stop in


@dataclass
class Running:
    chain: Chain
    slot: int
    process: subprocess.Popen
    begun: float


def slots_of(per_device: int) -> list[str | None]:
    """The GPU of each place where a chain can run; `None` on a CPU."""
    count = torch.cuda.device_count()
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    gpus: list[str | None] = list(visible or map(str, range(count))) if count else [None]
    return gpus * per_device


def run_chains(
    chains: Sequence[Chain], command: Sequence[str], work: Path, per_device: int, limit: float
) -> tuple[int, list[str]]:
    """Run chains until all are done or the time is up.

    Args:
        chains: in the order in which they begin where they can.
        command: words that run a chain when its name follows them.
        work: directory of the chains' directories.
        per_device: chains at once on a GPU.
        limit: seconds after which all are stopped.

    Returns:
        How many chains are not done, and the names of those that failed.
    """
    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    slots = slots_of(per_device)
    free = list(range(len(slots)))
    done = {chain.name for chain in chains if chain.done}
    waiting = [chain for chain in chains if chain.name not in done]
    console.print(f"{len(done)} of {len(chains)} chains are done; {len(slots)} at a time")
    running: list[Running] = []
    failed: list[str] = []
    begun = time.monotonic()
    try:
        while (waiting or running) and time.monotonic() - begun < limit:
            for chain in [c for c in waiting if set(c.needs) <= done][: len(free)]:
                waiting.remove(chain)
                slot = free.pop(0)
                running.append(Running(chain, slot, start(chain, command, work, slots[slot]), time.monotonic()))
            if not running:
                break  # what is left needs what has failed
            time.sleep(POLL)
            for job in [r for r in running if r.process.poll() is not None]:
                running.remove(job)
                free.append(job.slot)
                name, seconds = job.chain.name, time.monotonic() - job.begun
                if job.process.returncode == 0:
                    done.add(name)
                    console.print(f"{len(done)}/{len(chains)}  {name}  {seconds:.0f} s")
                    continue
                failed.append(name)
                log = (work / name / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
                console.print(f"failed  {name}  {seconds:.0f} s\n  " + "\n  ".join(log[-3:]))
    finally:
        stop([r.process for r in running])
    return len(chains) - len(done), failed


def start(chain: Chain, command: Sequence[str], work: Path, gpu: str | None) -> subprocess.Popen:
    place = work / chain.name
    place.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    with (place / "log.txt").open("a", encoding="utf-8") as log:
        return subprocess.Popen(
            [sys.executable, "-m", *command, chain.name],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that workers that read data stop with it
        )


def stop(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        process.terminate()
    end = time.monotonic() + STOP
    for process in processes:
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
