"""Figures as worked by hand and by scikit-learn; intervals as a plain bootstrap has them."""

import json

import numpy as np
import pytest

from minislm import metrics
from minislm.metrics import confusion_matrix, evaluate, figures, interval, report

# rows true, columns predicted:   a  b  c  d  e
# c is never predicted, d is      3  1  0  0  0    a: precision 3/6, recall 3/4, F1 6/10
# never true, e is neither        1  2  0  1  0    b: precision 2/3, recall 2/4, F1 4/7
#                                 2  0  0  0  0    c: 0;  d: 0;  e: not counted
TRUTH = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
PREDICTED = [0, 1, 0, 0, 1, 0, 3, 1, 0, 0]


def test_figures_are_those_worked_by_hand():
    result = evaluate(TRUTH, PREDICTED, list("abcde"))
    assert result["n"] == 10 and result["labels"] == list("abcde")
    assert result["confusion"][:3] == [[3, 1, 0, 0, 0], [1, 2, 0, 1, 0], [2, 0, 0, 0, 0]]
    assert result["confusion"][3:] == [[0] * 5] * 2
    assert result["accuracy"] == 0.5
    assert result["macro_f1"] == pytest.approx((6 / 10 + 4 / 7 + 0 + 0) / 4, abs=1e-6)
    assert result["weighted_f1"] == pytest.approx((4 * 6 / 10 + 4 * 4 / 7 + 2 * 0) / 10, abs=1e-6)
    expected = {
        "a": (3 / 6, 3 / 4, 6 / 10, 4),
        "b": (2 / 3, 2 / 4, 4 / 7, 4),
        "c": (0, 0, 0, 2),
        "d": (0, 0, 0, 0),
        "e": (0, 0, 0, 0),
    }
    assert result["per_class"].keys() == expected.keys()
    for label, (precision, recall, f1, support) in expected.items():
        assert result["per_class"][label] == pytest.approx(
            {"precision": precision, "recall": recall, "f1": f1, "support": support}, abs=1e-6
        )


def texts(n: int, classes: int, right: int) -> tuple[np.ndarray, np.ndarray]:
    """True and predicted classes of n texts; `right` of ten predictions, or more, are correct."""
    i = np.arange(n)
    truth = i * i // 3 % classes
    return truth, np.where(i * 7 % 10 < right, truth, i * 5 % classes)


@pytest.mark.parametrize("n, classes, right, accuracy, macro, weighted", [
    # printed to six places by scikit-learn 1.9.1 for *texts(n, classes, right): accuracy_score, and
    # f1_score with average="macro", then "weighted", and zero_division=0
    (500, 6, 8, 0.864000, 0.824230, 0.868542),
    (60, 30, 5, 0.533333, 0.519676, 0.556740),
    (40, 3, 0, 0.575000, 0.530752, 0.613598),
    (9, 20, 4, 0.333333, 0.266667, 0.311111),
])  # fmt: skip
def test_figures_are_those_of_scikit_learn(n, classes, right, accuracy, macro, weighted):
    result = evaluate(*texts(n, classes, right), [str(i) for i in range(classes)])
    figures = [result[key] for key in ("accuracy", "macro_f1", "weighted_f1")]
    assert figures == [accuracy, macro, weighted]


def plain_f1(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """The figures of one sample, from their definitions."""
    present = np.union1d(truth, predicted)
    f1, support = [], []
    for c in present:
        hits = np.sum((truth == c) & (predicted == c))
        f1.append(2 * hits / (np.sum(truth == c) + np.sum(predicted == c)))
        support.append(np.sum(truth == c))
    return {
        "accuracy": np.mean(truth == predicted),
        "macro_f1": np.mean(f1),
        "weighted_f1": np.average(f1, weights=support),
    }


def test_intervals_are_those_of_resampling_the_texts():
    truth, predicted = texts(300, 6, 7)
    intervals = evaluate(truth, predicted, list("abcdef"))["interval_95"]
    rng = np.random.default_rng(1)
    draws = [plain_f1(truth[i], predicted[i]) for i in rng.integers(0, 300, (2000, 300))]
    assert intervals.keys() == draws[0].keys()
    for key, found in intervals.items():
        expected = interval(
            np.array([draw[key] for draw in draws]), plain_f1(truth, predicted)[key], 300
        )
        np.testing.assert_allclose(found, expected, atol=0.01)


def test_intervals_of_a_rare_class_are_those_of_resampling_the_texts():
    truth, predicted = np.repeat([0, 1, 2], [40, 20, 1]), np.repeat([0, 1, 0, 2], [35, 15, 10, 1])
    result, rng = evaluate(truth, predicted, list("abc")), np.random.default_rng(1)
    draws = [plain_f1(truth[i], predicted[i]) for i in rng.integers(0, 61, (4000, 61))]
    expected = interval(np.array([draw["macro_f1"] for draw in draws]), result["macro_f1"], 61)
    # a third of the draws leave the rare class out, and the mean with it
    np.testing.assert_allclose(result["interval_95"]["macro_f1"], expected, atol=0.01)


@pytest.mark.parametrize("bias", [0, -0.5, 1, 3])
def test_intervals_lie_around_the_figure_whatever_the_resamples_bias(bias):
    """Normal resamples, of .05 around .5 and a bias, of which the figure .5 has as much itself."""
    resamples = 0.5 + 0.05 * (bias + np.random.default_rng(0).normal(size=200_000))
    expected = 0.5 - 0.05 * bias + 0.05 * np.array([-1.96, 1.96])
    expected[1] = max(expected[1], 0.5)  # the figure is in it
    np.testing.assert_allclose(interval(resamples, 0.5, 100), expected, atol=0.002)


def test_intervals_end_where_figures_do():
    resamples = np.random.default_rng(0).normal(0.97, 0.02, 2000).clip(0, 1)
    low, high = interval(resamples, 0.98, 50)
    assert 0.9 < low < 0.98 and high == 1
    low, high = interval(1 - resamples, 0.02, 50)
    assert low == 0 and 0.02 < high < 0.1


def test_the_bias_of_resamples_that_are_mostly_the_same_is_that_of_their_mean():
    resamples = np.repeat([0.4, 0.5, 0.6], [300, 600, 100])  # of .48, where the figure is .5
    np.testing.assert_allclose(interval(resamples, 0.5, 100), (0.44, 0.64), atol=1e-9)


def test_the_interval_of_what_is_always_the_same():
    """Up to where 60 texts would be without an error, or all of them errors, 2.5% of the time."""
    low, high = interval(np.ones(2000), 1.0, 60)
    assert low**60 == pytest.approx(0.025) and high == 1
    low, high = interval(np.zeros(2000), 0.0, 60)
    assert low == 0 and (1 - high) ** 60 == pytest.approx(0.025)


def test_intervals_where_many_classes_are_predicted_and_none_is_true():
    """Resamples leave them out, so that all their macro-F1 lie above the figure."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 10, 300)
    predicted = np.where(rng.random(300) < 0.7, truth, rng.integers(0, 77, 300))
    result = evaluate(truth, predicted, [str(i) for i in range(77)])
    low, high = result["interval_95"]["macro_f1"]
    assert 0 < low <= result["macro_f1"] <= high < 1 and high - low > 0.03


def test_intervals_of_many_classes_hold_the_true_figure_as_often_as_they_say():
    """40 classes of 5 texts each, 80 samples: percentiles alone hold it in 65 of them."""
    rng, classes = np.random.default_rng(0), 40
    often = np.full((classes, classes), 0.3 / (classes - 1))
    np.fill_diagonal(often, 0.7)
    true, held = figures(often[None])[0]["macro_f1"][0], 0
    for _ in range(80):
        confusion = np.stack([rng.multinomial(5, row) for row in often])
        drawn = rng.multinomial(200, confusion.ravel() / 200, 400).reshape(-1, classes, classes)
        macro_f1 = figures(drawn)[0]["macro_f1"]
        low, high = interval(macro_f1, figures(confusion)[0]["macro_f1"], 200)
        held += low <= true <= high
    assert held >= 72


def test_intervals_hold_the_figures_and_depend_on_the_seed_alone():
    data = *texts(200, 6, 7), list("abcdef")
    result = evaluate(*data, seed=3)
    for key, (low, high) in result["interval_95"].items():
        assert low < result[key] < high
    assert evaluate(*data, seed=3) == result
    assert evaluate(*data, seed=4)["interval_95"] != result["interval_95"]


def test_intervals_do_not_depend_on_how_many_confusions_are_drawn_at_a_time(monkeypatch):
    data = *texts(200, 6, 7), list("abcdef")
    result = evaluate(*data)
    for cells in (1, 7 * 36, 10**4):
        monkeypatch.setattr(metrics, "CELLS", cells)
        assert evaluate(*data) == result


def test_sixteen_times_the_texts_quarter_the_intervals():
    truth, predicted = texts(200, 6, 7)
    few = evaluate(truth, predicted, list("abcdef"))
    many = evaluate(np.tile(truth, 16), np.tile(predicted, 16), list("abcdef"))
    for key, (low, high) in few["interval_95"].items():
        assert many[key] == few[key]
        ratio = np.diff(many["interval_95"][key]) / (high - low)
        assert ratio == pytest.approx(1 / 4, rel=0.15)


def test_a_result_without_a_mistake_is_not_certain():
    result = evaluate([0, 1, 1], [0, 1, 1], ["a", "b"])
    assert result["accuracy"] == result["macro_f1"] == result["weighted_f1"] == 1
    assert {*map(tuple, result["interval_95"].values())} == {(0.292402, 1.0)}  # .025 ** (1 / 3)


def test_an_index_outside_the_classes_is_an_error():
    with pytest.raises(IndexError):
        confusion_matrix([0, 1], [0, 2], 2)


def test_a_result_survives_json():
    result = evaluate(TRUTH, PREDICTED, list("abcde"))
    assert json.loads(json.dumps(result)) == result


# -------------------------------------------------------------------------------- report


def rows_of(text: str) -> dict[str, list[list[str]]]:
    """The lines of a report by their first word, each as its other words."""
    rows = {}
    for line in text.splitlines():
        first, *rest = line.split() or [""]
        rows.setdefault(first, []).append(rest)
    return rows


def test_a_report_has_every_figure_and_the_matrix():
    labels = ["anger", "a_class_with_quite_a_long_name", "c", "d", "e"]
    result = evaluate(TRUTH, PREDICTED, labels)
    rows = rows_of(report(result))
    names = {"accuracy": "accuracy", "macro-F1": "macro_f1", "weighted-F1": "weighted_f1"}
    for name, key in names.items():
        low, high = result["interval_95"][key]
        assert rows[name] == [f"{result[key]:.3f} 95% interval {low:.3f} to {high:.3f}".split()]
    assert rows["anger"] == [["0.500", "0.750", "0.600", "4"], ["3", "1", ".", ".", "."]]
    assert rows[labels[1]] == [["0.667", "0.500", "0.571", "4"], ["1", "2", ".", "1", "."]]
    assert rows["c"] == [["0.000", "0.000", "0.000", "2"], ["2", ".", ".", ".", "."]]
    assert rows["d"] == rows["e"] == [["0.000", "0.000", "0.000", "0"], ["."] * 5]


def test_large_counts_stay_apart():
    rows = rows_of(report(evaluate([0] * 54321 + [1], [0] * 12345 + [1] * 41977, ["x", "y"])))
    assert rows["x"][1] == ["12345", "41976"] and rows["y"][1] == [".", "1"]


def test_a_report_of_many_classes_lists_its_most_frequent_confusions():
    labels = [f"c{i}" for i in range(25)]
    counts = {(3, 4): 9, (4, 3): 7, (0, 24): 5} | {(i, i + 1): 2 for i in range(5, 12)}
    mistakes = [pair for pair, n in counts.items() for _ in range(n)] + [(20, 21)]
    truth, predicted = zip(*mistakes, *[(i, i) for i in range(25)] * 3)
    text = report(evaluate(truth, predicted, labels))
    rows = rows_of(text)
    for i, label in enumerate(labels):
        assert rows[label][0][-1] == str(truth.count(i)) and len(rows[label]) == 1
    worst = text.split("most frequent confusions\n")[1].splitlines()
    assert [line.split() for line in worst[:3]] == [
        ["9", "c3", "->", "c4"], ["7", "c4", "->", "c3"], ["5", "c0", "->", "c24"],
    ]  # fmt: skip
    assert [line.split()[0] for line in worst] == ["9", "7", "5"] + ["2"] * 7  # the ten worst
