"""Sequences with labels, from tables: classes, several bits, or measured values."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from ..files import table_rows
from ..sequence import encode, normalise, reverse_complement
from ..sequence import vocabulary as find_vocabulary
from .batch import SequenceBatch
from .regions import ALIASES, PARTS
from .samplers import ResumableData, WindowSampler

Task = Literal["binary", "multiclass", "multilabel", "regression"]


class LabelledDataset(Dataset):
    """Encoded sequences of one part, padded to the longest of a batch."""

    def __init__(self, data: LabelledData, chosen: npt.NDArray[np.int64], *, training: bool, seed: int) -> None:
        self.data, self.chosen, self.training, self.seed = data, chosen, training, seed

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitems__(self, numbers: Sequence[int]) -> SequenceBatch:
        data, words = self.data, self.data.words
        rows = [int(self.chosen[number % len(self.chosen)]) for number in numbers]
        found = []
        for number, row in zip(numbers, rows):
            bases = data.sequences[row]
            flip = self.training and np.random.default_rng((self.seed, number)).random() < data.rc_prob
            found.append(reverse_complement(bases) if flip else bases)
        width = max(map(len, found)) + int(data.bos)
        tokens = np.full((len(rows), width), words.pad, np.int64)
        mask = np.zeros((len(rows), width), bool)
        for k, bases in enumerate(found):
            tokens[k, 0] = words.bos
            tokens[k, int(data.bos) : int(data.bos) + len(bases)] = encode(bases, words)
            mask[k, : int(data.bos) + len(bases)] = True
        labels = torch.from_numpy(data.labels[rows])
        return SequenceBatch(torch.from_numpy(tokens), torch.from_numpy(mask), labels)


class LabelledData(ResumableData):
    """Base of labelled sequences; a subclass says in `rows` where they come from.

    Args:
        task: "binary" and "multiclass" give int64 classes (b,); "multilabel" and "regression" float32 (b, k), of which
            NaN is missing.
        max_length: Longest sequence; longer ones are cut.
        truncate: Which end is cut: "right", "left", or "both" to keep the middle.
        rc_prob: Share of training sequences that are read on the reverse strand.
        standardise: Regression: shift and scale values by mean and deviation of the training part.
        val_share, test_share: Parts drawn by seed, the same share of each class, where the table has no split.
        bos: Begin with the start id.
        vocabulary: "byte", "char" or "acgt".
        batch_size: Sequences of a batch.
        seed: Of split and order.
        num_workers: Loader processes.

    Attributes:
        num_classes: Classes, or columns of values.
        vocab_size: Number of ids.
        classes: Text of each class as the table has it, by number.

    Raises:
        ValueError: if an option is out of range.
    """

    def __init__(
        self,
        task: Task = "binary",
        max_length: int = 1024,
        truncate: Literal["right", "left", "both"] = "right",
        rc_prob: float = 0.0,
        standardise: bool = True,
        val_share: float = 0.1,
        test_share: float = 0.1,
        bos: bool = False,
        vocabulary: str = "acgt",
        batch_size: int = 32,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if min(max_length, batch_size) < 1:
            raise ValueError(f"expected max_length and batch_size of at least 1, got {max_length} and {batch_size}")
        if not 0 <= rc_prob <= 1:
            raise ValueError(f"expected rc_prob from 0 to 1, got {rc_prob}")
        if min(val_share, test_share) < 0 or val_share + test_share >= 1:
            shares = f"val_share {val_share} and test_share {test_share}"
            raise ValueError(f"expected shares that are not negative and sum to below 1, got {shares}")
        self.task, self.max_length, self.truncate, self.rc_prob = task, max_length, truncate, rc_prob
        self.standardise, self.val_share, self.test_share, self.bos = standardise, val_share, test_share, bos
        self.vocabulary, self.words = vocabulary, find_vocabulary(vocabulary)
        self.vocab_size = self.words.size
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers
        self.sequences: list[bytes] = []
        self.labels: npt.NDArray[Any] = np.zeros(0)
        self.classes: list[str] = []
        self.parts: dict[str, npt.NDArray[np.int64]] = {}
        self.mean: list[float] = []
        self.deviation: list[float] = []

    @abstractmethod
    def rows(self) -> tuple[list[str], npt.NDArray[Any], list[str] | None]:
        """Sequences, labels (n,) or (n, k), and the part of each row where the table says it."""

    @property
    def num_classes(self) -> int:
        """Classes, or columns of values."""
        self.setup()
        return len(self.classes) if self.classes else self.labels.shape[1]

    def setup(self, stage: str | None = None) -> None:
        """Read, check, number the classes and split.

        Raises:
            ValueError: if a sequence holds letters that are none, labels do not fit the task, or a part is empty.
        """
        if self.parts:
            return
        texts, labels, split = self.rows()
        for k, text in enumerate(texts):
            try:
                if not text:
                    raise ValueError("the sequence is empty")
                self.sequences.append(self._cut(normalise(text)))
            except ValueError as error:
                raise ValueError(f"row {k + 1}: {error}") from error
        if self.task in ("binary", "multiclass"):
            names, numbers = np.unique(labels.astype(str), return_inverse=True)
            self.classes, self.labels = names.tolist(), numbers.astype(np.int64)
            if len(self.classes) < 2 or (self.task == "binary" and len(self.classes) != 2):
                raise ValueError(f"task {self.task!r} with the classes {self.classes[:5]}; expected two (or more)")
        else:
            self.labels = labels.astype(np.float32).reshape(len(texts), -1)
        self.parts = self._split(split)
        if self.task == "regression" and self.standardise:
            known = self.labels[self.parts["train"]]
            mean, deviation = np.nanmean(known, axis=0), np.nanstd(known, axis=0)
            deviation[deviation == 0] = 1
            self.mean, self.deviation = mean.tolist(), deviation.tolist()
            self.labels = ((self.labels - mean) / deviation).astype(np.float32)

    def _cut(self, bases: bytes) -> bytes:
        extra = len(bases) - self.max_length
        if extra <= 0:
            return bases
        start = {"right": 0, "left": extra, "both": extra // 2}[self.truncate]
        return bases[start : start + self.max_length]

    def _split(self, split: list[str] | None) -> dict[str, npt.NDArray[np.int64]]:
        if split is not None:
            words = np.array([ALIASES.get(word.lower(), word.lower()) for word in split])
            if strange := sorted(set(words.tolist()) - set(PARTS)):
                raise ValueError(f"expected train, val and test in the split column, got {strange[:3]}")
            parts = {part: np.flatnonzero(words == part) for part in PARTS}
            if len(parts["val"]) == 0:  # benchmark files without validation data
                parts["train"], parts["val"] = self._draw(parts["train"], self.val_share)
        else:
            rest, test = self._draw(np.arange(len(self.sequences)), self.test_share)
            train, val = self._draw(rest, self.val_share / max(1e-9, 1 - self.test_share))
            parts = {"train": train, "val": val, "test": test}
        if len(parts["train"]) == 0:
            raise ValueError("the training part is empty")
        return parts

    def _draw(self, rows: npt.NDArray[np.int64], share: float) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """What stays, and a share drawn by seed, of each class alike."""
        groups = self.labels[rows] if self.classes else np.zeros(len(rows))
        rng = np.random.default_rng(self.seed)
        drawn = [
            rng.permutation(rows[groups == group])[: round(share * int((groups == group).sum()))]
            for group in np.unique(groups)
        ]
        taken = np.sort(np.concatenate(drawn)) if drawn else rows[:0]
        return np.setdiff1d(rows, taken), taken

    def train_dataloader(self) -> DataLoader[SequenceBatch]:
        """Training sequences in a seeded random order."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[SequenceBatch]:
        """Validation sequences in order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[SequenceBatch]:
        """Test sequences in order."""
        return self._loader("test")

    def _loader(self, part: str, *, shuffle: bool = False) -> DataLoader[SequenceBatch]:
        self.setup()
        seed = self.seed + 7_919 * self.run_seed
        dataset = LabelledDataset(self, self.parts[part], training=shuffle, seed=seed)
        sampler = WindowSampler(dataset, shuffle=shuffle, seed=seed)
        return self.ordered_loader(sampler, self.batch_size, self.num_workers)

    def state(self) -> dict[str, Any]:
        """How a saved model reads sequences, and what its outputs mean."""
        self.setup()
        facts = {"vocabulary": self.vocabulary, "bos": self.bos, "task": self.task, "classes": self.classes}
        return facts | {"mean": self.mean, "deviation": self.deviation, "max_length": self.max_length}


class LabelledSequences(LabelledData):
    """Sequences and labels of a table.

    Args:
        path: .csv, .tsv (also .gz) or .parquet.
        sequence: Column with the sequences.
        label: Column with the labels, or several for "multilabel" and "regression".
        split: Column that says train, val or test; None draws the parts by seed.
        task: See `LabelledData`.
        max_length: Longest sequence.
        options: Further arguments of `LabelledData`.
    """

    def __init__(
        self,
        path: str,
        sequence: str = "sequence",
        label: str | list[str] = "label",
        split: str | None = None,
        task: Task = "binary",
        max_length: int = 1024,
        **options: Any,
    ) -> None:
        super().__init__(task=task, max_length=max_length, **options)
        self.path, self.sequence, self.split = path, sequence, split
        self.label = [label] if isinstance(label, str) else list(label)
        if len(self.label) > 1 and task in ("binary", "multiclass"):
            raise ValueError(f"task {task!r} takes one label column, got {self.label}")

    def rows(self) -> tuple[list[str], npt.NDArray[Any], list[str] | None]:
        """Of the file.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if a column is missing, a value is no number, or the file is empty.
        """
        columns = read_table(self.path)
        for name in (self.sequence, *self.label, *([self.split] if self.split else [])):
            if name not in columns:
                raise ValueError(f"{self.path} has no column {name!r}; it has {', '.join(columns)}")
        texts = [str(text) for text in columns[self.sequence]]
        if not texts:
            raise ValueError(f"{self.path} has no rows")
        split = [str(word) for word in columns[self.split]] if self.split else None
        if self.task in ("binary", "multiclass"):
            return texts, np.array(columns[self.label[0]]), split
        try:
            values = [[float(v) if v not in ("", None) else np.nan for v in columns[name]] for name in self.label]
        except ValueError as error:
            raise ValueError(f"{self.path}: labels of task {self.task!r} must be numbers ({error})") from error
        return texts, np.array(values).T, split


def read_table(path: str) -> dict[str, list[Any]]:
    if path.endswith(".parquet"):
        if not Path(path).is_file():
            raise FileNotFoundError(2, "No such file", path)
        import pandas as pd

        try:
            frame = pd.read_parquet(path)
            columns = [frame.iloc[:, place].tolist() for place in range(frame.shape[1])]
        except (ImportError, PermissionError):
            raise
        except Exception as error:  # Arrow's kinds of errors; texts that are no UTF-8 show only in the second line
            raise ValueError(f"{path} is damaged or no Parquet file ({error}); fetch it again") from error
        if not frame.columns.is_unique:
            raise ValueError(
                f"{path}: two columns are named {frame.columns[frame.columns.duplicated()][0]!r}; rename one"
            )
        return dict(zip(map(str, frame.columns), columns))
    stem = path.removesuffix(".gz")
    if not stem.endswith((".csv", ".tsv")):
        raise ValueError(f"unknown kind of table {path!r}; expected .csv, .tsv (also .gz) or .parquet")
    rows = []
    for number, row in table_rows(path, "," if stem.endswith(".csv") else "\t"):
        rows.append(row)
        if len(row) != len(rows[0]):
            raise ValueError(f"{path}, line {number}: expected {len(rows[0])} columns, got {len(row)}")
    return {name: [row[k] for row in rows[1:]] for k, name in enumerate(rows[0])}
