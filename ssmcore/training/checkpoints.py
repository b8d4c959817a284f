"""Model folders and checkpoint files: written whole or not at all, read without unpickling code.

A model folder holds `config.json` (what to build), `model.safetensors` (weights), `README.md` (model card) and files of
the domain. A `.ckpt` file holds a training run; `export_checkpoint` makes the former from the latter.
"""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import re
import shutil
import socket
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
_PICKLES = (".bin", ".pt", ".pth", ".pkl")


@dataclass(frozen=True)
class ModelFolder:
    """What a model folder holds.

    Attributes:
        path: The folder.
        config: `config.json`: "omnissm" (version), "model" (DOMAIN/NAME), "args", "task".
        state: Weights by name, on the CPU.
        files: Further text files by name, such as `data.json`.
    """

    path: Path
    config: dict[str, Any]
    state: dict[str, Tensor]
    files: dict[str, str] = field(default_factory=dict)


def write_atomic(path: str | os.PathLike, content: str | bytes) -> None:
    """Write a file so that it is seen whole or not at all, also after a crash or on a full disk.

    Raises:
        OSError: if it cannot be written; the old file, if any, is unchanged and nothing else is left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.{owner()}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk names no file by itself
        raise


def owner() -> str:
    """This process, in the names of its temporary files: `sweep` then knows the rests of killed ones."""
    return f"{socket.gethostname()}-{os.getpid()}"


def sweep(folder: str | os.PathLike, name: str = "") -> None:
    """Remove temporary files and folders of processes of this machine that have been killed.

    Args:
        folder: Where to look; not below.
        name: Part of the names of the files that they were to become; empty takes all.
    """
    pattern = re.compile(rf"\..*\.{re.escape(socket.gethostname())}-(\d+)\.")
    for path in Path(folder).glob(".*"):
        found = pattern.match(path.name)
        if found and name in path.name and not _is_alive(int(found[1])):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it is another user's
    return True


def check_writable(folder: str | os.PathLike) -> None:
    """Find out now what else would be found out at the end of the work: that a folder cannot be written or made.

    Raises:
        OSError: as the system says it, naming the folder.
    """
    place = Path(folder)
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_model_folder(
    path: str | os.PathLike,
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    files: Mapping[str, str] | None = None,
    *,
    dtype: torch.dtype | None = torch.float32,
) -> Path:
    """Write a model folder; an older one of that name is replaced at the end, in one step.

    Args:
        path: The folder.
        state: Weights by name; of tied weights the first is stored.
        config: "model" (DOMAIN/NAME), "args" and "task", JSON-able. The version is added.
        files: Further text files by name.
        dtype: Type of the stored floating-point weights; None keeps theirs.

    Returns:
        The folder.

    Raises:
        ValueError: if `path` holds something else than a model folder.
        OSError: if it cannot be written; nothing half-written is left.
    """
    path = Path(path)
    if path.exists() and not (path / CONFIG).is_file() and (path.is_file() or any(path.iterdir())):
        raise ValueError(f"{str(path)!r} exists and is not a model folder (no {CONFIG}). Choose another name.")
    full = {"omnissm": version("omnissm"), **config}
    tensors = _untied(state, dtype)
    contents: dict[str, str | bytes] = {
        CONFIG: json.dumps(full, indent=2) + "\n",
        WEIGHTS: save(tensors, metadata={"format": "pt"}),
        CARD: _card(full, tensors),
        **(files or {}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, path.name)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.{owner()}.", dir=path.parent))
    old = temporary.with_name(temporary.name + ".old")
    try:
        for name, content in contents.items():
            write_atomic(temporary / name, content)
        temporary.chmod(0o777 & ~_umask())
        if path.exists():
            path.rename(old)
        temporary.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    return path


def _untied(state: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    kept: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else (id(tensor), tensor.shape, ())
        kept.setdefault(place, name)
    cast = {name: state[name].detach().to("cpu", copy=True).contiguous() for name in kept.values()}
    return {name: t.to(dtype) if dtype and t.is_floating_point() else t for name, t in cast.items()}


def _card(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    count = sum(math.prod(t.shape) for t in tensors.values())
    return (
        f"---\nlibrary_name: omnissm\n---\n\n# {config['model']}\n\n"
        f"Trained with omnissm {config['omnissm']}; {count:,} stored numbers.\n\n"
        f"Arguments of the model:\n\n```json\n{json.dumps(config.get('args', {}), indent=2)}\n```\n\n"
        f"Task:\n\n```json\n{json.dumps(config.get('task', {}), indent=2)}\n```\n"
    )


def read_model_folder(path: str | os.PathLike) -> ModelFolder:
    """Read a model folder without running code from it.

    Raises:
        FileNotFoundError: if the folder or one of its two main files is missing.
        ValueError: if a file is damaged, or a later version than this one wrote the folder.
    """
    path = Path(path)
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{str(path)!r} is not a model folder: {name} is missing.")
    try:
        config = json.loads((path / CONFIG).read_text())
        written = tuple(int(part) for part in str(config["omnissm"]).split(".")[:2])
        if not isinstance(config["model"], str) or not isinstance(config.setdefault("args", {}), dict):
            raise TypeError("'model' is a name and 'args' an object")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path / CONFIG} is damaged: expected JSON with 'omnissm' and 'model', {error!r}.") from error
    if written > tuple(int(part) for part in version("omnissm").split(".")[:2]):
        raise ValueError(
            f"{str(path)!r} was written by omnissm {config['omnissm']}, this is {version('omnissm')}."
            f' Update with: pip install "omnissm>={config["omnissm"]}"'
        )
    try:
        state = load_file(path / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{path / WEIGHTS} is damaged or cut off: {error}. Export the model again.") from error
    others = [file for file in sorted(path.iterdir()) if file.suffix in (".json", ".md", ".txt")]
    files = {file.name: file.read_text() for file in others if file.name not in (CONFIG, CARD)}
    return ModelFolder(path, _Entries(config, path / CONFIG), state, _Entries(files, path))


class _Entries(dict[str, Any]):
    """A dictionary that says where an entry is missing."""

    def __init__(self, entries: Mapping[str, Any], place: Path) -> None:
        super().__init__(entries)
        self.place = place

    def __missing__(self, name: str) -> Any:
        raise ValueError(f"{str(self.place)!r} lacks {name!r}; is the model folder whole?")


def read_checkpoint(path: str | os.PathLike, *, allow_pickle: bool = False) -> dict[str, Any]:
    """Read a training checkpoint (`.ckpt`) as plain data, never as code.

    Args:
        path: The file.
        allow_pickle: Also take `.bin`, `.pt`, `.pth` and `.pkl` files (tensors and plain values only, even then).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, holds more than plain data, or is a pickle and `allow_pickle` is False.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Checkpoint {str(path)!r} does not exist.")
    if path.suffix in _PICKLES and not allow_pickle:
        raise ValueError(f"{str(path)!r} is a pickle file. Give a .ckpt file or a model folder, or allow_pickle=True.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"Checkpoint {str(path)!r} is damaged, or holds more than plain values.") from error
    except PermissionError:
        raise
    except Exception as error:  # a damaged file makes the reader raise anything from IndexError to MemoryError
        raise ValueError(f"Checkpoint {str(path)!r} is damaged or cut off. Use another one of the run.") from error
    if not isinstance(content, dict):
        raise ValueError(f"Checkpoint {str(path)!r} holds a {type(content).__name__}, expected a dictionary.")
    return content


def export_checkpoint(path: str | os.PathLike, folder: str | os.PathLike, *, raw: bool = False) -> Path:
    """Turn a training checkpoint into a model folder; the task's class is not needed.

    Args:
        path: The `.ckpt` file.
        folder: The model folder to write.
        raw: Of a run with averaged weights, take the last ones instead of the average.

    Returns:
        The folder.

    Raises:
        ValueError: if the file does not come from a task of this package.
    """
    checkpoint = read_checkpoint(path)
    if "omnissm" not in checkpoint:
        raise ValueError(f"{str(path)!r} was not written by a task of this package; it cannot be exported.")
    about = checkpoint["omnissm"]
    return save_model_folder(folder, network_state(checkpoint, raw=raw), about["config"], about["files"])


def network_state(checkpoint: Mapping[str, Any], *, raw: bool = False) -> dict[str, Tensor]:
    """Weights of the task's network (`net.`) in a checkpoint's dictionary; the averaged ones if there are any."""
    state = checkpoint.get("current_model_state") if raw else None
    state = checkpoint["state_dict"] if state is None else state
    return {name.removeprefix("net."): tensor for name, tensor in state.items() if name.startswith("net.")}


def read_weights(path: str | os.PathLike, *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """Weights of a network from a model folder, a `.ckpt` file or a `.safetensors` file."""
    path = Path(path)
    if path.is_dir():
        return read_model_folder(path).state
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise FileNotFoundError(f"Weights {str(path)!r} do not exist.")
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{str(path)!r} is damaged or cut off: {error}.") from error
    checkpoint = read_checkpoint(path, allow_pickle=allow_pickle)
    return network_state(checkpoint) if "state_dict" in checkpoint else checkpoint


def load_weights(module: nn.Module, state: Mapping[str, Tensor], *, strict: bool = True, source: str = "file") -> str:
    """Copy weights into a module after comparing names and shapes.

    Args:
        module: Where to; on any device.
        state: Weights by name. A tied weight may be given under any one of its names.
        strict: Refuse any difference; else copy what fits.
        source: Where the weights come from, for messages.

    Returns:
        What did not fit, in one line; empty if everything did.

    Raises:
        ValueError: if `strict` and a name is missing or unknown or a shape differs.
    """
    own = module.state_dict(keep_vars=True)
    given = {id(own[name]) for name in state if name in own}
    differences = [
        f"`{name}` is {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    differences += [f"`{name}` is missing" for name in own if name not in state and id(own[name]) not in given]
    differences += [f"`{name}` is not in the model" for name in state if name not in own]
    shown = "; ".join(differences[:3]) + (f"; and {len(differences) - 3} more" if len(differences) > 3 else "")
    if differences and strict:
        raise ValueError(f"Weights of {source} do not fit the model: {shown}. Were its options the same?")
    fitting = {name: t for name, t in state.items() if name in own and t.shape == own[name].shape}
    module.load_state_dict(fitting, strict=False)
    return shown
