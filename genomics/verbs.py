"""The verbs that look at models and sequences: embed, generate, boundaries, essential, evaluate, describe."""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

Dtype = Literal["float32", "bfloat16"]
Pooling = Literal["mean", "max", "last", "none", "chunks"]


def embed(
    sequences: Path,
    model: str,
    out: Path,
    regions: str | list[str] | None = None,
    bed: Path | None = None,
    column: str = "sequence",
    layer: str | None = None,
    pooling: Pooling = "mean",
    strands: Literal["fwd", "mean", "concat"] = "fwd",
    device: str = "auto",
    dtype: Dtype = "float32",
    batch_tokens: int | None = None,
    progress: bool | None = None,
) -> None:
    """Embed sequences with a model.

    Args:
        sequences: FASTA or GenBank file, or a table (.csv, .tsv) with a column of sequences.
        model: Model folder, run folder, .ckpt file, or "owner/name" on the hub.
        out: .npz, .parquet or .zarr.
        regions: Embed these regions of the FASTA file instead of whole sequences.
        bed: The same from a BED file; a strand is honoured.
        column: Column of a table.
        layer: Layer, see `describe`; by default the last.
        pooling: One vector (mean, max, last), or one for each base (none) or chunk (chunks).
        strands: Read forward, or join both directions.
        device: auto, cpu or such as cuda:0.
        dtype: Of the weights.
        batch_tokens: Positions of a batch at most; 65,536 on a CPU and 1,048,576 on a GPU where none are given.
        progress: Show count, rate and time left.

    Raises:
        ValueError: for a layer that the model lacks.

    Example:
      omnissm genomics embed --sequences genes.fa --model runs/NAME --out genes.parquet
    """
    from .embedding import SUFFIXES, embed_sequences, write_embeddings
    from .loading import load_scorer

    _check_out(out, SUFFIXES)
    if out.suffix == ".zarr" and out.exists():
        raise ValueError(f"{str(out)!r} exists; remove it or choose another name")
    scorer = load_scorer(model, device=device, dtype=dtype, batch_tokens=batch_tokens)
    named = _sequences(sequences, _list(regions), bed, column)
    found = embed_sequences(scorer, named, layer=layer, pooling=pooling, strands=strands, progress=progress)
    facts = {
        "model": scorer.name,
        "model_sha256": scorer.digest(),
        "layer": layer or "last",
        "pooling": pooling,
        "strands": strands,
    }
    write_embeddings(out, found, facts)
    sys.stdout.write(f"{out}\n")


def _sequences(path: Path, regions: Sequence[str], bed: Path | None, column: str) -> list[tuple[str, bytes]]:
    from .annotation import read_bed
    from .data.labelled import read_table
    from .intervals import Interval
    from .reference import Reference

    if path.name.removesuffix(".gz").endswith((".csv", ".tsv", ".parquet")):
        if regions or bed:
            raise ValueError(f"regions and bed are places in a genome; {path} is a table of sequences")
        columns = read_table(str(path))
        if column not in columns:
            raise ValueError(f"{path} has no column {column!r}; it has {', '.join(columns)}")
        return [(str(k), str(text).encode()) for k, text in enumerate(columns[column])]
    genome = Reference(path)
    places = [genome.region(text) for text in regions]
    places += read_bed(bed) if bed else []
    if not regions and bed is None:
        places = [Interval(name, 0, length) for name, length in genome.lengths.items()]
        return [(place.chrom, genome.fetch_interval(place)) for place in places]
    return [(str(place), genome.fetch_interval(place)) for place in places]


def generate(
    model: str,
    out: str = "-",
    prompts: str | list[str] | None = None,
    prompt_file: Path | None = None,
    n: int = 1,
    length: int = 1000,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    restrict: Literal["acgt", "none"] = "acgt",
    seed: int = 0,
    device: str = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Write new sequences, sampled from a causal model.

    Args:
        model: Model folder, run folder, .ckpt file, or "owner/name" on the hub.
        out: FASTA file, or - for stdout; descriptions say the log-likelihood.
        prompts: Bases to continue; by default from nothing.
        prompt_file: The same from a FASTA file.
        n: Sequences for each prompt.
        length: New bases of each.
        temperature: Above 1 is more random, 0 always the most probable base.
        top_k: Among the k most probable only; 0 all.
        top_p: Among the most probable that together have this share.
        restrict: Only A, C, G, T, or all ids.
        seed: The same seed gives the same sequences.
        device: auto, cpu or such as cuda:0.
        dtype: Of the weights.

    Raises:
        ValueError: for a masked model.

    Example:
      omnissm genomics generate --model runs/NAME --prompts ATG --n 3 --length 300 --out new.fa
    """
    from .files import open_out
    from .generation import generate as run
    from .loading import load_scorer
    from .reference import read_fasta

    scorer = load_scorer(model, device=device, dtype=dtype)
    named = [(f"prompt{k}", text) for k, text in enumerate(_list(prompts))]
    named += [(name, bases.decode()) for name, bases in read_fasta(prompt_file)] if prompt_file else []
    named = named or [("new", "")]
    options: dict[str, Any] = {"n": n, "length": length, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    texts = [text for _, text in named]
    with open_out(out) as file:
        count: dict[int, int] = {}
        for new in run(scorer, texts, restrict=restrict == "acgt", seed=seed, **options):
            count[new.prompt] = count.get(new.prompt, 0) + 1
            name, prompt = named[new.prompt]
            file.write(f">{name}_{count[new.prompt]} log_likelihood={new.log_likelihood:.4f} prompt={len(prompt)}\n")
            text = prompt + new.sequence
            file.writelines(f"{text[k : k + 80]}\n" for k in range(0, len(text), 80))
    if out != "-":
        sys.stdout.write(f"{out}\n")


def boundaries(
    reference: Path,
    model: str,
    regions: str | list[str],
    out: str,
    genes: Path | None = None,
    gene_type: str = "CDS",
    rates: str | None = None,
    figure: Path | None = None,
    region_figure: Path | None = None,
    device: str = "auto",
    dtype: Dtype = "float32",
    seed: int = 0,
) -> None:
    """Write where a hierarchical model cuts a region, and how that relates to genes.

    Args:
        reference: Genome.
        model: A model with stages.
        regions: Such as chr1:1-49152; each is read in one piece.
        out: .bed, .bedgraph or .tsv of the first region.
        genes: GFF3, GTF, BED, table or GenBank file with genes.
        gene_type: Type of its features that count as genes.
        rates: TSV of selection rates by class and codon position over all regions; - for stdout.
        figure: Picture of these rates.
        region_figure: Picture of the first region with cuts and genes.
        device: auto, cpu or such as cuda:0.
        dtype: Of the weights.
        seed: Of intervals and of the comparison with shifted boundaries.

    Raises:
        ValueError: if the model has no stages, or rates are asked for without genes.

    Example:
      omnissm genomics boundaries --reference genome.fa --model runs/NAME --regions chr1:1-49152 \\
        --out cuts.bed --genes genes.gff3 --rates rates.tsv --figure rates.png
    """
    from .annotation import read_features
    from .boundaries import annotate, plot_rates, plot_region, trace, write_rates, write_trace
    from .loading import load_scorer
    from .reference import Reference

    for path in (figure, region_figure):
        if path is not None:
            _check_out(path, (".png", ".pdf", ".svg"))
    if (rates or figure) and genes is None:
        raise ValueError("rates by class need --genes, a file with genes")
    genome = Reference(reference)
    scorer = load_scorer(model, device=device, dtype=dtype)
    traces = [trace(scorer, genome, genome.region(text)) for text in _list(regions)]
    write_trace(out, traces[0])
    written = [out]
    features = read_features(genes, [gene_type]) if genes else []
    if genes and not features:
        raise ValueError(f"{genes} has no features of type {gene_type!r}; name another --gene_type")
    if rates or figure:
        found = annotate(traces, features, seed=seed)
        if rates:
            write_rates(rates, found)
            written += [rates] if rates != "-" else []
        if figure:
            plot_rates(found, figure)
            written.append(str(figure))
    if region_figure:
        plot_region(traces[0], features, region_figure)
        written.append(str(region_figure))
    sys.stdout.write("".join(f"{name}\n" for name in written))


def essential(
    reference: Path,
    genes: Path,
    model: str,
    out: str = "essential.tsv",
    gene_type: str | None = None,
    labels: str | list[str] | None = None,
    window: int = 8192,
    offset: int = 12,
    code: int = 11,
    circular: str | list[str] | None = None,
    device: str = "auto",
    dtype: Dtype = "float32",
    batch_tokens: int | None = None,
    progress: bool | None = None,
) -> None:
    """Score genes by what a stop cassette near their start costs in likelihood.

    Args:
        reference: Genome.
        genes: GFF3, GTF, BED, table or GenBank file with coding sequences from start to stop codon.
        model: A causal model.
        out: TSV, or - for stdout.
        gene_type: Type of the features that count; by default "CDS" of GFF3, GTF and GenBank, all of others.
        labels: Columns or attributes with 1 for essential and 0 for not; gives areas under the ROC curve.
        window: Bases around a gene that the model reads.
        offset: Bases from the start codon's first base to the cassette.
        code: NCBI number of the genetic code.
        circular: Circular contigs of the reference, or "all".
        device: auto, cpu or such as cuda:0.
        dtype: Of the weights.
        batch_tokens: Positions of a batch at most; 65,536 on a CPU and 1,048,576 on a GPU where none are given.
        progress: Show count, rate and time left.

    Raises:
        ValueError: if there are no genes, or a label is missing.

    Example:
      omnissm genomics essential --reference genome.fa --genes genes.tsv --labels essential --model runs/NAME
    """
    from .annotation import read_features
    from .essentiality import CASSETTE, auroc, score_genes
    from .files import open_out
    from .loading import load_scorer
    from .reference import Reference

    stem = genes.name.removesuffix(".gz")
    kinds = [gene_type] if gene_type else None if stem.endswith((".tsv", ".csv", ".bed")) else ["CDS"]
    features = read_features(genes, kinds)
    if not features:
        raise ValueError(f"{genes} has no features of type {kinds}; name another --gene_type")
    names = _list(labels)
    for name in names:
        if not any(name in gene.attributes for gene in features):
            raise ValueError(f"{genes} has no label {name!r}; it has {', '.join(features[0].attributes)}")
    genome = Reference(reference, circular=True if circular == "all" else _list(circular))
    scorer = load_scorer(model, device=device, dtype=dtype, batch_tokens=batch_tokens)
    found = score_genes(scorer, genome, features, window=window, offset=offset, table=code, progress=progress)
    with open_out(out) as file:
        file.write(
            f"# model={scorer.name} window={window} cassette={CASSETTE.decode()} offset={offset} orientation=gene\n"
        )
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(("gene", "chrom", "strand", "length", "gc", "cai", "ll_wt", "ll_ko", "score", "status", *names))
        for row in found:
            numbers = (row.gc, row.cai, row.ll_wt, row.ll_ko, row.score)
            shown = ["" if value != value else f"{value:.6g}" for value in numbers]
            own = [row.gene.attributes.get(name, "") for name in names]
            writer.writerow((row.gene.id, row.gene.chrom, row.gene.strand, len(row.gene), *shown, row.status, *own))
    scored = [row for row in found if row.status == "ok"]
    skipped = Counter(row.status for row in found if row.status != "ok")
    reasons = f" ({', '.join(f'{status} {count:,}' for status, count in skipped.items())})" if skipped else ""
    sys.stderr.write(f"{len(scored):,} genes scored, {skipped.total():,} left out{reasons}\n")
    for name in names:
        kept = [row for row in scored if row.gene.attributes.get(name) in ("0", "1")]
        truth = [row.gene.attributes[name] == "1" for row in kept]
        values: dict[str, list[float]] = {
            "model": [row.score for row in kept],
            "length": [len(row.gene) for row in kept],
            "gc": [row.gc for row in kept],
            "cai": [row.cai for row in kept],
        }
        said = "  ".join(f"{key} {auroc(numbers, truth):.3f}" for key, numbers in values.items())
        sys.stderr.write(f"AUROC {name} ({sum(truth)} of {len(truth)} essential): {said}\n")
    if out != "-":
        sys.stdout.write(f"{out}\n")


def evaluate(
    fasta: Path,
    model: str | None = None,
    regions: str | list[str] | None = None,
    bed: Path | None = None,
    train: str | list[str] | None = None,
    orders: list[int] | None = None,
    strength: float = 100.0,
    window: int = 8192,
    context: int = 0,
    both_strands: bool = False,
    restrict: Literal["acgt"] | None = None,
    device: str = "auto",
    dtype: Dtype = "float32",
    batch_tokens: int | None = None,
    progress: bool | None = None,
) -> None:
    """Bits per base of a model, beside interpolated Markov models.

    Args:
        fasta: Genome.
        model: A causal model; left out, only the Markov models are evaluated.
        regions: Where to evaluate, such as chr1:4175708-4639675; by default everywhere.
        bed: The same from a BED file.
        train: Regions in which the Markov models count; they are left out without these.
        orders: Orders of the Markov models; 0 to 10 by default.
        strength: Weight of shorter contexts, in counts.
        window: Bases read at once.
        context: Bases of each window that are read but not scored.
        both_strands: Also read the reverse complement.
        restrict: "acgt" renormalises probabilities over the four bases.
        device: auto, cpu or such as cuda:0.
        dtype: Of the weights.
        batch_tokens: Positions of a batch at most; 65,536 on a CPU and 1,048,576 on a GPU where none are given.
        progress: Show count, rate and time left.

    Raises:
        ValueError: if there is nothing to evaluate.

    Example:
      omnissm genomics evaluate --fasta genome.fa --model runs/NAME --regions chr1:4175708-4639675 \\
        --train chr1:1-4175707 --window 8192 --context 1024
    """
    from .annotation import read_bed
    from .evaluation import evaluate_model, markov_baseline
    from .intervals import Interval
    from .loading import load_scorer
    from .reference import Reference

    if model is None and train is None:
        raise ValueError("nothing to evaluate: give --model, or --train for Markov models")
    genome = Reference(fasta)
    places = [genome.region(text) for text in _list(regions)]
    places += read_bed(bed) if bed else []
    places = places or [Interval(name, 0, length) for name, length in genome.lengths.items()]
    rows: list[tuple[str, Any]] = []
    if model is not None:
        scorer = load_scorer(model, device=device, dtype=dtype, restrict=restrict, batch_tokens=batch_tokens)
        options: dict[str, Any] = {"window": window, "context": context, "both_strands": both_strands}
        rows.append((scorer.name, evaluate_model(scorer, genome, places, progress=progress, **options)))
    if train is not None:
        seen = [genome.fetch_interval(genome.region(text)) for text in _list(train)]
        found = markov_baseline(seen, genome, places, orders or range(11), strength)
        rows += [(f"markov order {order}", value) for order, value in found.items()]
    sys.stdout.write("model\tbits_per_base\tperplexity\tbases\n")
    for name, value in rows:
        sys.stdout.write(f"{name}\t{value.bits_per_base:.4f}\t{value.perplexity:.4f}\t{value.bases}\n")


def describe(
    model: str | None = None,
    fasta: Path | None = None,
    region: str | None = None,
    length: int = 8192,
    table: Path | None = None,
    sequence: str = "sequence",
    label: str | list[str] = "label",
    split: str | None = None,
    task: Literal["binary", "multiclass", "multilabel", "regression"] = "binary",
    max_length: int = 1024,
    kmer: int = 4,
) -> None:
    """Print what a model is (stages, parameters, layers, operations per base, where it cuts), or a table of labels.

    Of a table: parts, class weights, and what the most frequent class and a ridge regression on k-mers reach.

    Args:
        model: Name of a model, model folder, run folder, .ckpt file, or "owner/name" on the hub.
        fasta: Measure the rates of boundaries on this genome.
        region: Where; by default the first `length` bases.
        length: Bases for which operations are counted.
        table: Labelled sequences, .csv, .tsv (also .gz) or .parquet.
        sequence: Column with the sequences.
        label: Column with the labels, or several for multilabel and regression.
        split: Column that says train, val or test; without one, parts are drawn as `LabelledSequences` does.
        task: What the labels are.
        max_length: Longest sequence of the table; longer ones are cut.
        kmer: Bases of a k-mer, 1 to 6.

    Raises:
        ValueError: for an unknown model, or a table that does not fit.

    Example:
      omnissm genomics describe --model dnahnet_debug
    """
    if model is None and table is None:
        raise ValueError("expected a model or a table to describe; give --model NAME or --table FILE")
    if model is not None:
        from .describe import describe_model

        sys.stdout.write(describe_model(model, fasta, region, length))
    if table is not None:
        from .baselines import describe_labels
        from .data import LabelledSequences

        data = LabelledSequences(str(table), sequence, label, split, task, max_length)
        sys.stdout.write(describe_labels(data, kmer))


def _list(given: str | Sequence[str] | None) -> list[str]:
    return [given] if isinstance(given, str) else list(given or ())


def _check_out(out: Path, suffixes: Sequence[str]) -> None:
    """Refuse a bad name before the work."""
    if out.suffix not in suffixes:
        raise ValueError(f"output is {str(out)!r}, expected a name ending in {', '.join(suffixes)}")
