"""Read many drawn files of every format: python tests/fuzz/run.py [--examples 10000] [--formats vcf,fasta] [--seed 1].

Each format is read as often whole as damaged. Seeds and counts are printed; a failing file stays in the folder of
--keep with the seed, the damage and the fault in FAULT.json, and the other formats go on. Exit code 1 after a failure.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.append(str(Path(__file__).parent))

from formats import FORMATS
from fuzzing import SHARED_MEMORY, fuzz


def say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def main() -> int:
    """Run all formats, or some."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=10_000, help="files of each format")
    parser.add_argument("--formats", default="", help="names joined by commas; all by default")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="by default the clock's")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), help="folder for failing files")
    options = parser.parse_args()
    names = set(filter(None, options.formats.split(",")))
    unknown = names - {format.name for format in FORMATS}
    if unknown:
        parser.error(f"unknown format {sorted(unknown)[0]!r}; known are {', '.join(f.name for f in FORMATS)}")
    failed = 0
    for format in FORMATS:
        for damaged in (False, True) if not names or format.name in names else ():
            kind, start = "damaged" if damaged else "whole", time.perf_counter()
            say(f"{format.name:16} {kind:8} seed {options.seed} ")
            try:
                with tempfile.TemporaryDirectory(dir=SHARED_MEMORY) as scratch:
                    report = fuzz(
                        format,
                        damaged=damaged,
                        examples=max(1, round(format.weight * options.examples / 2)),
                        seed=options.seed,
                        scratch=Path(scratch),
                        keep=options.keep,
                    )
            except AssertionError as error:
                failed += 1
                say(f"FAULT\n{error}\n")
                continue
            counts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(report.counts.items()))
            say(f"{counts}; {report.peak / 2**20:.0f} MiB, {time.perf_counter() - start:.0f} s\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
