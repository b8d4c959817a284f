"""Devices by name."""

from __future__ import annotations

import torch

__all__ = ["find_device"]


def find_device(name: str | torch.device) -> torch.device:
    """The device of a name; "auto" takes the first GPU if there is one.

    Raises:
        ValueError: if it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}; expected auto, cpu or cuda:0.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        there = torch.cuda.device_count()
        raise ValueError(f"device {str(name)!r} is not there; this machine has {there} GPUs. Device cpu always is.")
    return device
