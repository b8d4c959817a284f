"""Set-up of the op tests: outputs that a kernel forgets to write show up as NaN."""

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))


@pytest.fixture(autouse=True, scope="session")
def _quick_interpreter() -> Iterator[None]:
    if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
        yield
        return
    from quick_interpreter import shorten

    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        yield


@pytest.fixture(autouse=True)
def _poisoned_empties() -> Iterator[None]:
    # In this mode torch.empty fills floats with NaN and integers with their largest value.
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(params=["chunked", "triton"])
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    """The implementations that are compared with the reference; Triton only where it runs."""
    from omnissm.kernels import available_backends

    reason = available_backends(device)[request.param]
    if reason is not None:
        pytest.skip(reason)
    return request.param
