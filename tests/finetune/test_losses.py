"""The losses against plain formulas in float64, and against the classes' own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from mqa_hf import MQAConfig, MQAForCausalLM, MQAForConditionalGeneration, MQASeq2SeqConfig
from mqa_hf.base.errors import MQAError
from mqa_hf.finetune.data import IGNORED
from mqa_hf.finetune.losses import LOSSES, Objective, attention_names, check_head, chunk_losses, logits_of

STACK = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 8,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}


def decoder(heads, **options):
    return MQAForCausalLM(MQAConfig(**STACK, num_key_value_heads=heads, **options)).double().eval()


def encoder_decoder(heads):
    stack = {**STACK, "position_embedding": "relative"}
    config = MQASeq2SeqConfig(
        encoder={**stack, "num_key_value_heads": 4, "causal": False},
        decoder={**stack, "num_key_value_heads": heads, "cross_num_key_value_heads": heads},
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return MQAForConditionalGeneration(config).double().eval()


def batch():
    ids = torch.randint(1, 90, (2, 12))
    labels = torch.randint(1, 90, (2, 12))
    labels[0, 3:6] = IGNORED
    return {"input_ids": ids, "labels": labels}


def source_batch():
    plain = batch()
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return {
        "input_ids": torch.randint(1, 90, (2, 9)),
        "attention_mask": mask,
        "decoder_input_ids": plain["input_ids"],
        "labels": plain["labels"],
    }


def run(objective, student, inputs, count=1.0):
    with objective.attach(student):
        taught = None
        if objective.teacher is not None:
            with torch.no_grad():
                taught = objective.teacher(**{k: v for k, v in inputs.items() if k != "labels"})
        outputs = student(**inputs, taught=taught, count=count)
        if outputs["loss"].requires_grad:
            outputs["loss"].backward()
        return outputs


def reference(student, teacher, inputs):
    """Cross-entropy and KL, in sums over tokens, from whole logits."""
    given = {name: value for name, value in inputs.items() if name != "labels"}
    seen = inputs["labels"] != IGNORED
    log_p = F.log_softmax(student(**given).logits[seen], dim=-1)
    log_q = F.log_softmax(teacher(**given).logits[seen], dim=-1)
    lm = F.nll_loss(log_p, inputs["labels"][seen], reduction="sum")
    return lm, F.kl_div(log_p, log_q, log_target=True, reduction="sum")


@pytest.mark.parametrize("chunk", [2**27, 90 * 5])
@pytest.mark.parametrize("kind", ["decoder", "scaled", "encoder-decoder"])
def test_cross_entropy_and_divergence_and_their_gradients_are_those_of_whole_logits(kind, chunk):
    if kind == "encoder-decoder":
        student, teacher, inputs = encoder_decoder(1), encoder_decoder(4), source_batch()
    else:
        options = {"logit_scale": 0.25} if kind == "scaled" else {}
        student, teacher, inputs = decoder(1, **options), decoder(4, **options), batch()
    twin = copy.deepcopy(student)
    outputs = run(Objective({"kl": 0.75, "lm": 0.25}, teacher, chunk), student, inputs, count=7.0)
    lm, kl = reference(twin, teacher, inputs)
    torch.testing.assert_close(outputs["sums"][:2].double(), torch.stack((lm, kl)).detach(), rtol=1e-5, atol=1e-5)
    assert outputs["sums"][-1] == 21
    assert all(p.grad is None for p in teacher.parameters())
    ((0.75 * kl + 0.25 * lm) / 7).backward()
    for (name, ours), theirs in zip(student.named_parameters(), twin.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_under_autocast_the_losses_of_given_logits_are_still_made_in_float32():
    logits, told = torch.randn(40, 300).requires_grad_(), torch.randn(40, 300)
    labels = torch.randint(300, (40,))
    labels[::5] = IGNORED
    seen = labels != IGNORED
    log_p, log_q = (F.log_softmax(x.double()[seen], dim=-1) for x in (logits, told))
    expected = torch.stack(
        (F.nll_loss(log_p, labels[seen], reduction="sum"), F.kl_div(log_p, log_q, log_target=True, reduction="sum"))
    )
    (wanted,) = torch.autograd.grad(expected[1], logits)
    with torch.autocast("cpu", torch.bfloat16):
        sums = chunk_losses(logits, labels, told, lambda x: x, lambda x: x)
    (got,) = torch.autograd.grad(sums[1], logits)
    torch.testing.assert_close(sums.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)


def test_the_forward_of_a_class_comes_back():
    student, teacher, inputs = decoder(1), decoder(4), batch()
    before = student(inputs["input_ids"]).logits
    run(Objective({"kl": 1.0}, teacher), student, inputs)
    torch.testing.assert_close(student(inputs["input_ids"]).logits, before)
    assert "forward" not in student.__dict__


def test_hidden_states_of_the_teacher_itself_are_no_loss():
    teacher, inputs = decoder(4), batch()
    objective = Objective({"hidden": 1.0}, teacher)
    assert run(objective, copy.deepcopy(teacher), inputs)["sums"][LOSSES.index("hidden")].abs() < 1e-5
    other = decoder(1)
    states = [m(inputs["input_ids"], output_hidden_states=True).hidden_states for m in (other, teacher)]
    seen = inputs["labels"] != IGNORED
    cosine = torch.stack([F.cosine_similarity(s[seen], t[seen], dim=-1) for s, t in zip(*states)])
    expected = (1 - cosine).mean(0).sum()
    got = run(Objective({"hidden": 1.0}, teacher), other, inputs)["sums"][LOSSES.index("hidden")]
    torch.testing.assert_close(got.double(), expected.detach(), rtol=1e-5, atol=1e-5)


def test_attention_is_compared_where_both_read_the_teachers_states():
    student, teacher, inputs = decoder(1), decoder(4), batch()
    student.load_state_dict({**student.state_dict(), "model.norm.weight": student.model.norm.weight.detach() * 3})
    names = attention_names(student, teacher)
    assert names == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    caught = {}
    hooks = [
        teacher.get_submodule(name).register_forward_hook(
            lambda m, a, k, out, n=name: caught.update({n: (a, k, out[0])}), with_kwargs=True
        )
        for name in names
    ]
    teacher(inputs["input_ids"], use_cache=False)
    for hook in hooks:
        hook.remove()
    seen = inputs["labels"] != IGNORED
    errors = []
    for name in names:
        args, kwargs, y = caught[name]
        ours = student.get_submodule(name)(*args, **kwargs)[0]
        errors.append(((ours - y)[seen].square().sum(-1) / y[seen].square().sum(-1)).mean())
    outputs = run(Objective({"attention": 1.0}, teacher), student, inputs, count=21.0)
    torch.testing.assert_close(
        outputs["loss"].detach().double(), torch.stack(errors).mean().detach(), rtol=1e-5, atol=1e-6
    )
    trained = {name.rsplit(".", 2)[0] for name, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == set(names)


FREQUENCIES = {"rope_frequencies": [[0, 0, 1, 2, 3]] * 2, "qk_head_dim": 10}
LATENTS = {
    "rotary": FREQUENCIES,
    "rounded": {**FREQUENCIES, "kv_latent_bits": 4},
    "partly rotated": {
        "rope_frequencies": [[0, 1, 1]] * 2,
        "qk_head_dim": 6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
    },
    "learned": {"position_embedding": "learned", "qk_head_dim": 0},
}
SIDES = ("head_dim", "rope_parameters", "position_embedding")  # what a teacher has in common with it


@pytest.mark.parametrize("kind", LATENTS)
@pytest.mark.parametrize("weights", [{"attention": 1.0}, {"kl": 1.0, "hidden": 1.0}], ids=str)
def test_gradients_reach_every_map_of_a_latent(kind, weights):
    options = LATENTS[kind]
    student = decoder(1, kv_latent_dim=32, kv_latent_heads=2, **options)
    teacher, inputs = decoder(2, **{n: v for n, v in options.items() if n in SIDES}), batch()
    names = ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert attention_names(student, teacher) == names
    run(Objective(weights, teacher), student, inputs)
    parameters = [(n, p) for n, p in student.named_parameters() if "self_attn" in n or "attention" not in weights]
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for _, p in parameters)
    held = {n.removeprefix(f"{names[0]}.") for n, _ in parameters if n.startswith(names[0])}
    maps = {"q_proj.weight", "kv_proj.weight", "kv_proj.bias", "v_up.weight", "o_proj.weight"}
    maps |= {"k_proj.weight", "k_proj.bias", "query_factors"} if kind != "learned" else set()
    assert held == maps | ({"k_up.weight"} if kind in ("partly rotated", "learned") else set())


def test_the_gradient_of_rounded_latents_is_that_of_the_numbers_they_are_rounded_to():
    """Straight through: with respect to Z, as if the rounded latent was Z x itself."""
    student = decoder(1, kv_latent_dim=32, kv_latent_heads=2, **LATENTS["rounded"])
    attention, x = student.model.layers[0].self_attn, torch.randn(1, 7, 32, dtype=torch.float64)
    latent = attention.latents(x)
    assert not torch.allclose(latent, attention.kv_proj(x))
    weight = torch.randn(1, 7, 32, dtype=torch.float64)
    ((attention.v_up(latent) ** 2).mean() + (weight * latent).sum()).backward()
    free = latent.detach().requires_grad_()
    ((attention.v_up(free) ** 2).mean() + (weight * free).sum()).backward()
    torch.testing.assert_close(attention.kv_proj.weight.grad, free.grad[0].T @ x[0])


def test_attentions_of_encoder_decoder_models_with_latents_are_found():
    student, teacher, inputs = encoder_decoder(1), encoder_decoder(4), source_batch()
    stack = {**student.config.decoder.to_dict(), "kv_latent_dim": 16, "cross_kv_latent_dim": 24, "qk_head_dim": 0}
    config = copy.deepcopy(student.config)
    config.decoder = MQAConfig(**{**stack, "kv_latent_heads": 4})
    student = MQAForConditionalGeneration(config).double().eval()
    names = [f"model.decoder.layers.{i}.{kind}" for i in range(2) for kind in ("self_attn", "cross_attn")]
    assert attention_names(student, teacher) == names
    loss = run(Objective({"attention": 1.0}, teacher), student, inputs, count=21.0)["loss"]
    assert torch.isfinite(loss)
    trained = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {n for n, _ in student.named_parameters() if any(f"{name}." in n for name in names)}


@pytest.mark.parametrize("weights", [{"attention": 1.0}, {"kl": 1.0, "hidden": 1.0}], ids=str)
def test_checkpointed_layers_have_the_same_gradients(weights):
    student, teacher, inputs = decoder(1), decoder(4), batch()
    twin = copy.deepcopy(student)
    run(Objective(weights, teacher), student, inputs)
    twin.gradient_checkpointing_enable()
    twin.train()
    run(Objective(weights, teacher), twin, inputs)
    for (name, p), q in zip(student.named_parameters(), twin.named_parameters()):
        if p.grad is None:
            assert q[1].grad is None, name
        else:
            torch.testing.assert_close(p.grad, q[1].grad, msg=lambda m, n=name: f"{n}: {m}")


def test_an_evaluation_of_the_attention_stage_measures_the_model_as_it_is():
    student, teacher, inputs = decoder(1), decoder(4), batch()
    lm, kl = reference(student, teacher, inputs)
    with torch.no_grad():
        sums = run(Objective({"attention": 1.0}, teacher), student, inputs)["sums"]
    torch.testing.assert_close(sums[:2].double(), torch.stack((lm, kl)).detach(), rtol=1e-5, atol=1e-5)


def test_encoder_decoder_attention_weighs_each_side_by_its_own_tokens():
    student, teacher, inputs = encoder_decoder(1), encoder_decoder(4), source_batch()
    loss = run(Objective({"attention": 1.0}, teacher), student, inputs, count=21.0)["loss"]
    assert torch.isfinite(loss)
    twin = copy.deepcopy(teacher)
    first = next(p for n, p in twin.named_parameters() if "cross_attn.k_proj" in n)
    assert attention_names(student, teacher)[0].endswith("decoder.layers.0.self_attn")
    assert first.shape[0] == 4 * student.config.decoder.head_dim


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_heads_of_other_classes_are_known_or_refused(softcap):
    small = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 1, "initializer_range": 0.3}
    check_head(Gemma2ForCausalLM(Gemma2Config(**small, final_logit_softcapping=softcap)).eval())
    llama = LlamaForCausalLM(LlamaConfig(**small)).eval()
    check_head(llama)
    ids = torch.arange(8)[None]
    torch.testing.assert_close(logits_of(llama, llama.model(ids).last_hidden_state), llama(ids).logits)
    plain = type(llama).forward

    class Odd(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            outputs = plain(self, *args, **kwargs)
            outputs.logits = outputs.logits.sin()
            return outputs

    with pytest.raises(MQAError, match="Odd changes its logits"):
        check_head(Odd(LlamaConfig(**small)).eval())


@pytest.mark.gpu
@pytest.mark.parametrize("weights", [{"lm": 1.0}, {"kl": 1.0}, {"kl": 0.5, "lm": 0.5}], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_ligers_kernels_give_the_same(weights, autocast):
    pytest.importorskip("liger_kernel")
    student, teacher = decoder(1, logit_scale=0.5).float().cuda(), decoder(4, logit_scale=0.5).float().cuda()
    twin = copy.deepcopy(student)
    inputs = {name: value.cuda() for name, value in batch().items()}
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        ours = run(Objective(weights, teacher, liger=True), student, inputs, count=21.0)["loss"]
        theirs = run(Objective(weights, teacher), twin, inputs, count=21.0)["loss"]
    bound = 3e-2 if autocast else 1e-3
    torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound)
    for (name, p), q in zip(student.named_parameters(), twin.parameters()):
        assert (p.grad - q.grad).norm() <= bound * 3 * q.grad.norm(), name


def test_what_cannot_be_compared_is_said():
    with pytest.raises(MQAError, match="needs a teacher"):
        Objective({"kl": 1.0})
    with pytest.raises(MQAError, match="cannot be combined with other losses"):
        Objective({"kl": 1.0, "attention": 1.0}, decoder(4))
    with pytest.raises(MQAError, match="`loss` takes"):
        Objective({"mse": 1.0})
    with pytest.raises(MQAError, match="have the names of the teacher's and other shapes"):
        run(Objective({"attention": 1.0}, decoder(4)), decoder(4), batch())
    other = MQAForCausalLM(MQAConfig(**{**STACK, "vocab_size": 80}))
    with pytest.raises(MQAError, match="90 words and the teacher 80"):
        run(Objective({"kl": 1.0}, other), decoder(1), batch())
