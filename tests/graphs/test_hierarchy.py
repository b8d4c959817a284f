"""Clusters by hand and against Kruskal's rule, orders of leaves, and the model over them."""

from dataclasses import replace

import networkx as nx
import pytest
import torch

from omnissm.graphs import Graph, collate, create_model
from omnissm.graphs.data import SyntheticGraphs, create_graphs
from omnissm.graphs.hierarchy import affinity_clusters, edge_distances, join_clusters, leaf_order, real_rounds


def values(nodes=12, edges=20, seed=0):
    """An undirected graph whose distances are all different."""
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randint(0, nodes, (2, edges), generator=generator)
    ends = ends[:, ends[0] != ends[1]]
    x = torch.randn(nodes, 3, generator=generator)
    return Graph(x, torch.cat([ends, ends.flip(0)], dim=1), is_directed=False)


def clusters_of(graph):
    return collate([graph]).with_clusters().clusters


def test_rounds_by_hand():
    """A line 0-1-2-3-4 with distances 1, 4, 2, 3, and node 5 by itself."""
    ends = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4]])
    found = affinity_clusters(ends, torch.tensor([1.0, 4.0, 2.0, 3.0]), torch.zeros(6, dtype=torch.int64))
    assert found.t().tolist() == [[0, 0, 2, 2, 2, 5], [0, 0, 0, 0, 0, 5], [0] * 6]
    order = leaf_order(found, torch.zeros(6, dtype=torch.int64))
    assert order.tolist() == [0, 1, 2, 3, 4, 5]
    turned = affinity_clusters(ends.flip(0), torch.tensor([1.0, 4.0, 2.0, 3.0]), torch.zeros(6, dtype=torch.int64))
    assert torch.equal(found, turned)


def test_ties_go_to_the_smaller_clusters():
    ring = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
    found = affinity_clusters(ring, torch.ones(4), torch.zeros(4, dtype=torch.int64))
    # 0-1 first of all; 2 picks 1 before 3, and 3 picks 0 before 2
    assert found.tolist() == [[0]] * 4
    pairs = torch.tensor([[0, 2, 1], [1, 3, 2]])
    found = affinity_clusters(pairs, torch.tensor([1.0, 1.0, 5.0]), torch.zeros(4, dtype=torch.int64))
    assert found.t().tolist() == [[0, 0, 2, 2], [0, 0, 0, 0]]


@pytest.mark.parametrize("seed", range(6))
def test_rounds_against_a_plain_loop(seed):
    """Each cluster's picks, with costs between merged clusters as minima, by networkx and dictionaries."""
    graph = values(30, 45, seed)
    distance = edge_distances(graph.x, graph.edge_index).tolist()
    label, rounds = {v: v for v in range(30)}, []
    edges = [(d, *e) for d, e in zip(distance, graph.edge_index.t().tolist())]
    while any(label[u] != label[v] for _, u, v in edges):
        picked = nx.Graph()
        picked.add_nodes_from(label.values())
        for cluster in set(label.values()):
            leaving = [(d, u, v) for d, u, v in edges if (label[u] == cluster) != (label[v] == cluster)]
            if leaving:
                _, u, v = min(leaving)
                picked.add_edge(label[u], label[v])
        names = {c: min(part) for part in nx.connected_components(picked) for c in part}
        label = {v: names[c] for v, c in label.items()}
        rounds.append([label[v] for v in range(30)])
    if len(set(label.values())) > 1:
        rounds.append([0] * 30)
    assert clusters_of(graph).t().tolist() == rounds


def test_a_batch_is_its_graphs():
    graphs = [values(7, 6, 1), values(1, 0), values(20, 12, 2), Graph(torch.zeros(0, 3), torch.zeros(2, 0).long())]
    graphs = [replace(graph, is_directed=False) for graph in [*graphs, values(33, 90, 4), values(3, 0, 5)]]
    batch = collate(graphs).with_clusters()
    separate = [clusters_of(graph) for graph in graphs]
    assert torch.equal(join_clusters(separate, batch.ptr.tolist()), batch.clusters)
    cached = collate([replace(graph, clusters=one) for graph, one in zip(graphs, separate)])
    assert torch.equal(cached.clusters, batch.clusters)
    assert cached.with_clusters() is cached
    for graph, one in zip(cached.graphs(), separate):
        assert torch.equal(graph.clusters[:, : one.shape[1]], one)
    real = real_rounds(batch.clusters, batch.batch, 6)
    assert [int(real[batch.batch == k].sum(1).max()) for k in (0, 1, 2, 4, 5)] == [
        separate[k].shape[1] for k in (0, 1, 2, 4, 5)
    ]
    order = leaf_order(batch.clusters, batch.batch)
    assert torch.equal(order.sort().values, torch.arange(64))
    assert torch.equal(batch.batch[order], batch.batch)


def test_leaves_of_a_cluster_are_together():
    graph = values(40, 60, 3)
    clusters = clusters_of(graph)
    order = leaf_order(clusters, torch.zeros(40, dtype=torch.int64))
    for column in clusters[order].unbind(1):
        changes = 1 + int((column[1:] != column[:-1]).sum())
        assert changes == len(column.unique())


@pytest.mark.parametrize("sequence", ["order", "paths"])
def test_a_graph_alone_and_without_any_node(sequence):
    net = create_model("gsm_pp", node_features=3, d_model=16, sequence=sequence).double().eval()
    graphs = [values(7, 6, 1), values(1, 0), values(20, 12, 2), values(3, 0, 5)]
    together = net(collate(graphs))
    torch.testing.assert_close(together, torch.cat([net(one) for one in graphs]))
    empty = Graph(torch.zeros(0, 3), torch.zeros(2, 0).long(), is_directed=False)
    assert net(empty).shape == (1, 1)
    torch.testing.assert_close(net(collate([empty, graphs[0]]))[1:], together[:1])


def test_paths_follow_their_nodes_when_distances_differ():
    net = create_model("gsm_pp", node_features=3, d_model=16, level="node", sequence="paths").double().eval()
    one = values(14, 25, 7)
    names, edges = torch.randperm(14), torch.randperm(one.num_edges)
    x = torch.empty_like(one.x).index_copy(0, names, one.x)
    other = replace(one, x=x, edge_index=names[one.edge_index][:, edges])
    torch.testing.assert_close(net(other)[names], net(one))


def test_the_order_of_leaves_is_what_the_sequence_reads():
    """Only nodes before one in the order, its neighbours and attention reach it: with attention cut, none behind."""
    net = create_model("gsm_pp", node_features=3, d_model=16, level="node", local_layers=1).double().eval()
    layer = net.layers[0]
    torch.nn.init.zeros_(layer.attention.out.weight)
    one = Graph(torch.randn(9, 3), torch.zeros(2, 0).long(), is_directed=False)
    changed = replace(one, x=one.x + torch.eye(9)[:, [4]])
    moved = (net(changed) - net(one)).abs().sum(1) > 0
    assert moved.tolist() == [False] * 4 + [True] * 5


def test_data_modules_cut_once():
    data = SyntheticGraphs("connectivity", train_samples=4, val_samples=2, clusters=True, batch_size=4)
    batch = next(iter(data.val_dataloader()))
    plain = collate(create_graphs("connectivity", 2, seed=1)).with_clusters()
    assert torch.equal(batch.clusters, plain.clusters)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence": "dfs"}, "sequence must be one of order, paths"),
        ({"local_layers": 0}, "must be positive"),
        ({"nheads": 3}, "multiple of nheads"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        create_model("gsm_pp", node_vocab=[3], d_model=16, **options)


def test_clusters_of_another_size_are_refused():
    graph = values(5, 4)
    with pytest.raises(ValueError, match=r"`clusters` must have shape \(5, features\)"):
        replace(graph, clusters=torch.zeros(4, 1, dtype=torch.int64))
