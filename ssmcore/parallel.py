"""Two mixers side by side on one input, such as attention heads beside a state-space model.

Dong et al. (2024), Hymba, section 2.1 ("norm_mean"); Zuo et al. (2025), Falcon-H1, section 2.1 ("sum"); Bick, Xing & Gu
(2025) for few attention heads beside many recurrent ones.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NoReturn

import torch
from torch import Tensor, nn

from ..kernels import TokenTree
from .drafts import PairDraft
from .mixers.common import Mode, require_causal, require_state
from .states import PairState

Merge = Literal["sum", "norm_mean", "adapter"]


class DoubleMixer(nn.Module):
    """A mixer made of two.

        sum:        y = a + b
        norm_mean:  y = (scale_a rms(a) + scale_b rms(b)) / 2
        adapter:    y = (a + adapter(b given the mean and standard deviation of a)) / 2

    Mean, standard deviation and root mean square are over the channels of a position.

    Args:
        d_model: Width.
        first: Mixer that gives a.
        second: Mixer that gives b.
        merge: "sum", "norm_mean" or "adapter".
        device: Where to create the parameters.
        dtype: Their dtype.

    Raises:
        ValueError: if `merge` is unknown.
    """

    linear_in_x: ClassVar[bool] = False

    def __init__(
        self,
        d_model: int,
        first: nn.Module,
        second: nn.Module,
        *,
        merge: Merge = "sum",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if merge not in ("sum", "norm_mean", "adapter"):
            raise ValueError(f"`merge` must be 'sum', 'norm_mean' or 'adapter', got {merge!r}.")
        self.d_model, self.merge = d_model, merge
        self.first, self.second = first, second
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if merge == "norm_mean":
            self.scale = nn.Parameter(torch.ones(2, d_model, **factory))
        if merge == "adapter":
            self.adapter = nn.Linear(d_model, d_model, bias=False, **factory)
            nn.init.eye_(self.adapter.weight)

    @property
    def causal(self) -> bool:
        """Whether both mixers are."""
        return bool(getattr(self.first, "causal", False) and getattr(self.second, "causal", False))

    @property
    def varlen(self) -> bool:
        """Whether both mixers take packed sequences."""
        return bool(getattr(self.first, "varlen", False) and getattr(self.second, "varlen", False))

    @property
    def state_type(self) -> type[PairState] | None:
        """Type of the state, if there is one."""
        return PairState if self.causal else None

    def no_decay_names(self) -> tuple[str, ...]:
        """Parameters that weight decay must leave alone."""
        return ("scale",) if self.merge == "norm_mean" else ()

    def forward(self, x: Tensor, **arguments: Any) -> Tensor:
        """Mix whole sequences, (b, l, d); keyword arguments go to both."""
        return self._merged(self.first(x, **arguments), self.second(x, **arguments))

    def prefill(self, x: Tensor, state: PairState | None = None, **arguments: Any) -> tuple[Tensor, PairState]:
        """Like `forward`, going on from a state.

        Raises:
            TypeError: if a mixer is not causal, or the state is of another kind.
        """
        require_causal(self)
        if state is not None:
            require_state(state, PairState)
        a, first = self.first.prefill(x, None if state is None else state.first, **arguments)  # type: ignore[operator]
        b, second = self.second.prefill(x, None if state is None else state.second, **arguments)  # type: ignore[operator]
        return self._merged(a, b), PairState(first, second)

    def step(self, x: Tensor, state: PairState) -> tuple[Tensor, PairState]:
        """One position, (b, d).

        Raises:
            TypeError: if a mixer is not causal, or the state is of another kind.
        """
        require_causal(self)
        require_state(state, PairState)
        a, first = self.first.step(x, state.first)  # type: ignore[operator]
        b, second = self.second.step(x, state.second)  # type: ignore[operator]
        return self._merged(a, b), PairState(first, second)

    def verify(self, x: Tensor, state: PairState, tree: TokenTree) -> tuple[Tensor, PairDraft]:
        """Mix a tree of positions, (b, l, d), see `Stack.verify`.

        Raises:
            TypeError: if a mixer is not causal, or the state is of another kind.
        """
        require_causal(self)
        require_state(state, PairState)
        a, first = self.first.verify(x, state.first, tree)  # type: ignore[operator]
        b, second = self.second.verify(x, state.second, tree)  # type: ignore[operator]
        return self._merged(a, b), PairDraft(first, second)

    def init_state(self, batch: int, **options: Any) -> PairState:
        """State before the first position; options (`device`, `dtype`) go to both."""
        require_causal(self)
        first, second = self.first.init_state(batch, **options), self.second.init_state(batch, **options)  # type: ignore[operator]
        return PairState(first, second)

    def mixing_matrix(self, x: Tensor, *, state: PairState | None = None) -> NoReturn:
        """Not of two mixers; each of them may have one.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "mixers side by side have no single matrix; ask `first` or `second`, or analysis.token_jacobian for both."
        )

    def flops(self, l: int, *, mode: Mode = "prefill") -> int:  # noqa: E741
        """Operations of both mixers; merging is not counted."""
        return int(self.first.flops(l, mode=mode) + self.second.flops(l, mode=mode))  # type: ignore[operator]

    def state_numel(self) -> int:
        """Numbers in the states of one sequence."""
        return int(self.first.state_numel() + self.second.state_numel())  # type: ignore[operator]

    def _merged(self, a: Tensor, b: Tensor) -> Tensor:
        if self.merge == "sum":
            return a + b
        wide = torch.promote_types(a.dtype, torch.float32)
        p, q = a.to(wide), b.to(wide)
        if self.merge == "norm_mean":
            p, q = (t * torch.rsqrt(t.square().mean(-1, keepdim=True) + 1e-5) for t in (p, q))
            return ((self.scale[0].to(wide) * p + self.scale[1].to(wide) * q) / 2).to(a.dtype)
        q = (q - q.mean(-1, keepdim=True)) * torch.rsqrt(q.var(-1, keepdim=True, unbiased=False) + 1e-5)
        q = p.mean(-1, keepdim=True) + q * torch.sqrt(p.var(-1, keepdim=True, unbiased=False) + 1e-5)
        # At padding both are zero and must stay so; the tiny deviation above does.
        return ((a + self.adapter(q.to(a.dtype))) / 2).to(a.dtype)
