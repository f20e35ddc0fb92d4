"""Run the kernels of latents once at small sizes, for compute-sanitizer on a CUDA device:

compute-sanitizer --tool memcheck python tests/mqa_hf/sanitize_latents.py
"""

import torch
from test_latent_kernels import (
    cached,
    components,
    distance,
    rotation,
    test_queries_and_the_write_to_the_cache,
)

from mqa_hf.kernel_latent_mqa import attend_latent, naive_attend_latent

B, H, S = 2, 8, 300
WAYS = [{}, {"blocks": (64, 16, 4, 2), "splits": 3}, {"splits": 2, "counters": torch.zeros(B * H, dtype=torch.int32)}]


def attend(r: int, bits: int, C: int) -> None:
    """The kernel that this device takes, the one for all devices, and one whose last program merges the others."""
    torch.manual_seed(0)
    dtype, positions = torch.bfloat16, torch.tensor([S - 6, S + 1], device="cuda")
    latents, packed = cached(B, S, r, bits, dtype)
    length = torch.tensor([S - 5], dtype=torch.int32, device="cuda")
    options = {"capacity": S, **packed}
    if C:
        options |= components(C, H, B, r, dtype, rotation(S + 9, 8, torch.float32), positions)
    else:
        options["plain"] = torch.randn(B, H, r, device="cuda", dtype=dtype)
    expected = naive_attend_latent(latents, length, r**-0.5, **options)
    for way in WAYS:
        own = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in way.items()}
        found = attend_latent(latents, length, r**-0.5, **options, **own)
        assert distance(found, expected) < 1e-2, (r, bits, C, way)


if __name__ == "__main__":
    for r in (64, 128, 256):
        for bits in (16, 8, 4):
            for C in (0, 64):
                attend(r, bits, C)
    for seed in range(6):
        test_queries_and_the_write_to_the_cache(seed, torch.bfloat16)
    torch.cuda.synchronize()
    print("done")
