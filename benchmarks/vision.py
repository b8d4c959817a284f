"""Time vision models beside timm's in one run and write results/DEVICE/vision.json.

    python benchmarks/vision.py [--device cpu|cuda] [--threads 1] [--sizes 224 384 768] [--quick] [--seconds 270]
    python benchmarks/vision.py plot [--file results/DEVICE/vision.json]

On a CPU: batch 8, float32, processor time, the best of eleven. On a GPU: bfloat16 autocast, batch 128 at 224 and as
many pixels at other sizes, wall time, plain (inference and training) and compiled (inference). TF32 is as torch sets
it by default.

The file is written after each row, what matters most first. A run of the same commit on the same device goes on where
an earlier one stopped; `--again` starts anew. `plot` draws throughput and memory against the size of the images.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # not there under PYTHONSAFEPATH

from command import leave
from run import describe, folder_of, write_json

from omnissm.vision.timing import time_model

# The first two are timed at all sizes before the others.
ON_CPU = (
    "deit_tiny_patch16_224",
    "hydra_vit_tiny_patch16_224",
    "vim_tiny_patch16_224",
    "vmamba_tiny_s1l8",
    "mambaout_femto",
    "lbvim_tiny_patch16_224",
    "chimera_vit_tiny_patch16_224",
    "mambavision_tiny",
    "convnext_tiny",
)
ON_GPU = (
    "hydra_vit_small_patch16_224",
    "vit_small_patch16_224",
    "vmamba_tiny_s1l8",
    "swin_tiny_patch4_window7_224",
    "convnext_tiny",
    "mambaout_tiny",
)
ONE_SIZE = {"swin_tiny_patch4_window7_224"}  # beside which VMamba's authors give their speed, at 224
PICTURE = HERE.parent / "docs" / "images" / "vision_sizes.png"
Case = tuple[str, int, bool]  # model, side of the images, compiled


def cases(names: tuple[str, ...], sizes: list[int], compiled: bool) -> list[Case]:
    """What to time, the most important first."""
    pair, others = names[:2], names[2:]
    by_size = [sizes[0], *sorted(sizes[1:], reverse=True)]
    ways = (False, True) if compiled else (False,)
    found = [(name, size, way) for size in by_size for way in ways for name in pair]
    found += [(name, sizes[0], way) for way in ways for name in others]
    return found + [
        (name, size, way) for way in ways for size in by_size[1:] for name in others if name not in ONE_SIZE
    ]


def measure(case: Case, device: torch.device) -> dict[str, Any]:
    """One row; a model that does not fit has the key `failed`."""
    name, size, compiled = case
    gpu = device.type == "cuda"
    batch = max(1, round(128 * (224 / size) ** 2)) if gpu else 8
    try:
        return time_model(
            name,
            device=device,
            batch_size=batch,
            image_size=size,
            bf16=gpu,
            compile=compiled,
            training=not compiled,
            repeats=3 if gpu else 10,
        )
    except torch.OutOfMemoryError:
        return {"model": name, "batch_size": batch, "image_size": size, "compile": compiled, "failed": "memory"}
    finally:
        gc.collect()
        if gpu:
            torch.compiler.reset()
            torch.cuda.empty_cache()


def plot(path: Path, picture: Path) -> None:
    """Draw throughput and peak memory of inference against the side of the images."""
    from matplotlib.figure import Figure

    content = json.loads(path.read_text())
    rows = [row for row in content["rows"] if "failed" not in row]
    names = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    keys = {"inference_images_per_s": "images per second", "inference_peak_mb": "peak memory, MB"}
    for axis, (key, label) in zip(axes, keys.items(), strict=True):
        for number, name in enumerate(names):
            for compiled in (False, True):
                points = sorted(
                    (row["image_size"], row[key])
                    for row in rows
                    if row["model"] == name and row["compile"] == compiled and row.get(key) is not None
                )
                if points:
                    axis.plot(
                        *zip(*points, strict=True),
                        marker="o",
                        markersize=4,
                        color=f"C{number}",
                        linestyle="--" if compiled else "-",
                        label=name + (", compiled" if compiled else ""),
                    )
        sizes = sorted({row["image_size"] for row in rows})
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        axis.set_xlabel("side of the images, pixels")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[1].set_ylim(bottom=0)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="x-small")
    figure.suptitle(f"{content['device']}, as many pixels in a batch at every size", fontsize="medium")
    picture.parent.mkdir(parents=True, exist_ok=True)
    temporary = picture.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120)
    temporary.replace(picture)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("time", "plot"), nargs="?", default="time")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on the CPU")
    parser.add_argument("--sizes", type=int, nargs="+", default=None, help="sides of the images, pixels")
    parser.add_argument("--models", nargs="+", default=None, help="names; default a few of ours and of timm's")
    parser.add_argument("--quick", action="store_true", help="no compiled runs")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row after this time")
    parser.add_argument("--again", action="store_true", help="keep no row of an earlier run")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for DEVICE/vision.json")
    parser.add_argument("--file", type=Path, help="result file to plot; default that of this device in --out")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="where to plot")
    parser.add_argument("--commit", help="commit to note, where the code is a copy without history")
    options = parser.parse_args(argv)
    begin = time.perf_counter()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    gpu = device.type == "cuda"
    about = {**describe(device, options.commit), "threads": options.threads}
    path = options.file or options.out / folder_of(about["device"]) / "vision.json"
    if options.job == "plot":
        if not path.is_file():
            parser.error(f"there is no {path}; measure first, or name a file with --file.")
        plot(path, options.picture)
        return 0
    names = tuple(options.models or (ON_GPU if gpu else ON_CPU))
    todo = cases(names, options.sizes or ([224, 384, 768] if gpu else [224]), gpu and not options.quick)
    rows: list[dict[str, Any]] = []
    if path.is_file() and not options.again:
        earlier = json.loads(path.read_text())
        rows = earlier.pop("rows") if {**about, "rows": None} == {**earlier, "rows": None} else []
    done = {(row["model"], row["image_size"], row["compile"]) for row in rows}
    for case in todo:
        if case in done:
            continue
        if time.perf_counter() - begin > options.seconds:
            print(f"out of time with {sum(one not in done for one in todo)} rows to go; run again to go on")
            break
        row = measure(case, device)
        rows.append(row)
        done.add(case)
        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
        write_json(path, {**about, "rows": rows})
    return 0


if __name__ == "__main__":
    leave(main)
