"""S4: a state-space model per channel whose matrix is diagonal plus low rank, so that HiPPO matrices are exact.

    h' = A h + B u,  y = Re C h + D u,    A = diag(Lambda) - sum_r P_r P_r^*      bilinear rule with step dt
    sum_{t<l} K_t z^t = C (1 - A_^l) G(z) B                                       at the l-th roots of unity z
    G(z) B = R B - g R P (1 + g P^* R P)^{-1} P^* R B,    R = dt / (1 - z - dt/2 (1 + z) Lambda),  g = (1 + z) / 2

Gu, Goel & Ré (2021), "Efficiently Modeling Long Sequences with Structured State Spaces", section 3 and appendix C. C is
the parameter, and the factor 1 - A_^l is worked out for each length, where the published code stores their product and
rewrites it when lengths change. The factor (1 + z) / 2 is kept out of R, which has no pole at z = -1 then.

`init="ptd"`: Yu, Nigmetov, Morozov, Mahoney & Erichson (2023), "Robustifying State-space Models for Long Sequences via
Approximate Diagonalization". The matrix is perturbed until it can be diagonalised, and the model is diagonal.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from ..hippo import normal_form, perturbed_form
from ..init import no_weight_decay
from .common import Layout, MixingMatrix, Mode, check_input, lay_out, require_causal, require_state, total_flops, wide
from .s4 import S4D, S4DState, _last_sequence

S4Init = Literal["legs", "legt", "ptd"]
_EXPORT_BITS = 24  # of lengths, where exported code does not know them


class _System(NamedTuple):
    """A, B and C of all channels in double precision; both halves of the conjugate pairs where it says n."""

    dt: Tensor  # (d, 1)
    Lambda: Tensor  # (d, n)
    P: Tensor  # (r, d, n)
    B: Tensor  # (d, n)
    C: Tensor  # (sides, d, n)


class S4(S4D):
    """Sequence mixer with constant diagonal plus low rank dynamics, causal or two-sided.

    Args:
        d_model: Width d.
        d_state: States n per channel, even.
        n_ssm: How many sets of A, B and P the channels share; must divide d_model. None: 1.
        init: HiPPO matrix, "legs" or "legt"; or "ptd", a perturbed "legs" matrix in n complex eigenvalues.
        epsilon: Norm of the perturbation, for "ptd".
        bidirectional: Add a second kernel that looks ahead; there is no state then.
        rate: Factor of all steps: a model trained at one sampling rate runs at another, 0.5 for twice as many samples.
        dt_min: Shortest initial step.
        dt_max: Longest initial step.
        dropout: Dropout between activation and output map.
        device: Where to create the parameters.
        dtype: Floating dtype of the output map; the parameters of the recurrence are at least float32.

    Raises:
        ValueError: if an option has an unknown value or a size is out of range.

    Kernels take memory d * n * l; the work to move a state along a sequence is d * n^3 * log l.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        n_ssm: int | None = None,
        init: S4Init = "legs",
        epsilon: float = 0.1,
        bidirectional: bool = False,
        rate: float = 1.0,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if init not in get_args(S4Init):
            raise ValueError(f"`init` must be one of {', '.join(map(repr, get_args(S4Init)))}, got {init!r}.")
        super().__init__(
            d_model,
            d_state=2 * d_state if init == "ptd" and d_state % 2 == 0 else d_state,  # n complex numbers are n pairs
            n_ssm=n_ssm or 1,
            discretization="bilinear",
            bidirectional=bidirectional,
            rate=rate,
            dt_min=dt_min,
            dt_max=dt_max,
            dropout=dropout,
            device=device,
            dtype=dtype,
        )
        P = None
        if init == "ptd":
            Lambda, B, _ = perturbed_form("legs", d_state, epsilon)
            B = B / 2  # the real part of a pair is twice that of either
        else:
            Lambda, P, B, _ = normal_form(init, d_state)
        with torch.no_grad():
            self.A_real.copy_((-Lambda.real).clamp(min=1e-4).log().expand_as(self.A_real))
            self.A_imag.copy_(Lambda.imag.expand_as(self.A_imag))
            self.B.copy_(torch.view_as_real(B).expand_as(self.B))
        if P is None:
            self.register_parameter("P", None)
            return
        P = torch.view_as_real(P)[:, None].repeat(1, self.A_real.shape[0], 1, 1)  # (r, n_ssm, n / 2, 2)
        self.P = nn.Parameter(P.to(self.A_real))
        no_weight_decay(self.P)

    def lr_names(self) -> tuple[str, ...]:
        """Parameters with their own learning rate and no weight decay."""
        return (*super().lr_names(), *(["P"] if self._parameters.get("P") is not None else []))

    def prefill(
        self,
        x: Tensor,
        state: S4DState | None = None,
        *,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, S4DState]:
        """Like `forward`, going on from a state; see `S4D.prefill`."""
        if self.P is None:
            return super().prefill(x, state, mask=mask, seq_idx=seq_idx, reset=reset)
        require_causal(self)
        check_input(x, self.d_model)
        layout = lay_out(x, mask, seq_idx, reset)
        u, length = layout.zero_padding(layout.align(x)), x.shape[1]
        given = self._state(x, state).ssm
        if not torch.compiler.is_compiling() and not length:
            return layout.restore(self._out(self._convolve(u, layout))), S4DState(given)
        system, y = self._system(), self._convolve(u, layout)
        start = layout.restart(torch.view_as_complex(given))
        if state is not None:
            y = y + self._response(system, start, layout, length).to(y.dtype)
        count: int | Tensor = length if layout.count is None else layout.count
        kept = _advance(system, start, count, length)
        if layout.index is not None:
            same = layout.index[:, -1] == layout.index[:, 0]
            kept = torch.where(same[:, None, None], kept, torch.zeros_like(kept))
        absorbed = _absorb(system, _last_sequence(wide(u), layout), length)
        last = torch.view_as_real(kept + absorbed).to(given.dtype)
        return layout.restore(self._out(y)), S4DState(last)

    def step(self, x: Tensor, state: S4DState) -> tuple[Tensor, S4DState]:
        """One position, (b, d), in O(n) per channel; see `S4D.step`."""
        if self.P is None:
            return super().step(x, state)
        require_causal(self)
        check_input(x, self.d_model, "b")
        require_state(state, S4DState)
        ssm = self._state(x, state).ssm
        system, u = self._system(), wide(x)
        h = _step(system, torch.view_as_complex(ssm), u)
        y = 2 * (system.C[0, :, : h.shape[-1]] * h).real.sum(-1).to(u.dtype) + wide(self.D) * u
        return self._out(y.to(x.dtype)), S4DState(torch.view_as_real(h).to(ssm.dtype))

    def mixing_matrix(self, x: Tensor, *, state: S4DState | None = None) -> MixingMatrix:
        """The Toeplitz matrix of every channel, (1, d, l, l), before activation and output map."""
        found = super().mixing_matrix(x, state=state if self.P is None else None)
        if state is None or self.P is None:
            return found
        require_causal(self)
        h = torch.view_as_complex(self._state(x, state).ssm)
        added = self._response(self._system(), h, Layout(), x.shape[1])[..., None].to(found.outputs.dtype)
        return found._replace(outputs=found.outputs + added, from_state=added)

    def flops(self, l: int, *, mode: Mode = "prefill") -> int:  # noqa: E741
        """Operations as `S4D.flops` counts them, and those of the low rank part; the kernel is counted, not A_^l."""
        plain, half = super().flops(l, mode=mode), self.d_state // 2
        if self.P is None:
            return plain
        rank = self.P.shape[0]
        if mode == "decode":
            return plain + self.d_model * half * (6 + 24 * rank)
        parts = {"rank": (l // 2 + 1) * self.d_model * 2 * half * 8 * (2 * rank + rank * rank)}
        return plain + total_flops(parts, mode)

    def _system(self) -> _System:
        double = torch.float32 if self.D.device.type == "mps" else torch.float64
        repeats = self.d_model // self.A_real.shape[0]
        half = torch.complex(-self.A_real.to(double).exp(), self.A_imag.to(double)).repeat(repeats, 1)
        P = torch.view_as_complex(self.P.to(double)).repeat(1, repeats, 1)
        B = torch.view_as_complex(self.B[0].to(double)).repeat(repeats, 1)
        C = torch.view_as_complex(self.C.to(double))
        pairs = (torch.cat([part, part.conj()], dim=-1) for part in (half, P, B, C))
        return _System(self.inv_dt.to(double).exp() * self.rate, *pairs)

    def _kernels(self, length: int) -> tuple[Tensor, Tensor | None]:
        """Impulse responses (d, l) to the past and, two-sided, to the future."""
        if self.P is None:
            return super()._kernels(length)
        system = self._system()
        kernels = _responses(system, system.C, system.B[None], length)[:, 0].to(wide(self.D).dtype)
        return kernels[0], None if self.causal else kernels[1]

    def _response(self, system: _System, h: Tensor, layout: Layout, length: int) -> Tensor:
        """What the state (b, d, n/2) adds to the outputs of the rows' first sequences, (b, l, d).

        C A_^{t+1} h is the kernel of an input map B' with A_ h = (1 - dt/2 A)^{-1} dt B', so B' = (1 / dt + A / 2) h.
        """
        h = _pairs(h.to(system.B.dtype))
        right = h / system.dt + _multiply(system, h) / 2
        y = _responses(system, system.C[:1], right, length)[0].mT
        if layout.index is None:
            return y
        return torch.where((layout.index == layout.index[:, :1])[..., None], y, torch.zeros_like(y))


def _pairs(half: Tensor) -> Tensor:
    """Both halves of conjugate pairs: (..., n / 2) -> (..., n)."""
    return torch.cat([half, half.conj()], dim=-1)


def _multiply(system: _System, h: Tensor) -> Tensor:
    """A h in O(n): (..., d, n)."""
    inner = torch.einsum("rdn,...dn->r...d", system.P.conj(), h)
    return system.Lambda * h - torch.einsum("r...d,rdn->...dn", inner, system.P)


def _step(system: _System, h: Tensor, u: Tensor | None) -> Tensor:
    """One step of the bilinear rule by the Woodbury identity: h (..., d, n / 2), u (..., d)."""
    half, h = h.shape[-1], _pairs(h.to(system.B.dtype))
    g = h + system.dt / 2 * _multiply(system, h)
    if u is not None:
        g = g + system.dt * system.B * u[..., None]
    inverse = 1 / (1 - system.dt / 2 * system.Lambda)
    left, right = system.P.conj() * inverse, system.P * inverse  # (r, d, n)
    small = torch.einsum("rdn,sdn->drs", left, system.P) * system.dt[..., None] / 2
    small = small + torch.eye(len(left), device=small.device)
    inner = torch.linalg.solve(small, torch.einsum("rdn,...dn->...dr", left, g)[..., None])[..., 0]
    return (inverse * g - system.dt / 2 * torch.einsum("...dr,rdn->...dn", inner, right))[..., :half]


def _roots(system: _System, length: int) -> tuple[Tensor, Tensor]:
    """Roots of unity z (k,) with k = l // 2 + 1, and R (d, n, k) there."""
    angle = -2 * torch.pi * torch.arange(length // 2 + 1, device=system.dt.device, dtype=system.dt.dtype) / length
    z = torch.polar(torch.ones_like(angle), angle)
    dt, Lambda = system.dt[..., None], system.Lambda[..., None]
    return z, dt / (1 - z - dt / 2 * (1 + z) * Lambda)


def _low_rank(PRP: Tensor, z: Tensor, PRw: Tensor) -> Tensor:
    """g (1 + g P^* R P)^{-1} P^* R w: (r, r, d, k) and (r, w, d, k) -> (r, w, d, k)."""
    g = (1 + z) / 2
    if len(PRP) == 1:
        return g * PRw / (1 + g * PRP[0])
    (a, b), (c, d) = (g * PRP).unbind()  # two ranks at most
    a, d, (first, second) = 1 + a, 1 + d, (g * PRw).unbind()
    return torch.stack([d * first - b * second, a * second - c * first]) / (a * d - b * c)


def _transfer(system: _System, left: Tensor, right: Tensor, length: int) -> Tensor:
    """left G(z) right at the roots of unity: (x, d, n) and (w, d, n) -> (x, w, d, k)."""
    z, R = _roots(system, length)
    rows, columns = torch.cat([left, system.P.conj()]), torch.cat([right, system.P])
    products = (rows[:, None] * columns).flatten(0, 1).movedim(0, 1) @ R  # (d, pairs, k)
    found = products.unflatten(1, (len(rows), len(columns))).movedim(0, 2)  # (rows, columns, d, k)
    x, w = len(left), len(right)
    inner = _low_rank(found[x:, w:], z, found[x:, :w])
    return found[:x, :w] - (found[:x, w:, None] * inner).sum(1)


def _responses(system: _System, C: Tensor, B: Tensor, length: int) -> Tensor:
    """C A_^t (1 - dt/2 A)^{-1} dt B for t < l: (x, d, n) and (w, d, n) -> (x, w, d, l)."""
    around = 2 * length if torch.compiler.is_compiling() else length  # exported code cannot halve a length
    half = C.shape[-1] // 2
    # C (1 - A_^l): the matrix acts on rows, as its transpose does on columns.
    C = C - _pairs(_advance(system, C[..., :half], around, around, transposed=True))
    return torch.fft.irfft(_transfer(system, C, B, around), n=around)[..., :length]


def _absorb(system: _System, u: Tensor, length: int) -> Tensor:
    """sum_t A_^{l-1-t} B_ u_t: (b, l, d) -> (b, d, n / 2).

    On a circle of l positions the state is (1 - A_^l)^{-1} times that, and a product with the spectrum of u.
    """
    z, R = _roots(system, length)
    products = (system.P.conj()[:, None] * torch.cat([system.B[None], system.P])).flatten(0, 1).movedim(0, 1) @ R
    found = products.unflatten(1, (len(system.P), 1 + len(system.P))).movedim(0, 2)
    inner = _low_rank(found[:, 1:], z, found[:, :1])[:, 0]  # (r, d, k)
    response = (system.B[..., None] - (system.P[..., None] * inner[:, :, None]).sum(0)) * R
    spectrum = torch.fft.rfft(u.to(system.dt.dtype), dim=1).mT * z  # read at l - 1, which is -1 on the circle
    place = torch.arange(z.shape[0], device=z.device)
    alone = (place == 0) | (2 * place == length)  # frequencies that are their own conjugates
    spectrum = spectrum * torch.where(alone, 0.5, 1.0) / length
    first, second = (spectrum.movedim(0, 1) @ response.mT).movedim(0, 1).chunk(2, dim=-1)
    h = first + second.conj()
    return h - _advance(system, h, length, length)


def _advance(system: _System, h: Tensor, count: int | Tensor, longest: int, *, transposed: bool = False) -> Tensor:
    """A_^count h for (b, d, n / 2), with one count for all rows or (b,) of them, none above `longest`.

    Powers of two of the matrix, real on real and imaginary parts, are squared one from another. Transposed: h is a row
    that is multiplied from the right, C A_^count.
    """
    half = h.shape[-1]
    basis = torch.eye(half, device=h.device, dtype=system.B.dtype)
    basis = torch.cat([basis, 1j * basis])[:, None].expand(-1, len(system.dt), -1)
    matrix = torch.view_as_real(_step(system, basis, None)).flatten(-2)  # (column, d, n)
    matrix = _interleave_rows(matrix, half).permute(1, 2, 0)  # (d, row, column)
    # As a row, C reads 2 Re C h = 2 (C.re, -C.im) . (h.re, h.im).
    vector = torch.view_as_real((h.conj() if transposed else h).resolve_conj().to(system.B.dtype)).flatten(-2)
    matrix = matrix.mT if transposed else matrix
    symbolic = torch.compiler.is_compiling()
    for bit in range(_EXPORT_BITS if symbolic else longest.bit_length()):
        moved = torch.einsum("dij,...dj->...di", matrix, vector)
        if isinstance(count, Tensor):
            vector = torch.where((count[:, None, None] >> bit) % 2 == 1, moved, vector)
        elif symbolic:
            wanted = torch.full((), count, device=h.device) >> bit
            vector = torch.where(wanted % 2 == 1, moved, vector)
        elif count >> bit & 1:
            vector = moved
        matrix = matrix @ matrix
    found = torch.view_as_complex(vector.unflatten(-1, (half, 2)))
    return found.conj() if transposed else found


def _interleave_rows(matrix: Tensor, half: int) -> Tensor:
    """Columns of the basis 1..., i... in the order of real and imaginary parts."""
    return matrix.unflatten(0, (2, half)).transpose(0, 1).flatten(0, 1)
