"""The tables of models in the documents name all models of the code, with their numbers of parameters."""

import re
from itertools import repeat
from pathlib import Path

import pytest
import timm
import torch

from omnissm import genomics, graphs, timeseries, vision

DOCS = Path(__file__).resolve().parents[2] / "docs"
GRAPHS = {"node_vocab": [1], "num_outputs": 1}  # one column with one category, one output: as the page says
COMPOSED = {"hnet", "masked_dna"}  # built from options, so they have no size


def table(page: str) -> dict[str, int | None]:
    """Name -> number of parameters, or None where the page gives none, of the first table of a page."""
    found = {}
    for line in (DOCS / page).read_text().partition("\n| name |")[2].splitlines()[2:]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        names = re.findall(r"`(\w+)`", cells[0])
        counts = next((cell for cell in cells[1:] if re.fullmatch(r"[\d, ]*", cell)), "")
        numbers = [int(number.replace(",", "")) for number in counts.split(", ") if number]
        found |= zip(names, numbers * len(names) if len(numbers) == 1 else numbers or repeat(None))
    return found


def count(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("package", [vision, timeseries, graphs, genomics], ids=lambda each: each.__name__[8:])
def test_every_model_stands_in_its_table(package):
    page = {vision: "vision_models.md", timeseries: "models.md", graphs: "graph_models.md"}
    assert set(table(page.get(package, "genomics_models.md"))) == set(package.list_models()) - COMPOSED


@pytest.mark.parametrize("name", list(table("vision_models.md")))
def test_size_of_a_backbone(name):
    with torch.device("meta"):
        assert count(timm.create_model(name)) == table("vision_models.md")[name]


@pytest.mark.parametrize("name", [name for name, size in table("models.md").items() if size])
def test_size_of_a_forecaster(name):
    network = timeseries.create_model(name, n_variates=7, lookback=96, horizon=96)
    assert count(network) == table("models.md")[name]


@pytest.mark.parametrize("name", list(table("graph_models.md")))
def test_size_of_a_graph_model(name):
    assert count(graphs.create_model(name, **GRAPHS)) == table("graph_models.md")[name]


@pytest.mark.parametrize("name", [name for name, size in table("genomics_models.md").items() if size])
def test_size_of_a_model_of_dna(name):
    with torch.device("meta"):
        assert count(genomics.create_model(name)) == table("genomics_models.md")[name]
