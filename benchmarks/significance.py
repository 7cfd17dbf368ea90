"""Which difference is real: a paired bootstrap over texts and seeds, McNemar's exact test, Holm.
Which probability is: the expected calibration error.

A resample draws N of the N texts and, for each method by itself, S of its S seeds, both with
replacement; a method's figure is then its mean over the seeds drawn. All methods see the same
texts, so their differences are paired (Efron & Tibshirani 1993). With few seeds, their share of the
variance is understated: it comes out as (S - 1) / S of what it is. Intervals of the resamples are
those of `minislm.metrics.interval`.

Axes: N texts, S seeds, C classes, R resamples. A predicted class of -1 is a refusal: always wrong,
and no class of its own.
"""

from math import comb

import numpy as np

RESAMPLES, CHUNK = 2000, 100  # drawn at a time, to bound the memory
FIGURES = ("macro_f1", "weighted_f1", "accuracy")


def figures(truth: np.ndarray, predicted: np.ndarray, classes: int, weights=None) -> np.ndarray:
    """FIGURES as (3, R, S), of predictions on resampled texts; `minislm.metrics` defines them.

    truth: (N,) int; predicted: (S, N) int.
    weights: (R, N), how often a resample has each text; None: each once, so R is 1.
    """
    weights = np.ones((1, len(truth))) if weights is None else weights
    weights = weights.astype(np.float32)  # exact: counts below 2^24
    true = (truth[:, None] == np.arange(classes)).astype(np.float32)  # (N, C)
    support, per_seed = weights @ true, []  # (R, C)
    for row in predicted:
        said = (row[:, None] == np.arange(classes)).astype(np.float32)  # (N, C)
        hits = (weights @ (said * true)).astype(np.float64)  # (R, C)
        both = support + weights @ said
        f1, n = 2 * hits / np.maximum(both, 1), support.sum(-1)
        macro, weighted = f1.sum(-1) / (both > 0).sum(-1), (f1 * support).sum(-1) / n
        per_seed.append((macro, weighted, hits.sum(-1) / n))
    return np.moveaxis(np.array(per_seed), 0, -1)  # (S, 3, R) -> (3, R, S)


def bootstrap(
    truth: np.ndarray, predictions: dict[str, np.ndarray], classes: int,
    resamples: int = RESAMPLES, seed: int = 0,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Each method's FIGURES in every resample, (3, R); row r is of the same texts in all.

    predictions: (S, N) a method, of as many seeds as it has.
    """
    texts, n = np.random.default_rng(seed), len(truth)
    seeds = {name: np.random.default_rng([seed, i]) for i, name in enumerate(predictions, 1)}
    found = {name: [] for name in predictions}
    for start in range(0, resamples, CHUNK):
        draws = texts.integers(0, n, (min(CHUNK, resamples - start), n))
        weights = np.stack([np.bincount(draw, minlength=n) for draw in draws])  # (CHUNK, N)
        for name, predicted in predictions.items():
            values, S = figures(truth, predicted, classes, weights), len(predicted)
            drawn = seeds[name].integers(0, S, (1, len(draws), S))
            found[name].append(np.take_along_axis(values, drawn, -1).mean(-1))  # (3, CHUNK)
    return {name: np.concatenate(parts, -1) for name, parts in found.items()}


def mcnemar(right_a: np.ndarray, right_b: np.ndarray) -> float:
    """The exact two-sided p that two classifiers err equally often on the same texts.

    Of the n texts that just one of them gets right, either gets Binomial(n, 1/2) if they do
    (McNemar 1947). right_a, right_b: (N,) bool.
    """
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    n = only_a + only_b
    return min(1.0, 2 * sum(comb(n, k) for k in range(min(only_a, only_b) + 1)) / 2**n)


def holm(p_values: list[float]) -> list[float]:
    """p values corrected for being several (Holm 1979), in the order given."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def reliability(probabilities: np.ndarray, truth, bins: int = 15) -> np.ndarray:
    """(3, bins): texts, mean top probability, accuracy, a bin of the top probability's range."""
    top, right = probabilities.max(-1), probabilities.argmax(-1) == np.asarray(truth)
    at = np.clip(np.ceil(top * bins).astype(int) - 1, 0, bins - 1)  # bins are open on the left
    sums = np.stack([np.bincount(at, values, bins) for values in (np.ones(len(top)), top, right)])
    sums[1:] /= np.maximum(sums[0], 1)
    return sums


def expected_calibration_error(probabilities: np.ndarray, truth, bins: int = 15) -> float:
    """Mean gap of top probability and accuracy (Guo et al. 2017); probabilities: (N, C)."""
    n, confidence, accuracy = reliability(probabilities, truth, bins)
    return float((n * abs(confidence - accuracy)).sum() / n.sum())
