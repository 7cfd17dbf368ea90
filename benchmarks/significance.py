"""Which differences are real: a paired bootstrap over texts and seeds, McNemar's exact test, Holm's
correction. How far probabilities are off: the expected calibration error.

A resample draws N of the N texts and, for each method by itself, S of its S seeds, both with
replacement; a method's figure is then its mean over the seeds drawn. All methods see the same
texts, so their differences are paired (Efron & Tibshirani 1993). With few seeds, their share of the
variance is understated: it comes out as (S - 1) / S of what it is. A figure's interval is that of
`minislm.metrics.interval`. A difference's is the plain percentiles: the biases of two figures are
about alike, and a shift by the rest would make a lead of two methods that nearly always tie.

Axes: N texts, S seeds, C classes, R resamples. A predicted class of -1 is a refusal: always wrong,
and no class of its own.
"""

from math import comb

import numpy as np

from minislm import metrics

RESAMPLES, CHUNK = 2000, 100  # CHUNK: resamples drawn at a time, to bound the memory
FIGURES = ("macro_f1", "weighted_f1", "accuracy")


def figures(truth: np.ndarray, predicted: np.ndarray, classes: int, draws=None) -> np.ndarray:
    """FIGURES as (3, R, S), of predictions on resampled texts.

    truth: (N,) int; predicted: (S, N) int.
    draws: (R, N) int, the texts of each resample; None: each once, so R is 1.
    """
    draws = np.arange(len(truth))[None] if draws is None else draws
    shape = classes, classes + 1  # of a confusion matrix, whose last column counts refusals
    cells = truth * shape[1] + predicted % shape[1]  # (S, N), each text's place in it
    size = shape[0] * shape[1]
    counts = [[np.bincount(row[draw], minlength=size) for row in cells] for draw in draws]
    overall, _ = metrics.figures(np.reshape(counts, (len(draws), len(predicted), *shape)))
    return np.stack([overall[key] for key in FIGURES])


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
        for name, predicted in predictions.items():
            values, S = figures(truth, predicted, classes, draws), len(predicted)
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
