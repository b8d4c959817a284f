"""Every graph model by name: shapes, gradients, symmetries, bad input, and the equations of its parts."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from omnissm.graphs import Graph, collate, create_model, list_models
from omnissm.graphs.encoders import FeatureEncoder
from omnissm.graphs.models import GraphModel
from omnissm.graphs.models.message_passing import GCN, GatedGCN, GraphAttention
from omnissm.ssmcore.training import param_groups

SIZES = {"d_model": 16, "n_layer": 2, "num_outputs": 3}
SSM = {"headdim": 4, "d_state": 3}


def options(name, **more):
    extra = SSM if any(part in name for part in ("ssm", "chimera", "dag", "order")) else {}
    return {"node_vocab": [5, 3], "edge_vocab": [4], **SIZES, **extra, **more}


def graph(nodes, edges, seed=0, directed=True):
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randint(0, max(nodes, 1), (2, 6 * edges), generator=generator)
    ends = ends[:, ends[0] < ends[1]][:, :edges]
    label = torch.randint(0, 4, (ends.shape[1], 1), generator=generator)
    x = torch.stack([torch.randint(0, k, (nodes,), generator=generator) for k in (5, 3)], dim=1)
    if not directed:
        ends, label = torch.cat([ends, ends.flip(0)], dim=1), torch.cat([label, label])
    return Graph(x, ends, label, is_directed=directed)


def graphs_for(name):
    directed = name.startswith("dag")
    return [graph(6, 9, 1, directed), graph(1, 0, 2, directed), graph(0, 0, 3, directed), graph(11, 20, 4, directed)]


@pytest.mark.parametrize("name", list_models())
@pytest.mark.parametrize("level", ["graph", "node", "link"])
def test_shapes_and_gradients(name, level):
    outputs = 1 if level == "link" else 3
    net = create_model(name, **options(name, level=level, num_outputs=outputs))
    graphs = graphs_for(name)
    if level == "link":
        graphs = [replace(one, pairs=torch.zeros(2, 2 if one.num_nodes else 0, dtype=torch.int64)) for one in graphs]
    y = net(collate(graphs))
    assert y.shape == {"graph": (4, 3), "node": (18, 3), "link": (6,)}[level]
    y.square().sum().backward()
    for parameter_name, p in net.named_parameters():
        assert p.grad is not None, parameter_name
        assert p.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("name", list_models())
@pytest.mark.parametrize("readout", ["mean", "sum+max", "sinks"])
def test_alone_and_in_a_batch(name, readout):
    net = create_model(name, **options(name, readout=readout)).double().eval()
    graphs = graphs_for(name)
    together = net(collate(graphs))
    torch.testing.assert_close(together, torch.cat([net(one) for one in graphs]))
    torch.testing.assert_close(net(collate(graphs[::-1])), together.flip(0))


@pytest.mark.parametrize("name", list_models())
def test_renaming_nodes_and_shuffling_edges(name):
    """Sequences of nodes depend on their numbers: of models with some only the edges are shuffled."""
    net = create_model(name, **options(name, level="node")).double().eval()
    one = graphs_for(name)[3]
    names = torch.arange(one.num_nodes) if name in ("gsm_pp", "order_gine_tiny") else torch.randperm(one.num_nodes)
    edges = torch.randperm(one.num_edges)
    x = torch.empty_like(one.x).index_copy(0, names, one.x)
    other = replace(one, x=x, edge_index=names[one.edge_index][:, edges], edge_attr=one.edge_attr[edges])
    torch.testing.assert_close(net(other)[names], net(one))


def test_readouts_lie_side_by_side():
    net = create_model("gcn", **options("gcn", readout="mean+max+sum+scaled+log"))
    batch = collate(graphs_for("gcn"))
    x = torch.randn(batch.num_nodes, 16)
    mean, top, total, scaled, log = net.pool(x, batch).split(16, dim=1)
    for k, nodes in enumerate(torch.tensor_split(x, batch.ptr[1:-1])):
        expected = [torch.zeros(16)] * 5
        if len(nodes):
            expected = [nodes.mean(0), nodes.amax(0), nodes.sum(0), nodes.sum(0) / len(nodes) ** 0.5]
            expected.append((1 + nodes.relu().sum(0)).log())
        for found, one in zip((mean[k], top[k], total[k], scaled[k], log[k]), expected):
            torch.testing.assert_close(found, one)
    small = create_model("gcn", **options("gcn", readout="max+sum", sum_scale=0.1)).pool(x, batch)
    torch.testing.assert_close(small, torch.cat([top, 0.1 * total], dim=1))
    with pytest.raises(ValueError, match="sum_scale must be positive, got 0"):
        create_model("gcn", **options("gcn", sum_scale=0.0))
    wide = create_model("gcn", **options("gcn", readout="mean+log", readout_width=24))
    assert wide.head[0].in_features == 48
    assert wide(batch).shape == (4, 3)
    for wrong in ("median", "mean+mean", "mean+"):
        with pytest.raises(ValueError, match=r"readout must be one of mean, sum, scaled, log, max, sinks, or several"):
            create_model("gcn", **options("gcn", readout=wrong))


@pytest.mark.parametrize("local", ["gcn", "gine", "gated_gcn"])
def test_steps_of_message_passing_before_a_mixer(local):
    """Without mixing along edges, k steps see k edges far, in both directions."""
    path = torch.stack([torch.arange(7), torch.arange(1, 8)])
    bare = Graph(torch.zeros(8, 2, dtype=torch.int64), path)
    other = replace(bare, x=bare.x.index_fill(0, torch.tensor([0]), 1))
    for steps in (1, 3):
        more = {"local": local, "n_layer": 1, "local_layers": steps, "edge_vocab": None}
        net = create_model("order_gine_tiny", **options("order_gine_tiny", **more)).double().eval()
        for parameter in net.layers[0].order_mixer.out_proj.parameters():
            torch.nn.init.zeros_(parameter)
        assert (net.features(bare) != net.features(other)).any(1).tolist() == [v <= steps for v in range(8)]
        net.train()(bare).sum().backward()
        assert all(p.grad is not None for p in net.parameters())
    with pytest.raises(ValueError, match="local_layers must be positive, got 0; local='none' is for none"):
        create_model("dag_gine_tiny", **options("dag_gine_tiny", local_layers=0))


def test_hidden_nodes_keep_their_positions():
    net = create_model("mlp", **options("mlp", pe=3, node_dropout=0.5))
    one = replace(graph(400, 0), pe=torch.randn(400, 3))
    seen, hidden = net.eval().encode(collate([one]))[0], net.train().encode(collate([one]))[0]
    same, bare = (hidden == seen).all(1), (hidden == net.pe_encoder(one.pe)).all(1)
    assert bool((same ^ bare).all())
    assert 140 < int(bare.sum()) < 260
    with pytest.raises(ValueError, match="node_dropout must be at least 0 and below 1, got 1"):
        create_model("mlp", **options("mlp", node_dropout=1.0))


@pytest.mark.parametrize("name", ["dag_gine_tiny", "gsm_pp", "mlp"])
def test_members_are_averaged(name):
    net = create_model(name, **options(name, members=3)).eval()
    batch = collate(graphs_for(name), topology=False)
    each = net.each(batch)
    assert not torch.allclose(each[0], each[1])
    torch.testing.assert_close(net(batch), (each[0] + each[1] + each[2]) / 3)
    torch.testing.assert_close(each[2], net.members[2](batch))
    assert isinstance(create_model(name, **options(name, members=1)), GraphModel)
    with pytest.raises(ValueError, match="members must be at least 1, got 0"):
        create_model(name, **options(name, members=0))


@pytest.mark.parametrize("along", ["order", "both"])
@pytest.mark.parametrize("name", ["dag_gine_tiny", "chimera_graph_tiny"])
def test_states_along_the_order_of_nodes(name, along):
    """Nodes without edges tell each other something, within their graph and by their numbers."""
    net = create_model(name, **options(name, along=along, level="node")).double().eval()
    graphs = graphs_for(name)
    y = net(collate(graphs))
    torch.testing.assert_close(y, torch.cat([net(one) for one in graphs]))
    bare = graph(9, 0)
    first = replace(bare, x=torch.cat([(bare.x[:1] + 1) % 3, bare.x[1:]]))
    assert ((net(first) - net(bare)).abs().amax(1) > 1e-9).all()
    turned = replace(bare, x=bare.x.flip(0))
    assert not torch.allclose(net(turned).flip(0), net(bare))
    edges = create_model(name, **options(name, along="edges", level="node")).double().eval()
    assert int(((edges(first) - edges(bare)).abs().amax(1) > 1e-9).sum()) == 1
    y.sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    with pytest.raises(ValueError, match="along must be one of edges, order, both, got 'line'"):
        create_model(name, **options(name, along="line"))


@pytest.mark.parametrize("name", list_models())
def test_edges_and_their_features_matter(name):
    net = create_model(name, **options(name)).double().eval()
    one = graphs_for(name)[3]
    fewer = replace(one, edge_index=one.edge_index[:, :0], edge_attr=one.edge_attr[:0])
    same = torch.allclose(net(one), net(fewer))
    assert same == (name == "mlp")
    relabelled = replace(one, edge_attr=(one.edge_attr + 1) % 4)
    assert torch.allclose(net(one), net(relabelled)) == (name in ("mlp", "gcn"))


@pytest.mark.parametrize("name", list_models())
def test_bfloat16_on_a_cpu_and_state(name):
    net = create_model(name, **options(name)).eval()
    batch = collate(graphs_for(name))
    expected = net(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (net(batch) - expected).abs().max() < 0.1 * expected.abs().max()
    other = create_model(name, **options(name)).eval()
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(batch), expected)
    assert sum(p.numel() for group in param_groups(net) for p in group["params"]) == sum(
        p.numel() for p in net.parameters()
    )


@pytest.mark.parametrize("name", ["dag_gine_tiny", "chimera_graph_tiny"])
def test_hard_graphs(name):
    """5,000 parents, a complete DAG of 200, two parts, parallel edges, and values for features."""
    hub = torch.stack([torch.arange(1, 5001), torch.zeros(5000, dtype=torch.int64)])
    complete = torch.triu_indices(200, 200, 1)
    apart = torch.tensor([[0, 0, 3], [1, 1, 4]])
    net = create_model(name, node_features=2, d_model=8, n_layer=1, headdim=4, d_state=2).eval()
    for nodes, ends in ((5001, hub), (200, complete), (6, apart)):
        x = torch.randn(nodes, 2)
        y = net(Graph(x, ends))
        assert y.isfinite().all()
        assert y.shape == (1, 1)


def test_a_mixer_for_dags_refuses_cycles():
    net = create_model("dag_ssm_tiny", **options("dag_ssm_tiny"))
    ring = Graph(torch.zeros(3, 2, dtype=torch.int64), torch.tensor([[0, 1, 2], [1, 2, 0]]), torch.zeros(3, 1).long())
    ahead = graph(4, 3)
    with pytest.raises(ValueError, match=r"cycle: nodes (4 -> 5 -> 6|5 -> 6 -> 4|6 -> 4 -> 5) -> \d of graph 1"):
        net(collate([ahead, ring]))
    loop = replace(ring, edge_index=torch.tensor([[0, 1, 1], [1, 2, 1]]))
    with pytest.raises(ValueError, match="self loop at node 1"):
        net(loop)
    assert create_model("chimera_graph_tiny", **options("chimera_graph_tiny"))(loop).isfinite().all()


@pytest.mark.parametrize("name", ["dag_gine_tiny", "chimera_graph_tiny", "gps", "gsm_pp"])
def test_float16_under_autocast(name):
    net = create_model(name, **options(name))
    with torch.autocast("cpu", dtype=torch.float16):
        y = net(collate(graphs_for(name)))
    y.float().square().sum().backward()
    assert y.isfinite().all()
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("name", list_models())
def test_batches_that_are_none(name):
    """Objects of PyG whose graphs are mixed up or joined by an edge."""
    net = create_model(name, node_vocab=[1], d_model=32, n_layer=1)
    parts = {"x": torch.zeros(4, 1).long(), "edge_index": torch.tensor([[0, 2], [1, 3]]), "edge_attr": None, "y": None}
    with pytest.raises(ValueError, match="must not decrease"):
        net(SimpleNamespace(**parts, batch=torch.tensor([1, 0, 1, 0])))
    parts["edge_index"] = torch.tensor([[0, 1], [1, 3]])
    with pytest.raises(ValueError, match="Edge 1 joins nodes 1 and 3 of two graphs"):
        net(SimpleNamespace(**parts, batch=torch.tensor([0, 0, 1, 1])))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: create_model("dag_ssm_tyni"), ValueError, "Did you mean 'dag_ssm_tiny'"),
        (lambda: create_model("gine", dropuot=0.1), TypeError, "did you mean dropout"),
        (lambda: create_model("gine", gamma=0.9), TypeError, "no option 'gamma'"),
        (lambda: create_model("gine", level="edge"), ValueError, "graph, node, link"),
        (lambda: create_model("gine", level="link", num_outputs=2), ValueError, "inner product"),
        (lambda: create_model("gine", n_layer=0), ValueError, "must be positive"),
        (lambda: create_model("gine", node_vocab=[3], node_features=2), ValueError, "not both"),
        (lambda: create_model("gine", node_vocab=[5])(graph(3, 2)), ValueError, "takes 1 columns"),
        (lambda: create_model("gine", node_vocab=[1, 3])(graph(9, 2)), ValueError, "below [1, 3]"),
        (lambda: create_model("gine", node_vocab=[5, 3], pe=4)(graph(3, 2)), ValueError, "no `pe`"),
        (lambda: create_model("gine", **options("gine"))(replace(graph(3, 2), edge_attr=None)), ValueError, "got none"),
        (lambda: create_model("gine", node_vocab=[5, 3], level="link")(graph(3, 2)), ValueError, "`pairs`"),
    ],
)
def test_what_is_refused(make, error, message):
    with pytest.raises(error) as caught:
        make()
    assert message in str(caught.value)


def test_gcn_is_the_product_of_its_equation():
    one = graph(9, 14, directed=False)
    conv = GCN(8).double()
    x = torch.randn(9, 8, dtype=torch.float64)
    matrix = torch.eye(9, dtype=torch.float64)
    matrix.index_put_((one.edge_index[1], one.edge_index[0]), torch.ones(one.num_edges).double(), accumulate=True)
    scale = torch.diag(matrix.sum(1).rsqrt())
    torch.testing.assert_close(conv(x, x, one.edge_index), conv.linear(scale @ matrix @ scale @ x))


def test_gated_gcn_node_by_node():
    one = graph(7, 10)
    conv = GatedGCN(4).double().eval()
    x, e = torch.randn(7, 4).double(), torch.randn(one.num_edges, 4).double()
    own, sent, from_source, to_target = conv.nodes(x).chunk(4, dim=-1)
    y, edges = conv(x, e, one.edge_index)
    for v in range(7):
        total, weight = torch.zeros(4).double(), torch.full((4,), 1e-6).double()
        for k, (source, target) in enumerate(one.edge_index.t().tolist()):
            if target == v:
                logit = to_target[v] + from_source[source] + conv.edges(e[k])
                total, weight = total + logit.sigmoid() * sent[source], weight + logit.sigmoid()
                new = e[k] + torch.nn.functional.gelu(conv.edge_norm(logit))
                torch.testing.assert_close(edges[k], new)
        new = own[v] + total / weight
        torch.testing.assert_close(y[v], x[v] + torch.nn.functional.gelu(conv.node_norm(new)))


def test_attention_sees_its_own_graph_only():
    attention = GraphAttention(8, 2).double()
    batch, ptr = torch.tensor([0, 0, 0, 2, 2]), torch.tensor([0, 3, 3, 5])
    x = torch.randn(5, 8, dtype=torch.float64)
    y = attention(x, batch, ptr)
    alone = attention(x[3:], torch.zeros(2, dtype=torch.int64), torch.tensor([0, 2]))
    torch.testing.assert_close(y[3:], alone)
    q, k, v = attention.qkv(x[3:]).chunk(3, dim=-1)
    heads = [(part[:, :4], part[:, 4:]) for part in (q, k, v)]
    mixed = [(heads[0][i] @ heads[1][i].T / 2).softmax(-1) @ heads[2][i] for i in range(2)]
    torch.testing.assert_close(alone, attention.out(torch.cat(mixed, dim=1)))


def test_encoder_adds_one_row_per_column():
    encoder = FeatureEncoder(4, [3, 2])
    x = torch.tensor([[2, 1], [0, 0]])
    torch.testing.assert_close(encoder(x, 2), encoder.table.weight[[2, 0]] + encoder.table.weight[[4, 3]])
    plain = FeatureEncoder(4)
    assert torch.equal(plain(None, 3), plain.table.weight.expand(3, -1))
    with pytest.raises(TypeError, match="categories as integers"):
        encoder(x.float(), 2)
