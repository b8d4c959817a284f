"""What goes wrong inside a process; functions that the harness calls there before the command."""

import errno
import os
import time
from pathlib import Path

import torch

from omnissm.ssmcore.training import SSMTask
from omnissm.ssmcore.training.callbacks import ResumePoint


def slow_steps() -> None:
    """Each training step takes a tenth of a second longer."""
    _before_step(lambda task: time.sleep(0.1))


def held() -> None:
    """Steps after the first wait while there is a file `hold`."""

    def wait(task: SSMTask) -> None:
        while task.global_step > 1 and Path("hold").exists():
            time.sleep(0.02)

    _before_step(wait)


def held_test() -> None:
    """Each batch of a test waits while there is a file `hold`."""

    def wait(*args) -> None:
        while Path("hold").exists():
            time.sleep(0.02)

    SSMTask.on_test_batch_start = wait


def fails_at_once() -> None:
    """The first batch cannot be used."""

    def fail(task: SSMTask) -> None:
        raise ValueError("sample 3 cannot be read")

    _before_step(fail)


def loss_is_nan() -> None:
    """The loss of step 5 is not a number."""
    backward = SSMTask.on_before_backward

    def poisoned(self: SSMTask, loss: torch.Tensor) -> None:
        backward(self, loss * float("nan") if self.global_step == 5 else loss)

    SSMTask.on_before_backward = poisoned


def loss_is_nan_at_once() -> None:
    """The first loss is not a number."""
    backward = SSMTask.on_before_backward
    SSMTask.on_before_backward = lambda self, loss: backward(self, loss * float("nan"))


def gradient_is_infinite() -> None:
    """The gradient of one weight is infinite in step 5, while the loss is finite."""
    check = SSMTask.on_before_optimizer_step

    def poisoned(self: SSMTask, optimizer: torch.optim.Optimizer) -> None:
        if self.global_step == 5:
            next(p for p in self.net.parameters() if p.grad is not None).grad.view(-1)[0] = torch.inf
        check(self, optimizer)

    SSMTask.on_before_optimizer_step = poisoned


def disk_fills_up() -> None:
    """From the second epoch on the disk is full: what is written cannot be made safe."""
    start, sync = ResumePoint.on_train_epoch_start, os.fsync
    full = []

    def epoch(self, trainer, pl_module) -> None:
        if trainer.current_epoch == 1:
            full.append(True)
        start(self, trainer, pl_module)

    def fail(handle: int) -> None:
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    ResumePoint.on_train_epoch_start, os.fsync = epoch, fail


def _before_step(action) -> None:
    start = SSMTask.on_train_batch_start

    def slow(self: SSMTask, batch, batch_idx: int) -> None:
        start(self, batch, batch_idx)
        action(self)

    SSMTask.on_train_batch_start = slow


def held_blocks() -> None:
    """Blocks of variants after the second wait while there is a file `hold`."""
    from omnissm.genomics.variant_scorer import VariantScorer

    score, done = VariantScorer.score, []

    def held(self, rows):
        done.append(True)
        while len(done) > 2 and Path("hold").exists():
            time.sleep(0.02)
        return score(self, rows)

    VariantScorer.score = held
