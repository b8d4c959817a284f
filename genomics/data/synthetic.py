"""DNA that needs no file: genes with codons used unequally on both strands of a random background."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..annotation import Feature
from ..reference import Reference
from ..sequence import reverse_complement
from .labelled import LabelledData
from .windows import FastaWindows

_STOPS = ("TAA", "TAG", "TGA")
_PROMOTER = "TTGACA" + "ATTCGATCCGATTGACG" + "TATAAT"
CODONS = [a + b + c for a in "ACGT" for b in "ACGT" for c in "ACGT" if a + b + c not in _STOPS]


def codon_usage(seed: int = 0, spread: float = 0.3) -> npt.NDArray[np.float64]:
    """(61,) shares of the sense codons `CODONS`, drawn once from a Dirichlet law; smaller `spread` is more unequal."""
    return np.random.default_rng(seed).dirichlet(np.full(len(CODONS), spread))


def synthetic_genome(
    bases: int = 100_000, coding: float = 0.85, seed: int = 0, spread: float = 0.3
) -> tuple[bytes, list[Feature]]:
    """A genome and its genes.

    Args:
        bases: Length.
        coding: Share of bases in genes.
        seed: Of everything.
        spread: See `codon_usage`.

    Returns:
        The sequence and its genes (type "CDS"), each with a promoter 10 bases before its start.
    """
    rng = np.random.default_rng(seed)
    usage = codon_usage(seed, spread)
    parts: list[bytes] = []
    genes: list[Feature] = []
    at = 0
    while at < bases:
        codons = int(rng.integers(60, 300))
        gene = "ATG" + "".join(rng.choice(CODONS, codons, p=usage)) + str(rng.choice(_STOPS))
        space = _random(rng, max(50, int(len(gene) * (1 - coding) / coding * rng.uniform(0.5, 1.5))))
        unit = (_PROMOTER + _random(rng, 10) + gene).encode()
        strand = "+" if rng.random() < 0.5 else "-"
        start = at + len(space) + (len(unit) - len(gene) if strand == "+" else 0)
        unit = unit if strand == "+" else reverse_complement(unit)
        if at + len(space) + len(unit) > bases:
            parts.append(_random(rng, bases - at).encode())
            break
        parts += [space.encode(), unit]
        at += len(space) + len(unit)
        genes.append(Feature("synthetic", start, start + len(gene), strand, "CDS", f"gene{len(genes)}"))
    return b"".join(parts), genes


def _random(rng: np.random.Generator, length: int) -> str:
    return "".join(rng.choice(list("ACGT"), length))


class SyntheticDNA(FastaWindows):
    """Windows of a synthetic genome.

    Args:
        bases: Length of the genome.
        coding: Share of bases in genes.
        data_seed: Of the genome; `seed` is that of the windows.
        spread: Smaller uses codons more unequally.
        length: Bases of a window.
        batch_size: Rows of a batch.
        options: Further arguments of `FastaWindows`.
    """

    def __init__(
        self,
        bases: int = 100_000,
        coding: float = 0.85,
        data_seed: int = 0,
        spread: float = 0.3,
        length: int = 256,
        batch_size: int = 16,
        **options: Any,
    ) -> None:
        super().__init__([], length=length, batch_size=batch_size, **options)
        sequence, self.genes = synthetic_genome(bases, coding, data_seed, spread)
        self.reference = Reference.from_sequences({"synthetic": sequence})

    def references(self) -> list[Reference]:
        """The one genome."""
        return [self.reference]


class SyntheticLabels(LabelledData):
    """Short sequences to classify: coding or not, or with a promoter or not.

    Args:
        kind: "coding" or "promoter".
        samples: Number of sequences.
        length: Bases of each.
        data_seed: Of the sequences.
        options: Further arguments of `LabelledData`.
    """

    def __init__(
        self,
        kind: Literal["coding", "promoter"] = "coding",
        samples: int = 512,
        length: int = 120,
        data_seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(task="binary", max_length=length, **options)
        self.kind, self.samples, self.data_seed = kind, samples, data_seed

    def rows(self) -> tuple[list[str], npt.NDArray[Any], list[str] | None]:
        """Half of each class."""
        rng = np.random.default_rng(self.data_seed)
        usage = codon_usage(self.data_seed)
        length = self.max_length
        found = []
        for k in range(self.samples):
            text = _random(rng, length)
            if k % 2 and self.kind == "coding":
                text = "".join(rng.choice(CODONS, -(-length // 3), p=usage))[:length]
            elif k % 2:
                at = int(rng.integers(max(1, length - len(_PROMOTER))))
                text = (text[:at] + _PROMOTER + text[at:])[:length]
            found.append(text)
        return found, np.arange(self.samples) % 2, None
