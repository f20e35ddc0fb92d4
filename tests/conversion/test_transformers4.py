"""What transformers 4 computes of native results: the logits of transformers 5, of the same file."""

import json
import os
import subprocess
import sys
import warnings
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from native_sources import BASE, CONFIGS
from sources import CASES, LLAMA, kv_heads_of, make_model, rope, save
from transformers import AutoConfig, AutoModelForCausalLM

from mqa_hf import convert
from mqa_hf.base.errors import MQAError
from mqa_hf.conversion.families import FAMILIES

WORKER = Path(__file__).with_name("transformers4_worker.py")
IDS = torch.randint(3, 101, (2, 24), generator=torch.Generator().manual_seed(3))

# Types that transformers 4 does not have.
NEW = (
    *(
        "afmoe",
        "apertus1p5_text",
        "beam",
        "cohere2_moe",
        "cohere_compass_text",
        "cwm",
        "exaone",
        "exaone_moe",
        "flint",
        "granite_swa",
    ),
    *(
        "granitemoe_swa",
        "hy_v3",
        "hyperclovax",
        "internlm3",
        "iquestcoder",
        "jais2",
        "kolibri1",
        "laguna",
        "lara_mini",
        "lfm2_moe",
    ),
    *("lfm3", "mellum", "minimax_m2", "ministral3", "nanochat", "nemotron_h", "olmo_hybrid", "qwen3_5_moe_text"),
    *("qwen3_5_text", "qwen4_exp_text", "solar_open"),
)
# Their heads are hidden_size / num_attention_heads wide in transformers 4, whatever head_dim says.
PLAIN_HEADS = {"hidden_size": 64}
MAMBA = {"mamba_d_head": 32, "use_mamba_kernels": False}
OWN = {
    "granitemoe": PLAIN_HEADS,
    "granitemoehybrid": {**PLAIN_HEADS, **MAMBA},
    "granitemoeshared": PLAIN_HEADS,
    "jamba": PLAIN_HEADS,
    "phimoe": PLAIN_HEADS,
    "qwen2_moe": PLAIN_HEADS,
    # transformers 4 takes a prompt that is longer than the window for its last window.
    "recurrent_gemma": {**PLAIN_HEADS, "attention_window_size": 32},
    "zamba": {**PLAIN_HEADS, "use_mamba_kernels": False},
    # Without its kernels transformers 4 is wrong beyond the first chunk of the state-space layers.
    "zamba2": {**PLAIN_HEADS, "num_attention_heads": 16, "mamba_headdim": 32, "use_mamba_kernels": False,
               "chunk_size": 32},
}  # fmt: skip
LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 5e5}


def nested(full: dict, sliding_theta: float) -> dict:
    sliding = {"rope_type": "default", "rope_theta": sliding_theta}
    return {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}}


# The rotary positions that published configurations of these types have.
PUBLISHED = [
    ("apertus", "rope default", rope("default")),
    ("exaone4", "rope llama3", LLAMA3),
    ("gemma3_text", "rope linear, global", nested({"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, 1e4)),
    ("gpt_oss", "rope yarn", {"rope_parameters": {**YARN, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}}),
    ("gpt_oss", "rope default", rope("default")),
    ("hunyuan_v1_dense", "rope dynamic, alpha", rope("dynamic", factor=1.0, alpha=1000.0)),
    ("llama4_text", "rope llama3", LLAMA3),
    ("olmo3", "rope yarn, full attention", nested({**YARN, "attention_factor": 1.2}, 5e5)),
    ("phimoe", "longrope", rope("longrope", short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[2.0, 3.0, 4.0, 5.0],
                                short_mscale=1.2, long_mscale=1.3, original_max_position_embeddings=32)),
    ("qwen3", "rope yarn", {"rope_parameters": YARN}),
]  # fmt: skip
CONFIG_OF = {**{kind: config for kind, _, config in reversed(CASES)}, **{k: {**BASE, **c} for k, c in CONFIGS.items()}}
KINDS = [
    *((kind, what, config) for kind, what, config in CASES if FAMILIES[kind].native and kind not in NEW),
    ("llama", "Llama 3.1", {**LLAMA, "num_key_value_heads": 3, **LLAMA3}),
    *(
        (kind, what, {**CONFIG_OF[kind], **OWN.get(kind, {}), **more})
        for kind, what, more in [*((kind, "in its own class", {}) for kind in CONFIGS if kind not in NEW), *PUBLISHED]
    ),
]
# The parameters of Apertus' activation are bfloat16 in transformers 4, those of these models float32.
TOLERANCE = defaultdict(lambda: 1e-4, apertus=2e-2, zamba2=1e-3)
# Layers that share the keys and values of others have projections in transformers 4, which it does not use.
UNUSED = ("gemma3n_text",)


def with_another_theta(kind: str, config: dict) -> dict:
    """No class's default: what is not read shows."""
    parameters = getattr(AutoConfig.for_model(kind, **json.loads(json.dumps(config))), "rope_parameters", None)
    if not parameters or kind == "dbrx":  # whose theta transformers 4 reads elsewhere, and transformers 5 does not
        return config
    for flat in [parameters] if "rope_type" in parameters else parameters.values():
        flat["rope_theta"] *= 1.7
    return {**config, "rope_parameters": parameters}


def computed(directory: Path) -> torch.Tensor:
    # transformers 4 leaves out the caps of Gemma's scores in `sdpa`.
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(IDS).logits


def results(root: Path) -> tuple[dict[tuple[str, str, str], tuple[Path, torch.Tensor]], set[tuple[str, str, str]]]:
    """Native results with the source's heads, which have the source's logits, and with one; and those logits.

    Also those of which `convert` says that transformers 4 computes something else.
    """
    made, warned = {}, set()
    for number, (kind, what, config) in enumerate(KINDS):
        model = make_model(kind, with_another_theta(kind, config))
        source = save(model, root / f"{number}-source")
        heads = kv_heads_of(model)
        expected = computed(source)
        for label, kv_heads in (("own", heads), ("one", 1)):
            directory = root / f"{number}-{label}"
            try:
                with warnings.catch_warnings(record=True) as said:
                    warnings.simplefilter("always")
                    convert(source, directory, kv_heads=kv_heads, target="native")
            except MQAError as error:
                if "cannot hold this model" not in str(error):  # such as GPT-BigCode, with one head and no windows
                    raise
                continue
            if label == "own":
                torch.testing.assert_close(computed(directory), expected, atol=1e-4, rtol=0)
            made[kind, what, label] = directory, expected if label == "own" else computed(directory)
            if any("transformers 4 refuses the result or computes something else" in str(w.message) for w in said):
                warned.add((kind, what, label))
    return made, warned


needs_transformers4 = pytest.mark.skipif(
    "TRANSFORMERS4" not in os.environ,
    reason="TRANSFORMERS4 names no folder made with: pip install --no-deps --target FOLDER transformers==4.57.3 "
    "huggingface_hub==0.36.0 tokenizers==0.22.1",
)


@pytest.mark.slow
@needs_transformers4
def test_this_package_s_own_class_says_which_transformers_it_needs(tmp_path):
    convert(save(make_model("llama", LLAMA), tmp_path / "source"), tmp_path / "ours")
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\nfrom transformers import AutoModelForCausalLM\n"
        "AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True)"
    )
    command = [sys.executable, "-c", program, os.environ["TRANSFORMERS4"], str(tmp_path / "ours")]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode != 0
    said = done.stderr.strip().splitlines()[-1]
    assert said.startswith("ImportError: This model needs transformers 5.17 or newer, found 4.57.3; upgrade")


@pytest.mark.slow
@needs_transformers4
@pytest.mark.timeout(900)
def test_transformers_4_computes_the_logits_of_transformers_5(tmp_path):
    torch.save(IDS, tmp_path / "ids.pt")
    made, warned = results(tmp_path)
    command = [sys.executable, str(WORKER), os.environ["TRANSFORMERS4"], str(tmp_path / "ids.pt")]
    done = subprocess.run([*command, *(str(d) for d, _ in made.values())], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    problems, worst = [], defaultdict(dict)
    for (kind, what, label), (directory, expected) in made.items():
        found = torch.load(directory / "transformers4.pt")
        where = f"{kind}, {what}, {label}"
        if "error" in found:
            if (kind, what, label) in warned:
                continue
            problems.append(f"{where}: {found['error']}")
            continue
        difference = (found["logits"] - expected).abs().max().item()
        if (kind, what, label) in warned:
            problems += [f"{where}: the logits agree, yet a warning says otherwise"] * (difference <= TOLERANCE[kind])
            continue
        worst[kind][label] = max(worst[kind].get(label, 0.0), difference)
        worst[kind]["size"] = max(worst[kind].get("size", 0.0), expected.abs().max().item())
        problems += [f"{where}: the logits differ by {difference}"] * (not difference <= TOLERANCE[kind])
        problems += [f"{where}: unexpected {found['unexpected_keys']}"] * bool(found["unexpected_keys"])
        problems += [f"{where}: missing {found['missing_keys']}"] * (
            bool(found["missing_keys"]) and kind not in UNUSED
        )
    print(f"\n{'':18} largest logit difference, transformers 4 and 5")
    print(f"{'':18} {'own heads':>12} {'one head':>12} {'largest logit':>14}")
    for kind, row in worst.items():
        own, one = (f"{row[label]:.1e}" if label in row else "-" for label in ("own", "one"))
        print(f"{kind:18} {own:>12} {one:>12} {row['size']:14.1f}")
    assert not problems, "\n".join(problems)
    assert len(worst) >= 60
