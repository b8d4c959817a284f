"""Generating symbols one by one from a model with a state.

    ids = generate(model, prompt, 100, temperature=0.8, top_p=0.95, generator=torch.Generator().manual_seed(0))
    for symbols in stream(model, prompt, 100): ...

Prompts of different lengths are padded on either side and told apart by a mask; each row goes on as if it were alone.
Top-p: Holtzman et al. (2020); repetition penalty: Keskar et al. (2019), section 4.1.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ..kernels import overwrite_states
from .cache import allocate, copy_state_


@torch.no_grad()
def generate(
    model: nn.Module,
    ids: Tensor,
    max_new: int,
    *,
    mask: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: Sequence[int] = (),
    pad: int = 0,
    generator: torch.Generator | None = None,
    state: Any = None,
    chunk_size: int | None = None,
    cuda_graph: bool | None = None,
) -> Tensor:
    """Go on from prompts, symbol by symbol.

    Args:
        model: `SequenceModel`, or anything with its `prefill`, `step` and `init_state` whose outputs are logits.
        ids: Prompts, (b, l) integers, l >= 1.
        max_new: Symbols to add.
        mask: True at the prompts' real symbols, (b, l); padding may stand on either side. None: all are.
        temperature: Divides the logits; 0 takes the largest.
        top_k: Draw from the k most probable symbols.
        top_p: Draw from the fewest most probable symbols that together have this probability.
        repetition_penalty: Positive logits of symbols that have occurred are divided by this, negative ones multiplied.
        stop: Symbols that end a row; the one that ended it is part of the result.
        pad: Symbol that fills rows that have ended.
        generator: Source of random numbers, on the device of the model; the same seed gives the same symbols.
        state: State to go on from; None: the prompt is the start.
        chunk_size: Positions of the prompt that are taken in at once; None: all.
        cuda_graph: Replay one recorded step. None: on CUDA devices, where the state does not grow.

    Returns:
        The new symbols, (b, max_new), shorter if all rows end before.

    Raises:
        ValueError: if an option is out of range, a row has no real symbol, or a graph is asked for on a CPU.
    """
    pieces = list(
        stream(
            model,
            ids,
            max_new,
            mask=mask,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            stop=stop,
            pad=pad,
            generator=generator,
            state=state,
            chunk_size=chunk_size,
            cuda_graph=cuda_graph,
        )
    )
    return torch.stack(pieces, dim=1) if pieces else ids[:, :0]


def stream(
    model: nn.Module,
    ids: Tensor,
    max_new: int,
    *,
    mask: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: Sequence[int] = (),
    pad: int = 0,
    generator: torch.Generator | None = None,
    state: Any = None,
    chunk_size: int | None = None,
    cuda_graph: bool | None = None,
) -> Iterator[Tensor]:
    """The symbols of `generate` as they come, (b,) each; see there for arguments and errors."""
    check_options(ids, mask, max_new, chunk_size, temperature, top_k, top_p, repetition_penalty)
    device = ids.device
    graphs = device.type == "cuda" if cuda_graph is None else cuda_graph
    if graphs and device.type != "cuda":
        raise ValueError(f"cuda_graph=True needs a CUDA device, the prompt is on '{device}'.")
    if state is None:
        state = allocate(model, ids.shape[0], slots=ids.shape[1] + max_new, device=device)
    elif cuda_graph is None:
        graphs = False  # a state from elsewhere may grow
    return _stream(
        model,
        ids,
        max_new,
        mask=mask,
        choice={"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator},
        penalty=repetition_penalty,
        stop=torch.tensor(list(stop), dtype=torch.int64, device=device),
        pad=pad,
        state=state,
        chunk_size=chunk_size,
        graphs=graphs,
    )


def _stream(
    model: nn.Module,
    ids: Tensor,
    max_new: int,
    *,
    mask: Tensor | None,
    choice: dict[str, Any],
    penalty: float,
    stop: Tensor,
    pad: int,
    state: Any,
    chunk_size: int | None,
    graphs: bool,
) -> Iterator[Tensor]:
    advance: Any = None
    with torch.no_grad():
        logits, state = read_prompt(model, ids, state, mask, chunk_size)
        seen = None
        if penalty != 1:
            real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
            # One column more takes what padding holds.
            seen = torch.zeros(ids.shape[0], logits.shape[1] + 1, dtype=torch.bool, device=ids.device)
            seen = seen.scatter(1, torch.where(real, ids, logits.shape[1]), True)[:, :-1]
    ended = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
    for count in range(1, max_new + 1):
        with torch.no_grad():
            if seen is not None:
                logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
            symbols = torch.where(ended, pad, sample(logits, **choice))
            ended = ended | torch.isin(symbols, stop)
            if seen is not None:
                seen = seen.scatter(1, symbols[:, None], True)
        yield symbols
        if count == max_new or (stop.numel() and bool(ended.all())):
            return
        with torch.no_grad():
            if graphs:
                advance = advance or RecordedStep(model, symbols, state)
                logits = advance(symbols)
            else:
                logits, state = model.step(symbols, state)  # type: ignore[operator]


def sample(
    logits: Tensor,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Choose one symbol per row.

    Args:
        logits: (b, n).
        temperature: Divides them; 0 takes the largest.
        top_k: Keep the k largest.
        top_p: Keep the fewest most probable ones that together reach this probability.
        generator: Source of random numbers.

    Returns:
        (b,) int64.
    """
    if temperature == 0:
        return logits.float().argmax(-1)
    probability, order = _ordered(logits, temperature, top_k, top_p)
    place = torch.multinomial(probability, 1, generator=generator)
    return order.gather(1, place)[:, 0]


def probabilities(
    logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """What `sample` draws from.

    Args:
        logits: (b, n).
        temperature: Divides them; above 0.
        top_k: Keep the k largest.
        top_p: Keep the fewest most probable ones that together reach this probability.

    Returns:
        (b, n) float32, each row of sum 1.
    """
    probability, order = _ordered(logits, temperature, top_k, top_p)
    probability = probability / probability.sum(-1, keepdim=True)
    return torch.zeros_like(probability).scatter(1, order, probability)


def _ordered(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> tuple[Tensor, Tensor]:
    """Weights in falling order, 0 for what is left out, and whose they are, (b, n) each."""
    ordered, order = (logits.float() / temperature).sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ordered[:, top_k:] = float("-inf")
    probability = ordered.softmax(-1)
    if top_p is not None:
        before = probability.cumsum(-1) - probability
        probability = torch.where(before < top_p, probability, 0)
    return probability, order


class RecordedStep:
    """`model.step` as a CUDA graph over its own memory for symbols, state and logits.

    Args:
        model: With `step`.
        symbols: What a step takes, (b,); gives shape and device.
        state: State to start from; it is copied, and does not grow.

    Calling it with symbols advances the state in `self.state`, in place, and returns logits that the next call
    overwrites.
    """

    def __init__(self, model: nn.Module, symbols: Tensor, state: Any) -> None:
        self.symbols, self.state = symbols.clone(), _pytree.tree_map(torch.clone, state)
        # Running it outside first lets libraries set themselves up; the state is a value and stays as it was.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                model.step(self.symbols, self.state)  # type: ignore[operator]
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with overwrite_states(), torch.cuda.graph(self.graph):
            self.logits, after = model.step(self.symbols, self.state)  # type: ignore[operator]
            copy_state_(self.state, after)

    def __call__(self, symbols: Tensor) -> Tensor:
        self.symbols.copy_(symbols)
        self.graph.replay()
        return self.logits


def read_prompt(
    model: nn.Module, ids: Tensor, state: Any, mask: Tensor | None, chunk_size: int | None
) -> tuple[Tensor, Any]:
    """Take in prompts.

    Args:
        model: As for `generate`.
        ids: (b, l) integers.
        state: State to go on from.
        mask: True at real symbols, (b, l); None: all are.
        chunk_size: Positions that are taken in at once; None: all.

    Returns:
        Logits at each row's last real symbol, (b, n), and the state after it.
    """
    options: dict[str, Any] = {}
    if "last_only" in inspect.signature(model.prefill).parameters:  # type: ignore[arg-type]
        options["last_only"] = True
    logits: Any = None
    for piece in torch.arange(ids.shape[1]).split(chunk_size or ids.shape[1]):
        part = slice(int(piece[0]), int(piece[-1]) + 1)
        real = torch.ones_like(ids[:, part], dtype=torch.bool) if mask is None else mask[:, part]
        if mask is not None:
            options["mask"] = real
        y, state = model.prefill(ids[:, part], state, **options)  # type: ignore[operator]
        if "last_only" not in options:
            last = real.shape[1] - 1 - real.flip(1).int().argmax(1)
            y = y[torch.arange(len(ids), device=ids.device), last]
        logits = y if logits is None else torch.where(real.any(1, keepdim=True), y, logits)
    return logits, state


def check_options(
    ids: Tensor,
    mask: Tensor | None,
    max_new: int,
    chunk_size: int | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    penalty: float = 1.0,
) -> None:
    """Check what `generate` takes.

    Args:
        ids: See `generate`, like all that follow.
        mask: See there.
        max_new: See there.
        chunk_size: See there.
        temperature: See there.
        top_k: See there.
        top_p: See there.
        penalty: See there.

    Raises:
        ValueError: if one is out of range.
    """
    if ids.dim() != 2 or ids.shape[1] < 1 or ids.is_floating_point():
        raise ValueError(f"`ids` must be (b, l) integers with l >= 1, got {tuple(ids.shape)} {ids.dtype}.")
    if mask is not None and not bool(mask.any(1).all()):
        raise ValueError("`mask` leaves a row without any symbol; give it at least one, such as a start symbol.")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, got {chunk_size}.")
    if max_new < 0:
        raise ValueError(f"`max_new` must be at least 0, got {max_new}.")
    if not temperature >= 0:
        raise ValueError(f"`temperature` must be at least 0, got {temperature}.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"`top_k` must be at least 1, got {top_k}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"`top_p` must lie in (0, 1], got {top_p}.")
    if not penalty > 0:
        raise ValueError(f"`repetition_penalty` must be positive, got {penalty}.")


__all__ = ["RecordedStep", "generate", "probabilities", "sample", "stream"]
