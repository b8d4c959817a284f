"""Devices by name."""

import pytest
import torch

from omnissm.ssmcore.training.devices import find_device


def test_devices_are_found_or_refused():
    assert find_device("cpu") == find_device(torch.device("cpu")) == torch.device("cpu")
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="unknown device 'tpu9'"):
        find_device("tpu9")
    with pytest.raises(ValueError, match="'cuda:99' is not there"):
        find_device("cuda:99")
