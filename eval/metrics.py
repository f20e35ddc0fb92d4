"""The metrics of `mqa-hf evaluate`, for the `evaluate` library. They need no network.

    from mqa_hf.eval.metrics import Translations
    Translations().compute(predictions=["a cat"], references=["the cat"])

Intervals contain 95% of 1,000 bootstrap samples over documents. Differences from the original are paired: both models
are measured on the same sample of documents (Koehn 2004).
"""

import json
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

SAMPLES = 1000
Interval = tuple[float, float] | None


def weights(documents: int) -> np.ndarray:
    """How often each document is drawn in each bootstrap sample, [SAMPLES, D]; the same for every call."""
    return np.random.default_rng(0).multinomial(documents, np.full(documents, 1 / documents), SAMPLES)


def ratio(above: Any, below: Any, less: Any = None) -> tuple[float, Interval]:
    """Σ above / Σ below over documents, and its interval; `None` for a single document.

    Args:
        above, below: [D].
        less: [D], subtracted from `above`, for a paired difference.
    """
    above, below = np.asarray(above, float), np.asarray(below, float)
    if less is not None:
        above = above - np.asarray(less, float)
    value = float(above.sum() / below.sum())
    if len(above) < 2:
        return value, None
    drawn = weights(len(above))
    with np.errstate(divide="ignore", invalid="ignore"):
        samples = (drawn @ above) / (drawn @ below)
    low, high = np.quantile(samples[np.isfinite(samples)], (0.025, 0.975))
    return value, (float(low), float(high))


def repetition(tokens: Sequence[int], n: int = 4) -> tuple[int, int]:
    """Number of n-grams that repeat an earlier one of the same text, and number of all n-grams."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(grams) - len(set(grams)), len(grams)


def information(description: str, features: dict[str, Any]) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=description, citation="", inputs_description=description, features=datasets.Features(features)
    )


class NextTokens(evaluate.Metric):
    """Sums over each document's tokens -> loss, perplexity, bits per byte, KL to the original, same first choice."""

    def _info(self) -> evaluate.MetricInfo:
        numbers = ("nats", "original", "divergence", "same", "tokens", "bytes")
        return information(self.__doc__ or "", dict.fromkeys(numbers, datasets.Value("float64")))

    def _compute(self, nats: Any, original: Any, divergence: Any, same: Any, tokens: Any, bytes: Any) -> dict:
        """
        Args:
            nats: [D] negative log-likelihood of each document.
            original: [D] the original's.
            divergence: [D] KL(original ‖ checkpoint), in nats.
            same: [D] tokens for which both have the same first choice.
            tokens, bytes: [D] predicted.
        """
        loss, loss_interval = ratio(nats, tokens)
        bits, bits_interval = ratio(np.asarray(nats) / np.log(2), bytes)
        found: dict[str, Any] = {
            "loss": loss,
            "loss_interval": loss_interval,
            "perplexity": float(np.exp(loss)),
            "perplexity_interval": None if loss_interval is None else tuple(float(np.exp(x)) for x in loss_interval),
            "bits_per_byte": bits,
            "bits_per_byte_interval": bits_interval,
        }
        found["loss_above_original"], found["loss_above_original_interval"] = ratio(nats, tokens, less=original)
        found["kl"], found["kl_interval"] = ratio(divergence, tokens)
        found["same_first_choice"], found["same_first_choice_interval"] = ratio(same, tokens)
        return {**found, "tokens": int(np.sum(tokens)), "bytes": int(np.sum(bytes))}


class Continuations(evaluate.Metric):
    """Generated tokens compared with the original's: agreement, repetition, length."""

    def _info(self) -> evaluate.MetricInfo:
        tokens = datasets.Sequence(datasets.Value("int64"))
        return information(self.__doc__ or "", {"predictions": tokens, "references": tokens})

    def _compute(self, predictions: Any, references: Any) -> dict:
        pairs = [(list(ours), list(theirs)) for ours, theirs in zip(predictions, references)]
        ones = np.ones(len(pairs))
        agreeing = []
        for ours, theirs in pairs:
            shared = min(len(ours), len(theirs))
            same = np.equal(ours[:shared], theirs[:shared])
            agreeing.append(shared if same.all() else int(same.argmin()))
        repeated, grams = np.array([repetition(ours) for ours, _ in pairs], float).T
        found: dict[str, Any] = {}
        for name, above, below in (
            ("agreeing_tokens", agreeing, ones),
            ("identical", [ours == theirs for ours, theirs in pairs], ones),
            ("repetition", repeated, np.maximum(grams, 1e-9)),
            ("length", [len(ours) for ours, _ in pairs], ones),
        ):
            found[name], found[f"{name}_interval"] = ratio(above, below)
        return {**found, "texts": len(pairs)}


class Translations(evaluate.Metric):
    """Texts compared with references: BLEU and chrF by sacrebleu, ROUGE (F1) by rouge_score, all from 0 to 100."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return information(self.__doc__ or "", {"predictions": text, "references": text})

    def _compute(self, predictions: list[str], references: list[str]) -> dict:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics import BLEU, CHRF

        found: dict[str, Any] = {}
        several = len(predictions) > 1
        for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
            try:
                score: Any = metric.corpus_score(predictions, [references], n_bootstrap=SAMPLES if several else 1)
            except TypeError:  # sacrebleu has no interval if a sample has no match at all
                score = metric.corpus_score(predictions, [references])
            said = json.loads(score.format(width=6, is_json=True, signature=str(metric.get_signature())))
            middle, half = said.get("confidence_mean"), said.get("confidence_var")
            found[name], found[f"{name}_signature"] = score.score, said["signature"]
            found[f"{name}_interval"] = None if middle is None else (middle - half, middle + half)
        kinds = ("rouge1", "rouge2", "rougeL")
        scorer = RougeScorer(kinds, use_stemmer=False)
        scores = [scorer.score(target, text) for text, target in zip(predictions, references)]
        for kind in kinds:
            values = [100 * score[kind].fmeasure for score in scores]
            found[kind], found[f"{kind}_interval"] = ratio(values, np.ones(len(values)))
        return {**found, "texts": len(predictions)}


def bleu_above(ours: Sequence[str], theirs: Sequence[str], references: Sequence[str]) -> tuple[float, Interval]:
    """Difference in BLEU from `theirs` and the interval of the paired difference; `None` for a single text."""
    from sacrebleu.metrics import BLEU

    metric: Any = BLEU()

    def counts(texts: Sequence[str]) -> np.ndarray:  # [D, 10]: matching n-grams, n-grams, lengths of both
        scores = [metric.corpus_score([text], [[reference]]) for text, reference in zip(texts, references)]
        return np.array([[*score.counts, *score.totals, score.sys_len, score.ref_len] for score in scores])

    def bleu(sums: np.ndarray) -> float:
        right, all_of_them, (ours_long, theirs_long) = (part.tolist() for part in np.split(sums, (4, 8)))
        return BLEU.compute_bleu(right, all_of_them, ours_long, theirs_long, metric.smooth_method).score

    both = counts(ours), counts(theirs)
    value = bleu(both[0].sum(0)) - bleu(both[1].sum(0))
    if len(ours) < 2:
        return value, None
    drawn = weights(len(ours))
    samples = [bleu(one) - bleu(other) for one, other in zip(*(drawn @ found for found in both))]
    low, high = np.quantile(samples, (0.025, 0.975))
    return value, (float(low), float(high))


class WordErrors(evaluate.Metric):
    """Word error rate of transcripts, by jiwer."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return information(self.__doc__ or "", {"predictions": text, "references": text})

    def _compute(self, predictions: list[str], references: list[str]) -> dict:
        import jiwer

        counts = [jiwer.process_words(target, text) for text, target in zip(predictions, references)]
        errors = [c.substitutions + c.deletions + c.insertions for c in counts]
        words = [c.substitutions + c.deletions + c.hits for c in counts]
        rate, interval = ratio(errors, words)
        return {"word_error_rate": rate, "word_error_rate_interval": interval, "texts": len(words)}
