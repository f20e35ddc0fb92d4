"""The experiments of "Fast Transformer Decoding" (arXiv 1911.02150) and "GQA" (arXiv 2305.13245) at a small scale.

    python -m mqa_hf.eval.reproduction run WORK translation=wmt/wmt14:de-en
    python -m mqa_hf.eval.reproduction cost WORK
    python -m mqa_hf.eval.reproduction page docs

`recipes/` describes the experiments (`recipe.py`), `experiments.py` turns them into jobs, `queue.py` runs the jobs on
all GPUs, `cost.py` times the shape of the first paper, and `page.py` makes the tables and figures of
docs/reproduction.md from the results.
"""
