"""Every domain refuses an option of the wrong kind in one line, and takes the right ones."""

import pytest

from omnissm import genomics, graphs, timeseries, vision
from omnissm.ssmcore.training.options import check_kinds

CALLS = {
    "vision": (vision.create_model, "hydra_vit_tiny_patch16_224", "depth", {}),
    "genomics": (genomics.create_model, "markov", "order", {}),
    "timeseries": (timeseries.create_model, "chimera_tiny", "n_layer", {"lookback": 8, "horizon": 2, "n_variates": 2}),
    "graphs": (graphs.create_model, "gcn", "n_layer", {"node_features": 2}),
}


@pytest.mark.parametrize("domain", CALLS)
@pytest.mark.parametrize("value", ["two", 2.5, True, None])
def test_sizes_that_are_no_whole_number(domain, value):
    create, name, option, given = CALLS[domain]
    with pytest.raises(TypeError, match=f"option '{option}' of model '{name}' must be a whole number, got {value!r}"):
        create(name, **given, **{option: value})


def test_kinds():
    def make(size: int, share: float, on: bool = False, most: int | None = None, name: str = "", each: list[int] = ()):
        """Takes options."""

    class Maker:
        def __init__(self, size: int, rate: float | None = None) -> None:
            """Takes options."""

    makers = [make, Maker]
    check_kinds("m", makers, {"size": 1, "share": 1, "on": True, "most": None, "name": 5, "each": 2, "other": "x"})
    check_kinds("m", makers, {"share": 0.5, "most": 3, "rate": None})
    for wrong, said in (
        ({"share": "high"}, "'share' of model 'm' must be a number, got 'high'"),
        ({"on": 1}, "'on' of model 'm' must be true or false, got 1"),
        ({"most": 1.5}, "'most' of model 'm' must be a whole number, got 1.5"),
        ({"size": [1]}, r"'size' of model 'm' must be a whole number, got \[1\]"),
        ({"rate": "x"}, "'rate' of model 'm' must be a number, got 'x'"),
    ):
        with pytest.raises(TypeError, match=said):
            check_kinds("m", makers, wrong)
