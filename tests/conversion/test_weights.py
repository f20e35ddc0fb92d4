"""Weights that are not what they should be: missing, without a place, of another shape, no numbers, too large."""

import json
from pathlib import Path

import pytest
import torch
from native_sources import make_native
from safetensors.torch import load_file, save_file
from sources import GPT, LLAMA, make_model, save
from tokenizer import write_tokenizer

from mqa_hf import convert
from mqa_hf.base.errors import ConversionWarning, MQAError
from mqa_hf.conversion.checkpoint import count_nonfinite
from mqa_hf.conversion.convert import Conversion
from mqa_hf.conversion.loading import load_model
from mqa_hf.conversion.pooling import relative
from mqa_hf.eval.evaluate import evaluate
from mqa_hf.finetune.uptrain import uptrain

KEY, UP = "model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.up_proj.weight"


def change(directory: Path, change) -> Path:
    """Change the tensors of a checkpoint in place."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def lose(tensors):
    del tensors[UP]


def add(tensors):
    tensors["model.layers.1.mlp.side_proj.weight"] = torch.ones(2)


def widen(tensors):
    tensors[UP] = torch.ones(81, 48)


def spoil(tensors):
    tensors[UP][3, 4] = float("nan")


DAMAGES = {
    lose: rf"missing: {UP}",
    add: r"not in this configuration: model\.layers\.1\.mlp\.side_proj\.weight",
    widen: rf"a different shape: {UP} \[81, 48\] instead of \[80, 48\]",
    spoil: rf"NaN or infinity: {UP} \(1 of 3,840",
}


@pytest.fixture
def places(tmp_path):
    """A source with a tokenizer, its conversion, and text."""
    source = save(make_model("llama", LLAMA), tmp_path / "source")
    write_tokenizer(source)
    convert(source, tmp_path / "ours")
    rows = "".join(json.dumps({"text": f"hello world {i} this is some text. " * 5}) + "\n" for i in range(60))
    (tmp_path / "text.jsonl").write_text(rows)
    return tmp_path


@pytest.mark.parametrize(("damage", "message"), DAMAGES.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_a_model_is_not_loaded_from_other_weights_than_its_own(damage, message, places):
    load_model(places / "ours")
    with pytest.raises(MQAError, match=message):
        load_model(change(places / "ours", damage))


def trained(places: Path) -> None:
    given = {"dataset": str(places / "text.jsonl"), "teacher": str(places / "source"), "report_to": "none"}
    uptrain(places / "ours", places / "trained", **given, tokens=128, sequence_length=16, batch_tokens=128)


def measured(places: Path) -> None:
    asked = {"text": str(places / "text.jsonl"), "tokens": 64, "window": 32, "prompts": 0}
    evaluate(places / "source", [places / "ours"], output=places / "evaluation", **asked)


@pytest.mark.parametrize("job", [trained, measured])
@pytest.mark.parametrize("which", ["source", "ours"])
def test_training_and_evaluation_refuse_a_student_a_teacher_and_an_original_that_lack_a_tensor(job, which, places):
    change(places / which, lose)
    with pytest.raises(MQAError, match=rf"missing.*{UP}"):
        job(places)
    assert not (places / "trained").exists()


def test_masks_in_old_files_are_known_and_do_no_harm(tmp_path):
    source = save(make_model("gpt2", GPT), tmp_path / "source")
    change(source, lambda tensors: tensors.update({"transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64)}))
    load_model(source)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("options", [{}, {"method": "first"}, {"method": "shared"}, {"kv_heads": 6}], ids=str)
def test_weights_that_are_no_numbers_are_refused_by_name(value, options, places):
    def spoil(tensors):
        tensors[KEY][45, 2] = value  # not in the first head

    change(places / "source", spoil)
    with pytest.raises(MQAError, match=rf"1 of the 2,304 entries of {KEY} in model.safetensors are NaN"):
        convert(places / "source", places / "other", calibration=None, **options)
    assert not (places / "other").exists()


def test_weights_that_are_no_numbers_are_refused_in_their_own_class_too(tmp_path):
    source = save(make_native("falcon_h1"), tmp_path / "source")
    change(source, lambda tensors: tensors["model.final_layernorm.weight"].fill_(float("inf")))
    with pytest.raises(MQAError, match=r"model\.final_layernorm\.weight"):
        convert(source, tmp_path / "native", target="native")


def test_norms_of_single_heads_are_read_as_one_only_if_there_is_one_for_each_head(tmp_path):
    fields = {**LLAMA, "qk_layernorm": True}
    source = save(make_model("stablelm", fields), tmp_path / "source")
    norms = [f"model.layers.1.self_attn.k_layernorm.norms.{i}.weight" for i in range(6)]
    written = load_file(source / "model.safetensors")
    convert(source, tmp_path / "ours", kv_heads=6)
    read = load_file(tmp_path / "ours" / "model.safetensors")["model.layers.1.self_attn.k_norm.weight"]
    assert torch.equal(read, torch.stack([written[name] for name in norms]))
    convert(source, tmp_path / "random", method="random")
    assert torch.equal(
        load_file(tmp_path / "random" / "model.safetensors")["model.layers.1.self_attn.k_norm.weight"],
        torch.ones(1, 8),
    )
    assert Conversion(source, tmp_path / "dry").dry_run()["source_files"] == 1
    change(source, lambda tensors: tensors[norms[2]].fill_(float("nan")))
    with pytest.warns(ConversionWarning, match="8 entries of 1 tensors are NaN"):
        report = convert(source, tmp_path / "nan", allow_nonfinite=True)
    assert report.nonfinite.read == {norms[2]: 8}
    change(source, lambda tensors: tensors.pop(norms[2]))
    with pytest.raises(MQAError, match=r"tensors missing: model\.layers\.1\.self_attn\.k_layernorm\.norms\.2\.weight"):
        convert(source, tmp_path / "gap")
    change(source, lambda tensors: [tensors.pop(norms[i]) for i in (3, 4, 5)])
    with pytest.raises(MQAError, match=r"norms\.weight has the shape \[2, 8\], which does not fit .* \[6, 8\]"):
        convert(source, tmp_path / "few")


def test_experts_are_joined_whatever_their_types_and_missing_ones_are_named(tmp_path):
    fields = {**LLAMA, "num_key_value_heads": 3, "num_local_experts": 5, "num_experts_per_tok": 2}
    source = save(make_model("mixtral", fields), tmp_path / "source")
    place = "model.layers.1.block_sparse_moe.experts"
    written = load_file(source / "model.safetensors")
    change(source, lambda tensors: tensors.update({f"{place}.3.w3.weight": written[f"{place}.3.w3.weight"].half()}))
    convert(source, tmp_path / "mixed", kv_heads=3)
    read = load_file(tmp_path / "mixed" / "model.safetensors")["model.layers.1.mlp.experts.gate_up_proj"]
    gates, inputs = (torch.stack([written[f"{place}.{e}.{name}.weight"] for e in range(5)]) for name in ("w1", "w3"))
    inputs[3] = inputs[3].half().float()
    assert torch.equal(read, torch.cat((gates, inputs), 1))
    for name, other, said in (
        (f"{place}.1.w3.weight", None, rf"tensors missing: {place}\.1\.w3\.weight$"),
        (f"{place}.0.w2.weight", torch.ones(3), "not in this configuration"),
        (f"{place}.0.w2.weight", torch.ones(()), "not in this configuration"),
        (f"{place}.99999999.w2.weight", torch.ones(48, 80), r"tensors missing: .*experts\.5\.w2\.weight"),
        (f"{place}.down_proj", torch.ones(5, 48, 80), "not in this configuration"),
    ):
        save_file({**written, name: other} if other is not None else {n: t for n, t in written.items() if n != name},
                  source / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
        with pytest.raises(MQAError, match=said):
            convert(source, tmp_path / "damaged")


def test_weights_that_are_no_numbers_can_be_converted_and_are_counted(places):
    change(places / "source", lambda tensors: tensors[KEY][:2].fill_(float("nan")))
    with pytest.warns(ConversionWarning, match="96 entries of 1 tensors are NaN or infinite"):
        report = convert(places / "source", places / "other", allow_nonfinite=True)
    assert report.nonfinite.model_dump() == {"read": {KEY: 96}, "written": {KEY: 96}}
    assert report.layers[0].key_error is None
    assert report.layers[0].value_error > 0
    assert "--allow-nonfinite" in report.command
    text = (places / "other" / "conversion.json").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == report.model_dump(mode="json")
    with pytest.raises(MQAError, match="nothing can be fitted to NaN"):
        convert(places / "source", places / "fitted", method="shared", allow_nonfinite=True)


def test_numbers_that_the_dtype_cannot_hold_are_refused_by_name(places):
    change(places / "source", lambda tensors: tensors[UP][0].fill_(70000.0))
    with pytest.raises(MQAError, match=rf"48 of the 3,840 entries of {UP} .*float16 \(up to 7e\+04.*bfloat16"):
        convert(places / "source", places / "other", dtype="float16")
    assert not (places / "other").exists()
    convert(places / "source", places / "other", dtype="bfloat16")
    with pytest.raises(MQAError, match=rf"NaN or infinity: {UP} \(48 of 3,840, as torch.float16"):
        load_model(places / "other", dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_entries_that_are_no_numbers_are_counted(dtype):
    tensor = torch.ones(7, 5, dtype=dtype)
    assert count_nonfinite(tensor) == count_nonfinite(tensor[:0]) == 0
    tensor[0, 1], tensor[2, 2], tensor[6, 4] = float("nan"), float("inf"), -float("inf")
    assert count_nonfinite(tensor) == 3
    assert count_nonfinite(torch.ones(3, dtype=torch.int64)) == 0


def test_an_error_that_is_no_number_is_not_written_as_none_at_all():
    assert relative(0.0, 0.0) == 0.0
    assert relative(1.0, 2.0) == 0.5
    assert relative(float("nan"), 1.0) is relative(1.0, float("inf")) is None


def test_an_adapter_beside_the_weights_is_refused_by_all(places):
    (places / "source" / "adapter_config.json").write_text("{}")
    for job in (
        lambda: convert(places / "source", places / "other"),
        lambda: trained(places),
        lambda: measured(places),
    ):
        with pytest.raises(MQAError, match=r"PEFT adapter beside the weights.*merge it first"):
            job()
