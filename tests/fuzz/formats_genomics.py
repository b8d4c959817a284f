"""Files of genomes, variants and annotation."""

from __future__ import annotations

import csv
import gzip
import io
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pysam
from fuzzing import SHARED_MEMORY, Format, Payload, write_all
from hypothesis import strategies as st

from omnissm.genomics.annotation import read_features
from omnissm.genomics.contigs import ContigMap, read_contig_map
from omnissm.genomics.data.labelled import read_table
from omnissm.genomics.genbank import read_genbank
from omnissm.genomics.models.markov import MarkovModel
from omnissm.genomics.parts import Parts
from omnissm.genomics.reference import Reference
from omnissm.genomics.scoring import score_variants
from omnissm.genomics.status import Policy, check
from omnissm.genomics.variants import VariantFile

BASES = "".join(np.random.default_rng(0).choice(list("ACGT"), 300))
GENOME = Reference.from_sequences({"chr1": BASES, "2": BASES[:40] + "N" * 20, "é|x.1": "ACGT"})
MODEL = MarkovModel(2).fit([BASES])

packings = st.sampled_from(["", ".gz", ".bgz"])
newlines = st.sampled_from(["\n", "\r\n"])
words = st.text("ab1_.-|é", min_size=1, max_size=8)
alleles = st.text("ACGTNacgtn", min_size=1, max_size=6)
odd_alleles = st.sampled_from(["<DEL>", "*", ".", "<NON_REF>", "G]17:198982]", "]13:123456]T", "<*>"])
chroms = st.one_of(st.sampled_from(["chr1", "1", "2", "é|x.1"]), words)
positions = st.one_of(st.integers(1, 310), st.integers(1, 10**18 - 1))
variants = st.fixed_dictionaries(
    {
        "chrom": chroms,
        "pos": positions,
        "id": words,
        "ref": alleles,
        "alts": st.lists(st.one_of(alleles, odd_alleles), min_size=1, max_size=3),
    }
)
VCF_HEAD = ["##fileformat=VCFv4.2", '##INFO=<ID=DP,Number=1,Type=Integer,Description="Depth">']
VCF_COLUMNS = "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO"


def packed(payload: Mapping[str, bytes], folder: Path, model: Any) -> Path:
    """The one content, plain, as gzip or as BGZF."""
    ((name, content),) = payload.items()
    path = folder / f"{name}{'.gz' if model['packing'] else ''}"
    if model["packing"] == ".gz":
        path.write_bytes(gzip.compress(content, 1, mtime=0))
    elif model["packing"] == ".bgz":
        with pysam.BGZFile(str(path), "wb") as file:
            file.write(content)
    else:
        path.write_bytes(content)
    return path


def ended(lines: list[str], model: Any) -> bytes:
    """Lines with the model's newline; the last one may have none."""
    return (model["newline"].join(lines) + (model["newline"] if model["ended"] else "")).encode()


text_file = {"packing": packings, "newline": newlines, "ended": st.booleans()}


# VCF


def vcf(model: Any) -> Payload:
    lines = [*VCF_HEAD, VCF_COLUMNS]
    lines += [
        f"{v['chrom']}\t{v['pos']}\t{v['id']}\t{v['ref']}\t{','.join(v['alts'])}\t.\tPASS\tDP=3"
        for v in model["variants"]
    ]
    return {"a.vcf": ended(lines, model)}


def records(path: Path, model: Any) -> list[Any]:
    """What a file says; every allele also gets its status."""
    found = []
    for r in VariantFile(path, reference=GENOME):
        for alt in r.alts:
            check(r, alt, GENOME, ContigMap(GENOME.lengths), Policy())
        found.append((r.chrom, r.start, r.id, r.ref, r.alts, r.problem))
    return found


def as_records(model: Any) -> list[Any]:
    return [
        (v["chrom"], v["pos"] - 1, v["id"], v["ref"].upper(), tuple(a.upper() for a in v["alts"]), "")
        for v in model["variants"]
    ]


vcf_models = st.fixed_dictionaries({**text_file, "variants": st.lists(variants, max_size=4)})


def scored(path: Path, model: Any) -> list[str]:
    """Score the file and write it; the rows must be those of the file, and the output must be readable."""
    out = path.parent / "out" / f"o{model['out']}"
    table = score_variants(path, GENOME, MODEL, window=31, out=str(out), max_mismatch_frac=1.0)
    assert not out.with_name(f"{out.name}.parts").exists()
    if model["out"] != ".tsv":
        assert sum(len(r.alts) for r in VariantFile(out)) == table.n_rows
    return [f"{c}:{p}:{r}>{a}" for c, p, r, a in zip(table["chrom"], table["pos"], table["ref"], table["alt"])]


def scored_rows(model: Any) -> list[str]:
    return [f"{v['chrom']}:{v['pos']}:{v['ref'].upper()}>{a.upper()}" for v in model["variants"] for a in v["alts"]]


# BCF

simple_variants = st.fixed_dictionaries(
    {
        "chrom": st.sampled_from(["chr1", "2"]),
        "pos": st.integers(1, 2**29),
        "id": st.text("ab1", min_size=1, max_size=5),
        "ref": st.text("ACGT", min_size=1, max_size=5),
        "alts": st.lists(st.one_of(st.text("ACGT", min_size=1, max_size=5), st.just("<DEL>")), min_size=1, max_size=3),
    }
)


def bcf(model: Any) -> Payload:
    """Unpacked BCF, by htslib."""
    header = pysam.VariantHeader()
    for contig in ("chr1", "2"):
        header.add_line(f"##contig=<ID={contig},length={2**30}>")
    header.add_line(VCF_HEAD[1])
    header.add_line('##INFO=<ID=END,Number=1,Type=Integer,Description="End">')
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY) as scratch:
        path = f"{scratch}/a.bcf"
        with pysam.VariantFile(path, "wb", header=header) as file:
            for v in model["variants"]:
                place = {"contig": v["chrom"], "start": v["pos"] - 1, "alleles": (v["ref"], *v["alts"]), "id": v["id"]}
                file.write(file.new_record(**place, info={"DP": 3}, stop=v["pos"] - 1 + len(v["ref"])))
        return {"a.bcf": gzip.decompress(Path(path).read_bytes())}


def pack_bcf(payload: Mapping[str, bytes], folder: Path, model: Any) -> Path:
    with pysam.BGZFile(str(folder / "a.bcf"), "wb") as file:
        file.write(payload["a.bcf"])
    return folder / "a.bcf"


# Tables of variants

tables = st.fixed_dictionaries(
    {
        **text_file,
        "names": st.fixed_dictionaries(
            {
                "chrom": st.sampled_from(["chrom", "chr", "CHROM", "#CHROM", "contig"]),
                "pos": st.sampled_from(["pos", "POS", "position", "start0"]),
                "ref": st.sampled_from(["ref", "REF", "allele1"]),
                "alt": st.sampled_from(["alt", "ALT", "allele2"]),
                "id": st.sampled_from(["id", "ID", "variant_id"]),
            }
        ),
        "order": st.permutations(["chrom", "pos", "ref", "alt", "id", "more"]),
        "kind": st.sampled_from(["csv", "tsv", "parquet"]),
        "variants": st.lists(variants, max_size=4),
        "more": st.text('a,"é ', max_size=4),
    }
)


def rows_of(model: Any) -> list[list[Any]]:
    first = 0 if model["names"]["pos"] == "start0" else 1
    named = [
        {**v, "alt": ",".join(v["alts"]), "pos": v["pos"] - 1 + first, "more": model["more"]} for v in model["variants"]
    ]
    return [[v[key] for key in model["order"]] for v in named]


def variant_table(model: Any) -> Payload:
    names = [model["names"].get(key, key) for key in model["order"]]
    buffer = io.BytesIO() if model["kind"] == "parquet" else io.StringIO(newline="")
    if model["kind"] == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = list(zip(*rows_of(model))) or [()] * len(names)
        pq.write_table(pa.table({n: pa.array(c) for n, c in zip(names, columns)}), buffer)
        return {"a.parquet": buffer.getvalue()}
    delimiter = "," if model["kind"] == "csv" else "\t"
    csv.writer(buffer, delimiter=delimiter, lineterminator=model["newline"]).writerows([names, *rows_of(model)])
    return {f"a.{model['kind']}": buffer.getvalue().encode()}


def pack_table(payload: Mapping[str, bytes], folder: Path, model: Any) -> Path:
    return write_all(payload, folder, model) if model["kind"] == "parquet" else packed(payload, folder, model)


# Names like HGVS

base = st.sampled_from("ACGT")
changes = st.one_of(
    st.tuples(st.just("snv"), st.integers(1, 300), base, base),
    st.tuples(st.just("ins"), st.integers(1, 299), st.just(""), st.text("ACGT", min_size=1, max_size=4)),
    st.tuples(st.sampled_from(["del", "dup"]), st.integers(1, 290), st.integers(1, 6), st.just("")),
    st.tuples(st.just("delins"), st.integers(1, 290), st.integers(1, 6), st.text("ACGT", min_size=1, max_size=4)),
)  # fmt: skip
hgvs_models = st.fixed_dictionaries({**text_file, "changes": st.lists(changes, max_size=5)})


def hgvs_text(change: Any) -> str:
    kind, first, old, new = change
    if kind == "snv":
        return f"chr1:g.{first}{old}>{new}"
    if kind == "ins":
        return f"chr1:g.{first}_{first + 1}ins{new}"
    span = f"{first}" if old == 1 else f"{first}_{first + old - 1}"
    return f"chr1:g.{span}{kind}{new}"


def hgvs(model: Any) -> Payload:
    return {"a.txt": ended(["# names", *map(hgvs_text, model["changes"])], model)}


def hgvs_records(model: Any) -> list[Any]:
    found = []
    for change in model["changes"]:
        kind, first, old, new = change
        start = first - 1
        if kind == "snv":
            place = (start, old, new)
        elif kind == "ins":
            place = (start + 1, "-", new)
        elif kind == "dup":
            place = (start + old, "-", BASES[start : start + old])
        else:
            place = (start, BASES[start : start + old], new or "-")
        found.append(("chr1", place[0], hgvs_text(change), place[1], (place[2],), ""))
    return found


# FASTA

contigs = st.lists(
    st.tuples(words, st.text("ACGTNRYacgtnuU", min_size=1, max_size=60)),
    min_size=1,
    max_size=4,
    unique_by=lambda c: c[0],
)
fasta_models = st.fixed_dictionaries(
    {
        **text_file,
        "contigs": contigs,
        "width": st.sampled_from([1, 7, 60]),
        "about": st.sampled_from(["", " an organism", "\tx >y"]),
        "cache": st.sampled_from(["memory", "none", "auto"]),
        "cuts": st.lists(st.tuples(st.integers(-5, 70), st.integers(0, 30)), max_size=3),
    }
)


def fasta(model: Any) -> Payload:
    lines = []
    for name, bases in model["contigs"]:
        lines.append(f">{name}{model['about']}")
        lines += [bases[k : k + model["width"]] for k in range(0, len(bases), model["width"])]
    return {"a.fa": ended(lines, model)}


def sequences(path: Path, model: Any) -> dict[str, Any]:
    reference = Reference(path, cache=model["cache"])
    found = {
        name: [
            reference.fetch(name, 0, length),
            *(reference.fetch(name, start, start + span) for start, span in model["cuts"]),
        ]
        for name, length in reference.lengths.items()
    }
    reference.digest()
    return found


def as_sequences(model: Any) -> dict[str, Any]:
    found = {}
    for name, bases in model["contigs"]:
        plain = bases.upper().replace("U", "T")
        wide = "N" * 100 + plain + "N" * 200
        cuts = [wide[100 + start : 100 + start + span] for start, span in model["cuts"]]
        found[name] = [text.encode() for text in (plain, *cuts)]
    return found


# Annotation

features = st.fixed_dictionaries(
    {
        "chrom": words.filter(lambda name: not name.startswith(("#", "track", "browser"))),
        "start": st.integers(0, 10**12),
        "length": st.integers(1, 10**6),
        "strand": st.sampled_from("+-."),
        "id": st.text("abZ019_", min_size=1, max_size=8),
        "note": st.text("a ;=%é,&", max_size=6),
    }
)
annotation_models = st.fixed_dictionaries(
    {
        **text_file,
        "kind": st.sampled_from(["bed", "gff3", "gtf", "tsv", "csv"]),
        "features": st.lists(features, min_size=1, max_size=4),
    }
)


def annotation(model: Any) -> Payload:
    from urllib.parse import quote

    lines, kind = [], model["kind"]
    separator = "," if kind == "csv" else "\t"
    if kind in ("tsv", "csv"):
        lines.append(separator.join(["chrom", "start0", "end", "strand", "id"]))
    elif kind == "bed":
        lines += ["track name=x", "# remark"]
    for f in model["features"]:
        start, end = f["start"], f["start"] + f["length"]
        if kind == "bed":
            fields = [f["chrom"], start, end, f["id"], 0, f["strand"]]
        elif kind in ("tsv", "csv"):
            fields = [f["chrom"], start, end, f["strand"], f["id"]]
        else:
            facts = f"ID={f['id']};note={quote(f['note'], safe='')}"
            facts = facts if kind == "gff3" else f'gene_id "{f["id"]}"; other "x"'
            fields = [f["chrom"], "src", "gene", start + 1, end, ".", f["strand"], ".", facts]
        lines.append(separator.join(map(str, fields)))
    return {f"a.{kind}": ended(lines, model)}


def read_annotation(path: Path, model: Any) -> list[Any]:
    found = read_features(path)
    assert all(f.start <= f.end and f.interval for f in found)
    note = [f.attributes.get("note") for f in found] if model["kind"] == "gff3" else None
    return [[(f.chrom, f.start, f.end, f.strand, f.id) for f in found], note]


def as_features(model: Any) -> list[Any]:
    places = [(f["chrom"], f["start"], f["start"] + f["length"], f["strand"], f["id"]) for f in model["features"]]
    return [places, [f["note"] for f in model["features"]] if model["kind"] == "gff3" else None]


# GenBank

places = st.tuples(st.integers(0, 20), st.integers(1, 9), st.sampled_from([1, -1]), st.booleans())
genbank_models = st.fixed_dictionaries(
    {
        "packing": st.sampled_from(["", ".gz"]),
        "kind": st.sampled_from(["genbank", "embl"]),
        "records": st.lists(
            st.fixed_dictionaries(
                {
                    "bases": st.text("ACGTN", min_size=30, max_size=120),
                    "circular": st.booleans(),
                    "features": st.lists(
                        st.tuples(st.integers(0, 20), st.integers(1, 9), st.sampled_from([1, -1]), st.booleans()),
                        max_size=3,
                    ),
                }
            ),
            min_size=1,
            max_size=2,
        ),
    }
)


def genbank(model: Any) -> Payload:
    from Bio import SeqIO
    from Bio.Seq import Seq
    from Bio.SeqFeature import CompoundLocation, SeqFeature, SimpleLocation
    from Bio.SeqRecord import SeqRecord

    made = []
    for k, r in enumerate(model["records"]):
        facts = {"molecule_type": "DNA", "topology": "circular" if r["circular"] else "linear"}
        record = SeqRecord(Seq(r["bases"]), id=f"rec{k}.1", name=f"rec{k}", annotations=facts)
        for n, (start, span, strand, split) in enumerate(r["features"]):
            place = SimpleLocation(start, start + span, strand)
            if split:
                place = CompoundLocation([place, SimpleLocation(start + span, start + span + 1, strand)][::strand])
            record.features.append(SeqFeature(place, type="CDS", qualifiers={"locus_tag": [f"g{n}"]}))
        made.append(record)
    text = io.StringIO()
    SeqIO.write(made, text, model["kind"])
    return {"a.gb" if model["kind"] == "genbank" else "a.embl": text.getvalue().encode()}


def read_records(path: Path, model: Any) -> list[Any]:
    found = read_genbank(path)
    Reference(path)
    assert all(f.interval for r in found for f in r.features)
    places = [[(f.start, f.end, f.strand, f.id, len(f.parts)) for f in r.features] for r in found]
    return [(r.name, r.sequence, r.circular, p) for r, p in zip(found, places)]


def as_genbank(model: Any) -> list[Any]:
    return [
        (
            f"rec{k}.1",
            r["bases"].encode(),
            r["circular"],
            [
                (s, s + span + split, "+" if strand == 1 else "-", f"g{n}", 2 * split)
                for n, (s, span, strand, split) in enumerate(r["features"])
            ],
        )
        for k, r in enumerate(model["records"])
    ]


# Tables of labelled sequences, names of contigs, parts of a scoring run

labelled_rows = st.lists(st.tuples(st.text("ACGT", max_size=9), st.text('a,"é 01', max_size=4)), min_size=1, max_size=4)
labelled_models = st.fixed_dictionaries(
    {
        **text_file,
        "kind": st.sampled_from(["csv", "tsv", "parquet"]),
        "rows": st.lists(
            st.tuples(st.text("ACGT", max_size=9), st.text('a,"é 01', max_size=4)), min_size=1, max_size=4
        ),
    }
)


def labelled(model: Any) -> Payload:
    if model["kind"] == "parquet":
        import pandas as pd

        buffer = io.BytesIO()
        pd.DataFrame(model["rows"], columns=["sequence", "label"]).to_parquet(buffer)
        return {"a.parquet": buffer.getvalue()}
    text = io.StringIO(newline="")
    delimiter = "," if model["kind"] == "csv" else "\t"
    csv.writer(text, delimiter=delimiter, lineterminator=model["newline"]).writerows(
        [("sequence", "label"), *model["rows"]]
    )
    return {f"a.{model['kind']}": text.getvalue().encode()}


def as_columns(model: Any) -> dict[str, Any]:
    sequences, labels = zip(*model["rows"])
    return {"sequence": list(sequences), "label": list(labels)}


def read_labelled(path: Path, model: Any) -> dict[str, Any]:
    return read_table(str(path))


def read_map(path: Path, model: Any) -> dict[str, str]:
    return read_contig_map(path)


def contig_map(model: Any) -> Payload:
    return {"map.txt": model["newline"].join(f"{a} {b}" for a, b in model["pairs"].items()).encode()}


map_models = st.fixed_dictionaries({"newline": newlines, "pairs": st.dictionaries(words, words, max_size=4)})

parts_models = st.fixed_dictionaries(
    {
        "score": st.lists(st.floats(width=64), max_size=5),
        "chrom": st.lists(st.text("chr1é", max_size=5), max_size=5),
    }
)


def parts(model: Any) -> Payload:
    manifest = b'{"columns": ["score", "chrom"]}'
    return {
        "manifest.json": manifest,
        **arrays({"score": np.array(model["score"]), "chrom": np.array(model["chrom"], str)}),
    }


def arrays(named: Mapping[str, np.ndarray]) -> Payload:
    """Every array as a .npy file."""
    found = {}
    for name, array in named.items():
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        found[f"{name}.npy"] = buffer.getvalue()
    return found


def pack_npz(payload: Mapping[str, bytes], folder: Path, model: Any, name: str = "a.npz") -> Path:
    """Contents as a .npz file."""
    import zipfile

    with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for member, content in payload.items():
            archive.writestr(member, content)
    return folder / name


def pack_parts(payload: Mapping[str, bytes], folder: Path, model: Any) -> Path:
    pack_npz({k: v for k, v in payload.items() if k != "manifest.json"}, folder, model, "part-000000.npz")
    (folder / "manifest.json").write_bytes(payload["manifest.json"])
    return folder


def read_parts(path: Path, model: Any) -> dict[str, Any]:
    return dict(Parts.open(path).read(0) or {})


def as_parts(model: Any) -> dict[str, Any]:
    return {"score": np.array(model["score"], float), "chrom": np.array(model["chrom"], str)}


FORMATS = [
    Format("vcf", vcf_models, vcf, records, as_records, packed),
    Format(
        "scoring",
        st.fixed_dictionaries(
            {
                **text_file,
                "out": st.sampled_from([".vcf", ".vcf.gz", ".tsv"]),
                "variants": st.lists(variants, max_size=4),
            }
        ),
        vcf,
        scored,
        scored_rows,
        packed,
        weight=0.5,
    ),
    Format(
        "bcf",
        st.fixed_dictionaries({"variants": st.lists(simple_variants, max_size=4)}),
        bcf,
        records,
        as_records,
        pack_bcf,
    ),
    Format("variant-table", tables, variant_table, records, as_records, pack_table),
    Format("hgvs", hgvs_models, hgvs, records, hgvs_records, packed),
    Format("fasta", fasta_models, fasta, sequences, as_sequences, packed),
    Format("annotation", annotation_models, annotation, read_annotation, as_features, packed),
    Format("genbank", genbank_models, genbank, read_records, as_genbank, packed),
    Format(
        "labelled-table", labelled_models, labelled, lambda path, model: read_table(str(path)), as_columns, pack_table
    ),
    Format(
        "contig-map", map_models, contig_map, lambda path, model: read_contig_map(path), lambda model: model["pairs"]
    ),
    Format("score-parts", parts_models, parts, read_parts, as_parts, pack_parts),
]
