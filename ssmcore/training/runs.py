"""One folder per run: its name, who may write into it, and the files of results."""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from pytorch_lightning.utilities import rank_zero_only
from safetensors.torch import save
from torch import Tensor

from .checkpoints import check_writable, read_checkpoint, write_atomic
from .lock import FolderLock
from .logs import whole_lines
from .task import SSMTask

LAST, FIRST, STOPPED = "last.ckpt", ".first.ckpt", "stopped.ckpt"

_TRAINER = ("accumulate_grad_batches", "callbacks", "gradient_clip_algorithm", "gradient_clip_val", "precision")
_COMPARED = ("model", "data", "seed_everything", *(f"trainer.{option}" for option in _TRAINER))
_FREE = "data.init_args.num_workers"  # the order of samples does not depend on it, and memory may have run out
_FILES = ("config.yaml", "metrics.json", "predictions.safetensors")


def read_yaml(path: Path) -> dict[str, Any]:
    """A configuration file as a dictionary.

    Raises:
        ValueError: if it is not valid YAML of that kind.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        found = "nothing" if content is None else type(content).__name__
        raise ValueError(f"{str(path)!r} holds {found}, expected a mapping of options.")
    return content


def check_configs(words: Sequence[str]) -> None:
    """Read each file behind `-c`, as the parser's own message about a broken one leaves its name out.

    Raises:
        ValueError: if one is not YAML, or holds no options.
    """
    for word, following in zip(words, [*words[1:], ""]):
        option, equals, value = word.partition("=")
        path = Path(value if equals else following)
        if option in ("-c", "--config") and path.is_file():
            read_yaml(path)


@dataclass(frozen=True)
class Run:
    """A run's folder.

    Attributes:
        name: As given by --run, or the configuration's name.
        folder: runs/NAME, or the name itself where it has a slash.
        config: Name of the configuration, for reports.
    """

    name: str
    folder: Path
    config: str = ""

    @classmethod
    def create(cls, name: str | None, configs: Sequence[str], model: Any) -> Run:
        """Name the run after --run, else the last configuration that is not a trainer's, else the task's class."""
        files = [Path(file) for file in configs]
        stems = [file.stem for file in files if file.parent.name != "trainer"]
        own = stems[-1] if stems else str(model.class_path).rpartition(".")[2].lower()
        if own == "config" and files:
            own = files[-1].absolute().parent.name
        chosen = name or own
        return cls(chosen, folder_of(chosen), own)

    @staticmethod
    def add_config(argv: Sequence[str], verb: str) -> list[str]:
        """Arguments with `-c FOLDER/config.yaml` in front, where only a run or a checkpoint of one is named.

        With a checkpoint also `--run FOLDER`: the folder may have moved since its configuration has named it.

        Raises:
            FileNotFoundError: if there is nothing to resume, or no such run and no model that could be taken instead.
        """
        words = list(argv)
        if any(word.partition("=")[0] in ("-c", "--config", "-h", "--help") for word in words):
            return words
        values = {}
        for word, following in zip(words, [*words[1:], ""]):
            option, equals, value = word.partition("=")
            values[option] = value if equals else following
        folder = folder_of(values["--run"]) if "--run" in values else None
        if folder is None and "--ckpt_path" in values:
            path = Path(values["--ckpt_path"])
            folder = path if path.is_dir() else path.parent.parent
        known = folder is not None and (folder / "config.yaml").is_file()
        if folder is not None and not known and verb == "fit" and "--resume" in words:
            raise FileNotFoundError(_nothing(folder))
        given = any(word.partition("=")[0] == "--model" or word.startswith("--model.") for word in words)
        if "--run" in values and not known and verb != "fit" and not given:
            raise FileNotFoundError(_no_run(values["--run"]))
        if folder is None or not known or (verb == "fit" and "--resume" not in words):
            return words
        named = [] if "--run" in values else ["--run", os.path.join(os.curdir, folder)]  # a path, so with a slash
        return ["-c", str(folder / "config.yaml"), *named, *words]

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints lie."""
        return self.folder / "checkpoints"

    @cached_property
    def lock(self) -> FolderLock:
        """Lets one process at a time write into the folder."""
        return FolderLock(self.folder, ", or give another --run NAME")

    @rank_zero_only
    def check(self, config: str, *, resume: bool, overwrite: bool) -> None:
        """Whether a fit may use the folder.

        Args:
            config: Text of config.yaml.
            resume: Go on with what is there; its configuration must be the same in model, data, seed, and the
                trainer's callbacks, clipping, accumulation and precision, apart from the number of loading processes.
            overwrite: Replace what is there.

        Raises:
            ValueError: if the folder is used and neither is set, if both are, if the configurations differ, or if
                another process is writing into the folder.
            FileNotFoundError: if there is nothing to resume.
            OSError: if the folder cannot be written.
        """
        if resume and overwrite:
            raise ValueError("--resume goes on with a run and --overwrite replaces it; give one of them.")
        stored = self.folder / "config.yaml"
        if resume:
            if not stored.is_file():
                raise FileNotFoundError(_nothing(self.folder))
            self._compare(read_yaml(stored), yaml.safe_load(config))
        elif not overwrite and (stored.exists() or any(self._kept())):
            raise ValueError(
                f"Run {self.name!r} exists in {str(self.folder)!r}."
                " Give another --run NAME, --resume to go on with it, or --overwrite to replace it."
            )

        for place in (self.folder, self.checkpoints):
            check_writable(place)
        if self.folder.is_dir():
            self.lock.acquire()

    @rank_zero_only
    def open(self) -> None:
        """Make the folder, if there is none, and lock it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock.acquire()

    @rank_zero_only
    def claim(self, config: str, *, resume: bool) -> None:
        """Take the folder for a fit: write config.yaml, and keep (resume) or remove what an earlier fit left.

        The model folder goes in both cases: it would be older than the next best checkpoint, until the fit ends. A kill
        at any point leaves the old run, the new one, or no run: config.yaml goes first and comes when a state to resume
        from is there.
        """
        if resume:
            shutil.rmtree(self.folder / "model", ignore_errors=True)
            self._keep_metrics()
        else:
            self._clear()
        write_atomic(self.folder / "config.yaml", config)
        first, last = self.checkpoints / FIRST, self.checkpoints / LAST
        if first.exists() and not last.exists():
            first.rename(last)
        self._sweep()

    @property
    def newest(self) -> Path | None:
        """The checkpoint to resume from, if there is one, as it is on the disk."""
        found = (self.checkpoints / name for name in (LAST, FIRST))
        return next((path for path in found if path.exists()), None)

    def state(self) -> Path | None:
        """The checkpoint to resume from, if there is one, after reading it.

        Raises:
            ValueError: if it is damaged, or holds more than tensors and plain values.
        """
        path = self.newest
        if path is not None and path.is_file():  # a folder where parameters are sharded
            read_checkpoint(path)
        return path

    @rank_zero_only
    def leave_nothing(self) -> None:
        """Remove what a fit has written that ended before its first step, so that the folder is as it was before."""
        if not self.folder.is_dir():
            return
        self._sweep()
        self.lock.release()
        with contextlib.suppress(OSError):  # other files are in it
            self.checkpoints.rmdir()
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _sweep(self) -> None:
        """Remove what kills have cut off, and the state of a fit before its first step, unless it is the only one."""
        only = (self.folder / "config.yaml").exists() and not (self.checkpoints / LAST).exists()
        for pattern in (".*.ckpt.*", *(() if only else (FIRST,))):
            for path in self.checkpoints.glob(pattern):
                _remove(path)
        for name in (*_FILES, "metrics.csv", "model"):
            for path in self.folder.glob(f".{name}.*"):
                _remove(path)

    def _compare(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        before, now = ({k: v for part in _COMPARED for k, v in _flat(part, _at(c, part))} for c in (old, new))
        keys = [key for key in sorted({*before, *now} - {_FREE}) if before.get(key) != now.get(key)]
        if keys:
            shown = "; ".join(f"{key} is {now.get(key)!r}, was {before.get(key)!r}" for key in keys[:3])
            raise ValueError(
                f"--resume needs the run's own configuration, but {shown}."
                f" Start a new run with --init_from {self.checkpoints / 'last.ckpt'} instead."
            )

    def _kept(self) -> Iterator[Path]:
        """What an earlier fit has left in the checkpoints' folder, apart from a state before its first step."""
        if self.checkpoints.is_dir():
            yield from (path for path in self.checkpoints.iterdir() if not path.name.startswith("."))

    def _keep_metrics(self) -> None:
        file = self.folder / "metrics.csv"
        if file.exists():
            count = len(list(self.folder.glob("metrics.*.csv")))
            file.rename(self.folder / f"metrics.{count + 1}.csv")

    def _clear(self) -> None:
        for file in [*(self.folder / name for name in _FILES), *self.folder.glob("metrics*.csv")]:
            file.unlink(missing_ok=True)
        shutil.rmtree(self.folder / "model", ignore_errors=True)
        for path in self._kept():
            _remove(path)

    def write_metrics(self, found: dict[str, float], model: SSMTask, checkpoint: str | None, seed: Any) -> None:
        """Write metrics.json; metrics of the other verb stay if they come from the same checkpoint."""
        path = self.folder / "metrics.json"
        stamp = [checkpoint, Path(checkpoint).stat().st_mtime_ns] if checkpoint else None
        earlier: dict[str, Any] = {}
        if path.exists():
            earlier = json.loads(path.read_text())
        if earlier.get("checkpoint") != stamp:
            earlier = {}
        about = model.model_config()
        content = {
            "metrics": {**earlier.get("metrics", {}), **found},
            "config": self.config,
            "model": about.get("model"),
            "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "seed": seed,
            "checkpoint": stamp,
            "versions": {
                "omnissm": version("omnissm"),
                "torch": torch.__version__,
                "pytorch_lightning": version("pytorch-lightning"),
                "python": platform.python_version(),
            },
        }
        write_atomic(path, json.dumps(content, indent=2) + "\n")

    def write_predictions(self, outputs: Sequence[Any]) -> Path:
        """Join the batches' tensors, or dictionaries or named tuples of them, and write them."""
        joined: dict[str, list[Tensor]] = {}
        for output in outputs:
            named = output._asdict() if hasattr(output, "_asdict") else output
            for name, tensor in (named if isinstance(named, dict) else {"prediction": named}).items():
                joined.setdefault(name, []).append(tensor.cpu())
        path = self.folder / "predictions.safetensors"
        write_atomic(path, save({name: torch.cat(parts) for name, parts in joined.items()}))
        return path


def read_metrics(folder: str | Path) -> pd.DataFrame:
    """All rows of a run's metrics.csv, in order; steps that a resumed run has repeated count once.

    A last line that a crash has cut off is left out.

    Raises:
        FileNotFoundError: if the run has no metrics.csv, or one without a row.
    """
    folder = Path(folder)
    parts = sorted(folder.glob("metrics.*.csv"), key=lambda path: int(path.suffixes[0][1:]))
    parts += [folder / "metrics.csv"] * ((folder / "metrics.csv").exists() or not parts)
    tables = [pd.read_csv(io.StringIO(text)) for text in map(whole_lines, parts) if text]
    tables = [table for table in tables if len(table)]  # a cut may leave a header
    if not tables:
        raise FileNotFoundError(2, "No rows of metrics", str(folder / "metrics.csv"))
    table = tables[0]
    for part in tables[1:]:
        earlier = table[table["step"] < part["step"].min()]
        table = pd.concat([earlier, part], ignore_index=True) if len(earlier) else part
    return table[sorted(table.columns)]  # the parts may have met the metrics in another order


def _nothing(folder: Path) -> str:
    return (
        f"Nothing to resume: {folder / 'config.yaml'} does not exist. A fit that ended before its first step is started"
        " again with -c and without --resume."
    )


def _no_run(name: str) -> str:
    place = folder_of(name)
    others = [path.parent.name for path in place.parent.glob("*/config.yaml")]
    close = difflib.get_close_matches(place.name, others, n=1)
    advice = f"Did you mean {str(Path(name).with_name(close[0]))!r}? Else name" if close else "Name"
    return f"No run {name!r}: {place / 'config.yaml'} does not exist. {advice} a configuration with -c."


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def folder_of(name: str) -> Path:
    """Folder of a run's name: below runs/, or the path itself where it has a slash."""
    return Path(name) if "/" in name else Path("runs") / name


def _at(config: dict[str, Any], key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _flat(key: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        return [pair for name, part in value.items() for pair in _flat(f"{key}.{name}", part)]
    return [(key, value)]
