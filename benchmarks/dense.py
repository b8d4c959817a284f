"""Time segmenters and detectors beside torchvision's and write results/DEVICE/dense.json.

    python benchmarks/dense.py [--device cpu|cuda] [--threads 1] [--only NAME ...]

The models are those of configs/vision/NAME.yaml, untrained, at their image size. A call takes images in [0, 1] and ends
with the class of each pixel, or with boxes after suppression. On a CPU: one image, float32, processor time, best of the
repeats. On a GPU: bfloat16 autocast, one image and a batch, wall time, best of the repeats of several calls. Untrained
detectors find many unsure boxes; the threshold of 0.3 leaves few, as in use.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # not there under PYTHONSAFEPATH

from command import leave
from run import describe, folder_of, write_json

from omnissm.vision.tasks import normalized

CONFIGS = {
    "segment_wbc": 64,
    "segment_wbc_lraspp": 64,
    "segment_wbc_deeplab": 64,
    "detect_bccd": 16,
    "detect_bccd_fcos": 16,
    "detect_bccd_ssdlite": 16,
}
CLASSES = 3


def create(name: str) -> tuple[Any, tuple[int, int], bool]:
    """Network of a configuration, its image size, and whether it finds boxes."""
    content = yaml.safe_load((HERE.parent / "configs" / "vision" / f"{name}.yaml").read_text())
    module, _, kind = content["model"]["class_path"].rpartition(".")
    options = {k: v for k, v in content["model"]["init_args"].items() if k not in ("optimizer", "lr_scheduler")}
    size = content["data"]["init_args"]["image_size"]
    rows, columns = (size, size) if isinstance(size, int) else size
    if kind == "Detection":
        options["image_size"] = (rows, columns)
    task = getattr(import_module(module), kind)(num_classes=CLASSES, **options)
    return task.net.eval(), (rows, columns), kind == "Detection"


def seconds(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Best seconds of one call."""
    best, gpu = float("inf"), device.type == "cuda"
    calls = 10 if gpu else 1
    for _ in range(3 if gpu else 1):
        call()
    for _ in range(repeats):
        if gpu:
            torch.cuda.synchronize()
        begin = time.perf_counter() if gpu else time.process_time()
        for _ in range(calls):
            call()
        if gpu:
            torch.cuda.synchronize()
        best = min(best, ((time.perf_counter() if gpu else time.process_time()) - begin) / calls)
    return best


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on the CPU")
    parser.add_argument("--only", nargs="+", default=list(CONFIGS), choices=list(CONFIGS), help="configurations")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for DEVICE/dense.json")
    parser.add_argument("--commit", help="commit to note, where the code is a copy without history")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    gpu = device.type == "cuda"
    rows = []
    for name in options.only:
        torch.manual_seed(0)
        net, size, boxes = create(name)
        net.to(device)
        for batch in (1, CONFIGS[name]) if gpu else (1,):
            images = torch.rand(batch, 3, *size, device=device)

            def call(net: Any = net, images: torch.Tensor = images, boxes: bool = boxes) -> Any:
                autocast = torch.autocast("cuda", torch.bfloat16) if gpu else contextlib.nullcontext()
                with torch.inference_mode(), autocast:
                    seen = normalized(images, net)
                    return net.detect(seen, 0.3) if boxes else net(seen).argmax(1)

            if gpu:
                torch.cuda.reset_peak_memory_stats()
            each = seconds(call, device, options.repeats) / batch
            row = {
                "model": name,
                "parameters": sum(p.numel() for p in net.parameters()),
                "image_size": list(size),
                "batch_size": batch,
                "ms_per_image": round(each * 1e3, 4),
                "images_per_s": round(1 / each, 2),
                "peak_mb": round(torch.cuda.max_memory_allocated() / 2**20, 1) if gpu else None,
            }
            rows.append(row)
            print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    about = describe(device, options.commit)
    content = {**about, "threads": options.threads, "bf16": gpu, "rows": rows}
    write_json(options.out / folder_of(about["device"]) / "dense.json", content)
    return 0


if __name__ == "__main__":
    leave(main)
