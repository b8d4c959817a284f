"""Any causal mixer in both directions, the second time on the reversed sequence.

    f = mixer(x),    b = reverse(mixer'(reverse(x)))
    y = f + b,    or Linear([f, b]),    or g f + (1 - g) b with g = sigmoid(Linear(x))

The position itself is seen by both, so that with "add" a diagonal counts twice; Hydra repairs this.
Bi-Mamba: Zhu et al. (2024), "Vision Mamba"; with shared projections: Schiff et al. (2024), "Caduceus".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NoReturn, get_args

import torch
from torch import Tensor, nn

from .common import MixingMatrix, Mode, bidirectional_only, check_input, lay_out, linear_flops, total_flops

Combine = Literal["add", "concat", "gate"]
Tie = Literal["none", "projections", "all"]


class Bidirectional(nn.Module):
    """Bidirectional mixer (b, l, d) -> (b, l, d) of two causal ones, or of one that is used twice.

    Args:
        d_model: Width of the stream.
        mixer: Name of a causal sequence mixer.
        mixer_options: Its options.
        combine: "add"; "concat" (a linear map 2 d -> d of both); "gate" (a learned share of each channel).
        tie: What the directions share: "none", "projections" (in_proj and out_proj) or "all".
        device: Where to create the parameters.
        dtype: Their dtype.

    Raises:
        ValueError: if an option has an unknown value.
        TypeError: if the mixer is not causal, has no such option, or no projections to share.
    """

    causal: ClassVar[bool] = False
    state_type: ClassVar[None] = None

    def __init__(
        self,
        d_model: int,
        *,
        mixer: str = "mamba2",
        mixer_options: Mapping[str, Any] | None = None,
        combine: Combine = "add",
        tie: Tie = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        from . import create_mixer  # the table holds this class too

        super().__init__()
        for name, value, choices in (("combine", combine, get_args(Combine)), ("tie", tie, get_args(Tie))):
            if value not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_model, self.combine, self.tie = d_model, combine, tie
        self.ahead: nn.Module = create_mixer(mixer, d_model, **factory, **(mixer_options or {}))
        if not getattr(self.ahead, "causal", False) or not hasattr(self.ahead, "state_type"):
            raise TypeError(f"`mixer` must be a causal sequence mixer, got {mixer!r}.")
        self.linear_in_x, self.varlen = bool(self.ahead.linear_in_x), bool(self.ahead.varlen)
        if tie != "all":
            self.back: nn.Module = create_mixer(mixer, d_model, **factory, **(mixer_options or {}))
        if tie == "projections":
            for name in ("in_proj", "out_proj"):
                if not isinstance(getattr(self.ahead, name, None), nn.Linear):
                    raise TypeError(f"tie='projections' needs a mixer with `{name}`, {mixer!r} has none.")
                delattr(self.back, name)
                # A plain attribute: registered twice, it would be twice in state dicts.
                object.__setattr__(self.back, name, getattr(self.ahead, name))
        if combine == "concat":
            self.join = nn.Linear(2 * d_model, d_model, **factory)
        elif combine == "gate":
            self.gate = nn.Linear(d_model, d_model, **factory)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, seq_idx: Tensor | None = None) -> Tensor:
        """Mix whole sequences.

        Args:
            x: (b, l, d).
            mask: True at real tokens, (b, l) bool; contiguous in each row. Outputs at padding are 0.
            seq_idx: Which packed sequence a position belongs to, (b, l) integers; sequences do not see each other.

        Returns:
            (b, l, d).

        Raises:
            ValueError: if a shape is wrong or a mask has holes.
            TypeError: if a dtype is wrong.
        """
        check_input(x, self.d_model)
        later = {"mask": mask, "seq_idx": None if seq_idx is None else -seq_idx}
        reversed_inputs = {name: None if tensor is None else tensor.flip(1) for name, tensor in later.items()}
        ahead = self.ahead(x, mask=mask, seq_idx=seq_idx)
        back = self._back()(x.flip(1), **reversed_inputs).flip(1)
        if self.combine == "concat":
            y = self.join(torch.cat([ahead, back], dim=-1))
        elif self.combine == "gate":
            share = torch.sigmoid(self.gate(x))
            y = share * ahead + (1 - share) * back
        else:
            y = ahead + back
        return lay_out(x, mask, align=False).restore(y)

    def prefill(self, *_: Any, **__: Any) -> NoReturn:
        """Not of this mixer.

        Raises:
            TypeError: always.
        """
        raise bidirectional_only(self)

    step = init_state = prefill

    def mixing_matrix(self, x: Tensor, *, state: None = None) -> MixingMatrix:
        """The matrices of both directions side by side, (b, 2 h, l, l): the first h lower, the others upper triangular.

        Args:
            x: (b, l, d).
            state: None; there is no state.

        Raises:
            TypeError: if a state is given.
        """
        if state is not None:
            raise bidirectional_only(self)
        ahead: MixingMatrix = self.ahead.mixing_matrix(x)  # type: ignore[operator]
        back: MixingMatrix = self._back().mixing_matrix(x.flip(1))  # type: ignore[operator]
        along = [
            None if one is None or other is None else torch.cat([one, other.flip(1)], dim=2)
            for one, other in zip(ahead[1:], back[1:])
        ]
        matrix = torch.cat([ahead.matrix, back.matrix.flip(2, 3)], dim=1)
        return MixingMatrix(matrix, *along)  # type: ignore[arg-type]

    def flops(self, l: int, *, mode: Mode = "prefill") -> int:  # noqa: E741
        """Multiplications and additions for one sequence of length l.

        Raises:
            TypeError: for mode "decode".
        """
        if mode == "decode":
            raise bidirectional_only(self)
        join = [layer for name, layer in self.named_children() if name in ("join", "gate")]
        own = total_flops({"join": l * linear_flops(*join)}, mode)  # type: ignore[arg-type]
        return own + sum(part.flops(l, mode=mode) for part in (self.ahead, self._back()))  # type: ignore[operator]

    def state_numel(self) -> int:
        """There is no state: 0."""
        return 0

    def extra_repr(self) -> str:
        """Shown by repr()."""
        return f"combine={self.combine!r}, tie={self.tie!r}"

    def _back(self) -> nn.Module:
        return self.ahead if self.tie == "all" else self.back
