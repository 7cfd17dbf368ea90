"""The floor: 1-2-gram TF-IDF and a linear classifier, by scikit-learn (pip install -e ".[bench]").

    python benchmarks/tfidf.py DATA

Every classifier that scikit-learn users reach for first, at its default settings, fitted on train
and scored on test; nothing is chosen on the test split.
"""

import sys
from pathlib import Path

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, SGDClassifier
from sklearn.svm import LinearSVC

from minislm.data import class_indices, load_split, load_task
from minislm.metrics import evaluate

MODELS = {
    "SGD": SGDClassifier(random_state=0),
    "logistic regression": LogisticRegression(max_iter=1000),
    "linear SVM": LinearSVC(),
}


def main() -> None:
    folder = Path(sys.argv[1])
    task = load_task(folder)
    train, test = load_split(folder, "train"), load_split(folder, "test")
    vectorizer = TfidfVectorizer(ngram_range=(1, 2))
    x, x_test = (f([e.text for e in s]) for f, s in (
        (vectorizer.fit_transform, train), (vectorizer.transform, test)
    ))  # fmt: skip
    y, y_test = (class_indices(split, task, str(folder)) for split in (train, test))
    for name, model in MODELS.items():
        r = evaluate(y_test, model.fit(x, y).predict(x_test), task.labels)
        low, high = r["interval_95"]["macro_f1"]
        print(f"{name:<20} macro-F1 {r['macro_f1']:.3f} ({low:.3f} to {high:.3f})   "
              f"weighted-F1 {r['weighted_f1']:.3f}   n {r['n']}")  # fmt: skip


if __name__ == "__main__":
    main()
