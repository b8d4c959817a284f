"""The contract of sequence mixers, (b, l, d) -> (b, l, d)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ...kernels.testing import TOLERANCE, relative_error
from ..mixers.common import MixerState
from ..protocols import CausalMixer, SequenceMixer
from .common import check_declarations, normal, require

BATCH, LENGTH = 2, 21
# Cuts of LENGTH positions; the pieces of one position are done by `step`.
CUTS = ((20, 1), (1, 20), (7, 1, 1, 1, 8, 2, 1), (1,) * LENGTH)
EXPORT_LENGTHS = (2, 3, 17, 64, 131)


def check_declared(mixer: nn.Module) -> None:
    """It has what the protocol names, and the numbers it states of itself are true."""
    require(isinstance(mixer, SequenceMixer), "it lacks methods or attributes of protocols.SequenceMixer")
    require(isinstance(getattr(mixer, "d_model", None), int), "it has no integer `d_model`")
    check_declarations(mixer)
    for mode in ("train", "prefill", *(["decode"] if mixer.causal else [])):
        flops = [mixer.flops(length, mode=mode) for length in (16, 32)]  # type: ignore[operator]
        require(all(isinstance(n, int) and n > 0 for n in flops), f"flops(l, mode={mode!r}) is no positive integer")
        require(flops[0] <= flops[1], f"flops(l, mode={mode!r}) falls with the length")
    if not mixer.causal:
        require(mixer.state_numel() == 0, "it is not causal and states a state")  # type: ignore[operator]
        for method in ("prefill", "step"):
            with _raises(TypeError, f"`{method}` of a bidirectional mixer must raise TypeError"):
                getattr(mixer, method)(sequence_input(mixer), None)
        return
    require(isinstance(mixer, CausalMixer), "it lacks methods of protocols.CausalMixer")
    state = mixer.init_state(1)  # type: ignore[operator]
    require(type(state) is mixer.state_type, f"init_state() gives a {type(state).__name__}, not its `state_type`")
    floating = sum(tensor.numel() for tensor in state.tensors().values() if tensor.is_floating_point())
    require(mixer.state_numel() == floating, "state_numel() is not the size of init_state(1)")  # type: ignore[operator]


def check_sequence_shape(mixer: nn.Module) -> None:
    """Input shape and dtype come back, for one position and for many, and entries of a batch do not see each other."""
    for batch, length in ((BATCH, 0), (0, 2), (BATCH, 1), (BATCH, 2), (BATCH, LENGTH)):
        x = sequence_input(mixer, length, batch=batch)
        y = mixer(x)
        require(y.shape == x.shape, f"{tuple(x.shape)} came back as {tuple(y.shape)}")
        require(y.dtype == x.dtype, f"{x.dtype} came back as {y.dtype}")
    _close(torch.cat([mixer(part) for part in x.split(1)]), y, "a batch differs from its entries")
    with _raises(ValueError, "an input of the wrong width must raise ValueError"):
        mixer(torch.cat([x, x], dim=-1))


def check_cuts(mixer: nn.Module) -> None:
    """However a sequence is cut into prefills and steps, outputs and the last state are the same."""
    if not mixer.causal:
        return
    x = sequence_input(mixer)
    whole, last = mixer.prefill(x)  # type: ignore[operator]
    _close(whole, mixer(x), "prefill differs from forward")
    for cut in CUTS:
        y, state = _pieces(mixer, x, cut)
        _close(y, whole, f"pieces {cut} differ from one call")
        _same_state(mixer, state, last, f"after pieces {cut}")
    y, _ = _pieces(mixer, x, (1, 3, 1), mixer.init_state(BATCH))  # type: ignore[operator]
    _close(y, whole[:, :5], "a start from init_state() differs from a start without a state")
    _no_positions(mixer, last)
    none, _ = mixer.step(x[:0, 0], mixer.init_state(0))  # type: ignore[operator]
    require(none.shape == x[:0, 0].shape, f"a step of an empty batch gives {tuple(none.shape)}")


def _no_positions(mixer: nn.Module, state: Any) -> None:
    """A piece without positions, whatever comes with it, leaves the state as it is."""
    x = sequence_input(mixer, 0)
    true = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    for name in ("mask", "reset", *(["seq_idx"] if mixer.varlen else [])):
        y, after = mixer.prefill(x, state, **{name: true.int() if name == "seq_idx" else true})  # type: ignore[operator]
        require(y.shape == x.shape, f"no positions with `{name}` give {tuple(y.shape)}")
        for field, tensor in after.tensors().items():
            require(torch.equal(tensor, state.tensors()[field]), f"no positions with `{name}` change `state.{field}`")


def check_padding(mixer: nn.Module) -> None:
    """Padding on either side changes neither real outputs nor states, and gives zeros."""
    x = sequence_input(mixer, LENGTH, batch=4)
    spans = ((0, LENGTH), (6, LENGTH), (0, 9), (5, 7))
    mask = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    for row, (start, end) in enumerate(spans):
        mask[row, start:end] = True
    padded = torch.where(mask[..., None], x, 100.0)
    starts: list[Any] = [None]
    if mixer.causal:
        starts.append(mixer.prefill(sequence_input(mixer, 5, batch=4, seed=3))[1])  # type: ignore[operator]
    for start_state in starts:
        what = "" if start_state is None else " going on from a state"
        if mixer.causal:
            y, state = mixer.prefill(padded, start_state, mask=mask)  # type: ignore[operator]
        else:
            y = mixer(padded, mask=mask)
        require(not y[~mask].any(), "outputs at padding are not zero")
        for row, (start, end) in enumerate(spans):
            alone = x[row : row + 1, start:end]
            name = f"a row padded by {start} and {LENGTH - end}{what}"
            if not mixer.causal:
                _close(y[row : row + 1, start:end], mixer(alone), f"{name} differs from the row alone")
                continue
            begin = None if start_state is None else start_state.select(_rows(x, row))
            expected, last = mixer.prefill(alone, begin)  # type: ignore[operator]
            _close(y[row : row + 1, start:end], expected, f"{name} differs from the row alone")
            _same_state(mixer, state.select(_rows(x, row)), last, f"of {name}")
    whole = torch.ones_like(mask)
    _close(mixer(x, mask=whole), mixer(x), "a mask that is True everywhere changes the output")
    if mixer.causal:
        mask[1] = False
        _, state = mixer.prefill(padded, start_state, mask=mask)  # type: ignore[operator]
        kept = start_state.select(_rows(x, 1))
        _same_state(mixer, state.select(_rows(x, 1)), kept, "of a row without real tokens")
    holes = whole.clone()
    holes[0, 3] = False
    with _raises(ValueError, "a mask with holes must raise ValueError"):
        mixer(x, mask=holes)


def check_packing(mixer: nn.Module) -> None:
    """Packed sequences do not see each other: outputs, states, with padding, going on from a state."""
    x = sequence_input(mixer)
    seq_idx = torch.tensor([[0] * 4 + [1] + [2] * 9 + [3] + [5] * 6, [3] * 20 + [7]], device=x.device)
    if not mixer.varlen:
        with _raises((TypeError, ValueError), "it is not `varlen` and takes seq_idx"):
            mixer(x, seq_idx=seq_idx)
        return
    parts = [[0, 4, 5, 14, 15, LENGTH], [0, 20, LENGTH]]

    def apart(row: int, begin: Any = None) -> tuple[Tensor, Any]:
        found = []
        for start, end in itertools.pairwise(parts[row]):
            piece = x[row : row + 1, start:end]
            if mixer.causal:
                y, state = mixer.prefill(piece, begin if start == 0 else None)  # type: ignore[operator]
            else:
                y, state = mixer(piece), None
            found.append(y)
        return torch.cat(found, dim=1), state

    for row in range(BATCH):
        y = mixer(x, seq_idx=seq_idx.int())
        _close(y[row : row + 1], apart(row)[0], "packed sequences differ from the same sequences apart")
    mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    mask[0, 15:] = mask[1, :20] = False
    y = mixer(x, mask=mask, seq_idx=seq_idx)
    _close(y[:1, :15], apart(0)[0][:, :15], "packed sequences with padding differ from the same sequences apart")
    _close(y[1:, 20:], apart(1)[0][:, 20:], "a packed sequence behind padding differs from itself alone")
    if not mixer.causal:
        return
    _, begin = mixer.prefill(sequence_input(mixer, 5, seed=3))  # type: ignore[operator]
    y, state = mixer.prefill(x, begin, seq_idx=seq_idx)  # type: ignore[operator]
    for row in range(BATCH):
        expected, last = apart(row, begin.select(_rows(x, row)))
        _close(y[row : row + 1], expected, "packed sequences going on from a state differ from the same ones apart")
        _same_state(mixer, state.select(_rows(x, row)), last, "after packed sequences")


def check_reset(mixer: nn.Module) -> None:
    """A reset drops the state before its position: like sequences apart, also at the first position of a call."""
    if not mixer.causal:
        return
    x = sequence_input(mixer)
    reset = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    reset[0, [5, 6, 14]] = reset[1, 0] = True
    _, begin = mixer.prefill(sequence_input(mixer, 5, seed=3))  # type: ignore[operator]
    y, state = mixer.prefill(x, begin, reset=reset)  # type: ignore[operator]
    first, _ = mixer.prefill(x[:1, :5], begin.select(_rows(x, 0)))  # type: ignore[operator]
    parts = [first, *(mixer.prefill(x[:1, a:b])[0] for a, b in ((5, 6), (6, 14)))]  # type: ignore[operator]
    end, last = mixer.prefill(x[:1, 14:])  # type: ignore[operator]
    _close(y[:1], torch.cat([*parts, end], dim=1), "resets differ from sequences apart")
    _same_state(mixer, state.select(_rows(x, 0)), last, "after resets")
    whole, last = mixer.prefill(x[1:])  # type: ignore[operator]
    _close(y[1:], whole, "a reset at the first position does not drop the state handed in")
    _same_state(mixer, state.select(_rows(x, 1)), last, "after a reset at the first position")


def check_all_at_once(mixer: nn.Module) -> None:
    """A mask, packed sequences, resets and a state together are the same steps, one row and position after another."""
    if not mixer.causal:
        return
    x = sequence_input(mixer, 9, batch=3)
    spans = ((0, 9), (2, 8), (5, 5))
    mask, reset = (torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device) for _ in range(2))
    for row, (start, end) in enumerate(spans):
        mask[row, start:end] = True
    reset[0, [0, 6]] = reset[1, [1, 2, 4]] = reset[2, 3] = True  # also at padding, where it is none
    options = {"mask": mask, "reset": reset}
    seq_idx = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2, 2], [0, 0, 0, 0, 4, 4, 4, 5, 6], [0] * 8 + [1]], device=x.device)
    if mixer.varlen:
        options["seq_idx"] = seq_idx
    _, begin = mixer.prefill(sequence_input(mixer, 5, batch=3, seed=3))  # type: ignore[operator]
    y, after = mixer.prefill(x, begin, **options)  # type: ignore[operator]
    for row, (start, end) in enumerate(spans):
        state, found = begin.select(_rows(x, row)), [y[row : row + 1, :0]]
        for t in range(start, end):
            changed = mixer.varlen and t > start and bool(seq_idx[row, t] != seq_idx[row, t - 1])
            if changed or bool(reset[row, t]):
                state = mixer.init_state(1)  # type: ignore[operator]
            one, state = mixer.step(x[row : row + 1, t], state)  # type: ignore[operator]
            found.append(one[:, None])
        _close(y[row : row + 1, start:end], torch.cat(found, dim=1), f"row {row} differs from its steps")
        _same_state(mixer, after.select(_rows(x, row)), state, f"after row {row}")


def check_no_future(mixer: nn.Module) -> None:
    """No gradient from the future, but for the rounding of Fourier transforms; a mixer that is not causal has some."""
    x = sequence_input(mixer).requires_grad_()
    y = mixer(x)
    seen = False
    for t in (0, 3, 4, 16, LENGTH - 2):
        (dx,) = torch.autograd.grad(y[:, t].sum(), x, retain_graph=True)
        size = dx.abs().amax((0, 2))
        require(bool(size[: t + 1].any()), f"output {t} depends on nothing before it")
        later = bool((size[t + 1 :] > 20 * torch.finfo(x.dtype).eps * size.max()).any())
        require(not (mixer.causal and later), f"output {t} depends on later positions")
        seen = seen or later
    require(bool(mixer.causal) or seen, "it is not causal and sees no later position")


def check_sequence_gradients(mixer: nn.Module) -> None:
    """Every parameter, the input and the state get a finite gradient that is not all zero."""
    x = sequence_input(mixer, seed=1).requires_grad_()
    named = {"x": x} | {name: p for name, p in mixer.named_parameters() if p.requires_grad}
    if mixer.causal:
        begin = mixer.prefill(sequence_input(mixer, 5, seed=3))[1].detach()  # type: ignore[operator]
        leaves = {
            name: tensor.requires_grad_()
            for name, tensor in begin.tensors().items()
            if tensor.is_floating_point() and name not in begin.choices
        }
        named |= {f"state.{name}": tensor for name, tensor in leaves.items() if tensor.numel()}
        ys = [mixer(x), mixer.prefill(x, begin)[0]]  # type: ignore[operator]
    else:
        ys = [mixer(x)]
    loss = sum((y * normal(y.shape, seed=index).to(y)).sum() for index, y in enumerate(ys))
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)  # type: ignore[arg-type]
    for name, gradient in zip(named, gradients):
        if gradient is None:
            raise AssertionError(f"The mixer breaks its contract: `{name}` gets no gradient.")
        require(bool(gradient.isfinite().all()), f"the gradient of `{name}` is not finite")
        require(bool(gradient.any()), f"the gradient of `{name}` is zero")


def check_dtypes(mixer: nn.Module) -> None:
    """Outputs have the dtype of the input, also in bfloat16 and under autocast; recurrent states stay float32.

    A model converted as a whole has rounded decay rates too and is allowed a larger error for that.
    """
    mixer = copy.deepcopy(mixer).float()
    x = sequence_input(mixer, 256)
    exact = mixer(x)
    narrow = copy.deepcopy(mixer).bfloat16()
    for name, run, inputs in (("autocast", mixer, x), ("parameters", narrow, x.bfloat16())):
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=name == "autocast"):
            y = run(inputs)
            require(y.dtype == torch.bfloat16, f"bfloat16 {name} give {y.dtype}")
            error, limit = relative_error(y, exact), 3e-2 if name == "autocast" else 0.3
            require(error < limit, f"bfloat16 {name} are off by {error:.1e}, allowed {limit}")
            if not mixer.causal:
                continue
            _, state = run.prefill(inputs[:, :9])  # type: ignore[operator]
            _, later = run.step(inputs[:, 9], state)  # type: ignore[operator]
        for when, value in (("prefill", state), ("step", later)):
            for field, tensor in value.tensors().items():
                if not tensor.is_floating_point() or not tensor.numel():
                    continue
                expected = torch.float32 if field in (*value.recurrent, *value.choices) else torch.bfloat16
                what = f"`state.{field}` after {when} with bfloat16 {name} is {tensor.dtype}, expected {expected}"
                require(tensor.dtype == expected, what)
    if mixer.causal:
        for dtype in (torch.float32, torch.float64):
            run = copy.deepcopy(mixer).to(dtype)
            state = run.prefill(x[:, :9].to(dtype))[1]  # type: ignore[operator]
            kinds = {tensor.dtype for tensor in state.tensors().values() if tensor.is_floating_point()}
            require(kinds == {dtype}, f"a mixer of {dtype} has a state of {kinds}")


def check_mixing_matrix(mixer: nn.Module) -> None:
    """The matrix times the inputs, plus what comes from a state, is the output; nothing above a causal diagonal."""
    x = sequence_input(mixer)
    if not mixer.linear_in_x:
        with _raises((NotImplementedError, TypeError), "it is not linear and gives a mixing matrix"):
            mixer.mixing_matrix(x)  # type: ignore[operator]
        return
    states = [None]
    if mixer.causal:
        states.append(mixer.prefill(sequence_input(mixer, 5, seed=3))[1])  # type: ignore[operator]
    for state in states:
        found = mixer.mixing_matrix(x, state=state)  # type: ignore[operator]
        heads = found.matrix.shape[1]
        require(found.matrix.shape[0] in (1, BATCH), "the matrix has a batch of its own")
        require(found.matrix.dtype == torch.promote_types(x.dtype, torch.float32), f"it is {found.matrix.dtype}")
        if found.matrix.dim() == 4:  # several ranks have a form of their own
            shape = (BATCH, LENGTH, heads)
            require(found.matrix.shape[2:] == (LENGTH, LENGTH), f"the matrix is {tuple(found.matrix.shape)}")
            require(
                found.inputs.shape[:3] == found.outputs.shape[:3] == shape, "inputs or outputs are not (b, l, h, p)"
            )
            if mixer.causal:
                require(not found.matrix.triu(1).any(), "a causal mixer has a matrix with an upper part")
        _close(found.apply(), found.outputs, f"matrix times inputs is not the outputs (state: {state is not None})")
    require(found.from_state is not None or not mixer.causal, "a state is given and `from_state` is None")


def check_state_methods(mixer: nn.Module) -> None:
    """States are values: never changed, cut by rows, moved, detached, saved and loaded bit for bit, and checked."""
    if not mixer.causal:
        return
    x = sequence_input(mixer, batch=3)
    _, state = mixer.prefill(x)  # type: ignore[operator]
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    require(isinstance(state, MixerState), "states must derive from mixers.common.MixerState")
    require(state.batch_size == 3, f"batch_size is {state.batch_size} for 3 rows")
    require(state.nbytes == sum(tensor.nbytes for tensor in before.values()), "nbytes is not that of its tensors")
    y, _ = mixer.step(x[:, 0], state)  # type: ignore[operator]
    mixer.prefill(x, state)  # type: ignore[operator]
    for name, tensor in state.tensors().items():
        require(torch.equal(tensor, before[name]), f"`state.{name}` was changed in place")
    index = torch.tensor([2, 0, 2, 1], device=x.device)
    chosen, _ = mixer.step(x[index, 0], state.select(index))  # type: ignore[operator]
    _close(chosen, y[index], "rows chosen by select() differ")
    detached = state.detach()
    require(not any(tensor.requires_grad for tensor in detached.tensors().values()), "detach() leaves a graph")
    moved = detached.to(device=x.device, dtype=torch.bfloat16)
    wide = (*state.recurrent, *state.choices)
    for name, tensor in moved.tensors().items():
        right = not tensor.is_floating_point() or tensor.dtype == torch.bfloat16 or name in wide
        require(right, f"to(dtype=bfloat16) makes `state.{name}` {tensor.dtype}")
        require(name not in wide or tensor.dtype == torch.float32, f"to() rounds `state.{name}`")
    contiguous = {name: tensor.contiguous().cpu() for name, tensor in detached.tensors().items()}
    loaded = safetensors.torch.load(safetensors.torch.save(contiguous))
    again = type(state)(**loaded).to(device=x.device)
    require(torch.equal(mixer.step(x[:, 0], again)[0], y), "a saved and loaded state differs")  # type: ignore[operator]
    with _raises(ValueError, "a state of another batch must raise ValueError"):
        mixer.step(x[:2, 0], state)  # type: ignore[operator]
    with _raises(TypeError, "a state of another kind must raise TypeError"):
        mixer.prefill(x, contiguous)  # type: ignore[operator]
    with _raises(TypeError, "a step without a state must raise TypeError"):
        mixer.step(x[:, 0], None)  # type: ignore[operator]
    for name, tensor in detached.tensors().items():
        wrong = torch.float64 if not tensor.is_floating_point() else torch.int64
        for dtype in (wrong, *([torch.bfloat16] if name in wide else [])):
            other = type(state)(**{**detached.tensors(), name: tensor.to(dtype)})
            with _raises(TypeError, f"a state with `{name}` of {dtype} must raise TypeError"):
                mixer.step(x[:, 0], other)  # type: ignore[operator]


def check_sequence_state_dict(mixer: nn.Module) -> None:
    """A state dict goes around, through safetensors as well, and a deep copy is equal and apart."""
    x = sequence_input(mixer)
    expected = mixer(x)
    twin = copy.deepcopy(mixer)
    require(torch.equal(twin(x), expected), "a deep copy differs")
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.1)
    require(torch.equal(mixer(x), expected), "a deep copy shares parameters")
    require(not torch.equal(twin(x), expected), "the output does not depend on the parameters")
    weights = {name: value.contiguous().cpu() for name, value in mixer.state_dict().items()}
    twin.load_state_dict(safetensors.torch.load(safetensors.torch.save(weights)), strict=True)
    require(torch.equal(twin(x), expected), "loading the state dict does not restore the output")


def check_export(mixer: nn.Module) -> None:
    """torch.export takes forward, and prefill and step with a state, and runs for lengths it has not seen."""
    eager = copy.deepcopy(mixer).eval().requires_grad_(False)
    length = torch.export.Dim("length", min=2, max=4096)
    x = sequence_input(mixer, 20)
    program = torch.export.export(eager, (x,), dynamic_shapes=({1: length},)).module()
    for size in EXPORT_LENGTHS:
        other = sequence_input(mixer, size, seed=size)
        _close(program(other), eager(other), f"exported code differs at length {size}")
    if not mixer.causal:
        return
    state = eager.prefill(x)[1]  # type: ignore[operator]
    shapes = ({1: length}, [None] * len(state.tensors()))
    program = torch.export.export(_Prefill(eager), (x, state), dynamic_shapes=shapes).module()
    step = torch.export.export(_Step(eager), (x[:, 0], state)).module()
    for size in EXPORT_LENGTHS:
        other = sequence_input(mixer, size, seed=size)
        (got, after), (expected, last) = program(other, state), eager.prefill(other, state)  # type: ignore[operator]
        _close(got, expected, f"exported prefill differs at length {size}")
        _same_state(eager, after, last, "of exported prefill")
    (got, after), (expected, last) = step(x[:, 0], state), eager.step(x[:, 0], state)  # type: ignore[operator]
    _close(got, expected, "the exported step differs")
    _same_state(eager, after, last, "of the exported step")


def check_compile(mixer: nn.Module) -> None:
    """torch.compile takes it as one graph, with gradients, masks and, where it is offered, packing."""
    x = sequence_input(mixer)
    mask = torch.arange(LENGTH, device=x.device).expand(BATCH, -1) < LENGTH - 4
    options: dict[str, Any] = {"mask": mask}
    if mixer.varlen:
        options["seq_idx"] = (torch.arange(LENGTH, device=x.device) > 7).int().expand(BATCH, -1)
    torch.compiler.reset()
    compiled = torch.compile(mixer, fullgraph=True, dynamic=True, backend="eager")
    results = []
    for run in (compiled, mixer):
        leaf = x.clone().requires_grad_()
        y = run(leaf, **options)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaf)])
    for got, expected, what in zip(*results, ("outputs", "gradients")):
        _close(got, expected, f"{what} of compiled code differ")


SEQUENCE_CHECKS: tuple[Callable[[nn.Module], None], ...] = (
    check_declared,
    check_sequence_shape,
    check_cuts,
    check_padding,
    check_packing,
    check_reset,
    check_all_at_once,
    check_no_future,
    check_sequence_gradients,
    check_dtypes,
    check_mixing_matrix,
    check_state_methods,
    check_sequence_state_dict,
    check_export,
    check_compile,
)
"""What every mixer of sequences fulfils; each check takes the mixer and raises AssertionError."""


def sequence_input(mixer: nn.Module, length: int = LENGTH, *, batch: int = BATCH, seed: int = 0) -> Tensor:
    """Normal numbers (b, l, d) in the dtype and on the device of the mixer."""
    like = next(mixer.parameters())
    return normal((batch, length, int(mixer.d_model)), seed).to(like)  # type: ignore[arg-type]


class _Prefill(nn.Module):
    """`prefill` as forward, which is what torch.export takes."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self.mixer.prefill(x, state)  # type: ignore[operator]


class _Step(_Prefill):
    """`step` as forward."""

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self.mixer.step(x, state)  # type: ignore[operator]


def _pieces(mixer: nn.Module, x: Tensor, sizes: tuple[int, ...], state: Any = None) -> tuple[Tensor, Any]:
    """Outputs and last state of consecutive calls: pieces of one position by `step` where there is a state."""
    found, start = [], 0
    for size in sizes:
        if size == 1 and state is not None:
            y, state = mixer.step(x[:, start], state)  # type: ignore[operator]
            y = y[:, None]
        else:
            y, state = mixer.prefill(x[:, start : start + size], state)  # type: ignore[operator]
        found.append(y)
        start += size
    return torch.cat(found, dim=1), state


def _same_state(mixer: nn.Module, state: MixerState, expected: MixerState, what: str) -> None:
    """Recurrent fields agree, and so do the outputs of the next positions; the rest of a state is its own affair."""
    tensors, wanted = state.tensors(), expected.tensors()
    for name in state.recurrent:
        got, target = tensors[name], wanted[name]
        if name in state.periodic:
            got, target = torch.polar(torch.ones_like(got), got), torch.polar(torch.ones_like(target), target)
        _close(got, target, f"`state.{name}` differs {what}")
    x = sequence_input(mixer, 5, batch=state.batch_size, seed=11)
    got, _ = mixer.prefill(x, state)  # type: ignore[operator]
    target, _ = mixer.prefill(x, expected)  # type: ignore[operator]
    _close(got, target, f"the next outputs differ {what}")


def _close(got: Tensor, expected: Tensor, otherwise: str) -> None:
    require(got.shape == expected.shape, f"{otherwise}: {tuple(got.shape)} instead of {tuple(expected.shape)}")
    limit = max(TOLERANCE[got.dtype], TOLERANCE[expected.dtype])
    error = relative_error(got, expected)
    require(error <= limit, f"{otherwise} by {error:.1e}, allowed {limit:.0e}")


def _rows(x: Tensor, row: int) -> Tensor:
    return torch.tensor([row], device=x.device)


@contextmanager
def _raises(error: type[Exception] | tuple[type[Exception], ...], otherwise: str) -> Iterator[None]:
    try:
        yield
    except error:
        return
    raise AssertionError(f"The mixer breaks its contract: {otherwise}.")
