"""What compare.py's cells say: figures with intervals, tests, the table, the plot.

Axes: N texts, S seeds, C classes, R resamples.
"""

import json
import math
from itertools import combinations
from pathlib import Path

import numpy as np
from significance import (
    FIGURES,
    bootstrap,
    expected_calibration_error,
    figures,
    holm,
    mcnemar,
    reliability,
)  # fmt: skip

from minislm.metrics import confusion_matrix, interval

ALPHA = 0.05  # of the sentence that says whether a lead is significant


def read_predictions(path: Path, labels, n: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Predicted classes (N,), -1 a refusal, and probabilities (N, C) if every line has them."""
    rows = [json.loads(line) for line in path.open(encoding="utf-8")]
    if len(rows) != n:
        raise ValueError(f"{path}: {len(rows)} predictions of {n} texts")
    index = {label: i for i, label in enumerate(labels)}
    predicted = np.array([index.get(row["label"], -1) for row in rows])
    if not all(row.get("probabilities") for row in rows):
        return predicted, None
    return predicted, np.array([[row["probabilities"][label] for label in labels] for row in rows])


def mean(values) -> float | None:
    values = [v for v in values if v is not None]
    return float(np.mean(values)) if values else None


def analyse(groups: dict[str, list[dict]], truth: np.ndarray, labels) -> dict[str, dict]:
    """A row of the table per method, best macro-F1 first.

    groups: a method's cells (their cell.json, with `folder`), first seed first.
    """
    C, N = len(labels), len(truth)
    read = {
        m: [read_predictions(Path(c["folder"]) / "predictions.jsonl", labels, N) for c in cells]
        for m, cells in groups.items()
    }
    predictions = {m: np.stack([p for p, _ in found]) for m, found in read.items()}
    draws, rows = bootstrap(truth, predictions, C), {}
    for m, cells in groups.items():
        values = figures(truth, predictions[m], C)[:, 0].mean(-1)  # (3,)
        trainings, known = [c["training"] for c in cells], [p for _, p in read[m] if p is not None]
        truths = np.tile(truth, len(known))
        confusions = [confusion_matrix(truth, p % (C + 1), C + 1)[:C] for p in predictions[m]]
        rows[m] = {
            **{key: [float(v), *interval(d, v, N)] for key, v, d in zip(FIGURES, values, draws[m])},
            "ece": mean([expected_calibration_error(p, truth) for p in known]),
            "trained": trainings[0]["trained"],
            "lr": trainings[0]["lr"],
            "seeds": len(cells),
            "training_s": mean([t["seconds"] for t in trainings]),
            "texts_per_s": mean([c["texts_per_s"] for c in cells]),
            "training_gb": max(t["peak_bytes"] for t in trainings) / 1e9,
            "inference_gb": max(c["predict_peak_bytes"] for c in cells) / 1e9,
            "reliability": reliability(np.concatenate(known), truths).tolist() if known else None,
            "confusion": sum(confusions).tolist(),  # the last column counts refusals
        }
    rows = dict(sorted(rows.items(), key=lambda item: -item[1]["macro_f1"][0]))
    best, *others = rows
    right = {m: predictions[m][0] == truth for m in rows}
    pairs = [*combinations(rows, 2)]  # not just with the best, which these same texts chose
    p_values = [mcnemar(right[a], right[b]) for a, b in pairs]
    tests = dict(zip(pairs, zip(p_values, holm(p_values))))
    for m in others:
        p, corrected = tests[best, m]
        difference = rows[m]["macro_f1"][0] - rows[best]["macro_f1"][0]
        low, high = np.quantile(draws[m][0] - draws[best][0], (0.025, 0.975))
        rows[m]["to_best"] = [difference, min(low, difference), max(high, difference)]
        rows[m] |= {"mcnemar_p": p, "holm_p": corrected}
        rows[m]["wrong_more_often"] = bool(right[m].sum() < right[best].sum())  # of what p tells
    return rows


# The table


def with_interval(value: float, low: float, high: float, sign: str = "") -> str:
    return f"{value:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"


def shown(value, form: str) -> str:
    return "-" if value is None else format(value, form)


def markdown(heads: list[str], lines: list[list[str]]) -> str:
    """A table that reads well unrendered too."""
    wide = [max(map(len, column)) for column in zip(heads, *lines)]
    rule = ["-" * wide[0], *("-" * (w - 1) + ":" for w in wide[1:])]
    padded = [
        [row[0].ljust(wide[0]), *(cell.rjust(w) for cell, w in zip(row[1:], wide[1:]))]
        for row in (heads, rule, *lines)
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def table(rows: dict[str, dict]) -> str:
    """The methods, best first."""
    heads = [
        "method", "macro-F1", "weighted-F1", "accuracy", "macro-F1 to best", "Holm p", "ECE",
        "trained", "lr", "seeds", "training s", "texts/s", "peak GB",
    ]  # fmt: skip
    lines = [
        [m, *(with_interval(*r[key]) for key in FIGURES),
         with_interval(*r["to_best"], "+") if "to_best" in r else "best",
         shown(r.get("holm_p"), ".2g"), shown(r["ece"], ".3f"), shown(r["trained"], ","),
         shown(r["lr"], "g"), str(r["seeds"]),
         shown(r["training_s"], ".0f"), shown(r["texts_per_s"], ",.1f"),
         f"{shown(r['training_gb'] or None, '.2f')} / {r['inference_gb']:.2f}"]
        for m, r in rows.items()
    ]  # fmt: skip
    return markdown(heads, lines)


def curve_table(curve: dict[str, dict[int, list[float]]], total: int) -> str:
    """curve: method -> examples per class -> macro-F1 and interval; 0: the sample of `total`."""
    sizes = sorted({n for points in curve.values() for n in points if n}) + [0]
    heads = ["macro-F1 at examples per class", *(str(n or f"{total:,} in all") for n in sizes)]
    lines = [
        [m, *(with_interval(*points[n]) if n in points else "-" for n in sizes)]
        for m, points in curve.items()
    ]
    return markdown(heads, lines)


def verdict(rows: dict[str, dict]) -> str:
    """Which method wins, and whether by more than chance would have it."""
    best, *others = rows
    if not others:
        return f"Only {best} was run: there is nothing to compare it with."
    second = rows[others[0]]
    lead, high, low = (0 - x for x in second["to_best"])
    differ = second["holm_p"] < ALPHA
    tests = {"the interval of its lead": low > 0}
    tests["McNemar's test"] = differ and second["wrong_more_often"]
    if all(tests.values()):
        said = "Its lead is significant by both the interval and McNemar's test."
    elif any(tests.values()):
        said = f"Only {max(tests, key=tests.get)} says so beyond chance: not settled."
    else:
        said = "Its lead over the second is not significant."
    if differ and not second["wrong_more_often"]:
        said += f" McNemar's test even says that {others[0]} is right more often."
    return (
        f"{best} has the highest macro-F1, {lead:.3f} (95% interval {low:.3f} to {high:.3f}) above "
        f"{others[0]} (McNemar's exact test on the first seed of each, Holm-corrected for all "
        f"pairs of methods: p = {second['holm_p']:.2g}). {said}"
    )


# The plot (pip install -e ".[plot]")


def load_matplotlib() -> None:
    try:
        import matplotlib
    except ImportError:
        raise ValueError('--plot needs matplotlib: pip install -e ".[plot]"') from None
    matplotlib.use("Agg")


def plot(path: Path, rows: dict[str, dict], curve: dict, labels) -> None:
    """F1 with intervals, learning curves; a method's reliability diagram above its confusions."""
    load_matplotlib()
    from matplotlib import pyplot as plt

    width = min(max(2, len(rows)), 6)  # methods beside each other
    bands = math.ceil(len(rows) / width)
    figure = plt.figure(figsize=(3.2 * width, 3.4 + 6.6 * bands), layout="constrained")
    grid = figure.add_gridspec(1 + 2 * bands, 2 * width)
    names = list(rows)
    top = figure.add_subplot(grid[0, : width if curve else 2 * width])
    for i, (key, title) in enumerate(zip(FIGURES, ("macro-F1", "weighted-F1", "accuracy"))):
        value, low, high = np.array([rows[m][key] for m in names]).T
        at = np.arange(len(names)) + 0.2 * (i - 1)
        top.errorbar(value, at, xerr=(value - low, high - value), fmt="o", capsize=3, label=title)
    top.set_yticks(range(len(names)), names)
    top.invert_yaxis()
    top.set_xlabel("95% intervals over test texts and seeds")
    top.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, fontsize=8, frameon=False)
    if curve:
        side = figure.add_subplot(grid[0, width:])
        sizes = sorted({n for points in curve.values() for n in points if n})
        for i, m in enumerate(names):
            if known := [n for n in sizes if n in curve[m]]:
                value, low, high = np.array([curve[m][n] for n in known]).T
                at = np.array(known) * 1.03 ** (i - len(names) / 2)  # side by side
                side.errorbar(
                    at, value, yerr=(value - low, high - value), color=f"C{i}", capsize=3, label=m
                )
            else:  # without training: the same at any size
                side.axhline(curve[m][0][0], color=f"C{i}", linestyle=":", label=m)
        side.set_xscale("log")
        side.set_xticks(sizes, [str(n) for n in sizes])
        side.minorticks_off()
        side.set(xlabel="training examples per class", ylabel="macro-F1")
        side.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, fontsize=8, frameon=False)
    for i, m in enumerate(names):
        band, column = divmod(i, width)
        place = slice(2 * column, 2 * column + 2)
        axes = figure.add_subplot(grid[1 + 2 * band, place])
        axes.set(title=m, xlabel="top probability", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
        axes.plot((0, 1), (0, 1), "k:", linewidth=1)
        if rows[m]["reliability"]:
            n, confidence, accuracy = np.array(rows[m]["reliability"])
            there = n > 0
            axes.plot(confidence[there], accuracy[there], zorder=1)
            axes.scatter(confidence[there], accuracy[there], 200 * n[there] / n.sum() + 4, zorder=2)
            axes.text(0.04, 0.92, f"ECE {rows[m]['ece']:.3f}")
        else:
            axes.text(0.5, 0.5, "no probabilities", ha="center", backgroundcolor="w")
        axes = figure.add_subplot(grid[2 + 2 * band, place])
        counts = np.array(rows[m]["confusion"])[:, : len(labels)]
        shares = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.set(xlabel="predicted", ylabel="true")
        if len(labels) <= 20:
            axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
            axes.set_yticks(range(len(labels)), labels, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
