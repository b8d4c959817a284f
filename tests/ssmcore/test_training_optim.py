"""Parameter groups by rule, and schedules against their formulas."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from omnissm.ssmcore.init import no_weight_decay
from omnissm.ssmcore.mixers import Chimera2D
from omnissm.ssmcore.training import EpochDecay, WarmupCosine, create_optimizer, param_groups


class Cell(nn.Module):
    """One parameter of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.A_log = nn.Parameter(torch.zeros(4, 2))
        self.D = nn.Parameter(torch.ones(2, 4))
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
        self.table = nn.Parameter(torch.ones(2, 3))
        self.step = nn.Parameter(torch.ones(5, 2))
        self.marked = nn.Parameter(torch.ones(2, 2))
        no_weight_decay(self.marked)

    def no_decay_names(self) -> tuple[str, ...]:
        return ("table", "absent_by_option")

    def lr_names(self) -> dict[str, float]:
        return {"step": 1e-3}


def names_of(module, group):
    return {name for name, p in module.named_parameters() if any(p is q for q in group["params"])}


def test_groups_by_rule():
    cell = Cell()
    decayed, rest, own = param_groups(cell, 0.1)
    assert names_of(cell, decayed) == {"proj.weight"}
    assert names_of(cell, rest) == {"proj.bias", "norm.weight", "norm.bias", "A_log", "D", "table", "marked"}
    assert names_of(cell, own) == {"step"}
    assert (decayed["weight_decay"], rest["weight_decay"], own["weight_decay"]) == (0.1, 0.0, 0.0)
    assert own["lr"] == 1e-3
    assert "weight_decay" not in param_groups(cell)[0]


def test_marks_survive_in_declarations_after_copy_and_compile():
    wrapped = nn.ModuleDict({"a": copy.deepcopy(Cell())})
    wrapped["a"].compile()
    _, rest, own = param_groups(wrapped)
    assert "a.table" in names_of(wrapped, rest)
    assert names_of(wrapped, own) == {"a.step"}


def test_tied_parameters_are_counted_once_and_one_rule_is_enough():
    cell = Cell()
    cell.other = nn.Linear(3, 2, bias=False)
    cell.other.weight = cell.table
    groups = param_groups(cell)
    everything = [p for group in groups for p in group["params"]]
    assert len(everything) == len({id(p) for p in everything})
    assert any(p is cell.table for p in groups[1]["params"])


def test_mixer_declares_its_recurrence():
    mixer = Chimera2D(8, d_state=2)
    decayed, rest = param_groups(mixer)[:2]
    recurrence = {name for name, _ in mixer.named_parameters() if name.rpartition(".")[2] in mixer.no_decay_names()}
    assert recurrence
    assert recurrence <= names_of(mixer, rest)
    assert all(p.ndim >= 2 for p in decayed["params"])


def test_own_rate_is_capped_by_the_optimizers():
    optimizer = create_optimizer(Cell(), lambda groups: AdamW(groups, lr=1e-4, weight_decay=0.3))
    assert [group["lr"] for group in optimizer.param_groups] == [1e-4, 1e-4, 1e-4]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0, 0.0]
    optimizer = create_optimizer(Cell(), lambda groups: AdamW(groups, lr=1e-2))
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-2, 1e-3]


def test_nothing_to_train():
    assert create_optimizer(nn.Identity(), AdamW) is None


def rates(scheduler, optimizer, steps):
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def one_parameter(lr=1.0):
    return SGD([nn.Parameter(torch.zeros(1))], lr=lr)


def test_warmup_cosine_follows_its_formula():
    optimizer = one_parameter(0.5)
    scheduler = WarmupCosine(optimizer, warmup=0.2, final=0.1)
    scheduler.set_total_steps(20)
    expected = [0.5 * (k + 1) / 4 for k in range(4)]
    expected += [0.5 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * k / 16))) for k in range(16)]
    assert rates(scheduler, optimizer, 20) == pytest.approx(expected)
    assert rates(scheduler, optimizer, 3) == pytest.approx([0.05] * 3)  # stays at the end


def test_epoch_decay_halves():
    optimizer = one_parameter()
    assert rates(EpochDecay(optimizer, hold=2), optimizer, 5) == pytest.approx([1, 1, 0.5, 0.25, 0.125])


@pytest.mark.parametrize("create", [lambda o: WarmupCosine(o, total_steps=9), EpochDecay])
def test_schedule_continues_from_its_state(create):
    optimizer = one_parameter()
    scheduler = create(optimizer)
    whole = rates(scheduler, optimizer, 9)
    optimizer = one_parameter()
    scheduler = create(optimizer)
    rates(scheduler, optimizer, 4)
    state, inner = scheduler.state_dict(), optimizer.state_dict()
    optimizer = one_parameter()
    scheduler = create(optimizer)
    scheduler.load_state_dict(state)
    optimizer.load_state_dict(inner)
    assert rates(scheduler, optimizer, 5) == pytest.approx(whole[4:])


def test_warmup_cosine_of_another_length_goes_on_by_the_new_plan(caplog):
    optimizer = one_parameter()
    scheduler = WarmupCosine(optimizer)
    scheduler.set_total_steps(20)
    whole = rates(scheduler, optimizer, 20)
    optimizer = one_parameter()
    scheduler = WarmupCosine(optimizer)
    scheduler.set_total_steps(8)
    rates(scheduler, optimizer, 8)  # down to zero
    longer = one_parameter()
    resumed = WarmupCosine(longer)
    resumed.set_total_steps(20)
    longer.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    assert resumed.get_last_lr() == pytest.approx([whole[8]])
    assert rates(resumed, longer, 12) == pytest.approx(whole[8:])
    assert "planned for 8 steps and now for 20: at step 8" in caplog.text


@pytest.mark.parametrize(
    ("create", "message"),
    [
        (lambda o: WarmupCosine(o, warmup=5), r"share of all steps in \[0, 1\), got 5"),
        (lambda o: WarmupCosine(o, final=2), r"in \[0, 1\], got 2"),
        (lambda o: EpochDecay(o, factor=0), r"factor must be positive, got 0"),
        (lambda o: EpochDecay(o, hold=0), r"expected 1 or more, got 0"),
    ],
)
def test_bad_schedules(create, message):
    with pytest.raises(ValueError, match=message):
        create(one_parameter())


def test_rates_of_some_parameters_are_scaled():
    """Scales multiply the optimiser's rate, split groups as needed, and leave rates that modules declare alone."""

    class Own(nn.Linear):
        def lr_names(self):
            return {"weight": 1e-4}

    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), Own(2, 2, bias=False))
    scales = {net[0].weight: 3.0, net[0].bias: 3.0, net[2].weight: 7.0}
    made = create_optimizer(net, lambda groups: torch.optim.AdamW(groups, lr=1e-2), scales)
    rates = {id(p): group["lr"] for group in made.param_groups for p in group["params"]}
    assert [rates[id(p)] for p in net.parameters()] == pytest.approx([3e-2, 3e-2, 1e-2, 1e-2, 1e-4])
    assert all("scale" not in group for group in made.param_groups)
    decay = {id(p): group["weight_decay"] for group in made.param_groups for p in group["params"]}
    assert [decay[id(p)] for p in net.parameters()] == [1e-2, 0, 1e-2, 0, 0]
