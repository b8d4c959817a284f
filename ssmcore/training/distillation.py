"""Distilling attention into state-space models: the three stages one after another in one run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distill import STAGES, HybridAttention, Stage, attention_layers, convert, stage_loss
from ..mixers import Attention
from .optim import LRSchedulerCallable, OptimizerCallable
from .task import SSMTask


class Distillation(SSMTask):
    """Teach a copy of a model, with state-space models in place of attention heads, to do what the model does.

    Batches are tensors (symbols or images), tuples whose first entry is one, or named tuples with `tokens` (and `mask`,
    `seq_idx`) or `image`, as the data modules of this library make them.

    Logs `train/loss` and `train/stage` (0, 1, 2); for validation and test `loss` and `kl` (cross-entropy to the teacher
    and what of it is avoidable, nats per prediction) and `agreement` (share of equal best guesses); for batches with
    `tokens` also `nats` and `teacher_nats`, the cross-entropy of the next symbol.

    The first two stages leave some weights out; several processes need the strategy `ddp_find_unused_parameters_true`.

    Args:
        teacher: With `Attention` modules; it is not changed, and no part of checkpoints. Or a path for `reader`.
        reader: Called with the path, such as `omnissm.genomics.models.from_pretrained`; for configurations.
        keep: Heads that stay attention, by layer; see `omnissm.ssmcore.distill.convert`. None: none.
        shares: Share of the run's steps for the stages "matrix", "hidden" and "logits".
        temperature: Of the last stage.
        train_rest: Train embedding, norms, MLPs and heads that stayed attention in the last stage too, instead of the
            state-space models alone.
        optimizer: Called with parameter groups.
        lr_scheduler: Called with the optimiser.
        compile: Compile the student.
        check_finite: Stop at a loss or gradient that is not finite.

    Raises:
        ValueError: if shares are not three numbers of sum 1, a path has no reader, or nothing can be replaced.
    """

    monitor = "val/kl"

    def __init__(
        self,
        teacher: nn.Module | str,
        reader: Callable | None = None,
        keep: dict[str, list[int]] | None = None,
        shares: tuple[float, float, float] = (0.2, 0.2, 0.6),
        temperature: float = 1.0,
        train_rest: bool = True,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        compile: bool = False,
        check_finite: bool = True,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, compile, check_finite)
        if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"`shares` must be three shares (matrix, hidden, logits) of sum 1, got {tuple(shares)}.")
        if temperature <= 0:
            raise ValueError(f"`temperature` must be positive, got {temperature}.")
        if isinstance(teacher, str) and reader is None:
            raise ValueError(f"`reader` must say how to read the teacher at {teacher}, got none.")
        source: nn.Module = reader(teacher) if isinstance(teacher, str) and reader is not None else teacher  # type: ignore[assignment]
        self.net = convert(source, keep).train()
        # In a tuple, so that it is no part of this module: neither in checkpoints nor trained.
        self._teacher = (source.eval().requires_grad_(False),)
        self.net.requires_grad_(train_rest)
        for name in attention_layers(source):
            mixer: Any = self.net.get_submodule(name)
            if not isinstance(mixer, Attention):
                (mixer.second if isinstance(mixer, HybridAttention) else mixer).requires_grad_(True)
        self.keep = {name: [int(head) for head in heads] for name, heads in (keep or {}).items()}
        self.shares, self.temperature = tuple(float(share) for share in shares), temperature

    @property
    def teacher(self) -> nn.Module:
        """The model to learn from."""
        return self._teacher[0]

    def model_config(self) -> dict[str, Any]:
        """Which heads stayed; `convert(teacher, keep)` rebuilds the network."""
        return {"model": "ssmcore/distilled", "args": {"keep": self.keep}, "task": {"kind": type(self).__name__}}

    def on_fit_start(self) -> None:
        """Put the teacher where the student is."""
        self.teacher.to(self.device)

    on_validation_start = on_test_start = on_fit_start

    def stage(self, step: int, total: float) -> Stage:
        """The stage of an optimiser step of a run of `total` steps."""
        ends = list(accumulate(self.shares))
        return next(stage for stage, end in zip(STAGES, [*ends[:2], math.inf]) if step < end * total)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of the present stage.

        Raises:
            ValueError: if the run has no end, so that stages cannot share it.
        """
        total = self.trainer.estimated_stepping_batches
        if not math.isfinite(total):
            raise ValueError("the stages share a run that has an end; set trainer.max_epochs or trainer.max_steps.")
        stage = self.stage(self.trainer.global_step, total)
        x, options = read_batch(batch)
        loss = stage_loss(
            stage,
            self.teacher,
            self.net,
            lambda model: model(x, **options),
            temperature=self.temperature,
            mask=options.get("mask"),
        )
        self.log("train/loss", loss)
        self.log("train/stage", float(STAGES.index(stage)))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log how far the student is from the teacher."""
        self._compare(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log how far the student is from the teacher."""
        self._compare(batch, "test")

    def _compare(self, batch: Any, part: str) -> None:
        x, options = read_batch(batch)
        got = self.net(x, **options).float().log_softmax(-1)
        wanted = self.teacher(x, **options).float().log_softmax(-1)
        real = options.get("mask")
        real = torch.ones(got.shape[:-1], dtype=torch.bool, device=got.device) if real is None else real
        cross, entropy = (-(wanted.exp() * one).sum(-1)[real] for one in (got, wanted))
        found = {
            "loss": cross.mean(),
            "kl": (cross - entropy).mean(),
            "agreement": (got.argmax(-1) == wanted.argmax(-1))[real].float().mean(),
        }
        count = int(real.sum())
        if hasattr(batch, "tokens"):
            both = real[:, 1:] & real[:, :-1]
            if options.get("seq_idx") is not None:
                both = both & (options["seq_idx"][:, 1:] == options["seq_idx"][:, :-1])
            for name, one in (("nats", got), ("teacher_nats", wanted)):
                found[name] = F.nll_loss(one[:, :-1][both], x[:, 1:][both])
        self.log_dict({f"{part}/{name}": value for name, value in found.items()}, batch_size=count, sync_dist=True)


def read_batch(batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """What a model is called with: its input, and mask and numbers of packed sequences where there are any.

    Raises:
        TypeError: if the batch is of none of the kinds that `Distillation` names.
    """
    if isinstance(batch, Tensor):
        return batch, {}
    if hasattr(batch, "tokens"):
        mask, seq_idx = getattr(batch, "mask", None), getattr(batch, "seq_idx", None)
        options = {"mask": None if mask is None or bool(mask.all()) else mask, "seq_idx": seq_idx}
        return batch.tokens, {name: value for name, value in options.items() if value is not None}
    if hasattr(batch, "image"):
        return batch.image, {}
    if isinstance(batch, Sequence) and not isinstance(batch, Mapping) and batch and isinstance(batch[0], Tensor):
        return batch[0], {}
    raise TypeError(f"expected a tensor, a tuple of tensors, or a batch with `tokens` or `image`, got {type(batch)}.")
