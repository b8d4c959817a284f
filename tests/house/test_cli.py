"""The dispatcher: help without torch, names, exit codes, and one line per fault of the user."""

import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Literal

import pytest

from omnissm import __main__ as cli
from omnissm.ssmcore import doctor


@pytest.fixture
def verb(monkeypatch):
    """Make a function the verb `omnissm timeseries probe`."""

    def make(function):
        monkeypatch.setattr(cli, "probe", function, raising=False)
        monkeypatch.setitem(cli.VERBS["timeseries"], "probe", ("omnissm.__main__:probe", "Try something."))
        return lambda *words: cli.main(["timeseries", "probe", *words])

    return make


@pytest.mark.parametrize("words", [["--help"], ["timeseries", "--help"], ["timeseries"], ["demo", "--help"], []])
def test_help_needs_no_torch(words):
    code = (
        f"import sys; from omnissm.__main__ import main; code = main({words!r});"
        "sys.exit(code or ('torch' in sys.modules) or ('jsonargparse' in sys.modules))"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: omnissm")
    assert time.perf_counter() - start < 1.0  # 0.07 s when the machine is idle


def test_help_lists_all_verbs(capsys):
    assert cli.main(["timeseries", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {verb} " in shown for verb in cli.VERBS["timeseries"])
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in [*cli.DOMAINS, *cli.COMMANDS])


def test_version(capsys):
    from importlib.metadata import version

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"omnissm {version('omnissm')}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["timeserie"], "Unknown command 'timeserie'. Did you mean 'timeseries'? `omnissm --help` shows all 8."),
        (["timeseries", "forcast"], "Unknown timeseries verb 'forcast'. Did you mean 'forecast'?"),
        (["demo", "vission"], "Unknown demo 'vission'."),
        (["configs", "timeserie"], "Unknown configuration folder 'timeserie'. Did you mean 'timeseries'?"),
        (
            ["timeseries", "fit", "-c", "trainer/cpu_smok"],
            "neither a file nor a known name. Did you mean",
        ),
    ],
)
def test_unknown_names(words, message, capsys):
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("omnissm: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_verbs_exist():
    """Every "module:function" of the tables can be imported."""
    from importlib import import_module

    targets = [target for table in cli.VERBS.values() for target, _ in table.values()]
    targets += [target for target, _ in cli.DEMOS.values()]
    for target in targets:
        module, _, name = target.partition(":")
        assert not name or callable(getattr(import_module(module), name)), target


def add(count: int, scale: float = 1.5, files: list[Path] | None = None) -> int:
    """Multiply a number.

    More about it.

    Args:
        count: How many.
        scale: How much each.
        files: Ignored.

    Returns:
        The exit code.

    Example:
      omnissm timeseries probe --count 3 \\
        --scale 2
    """
    sys.stdout.write(f"{count * scale} {files}\n")
    return 0 if count < 10 else 1


def test_function_becomes_a_verb(verb, capsys, tmp_path):
    probe = verb(add)
    assert probe("--count", "2", "--files", '["a"]') == 0
    assert capsys.readouterr().out == f"3.0 {[Path('a')]}\n"
    (tmp_path / "c.yaml").write_text("count: 4\nscale: 2\n")
    assert probe("-c", str(tmp_path / "c.yaml"), "--scale", "3") == 0
    assert capsys.readouterr().out == "12.0 None\n"
    assert probe("--count", "10") == 1


def test_help_of_a_verb_shows_defaults_and_the_example(verb, capsys):
    assert verb(add)("--help") == 0
    shown = capsys.readouterr().out
    assert "Multiply a number." in shown
    assert "How much each" in shown
    assert "default: 1.5" in shown
    assert "example:\n  omnissm timeseries probe --count 3 \\\n    --scale 2" in shown


def choose(
    path: Path,
    names: str | list[str] | None = None,
    kind: Literal["a", "b"] = "a",
    part: int | None = 1,
    order: Literal["up", "down"] | None = None,
) -> None:
    """Choose.

    Args:
        path: A file.
        names: Some names.
        kind: A kind.
        part: A part.
        order: An order.

    Example:
      omnissm graphs probe --path x
    """


def test_help_of_a_verb_says_types_plainly_and_speaks_of_its_domain(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert verb(choose)("--help") == 0
    shown = capsys.readouterr().out
    assert "A file. (required, type: Path)" in shown
    assert "Some names. (type: str | list[str], default: null)" in shown
    assert re.search(r"--kind \{a,b\}\s+A kind. \(default: a\)", shown)
    assert "A part. (type: int, default: 1)" in shown
    assert "An order. (one of up, down, default: null)" in shown
    assert "Print the values of all options as YAML and exit" in shown
    assert shown.endswith("example:\n  omnissm timeseries probe --path x\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--count", "two"], "--count: expected int; got two."),
        (["--cuont", "2"], "Did you mean '--count'?"),
        ([], "count"),
    ],
)
def test_bad_options_of_a_verb(verb, capsys, words, message):
    assert verb(add)(*words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def gather(names: list[str] | None = None, paths: list[Path] | None = None, sizes: list[int] | None = None) -> None:
    """Gather.

    Args:
        names: Some names.
        paths: Some paths.
        sizes: Some sizes.
    """
    sys.stdout.write(repr((names, [str(path) for path in paths or ()], sizes)))


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--names", "mse"], (["mse"], [], None)),
        (["--names=1: a", "--sizes", "3"], (["1: a"], [], [3])),
        (["--names", "[mse, mae]", "--sizes=[3, 4]"], (["mse", "mae"], [], [3, 4])),
        (["--paths", "a b, c.png", "--names", "null"], (None, ["a b, c.png"], None)),
        (["--names", "a", "--names+", "b"], (["a", "b"], [], None)),
    ],
)
def test_one_item_is_a_list_of_it(verb, capsys, words, found):
    assert verb(gather)(*words) == 0
    assert capsys.readouterr().out == repr(found)


@pytest.mark.parametrize(
    ("function", "words", "line"),
    [
        (
            choose,
            ["--path", "x", "--kind", "bb"],
            "--kind: expected one of a, b; got bb. Did you mean 'b'?",
        ),
        (choose, ["--path", "x", "--part", "y"], "--part: expected int; got y."),
        (gather, ["--sizes", "x"], "--sizes: expected int; got x."),
    ],
)
def test_an_error_of_a_value_says_what_it_may_be(verb, capsys, function, words, line):
    assert verb(function)(*words) == 2
    assert capsys.readouterr().err == f"omnissm: error: {line}\n"


def raising(error):
    def probe() -> None:
        raise error

    return probe


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("expected 3,\n  got 4"), "expected 3, got 4"),
        (TypeError("expected text"), "expected text"),
        (ImportError('missing: pip install "omnissm[plot]"'), 'missing: pip install "omnissm[plot]"'),
        (FileNotFoundError(2, "No such file or directory", "a.csv"), "No such file or directory: 'a.csv'"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ValueError("Caught X in worker\nOriginal Traceback\n  File\nValueError: bad row 3\n"), "bad row 3"),
    ],
)
def test_faults_of_the_user_are_one_line(verb, capsys, error, line):
    assert verb(raising(error))() == 2
    assert capsys.readouterr().err == f"omnissm: error: {line}\n"


def unpack() -> None:
    """A fault of ours: the interpreter raises, no `raise` statement does."""
    first, _second = [1]
    sys.stdout.write(f"{first}")


def none_plus_one() -> None:
    sys.stdout.write(str(None + 1))  # type: ignore[operator]


@pytest.mark.parametrize("function", [raising(KeyError("x")), raising(RuntimeError("x")), none_plus_one, unpack])
def test_our_faults_are_not_hidden(verb, function):
    module = function.__globals__["__name__"]
    function.__globals__["__name__"] = "omnissm.test"  # as if the function were part of the package
    try:
        with pytest.raises((KeyError, RuntimeError, TypeError, ValueError)):
            verb(function)()
    finally:
        function.__globals__["__name__"] = module


def test_config_names_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text("{}")
    found = cli.find_configs(["-c", "own.yaml", "--config=cpu_smoke", "-c", "trainer/ddp", "--x", "-c"], "timeseries")
    assert found[1] == "own.yaml"
    assert Path(found[2].partition("=")[2]).parts[-3:] == ("configs", "trainer", "cpu_smoke.yaml")
    assert Path(found[4]).name == "ddp.yaml"
    assert found[5:] == ["--x", "-c"]


def test_configs_are_listed_with_their_first_line(capsys):
    assert cli.main(["configs", "trainer"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [f"trainer/{n}" for n in ("cpu_smoke", "ddp", "fsdp2", "gpu_bf16")]
    assert all(len(line.split()) > 4 for line in lines)


def test_arguments_of_the_process_stay(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["omnissm", "--version"])
    assert cli.main(["configs", "trainer"]) == 0
    assert sys.argv == ["omnissm", "--version"]
    capsys.readouterr()
    assert cli.main() == 0
    assert capsys.readouterr().out.startswith("omnissm ")


@pytest.mark.parametrize("module", ["omnissm", "omnissm.timeseries"])
def test_python_m_is_the_same(module):
    words = ["timeseries"] if module == "omnissm" else []
    done = subprocess.run([sys.executable, "-m", module, *words, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: omnissm timeseries")


def test_doctor(capsys):
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for expected in ("torch", "cpu", "linear_scan on cpu", "reference: yes", "selective_scan2d", "Import path"):
        assert expected in shown


def test_doctor_looks_for_what_extras_install():
    """Packages of each extra; of `demo` those that go with every version of Python."""
    project = tomllib.loads((Path(cli.__file__).parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for extra, names in doctor.EXTRAS.items():
        listed = {re.split(r"[<>=;\[ ]", line)[0] for line in extras[extra] if ";" not in line}
        assert set(names) == listed - {"omnissm"}, extra
