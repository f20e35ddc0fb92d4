"""Launch and compile Triton kernels. They are optional: without them, a decode step runs PyTorch operations.

The kernels read lengths from device memory, so that a captured CUDA graph stays valid while a text grows, and
accumulate in float32. With programmatic dependent launch (Hopper and later), a kernel starts loading its weights
before the previous one has ended. Each kernel has a reference in PyTorch (`naive_...`), in float64.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:
    triton = gdc_launch_dependents = gdc_wait = None
    tl: Any = SimpleNamespace(constexpr=None)  # type: ignore[no-redef]

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.ampere import async_copy
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
except ImportError:
    gluon = async_copy = fence_async_shared = mbarrier = warpgroup_mma = warpgroup_mma_wait = None
    gl: Any = SimpleNamespace(constexpr=None)  # type: ignore[no-redef]

jit: Any = triton.jit if triton is not None else lambda function: function
gluon_jit: Any = gluon.jit if gluon is not None else lambda function: function


def available(device: torch.device) -> bool:
    """Whether the kernels can run on a device (CUDA with compute capability 8.0 or higher, and Triton)."""
    return triton is not None and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def overlapping(device: torch.device) -> bool:
    """Whether kernels may start before the previous one has ended."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def hopper(device: torch.device) -> bool:
    """Whether the Gluon kernels for Hopper can run on a device. They need Triton 3.6, which PyTorch 2.11 ships with,
    because Gluon changes with every version.
    """
    known = gluon is not None and triton.__version__.startswith("3.6.")
    return known and device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory available to a program."""
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 99 * 1024)


def power(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length()


_thread = threading.local()  # while it has `collected`, launches are recorded there instead of run


def collecting() -> bool:
    """Whether launches are only recorded, by [`compile_all`]."""
    return getattr(_thread, "collected", None) is not None


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a kernel, with programmatic dependent launch if the device supports it."""
    early = overlapping(arguments[0].device)
    options = {**options, "PDL": early, **({"launch_pdl": True} if early else {})}
    if collecting():
        _thread.collected.append((kernel, grid, arguments, options))
    else:
        kernel[grid](*arguments, **options)


def compile_all(run: Callable[[], object]) -> None:
    """Compile in parallel all kernels that `run` would launch, without launching them."""
    calls: list[tuple] = []
    _thread.collected = calls
    try:
        run()
    finally:
        _thread.collected = None

    def kind(value: torch.Tensor | float) -> tuple:
        if isinstance(value, torch.Tensor):
            return value.dtype, value.data_ptr() % 16 == 0
        return value % 16 == 0, value == 1 if isinstance(value, int) else type(value)

    def build(call: tuple) -> None:
        kernel, grid, arguments, options = call
        torch.cuda.set_device(arguments[0].device)  # of this thread
        built = kernel.warmup(*arguments, grid=grid, **options)
        getattr(built, "run", None)  # also builds the launcher, which is compiled from C

    distinct = {(id(c[0]), *map(kind, c[2]), *sorted(c[3].items())): c for c in calls}.values()
    with ThreadPoolExecutor() as pool:
        list(pool.map(build, distinct))
