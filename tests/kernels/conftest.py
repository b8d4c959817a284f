"""Set-up of the op tests: outputs that a kernel forgets to write show up as NaN; tests replay nothing of each other."""

import sys
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _poisoned_empties() -> Iterator[None]:
    # In this mode torch.empty fills floats with NaN and integers with their largest value.
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def _nothing_to_replay() -> None:
    # Tests put other tiles and sizes in the place of those that launchers take as given.
    if "omnissm.kernels.replay" in sys.modules:
        sys.modules["omnissm.kernels.replay"].forget()


@pytest.fixture(params=["chunked", "triton"])
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    """The implementations that are compared with the reference; Triton only where it runs."""
    from omnissm.kernels import available_backends

    reason = available_backends(device)[request.param]
    if reason is not None:
        pytest.skip(reason)
    return request.param
