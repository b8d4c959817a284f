"""Networks within networks: each stage cuts its sequence into chunks for the next one.

    e = E(x);  chunks at the router's boundaries;  z = inner(chunks);  u = dechunk(z)
    y = Dec(ste(c) u + residual_proj(e))

The inner network of a stage is the next stage, and of the last one a plain stack. A stack is any module with `forward`,
`prefill`, `step` and `init_state` as `omnissm.ssmcore.Stack` has them.

Hwang, Wang & Gu (2025), section 2.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import register_dataclass, tree_map

from ..mixers.common import is_padding_behind, lay_out, require_state
from ..states import NestedState
from .boundaries import P_MIN, Boundaries, Layout, chunk, dechunk, straight_through
from .routers import Router, RouterState


class Stage(NamedTuple):
    """One stage of a `Hierarchy`.

    Attributes:
        d_model: Width of its stacks, at least that of the stage outside.
        encoder: Stack before the router.
        decoder: Stack after the join.
        router: Where chunks begin; None is a learned `Router`.
    """

    d_model: int
    encoder: nn.Module
    decoder: nn.Module
    router: nn.Module | None = None


@dataclass(frozen=True, eq=False)
class HierarchyState(NestedState):
    """State of one stage and of all inside it.

    Attributes:
        encoder: State of the encoder.
        router: State of the router.
        inner: State of the inner network: of the next stage, or of the innermost stack.
        dechunk: Smoothed value at the last position, (b, d), at least float32.
        decoder: State of the decoder.
        count: Chunks so far, (b,) int64.
    """

    encoder: Any
    router: RouterState
    inner: Any
    dechunk: Tensor
    decoder: Any
    count: Tensor

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move it; a dtype is that of the activations, recurrent states and smoothed values stay float32 at least."""
        wide = None if dtype is None else torch.promote_types(dtype, torch.float32)
        return replace(super().to(device, dtype), dechunk=self.dechunk.to(device=device, dtype=wide))


register_dataclass(HierarchyState, serialized_type_name=f"{HierarchyState.__module__}.{HierarchyState.__qualname__}")


class Hierarchy(nn.Module):
    """Stages around an innermost stack.

    Args:
        stages: From the outermost to the last one that cuts; none makes a plain stack, with widening if `d_outer` asks.
        innermost: Stack of the innermost sequence.
        d_innermost: Its width; None: that of the last stage.
        d_outer: Width of input and output; None: that of the first stage. Missing channels are filled by a learned
            vector and cut off again at the end.
        layout: How chunks of a batch lie, see `chunk`. "flat" is for stacks that are fast on packed rows; states
            always use "padded".
        device: Where to create the parameters that are built here.
        dtype: Their dtype; `residual_proj` is float32 at least.

    Raises:
        ValueError: if widths decrease inwards.
    """

    causal = True
    varlen = True
    encoder: Any
    decoder: Any
    routing_module: Any
    main_network: Any
    pad_dimension: nn.Parameter | None

    def __init__(
        self,
        stages: Sequence[Stage],
        innermost: nn.Module,
        *,
        d_innermost: int | None = None,
        d_outer: int | None = None,
        layout: Layout = "padded",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        stage = stages[0] if stages else None
        width = stage.d_model if stage is not None else d_innermost or d_outer
        if width is None:
            raise ValueError("a Hierarchy without stages needs d_innermost, the width of its stack.")
        outer = width if d_outer is None else d_outer
        if width < outer:
            raise ValueError(f"widths must not decrease inwards, got {outer} around {width}.")
        self.d_model, self.d_outer, self.layout = width, outer, layout
        self.n_stages = len(stages)
        self.pad_dimension = nn.Parameter(torch.zeros(width - outer, **factory)) if width > outer else None
        if stage is None:
            self.main_network = innermost
            return
        self.encoder, self.decoder = stage.encoder, stage.decoder
        self.routing_module = Router(width, **factory) if stage.router is None else stage.router
        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.residual_proj = nn.Linear(width, width, device=device, dtype=wide)
        nn.init.zeros_(self.residual_proj.weight)
        nn.init.zeros_(self.residual_proj.bias)
        self.main_network = Hierarchy(
            stages[1:], innermost, d_innermost=d_innermost, d_outer=width, layout=layout, **factory
        )

    @property
    def widths(self) -> list[int]:
        """Width of each stage and of the innermost stack."""
        inner = self.main_network
        return [self.d_model, *inner.widths] if isinstance(inner, Hierarchy) else [self.d_model]

    def levels(self) -> list[Hierarchy]:
        """This stage and those inside it, and at last the innermost stack's level."""
        inner = self.main_network
        return [self, *inner.levels()] if isinstance(inner, Hierarchy) else [self]

    def no_decay_names(self) -> tuple[str, ...]:
        """Parameters that weight decay must leave alone."""
        return ("pad_dimension",) if self.pad_dimension is not None else ()

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, seq_idx: Tensor | None = None
    ) -> tuple[Tensor, list[Boundaries]]:
        """Map whole sequences.

        Args:
            x: (b, l, d_outer).
            mask: Which positions are real, (b, l) bool; real ones are contiguous.
            seq_idx: Which packed sequence a position belongs to, (b, l) integers that do not decrease.

        Returns:
            y, (b, l, d_outer), 0 at padding, and the boundaries of each stage, outermost first.
        """
        needed = mask
        if mask is not None and self._all_causal() and is_padding_behind(mask):
            needed = None  # padding stands behind, where causal stacks cannot see it
        y, found = self._forward(x, mask, needed, seq_idx)
        return (y if mask is None else y * mask[..., None]), found

    def _forward(
        self, x: Tensor, mask: Tensor | None, needed: Tensor | None, seq_idx: Tensor | None
    ) -> tuple[Tensor, list[Boundaries]]:
        """`needed` is the mask for the stacks: None where padding stands behind all real positions of causal ones."""
        x = self._widen(x)
        if not self.n_stages:
            return self._narrow(self.main_network(x, mask=needed, seq_idx=seq_idx)), []
        encoded = self.encoder(x, mask=needed, seq_idx=seq_idx)
        boundaries = self.routing_module(encoded, mask=mask, seq_idx=seq_idx)
        chunks = chunk(encoded, boundaries, seq_idx=seq_idx, layout=self.layout)
        needs = None if self.main_network._all_causal() else chunks.mask
        z, found = self.main_network._forward(chunks.x, chunks.mask, needs, chunks.seq_idx)
        u, _ = dechunk(z, boundaries, chunks)
        y = self._join(u, encoded, boundaries)
        return self._narrow(self.decoder(y, mask=needed, seq_idx=seq_idx)), [boundaries, *found]

    def prefill(
        self,
        x: Tensor,
        state: HierarchyState | Any | None = None,
        *,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        reset: Tensor | None = None,
        with_state: bool = True,
    ) -> tuple[Tensor, Any, list[Boundaries]]:
        """Like `forward`, continuing from a state; any cut of a sequence gives the same values.

        Rows that are padding throughout keep their state; a row without a boundary leaves the inner network alone.

        Args:
            x: (b, l, d_outer).
            state: After the positions before; None at the start.
            mask: True at real positions, (b, l) bool; contiguous in each row.
            seq_idx: Which packed sequence a position belongs to, (b, l) integers; `state` belongs to the first one.
            reset: True where the state starts anew before the position is absorbed, (b, l) bool.
            with_state: Whether the state after is wanted. Causal stacks take less work to go without it, where padding
                stands behind all real positions; y at padding is then of no meaning.

        Returns:
            y, the state after the last real position (None if it is not wanted), and the boundaries of each stage
            (those inside a stage without any boundary are left out).

        Raises:
            TypeError: if the state is of another kind.
        """
        unseen = not with_state and self._all_causal() and (mask is None or is_padding_behind(mask))
        y, after, found = self._prefill(x, state, mask, seq_idx, reset, unseen)
        return y, after if with_state else None, found

    def _prefill(
        self,
        x: Tensor,
        state: Any,
        mask: Tensor | None,
        seq_idx: Tensor | None,
        reset: Tensor | None,
        unseen: bool,
    ) -> tuple[Tensor, Any, list[Boundaries]]:
        """`unseen`: real positions cannot see padding, and the state after it does not matter."""
        x = self._widen(x)
        needed = None if unseen else mask
        given = {"mask": needed, "seq_idx": seq_idx} | ({} if reset is None else {"reset": reset})
        if not self.n_stages:
            y, state = self.main_network.prefill(x, state, **given)
            return self._narrow(y), state, []
        begins = state is None
        if not begins:
            require_state(state, HierarchyState)
        rows = lay_out(x, mask, seq_idx, reset, align=False)
        encoded, encoder = self.encoder.prefill(x, None if begins else state.encoder, **given)
        before = None if begins else tree_map(rows.restart, state.router)
        boundaries, router = self.routing_module.prefill(encoded, before, mask=mask, seq_idx=rows.index)
        chunks = chunk(encoded, boundaries, seq_idx=rows.index)
        found: list[Boundaries] = []
        z, inner = chunks.x.new_zeros(x.shape[0], 0, self.d_model), None if begins else state.inner
        if chunks.max_count:
            anew = None
            if chunks.fresh is not None:  # the inner network sees no position of the sequence that the state is of
                fresh = chunks.fresh if rows.fresh is None else chunks.fresh | rows.fresh
                anew = F.pad(fresh[:, None], (0, chunks.max_count - 1))
            z, inner, found = self.main_network._prefill(chunks.x, inner, chunks.mask, chunks.seq_idx, anew, unseen)
        elif begins:
            inner = self.main_network.init_state(x.shape[0], device=x.device, dtype=x.dtype)
        u, smooth = dechunk(z, boundaries, chunks, None if begins else rows.restart(state.dechunk))
        y = self._join(u, encoded, boundaries)
        y, decoder = self.decoder.prefill(y, None if begins else state.decoder, **given)
        count = chunks.counts if begins else state.count + chunks.counts
        after = HierarchyState(encoder, router, inner, smooth, decoder, count)
        return self._narrow(y), after, [boundaries, *found]

    def step(self, x: Tensor, state: Any, *, dense: bool = False) -> tuple[Tensor, Any, list[Boundaries]]:
        """One position of each row, (b, d_outer).

        Args:
            x: Input.
            state: As returned by `prefill`, `step` or `init_state`.
            dense: Run the inner network for all rows and keep what has not changed, whatever the router says: no wait
                for the device. Otherwise it is left out where no row begins a chunk.

        Returns:
            y (b, d_outer), the new state, and the boundaries of the stages that were reached, their tensors (b,).

        Raises:
            TypeError: if the state is of another kind.
        """
        x = self._widen(x)
        if not self.n_stages:
            y, state = self.main_network.step(x, state)
            return self._narrow(y), state, []
        require_state(state, HierarchyState)
        encoded, encoder = self.encoder.step(x, state.encoder)
        boundaries, router = self.routing_module.step(encoded, state.router)
        chosen = boundaries.mask
        dense = dense or (x.is_cuda and torch.cuda.is_current_stream_capturing())
        every, some = (False, True) if dense else torch.stack([chosen.all(), chosen.any()]).tolist()
        inner, smooth, found = state.inner, state.dechunk, []
        if every:
            z, inner, found = self.main_network.step(encoded, state.inner)
        elif some:  # rows without a chunk are padding
            z, inner, found = self.main_network.prefill(encoded[:, None], state.inner, mask=chosen[:, None])
            z, found = z[:, 0], [tree_map(lambda leaf: leaf[:, 0], b) for b in found]
        if some:
            smooth = _ema_step(z, smooth, boundaries)
        y = self._join(smooth, encoded, boundaries)
        y, decoder = self.decoder.step(y, state.decoder)
        after = HierarchyState(encoder, router, inner, smooth, decoder, state.count + chosen)
        return self._narrow(y), after, [boundaries, *found]

    def init_state(
        self,
        batch: int,
        *,
        slots: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Any:
        """State before the first position; without stages that of the innermost stack.

        Args:
            batch: Rows.
            slots: Room for so many positions in every attention layer, which then never grows; None: they grow.
            device: Where to create it.
            dtype: That of the activations.
        """
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        stack = like if slots is None else like | {"slots": slots}
        if not self.n_stages:
            return self.main_network.init_state(batch, **stack)
        device = device or self.residual_proj.weight.device
        wide = torch.promote_types(dtype or self.residual_proj.weight.dtype, torch.float32)
        return HierarchyState(
            self.encoder.init_state(batch, **stack),
            self.routing_module.init_state(batch, **like | {"device": device}),
            self.main_network.init_state(batch, **stack),
            torch.zeros(batch, self.d_model, device=device, dtype=wide),
            self.decoder.init_state(batch, **stack),
            torch.zeros(batch, device=device, dtype=torch.int64),
        )

    def reset_parameters(self, std: float = 0.02, *, outside: int = 0) -> None:
        """Draw all linear weights anew; convolutions, recurrence parameters and norms are left as built.

        Normal with `std`; what writes to the residual stream (`out_proj`, `fc2`) smaller by the root of the number of
        branches on the path from the outside. Routers become the identity, `residual_proj` and `pad_dimension` zero.

        Args:
            std: Standard deviation.
            outside: Branches of the stages outside.
        """
        stacks = [self.encoder, self.decoder] if self.n_stages else [self.main_network]
        branches = outside + sum(_branches(stack) for stack in stacks)
        for stack in stacks:
            for name, part in stack.named_modules():
                if isinstance(part, nn.Linear):
                    last = name.rpartition(".")[2] in ("out_proj", "fc2")
                    nn.init.normal_(part.weight, std=std / math.sqrt(branches) if last else std)
        if self.pad_dimension is not None:
            nn.init.zeros_(self.pad_dimension)
        if isinstance(self.main_network, Hierarchy):
            nn.init.zeros_(self.residual_proj.weight)
            nn.init.zeros_(self.residual_proj.bias)
            if isinstance(self.routing_module, Router):
                self.routing_module.reset_parameters()
            self.main_network.reset_parameters(std, outside=branches)

    def _all_causal(self) -> bool:
        if not self.n_stages:
            return bool(getattr(self.main_network, "causal", False))
        stacks = (self.encoder, self.decoder)
        return all(getattr(stack, "causal", False) for stack in stacks) and bool(self.main_network._all_causal())

    def _widen(self, x: Tensor) -> Tensor:
        if self.pad_dimension is None:
            return x
        return torch.cat([x, self.pad_dimension.to(x.dtype).expand(*x.shape[:-1], -1)], dim=-1)

    def _narrow(self, y: Tensor) -> Tensor:
        return y[..., : self.d_outer]

    def _join(self, u: Tensor, encoded: Tensor, boundaries: Boundaries) -> Tensor:
        """ste(c) u + residual_proj(e) in float32, in the dtype of e."""
        with torch.autocast(encoded.device.type, enabled=False):
            proj = self.residual_proj
            residual = F.linear(encoded.to(u.dtype), proj.weight.to(u.dtype), proj.bias.to(u.dtype))
        if torch.is_grad_enabled() and boundaries.confidence.requires_grad:
            u = straight_through(boundaries.confidence)[..., None] * u
        return (u + residual).to(encoded.dtype)  # without a gradient the factor is 1


def _ema_step(z: Tensor, smooth: Tensor, boundaries: Boundaries) -> Tensor:
    prob = boundaries.prob.clamp(P_MIN, 1 - P_MIN)[:, None]
    return torch.where(boundaries.mask[:, None], prob * z.to(smooth.dtype) + (1 - prob) * smooth, smooth)


def _branches(stack: nn.Module) -> int:
    """Branches that add to the residual stream of a stack."""
    blocks = getattr(stack, "blocks", ())
    return sum(1 if getattr(block, "mlp", None) is None else 2 for block in blocks)


def stage_multipliers(
    widths: Sequence[int], targets: Sequence[float], *, reference: float | None = None
) -> list[float]:
    """Learning rates of the stages as multiples of a base rate, outermost first, the innermost stack last.

        lambda_s = sqrt(reference * prod_{i >= s} N_i / prod_i N_i * D_S / D_s)

    Args:
        widths: D_0, ..., D_S, the last one of the innermost stack.
        targets: Elements per chunk N_0, ..., N_{S-1}.
        reference: Elements per token of the model that the base rate was found for; None: prod N_i, so that the
            innermost stack has the base rate itself.

    Raises:
        ValueError: if there is not one width more than targets.

    Source: Hwang, Wang & Gu (2025), section 3.3 of the appendix on learning rates.
    """
    if len(widths) != len(targets) + 1:
        raise ValueError(f"{len(targets)} targets need {len(targets) + 1} widths, got {len(widths)}.")
    whole = math.prod(targets)
    reference = whole if reference is None else reference
    return [
        math.sqrt(reference * math.prod(targets[s:]) / whole * widths[-1] / width) for s, width in enumerate(widths)
    ]
