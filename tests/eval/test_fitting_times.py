"""`python -m mqa_hf.eval.fitting_times`: seconds of a fit by phase."""

import pytest

from mqa_hf.base.errors import MQAError
from mqa_hf.eval.fitting_times import PHASES, FittingTiming


@pytest.mark.parametrize(
    ("options", "phases"),
    [
        ({}, {"moments", "heads", "refit"}),
        ({"method": "latent", "latent": 16, "key_width": 64}, {"moments of latents", "latents", "refit"}),
    ],
)
def test_the_phases_of_a_fit(options, phases):
    found = FittingTiming("smollm2-135m", layers=2, tokens=96, sequence_length=32, device="cpu", **options).run()
    assert (found.layers, found.tokens, found.device) == (2, 96, "CPU")
    rest = {"weights to the device", "comparison", "tokens through the layer", "waiting for weights, and the rest"}
    assert set(found.phases) == phases | rest
    assert all(seconds > 0 for seconds in found.phases.values())
    assert abs(sum(found.phases.values()) - found.seconds) < 1e-6
    assert set(found.phases) - rest < set(PHASES)


def test_a_shape_without_layers_is_one_message():
    with pytest.raises(MQAError, match="gpt2 does not say its layers"):
        FittingTiming("gpt2", device="cpu").run()
