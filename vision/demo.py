"""The quick start: a small VMamba learns handwritten digits, beside two simple methods, with a contact sheet."""

from __future__ import annotations

import csv
import io
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..ssmcore.training.report import markdown_table, run_verb, write_summary

__all__ = ["demo"]

CONFIG = "vision/vmamba_digits"
SIDE = 32  # pixels; the originals have 8
TRAIN = 0.8  # the first images; the rest is the test part
FLOOR = "logistic regression"


def demo(out: Path = Path("demo"), epochs: int = 8, seed: int = 0, limit: int | None = None) -> int:
    """Train a small image classifier on handwritten digits, test it on others, and show what it doubts.

    The images come with scikit-learn. Files in the folder that an earlier demo wrote are replaced.

    Args:
        out: Folder for the images, the run, predictions.csv, sheet.png, summary.md and report.html.
        epochs: Passes over the training part.
        seed: Of weights and order.
        limit: Take so many images only.

    Returns:
        0, or 1 if the classifier is no better than logistic regression on the pixels.

    Raises:
        ImportError: if the data is missing; the line says what to install.

    Example:
      omnissm demo vision --out demo
    """
    if find_spec("sklearn") is None:
        raise ImportError('the demo needs scikit-learn; run: pip install "omnissm[demo]"')
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    pixels, labels = pixels[:limit], labels[:limit]
    cut = int(TRAIN * len(pixels))
    write_images(out / "digits", pixels, labels, cut)
    run, quick = out / "run", ("--trainer.enable_progress_bar", "false")
    options = ("--data.init_args.root", out / "digits", "--seed_everything", seed, "--trainer.max_epochs", epochs)
    run_verb("vision", "fit", "-c", CONFIG, *options, "--run", _path(run), "--overwrite", *quick)
    run_verb("vision", "test", "--run", _path(run), *quick)
    files = ("--out", out / "predictions.csv", "--sheet", out / "sheet.png")
    run_verb("vision", "predict", "--checkpoint", run, "--images", f"[{out / 'digits' / 'test'}]", *files)
    found = json.loads((run / "metrics.json").read_text())
    rows = [{"method": f"{found['model'].partition('/')[2]}, narrow", "accuracy": found["metrics"]["test/accuracy"]}]
    rows += [{"method": name, "accuracy": value} for name, value in simple_methods(pixels, labels, cut).items()]
    better = rows[0]["accuracy"] > {row["method"]: row["accuracy"] for row in rows}[FLOOR]
    facts = {"parameters": found["parameters"], "train": cut, "test": len(pixels) - cut, "epochs": epochs}
    write_summary(out, _summary(rows, better, facts, _mistakes(out / "predictions.csv")))
    return int(not better)


def _path(folder: Path) -> str:
    """A run's folder as the command line takes it: with a slash, so that it is no name below runs/."""
    return str(folder) if "/" in str(folder) else f"./{folder}"


def write_images(folder: Path, pixels: np.ndarray, labels: np.ndarray, cut: int) -> None:
    """Write digits as FOLDER/train|test/DIGIT/is_DIGIT_NUMBER.png; those from `cut` on are the test part.

    Args:
        folder: Where to.
        pixels: Rows of 64 values from 0 to 16, (n, 64).
        labels: The digits, (n,).
        cut: Images of the training part.
    """
    from PIL import Image

    from ..ssmcore.training.checkpoints import write_atomic

    for number, (row, label) in enumerate(zip(pixels, labels)):
        grey = Image.fromarray((row.reshape(8, 8) * 255 / 16).astype(np.uint8))
        buffer = io.BytesIO()
        grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(buffer, "PNG")
        part = "train" if number < cut else "test"
        write_atomic(folder / part / str(label) / f"is_{label}_{number:04}.png", buffer.getvalue())


def simple_methods(pixels: np.ndarray, labels: np.ndarray, cut: int) -> dict[str, float]:
    """Test accuracy of methods that know nothing of images: what a network has to beat."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    models = {FLOOR: LogisticRegression(max_iter=3000), "nearest 3 training images": KNeighborsClassifier(3)}
    return {
        name: float(model.fit(pixels[:cut] / 16, labels[:cut]).score(pixels[cut:] / 16, labels[cut:]))
        for name, model in models.items()
    }


def _mistakes(table: Path) -> list[tuple[str, str, float]]:
    """(digit, what the model says, with which probability) of the images that it gets wrong."""
    with open(table, newline="") as file:
        rows = [
            (Path(row["path"]).parent.name, row["class1"], float(row["probability1"])) for row in csv.DictReader(file)
        ]
    return [row for row in rows if row[0] != row[1]]


def _summary(
    rows: list[dict[str, Any]], better: bool, facts: dict[str, int], wrong: list[tuple[str, str, float]]
) -> str:
    """The page a person reads."""
    shown = [{**row, "accuracy": f"{row['accuracy']:.3f}"} for row in rows]
    verdict = "more than" if better else "NOT more than"
    pairs = sorted({(a, b) for a, b, _ in wrong}, key=lambda pair: -sum((a, b) == pair for a, b, _ in wrong))[:3]
    often = ", ".join(f"{a} read as {b} ({sum((x, y) == (a, b) for x, y, _ in wrong)} times)" for a, b in pairs)
    sure = sum(probability > 0.9 for *_, probability in wrong)
    return f"""# Vision: handwritten digits

After {facts["epochs"]} passes over {facts["train"]:,} images a small VMamba reads {rows[0]["accuracy"]:.1%} of
{facts["test"]:,} test digits right, {verdict} {FLOOR} on the pixels ({rows[1]["accuracy"]:.1%}); to name the three most
similar training images and take a vote reaches {rows[2]["accuracy"]:.1%}.

{markdown_table(shown)}
The images are scikit-learn's, 8 x 8 pixels drawn larger ({SIDE} x {SIDE}). The last fifth of the file is the test part;
drawn at random from the whole file, it would be easier. One test image is {1 / facts["test"]:.2%}, and
differences of one or two per cent between methods mean little. The network has {facts["parameters"]:,} parameters, far
more than so small a task needs; it is here to show how training goes.

![Contact sheet: the 60 test images of which the model is least sure.](sheet.png)

The 60 test images of which the model is least sure, the most doubtful first. Below each: what the model says and how
sure it is (`9 46%`: a nine, 46 % sure), then the name of the file, which tells the truth: `is_4_...` is a 4.
Of all {facts["test"]:,} test images it has {len(wrong)} wrong{f", most often {often}" if wrong else ""};
it was more than 90 % sure in {sure} of them. The whole table is `predictions.csv`.

The commands, in the folder of this page, with `digits` being one folder for each class:

    omnissm vision fit -c {CONFIG} --data.init_args.root digits --run ./run
    omnissm vision test --run ./run
    omnissm vision predict --checkpoint run --images '[digits/test]' --out predictions.csv --sheet sheet.png

For your own images name another folder.
"""
