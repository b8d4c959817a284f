"""Time series: training times, backtests, anomalies on NAB, classes on two UEA sets, lags, coverage and gaps.

    python benchmarks/timeseries.py nab --root data/nab
    python benchmarks/timeseries.py classes --root data/uea --seeds 0 1 2
    python benchmarks/timeseries.py lags
    python benchmarks/timeseries.py coverage --run runs/weather
    python benchmarks/timeseries.py gaps --seeds 0 1 2
    python benchmarks/timeseries.py epoch --root data/ett [--peer /tmp/nf/bin/python]
    python benchmarks/timeseries.py backtest --root data/ett
    python benchmarks/timeseries.py wide --device cuda

Each writes benchmarks/results/timeseries/NAME.json, and prints it. `--peer` names a Python with neuralforecast; an
epoch of its iTransformer is then timed in the same run.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # not there under PYTHONSAFEPATH

from command import leave

from omnissm.ssmcore.training import write_atomic
from omnissm.timeseries import Forecaster, anomalies, create_model, evaluate
from omnissm.timeseries.conformal import track_intervals
from omnissm.timeseries.data import ETT, create_synthetic, read_nab
from omnissm.timeseries.data.nyc_weather import read_nyc_weather
from omnissm.timeseries.forecast import load, run_data
from omnissm.timeseries.imputation import METHODS, compare_imputations, hide_blocks
from omnissm.timeseries.windows import WindowBatch

RESULTS = HERE / "results" / "timeseries"
NAB = (
    "nyc_taxi",
    "machine_temperature_system_failure",
    "ambient_temperature_system_failure",
    "ec2_request_latency_system_failure",
    "art_daily_jumpsup",
)
NORMAL = 0.4  # first share of a series of NAB, on which models are trained and thresholds set
_Case = tuple[str, dict[str, Any], str]  # model, its options, precision of a step
PEER = Path(__file__).resolve().parent / "peers" / "neuralforecast_epoch.py"


def nab(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Scores of one-step residuals beside rolling z-scores and random ones, on what follows the normal part."""
    rows = []
    for name in NAB:
        ds = read_nab(arguments.root, name)
        first = int(NORMAL * ds.sizes["time"])
        normal, simple = ds.drop_vars("label").isel(time=slice(0, first)), anomalies.rolling_z_scores(ds)
        scores = {"rolling z-score": simple}
        for model in ("ridge", "chimera_tiny"):
            options = {"steps": 48} if model == "ridge" else {}
            fitted = Forecaster(model, lookback=96, horizon=1, fill="forward", model_args=options)
            fitted.fit(normal, val=0.25, max_epochs=3, coverages=None, progress=False)
            residual = anomalies.forecast_scores(fitted, ds.drop_vars("label"))
            scores[model] = anomalies.residual_scores(residual, residual.isel(time=slice(0, first)))
        found = {}
        for label, score in scores.items():
            each = anomalies.detect(score, score.isel(time=slice(0, first)))
            found[label] = (each["score"].isel(time=slice(first, None)), each["threshold"])
        found["random"] = (anomalies.random_scores(found["ridge"][0]), None)
        table = anomalies.compare_scores(anomalies.flags_of(ds).isel(time=slice(first, None)), found)
        rows += [{"series": name, **row} for row in table.round(4).to_dict("records")]
    return rows


def classes(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Accuracy of the shipped configurations."""
    for name in ("basic_motions", "japanese_vowels"):
        for seed in arguments.seeds:
            words = ["--data.init_args.root", str(arguments.root), "--seed_everything", str(seed)]
            yield {"set": name, "seed": seed, **_fitted(f"timeseries/sequence_classifier_{name}", words)}


def lags(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Errors on variates that repeat one another after a lag, with and without mixing of variates."""
    for mix in (True, False):
        for seed in arguments.seeds:
            words = ["--model.init_args.model_args.mixer", f"{{mix_variates: {str(mix).lower()}}}"]
            words += ["--seed_everything", str(seed)]
            yield {"mix_variates": mix, "seed": seed, **_fitted("timeseries/chimera_tiny_lagged_graph", words)}


def _fitted(config: str, words: list[str]) -> dict[str, Any]:
    """Test metrics of a configuration with further options, parameters, and CPU seconds of fit and test."""
    from omnissm.__main__ import main

    with tempfile.TemporaryDirectory() as scratch:
        run = ["--run", f"{scratch}/run", "--trainer.enable_progress_bar", "false"]
        began = time.process_time()
        for verb, more in (("fit", ["-c", config, *words]), ("test", [])):
            if main(["timeseries", verb, *more, *run]):
                raise SystemExit(1)
        seconds = round(time.process_time() - began, 1)
        found = json.loads(Path(scratch, "run", "metrics.json").read_text())
    values = {key.removeprefix("test/"): round(value, 4) for key, value in found["metrics"].items()}
    return values | {"parameters": found["parameters"], "cpu_s": seconds}


def coverage(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Coverage of the intervals of a run on its test part: as calibrated on the validation part, and tracked."""
    model, (ds, test) = load(arguments.run), run_data(arguments.run)
    result = model.backtest(ds.isel(time=slice(0, test.stop)), test.start, progress=False)
    rows = []
    for label, each in (("split", result), ("tracked", track_intervals(result, arguments.rate))):
        for level in (0.5, 0.8, 0.9, 0.95):
            names = (f"coverage@{level}", f"interval_width@{level}")
            by = evaluate(each, names, "variate")
            whole = float(evaluate(each, names[0], ())[names[0]])
            worst = [float(by[names[0]].min()), float(by[names[0]].max())]
            rows.append({"intervals": label, "nominal": level, "coverage": round(whole, 4)})
            rows[-1] |= {"least_and_most_of_a_variate": [round(value, 4) for value in worst]}
    return rows


def gaps(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Errors at gaps, in standard deviations: where high values go missing, and at hidden blocks of weather."""
    rows = []
    for seed in arguments.seeds:
        dark = create_synthetic("blackout", length=500, n_variates=3, seed=seed)
        weather = read_nyc_weather(stations=["JFK"]).isel(time=slice(1000, 1600))
        hidden, truth = hide_blocks(weather, 0.15, 8, seed)
        sets = {"blackout": (dark, dark["truth"].where(dark["target"].isnull())), "nyc_weather": (hidden, truth)}
        for name, (gappy, wanted) in sets.items():
            table = compare_imputations(wanted, {method: fill(gappy) for method, fill in METHODS.items()})
            rows += [{"set": name, "seed": seed, **row} for row in table.round(4).to_dict("records")]
    return rows


def epoch(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of a training epoch on ETTh1, 96 to 96, batches of 32 windows, without validation."""
    torch.set_num_threads(1)
    data = ETT(str(arguments.root), lookback=96, horizon=96)
    batches = list(data.windows("train").batches(32))
    rows = []
    for name, options in (("chimera_tiny", {}), ("chimera_small", {}), ("i_transformer", {"d_model": 96})):
        torch.manual_seed(0)
        model = create_model(name, lookback=96, horizon=96, n_variates=data.n_variates, **options)
        step = _training_step(model, torch.optim.AdamW(model.parameters(), 1e-3))
        step(batches[0])
        wall, cpu = time.perf_counter(), time.process_time()
        for batch in batches[:: arguments.every]:
            step(batch)
        share = len(batches) / len(batches[:: arguments.every])
        row = {"model": name, "wall_s": (time.perf_counter() - wall) * share}
        row |= {"cpu_s": (time.process_time() - cpu) * share, "steps": len(batches), "timed": 1 / share}
        rows.append({**row, "parameters": sum(p.numel() for p in model.parameters())})
    if arguments.peer:
        command = [arguments.peer, str(PEER), str(arguments.root), str(len(batches)), str(arguments.every)]
        rows.append(
            json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        )
    return rows


def backtest(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of a backtest over 2,000 origins of ETTh1, 96 to 96."""
    torch.set_num_threads(1)
    ds = ETT(str(arguments.root)).read()
    rows = []
    for name in ("chimera_tiny", "chimera_small"):
        model = Forecaster(name, lookback=96, horizon=96, max_steps=2)
        model.fit(ds.isel(time=slice(0, 2000)), max_epochs=1, progress=False)
        wall, cpu = time.perf_counter(), time.process_time()
        result = model.backtest(ds.isel(time=slice(0, 11520 + 2000 + 95)), start=11520, progress=False)
        row = {"model": name, "origins": result.sizes["cutoff"], "wall_s": time.perf_counter() - wall}
        rows.append({**row, "cpu_s": time.process_time() - cpu})
    return rows


def wide(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A training step on 321 variates, 96 steps to 96, batches of 32 windows, beside attention over the same tokens."""
    cases: list[_Case] = [
        (name, options, precision)
        for name, options in (
            ("patch_tst", {"n_layer": 3, "d_model": 128}),  # the same tokens: 12 patches of 16 steps for each variate
            ("chimera_base", {}),
            ("s_mamba", {"d_model": 512, "d_ff": 512, "d_state": 16, "n_layer": 3}),
            ("chimera_base", {"mixer": {"coupling": "pooled"}}),
            ("chimera_base", {"mixer": {"mix_variates": False}}),
        )
        for precision in ("float32", "bfloat16")
    ]
    compiled = [case for case in cases if case[0] != "patch_tst"]
    for case in cases:
        if case == compiled[0]:
            _compile(compiled, arguments)
        yield _wide_row(case, arguments, arguments.repeat)


def _compile(cases: list[_Case], arguments: argparse.Namespace) -> None:
    """One step of each in processes beside each other, so that the kernels of all of them are built at once."""
    if arguments.device == "cpu":
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(cases), mp_context=context) as pool:
        list(pool.map(_wide_row, cases, [arguments] * len(cases), [0] * len(cases)))


def _wide_row(case: _Case, arguments: argparse.Namespace, repeat: int) -> dict[str, Any]:
    name, options, precision = case
    device, variates = torch.device(arguments.device), arguments.variates
    row: dict[str, Any] = {"model": name, "options": options, "precision": precision}
    torch.manual_seed(0)
    try:
        x, y = (torch.randn(arguments.batch, variates, 96, device=device) for _ in range(2))
        seen = torch.ones_like(x, dtype=torch.bool)
        batch = WindowBatch(x, seen, y, seen, *[None] * 6)
        model = create_model(name, lookback=96, horizon=96, n_variates=variates, **options).to(device)
        step = _training_step(model, torch.optim.AdamW(model.parameters(), 1e-3), precision)
        row |= _measure(lambda: step(batch), device, repeat)
    except RuntimeError as error:  # no memory, or a model that does not run there
        return row | {"failed": str(error).splitlines()[0][:200]}
    return row | {"parameters": sum(p.numel() for p in model.parameters())}


def _training_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, precision: str = "float32"
) -> Callable[[WindowBatch], None]:
    def step(batch: WindowBatch) -> None:
        with torch.autocast(batch.x.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = (model(batch) - batch.y).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _measure(run: Callable[[], None], device: torch.device, repeat: int) -> dict[str, float]:
    """Median milliseconds, and the most memory on a GPU; after a first call, and nothing without `repeat`."""
    run()
    if not repeat:
        return {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeat):
        _wait(device)
        began = time.perf_counter()
        run()
        _wait(device)
        seconds.append(time.perf_counter() - began)
    found = {"step_ms": round(1e3 * statistics.median(seconds), 2)}
    if device.type == "cuda":
        found["memory_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["nab", "classes", "lags", "coverage", "gaps", "epoch", "backtest", "wide"])
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of the data")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--run", type=Path, help="folder of a run")
    parser.add_argument("--rate", type=float, default=0.05, help="of the tracked intervals")
    parser.add_argument("--peer", help="a Python with neuralforecast")
    parser.add_argument("--every", type=int, default=1, help="time every so many batches of the epoch, and scale up")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--variates", type=int, default=321)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder of the result, by default that of the repository")
    arguments = parser.parse_args()
    if arguments.what == "coverage" and arguments.run is None:
        parser.error("coverage needs --run FOLDER")
    gpu = arguments.what == "wide" and arguments.device == "cuda"
    about: dict[str, Any] = {
        "command": f"python benchmarks/timeseries.py {arguments.what}",
        "device": torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rows": [],
    }
    out = (arguments.out or RESULTS) / f"{arguments.what}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    for row in globals()[arguments.what](arguments):
        about["rows"].append(row)
        write_atomic(out, json.dumps(about, indent=1) + "\n")  # with each row: what was measured outlives a kill
    print(pd.DataFrame(about["rows"]).to_string(index=False))


if __name__ == "__main__":
    leave(main)
