"""Accuracy and F1 from a confusion matrix, and their bootstrap intervals.

    F1 = 2 TP / (2 TP + FP + FN)

macro_f1 is the mean over the classes that are there or are predicted, weighted_f1 the mean weighted
by each class's texts: scikit-learn's f1_score with zero_division=0. Axes: N texts, C classes, R
resamples.
"""

import numpy as np

RESAMPLES, CHUNK = 2000, 100  # drawn at a time, to bound the memory


def confusion_matrix(truth, predicted, classes: int) -> np.ndarray:
    """(C, C) counts: rows are the true classes, columns the predicted; both given as indices.

    Where a prediction is -1, none of the classes, a last column counts these: (C, C + 1).
    """
    predicted = np.asarray(predicted, np.int64)
    matrix = np.zeros((classes, classes + bool((predicted < 0).any())), np.int64)
    np.add.at(matrix, (np.asarray(truth, np.int64), predicted), 1)
    return matrix


def class_scores(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """precision, recall, f1 and support of (..., C, C or C + 1) confusions, each (..., C)."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    support, predicted = confusion.sum(-1), confusion.sum(-2)[..., : confusion.shape[-2]]
    return {
        "precision": hits / np.maximum(predicted, 1),
        "recall": hits / np.maximum(support, 1),
        "f1": 2 * hits / np.maximum(support + predicted, 1),
        "support": support,
    }


def summary(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """accuracy, macro_f1 and weighted_f1 of (..., C, C or C + 1) confusions, each (...)."""
    scores, n = class_scores(confusion), confusion.sum((-2, -1))
    present = (scores["support"] + confusion.sum(-2)[..., : confusion.shape[-2]]) > 0
    return {
        "accuracy": np.trace(confusion, axis1=-2, axis2=-1) / n,
        "macro_f1": (scores["f1"] * present).sum(-1) / present.sum(-1),
        "weighted_f1": (scores["f1"] * scores["support"]).sum(-1) / n,
    }


def evaluate(truth, predicted, labels, seed: int = 0) -> dict:
    """The content of test.json: figures, 95% percentile bootstrap intervals, confusion, classes.

    Resampling n texts with replacement draws a multinomial over the confusion matrix's cells (Efron
    & Tibshirani 1993, ch. 13), so no text need be looked at again.
    """
    confusion = confusion_matrix(truth, predicted, len(labels))
    n = int(confusion.sum())
    rng, chunks, intervals, classes = np.random.default_rng(seed), [], {}, {}
    for _ in range(RESAMPLES // CHUNK):
        drawn = rng.multinomial(n, confusion.ravel() / n, CHUNK)
        chunks.append(summary(drawn.reshape(-1, *confusion.shape)))
    for key in chunks[0]:
        values = np.concatenate([chunk[key] for chunk in chunks])  # (R,)
        intervals[key] = [round(float(q), 6) for q in np.quantile(values, (0.025, 0.975))]
    scores = class_scores(confusion)
    for i, label in enumerate(labels):
        classes[label] = {key: round(values[i].item(), 6) for key, values in scores.items()}
    return {key: round(float(value), 6) for key, value in summary(confusion).items()} | {
        "n": n, "interval_95": intervals, "confusion": confusion.tolist(), "labels": list(labels),
        "per_class": classes,
    }  # fmt: skip


def report(result: dict) -> str:
    """An `evaluate` result for the terminal: figures, a table a class, and the confusion matrix."""
    lines = []
    for key, (low, high) in result["interval_95"].items():
        name = key.replace("_f", "-F")
        lines.append(f"{name:<12} {result[key]:.3f}   95% interval {low:.3f} to {high:.3f}")
    labels, confusion = result["labels"], result["confusion"]
    columns = labels + ["none"] * (len(confusion[0]) - len(labels))
    corner = "true \\ predicted"
    wide = max(map(len, (corner, *labels)))
    lines += ["", f"{'class':<{wide}}  precision  recall     F1  texts"]
    for label, s in result["per_class"].items():
        figures = f"{s['precision']:9.3f}  {s['recall']:6.3f}  {s['f1']:5.3f}  {s['support']:5}"
        lines.append(f"{label:<{wide}}  {figures}")
    if len(labels) <= 20:  # as many columns as a terminal has room for
        cell = max(5, len(str(max(map(max, confusion)))) + 1)
        heads = "".join(f"{label[: cell - 1]:>{cell}}" for label in columns)
        lines += ["", f"{corner:<{wide}}{heads}"]
        for label, row in zip(labels, confusion):
            lines.append(f"{label:<{wide}}" + "".join(f"{n or '.':>{cell}}" for n in row))
    else:
        pairs = [
            (n, labels[i], columns[j])
            for i, row in enumerate(confusion) for j, n in enumerate(row) if i != j and n
        ]  # fmt: skip
        worst = sorted(pairs, reverse=True)[:10]
        lines += ["", "most frequent confusions"]
        lines += [f"{n:5}  {true} -> {predicted}" for n, true, predicted in worst]
    if result.get("truncated"):
        lines += ["", f"truncated: {result['truncated']} texts"]
    if "invented" in result:
        counts = f"{result['empty_answers']} empty, {result['invented']} invented"
        lines += ["", f"answers without a class: {counts}"]
        lines += [f"{n:5}  {a[:60]!r}" for a, n in result["most_frequent_inventions"].items()]
    return "\n".join(lines)
