"""Launchers that are replayed do what they did when they were recorded, with other tensors."""

import ast
import weakref
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import omnissm.kernels
from omnissm.kernels.testing import OpSpec, run_with_gradients

replay = pytest.importorskip("omnissm.kernels.replay")

FOLDER = Path(omnissm.kernels.__file__).parent
SPECS = [
    spec
    for path in sorted(FOLDER.glob("*/spec.py"))
    for spec in vars(import_module(f"omnissm.kernels.{path.parent.name}.spec")).values()
    if isinstance(spec, OpSpec) and "triton" in spec.implementations
]


@pytest.fixture(autouse=True)
def _in_interpreter():
    with replay.in_interpreter():
        yield
    replay.forget()


def replays() -> list:
    return [one for one in replay._known.values() if type(one) is replay.Source]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_every_op_does_the_same_when_replayed(spec, device):
    size = dict(spec.test_sizes[1])
    if device.type == "cpu" and "l" in size:
        size["l"] = min(size["l"], 9)

    def outputs(seed):
        generator = torch.Generator(device).manual_seed(seed)
        inputs = spec.make_inputs(**size, dtype=torch.float32, device=device, generator=generator)
        result = spec.op(**inputs, backend="triton")
        shapes = dict(zip(spec.outputs, result if isinstance(result, tuple) else (result,), strict=True))
        cotangents = {name: torch.ones_like(one) for name, one in shapes.items()}
        return run_with_gradients(lambda **given: spec.op(**given, backend="triton"), inputs, spec.outputs, cotangents)

    expected = []
    for seed in (1, 2):
        replay.forget()
        expected.append(outputs(seed))
    replay.forget()
    for _ in range(2):
        outputs(3)
    assert len(replays()) >= 2  # forward and backward
    known = dict(replay._known)
    for seed, wanted in zip((1, 2), expected, strict=True):
        for name, value in outputs(seed).items():
            assert torch.equal(value, wanted[name]), name
    assert replay._known == known


class Counted:
    """A launcher without kernels; counts its own runs."""

    def __init__(self, function):
        self.runs = 0

        def run(*arguments):
            self.runs += 1
            return function(*arguments)

        self.call = replay.replayed(run)


def check_replayed(function, make, device, calls=4):
    counted = Counted(function)
    for seed in range(calls):
        torch.manual_seed(seed)
        given = make()
        found = counted.call(*(one.clone() if isinstance(one, torch.Tensor) else one for one in given))
        torch.testing.assert_close(found, function(*given), rtol=0, atol=0)
    assert counted.runs == 2


def test_views_writes_in_place_lists_and_options(device):
    def function(x, several, factor, flag):
        whole = torch.empty_like(x)
        left, right = whole.unbind(0)
        left.copy_(x[1] * factor)
        right.zero_()
        right[1:].add_(several[0][0], alpha=2)
        unused = x.new_empty(1000)
        joined = torch.cat([whole.flatten(), several[1].flatten()])
        return whole, joined[2:].clone(), None if flag else unused.sum(), joined.view(2, -1)

    x = torch.randn(2, 3, 4, device=device)
    check_replayed(function, lambda: (torch.randn_like(x), [torch.randn(4, device=device), x], 0.5, True), device)


def test_an_output_may_be_an_argument_written_in_place(device):
    def function(state, x):
        state.mul_(2).add_(x)
        return state[:1] + 1

    counted = Counted(function)
    state, plain = torch.ones(2, 3, device=device), torch.ones(2, 3, device=device)
    for step in range(5):
        x = torch.full((3,), float(step), device=device)
        assert torch.equal(counted.call(state, x), function(plain, x))
    assert torch.equal(state, plain)
    assert counted.runs == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:, :3],
        lambda x: x.double(),
        lambda x: x.t().contiguous().t(),
        lambda x: torch.zeros(5 * 4 + 1, device=x.device)[1:].view(5, 4),
    ],
    ids=["shape", "dtype", "strides", "alignment"],
)
def test_other_kinds_are_not_replayed(change, device):
    counted = Counted(lambda x, number: x + number)
    x = torch.randn(5, 4, device=device)
    for _ in range(3):
        counted.call(x, 2)
    assert counted.runs == 2
    assert torch.equal(counted.call(change(x), 2), change(x) + 2)
    assert torch.equal(counted.call(x, 3), x + 3)
    assert torch.equal(counted.call(x, 2.0), x + 2.0)
    assert counted.runs == 5


def test_settings_that_launchers_read_make_other_kinds(device):
    counted = Counted(lambda x: x + len(torch.get_float32_matmul_precision()))
    x, before = torch.zeros(4, device=device), torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            for _ in range(3):
                assert torch.equal(counted.call(x), x + len(precision))
    finally:
        torch.set_float32_matmul_precision(before)
    assert counted.runs == 4


def test_an_op_without_outputs_is_done_again(device):
    def function(x, y):
        into = [torch.empty_like(x), torch.empty_like(y)]
        torch._foreach_copy_(into, [x, y])
        return into[0] + into[1]

    check_replayed(function, lambda: (torch.randn(4, device=device), torch.randn(4, device=device)), device)


class Pair(NamedTuple):
    one: torch.Tensor
    two: torch.Tensor


def test_tensors_in_classes_of_their_own_keep_a_launcher_from_being_replayed(device):
    counted = Counted(lambda x: Pair(x + 1, x + 2))
    for _ in range(4):
        x = torch.randn(4, device=device)
        assert torch.equal(counted.call(x).two, x + 2)
    assert counted.runs == 4


def test_an_op_with_launches_of_its_own_is_done_once(device):
    from omnissm.kernels.transforms import operator

    runs = []

    @operator("replay_test_inner", mutates=("x",))
    @replay.replayed
    def inner(x: torch.Tensor) -> None:
        runs.append(1)
        x.add_(1)

    def function(x):
        inner(x)
        return x * 2

    counted = Counted(function)
    with torch.no_grad():
        for _ in range(5):
            x = torch.randn(4, device=device)
            assert torch.equal(counted.call(x.clone()), (x + 1) * 2)
    assert counted.runs == 2
    assert len(runs) == 2


def test_the_same_tensor_twice_is_not_replayed(device):
    counted = Counted(lambda x, y: x - y)
    x = torch.randn(4, device=device)
    for _ in range(3):
        counted.call(x, x)
    assert counted.runs == 3
    check_replayed(lambda x, y: x - y, lambda: (torch.randn(4, device=device), torch.randn(4, device=device)), device)


def test_values_that_are_read_and_tensors_from_elsewhere_keep_a_launcher_from_being_replayed(device):
    constant = torch.randn(4, device=device)
    for function in (lambda x: x * x.sum().item(), lambda x: x + constant):
        counted = Counted(function)
        for _ in range(4):
            x = torch.randn(4, device=device)
            assert torch.equal(counted.call(x), function(x))
        assert counted.runs == 4


def test_an_error_while_recording_leaves_nothing_behind(device):
    failing = [False, True, False, False]

    def function(x):
        if failing and failing.pop(0):
            raise ValueError("no")
        return x + 1

    counted = Counted(function)
    x = torch.randn(4, device=device)
    counted.call(x)
    with pytest.raises(ValueError, match="no"):
        counted.call(x)
    for _ in range(3):
        assert torch.equal(counted.call(x), x + 1)
    assert counted.runs == 3
    assert replay.recording.by is None


def test_temporaries_are_let_go_before_the_end(device):
    held: list[weakref.ref] = []
    counts: list[int] = []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor):
                alive = [one for one in held if one() is not None]
                counts.append(len(alive))
                held.append(weakref.ref(found))
            return found

    def function(x):
        for _ in range(6):
            x = x + 1
        return x

    counted = Counted(function)
    for _ in range(2):
        counted.call(torch.randn(4, device=device))
    (found,) = replays()
    with Watched():
        found.run(torch.randn(4, device=device))
    assert max(counts) <= 2


def test_recording_holds_no_temporaries(device):
    """What a launcher makes for one group of rows after another need not fit the memory at once."""
    held: list[weakref.ref] = []
    most: list[int] = []

    def function(x):
        for _ in range(20):
            part = torch.empty_like(x)
            held.append(weakref.ref(part))
            part.copy_(x[:2].repeat(2))
            x = part + 1
            most.append(sum(one() is not None for one in held))
        return x

    check_replayed(function, lambda: (torch.randn(4, device=device),), device)
    assert max(most) <= 2


def test_what_is_recorded_is_bounded(device, monkeypatch):
    monkeypatch.setattr(replay, "_MOST_STEPS", 10)
    counted = Counted(lambda x: (x + 1) * 2 - 3)  # three steps, and two that let go
    for size in range(1, 9):
        for _ in range(3):
            x = torch.randn(size, device=device)
            assert torch.equal(counted.call(x), (x + 1) * 2 - 3)
    assert counted.runs == 16
    assert sum(len(one.lines) for one in replays()) <= 10


def test_every_kernel_launch_can_be_recorded():
    """A launch that is not `quick` would be missing from a replay."""
    launched, decorated = set(), {}
    for path in FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                name = ast.unparse(node.func.value)
                if name.endswith("_kernel"):
                    launched.add(name)
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(one) for one in node.decorator_list):
                decorated[node.name] = ast.unparse(node.decorator_list[0])
    kernels = {name for name in launched if name in decorated}
    assert len(kernels) > 20
    assert {name for name in kernels if decorated[name] != "quick"} == set()
