"""Classifiers on features that are not trained: the field's cheap methods, and its floor.

nearest: votes of the k most similar training texts (Cover & Hart 1967), by the cosine of embeddings
less their mean (Wang et al. 2019). prototypes: the cosine to each class's mean (Snell et al. 2017).
logistic: a linear classifier with a ridge on standardised features. tfidf: a linear SVM (one class
against the rest, squared hinge, as in LIBLINEAR, Fan et al. 2008) on counts of words and word
pairs, weighted by rarity (Sparck Jones 1972); no model.

Each is fitted to all training texts at once; its one setting has the best macro-F1 on validation
(prototypes' scale the least cross-entropy, as it changes no prediction).
Axes: N training texts, B texts, D features, C classes.
"""

import re
import zlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .metrics import confusion_matrix, figures

WORD = re.compile(r"\w\w+|[^\w\s]")
KS, SCALES = (1, 3, 5, 10, 20, 50), (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
RIDGES = (1e-2, 1e-3, 1e-4, 3e-5, 1e-5, 1e-6)
LBFGS = dict(max_iter=200, history_size=10, line_search_fn="strong_wolfe")


class Fitted(nn.Module):
    """A head whose state fit(x, y, x_validation, y_validation) sets; x (N, 1, D), y (N,) int64."""

    state: tuple[str, ...]  # names of the buffers

    def __init__(self, classes: int):
        super().__init__()
        self.classes = classes
        for name in self.state:
            self.register_buffer(name, torch.zeros(0))


def macro_f1(scores: Tensor, y: Tensor) -> float:
    confusion = confusion_matrix(y.cpu(), scores.argmax(-1).cpu(), scores.shape[1])  # (C, C)
    return figures(confusion)[0]["macro_f1"].item()


class Nearest(Fitted):
    state = ("keys", "targets", "k", "mean")

    def fit(self, x: Tensor, y: Tensor, x_validation: Tensor, y_validation: Tensor) -> None:
        self.mean = x[:, 0].mean(0)
        self.keys, self.targets, f1 = self.unit(x), y, {}
        for k in (k for k in KS if k <= len(x)):
            self.k = torch.tensor(k)
            f1[k] = macro_f1(self(x_validation), y_validation)
        self.k = torch.tensor(max(f1, key=f1.get))

    def unit(self, x: Tensor) -> Tensor:
        """x (B, 1, D) -> (B, D) of length 1, without what all texts have in common."""
        return F.normalize(x[:, 0] - self.mean, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 1, D) -> (B, C), logarithms of the neighbours' votes, near ones counting more."""
        near = (self.unit(x) @ self.keys.T).topk(int(self.k), -1)
        weights = (near.values / 0.05).softmax(-1)  # (B, k), at CosineHead's first temperature
        votes = weights.new_full((len(x), self.classes), 1e-6)  # log 0 is no score
        return votes.scatter_add(1, self.targets[near.indices], weights).log()


class Prototypes(Fitted):
    state = ("means", "scale")

    def fit(self, x: Tensor, y: Tensor, x_validation: Tensor, y_validation: Tensor) -> None:
        members = F.one_hot(y, self.classes).to(x.dtype)  # (N, C)
        self.means = F.normalize(members.T @ F.normalize(x[:, 0], dim=-1), dim=-1)  # (C, D)
        self.scale = torch.tensor(1.0)
        cosines = self(x_validation)  # (N, C)
        loss = {scale: F.cross_entropy(scale * cosines, y_validation) for scale in SCALES}
        self.scale = torch.tensor(min(loss, key=loss.get))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.normalize(x[:, 0], dim=-1) @ self.means.T


class Logistic(Fitted):
    state = ("weight", "bias", "mean", "deviation")
    loss = staticmethod(F.cross_entropy)  # of scores (N, C) and y

    def fit(self, x: Tensor, y: Tensor, x_validation: Tensor, y_validation: Tensor) -> None:
        self.measure(x)
        x, x_validation = self.features(x), self.features(x_validation)  # (N, D), dense or sparse
        best, like = -1.0, dict(dtype=x.dtype, device=x.device, requires_grad=True)
        weight = torch.zeros(x.shape[1], self.classes, **like)
        bias = torch.zeros(self.classes, **like)
        for ridge in RIDGES:  # the strongest first; each starts where the last ended
            lbfgs = torch.optim.LBFGS([weight, bias], **LBFGS)

            def objective() -> Tensor:
                lbfgs.zero_grad()
                value = self.loss(x @ weight + bias, y) + ridge * weight.square().sum()
                value.backward()
                return value

            lbfgs.step(objective)
            if (found := macro_f1(x_validation @ weight + bias, y_validation)) > best:
                best, self.weight, self.bias = found, weight.detach().clone(), bias.detach().clone()

    def measure(self, x: Tensor) -> None:
        self.mean, self.deviation = x[:, 0].mean(0), x[:, 0].std(0, correction=0).clamp_min(1e-6)

    def features(self, x: Tensor) -> Tensor:
        return (x[:, 0] - self.mean) / self.deviation

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x) @ self.weight + self.bias


class NGrams:
    """What stands in the place of a Prompt where there is no model to ask."""

    def __init__(self, task):
        self.task, self.truncated = task, 0

    def render(self, text: str) -> str:
        return text.encode("utf-8", "replace").decode()

    def branches(self, text: str) -> list[list[int]]:
        """Hashes of the text's words and pairs of neighbouring words: one list, for one prompt."""
        words = WORD.findall(text.lower())
        grams = words + [f"{a} {b}" for a, b in zip(words, words[1:])]
        return [[zlib.crc32(gram.encode("utf-8", "replace")) for gram in grams]]


class Tfidf(Logistic):
    """x: the texts' n-grams, list[list[int]]; those that training has not seen are ignored.
    feature = (1 + log count) * (1 + log((1 + N) / (1 + texts that have it))), rows of unit length.
    """

    state = (*Logistic.state, "grams", "rarity")

    def measure(self, x: list[list[int]]) -> None:
        grams = torch.tensor([gram for text in x for gram in set(text)], dtype=torch.int64)
        if not len(grams):
            raise ValueError("tfidf: no training text has a word of two letters or a sign")
        self.grams, texts = grams.unique(return_counts=True)  # sorted; how many texts have each
        self.rarity = 1 + torch.log((1 + len(x)) / (1 + texts))

    def loss(self, scores: Tensor, y: Tensor) -> Tensor:
        signs = 2 * F.one_hot(y, self.classes) - 1
        return (1 - signs * scores).clamp_min(0).square().sum(1).mean()

    def features(self, x: list[list[int]]) -> Tensor:
        """(B, D), sparse."""
        places, values = [], []
        for i, text in enumerate(x):
            grams, counts = torch.tensor(text, dtype=torch.int64).unique(return_counts=True)
            at = torch.searchsorted(self.grams, grams).clamp_max(len(self.grams) - 1)
            known = self.grams[at] == grams
            at, counts = at[known], counts[known]
            places.append(torch.stack([torch.full_like(at, i), at]))
            values.append(F.normalize((1 + counts.log()) * self.rarity[at], dim=0))
        places, size = torch.cat(places, 1), (len(x), len(self.grams))
        return torch.sparse_coo_tensor(places, torch.cat(values), size, check_invariants=False)
