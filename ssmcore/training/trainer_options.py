"""Values of the trainer's options, refused in one line before anything is built; Lightning divides by some zeros."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pytorch_lightning.strategies import StrategyRegistry

__all__ = ["check_trainer_options"]

Rule = tuple[Callable[[Any], bool], str]  # whether a value is right, and what is expected


def _whole(least: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and value >= least


def _is_part(value: Any) -> bool:
    """Whole numbers may come as floats, as a parser of options may make them."""
    return isinstance(value, (int, float)) and value >= 0 and (value <= 1 or value % 1 == 0)


def _is_some(value: Any) -> bool:
    return _is_part(value) and value > 0


def _is_few(value: Any) -> bool:
    """Lightning takes a float above 1 here for all batches, without a word."""
    return _is_part(value) and (isinstance(value, int) or value <= 1)


def _is_bound(value: Any) -> bool:
    return isinstance(value, (int, float)) and value >= 0


def _is_span(value: Any) -> bool:
    """A dictionary or a timedelta is left to Lightning."""
    return not isinstance(value, str) or re.fullmatch(r"\d+:\d\d:\d\d:\d\d", value) is not None


def _is_interval(value: Any) -> bool:
    """A text or a span of time is left to Lightning."""
    return not isinstance(value, (int, float)) or (0 < value <= 1 if value % 1 else value >= 1)


_PART: Rule = (_is_part, "a number of batches, or a share between 0.0 and 1.0")
_RULES: dict[str, Rule] = {
    "accumulate_grad_batches": (_whole(1), "a number of batches of at least 1"),
    "barebones": (lambda value: value is False, "false, as a run writes metrics and checkpoints"),
    "check_val_every_n_epoch": (_whole(1), "a number of epochs of at least 1, or null to count batches only"),
    "gradient_clip_val": (_is_bound, "a bound of at least 0, or null for none"),
    "limit_predict_batches": _PART,
    "limit_test_batches": _PART,
    "limit_train_batches": (_is_some, "a number of batches of at least 1, or a share above 0.0 and up to 1.0"),
    "limit_val_batches": _PART,
    "log_every_n_steps": (_whole(0), "a number of steps, 0 for never"),
    "max_epochs": (_whole(-1), "a number of epochs, or -1 for no limit"),
    "max_steps": (_whole(-1), "a number of steps, or -1 for no limit"),
    "max_time": (_is_span, "days, hours, minutes and seconds such as 00:01:30:00"),
    "min_epochs": (_whole(0), "a number of epochs"),
    "min_steps": (_whole(0), "a number of steps"),
    "num_nodes": (_whole(1), "a number of machines of at least 1"),
    "num_sanity_val_steps": (_whole(-1), "a number of batches, or -1 for all"),
    "overfit_batches": (_is_few, "a number of batches such as 3, or a share between 0.0 and 1.0"),
    "val_check_interval": (_is_interval, "a number of batches of at least 1, or a share of an epoch up to 1.0"),
}


def check_trainer_options(options: Mapping[str, Any], prefix: str = "") -> None:
    """Refuse values that no training could mean, devices that are not there and unknown strategies.

    Args:
        options: Options of `pytorch_lightning.Trainer` with their values; those left out or None have their defaults.
        prefix: Stands before the names in messages.

    Raises:
        ValueError: for the first wrong one: what was expected and what came.
    """
    for name, (is_right, wanted) in _RULES.items():
        value = options.get(name)
        if value is not None and not is_right(value):
            raise ValueError(f"{prefix}{name}: expected {wanted}; got {value}.")
    accelerator = options.get("accelerator") or "auto"
    has_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    if accelerator in ("gpu", "cuda") and not has_gpu:
        raise ValueError(
            f"{prefix}accelerator: {accelerator} was asked for and torch finds no GPU here; take cpu or auto. "
            "`omnissm doctor` shows what torch sees."
        )
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not has_gpu)
    if not _are_devices(options.get("devices", "auto"), on_cpu):
        many = "a number of processes of at least 1, or auto"
        wanted = many if on_cpu else "a number of devices, -1 or auto for all, or a list such as [0, 2]"
        raise ValueError(f"{prefix}devices: expected {wanted}; got {options['devices']}.")
    strategy = options.get("strategy")
    if isinstance(strategy, str) and strategy not in (names := ["auto", *StrategyRegistry.available_strategies()]):
        close = difflib.get_close_matches(strategy, names, n=2)
        advice = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(names[:3])} and others."
        if strategy == "fsdp2":
            advice = "it comes as a configuration: -c trainer/fsdp2"
        raise ValueError(f"{prefix}strategy: {strategy!r} is unknown; {advice}")


def _are_devices(value: Any, on_cpu: bool) -> bool:
    if value in ("auto", None):
        return True
    if isinstance(value, list):
        return not on_cpu and bool(value) and all(isinstance(each, int) and each >= 0 for each in value)
    if isinstance(value, str) and "," in value:
        return not on_cpu
    try:
        count = int(value)
    except (TypeError, ValueError):
        return False
    return count >= 1 or (count == -1 and not on_cpu)
