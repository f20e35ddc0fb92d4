"""Software that people use with a checkpoint: PEFT, TRL, lm-eval, quantisers, exporters and others.

Each test needs the package that it is about, beside this one, and is skipped without it:

    pip install peft trl lm-eval optimum-quanto torchao bitsandbytes onnx onnxscript onnxruntime openvino ctranslate2
    pip install executorch
    pip install --no-deps mergekit llmcompressor compressed-tensors
    pytest -m slow tests/ecosystem/test_consumers.py

`docs/serving.md` has the results as a table.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sources import LLAMA, make_model, save
from tokenizer import write_tokenizer
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

from mqa_hf import convert
from mqa_hf.serving.executorch import ExportableDecoder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STACK = {
    **LLAMA, "vocab_size": 512, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32,
    "intermediate_size": 96, "max_position_embeddings": 512,
}  # fmt: skip
FIT = {"calibration_tokens": 4096, "sequence_length": 64}
KINDS = {
    "one head": {},
    "wide": {"method": "shared", "head_width": 2, **FIT},
    "by layer": {"method": "shared", "cache_budget": "50%", **FIT},
    "latent": {"method": "latent", "latent": 32, **FIT},
    "native": {"target": "native"},
}
ONE_WIDTH = {"one head", "native"}  # what software with one `head_dim` for queries, keys and values can hold
COUNT = 16
LOGITS = {"rtol": 1e-4, "atol": 1e-4}
TEXT = "the quick brown fox and the dog"
PROMPT = torch.randint(5, 90, (1, 12), generator=torch.Generator().manual_seed(1))
OTHER = torch.randint(5, 90, (1, 29), generator=torch.Generator().manual_seed(2))
ENDLESS = {"do_sample": False, "max_new_tokens": COUNT, "eos_token_id": -1, "pad_token_id": 0}
LENGTH = torch.export.Dim("length", min=2, max=256)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("consumers")
    source = save(make_model("llama", STACK), folder / "source")
    write_tokenizer(source)
    for name, options in KINDS.items():
        convert(source, folder / name, **options)
    return folder


@pytest.fixture(params=KINDS)
def path(request, checkpoints):
    return checkpoints / request.param


def load(path, **options):
    options = {"dtype": torch.float32, **options}
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **options).eval()


def generated(model, prompt=PROMPT, **options):
    tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), **ENDLESS, **options)
    return tokens[:, prompt.shape[1] :].tolist()


@torch.no_grad()
def by_whole_passes(model, prompt=PROMPT):
    ids = prompt
    for _ in range(COUNT):
        ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    return ids[:, prompt.shape[1] :].tolist()


@torch.no_grad()
def logits(model, ids=PROMPT):
    return model(ids, use_cache=False).logits


class Logits(nn.Module):
    """Exporters take a module that returns one tensor."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask=None):
        return self.model(input_ids, attention_mask=attention_mask, use_cache=False).logits


def test_text_generation_pipeline(path):
    ids = AutoTokenizer.from_pretrained(path, trust_remote_code=True)(TEXT, return_tensors="pt").input_ids
    generator = pipeline("text-generation", model=str(path), trust_remote_code=True, dtype=torch.float32)
    expected = by_whole_passes(load(path), ids)[0]
    assert list(generator(TEXT, return_tensors=True, **ENDLESS)[0]["generated_token_ids"])[-COUNT:] == expected
    padded = generator([TEXT, "and"], batch_size=2, return_tensors=True, **ENDLESS)
    assert list(padded[0][0]["generated_token_ids"])[-COUNT:] == expected


def test_sequence_classification(path):
    options = {"trust_remote_code": True, "dtype": torch.float32}
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=3, **options).eval()
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    model.config.pad_token_id = tokenizer.pad_token_id
    stack = AutoModel.from_pretrained(path, **options).eval()
    one = tokenizer("and the", return_tensors="pt").input_ids
    out = model(**tokenizer([TEXT, "and the"], return_tensors="pt", padding=True), labels=torch.tensor([0, 2]))
    with torch.no_grad():
        torch.testing.assert_close(out.logits[1:], model.score(stack(one).last_hidden_state[:, -1]), **LOGITS)
    out.loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None


def test_trainer(path, tmp_path):
    model = load(path)
    with torch.no_grad():
        expected = model(OTHER, labels=OTHER).loss.item()
    arguments = TrainingArguments(
        output_dir=tmp_path, max_steps=1, per_device_train_batch_size=2, report_to="none", use_cpu=True,
        logging_steps=1, save_strategy="no", learning_rate=1e-3,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": OTHER[0], "labels": OTHER[0]}] * 2)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-3)
    trainer.save_model(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert not torch.equal(logits(again), logits(load(path)))
    assert generated(model.eval()) == by_whole_passes(again)


def test_drafts_and_static_cache(path):
    model, repeated = load(path), PROMPT.repeat(1, 3)
    assert generated(model, assistant_model=load(path)) == by_whole_passes(model)
    assert generated(model, repeated, prompt_lookup_num_tokens=3) == by_whole_passes(model, repeated)
    assert generated(model, cache_implementation="static", disable_compile=True) == by_whole_passes(model)


def test_continuous_batching(path):
    model, prompts = load(path), [PROMPT[0].tolist(), OTHER[0].tolist()]
    options = {"generation_config": GenerationConfig(**ENDLESS)}
    if path.name not in ONE_WIDTH:
        with pytest.raises(ValueError, match="continuous batching"):
            model.generate_batch(prompts, **options)
        return
    found = {tuple(o.prompt_ids): o.generated_tokens for o in model.generate_batch(prompts, **options).values()}
    for prompt in prompts:
        assert [found[tuple(prompt)]] == generated(model, torch.tensor([prompt]))


def test_lora(path, tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(load(path), peft.LoraConfig(task_type="CAUSAL_LM")).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=50.0)
    for _ in range(2):
        model(OTHER, labels=OTHER).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load(path), tmp_path).eval()
    torch.testing.assert_close(logits(again), logits(model.eval()), **LOGITS)
    assert not torch.allclose(logits(again), logits(load(path)), **LOGITS)
    expected = by_whole_passes(again)
    assert generated(again) == expected
    assert generated(again.merge_and_unload()) == expected


def test_trl(path, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    arguments = trl.SFTConfig(
        output_dir=tmp_path, max_steps=1, per_device_train_batch_size=2, report_to="none", use_cpu=True, bf16=False,
        logging_steps=1, save_strategy="no", eos_token=tokenizer.eos_token,
    )  # fmt: skip
    data = datasets.Dataset.from_dict({"text": [TEXT, "the dog and the fox"]})
    trainer = trl.SFTTrainer(load(path), arguments, train_dataset=data, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        expected = load(path)(**{k: batch[k] for k in ("input_ids", "attention_mask", "labels")}).loss.item()
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-3)


def test_lm_eval(path):
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    evaluated = huggingface.HFLM(
        pretrained=str(path), trust_remote_code=True, device="cpu", dtype="float32", batch_size=2
    )
    pair = ("the quick brown fox", " and the dog")
    ((found, _),) = evaluated.loglikelihood([Instance("loglikelihood", {}, pair, 0)], disable_tqdm=True)
    context, rest = evaluated._encode_pair(*pair)
    scores = logits(load(path), torch.tensor([context + rest])).log_softmax(-1)[0, len(context) - 1 : -1]
    assert found == pytest.approx(scores.gather(1, torch.tensor(rest)[:, None]).sum().item(), abs=1e-3)


def quantised_by_quanto(path):
    quanto = pytest.importorskip("optimum.quanto")
    model = load(path)
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    return model


def quantised_by_torchao(path):
    quantization = pytest.importorskip("torchao.quantization")
    model = load(path)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def quantised_by_bitsandbytes(path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    # No threshold: with one, columns with a large entry in any row are not rounded, so that rows depend on each other.
    quantised = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return load(path, quantization_config=quantised, device_map="cpu")


def quantised_by_llm_compressor(path):
    llmcompressor = pytest.importorskip("llmcompressor")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.quantization import QuantizationModifier

    model, weights = load(path), QuantizationArgs(num_bits=8, strategy="channel")
    groups = {"all": QuantizationScheme(targets=["Linear"], weights=weights)}
    recipe = QuantizationModifier(config_groups=groups, ignore=["lm_head"])
    llmcompressor.oneshot(model=model, trust_remote_code_model=True, recipe=recipe)
    return model


@pytest.mark.parametrize(
    "quantised",
    [quantised_by_quanto, quantised_by_torchao, quantised_by_bitsandbytes, quantised_by_llm_compressor],
)
def test_int8_weights(quantised, path):
    model, plain = quantised(path), load(path)
    difference = (logits(model) - logits(plain)).abs().max() / logits(plain).abs().max()
    assert 1e-6 < difference < 0.2
    assert generated(model) == by_whole_passes(model)
    if hasattr(model, "decoding"):
        rows = torch.cat((PROMPT, PROMPT.flip(1)))
        fast = generated(model, rows)
        model.decoding.enabled = False
        assert fast == generated(model, rows)


def test_compile(path):
    model = load(path)
    compiled = torch.compile(model.forward, fullgraph=True)
    with torch.no_grad():
        for ids in (PROMPT, OTHER):
            torch.testing.assert_close(compiled(ids, use_cache=False).logits, logits(model, ids), **LOGITS)


def exported(path, **options):
    with torch.no_grad():
        return torch.export.export(
            Logits(load(path)).eval(), (PROMPT,), dynamic_shapes={"input_ids": {1: LENGTH}}, **options
        )


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, path):
    program = exported(path, strict=strict).module()
    for ids in (PROMPT, OTHER):
        torch.testing.assert_close(program(ids), logits(load(path), ids), **LOGITS)


def test_onnx(path, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    with torch.no_grad():
        torch.onnx.export(
            Logits(load(path)), (PROMPT,), tmp_path / "model.onnx", dynamo=True, input_names=["input_ids"],
            output_names=["logits"], dynamic_shapes={"input_ids": {1: LENGTH}}, verbose=False,
        )  # fmt: skip
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for ids in (PROMPT, OTHER):
        found = torch.tensor(session.run(None, {"input_ids": ids.numpy()})[0])
        torch.testing.assert_close(found, logits(load(path), ids), **LOGITS)


@pytest.mark.parametrize("traced", [False, True])
def test_openvino(traced, path):
    openvino = pytest.importorskip("openvino")
    example = {"input_ids": PROMPT, "attention_mask": torch.ones_like(PROMPT)}
    with torch.no_grad():
        model = (
            openvino.convert_model(Logits(load(path)), example_input=example)
            if traced
            else openvino.convert_model(exported(path))
        )
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for ids in (PROMPT, OTHER):
        inputs = [ids.numpy(), torch.ones_like(ids).numpy()] if traced else [ids.numpy()]
        torch.testing.assert_close(torch.tensor(compiled(inputs)[0]), logits(load(path), ids), **LOGITS)


def exportable(path, kind):
    """The step of transformers' module for ExecuTorch, exported."""
    model = load(path)
    model.generation_config = GenerationConfig(
        use_cache=True, cache_implementation="static", max_length=64, eos_token_id=None, pad_token_id=0,
        cache_config={"batch_size": 1, "max_cache_len": 64},
    )  # fmt: skip
    model.config.use_cache = True
    module = kind(model, batch_size=1, max_cache_len=64, device="cpu")
    with torch.no_grad():
        return module.export(input_ids=PROMPT[:, :1], cache_position=torch.zeros(1, dtype=torch.long))


def tokens_of(step):
    """Greedy tokens of a step from (token, position) to logits [1, 1, vocabulary]."""
    ids = PROMPT[0].tolist()
    for position in range(len(ids) + COUNT - 1):
        scores = step(torch.tensor([[ids[position]]]), torch.tensor([position]))
        if position >= PROMPT.shape[1] - 1:
            ids.append(int(scores[0, -1].argmax()))
    return [ids[PROMPT.shape[1] :]]


def test_exportable_module(path):
    step = exportable(path, ExportableDecoder).module()
    found = tokens_of(lambda token, position: step(input_ids=token, cache_position=position))
    assert found == by_whole_passes(load(path))
    if path.name not in ONE_WIDTH:
        with pytest.raises(RuntimeError, match="index_copy_"):
            exportable(path, TorchExportableModuleForDecoderOnlyLM)


def test_executorch(path, tmp_path):
    pytest.importorskip("executorch")
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    lowered = to_edge_transform_and_lower(exportable(path, ExportableDecoder), partitioner=[XnnpackPartitioner()])
    (tmp_path / "model.pte").write_bytes(lowered.to_executorch().buffer)
    program = Runtime.get().load_program(tmp_path / "model.pte")
    method = program.load_method("forward")
    assert tokens_of(lambda *arguments: method.execute(arguments)[0]) == by_whole_passes(load(path))


def test_ctranslate2(path, tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2")
    converter = ctranslate2.converters.TransformersConverter(str(path), trust_remote_code=True)
    if path.name != "native":
        with pytest.raises(ValueError, match="No conversion is registered"):
            converter.convert(str(tmp_path / "out"))
        return
    converter.convert(str(tmp_path / "out"))
    generator = ctranslate2.Generator(str(tmp_path / "out"), device="cpu", compute_type="float32")
    tokens = AutoTokenizer.from_pretrained(path).convert_ids_to_tokens(PROMPT[0].tolist())
    options = {"max_length": COUNT, "min_length": COUNT, "sampling_topk": 1, "include_prompt_in_result": False}
    (result,) = generator.generate_batch([tokens], **options)
    tokens = load(path).generate(PROMPT, do_sample=False, min_new_tokens=COUNT, max_new_tokens=COUNT, pad_token_id=0)
    assert result.sequences_ids[0] == tokens[0, PROMPT.shape[1] :].tolist()


def test_mergekit(path, tmp_path):
    pytest.importorskip("mergekit")
    shutil.copytree(path, tmp_path / "copy")  # mergekit refuses to merge one folder with itself
    models = "".join(f"  - model: {p}\n    parameters: {{weight: 0.5}}\n" for p in (path, tmp_path / "copy"))
    (tmp_path / "merge.yml").write_text(f"merge_method: linear\ndtype: float32\nmodels:\n{models}")
    command = [Path(sys.executable).with_name("mergekit-yaml"), tmp_path / "merge.yml", tmp_path / "out"]
    subprocess.run([*map(str, command), "--trust-remote-code"], check=True, capture_output=True)
    for file in path.glob("*_mqa.py"):  # mergekit leaves the code of the model behind
        shutil.copy(file, tmp_path / "out")
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(load(path)), **LOGITS)
