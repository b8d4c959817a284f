"""Orders of nodes and orientations: permutations, no cycle, every edge kept; levels of real DAGs."""

import json

import pytest
import torch

from omnissm.graphs import Graph, depth_pe, orient, prepare, random_walk_pe, rank_nodes, sibling_pe
from omnissm.kernels import dag_order

WAYS = ["input", "bfs", "degree", "random"]


def undirected(nodes=12, edges=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randint(0, nodes, (2, 4 * edges), generator=generator)
    ends = ends[:, ends[0] < ends[1]].unique(dim=1)[:, :edges]
    both = torch.cat([ends, ends.flip(0)], dim=1)
    label = torch.arange(ends.shape[1]).repeat(2)[:, None]
    return Graph(torch.zeros(nodes, 1, dtype=torch.int64), both, label, is_directed=False)


@pytest.mark.parametrize("by", WAYS)
def test_orientation_is_acyclic_and_keeps_every_edge(by):
    graph = undirected()
    rank = rank_nodes(graph.edge_index, 12, by)
    assert sorted(rank.tolist()) == list(range(12))
    dag = orient(graph, by)
    assert dag.is_directed
    assert dag.num_edges == graph.num_edges // 2
    assert sorted(dag.edge_attr[:, 0].tolist()) == list(range(dag.num_edges))  # once each, with their features
    assert (rank[dag.edge_index[0]] < rank[dag.edge_index[1]]).all()
    dag_order(dag.edge_index, 12)


def test_orders_are_what_they_say():
    star = torch.tensor([[4, 4, 4, 1], [0, 1, 2, 3]])  # 3 - 1 - 4 - {0, 2}, and 5 alone
    assert rank_nodes(star, 6, "bfs").argsort().tolist() == [0, 4, 1, 2, 3, 5]
    assert rank_nodes(star, 6, "degree").argsort().tolist() == [4, 1, 0, 2, 3, 5]
    assert not torch.equal(rank_nodes(star, 6, "random", seed=0), rank_nodes(star, 6, "random", seed=1))
    assert torch.equal(rank_nodes(star, 6, "random", seed=1), rank_nodes(star, 6, "random", seed=1))


def test_what_is_refused():
    graph = undirected()
    with pytest.raises(ValueError, match="by must be one of input, bfs"):
        orient(graph, "depth")
    with pytest.raises(ValueError, match="12 different numbers"):
        orient(graph, torch.zeros(12))
    with pytest.raises(ValueError, match="this one is directed"):
        orient(orient(graph))


def test_levels_of_bayesian_networks(shared_data):
    """Levels equal a plain longest-path loop, and the known depths."""
    path = shared_data / "graphs" / "bn_dag_zoo.json"
    if not path.is_file():
        pytest.skip("no bn_dag_zoo.json")
    zoo = json.loads(path.read_text())
    depths = {"diabetes": 146, "munin": 15, "link": 10, "andes": 41}
    for name, network in zoo.items():
        ends = torch.tensor(network["edges"]).t().reshape(2, -1)
        order = dag_order(ends, network["num_nodes"])
        level = torch.repeat_interleave(torch.arange(order.num_levels), order.level_ptr.diff())[order.inverse]
        expected = [0] * network["num_nodes"]
        for _ in range(order.num_levels):
            for u, v in network["edges"]:
                expected[v] = max(expected[v], expected[u] + 1)
        assert level.tolist() == expected, name
        if name in depths:
            assert order.num_levels == depths[name]


def test_random_walks_return():
    """On a triangle a walk is back after 2 steps with 1/2 and after 3 with 1/4; on a single edge every other step."""
    triangle = torch.tensor([[0, 1, 1, 2, 2, 0], [1, 0, 2, 1, 0, 2]])
    expected = torch.tensor([0, 1 / 2, 1 / 4, 3 / 8]).expand(3, -1)
    torch.testing.assert_close(random_walk_pe(triangle, 3, 4), expected)
    edge = torch.tensor([[0, 1], [1, 0]])
    torch.testing.assert_close(random_walk_pe(edge, 3, 3)[0], torch.tensor([0.0, 1.0, 0.0]))
    assert not random_walk_pe(edge, 3, 3)[2].any()  # alone: nowhere to go, nowhere to come from


def test_depth_is_the_longest_path():
    edges = torch.tensor([[3, 1, 3, 0, 2], [1, 0, 0, 2, 4]])  # 3 -> 1 -> 0 -> 2 -> 4, and 3 -> 0; 5 alone
    assert depth_pe(edges, 6, 5).argmax(1).tolist() == [2, 1, 3, 0, 4, 0]
    assert torch.equal(depth_pe(edges, 6, 3), torch.eye(3)[[2, 1, 2, 0, 2, 0]])
    assert depth_pe(edges[:, :0], 0, 3).shape == (0, 3)
    with pytest.raises(ValueError, match=r"depth_steps=3 needs graphs without cycles.*6 nodes has a cycle"):
        depth_pe(torch.cat([edges, torch.tensor([[4], [0]])], dim=1), 6, 3)


def test_places_among_siblings():
    """0 has children 1, 2, 3, and 2 has 5, 4: as the numbers say, not as edges are stored."""
    edges = torch.tensor([[0, 0, 0, 2, 2], [3, 1, 2, 5, 4]])
    eye = torch.eye(2)
    before, after = eye[[0, 0, 1, 1, 0, 1]], eye[[0, 1, 1, 0, 1, 0]]
    expected = torch.cat([before, after], dim=1)
    expected[0] = 0
    assert torch.equal(sibling_pe(edges, 6, 4), expected)
    wide = sibling_pe(edges, 6, 6)
    assert wide[:, :3].argmax(1).tolist() == [0, 0, 1, 2, 0, 1]
    assert wide[1:, 3:].argmax(1).tolist() == [2, 1, 0, 1, 0]
    assert sibling_pe(edges[:, :0], 0, 4).shape == (0, 4)
    graph = Graph(torch.zeros(6, 1), edges)
    assert torch.equal(prepare(graph, depth_steps=3, sibling_steps=4).pe[:, 3:], expected)
    for wrong in (3, 0, -2):
        with pytest.raises(ValueError, match=f"must be a positive, even number, got {wrong}"):
            sibling_pe(edges, 6, wrong)


def test_prepared_in_order():
    ring = torch.tensor([[0, 1, 2, 1, 2, 0], [1, 2, 0, 0, 1, 2]])
    graph = prepare(Graph(torch.zeros(3, 1), ring, is_directed=False), orientation="input", pe_steps=2, depth_steps=3)
    assert graph.edge_index.tolist() == [[0, 1, 0], [1, 2, 2]]  # 0 -> 1 -> 2, 0 -> 2
    assert torch.equal(graph.pe[:, :2], random_walk_pe(ring, 3, 2))  # of the graph with both directions
    assert torch.equal(graph.pe[:, 2:], torch.eye(3))
