"""Names of contigs that differ between files: "chr1" and "1", "MT" and "chrM", versions of accessions."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path

_MITOCHONDRIA = ("M", "MT", "chrM", "chrMT")


def read_contig_map(path: str | Path) -> dict[str, str]:
    """A file of two columns, name in the variants and name in the reference, separated by tab or spaces.

    Raises:
        ValueError: for a line that has another number of columns.
    """
    pairs = {}
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        words = line.split()
        if len(words) != 2:
            raise ValueError(f"{path}, line {number}: expected two columns (name, name in the reference), got {line!r}")
        pairs[words[0]] = words[1]
    return pairs


class ContigMap:
    """Finds a name's contig in a reference.

    In order: the override, the same name, with or without "chr", the mitochondrial names, with or without a version
    suffix, and the accession inside an old-style name such as "gi|88193823|ref|NC_007795.1|". Names with two different
    versions are two contigs.

    Args:
        names: Contigs of the reference.
        override: Name to contig; goes before all rules.

    Raises:
        ValueError: if an override names a contig that the reference lacks.
    """

    def __init__(self, names: Iterable[str], override: Mapping[str, str] | None = None) -> None:
        self.names = list(names)
        self.override = dict(override or {})
        self.used: dict[str, str] = {}
        unknown = [contig for contig in self.override.values() if contig not in self.names]
        if unknown:
            close = difflib.get_close_matches(unknown[0], self.names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"the contig map leads to {unknown[0]!r}, which the reference lacks{hint}")
        self._exact = set(self.names)
        self._whole: dict[str, set[str]] = {}
        self._bare: dict[str, set[str]] = {}
        for name in self.names:
            for known, forms in zip((self._whole, self._bare), _forms(name)):
                for form in forms:
                    known.setdefault(form, set()).add(name)

    def find(self, name: str) -> str | None:
        """The reference's name of a contig, or None.

        Raises:
            ValueError: if two contigs of the reference could be meant.
        """
        if name in self.used:
            return self.used[name]
        if name in self.override:
            found = {self.override[name]}
        elif name in self._exact:
            found = {name}
        else:
            whole, bare = _forms(name)
            found = set().union(*(self._whole.get(form, set()) for form in whole | bare))
            found = found.union(*(self._bare.get(form, set()) for form in whole))
        if len(found) > 1:
            names = " and ".join(sorted(found))
            raise ValueError(f"contig {name!r} may be {names} of the reference; say which with a contig map")
        if not found:
            return None
        self.used[name] = found.pop()
        return self.used[name]

    def aliases(self) -> dict[str, str]:
        """The names found so far that differ from the reference's."""
        return {name: contig for name, contig in self.used.items() if name != contig}


def _forms(name: str) -> tuple[set[str], set[str]]:
    """Spellings that count as the same name, and those that are left of them without their versions."""
    forms = {name}
    fields = [part for part in name.split("|") if part]
    if len(fields) > 1:
        forms.add(fields[-1])
    if name in _MITOCHONDRIA:
        return forms | {"MT"}, set()
    forms |= {form.removeprefix("chr") for form in forms}
    parts = (form.rpartition(".") for form in forms)
    return forms, {head for head, dot, version in parts if dot and version.isdigit()}
