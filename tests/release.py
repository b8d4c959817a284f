"""Build sdist and wheel of HEAD, try the wheel in new environments: python tests/release.py [--try 3.12:highest ...].

The sdist is made from the committed files alone, the wheel from the sdist, and both are compared with the list of
committed files. Each PYTHON:RESOLUTION (resolution highest, or lowest-direct: every dependency at its floor in
pyproject.toml) then gets a new environment, in which all modules are imported, help is asked for, one
configuration of each domain is fitted and some tests of the sdist run. Needs git and uv; about 7 GB of disk and ten
minutes for each environment. UV_TORCH_BACKEND=cpu takes the smaller builds of torch where their index can be reached.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kernels", "ssmcore", "vision", "genomics", "timeseries", "graphs", "configs")
CASES = ("3.11:lowest-direct", "3.11:highest", "3.12:highest", "3.13:highest")
CONFIGS = {
    "vision": "hydra_vit_tiny_synthetic",
    "genomics": "dnahnet_debug_synthetic",
    "timeseries": "chimera_tiny_nyc_weather",
    "graphs": "dag_ssm_tiny_synthetic",
}
# One file for the primitive, one for the mixers' blocks, one for each domain; all of them: --tests tests.
TESTS = (
    "tests/kernels/test_linear_scan.py",
    "tests/kernels/test_ssd.py",
    "tests/ssmcore/test_blocks.py",
    "tests/vision/test_layers.py",
    "tests/genomics/test_intervals.py",
    "tests/timeseries/test_windows.py",
    "tests/graphs/test_batch.py",
    "tests/house/test_imports.py",
    "tests/house/test_public.py",
)
IMPORT_ALL = """
import importlib, importlib.util, pkgutil, omnissm
triton = importlib.util.find_spec("triton")
names = [m.name for m in pkgutil.walk_packages(omnissm.__path__, "omnissm.") if triton or ".triton_" not in m.name]
for name in names:
    importlib.import_module(name)
assert len(names) > 300, len(names)
import torch
print(f"{len(names)} modules with torch {torch.__version__}")
"""


class CommandError(Exception):
    """A command of a trial ended with an error."""


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def call(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command; `CommandError` with its last lines where it fails."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
        raise CommandError(f"{' '.join(str(part) for part in command)} (exit code {done.returncode})\n{tail}")
    return done.stdout


def build(out: Path, scratch: Path) -> tuple[Path, Path]:
    """The sdist of HEAD and the wheel made from it, new in `out`."""
    source = scratch / "source"
    source.mkdir()
    archive = scratch / "head.tar"
    call("git", "archive", "-o", archive, "HEAD", cwd=ROOT)
    with tarfile.open(archive) as tar:
        tar.extractall(source, filter="data")
    built = scratch / "dist"
    call("uv", "build", "-q", "--out-dir", built, source, cwd=scratch)
    (sdist,), (wheel,) = built.glob("*.tar.gz"), built.glob("*.whl")
    out.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(sdist, out)), Path(shutil.copy(wheel, out))


def compare(what: str, found: set[str], expected: set[str]) -> None:
    problems = [f"not in it: {name}" for name in sorted(expected - found)]
    problems += [f"should not be in it: {name}" for name in sorted(found - expected)]
    if problems:
        raise CommandError(f"{what}\n" + "\n".join(problems[:20]))
    say(f"{what}: {len(found)} files, as committed")


def check_contents(sdist: Path, wheel: Path) -> None:
    """Every committed file is in the sdist; the wheel holds modules, configurations and pretrained models only."""
    tracked = set(call("git", "ls-tree", "-r", "--name-only", "HEAD", cwd=ROOT).splitlines())
    tracked = {name for name in tracked if not name.startswith(".")}
    with tarfile.open(sdist) as tar:
        members = {member.name.split("/", 1)[1] for member in tar.getmembers() if member.isfile()}
    made = {name for name in members if name in ("PKG-INFO", "setup.cfg") or name.startswith("omnissm.egg-info/")}
    compare(sdist.name, members - made, tracked)
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    code = {name for name in tracked if name.split("/")[0] in FOLDERS and name.endswith(".py")}
    data = {name for name in tracked if name.startswith(("configs/", "genomics/pretrained/"))}
    code |= {"__init__.py", "__main__.py", "py.typed"}
    compare(wheel.name, packed, {f"omnissm/{name}" for name in code | data})


def check_version(wheel: Path) -> str:
    """The version of pyproject.toml, which the wheel, the citation and the changelog agree with."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    citation = (ROOT / "CITATION.cff").read_text()
    if wheel.name.split("-")[1] != version or f"version: {version}" not in citation.replace('"', ""):
        raise CommandError(f"{wheel.name} and CITATION.cff should have the version {version} of pyproject.toml")
    unreleased, _, rest = (ROOT / "CHANGELOG.md").read_text().partition("\n## Unreleased\n")[2].partition("\n## ")
    if "- " in unreleased or not rest.startswith(f"{version} - "):
        say(f"CHANGELOG.md still has entries under Unreleased: date them as {version} before the tag")
    return version


def try_wheel(case: str, wheel: Path, source: Path, tests: list[str], version: str) -> None:
    """Install and use the wheel in a new environment; `source` is the unpacked sdist."""
    python, resolution = case.rsplit(":", 1)
    with tempfile.TemporaryDirectory(prefix="omnissm-release-") as name:
        folder = Path(name)
        env, pins, work = folder / "env", folder / "pins.txt", folder / "an empty folder"
        work.mkdir()
        call("uv", "venv", "-q", "--python", python, env, cwd=folder)
        uv = ("--python", env / "bin" / "python")
        wanted = ("--extra", "test", "--resolution", resolution, *uv)
        call("uv", "pip", "compile", "-q", "-o", pins, *wanted, source / "pyproject.toml", cwd=folder)
        call("uv", "pip", "install", "-q", *uv, "-r", pins, wheel, cwd=folder)
        call("uv", "pip", "check", *uv, cwd=folder)

        def step(title: str, action: Callable[[], str]) -> None:
            start = time.perf_counter()
            said = action().strip().splitlines()[-1:]
            say(f"  {case:20} {title:16} {time.perf_counter() - start:5.0f} s  {''.join(said)[:90]}")

        omnissm = env / "bin" / "omnissm"
        if version not in call(omnissm, "--version", cwd=work):
            raise CommandError(f"omnissm --version should say {version}")
        step("import", lambda: call(env / "bin" / "python", "-c", IMPORT_ALL, cwd=work))
        for domain in CONFIGS:
            call(omnissm, domain, "--help", cwd=work)
            step(f"help {domain}", lambda domain=domain: call(omnissm, domain, "fit", "--help", cwd=work)[:0])
        step("doctor", lambda: call(omnissm, "doctor", cwd=work))
        for domain, config in CONFIGS.items():
            command = (omnissm, domain, "fit", "-c", f"{domain}/{config}", "-c", "trainer/cpu_smoke")
            step(f"fit {domain}", lambda command=command: call(*command, cwd=work)[:0])
        options = ("-q", "-p", "no:cacheprovider", "--disable-warnings", "--tb", "short", "--timeout", "600")
        pytest = (env / "bin" / "pytest", *options, "-m", "not slow and not gpu", *tests)
        step("tests", lambda: call(*pytest, cwd=source))


def main() -> int:
    """Build, compare and try; exit code 1 where anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--try", dest="cases", nargs="*", default=CASES, metavar="PYTHON:RESOLUTION", help="default: all"
    )
    parser.add_argument("--tests", nargs="+", default=TESTS, metavar="PATH", help="tests of the sdist to run in each")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for sdist and wheel")
    options = parser.parse_args()
    missing = [tool for tool in ("git", "uv") if shutil.which(tool) is None]
    if missing:
        parser.error(f"{missing[0]} is not on the PATH; `make release-check` uses that of .venv")
    failed = []
    with tempfile.TemporaryDirectory(prefix="omnissm-build-") as name:
        scratch = Path(name)
        sdist, wheel = build(options.out, scratch)
        check_contents(sdist, wheel)
        version = check_version(wheel)
        with tarfile.open(sdist) as tar:
            tar.extractall(scratch, filter="data")
        for case in options.cases:
            try:
                try_wheel(case, wheel.resolve(), scratch / f"omnissm-{version}", list(options.tests), version)
            except CommandError as failure:
                failed.append(case)
                say(f"  {case:20} FAILED: {failure}")
    say(f"{len(options.cases) - len(failed)} of {len(options.cases)} environments passed: {sdist}, {wheel}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
