"""What a table of labelled sequences holds, and what simple predictors make of it: no network should do worse.

counts   f = frequencies of the k-mers of a sequence, standardised over the training part
ridge    w = (F^T F + c I)^-1 F^T y,    y the values, or 1 and 0 for every class; c chosen on the validation part
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .data.labelled import LabelledData
from .sequence import encode

Array = npt.NDArray[np.float64]

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # times the number of training rows
_CODE = np.full(256, -1)
_CODE[encode("ACGT", "acgt")] = range(4)


def kmer_frequencies(sequences: Sequence[bytes], k: int) -> Array:
    """Share of every k-mer of A, C, G and T among a sequence's, (n, 4^k); k-mers with other letters are left out.

    Raises:
        ValueError: if k is not 1 to 6.
    """
    if not 1 <= k <= 6:
        raise ValueError(f"expected k-mers of 1 to 6 bases, got {k}")
    found = np.zeros((len(sequences), 4**k))
    for row, sequence in enumerate(sequences):
        codes = _CODE[encode(sequence, "acgt")]
        if len(codes) < k:
            continue
        windows = np.lib.stride_tricks.sliding_window_view(codes, k)
        words = windows[(windows >= 0).all(axis=1)] @ 4 ** np.arange(k)[::-1]
        if len(words):
            found[row] = np.bincount(words, minlength=4**k) / len(words)
    return found


def ridge(features: Array, values: Array, train: npt.NDArray[Any], val: npt.NDArray[Any]) -> Array:
    """Predictions for all rows of one column of values; the penalty is 1 per row where there is no validation part.

    Args:
        features: (n, f).
        values: (n,); NaN is missing.
        train: Rows to learn from.
        val: Rows that choose the penalty.
    """
    train, val = train[~np.isnan(values[train])], val[~np.isnan(values[val])]
    scale = features[train].std(axis=0)
    x = (features - features[train].mean(axis=0)) / np.where(scale > 0, scale, 1)
    mean = values[train].mean()
    gram, right = x[train].T @ x[train], x[train].T @ (values[train] - mean)
    tried = []
    for penalty in PENALTIES if len(val) else (1.0,):
        weights = np.linalg.solve(gram + penalty * len(train) * np.eye(x.shape[1]), right)
        found = mean + x @ weights
        tried.append((float(np.square(found[val] - values[val]).sum()), found))
    return min(tried, key=lambda pair: pair[0])[1]


def describe_labels(data: LabelledData, k: int = 4) -> str:
    """Parts, lengths, labels with weights, and what the most frequent label and k-mers give on held-out rows.

    Args:
        data: The table.
        k: Bases of a k-mer, 1 to 6.

    Returns:
        Lines of text. Held out is the test part, or the validation part of a table without one.

    Raises:
        ValueError: if k is out of range or the table does not fit its task.
    """
    data.setup()
    features = kmer_frequencies(data.sequences, k)
    train, val, test = (data.parts[part] for part in ("train", "val", "test"))
    held, name = (test, "test") if len(test) else (val, "val")
    lengths = [len(sequence) for sequence in data.sequences]
    lines = [
        f"{len(lengths):,} sequences: {len(train):,} train, {len(val):,} val, {len(test):,} test;"
        f" {min(lengths):,} to {max(lengths):,} bases, median {np.median(lengths):,.0f}"
    ]
    if data.classes:
        return "\n".join(lines + _classes(data, features, held, name, k)) + "\n"
    values = data.labels.astype(np.float64)
    if data.mean:
        values = values * np.array(data.deviation) + np.array(data.mean)
    columns = getattr(data, "label", None) or [str(column) for column in range(values.shape[1])]
    for column, title in enumerate(columns):
        lines += _values(data, features, values[:, column], held, f"{title}, {name}", k)
    return "\n".join(lines) + "\n"


def _classes(data: LabelledData, features: Array, held: npt.NDArray[Any], name: str, k: int) -> list[str]:
    counts = np.bincount(data.labels[data.parts["train"]], minlength=len(data.classes))
    lines = []
    for number, (title, count) in enumerate(zip(data.classes, counts)):
        parts = ", ".join(f"{(data.labels[rows] == number).sum():,} {part}" for part, rows in data.parts.items())
        weight = f"{counts.sum() / (len(counts) * count):.4f}" if count else "none, since it is not trained on"
        lines.append(f"class {title}: {parts}; weight {weight}")
    if not len(held):
        return lines
    one_hot = np.eye(len(data.classes))[data.labels]
    by_kmers = np.stack([ridge(features, y, data.parts["train"], data.parts["val"]) for y in one_hot.T]).argmax(0)
    for title, found in (
        (f"most frequent class ({data.classes[counts.argmax()]})", np.full(len(data.labels), counts.argmax())),
        (f"{k}-mers, ridge regression", by_kmers),
    ):
        truth, said = data.labels[held], found[held]
        lines.append(f"{title}: {name} accuracy {(truth == said).mean():.4f}, MCC {_mcc(truth, said):.4f}")
    return lines


def _values(data: LabelledData, features: Array, values: Array, held: npt.NDArray[Any], name: str, k: int) -> list[str]:
    train = data.parts["train"][~np.isnan(values[data.parts["train"]])]
    held = held[~np.isnan(values[held])]
    lines = []
    mean = values[train].mean() if len(train) else np.nan
    if data.task == "multilabel":
        positive = int((values[train] > 0.5).sum())
        weight = f"{(len(train) - positive) / positive:.4f}" if positive else "none, since there is none"
        lines.append(f"{name}: {positive:,} of {len(train):,} training rows positive, weight of a positive {weight}")
    if not len(held) or not len(train):
        return lines
    found, truth = ridge(features, values, data.parts["train"], data.parts["val"])[held], values[held]
    if data.task == "multilabel":
        common = ((truth > 0.5) == (mean > 0.5)).mean()
        lines.append(f"{name}, most frequent label: accuracy {common:.4f}, AUROC 0.5000")
        right = ((found > 0.5) == (truth > 0.5)).mean()
        return [*lines, f"{name}, {k}-mers, ridge regression: accuracy {right:.4f}, AUROC {_auroc(truth, found):.4f}"]
    lines.append(f"{name}, mean of the training part: RMSE {np.sqrt(np.square(truth - mean).mean()):.4f}")
    ranks = (_ranks(truth), _ranks(found))
    return [
        *lines,
        f"{name}, {k}-mers, ridge regression: RMSE {np.sqrt(np.square(truth - found).mean()):.4f},"
        f" Pearson {_pearson(truth, found):.4f}, Spearman {_pearson(*ranks):.4f}",
    ]


def _mcc(truth: npt.NDArray[Any], said: npt.NDArray[Any]) -> float:
    """Matthews correlation of classes; 0 where one of both is constant."""
    classes = np.unique(np.concatenate([truth, said]))
    a, b = (np.equal.outer(values, classes).astype(float) for values in (truth, said))
    a, b = a - a.mean(0), b - b.mean(0)
    norm = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / norm if norm > 0 else 0.0


def _ranks(values: Array) -> Array:
    """Ranks, the mean of equal ones."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (count.cumsum() - (count - 1) / 2)[place]


def _pearson(a: Array, b: Array) -> float:
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else float("nan")


def _auroc(truth: Array, score: Array) -> float:
    positive = truth > 0.5
    pairs = int(positive.sum()) * int((~positive).sum())
    if not pairs:
        return float("nan")
    count = int(positive.sum())
    return float((_ranks(score)[positive].sum() - count * (count + 1) / 2) / pairs)
