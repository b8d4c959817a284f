"""Training for longer sequences than a batch holds: where the states of a training step begin, and what to measure.

Recurrent models fail beyond their training length because they meet states there that they have never begun from. A few
hundred further training steps from other states than zero repair much of it. Policies, for the states before a batch:

    noise         normal with one standard deviation
    fitted_noise  normal with mean and deviation of the final states seen so far, per layer and head
    pass          the final states of the batch before, rows shuffled
    tbptt         the final state of the piece before of the same sequence; zero where a sequence starts

Gradients never cross from one batch to the next. Buitrago Ruiz & Gu (2025), "Understanding and Improving Length
Generalization in Recurrent Models".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from itertools import pairwise
from typing import Any, Literal, get_args

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn
from torch.utils import _pytree

from ..blocks import Stack
from ..mixers.common import MixerState

Policy = Literal["noise", "fitted_noise", "pass", "tbptt"]


class InitialStates(Callback):
    """Start the sequences of training batches from states other than zero; validation starts from zero as ever.

    During a training step one module of the model, by default its first `Stack`, runs `prefill` where its forward is
    called. It must be causal, be called once a step, and have states of fixed size (attention needs a window). States
    are dropped when an epoch begins. They are part of checkpoints, for the first process; others start anew.

    Args:
        policy: "noise", "fitted_noise", "pass" or "tbptt".
        module: Name of the module within the LightningModule; None: its first `Stack`.
        sigma: Standard deviation for "noise".
        momentum: Weight of what was seen before in the running statistics of "fitted_noise", in [0, 1).
        starts: For "tbptt", attribute or key of a batch that says which rows begin a new sequence, (b,) bool.

    Raises:
        ValueError: if an option has an unknown value or lies out of range.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        module: str | None = None,
        sigma: float = 0.1,
        momentum: float = 0.99,
        starts: str = "starts",
    ) -> None:
        if policy not in get_args(Policy):
            raise ValueError(f"`policy` must be one of {', '.join(map(repr, get_args(Policy)))}, got {policy!r}.")
        if sigma < 0 or not 0 <= momentum < 1:
            raise ValueError(f"expected sigma >= 0 and 0 <= momentum < 1, got sigma={sigma}, momentum={momentum}.")
        self.policy, self.module, self.sigma, self.momentum, self.starts = policy, module, sigma, momentum, starts
        self._last: list[Tensor] | None = None  # leaves of the final state of the batch before
        self._moments: list[Tensor] = []  # per recurrent tensor: running sums of mean and square, (2, heads)
        self._weight = 0.0
        self._patched: nn.Module | None = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the states of the epoch before; statistics stay."""
        self._last = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Let the module go on from states for this step.

        Raises:
            ValueError: if the model has no such module, or the batch does not say which rows start.
            TypeError: if the module is not causal.
        """
        target = self._target(pl_module)
        if not getattr(target, "causal", False):
            raise TypeError(f"states need a causal model; {type(target).__name__} is none.")
        starts = self._starting_rows(batch) if self.policy == "tbptt" else None
        forward, calls = target.prefill, 0

        def from_state(x: Tensor, **arguments: Any) -> Tensor:
            nonlocal calls
            calls += 1
            if calls > 1:
                raise ValueError(f"InitialStates({self.policy!r}) needs a model that is called once per training step.")
            kind = x.device.type
            narrow = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            begin = self.initial_state(target.init_state(x.shape[0], device=x.device, dtype=narrow), starts)  # type: ignore[operator]
            y, final = forward(x, begin, **arguments)  # type: ignore[operator]
            self.keep(begin, final.detach())
            return y

        target.forward = from_state  # type: ignore[method-assign]
        self._patched = target

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        """Give the module its forward back."""
        if self._patched is not None:
            del self._patched.forward
            self._patched = None

    def on_exception(self, *_: Any, **__: Any) -> None:
        """Likewise."""
        self.on_train_batch_end()

    def state_dict(self) -> dict[str, Any]:
        """States and statistics, as tensors."""
        return {"last": self._last, "moments": self._moments, "weight": self._weight}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Read what `state_dict` wrote; on further processes the statistics alone."""
        first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        self._last = state_dict["last"] if first else None
        self._moments, self._weight = state_dict["moments"], state_dict["weight"]

    def initial_state(self, zero: Any, starts: Tensor | None = None) -> Any:
        """The state to begin a batch from.

        Args:
            zero: The model's own initial state for this batch.
            starts: Rows that begin a new sequence, (b,) bool, for "tbptt".

        Raises:
            ValueError: if `starts` is of another number of rows, or rows go on and the batch before had another number
                of them.
        """
        if self.policy == "noise":
            return _map_recurrent(zero, lambda _, tensor: tensor + self.sigma * torch.randn_like(tensor))
        if self.policy == "fitted_noise":
            return _map_recurrent(zero, self._fitted) if self._moments else zero
        leaves, spec = _pytree.tree_flatten(zero)
        rows = leaves[0].shape[0]
        if starts is not None and starts.shape[0] != rows:
            raise ValueError(f"`{self.starts}` must name the {rows} rows of the batch, got {starts.shape[0]}.")
        if self._last is None:
            return zero
        last = [tensor.to(leaf) for tensor, leaf in zip(self._last, leaves)]
        before = last[0].shape[0]
        if self.policy == "pass":
            order = torch.randperm(max(rows, before), device=last[0].device)[:rows] % before
            return _pytree.tree_unflatten([tensor.index_select(0, order) for tensor in last], spec)
        if starts is None or bool(starts.all()):
            return zero
        if rows != before:
            raise ValueError(
                f"rows go on from the batch before, which had {before} of them, this one has {rows}; "
                "keep the batch size, or mark all rows as starts."
            )
        starts = starts.to(last[0].device)
        begin = [
            torch.where(starts.unflatten(0, (-1, *[1] * (leaf.dim() - 1))), leaf, tensor)
            for leaf, tensor in zip(leaves, last)
        ]
        return _pytree.tree_unflatten(begin, spec)

    def keep(self, begin: Any, final: Any) -> None:
        """Remember the final state of a batch, detached.

        Raises:
            ValueError: if states grow with the sequence.
        """
        last = _pytree.tree_leaves(final)
        if any(new.shape != old.shape for new, old in zip(last, _pytree.tree_leaves(begin))):
            raise ValueError("states of this model grow from batch to batch; give its attention layers a window.")
        if self.policy in ("pass", "tbptt"):
            self._last = last
        elif self.policy == "fitted_noise":
            found = [_moments(tensor) for tensor in _recurrent(final)]
            old = self._moments or [torch.zeros_like(new) for new in found]
            self._moments = [self.momentum * was.to(new) + (1 - self.momentum) * new for was, new in zip(old, found)]
            self._weight = self.momentum * self._weight + 1 - self.momentum

    def _fitted(self, index: int, tensor: Tensor) -> Tensor:
        mean, square = (self._moments[index].to(tensor) / self._weight).unflatten(1, (-1, *[1] * (tensor.dim() - 2)))
        return mean + (square - mean.square()).clamp(min=0).sqrt() * torch.randn_like(tensor)

    def _target(self, module: nn.Module) -> nn.Module:
        if self.module is not None:
            try:
                return module.get_submodule(self.module)
            except AttributeError:
                raise ValueError(f"the model has no module {self.module!r}; see its named_modules().") from None
        for part in module.modules():
            if isinstance(part, Stack):
                return part
        raise ValueError("the model has no Stack; name the module whose states are to be passed on with `module`.")

    def _starting_rows(self, batch: Any) -> Tensor:
        if isinstance(batch, Mapping):
            found = batch.get(self.starts)
        else:
            found = getattr(batch, self.starts, None)
        if not isinstance(found, Tensor) or found.dtype != torch.bool or found.dim() != 1:
            raise ValueError(
                f"policy 'tbptt' needs a batch with `{self.starts}`, (b,) bool: rows that begin a sequence."
            )
        return found


def loss_by_position(losses: Tensor, edges: Sequence[int]) -> Tensor:
    """Mean loss between positions, which shows where a model leaves what it was trained for.

    Args:
        losses: Loss at every position, (b, l).
        edges: Increasing positions; bucket k holds edges[k] to edges[k + 1] - 1.

    Returns:
        (len(edges) - 1,).

    Raises:
        ValueError: if the edges do not increase or leave the sequence.
    """
    spans = list(pairwise(edges))
    if not spans or edges[0] < 0 or edges[-1] > losses.shape[1] or any(end <= start for start, end in spans):
        raise ValueError(f"`edges` must increase within 0 to l={losses.shape[1]}, got {list(edges)}.")
    return torch.stack([losses[:, start:end].mean() for start, end in spans])


@torch.no_grad()
def effective_remembrance(model: nn.Module, x: Tensor, starts: Sequence[int]) -> Tensor:
    """How much the prediction after a sequence depends on what came before some positions.

    Total variation, in [0, 1], between the model's distribution of the next symbol given all of x and given x[t:] only;
    0 where what lies before t no longer matters.

    Args:
        model: Maps (b, l) symbols to logits (b, l, v).
        x: (b, l).
        starts: Positions t, from 0 to l - 1.

    Returns:
        Means over the batch, (len(starts),).
    """
    whole = model(x)[:, -1].float().softmax(-1)
    found = [(model(x[:, t:])[:, -1].float().softmax(-1) - whole).abs().sum(-1) / 2 for t in starts]
    return torch.stack(found).mean(1)


@torch.no_grad()
def state_norms(model: nn.Module, x: Tensor, every: int) -> Tensor:
    """Root mean square of each recurrent state along a sequence; a trained model whose states keep growing fails later.

    Args:
        model: A causal model with `prefill`.
        x: (b, l) or (b, l, d).
        every: Positions between two measurements.

    Returns:
        (l / every rounded up, number of recurrent states), after every, 2 every, ... and l positions.

    Raises:
        ValueError: if `every` is below 1.
    """
    if every < 1:
        raise ValueError(f"expected every of at least 1, got {every}.")
    state, rows = None, []
    for piece in x.split(every, dim=1):
        _, state = model.prefill(piece, state)  # type: ignore[operator]
        rows.append(torch.stack([tensor.float().square().mean().sqrt() for tensor in _recurrent(state)]))
    return torch.stack(rows)


def _moments(tensor: Tensor) -> Tensor:
    """Mean and mean square for each head (or channel), (2, h)."""
    rows = tensor.movedim(1, 0).flatten(1)
    return torch.stack([rows.mean(1), rows.square().mean(1)])


def _recurrent(state: Any) -> list[Tensor]:
    """The recurrent tensors of a state that are no angles."""
    found: list[Tensor] = []

    def look(_: int, tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _map_recurrent(state, look)
    return found


def _map_recurrent(state: Any, function: Callable[[int, Tensor], Tensor]) -> Any:
    """The state with each recurrent tensor that is no angle replaced by function(number, tensor)."""
    count = 0

    def mapped(part: Any) -> Any:
        nonlocal count
        if isinstance(part, MixerState):
            changed = {}
            for name in part.recurrent:
                if name not in part.periodic:
                    changed[name] = function(count, getattr(part, name))
                    count += 1
            return replace(part, **changed)  # type: ignore[type-var]
        if isinstance(part, tuple):
            return tuple(map(mapped, part))
        if is_dataclass(part) and not isinstance(part, type):
            return replace(part, **{field.name: mapped(getattr(part, field.name)) for field in fields(part)})
        return part

    return mapped(state)
