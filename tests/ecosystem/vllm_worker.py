"""Runs in vLLM's environment: tokens and the size of the cache for a checkpoint, as JSON in a line.

python vllm_worker.py CHECKPOINT OPTIONS PROMPTS COUNT
"""

import json
import os
import sys

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}  # fmt: skip

if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    directory, options, prompts, count = sys.argv[1], *map(json.loads, sys.argv[2:])
    llm = LLM(
        directory,
        **{"enforce_eager": True, "dtype": "float32", "max_model_len": 256, "skip_tokenizer_init": True, **options},
    )
    found = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False),
        use_tqdm=False,
    )
    cache = llm.llm_engine.vllm_config.cache_config
    print()
    print(
        json.dumps(
            {
                "tokens": [list(one.outputs[0].token_ids) for one in found],
                "blocks": cache.num_gpu_blocks,
                "block_size": cache.block_size,
            }
        )
    )
