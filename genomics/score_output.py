"""Scores in files: the input VCF with additions, TSV or Parquet; each appears whole at the end."""

from __future__ import annotations

import csv
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .files import atomic_path, open_out
from .intervals import to_one_based
from .status import STATUSES
from .variant_scorer import EXTRAS, FACTS, SCORES, Columns
from .variants import Record

log = logging.getLogger(__name__)

SUFFIXES = (".vcf", ".vcf.gz", ".bcf", ".tsv", ".tsv.gz", ".parquet")
_WHOLE = ("record", "alt_index", "pos", "n_scored", "window_start0", "window_length")


def check_outputs(outs: Sequence[str], header: Sequence[str], prefix: str, *, overwrite_info: bool) -> None:
    """Refuse bad names before the work.

    Args:
        outs: Names of files, or - for TSV on standard output.
        header: Header lines of the input.
        prefix: Begin of the new INFO fields.
        overwrite_info: Replace such fields of an earlier run.

    Raises:
        ValueError: for an unknown suffix, a bad prefix, or INFO fields that are there already.
    """
    for out in outs:
        if out != "-" and not out.endswith(SUFFIXES):
            raise ValueError(f"unknown kind of output {out!r}; expected {', '.join(SUFFIXES)}, or - for TSV")
    if not re.fullmatch(r"[A-Za-z_][0-9A-Za-z_.]*", prefix):
        raise ValueError(f"expected an INFO prefix of letters, digits and _, got {prefix!r}")
    found = [line for line in header if line.startswith(f"##INFO=<ID={prefix}_")]
    if found and not overwrite_info and any(map(is_vcf, outs)):
        raise ValueError(
            f"the input has INFO fields {prefix}_... already ({found[0][:60]!r}); give --overwrite_info true to replace"
            " them, or another --prefix"
        )


def write_scores(
    out: str,
    blocks: Callable[[], Iterable[tuple[list[Record], Columns]]],
    columns: Sequence[str],
    *,
    header: Sequence[str],
    facts: Mapping[str, Any],
    prefix: str,
) -> None:
    """Write one output.

    Args:
        out: Its name; the suffix tells the format.
        blocks: Gives the records with their columns, block by block, each time it is called.
        columns: Names of the columns, in order.
        header: Header lines of the input, empty where it is no VCF.
        facts: Model, window and so on, for the header.
        prefix: Begin of the INFO fields.

    Raises:
        ImportError: if a package for the format is missing.
        ValueError: if the input cannot be held in the format.
    """
    if out == "-" or out.endswith((".tsv", ".tsv.gz")):
        with open_out(out) as file:
            writer = csv.writer(file, delimiter="\t", lineterminator="\n")
            writer.writerow(columns)
            for _, block in blocks():
                writer.writerows(zip(*(_plain(block[name]) for name in columns)))
    elif out.endswith(".parquet"):
        _write_parquet(out, (block for _, block in blocks()), columns, facts)
    else:
        _write_vcf(out, blocks, columns, header, facts, prefix)


def _plain(values: Any) -> list[Any]:
    if values.dtype.kind == "f":
        return ["" if np.isnan(v) else f"{v:.6g}" for v in values]
    return values.tolist()


def _write_parquet(out: str, blocks: Iterable[Columns], columns: Sequence[str], facts: Mapping[str, Any]) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError('Parquet needs pyarrow; run: pip install "omnissm[io]"') from error
    types = {**dict.fromkeys(_WHOLE, pa.int64()), **dict.fromkeys(SCORES, pa.float64())}
    fields = [(name, types.get(name, pa.string())) for name in columns]
    schema = pa.schema(fields, metadata={"omnissm": json.dumps(dict(facts), sort_keys=True)})
    with atomic_path(out) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for block in blocks:
            arrays = [pa.array(block[name].tolist(), schema.field(name).type, from_pandas=True) for name in columns]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def _write_vcf(
    out: str,
    blocks: Callable[[], Iterable[tuple[list[Record], Columns]]],
    columns: Sequence[str],
    header: Sequence[str],
    facts: Mapping[str, Any],
    prefix: str,
) -> None:
    scores = [name for name in columns if name not in (*FACTS, *EXTRAS)]
    head = _vcf_header(header, scores, facts, prefix)
    order = _Order()

    def lines() -> Iterator[bytes]:
        for line in head:
            yield line.encode("utf-8", "surrogateescape") + b"\n"
        for records, block in blocks():
            at = 0
            for record in records:
                rows = range(at, at + len(record.alts))
                at += len(record.alts)
                order.see(record)
                line = record.line or vcf_line(record)
                if not record.problem:
                    line = _annotate(line, block, rows, scores, prefix)
                yield line.encode("utf-8", "surrogateescape") + b"\n"

    if out.endswith(".vcf"):
        with atomic_path(out) as temporary, open(temporary, "wb") as file:
            file.writelines(lines())
        return
    try:
        import pysam
    except ImportError as error:
        raise ImportError('compressed VCF and BCF need pysam; run: pip install "omnissm[io]"') from error
    with atomic_path(out) as temporary:
        if out.endswith(".bcf"):
            _write_bcf(temporary, lines())
            return
        with pysam.BGZFile(str(temporary), "wb", None) as packed:
            for line in lines():
                packed.write(line)
    for suffix in (".tbi", ".csi"):
        Path(out + suffix).unlink(missing_ok=True)  # of an earlier file
    if order.sorted and order.readable:
        try:
            pysam.tabix_index(out, preset="vcf", force=True, csi=order.furthest >= 2**29)  # what .tbi can hold
        except OSError as error:  # positions beyond any index, or a header that htslib does not take
            log.warning("%s has no index: %s", out, error)
    else:
        why = "is not sorted by contig and position" if order.readable else "holds lines that cannot be read"
        log.warning("%s %s, so it has no index", out, why)


def _write_bcf(path: Path, lines: Iterable[bytes]) -> None:
    """Through text files, because BCF needs every contig, filter and field declared in its header."""
    import pysam

    draft, text = path.with_name(path.name + ".draft.vcf"), path.with_name(path.name + ".vcf")
    try:
        header: list[bytes] = []
        used: dict[bytes, None] = {}
        with open(draft, "wb") as file:
            for line in lines:
                if line.startswith(b"#"):
                    header.append(line)
                    continue
                file.write(line)
                used |= dict.fromkeys(_declarations(line))
        known = {line.partition(b",")[0].rstrip(b">\n") for line in header}
        added = [line + b"\n" for line in used if line.partition(b",")[0].rstrip(b">") not in known]
        with open(draft, "rb") as old, open(text, "wb") as new:
            new.writelines([*header[:-1], *added, header[-1]])
            shutil.copyfileobj(old, new)
        with pysam.VariantFile(str(text)) as source, pysam.VariantFile(str(path), "wb", header=source.header) as target:
            for record in source:
                target.write(record)
    except (OSError, ValueError) as error:
        raise ValueError(f"these records cannot be held in BCF ({error}); write .vcf.gz") from error
    finally:
        draft.unlink(missing_ok=True)
        text.unlink(missing_ok=True)


def _declarations(line: bytes) -> Iterator[bytes]:
    """Header lines for all that a line of a VCF names."""
    words = line.rstrip(b"\n").split(b"\t")
    yield b"##contig=<ID=" + words[0] + b">"
    for name in words[6].split(b";") if words[6] not in (b".", b"PASS") else ():
        yield b"##FILTER=<ID=" + name + b',Description="not declared">'
    for field in words[7].split(b";") if words[7] != b"." else ():
        name, equals, _ = field.partition(b"=")
        kind = b",Number=.,Type=String" if equals else b",Number=0,Type=Flag"
        yield b"##INFO=<ID=" + name + kind + b',Description="not declared">'
    if b"<" in words[4]:  # pysam looks for this field beside a symbolic allele
        yield b'##INFO=<ID=END,Number=1,Type=Integer,Description="Last base of the variant">'
    for name in words[8].split(b":") if len(words) > 8 else ():
        yield b"##FORMAT=<ID=" + name + b',Number=.,Type=String,Description="not declared">'


class _Order:
    """Whether records come in the order that an index needs, whether all can be read, and how far they reach."""

    def __init__(self) -> None:
        self.sorted, self.readable, self.furthest = True, True, 0
        self._seen, self._last = set[str](), ("", -1)

    def see(self, record: Record) -> None:
        if record.problem:
            self.readable = False
            return
        chrom, start = record.chrom, record.start
        self.furthest = max(self.furthest, start + len(record.ref))
        if chrom != self._last[0]:
            self.sorted = self.sorted and chrom not in self._seen
            self._seen.add(chrom)
        elif start < self._last[1]:
            self.sorted = False
        self._last = (chrom, start)


def _vcf_header(header: Sequence[str], scores: Sequence[str], facts: Mapping[str, Any], prefix: str) -> list[str]:
    own = (f"##INFO=<ID={prefix}_", f"##ssm_model=<prefix={prefix},", f"##ssm_contigs=<prefix={prefix},")
    kept = [line for line in header if not line.startswith(own)]
    if not kept:
        contigs = [f"##contig=<ID={name},length={length}>" for name, length in facts.get("contigs", {}).items()]
        kept = ["##fileformat=VCFv4.3", *contigs, "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO"]
    more = f"window {facts.get('window')}, {facts.get('mode')}, strand {facts.get('strand')}"
    added = [
        f'##INFO=<ID={prefix}_{name.upper()},Number=A,Type=Float,Description="{SCORES[name]}; {more}">'
        for name in scores
    ]
    about = "; ".join(f"{name}: {text}" for name, text in STATUSES.items()).replace('"', "'")
    added.append(f'##INFO=<ID={prefix}_STATUS,Number=A,Type=String,Description="{about}">')
    said = ("model", "model_sha256", "version", "window", "placement", "mode", "strand", "reference_md5")
    added.append(
        f"##ssm_model=<prefix={prefix}," + ",".join(f"{key}={facts[key]}" for key in said if key in facts) + ">"
    )
    if facts.get("aliases"):
        pairs = ",".join(f"{name}={contig}" for name, contig in facts["aliases"].items())
        added.append(f"##ssm_contigs=<prefix={prefix},{pairs}>")
    return [*kept[:-1], *added, kept[-1]]


def is_vcf(out: str) -> bool:
    """Whether an output is VCF or BCF."""
    return out.endswith((".vcf", ".vcf.gz", ".bcf"))


def vcf_line(record: Record) -> str:
    """A VCF line of a record that comes from a table.

    Raises:
        ValueError: if it has an empty allele or could not be read.
    """
    if record.problem or record.ref == "-" or "-" in record.alts or not record.ref:
        raise ValueError(
            f"record {record.index + 1} has an empty allele or could not be read, which VCF cannot hold; write .tsv"
        )
    alts = ",".join(alt or "." for alt in record.alts)
    return f"{record.chrom}\t{to_one_based(record.start)}\t{record.id}\t{record.ref}\t{alts}\t.\t.\t."


def _annotate(line: str, block: Columns, rows: range, scores: Sequence[str], prefix: str) -> str:
    words = line.split("\t", 8)
    old = [] if words[7] in (".", "") else words[7].split(";")
    old = [field for field in old if not field.startswith(f"{prefix}_")]
    new = [f"{prefix}_{name.upper()}={','.join(_number(block[name][row]) for row in rows)}" for name in scores]
    new.append(f"{prefix}_STATUS={','.join(block['status'][row] for row in rows)}")
    words[7] = ";".join([*old, *new])
    return "\t".join(words)


def _number(value: float) -> str:
    return "." if np.isnan(value) else f"{value:.6g}"
