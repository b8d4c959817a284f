"""HAX: Mamba-2 plus attention over few keys that depend on the context, chosen by hashing and by a learned score.

    [k, q] = W u,    u the convolved signal that enters the recurrence
    hashing:    keys in the bin of the query, the latest m of them;  bin = signs of (k_t - mean of k so far) R
    selection:  the m keys with the highest score so far;            score_s = MLP([k_s, sum of q so far, normed])
    y_t = SSD_t(u) + E sum_s softmax_s(q_t.k_s / sqrt(n)) u_s        over the union; zero where it is empty

Zhan, Zhao, Zhu & Tang (2025), "Overcoming Long-Context Limitations of State-Space Models via Context-Dependent Sparse
Attention". In contrast to the published code nothing looks ahead: means are of the past, norms are over features, the
directions R are part of the model, and a query without keys gets zero. Masks are dense: time and memory of a call are
quadratic in its length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import linear_scan
from ..init import no_weight_decay
from .common import (
    ConvSSMState,
    Layout,
    MixerState,
    MixingMatrix,
    Mode,
    check_input,
    check_state,
    convolve,
    lay_out,
    linear_flops,
    mixer_state,
    recurrence_dtype,
    require_state,
    sequence_start,
    wide,
)
from .mamba2 import Mamba2

Source = Literal["lsh", "select"]


@mixer_state
class HAXState(MixerState):
    """State of `HAX`: that of Mamba-2 and what the keys of all positions so far are, one slot each.

    Attributes:
        conv: Inputs of the convolution, as in `ConvSSMState`.
        ssm: Recurrent state, (b, h, p, n).
        sums: Sums of the keys and of the queries so far, (b, 2, key_dim).
        k: Keys, (b, t, key_dim).
        v: The signal at these positions, (b, t, d_inner).
        score: Scores of the keys, (b, t), float32 at least: in 16 bits many would be equal.
        bins: Bins of the keys, (b, t) int64.
        length: Positions so far, (b,) int64.
    """

    conv: Tensor
    ssm: Tensor
    sums: Tensor
    k: Tensor
    v: Tensor
    score: Tensor
    bins: Tensor
    length: Tensor

    recurrent: ClassVar[tuple[str, ...]] = ("ssm", "sums")
    integral: ClassVar[tuple[str, ...]] = ("bins", "length")
    choices: ClassVar[tuple[str, ...]] = ("sums", "score")


class _Keys(NamedTuple):
    """What attention reads of a call's positions."""

    q: Tensor  # (b, l, n)
    k: Tensor  # (b, l, n)
    v: Tensor  # (b, l, d_inner)
    bins: Tensor  # of keys and queries, (b, l, 2)
    score: Tensor  # (b, l)
    sums: Tensor  # after the call, (b, 2, n)


class HAX(Mamba2):
    """Causal mixer: Mamba-2 and sparse attention on the same signal.

    Args:
        d_model: Width of the stream.
        key_dim: Channels n of keys and queries.
        budget: Keys that a query attends to at most, shared evenly by the sources.
        sources: Which keys are proposed: "lsh" (the latest ones of the query's bin), "select" (those that score best).
        num_hash: Random directions of the hash, 1 to 62.
        select_weight: Weight of the loss that the score learns by: binary cross-entropy with the mean attention, by
            sigmoid(q_t.k_s / sqrt(n)), that a key receives from its own and later queries. Backward passes through the
            mixer add its gradient to that of the score's parameters alone; outputs do not change. 0 leaves it out.
        d_state: As for `Mamba2`.
        d_conv: As for `Mamba2`.
        expand: As for `Mamba2`.
        headdim: As for `Mamba2`.
        ngroups: As for `Mamba2`.
        dt_limit: As for `Mamba2`.
        chunk_size: As for `Mamba2`.
        device: Where to create the parameters.
        dtype: Their dtype; those of the recurrence are float32 at least.

    Raises:
        ValueError: if a size is out of range or a source unknown.
    """

    state_type: ClassVar[type[MixerState]] = HAXState  # type: ignore[assignment]
    directions: Tensor

    def __init__(
        self,
        d_model: int,
        *,
        key_dim: int = 64,
        budget: int = 64,
        sources: Sequence[Source] = ("lsh", "select"),
        num_hash: int = 4,
        select_weight: float = 1.0,
        d_state: int = 128,
        d_conv: int = 4,
        expand: float = 2,
        headdim: int = 64,
        ngroups: int = 1,
        dt_limit: Sequence[float] = (0.0, math.inf),
        chunk_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model,
            d_state=d_state,
            d_conv=d_conv,
            expand=expand,
            headdim=headdim,
            ngroups=ngroups,
            dt_limit=dt_limit,
            chunk_size=chunk_size,
            device=device,
            dtype=dtype,
        )
        unknown = [source for source in sources if source not in get_args(Source)]
        if unknown or not len(sources):
            raise ValueError(f"`sources` must be some of 'lsh' and 'select', got {list(sources)}.")
        if key_dim < 1 or budget < len(sources) or not 1 <= num_hash <= 62:
            raise ValueError(
                f"`key_dim` must be at least 1, `budget` at least {len(sources)} (one key per source) and `num_hash` 1 "
                f"to 62; got {key_dim}, {budget} and {num_hash}."
            )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.key_dim, self.budget, self.sources = key_dim, budget, tuple(sources)
        self.num_hash, self.select_weight = num_hash, select_weight
        self.qk_proj = nn.Linear(self.d_ssm, 2 * key_dim, bias=False, **factory)  # [k, q]
        self.E = nn.Parameter(torch.ones(self.d_ssm, device=device, dtype=recurrence_dtype(dtype)))
        no_weight_decay(self.E)
        if "lsh" in self.sources:
            self.register_buffer("directions", torch.randn(key_dim, num_hash, **factory))
        if "select" in self.sources:
            width = 2 * key_dim
            layers = [nn.Linear(width, width, **factory), nn.ReLU(), nn.Linear(width, width, **factory), nn.ReLU()]
            self.scorer = nn.Sequential(*layers, nn.Linear(width, 1, **factory))

    def no_decay_names(self) -> tuple[str, ...]:
        """Parameters that weight decay must leave alone."""
        return (*super().no_decay_names(), *(name for name in ("E",) if name in self._parameters))

    def prefill(  # type: ignore[override]
        self,
        x: Tensor,
        state: HAXState | None = None,
        *,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, HAXState]:
        """Mix sequences that go on from a state; see `Mamba2.prefill`. The state grows by a slot per position."""
        check_input(x, self.d_model)
        layout = lay_out(x, mask, seq_idx, reset)
        projected = self._project(layout.align(x))
        state = self._given(state, x, projected.z.dtype)
        xBC, conv = convolve(projected.conv_in, self.conv1d, state.conv, layout)
        y, ssm = self._scan(self._scan_inputs(xBC, projected.dt, layout), state.ssm, layout)
        keys = self._keys(xBC[..., : self.d_ssm], state, layout)
        extra, _ = self._attend(keys, state, layout)
        y = (wide(y) + wide(self.E) * extra).to(y.dtype)
        return layout.restore(self._output(projected, y)), self._extended(state, keys, conv, ssm, layout)

    def step(self, x: Tensor, state: HAXState) -> tuple[Tensor, HAXState]:  # type: ignore[override]
        """One position, (b, d) -> (b, d).

        Raises:
            ValueError: if a shape is wrong or the state does not fit.
            TypeError: if the state is of another kind.
        """
        check_input(x, self.d_model, "b")
        require_state(state, HAXState)
        y, state = self.prefill(x[:, None], state)
        return y[:, 0], state

    def init_state(  # type: ignore[override]
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> HAXState:
        """The state before the first position; `dtype` is that of the activations, by default the parameters'."""
        plain = super().init_state(batch, device=device, dtype=dtype)
        shapes = self._shapes(batch, 0)
        integers = {name: plain.conv.new_zeros(shapes[name], dtype=torch.int64) for name in HAXState.integral}
        floats = {name: plain.conv.new_zeros(shapes[name]) for name in ("k", "v")}
        floats |= {name: plain.ssm.new_zeros(shapes[name]) for name in ("sums", "score")}
        return HAXState(plain.conv, plain.ssm, **floats, **integers)

    def mixing_matrix(  # type: ignore[override]
        self, x: Tensor, *, state: HAXState | None = None
    ) -> MixingMatrix:
        """The matrix of every channel, (b, d_inner, l, l): that of Mamba-2 plus E times the sparse attention.

        Args:
            x: (b, l, d).
            state: To go on from.

        Raises:
            ValueError: if a shape is wrong or the state does not fit.
            TypeError: if the state is of another kind.
        """
        check_input(x, self.d_model)
        projected = self._project(x)
        given = self._given(state, x, projected.z.dtype)
        found = super().mixing_matrix(x, state=None if state is None else ConvSSMState(given.conv, given.ssm))
        xBC, _ = convolve(projected.conv_in, self.conv1d, given.conv, Layout())
        extra, weights = self._attend(self._keys(xBC[..., : self.d_ssm], given, Layout()), given, Layout())
        slots, E = given.k.shape[1], wide(self.E)
        matrix = found.matrix.repeat_interleave(self.headdim, dim=1)
        matrix = matrix + E[:, None, None] * weights[:, None, :, slots:]
        from_state = None
        if found.from_state is not None:
            from_state = found.from_state.flatten(2) + E * (weights[..., :slots] @ wide(given.v))
        inputs, outputs = found.inputs.flatten(2), found.outputs.flatten(2) + E * extra
        return MixingMatrix(
            matrix, inputs[..., None], outputs[..., None], None if from_state is None else from_state[..., None]
        )

    def flops_parts(self, l: int, *, mode: Mode = "prefill") -> dict[str, int]:  # noqa: E741
        """Those of the forward pass by part; "attention" counts all pairs, in one step those with l keys."""
        parts = super().flops_parts(l, mode=mode)
        positions = 1 if mode == "decode" else l
        score = [layer for layer in self.scorer if isinstance(layer, nn.Linear)] if "select" in self.sources else []
        parts["keys"] = positions * linear_flops(self.qk_proj, *score)
        parts["attention"] = positions * 2 * l * (self.key_dim + self.d_ssm)
        return parts

    def state_numel(self, l: int = 0) -> int:  # noqa: E741
        """Numbers in the state of one sequence after l positions, bins and length not counted."""
        shapes = self._shapes(1, l)
        return sum(math.prod(shape) for name, shape in shapes.items() if name not in HAXState.integral)

    def _shapes(self, batch: int, slots: int) -> dict[str, tuple[int, ...]]:
        n = self.key_dim
        fixed = {**self._state_shapes(batch), "sums": (batch, 2, n), "length": (batch,)}
        kept = {"k": (batch, slots, n), "v": (batch, slots, self.d_ssm)}
        return {**fixed, **kept, "score": (batch, slots), "bins": (batch, slots)}

    def _check(self, state: ConvSSMState, x: Tensor) -> None:
        check_state(state, ConvSSMState, self._state_shapes(x.shape[0]), x.device)

    def _given(self, state: HAXState | None, x: Tensor, dtype: torch.dtype) -> HAXState:
        if state is None:
            made = self.init_state(x.shape[0], device=x.device, dtype=dtype)
            return made.to(dtype=torch.float64) if self.D.dtype == torch.float64 else made
        require_state(state, HAXState)
        slots = state.k.shape[1] if state.k.dim() == 3 else 0
        check_state(state, HAXState, self._shapes(x.shape[0], slots), x.device)
        return state

    def _keys(self, u: Tensor, state: HAXState, layout: Layout) -> _Keys:
        """Queries, keys, bins and scores of this call; u (b, l, d_inner) is zero at padding."""
        kq = self.qk_proj(u)
        k, q = kq.chunk(2, dim=-1)
        bins = torch.zeros(*u.shape[:2], 2, dtype=torch.int64, device=u.device)
        with torch.autocast(u.device.type, enabled=False):
            plain = wide(kq.detach())  # choices have no gradient
            start = layout.restart(state.sums.detach()).flatten(1)
            sums, last = linear_scan(plain.new_ones(plain.shape[2]), plain, start, seq_idx=layout.index)
            if "lsh" in self.sources:
                count = self._places(state, layout, u.shape[1]) + 1
                centred = (plain - sums / count[..., None]).unflatten(-1, (2, self.key_dim))
                positive = centred @ self.directions.to(centred.dtype) > 0
                bins = (positive.long() << torch.arange(self.num_hash, device=u.device)).sum(-1)
            score = plain[..., 0]
            if "select" in self.sources:
                seen = F.normalize(sums[..., self.key_dim :], dim=-1)
                inputs = torch.cat([plain[..., : self.key_dim], seen], dim=-1)
                score = inputs
                for layer in self.scorer:  # in full precision, since ranks hang on it
                    if isinstance(layer, nn.Linear):
                        score = F.linear(score, wide(layer.weight), wide(layer.bias))
                    else:
                        score = layer(score)
                score = score[..., 0]
        return _Keys(q, k, u, bins, score, last.unflatten(1, (2, self.key_dim)))

    def _places(self, state: HAXState, layout: Layout, length: int) -> Tensor:
        """Position of every token in its own sequence, (b, l)."""
        place = torch.arange(length, device=state.length.device)[None]
        before = layout.restart(state.length)[:, None]
        if layout.index is None:
            return place + before
        return place - sequence_start(layout.index) + torch.where(layout.index == layout.index[:, :1], before, 0)

    def _attend(self, keys: _Keys, state: HAXState, layout: Layout) -> tuple[Tensor, Tensor]:
        """What sparse attention adds, (b, l, d_inner), and its weights, (b, l, t + l), of keys held and new."""
        length, slots = keys.k.shape[1], state.k.shape[1]
        place = torch.arange(length, device=keys.k.device)
        new = (place <= place[:, None]).expand(keys.k.shape[0], -1, -1)
        held = torch.arange(slots, device=place.device) < layout.restart(state.length)[:, None]
        old = held[:, None].expand(-1, length, -1)
        if layout.index is not None:
            new = new & (layout.index[:, :, None] == layout.index[:, None])
            old = old & (layout.index == layout.index[:, :1])[..., None]
        if layout.mask is not None:
            new = new & layout.mask[:, None] & layout.mask[..., None]
            old = old & layout.mask[..., None]
        visible = torch.cat([old, new], dim=-1)
        chosen = torch.zeros_like(visible)
        share = self.budget // len(self.sources)
        if "lsh" in self.sources:
            own = torch.cat([state.bins, keys.bins[..., 0]], dim=1)
            same = visible & (keys.bins[..., 1, None] == own[:, None])
            chosen = chosen | (same & (same.flip(-1).cumsum(-1).flip(-1) <= share))
        if "select" in self.sources:
            # float32 also in float64: sums in another order leave equal scores equal, and the earlier key wins.
            score = torch.cat([state.score.to(keys.score.dtype), keys.score], dim=1).detach().float()
            order = score[:, None].masked_fill(~visible, -math.inf).argsort(dim=-1, descending=True, stable=True)
            chosen = chosen | (visible & (order.argsort(-1) < share))
        k, v = (torch.cat([a.to(b.dtype), b], dim=1) for a, b in ((state.k, keys.k), (state.v, keys.v)))
        with torch.autocast(k.device.type, enabled=False):
            pairs = wide(keys.q) @ wide(k).mT * self.key_dim**-0.5
            # Finite, since a row may have no key: its weights are zeroed instead.
            weights = pairs.masked_fill(~chosen, torch.finfo(pairs.dtype).min).softmax(-1) * chosen
            y = weights @ wide(v)
        if self.select_weight and keys.score.requires_grad and torch.is_grad_enabled():
            y = _AddLoss.apply(y, self.select_weight * _select_loss(keys.score, pairs[..., slots:].detach(), new))
        return y, weights

    def _extended(self, state: HAXState, keys: _Keys, conv: Tensor, ssm: Tensor, layout: Layout) -> HAXState:
        """The state after this call: the last sequence of each row, each position in its slot."""
        batch, length = keys.k.shape[:2]
        count = state.length.new_full((batch,), length) if layout.count is None else layout.count
        before, start = layout.restart(state.length), torch.zeros_like(count)
        if layout.index is not None and length:
            start = sequence_start(layout.index)[:, -1]
            before = torch.where(layout.index[:, -1] == layout.index[:, 0], before, torch.zeros_like(before))
        total = before + count - start
        slots = state.k.shape[1] + length
        slot = torch.arange(slots, device=count.device)
        new = (slot >= before[:, None]) & (slot < total[:, None])
        source = (slot - before[:, None] + start[:, None]).clamp(0, max(length - 1, 0))

        def filled(old: Tensor, fresh: Tensor) -> Tensor:
            """Of (b, slots, c) tensors."""
            kept = F.pad(old.to(fresh.dtype), (0, 0, 0, length))
            if not length:
                return kept
            kept = torch.where((slot < before[:, None])[..., None], kept, torch.zeros_like(kept))
            return torch.where(new[..., None], fresh.gather(1, source[..., None].expand(-1, -1, fresh.shape[2])), kept)

        return HAXState(
            conv,
            ssm,
            keys.sums,
            filled(state.k, keys.k),
            filled(state.v, keys.v),
            filled(state.score[..., None], keys.score.detach()[..., None])[..., 0],
            filled(state.bins[..., None], keys.bins[..., :1])[..., 0],
            total,
        )


def _select_loss(score: Tensor, pairs: Tensor, visible: Tensor) -> Tensor:
    """Cross-entropy of scores (b, l) with how much later queries attend to a key, by pairs (b, queries, keys)."""
    later = visible.sum(1)
    target = (pairs.sigmoid() * visible).sum(1) / later.clamp(min=1)
    loss = F.binary_cross_entropy_with_logits(score.to(target.dtype), target, reduction="none")
    real = later > 0
    return (loss * real).sum() / real.sum().clamp(min=1)


class _AddLoss(torch.autograd.Function):
    """A signal as it is, whose backward pass carries the gradient of a loss beside its own."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(torch.ones_like(loss))
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor, Tensor]:
        (one,) = ctx.saved_tensors
        return dy[0], one
