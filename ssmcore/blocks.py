"""What stands around mixers: norm, gated MLP, residual blocks and stacks of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels import TokenTree, rms_norm, swiglu
from .drafts import StackDraft
from .init import residual_init_
from .mixers.attention import Attention
from .mixers.common import lay_out, require_state
from .mixers.memory import GatedMemoryUnit
from .parallel import DoubleMixer
from .patterns import LETTERS, Layer, create_layer_mixer, layer_entries
from .states import PairState, StackState

NormPosition = Literal["pre", "post"]
Norm = Literal["rms", "layer"]


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension; statistics in float32, result in x's dtype.

    Args:
        d_model: Size of the last dimension.
        eps: Added to the mean square.
        device: Where to create the weight.
        dtype: Its dtype.

    Source: Zhang & Sennrich (2019), equation (4).
    """

    def __init__(
        self,
        d_model: int,
        *,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model, device=device, dtype=dtype))

    def no_decay_names(self) -> tuple[str, ...]:
        """Parameters that weight decay must leave alone."""
        return ("weight",)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., d_model)."""
        if x.dtype == self.weight.dtype:
            return self.rounded(x)
        dtype = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), self.eps).to(x.dtype)

    def rounded(self, x: Tensor) -> Tensor:
        """Normalise what may be wider than the weight, (..., d_model), after rounding it to the dtype of the weight."""
        return rms_norm(x, self.weight, eps=self.eps)

    def extra_repr(self) -> str:
        """Shown by repr()."""
        return f"{self.weight.numel()}, eps={self.eps}"


class LayerNorm(nn.LayerNorm):
    """Layer norm with statistics in float32 and the result in x's dtype, whatever the dtype of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., d_model)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight, bias = (None if part is None else part.to(dtype) for part in (self.weight, self.bias))
        return F.layer_norm(x.to(dtype), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class GatedMLP(nn.Module):
    """value, gate = fc1(x); fc2(value * silu(gate)).

    Args:
        d_model: Width of input and output.
        hidden: Inner width; None: 8 d_model / 3 rounded up to a multiple of 128.
        device: Where to create the parameters.
        dtype: Their dtype.

    Raises:
        ValueError: if the width is below 1.

    Source: Shazeer (2020), section 2, SwiGLU.
    """

    def __init__(
        self,
        d_model: int,
        *,
        hidden: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = 128 * -(-8 * d_model // (3 * 128)) if hidden is None else hidden
        if hidden < 1:
            raise ValueError(f"`hidden` must be at least 1, got {hidden}.")
        self.fc1 = nn.Linear(d_model, 2 * hidden, bias=False, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, d_model, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_model) to itself."""
        return self.fc2(swiglu(self.fc1(x)))


class Residual(nn.Module):
    """A mixer, and an MLP if there is one, around a residual stream.

        pre:   x = x + mixer(norm(x));   x = x + mlp(mlp_norm(x))
        post:  x = norm(x + mixer(x));   x = mlp_norm(x + mlp(x))

    Args:
        d_model: Width of the stream.
        mixer: Any module whose first argument is the stream; further ones are passed through.
        mlp: Module on the stream, or None.
        norm: "rms" or "layer".
        norm_position: "pre" or "post".
        eps: Of the norms.
        residual_in_fp32: Keep a 16-bit stream in float32: many layers of 16-bit additions lose small updates.
        device: Where to create the norms.
        dtype: Their dtype.

    Raises:
        ValueError: if an option has an unknown value.
    """

    def __init__(
        self,
        d_model: int,
        mixer: nn.Module,
        mlp: nn.Module | None = None,
        *,
        norm: Norm = "rms",
        norm_position: NormPosition = "pre",
        eps: float = 1e-5,
        residual_in_fp32: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if norm_position not in ("pre", "post"):
            raise ValueError(f"`norm_position` must be 'pre' or 'post', got {norm_position!r}.")
        self.norm_position = norm_position
        self.residual_in_fp32 = residual_in_fp32
        self.norm = create_norm(norm, d_model, eps=eps, device=device, dtype=dtype)
        self.mixer = mixer
        self.mlp = mlp
        self.mlp_norm = None if mlp is None else create_norm(norm, d_model, eps=eps, device=device, dtype=dtype)

    def forward(self, x: Tensor, *, with_output: bool = False, **mixer_arguments: Any) -> Any:
        """Pass the stream (..., d_model) through the block; keyword arguments go to the mixer.

        The stream comes back in float32 (with `residual_in_fp32`), else in the dtype of `x`; `with_output` gives the
        mixer's output beside it.
        """
        x = self._stream(x)
        y = self.mixer(self._inner(x, self.norm), **mixer_arguments)
        return (self._after(x, y), y) if with_output else self._after(x, y)

    def prefill(self, x: Tensor, state: Any = None, *, with_output: bool = False, **mixer_arguments: Any) -> Any:
        """Like `forward`, going on from the mixer's state; what that gives, and the state after it."""
        x = self._stream(x)
        y, state = self.mixer.prefill(self._inner(x, self.norm), state, **mixer_arguments)  # type: ignore[operator]
        return (self._after(x, y), y) if with_output else self._after(x, y), state

    def step(self, x: Tensor, state: Any, *, with_output: bool = False, **mixer_arguments: Any) -> Any:
        """One position of the stream, (b, d_model)."""
        x = self._stream(x)
        y, state = self.mixer.step(self._inner(x, self.norm), state, **mixer_arguments)  # type: ignore[operator]
        return (self._after(x, y), y) if with_output else self._after(x, y), state

    def verify(self, x: Tensor, state: Any, tree: TokenTree) -> tuple[Tensor, Any]:
        """A tree of positions, (b, l, d_model), see `Stack.verify`."""
        x = self._stream(x)
        y, draft = self.mixer.verify(self._inner(x, self.norm), state, tree)  # type: ignore[operator]
        return self._after(x, y), draft

    def _stream(self, x: Tensor) -> Tensor:
        return x.to(torch.promote_types(x.dtype, torch.float32)) if self.residual_in_fp32 else x

    def _inner(self, x: Tensor, norm: nn.Module) -> Tensor:
        """What a branch sees, in the dtype of its parameters where the model was converted as a whole."""
        if self.norm_position == "pre" and isinstance(norm, RMSNorm):
            return norm.rounded(x)
        x = x.to(norm.get_parameter("weight").dtype)
        return norm(x) if self.norm_position == "pre" else x

    def _add(self, x: Tensor, y: Tensor, norm: nn.Module) -> Tensor:
        # An addition takes in a narrower branch without a copy of it.
        x = x + y if torch.promote_types(x.dtype, y.dtype) == x.dtype else x + y.to(x.dtype)
        return x if self.norm_position == "pre" else norm(x).to(x.dtype)

    def _after(self, x: Tensor, y: Tensor) -> Tensor:
        """The stream after the mixer's output y has been added and the MLP has run."""
        x = self._add(x, y, self.norm)
        if self.mlp is None or self.mlp_norm is None:
            return x
        return self._add(x, self.mlp(self._inner(x, self.mlp_norm)), self.mlp_norm)


class Stack(nn.Module):
    """Residual blocks and a final norm.

    Layers are given in one of three forms, which may describe the same stack:

        Stack(64, "m2T1")                     letter and count: "m" is mamba2, "t" attention; upper case adds an MLP
        Stack(64, ["mamba2", "mamba2", {"mixer": "attention", "mlp": True}])
        Stack(64, 3, mixer="mamba2", attn_layers=[2])         (an MLP in all of them: mlp=True)

    Two mixers side by side are a layer too: {"mixer": ["mamba2", "attention"], "merge": "sum"}, see `DoubleMixer`. A
    gated memory unit, "g" in a pattern, reads what an earlier layer's mixer gives, {"mixer": "gmu", "reads": 0}.

    Args:
        d_model: Width of the stream.
        layers: Pattern; or a number of layers; or one entry per layer: a name of `MIXERS`, a mapping with "mixer",
            optionally "mlp" (bool) and options of the mixer, or a module.
        mixer: Name of the mixers where `layers` is a number.
        attn_layers: Which of them, counted from 0, are attention instead.
        mlp: Whether layers given by a number have an MLP.
        mixer_options: Options of every mixer that is built by name. Under a name of `MIXERS`: options of that mixer
            only, {"mamba2": {"d_state": 64}, "attention": {"headdim": 32}}.
        mlp_hidden: Inner width of the MLPs, see `GatedMLP`.
        norm: "rms" or "layer".
        norm_position: "pre" or "post", see `Residual`.
        eps: Of the norms.
        residual_in_fp32: Keep the stream in float32.
        letters: Table of the pattern's letters, lower case, to names.
        device: Where to create the parameters.
        dtype: Their dtype.

    Raises:
        ValueError: if a pattern, letter, name or option is unknown, or there is no layer.
        TypeError: if a mixer has no such option.
    """

    def __init__(
        self,
        d_model: int,
        layers: str | int | Sequence[Layer],
        *,
        mixer: str | None = None,
        attn_layers: Sequence[int] = (),
        mlp: bool = False,
        mixer_options: Mapping[str, Any] | None = None,
        mlp_hidden: int | None = None,
        norm: Norm = "rms",
        norm_position: NormPosition = "pre",
        eps: float = 1e-5,
        residual_in_fp32: bool = True,
        letters: Mapping[str, str] = LETTERS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        entries = layer_entries(layers, mixer=mixer, attn_layers=attn_layers, mlp=mlp, letters=letters)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        place: dict[str, Any] = {
            "norm": norm,
            "norm_position": norm_position,
            "eps": eps,
            "residual_in_fp32": residual_in_fp32,
        }
        self.d_model = d_model
        self.checkpoint_every = 0
        self.blocks = nn.ModuleList()
        for entry in entries:
            branch = None
            if isinstance(entry, nn.Module):
                built = entry
            else:
                options = {"mixer": entry} if isinstance(entry, str) else dict(entry)
                if options.pop("mlp", False):
                    branch = GatedMLP(d_model, hidden=mlp_hidden, **factory)
                built = create_layer_mixer(d_model, options, mixer_options or {}, factory)
            self.blocks.append(Residual(d_model, built, branch, **place, **factory))
        mixers: list[Any] = [block.mixer for block in self.blocks]
        self._reads = {k: _memory(mixers, k) for k, m in enumerate(mixers) if isinstance(m, GatedMemoryUnit)}
        self.norm = nn.Identity() if norm_position == "post" else create_norm(norm, d_model, eps=eps, **factory)
        branches = sum(1 if block.mlp is None else 2 for block in self.blocks)
        for entry, block in zip(entries, self.blocks):
            if not isinstance(entry, nn.Module):  # a module that was handed in keeps its weights
                residual_init_(block, branches)

    @property
    def causal(self) -> bool:
        """Whether every mixer is causal."""
        return all(getattr(block.mixer, "causal", False) for block in self.blocks)

    def set_grad_checkpointing(self, every: int = 1) -> None:
        """Recompute every n-th block in the backward pass instead of keeping its activations; 0 turns it off."""
        if every < 0:
            raise ValueError(f"expected every of at least 0, got {every}.")
        self.checkpoint_every = every

    def forward(self, x: Tensor, **mixer_arguments: Any) -> Tensor:
        """Pass (..., d_model) through all blocks and the final norm; keyword arguments go to every mixer."""
        memories: dict[int, Tensor] = {}
        for index, block in enumerate(self.blocks):
            x = self._run(index, block, x, **mixer_arguments, **self._memory_options(index, memories))
            x = self._kept(index, x, memories)
        return self.norm(x)

    def prefill(
        self,
        x: Tensor,
        state: StackState | None = None,
        *,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, StackState]:
        """Like `forward`, going on from a state.

        Args:
            x: (b, l, d_model).
            state: After the positions before; None at the start.
            mask: True at real tokens, (b, l) bool; contiguous in each row.
            seq_idx: Which packed sequence a position belongs to, (b, l) integers.
            reset: True where the state starts anew before the position is absorbed, (b, l) bool.

        Returns:
            (b, l, d_model), and the state after each row's last real token.

        Raises:
            TypeError: if a mixer sees both directions; the message names the layer.
            ValueError: if the state is of another number of layers or does not fit a mixer.
        """
        self._require_causal()
        given = {"mask": mask, "seq_idx": seq_idx, "reset": reset}
        arguments = {name: value for name, value in given.items() if value is not None}
        before = self._layer_states(state)
        after, whole = [], x
        memories: dict[int, Tensor] = {}
        for index, (block, own) in enumerate(zip(self.blocks, before)):
            options = arguments | self._memory_options(index, memories)
            x, own = self._run(index, block.prefill, x, own, **options)  # type: ignore[arg-type]
            x = self._kept(index, x, memories)
            after.append(own)
        # Last, since mixers say best what does not fit.
        position = _position(whole, None if state is None else state.position, mask, seq_idx, reset)
        return self.norm(x), StackState(tuple(after), position)

    def step(self, x: Tensor, state: StackState) -> tuple[Tensor, StackState]:
        """One position, (b, d_model).

        Raises:
            TypeError: if a mixer sees both directions, or the state is of another kind.
            ValueError: if the state is of another number of layers or does not fit a mixer.
        """
        self._require_causal()
        require_state(state, StackState)
        after = []
        memories: dict[int, Tensor] = {}
        for index, (block, own) in enumerate(zip(self.blocks, self._layer_states(state))):
            x, own = block.step(x, own, **self._memory_options(index, memories))  # type: ignore[operator]
            x = self._kept(index, x, memories)
            after.append(own)
        return self.norm(x), StackState(tuple(after), state.position + 1)

    def verify(self, x: Tensor, state: StackState, tree: TokenTree) -> tuple[Tensor, StackDraft]:
        """Pass a tree of positions through, each as if it alone followed on the path that leads to it.

        Args:
            x: (b, l, d_model), one position per node.
            state: Before the tree.
            tree: From `omnissm.kernels.token_tree`.

        Returns:
            (b, l, d_model), and a draft whose `accept(node)` is the state after a path.

        Raises:
            TypeError: if a mixer takes no trees, or the state is of another kind.
            ValueError: if the state does not fit.
        """
        for index, block in enumerate(self.blocks):
            if not hasattr(block.mixer, "verify"):
                raise TypeError(f"layer {index} ({type(block.mixer).__name__}) takes no trees; decode step by step.")
        require_state(state, StackState)
        drafts = []
        for block, own in zip(self.blocks, self._layer_states(state)):
            x, draft = block.verify(x, own, tree)  # type: ignore[operator]
            drafts.append(draft)
        return self.norm(x), StackDraft(tree, tuple(drafts), state.position)

    def init_state(
        self,
        batch: int,
        *,
        slots: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> StackState:
        """State before the first position.

        Args:
            batch: Rows.
            slots: Room for so many positions in attention layers, which then never grow; None: grow.
            device: Where to create it; by default where the parameters are.
            dtype: That of the activations; by default the parameters'.
        """
        self._require_causal()
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        layers = tuple(_init_state(block.mixer, batch, slots, options) for block in self.blocks)
        place = device or next(self.parameters()).device
        return StackState(layers, torch.zeros(batch, dtype=torch.int64, device=place))

    def state_numel(self) -> int:
        """Numbers in the states of one sequence (attention: before its first position)."""
        mixers: list[Any] = [block.mixer for block in self.blocks]
        return sum(mixer.state_numel() for mixer in mixers)

    def _memory_options(self, index: int, memories: Mapping[int, Tensor]) -> dict[str, Any]:
        """What a block is told where it reads a memory or is read."""
        options: dict[str, Any] = {"memory": memories[self._reads[index]]} if index in self._reads else {}
        return options | ({"with_output": True} if index in self._reads.values() else {})

    def _kept(self, index: int, x: Any, memories: dict[int, Tensor]) -> Tensor:
        """The stream, after the output of a block that is read has been put aside."""
        if index not in self._reads.values():
            return x
        x, memories[index] = x
        return x

    def _run(self, index: int, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if self.checkpoint_every and index % self.checkpoint_every == 0 and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False, **options)
        return function(*arguments, **options)

    def _require_causal(self) -> None:
        for index, block in enumerate(self.blocks):
            if not getattr(block.mixer, "causal", False) or not hasattr(block.mixer, "prefill"):
                raise TypeError(
                    f"layer {index} ({type(block.mixer).__name__}) has no state, so neither has the stack; "
                    "call it on whole sequences, or build it of causal mixers for prefill and step."
                )

    def _layer_states(self, state: StackState | None) -> Sequence[Any]:
        if state is None:
            return [None] * len(self.blocks)
        require_state(state, StackState)
        if len(state.layers) != len(self.blocks):
            raise ValueError(f"`state` is of {len(state.layers)} layers, expected {len(self.blocks)}.")
        return state.layers


def create_norm(norm: str, d_model: int, *, eps: float = 1e-5, **factory: Any) -> nn.Module:
    """Build a norm over the last dimension: "rms" or "layer".

    Raises:
        ValueError: if the name is unknown.
    """
    if norm == "rms":
        return RMSNorm(d_model, eps=eps, **factory)
    if norm == "layer":
        return LayerNorm(d_model, eps=eps, **factory)
    raise ValueError(f"`norm` must be 'rms' or 'layer', got {norm!r}.")


def _memory(mixers: Sequence[nn.Module], index: int) -> int:
    """Which layer the gated memory unit at `index` reads."""
    reads = mixers[index].reads
    earlier = [k for k in range(index) if not isinstance(mixers[k], GatedMemoryUnit)]
    if isinstance(reads, int):
        if reads not in earlier:
            raise ValueError(f"layer {index} reads layer {reads}, expected an earlier layer with a mixer: {earlier}.")
        return reads
    recurrent = [k for k in earlier if not isinstance(mixers[k], Attention)]
    if not earlier:
        raise ValueError(f"layer {index} is a gated memory unit and has no earlier layer to read.")
    return (recurrent or earlier)[-1]


def _init_state(mixer: Any, batch: int, slots: int | None, options: Mapping[str, Any]) -> Any:
    """State of a mixer, with room for a number of positions where a mixer's state grows."""
    if isinstance(mixer, DoubleMixer):
        parts = (_init_state(part, batch, slots, options) for part in (mixer.first, mixer.second))
        return PairState(*parts)
    if isinstance(mixer, Attention):
        return mixer.init_state(batch, slots=slots, **options)
    return mixer.init_state(batch, **options)


def _position(
    x: Tensor, before: Tensor | None, mask: Tensor | None, seq_idx: Tensor | None, reset: Tensor | None
) -> Tensor:
    """Real tokens in each row's present sequence after this call, (b,)."""
    layout = lay_out(x, mask, seq_idx, reset)
    batch, length = x.shape[:2]
    before = torch.zeros(batch, dtype=torch.int64, device=x.device) if before is None else layout.restart(before)
    if layout.index is None or not length:
        return before + (length if layout.count is None else layout.count)
    own = layout.index == layout.index[:, -1:]
    count = (own if layout.mask is None else own & layout.mask).sum(1)
    return torch.where(layout.index[:, -1] == layout.index[:, 0], before + count, count)
