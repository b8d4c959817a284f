"""Time vision models beside timm's in one run and write results/DEVICE/vision.json.

    python benchmarks/vision.py [--device cpu|cuda] [--threads 1] [--sizes 224 384 768] [--quick]

On a CPU: batch 8, float32, processor time. On a GPU: bfloat16 autocast, batch 128 at 224 and as many pixels at other
sizes, plain and compiled, wall time. TF32 is as torch sets it by default.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # not there under PYTHONSAFEPATH

from run import describe, folder_of, write_json

from omnissm.vision.timing import time_model

OURS = (
    "hydra_vit_tiny_patch16_224",
    "vim_tiny_patch16_224",
    "lbvim_tiny_patch16_224",
    "chimera_vit_tiny_patch16_224",
    "vmamba_tiny_s1l8",
    "mambavision_tiny",
)
PEERS = ("deit_tiny_patch16_224", "mambaout_femto", "convnext_tiny")
ON_GPU = ("hydra_vit_small_patch16_224", "vit_small_patch16_224", "mambaout_tiny")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on the CPU")
    parser.add_argument("--sizes", type=int, nargs="+", default=None, help="sides of the images, pixels")
    parser.add_argument("--models", nargs="+", default=None, help="names; default a few of each family and of timm")
    parser.add_argument("--quick", action="store_true", help="no compiled runs")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for DEVICE/vision.json")
    parser.add_argument("--commit", help="commit to note, where the code is a copy without history")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    gpu = device.type == "cuda"
    names = options.models or [*PEERS, *OURS, *(ON_GPU if gpu else ())]
    sizes = options.sizes or ([224, 384, 768] if gpu else [224])
    rows = []
    for size in sizes:
        for name in names:
            for compiled in (False, True) if gpu and not options.quick and size == 224 else (False,):
                batch = max(1, round(128 * (224 / size) ** 2)) if gpu else 8
                try:
                    row = time_model(name, device=device, batch_size=batch, image_size=size, bf16=gpu, compile=compiled)
                except torch.OutOfMemoryError:
                    row = {
                        "model": name,
                        "image_size": size,
                        "batch_size": batch,
                        "compile": compiled,
                        "failed": "memory",
                    }
                rows.append(row)
                print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
                gc.collect()
                if gpu:
                    torch.cuda.empty_cache()
    about = describe(device, options.commit)
    write_json(
        options.out / folder_of(about["device"]) / "vision.json", {**about, "threads": options.threads, "rows": rows}
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
