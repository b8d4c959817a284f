"""Values of the trainer's options that no training could mean are refused by name."""

import pytest
import torch

from omnissm.ssmcore.training.trainer_options import check_trainer_options


@pytest.fixture
def gpus(monkeypatch):
    """Say whether torch finds a GPU."""

    def found(there):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)

    found(False)
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_epochs": None, "gradient_clip_val": None, "val_check_interval": None},
        {"max_epochs": -1, "max_steps": -1, "min_epochs": 0, "num_sanity_val_steps": -1, "log_every_n_steps": 0},
        {"limit_train_batches": 0.5, "limit_val_batches": 0, "limit_test_batches": 1.0, "overfit_batches": 3},
        {"limit_train_batches": 40.0, "val_check_interval": 10.0},
        {"val_check_interval": 0.25},
        {"max_time": "00:00:10:00"},
        {"max_time": {"minutes": 10}},
        {"val_check_interval": 10, "check_val_every_n_epoch": None},
        {"val_check_interval": "00:01:00:00"},
        {"accelerator": "cpu", "devices": "2", "strategy": "ddp", "num_nodes": 4},
        {"accelerator": "auto", "devices": "auto", "strategy": "auto"},
        {"gradient_clip_val": 0, "accumulate_grad_batches": 1, "barebones": False},
    ],
)
def test_values_that_mean_something_pass(options, gpus):
    check_trainer_options(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_epochs": -2}, r"^max_epochs: expected a number of epochs, or -1 for no limit; got -2\.$"),
        ({"max_steps": -5}, "^max_steps: expected"),
        ({"val_check_interval": 0}, "^val_check_interval: expected a number of batches of at least 1, or a share"),
        ({"val_check_interval": 1.5}, "^val_check_interval: expected .* up to 1.0; got 1.5"),
        ({"check_val_every_n_epoch": 0}, "^check_val_every_n_epoch: expected .* or null"),
        ({"accumulate_grad_batches": 0}, "^accumulate_grad_batches: expected"),
        ({"limit_val_batches": 1.5}, "^limit_val_batches: expected .* share between 0.0 and 1.0; got 1.5"),
        ({"limit_train_batches": 0}, "^limit_train_batches: expected a number of batches of at least 1, .*; got 0"),
        ({"overfit_batches": -1}, "^overfit_batches: expected"),
        ({"overfit_batches": 2.0}, r"^overfit_batches: expected a number of batches such as 3, .*; got 2\.0"),
        ({"max_time": "10s"}, "^max_time: expected days, hours, minutes and seconds such as 00:01:30:00; got 10s"),
        ({"gradient_clip_val": -1.0}, "^gradient_clip_val: expected a bound of at least 0"),
        ({"gradient_clip_val": "x"}, "^gradient_clip_val: expected .*; got x"),
        ({"barebones": True}, "^barebones: expected false"),
        ({"num_nodes": 0}, "^num_nodes: expected a number of machines"),
        ({"devices": "0"}, "^devices: expected a number of processes of at least 1, or auto; got 0"),
        ({"devices": -1, "accelerator": "cpu"}, "^devices: expected"),
        ({"devices": [0, 5]}, "^devices: expected a number of processes"),
        ({"devices": "two"}, "^devices: expected .*; got two"),
        ({"accelerator": "gpu"}, "^accelerator: gpu was asked for and torch finds no GPU here; take cpu or auto"),
        ({"strategy": "dpp"}, r"^strategy: 'dpp' is unknown; did you mean ddp\?$"),
        ({"strategy": "fsdp2"}, "^strategy: 'fsdp2' is unknown; it comes as a configuration: -c trainer/fsdp2"),
        ({"strategy": "zzz"}, "^strategy: 'zzz' is unknown; there are auto, ddp, "),
    ],
)
def test_others_are_refused_by_name(options, message, gpus):
    with pytest.raises(ValueError, match=message):
        check_trainer_options(options)
    with pytest.raises(ValueError, match=rf"^trainer\.{next(iter(options))}: "):
        check_trainer_options(options, "trainer.")


def test_devices_of_a_machine_with_gpus(gpus):
    gpus(True)
    for devices in (1, "2", -1, "-1", [0, 2], "0,2", "auto"):
        check_trainer_options({"accelerator": "gpu", "devices": devices})
        check_trainer_options({"devices": devices})
    for devices in (0, [], [-1], "few"):
        with pytest.raises(ValueError, match=r"^devices: expected a number of devices, -1 or auto for all, or a list"):
            check_trainer_options({"devices": devices})
    with pytest.raises(ValueError, match="a number of processes"):
        check_trainer_options({"devices": [0, 1], "accelerator": "cpu"})
