"""Time training and decoding of a language model of 12 Mamba-2 layers beside transformers', and write core.json.

    python benchmarks/core.py [--device cpu|cuda] [--out FOLDER]

The file is written after each row. A run of the same commit on the same device goes on where an earlier one stopped;
`--again` starts anew. On a CPU times are processor time, of one thread unless --threads says otherwise.

Training: forward, loss and backward under bfloat16 autocast (float32 on a CPU), both with the same sizes; transformers
runs its plain PyTorch path, as it does without its optional CUDA packages. What does not fit the memory says so.
Decoding: one symbol for each of a batch of sequences, on a GPU as the replay of a CUDA graph, beside the time to read
all parameters once and to read and write all states once. Steps, on a GPU only: one position of `ssd` in place, a tenth
of a CUDA graph of ten calls, each with a state of its own, beside what it has to reach. Mixers, on a CPU only: one
layer forward, and forward and backward, beside the same layer of transformers with the same weights.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # not there under PYTHONSAFEPATH

from command import leave
from run import Timer, copy_bandwidth, describe, folder_of, installed, write_json

from omnissm.kernels import ssd_step_
from omnissm.ssmcore import SequenceModel
from omnissm.ssmcore.checkpoints import from_checkpoint
from omnissm.ssmcore.generate import RecordedStep

Row = dict[str, Any]
Case = tuple[Row, Callable[[], Row]]
JOBS = ("training", "decoding", "steps", "mixers")
LONG = 5e3  # milliseconds from which a run is repeated twice only
VOCABULARY = 512
STEPS = 10  # calls in one recorded graph
STEP_LIMITS = {1: 0.004, 64: 0.055, 256: 0.20}  # milliseconds of one call, by batch
SIZES = {
    "cuda": {"d_model": 768, "n_layer": 12, "length": 2048, "batches": (8, 1)},
    "cpu": {"d_model": 256, "n_layer": 2, "length": 512, "batches": (1,)},
}


class PatientTimer(Timer):
    """On a CPU processor time, and few runs of what takes long."""

    def __call__(self, run: Callable[[], Any]) -> dict[str, float]:
        if self.cache is not None or self.measure(run, 1)[0] < LONG:
            return super().__call__(run)
        low, high = sorted(self.measure(run, 2))
        return {"median": round((low + high) / 2, 4), "p20": round(low, 4), "p80": round(high, 4), "runs": 2}

    def measure(self, run: Callable[[], Any], count: int) -> list[float]:
        if self.cache is not None:
            return super().measure(run, count)
        times = []
        for _ in range(count):
            start = time.process_time()
            run()
            times.append((time.process_time() - start) * 1e3)
        return times


def ours(d_model: int, n_layer: int) -> nn.Module:
    return SequenceModel(d_model, n_layer, mixer="mamba2", vocab_size=VOCABULARY)


def transformers_model(d_model: int, n_layer: int) -> nn.Module:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    return Mamba2ForCausalLM(
        Mamba2Config(
            hidden_size=d_model, num_hidden_layers=n_layer, vocab_size=VOCABULARY, state_size=128, head_dim=64,
            num_heads=2 * d_model // 64, n_groups=1, expand=2, tie_word_embeddings=True, use_cache=False,
        )
    )  # fmt: skip


@contextlib.contextmanager
def precision(device: torch.device) -> Iterator[None]:
    with torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext():
        yield


def train_step(model: nn.Module, ids: torch.Tensor, device: torch.device) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad()
        with precision(device):
            found = model(ids)
            logits = found if isinstance(found, torch.Tensor) else found.logits
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()

    return step


def training_cases(device: torch.device, timer: Timer) -> Iterator[Case]:
    size = SIZES[device.type]
    builds: dict[str, Callable[..., nn.Module]] = {"omnissm": ours, "omnissm, activation checkpointing": ours}
    if installed("transformers"):
        builds["transformers"] = transformers_model
        builds["transformers, activation checkpointing"] = transformers_model
    for batch in size["batches"]:
        for path, build in builds.items():
            key = {"job": "training", "path": path, "batch": batch, "length": size["length"]}
            yield key, partial(training, build, key, device, timer)


def training(build: Callable[..., nn.Module], key: Row, device: torch.device, timer: Timer) -> Row:
    size = SIZES[device.type]
    torch.manual_seed(0)
    ids = torch.randint(VOCABULARY, (key["batch"], key["length"]), device=device)
    model = build(size["d_model"], size["n_layer"]).to(device).train()
    if key["path"].endswith("checkpointing"):
        use_checkpointing(model)
    row: Row = {"parameters": sum(p.numel() for p in model.parameters())}
    try:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        row["step_ms"] = timer(train_step(model, ids, device))
        row["tokens_per_s"] = round(ids.numel() / row["step_ms"]["median"] * 1e3)
        if device.type == "cuda":
            row["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
    except torch.OutOfMemoryError:
        row["skipped"] = "does not fit the memory of the device"
    return row


def use_checkpointing(model: nn.Module) -> None:
    if isinstance(model, SequenceModel):
        model.stack.set_grad_checkpointing()
    else:
        model.gradient_checkpointing_enable()


def _forward_and_backward(layer: nn.Module, x: torch.Tensor) -> None:
    layer(x).square().mean().backward()


def mixer_cases(device: torch.device, timer: Timer) -> Iterator[Case]:
    if device.type == "cpu" and installed("transformers"):
        for model, length in (("mamba2", 4096), ("mamba", 2048)):
            for path in ("omnissm", "transformers"):
                key = {"job": "mixer", "model": model, "path": path, "batch": 2, "length": length}
                yield key, partial(mixer, key, timer)


def mixer(key: Row, timer: Timer) -> Row:
    """One Mamba or Mamba-2 layer, ours or that of transformers' PyTorch path, with the same weights, float32."""
    from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    one = {"num_hidden_layers": 1, "vocab_size": VOCABULARY, "use_cache": False}
    if key["model"] == "mamba2":
        wide = Mamba2Config(hidden_size=256, state_size=64, head_dim=64, num_heads=8, n_groups=1, expand=2, **one)
        model = Mamba2ForCausalLM(wide)
    else:
        model = MambaForCausalLM(MambaConfig(hidden_size=128, state_size=16, expand=2, **one))
    same = from_checkpoint(model.state_dict(), model.config.to_dict(), f"hf_{key['model']}")
    layers = {"omnissm": same.stack.blocks[0].mixer, "transformers": model.backbone.layers[0].mixer}
    x = torch.randn(key["batch"], key["length"], model.config.hidden_size)
    with torch.no_grad():
        if not torch.allclose(layers["omnissm"](x), layers["transformers"](x), rtol=1e-3, atol=1e-4):
            return {"wrong": "the two layers differ"}
        forward = timer(partial(layers[key["path"]], x))
    return {"forward_ms": forward, "step_ms": timer(partial(_forward_and_backward, layers[key["path"]], x))}


def decoding_cases(device: torch.device, timer: Timer, bandwidth: float) -> Iterator[Case]:
    for batch in (1, 64, 256) if device.type == "cuda" else (1,):
        key = {"job": "decoding", "path": "omnissm", "batch": batch}
        yield key, partial(decoding, batch, device, timer, bandwidth)


@torch.no_grad()
def decoding(batch: int, device: torch.device, timer: Timer, bandwidth: float) -> Row:
    size, dtype = SIZES[device.type], torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    model = ours(size["d_model"], size["n_layer"]).to(device, dtype).eval()
    symbols = torch.zeros(batch, dtype=torch.long, device=device)
    state = model.init_state(batch)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    floor = (weights + 2 * state.nbytes) / bandwidth * 1e3
    if device.type == "cuda":
        recorded = RecordedStep(model, symbols, state)
        step_ms = timer(lambda: recorded(symbols))
    else:
        step_ms = timer(lambda: model.step(symbols, state))
    rate = round(batch / step_ms["median"] * 1e3)
    row = {"step_ms": step_ms, "floor_ms": round(floor, 4), "tokens_per_s": rate}
    return row | {"dtype": str(dtype).removeprefix("torch.")}


def step_cases(device: torch.device, timer: Timer, bandwidth: float) -> Iterator[Case]:
    if device.type == "cuda":
        for batch, limit in STEP_LIMITS.items():
            key = {"job": "step", "op": "ssd_step", "batch": batch, "h": 32, "p": 64, "n": 128, "required_ms": limit}
            yield key, partial(step, key, device, timer, bandwidth)


@torch.no_grad()
def step(key: Row, device: torch.device, timer: Timer, bandwidth: float) -> Row:
    batch, h, p, n = (key[name] for name in ("batch", "h", "p", "n"))
    like: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    x, B, C = (torch.randn(*size, **like) for size in ((batch, h, p), (batch, 1, n), (batch, 1, n)))
    weight, D = torch.rand(batch, h, device=device), torch.ones(h, device=device)
    log_decay, states = -weight, torch.randn(STEPS, batch, h, p, n, device=device)

    def run() -> None:
        for state in states:
            ssd_step_(x, log_decay, B, C, state, weight=weight, D=D)

    run()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        run()
    of_all = timer(graph.replay)
    of_one = {name: round(of_all[name] / STEPS, 5) for name in ("median", "p20", "p80")}
    floor = 2 * states[0].nbytes / bandwidth * 1e3
    return {"step_ms": of_one | {"runs": of_all["runs"]}, "floor_ms": round(floor, 5)}


def cases(jobs: Sequence[str], device: torch.device, timer: Timer, bandwidth: float) -> Iterator[Case]:
    """What to time: what a row is about, and the function that measures it."""
    if "training" in jobs:
        yield from training_cases(device, timer)
    if "decoding" in jobs:
        yield from decoding_cases(device, timer, bandwidth)
    if "steps" in jobs:
        yield from step_cases(device, timer, bandwidth)
    if "mixers" in jobs:
        yield from mixer_cases(device, timer)


def kept(path: Path, about: Row) -> list[Row]:
    """Rows of an earlier run of the same code on the same device; the bandwidth is measured anew each time."""
    if not path.is_file():
        return []
    earlier = json.loads(path.read_text())
    return earlier["rows"] if all(earlier.get(key) == value for key, value in about.items()) else []


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for DEVICE/core.json")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on the CPU")
    parser.add_argument("--seconds", type=float, default=1.0, help="time to spend on each number")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS), help="what to time")
    parser.add_argument("--again", action="store_true", help="keep no row of an earlier run")
    parser.add_argument("--commit", help="commit to note, where the code is a copy without history")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    timer = PatientTimer(device, options.seconds)
    about = describe(device, options.commit) | {"transformers": installed("transformers")}
    path = options.out / folder_of(about["device"]) / "core.json"
    rows = [] if options.again else kept(path, about)
    bandwidth = copy_bandwidth(timer)
    for key, measure in cases(options.jobs, device, timer, bandwidth):
        if any(key.items() <= row.items() for row in rows):
            continue
        rows.append(key | measure())
        print(rows[-1], flush=True)
        write_json(path, {**about, "copy_gb_per_s": round(bandwidth / 1e9, 1), "rows": rows})
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return int(any("wrong" in row for row in rows))


if __name__ == "__main__":
    leave(main)
