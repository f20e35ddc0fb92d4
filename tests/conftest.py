import os

# Before transformers is imported: tests never reach for the Hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Also for the processes that tests start: several of them with several threads each are ten times as slow.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from transformers.utils import logging

logging.disable_progress_bar()
torch.set_num_threads(1)
# `with torch.device("meta")` remembers the constructors it redirects at its first use: that must see the real one of
# the function that `empty_is_nan` replaces, or "meta" models would be allocated.
with torch.device("meta"):
    torch.empty(1)


def pytest_collection_modifyitems(config, items):
    if not config.getoption("-m"):
        skip_slow = pytest.mark.skip(reason="slow; run with: pytest -m slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip_slow)
    if not torch.cuda.is_available():
        skip_gpu = pytest.mark.skip(reason="needs a CUDA device; run there with: pytest -m gpu")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip_gpu)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def empty_is_nan(monkeypatch):
    """Memory that nothing was written to shows up as NaN instead of passing as zero."""
    plain = torch.empty

    def poisoned(*args, **kwargs):
        tensor = plain(*args, **kwargs)
        if tensor.is_floating_point() and tensor.device.type == "cpu":
            tensor.detach().fill_(float("nan"))
        return tensor

    monkeypatch.setattr(torch, "empty", poisoned)
