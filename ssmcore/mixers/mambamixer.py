"""MambaMixer: selective mixing of tokens and of channels by turns, each fed a weighted sum of all earlier outputs.

    input of token mixer i    = sum_{j<i} alpha_ij yT_j + beta_ij yC_j
    input of channel mixer i  = sum_{j<=i} theta_ij yT_j + sum_{j<i} gamma_ij yC_j,        yT_0 = yC_0 = x

Weights start at 1 for the newest output and 0 elsewhere. The token mixer is Mamba along positions, the channel mixer
Mamba in both directions along channels. Behrouz, Santacatterina & Zabih (2024), "MambaMixer: Efficient Selective State
Space Models with Dual Token and Channel Selection", section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bidirectional import Bidirectional
from .common import (
    ConvSSMState,
    MixerState,
    Mode,
    check_input,
    check_state,
    lay_out,
    recurrence_dtype,
    require_causal,
    require_state,
)
from .s6 import Mamba


class ChannelMixer(nn.Module):
    """Mamba in both directions along the channels of a signal, (b, l, d) -> (b, l, d).

    With `max_len` all positions of a channel are one token of the scan, as published: outputs depend on all positions
    and inputs are filled up with zeros to that length. Without it every position is a scan of its own, over `width`
    features of each channel, and no output depends on another position.

    Args:
        d_model: Channels d.
        max_len: Positions of the longest input, or None.
        width: Features of a channel where positions are apart.
        d_state: States of the scans.
        d_conv: Width of their convolutions.
        expand: Inner width of the scans over their outer one.
        device: Where to create the parameters.
        dtype: Their dtype; those of the recurrence are float32 at least.

    Raises:
        ValueError: if a size is out of range.
    """

    def __init__(
        self,
        d_model: int,
        *,
        max_len: int | None = None,
        width: int = 4,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if width < 1 or (max_len is not None and max_len < 1):
            raise ValueError(f"`max_len` and the width must be at least 1, got {max_len} and {width}.")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_model, self.max_len = d_model, max_len
        options = {"d_state": d_state, "d_conv": d_conv, "expand": expand}
        if max_len is None:
            self.lift: nn.Linear | None = nn.Linear(1, width, **factory)
            self.drop: nn.Linear | None = nn.Linear(width, 1, **factory)
        else:
            self.lift = self.drop = None
        self.scan = Bidirectional(max_len or width, mixer="mamba", mixer_options=options, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Mix channels.

        Raises:
            ValueError: if the input is longer than `max_len`.
        """
        if self.lift is not None and self.drop is not None:
            each = self.lift(x.reshape(-1, self.d_model, 1))  # (b l, d, width)
            return self.drop(self.scan(each)).reshape(x.shape)
        length, limit = x.shape[1], self.max_len or 0
        if not torch.compiler.is_compiling() and length > limit:
            raise ValueError(f"`x` has {length} positions, expected at most max_len={limit}.")
        # The rest of a tensor with enough zeros behind, since exported code may not pad by a length of its own.
        filled = torch.cat([x, x.new_zeros(x.shape[0], limit, x.shape[2])], dim=1)[:, :limit]
        place = torch.arange(length, device=x.device).clamp(max=limit - 1)  # clamp: for export
        return self.scan(filled.mT).mT.index_select(1, place)

    def flops(self, l: int) -> int:  # noqa: E741
        """Operations of a forward pass over l positions."""
        if self.lift is not None:
            width = self.lift.out_features
            return l * (4 * width * self.d_model + self.scan.flops(self.d_model))
        return self.scan.flops(self.d_model)


class MambaMixer(nn.Module):
    """Sequence mixer of `n_layer` pairs of a token mixer and a channel mixer.

    Causal, every channel mixer works on positions apart, and steps are exact. Otherwise channel mixers see all
    positions, as published, and inputs are limited to `max_len` positions.

    Args:
        d_model: Width of the stream.
        n_layer: Pairs.
        causal: See no later position.
        max_len: Positions of the longest input, where it is not causal.
        channel_width: Features of a channel inside causal channel mixers.
        d_state: States of all scans.
        d_conv: Width of all convolutions.
        expand: Inner width of all scans over their outer one.
        device: Where to create the parameters.
        dtype: Their dtype; those of the recurrence are float32 at least.

    Raises:
        ValueError: if a size is out of range.
    """

    linear_in_x: ClassVar[bool] = False
    varlen: ClassVar[bool] = False
    state_type: ClassVar[type[MixerState]] = ConvSSMState

    def __init__(
        self,
        d_model: int,
        *,
        n_layer: int = 1,
        causal: bool = False,
        max_len: int = 1024,
        channel_width: int = 4,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if n_layer < 1:
            raise ValueError(f"`n_layer` must be at least 1, got {n_layer}.")
        sizes: dict[str, Any] = {"d_state": d_state, "d_conv": d_conv, "expand": expand}
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_model, self.n_layer, self.causal, self.max_len = d_model, n_layer, causal, max_len
        self.tokens = nn.ModuleList(Mamba(d_model, **sizes, **factory) for _ in range(n_layer))
        limit = None if causal else max_len
        self.channels = nn.ModuleList(
            ChannelMixer(d_model, max_len=limit, width=channel_width, **sizes, **factory) for _ in range(n_layer)
        )
        # Layer i reads its i + 1 token outputs (the channel mixer one more), then its i + 1 channel outputs.
        self.to_token = nn.ParameterList(_newest(2 * i + 2, 2 * i + 1, **factory) for i in range(n_layer))
        self.to_channel = nn.ParameterList(_newest(2 * i + 3, i + 1, **factory) for i in range(n_layer))

    def no_decay_names(self) -> tuple[str, ...]:
        """Parameters that weight decay must leave alone."""
        return tuple(f"{name}.{i}" for name in ("to_token", "to_channel") for i in range(self.n_layer))

    def forward(self, x: Tensor, *, mask: Tensor | None = None, seq_idx: Tensor | None = None) -> Tensor:
        """Mix whole sequences.

        Args:
            x: (b, l, d).
            mask: True at real tokens, (b, l) bool; contiguous in each row. Outputs at padding are 0.
            seq_idx: None; packed sequences are not taken.

        Returns:
            (b, l, d).

        Raises:
            ValueError: if a shape is wrong, a mask has holes, the input is longer than `max_len` or `seq_idx` is given.
        """
        return self._mix(x, None, mask, seq_idx, None)[0]

    def prefill(
        self,
        x: Tensor,
        state: ConvSSMState | None = None,
        *,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, ConvSSMState]:
        """Like `forward`, going on from a state and returning the one after; `reset` (b, l) drops it before a position.

        Raises:
            TypeError: if the mixer is not causal or the state of another kind.
            ValueError: as for `forward`, or if the state does not fit.
        """
        require_causal(self)
        if state is None:
            dtype = torch.promote_types(x.dtype, self.to_token[0].dtype)
            state = self.init_state(x.shape[0], device=x.device, dtype=None if dtype == torch.float64 else x.dtype)
        check_state(state, ConvSSMState, self._shapes(x.shape[0]), x.device)
        return self._mix(x, state, mask, seq_idx, reset)

    def step(self, x: Tensor, state: ConvSSMState) -> tuple[Tensor, ConvSSMState]:
        """One position, (b, d).

        Raises:
            ValueError: if a shape is wrong or the state does not fit.
            TypeError: if the mixer is not causal or the state of another kind.
        """
        require_causal(self)
        check_input(x, self.d_model, "b")
        require_state(state, ConvSSMState)
        y, state = self.prefill(x[:, None], state)
        return y[:, 0], state

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> ConvSSMState:
        """State before the first position, one entry per layer behind the batch: that of `Mamba` with a layer axis."""
        require_causal(self)
        like = self.to_token[0]
        device, dtype = device or like.device, dtype or like.dtype
        shapes = self._shapes(batch)
        return ConvSSMState(
            torch.zeros(shapes["conv"], device=device, dtype=dtype),
            torch.zeros(shapes["ssm"], device=device, dtype=recurrence_dtype(dtype)),
        )

    def mixing_matrix(self, x: Tensor, *, state: ConvSSMState | None = None) -> NoReturn:
        """Not of this mixer.

        Raises:
            NotImplementedError: always; `omnissm.ssmcore.analysis.token_jacobian` serves nonlinear mixers.
        """
        raise NotImplementedError(
            "MambaMixer mixes channels too and has no matrix over positions; see ssmcore.analysis.token_jacobian."
        )

    def flops(self, l: int, *, mode: Mode = "prefill") -> int:  # noqa: E741
        """Operations of one sequence of length l, or of one position ("decode", causal only).

        Raises:
            TypeError: for mode "decode" of a mixer that is not causal.
        """
        if mode == "decode":
            require_causal(self)
        tokens = sum(mixer.flops(l, mode=mode) for mixer in self.tokens)  # type: ignore[operator]
        channels = sum(mixer.flops(1 if mode == "decode" else l) for mixer in self.channels)  # type: ignore[operator]
        return int(tokens + channels * (3 if mode == "train" else 1))

    def state_numel(self) -> int:
        """Numbers in the state of one sequence."""
        return sum(math.prod(shape) for shape in self._shapes(1).values()) if self.causal else 0

    def extra_repr(self) -> str:
        """Shown by repr()."""
        return f"n_layer={self.n_layer}, causal={self.causal}" + ("" if self.causal else f", max_len={self.max_len}")

    def _shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        each = self.tokens[0]._state_shapes(batch)  # type: ignore[operator]
        return {name: (batch, self.n_layer, *shape[1:]) for name, shape in each.items()}

    def _mix(
        self, x: Tensor, state: ConvSSMState | None, mask: Tensor | None, seq_idx: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, ConvSSMState]:
        check_input(x, self.d_model)
        if seq_idx is not None:
            raise ValueError("MambaMixer takes no packed sequences (seq_idx); give one sequence per row, or resets.")
        layout = lay_out(x, mask, None, reset)
        x = layout.zero_padding(layout.align(x))
        tokens, channels, convs, scans = [x], [x], [], []
        # Rows are aligned already; what is left of the mask marks the padding behind them.
        flags = {"mask": layout.mask, "seq_idx": layout.index}
        for i, (token, channel) in enumerate(zip(self.tokens, self.channels)):
            own = None
            if state is not None:
                own = ConvSSMState(layout.restart(state.conv[:, i]), layout.restart(state.ssm[:, i]))
            mixed = _sum([*tokens, *channels], self.to_token[i])
            y, after = token.prefill(mixed, own, **flags)  # type: ignore[operator]
            tokens.append(y)
            convs.append(after.conv)
            scans.append(after.ssm)
            mixed = _sum([*tokens, *channels], self.to_channel[i])
            channels.append(layout.zero_padding(channel(mixed)))
        return layout.restore(channels[-1]), ConvSSMState(torch.stack(convs, dim=1), torch.stack(scans, dim=1))


def _newest(count: int, place: int, **factory: Any) -> nn.Parameter:
    return nn.Parameter(F.one_hot(torch.tensor(place), count).to(**_plain(factory)))


def _plain(factory: dict[str, Any]) -> dict[str, Any]:
    """Device and dtype of new parameters, the default dtype where none is named."""
    return {"device": factory["device"], "dtype": factory["dtype"] or torch.get_default_dtype()}


def _sum(parts: Sequence[Tensor], weights: Tensor) -> Tensor:
    return torch.stack([weight.to(part.dtype) * part for weight, part in zip(weights, parts)]).sum(0)
