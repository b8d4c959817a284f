"""Windows with annotation: around genes in their orientation, and with a label for every base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..annotation import Feature, read_features
from ..intervals import Interval
from .batch import SequenceBatch
from .windows import IGNORE, FastaWindows, WindowDataset

__all__ = ["AnnotatedWindows", "GeneWindows"]


class GeneDataset(WindowDataset):
    """One window for each gene that lies in the regions of a part, read in the gene's direction."""

    data: GeneWindows

    def __init__(self, data: GeneWindows, regions: Sequence[Interval], *, training: bool, seed: int) -> None:
        self.data, self.regions, self.training, self.seed = data, list(regions), training, seed
        self.random, self.cumulative = False, {}
        self.genes = [gene for gene in data.genes if self._region_of(gene) is not None]
        self.rows = [[self._place(gene)] for gene in self.genes]
        if not self.rows:
            raise ValueError("no gene lies in a part; see the split, the annotation and gene_type")

    def _region_of(self, gene: Feature) -> Interval | None:
        for region in self.regions:
            if region.chrom == gene.chrom and region.start <= gene.start and gene.end <= region.end:
                return region
        return None

    def _place(self, gene: Feature) -> Interval:
        """The window: centred, moved into the gene's region unless that is a whole ring."""
        region = self._region_of(gene)
        assert region is not None  # genes elsewhere are left out
        length = self.data.length
        start = gene.interval.resize(length).start
        if self._is_ring(region, length):
            return Interval(gene.chrom, start, start + length, gene.strand)
        start = max(region.start, min(start, region.end - length))
        return Interval(gene.chrom, start, min(start + length, region.end), gene.strand)

    def window(self, number: int, length: int | None = None) -> tuple[list[Interval], list[bool], np.random.Generator]:
        """The place of a gene, and whether the gene lies on the reverse strand."""
        places = self.rows[number % len(self.rows)]
        return places, [places[0].strand == "-"], np.random.default_rng((self.seed, number))

    def __getitems__(self, numbers: Sequence[int], length: int | None = None) -> SequenceBatch:
        batch = super().__getitems__(numbers)
        if self.data.label is None:
            return batch
        classes = [self.data.class_of(self.genes[number % len(self.rows)]) for number in numbers]
        return batch._replace(labels=torch.tensor(classes))


class GeneWindows(FastaWindows):
    """Windows centred on genes, in the direction of the gene; for language models of genes, or to classify genes.

    A gene belongs to the part in whose regions it lies as a whole; its window does not leave the region.

    Args:
        fasta: FASTA or GenBank file, or several.
        annotation: GFF3, GTF, BED, table or GenBank file with the genes.
        gene_type: Type of its features that count as genes.
        label: Attribute (or column of a table) of the genes to predict; its values, sorted, are the classes. Genes
            without it are left out. None: no labels.
        length: Bases of a window; longer genes are cut at both ends.
        options: Further arguments of `FastaWindows`.

    Raises:
        ValueError: for an option of random windows.

    Attributes:
        num_classes: Values of the label.
        classes: These values, in order.
    """

    def __init__(
        self,
        fasta: str | list[str],
        annotation: str,
        gene_type: str = "CDS",
        label: str | None = None,
        length: int = 8192,
        **options: Any,
    ) -> None:
        wrong = sorted({"length_schedule", "pack", "sampling", "stride", "epoch_size", "rc_prob"} & set(options))
        if wrong:
            raise ValueError(f"windows of genes are one for each gene, in its direction; leave out {', '.join(wrong)}")
        super().__init__(fasta, length=length, **options)
        self.annotation, self.gene_type, self.label = annotation, gene_type, label
        self.genes: list[Feature] = []
        self.classes: list[str] = []

    def setup(self, stage: str | None = None) -> None:
        """Open the genomes, split them and read the genes.

        Raises:
            ValueError: if there are no such genes, or fewer than two values of the label.
        """
        super().setup(stage)
        if self.genes:
            return
        found = [gene for gene in read_features(self.annotation, [self.gene_type]) if gene.chrom in self._genomes]
        if not found:
            raise ValueError(f"{self.annotation} has no features of type {self.gene_type!r} on the genome's contigs")
        if self.label is not None:
            found = [gene for gene in found if gene.attributes.get(self.label)]
            self.classes = sorted({gene.attributes[self.label] for gene in found})
            if len(self.classes) < 2:
                raise ValueError(
                    f"{self.annotation}: the label {self.label!r} has the values {self.classes}, expected two"
                )
        self.genes = found

    @property
    def num_classes(self) -> int:
        """Values of the label."""
        self.setup()
        return len(self.classes)

    def class_of(self, gene: Feature) -> int:
        """Number of a gene's class."""
        return self.classes.index(gene.attributes[self.label or ""])

    def make_dataset(self, regions: Sequence[Interval], *, training: bool, seed: int) -> WindowDataset:
        """The genes of one part."""
        return GeneDataset(self, regions, training=training, seed=seed)

    def state(self) -> dict[str, Any]:
        """How a saved model reads sequences, and its classes."""
        return super().state() | {"classes": self.classes}


class AnnotatedDataset(WindowDataset):
    """Windows with the class of every base."""

    data: AnnotatedWindows

    def __getitems__(self, numbers: Sequence[int], length: int | None = None) -> SequenceBatch:
        batch = super().__getitems__(numbers, length)
        labels = np.full(tuple(batch.tokens.shape), IGNORE, np.int64)
        for row, number in enumerate(numbers):
            places, flips, _ = self.window(number, length)
            at = 0
            for place, flip in zip(places, flips):
                at += int(self.data.bos)
                labels[row, at : at + len(place)] = self.data.classes_at(place, flip)
                at += len(place)
        return batch._replace(labels=torch.from_numpy(labels))


class AnnotatedWindows(FastaWindows):
    """Windows with a class for every base, for `TokenClassification`: 0 outside all features, else their type.

    Args:
        fasta: FASTA or GenBank file, or several.
        annotation: GFF3, GTF, BED, table or GenBank file.
        classes: Types of features, numbered from 1; where several cover a base, the last one counts.
        stranded: Features on the strand that is not read count as outside; features without a strand count on both.
        length: Bases of a window.
        options: Further arguments of `FastaWindows`.

    Raises:
        ValueError: for an objective of language models, or no class.

    Attributes:
        num_classes: Classes, with that outside.
    """

    def __init__(
        self,
        fasta: str | list[str],
        annotation: str,
        classes: list[str],
        stranded: bool = False,
        length: int = 8192,
        **options: Any,
    ) -> None:
        wrong = sorted({"objective", "mutate"} & set(options))
        if wrong:
            raise ValueError(f"windows with labels are not for language models; leave out {', '.join(wrong)}")
        if not classes:
            raise ValueError("expected at least one type of features as classes, got none")
        super().__init__(fasta, length=length, **options)
        self.annotation, self.classes, self.stranded = annotation, list(classes), stranded
        self.num_classes = 1 + len(self.classes)
        self._tracks: dict[str, tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]] = {}

    def setup(self, stage: str | None = None) -> None:
        """Open the genomes, split them and mark their bases, a byte for each base and strand.

        Raises:
            ValueError: if the annotation has none of the classes.
        """
        super().setup(stage)
        if self._tracks:
            return
        features = [f for f in read_features(self.annotation, self.classes) if f.chrom in self._genomes]
        if not features:
            raise ValueError(
                f"{self.annotation} has none of the types {', '.join(self.classes)} on the genome's contigs"
            )
        lengths = {name: reference.lengths[name] for name, reference in self._genomes.items()}
        self._tracks = {name: (np.zeros(n, np.uint8), np.zeros(n, np.uint8)) for name, n in lengths.items()}
        for number, name in enumerate(self.classes, 1):
            for feature in features:
                for start, end in feature.parts or ((feature.start, feature.end),):
                    for strand, track in zip("+-", self._tracks[feature.chrom]):
                        if feature.type == name and (not self.stranded or feature.strand in (strand, ".")):
                            track[start:end] = number

    def classes_at(self, place: Interval, flip: bool) -> npt.NDArray[np.int64]:
        """Classes of the bases of a place, in reading direction; a place may go round a circular contig."""
        track = self._tracks[place.chrom][int(flip)]
        found = np.take(track, np.arange(place.start, place.end), mode="wrap").astype(np.int64)
        return found[::-1] if flip else found

    def make_dataset(self, regions: Sequence[Interval], *, training: bool, seed: int) -> WindowDataset:
        """Windows of one part."""
        return AnnotatedDataset(self, regions, training=training, seed=seed)

    def state(self) -> dict[str, Any]:
        """How a saved model reads sequences, and its classes."""
        return super().state() | {"classes": ["outside", *self.classes]}
