"""Mixtures of experts: transformers' kernels, the step's kernel and the loop over experts agree."""

import pytest
import torch
from latents import randomise
from stand_ins import use_references

from mqa_hf import MQAConfig, MQAForCausalLM, experts_step_mqa
from mqa_hf.kernel_experts_mqa import naive_chosen_experts

STACK = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 6,
    "max_position_embeddings": 256, "eos_token_id": None, "pad_token_id": 0, "num_experts": 8,
    "num_experts_per_tok": 2, "expert_intermediate_size": 40,
}  # fmt: skip
CASES = {
    "softmax": {},
    "without renormalising": {"router_renormalise": False, "num_experts_per_tok": 3, "hidden_act": "gelu"},
    "sigmoids, groups, correction": {
        "router_scores": "sigmoid", "router_correction": True, "router_groups": 4, "router_groups_kept": 2,
        "router_scale": 2.5, "shared_expert_intermediate_size": 56,
    },
    "shared expert with a gate, a dense layer": {
        "shared_expert_intermediate_size": 56, "shared_expert_gate": True, "expert_layers": [False, True, True],
    },
    "latent": {
        "kv_latent_dim": 16, "qk_head_dim": 8, "rope_frequencies": [[0, 1, 2, 3]] * 3, "residual": "sandwich",
    },
    "parallel": {"residual": "parallel_shared_norm"},
    "biases, a limit": {"expert_bias": True, "expert_limit": 0.8, "router_bias": True},
    "chosen by logits": {"router_scores": "sigmoid", "router_choice": "logits", "router_correction": True},
    "sparsemixer": {"router_scores": "sparsemixer", "router_jitter": 0.2, "router_renormalise": False},
}  # fmt: skip
cases = pytest.mark.parametrize("name", CASES)


def make(name, device="cpu", dtype=torch.float64):
    torch.manual_seed(1)
    model = randomise(MQAForCausalLM(MQAConfig(**{**STACK, **CASES[name]}))).to(device, dtype)
    if dtype == torch.float64:  # which grouped products do not take
        model.set_experts_implementation("eager")
    return model


def tokens(model, enabled=True, **options):
    ids = torch.randint(3, 97, (3, 11), generator=torch.Generator().manual_seed(5)).to(model.device)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    model.decoding.enabled = enabled
    return model.generate(ids, attention_mask=mask, max_new_tokens=16, do_sample=False, **options).tolist()


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@cases
def test_transformers_kernels_agree_with_one_expert_at_a_time(name, implementation):
    model = make(name, dtype=torch.float32).train()
    assert model.config._experts_implementation == "grouped_mm"  # the default
    ids = torch.randint(3, 97, (2, 19), generator=torch.Generator().manual_seed(5))
    found = []
    for kind in ("eager", implementation):
        model.set_experts_implementation(kind)
        model.zero_grad()
        output = model(ids, labels=ids)
        output.loss.backward()
        found.append((output.logits, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)
    assert any("experts.down_proj" in n for n in found[0][1])


@pytest.mark.parametrize("beams", [1, 3])
@cases
def test_both_loops_give_the_same_tokens(name, beams, monkeypatch):
    model = make(name)
    expected = tokens(model, enabled=False, num_beams=beams)
    assert tokens(model, num_beams=beams) == expected
    calls = []

    def counted(*arguments, **beside):
        calls.append(arguments)
        assert (beside["limit"], beside["down_bias"] is not None) == (
            model.config.expert_limit,
            model.config.expert_bias,
        )
        return naive_chosen_experts(*arguments, **beside)

    def routed(x, router, k, **options):
        config = model.config
        assert (options["scores"], options["choice"]) == (config.router_scores, config.router_choice)
        assert options["gap"] == 2 * config.router_jitter
        assert (options["correction"] is not None) == config.router_correction
        assert (k, options["renormalise"], options["scale"], options["groups"], options["groups_kept"]) == (
            config.num_experts_per_tok, config.router_renormalise, config.router_scale, config.router_groups,
            config.router_groups_kept,
        )  # fmt: skip
        mixture = next(layer.mlp for layer in model.model.layers if getattr(layer.mlp, "router", None) is not None
                       and layer.mlp.router.weight is router)  # fmt: skip
        return mixture.route(x)

    if name == "latent":
        return  # the kernels of latents have no stand-in here
    use_references(monkeypatch)
    monkeypatch.setattr(experts_step_mqa, "TYPES", (torch.float64,))
    monkeypatch.setattr(experts_step_mqa, "chosen_experts", counted)
    monkeypatch.setattr(experts_step_mqa, "route", routed)
    model = make(name)
    assert tokens(model, num_beams=beams) == expected
    assert len(calls) % sum(model.config.expert_layers) == 0 < len(calls)


@cases
def test_adapters_anywhere_are_seen_and_switched(name):
    """On the router, the experts and the gate of the shared expert; the step is not captured with one."""
    peft = pytest.importorskip("peft")
    model = make(name)
    before = tokens(model)
    assert model.decoding.engine.decode_step.plain()
    targets = [n for n, m in model.named_modules() if n.endswith(("shared_gate", "o_proj"))]
    parameters = ["mlp.router.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    options = {"init_lora_weights": False, "target_modules": targets, "target_parameters": parameters}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=64, **options)).double().eval()
    names = {n.split(".lora_")[0] for n, _ in adapted.named_parameters() if "lora_B" in n}
    assert any("mlp.router" in n for n in names)
    ours = tokens(adapted)
    assert not model.decoding.engine.decode_step.plain()
    assert ours == tokens(model, enabled=False) != before
    model.decoding.enabled = True
    with adapted.disable_adapter():
        assert tokens(adapted) == before


def test_corrections_stay_in_float32_and_odd_widths_run(tmp_path):
    model = make("sigmoids, groups, correction", dtype=torch.float32)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "rounded")
    loaded = MQAForCausalLM.from_pretrained(tmp_path / "rounded", dtype=torch.bfloat16)
    kinds = {n: p.dtype for n, p in loaded.named_parameters()}
    assert {n for n, dtype in kinds.items() if dtype == torch.float32} == {
        f"model.layers.{i}.mlp.router_correction" for i in range(3)
    }
    odd = MQAForCausalLM(MQAConfig(**{**STACK, "expert_intermediate_size": 37}))
    assert odd.config._experts_implementation == "eager"
    assert odd(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


@pytest.mark.gpu
@cases
def test_a_captured_step_gives_the_same_tokens(name):
    model = make(name, "cuda", torch.float32)
    ours = tokens(model)
    assert model.decoding.engine.graph.captured is not None
    assert model.decoding.engine.decode_step.triton
    assert ours == tokens(model, enabled=False)


def test_what_experts_need_is_said():
    for fields, said in (
        ({"gated_mlp": False}, "experts are gated MLPs without biases"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"router_groups": 8, "router_groups_kept": 2}, "groups of at least two experts"),
        ({"router_groups": 4, "router_groups_kept": 1, "num_experts_per_tok": 3}, "as many experts in those"),
        ({"num_experts_per_tok": 9}, "between 1 and num_experts"),
        ({"expert_intermediate_size": None}, "expert_intermediate_size"),
    ):
        with pytest.raises(ValueError, match=said):
            MQAConfig(**{**STACK, **fields})
