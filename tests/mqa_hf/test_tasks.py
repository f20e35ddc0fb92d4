"""Classes for classification and for spans of answers, and the default targets of adapters."""

import pytest
import torch
from isolated import run_without_the_package
from sources import LLAMA, batch, make_model, save
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from mqa_hf import MQAConfig, MQAForCausalLM, convert

CLASSES = {
    "sequence": AutoModelForSequenceClassification,
    "token": AutoModelForTokenClassification,
    "answer": AutoModelForQuestionAnswering,
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tasks")
    source = save(make_model("llama", {**LLAMA, "pad_token_id": 0}), directory / "source")
    convert(source, directory / "ours", kv_heads=6)
    return source, directory / "ours"


@pytest.mark.parametrize("task", CLASSES)
def test_it_computes_what_the_class_of_the_source_does(task, converted):
    theirs, ours = (CLASSES[task].from_pretrained(path, num_labels=3).eval() for path in converted)
    assert type(ours).__module__ == "mqa_hf.modeling_mqa"
    if task == "answer":  # whose class names its stack otherwise, and loads nothing from this file
        theirs.transformer.load_state_dict(AutoModel.from_pretrained(converted[0]).state_dict())
    heads = [name for name, _ in ours.named_parameters() if not name.startswith("model.")]
    assert heads == [name for name, _ in theirs.named_parameters() if not name.startswith(("model.", "transformer."))]
    for name in heads:
        ours.get_parameter(name).data.normal_(generator=torch.Generator().manual_seed(1))
        theirs.get_parameter(name).data.copy_(ours.get_parameter(name))
    ids, mask = batch()
    ids = ids.masked_fill(mask == 0, 0)
    labels = {
        "sequence": {"labels": torch.tensor([0, 2, 1])},
        "token": {"labels": torch.randint(0, 3, ids.shape)},
        "answer": {"start_positions": torch.tensor([1, 7, 6]), "end_positions": torch.tensor([3, 9, 9])},
    }[task]
    found, expected = (model(ids, attention_mask=mask, **labels) for model in (ours, theirs))
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-4, atol=1e-4)
    for name in ("logits",) if task != "answer" else ("start_logits", "end_logits"):
        seen = mask.bool() if task != "sequence" else ...
        torch.testing.assert_close(found[name][seen], expected[name][seen], rtol=0, atol=1e-4)
    found.loss.backward()
    assert all(p.grad is not None for p in ours.parameters())


@pytest.mark.parametrize("task", CLASSES)
def test_its_own_code_is_enough(task, converted, tmp_path):
    """In a process without the package; saved there, it loads again, and so does every other class."""
    auto = CLASSES[task].__name__
    run_without_the_package(
        f"""
import json, torch, transformers
source, target = json.loads(sys.argv[1])
model = transformers.{auto}.from_pretrained(source, trust_remote_code=True)
assert type(model).__name__ == "{auto.replace("Auto", "MQA").replace("Model", "")}"
expected = model.eval()(torch.tensor([[5, 6, 7]]))[0]
model.save_pretrained(target)
again = transformers.{auto}.from_pretrained(target, trust_remote_code=True).eval()
assert torch.equal(again(torch.tensor([[5, 6, 7]]))[0], expected)
transformers.AutoModelForCausalLM.from_pretrained(target, trust_remote_code=True)
tokens = transformers.AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True).generate(
    torch.tensor([[5, 6, 7]]), max_new_tokens=3
)
assert tokens.shape == (1, 6)
print("true")
""",
        converted[1],
        tmp_path / "saved",
        scratch=tmp_path,
    )


@pytest.mark.parametrize("options", [{}, {"kv_latent_dim": 16, "qk_head_dim": 8, "rope_frequencies": [[0, 1, 2, 3]]}])
def test_adapters_have_default_targets(options):
    peft = pytest.importorskip("peft")
    model = MQAForCausalLM(
        MQAConfig(
            hidden_size=48, num_attention_heads=6, num_hidden_layers=1, intermediate_size=64, vocab_size=97, **options
        )
    )
    for config in (peft.LoraConfig(r=2), peft.IA3Config(), peft.LoHaConfig(r=2)):
        adapted = peft.get_peft_model(model, config)
        changed = {name.split(".")[-2] for name, p in adapted.named_parameters() if p.requires_grad}
        names = {part for name, p in adapted.named_parameters() if p.requires_grad for part in name.split(".")}
        assert changed
        if isinstance(config, peft.LoraConfig):
            assert names >= ({"q_proj", "kv_proj"} if options else {"q_proj", "v_proj"})
        adapted.unload()


def test_the_text_configuration_and_the_bare_model(converted):
    model = AutoModel.from_pretrained(converted[1])
    assert type(model).__name__ == "MQAModel"
    assert model.config.get_text_config() is model.config
    assert model.get_input_embeddings() is model.embed_tokens
