"""DNA as bytes: alphabet, complement, and the vocabularies that turn bases into ids.

In memory a sequence is upper-case IUPAC text as `bytes` or uint8. All per-base work is one lookup in a 256-entry table.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Sequence = str | bytes | bytearray | Bytes

BASES = b"ACGT"
IUPAC = b"ACGTRYSWKMBDHVN"
_PARTNERS = b"TGCAYRSWMKVHDBN"


def _table(source: bytes, target: bytes) -> Bytes:
    table = np.arange(256, dtype=np.uint8)
    table[np.frombuffer(source, np.uint8)] = np.frombuffer(target, np.uint8)
    return table


_COMPLEMENT = _table(IUPAC + IUPAC.lower() + b"Uu", _PARTNERS + _PARTNERS.lower() + b"Aa")
_UPPER = _table(bytes(range(97, 123)), bytes(range(65, 91)))
_U_TO_T = _table(b"Uu", b"Tt")
_UPPER_T = _U_TO_T[_UPPER]
_IS_IUPAC = np.isin(np.arange(256), np.frombuffer(IUPAC + IUPAC.lower() + b"Uu", np.uint8))
_IS_ACGT = np.isin(np.arange(256), np.frombuffer(b"ACGTacgt", np.uint8))


def as_array(seq: Sequence) -> Bytes:
    """A sequence as uint8, without a copy where there is one in that form; letters beyond Latin-1 become "?"."""
    if isinstance(seq, np.ndarray):
        return seq
    return np.frombuffer(seq.encode("latin-1", "replace") if isinstance(seq, str) else seq, np.uint8)


def normalise(seq: Sequence, *, u_to_t: bool = True) -> bytes:
    """Upper case, and T for U.

    Args:
        seq: Text of IUPAC letters in any case.
        u_to_t: Read RNA as DNA.

    Raises:
        ValueError: at the first letter outside the IUPAC alphabet, with its 1-based position.
    """
    array = as_array(seq)
    known = _IS_IUPAC[array]
    if not known.all():
        where = int(np.argmin(known))
        raise ValueError(
            f"expected IUPAC letters ({IUPAC.decode()}, U), got {chr(int(array[where]))!r} at base {where + 1}"
        )
    return (_UPPER_T if u_to_t else _UPPER)[array].tobytes()


def upper(seq: Sequence) -> bytes:
    """Upper case with T for U, without a check."""
    return _UPPER_T[as_array(seq)].tobytes()


def soft_mask(seq: Sequence) -> npt.NDArray[np.bool_]:
    """True where the file's letter was lower case."""
    array = as_array(seq)
    return (array >= 97) & (array <= 122)


def complement(seq: Sequence) -> bytes:
    """The complement letter by letter, both cases; U becomes A.

    >>> complement(b"ACGTRYN")
    b'TGCAYRN'
    """
    return _COMPLEMENT[as_array(seq)].tobytes()


def reverse_complement(seq: Sequence) -> bytes:
    """The other strand, read in its own direction.

    >>> reverse_complement(b"AACGT")
    b'ACGTT'
    """
    return _COMPLEMENT[as_array(seq)[::-1]].tobytes()


def is_iupac(seq: Sequence) -> bool:
    """Whether every letter is in the IUPAC alphabet, in any case."""
    return bool(_IS_IUPAC[as_array(seq)].all())


def is_acgt(seq: Sequence) -> npt.NDArray[np.bool_]:
    """(l,) bool: which letters are A, C, G or T, in any case."""
    return _IS_ACGT[as_array(seq)]


def gc_content(seq: Sequence) -> float:
    """Share of G and C among the bases A, C, G, T; NaN without any."""
    array = as_array(upper(seq))
    counts = np.bincount(array, minlength=256)[list(BASES)]
    return float((counts[1] + counts[2]) / counts.sum()) if counts.sum() else float("nan")


def n_runs(seq: Sequence) -> npt.NDArray[np.int64]:
    """(k, 2) starts and ends, 0-based half-open, of the runs of letters other than A, C, G, T."""
    gap = np.concatenate([[False], ~is_acgt(seq), [False]])
    return np.flatnonzero(gap[1:] != gap[:-1]).reshape(-1, 2)


@dataclass(frozen=True)
class Vocabulary:
    """Map between letters and ids.

    Attributes:
        name: "byte", "char" or "acgt".
        size: Number of ids, as the embedding needs it.
        letters: Letters by id; letters that have none become `unknown`.
        pad, bos, mask, unknown: Special ids.
        eos: End of sequence; None where the vocabulary has none.
    """

    name: str
    size: int
    letters: dict[int, int] = field(repr=False)
    pad: int
    bos: int
    mask: int
    unknown: int
    eos: int | None = None

    @cached_property
    def encoder(self) -> Bytes:
        """(256,) uint8: id of each byte, lower case as upper case, U as T."""
        table = np.full(256, self.unknown, np.uint8)
        for letter, index in self.letters.items():
            table[letter] = index
        table[ord("U")] = table[ord("T")]
        table[97:123] = table[65:91]
        return table

    @cached_property
    def decoder(self) -> Bytes:
        """(size,) uint8: letter of each id, N where it has none."""
        table = np.full(self.size, ord("N"), np.uint8)
        for letter, index in self.letters.items():
            table[index] = letter
        return table

    @cached_property
    def complement(self) -> npt.NDArray[np.int64]:
        """(size,) int64 permutation: id of the complement of each id; special ids stay."""
        table = np.arange(self.size)
        for letter, index in self.letters.items():
            partner = int(_COMPLEMENT[letter])
            if letter not in b"Uu" and partner in self.letters:
                table[index] = self.letters[partner]
        return table

    @cached_property
    def bases(self) -> npt.NDArray[np.int64]:
        """(4,) int64 ids of A, C, G, T."""
        return self.encoder[list(BASES)].astype(np.int64)

    @cached_property
    def is_base(self) -> npt.NDArray[np.bool_]:
        """(size,) bool: which ids are A, C, G or T; only these are ever targets."""
        return np.isin(np.arange(self.size), self.bases)


VOCABULARIES = {
    "byte": Vocabulary("byte", 256, {c: c for c in IUPAC + IUPAC.lower() + b"Uu"}, 0, 254, 1, ord("N"), 255),
    "char": Vocabulary("char", 16, {ord(c): i for i, c in enumerate("ACGTN", 7)}, 4, 2, 3, 6, 1),
    "acgt": Vocabulary("acgt", 8, {ord(c): i for i, c in enumerate("NACGT", 3)}, 0, 1, 2, 3),
}


def vocabulary(name: str | Vocabulary) -> Vocabulary:
    """A vocabulary by name.

    Args:
        name: "byte" (256 ids, id = byte), "char" (16 ids, as Caduceus and HyenaDNA number them) or "acgt" (8 ids).

    Raises:
        ValueError: for an unknown name.
    """
    if isinstance(name, Vocabulary):
        return name
    if name not in VOCABULARIES:
        close = difflib.get_close_matches(name, VOCABULARIES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown vocabulary {name!r}; expected one of {', '.join(VOCABULARIES)}.{hint}")
    return VOCABULARIES[name]


def encode(seq: Sequence, vocab: str | Vocabulary = "byte") -> Bytes:
    """Ids of a sequence.

    Args:
        seq: Letters in any case; those the vocabulary lacks become its unknown id.
        vocab: Vocabulary or its name.

    Returns:
        (l,) uint8.

    >>> encode("ACGTN", "acgt").tolist()
    [4, 5, 6, 7, 3]
    """
    return vocabulary(vocab).encoder[as_array(seq)]


def decode(ids: npt.ArrayLike, vocab: str | Vocabulary = "byte") -> str:
    """Letters of ids; special and unknown ids become N.

    Args:
        ids: (l,) integers.
        vocab: Vocabulary or its name.

    >>> decode([4, 5, 6, 7, 0], "acgt")
    'ACGTN'
    """
    return vocabulary(vocab).decoder[np.asarray(ids)].tobytes().decode()
