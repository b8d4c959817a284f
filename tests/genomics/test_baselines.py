"""Tables of labels: weights, the most frequent class and k-mers against other libraries' formulas."""

import numpy as np
import pandas as pd
import pytest

from omnissm.genomics.baselines import describe_labels, kmer_frequencies, ridge
from omnissm.genomics.data import LabelledSequences

RNG = np.random.default_rng(0)


def write_table(path, task, rows=300):
    """Class or value follows from the share of G and C; a quarter of the rows in class "rich"."""
    rich = np.arange(rows) % 4 == 0
    share = np.where(rich, 0.7, 0.4)
    texts = ["".join(RNG.choice(list("ACGT"), 60, p=[(1 - s) / 2, s / 2, s / 2, (1 - s) / 2])) for s in share]
    split = np.array(["train", "val", "test"])[
        np.where(np.arange(rows) < 200, 0, np.where(np.arange(rows) < 240, 1, 2))
    ]
    table = pd.DataFrame({"sequence": texts, "split": split})
    if task == "regression":
        table["a"] = [100 + 10 * sum(base in "GC" for base in text) for text in texts]
        table["b"] = [np.nan if k % 3 == 0 else text.count("AC") for k, text in enumerate(texts)]
    elif task == "multilabel":
        table["a"], table["b"] = rich.astype(int), 1 - rich.astype(int)
    else:
        table["label"] = np.where(rich, "rich", "poor")
    table.to_csv(path, index=False)
    return table


def test_kmers_are_counted():
    found = kmer_frequencies([b"AACGN", b"A", b"NNNN", b"TTT"], 2)
    assert found.shape == (4, 16)
    assert {k: found[0, k] for k in np.flatnonzero(found[0])} == pytest.approx({0: 1 / 3, 1: 1 / 3, 6: 1 / 3})
    assert not found[1:3].any()
    assert found[3, 15] == 1
    with pytest.raises(ValueError, match="1 to 6 bases, got 7"):
        kmer_frequencies([b"A"], 7)


def test_ridge_finds_a_linear_rule_and_leaves_missing_values_out():
    x = RNG.normal(size=(200, 5))
    y = 3 + x @ [1.0, -2.0, 0.0, 0.5, 0.0]
    missing = y.copy()
    missing[::7] = np.nan
    rows = np.arange(200)
    found = ridge(x, missing, rows[:120], rows[120:160])
    np.testing.assert_allclose(found, y, atol=0.02)


def test_classes(tmp_path):
    table = write_table(tmp_path / "t.csv", "binary")
    text = describe_labels(LabelledSequences(str(tmp_path / "t.csv"), split="split"), 2)
    assert "300 sequences: 200 train, 40 val, 60 test; 60 to 60 bases, median 60" in text
    assert "class poor: 150 train, 30 val, 45 test; weight 0.6667" in text  # 200 / (2 * 150)
    assert "class rich: 50 train, 10 val, 15 test; weight 2.0000" in text
    assert "most frequent class (poor): test accuracy 0.7500, MCC 0.0000" in text
    accuracy = float(text.split("ridge regression: test accuracy ")[1].split(",")[0])
    assert accuracy > 0.9
    shuffled = table.assign(label=RNG.permutation(table["label"]))
    shuffled.to_csv(tmp_path / "s.csv", index=False)
    text = describe_labels(LabelledSequences(str(tmp_path / "s.csv"), split="split"), 2)
    assert abs(float(text.split("MCC ")[2])) < 0.35  # nothing to learn


def test_values_and_bits(tmp_path):
    table = write_table(tmp_path / "r.csv", "regression")
    options = {"label": ["a", "b"], "split": "split", "task": "regression"}
    text = describe_labels(LabelledSequences(str(tmp_path / "r.csv"), **options), 2)
    test, train = table["a"][240:], table["a"][:200]
    rmse = np.sqrt(((test - train.mean()) ** 2).mean())
    assert f"a, test, mean of the training part: RMSE {rmse:.4f}" in text  # in units of the table
    assert float(text.split("Pearson ")[1].split(",")[0]) > 0.98
    assert float(text.split("Spearman ")[2]) > 0.9
    write_table(tmp_path / "m.csv", "multilabel")
    options["task"] = "multilabel"
    text = describe_labels(LabelledSequences(str(tmp_path / "m.csv"), **options), 2)
    assert "a, test: 50 of 200 training rows positive, weight of a positive 3.0000" in text
    assert "b, test: 150 of 200 training rows positive, weight of a positive 0.3333" in text
    assert "a, test, most frequent label: accuracy 0.7500" in text
    assert float(text.split("AUROC ")[2].split("\n")[0]) > 0.95


def test_verb(tmp_path, capsys):
    from omnissm.__main__ import main

    write_table(tmp_path / "t.csv", "binary")
    assert main(["genomics", "describe", "--table", str(tmp_path / "t.csv"), "--split", "split", "--kmer", "3"]) == 0
    assert "3-mers, ridge regression: test accuracy" in capsys.readouterr().out
    assert main(["genomics", "describe"]) == 2
    assert "give --model NAME or --table FILE" in capsys.readouterr().err
    assert main(["genomics", "describe", "--table", str(tmp_path / "t.csv"), "--label", "lable"]) == 2
    assert "has no column 'lable'; it has sequence, split, label" in capsys.readouterr().err
