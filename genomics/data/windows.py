"""Windows of a genome for language models: random for training, tiled for evaluation, packed where pieces are short."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from ..annotation import read_bed
from ..intervals import Interval
from ..reference import Cache, Reference
from ..sequence import as_array, encode, is_acgt, reverse_complement, soft_mask, upper
from ..sequence import vocabulary as find_vocabulary
from .batch import SequenceBatch
from .regions import (
    Regions,
    intersect,
    split_by_bed,
    split_by_blocks,
    split_by_name,
    split_by_share,
    subtract,
    with_gap,
)
from .samplers import LengthSampler, ResumableData, WindowSampler, check_schedule

Objective = Literal["causal", "masked"]
MASKED_SHARE, MASK_ID_SHARE, RANDOM_SHARE = 0.15, 0.8, 0.1
IGNORE = -100


class Piece(NamedTuple):
    """Bases of one window or of one piece of a packed row."""

    bases: bytes
    soft: npt.NDArray[np.bool_]


class WindowDataset(Dataset):
    """Encoded windows of the regions of one part.

    Args:
        data: The data module, whose settings and genome are used.
        regions: The part's regions.
        training: Random windows and strands; else tiled ones, forward, that cover every base once.
        seed: Base of all random choices.
    """

    def __init__(self, data: FastaWindows, regions: Sequence[Interval], *, training: bool, seed: int) -> None:
        self.data, self.regions, self.training, self.seed = data, list(regions), training, seed
        self.random = training and data.sampling == "random" and not data.pack
        self.rows: list[list[Interval]] = []
        self.cumulative: dict[int, npt.NDArray[np.int64]] = {}  # legal starts of a length up to each region
        if not self.random:
            tiles = self._tiles()
            self.rows = _packed(tiles, data.length, int(data.bos)) if data.pack else [[tile] for tile in tiles]
        if not len(self):
            raise ValueError(
                "no window: all regions are empty or hold too many N; see length, max_n_frac and the split"
            )

    def __len__(self) -> int:
        if self.random:
            length, total = self.data.length, sum(len(region) for region in self.regions)
            return (self.data.epoch_size or max(1, total // length)) if total else 0
        return len(self.rows)

    def _starts(self, length: int) -> npt.NDArray[np.int64]:
        """Legal starts of a random window, summed over the regions."""
        if length not in self.cumulative:
            counts = [len(r) if self._is_ring(r, length) else max(1, len(r) - length + 1) for r in self.regions]
            self.cumulative[length] = np.cumsum(counts)
        return self.cumulative[length]

    def _is_ring(self, region: Interval, length: int) -> bool:
        reference = self.data.genome(region.chrom)
        return region.chrom in reference.circular and len(region) == reference.lengths[region.chrom] >= length

    def _tiles(self) -> list[Interval]:
        length = self.data.length
        stride = self.data.stride if self.training and self.data.stride else length
        found = []
        for region in self.regions:
            start = region.start
            while True:
                tile = Interval(region.chrom, start, min(start + length, region.end))
                bases = self.data.genome(tile.chrom).fetch(tile.chrom, tile.start, tile.end)
                if 1 - is_acgt(bases).mean() <= self.data.max_n_frac:
                    found.append(tile)
                start += stride
                if tile.end == region.end:
                    break
        return found

    def window(self, number: int, length: int | None = None) -> tuple[list[Interval], list[bool], np.random.Generator]:
        """Places of a row, whether each is read on the reverse strand, and the generator for further choices."""
        rng = np.random.default_rng((self.seed, number))
        if self.random:
            places = [self._draw(rng, length or self.data.length)]
        else:
            places = self.rows[number % len(self.rows)]
        flips = [bool(self.training and rng.random() < self.data.rc_prob) for _ in places]
        return places, flips, rng

    def sample_name(self, number: int) -> str:
        """A window as messages name it: its place, or its places where several share a row."""
        return " + ".join(map(str, self.window(number)[0]))

    def _draw(self, rng: np.random.Generator, length: int) -> Interval:
        place, starts = self.regions[0], self._starts(length)
        for _ in range(50):  # a window of N is drawn anew
            pick = int(rng.integers(starts[-1]))
            k = int(np.searchsorted(starts, pick, side="right"))
            region = self.regions[k]
            start = region.start + pick - (int(starts[k - 1]) if k else 0)
            end = start + length
            place = Interval(region.chrom, start, end if self._is_ring(region, length) else min(end, region.end))
            bases = self.data.genome(place.chrom).fetch(place.chrom, place.start, place.end)
            if 1 - is_acgt(bases).mean() <= self.data.max_n_frac:
                break
        return place

    def __getitems__(self, numbers: Sequence[int], length: int | None = None) -> SequenceBatch:
        data = self.data
        words = data.words
        width = (length or data.length) + int(data.bos)
        tokens = np.full((len(numbers), width), words.pad, np.int64)
        mask = np.zeros((len(numbers), width), bool)
        weight = np.ones((len(numbers), width), np.float32)
        seq_idx = np.zeros((len(numbers), width), np.int64)
        labels = np.full((len(numbers), width), IGNORE, np.int64)
        mutating = self.training and data.mutate > 0 and data.objective == "causal"
        for row, number in enumerate(numbers):
            places, flips, rng = self.window(number, length)
            at = 0
            for k, (place, flip) in enumerate(zip(places, flips)):
                piece = data.read(place, flip)
                end = at + int(data.bos) + len(piece.bases)
                tokens[row, at] = words.bos
                tokens[row, at + int(data.bos) : end] = encode(piece.bases, words)
                weight[row, at + int(data.bos) : end][piece.soft] = data.soft_weight
                seq_idx[row, at:] = k
                mask[row, at:end] = True
                at = end
            seq_idx[row, at:] = len(places)
            if data.objective == "masked":
                tokens[row], labels[row] = _mask(tokens[row], words, rng)
            elif mutating:
                labels[row] = tokens[row]
                tokens[row] = _mutate(tokens[row], words, data.mutate, rng)
        return SequenceBatch(
            torch.from_numpy(tokens),
            torch.from_numpy(mask),
            torch.from_numpy(labels) if data.objective == "masked" or mutating else None,
            torch.from_numpy(seq_idx) if data.pack else None,
            torch.from_numpy(weight) if data.soft_weight < 1 else None,
        )

    def __getitem__(self, number: int | tuple[int, list[int]]) -> SequenceBatch:
        """One window, or the windows of a batch of another length: (length, numbers)."""
        if isinstance(number, tuple):
            return self.__getitems__(number[1], number[0])
        return self.__getitems__([number])


class FastaWindows(ResumableData):
    """Windows of one or several genomes, cut after the genome was split into parts.

    A random window is a function of (seed, epoch, index): the same for any number of workers.

    Args:
        fasta: FASTA or GenBank file, or several; contig names must differ.
        length: Bases of a window; with `bos` a row has one position more.
        train: Contigs or regions such as chr1:1-5000 of the training part, or its share of all bases in file order. By
            default shares 0.8, 0.1 and 0.1; contigs that no part names are for training.
        val: The same of the validation part.
        test: The same of the test part.
        split_bed: File with columns chrom, start, end, split, instead.
        split_blocks: Bases of blocks that are dealt out by `split_pattern`, instead.
        split_pattern: Blocks for train, val and test in turn.
        gap: Bases left out on both sides of a border between parts.
        include: BED file: only within its intervals.
        exclude: BED file: only outside of its intervals.
        sampling: "random" or "tiled" windows in training; evaluation always tiles.
        stride: Distance of tiled training windows; the length by default.
        epoch_size: Random windows of an epoch; by default as many as cover the part once.
        rc_prob: Share of training windows that are read on the reverse strand.
        mutate: Share of training bases that a causal model reads as another base; what it is asked for stays. A small
            genome is then learned by heart more slowly.
        max_n_frac: Largest share of N in a window.
        soft_mask: "upper" reads lower case as upper case; a number from 0 to 1 is its weight in the loss.
        circular: Names of circular contigs, or True.
        pack: Put several short pieces into one row, with `seq_idx`.
        bos: Begin each piece with the start id.
        objective: "causal", or "masked" for rows with 15 % of the bases hidden and labels for these.
        vocabulary: "byte", "char" or "acgt".
        batch_size: Rows of a batch.
        tokens_per_batch: Positions of a batch, instead.
        length_schedule: Pairs [step, bases] from step 0 on: windows of training grow, with as many positions in a
            batch; evaluation keeps `length`.
        cache: See `Reference`.
        seed: Base of all random choices.
        num_workers: Loader processes.

    Attributes:
        vocab_size: Number of ids.
    """

    def __init__(
        self,
        fasta: str | list[str],
        length: int = 8192,
        train: float | list[str] | None = None,
        val: float | list[str] | None = None,
        test: float | list[str] | None = None,
        split_bed: str | None = None,
        split_blocks: int | None = None,
        split_pattern: str = "7:1:2",
        gap: int = 0,
        include: str | None = None,
        exclude: str | None = None,
        sampling: Literal["random", "tiled"] = "random",
        stride: int | None = None,
        epoch_size: int | None = None,
        rc_prob: float = 0.5,
        mutate: float = 0.0,
        max_n_frac: float = 0.1,
        soft_mask: float | Literal["upper"] = "upper",
        circular: bool | list[str] = False,
        pack: bool = False,
        bos: bool = True,
        objective: Objective = "causal",
        vocabulary: str = "byte",
        batch_size: int = 16,
        tokens_per_batch: int | None = None,
        length_schedule: list[list[int]] | None = None,
        cache: Cache = "auto",
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if length < 2:
            raise ValueError(f"expected a length of at least 2 bases, got {length}")
        if not 0 <= rc_prob <= 1:
            raise ValueError(f"expected rc_prob from 0 to 1, got {rc_prob}")
        if not 0 <= mutate < 1:
            raise ValueError(f"expected mutate from 0 to below 1, got {mutate}")
        if gap < 0 or not 0 <= max_n_frac <= 1:
            raise ValueError(f"expected a gap of at least 0 and max_n_frac from 0 to 1, got {gap} and {max_n_frac}")
        sizes = {"stride": stride, "epoch_size": epoch_size, "split_blocks": split_blocks, "batch_size": batch_size}
        for name, size in (sizes | {"tokens_per_batch": tokens_per_batch}).items():
            if size is not None and size < 1:
                raise ValueError(f"expected {name} of at least 1, got {size}")
        self.soft_weight = 1.0 if isinstance(soft_mask, str) else float(soft_mask)
        if not 0 <= self.soft_weight <= 1:
            raise ValueError(f"expected soft_mask 'upper' or a weight from 0 to 1, got {soft_mask}")
        self.length_schedule = check_schedule(length_schedule)
        if self.length_schedule and (sampling != "random" or pack):
            raise ValueError("length_schedule goes with random windows; leave out pack and sampling: tiled")
        self.fasta = [fasta] if isinstance(fasta, str) else list(fasta)
        self.length, self.stride, self.epoch_size, self.sampling = length, stride, epoch_size, sampling
        self.named = {"train": train, "val": val, "test": test}
        self.split_bed, self.split_blocks, self.split_pattern = split_bed, split_blocks, split_pattern
        self.gap, self.include, self.exclude = gap, include, exclude
        self.rc_prob, self.max_n_frac, self.circular, self.cache = rc_prob, max_n_frac, circular, cache
        self.mutate = mutate
        self.pack, self.bos, self.objective = pack, bos, objective
        self.vocabulary, self.words = vocabulary, find_vocabulary(vocabulary)
        self.vocab_size = self.words.size
        rows = tokens_per_batch // (length + int(bos)) if tokens_per_batch else batch_size
        self.batch_size, self.seed, self.num_workers = max(1, rows), seed, num_workers
        self.parts: Regions = {}
        self._genomes: dict[str, Reference] = {}
        self._datasets: dict[str, WindowDataset] = {}

    def references(self) -> list[Reference]:
        """The genomes; a subclass may make them."""
        circular = self.circular
        return [Reference(path, circular=circular, cache=self.cache) for path in self.fasta]

    def genome(self, chrom: str) -> Reference:
        """The genome that holds a contig."""
        return self._genomes[chrom]

    def setup(self, stage: str | None = None) -> None:
        """Open the genomes and split them.

        Raises:
            ValueError: if names repeat, parts overlap, or a part that is asked for is empty.
        """
        if self.parts:
            return
        for reference in self.references():
            for name in reference.names:
                if name in self._genomes:
                    raise ValueError(f"contig {name!r} is in two files; names must differ")
                self._genomes[name] = reference
        lengths = {name: reference.lengths[name] for name, reference in self._genomes.items()}
        parts = self._split(lengths)
        if self.include:
            kept = read_bed(self.include)
            parts = {part: intersect(regions, kept) for part, regions in parts.items()}
        if self.exclude:
            removed = read_bed(self.exclude)
            parts = {part: subtract(regions, removed) for part, regions in parts.items()}
        self.parts = {part: with_gap(regions, self.gap, lengths) for part, regions in parts.items()}

    def _split(self, lengths: dict[str, int]) -> Regions:
        if self.split_bed:
            return split_by_bed(self.split_bed, lengths)
        if self.split_blocks:
            return split_by_blocks(lengths, self.split_blocks, self.split_pattern)
        shares = [value for value in self.named.values() if isinstance(value, (int, float))]
        names = {part: value for part, value in self.named.items() if not isinstance(value, (int, float))}
        if shares and any(names.values()):
            raise ValueError("give train, val and test all as shares or all as contigs and regions")
        if not any(names.values()):
            default = (0.8, 0.1, 0.1) if not shares else (0.0, 0.0, 0.0)
            return split_by_share(lengths, [float(v or d) for v, d in zip(self.named.values(), default)])  # type: ignore[arg-type]
        return split_by_name(lengths, names)  # type: ignore[arg-type]

    def read(self, place: Interval, flip: bool) -> Piece:
        """Bases of a place, on the reverse strand if asked, and which were soft-masked."""
        raw = self.genome(place.chrom).fetch(place.chrom, place.start, place.end, keep_case=True)
        raw = reverse_complement(raw) if flip else raw
        return Piece(upper(raw), soft_mask(as_array(raw)))

    def windows(self, part: str) -> WindowDataset:
        """The windows of a part: "train", "val" or "test"."""
        self.setup()
        if part not in self._datasets:
            seed = self.seed + 7_919 * self.run_seed
            training = part == "train"
            if not self.parts.get(part):
                raise ValueError(f"part {part!r} has no bases; give it contigs, regions or a share")
            self._datasets[part] = self.make_dataset(self.parts[part], training=training, seed=seed)
        return self._datasets[part]

    def make_dataset(self, regions: Sequence[Interval], *, training: bool, seed: int) -> WindowDataset:
        """The windows of some regions; a subclass may make others."""
        return WindowDataset(self, regions, training=training, seed=seed)

    def train_dataloader(self) -> DataLoader[SequenceBatch]:
        """Training windows."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[SequenceBatch] | list[DataLoader[SequenceBatch]]:
        """Validation windows in order; nothing in a fit without that part."""
        self.setup()
        fitting = self.trainer is not None and self.trainer.state.fn == "fit"
        return [] if fitting and not self.parts["val"] else self._loader("val")

    def test_dataloader(self) -> DataLoader[SequenceBatch]:
        """Test windows in order."""
        return self._loader("test")

    def _loader(self, part: str, *, shuffle: bool = False) -> DataLoader[SequenceBatch]:
        dataset = self.windows(part)
        seed = self.seed + 7_919 * self.run_seed
        if shuffle and self.length_schedule:
            sampler: WindowSampler = LengthSampler(
                dataset, self.length_schedule, self.batch_size, self.length, int(self.bos), seed=seed
            )
            return self.ordered_loader(sampler, None, self.num_workers)
        sampler = WindowSampler(dataset, shuffle=shuffle, seed=seed)
        return self.ordered_loader(sampler, self.batch_size, self.num_workers)

    def state(self) -> dict[str, Any]:
        """How a saved model reads sequences."""
        return {"vocabulary": self.vocabulary, "length": self.length, "bos": self.bos, "objective": self.objective}


def _packed(pieces: Sequence[Interval], length: int, bos: int) -> list[list[Interval]]:
    """Pieces in order, as many in a row of `length` + `bos` positions as fit."""
    rows: list[list[Interval]] = []
    free = 0
    for piece in pieces:
        if len(piece) + bos > free:
            rows.append([])
            free = length + bos
        rows[-1].append(piece)
        free -= len(piece) + bos
    return rows


def _mask(
    tokens: npt.NDArray[np.int64], words: Any, rng: np.random.Generator
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Hide 15 % of the bases: of these 80 % become the mask id, 10 % a random base, 10 % stay."""
    chosen = words.is_base[tokens] & (rng.random(len(tokens)) < MASKED_SHARE)
    labels = np.where(chosen, tokens, IGNORE)
    how = rng.random(len(tokens))
    hidden = np.where(chosen & (how < MASK_ID_SHARE), words.mask, tokens)
    swap = chosen & (how >= MASK_ID_SHARE) & (how < MASK_ID_SHARE + RANDOM_SHARE)
    return np.where(swap, words.bases[rng.integers(4, size=len(tokens))], hidden), labels


def _mutate(tokens: npt.NDArray[np.int64], words: Any, share: float, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Ids with a share of the bases exchanged for one of the other three."""
    bases = words.bases
    place = np.zeros(words.size, np.int64)
    place[bases] = np.arange(4)
    chosen = words.is_base[tokens] & (rng.random(len(tokens)) < share)
    return np.where(chosen, bases[(place[tokens] + rng.integers(1, 4, size=len(tokens))) % 4], tokens)
