"""The quick start: a model for directed acyclic graphs learns to add up paths, beside one that passes messages."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np

from ..ssmcore.training.checkpoints import write_atomic
from ..ssmcore.training.report import markdown_table, run_verb, write_summary

__all__ = ["demo"]

CONFIG, NODES = "graphs/dag_ssm_tiny_synthetic", 12
KIND: Final = "path_sum"
BASELINE = ("--model.init_args.model", "gine", "--model.init_args.model_args", '{"d_model": 32, "n_layer": 4}')


def demo(out: Path = Path("demo"), epochs: int = 20, samples: int = 4096, seed: int = 0) -> int:
    """Train a model of directed acyclic graphs on a regression whose exact answer is known, and draw what it reads.

    The graphs are drawn at random. Files in the folder that an earlier demo wrote are replaced.

    Args:
        out: Folder for the runs, predictions.csv, pictures, summary.md and report.html.
        epochs: Passes over the training graphs.
        samples: Training graphs.
        seed: Of weights and order.

    Returns:
        0, or 1 if the model is no better than a message-passing network (GINE) trained alike.

    Raises:
        ImportError: if matplotlib is missing; the line says what to install.

    Example:
      omnissm demo graphs --out demo
    """
    if find_spec("matplotlib") is None:
        raise ImportError('the demo needs matplotlib; run: pip install "omnissm[demo]"')
    out.mkdir(parents=True, exist_ok=True)
    options = ["--data.init_args.train_samples", samples, "--trainer.max_epochs", epochs, "--seed_everything", seed]
    options += ["--trainer.enable_progress_bar", "false"]
    model, baseline = _train(out / "run", options), _train(out / "baseline", [*options, *BASELINE])
    drawn = ("--synthetic", KIND, "--checkpoint", out / "run", "--node", NODES - 1)
    run_verb("graphs", "plot", *drawn, "--out", out / "influence.png")
    answers = _answers(out)
    write_atomic(out / "predictions.csv", "exact,predicted\n" + "".join(f"{y:.5f},{f:.5f}\n" for y, f in answers))
    _draw(out / "predictions.png", answers)
    spread = float(answers[:, 0].std())
    rows = [
        {"method": "dag_ssm_tiny, one layer", **model},
        {"method": "gine, four layers", **baseline},
        {"method": "always the mean", "RMSE": spread, "Pearson": "", "parameters": 0},
    ]
    better = model["RMSE"] < baseline["RMSE"]
    write_summary(out, _summary(rows, better, epochs, samples, len(answers)))
    return int(not better)


def _train(folder: Path, options: list[Any]) -> dict[str, Any]:
    """Fit and test by the command line; the test part's figures."""
    run = str(folder) if "/" in str(folder) else f"./{folder}"  # with a slash it is no name below runs/
    run_verb("graphs", "fit", "-c", CONFIG, *options, "--run", run, "--overwrite")
    run_verb("graphs", "test", "--run", run, "--trainer.enable_progress_bar", "false")
    found = json.loads((folder / "metrics.json").read_text())
    values = found["metrics"]
    return {"RMSE": values["test/rmse"], "Pearson": values["test/pearson"], "parameters": found["parameters"]}


def _answers(out: Path) -> np.ndarray:
    """Exact and predicted values of all test graphs, (n, 2), by the verb that predicts."""
    import torch
    from safetensors.torch import load_file

    from .data import SyntheticGraphs

    run = str(out / "run") if "/" in str(out / "run") else f"./{out / 'run'}"
    run_verb("graphs", "predict", "--run", run, "--trainer.enable_progress_bar", "false")
    values = load_file(out / "run" / "predictions.safetensors")["prediction"]
    exact = torch.cat([graph.y for graph in SyntheticGraphs(KIND).read_parts()["test"] if graph.y is not None])
    known = exact.isfinite()
    return torch.stack([exact[known], values[known]], dim=1).double().numpy()


def _draw(out: Path, answers: np.ndarray) -> None:
    """Predicted against exact values, and the line on which both are the same."""
    from matplotlib.figure import Figure

    from .plots import save

    figure = Figure(figsize=(5.2, 4.6), layout="constrained")
    axes = figure.subplots()
    ends = [answers.min(), answers.max()]
    axes.plot(ends, ends, color="#7b8794", linewidth=1, label="exactly right")
    axes.plot(answers[:, 0], answers[:, 1], ".", color="C0", alpha=0.6, label="a test graph")
    axes.set_xlabel("exact sum over all paths")
    axes.set_ylabel("what the model says")
    axes.legend(frameon=False)
    save(figure, out)


def _summary(rows: list[dict[str, Any]], better: bool, epochs: int, samples: int, count: int) -> str:
    """The page a person reads."""
    model, baseline, mean = (row["RMSE"] for row in rows)
    shown = [{key: f"{value:.4f}" if isinstance(value, float) else value for key, value in row.items()} for row in rows]
    verdict = "better than" if better else "NOT better than"
    return f"""# Graphs: a regression on directed acyclic graphs

A one-layer state-space model finds the sum over all paths in {count} unseen graphs with an error (RMSE) of {model:.3f},
{verdict} a message-passing network (GINE) trained alike ({baseline:.3f}); the mean as the only answer is off by
{mean:.3f}.

{markdown_table(shown)}
Each graph has {NODES} nodes and edges that only lead forwards, each edge with one of four labels that stand for the
factors 1/4, 1/2, 3/4 and 1. A path from one of the two first nodes to the last is worth the product of its factors, and
the answer is the sum over all paths, which may be dozens. The model sees nodes, edges and labels, never the factors,
and learns from {samples:,} random graphs in {epochs} passes. **RMSE** is the root of the mean squared error, lower is
better; **Pearson** is the correlation with the exact answer, 1 is perfect. The graphs are made up so that the exact
answer is known, and a scan passes sums along edges by its nature: this is a task that suits it. The other network
passes messages along the edges, labels included, as often as it has layers; its settings were not tuned.

![Predicted against exact sums.](predictions.png)

Each dot is a test graph. On the grey line the prediction is exact; the further from it, the worse.

![A graph by levels, and the influence of its nodes on each other.](influence.png)

One graph as the model reads it. Left: nodes in columns by level, for edges only lead to the right; colour shows how
much each node weighs in the output of the last node, number {NODES - 1} with the red ring, whose value is asked for.
Paths begin at nodes 0 and 1: node 0 has an edge to the last node and should stand out, node 1 reaches it by detours
only and should weigh less. Right: the same for all pairs of nodes; a bright cell says that the output of its row's node
depends on the input of its column's node. It is dark above the diagonal: nothing flows backwards.

The commands, in the folder of this page:

    omnissm graphs fit -c {CONFIG} --trainer.max_epochs {epochs} --run ./run
    omnissm graphs test --run ./run
    omnissm graphs predict --run ./run
    omnissm graphs plot --synthetic {KIND} --checkpoint run --node {NODES - 1} --out influence.png

`docs/guides/graphs.md` shows how to write your own graphs to a file that these commands read.
"""
