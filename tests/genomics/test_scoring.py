"""Scores against numbers computed by hand from a bigram model, and what a run promises: order, resuming, shards."""

import gzip
import itertools
import multiprocessing
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from omnissm.genomics.contigs import ContigMap
from omnissm.genomics.haplotypes import haplotypes
from omnissm.genomics.intervals import Variant
from omnissm.genomics.likelihood import Scorer
from omnissm.genomics.models.markov import MarkovModel
from omnissm.genomics.reference import Reference
from omnissm.genomics.scoring import merge_scores, score_sequences, score_variants
from omnissm.genomics.sequence import reverse_complement
from omnissm.genomics.status import Policy, RefMismatchError, check
from omnissm.genomics.variant_scorer import ScoreOptions
from omnissm.genomics.variants import read_variants

RNG = np.random.default_rng(0)
SEQUENCE = "".join(RNG.choice(list("ACGT"), 400))
LOG_P = np.log(RNG.dirichlet(np.ones(4), 4))  # LOG_P[a, b]: b after a
LOG_FIRST = np.log(np.full(4, 0.25))


class Bigram(nn.Module):
    """log p(x_t | x_{t-1}) from a table; N gives and takes nothing."""

    vocabulary = "acgt"
    is_causal = True

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.tensor(LOG_P))

    def log_prob(self, tokens, mask=None):
        codes = tokens - 4
        known = codes >= 0
        previous = torch.cat([torch.full_like(codes[:, :1], -1), codes[:, :-1]], dim=1)
        pair = self.table[previous.clamp(min=0), codes.clamp(min=0)]
        values = torch.where(previous >= 0, pair, torch.full_like(pair, np.log(0.25)))
        return torch.where(known, values, torch.zeros_like(values))

    def forward(self, tokens, mask=None):
        codes = tokens - 4
        logits = torch.full((*tokens.shape, 8), float("-inf"), dtype=torch.float64)
        logits[..., 4:] = torch.where((codes >= 0)[..., None], self.table[codes.clamp(min=0)], np.log(0.25))
        return logits


class BigramLogits(Bigram):
    """The same model as a network of logits that reads a start id."""

    log_prob = None


def ll(text):
    codes = ["ACGT".index(letter) for letter in text]
    return LOG_FIRST[codes[0]] + sum(LOG_P[a, b] for a, b in itertools.pairwise(codes))


def score(variants, reference, **options):
    return score_variants(variants, reference, Bigram(), window=options.pop("window", 51), **options)


@pytest.fixture
def genome():
    return Reference.from_sequences({"c": SEQUENCE, "ring": SEQUENCE[:120]}, circular=["ring"])


def by_hand(variant, sequence, window):
    """Both strands, fixed windows, away from the ends, as the definition says."""
    start = variant.start - (window - len(variant.ref)) // 2
    extra = max(0, len(variant.ref) - len(variant.alt))
    changed = sequence[: variant.start] + variant.alt + sequence[variant.end :]
    forward = ll(changed[start : start + window]) - ll(sequence[start : start + window])
    end = start + window + len(variant.alt) - len(variant.ref)
    flip = [
        reverse_complement(text).decode() for text in (changed[end - window : end], sequence[start : start + window])
    ]
    assert start - extra >= 0
    return forward, ll(flip[0]) - ll(flip[1])


def variant_at(start, length, alt):
    return Variant("c", start, SEQUENCE[start : start + length], alt)


KINDS = {
    "snv": variant_at(200, 1, "A" if SEQUENCE[200] != "A" else "C"),
    "mnv": variant_at(200, 3, "".join("CATG"["ACGT".index(c)] for c in SEQUENCE[200:203])),
    "insertion": variant_at(200, 1, SEQUENCE[200] + "GATTACA"),
    "deletion": variant_at(200, 6, SEQUENCE[200]),
    "delins": variant_at(200, 4, "CCCCCCC"),
}


@pytest.mark.parametrize("window", [51, 52, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_closed_form(kind, window, genome):
    left = KINDS[kind].left_align(genome)
    forward, backward = by_hand(left, SEQUENCE, window)
    table = score([KINDS[kind]], genome, window=window, scores=("llr", "llr_fwd", "llr_rev", "ll_ref", "ll_alt"))
    assert table["status"].tolist() == ["ok"]
    np.testing.assert_allclose([table["llr_fwd"][0], table["llr_rev"][0]], [forward, backward], rtol=1e-9)
    np.testing.assert_allclose(table["llr"][0], (forward + backward) / 2, rtol=1e-9)
    np.testing.assert_allclose(table["ll_alt"] - table["ll_ref"], table["llr"], rtol=1e-7)
    assert table["n_scored"][0] == table["window_length"][0] == window
    assert table["window_start0"][0] == left.start - (window - len(left.ref)) // 2


def test_networks_of_logits_give_the_same(genome):
    """A start id before the sequence, logits shifted by one; the first base has probability 1/4 in both."""
    a = score_variants(list(KINDS.values()), genome, Bigram(), window=51)
    b = score_variants(list(KINDS.values()), genome, BigramLogits(), window=51)
    np.testing.assert_allclose(a["llr"], b["llr"], rtol=1e-5)


def test_flank_mode_keeps_both_flanks(genome):
    variant = KINDS["deletion"].left_align(genome)
    h = haplotypes(variant, genome, 51, mode="flank")
    assert h.ref.decode() == SEQUENCE[h.start : h.start + 51]
    assert len(h.alt) == 51 + len(variant.alt) - len(variant.ref)
    assert h.alt.startswith(h.ref[: h.site])
    assert h.alt.endswith(h.ref[h.ref_end :])
    back = haplotypes(variant, genome, 51, mode="flank", strand="-")
    assert (reverse_complement(back.ref), reverse_complement(back.alt)) == (h.ref, h.alt)


@pytest.mark.parametrize("strand", "+-")
@pytest.mark.parametrize("start", [0, 1, 20, 200, 370, 395, 399])
@pytest.mark.parametrize("alt", ["", "TTTTT"])
def test_windows_at_contig_ends(start, alt, strand, genome):
    length = min(3, len(SEQUENCE) - start)
    ref = SEQUENCE[start : start + length]
    variant = Variant("c", start, ref, ref[0] + alt)
    if ref == variant.alt:
        return
    h = haplotypes(variant, genome, 51, strand=strand)
    assert len(h.ref) == 51
    assert 0 <= h.start <= len(SEQUENCE) - 51
    assert h.ref[: h.site] == h.alt[: h.site]
    read = SEQUENCE if strand == "+" else reverse_complement(SEQUENCE).decode()
    assert h.ref.decode() in read
    allele = variant.ref if strand == "+" else reverse_complement(variant.ref).decode()
    assert h.ref[h.site : h.ref_end].decode() == allele
    changed = SEQUENCE[:start] + variant.alt + SEQUENCE[start + length :]
    assert h.alt.decode() in (changed if strand == "+" else reverse_complement(changed).decode())
    assert h.limit == min(len(h.ref), len(h.alt))


def test_circular_contig_has_no_ends(genome):
    ring = SEQUENCE[:120]
    turned = Reference.from_sequences({"ring": ring[60:] + ring[:60]}, circular=True)
    for start in (0, 1, 118, 119):
        alt = "A" if ring[start] != "A" else "C"
        here = score([Variant("ring", start, ring[start], alt)], genome)
        there = score([Variant("ring", (start + 60) % 120, ring[start], alt)], turned)
        assert here["llr"][0] == pytest.approx(there["llr"][0], rel=1e-9)
        assert 0 <= here["window_start0"][0] < 120


def test_reading_the_other_strand_of_everything_gives_the_same_score(genome):
    """Odd window: SNV on the reverse complement of the contig."""
    flipped = Reference.from_sequences({"c": reverse_complement(SEQUENCE)})
    for start in (100, 200, 300):
        variant = variant_at(start, 1, "A" if SEQUENCE[start] != "A" else "C")
        a = score([variant], genome)["llr"][0]
        b = score([variant.reverse_complement(len(SEQUENCE))], flipped)["llr"][0]
        assert a == pytest.approx(b, abs=1e-9)


def test_one_haplotype_one_score():
    reference = Reference.from_sequences({"c": "ACGTTGCATCAGGTAAAAAAACCGATTAGCCAGTCAGGACTT"})
    spellings = [Variant("c", k, "AA", "A") for k in range(14, 20)] + [Variant("c", 13, "TA", "T")]
    found = score(spellings, reference, window=21)["llr"]
    assert len(set(found.tolist())) == 1


def test_swapped_record_turns_the_sign(genome):
    plain = score([Variant("c", 200, SEQUENCE[200], "A" if SEQUENCE[200] != "A" else "C")], genome)
    alt = plain["alt"][0]
    swapped = score([Variant("c", 200, alt, SEQUENCE[200])], genome, policy=Policy("swap"), max_mismatch_frac=1.0)
    assert swapped["status"].tolist() == ["swapped"]
    assert swapped["llr"][0] == pytest.approx(-plain["llr"][0], rel=1e-9)


def test_trusted_ref_goes_into_the_window(genome):
    wrong = next(c for c in "ACGT" if c != SEQUENCE[200])
    alt = next(c for c in "ACGT" if c not in (wrong, SEQUENCE[200]))
    table = score([Variant("c", 200, wrong, alt)], genome, policy=Policy("trust"), scores=("llr_fwd",))
    start = 175
    old = SEQUENCE[start:200] + wrong + SEQUENCE[201 : start + 51]
    new = SEQUENCE[start:200] + alt + SEQUENCE[201 : start + 51]
    assert table["llr_fwd"][0] == pytest.approx(ll(new) - ll(old), rel=1e-9)


@pytest.mark.parametrize("name", ["llr_mean", "llr_site"])
def test_other_likelihood_scores(name, genome):
    variant = KINDS["snv"]
    table = score([variant], genome, strand="fwd", scores=(name,))
    start = 175
    ref = SEQUENCE[start : start + 51]
    alt = ref[:25] + variant.alt + ref[26:]
    codes = ["ACGT".index(c) for c in ref[24] + ref[25] + variant.alt]
    expected = {
        "llr_mean": (ll(alt) - ll(ref)) / 51,
        "llr_site": LOG_P[codes[0], codes[2]] - LOG_P[codes[0], codes[1]],
    }[name]
    assert table[name][0] == pytest.approx(expected, rel=1e-9)


def test_scores_do_not_depend_on_the_batch(genome):
    variants = [*KINDS.values()] + [variant_at(k, 1, SEQUENCE[k] + "AC") for k in range(0, 400, 37)]
    one, many = (
        score_variants(variants, genome, Scorer(Bigram(), batch_tokens=tokens), window=51, mode="flank")["llr"]
        for tokens in (1, 100_000)
    )
    np.testing.assert_allclose(one, many, atol=1e-12)
    alone = [score_variants([v], genome, Bigram(), window=51, mode="flank")["llr"][0] for v in variants]
    np.testing.assert_allclose(one, alone, atol=1e-12)


def test_context_of_n(genome):
    reference = Reference.from_sequences({"c": SEQUENCE[:100] + "N" * 100 + SEQUENCE[:100]})
    near, far = (
        Variant("c", 98, SEQUENCE[98], "A" if SEQUENCE[98] != "A" else "C"),
        Variant("c", 40, SEQUENCE[40], "A" if SEQUENCE[40] != "A" else "C"),
    )
    assert score([near, far], reference)["status"].tolist() == ["n_context", "ok"]
    table = score([near], reference, max_n_frac=0.9, scores=("llr_fwd",))
    assert table["status"][0] == "ok"
    assert table["n_scored"][0] < 51  # N is never a target


class Masked(nn.Module):
    """At each position the logits depend on the left neighbour, whatever stands there."""

    vocabulary = "acgt"
    is_causal = False

    def forward(self, tokens, mask=None):
        previous = torch.cat([tokens[:, :1], tokens[:, :-1]], dim=1) - 4
        logits = torch.full((*tokens.shape, 8), float("-inf"), dtype=torch.float64)
        logits[..., 4:] = torch.tensor(LOG_P)[previous.clamp(min=0)]
        return logits


def test_masked_models(genome):
    table = score_variants([KINDS["snv"], KINDS["deletion"]], genome, Masked(), window=51, strand="fwd")
    assert table["status"].tolist() == ["ok", "unsupported"]
    codes = ["ACGT".index(c) for c in (SEQUENCE[199], SEQUENCE[200], KINDS["snv"].alt)]
    assert table["masked_llr"][0] == pytest.approx(LOG_P[codes[0], codes[2]] - LOG_P[codes[0], codes[1]], rel=1e-6)
    with pytest.raises(ValueError, match="ask for masked_llr"):
        score_variants([], genome, Masked(), scores=("llr",))
    with pytest.raises(ValueError, match="gives no masked_llr"):
        score_variants([], genome, Bigram(), scores=("masked_llr",))


class Moody(Bigram):
    """Fails on sequences that hold a certain word, alone or in a batch."""

    def log_prob(self, tokens, mask=None):
        text = "".join("NACGT"[max(0, c - 3)] for c in tokens.flatten().tolist())
        if "GATTACA" in text:
            raise RuntimeError("cannot bear GATTACA")
        return super().log_prob(tokens, mask)


def test_a_failing_row_does_not_stop_the_run(genome, caplog):
    table = score_variants([KINDS["snv"], KINDS["insertion"], KINDS["mnv"]], genome, Moody(), window=51)
    assert table["status"].tolist() == ["ok", "failed", "ok"]
    assert np.isnan(table["llr"]).tolist() == [False, True, False]
    assert "cannot bear GATTACA" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scores": ("lr",)}, "unknown score 'lr'"),
        ({"window": 1}, "window of at least 2"),
        ({"placement": 1.5}, "placement from 0 to 1"),
        ({"strand": "up"}, "expected strand"),
        ({"mode": "up"}, "expected mode"),
        ({"strand": "fwd", "scores": ("llr_rev",)}, "needs its strand"),
        ({"max_n_frac": -0.1}, "share of N"),
        ({"max_n_frac": float("nan")}, "share of N"),
        ({"share_window": 0}, "share_window of at least 1"),
        ({"embed_k": -1}, "embed_k of at least 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ScoreOptions(**options)


def test_bad_limits(genome):
    for limit in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="max_mismatch_frac"):
            score_variants([], genome, Bigram(), max_mismatch_frac=limit)
    with pytest.raises(ValueError, match="max_allele"):
        Policy(max_allele=0)
    with pytest.raises(ValueError, match="batch_tokens of at least 1, got -1"):
        Scorer(Bigram(), batch_tokens=-1)


def test_sequences():
    texts = [SEQUENCE[:40], SEQUENCE[:9], "NN"]
    forward = score_sequences(texts, Bigram())
    np.testing.assert_allclose(forward[:2], [ll(text) for text in texts[:2]], rtol=1e-9)
    assert np.isnan(forward[2])
    backward = [ll(reverse_complement(text).decode()) for text in texts[:2]]
    np.testing.assert_allclose(score_sequences(texts, Bigram(), strands="both")[:2], (forward[:2] + backward) / 2)
    np.testing.assert_allclose(score_sequences(texts, Bigram(), reduce="mean")[:2], forward[:2] / [40, 9])


# Files


def write_genome(folder):
    (folder / "genome.fa").write_text(f">c\n{SEQUENCE}\n>n\n{'N' * 99}\n")
    return folder / "genome.fa"


HEADER = (
    '##fileformat=VCFv4.2\n##custom="kept, as it is"\n##FORMAT=<ID=GT,Number=1,Type=String,Description="g">\n'
    "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\tFORMAT\tS1\tS2\n"
)


def write_vcf(path, count=60, chrom="chrc"):
    lines = []
    for k in range(count):
        at = 3 + (k * 6) % 390
        alt = "A" if SEQUENCE[at] != "A" else "C"
        alt += {0: f",{SEQUENCE[at]}GG", 1: ",<DEL>", 2: ",*"}.get(k % 7, "")
        info = "." if k % 2 else f"DP={k};X"
        lines.append(f"{chrom}\t{at + 1}\trs{k}\t{SEQUENCE[at]}\t{alt}\t{k}.50\tPASS\t{info}\tGT\t0/1\t1|1\n")
    path.write_text(HEADER + "".join(sorted(lines, key=lambda line: int(line.split("\t")[1]))))
    return path


def test_a_vcf_keeps_all_it_has(tmp_path):
    pysam = pytest.importorskip("pysam")
    genome, calls = write_genome(tmp_path), write_vcf(tmp_path / "calls.vcf")
    outs = [str(tmp_path / f"out{suffix}") for suffix in (".vcf", ".vcf.gz", ".tsv", ".tsv.gz", ".parquet", ".bcf")]
    table = score_variants(calls, genome, Bigram(), window=51, scores=("llr", "ll_ref"), out=outs, part_size=7)
    old, new = calls.read_text().splitlines(), (tmp_path / "out.vcf").read_text().splitlines()
    assert [line for line in new if line in old and line.startswith("##")] == [x for x in old if x.startswith("##")]
    added = [line for line in new if line.startswith("##") and line not in old]
    assert [line.split(",")[0] for line in added[:3]] == [f"##INFO=<ID=SSM_{n}" for n in ("LLR", "LL_REF", "STATUS")]
    assert added[3].startswith("##ssm_model=<prefix=SSM,model=Bigram,model_sha256=")
    assert added[4] == "##ssm_contigs=<prefix=SSM,chrc=c>"
    rows = iter(range(table.n_rows))
    for a, b in zip([x for x in old if x[0] != "#"], [x for x in new if x[0] != "#"], strict=True):
        words, given = b.split("\t"), a.split("\t")
        assert words[:7] + words[8:] == given[:7] + given[8:]
        kept = [] if given[7] == "." else given[7].split(";")
        fields = words[7].split(";")
        assert fields[: len(kept)] == kept
        info = dict(field.split("=") for field in fields[len(kept) :])
        mine = [next(rows) for _ in given[4].split(",")]
        assert info["SSM_STATUS"].split(",") == table["status"][mine].tolist()
        for text, value in zip(info["SSM_LLR"].split(","), table["llr"][mine]):
            assert (text == ".") == np.isnan(value)
            assert text == "." or float(text) == pytest.approx(value, rel=1e-5)
    assert gzip.decompress(Path(outs[1]).read_bytes()) == (tmp_path / "out.vcf").read_bytes()
    with pysam.VariantFile(outs[1]) as file:  # the index works
        assert len(list(file.fetch("chrc", 0, 50))) == sum(int(x.split("\t")[1]) <= 50 for x in old if x[0] != "#")
    with pysam.VariantFile(outs[5]) as file:
        records = list(file)
    assert len(records) == 60
    assert records[0].info["SSM_LLR"][0] == pytest.approx(table["llr"][0], rel=1e-5)
    assert gzip.decompress(Path(outs[3]).read_bytes()) == (tmp_path / "out.tsv").read_bytes()
    import pandas as pd
    import pyarrow.parquet as pq

    frame = pd.read_csv(outs[2], sep="\t", keep_default_na=False, na_values={"llr": "", "ll_ref": ""})
    assert frame["status"].tolist() == table["status"].tolist()
    np.testing.assert_allclose(frame["llr"], table["llr"], rtol=1e-5)
    assert pd.read_parquet(outs[4])["llr"].tolist() == pytest.approx(table["llr"].tolist(), nan_ok=True)
    assert b"model_sha256" in pq.read_schema(outs[4]).metadata[b"omnissm"]
    assert not list(tmp_path.glob("*.parts"))
    assert not list(tmp_path.glob(".*"))


def test_annotating_twice_needs_a_word(tmp_path):
    genome, calls = write_genome(tmp_path), write_vcf(tmp_path / "calls.vcf", 5)
    first, second = str(tmp_path / "a.vcf"), str(tmp_path / "b.vcf")
    score_variants(calls, genome, Bigram(), window=51, out=first)
    with pytest.raises(ValueError, match="--overwrite_info"):
        score_variants(first, genome, Bigram(), window=51, out=second)
    score_variants(first, genome, Bigram(), window=51, out=second, overwrite_info=True)
    assert (tmp_path / "b.vcf").read_text() == (tmp_path / "a.vcf").read_text()
    score_variants(first, genome, Bigram(), window=31, out=second, prefix="OTHER")
    text = (tmp_path / "b.vcf").read_text()
    assert "SSM_LLR=" in text
    assert "OTHER_LLR=" in text
    assert text.count("##ssm_model=") == 2


def test_tables_become_vcf_where_vcf_can_hold_them(tmp_path):
    genome = write_genome(tmp_path)
    row = f"c\t11\t{SEQUENCE[10]}\t{'A' if SEQUENCE[10] != 'A' else 'C'}\n"
    (tmp_path / "t.tsv").write_text("chrom\tpos\tref\talt\n" + row)
    score_variants(tmp_path / "t.tsv", genome, Bigram(), window=21, out=str(tmp_path / "t.vcf"))
    (record,) = read_variants(tmp_path / "t.vcf")
    assert (record.chrom, record.start) == ("c", 10)
    assert "##contig=<ID=c,length=400>" in (tmp_path / "t.vcf").read_text()
    (tmp_path / "t.tsv").write_text("chrom\tpos\tref\talt\n" + row + f"c\t12\t{SEQUENCE[11]}\t-\n")
    with pytest.raises(ValueError, match=r"record 2 has an empty allele .* write \.tsv"):
        score_variants(tmp_path / "t.tsv", genome, Bigram(), window=21, out=str(tmp_path / "u.vcf"))
    assert not (tmp_path / "u.vcf.parts").exists()
    assert score_variants(tmp_path / "t.tsv", genome, Bigram(), window=21).counts() == {"ok": 2}


def test_an_empty_vcf_gives_an_empty_vcf(tmp_path):
    pysam = pytest.importorskip("pysam")
    (tmp_path / "calls.vcf").write_text(HEADER)
    outs = [str(tmp_path / name) for name in ("o.vcf", "o.vcf.gz", "o.tsv", "o.parquet")]
    table = score_variants(tmp_path / "calls.vcf", write_genome(tmp_path), Bigram(), out=outs)
    assert table.n_rows == 0
    with pysam.VariantFile(outs[1]) as file:
        assert list(file) == []
        assert "SSM_LLR" in file.header.info
    assert (tmp_path / "o.tsv").read_text().count("\n") == 1


def test_malformed_lines_pass_through(tmp_path):
    calls = write_vcf(tmp_path / "calls.vcf", 4)
    calls.write_text(calls.read_text() + "chrc\tx\t.\tA\tC\n")
    table = score_variants(calls, write_genome(tmp_path), Bigram(), window=51, out=str(tmp_path / "o.vcf"))
    assert table["status"].tolist()[-1] == "failed"
    assert (tmp_path / "o.vcf").read_text().endswith("chrc\tx\t.\tA\tC\n")


def test_wrong_assembly_is_noticed(tmp_path):
    other = "".join(np.random.default_rng(5).choice(list("ACGT"), 400))
    (tmp_path / "other.fa").write_text(f">c\n{other}\n")
    with pytest.raises(RefMismatchError, match="Is it the same assembly"):
        score_variants(write_vcf(tmp_path / "calls.vcf"), tmp_path / "other.fa", Bigram(), window=51)
    assert score_variants(
        tmp_path / "calls.vcf", tmp_path / "other.fa", Bigram(), window=51, max_mismatch_frac=1.0
    ).counts()["ref_mismatch"]


def test_shards_merge_to_the_same_file(tmp_path):
    genome, calls = write_genome(tmp_path), write_vcf(tmp_path / "calls.vcf")
    options = {"window": 51, "part_size": 7}
    whole, merged, far = (str(tmp_path / name) for name in ("whole.vcf", "merged.vcf", "far.vcf"))
    table = score_variants(calls, genome, Bigram(), out=whole, **options)
    for k in (2, 0):
        score_variants(calls, genome, Bigram(), out=merged, shard=(k, 3), **options)
    with pytest.raises(ValueError, match="part 1 is missing"):
        merge_scores(calls, merged)
    score_variants(calls, genome, Bigram(), out=far, shard=(1, 3), **options)  # on another machine
    joined = merge_scores(calls, merged, [f"{merged}.parts", f"{far}.parts"])
    assert (tmp_path / "merged.vcf").read_bytes() == (tmp_path / "whole.vcf").read_bytes()
    assert joined["llr"].tolist() == pytest.approx(table["llr"].tolist(), nan_ok=True, abs=0)
    with pytest.raises(ValueError, match="window = 51, now it is 31"):
        score_variants(calls, genome, Bigram(), out=far, shard=(0, 3), window=31, part_size=7)
    with pytest.raises(ValueError, match="is not the file that the parts"):
        merge_scores(write_vcf(tmp_path / "more.vcf", 61), far)
    with pytest.raises(FileNotFoundError):
        merge_scores(calls, str(tmp_path / "never.vcf"))


def test_threads_change_nothing(tmp_path):
    genome, calls = write_genome(tmp_path), write_vcf(tmp_path / "calls.vcf")
    reference = Reference(genome, cache="none")  # each thread reads the file through a handle of its own
    outs = [tmp_path / f"{workers}.vcf" for workers in (0, 1, 3)]
    for workers, out in zip((0, 1, 3), outs):
        table = score_variants(calls, reference, Bigram(), window=51, part_size=4, out=str(out), workers=workers)
        again = score_variants(calls, reference, Bigram(), window=51, part_size=9, workers=workers)  # in memory
        np.testing.assert_array_equal(table["llr"], again["llr"])
    assert outs[0].read_bytes() == outs[1].read_bytes() == outs[2].read_bytes()
    assert len(reference._handles) > 1
    with pytest.raises(ValueError, match="workers of at least 0, got -1"):
        score_variants(calls, reference, Bigram(), window=51, workers=-1)
    merged = str(tmp_path / "merged.vcf")
    for k in range(2):
        score_variants(calls, reference, Bigram(), window=51, part_size=4, out=merged, workers=2, shard=(k, 2))
    merge_scores(calls, merged)
    assert (tmp_path / "merged.vcf").read_bytes() == outs[0].read_bytes()
    other = Reference.from_sequences({"c": "".join(np.random.default_rng(5).choice(list("ACGT"), 400))})
    with pytest.raises(RefMismatchError):  # what stops a run without threads stops one with them
        score_variants(calls, other, Bigram(), window=51, workers=2)


def test_a_row_whose_windows_cannot_be_cut_does_not_stop_the_run(tmp_path, monkeypatch, caplog):
    from omnissm.genomics import variant_scorer

    real = variant_scorer.haplotypes

    def fails(variant, *args, **kwargs):
        if variant.start == 15:
            raise ValueError("no such window")
        return real(variant, *args, **kwargs)

    monkeypatch.setattr(variant_scorer, "haplotypes", fails)
    variants = [Variant("c", at, SEQUENCE[at], "A" if SEQUENCE[at] != "A" else "C") for at in (10, 15, 20)]
    table = score_variants(variants, Reference.from_sequences({"c": SEQUENCE}), Bigram(), window=51)
    assert table["status"].tolist() == ["ok", "failed", "ok"]
    assert "record 2: no such window" in caplog.text


def test_an_unfinished_run_is_not_started_anew_by_accident(tmp_path):
    genome, calls, out = write_genome(tmp_path), write_vcf(tmp_path / "calls.vcf"), str(tmp_path / "o.vcf")
    score_variants(calls, genome, Bigram(), out=out, window=51, shard=(0, 2), part_size=9)
    with pytest.raises(ValueError, match="unfinished run; go on with --resume"):
        score_variants(calls, genome, Bigram(), out=out, window=51, part_size=9)
    write_vcf(tmp_path / "calls.vcf", 61)
    with pytest.raises(ValueError, match="input_sha256"):
        score_variants(calls, genome, Bigram(), out=out, window=51, part_size=9, resume=True)
    assert not (tmp_path / "o.vcf").exists()


class Slow(Bigram):
    def log_prob(self, tokens, mask=None):
        time.sleep(0.01)
        return super().log_prob(tokens, mask)


Slow.__name__ = "Bigram"


def test_killed_runs_resume_to_the_same_files(tmp_path):
    """SIGKILL at ten random moments, each time resumed; the last run is left alone."""
    genome, calls = write_genome(tmp_path), write_vcf(tmp_path / "calls.vcf")
    names = ("vcf", "tsv", "vcf.gz")
    options = {"window": 51, "part_size": 2}
    score_variants(calls, genome, Bigram(), out=[str(tmp_path / f"a.{name}") for name in names], **options)
    outs = [tmp_path / f"b.{name}" for name in names]

    def run():
        score_variants(calls, genome, Slow(), out=[str(out) for out in outs], resume=True, **options)

    fork = multiprocessing.get_context("fork")
    for moment in np.random.default_rng(1).uniform(0.0, 0.12, 10):
        process = fork.Process(target=run)
        process.start()
        time.sleep(moment)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        for out, name in zip(outs, names):  # whole or absent
            assert not out.exists() or out.read_bytes() == (tmp_path / f"a.{name}").read_bytes()
    run()
    for out, name in zip(outs, names):
        assert out.read_bytes() == (tmp_path / f"a.{name}").read_bytes()
    assert not (tmp_path / "b.vcf.parts").exists()


@pytest.mark.slow
def test_two_hundred_thousand_records_are_read_and_checked_fast(tmp_path):
    text = "".join(np.random.default_rng(0).choice(list("ACGT"), 1_000_000))
    rows = "".join(
        f"c\t{5 * k + 1}\t.\t{text[5 * k]}\t{'A' if text[5 * k] != 'A' else 'C'}\t.\t.\t.\n" for k in range(200_000)
    )
    (tmp_path / "a.vcf").write_text(HEADER.replace("\tFORMAT\tS1\tS2", "") + rows)
    reference = Reference.from_sequences({"c": text})
    contigs, start = ContigMap(reference.lengths), time.process_time()  # others may use the machine
    found = sum(
        check(r, alt, reference, contigs, Policy()).status == "ok"
        for r in read_variants(tmp_path / "a.vcf")
        for alt in r.alts
    )
    assert found == 200_000
    assert time.process_time() - start < 15


def test_resistance_gene(shared_data, tmp_path):
    """All SNVs of TEM-1 on a plasmid, scored by a Markov model of E. coli."""
    data = shared_data / "genomics"
    coli = Reference(data / "ecoli_k12_mg1655" / "ecoli_k12_mg1655.fna.gz")
    model = MarkovModel(7, strength=5.0).fit([coli.fetch("U00096.2", 0, 4_639_675)])
    plasmid = Reference(data / "bla_tem1" / "pBAD30.fa", circular=True)
    table = score_variants(data / "bla_tem1" / "bla_tem1_snvs.vcf", plasmid, model, window=101)
    assert table.counts() == {"ok": 2583}
    lines = [x for x in (data / "bla_tem1" / "bla_tem1_snvs.vcf").read_text().splitlines() if not x.startswith("#")]
    fitness = {k: float(x.split("DMS2500=")[1].split(";")[0]) for k, x in enumerate(lines) if "DMS2500=" in x}
    assert len(fitness) == 1715
    import pandas as pd

    rank = pd.Series(table["llr"][list(fitness)]).rank().corr(pd.Series(list(fitness.values())).rank())
    assert rank == pytest.approx(0.07, abs=0.02)
