"""Data modules of this domain, which deliver `SequenceBatch`; importing this package loads Lightning."""

from .batch import SequenceBatch as SequenceBatch
from .genes import AnnotatedWindows as AnnotatedWindows
from .genes import GeneWindows as GeneWindows
from .labelled import LabelledSequences as LabelledSequences
from .samplers import SaveInside as SaveInside
from .synthetic import SyntheticDNA as SyntheticDNA
from .synthetic import SyntheticLabels as SyntheticLabels
from .synthetic import codon_usage as codon_usage
from .synthetic import synthetic_genome as synthetic_genome
from .windows import FastaWindows as FastaWindows

__all__ = [
    "AnnotatedWindows",
    "FastaWindows",
    "GeneWindows",
    "LabelledSequences",
    "SaveInside",
    "SequenceBatch",
    "SyntheticDNA",
    "SyntheticLabels",
    "codon_usage",
    "synthetic_genome",
]
