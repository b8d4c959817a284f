"""`vision.timing`: memory that an earlier measurement used and freed counts again."""

import platform

import pytest
import torch

from omnissm.vision import timing


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="memory is given back with glibc only")
def test_each_measurement_counts_its_own_memory():
    kept = []

    def allocate():
        blocks = [torch.ones(2**16) for _ in range(200)]
        kept.append(blocks[-1])  # above the freed ones, which the system gets back only when asked

    peaks = [timing._measure(allocate, torch.device("cpu"), 1)[1] for _ in range(3)]
    assert min(peaks) > 40 * 2**20
