"""`omnissm genomics VERB`: the verbs that score variants, as plain typed functions; also `python -m`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

Strand = Literal["both", "fwd", "rev"]
Mode = Literal["fixed", "flank"]
OnMismatch = Literal["skip", "error", "swap", "trust"]
Dtype = Literal["float32", "bfloat16"]


def score(
    variants: str,
    reference: Path,
    model: str,
    out: str | list[str],
    window: int = 8192,
    scores: list[str] | None = None,
    strand: Strand = "both",
    mode: Mode = "fixed",
    placement: float = 0.5,
    regions: str | list[str] | None = None,
    regions_file: Path | None = None,
    contig_map: Path | None = None,
    circular: str | list[str] | None = None,
    on_ref_mismatch: OnMismatch = "skip",
    max_mismatch_frac: float = 0.3,
    max_allele: int = 1000,
    max_n_frac: float = 0.1,
    normalise: bool = True,
    coordinates: Literal[0, 1] = 1,
    share_window: int = 1,
    embed_k: int = 0,
    embed_layer: str | None = None,
    part_size: int = 1000,
    shard: str | None = None,
    devices: int = 1,
    resume: bool = False,
    prefix: str = "SSM",
    overwrite_info: bool = False,
    device: str = "auto",
    dtype: Dtype = "float32",
    batch_tokens: int | None = None,
    restrict: Literal["acgt"] | None = None,
    workers: int = 0,
    progress: bool | None = None,
) -> int:
    """Score every alternative allele of a file of variants with a model.

    Exit code 3: nothing was scored; 4: too many REF alleles differ from the reference.

    Args:
        variants: .vcf, .vcf.gz, .bcf, .tsv, .csv, .parquet, .txt (HGVS-like names), or - for a VCF on stdin.
        reference: Genome, FASTA (plain, BGZF or gzip) or GenBank.
        model: Model folder, run folder, .ckpt file, hf-hub:OWNER/NAME, or dnahnet_debug_ecoli of the package.
        out: .vcf, .vcf.gz, .bcf, .tsv, .tsv.gz, .parquet, or - for TSV on stdout; several as a list.
        window: Bases around a variant that the model reads.
        scores: Some of llr, llr_mean, llr_fwd, llr_rev, ll_ref, ll_alt, llr_site, masked_llr, embed_cos, embed_l1,
            embed_l2, boundary_shift; by default llr, or masked_llr of a masked model.
        strand: Reading directions.
        mode: "fixed" compares equally many bases; "flank" keeps both flanks of an indel.
        placement: Share of the window's free bases on the left of the variant.
        regions: Only records that overlap these, such as chr20:1-1000000.
        regions_file: The same from a BED file.
        contig_map: Two columns: name in the variants, name in the reference.
        circular: Circular contigs of the reference, or "all".
        on_ref_mismatch: Where REF differs from the reference: leave out, stop, exchange REF and ALT, or believe REF.
        max_mismatch_frac: Stop above this share of such alleles.
        max_allele: Longest allele.
        max_n_frac: Largest share of N in a window.
        normalise: Trim shared bases and shift indels to the left.
        coordinates: Whether a table's positions count from 1 or 0.
        share_window: Variants within so many bases share one reference window.
        embed_k: Bases on each side whose embeddings are averaged; 0 takes the window.
        embed_layer: Layer of the embeddings, see `describe`.
        part_size: Records of a block; a killed run loses at most one.
        shard: i/n, such as 0/4: score every n-th block; `score-merge` joins them.
        devices: GPUs to spread over, the first ones; with `--device cpu`, processes.
        resume: Go on with a killed run.
        prefix: Begin of the new INFO fields.
        overwrite_info: Replace such fields of an earlier run.
        device: auto, cpu or such as cuda:0.
        dtype: Of the weights.
        batch_tokens: Positions of a batch at most; 65,536 on a CPU and 1,048,576 on a GPU where none are given.
        restrict: "acgt" renormalises probabilities over the four bases.
        workers: Threads that read the genome for the next blocks while the model works.
        progress: Show count, rate and time left; by default on a terminal.

    Raises:
        ValueError: for inputs that do not fit.

    Example:
      omnissm genomics score --variants calls.vcf.gz --reference genome.fa \\
        --model runs/NAME --out scored.vcf.gz --window 8192
    """
    from ..ssmcore.training.interrupts import interruptible
    from .annotation import read_bed
    from .data.regions import merge
    from .loading import load_scorer
    from .reference import Reference
    from .scoring import score_variants
    from .status import Policy, RefMismatchError
    from .variant_scorer import ScoreOptions

    outs = [out] if isinstance(out, str) else list(out)
    if devices < 1 or (devices > 1 and shard is not None):
        raise ValueError(f"expected devices of at least 1, and 1 for a single shard, got {devices}")
    if devices > 1:
        return _spread(devices, device, variants, outs, prefix, overwrite_info, reference)
    options = ScoreOptions(
        scores=tuple(scores or ()),
        window=window,
        placement=placement,
        mode=mode,
        strand=strand,
        max_n_frac=max_n_frac,
        share_window=share_window,
        embed_k=embed_k,
        embed_layer=embed_layer,
        policy=Policy(on_ref_mismatch, max_allele, normalise),
    )
    places: list[Any] = [regions] if isinstance(regions, str) else list(regions or ())
    places += merge(read_bed(regions_file)) if regions_file else []
    genome = Reference(reference, circular=_circular(circular))
    scorer = load_scorer(model, device=device, dtype=dtype, restrict=restrict, batch_tokens=batch_tokens)
    kept = any(name != "-" for name in outs)
    try:
        with interruptible(_KEPT if kept else "Nothing is kept."):
            table = score_variants(
                variants,
                genome,
                scorer,
                options,
                out=outs,
                regions=places,
                contig_map=contig_map,
                coordinates=coordinates,
                max_mismatch_frac=max_mismatch_frac,
                part_size=part_size,
                shard=_shard(shard),
                resume=resume,
                prefix=prefix,
                overwrite_info=overwrite_info,
                workers=workers,
                progress=progress,
            )
    except RefMismatchError as error:
        sys.stderr.write(f"omnissm: error: {error}\n")
        return 4
    return _summary(table, scorer.dtype, outs if shard is None else [])


def _circular(given: str | list[str] | None) -> bool | list[str]:
    if given == "all":
        return True
    return [given] if isinstance(given, str) else list(given or ())


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, slash, second = text.partition("/")
    if not slash or not first.isdigit() or not second.isdigit():
        raise ValueError(f"expected a shard such as 0/4, got {text!r}")
    return int(first), int(second)


def _summary(table: Any, dtype: str, outs: list[str]) -> int:
    """Counts on stderr, names of files on stdout, and the exit code."""
    counts = table.counts()
    said = ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))
    sys.stderr.write(f"{table.n_rows:,} alleles ({dtype}): {said or 'none'}\n")
    sys.stdout.write("".join(f"{out}\n" for out in outs if out != "-"))
    return 0 if not table.n_rows or counts.get("ok", 0) + counts.get("swapped", 0) else 3


_KEPT = "Finished blocks are kept; go on with the same command and --resume true."


def _spread(
    devices: int, device: str, variants: str, outs: list[str], prefix: str, overwrite_info: bool, reference: Path
) -> int:
    """One process for each device over the shards, then the merge."""
    from ..ssmcore.training.devices import find_device
    from ..ssmcore.training.interrupts import interruptible

    if variants == "-":
        raise ValueError("standard input cannot be read by several processes; give a file")
    words = sys.argv[1:]
    base = words[words.index("score") + 1 :] if "score" in words else []
    if not base:
        raise ValueError("devices > 1 works from the command line; in Python, start one process for each shard")
    if device not in ("auto", "cuda", "cpu"):
        raise ValueError(f"several devices are the first GPUs, or --device cpu for processes on it, got {device!r}")
    places = ["cpu" if device == "cpu" else f"cuda:{k}" for k in range(devices)]
    find_device(places[-1])
    start = [sys.executable, "-m", "omnissm", "genomics", "score", *base, "--devices", "1"]
    with interruptible(_KEPT):
        runs: list[subprocess.Popen[bytes]] = []
        try:
            for k, place in enumerate(places):
                runs.append(subprocess.Popen([*start, "--shard", f"{k}/{devices}", "--device", place]))
            codes = [run.wait() for run in runs]
        except BaseException:
            for run in runs:
                run.terminate()
            for run in runs:
                run.wait()
            raise
    if any(code not in (0, 3) for code in codes):
        advice = "see above" if 2 in codes else "--resume true goes on"
        sys.stderr.write(f"omnissm: error: shards ended with exit codes {codes}; {advice}\n")
        return next((code for code in codes if code > 0 and code != 3), 1)  # a killed one has a negative code
    return score_merge(variants, outs, prefix=prefix, overwrite_info=overwrite_info, reference=reference)


def score_merge(
    variants: str,
    out: str | list[str],
    parts: str | list[str] | None = None,
    reference: Path | None = None,
    prefix: str = "SSM",
    overwrite_info: bool = False,
) -> int:
    """Join the shards of `score` into the files that one run would have written.

    Args:
        variants: The file that was scored.
        out: Outputs, as for `score`.
        parts: Folders OUT.parts of shards from several machines; by default that beside the first output.
        reference: The genome; needed for HGVS-like names only.
        prefix: Begin of the new INFO fields.
        overwrite_info: Replace such fields of an earlier run.

    Raises:
        ValueError: if a part is missing or of another run.

    Example:
      omnissm genomics score-merge --variants calls.vcf.gz --out scored.vcf.gz
    """
    from .scoring import merge_scores

    folders = [parts] if isinstance(parts, str) else list(parts or ())
    outs = [out] if isinstance(out, str) else list(out)
    table = merge_scores(variants, outs, folders, prefix=prefix, overwrite_info=overwrite_info, reference=reference)
    return _summary(table, str(table.facts.get("dtype", "")), outs)


def scan(
    reference: Path,
    region: str,
    model: str,
    out: str | list[str],
    window: int = 8192,
    strand: Strand = "both",
    circular: str | list[str] | None = None,
    skip_n: bool = True,
    device: str = "auto",
    dtype: Dtype = "float32",
    batch_tokens: int | None = None,
    progress: bool | None = None,
) -> int:
    """Score all single-base changes of a region (in-silico mutagenesis).

    Args:
        reference: Genome.
        region: Such as chr1:1000-1200 (1-based, both included), or a whole contig.
        model: Model folder, run folder, .ckpt file, hf-hub:OWNER/NAME, or dnahnet_debug_ecoli of the package.
        out: .tsv, .tsv.gz, .parquet, - for TSV on stdout, or .npy for a (4, l) array; several as a list.
        window: Bases that the model reads.
        strand: Reading directions.
        circular: Circular contigs of the reference, or "all".
        skip_n: Leave out positions that are N.
        device: auto, cpu or such as cuda:0.
        dtype: Of the weights.
        batch_tokens: Positions of a batch at most; 65,536 on a CPU and 1,048,576 on a GPU where none are given.
        progress: Show count, rate and time left.

    Raises:
        ValueError: for a region that is not in the reference.

    Example:
      omnissm genomics scan --reference genome.fa --region chr1:1000-1200 --model runs/NAME --out scan.tsv
    """
    from .loading import load_scorer
    from .reference import Reference
    from .scanning import check_scan_output, write_scan
    from .scanning import scan as run

    outs = [out] if isinstance(out, str) else list(out)
    for name in outs:
        check_scan_output(name)
    genome = Reference(reference, circular=_circular(circular))
    place = genome.region(region)
    scorer = load_scorer(model, device=device, dtype=dtype, batch_tokens=batch_tokens)
    table, scores = run(genome, place, scorer, skip_n=skip_n, window=window, strand=strand, progress=progress)
    for name in outs:
        write_scan(name, table, scores)
    return _summary(table, scorer.dtype, outs)


def markov(
    fasta: str | list[str], out: Path, order: int = 7, strength: float = 100.0, regions: list[str] | None = None
) -> None:
    """Count an interpolated Markov model, the baseline that every network should beat.

    Args:
        fasta: Genome, or several.
        out: Model folder to write.
        order: Bases of context.
        strength: Weight of shorter contexts, in counts.
        regions: Count only here, such as chr1:1-4000000; by default everywhere.

    Raises:
        ValueError: for an order outside 0..12 or an unknown region.

    Example:
      omnissm genomics markov --fasta genome.fa --out markov7
    """
    from .models import save_pretrained
    from .models.markov import MarkovModel
    from .reference import Reference

    model = MarkovModel(order, strength)
    for path in [fasta] if isinstance(fasta, str) else fasta:
        genome = Reference(path)
        places = [genome.region(text) for text in regions or genome.names]
        model.fit([genome.fetch_interval(place) for place in places])
    sys.stdout.write(f"{save_pretrained(model, out, dtype=None)}\n")


def convert(
    source: Path,
    out: Path,
    config_file: Path | None = None,
    family: Literal["hnet", "caduceus", "genbank"] = "hnet",
    allow_pickle: bool = False,
) -> None:
    """Turn published weights into a model folder, or a GenBank file into FASTA and GFF3.

    Args:
        source: Weights (.safetensors, .pt) or a GenBank file.
        out: Model folder; for genbank the name of both files without suffix.
        config_file: The published configuration file (JSON) of the weights.
        family: Whose names the weights have, or "genbank".
        allow_pickle: Read .pt files; only tensors and plain values, even then.

    Raises:
        ValueError: if weights and configuration do not fit.

    Example:
      omnissm genomics convert --source model.safetensors --config_file config.json --out folder
    """
    if family == "genbank":
        from .genbank import genbank_to_fasta_gff

        genbank_to_fasta_gff(source, f"{out}.fa", f"{out}.gff3")
        sys.stdout.write(f"{out}.fa\n{out}.gff3\n")
        return
    from .models import save_pretrained
    from .models.official import load_caduceus, load_hnet

    if config_file is None:
        raise ValueError("weights need their --config_file, a JSON file")
    load: Any = load_hnet if family == "hnet" else load_caduceus
    sys.stdout.write(f"{save_pretrained(load(source, config_file, allow_pickle=allow_pickle), out)}\n")


if __name__ == "__main__":
    from ..__main__ import main

    sys.exit(main(["genomics", *sys.argv[1:]]))
