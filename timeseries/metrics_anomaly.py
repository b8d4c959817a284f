"""How well scores tell anomalies: areas, F1 with and without thresholds, F1 of events.

`truth` is bool, `score` finite (or -inf: never flagged), larger where more suspicious. Ties count together.

Point adjustment credits a whole anomalous stretch as found once any step of it is flagged; long stretches are then
found by chance, and uniform random scores reach more than 0.9. It is here to compare with papers, never alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

__all__ = ["average_precision", "best_f1", "event_f1", "f1_point_adjusted", "f1_score", "roc_auc"]


def _curve(truth: Array, score: Array) -> tuple[Array, Array, Array]:
    """True and false positives when everything at or above each distinct score is flagged, and these scores."""
    order = np.argsort(-score, kind="stable")
    values, hits = score[order], truth[order].astype(np.float64)
    ends = np.flatnonzero(np.diff(values) != 0) if values.size else np.zeros(0, dtype=np.int64)
    last = np.concatenate([ends, [values.size - 1]]) if values.size else ends
    found = np.cumsum(hits)[last]
    return found, last + 1 - found, values[last]


def average_precision(truth: Array, score: Array) -> float:
    """Area under precision over recall by steps: sum of (R_k - R_{k-1}) P_k; NaN without anomalies."""
    truth, score = np.ravel(truth), np.ravel(score)
    if not truth.any():
        return float("nan")
    found, wrong, _ = _curve(truth, score)
    recall = found / truth.sum()
    return float((np.diff(recall, prepend=0.0) * found / (found + wrong)).sum())


def roc_auc(truth: Array, score: Array) -> float:
    """Chance that an anomalous step scores higher than a normal one, ties one half; NaN if there is one kind only."""
    truth, score = np.ravel(truth), np.ravel(score)
    if truth.all() or not truth.any():
        return float("nan")
    found, wrong, _ = _curve(truth, score)
    hit, miss = (np.concatenate([[0.0], part / part[-1]]) for part in (found, wrong))
    return float(np.trapezoid(hit, miss))


def f1_score(truth: Array, flagged: Array) -> float:
    """2 TP / (2 TP + FP + FN) of steps; NaN where nothing is true or flagged."""
    truth, flagged = np.ravel(truth), np.ravel(flagged)
    total = truth.sum() + flagged.sum()
    return float(2 * (truth & flagged).sum() / total) if total else float("nan")


def best_f1(truth: Array, score: Array) -> tuple[float, float]:
    """Largest F1 over all thresholds, and the threshold (flag at or above it); it looks at the truth."""
    truth, score = np.ravel(truth), np.ravel(score)
    if not truth.any():
        return float("nan"), float("nan")
    found, wrong, levels = _curve(truth, score)
    each = 2 * found / (found + wrong + truth.sum())
    best = int(each.argmax())
    return float(each[best]), float(levels[best])


def _events(flags: Array) -> Array:
    """First step and end of each stretch of True in one series, (events, 2)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    return edges.reshape(-1, 2)


def event_f1(truth: Array, flagged: Array) -> float:
    """F1 in which a stretch counts once: recall is of true stretches touched, precision of flagged ones that touch.

    Args:
        truth: (series, time) or (time,).
        flagged: The same shape.
    """
    truth, flagged = np.atleast_2d(truth), np.atleast_2d(flagged)
    hit = real = right = claimed = 0
    for true, flag in zip(truth, flagged):
        events, claims = _events(true), _events(flag)
        hit += sum(bool(flag[a:b].any()) for a, b in events)
        right += sum(bool(true[a:b].any()) for a, b in claims)
        real, claimed = real + len(events), claimed + len(claims)
    if not real and not claimed:
        return float("nan")
    recall, precision = hit / max(1, real), right / max(1, claimed)
    return 2 * precision * recall / (precision + recall) if hit else 0.0


def f1_point_adjusted(truth: Array, score: Array) -> float:
    """Largest F1 over thresholds after each true stretch with one flagged step is counted as found whole.

    Warning: uniform random scores reach 0.9 and more where anomalies are long. Report `best_f1` and
    `average_precision` beside it, and what random scores reach.

    Args:
        truth: (series, time) or (time,).
        score: The same shape.
    """
    truth, score = np.atleast_2d(truth), np.atleast_2d(score)
    adjusted = score.astype(np.float64).copy()
    for row, true in zip(adjusted, truth):
        for a, b in _events(true):
            row[a:b] = row[a:b].max()
    known = np.isfinite(adjusted)
    return best_f1(truth[known], adjusted[known])[0]
