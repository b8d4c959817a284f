"""States passed from batch to batch: values, gradients, shuffling, noise, and what is measured."""

from typing import NamedTuple

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnissm.ssmcore import SequenceModel, Stack
from omnissm.ssmcore.training.length import (
    InitialStates,
    effective_remembrance,
    loss_by_position,
    state_norms,
)

OPTIONS = {"d_state": 4, "headdim": 4}


class Pieces(NamedTuple):
    x: Tensor
    starts: Tensor


class Regression(pl.LightningModule):
    """Squared outputs of a stack; keeps what its stack was given and gave."""

    def __init__(self, layers="m2", **options):
        super().__init__()
        torch.manual_seed(0)
        self.stack = Stack(8, layers, mixer_options={**OPTIONS, **options}).double()
        self.outputs, self.grads = [], []

    def training_step(self, batch, batch_idx):
        y = self.stack(batch.x)
        self.outputs.append(y.detach())
        return y.square().sum()

    def on_after_backward(self):
        self.grads.append([p.grad.clone() for p in self.parameters()])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(task, batches, callback, folder, epochs=1):
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
        default_root_dir=folder,
    )
    trainer.fit(task, torch.utils.data.DataLoader(batches, batch_size=None))
    return trainer


def pieces(count=3, rows=2, length=5):
    x = torch.randn(rows, count * length, 8, dtype=torch.float64)
    flags = [torch.full((rows,), index == 0) for index in range(count)]
    return x, [Pieces(part, flag) for part, flag in zip(x.split(length, dim=1), flags)]


def test_tbptt_is_one_long_pass_with_cut_gradients(tmp_path):
    x, batches = pieces()
    task, callback = Regression(), InitialStates("tbptt")
    fit(task, batches, callback, tmp_path)
    torch.testing.assert_close(torch.cat(task.outputs, dim=1), task.stack(x))
    state = None
    for batch, grads in zip(batches, task.grads):
        y, state = task.stack.prefill(batch.x, state)
        expected = torch.autograd.grad(y.square().sum(), list(task.parameters()))
        torch.testing.assert_close(grads, list(expected))
        state = state.detach()
    assert "forward" not in vars(task.stack)
    torch.testing.assert_close(task.stack(x[:, :5]), task.outputs[0])


def test_rows_that_start_start_from_zero(tmp_path):
    x, batches = pieces(2)
    batches[1] = batches[1]._replace(starts=torch.tensor([False, True]))
    task = Regression()
    fit(task, batches, InitialStates("tbptt"), tmp_path)
    torch.testing.assert_close(task.outputs[1][:1], task.stack(x[:1])[:, 5:])
    torch.testing.assert_close(task.outputs[1][1:], task.stack(x[1:, 5:]))
    # A new epoch forgets.
    task = Regression()
    batches = [batch._replace(starts=torch.zeros(2, dtype=torch.bool)) for batch in batches]
    fit(task, batches, InitialStates("tbptt"), tmp_path, epochs=2)
    torch.testing.assert_close(task.outputs[2], task.outputs[0])


def test_passed_states_are_those_of_the_batch_before():
    stack = Regression().stack
    _, batches = pieces(2, rows=4)
    callback = InitialStates("pass")
    begin = callback.initial_state(stack.init_state(4))
    assert not begin.layers[0].ssm.any()
    _, final = stack.prefill(batches[0].x, begin)
    callback.keep(begin, final.detach())
    for rows in (4, 3, 7):
        begin = callback.initial_state(stack.init_state(rows))
        for new, old in zip(begin.layers, final.layers):
            source = (new.ssm[:, None] == old.ssm).flatten(2).all(2)  # which row each came from
            assert source.any(1).all()
            assert source.sum(0).max() <= -(-rows // 4)
            assert not new.ssm.requires_grad
            assert torch.equal(new.conv, old.conv[source.int().argmax(1)])


def test_noise():
    stack = Stack(8, "m1", mixer_options={"d_state": 64, "headdim": 16})
    zero = stack.init_state(50)
    begin = InitialStates("noise", sigma=0.3).initial_state(zero)
    assert begin.layers[0].ssm.std().item() == pytest.approx(0.3, rel=0.05)
    assert not begin.layers[0].conv.any()
    callback = InitialStates("fitted_noise", momentum=0.5)
    assert callback.initial_state(zero) is zero
    heads = torch.tensor([3.0])[:, None, None] + torch.tensor([0.5])[:, None, None] * torch.randn(50, 1, 16, 64)
    seen = type(zero)((type(zero.layers[0])(zero.layers[0].conv, heads),), zero.position)
    for _ in range(3):
        callback.keep(zero, seen)
    ssm = callback.initial_state(zero).layers[0].ssm
    assert ssm.mean().item() == pytest.approx(3.0, abs=0.05)
    assert ssm.std().item() == pytest.approx(0.5, rel=0.05)


def test_starts_are_of_the_batch():
    callback, stack = InitialStates("tbptt"), Stack(8, "m1", mixer_options=OPTIONS)
    with pytest.raises(ValueError, match="`starts` must name the 3 rows of the batch, got 2"):
        callback.initial_state(stack.init_state(3), torch.tensor([True, False]))


def test_angles_are_no_magnitudes():
    stack = Stack(8, "x1", mixer_options=OPTIONS)
    zero = stack.init_state(3)
    for policy in ("noise", "fitted_noise"):
        callback = InitialStates(policy)
        callback.keep(zero, InitialStates("noise", sigma=1.0).initial_state(zero))
        state = callback.initial_state(zero).layers[0]
        assert state.ssm.any()
        assert not state.phi.any()
    assert state_norms(stack, torch.randn(1, 6, 8), 3).shape == (2, 2)  # ssm and k


@pytest.mark.parametrize("policy", ["pass", "fitted_noise"])
def test_checkpoints_hold_what_was_seen(policy, tmp_path):
    _, batches = pieces(2)
    task, callback = Regression(), InitialStates(policy)
    trainer = fit(task, batches, callback, tmp_path)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]
    again = InitialStates(policy)
    again.load_state_dict(next(value for key, value in saved.items() if "InitialStates" in key))
    states = []
    for each in (callback, again):
        torch.manual_seed(1)
        states.append(each.initial_state(task.stack.init_state(2)).layers[1].ssm)
    assert states[0].any()
    torch.testing.assert_close(*states)


def test_misuse_is_refused(tmp_path):
    _, batches = pieces(2)
    with pytest.raises(
        ValueError, match="`policy` must be one of 'noise', 'fitted_noise', 'pass', 'tbptt', got 'zero'"
    ):
        InitialStates("zero")
    with pytest.raises(ValueError, match="has no module 'net'"):
        fit(Regression(), batches, InitialStates("pass", module="net"), tmp_path)
    with pytest.raises(TypeError, match="states need a causal model; Stack is none"):
        fit(Regression("h1"), batches, InitialStates("pass"), tmp_path)
    task = Regression()
    with pytest.raises(ValueError, match="needs a batch with `first`"):
        fit(task, batches, InitialStates("tbptt", starts="first"), tmp_path)
    task.training_step = lambda batch, batch_idx: (task.stack(batch.x) + task.stack(batch.x)).sum()
    with pytest.raises(ValueError, match="called once per training step"):
        fit(task, batches, InitialStates("pass"), tmp_path)
    assert "forward" not in vars(task.stack)


def test_states_that_grow_are_refused():
    stack = Stack(8, "t1")
    callback = InitialStates("pass")
    begin = stack.init_state(2)
    with pytest.raises(ValueError, match="give its attention layers a window"):
        callback.keep(begin, stack.prefill(torch.randn(2, 5, 8), begin)[1])


def test_loss_by_position():
    losses = torch.arange(12.0).view(2, 6)
    torch.testing.assert_close(loss_by_position(losses, [0, 2, 6]), torch.tensor([3.5, 6.5]))
    with pytest.raises(ValueError, match="must increase within 0 to l=6"):
        loss_by_position(losses, [0, 7])


class LastTwo(nn.Module):
    """Logits that depend on the sum of the last two symbols."""

    def forward(self, x):
        return 20.0 * F.one_hot((x + F.pad(x, (1, 0))[:, :-1]) % 3, 3)


def test_effective_remembrance():
    x = torch.tensor([[1, 2, 0, 1, 1]])
    torch.testing.assert_close(effective_remembrance(LastTwo(), x, [0, 2, 3, 4]), torch.tensor([0.0, 0.0, 0.0, 1.0]))
    model = SequenceModel(8, "m1", vocab_size=4, mixer_options=OPTIONS)
    found = effective_remembrance(model, torch.randint(4, (2, 30)), [0, 29])
    assert found[0] == 0
    assert 0 < found[1] <= 1


def test_state_norms():
    model = SequenceModel(8, "m2", vocab_size=4, mixer_options=OPTIONS)
    x = torch.randint(4, (2, 10))
    norms = state_norms(model, x, 4)
    assert norms.shape == (3, 2)
    state = model.prefill(x)[1]
    expected = torch.stack([layer.ssm.square().mean().sqrt() for layer in state.layers])
    torch.testing.assert_close(norms[-1], expected)
