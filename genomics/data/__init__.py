"""Data modules of this domain, which deliver `SequenceBatch`; importing this package loads Lightning."""

from .batch import SequenceBatch as SequenceBatch
from .labelled import LabelledSequences as LabelledSequences
from .synthetic import SyntheticDNA as SyntheticDNA
from .synthetic import SyntheticLabels as SyntheticLabels
from .synthetic import codon_usage as codon_usage
from .synthetic import synthetic_genome as synthetic_genome
from .windows import FastaWindows as FastaWindows

__all__ = [
    "FastaWindows",
    "LabelledSequences",
    "SequenceBatch",
    "SyntheticDNA",
    "SyntheticLabels",
    "codon_usage",
    "synthetic_genome",
]
