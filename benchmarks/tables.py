"""Tables of `docs/results.md`: each function turns result files into Markdown."""

from __future__ import annotations

import ast
import csv
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
# What measured a file without `command`, by the name of the file; {config} and the like are taken from its content.
COMMANDS = {
    "core": "python benchmarks/core.py",
    "dense": "python benchmarks/dense.py",
    "genomics": "python benchmarks/genomics.py JOB",
    "models": "python benchmarks/models.py",
    "vision": "python benchmarks/vision.py",
}
HEADS = {
    "cpu_s": "CPU s",
    "wall_s": "s",
    "step_ms": "ms a step",
    "floor_ms": "floor, ms",
    "tokens_per_s": "symbols a second",
    "bases_per_s": "bases a second",
    "variants_per_s": "variants a second",
    "peak_mib": "MiB at most",
    "peak_gib": "GiB at most",
    "test/f1": "F1",
    "f1": "F1",
    "cpu_seconds": "CPU s",
    "step_cpu_ms": "CPU ms a step",
    "timed": "share timed",
    "least_and_most_of_a_variate": "variates covered least and most",
}
CODE = ("model", "config", "command")  # columns with names of this library
ERRORS = ("mse", "mae", "rmse")  # columns with four decimals
FIRST_CALL = 20.0  # seconds that the first call of an op may take, forward and backward
Row = Mapping[str, Any]


def rows(results: Path, found: Sequence[Path], columns: Sequence[str] = (), where: Sequence[str] = ()) -> str:
    """One line for each row of a file that fulfils all conditions `key=value`; without columns all there are."""
    text = ""
    for path in found:
        content = read(path)
        chosen = [row for row in content["rows"] if all(_holds(row, condition) for condition in where)]
        if not chosen:
            raise ValueError(f"{path} has no row with {', '.join(where)}.")
        names = list(columns) or _scalar_names(chosen)
        names = [name for name in names if any(row.get(name) is not None for row in chosen)]
        if not set(names) & set(columns or names):
            raise ValueError(f"{path} has none of the columns {', '.join(columns)}.")
        text += "\n" if text else ""
        text += table(map(head, names), [[cell(name, row.get(name)) for name in names] for row in chosen])
        text += source(results, path, content)
    return text


def seeds(results: Path, found: Sequence[Path], keys: Sequence[str], values: Sequence[str]) -> str:
    """One line for each group of rows with the same keys: mean and standard deviation of the values over seeds."""
    text = ""
    for path in found:
        content = read(path)
        groups = _grouped(content["rows"], keys)
        lines = [
            [*(cell(key, row[0].get(key)) for key in keys), *(_spread(row, value) for value in values), str(len(row))]
            for row in groups.values()
        ]
        text += "\n" if text else ""
        text += table([*map(head, keys), *map(head, values), "seeds"], lines) + source(results, path, content)
    return text


def pivot(
    results: Path, found: Sequence[Path], keys: Sequence[str], across: Sequence[str], values: Sequence[str]
) -> str:
    """Rows by keys, columns by another key; cells hold the values with slashes, those of several seeds with commas."""
    text = ""
    for path in found:
        content = read(path)
        (key,) = across
        names = list(dict.fromkeys(row[key] for row in content["rows"]))
        lines = []
        for group in _grouped(content["rows"], keys).values():
            line = [cell(name, group[0][name]) for name in keys]
            for name in names:
                same = [row for row in group if row[key] == name]
                shown = (" / ".join(cell(value, row[value]) or "-" for value in values) for row in same)
                line.append(", ".join(shown))
            lines.append(line)
        text += "\n" if text else ""
        text += f"Columns: {key.replace('_', ' ')}; cells: {' / '.join(head(value) for value in values)}.\n\n"
        text += table([*map(head, keys), *map(str, names)], lines) + source(results, path, content)
    return text


def files(results: Path, found: Sequence[Path], columns: Sequence[str] = ()) -> str:
    """One line for each file; a file with rows gives a line for each row, with the file's `config` and `command`."""
    lines = []
    for path in found:
        content = read(path)
        for row in content.get("rows", [content]):
            whole = {**content, **row.get("metrics", {}), **row, **_origin(results, path, content, row)}
            lines.append([cell(name, whole.get(name)) for name in columns])
    return table(map(head, columns), lines) + _names(results, found)


def protocol(results: Path, found: Sequence[Path], grid: Sequence[str], models: Sequence[str]) -> str:
    """Test MSE / MAE of a grid of runs by data and horizon, means over seeds, beside published values.

    Runs of one model under several labels compete: for each data set and horizon the label with the smallest sum of
    validation MSE and MAE is shown.
    """
    (path,), (config,) = found, grid
    published: dict[str, Any] = yaml.safe_load((ROOT / config).read_text()).get("published", {})
    runs: dict[tuple[str, int, str], dict[str, list[Row]]] = {}
    for run in read(path):
        settings = run["settings"]
        place = (settings["data"], settings["horizon"], settings["model"])
        runs.setdefault(place, {}).setdefault(settings["label"], []).append(run)
    places = list(dict.fromkeys((data, horizon) for data, horizon, _ in runs))
    sets = list(dict.fromkeys(data for data, _ in places))
    places.sort(key=lambda place: (sets.index(place[0]), place[1]))
    lines, means, gap, others = [], {}, 0.0, set()
    for data, horizon in places:
        line = [f"{data} {horizon}"]
        for model in models:
            labels = runs[data, horizon, model]
            errors = {label: [_mean(each, key) for key in ("mse", "mae")] for label, each in labels.items()}
            best = min(labels, key=lambda label: sum(_mean(labels[label], key) for key in ("val_mse", "val_mae")))
            gap = max(gap, *(abs(a - b) for one in errors.values() for a, b in zip(one, errors[best])))
            others |= {best} - {model}
            line.append(_errors(errors[best]) + _deviations(labels[best]) + (" *" if best != model else ""))
            means.setdefault((data, model), []).append(errors[best])
        for model, values in published.items():
            line.append(_errors(values[data][horizon]))
            means.setdefault((data, f"published {model}"), []).append(values[data][horizon])
        lines.append(line)
        if (data, horizon) == [place for place in places if place[0] == data][-1]:
            columns = [*models, *(f"published {model}" for model in published)]
            each = (means[data, name] for name in columns)
            lines.append([f"{data}, mean", *(_errors([statistics.mean(v) for v in zip(*many)]) for many in each)])
    text = table(["", *(f"`{name}`" for name in models), *(f"published {name}" for name in published)], lines)
    if others:
        names = ", ".join(f"`{name}`" for name in sorted(others))
        text += (
            f"\n`*`: {names}; test errors of the settings that competed lie within {math.ceil(gap * 1e3) / 1e3:g}.\n"
        )
    return text + f"\n`benchmarks/results/{path.relative_to(results)}`, the grid is `{config}`.\n"


def dna(results: Path, found: Sequence[Path]) -> str:
    """One line for each trained model: where its curve (a .csv beside it) stands at the checkpoint that was kept."""
    lines = []
    for path in found:
        content = read(path)
        with open(path.with_suffix(".csv"), newline="") as file:
            (kept,) = (row for row in csv.DictReader(file) if int(row["step"]) == content["best_step"])
        counts = (content["parameters"], content["best_step"], int(kept["bases"]))
        lines.append(
            [
                f"`genomics/{path.stem}_ecoli`",
                *(f"{count:,}" for count in counts),
                f"{float(kept['flops']):.2e}",
                f"{float(kept['test_bits']):.4f}",
                ", ".join(f"{rate:.3f}" for rate in content["rates"].values()),
                _machine(content),
                f"`python benchmarks/genomics_train.py {path.stem} --data FOLDER --out FOLDER`",
            ]
        )
    names = ["config", "parameters", "steps", "bases read", "training FLOPs", "bits per base", "rates"]
    return table([*names, "machine", "command"], lines) + _names(results, found)


def operators(results: Path, found: Sequence[Path]) -> str:
    """One line for each implementation of an op that was timed, for each device."""
    text = ""
    for folder in sorted({path.parent for path in found}):
        contents = [read(path) for path in found if path.parent == folder]
        names = ["op, size, dtype", "path", "graph", "eager", "floor", "required", "aim"]
        names += ["extra MiB", "allowed MiB", "misses", "first call, s", "same bits"]
        lines = [_timed(each["op"], row) for each in contents for row in each["rows"] if "forward_ms" in row]
        text += ("\n" if text else "") + table(names, lines)
        machines: dict[str, list[str]] = {}
        for each in contents:
            machines.setdefault(_machine(each), []).append(f"`{each['op']}` {each['commit']}")
        for machine, commits in machines.items():
            text += (
                f"\n`benchmarks/results/{folder.relative_to(results)}/`; {machine}. Commits: {', '.join(commits)}.\n"
            )
        if waits := [each["autograd_thread_ms"] for each in contents if "autograd_thread_ms" in each]:
            text += (
                f"\nOf an eager gradient {min(waits):.2f} to {max(waits):.2f} ms there are the way to autograd's "
                "thread and back.\n"
            )
        notes: dict[str, list[str]] = {}
        for each in contents:
            if "notes" in each:
                notes.setdefault(each["notes"], []).append(f"`{each['op']}`")
        text += "".join(f"\n{', '.join(ops)}: {note}\n" for note, ops in notes.items())
    return text


def missed(row: Row) -> list[str]:
    """Names of the columns of `operators` in which a row of our kernels is above its limit."""
    found: list[str] = []
    if row["path"] != "triton" or "forward_ms" not in row:
        return found
    for name, kind in (("graph", "_graph_ms"), ("eager", "_ms")):
        got = [row[f"{which}{kind}"] for which in ("forward", "forward_backward")]
        if any(g and g["median"] > limit for g, limit in zip(got, row.get("required_ms", ()))):
            found.append(name)
    if row.get("peak_mib") is not None and row["peak_mib"] > row.get("required_mib", math.inf):
        found.append("extra MiB")
    if row.get("cold_s", 0) > FIRST_CALL:
        found.append("first call")
    return found


def untimed(results: Path, found: Sequence[Path]) -> str:
    """Names of the ops with a specification that none of the files times."""
    timed = {read(path)["op"] for path in found}
    every = set()
    for spec in (ROOT / "kernels").glob("*/spec.py"):
        calls = [node for node in ast.walk(ast.parse(spec.read_text())) if isinstance(node, ast.keyword)]
        every |= {node.value.id for node in calls if node.arg == "op" and isinstance(node.value, ast.Name)}
    missing = sorted(every - timed)
    return f"Not timed yet: {', '.join(f'`{name}`' for name in missing)}.\n" if missing else "All of them are timed.\n"


def anything(results: Path, path: Path) -> str:
    """Tables of a file that the page does not mention: one for each job of its rows, or its single values."""
    content, name = read(path), f"**{path.relative_to(results).with_suffix('')}**\n\n"
    if isinstance(content, list) or "rows" not in content:
        several = content if isinstance(content, list) else [content]
        flat = [_flat(each) for each in several]
        names = _scalar_names(flat)
        return name + table(map(head, names), [[cell(key, row.get(key)) for key in names] for row in flat])
    jobs = list(dict.fromkeys(row.get("job") for row in content["rows"]))
    shown = ""
    for job in jobs:
        chosen = [row for row in content["rows"] if row.get("job") == job]
        names = _scalar_names(chosen)
        shown += table(map(head, names), [[cell(k, row.get(k)) for k in names] for row in chosen]) + "\n"
    return name + shown.rstrip("\n") + "\n" + source(results, path, content)


def read(path: Path) -> Any:
    """Content of a result file."""
    return json.loads(path.read_text())


def table(names: Iterable[str], lines: Iterable[Sequence[str]]) -> str:
    """Markdown table; columns that are empty throughout are left out."""
    heads, body = list(names), [list(line) for line in lines]
    kept = [k for k in range(len(heads)) if any(line[k] for line in body)]
    marked = [[heads[k] for k in kept], ["---"] * len(kept), *([line[k] for k in kept] for line in body)]
    return "".join(f"| {' | '.join(line)} |\n" for line in marked)


def head(name: str) -> str:
    """How a column is called."""
    return HEADS.get(name, name.removeprefix("test/").replace("_", " "))


def cell(name: str, value: Any) -> str:
    """How a value is shown; of a time that was measured often the median."""
    if isinstance(value, Mapping):
        if "median" in value:
            return cell(name, value["median"])
        return ", ".join(f"{key} {cell('', each)}" for key, each in value.items())
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return str(value) if name == "seed" else f"{value:,}"
    if isinstance(value, float):
        if value and abs(value) >= 1e9:
            return f"{value:.2e}"
        if name.removeprefix("test/") in ERRORS:
            return f"{value:.4f}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " to ".join(cell("", each) for each in value)
    return f"`{value}`" if name in CODE else str(value).replace("|", "\\|")


def source(results: Path, path: Path, content: Row) -> str:
    """Where a table comes from: file, machine, versions, commands, and the file's own notes."""
    commands = _said(content, "command") or [COMMANDS[name] for name in (path.stem,) if name in COMMANDS]
    parts = [f"`benchmarks/results/{path.relative_to(results)}`", _machine(content)]
    parts += [f"commit {', '.join(commits)}"] if (commits := _said(content, "commit")) else []
    parts += [f"configuration `{content['config']}`"] if content.get("config") else []
    parts += [f"`{command}`" for command in commands]
    text = f"\n{'; '.join(part for part in parts if part)}.\n"
    return text + (f"\n{content['notes']}\n" if content.get("notes") else "")


def _names(results: Path, found: Sequence[Path]) -> str:
    return f"\nFiles: {', '.join(f'`{path.relative_to(results)}`' for path in found)}.\n"


def _said(content: Row, key: str) -> list[str]:
    """What a file says for all its rows, or what its rows say each, once."""
    every = [content, *content.get("rows", ())]
    return list(dict.fromkeys(row[key] for row in every if row.get(key)))


def _machine(content: Row) -> str:
    known = [str(content["device"])] if content.get("device") else []
    known += [f"{content['threads']} thread{'s' if content['threads'] > 1 else ''}"] if content.get("threads") else []
    for name in ("torch", "triton", "transformers", "timm"):
        known += [f"{name} {str(content[name]).partition('+')[0]}"] if content.get(name) else []
    return ", ".join(known)


def _origin(results: Path, path: Path, content: Row, row: Row) -> dict[str, str]:
    """Configuration and command of a run, from its own note or its file's name."""
    folder, stem = path.parent.name, re.sub(r"_seed\d+$", "", path.stem)
    if "metrics" in content:
        config = f"{folder}/{stem}"
        seed = f" --seed_everything {content['seed']}" if content.get("seed") else ""
        fit = f"omnissm {folder} fit -c {config}{seed} --run RUN; omnissm {folder} test --run RUN"
        command = fit if content.get("checkpoint") else f"omnissm {folder} test -c {config}"
        return {"config": config, "model": content["model"].removeprefix(f"{folder}/"), "command": command}
    if folder == "graphs":
        config, _, options = str(content["config"]).partition(" ")
        models = f" --models {row['model']}" + (f" {options}" if options else "")
        return {"config": config, "set": path.stem, "command": f"python benchmarks/graphs.py --config {config}{models}"}
    return {"file": path.stem}


def _holds(row: Row, condition: str) -> bool:
    key, _, value = condition.partition("=")
    return str(row.get(key)) == value


def _flat(content: Row) -> dict[str, Any]:
    """Values of a file with those of its `settings` and `metrics` beside them."""
    inner = {**content.get("settings", {}), **content.get("metrics", {})}
    return {key: value for key, value in {**inner, **content}.items() if key not in ("settings", "metrics")}


def _scalar_names(chosen: Sequence[Row]) -> list[str]:
    names = dict.fromkeys(name for row in chosen for name in row)
    simple = (str, int, float, bool, type(None))

    def shown(value: Any) -> bool:
        return isinstance(value, simple) or (isinstance(value, Mapping) and "median" in value)

    return [name for name in names if all(shown(row.get(name)) for row in chosen)]


def _grouped(chosen: Sequence[Row], keys: Sequence[str]) -> dict[tuple[str, ...], list[Row]]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in chosen:
        groups.setdefault(tuple(str(row.get(key)) for key in keys), []).append(row)
    return groups


def _mean(chosen: Sequence[Row], key: str) -> float:
    return statistics.mean(row[key] for row in chosen)


def _spread(group: Sequence[Row], key: str) -> str:
    values = [row[key] for row in group if row.get(key) is not None]
    if not values:
        return ""
    mean = statistics.mean(values)
    return f"{mean:.4g}" if len(values) == 1 else f"{mean:.3f} ± {statistics.stdev(values):.3f}"


def _errors(pair: Sequence[float]) -> str:
    return " / ".join(f"{value:.3f}" for value in pair)


def _deviations(chosen: Sequence[Row]) -> str:
    if len(chosen) < 2:
        return ""
    found = [statistics.stdev(row[key] for row in chosen) for key in ("mse", "mae")]
    return f" (± {_errors(found)})" if any(found) else ""


def _timed(op: str, row: Row) -> list[str]:
    size = ", ".join(f"{key} {value}" for key, value in row["size"].items() if value is not False)
    cells = [f"`{op}`, {size}, {row['dtype']}", row["path"]]
    for kind in ("_graph_ms", "_ms"):
        forward, both = row[f"forward{kind}"], row[f"forward_backward{kind}"]
        known = forward is not None and both is not None
        cells.append(f"{forward['median']:.3f} / {both['median']:.3f}" if known else "")
    cells.append(f"{row['forward_floor_ms']:.3f} / {row['forward_backward_floor_ms']:.3f}")
    for key in ("required_ms", "stretch_ms"):
        cells.append(" / ".join(f"{value:g}" for value in row[key]) if key in row else "")
    cells += ["" if row.get(key) is None else f"{row[key]:,.0f}" for key in ("peak_mib", "required_mib")]
    cells.append(", ".join(missed(row)))
    cells.append(f"{row['cold_s']:.1f}" if "cold_s" in row else "")
    return [*cells, {True: "yes", False: "no"}.get(row.get("repeatable"), "")]
