"""Labelled series in the text format `.ts` of the UEA and UCR archives, as a Dataset in the schema and back.

Header lines begin with "@" ("@classLabel true walking standing", "@targetLabel true" for regression), remarks with "#".
After "@data" every line is one series: variates separated by ":", steps by ",", "?" where missing, the label last.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr

from ..ssmcore.training.checkpoints import write_atomic

__all__ = ["read_ts", "write_ts"]


def read_ts(path: str | Path) -> xr.Dataset:
    """Read a `.ts` file.

    Args:
        path: The file.

    Returns:
        `target` (series, time, variate) float32, NaN where missing and behind the end of shorter series; `length`
        (series,) steps of each series; `label` (series,) text, or numbers with "@targetLabel", if the file has them.
        Attribute `classes` lists the labels that the header names.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: in one line with the number of the first bad one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the path of a .ts file.")
    header: dict[str, list[str]] = {}
    cases: list[np.ndarray] = []
    labels: list[str] = []
    started = False
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if not started:
            if not line.startswith("@") or line == "@":
                raise ValueError(f"{path.name}, line {number}: expected a header line beginning with @, or @data.")
            key, *words = line[1:].split()
            started = key.lower() == "data"
            header[key.lower()] = words
            continue
        values, label = _read_case(line, header, f"{path.name}, line {number}")
        if cases and len(values) != len(cases[0]):
            raise ValueError(
                f"{path.name}, line {number}: {len(values)} variates, the series before have {len(cases[0])}."
            )
        cases.append(values)
        labels.append(label)
    if not cases:
        raise ValueError(f"{path.name} holds no series{'' if started else ' (no line @data)'}; is it a whole .ts file?")
    return _dataset(cases, labels, header, path.stem)


def _labelled(header: dict[str, list[str]]) -> bool:
    return any((header.get(key) or ["false"])[0].lower() == "true" for key in ("classlabel", "targetlabel"))


def _read_case(line: str, header: dict[str, list[str]], place: str) -> tuple[np.ndarray, str]:
    """One series (variate, time), NaN where missing and behind the end of a shorter variate, and its label."""
    if "(" in line:
        raise ValueError(f"{place}: series with time stamps are not read; remove the stamps and use equal steps.")
    *parts, label = line.split(":") if _labelled(header) else [*line.split(":"), ""]
    if not parts:
        raise ValueError(f"{place}: expected variates and a label separated by ':', got one field.")
    try:
        rows = [np.array([_number(word) for word in part.split(",")]) for part in parts]
    except ValueError as error:
        raise ValueError(f"{place}: {error}.") from None
    values = np.full((len(rows), max(map(len, rows))), np.nan)
    for row, known in zip(values, rows):
        row[: len(known)] = known
    return values, label.strip()


def _number(word: str) -> float:
    word = word.strip()
    try:
        value = np.nan if word in ("?", "NaN", "nan", "") else float(word)
    except ValueError:
        raise ValueError(f"{word!r} is not a number; missing values are written ?") from None
    if np.isinf(value):
        raise ValueError(f"{word!r} is infinite; missing values are written ?")
    return value


def _dataset(cases: list[np.ndarray], labels: list[str], header: dict[str, list[str]], name: str) -> xr.Dataset:
    lengths = np.array([case.shape[1] for case in cases])
    target = np.full((len(cases), lengths.max(), len(cases[0])), np.nan, dtype=np.float32)
    for row, case in zip(target, cases):
        row[: case.shape[1]] = case.T
    coords = {
        "series": [str(k) for k in range(len(cases))],
        "time": np.arange(lengths.max()),
        "variate": [f"x{k}" for k in range(target.shape[2])],
        "length": ("series", lengths),
    }
    ds = xr.Dataset({"target": (("series", "time", "variate"), target)}, coords, {"freq": 1, "name": name})
    if not _labelled(header):
        return ds
    classes = header.get("classlabel", [])[1:]
    unknown = [label for label in labels if label not in classes] if classes else []
    if unknown:
        raise ValueError(f"{name}.ts: label {unknown[0]!r} is not among the classes of the header, {classes}.")
    if classes:
        return ds.assign(label=("series", np.array(labels))).assign_attrs(classes=classes)
    try:
        return ds.assign(label=("series", np.array(labels, dtype=np.float64)))
    except ValueError:
        return ds.assign(label=("series", np.array(labels)))


def write_ts(ds: xr.Dataset, path: str | Path) -> None:
    """Write a Dataset as a `.ts` file, whole or not at all; times become step numbers.

    Args:
        ds: Dataset in the schema; `length` (series,) says where series end, and `label` (series,) what they are.
        path: The file.
    """
    ds = ds if "series" in ds["target"].dims else ds.expand_dims("series")
    target = ds["target"].transpose("series", "variate", "time").to_numpy()
    lengths = ds["length"].to_numpy() if "length" in ds.coords else np.full(len(target), target.shape[2])
    labels = ds["label"].to_numpy() if "label" in ds and ds["label"].dims == ("series",) else None
    lines = [
        f"@problemName {str(ds.attrs.get('name', Path(path).stem)).replace(' ', '_')}",
        "@timeStamps false",
        f"@missing {str(bool(np.isnan(target).any())).lower()}",
        f"@univariate {str(target.shape[1] == 1).lower()}",
        f"@dimensions {target.shape[1]}",
        f"@equalLength {str(len(set(lengths.tolist())) == 1).lower()}",
    ]
    if labels is None:
        lines.append("@classLabel false")
    elif labels.dtype.kind == "f":
        lines.append("@targetLabel true")
    else:
        known = ds.attrs.get("classes", sorted(set(labels.astype(str).tolist())))
        classes = [known] if isinstance(known, str) else [str(each) for each in known]  # files keep one as plain text
        if any(len(name.split()) != 1 or ":" in name for name in classes):
            raise ValueError(f"labels of a .ts file are words without spaces and colons, got {classes}; rename them")
        lines.append(f"@classLabel true {' '.join(classes)}")
    lines.append("@data")
    for row, (values, length) in enumerate(zip(target, lengths)):
        variates = [",".join("?" if np.isnan(v) else f"{v:.9g}" for v in each[:length]) for each in values]
        lines.append(":".join([*variates, *([] if labels is None else [str(labels[row])])]))
    write_atomic(path, "\n".join(lines) + "\n")
