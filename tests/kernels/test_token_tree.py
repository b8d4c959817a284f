"""Trees of positions: `ssd_tree` and `conv_tree` along every path equal the scans of that path alone."""

import math

import pytest
import torch

from omnissm.kernels import causal_conv1d, conv_tree, conv_tree_state, ssd, ssd_tree, ssd_tree_state, token_tree

DOUBLE = {"dtype": torch.float64}
BUSHY = [-1, 0, 0, 1, 1, 2, 3, 6, -1, 8]
CHAIN = [-1, 0, 1, 2, 3]
TREES = [[-1], CHAIN, BUSHY, [[-1, 0, 1, 1, 0], [-1, -1, 0, 2, 3]]]


def path_to(parent: list[int], node: int) -> list[int]:
    path = []
    while node >= 0:
        path.insert(0, node)
        node = parent[node]
    return path


def rows_of(parent, batch: int) -> list[list[int]]:
    return parent if isinstance(parent[0], list) else [parent] * batch


def inputs(length: int, *, state: bool = True, weight: bool = True, D: bool = True, seed: int = 0) -> dict:
    torch.manual_seed(seed)
    shapes = {"x": (2, length, 4, 3), "B": (2, length, 2, 5), "C": (2, length, 2, 5)}
    made = {name: torch.randn(shape, **DOUBLE) for name, shape in shapes.items()}
    made["log_decay"] = -torch.rand(2, length, 4, **DOUBLE) * torch.tensor([0.01, 1.0, 30.0, 0.0], **DOUBLE)
    made["initial_state"] = torch.randn(2, 4, 3, 5, **DOUBLE) if state else None
    made["weight"] = torch.rand(2, length, 4, **DOUBLE) if weight else None
    made["D"] = torch.randn(4, **DOUBLE) if D else None
    return made


@pytest.mark.parametrize("parent", TREES, ids=str)
@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("absent", [{}, {"state": False, "weight": False, "D": False}], ids=["all", "bare"])
def test_every_path_is_its_scan(parent, backend, absent, device):
    tree = token_tree(parent).to(device)
    given = {name: None if one is None else one.to(device) for name, one in inputs(tree.size, **absent).items()}
    y = ssd_tree(**given, tree=tree, backend=backend)
    rest = {name: value for name, value in given.items() if name not in ("C", "D")}
    for row, parents in enumerate(rows_of(parent, 2)):
        for node in range(tree.size):
            path = path_to(parents, node)
            alone = {
                name: value if value is None or name == "D" else value[row : row + 1] for name, value in given.items()
            }
            for name in ("x", "log_decay", "B", "C", "weight"):
                alone[name] = None if alone[name] is None else alone[name][:, path]
            expected, last = ssd(**alone, backend="reference")
            torch.testing.assert_close(y[row, node], expected[0, -1], rtol=1e-10, atol=1e-10)
            state = ssd_tree_state(**rest, tree=tree, node=torch.tensor([node, node], device=device))
            torch.testing.assert_close(state[row], last[0], rtol=1e-10, atol=1e-10)


def test_a_chain_is_the_scan_and_no_node_the_initial_state():
    given = inputs(5)
    y, last = ssd(**given)
    tree = token_tree(CHAIN)
    torch.testing.assert_close(ssd_tree(**given, tree=tree), y, rtol=1e-10, atol=1e-10)
    rest = {name: value for name, value in given.items() if name not in ("C", "D")}
    state = ssd_tree_state(**rest, tree=tree, node=torch.tensor([4, -1]))
    torch.testing.assert_close(state[0], last[0], rtol=1e-10, atol=1e-10)
    assert torch.equal(state[1], given["initial_state"][1])


def test_gradients():
    tree = token_tree(BUSHY)
    given = {name: value[:1] if name != "D" else value for name, value in inputs(10).items()}
    names = [name for name in given if name != "log_decay"]
    leaves = [given[name].requires_grad_() for name in names]

    def run(log_decay, *values):
        return ssd_tree(log_decay=-log_decay.square(), tree=tree, **dict(zip(names, values)))

    assert torch.autograd.gradcheck(run, (torch.rand(1, 10, 4, **DOUBLE).requires_grad_(), *leaves), fast_mode=True)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_a_decay_of_zero_forgets(backend):
    given = inputs(5)
    given["log_decay"][:, 2] = -math.inf
    y, last = ssd(**given)
    tree = token_tree(CHAIN)
    torch.testing.assert_close(ssd_tree(**given, tree=tree, backend=backend), y, rtol=1e-10, atol=1e-10)
    rest = {name: value for name, value in given.items() if name not in ("C", "D")}
    torch.testing.assert_close(ssd_tree_state(**rest, tree=tree, node=torch.tensor([4, 4])), last)


def test_float32_keeps_its_digits_under_strong_decays():
    """Sums of log-decays below a node are not differences of sums from the root, which would lose them."""
    tree = token_tree(list(range(-1, 63)))
    given = inputs(64)
    given["log_decay"][:, ::2] = -1000.0
    given["log_decay"][:, 1::2] = -0.001
    narrow = {name: value.float() for name, value in given.items()}
    got, expected = ssd_tree(**narrow, tree=tree), ssd_tree(**given, tree=tree, backend="reference")
    assert got.dtype == torch.float32
    assert (got - expected).square().mean().sqrt() / expected.square().mean().sqrt() < 1e-5


@pytest.mark.parametrize("parent", TREES, ids=str)
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("activation", ["silu", None])
def test_convolution_along_every_path(parent, width, activation, device):
    torch.manual_seed(0)
    tree = token_tree(parent).to(device)
    shapes = [(2, tree.size, 6), (2, 6, width - 1), (6, width), (6,)]
    x, state, weight, bias = (torch.randn(shape, **DOUBLE).to(device) for shape in shapes)
    y = conv_tree(x, weight, bias, tree, state, activation=activation)
    for row, parents in enumerate(rows_of(parent, 2)):
        for node in range(tree.size):
            path = path_to(parents, node)
            expected, last = causal_conv1d(
                x[row : row + 1, path], weight, bias, state[row : row + 1], activation=activation
            )
            torch.testing.assert_close(y[row, node], expected[0, -1], rtol=1e-10, atol=1e-10)
            kept = conv_tree_state(x, tree, torch.tensor([node, node], device=device), state)
            assert torch.equal(kept[row], last[0])
    assert torch.equal(conv_tree_state(x, tree, torch.tensor([-1, -1], device=device), state), state)
    bare = conv_tree(x, weight, None, tree)
    torch.testing.assert_close(bare, conv_tree(x, weight, 0 * bias, tree, 0 * state))


def test_trees():
    tree = token_tree(torch.tensor(BUSHY))
    for node in range(len(BUSHY)):
        path = path_to(BUSHY, node)
        assert tree.ancestors[0, node].nonzero()[:, 0].tolist() == path
        nodes, count = tree.path(torch.tensor([node]))
        assert nodes[0, : int(count)].tolist() == path
        assert int(tree.depth[0, node]) == len(path) - 1
    assert tree.height == 5
    assert tree.path(torch.tensor([-1]))[1].tolist() == [0]
    assert tree.lineage(torch.tensor([[3, -1]]), 4).tolist() == [[[-1, 0, 1, 3], [-4, -3, -2, -1]]]


def test_bad_input():
    with pytest.raises(ValueError, match="node 1 has parent 1, expected -1 to 0; parents first"):
        token_tree([-1, 1])
    with pytest.raises(ValueError, match="node 0 has parent -2"):
        token_tree([-2])
    with pytest.raises(TypeError, match="`parent` must be of integers"):
        token_tree(torch.zeros(3))
    with pytest.raises(ValueError, match=r"must be \(l,\) or \(b, l\) with l >= 1"):
        token_tree([[]])
    given = inputs(3)
    with pytest.raises(ValueError, match=r"`tree\.parent` has l=5, expected 3"):
        ssd_tree(**given, tree=token_tree(CHAIN))
    with pytest.raises(TypeError, match="`tree` must be a TokenTree"):
        ssd_tree(**given, tree=[-1, 0, 1])
    with pytest.raises(ValueError, match="must be <= 0"):
        ssd_tree(**given | {"log_decay": -given["log_decay"] + 1}, tree=token_tree([-1, 0, 1]))
    x, weight, tree = given["x"].flatten(2), torch.ones(12, 2, **DOUBLE), token_tree([-1, 0, 1])
    with pytest.raises(ValueError, match="`activation` must be 'silu' or None"):
        conv_tree(x, weight, None, tree, activation="relu")
    with pytest.raises(ValueError, match="`state` has 1=2, expected 1"):
        conv_tree(x, weight, None, tree, torch.ones(2, 12, 2, **DOUBLE))
