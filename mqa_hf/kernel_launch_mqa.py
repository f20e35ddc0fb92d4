"""Launching and compiling Triton kernels, which are optional: where they are missing, a decoding step runs PyTorch
operations instead.

The kernels take lengths from device memory, so that a captured CUDA graph stays valid while a text grows, and
accumulate in float32. With programmatic dependent launch (Hopper and later) a kernel starts loading its weights before
the one it waits for has ended. Beside each kernel stands the same in PyTorch (`naive_...`), in float64.
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
    """Whether the kernels can run on a device (CUDA from compute capability 8.0 on, with Triton)."""
    return triton is not None and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def overlapping(device: torch.device) -> bool:
    """Whether kernels may start before the one they wait for has ended."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def hopper(device: torch.device) -> bool:
    """Whether kernels in Gluon for Hopper can run on a device."""
    return gluon is not None and device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program can have."""
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 99 * 1024)


def power(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length()


_thread = threading.local()  # while it has `collected`, launches of a thread are noted there instead of being made


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a kernel, with programmatic dependent launch where the device has it."""
    early = overlapping(arguments[0].device)
    options = {**options, "PDL": early, **({"launch_pdl": True} if early else {})}
    if getattr(_thread, "collected", None) is not None:
        _thread.collected.append((kernel, grid, arguments, options))
    else:
        kernel[grid](*arguments, **options)


def compile_all(run: Callable[[], object]) -> None:
    """Compile all kernels that `run` would launch, side by side; none is launched."""
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
        getattr(built, "run", None)  # builds what launches it, which is a program in C, too

    distinct = {(id(c[0]), *map(kind, c[2]), *sorted(c[3].items())): c for c in calls}.values()
    with ThreadPoolExecutor() as pool:
        list(pool.map(build, distinct))
