"""Base of all tasks: optimiser groups, schedule, compilation, and a stop at the first loss that is not finite."""

from __future__ import annotations

import json
import math
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from .data import batch_samples
from .optim import LRSchedulerCallable, OptimizerCallable, create_optimizer


class NonFiniteError(ValueError):
    """The loss or a gradient became infinite or not a number."""


class SSMTask(pl.LightningModule):
    """A network in `self.net` with what every task shares; subclasses add the network, the loss and the metrics.

    Args:
        optimizer: Called with parameter groups; in YAML a `class_path` with `init_args`.
        lr_scheduler: Called with the optimiser. Its `interval` ("step" or "epoch", default "epoch") says when it moves.
        compile: Compile the network's forward pass (`net.compile()`; names of weights are unchanged).
        check_finite: Stop at the first loss or gradient that is not finite and name the batch.

    Attributes:
        net: The network; its weights are what a model folder holds.
        monitor: Metric that chooses the best checkpoint, unless the command line names another.
    """

    net: nn.Module
    monitor: str = "val/loss"

    def __init__(
        self,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        compile: bool = False,
        check_finite: bool = True,
    ) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.compile_net = compile
        self.check_finite = check_finite
        self._batch_idx = 0
        self._sharded = False

    def setup(self, stage: str) -> None:
        """Compile the network once, if asked."""
        if self.compile_net and not getattr(self.net, "_compiled_call_impl", None):
            self.net.compile()

    def configure_model(self) -> None:
        """Shard the network where the strategy spreads weights over processes."""
        if self.device_mesh is not None and not self._sharded:
            from .shard import shard

            shard(self.net, self.device_mesh["data_parallel"])
            self._sharded = True

    def configure_optimizers(self) -> Any:
        """Optimiser over `param_groups`, and its schedule with the length of the planned run.

        Raises:
            ValueError: if the schedule needs that length and the run has none.
        """
        optimizer = create_optimizer(self, self.optimizer, self.lr_scales())
        if optimizer is None or self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        if hasattr(scheduler, "set_total_steps"):
            steps = self.trainer.estimated_stepping_batches
            if 0 <= steps < math.inf:  # the trainer says -1 where it cannot count batches
                scheduler.set_total_steps(int(steps))
            elif getattr(scheduler, "total_steps", None) is None:
                endless = "this run has no end. Set trainer.max_epochs or trainer.max_steps"
                unknown = endless if steps > 0 else "the data have no length. Set trainer.max_steps"
                raise ValueError(
                    f"{type(scheduler).__name__} plans the rate over the whole run, and {unknown}, or the schedule's"
                    " total_steps."
                )
        plan: dict[str, Any] = {"scheduler": scheduler, "interval": getattr(scheduler, "interval", "epoch")}
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            plan["monitor"] = getattr(scheduler, "monitor", "val/loss")
        return {"optimizer": optimizer, "lr_scheduler": plan}

    def lr_scales(self) -> dict[Tensor, float]:
        """Factors of the optimiser's rate for some parameters. None by default; tasks override this."""
        return {}

    def model_config(self) -> dict[str, Any]:
        """What `config.json` of a model folder says: "model", "args" and "task", JSON-able. Tasks override this."""
        return {"model": f"{type(self.net).__module__}.{type(self.net).__qualname__}", "args": {}, "task": {}}

    def export_files(self) -> dict[str, str]:
        """Further files of the model folder, name to text. By default `data.json`: the data module's `state()`."""
        data = getattr(self._trainer, "datamodule", None) if self._trainer is not None else None
        state = data.state() if data is not None and hasattr(data, "state") else {}
        return {"data.json": json.dumps(state, indent=2) + "\n"} if state else {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put into each checkpoint what a model folder needs, so that it can be exported without this class."""
        checkpoint["omnissm"] = {"config": self.model_config(), "files": self.export_files()}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Remember the batch for error messages."""
        self._batch_idx = batch_idx

    def log_loss(self, loss: Tensor, count: int) -> None:
        """Log `train/loss` once an epoch: the mean over the batches of all processes, each weighted by `count`.

        Args:
            loss: Loss of the batch, scalar.
            count: Samples or steps that `loss` is a mean of, at least 1.
        """
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=count, sync_dist=True)

    def on_before_backward(self, loss: Tensor) -> None:
        """Stop before a loss that is not finite reaches the weights."""
        if self.check_finite and not torch.isfinite(loss):
            self._stop(f"loss is {loss.item()}")

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Stop before gradients that are not finite reach the weights (under float16 scaling the scaler skips them)."""
        if not self.check_finite or self.trainer.precision == "16-mixed":
            return
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        if gradients and not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            names = [n for n, p in self.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
            self._stop(f"gradient of `{names[0] if names else 'all parameters together'}` is not finite")

    def _stop(self, reason: str) -> None:
        place = f"epoch {self.current_epoch}, batch {self._batch_idx} (step {self.trainer.global_step})"
        named = batch_samples(self.trainer.train_dataloader, self._batch_idx)
        samples = f", samples {named} of the training part" if named else ""
        raise NonFiniteError(
            f"Training stopped: {reason} at {place}{samples}. Lower the learning rate, set"
            " trainer.gradient_clip_val, or look at this batch for extreme values."
        )
