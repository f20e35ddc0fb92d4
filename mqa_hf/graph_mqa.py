"""A step over static buffers, captured in a CUDA graph and replayed."""

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)


class StepGraph:
    """Runs a step: the first time eagerly, as a warm-up, later by replaying a graph.

    Args:
        enabled: whether to capture a graph; otherwise every step runs eagerly.

    Attributes:
        captured: the graph, once captured.
        warm: whether a step has run.
    """

    def __init__(self, enabled: bool):
        self.enabled = enabled
        self.warm = False
        self.captured: torch.cuda.CUDAGraph | None = None

    def __call__(self, run: Callable[[], None]) -> None:
        """Run a step. It must be the same at each call unless [`StepGraph.forget`] was called in between."""
        first, self.warm = not self.warm, True
        if first and self.enabled:
            return self.watch(run)
        if first or not (self.enabled and self.ready(run)):
            return run()
        assert self.captured is not None
        self.captured.replay()

    def forget(self) -> None:
        """Capture again at the next step, because a buffer was replaced."""
        self.captured = None

    def ready(self, run: Callable[[], None]) -> bool:
        """Capture a graph if there is none; return whether there is one to replay."""
        if self.captured is not None:
            return True
        graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
        gc.disable()  # collecting another graph would break the capture
        try:
            with own_workspaces(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                run()
        except RuntimeError as error:
            torch.cuda.synchronize()
            logger.warning_once(f"decoding runs without a CUDA graph: capture failed: {error}")
            self.enabled = False
            return False
        finally:
            if collects:
                gc.enable()
        self.captured = graph
        return True

    def watch(self, run: Callable[[], None]) -> None:
        """Run the step once eagerly; disable capture if something in it waits for the device."""
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        waits = [str(w.message) for w in caught if "called a synchronizing" in str(w.message)]
        if waits:
            self.enabled = False
            logger.warning_once(f"decoding runs without a CUDA graph: a step waits for the device: {waits[0]}")


@contextmanager
def own_workspaces() -> Iterator[None]:
    """Make cuBLAS allocate a new workspace, owned by the graph being captured.

    PyTorch keeps one workspace per stream. A graph captured with an older workspace, for example from the memory of an
    earlier graph, reads freed memory once that graph is gone and something clears the workspaces, as torch.compile
    does when it captures graphs itself (`clear_cublas_manager` in torch/_inductor/cudagraph_trees.py).
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()
