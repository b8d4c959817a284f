"""Reference sequences with random access: FASTA, BGZF-compressed FASTA, GenBank, or sequences in memory."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .contigs import ContigMap
from .files import check_whole, is_bgzf, is_gzip, open_lines
from .intervals import Interval
from .sequence import IUPAC, is_iupac, reverse_complement, upper

log = logging.getLogger(__name__)

GENBANK = (".gb", ".gbk", ".gbff", ".genbank", ".embl")
SMALL = 64 * 2**20  # bytes of a file that is read into memory unless told otherwise

Cache = Literal["auto", "memory", "none"]


class Reference:
    """Sequences by contig name.

    Args:
        path: FASTA (plain, BGZF or gzip; `.gz`) or GenBank/EMBL file.
        circular: Names of circular contigs, or True for all. A GenBank file says so itself.
        cache: "memory" holds all sequences; "none" reads each range from the file through an index (plain and BGZF);
            "auto" holds files up to 64 MB, and gzip files, which cannot be read in part.

    Attributes:
        lengths: Bases by contig, in file order.
        circular: Names of circular contigs.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no FASTA or GenBank file, is cut off, repeats a name or holds an empty sequence. (An index
            that another program made is believed; it leaves out all but the first of equal names.)
        ImportError: if pysam is needed and missing.
    """

    lengths: dict[str, int]

    def __init__(self, path: str | Path, *, circular: Collection[str] | bool = (), cache: Cache = "auto") -> None:
        self.path: Path | None = Path(path)
        self._sequences: dict[str, bytes] | None = None
        self._handles: dict[tuple[int, int], Any] = {}
        if not self.path.is_file():
            raise FileNotFoundError(2, "No such reference file", str(path))
        found: set[str] = set()
        stem = self.path.name.lower().removesuffix(".gz")
        if stem.endswith(GENBANK):
            from .genbank import read_genbank

            records = read_genbank(self.path)
            self._hold({record.name: record.sequence for record in records})
            found = {record.name for record in records if record.circular}
        elif _read_whole(self.path, cache):
            self._hold(dict(read_fasta(self.path)))
        else:
            check_whole(self.path)
            handle = self._open()
            self.lengths = dict(zip(handle.references, handle.lengths))
        self._check()
        self.circular: set[str] = found | self._names(circular)

    @classmethod
    def from_sequences(
        cls, sequences: Mapping[str, str | bytes], *, circular: Collection[str] | bool = ()
    ) -> Reference:
        """A reference of sequences in memory.

        Args:
            sequences: Bases by contig name.
            circular: Names of circular contigs, or True for all.
        """
        self = cls.__new__(cls)
        self.path, self._handles = None, {}
        self._hold({name: s.encode() if isinstance(s, str) else bytes(s) for name, s in sequences.items()})
        self._check()
        self.circular = self._names(circular)
        return self

    def _hold(self, sequences: dict[str, bytes]) -> None:
        self._sequences = sequences
        self.lengths = {name: len(sequence) for name, sequence in sequences.items()}

    def _check(self) -> None:
        empty = [name for name, length in self.lengths.items() if length == 0]
        if empty or not self.lengths:
            what = f"contig {empty[0]!r} has no bases" if empty else "no sequence"
            raise ValueError(f"{self.path or 'the reference'}: {what}; expected a FASTA file with sequences")

    def _names(self, circular: Collection[str] | bool) -> set[str]:
        if isinstance(circular, bool):
            return set(self.lengths) if circular else set()
        names = ContigMap(self.lengths)
        found = {name: names.find(name) for name in circular}
        for name, contig in found.items():
            if contig is None:
                raise ValueError(f"circular contig {name!r} is not in the reference: {', '.join(self.names[:5])}")
        return {contig for contig in found.values() if contig}

    def _open(self) -> Any:
        """A handle of this process's and thread's own."""
        try:
            import pysam
        except ImportError as error:
            raise ImportError('large references need pysam; run: pip install "omnissm[io]"') from error
        stem = str(self.path)
        if not os.path.exists(f"{stem}.fai") and not os.access(Path(stem).absolute().parent, os.W_OK):
            stat = os.stat(stem)
            key = hashlib.sha256(f"{os.path.abspath(stem)} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()
            folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "omnissm" / "fai"
            folder.mkdir(parents=True, exist_ok=True)
            stem = str(folder / key[:16])
        packed = is_bgzf(str(self.path))
        indices = [f"{stem}.fai", *([f"{stem}.gzi"] if packed else [])]
        if not all(os.path.exists(index) for index in indices):
            _check_names(self.path)  # type: ignore[arg-type]
            scratch = [f"{index}.{os.getpid()}" for index in indices]  # seen by others when it is whole
            options = ["--fai-idx", scratch[0], *(["--gzi-idx", scratch[1]] if packed else [])]
            try:
                pysam.faidx(str(self.path), *options)  # type: ignore[attr-defined]
            except (pysam.SamtoolsError, OSError, ValueError) as error:
                for made in scratch:
                    Path(made).unlink(missing_ok=True)
                raise ValueError(
                    f"{self.path} cannot be indexed: is it a whole FASTA file whose lines have one length in each"
                    f" sequence? cache='memory' takes lines of any length ({' '.join(str(error).split())[-200:]})"
                ) from error
            for made, index in zip(scratch, indices):
                os.replace(made, index)
        more = {"filepath_index_compressed": indices[1]} if packed else {}
        try:
            handle = pysam.FastaFile(str(self.path), filepath_index=indices[0], **more)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self.path} and its index {indices[0]} do not fit; delete the index ({error})"
            ) from error
        self._handles[os.getpid(), threading.get_ident()] = handle
        return handle

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}}

    @property
    def names(self) -> list[str]:
        """Contigs in file order."""
        return list(self.lengths)

    def contig_length(self, chrom: str) -> int:
        """Bases of a contig.

        Raises:
            ValueError: if the reference has no such contig.
        """
        if chrom not in self.lengths:
            raise ValueError(f"no contig {chrom!r} in the reference; it has {', '.join(self.names[:5])}")
        return self.lengths[chrom]

    def region(self, text: str) -> Interval:
        """A region such as "chr1:100-200" (1-based, both included) or a whole contig, which must lie in the reference.

        Raises:
            ValueError: if it has no such form, or does not lie in the reference.
        """
        place = Interval.from_str(text, lengths=self.lengths)
        if place.end > self.contig_length(place.chrom):
            raise ValueError(f"region {text!r} lies beyond the contig's {self.lengths[place.chrom]:,} bases")
        return place

    def fetch(self, chrom: str, start: int, end: int, *, keep_case: bool = False) -> bytes:
        """Bases of a range.

        Args:
            chrom: Contig, by its exact name.
            start: First base, 0-based; may be negative.
            end: One past the last; may lie beyond the end.
            keep_case: Leave lower case (soft-masked) letters.

        Returns:
            `end - start` letters. Outside a linear contig they are N; a circular one goes round.

        Raises:
            ValueError: if the reference has no such contig.
        """
        length = self.contig_length(chrom)
        if chrom in self.circular and (start < 0 or end > length):
            first = start % length
            whole = self._read(chrom, first, length)
            while len(whole) < end - start:
                whole += self._read(chrom, 0, min(length, end - start - len(whole)))
            bases = whole[: end - start]
        else:
            low, high = min(max(start, 0), length), max(0, min(end, length))
            bases = b"N" * (low - start if start < 0 else 0) + self._read(chrom, low, max(low, high))
            bases = bases[: end - start] + b"N" * max(0, end - start - len(bases))
        return bases if keep_case else upper(bases)

    def fetch_interval(self, interval: Interval) -> bytes:
        """Bases of an interval, read on its strand."""
        bases = self.fetch(interval.chrom, interval.start, interval.end)
        return reverse_complement(bases) if interval.strand == "-" else bases

    def _read(self, chrom: str, start: int, end: int) -> bytes:
        if self._sequences is not None:
            return self._sequences[chrom][start:end]
        # A handle must not be shared with a forked process or another thread.
        handle = self._handles.get((os.getpid(), threading.get_ident())) or self._open()
        return handle.fetch(chrom, start, end).encode() if end > start else b""

    def md5(self, chrom: str) -> str:
        """MD5 of a contig's upper-case bases, as in the M5 tag of SAM files."""
        return hashlib.md5(self.fetch(chrom, 0, self.contig_length(chrom))).hexdigest()

    def digest(self) -> str:
        """One MD5 over names, lengths and the bases of all contigs, read in pieces."""
        total = hashlib.md5()
        for chrom, length in self.lengths.items():
            total.update(f">{chrom} {length}\n".encode("utf-8", "surrogateescape"))
            for start in range(0, length, 2**24):
                total.update(upper(self._read(chrom, start, min(length, start + 2**24))))
        return total.hexdigest()


def _read_whole(path: Path, cache: Cache) -> bool:
    size = path.stat().st_size
    if not is_gzip(path) or is_bgzf(path):
        return cache == "memory" or (cache == "auto" and size <= SMALL)
    if size > SMALL or cache == "none":
        log.warning(
            "%s is plain gzip, which cannot be read in part: it is read whole into memory."
            " `gunzip -c %s | bgzip > NEW.fa.gz` avoids that.",
            path,
            path.name,
        )
    return True


def _check_names(path: Path) -> None:
    """Refuse names that come twice, before an index leaves the second one out.

    Raises:
        ValueError: naming the first.
    """
    seen: set[bytes] = set()
    rest = b"\n"
    with open_lines(path) as file:
        while block := file.read(2**22):
            text, start = rest + block, 0
            while (at := text.find(b"\n>", start)) >= 0 and (end := text.find(b"\n", at + 2)) >= 0:
                name, start = text[at + 2 : end].split(maxsplit=1)[:1], end
                if name and name[0] in seen:
                    raise ValueError(f"{path}: name {name[0].decode('latin-1')!r} comes twice")
                seen.update(name)
            rest = text[at:] if at >= 0 else text[-1:]


def read_fasta(path: str | Path) -> Iterator[tuple[str, bytes]]:
    """Names (first word of the header) and sequences of a FASTA file, plain or gzip, case kept.

    Args:
        path: The file.

    Raises:
        ValueError: if it does not start with ">", repeats a name, holds letters that are none, or is cut off.
    """
    seen: set[str] = set()
    name: str | None = None
    parts: list[bytes] = []
    with open_lines(path) as file:
        for number, line in enumerate(file, 1):
            if line.startswith(b">"):
                if name is not None:
                    yield name, _joined(parts, name, path)
                words = line[1:].split()
                name, parts = words[0].decode("utf-8", "surrogateescape") if words else "", []
                if not name or name in seen:
                    what = f"name {name!r} comes twice" if name else "a record has no name"
                    raise ValueError(f"{path}, line {number}: {what}")
                seen.add(name)
            elif name is None and line.strip():
                raise ValueError(f"{path} is no FASTA file: expected '>' first, got {line[:20]!r}")
            else:
                parts.append(line.strip())
    if name is not None:
        yield name, _joined(parts, name, path)


def _joined(parts: list[bytes], name: str, path: str | Path) -> bytes:
    whole = b"".join(parts)
    letters = np.frombuffer(whole, np.uint8)
    if not is_iupac(letters):
        strange = bytes(sorted(set(whole) - set(IUPAC + IUPAC.lower() + b"Uu"))).decode("latin-1")
        raise ValueError(f"{path}: contig {name!r} holds {strange!r}; expected IUPAC letters")
    return whole
