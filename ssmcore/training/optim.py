"""Parameter groups by rule and learning-rate schedules.

Recurrence parameters (`A_log`, `dt_bias`, `D`), biases and norm weights are not decayed: pulling them to zero changes
time constants and scales rather than complexity. Source: Gu & Dao (2023), section E.2; Gu, Goel & Re (2021), section D.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

OptimizerCallable = Callable[[Iterable], Optimizer]
"""Parameter groups to an optimizer, as a configuration gives it by `class_path` and `init_args`."""
LRSchedulerCallable = Callable[[Optimizer], LRScheduler]
"""An optimizer to its schedule of rates, as a configuration gives it."""

OWN_LR = 1e-3
log = logging.getLogger(__name__)
_NO_DECAY = re.compile(r"(A\d*_log|D|dt\d*_bias|theta\d*|[BCz]_bias|init_states|mimo_.*|.*bias)$")


def param_groups(module: nn.Module, weight_decay: float | None = None) -> list[dict[str, Any]]:
    """Split trainable parameters into optimiser groups: decayed, not decayed, and those with their own rate.

    Not decayed are tensors of one dimension or none, the recurrence's own names (`A_log`, `dt_bias`, `D`, ...), what a
    module declares by `no_decay_names()`, and what `no_weight_decay` has marked. What a module declares by `lr_names()`
    (names, or a mapping of names to rates; default 1e-3) is not decayed either and has its own rate, which
    `create_optimizer` caps at the optimiser's.

    Args:
        module: Any module; tied parameters are counted once, and one rule against decay is enough.
        weight_decay: Decay of the first group; None leaves it to the optimiser's own setting.

    Returns:
        Groups that are not empty, as dictionaries for a `torch.optim` optimiser.
    """
    no_decay, own_lr = _declared(module)
    parameters: dict[int, nn.Parameter] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            continue
        parameters[id(parameter)] = parameter
        marked = getattr(parameter, "_no_weight_decay", False)
        if parameter.ndim < 2 or marked or _NO_DECAY.match(name.rpartition(".")[2]):
            no_decay.add(id(parameter))
    rates = {key: rate for key, rate in own_lr.items() if key in parameters}
    decayed = [p for key, p in parameters.items() if key not in no_decay and key not in rates]
    rest = [p for key, p in parameters.items() if key in no_decay and key not in rates]
    first: dict[str, Any] = {"params": decayed}
    if weight_decay is not None:
        first["weight_decay"] = weight_decay
    groups = [first, {"params": rest, "weight_decay": 0.0}]
    for rate in sorted(set(rates.values())):
        own = [parameters[key] for key in rates if rates[key] == rate]
        groups.append({"params": own, "weight_decay": 0.0, "lr": rate})
    return [group for group in groups if group["params"]]


def create_optimizer(
    module: nn.Module, optimizer: OptimizerCallable, scales: Mapping[Tensor, float] | None = None
) -> Optimizer | None:
    """Build the optimiser over `param_groups(module)`; None for a module without trainable parameters.

    Args:
        module: Any module.
        optimizer: Called with the groups.
        scales: Factors of the optimiser's rate for some parameters, such as those of one stage. Rates that modules
            declare themselves are not scaled.
    """
    groups = param_groups(module)
    if not groups:
        return None
    if scales:
        groups = [part for group in groups for part in _by_scale(group, scales)]
    created = optimizer(groups)
    limit = created.defaults.get("lr")
    for group in created.param_groups:
        if limit is not None and group["lr"] > limit:
            group["lr"] = limit
        group["lr"] *= group.pop("scale", 1.0)
    return created


def _by_scale(group: dict[str, Any], scales: Mapping[Tensor, float]) -> list[dict[str, Any]]:
    if "lr" in group:
        return [group]
    parts: dict[float, list[Tensor]] = {}
    for parameter in group["params"]:
        parts.setdefault(scales.get(parameter, 1.0), []).append(parameter)
    return [group | {"params": parts[scale], "scale": scale} for scale in sorted(parts, reverse=True)]


def _declared(module: nn.Module) -> tuple[set[int], dict[int, float]]:
    """Identities of the parameters that modules declare themselves; class declarations survive copies and sharding."""
    no_decay: set[int] = set()
    own_lr: dict[int, float] = {}
    for part in module.modules():
        if callable(names := getattr(part, "no_decay_names", None)):
            no_decay.update(id(_parameter(part, name)) for name in names())
        if callable(names := getattr(part, "lr_names", None)):
            declared = names()
            rates = declared if isinstance(declared, Mapping) else dict.fromkeys(declared, OWN_LR)
            own_lr.update({id(_parameter(part, name)): float(rate) for name, rate in rates.items()})
    return no_decay, own_lr


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    """Like `module.get_parameter(name)`, but None where an option has left the parameter out."""
    owner, _, leaf = name.rpartition(".")
    try:
        return module.get_submodule(owner)._parameters.get(leaf)
    except AttributeError:
        return None


class WarmupCosine(LRScheduler):
    """Linear warm-up from zero, then half a cosine down to a share of the rate; stepped after every batch.

        rate_k = lr * (k + 1) / w                                          k < w = ceil(warmup * total)
        rate_k = lr * (final + (1 - final) (1 + cos(pi (k - w) / (total - w))) / 2)

    Args:
        optimizer: Whose groups are scheduled, each from its own rate.
        warmup: Share of all steps spent warming up, in [0, 1).
        final: Rate at the end, as a share of the full one.
        total_steps: Number of steps; None takes the trainer's plan.

    Raises:
        ValueError: if a share lies outside its range.
    """

    interval = "step"

    def __init__(
        self, optimizer: Optimizer, warmup: float = 0.05, final: float = 0.0, total_steps: int | None = None
    ) -> None:
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup is a share of all steps in [0, 1), got {warmup}.")
        if not 0 <= final <= 1:
            raise ValueError(f"final is a share of the full rate in [0, 1], got {final}.")
        self.warmup = warmup
        self.final = final
        self.total_steps = total_steps
        super().__init__(optimizer)

    def set_total_steps(self, total_steps: int) -> None:
        """Fix the plan's length where the constructor has left it open, and apply it to the present step."""
        if self.total_steps is None:
            self.total_steps = total_steps
            self._apply()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved step; where this run is planned for another length than the saved one, by its plan."""
        planned = self.total_steps
        super().load_state_dict(state_dict)
        saved = self.total_steps
        if planned is not None and planned != saved:
            self.total_steps = planned
            self._apply()
            log.warning(
                "The learning rate was planned for %s steps and now for %d: at step %d it moves to the new plan.",
                saved,
                planned,
                self.last_epoch,
            )

    def _apply(self) -> None:
        """Set the rates of the present step."""
        for group, rate in zip(self.optimizer.param_groups, self.get_lr()):
            group["lr"] = rate
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def get_lr(self) -> list[Any]:
        """Rates of the present step, one per group, without recursion: a resumed run needs no history."""
        total = self.total_steps or 1
        ramp = math.ceil(self.warmup * total)
        step = min(self.last_epoch, total)
        if step < ramp:
            share = (step + 1) / ramp
        else:
            progress = (step - ramp) / max(1, total - ramp)
            share = self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))
        return [rate * share for rate in self.base_lrs]


class EpochDecay(LRScheduler):
    """The full rate for some epochs, then a fixed factor per epoch (halving by default).

        rate_e = lr * factor ** max(0, e + 1 - hold),      e = 0, 1, ...

    Args:
        optimizer: Whose groups are scheduled, each from its own rate.
        factor: Multiplier per epoch after the held ones.
        hold: Epochs at the full rate.

    Raises:
        ValueError: if `factor` is not positive or `hold` is below 1.
    """

    interval = "epoch"

    def __init__(self, optimizer: Optimizer, factor: float = 0.5, hold: int = 1) -> None:
        if factor <= 0:
            raise ValueError(f"factor must be positive, got {factor}.")
        if hold < 1:
            raise ValueError(f"hold counts epochs at the full rate, expected 1 or more, got {hold}.")
        self.factor = factor
        self.hold = hold
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        """Rates of the present epoch, one per group."""
        share = self.factor ** max(0, self.last_epoch + 1 - self.hold)
        return [rate * share for rate in self.base_lrs]
