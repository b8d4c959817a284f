"""Configuration files and options: exit code 0, or 2 with one line."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import os
from importlib import import_module, resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from damage import TOKENS, VALUES
from fuzzing import Format, Payload
from hypothesis import strategies as st

from omnissm.__main__ import LIGHTNING, VERBS, main
from omnissm.ssmcore.training import cli

CONFIGS = {
    "timeseries": "sequence_classifier_waves",
    "genomics": "hnet_tiny_synthetic",
    "vision": "hydra_vit_tiny_synthetic",
    "graphs": "dag_ssm_tiny_synthetic",
}
for _domain in CONFIGS:
    for _part in ("tasks", "data"):
        import_module(f"omnissm.{_domain}.{_part}")
# Verbs that take long, write to the terminal only, or are the trainer's (these are read from configurations).
LEFT_OUT = {"benchmark", "list", "export-graph"}
COMMANDS = [
    (domain, verb, target)
    for domain, table in VERBS.items()
    for verb, (target, _) in table.items()
    if target != LIGHTNING and verb not in LEFT_OUT
]


def run(words: list[str], folder: Path) -> int:
    """Exit code of a command in a folder.

    Raises:
        ValueError: with its line, for exit code 2.
    """
    out, here = io.StringIO(), Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stderr(out), contextlib.redirect_stdout(io.StringIO()):
            code = main(words)
    finally:
        os.chdir(here)
    lines = [line for line in out.getvalue().splitlines() if line.startswith("omnissm: error: ")]
    if code == 2:
        if len(lines) != 1 or len(lines[0]) < 20:
            raise AssertionError(f"exit code 2 with {len(lines)} lines: {out.getvalue()}")
        raise ValueError(lines[0])
    if code or lines:
        raise AssertionError(f"exit code {code}: {out.getvalue()}")
    return code


def config(model: str) -> Payload:
    path = resources.files("omnissm.configs") / model / f"{CONFIGS[model]}.yaml"
    content = yaml.safe_load(path.read_text())
    content["trainer"] = {**content.get("trainer", {}), "accelerator": "cpu", "enable_progress_bar": False}
    return {"run.yaml": yaml.safe_dump(content).encode()}


def read_config(path: Path, model: str) -> int:
    """Everything that `fit` does before it trains."""
    cli.CLI.fit = lambda self, *_, **__: None  # type: ignore[method-assign]
    return run([model, "fit", "-c", path.name, "--run", "x"], path.parent)


names = ["a.vcf", "a.fa", "a.csv", "a.npz", "a.png", "empty", "missing.nc", "sub", ".", "/dev/null/x", "-"]
words = st.one_of(
    st.sampled_from(names),
    st.sampled_from([token.decode("utf-8", "replace")[:60].replace("\0", "") for token in TOKENS]),
    st.sampled_from([json.dumps(value) for value in VALUES]),
    st.integers(-5, 5).map(str),
)
command_models = st.sampled_from(COMMANDS).flatmap(
    lambda command: st.tuples(
        st.just(command),
        st.lists(st.tuples(st.sampled_from(options_of(command[2])), words), max_size=5),
        st.booleans(),
    )
)


def options_of(target: str) -> list[str]:
    module, _, name = target.partition(":")
    own = [f"--{option}" for option in inspect.signature(getattr(import_module(module), name)).parameters]
    return [*own, "-c", "--unknown", "-h"]


def command(model: Any) -> Payload:
    (domain, verb, _), options, joined = model
    given = [domain, verb]
    for option, word in options:
        given += [f"{option}={word}"] if joined else [option, word]
    png = io.BytesIO()
    from PIL import Image

    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(png, "png")
    return {
        "words.json": json.dumps(given).encode(),
        "a.vcf": b"##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\nc\t2\t.\tC\tA\t.\t.\t.\n",
        "a.fa": b">c\nACGTACGT\n",
        "a.csv": b"time,a\n2024-01-01,1\n2024-01-02,2\n",
        "a.npz": b"",
        "a.png": png.getvalue(),
        "empty": b"",
        "sub/b.png": png.getvalue(),
    }


def run_command(path: Path, model: Any) -> int:
    try:
        given = [str(word).replace("\0", "") for word in json.loads(path.read_text())]
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError("damage to the list of words itself") from error
    if given[1:2] and given[1] in {verb for _, verb, _ in COMMANDS}:
        return run(given, path.parent)
    raise ValueError("damage to the list of words itself")


FORMATS = [
    Format("config", st.sampled_from(list(CONFIGS)), config, read_config, lambda model: 0, weight=0.3),
    Format("options", command_models, command, run_command, lenient=True),
]
