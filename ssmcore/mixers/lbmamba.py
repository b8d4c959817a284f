"""LBMamba: Mamba with a second scan, backwards in time, inside segments of a few positions.

    hR_t = exp(dt_t A) hR_{t+1} + dt_t x_t B_t, zero past the segment's end
    y_t = C_t.(h_t + hR_t - dt_t x_t B_t) + D x_t

h_t is the scan of Mamba over the whole sequence. Backbones reverse the sequence between layers, so that two layers see
both directions. Zhang et al. (2025), "LBMamba: Locally Bi-directional Mamba", section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from ...kernels import selective_scan
from .common import MixingMatrix, Mode, bidirectional_only, check_input, convolve, lay_out, wide
from .s6 import S6, DtInit


class LBMamba(S6):
    """Locally bidirectional mixer (b, l, d) -> (b, l, d); neither residual nor norm inside.

    Args:
        d_model: Width of the stream.
        window: Positions m of a segment, counted from the start of each sequence; 1 is Mamba. A property of the
            trained weights: the published kernel takes 4 up to length 128, 8 up to 256, else 16.
        d_state: States n per channel.
        d_conv: Width of the causal convolution, 1 to 8.
        expand: d_inner = expand * d_model.
        dt_rank: Rank of the map from input to steps; None: d_model / 16 rounded up.
        dt_min: Shortest initial step.
        dt_max: Longest initial step.
        dt_init: Initial weight of dt_proj: "random" or "constant".
        dt_scale: Factor of that weight's size.
        dt_init_floor: Initial steps below are raised to it.
        bias: Of in_proj and out_proj.
        conv_bias: Of the convolution.
        device: Where to create the parameters.
        dtype: Their dtype; those of the recurrence are float32 at least.

    Raises:
        ValueError: if a size is out of range or an option unknown.
    """

    causal: ClassVar[bool] = False
    state_type: ClassVar[None] = None

    def __init__(
        self,
        d_model: int,
        *,
        window: int = 16,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init: DtInit = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        bias: bool = False,
        conv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model,
            d_state=d_state,
            d_conv=d_conv,
            expand=expand,
            dt_rank=dt_rank,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init=dt_init,
            dt_scale=dt_scale,
            dt_init_floor=dt_init_floor,
            bias=bias,
            conv_bias=conv_bias,
            device=device,
            dtype=dtype,
        )
        if window < 1:
            raise ValueError(f"`window` must be at least 1, got {window}.")
        self.window = window

    def forward(self, x: Tensor, *, mask: Tensor | None = None, seq_idx: Tensor | None = None) -> Tensor:
        """Mix whole sequences.

        Args:
            x: (b, l, d).
            mask: True at real tokens, (b, l) bool; contiguous in each row, segments start with them. Outputs at padding
                are 0.
            seq_idx: Which packed sequence a position belongs to, (b, l) integers; sequences do not see each other.

        Returns:
            (b, l, d).

        Raises:
            ValueError: if a shape is wrong or a mask has holes.
            TypeError: if a dtype is wrong.
        """
        check_input(x, self.d_model)
        layout = lay_out(x, mask, seq_idx)
        conv_in, z = self.in_proj(layout.align(x)).chunk(2, dim=-1)
        convolved, _ = convolve(conv_in, self.conv1d, None, layout)
        scan = self._scan_inputs(convolved, layout)
        y, _ = selective_scan(*scan, wide(self.D), z, seq_idx=layout.index, window=self.window)
        return layout.restore(self.out_proj(y))

    def prefill(self, *_: Any, **__: Any) -> NoReturn:
        """Not of this mixer.

        Raises:
            TypeError: always.
        """
        raise bidirectional_only(self)

    step = init_state = prefill

    def mixing_matrix(
        self, x: Tensor, *, state: None = None, effective: bool = False, channels: Sequence[int] | None = None
    ) -> MixingMatrix:
        """The operator of both recurrences on these inputs, one matrix per channel, (b, c, l, l).

        Args:
            x: (b, l, d).
            state: None; there is no state.
            effective: Count gate and convolution in: the operator from the x slice of in_proj to the input of out_proj.
            channels: Which of the d_inner channels are wanted; None: all.

        Raises:
            ValueError: if the shape is wrong.
            TypeError: if a state is given.
        """
        if state is not None:
            raise bidirectional_only(self)
        return self._matrix(x, None, self.window, effective, channels)

    def flops_parts(self, l: int, *, mode: Mode = "prefill") -> dict[str, int]:  # noqa: E741
        """See `Mamba.flops_parts`; the scan counts twice.

        Raises:
            TypeError: for mode "decode".
        """
        if mode == "decode":
            raise bidirectional_only(self)
        return super().flops_parts(l, mode=mode)

    def state_numel(self) -> int:
        """There is no state: 0."""
        return 0

    def extra_repr(self) -> str:
        """Shown by repr()."""
        return f"{super().extra_repr()}, window={self.window}"

    def _scan_flops(self) -> int:
        return 2 * super()._scan_flops()
