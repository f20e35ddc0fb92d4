"""Operations on small matrices of labelled rows: q, k and v rows say where they come from."""

import pytest
import torch

from mqa_hf import MQAConfig
from mqa_hf.conversion.matching import template
from mqa_hf.conversion.operations import (
    AddOne,
    Copy,
    DeinterleaveRotary,
    DropRows,
    SplitCodeGen,
    SplitGateUp,
    SplitGrouped,
    SplitStacked,
    Transpose,
)

# Two heads of width 2. A row is [100·(query 1, key 2, value 3) + 10·head + component].
QUERY, KEY, VALUE = ([[100 * part + 10 * head + i] for head in (1, 2) for i in (0, 1)] for part in (1, 2, 3))


def config(**fields):
    return MQAConfig(hidden_size=4, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=1, **fields)


def test_stacked_rows():
    fused = torch.tensor(QUERY + KEY + VALUE)
    parts = SplitStacked().to_canonical(fused, config())
    assert [part.tolist() for part in parts] == [QUERY, KEY, VALUE]
    parts = SplitStacked(transposed=True).to_canonical(fused.t(), config())
    assert [part.tolist() for part in parts] == [QUERY, KEY, VALUE]


def test_per_head_rows():
    fused = torch.tensor(
        [
            *([110], [111]),  # query of the first head
            *([210], [211]),  # key
            *([310], [311]),  # value
            *([120], [121]),  # query of the second head
            *([220], [221]),
            *([320], [321]),
        ]
    )
    assert [part.tolist() for part in SplitGrouped().to_canonical(fused, config())] == [QUERY, KEY, VALUE]


def test_grouped_rows():
    four = MQAConfig(hidden_size=4, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1)
    fused = torch.tensor(
        [
            *([111], [112]),  # the two queries of the first K/V head
            [210],  # its key
            [310],  # its value
            *([121], [122]),  # the two queries of the second
            [220],
            [320],
        ]
    )
    query, key, value = SplitGrouped().to_canonical(fused, four)
    assert query.flatten().tolist() == [111, 112, 121, 122]
    assert key.flatten().tolist() == [210, 220]
    assert value.flatten().tolist() == [310, 320]
    torch.testing.assert_close(SplitGrouped().from_canonical((query, key, value), four), fused)


def test_rows_around_one_shared_head_are_stacked():
    one = MQAConfig(hidden_size=4, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1)
    parts = SplitGrouped().to_canonical(torch.tensor(QUERY + KEY[:2] + VALUE[:2]), one)
    assert [part.tolist() for part in parts] == [QUERY, KEY[:2], VALUE[:2]]


def test_rows_of_codegen():
    eight = MQAConfig(hidden_size=32, num_attention_heads=8, num_key_value_heads=8, num_hidden_layers=1)
    fused = torch.tensor(
        [
            100 * part + 10 * head + i
            for core in range(4)
            for part in (1, 3, 2)  # query, value, key
            for head in (2 * core, 2 * core + 1)
            for i in range(4)
        ]
    )
    query, key, value = SplitCodeGen().to_canonical(fused, eight)
    # Rotary pairs (0, 1), (2, 3) become (0, 2), (1, 3).
    assert query.tolist() == [100 + 10 * head + i for head in range(8) for i in (0, 2, 1, 3)]
    assert key.tolist() == [200 + 10 * head + i for head in range(8) for i in (0, 2, 1, 3)]
    assert value.tolist() == [300 + 10 * head + i for head in range(8) for i in range(4)]
    torch.testing.assert_close(SplitCodeGen().from_canonical((query, key, value), eight), fused)


def test_gate_and_up_rows():
    gate, up = SplitGateUp().to_canonical(torch.tensor([[11], [12], [21], [22]]), config())
    assert (gate.tolist(), up.tolist()) == ([[11], [12]], [[21], [22]])


def test_norms_of_one_plus_weight():
    (weight,) = AddOne().to_canonical(torch.tensor([0.5, -0.25]), config())
    assert weight.tolist() == [1.5, 0.75]


def test_interleaved_rotary_rows():
    eight = MQAConfig(
        hidden_size=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        rope_parameters={"rope_type": "default", "rope_theta": 1.0, "partial_rotary_factor": 0.75},
    )
    rows = torch.arange(16)[:, None]
    (half_split,) = DeinterleaveRotary().to_canonical(rows, eight)
    assert half_split[:8, 0].tolist() == [0, 2, 4, 1, 3, 5, 6, 7]
    assert half_split[8:, 0].tolist() == [8, 10, 12, 9, 11, 13, 14, 15]


@pytest.mark.parametrize(
    ("operation", "shape"),
    [
        (Copy(), (5, 3)),
        (Transpose(), (5, 3)),
        (SplitStacked(), (12, 3)),
        (SplitStacked(), (12,)),
        (SplitStacked(transposed=True), (3, 12)),
        (SplitGrouped(), (12, 3)),
        (SplitGrouped(), (12,)),
        (SplitGateUp(), (10, 3)),
        (AddOne(), (5,)),
        (DeinterleaveRotary(), (4, 3)),
    ],
    ids=str,
)
def test_there_and_back(operation, shape):
    tensor = torch.randn(shape)
    torch.testing.assert_close(operation.from_canonical(operation.to_canonical(tensor, config()), config()), tensor)


def test_missing_biases_come_back_as_zeros():
    query, value = torch.ones(4), torch.full((4,), 3.0)
    fused = SplitStacked().from_canonical((query, None, value), config())
    assert fused.tolist() == [1.0] * 4 + [0.0] * 4 + [3.0] * 4


def test_dropped_rows_come_back_as_zeros():
    (kept,) = DropRows(2).to_canonical(torch.tensor([[1], [2], [3], [4]]), config())
    assert kept.tolist() == [[3], [4]]
    assert DropRows(2).from_canonical((kept,), config()).tolist() == [[0], [0], [3], [4]]


def test_templates():
    assert template("h.3.attn.c_attn.weight") == ("h.{}.attn.c_attn.weight", 3)
    assert template("layers.12.mlp.fc1.bias") == ("layers.{}.mlp.fc1.bias", 12)
    assert template("model.embed_tokens.weight") == ("model.embed_tokens.weight", None)
    assert template("ln_1.weight") == ("ln_1.weight", None)
