"""Training tasks: language models of next or masked bases, with the losses of hierarchies; supervised ones."""

from __future__ import annotations

import logging
import math
from typing import Any, Literal

import torch
from torch import Tensor

from ..ssmcore import Stack
from ..ssmcore.chunking import Boundaries, chunk_stats, ratio_loss
from ..ssmcore.training import SSMTask
from ..ssmcore.training.optim import LRSchedulerCallable, OptimizerCallable
from .data.batch import SequenceBatch
from .losses import IGNORE, bits, blocked_cross_entropy, next_base_targets
from .models import create_model, model_config, vocabulary_file
from .sequence import vocabulary as find_vocabulary
from .supervised import SequenceClassification as SequenceClassification
from .supervised import SequenceRegression as SequenceRegression
from .supervised import TokenClassification as TokenClassification

log = logging.getLogger(__name__)

PATIENCE = 200  # steps with a rate out of bounds before a stage counts as collapsed


class LanguageModel(SSMTask):
    """What next-base and masked language models share: sums over bases, losses on rates, learning rates of stages.

    Logs `train/loss` and, for training, validation and test, `bits_per_base`, `perplexity` and of hierarchies
    `stage{s}/rate` and `chunk_length`; validation and test also `loss` (nats per base), and where the data weigh some
    bases lower (soft-masked ones) `bits_per_base_soft` and `bits_per_base_hard`. All are exact over the whole part.

    Args:
        model: Name of a model, see `omnissm.genomics.list_models`.
        model_args: Its own options.
        vocabulary: Of the ids; taken from the data module on the command line.
        optimizer: Called with the parameter groups.
        lr_scheduler: Called with the optimiser.
        lr_multipliers: Learning rates of the stages, outermost first, as multiples of the optimiser's; "auto" asks the
            model.
        ratio_sync: Average rates of boundaries over all processes in the loss.
        grad_checkpointing: Recompute every n-th block in the backward pass; 0: none.
        compile: Compile the network.
        check_finite: Stop at a loss or gradient that is not finite.

    Raises:
        ValueError: if there are not as many multipliers as stages.
    """

    net: Any
    is_base: Tensor

    def __init__(
        self,
        model: str = "dnahnet_debug",
        model_args: dict[str, Any] | None = None,
        vocabulary: str = "byte",
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_multipliers: Literal["auto"] | list[float] = "auto",
        ratio_sync: bool = False,
        grad_checkpointing: int = 0,
        compile: bool = False,
        check_finite: bool = True,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, compile, check_finite)
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.net = create_model(model, **({"vocabulary": vocabulary} | (model_args or {})))
        own = [float(m) for m in self.net.lr_multipliers()] if hasattr(self.net, "lr_multipliers") else [1.0]
        self.multipliers = own if lr_multipliers == "auto" else [float(m) for m in lr_multipliers]
        if len(self.multipliers) != len(own):
            raise ValueError(f"`lr_multipliers` needs {len(own)} entries for {model!r}, got {len(self.multipliers)}.")
        self.ratio_sync = ratio_sync
        for part in self.net.modules():
            if isinstance(part, Stack):
                part.set_grad_checkpointing(grad_checkpointing)
        words = find_vocabulary(self.net.vocabulary)
        is_base = torch.zeros(self.net.vocab_size, dtype=torch.bool)
        is_base[torch.from_numpy(words.bases)] = True
        self.register_buffer("is_base", is_base, persistent=False)
        self.sums: dict[str, Tensor] = {}
        self.collapsed = [0] * len(self.targets)

    @property
    def targets(self) -> list[float]:
        """Elements per chunk aimed at, one per stage."""
        return list(getattr(self.net, "target_ratios", []))

    def forward(self, batch: SequenceBatch) -> Tensor:
        """Logits (b, l, V)."""
        return self.net(batch.tokens, mask=batch.mask, seq_idx=batch.seq_idx)

    def model_config(self) -> dict[str, Any]:
        """Name and all options that rebuild the network."""
        return model_config(self.net) | {"task": {"kind": type(self).__name__}}

    def export_files(self) -> dict[str, str]:
        """The data module's state, and the meaning of the ids."""
        return super().export_files() | vocabulary_file(self.net)

    def lr_scales(self) -> dict[Tensor, float]:
        """The factor of each parameter's stage."""
        if len(self.multipliers) == 1:
            return dict.fromkeys(self.net.parameters(), self.multipliers[0])
        return {p: self.multipliers[self.net.stage_of(name)] for name, p in self.net.named_parameters()}

    def targets_of(self, batch: SequenceBatch) -> Tensor:
        """Id that each position is asked for, (b, l) int64; -100 where there is none."""
        raise TypeError(f"{type(self).__name__} is not a task by itself; use CausalLM or MaskedLM.")

    def losses(self, batch: SequenceBatch) -> tuple[Tensor, Tensor, list[Boundaries]]:
        """Cross entropy of each position in nats, (b, l); what is asked, (b, l) int64; boundaries of each stage."""
        targets = self.targets_of(batch)
        mask = None if batch.mask.all() else batch.mask  # mixers are faster without
        hidden, found = self.net.hidden(batch.tokens, mask=mask, seq_idx=batch.seq_idx)
        return blocked_cross_entropy(hidden, self.net.logits, targets), targets, found

    def training_step(self, batch: SequenceBatch, batch_idx: int) -> Tensor:
        """Weighted mean of the cross entropy, and the losses on the rates of boundaries."""
        nats, targets, found = self.losses(batch)
        weight = (targets != IGNORE).to(nats.dtype)
        if batch.weight is not None:
            weight = weight * batch.weight
        mean = (nats * weight).sum() / weight.sum().clamp(min=1e-9)
        loss = mean
        if found:
            ratios = [ratio_loss(b, n, sync=self.ratio_sync) for b, n in zip(found, self.targets)]
            loss = mean + self.net.ratio_weight * torch.stack(ratios).sum()
            stats = chunk_stats(found)
            rates = {f"train/{name}": value for name, value in stats.items() if not name.endswith("prob")}
            self.log_dict(rates)
            if self.trainer.global_step % 10 == 0:  # reading the rates waits for the device
                self._watch([float(stats[f"stage{s}/rate"]) for s in range(len(found))])
        self.log("train/loss", loss)
        self.log("train/bits_per_base", mean.detach() / math.log(2), prog_bar=True)
        return loss

    def _watch(self, rates: list[float]) -> None:
        """Warn once about a stage that has long cut everywhere or hardly anywhere."""
        for s, (rate, target) in enumerate(zip(rates, self.targets)):
            out = rate > 0.95 or rate < 0.25 / target
            self.collapsed[s] = self.collapsed[s] + 10 if out else min(self.collapsed[s], 0)
            if self.collapsed[s] >= PATIENCE:
                self.collapsed[s] = -(2**40)
                log.warning(
                    "Stage %d begins a chunk at %.1f %% of its positions for %d steps (target %.1f %%): it has"
                    " collapsed. Raise ratio_weight (now %g) in model_args, or lower the learning rate.",
                    s, 100 * rate, PATIENCE, 100 / target, self.net.ratio_weight,
                )  # fmt: skip

    def validation_step(self, batch: SequenceBatch, batch_idx: int) -> None:
        """Add one batch to the sums."""
        self._add(batch)

    def test_step(self, batch: SequenceBatch, batch_idx: int) -> None:
        """Add one batch to the sums."""
        self._add(batch)

    def predict_step(self, batch: SequenceBatch, batch_idx: int) -> Tensor:
        """Cross entropy of each position in nats, (b, l); 0 where nothing is asked."""
        return self.losses(batch)[0]

    def on_validation_epoch_start(self) -> None:
        """Start the sums anew."""
        self.sums = {}

    def on_test_epoch_start(self) -> None:
        """Start the sums anew."""
        self.sums = {}

    def on_validation_epoch_end(self) -> None:
        """Log the means over all validation bases."""
        self._report("val")

    def on_test_epoch_end(self) -> None:
        """Log the means over all test bases."""
        self._report("test")

    def _add(self, batch: SequenceBatch) -> None:
        nats, targets, found = self.losses(batch)
        asked = targets != IGNORE
        self._sum("all", nats[asked])
        if batch.weight is not None:
            self._sum("soft", nats[asked & (batch.weight < 1)])
            self._sum("hard", nats[asked & (batch.weight >= 1)])
        for s, boundaries in enumerate(found):
            self._sum(f"stage{s}", boundaries.mask if boundaries.real is None else boundaries.mask[boundaries.real])

    def _sum(self, name: str, values: Tensor) -> None:
        added = torch.stack([values.double().sum(), values.new_tensor(values.numel(), dtype=torch.float64)])
        self.sums[name] = self.sums[name] + added if name in self.sums else added

    def _report(self, part: str) -> None:
        if not self.sums:
            return
        names = sorted(self.sums)
        table = torch.stack([self.sums[name] for name in names])
        table = self.trainer.strategy.reduce(table, reduce_op="sum")
        total = {name: (row[0] / row[1]).item() if row[1] else math.nan for name, row in zip(names, table)}
        values = {"loss": total["all"], "bits_per_base": bits(total["all"]), "perplexity": math.exp(total["all"])}
        values |= {f"bits_per_base_{kind}": bits(total[kind]) for kind in ("soft", "hard") if kind in total}
        stages = [total[name] for name in names if name.startswith("stage")]
        values |= {f"stage{s}/rate": rate for s, rate in enumerate(stages)}
        if stages:
            values["chunk_length"] = 1 / math.prod(stages)
        # One value on all processes already.
        self.log_dict({f"{part}/{name}": value for name, value in values.items()}, prog_bar=part == "val")


class CausalLM(LanguageModel):
    """Predict the next base; ambiguous bases are read but never asked for.

    See `LanguageModel` for arguments and logs.
    """

    def targets_of(self, batch: SequenceBatch) -> Tensor:
        """The next id of the sequence where it is A, C, G or T; of the labels where the ids that are read differ."""
        asked = batch.tokens if batch.labels is None else batch.labels
        return next_base_targets(asked, batch.mask, batch.seq_idx, self.is_base)


class MaskedLM(LanguageModel):
    """Predict bases that the data module has hidden; it gives them as labels.

    See `LanguageModel` for arguments and logs.
    """

    def targets_of(self, batch: SequenceBatch) -> Tensor:
        """The batch's labels.

        Raises:
            ValueError: if it has none.
        """
        if batch.labels is None or batch.labels.shape != batch.tokens.shape:
            raise ValueError("a masked language model needs labels (b, l); set objective: masked in the data module.")
        return batch.labels
