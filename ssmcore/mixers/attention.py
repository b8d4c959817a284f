"""Softmax attention: causal or not, grouped heads, rotary positions, windows, with an exact state.

    [q, k, v, mlp] = in_proj(x);   q, k, v <- causal depthwise convolution (optional);   q, k <- rotation by position
    y_t = sum_s softmax_s(scale q_t . k_s) v_s          over the keys that position t sees
    output = out_proj([y, up * silu(gate)])             [up, gate] = mlp (optional)

Vaswani et al. (2017), section 3.2; Ainslie et al. (2023) for grouped heads; Su et al. (2021) for rotary positions;
Beltagy, Peters & Cohan (2020) for windows. The optional convolution and MLP slice are those of hybrid Mamba models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import TokenTree, conv_tree, rotate_heads
from .common import (
    Layout,
    MixerState,
    MixingMatrix,
    Mode,
    check_input,
    check_state,
    convolve,
    depthwise_conv,
    lay_out,
    linear_flops,
    mixer_state,
    require_causal,
    require_state,
    sequence_start,
    total_flops,
    wide,
)
from .drafts import AttentionDraft

Rotation = Literal["half", "interleaved"]

LARGE = 2**24  # numbers of a mask


@mixer_state
class AttentionState(MixerState):
    """Keys and values of the positions before, in slots that grow with the sequence or, with a window, in a ring.

    Position p lies in slot p, with a window of w positions back in slot p mod w. Slots not yet reached hold zeros.

    Attributes:
        k: Rotated keys, (b, g, t, headdim).
        v: Values, (b, g, t, headdim).
        conv: The d_conv - 1 inputs of the convolution before the next position, (b, c, d_conv - 1); no columns without
            a convolution.
        length: Positions so far, (b,) int64.
    """

    k: Tensor
    v: Tensor
    conv: Tensor
    length: Tensor

    integral: ClassVar[tuple[str, ...]] = ("length",)


@mixer_state
class FixedAttentionState(AttentionState):
    """An `AttentionState` whose number of slots never changes, for compiled decoding; going beyond them is an error."""

    k: Tensor
    v: Tensor
    conv: Tensor
    length: Tensor


class Attention(nn.Module):
    """Multi-head attention.

    Args:
        d_model: Width d.
        nheads: Query heads; None: d_model / headdim.
        headdim: Channels per head; None: d_model / nheads, or 64 where that is not given either (d_model if smaller).
        kv_heads: Key and value heads, a divisor of nheads; None: nheads.
        causal: See no later position.
        window: Positions seen to the left and to the right of a position, besides itself, as a pair (left, right) or
            one number for both; -1 is no limit. Causal attention sees none to the right, whatever is said here.
        rotary_dim: Channels of each head that are rotated by position, from the first on; even; 0: none.
        rotary_base: Longest wave length of the rotation, over 2 pi.
        rotation: Which channels form a pair: i and i + rotary_dim / 2 ("half"), or 2i and 2i + 1 ("interleaved").
        d_conv: Width of a causal convolution over queries, keys and values; 0: none.
        mlp_dim: Width of a gated MLP that shares the projections, even; 0: none.
        qkv_bias: Bias of the input projection.
        out_bias: Bias of the output projection.
        scale: Factor of the scores; None: headdim ** -0.5.
        device: Where to create the parameters.
        dtype: Their dtype.

    Raises:
        ValueError: if a size is out of range or does not divide another.
    """

    linear_in_x: ClassVar[bool] = True  # given the scores: values enter linearly
    varlen: ClassVar[bool] = True
    state_type: ClassVar[type[MixerState]] = AttentionState

    def __init__(
        self,
        d_model: int,
        *,
        nheads: int | None = None,
        headdim: int | None = None,
        kv_heads: int | None = None,
        causal: bool = True,
        window: int | Sequence[int] | None = None,
        rotary_dim: int = 0,
        rotary_base: float = 10000.0,
        rotation: Rotation = "half",
        d_conv: int = 0,
        mlp_dim: int = 0,
        qkv_bias: bool = False,
        out_bias: bool = False,
        scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        given = f"nheads={nheads}, headdim={headdim}"
        if headdim is None:
            headdim = min(64, d_model) if nheads is None else _quotient(d_model, nheads)
        if nheads is None:
            nheads = _quotient(d_model, headdim)
        if nheads < 1 or headdim < 1:
            raise ValueError(f"heads must divide the width: d_model={d_model}, got {given}; name both.")
        kv_heads = nheads if kv_heads is None else kv_heads
        if kv_heads < 1 or nheads % kv_heads:
            raise ValueError(f"`kv_heads` must divide nheads={nheads}, got {kv_heads}.")
        if rotary_dim % 2 or not 0 <= rotary_dim <= headdim:
            raise ValueError(f"`rotary_dim` must be even and at most headdim={headdim}, got {rotary_dim}.")
        if rotation not in ("half", "interleaved"):
            raise ValueError(f"`rotation` must be 'half' or 'interleaved', got {rotation!r}.")
        if mlp_dim % 2 or mlp_dim < 0:
            raise ValueError(f"`mlp_dim` must be even and not negative, got {mlp_dim}.")
        if d_conv and not causal:
            raise ValueError(f"the convolution looks back only; causal=False takes d_conv=0, got {d_conv}.")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_model, self.nheads, self.headdim, self.kv_heads = d_model, nheads, headdim, kv_heads
        self.causal, self.rotary_dim, self.rotary_base, self.rotation = causal, rotary_dim, rotary_base, rotation
        self.window = _window(window, causal)
        self.scale = headdim**-0.5 if scale is None else scale
        self.d_conv, self.mlp_dim = d_conv, mlp_dim
        self.qkv_dim = (nheads + 2 * kv_heads) * headdim
        self.in_proj = nn.Linear(d_model, self.qkv_dim + mlp_dim, bias=qkv_bias, **factory)
        self.conv1d = depthwise_conv(self.qkv_dim, d_conv, **factory) if d_conv else None
        self.out_proj = nn.Linear(nheads * headdim + mlp_dim // 2, d_model, bias=out_bias, **factory)

    def no_decay_names(self) -> tuple[str, ...]:
        """Parameters that weight decay must leave alone."""
        return tuple(name for name, _ in self.named_parameters() if name.endswith("bias"))

    def forward(self, x: Tensor, *, mask: Tensor | None = None, seq_idx: Tensor | None = None) -> Tensor:
        """Mix whole sequences.

        Args:
            x: (b, l, d).
            mask: True at real tokens, (b, l); contiguous in each row.
            seq_idx: Numbers of packed sequences, (b, l), not decreasing.

        Returns:
            (b, l, d), zero at padding.
        """
        check_input(x, self.d_model)
        layout = lay_out(x, mask, seq_idx)
        q, k, v, mlp, _ = self._project(layout.align(x), None, layout)
        return layout.restore(self._out(self._attend(q, k, v, None, layout), mlp))

    def prefill(
        self,
        x: Tensor,
        state: AttentionState | None = None,
        *,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, AttentionState]:
        """Like `forward`, going on from a state.

        Args:
            x: (b, l, d).
            state: Of the positions before; None: none.
            mask: True at real tokens, (b, l).
            seq_idx: Numbers of packed sequences, (b, l); the state belongs to the first.
            reset: True where the state is dropped first, (b, l).

        Returns:
            (b, l, d), and the state after the last real token.

        Raises:
            TypeError: if attention is not causal or the state of another kind.
        """
        require_causal(self)
        check_input(x, self.d_model)
        layout = lay_out(x, mask, seq_idx, reset)
        begins = state is None
        state = self._state(x, state, layout)
        q, k, v, mlp, conv = self._project(layout.align(x), state, layout)
        y = self._attend(q, k, v, None if begins or not state.k.shape[2] else state, layout)
        return layout.restore(self._out(y, mlp)), self.extended(state, k, v, conv, layout)

    def step(self, x: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        """One position, (b, d).

        Raises:
            ValueError: if a shape is wrong or the state does not fit.
            TypeError: if attention is not causal or the state of another kind.
        """
        require_causal(self)
        check_input(x, self.d_model, "b")
        require_state(state, AttentionState)
        y, state = self.prefill(x[:, None], state)
        return y[:, 0], state

    def verify(self, x: Tensor, state: AttentionState, tree: TokenTree) -> tuple[Tensor, AttentionDraft]:
        """Mix a tree of positions, each of which sees the state and the path that leads to it.

        Args:
            x: (b, l, d), one position per node.
            state: Before the tree.
            tree: From `omnissm.kernels.token_tree`.

        Returns:
            (b, l, d), and what `accept(node)` needs to give the state after a path.

        Raises:
            ValueError: if a shape is wrong or the state does not fit.
            TypeError: if attention is not causal or the state of another kind.
        """
        require_causal(self)
        check_input(x, self.d_model)
        require_state(state, AttentionState)
        state = self._state(x, state, Layout())
        conv_in, mlp = self.in_proj(x).split([self.qkv_dim, self.mlp_dim], dim=-1)
        qkv = conv_in
        if self.conv1d is not None:
            qkv = conv_tree(conv_in, self.conv1d.weight[:, 0], self.conv1d.bias, tree, state.conv.to(x.dtype))
        q, k, v = self._heads(qkv, state.length[:, None] + tree.depth)
        left, _ = self.window
        seen = tree.ancestors
        if left is not None:
            seen = seen & (tree.depth[:, :, None] - tree.depth[:, None] <= left)
        seen = seen[:, None].expand(x.shape[0], -1, -1, -1)
        seen = torch.cat([self._earlier(state, tree.depth), seen], dim=-1)
        keys, values = torch.cat([state.k.to(k.dtype), k], dim=2), torch.cat([state.v.to(v.dtype), v], dim=2)
        y = self._sdpa(q, keys, values, seen).transpose(1, 2).flatten(2)
        draft = AttentionDraft(self, tree, state, None if self.conv1d is None else conv_in, k, v)
        return self._out(y, mlp), draft

    def init_state(
        self,
        batch: int,
        *,
        slots: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> AttentionState:
        """State before the first position.

        Args:
            batch: Rows.
            slots: Make room for this many positions at once and never grow; None: grow. A window needs no more than its
                own size, and never grows.
            device: Where to create it.
            dtype: That of the activations.
        """
        require_causal(self)
        like: dict[str, Any] = {"device": device or self.in_proj.weight.device}
        left, _ = self.window
        room = slots or 0 if left is None else left
        kv = torch.zeros(batch, self.kv_heads, room, self.headdim, dtype=dtype or self.in_proj.weight.dtype, **like)
        conv = kv.new_zeros(batch, self.qkv_dim, self.d_conv - 1) if self.d_conv else kv.new_zeros(batch, 0, 0)
        length = torch.zeros(batch, dtype=torch.int64, **like)
        kind = AttentionState if slots is None or left is not None else FixedAttentionState
        return kind(k=kv, v=kv.clone(), conv=conv, length=length)

    def mixing_matrix(self, x: Tensor, *, state: AttentionState | None = None) -> MixingMatrix:
        """The attention of every head, (b, h, l, l), acting on the values; keys of a state take part in the softmax."""
        check_input(x, self.d_model)
        if state is not None:
            require_causal(self)
        layout = Layout()
        state = None if state is None else self._state(x, state, layout)
        q, k, v, _, _ = self._project(x, state, layout)
        keys, values, seen = self._keys(k, v, state, layout)
        scores = self.scale * wide(q) @ self._spread(wide(keys)).mT
        scores = scores if seen is None else scores.masked_fill(~seen, float("-inf"))
        weights = scores.softmax(-1)
        values, length = self._spread(wide(values)), x.shape[1]
        matrix, earlier = weights[..., -length:], weights[..., :-length]
        from_state = None if state is None else (earlier @ values[:, :, :-length]).transpose(1, 2)
        outputs = wide(self._attend(q, k, v, state, layout).unflatten(2, (self.nheads, self.headdim)))
        return MixingMatrix(matrix, values[:, :, -length:].transpose(1, 2), outputs, from_state)

    def flops(self, l: int, *, mode: Mode = "prefill") -> int:  # noqa: E741
        """Operations of one sequence of length l, or of one position behind l others ("decode").

        Full attention counts 4 l^2 per channel of a head, causal half of it; windows count the positions they see.
        """
        left, right = (l if side is None else min(side, l) for side in self.window)
        linear = linear_flops(self.in_proj, self.out_proj) + 2 * self.d_conv * self.qkv_dim
        width = 4 * self.nheads * self.headdim
        if mode == "decode":
            return linear + width * (left + 1)
        unlimited = self.window[0] is None
        seen = l * l // 2 if self.causal and unlimited else l * min(l, left + 1 + right)
        return total_flops({"linear": l * linear, "attention": width * seen}, mode)

    def state_numel(self, l: int = 0) -> int:  # noqa: E741
        """Numbers in the state of one sequence after l positions."""
        if not self.causal:
            return 0
        slots = l if self.window[0] is None else self.window[0]
        return 2 * slots * self.kv_heads * self.headdim + max(self.d_conv - 1, 0) * self.qkv_dim

    def extra_repr(self) -> str:
        """Shown by repr()."""
        return f"nheads={self.nheads}, kv_heads={self.kv_heads}, headdim={self.headdim}, window={self.window}"

    def _state(self, x: Tensor, state: AttentionState | None, layout: Layout) -> AttentionState:
        if state is None:
            return self.init_state(x.shape[0], device=x.device, dtype=x.dtype)
        batch, slots = x.shape[0], self.window[0]
        if slots is None:
            slots = state.k.shape[2] if isinstance(state, AttentionState) and state.k.dim() == 4 else 0
        kv = (batch, self.kv_heads, slots, self.headdim)
        conv = (batch, self.qkv_dim, self.d_conv - 1) if self.d_conv else (batch, 0, 0)
        check_state(state, AttentionState, {"k": kv, "v": kv, "conv": conv, "length": (batch,)}, x.device)
        length = layout.restart(state.length)
        return type(state)(k=state.k, v=state.v, conv=state.conv, length=length)

    def _project(
        self, x: Tensor, state: AttentionState | None, layout: Layout
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Queries, keys and values (b, heads, l, headdim), the slice of the MLP, and the state of the convolution."""
        qkv, mlp = self.in_proj(x).split([self.qkv_dim, self.mlp_dim], dim=-1)
        conv = None
        if self.conv1d is not None:
            before = None if state is None else state.conv
            qkv, conv = convolve(qkv, self.conv1d, before, layout, activation=None)
        place = None
        if self.rotary_dim:
            place = self._places(x, None if state is None else state.length, layout)
        return *self._heads(qkv, place), mlp, conv

    def _heads(self, qkv: Tensor, place: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (b, heads, l, headdim), rotated by positions (b, l)."""
        qkv = qkv.unflatten(-1, (-1, self.headdim))
        q, v = qkv.split([self.nheads + self.kv_heads, self.kv_heads], dim=2)
        if self.rotary_dim and place is not None:
            q = rotate_heads(q, *self._angles(q, place), interleaved=self.rotation == "interleaved")
        q, k = q.split([self.nheads, self.kv_heads], dim=2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _places(self, x: Tensor, before: Tensor | None, layout: Layout) -> Tensor:
        """Position of every token in its own sequence, (b, l) or (1, l)."""
        place = torch.arange(x.shape[1], device=x.device)[None]
        if layout.index is not None:
            place = place - sequence_start(layout.index)
        if before is None:
            return place
        if layout.index is None:
            return place + before[:, None]
        return place + torch.where(layout.index == layout.index[:, :1], before[:, None], 0)

    def _angles(self, x: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the angles at positions (b, l), (b, l, rotary_dim / 2) in at least float32."""
        half = self.rotary_dim // 2
        exact = torch.float32 if x.device.type == "mps" else torch.float64
        frequency = self.rotary_base ** (-torch.arange(half, device=x.device, dtype=exact) / half)
        angle = place[..., None].to(exact) * frequency
        dtype = torch.promote_types(x.dtype, torch.float32)
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def _keys(
        self, k: Tensor, v: Tensor, state: AttentionState | None, layout: Layout
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values of the state and of this call, and who sees whom, (b, 1, l, t + l); None: everyone."""
        length = k.shape[2]
        left, right = self.window
        place = torch.arange(length, device=k.device)
        query = place[:, None]  # compared with all keys; no (l, l) tensor but of bool
        seen: Tensor | None = None
        if self.causal:
            seen = place <= query
        elif right is not None:
            seen = place <= query + right
        if left is not None:
            near = place >= query - left
            seen = near if seen is None else seen & near
        if layout.index is not None:
            same = layout.index[:, None, :, None] == layout.index[:, None, None, :]
            seen = same if seen is None else seen & same
        if layout.mask is not None and not self.causal:  # what is causal cannot see padding, which stands behind
            # Padding sees itself, so that its softmax is not empty; its output is dropped.
            real = layout.mask[:, None, None, :] | (place == query)
            seen = real if seen is None else seen & real
        if state is None:
            return k, v, seen
        batch, valid = k.shape[0], self._earlier(state, place[None])
        if layout.index is not None:
            valid = valid & (layout.index == layout.index[:, :1])[:, None, :, None]
        seen = valid.new_ones(length, length) if seen is None else seen
        seen = torch.cat([valid, seen.expand(batch, 1, length, length)], dim=-1)
        return torch.cat([state.k.to(k.dtype), k], dim=2), torch.cat([state.v.to(v.dtype), v], dim=2), seen

    def _earlier(self, state: AttentionState, place: Tensor) -> Tensor:
        """Which slots of the state positions see that lie `place` (b, l) or (1, l) behind it, (b, 1, l, t)."""
        left, _ = self.window
        slot = torch.arange(state.k.shape[2], device=place.device)
        held = slot if left is None else _ring(slot, state.length[:, None], left)
        valid = (held >= 0) & (held < state.length[:, None])  # (b, t)
        valid = valid[:, None, None].expand(-1, -1, place.shape[1], -1)
        if left is None:
            return valid
        oldest = state.length[:, None] + place - left
        return valid & (held[:, None, None, :] >= oldest[:, None, :, None])

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, state: AttentionState | None, layout: Layout) -> Tensor:
        """Outputs of all heads, (b, l, h p)."""
        plain = state is None and layout.index is None and self.window[0] is None
        plain = plain and (self.causal or layout.mask is None)
        if plain and (self.causal or self.window[1] is None):
            y = self._sdpa(q, k, v, None, is_causal=self.causal)
        elif state is not None and self._all_seen(q, state, layout):
            from torch.nn.attention.bias import causal_lower_right  # imports the compiler: a second

            keys, values = torch.cat([state.k.to(k.dtype), k], dim=2), torch.cat([state.v.to(v.dtype), v], dim=2)
            y = self._sdpa(q, keys, values, causal_lower_right(q.shape[2], keys.shape[2]))
        else:
            y = self._sdpa(q, *self._keys(k, v, state, layout))
        return y.transpose(1, 2).flatten(2)

    def _all_seen(self, q: Tensor, state: AttentionState, layout: Layout) -> bool:
        """Whether every query sees all slots of a state so large that it is worth a wait to do without a mask."""
        plain = layout.index is None and self.window[0] is None
        slots = state.k.shape[2]
        if not plain or self.kv_heads != self.nheads or not _may_look(q) or q.shape[0] * q.shape[2] * slots < LARGE:
            return False
        return bool((state.length == slots).all())

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, seen: Any, is_causal: bool = False) -> Tensor:
        grouped = self.kv_heads != self.nheads
        if grouped and torch.compiler.is_exporting():  # torch ties grouped heads of exported code to some lengths
            k, v, grouped = self._spread(k), self._spread(v), False
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=is_causal, scale=self.scale, enable_gqa=grouped
        )

    def _spread(self, t: Tensor) -> Tensor:
        """Repeat key or value heads for their query heads."""
        return t.index_select(1, torch.arange(self.nheads, device=t.device) // (self.nheads // self.kv_heads))

    def extended(
        self, state: AttentionState, k: Tensor, v: Tensor, conv: Tensor | None, layout: Layout
    ) -> AttentionState:
        """The state after more positions: the last sequence of each row, each position in its slot.

        Args:
            state: Before them.
            k: Rotated keys, (b, g, l, headdim).
            v: Values, (b, g, l, headdim).
            conv: State of the convolution after them, if there is one.
            layout: Of the rows.

        Raises:
            ValueError: if a state of fixed size has no room for them.
        """
        batch, length = k.shape[0], k.shape[2]
        left, _ = self.window
        count = k.new_full((batch,), length, dtype=torch.int64) if layout.count is None else layout.count
        start, before = torch.zeros_like(count), state.length
        if layout.index is not None and length:
            start = sequence_start(layout.index)[:, -1]
            before = torch.where(layout.index[:, -1] == layout.index[:, 0], before, torch.zeros_like(before))
        total = before + count - start
        slots = state.k.shape[2]
        if isinstance(state, FixedAttentionState):
            full = total > slots
            if _may_look(k) and bool(full.any()):
                raise ValueError(
                    f"`state` has {slots} slots, expected at least {int(total.max())}; make it with more of them."
                )
            k = torch.where(full[:, None, None, None], float("nan"), k)  # what else can be seen in compiled code
        elif left is None:
            slots = slots + length
        slot = torch.arange(slots, device=k.device)
        held = slot.expand(batch, -1) if left is None else _ring(slot, total[:, None], left)
        new = (held >= before[:, None]) & (held < total[:, None])
        source = (held - before[:, None] + start[:, None]).clamp(0, max(length - 1, 0))

        def filled(old: Tensor, fresh: Tensor) -> Tensor:
            kept = F.pad(old.to(fresh.dtype), (0, 0, 0, slots - old.shape[2]))
            if not length:
                return kept
            kept = torch.where(((held >= 0) & (held < before[:, None]))[:, None, :, None], kept, torch.zeros_like(kept))
            moved = fresh.gather(2, source[:, None, :, None].expand(-1, fresh.shape[1], -1, fresh.shape[3]))
            return torch.where(new[:, None, :, None], moved, kept)

        conv = (state.conv if conv is None else conv).to(k.dtype)
        return type(state)(k=filled(state.k, k), v=filled(state.v, v), conv=conv, length=total)

    def _out(self, y: Tensor, mlp: Tensor) -> Tensor:
        if self.mlp_dim:
            up, gate = mlp.chunk(2, dim=-1)
            y = torch.cat([y, up * F.silu(gate)], dim=-1)
        return self.out_proj(y)


def _quotient(whole: int, part: int) -> int:
    """How often a part fits, 0 if it does not."""
    return whole // part if part > 0 and whole % part == 0 else 0


def _window(window: int | Sequence[int] | None, causal: bool) -> tuple[int | None, int | None]:
    """Positions to the left and to the right, None for no limit."""
    pair = (window, window) if window is None or isinstance(window, int) else tuple(window)
    if len(pair) != 2 or any(side is not None and side < -1 for side in pair):
        raise ValueError(f"`window` must be (left, right), each at least 0 or -1 for no limit, got {window!r}.")
    left, right = (None if side == -1 else side for side in pair)
    return left, 0 if causal else right


def _may_look(tensor: Tensor) -> bool:
    """Whether a value may be read on the host: not in compiled code, nor while a CUDA graph is captured."""
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _ring(slot: Tensor, length: Tensor, size: int) -> Tensor:
    """Which position a slot of a ring holds when `length` positions have been written; negative: none."""
    return length - 1 - (length - 1 - slot) % max(size, 1)
