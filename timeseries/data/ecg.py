"""A simulator of 12-lead electrocardiograms with several labels a record, for tests and first steps; no patient data.

Each beat is a sum of bumps (P, Q, R, S, T) seen by two electrical directions, leads I and II; all other limb leads
follow from these two, III = II - I, aVR = -(I + II) / 2, aVL = I - II / 2, aVF = II - I / 2. After McSharry, Clifford,
Tarassenko & Smith (2003), "A Dynamical Model for Generating Synthetic Electrocardiogram Signals".
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import xarray as xr

from .classification import ClassificationData

__all__ = ["ECG_CLASSES", "LEADS", "SyntheticECG", "create_ecg"]

LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
ECG_CLASSES = ("tachycardia", "bradycardia", "atrial_fibrillation", "st_elevation", "wide_qrs")
# Bumps of a beat: place before or after the R peak in s, width in s, size in mV in I, II and V1 .. V6.
WAVES = {
    "P": (-0.17, 0.025, (0.08, 0.15, 0.05, 0.06, 0.07, 0.08, 0.08, 0.08)),
    "Q": (-0.035, 0.010, (-0.06, -0.10, 0.0, 0.0, -0.03, -0.06, -0.08, -0.08)),
    "R": (0.0, 0.011, (0.60, 1.10, 0.20, 0.40, 0.80, 1.30, 1.20, 0.90)),
    "S": (0.035, 0.012, (-0.10, -0.20, -0.90, -1.20, -0.70, -0.40, -0.20, -0.10)),
    "T": (0.26, 0.055, (0.18, 0.30, 0.10, 0.30, 0.35, 0.35, 0.30, 0.25)),
}


def create_ecg(records: int, seconds: float = 4.0, rate: int = 100, noise: float = 0.02, seed: int = 0) -> xr.Dataset:
    """Simulated records.

    Args:
        records: Their number.
        seconds: Length of the longest; the shortest has three quarters of it.
        rate: Samples per second.
        noise: Standard deviation of the noise in mV.
        seed: Seed.

    Returns:
        `target` (series, time, variate) in mV, `length` (series,), and `label` (series, class) bool over `ECG_CLASSES`;
        a record may have none (normal) or several.

    Raises:
        ValueError: if a number is below 1.
    """
    steps = int(seconds * rate)
    if records < 1 or seconds < 1 or rate < 1:
        raise ValueError(
            f"expected at least 1 record, 1 second and 1 sample a second, got {records}, {seconds} and {rate}"
        )
    rng = np.random.default_rng(seed)
    labels = rng.random((records, len(ECG_CLASSES))) < 0.3
    labels[labels[:, 0] & labels[:, 1], 1] = False  # no heart is fast and slow at once
    lengths = rng.integers(3 * steps // 4, steps + 1, records)
    target = np.full((records, steps, len(LEADS)), np.nan, dtype=np.float32)
    for row, label, length in zip(target, labels, lengths):
        row[:length] = _record(label, length, rate, noise, rng)
    coords = {
        "series": [str(k) for k in range(records)],
        "time": np.arange(steps),
        "variate": list(LEADS),
        "length": ("series", lengths),
        "class": list(ECG_CLASSES),
        "units": ("variate", ["mV"] * len(LEADS)),
    }
    variables = {"target": (("series", "time", "variate"), target), "label": (("series", "class"), labels)}
    return xr.Dataset(variables, coords, {"freq": 1, "name": "ecg"})


def _record(label: np.ndarray, length: int, rate: int, noise: float, rng: np.random.Generator) -> np.ndarray:
    """One record (length, 12)."""
    fast, slow, fibrillation, elevation, wide = label
    pulse = rng.uniform(110, 150) if fast else rng.uniform(38, 52) if slow else rng.uniform(62, 95)
    beats = [-rng.uniform(0, 60 / pulse)]
    while beats[-1] < length / rate + 1:
        beats.append(beats[-1] + 60 / pulse * max(0.4, 1 + (0.25 if fibrillation else 0.03) * rng.standard_normal()))
    t = np.arange(length) / rate
    signal = np.zeros((length, 8))
    for beat in beats:
        for name, (place, width, sizes) in WAVES.items():
            if name == "P" and fibrillation:
                continue
            spread = 2.5 * width if wide and name in "QRS" else width
            bump = np.exp(-0.5 * ((t - beat - place * (60 / pulse) ** 0.5) / spread) ** 2)
            signal += bump[:, None] * np.array(sizes)
        if elevation:
            plateau = 1 / (1 + np.exp(-(t - beat - 0.06) / 0.01)) - 1 / (1 + np.exp(-(t - beat - 0.24) / 0.02))
            signal += 0.25 * plateau[:, None] * np.array([0.3, 1.0, 0.5, 0.8, 0.8, 0.5, 0.3, 0.3])
    if fibrillation:  # fine waves of the atria
        signal += 0.04 * np.sin(2 * np.pi * rng.uniform(5, 8) * t + rng.uniform(0, 6))[:, None]
    signal = rng.uniform(0.8, 1.2) * signal + noise * rng.standard_normal(signal.shape)
    one, two = signal[:, 0], signal[:, 1]
    limbs = np.stack([one, two, two - one, -(one + two) / 2, one - two / 2, two - one / 2], axis=1)
    return np.concatenate([limbs, signal[:, 2:]], axis=1)


class SyntheticECG(ClassificationData):
    """Simulated records, see `create_ecg`; for a task with `multilabel: true`.

    Args:
        train_records: Number of records to train on.
        test_records: Number of records to test on.
        seconds: Length of the longest.
        rate: Samples per second.
        data_seed: Seed of the records.
        options: Arguments of `ClassificationData`.
    """

    def __init__(
        self,
        train_records: int = 200,
        test_records: int = 100,
        seconds: float = 4.0,
        rate: int = 100,
        data_seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.sizes = {"train": train_records, "test": test_records}
        self.seconds, self.rate, self.data_seed = seconds, rate, data_seed

    def read(self, part: Literal["train", "test"]) -> xr.Dataset:
        """The simulated records."""
        return create_ecg(self.sizes[part], self.seconds, self.rate, seed=2 * self.data_seed + (part == "test"))
