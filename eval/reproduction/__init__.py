"""The experiments of "Fast Transformer Decoding" (arXiv 1911.02150) and "GQA" (arXiv 2305.13245) at a small scale.

    python -m mqa_hf.eval.reproduction run WORK translation=wmt/wmt14:de-en
    python -m mqa_hf.eval.reproduction cost WORK
    python -m mqa_hf.eval.reproduction page docs

`recipes/` says what is trained (`recipe.py`), `experiments.py` makes jobs of it, `queue.py` runs them on the GPUs
that are there, `cost.py` times the shape of the first paper, and `page.py` makes the tables and pictures of
docs/reproduction.md from what was measured.
"""
