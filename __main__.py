"""The command line: `omnissm DOMAIN VERB ...`, also as `python -m omnissm`.

The first two levels of help come from the tables below; what a verb needs is imported once the verb is known.
Exit codes: 0 done, 2 bad input (one line says what was expected, what came and the way out), 1 a fault of ours.
"""

from __future__ import annotations

import argparse
import difflib
import dis
import inspect
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module, resources
from pathlib import Path
from types import TracebackType, UnionType
from typing import Any, Union, get_args, get_origin

LIGHTNING = "omnissm.ssmcore.training.cli"

VERBS: dict[str, dict[str, tuple[str, str]]] = {
    "vision": {
        "fit": (LIGHTNING, "Train a model as a configuration file says."),
        "validate": (LIGHTNING, "Metrics of a trained model on the validation part."),
        "test": (LIGHTNING, "Metrics of a trained model on the test part, written to metrics.json."),
        "predict": ("omnissm.vision.__main__:predict", "Classes, boxes or masks of images: table and drawings."),
        "evaluate": ("omnissm.vision.dense.verbs:evaluate", "Metrics by class of a segmenter or detector."),
        "export": ("omnissm.ssmcore.training.export:export", "Turn a checkpoint into a model folder."),
        "export-graph": ("omnissm.vision.dense.verbs:export_graph", "A segmenter or detector as a graph, also ONNX."),
        "plot": ("omnissm.vision.__main__:plot", "Where a model looks: receptive fields and mixing matrices."),
        "shard": ("omnissm.vision.__main__:shard", "Pack a folder of images into tar files."),
        "benchmark": ("omnissm.vision.__main__:benchmark", "Time models side by side on this machine."),
        "list": ("omnissm.vision.__main__:list_names", "Names and sizes of the models."),
    },
    "genomics": {
        "fit": (LIGHTNING, "Train a model as a configuration file says."),
        "validate": (LIGHTNING, "Metrics of a trained model on the validation part."),
        "test": (LIGHTNING, "Metrics of a trained model on the test part, written to metrics.json."),
        "export": ("omnissm.ssmcore.training.export:export", "Turn a checkpoint into a model folder."),
        "score": ("omnissm.genomics.__main__:score", "Score the variants of a VCF, BCF or table."),
        "score-merge": ("omnissm.genomics.__main__:score_merge", "Join the shards of a scoring run."),
        "scan": ("omnissm.genomics.__main__:scan", "Score all single-base changes of a region."),
        "embed": ("omnissm.genomics.verbs:embed", "Embeddings of sequences."),
        "generate": ("omnissm.genomics.verbs:generate", "New sequences from a causal model."),
        "boundaries": ("omnissm.genomics.verbs:boundaries", "Where a hierarchical model cuts, and genes."),
        "essential": ("omnissm.genomics.verbs:essential", "Score genes by a knock-out near their start."),
        "evaluate": ("omnissm.genomics.verbs:evaluate", "Bits per base, beside Markov models."),
        "describe": ("omnissm.genomics.verbs:describe", "Stages, sizes and costs of a model."),
        "markov": ("omnissm.genomics.__main__:markov", "Count an interpolated Markov model."),
        "convert": ("omnissm.genomics.__main__:convert", "Published weights to a model folder; GenBank to FASTA."),
    },
    "graphs": {
        "fit": (LIGHTNING, "Train a model as a configuration file says."),
        "validate": (LIGHTNING, "Metrics of a trained model on the validation part."),
        "test": (LIGHTNING, "Metrics of a trained model on the test part, written to metrics.json."),
        "predict": (LIGHTNING, "Outputs for all graphs of the test part."),
        "export": ("omnissm.ssmcore.training.export:export", "Turn a checkpoint into a model folder."),
        "describe": ("omnissm.graphs.__main__:describe", "Sizes, depth, cycles and labels of a packed file."),
        "plot": ("omnissm.graphs.__main__:plot", "A graph by levels, and the influence between its nodes."),
        "list": ("omnissm.graphs.__main__:list_names", "Names and sizes of the models."),
    },
    "timeseries": {
        "fit": (LIGHTNING, "Train a model as a configuration file says."),
        "validate": (LIGHTNING, "Metrics of a trained model on the validation part."),
        "test": (LIGHTNING, "Metrics of a trained model on the test part, written to metrics.json."),
        "predict": (LIGHTNING, "Raw forecasts of all test windows in the model's units."),
        "export": ("omnissm.ssmcore.training.export:export", "Turn a checkpoint into a model folder."),
        "forecast": ("omnissm.timeseries.__main__:forecast", "Forecast what follows the end of a file's series."),
        "backtest": ("omnissm.timeseries.__main__:backtest", "Forecast from many past cutoffs of a file's series."),
        "evaluate": ("omnissm.timeseries.__main__:evaluate", "Metrics of a forecast or backtest file."),
        "describe": ("omnissm.timeseries.__main__:describe", "Length, frequency, gaps and missing values of a file."),
        "classify": ("omnissm.timeseries.label_verbs:classify", "Classify whole series."),
        "detect": ("omnissm.timeseries.label_verbs:detect", "Score and flag anomalies of a file's series."),
        "impute": ("omnissm.timeseries.label_verbs:impute", "Fill the gaps of a file's series."),
        "convert": ("omnissm.timeseries.label_verbs:convert", "Turn a file of series into another format."),
        "protocol": ("omnissm.timeseries.protocol:protocol", "Models, data sets, horizons and seeds in one table."),
        "plot": ("omnissm.timeseries.__main__:plot", "Draw forecasts, anomalies, filled gaps or classes."),
    },
}
DOMAINS = {
    "genomics": "Model DNA, and score variants.",
    "graphs": "Predict properties of graphs, nodes and links.",
    "timeseries": "Forecast, classify and complete many related series.",
    "vision": "Classify images, find objects in them, and name the class of each pixel.",
}
DEMOS = {
    "timeseries": ("omnissm.timeseries.demo:demo", "A forecast of real weather, with intervals."),
    "genomics": ("omnissm.genomics.demo:demo", "Changes in genes scored by a trained H-Net, and where it cuts."),
    "vision": ("omnissm.vision.demo:demo", "A classifier of handwritten digits, and its contact sheet."),
    "graphs": ("omnissm.graphs.demo:demo", "A regression on directed acyclic graphs, and its plots."),
}
FILES = (
    ".bcf", ".bed", ".bedgraph", ".csv", ".fa", ".fasta", ".gz", ".json", ".md", ".nc", ".npy", ".npz", ".onnx",
    ".parquet", ".pdf", ".png", ".pt2", ".svg", ".ts", ".tsv", ".vcf",
)  # fmt: skip
COMMANDS = {
    "demo": "Try all four domains on data that needs no download, and write one report with pictures.",
    "doctor": "Versions, devices, and which implementations of the operations run here.",
    "configs": "List the configurations that come with the package.",
    "mixers": "List the sequence mixers with what they can do, their state and their size.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Words after `omnissm`; None takes the process's own. `sys.argv` is left alone, because distributed
            training starts its other processes from it.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # they speak to callers of its interface
    verbose = any(word in ("-v", "--verbose") for word in words)
    words = [word for word in words if word not in ("-v", "--verbose")]
    logging.basicConfig(level=logging.DEBUG if verbose else logging.WARNING, format="%(name)s: %(message)s")
    try:
        return _dispatch(words)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or closing stdout complains once more
        return 1
    except Exception as error:
        if not is_bad_input(error):
            raise
        logging.getLogger("omnissm").debug("full report", exc_info=error)
        sys.stderr.write(f"omnissm: error: {one_line(error)}\n")
        return 2


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(_help("omnissm", {**DOMAINS, **COMMANDS}))
        return 0
    head, rest = words[0], words[1:]
    if head == "--version":
        from importlib.metadata import version

        sys.stdout.write(f"omnissm {version('omnissm')}\n")
        return 0
    if head == "configs":
        return _list_configs(rest)
    if head == "doctor":
        return run_function("omnissm.ssmcore.doctor:doctor", rest, "omnissm doctor")
    if head == "mixers":
        return run_function("omnissm.ssmcore.mixers.table:mixers", rest, "omnissm mixers")
    if head == "demo":
        return _demo(rest)
    if head not in VERBS:
        raise ValueError(_unknown("command", head, [*DOMAINS, *COMMANDS], "omnissm --help"))
    table = VERBS[head]
    if not rest or rest[0] in ("-h", "--help"):
        sys.stdout.write(_help(f"omnissm {head}", {verb: line for verb, (_, line) in table.items()}))
        return 0
    verb, rest = rest[0], rest[1:]
    if verb not in table:
        raise ValueError(_unknown(f"{head} verb", verb, list(table), f"omnissm {head} --help"))
    target = table[verb][0]
    rest = find_configs(rest, head)
    if target == LIGHTNING:
        return import_module(LIGHTNING).run_cli(rest, verb, head)
    return run_function(target, rest, f"omnissm {head} {verb}")


def _demo(words: list[str]) -> int:
    if words and words[0] in ("-h", "--help"):
        sys.stdout.write(_help("omnissm demo", {name: line for name, (_, line) in DEMOS.items()}))
        return 0
    if not words or words[0].startswith("-"):
        return run_function("omnissm.__main__:demo_all", words, "omnissm demo")
    domain = words.pop(0)
    if domain not in DEMOS:
        raise ValueError(_unknown("demo", domain, list(DEMOS), "omnissm demo --help"))
    return run_function(DEMOS[domain][0], words, f"omnissm demo {domain}")


def demo_all(out: Path = Path("demo")) -> int:
    """Run the demo of each domain in a process of its own, and write one report about all of them.

    Args:
        out: Folder for report.html and a folder for each domain. Files of an earlier demo in it are replaced, others
            stay.

    Returns:
        0, or 1 if a demo failed or did not reach what it should; the others run nevertheless.

    Example:
      omnissm demo --out demo
    """
    from .ssmcore.demo import run_demos

    return run_demos({name: line for name, (_, line) in DEMOS.items()}, out)


def run_function(target: str, words: Sequence[str], prog: str) -> int:
    """Run a typed function as a verb: options, defaults and help come from its signature and docstring.

    Args:
        target: "module:function". Text from "Example:" on in its docstring ends the help as it stands.
        words: Command-line words.
        prog: Name shown in the help.

    Returns:
        The function's result where that is an integer, else 0.
    """
    from jsonargparse import ArgumentParser

    module, _, name = target.partition(":")
    function: Callable[..., Any] = getattr(import_module(module), name)
    text, _, example = (inspect.getdoc(function) or "").partition("\nExample:\n")
    parser = ArgumentParser(
        prog=prog,
        description=text.split("\n\n")[0].replace("\n", " "),
        epilog=f"example:\n{_of_domain(example, prog)}" if example else None,
        formatter_class=_formatter(),
        exit_on_error=False,
    )
    parser.add_argument("-c", "--config", action="config", help="YAML file with values of these options")
    parser.add_function_arguments(function, as_group=False)
    lists = {action.option_strings[0]: items for action in parser._actions if (items := _items(action))}
    for action in parser._actions:
        if _items(action):
            action.metavar = "ITEM | [ITEM,...]"
    try:
        config = parser.parse_args(_with_lists(words, lists))
    except Exception as error:
        options = [option for action in parser._actions for option in action.option_strings]
        raise ValueError(f"{_plain_error(one_line(error))}{close_option(str(error), options)}") from error
    values = parser.instantiate_classes(config)
    values.pop("config", None)
    _check_outputs(values.get("out"))
    result = function(**values)
    return result if isinstance(result, int) and not isinstance(result, bool) else 0


def _items(action: argparse.Action) -> Any:
    """The type of the items of an option that takes a list and no text; None for other options."""
    hint = getattr(action, "_typehint", None)
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    lists = [kind for kind in kinds if get_origin(kind) is list]
    return get_args(lists[0])[0] if lists and str not in kinds else None


def _with_lists(words: Sequence[str], lists: Mapping[str, Any]) -> list[str]:
    """The words with lists where an option takes one and gets a single item: `--metrics mse` for `--metrics [mse]`."""

    def listed(option: str, value: str) -> str:
        if value.startswith("[") or value == "null":
            return value
        return json.dumps([value]) if lists[option] in (str, Path) else f"[{value}]"

    found: list[str] = []
    for word in words:
        option, equals, value = word.partition("=")
        if found and found[-1] in lists and not word.startswith("-"):
            found.append(listed(found[-1], word))
        else:
            found.append(f"{option}={listed(option, value)}" if equals and option in lists else word)
    return found


def _plain_error(text: str) -> str:
    """A parser's error without what it says of alternatives that were not meant, and with choices in plain words."""
    union = r"Does not validate against any of the Union subtypes .*? Errors: - (Expected a .*?)"
    text = re.sub(rf"{union}(?: - Expected a .*)? Given value type: .*? Given value: (.*)$", r"\1. Got value: \2", text)
    text = re.sub(r'^Parser key "(\w+)": ', r"--\1: ", text)
    if missing := re.fullmatch(r"the following arguments are required: ([\w, ]+)", text):
        text = f"missing options: --{missing[1].replace(', ', ', --')}. --help tells what is expected."
    text = re.sub(r"Expected an? <class '(\w+)'>\. Got value: (.*?)(\. Got value: .*)?$", r"expected \1; got \2.", text)
    found = re.search(r"Expected a typing\.Literal\[(.*?)\]\. Got value: (.*)$", text)
    if not found:
        return text
    choices = [choice.strip("'\"") for choice in found[1].split(", ")]
    close = difflib.get_close_matches(found[2], choices, n=1)
    advice = f" Did you mean {close[0]!r}?" if close else ""
    return f"{text[: found.start()]}expected one of {', '.join(choices)}; got {found[2]}.{advice}"


def _of_domain(example: str, prog: str) -> str:
    """The example of a verb that several domains share, as a command of this one."""
    return re.sub(rf"\bomnissm \w+ {re.escape(prog.split()[-1])}\b", prog, example)


def _check_outputs(out: Any) -> None:
    """Refuse outputs that cannot be written before the work, not after it."""
    from .ssmcore.training.checkpoints import check_writable

    for name in out if isinstance(out, list) else [out]:
        if name is None or str(name) == "-":
            continue
        path = Path(name)
        if path.suffix in FILES and path.is_dir():
            raise ValueError(f"out is {str(name)!r}, which is a folder; give the name of a file.")
        check_writable(path.parent)


def _formatter() -> type:
    """Help format that shows defaults and plain types, and leaves the example's lines as they are."""
    from jsonargparse import DefaultHelpFormatter

    class Formatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _expand_help(self, action: argparse.Action) -> str:
            if action.dest == "print_config":
                return "Print the values of all options as YAML and exit; with skip_default without those not given."
            kinds = re.search(r"Literal\[(.+?)\]", str(getattr(action, "_typehint", "")))
            text = re.sub(r"type: (.+?)(, default: |\)$)", _plain_type, super()._expand_help(action))
            if kinds and not str(action.metavar).startswith("{"):  # what may be left out is not shown with its choices
                names = kinds[1].replace("'", "")
                text = re.sub(r"\((?=[^()]*\)$)", f"(one of {names}, ", text)
            return text

    return Formatter


def _plain_type(found: re.Match[str]) -> str:
    """A type without Python's words; choices are listed before the help, and what may be left out has a default."""
    kind = re.sub(r"<class '(\w+)'>", r"\1", found[1])
    kind = re.sub(r"^(?:Optional|Union)\[(.+)\]$", r"\1", kind).replace(", null", "").replace(" | null", "")
    if kind.startswith("Literal["):
        return found[2].removeprefix(", ")
    return f"type: {re.sub(r', (?![^[]*[]])', ' | ', kind)}{found[2]}"


def close_option(message: str, options: Sequence[str]) -> str:
    """The sentence that proposes options close to the first unknown one in an error message, or nothing."""
    found = re.search(r"(?:[Uu]nrecognized arguments:|Key|Option|nested key|key) ['\"]?(-{0,2}[\w.+-]+)", message)
    if not found:
        return ""
    word = found[1].lstrip("-").rpartition(".")[2]
    if any(word == option.lstrip("-") for option in options):  # the option is right, its value is not
        return ""
    names = {option.lstrip("-").rpartition(".")[2]: option for option in options if not option.endswith("+")}
    close = difflib.get_close_matches(word, names, n=2, cutoff=0.6)
    stop = "" if message.rstrip().endswith((".", "?")) else "."
    return f"{stop} Did you mean {' or '.join(repr(names[name]) for name in close)}?" if close else ""


def find_configs(words: Sequence[str], domain: str = "") -> list[str]:
    """Replace configuration names after -c or --config by the paths of the files that come with the package.

    A path that exists stays. Else `NAME`, `DOMAIN/NAME` and `trainer/NAME` are looked up, with or without `.yaml`.

    Raises:
        ValueError: if there is no such file; the message names close ones.
    """
    found, expected = [], False
    for word in words:
        option, equals, value = word.partition("=")
        if expected:
            found.append(_find_config(word, domain))
        elif equals and option in ("-c", "--config"):
            found.append(f"{option}={_find_config(value, domain)}")
        else:
            found.append(word)
        expected = not expected and word in ("-c", "--config")
    return found


def _find_config(name: str, domain: str) -> str:
    if Path(name).is_file():
        return name
    root = Path(str(resources.files("omnissm.configs")))
    stem = name.removesuffix(".yaml")
    for folder in ("", domain, "trainer"):
        path = root / folder / f"{stem}.yaml"
        if path.is_file():
            return str(path)
    known = [str(path.relative_to(root).with_suffix("")) for path in sorted(root.rglob("*.yaml"))]
    short = {entry: entry for entry in known} | {entry.rpartition("/")[2]: entry for entry in known}
    close = difflib.get_close_matches(stem, short, n=1, cutoff=0.5)
    advice = f" Did you mean {short[close[0]]!r}?" if close else ""
    raise ValueError(f"Configuration {name!r} is neither a file nor a known name.{advice} `omnissm configs` lists all.")


def _list_configs(words: list[str]) -> int:
    if words and words[0] in ("-h", "--help"):
        sys.stdout.write("usage: omnissm configs [DOMAIN]\n\n" + COMMANDS["configs"] + "\n\nexample:\n")
        sys.stdout.write("  omnissm configs timeseries\n")
        return 0
    root = Path(str(resources.files("omnissm.configs")))
    folders = sorted(path.name for path in root.iterdir() if any(path.glob("*.yaml")))
    if words and words[0] not in folders:
        raise ValueError(_unknown("configuration folder", words[0], folders, "omnissm configs"))
    for folder in words[:1] or folders:
        for path in sorted((root / folder).glob("*.yaml")):
            first = path.read_text().partition("\n")[0]
            about = first.lstrip("# ") if first.startswith("#") else ""
            sys.stdout.write(f"{folder}/{path.stem:<40} {about}\n")
    return 0


def is_bad_input(error: BaseException) -> bool:
    """Whether an error was caused by what the user gave.

    Files, full disks, refused options and sizes beyond the memory are. A `ValueError`, `TypeError` or `ImportError` is
    if a `raise` statement speaks, here or in a library: one that the interpreter itself raises inside this package is a
    fault of ours.
    """
    if isinstance(error, (OSError, argparse.ArgumentError)):
        return True
    if type(error).__name__ in ("MisconfigurationException", "BackendError") or _is_out_of_memory(error):
        return True
    if not isinstance(error, (ValueError, TypeError, ImportError)):
        return False
    trace = error.__traceback__
    if trace is None:
        return True
    while trace.tb_next is not None:
        trace = trace.tb_next
    return _raised(trace) or (isinstance(error, ValueError) and not _in_package(trace))


def _is_out_of_memory(error: BaseException) -> bool:
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def _raised(trace: TracebackType) -> bool:
    return trace.tb_frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _in_package(trace: TracebackType) -> bool:
    return str(trace.tb_frame.f_globals.get("__name__", "")).startswith("omnissm")


def one_line(error: BaseException) -> str:
    """An error's message on one line; of an error in a loader's process, only what it says itself."""
    if isinstance(error, OSError) and error.strerror:
        place = f" {error.filename!r}" if error.filename else ""
        return f"{error.strerror}:{place}" if place else error.strerror
    text = str(error)
    if "Original Traceback" in text:
        text = text.strip().splitlines()[-1].partition(": ")[2]
    return " ".join(text.split()) or type(error).__name__


def _unknown(kind: str, word: str, known: Sequence[str], listing: str) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    advice = f" Did you mean {close[0]!r}?" if close else ""
    return f"Unknown {kind} {word!r}.{advice} `{listing}` shows all {len(known)}."


def _help(prog: str, entries: dict[str, str]) -> str:
    lines = [f"usage: {prog} COMMAND ...", ""]
    lines += [f"  {name:<12} {about}" for name, about in entries.items()]
    lines += ["", f"`{prog} COMMAND --help` tells more."]
    if prog == "omnissm":
        lines += ["", "options: --version, -h --help, -v --verbose (debug logs and tracebacks)"]
        lines += ["", "example:", "  omnissm demo --out demo"]
    elif prog == "omnissm demo":
        lines[0] = "usage: omnissm demo [DOMAIN] [--out DIR]"
        lines[-1] = "Without DOMAIN all of them and DIR/report.html about all. Files of an earlier demo are replaced."
        lines += ["", "`omnissm demo DOMAIN --help` tells more.", "", "example:", "  omnissm demo --out demo"]
    else:
        lines += ["", "example:", f"  {prog} fit -c {prog.split()[1]}/NAME -c trainer/cpu_smoke"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
