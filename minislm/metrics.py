"""Accuracy and F1 from a confusion matrix, and their bootstrap intervals.

    F1 = 2 TP / (2 TP + FP + FN)

macro_f1 is the mean over classes that occur or are predicted, weighted_f1 the mean weighted by
each class's texts: scikit-learn's f1_score with zero_division=0. N texts, C classes, R resamples.
"""

import numpy as np

RESAMPLES, CELLS = 2000, 10**7  # CELLS: counts drawn at a time, to bound the memory


def confusion_matrix(truth, predicted, classes: int) -> np.ndarray:
    """(C, C) counts: rows are the true classes, columns the predicted; both given as indices.
    Where a prediction is -1, none of the classes, a last column counts these: (C, C + 1).
    """
    predicted = np.asarray(predicted, np.int64)
    matrix = np.zeros((classes, classes + bool((predicted < 0).any())), np.int64)
    np.add.at(matrix, (np.asarray(truth, np.int64), predicted), 1)
    return matrix


def figures(confusion: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Figures of (..., C, C or C + 1) confusions: over all classes (...), per class (..., C)."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    support, predicted = confusion.sum(-1), confusion.sum(-2)[..., : confusion.shape[-2]]
    f1, n = 2 * hits / np.maximum(support + predicted, 1), support.sum(-1)
    overall = {
        "accuracy": hits.sum(-1) / n,
        "macro_f1": f1.sum(-1) / (support + predicted > 0).sum(-1),
        "weighted_f1": (f1 * support).sum(-1) / n,
    }
    precision, recall = hits / np.maximum(predicted, 1), hits / np.maximum(support, 1)
    return overall, {"precision": precision, "recall": recall, "f1": f1, "support": support}


def interval(values: np.ndarray, estimate: float, n: int) -> tuple[float, float]:
    """A figure's 95% interval, of n texts: percentiles of (R,) resamples, less twice their bias.

    With few texts per class, the resamples' macro-F1 lies below the sample's by about as much as
    this below the truth (Efron & Tibshirani 1993, ch. 10). The bias is the mean's: many resamples
    may share a median. The interval includes the estimate, and the rate of errors, or of hits, of
    which n texts may have shown none (Clopper & Pearson 1934).
    """
    low, high = np.quantile(values, (0.025, 0.975)) + 2 * (estimate - values.mean())
    hidden = 1 - 0.025 ** (1 / n)
    return max(min(low, estimate, 1 - hidden), 0.0), min(max(high, estimate, hidden), 1.0)


def evaluate(truth, predicted, labels, seed: int = 0) -> dict:
    """The content of test.json: figures, 95% bootstrap intervals, confusion, classes.

    Resampling n texts draws a multinomial over the confusion's cells (Efron & Tibshirani, ch. 13).
    """
    confusion, n = confusion_matrix(truth, predicted, len(labels)), len(truth)
    overall, of_class = figures(confusion)
    rng, chunks, intervals = np.random.default_rng(seed), [], {}
    size = max(1, CELLS // confusion.size)
    for done in range(0, RESAMPLES, size):
        drawn = rng.multinomial(n, confusion.ravel() / n, min(size, RESAMPLES - done))
        chunks.append(figures(drawn.reshape(-1, *confusion.shape))[0])
    for key in overall:
        values = np.concatenate([chunk[key] for chunk in chunks])  # (R,)
        intervals[key] = np.round(interval(values, overall[key], n), 6).tolist()
    scores = [{k: v[i].round(6).item() for k, v in of_class.items()} for i in range(len(labels))]
    return {key: value.round(6).item() for key, value in overall.items()} | {
        "n": n, "interval_95": intervals, "confusion": confusion.tolist(), "labels": list(labels),
        "per_class": dict(zip(labels, scores)),
    }  # fmt: skip


def report(result: dict) -> str:
    """An `evaluate` result for the terminal: figures, those of each class, and the confusion."""
    lines = []
    for key, (low, high) in result["interval_95"].items():
        name = key.replace("_f", "-F")
        lines.append(f"{name:<12} {result[key]:.3f}   95% interval {low:.3f} to {high:.3f}")
    labels, confusion = result["labels"], result["confusion"]
    corner, columns = "true \\ predicted", labels + ["none"] * (len(confusion[0]) - len(labels))
    wide = max(map(len, (corner, *labels)))
    lines += ["", f"{'class':<{wide}}  precision  recall     F1  texts"]
    row = "{:<{}}  {precision:9.3f}  {recall:6.3f}  {f1:5.3f}  {support:5}"
    lines += [row.format(label, wide, **found) for label, found in result["per_class"].items()]
    if len(labels) <= 20:  # as many columns as a terminal has room for
        cell = max(5, len(str(max(map(max, confusion)))) + 1)
        lines += ["", f"{corner:<{wide}}" + "".join(f"{c[: cell - 1]:>{cell}}" for c in columns)]
        for label, row in zip(labels, confusion):
            lines.append(f"{label:<{wide}}" + "".join(f"{n or '.':>{cell}}" for n in row))
    else:
        pairs = sorted((n, i, j) for (i, j), n in np.ndenumerate(confusion) if i != j and n)
        lines += ["", "most frequent confusions"]
        lines += [f"{n:5}  {labels[i]} -> {columns[j]}" for n, i, j in reversed(pairs[-10:])]
    if result.get("truncated"):
        lines += ["", f"truncated: {result['truncated']} texts"]
    if "invented" in result:
        counts = f"{result['empty_answers']} empty, {result['invented']} invented"
        lines += ["", f"answers without a class: {counts}"]
        lines += [f"{n:5}  {a[:60]!r}" for a, n in result["most_frequent_inventions"].items()]
    return "\n".join(lines)
