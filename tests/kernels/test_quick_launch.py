"""`quick`: which launches of a Triton kernel look for the compiled one, and what it is launched with."""

from types import SimpleNamespace

import pytest
import torch

triton_utils = pytest.importorskip("omnissm.kernels.triton_utils")


class Kernel:
    """Stands for a Triton function: counts look-ups, notes launches of what they found."""

    arg_names = ("x_ptr", "length", "stride", "BLOCK")
    params = tuple(
        SimpleNamespace(do_not_specialize=name == "length", is_constexpr=name == "BLOCK") for name in arg_names
    )

    def __init__(self):
        self.looked_up, self.launched = 0, []

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.looked_up += 1
            return SimpleNamespace(run=self._run, function="function", packed_metadata="metadata")

        return launch

    def _run(self, *arguments):
        self.launched.append(arguments)


@pytest.fixture
def kernel(monkeypatch):
    hooks = SimpleNamespace(launch_enter_hook=None, launch_exit_hook=None)
    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: "stream")
    fake = SimpleNamespace(
        knobs=SimpleNamespace(runtime=hooks),
        runtime=SimpleNamespace(driver=SimpleNamespace(active=active)),
        hooks=hooks,
    )
    monkeypatch.setattr(triton_utils, "INTERPRETED", False)
    monkeypatch.setattr(triton_utils, "triton", fake)
    found = Kernel()
    found.fake = fake
    return found


def test_a_launch_like_an_earlier_one_is_not_looked_up(kernel):
    launch, x = triton_utils.quick(kernel), torch.zeros(64)
    for length, stride in ((5, 8), (7, 9)):
        launch[(3,)](x, length, stride, BLOCK=16, num_warps=4)
    assert kernel.looked_up == 1
    assert kernel.launched == [(3, 1, 1, "stream", "function", "metadata", None, None, None, x.data_ptr(), 7, 9, 16)]


def test_what_triton_compiles_for_is_looked_up(kernel):
    launch, x = triton_utils.quick(kernel), torch.zeros(64)
    launch[(3,)](x, 5, 8, BLOCK=16)
    calls = [
        ((x[1:], 5, 8), {"BLOCK": 16}),  # another alignment
        ((x.double(), 5, 8), {"BLOCK": 16}),
        ((None, 5, 8), {"BLOCK": 16}),
        ((x, 2**40, 8), {"BLOCK": 16}),  # 64 bits
        ((x, 5, 1), {"BLOCK": 16}),
        ((x, 5, 32), {"BLOCK": 16}),
        ((x, 5, True), {"BLOCK": 16}),
        ((x, 5, 8), {"BLOCK": 32}),
    ]
    for count, (arguments, options) in enumerate(calls, start=2):
        for _ in range(2):
            launch[(3, 2)](*arguments, **options)
        assert kernel.looked_up == count


def test_hooks_of_profilers_see_every_launch(kernel):
    launch, x = triton_utils.quick(kernel), torch.zeros(64)
    launch[(3,)](x, 5, 8, BLOCK=16)
    kernel.fake.hooks.launch_enter_hook = SimpleNamespace(calls=[print])
    launch[(3,)](x, 5, 8, BLOCK=16)
    assert kernel.looked_up == 2
    kernel.fake.hooks.launch_enter_hook = SimpleNamespace(calls=[])
    launch[(3,)](x, 5, 8, BLOCK=16)
    assert kernel.looked_up == 2
