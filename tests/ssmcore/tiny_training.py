"""A task and a data module small enough to train in milliseconds: a line with dropout through noisy points."""

import os
import signal

import torch
from torch import Tensor, nn

from omnissm.ssmcore.training import LRSchedulerCallable, OptimizerCallable, SSMData, SSMTask


class Line(SSMTask):
    """Least squares with dropout, so that seeds matter; can poison one step or kill its own process."""

    def __init__(
        self,
        n_variates: int = 1,
        width: int = 4,
        dropout: float = 0.2,
        poison_step: int = -1,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        if width < 1:
            raise ValueError(f"width must be 1 or more, got {width}.")
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.poison_step = poison_step
        self.net = nn.Sequential(nn.Linear(n_variates, width), nn.Dropout(dropout), nn.Linear(width, 1))
        self.args = {"n_variates": n_variates, "width": width}

    def model_config(self) -> dict:
        return {"model": "tests/line", "args": self.args, "task": {"loss": "mse"}}

    def loss(self, batch: list[Tensor]) -> Tensor:
        return (self.net(batch[0])[:, 0] - batch[1]).square().mean()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if os.environ.get("KILL_AT_STEP") == str(self.global_step):
            os.kill(os.getpid(), signal.SIGKILL)
        loss = self.loss(batch)
        self.log_loss(loss, len(batch[0]))
        return loss * float("nan") if self.global_step == self.poison_step else loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch), sync_dist=True)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test/loss", self.loss(batch), sync_dist=True)

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0])[:, 0]


class Fixed(Line):
    """The same without parameters: predicts zero."""

    def __init__(self, n_variates: int = 1) -> None:
        super().__init__(n_variates)
        self.net = Zero()


class Zero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), 1)


class Points(SSMData):
    """48 noisy points per part."""

    def __init__(self, n_variates: int = 3, batch_size: int = 8, seed: int = 0, num_workers: int = 0) -> None:
        super().__init__()
        self.n_variates = n_variates
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers

    def state(self) -> dict:
        return {"n_variates": self.n_variates}

    def loader(self, part: int, shuffle: bool = False):
        generator = torch.Generator().manual_seed(part)
        x = torch.randn(48, self.n_variates, generator=generator)
        y = x.sum(dim=1) + 0.1 * torch.randn(48, generator=generator)
        return self.create_loader(
            torch.utils.data.TensorDataset(x, y), self.batch_size, shuffle=shuffle, num_workers=self.num_workers
        )

    def train_dataloader(self):
        return self.loader(0, shuffle=True)

    def val_dataloader(self):
        return self.loader(1)

    def test_dataloader(self):
        return self.loader(2)

    def predict_dataloader(self):
        return self.loader(2)


class Shapeless(Points):
    """Lacks the fact the task needs."""

    def __init__(self) -> None:
        super().__init__()
        del self.n_variates


class Unreadable(Points):
    """Points whose file is broken, which only `setup` finds out."""

    def setup(self, stage: str | None = None) -> None:
        raise ValueError("points.csv cannot be read, expected two columns; give another file.")
