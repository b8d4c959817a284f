"""Every reader on whole and on damaged files: what was written comes back, or one line says what is wrong.

`python tests/fuzz/run.py` does the same with more examples.
"""

import sys
import tempfile
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
pytest.importorskip("hypothesis")
pytest.importorskip("pysam")
pytest.importorskip("pyarrow")

from formats import FORMATS
from fuzzing import SHARED_MEMORY, fuzz

EXAMPLES = 100  # of each kind


@pytest.mark.parametrize("damaged", [False, True], ids=["whole", "damaged"])
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_files_are_read_or_refused(format, damaged, tmp_path):
    examples = max(1, round(format.weight * EXAMPLES))
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY) as scratch:
        report = fuzz(
            format, damaged=damaged, examples=examples, seed=0, scratch=Path(scratch), keep=tmp_path / "failing"
        )
    assert report.counts["read"] > 0
    assert damaged == (report.counts["refused"] > 0) or format.lenient
