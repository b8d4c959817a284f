"""The task: losses and metrics by hand, unknown targets, units, and learning."""

from dataclasses import replace

import pytest
import torch

from omnissm.graphs import Graph, collate
from omnissm.graphs.data import Packed, SyntheticGraphs
from omnissm.graphs.tasks import GraphPrediction
from omnissm.ssmcore.training import create_optimizer

NAN = float("nan")


def task_for(target, outputs=1, **options):
    schema = {"node_vocab": [4], "num_outputs": outputs, "target": target, **options.pop("more", {})}
    return GraphPrediction("mlp", {"d_model": 8}, schema, **options)


def test_losses_leave_out_what_is_unknown():
    task = task_for("classes", 3)
    y = torch.tensor([[2.0, 0, 0], [0, 1.0, 0], [9.0, 9.0, 9.0]])
    labels = torch.tensor([0, 2, -1])
    expected = -(y[:2].log_softmax(1)[[0, 1], [0, 2]]).mean()
    torch.testing.assert_close(task.mean_loss(y, labels), expected)
    assert task.mean_loss(y, torch.full((3,), -1)) == 0
    found = task.metrics(y, labels[:, None])
    assert found["accuracy"] == 0.5

    task = task_for("values", 2, more={"mean": [1.0, 0.0], "scale": [2.0, 1.0]}, loss="mae")
    labels = torch.tensor([[3.0, NAN], [NAN, 5.0]])
    torch.testing.assert_close(task.mean_loss(torch.zeros(2, 2), labels), torch.tensor((1.0 + 5.0) / 2))
    with pytest.raises(ValueError, match="gives"):
        task.mean_loss(torch.zeros(2, 1), labels)


def test_classes_are_weighted_by_the_others():
    task = task_for("classes", 2, class_weighted=True)
    y, labels = torch.tensor([[1.0, 0], [1.0, 0], [1.0, 0], [0, 0]]), torch.tensor([0, 0, 0, 1])
    each = torch.nn.functional.cross_entropy(y, labels, reduction="none")
    weight = torch.tensor([0.25, 0.25, 0.25, 0.75])
    torch.testing.assert_close(task.mean_loss(y, labels), (each * weight).sum() / weight.sum())


def test_labels_are_smoothed_while_training():
    task = task_for("classes", 2, label_smoothing=0.2)
    y, labels = torch.tensor([[2.0, 0], [0.0, 1.0], [5.0, 5.0]]), torch.tensor([0, 1, -1])
    logs = y.log_softmax(1)
    plain = -(logs[0, 0] + logs[1, 1]) / 2
    torch.testing.assert_close(task.train().mean_loss(y, labels), 0.8 * plain - 0.2 * logs[:2].mean())
    torch.testing.assert_close(task.eval().mean_loss(y, labels), plain)
    with pytest.raises(ValueError, match="label_smoothing must be at least 0 and below 1, got 1"):
        task_for("classes", 2, label_smoothing=1.0)


@pytest.mark.parametrize("option", [{"class_weighted": True}, {"label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("target", ["values", "binary"])
def test_options_of_classes_are_refused_elsewhere(option, target):
    (name,) = option
    with pytest.raises(ValueError, match=f"{name} is for targets that are classes; these are '{target}'"):
        task_for(target, 1, **option)


def test_members_learn_each_for_itself():
    """The gradient of a member is that of its own loss, over their number."""
    schema = {"node_vocab": [4], "num_outputs": 1, "target": "values"}
    task = GraphPrediction("mlp", {"d_model": 8, "members": 2}, schema)
    task.log = lambda *a, **k: None
    graphs = [Graph(torch.randint(4, (5, 1)), torch.zeros(2, 0).long(), y=torch.randn(1, 1)) for _ in range(3)]
    batch = collate(graphs)
    task.training_step(batch, 0).backward()
    for member in task.net.members:
        found = [p.grad.clone() for p in member.parameters()]
        member.zero_grad()
        (task.mean_loss(member(batch), batch.y) / 2).backward()
        for one, p in zip(found, member.parameters()):
            torch.testing.assert_close(one, p.grad)


def test_metrics_are_of_the_whole_part():
    task = task_for("binary", 2)
    y = torch.tensor([[0.1, 0.0], [0.4, 1.0], [0.35, 2.0], [0.8, 3.0]])
    labels = torch.tensor([[0, 1.0], [0, NAN], [1.0, 1.0], [1.0, 1.0]])  # the second label has one side: no ranking
    found = task.metrics(y, labels)
    assert found["auroc"] == pytest.approx(0.75)
    assert found["ap"] == pytest.approx(0.5 + 0.5 * 2 / 3)

    task = task_for("values", more={"mean": [10.0], "scale": [4.0]})
    raw, labels = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[11.0], [13.0], [21.0]])
    found = task.metrics(task._in_units(raw), labels)
    errors = torch.tensor([-1.0, 1.0, -3.0])
    assert found["rmse"] == pytest.approx(float(errors.square().mean().sqrt()))
    assert found["mae"] == pytest.approx(5 / 3)
    expected = torch.corrcoef(torch.stack([raw[:, 0], labels[:, 0]]))[0, 1]
    assert found["pearson"] == pytest.approx(float(expected), abs=1e-6)


def test_forward_speaks_the_units_of_the_data():
    task = task_for("values", more={"mean": [10.0], "scale": [4.0]}).eval()
    batch = collate([Graph(torch.tensor([[1], [2]]), torch.zeros(2, 0, dtype=torch.int64))])
    torch.testing.assert_close(task(batch), 4 * task.net(batch) + 10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GraphPrediction("mlp"), "needs a schema"),
        (lambda: task_for("ranks"), "target must be one of"),
        (lambda: task_for("values", loss="rmse"), "loss must be one of"),
        (lambda: GraphPrediction("mpl", schema={"num_outputs": 1}), "Did you mean 'mlp'"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def learn(task, graphs, epochs, lr, batch_size=64):
    """Adam with warm-up and cosine, batches of fixed graphs."""
    torch.manual_seed(0)
    batches = [collate(graphs[i : i + batch_size]) for i in range(0, len(graphs), batch_size)]
    optimizer = create_optimizer(task, lambda groups: torch.optim.AdamW(groups, lr=lr, weight_decay=0.0))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * len(batches), pct_start=0.1)
    for _ in range(epochs):
        for i in torch.randperm(len(batches)).tolist():
            loss = task.mean_loss(task.net(batches[i]), batches[i].y)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(task.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return task.eval()


@torch.no_grad()
def score(task, graphs):
    batch = collate(graphs)
    y = task(batch)
    return task.metrics(y, batch.y if batch.y.dim() == 2 else batch.y[:, None])


def test_one_layer_adds_up_paths():
    data = SyntheticGraphs("path_sum", train_samples=2048, val_samples=128)
    options = {"d_model": 32, "n_layer": 1, "bidirectional": False, "edge_norm": "none"}
    torch.manual_seed(0)
    task = learn(GraphPrediction("dag_ssm_tiny", options, data.schema), data.graphs("train"), 12, 5e-3)
    assert score(task, data.graphs("val"))["rmse"] < 0.25 * data.schema["scale"][0]


def test_one_layer_reaches_across_a_ring():
    """Eight edges away in one layer; the same width without the resolvent stays at chance."""
    data = SyntheticGraphs("ring", {"k": 8}, train_samples=2048, val_samples=128)
    options = {"d_model": 32, "n_layer": 1, "local": "none", "mlp": 0}
    torch.manual_seed(0)
    task = learn(GraphPrediction("chimera_graph_tiny", options, data.schema), data.graphs("train"), 8, 3e-3)
    assert score(task, data.graphs("val"))["accuracy"] == 1
    near = learn(GraphPrediction("gine", {"d_model": 32}, data.schema), data.graphs("train"), 3, 3e-3)
    assert score(near, data.graphs("val"))["accuracy"] < 0.45


@pytest.mark.slow
def test_one_layer_with_its_defaults_reaches_sixteen_edges():
    data = SyntheticGraphs("ring", {"k": 16}, train_samples=2048, val_samples=128)
    options = {"d_model": 32, "n_layer": 1, "local": "none", "mlp": 0}
    torch.manual_seed(0)
    task = learn(GraphPrediction("chimera_graph_tiny", options, data.schema), data.graphs("train"), 28, 3e-3)
    assert score(task, data.graphs("val"))["accuracy"] == 1


@pytest.mark.slow
def test_one_layer_carries_a_class_along_a_chain():
    data = SyntheticGraphs("chain", {"k": 64}, train_samples=2048, val_samples=128)
    options = {"d_model": 32, "n_layer": 1, "bidirectional": False, "mlp": 0}
    torch.manual_seed(0)
    task = learn(GraphPrediction("dag_ssm_tiny", options, data.schema), data.graphs("train"), 6, 3e-3)
    assert score(task, data.graphs("val"))["accuracy"] == 1


def test_eight_molecules_are_learned_by_heart(shared_data):
    path = shared_data / "graphs" / "esol.npz"
    if not path.is_file():
        pytest.skip("no esol.npz")
    data = Packed(str(path))
    eight = [replace(graph, y=torch.randn(1, 1)) for graph in data.graphs("train")[:8]]
    task = GraphPrediction("chimera_graph_tiny", {"d_model": 32, "n_layer": 2}, data.schema | {"mean": None})
    assert learn(task, eight * 8, 40, 5e-3).mean_loss(task.net(collate(eight)), collate(eight).y) < 0.01
