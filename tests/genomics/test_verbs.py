"""The command line end to end on small files, and what the verbs compute."""

import json

import numpy as np
import pytest
import torch

from omnissm.__main__ import main
from omnissm.genomics import create_model, save_pretrained
from omnissm.genomics.annotation import Feature
from omnissm.genomics.boundaries import annotate, trace
from omnissm.genomics.data import synthetic_genome
from omnissm.genomics.embedding import embed_sequences
from omnissm.genomics.essentiality import (
    CASSETTE,
    adaptation_weights,
    auroc,
    codon_adaptation,
    score_genes,
)
from omnissm.genomics.evaluation import evaluate_model, markov_baseline
from omnissm.genomics.generation import generate
from omnissm.genomics.intervals import Interval, Variant
from omnissm.genomics.likelihood import Scorer
from omnissm.genomics.loading import load_scorer
from omnissm.genomics.models.markov import MarkovModel
from omnissm.genomics.reference import Reference
from omnissm.genomics.scanning import scan
from omnissm.genomics.scoring import score_variants
from omnissm.genomics.sequence import encode, reverse_complement

SEQUENCE, GENES = synthetic_genome(30_000, seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A genome, its genes, a tiny H-Net, a Markov model and a few variants."""
    root = tmp_path_factory.mktemp("genomics")
    (root / "g.fa").write_text(f">synthetic\n{SEQUENCE.decode()}\n")
    rows = [
        f"synthetic\tx\tCDS\t{g.start + 1}\t{g.end}\t.\t{g.strand}\t0\tID={g.id};ess={k % 2}"
        for k, g in enumerate(GENES)
    ]
    (root / "g.gff3").write_text("\n".join(rows) + "\n")
    torch.manual_seed(0)
    save_pretrained(create_model("hnet_tiny"), root / "hnet")
    save_pretrained(MarkovModel(3).fit([SEQUENCE]), root / "markov", dtype=None)
    lines = [
        f"synthetic\t{k + 1}\t.\t{chr(SEQUENCE[k])}\t{'A' if SEQUENCE[k] != 65 else 'C'}\t.\t.\t."
        for k in range(500, 900, 40)
    ]
    (root / "v.vcf").write_text(
        "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n" + "\n".join(lines) + "\n"
    )
    return root


@pytest.fixture
def genomics(folder, monkeypatch):
    monkeypatch.chdir(folder)

    def run(*words):
        return main(["genomics", *map(str, words)])

    return run


def test_score_and_shards(genomics, folder, capsys):
    base = ("--variants", "v.vcf", "--reference", "g.fa", "--model", "hnet", "--window", 64, "--part_size", 3)
    assert (
        genomics("score", *base, "--out", '["a.vcf", "a.tsv"]', "--scores", '["llr", "embed_cos", "boundary_shift"]')
        == 0
    )
    captured = capsys.readouterr()
    assert captured.out == "a.vcf\na.tsv\n"
    assert "10 alleles (float32): ok 10" in captured.err
    header, *rows = (folder / "a.tsv").read_text().splitlines()
    names = header.split("\t")
    assert names[8:11] == ["llr", "embed_cos", "boundary_shift"]
    assert len(rows) == 10
    for shard in ("0/2", "1/2"):
        more = ("--out", "b.vcf", "--scores", '["llr", "embed_cos", "boundary_shift"]', "--shard", shard)
        assert genomics("score", *base, *more) == 0
    assert genomics("score-merge", "--variants", "v.vcf", "--out", "b.vcf") == 0
    assert (folder / "b.vcf").read_text() == (folder / "a.vcf").read_text()


def test_exit_codes(genomics, folder, capsys):
    (folder / "none.vcf").write_text((folder / "v.vcf").read_text().replace("\nsynthetic", "\nunknown"))
    base = ("--reference", "g.fa", "--model", "markov", "--window", 32, "--out", "x.tsv")
    assert genomics("score", "--variants", "none.vcf", *base) == 3
    wrong = "".join(f"synthetic\t{k + 1}\t.\t{'A' if SEQUENCE[k] != 65 else 'C'}\tG\t.\t.\t.\n" for k in range(50, 90))
    (folder / "wrong.vcf").write_text((folder / "v.vcf").read_text() + wrong)
    assert genomics("score", "--variants", "wrong.vcf", *base) == 4
    assert "Is it the same assembly" in capsys.readouterr().err
    for words, message in [
        (("score", "--variants", "v.vcf", "--reference", "nope.fa", "--model", "markov", "--out", "x.tsv"), "nope.fa"),
        (("score", "--variants", "v.vcf", "--reference", "g.fa", "--model", "nope", "--out", "x.tsv"), "nope"),
        (("score", "--variants", "v.vcf", *base[:-1], "x.doc"), "unknown kind of output 'x.doc'"),
        (("score", "--variants", "v.vcf", *base, "--shard", "3/2"), "expected a shard i/n"),
        (("score", "--variants", "v.vcf", *base, "--device", "tpu9"), "unknown device"),
        (
            ("scan", "--reference", "g.fa", "--region", "synthetic:29990-40000", "--model", "markov", "--out", "-"),
            "beyond",
        ),
        (
            ("boundaries", "--reference", "g.fa", "--model", "markov", "--regions", "synthetic:1-90", "--out", "x.bed"),
            "no chunk",
        ),
        (("evaluate", "--fasta", "g.fa"), "nothing to evaluate"),
        (("describe", "--model", "hnet_tiniest"), "hnet_tiniest"),
        (("describe", "--model", "hnet_tiny", "--length", "0"), "a length of at least 1 base, got 0"),
        (("describe", "--model", "hnet_tiny", "--region", "c:1-9"), "give its file with --fasta"),
        (("scroe",), "Did you mean 'score'?"),
    ]:
        assert genomics(*words) == 2, words
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert not (folder / "x.tsv.parts").exists()


def test_scan(genomics, folder):
    assert (
        genomics(
            "scan",
            "--reference",
            "g.fa",
            "--region",
            "synthetic:1001-1020",
            "--model",
            "markov",
            "--window",
            41,
            "--out",
            '["s.tsv", "s.npy"]',
        )
        == 0
    )
    scores = np.load(folder / "s.npy", allow_pickle=False)
    assert scores.shape == (4, 20)
    reference = Reference(folder / "g.fa")
    for k, base in enumerate(reference.fetch("synthetic", 1000, 1020).decode()):
        assert scores["ACGT".index(base), k] == 0
    table, again = scan(reference, Interval("synthetic", 1000, 1020), MarkovModel(3).fit([SEQUENCE]), window=41)
    np.testing.assert_allclose(again, scores, atol=1e-5)
    assert table.n_rows == 60
    variant = (folder / "s.tsv").read_text().splitlines()[1].split("\t")
    assert float(variant[8]) == pytest.approx(again["ACGT".index(variant[6]), 0], rel=1e-4)


def test_embed(genomics, folder):
    pytest.importorskip("pyarrow")
    for out in ("e.npz", "e.parquet", "e.zarr"):
        assert (
            genomics(
                "embed",
                "--sequences",
                "g.fa",
                "--regions",
                '["synthetic:1-64", "synthetic:101-150"]',
                "--model",
                "hnet",
                "--out",
                out,
            )
            == 0
        )
    import pyarrow.parquet as pq

    with np.load(folder / "e.npz", allow_pickle=False) as content:
        values, names = content["values"], content["names"].tolist()
    assert names == ["synthetic:1-64", "synthetic:101-150"]
    assert values.shape == (2, 64)
    table = pq.read_table(folder / "e.parquet")
    np.testing.assert_allclose(np.array(table["embedding"].to_pylist()), values, rtol=1e-6)
    assert table.schema.metadata[b"pooling"] == b"mean"
    zarr = pytest.importorskip("zarr")
    np.testing.assert_allclose(zarr.open_group(folder / "e.zarr", mode="r")["values"][...], values)


def test_embeddings_are_pooled_from_bases(folder):
    scorer = Scorer(create_model("hnet_tiny"))
    named = [("a", SEQUENCE[:50]), ("b", SEQUENCE[100:133])]
    whole = embed_sequences(scorer, named, pooling="none")
    assert [entry.values.shape for entry in whole] == [(50, 64), (33, 64)]
    for pooling, function in (("mean", np.mean), ("max", np.max)):
        pooled = embed_sequences(scorer, named, pooling=pooling)
        for entry, full in zip(pooled, whole):
            np.testing.assert_allclose(entry.values, function(full.values, axis=0), rtol=1e-4, atol=1e-6)
    both = embed_sequences(scorer, named, strands="mean")
    turned = [(name, reverse_complement(bases)) for name, bases in named]
    for a, b in zip(both, embed_sequences(scorer, turned, strands="mean")):
        np.testing.assert_allclose(a.values, b.values, rtol=1e-4, atol=1e-6)
    chunks = embed_sequences(scorer, named, layer="inner", pooling="chunks")
    stages = scorer.boundaries([bases for _, bases in named])
    for entry, found in zip(chunks, stages):
        cuts = np.flatnonzero(found[0].mask)
        assert set(cuts) <= set(entry.starts.tolist())
        assert len(entry.values) == len(entry.starts)
    with pytest.raises(ValueError, match="has no layer 'outer'; it has embedding"):
        embed_sequences(scorer, named, layer="outer")


def test_generate(genomics, folder):
    words = ("generate", "--model", "hnet", "--prompts", '["ATG", "C"]', "--n", 2, "--length", 20)
    assert genomics(*words, "--out", "new.fa") == 0
    text = (folder / "new.fa").read_text()
    assert text.count(">") == 4
    for line in text.splitlines()[1::2]:
        assert set(line) <= set("ACGT")
    assert genomics(*words, "--out", "again.fa") == 0
    assert (folder / "again.fa").read_text() == text


def test_a_prompt_gives_the_same_in_any_batch():
    model = create_model("hnet_tiny")
    together = list(generate(Scorer(model), ["ATG", "CCC", "GATTACA"], n=2, length=15, seed=3))
    alone = list(generate(Scorer(model, batch_tokens=1), ["ATG", "CCC", "GATTACA"], n=2, length=15, seed=3))
    assert [(g.prompt, g.sequence) for g in together] == [(g.prompt, g.sequence) for g in alone]
    assert len({g.sequence for g in together}) > 1


def test_log_likelihoods_of_generated_sequences_are_those_of_the_scorer():
    model = MarkovModel(2).fit([SEQUENCE])
    for new in generate(Scorer(model), ["ACG"], n=3, length=30):
        values = Scorer(model).log_probs([b"ACG" + new.sequence.encode()])[0]
        assert new.log_likelihood == pytest.approx(values[3:].sum(), rel=1e-5)
    (greedy,) = generate(Scorer(model), ["ACG"], length=10, temperature=0)
    (top,) = generate(Scorer(model), ["ACG"], length=10, top_k=1, seed=9)
    assert greedy.sequence == top.sequence
    with pytest.raises(ValueError, match="has no start id"):
        list(generate(Scorer(model), [""]))


def test_sampling_follows_the_model():
    model = MarkovModel(0).fit([b"AAAACCGT"], both_strands=False)
    (new,) = generate(Scorer(model), ["A"], length=1500)
    shares = np.array([new.sequence.count(base) for base in "ACGT"]) / 1500
    expected = np.exp(model.log_table().numpy())
    np.testing.assert_allclose(shares, expected, atol=0.05)
    (cut,) = generate(Scorer(model), ["A"], length=100, top_p=float(expected[0]) + 0.01)
    assert set(cut.sequence) == {"A", "C"}  # the two most probable


def test_boundaries(genomics, folder):
    base = (
        "boundaries",
        "--reference",
        "g.fa",
        "--model",
        "hnet",
        "--regions",
        "synthetic:1-4000",
        "--genes",
        "g.gff3",
    )
    assert genomics(*base, "--out", "c.bed", "--rates", "r.tsv", "--figure", "r.png", "--region_figure", "one.png") == 0
    assert genomics(*base[:-2], "--out", "c.bedgraph") == 0
    assert genomics(*base[:-2], "--out", "c.tsv") == 0
    for name in ("r.png", "one.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    found = trace(Scorer(create_model("hnet_tiny")), Reference(folder / "g.fa"), Interval("synthetic", 0, 4000))
    assert len(found.forward[0].mask) == 4000
    lines = [line.split("\t") for line in (folder / "c.bed").read_text().splitlines()]
    assert {line[5] for line in lines} == {"+", "-"}
    assert all(int(line[2]) == int(line[1]) + 1 for line in lines)
    rates = {
        (r[0], r[1]): float(r[2]) for r in (x.split("\t") for x in (folder / "r.tsv").read_text().splitlines()[1:])
    }
    assert ("0", "codon position 1") in rates
    assert all(0 <= value <= 1 for value in rates.values())
    assert len((folder / "c.bedgraph").read_text().splitlines()) == 4000


class Cutter:
    """Cuts before every first codon position of the genes of its strand, and nowhere else."""

    bos, name = False, "cutter"

    def __init__(self, genes, length):
        self.genes, self.length = genes, length

    def boundaries(self, sequences):
        from omnissm.genomics.likelihood import Stage

        (bases,) = sequences
        strand = "+" if bases == SEQUENCE[: self.length] else "-"
        mask = np.zeros(self.length, bool)
        for gene in self.genes:
            if gene.strand == strand:
                first = gene.start if strand == "+" else self.length - gene.end
                mask[first : first + len(gene) : 3] = True
        return [[Stage(mask, np.ones(self.length, bool), mask.astype(np.float32), mask.astype(np.float32))]]


def test_rates_follow_the_gene_frame():
    genes = [gene for gene in GENES if gene.end <= 8000]
    assert {gene.strand for gene in genes} == {"+", "-"}
    reference = Reference.from_sequences({"synthetic": SEQUENCE})
    rates = {
        r.name: r for r in annotate([trace(Cutter(genes, 8000), reference, Interval("synthetic", 0, 8000))], genes)
    }
    assert [rates[f"codon position {k}"].rate for k in (1, 2, 3)] == [1, 0, 0]
    assert rates["start codon"].rate == pytest.approx(1 / 3)
    assert rates["promoter"].rate == 0
    assert rates["intergenic"].rate == 0
    assert rates["coding"].rate == pytest.approx(1 / 3, abs=1e-3)
    assert rates["coding"].low <= rates["coding"].rate <= rates["coding"].high
    assert 0 < rates["codon position 1"].null < 1


def test_essential(genomics, folder, capsys):
    words = (
        "essential",
        "--reference",
        "g.fa",
        "--genes",
        "g.gff3",
        "--labels",
        "ess",
        "--model",
        "markov",
        "--window",
        600,
    )
    assert genomics(*words, "--out", "ess.tsv") == 0
    said = capsys.readouterr().err
    assert "AUROC ess" in said
    statuses = [line.split("\t")[9] for line in (folder / "ess.tsv").read_text().splitlines()[2:]]
    counts = [f"{name} {statuses.count(name)}" for name in dict.fromkeys(statuses) if name != "ok"]
    assert counts
    assert (
        f"{statuses.count('ok')} genes scored, {sum(s != 'ok' for s in statuses)} left out ({', '.join(counts)})"
        in said
    )
    assert genomics(*words, "--out", "no.tsv", "--offset", -1) == 2
    assert "an offset of at least 0, got 600 and -1" in capsys.readouterr().err
    first, header, *rows = (folder / "ess.tsv").read_text().splitlines()
    assert first.startswith("# model=markov window=600 cassette=TAATAATAATAGTGA offset=12")
    assert header.split("\t") == [
        "gene",
        "chrom",
        "strand",
        "length",
        "gc",
        "cai",
        "ll_wt",
        "ll_ko",
        "score",
        "status",
        "ess",
    ]
    assert len(rows) == len(GENES)


@pytest.mark.parametrize("strand", "+-")
def test_knock_out_is_in_the_gene_frame(strand):
    gene = next(g for g in GENES if g.strand == strand and 2000 < g.start < 25_000)
    reference = Reference.from_sequences({"synthetic": SEQUENCE})
    seen = []

    class Spy(MarkovModel):
        def log_prob(self, tokens, mask=None):
            seen.append(tokens)
            return super().log_prob(tokens, mask)

    (result,) = score_genes(Scorer(Spy(2).fit([SEQUENCE])), reference, [gene], window=1001)
    assert result.status == "ok"
    bases = reference.fetch_interval(gene.interval)
    knocked = bases[:12] + CASSETTE + bases[27:]
    texts = ["".join("NACGT"[int(c) - 3] for c in row) for row in seen[0]]
    assert sum(bases.decode()[:60] in text for text in texts) == 1
    assert sum(knocked.decode()[:60] in text for text in texts) == 1
    assert result.score == pytest.approx(result.ll_wt - result.ll_ko)


def test_genes_that_cannot_be_scored():
    reference = Reference.from_sequences({"synthetic": SEQUENCE})
    gene = GENES[0]
    odd = [
        (Feature("other", 0, 30, "+", "CDS"), "contig_missing"),
        (Feature("synthetic", gene.start, gene.end, gene.strand, "CDS", "j", ((1, 2), (3, 4))), "joined"),
        (Feature("synthetic", gene.start + 1, gene.end, gene.strand, "CDS"), "partial"),
    ]
    found = score_genes(Scorer(MarkovModel(1)), reference, [feature for feature, _ in odd], window=500)
    assert [row.status for row in found] == [status for _, status in odd]
    assert all(np.isnan(row.score) for row in found)


def test_area_under_the_curve():
    assert auroc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]) == 0.75
    assert auroc([1, 1, 1, 1], [0, 1, 0, 1]) == 0.5
    assert auroc([1, 2, np.nan], [0, 1, 0]) == 1.0
    assert np.isnan(auroc([1, 2], [1, 1]))


def test_codon_adaptation(shared_data):
    from omnissm.genomics.annotation import read_features

    data = shared_data / "genomics" / "ecoli_k12_mg1655"
    genome = Reference(data / "ecoli_k12_mg1655.fna.gz")
    genes = [gene for gene in read_features(data / "genes.tsv") if gene.attributes["orf_ok"] == "1"]
    assert len(genes) == 4323
    weights = adaptation_weights(genome, genes)
    assert max(weights.values()) == 1
    values = [codon_adaptation(genome.fetch_interval(gene.interval), weights) for gene in genes]
    for label, expected in (("ess_min406", 0.742), ("ess_256", 0.772)):
        assert auroc(values, [gene.attributes[label] == "1" for gene in genes]) == pytest.approx(expected, abs=0.02)


def test_evaluate(genomics, capsys):
    words = ("--regions", "synthetic:25001-30000", "--train", "synthetic:1-25000", "--orders", "[0, 3]")
    assert genomics("evaluate", "--fasta", "g.fa", "--model", "markov", *words, "--window", 512, "--context", 16) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == ["model", "markov", "markov order 0", "markov order 3"]
    assert all(row[3] == "5000" for row in rows[1:])
    assert 1.5 < float(rows[3][1]) < float(rows[2][1]) < 2.01


@pytest.mark.parametrize(("window", "context"), [(1000, 0), (100, 20), (50, 49), (7, 3)])
def test_each_base_is_scored_once_with_its_context(window, context):
    reference = Reference.from_sequences({"c": SEQUENCE[:300]})
    model = MarkovModel(2).fit([SEQUENCE])
    found = evaluate_model(Scorer(model), reference, [Interval("c", 0, 300)], window=window, context=context)
    assert found.bases == 300
    if context >= 2:  # the order of the model: nothing is lost at the borders of windows
        whole = -model.log_prob(torch.from_numpy(encode(SEQUENCE[:300], "acgt").astype(np.int64))[None]).sum()
        assert found.nats == pytest.approx(float(whole), rel=1e-5)


def test_markov_probabilities():
    model = MarkovModel(3, strength=2.0).fit([SEQUENCE[:5000]])
    table = model.log_table().exp()
    for k in range(4):
        size = 4 ** (k + 1)
        part = table[(size - 4) // 3 : (size - 4) // 3 + size].reshape(-1, 4)
        torch.testing.assert_close(part.sum(dim=1), torch.ones(len(part)))
    text = "ACGTNACGT"
    tokens = torch.from_numpy(encode(text, "acgt").astype(np.int64))[None]
    values = model.log_prob(tokens)[0]
    assert values[4] == 0
    assert values[5] == pytest.approx(values[0])  # after N the context begins anew
    torch.testing.assert_close(model(tokens)[0, :-1].gather(-1, tokens[0, 1:, None])[:3, 0], values[1:4])
    both = MarkovModel(2).fit(["AACGT"])
    assert both.counts.sum() == 6
    by_hand = MarkovModel(0, strength=1.0).fit(["AAC"], both_strands=False).log_table().exp()
    torch.testing.assert_close(by_hand, torch.tensor([2.25, 1.25, 0.25, 0.25]) / 4)
    with pytest.raises(ValueError, match="order from 0 to 12"):
        MarkovModel(13)


def test_markov_on_a_genome(shared_data):
    coli = Reference(shared_data / "genomics" / "ecoli_k12_mg1655" / "ecoli_k12_mg1655.fna.gz")
    cut = 4_639_675 * 9 // 10
    seen, held = coli.fetch("U00096.2", 0, cut), [Interval("U00096.2", cut, 4_639_675)]
    found = markov_baseline([seen], coli, held, [6, 7], strength=5.0)
    assert found[7].bits_per_base == pytest.approx(1.931, abs=0.001)
    assert found[6].bits_per_base == pytest.approx(1.933, abs=0.001)


def test_verb_markov_and_describe(genomics, folder, capsys):
    assert genomics("markov", "--fasta", "g.fa", "--out", "mk", "--order", 2) == 0
    assert json.loads((folder / "mk" / "config.json").read_text())["model"] == "genomics/markov"
    capsys.readouterr()
    assert genomics("describe", "--model", "hnet_tiny", "--fasta", "g.fa", "--length", 512) == 0
    shown = capsys.readouterr().out
    assert "234,869 parameters" in shown
    assert "stage 1" in shown
    assert "operations per base at the target ratios" in shown
    assert "measured on synthetic:1-512, stage 0" in shown


def test_any_network_scores_and_strands_agree(folder):
    """Of an H-Net: both strands of an SNV are those of the reverse-complemented pair, for an odd window."""
    torch.manual_seed(1)
    model = create_model("hnet_tiny")
    text = SEQUENCE[:300].decode()
    flipped = Reference.from_sequences({"c": reverse_complement(text)})
    variant = Variant("c", 150, text[150], "A" if text[150] != "A" else "C")
    a = score_variants([variant], Reference.from_sequences({"c": text}), model, window=101)["llr"][0]
    b = score_variants([variant.reverse_complement(300)], flipped, model, window=101)["llr"][0]
    assert a == pytest.approx(b, abs=1e-5)


def test_equivariant_models_need_one_strand():
    """Of a strand-equivariant masked model, the other strand's pair has the same score."""
    torch.manual_seed(0)
    scorer = Scorer(create_model("caduceus_ps_1k"))
    text = SEQUENCE[:200].decode()
    variant = Variant("c", 100, text[100], "A" if text[100] != "A" else "C")
    a = score_variants([variant], Reference.from_sequences({"c": text}), scorer, window=61)
    flipped = Reference.from_sequences({"c": reverse_complement(text)})
    b = score_variants([variant.reverse_complement(200)], flipped, scorer, window=61)
    assert a["masked_llr"][0] == pytest.approx(b["masked_llr"][0], abs=1e-5)
    assert a["masked_llr"][0] != 0


def test_sixteen_bit_weights_give_nearly_the_same():
    variants = [Variant("c", k, chr(SEQUENCE[k]), "A" if SEQUENCE[k] != 65 else "C") for k in (100, 150)]
    reference = Reference.from_sequences({"c": SEQUENCE[:300]})
    found = []
    for dtype in ("float32", "bfloat16"):
        torch.manual_seed(0)
        scorer = load_scorer(create_model("hnet_tiny"), device="cpu", dtype=dtype)
        assert scorer.dtype == dtype
        found.append(score_variants(variants, reference, scorer, window=101)["llr"])
    np.testing.assert_allclose(found[1], found[0], atol=0.05)
    assert not np.array_equal(*found)


def test_convert_genbank(genomics, shared_data, folder):
    source = shared_data / "genomics" / "phage" / "phix174_NC_001422.gbk"
    assert genomics("convert", "--source", source, "--family", "genbank", "--out", "phix") == 0
    assert Reference(folder / "phix.fa").lengths == {"NC_001422.1": 5386}
