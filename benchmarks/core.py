"""Time training and decoding of a language model of 12 Mamba-2 layers beside transformers', and write core.json.

    python benchmarks/core.py [--device cpu|cuda] [--out FOLDER]

Training: forward, loss and backward under bfloat16 autocast (float32 on a CPU), both with the same sizes; transformers
runs its plain PyTorch path, as it does without its optional CUDA packages. What does not fit the memory says so.
Decoding: one symbol for each of a batch of sequences, on a GPU as the replay of a CUDA graph, beside the time to read
all parameters once and to read and write all states once. Mixers, on a CPU only: one layer forward, and forward and
backward, beside the same layer of transformers with the same weights.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # not there under PYTHONSAFEPATH

from run import Timer, copy_bandwidth, describe, folder_of, installed, write_json

from omnissm.ssmcore import SequenceModel
from omnissm.ssmcore.checkpoints import from_checkpoint
from omnissm.ssmcore.generate import RecordedStep

VOCABULARY = 512
SIZES = {
    "cuda": {"d_model": 768, "n_layer": 12, "length": 2048, "batches": (8, 1)},
    "cpu": {"d_model": 256, "n_layer": 2, "length": 512, "batches": (1,)},
}


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


def training_rows(device: torch.device, timer: Timer) -> list[dict[str, Any]]:
    size = SIZES[device.type]
    models: dict[str, Callable[[], nn.Module]] = {
        "omnissm": lambda: ours(size["d_model"], size["n_layer"]),
        "omnissm, activation checkpointing": lambda: ours(size["d_model"], size["n_layer"]),
    }
    if installed("transformers"):
        models["transformers"] = lambda: transformers_model(size["d_model"], size["n_layer"])
        models["transformers, activation checkpointing"] = models["transformers"]
    rows = []
    for batch in size["batches"]:
        ids = torch.randint(VOCABULARY, (batch, size["length"]), device=device)
        for name, build in models.items():
            torch.manual_seed(0)
            model = build().to(device).train()
            if name.endswith("checkpointing"):
                use_checkpointing(model)
            row = {"job": "training", "path": name, "batch": batch, "length": size["length"]}
            row["parameters"] = sum(p.numel() for p in model.parameters())
            rows.append(row)
            try:
                step = train_step(model, ids, device)
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                row["step_ms"] = timer(step)
                row["tokens_per_s"] = round(ids.numel() / row["step_ms"]["median"] * 1e3)
                if device.type == "cuda":
                    row["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
            except torch.OutOfMemoryError:
                row["skipped"] = "does not fit the memory of the device"
            print(row, flush=True)
            del model
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return rows


def use_checkpointing(model: nn.Module) -> None:
    if isinstance(model, SequenceModel):
        model.stack.set_grad_checkpointing()
    else:
        model.gradient_checkpointing_enable()


def _forward_and_backward(layer: nn.Module, x: torch.Tensor) -> None:
    layer(x).square().mean().backward()


def mixer_rows(timer: Timer) -> list[dict[str, Any]]:
    """One Mamba and one Mamba-2 layer of transformers' PyTorch path beside ours, float32."""
    from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

    one = {"num_hidden_layers": 1, "vocab_size": VOCABULARY, "use_cache": False}
    wide = Mamba2Config(hidden_size=256, state_size=64, head_dim=64, num_heads=8, n_groups=1, expand=2, **one)
    slim = MambaConfig(hidden_size=128, state_size=16, expand=2, **one)
    rows = []
    for name, length, model in (
        ("mamba2", 4096, Mamba2ForCausalLM(wide)),
        ("mamba", 2048, MambaForCausalLM(slim)),
    ):
        same = from_checkpoint(model.state_dict(), model.config.to_dict(), f"hf_{name}")
        layers = {"omnissm": same.stack.blocks[0].mixer, "transformers": model.backbone.layers[0].mixer}
        x = torch.randn(2, length, model.config.hidden_size)
        close = torch.allclose(layers["omnissm"](x), layers["transformers"](x), rtol=1e-3, atol=1e-4)
        if not close:
            raise SystemExit(f"the two {name} layers differ: not timed")
        for path, layer in layers.items():
            row = {"job": "mixer", "model": name, "path": path, "batch": 2, "length": length}
            with torch.no_grad():
                row["forward_ms"] = timer(partial(layer, x))
            row["step_ms"] = timer(partial(_forward_and_backward, layer, x))
            rows.append(row)
            print(row, flush=True)
    return rows


@torch.no_grad()
def decoding_row(model: nn.Module, batch: int, device: torch.device, timer: Timer, bandwidth: float) -> dict[str, Any]:
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
    row = {"job": "decoding", "path": "omnissm", "batch": batch, "step_ms": step_ms}
    return row | {"floor_ms": round(floor, 4), "tokens_per_s": rate}


def decoding_rows(device: torch.device, timer: Timer, bandwidth: float) -> list[dict[str, Any]]:
    size = SIZES[device.type]
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = ours(size["d_model"], size["n_layer"]).to(device, dtype).eval()
    rows = []
    for batch in (1, 64, 256) if device.type == "cuda" else (1,):
        rows.append(decoding_row(model, batch, device, timer, bandwidth) | {"dtype": str(dtype).removeprefix("torch.")})
        print(rows[-1], flush=True)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for DEVICE/core.json")
    parser.add_argument("--seconds", type=float, default=1.0, help="time to spend on each number")
    parser.add_argument("--jobs", nargs="+", default=["training", "decoding", "mixers"], help="what to time")
    parser.add_argument("--commit", help="commit to note, where the code is a copy without history")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    timer = Timer(device, options.seconds)
    about = describe(device, options.commit) | {"transformers": installed("transformers")}
    bandwidth = copy_bandwidth(timer)
    about["copy_gb_per_s"] = round(bandwidth / 1e9, 1)
    rows = training_rows(device, timer) if "training" in options.jobs else []
    rows += decoding_rows(device, timer, bandwidth) if "decoding" in options.jobs else []
    if "mixers" in options.jobs and device.type == "cpu":
        rows += mixer_rows(timer)
    write_json(options.out / folder_of(about["device"]) / "core.json", {**about, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
