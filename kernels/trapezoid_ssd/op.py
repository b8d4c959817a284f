"""`trapezoid_ssd`: the recurrence of Mamba-3, with one rank (SISO) or several (MIMO)."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from ..checks import call_kind, check_devices, check_floating, check_log_decays, check_shapes, known, remember
from ..dispatch import Backend, cast_for_autocast, choose
from ..isolation import isolated
from ..packing import FinalStates, by_segments, check_seq_idx, read_packing
from ..ssd.op import check_groups, in_dtype, state_dtype, widest
from .chunked import trapezoid_ssd_chunked
from .reference import trapezoid_ssd_reference
from .state import Rotation, TrapezoidState, rotate


def trapezoid_ssd(
    x: Tensor,
    log_decay: Tensor,
    gamma: Tensor,
    beta: Tensor,
    theta: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: TrapezoidState | None = None,
    *,
    B_bias: Tensor | None = None,
    C_bias: Tensor | None = None,
    D: Tensor | None = None,
    x_rank: Tensor | None = None,
    rotation: Rotation = "interleaved",
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    final_states: FinalStates = "last",
    chunk_size: int | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, TrapezoidState]:
    """State-space duality with a trapezoidal input rule and rotating keys and queries.

        phi_t = (phi_{t-1} + pi tanh(theta_t) (gamma_t + beta_t)) mod 2 pi                           (h, s)
        k_t = rot(B_t + B_bias; phi_t),    q_t = rot(C_t + C_bias; phi_t),    v_t = x_rank x_t
        H_t = exp(log_decay_t) (H_{t-1} + beta_t v_{t-1} k_{t-1}^T) + gamma_t v_t k_t^T              (h, p, n)
        y_t = H_t q_t + D v_t                                                                        (r, h, p)

    Sums over k are sums over ranks as well; each rank reads the same state with its own query. Mamba-3 calls it with
    `log_decay = dt A`, `gamma = lam dt`, `beta = (1 - lam) dt`, so that the angles advance by `pi tanh(theta) dt`.

    Args:
        x: Input, (b, l, h, p).
        log_decay: Logarithm of the decay, <= 0, (b, l, h).
        gamma: Weight of a position's own input, (b, l, h).
        beta: Weight of the input before it, (b, l, h).
        theta: Angle rates before tanh, shared by the heads, (b, l, s) with s <= n / 2; s = 0 rotates nothing.
        B: What enters the state, (b, l, r, g, n); each of the g groups serves h / g consecutive heads.
        C: What is read from the state, (b, l, r, g, n).
        initial_state: State before the first position; zeros if None.
        B_bias: Added to B for each head, (h, r, n).
        C_bias: Added to C for each head, (h, r, n).
        D: Skip from `v` to the output, (h,).
        x_rank: Factors that make the inputs of the ranks from `x`, (h, r, p); None is ones.
        rotation: Which entries of the last dimension are pairs: "interleaved" (2i, 2i + 1), or "half" (i, i + n // 2).
            The published Mamba-3 uses the first with one rank and the second with several.
        seq_idx: Which packed sequence a position belongs to, (b, l) integers that do not decrease along a row. State,
            angles and the input before start from zero with each new sequence; `initial_state` enters the first one
            of a row.
        cu_seqlens: Where the packed sequences of a single row (b = 1) begin and the last one ends, (s + 1,) integers,
            instead of `seq_idx`. `initial_state` may then have a row for each sequence.
        final_states: "last" returns the state of a row's last sequence, "segments" with `cu_seqlens` those of all s.
        chunk_size: Positions per chunk of the chunked path; None is 64 divided by the rank, at least 16.
        backend: "auto", "reference", "chunked" or "triton"; see `omnissm.kernels.use_backend`. Triton takes up
            to 8 ranks.

    Returns:
        y, (b, l, r, h, p) in the dtype of `x`, and the state after the last position; `phi`, `ssm` and `k` of it are
        float32 (float64 for float64 inputs), `v` has the dtype of `x`. With packing it is the state of a row's last
        sequence, with l = 0 the initial state.

    Raises:
        TypeError: if an argument is no floating tensor, or `initial_state` no TrapezoidState.
        ValueError: if shapes, devices or packing arguments disagree, g does not divide h, there are more angles than
            pairs, `rotation` is unknown, chunk_size is below 1, or, as far as a CPU in eager mode sees it, a log-decay
            is positive or `seq_idx` decreases.
        BackendError: if `backend` is named explicitly and cannot run here.

    16-bit inputs are summed in float32; Triton rounds operands of products to them. Under autocast `x`, `B` and `C` are
    cast; nothing else is. Differentiable in all floating tensors, the state too; the reference and chunked paths any
    number of times.
    Source: Lahoti, Li, Chen et al. (2026), "Mamba-3".
    """
    given = check_state(initial_state)
    kind = call_kind(
        "trapezoid_ssd", x, log_decay, gamma, beta, theta, B, C, B_bias, C_bias, D, x_rank, seq_idx, *given.values(),
        chunk_size, rotation,
    )  # fmt: skip
    floating = {
        "x": x, "log_decay": log_decay, "gamma": gamma, "beta": beta, "theta": theta, "B": B, "C": C,
        "B_bias": B_bias, "C_bias": C_bias, "D": D, "x_rank": x_rank, **given,
    }  # fmt: skip
    if not known(kind):
        check_floating(allow_complex=False, **floating)
    initial_rows = None if initial_state is None else initial_state.phi.shape[0]
    seq_idx, each = read_packing(x, seq_idx, cu_seqlens, final_states, initial_rows)
    if each:
        assert cu_seqlens is not None  # sequences have states of their own only with it

        def scan(count: Tensor, initial: tuple[Tensor, ...] | None, **rows: Any) -> tuple[Tensor, TrapezoidState]:
            before = None if initial is None else TrapezoidState(*initial)
            shared: dict[str, Any] = {"B_bias": B_bias, "C_bias": C_bias, "D": D, "x_rank": x_rank}
            options: dict[str, Any] = {"rotation": rotation, "chunk_size": chunk_size, "backend": backend}
            y, final = trapezoid_ssd(**rows, initial_state=before, **shared, **options)
            if not y.shape[1]:
                return y, final
            # Key and input of the last real position stand for those of the padding behind it.
            last = (count - 1, torch.arange(count.shape[0], device=count.device))[::-1]
            bias = final.k.new_zeros(()) if B_bias is None else B_bias.to(final.k.dtype).transpose(0, 1)
            return y, _with_last(final, rows["x"][last], rows["B"][last], bias, rotation == "half")

        positions = {"x": x, "log_decay": log_decay, "gamma": gamma, "beta": beta, "theta": theta, "B": B, "C": C}
        y, final = by_segments(scan, positions, initial_state, cu_seqlens, final_states)
        return y, TrapezoidState(*final)
    if not known(kind):
        _check(floating, given, seq_idx, rotation, chunk_size)
        remember(kind)
    check_seq_idx(seq_idx)
    check_log_decays(log_decay=log_decay)
    half = rotation == "half"
    (batch, length, nheads, headdim), (ranks, groups, n) = x.shape, B.shape[2:]
    sizes = {"b": batch, "h": nheads, "p": headdim, "s": theta.shape[2], "r": ranks, "g": groups, "n": n}

    x, B, C = cast_for_autocast(x, B, C)
    dtype = state_dtype(*floating.values())
    if x.numel() == 0 or B.numel() == 0:
        before = zero_state(sizes, x, dtype) if initial_state is None else state_in_dtype(initial_state, dtype)
        skip = torch.zeros(batch, length, ranks, nheads, headdim, dtype=x.dtype, device=x.device)
        return skip, TrapezoidState(*(part.clone() for part in before))
    chosen = choose(backend, x, op="trapezoid_ssd", obstacle=_obstacle(sizes))
    state: TrapezoidState | tuple[None, ...] = (None,) * 4
    if initial_state is not None:
        state = state_in_dtype(initial_state, dtype)
    elif chosen != "triton":
        state = zero_state(sizes, x, dtype)
    log_decay, gamma, beta = (in_dtype(part, dtype) for part in (log_decay, gamma, beta))
    if chosen != "triton":
        theta = in_dtype(theta, dtype)
    parameters = default_parameters(sizes, B_bias, C_bias, D, x_rank, x, dtype)

    def run(*parts: Any) -> tuple[Tensor, ...]:
        x, gamma, beta, theta, B, C, log_decay = parts[:7]
        (phi, ssm, k, v), (B_bias, C_bias, D, factors) = parts[7:11], parts[11:]
        if chosen == "reference":
            state = TrapezoidState(phi, ssm, k, v)
            y, final = trapezoid_ssd_reference(
                x, log_decay, gamma, beta, theta, B, C, state, B_bias, C_bias, D, factors, seq_idx, half
            )
            return y, *final
        entering = ssm if initial_state is None else _with_first(TrapezoidState(phi, ssm, k, v), beta[:, 0], factors)
        if chosen == "triton":
            from .triton_impl import trapezoid_ssd_triton

            return trapezoid_ssd_triton(
                x, log_decay, gamma, beta, theta, B, C, entering, phi, B_bias, C_bias, D,
                None if x_rank is None and ranks == 1 else factors, seq_idx, half,
            )  # fmt: skip
        if initial_state is not None:
            entering = _turned(entering, -phi, half)
        y, ssm, phi = trapezoid_ssd_chunked(
            x, log_decay, gamma, beta, theta, B, C, entering, phi, B_bias, C_bias, D, factors, seq_idx, half,
            chunk_size or max(16, 64 // ranks),
        )  # fmt: skip
        ssm = _turned(ssm, phi, half)
        return y, *_with_last(TrapezoidState(phi, ssm, ssm, x), x[:, -1], B[:, -1], B_bias.transpose(0, 1), half)

    per_position = (x, gamma, beta, theta, B, C)
    if seq_idx is None:
        y, *after = run(*per_position, log_decay, *state, *parameters)
    else:
        y, *after = isolated(
            run, seq_idx, per_position, decays=(log_decay,), first=state, shared=parameters, ends=(-1,) * 4
        )
    return y, TrapezoidState(*after)


def _check(
    floating: dict[str, Any], state: dict[str, Tensor], seq_idx: Tensor | None, rotation: str, chunk_size: int | None
) -> None:
    """Check shapes, devices and options; `state` are the parts of one by name."""
    dims = {
        "x": "b l h p", "log_decay": "b l h", "gamma": "b l h", "beta": "b l h", "theta": "b l s", "B": "b l r g n",
        "C": "b l r g n", "B_bias": "h r n", "C_bias": "h r n", "D": "h", "x_rank": "h r p", "seq_idx": "b l",
    } | dict(zip(state, STATE_SHAPES, strict=False))  # fmt: skip
    given = {**floating, "seq_idx": seq_idx}
    sizes = check_shapes(**{name: (given[name], of_name) for name, of_name in dims.items()})
    check_devices(**given)
    check_rotation(rotation, sizes)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")


def _obstacle(sizes: dict[str, int]) -> str | None:
    """Why Triton cannot take a call, None if it can."""
    if sizes["r"] > 8:
        return f"Triton takes up to 8 ranks, got r={sizes['r']}"
    p, n = sizes["p"], sizes["n"]
    if p > widest(n) or not 2 <= n <= 256:
        return f"Triton takes p up to 128 (64 for n above 128) and n from 2 to 256, got p={p} and n={n}"
    return None


# Dimensions of the parts of a `TrapezoidState`.
STATE_SHAPES = ("b h s", "b h p n", "b r h n", "b h p")


def check_state(state: TrapezoidState | None) -> dict[str, Tensor]:
    """The parts of a state by name; none if it is None.

    Raises:
        TypeError: if it is something else.
    """
    if state is None:
        return {}
    if not isinstance(state, TrapezoidState):
        raise TypeError(f"the state must be a TrapezoidState(phi, ssm, k, v), got {type(state).__name__}.")
    return state._asdict()


def check_rotation(rotation: str, sizes: dict[str, int]) -> bool:
    """Whether pairs are half a state apart; checks the name, the number of pairs and that groups share heads evenly.

    Raises:
        ValueError: if one of them is wrong.
    """
    if rotation not in get_args(Rotation):
        raise ValueError(f"rotation must be 'interleaved' or 'half', got {rotation!r}.")
    if sizes["s"] > sizes["n"] // 2:
        raise ValueError(
            f"`theta` has s={sizes['s']} angles, expected at most {sizes['n'] // 2}, half of n={sizes['n']} (from `B`)."
        )
    check_groups(sizes["h"], sizes["g"])
    return rotation == "half"


def zero_state(sizes: dict[str, int], x: Tensor, dtype: torch.dtype) -> TrapezoidState:
    """The state before anything was read."""
    shapes = ([sizes[letter] for letter in dims.split()] for dims in STATE_SHAPES)
    phi, ssm, k, v = (x.new_zeros(shape, dtype=dtype) for shape in shapes)
    return TrapezoidState(phi, ssm, k, v.to(x.dtype))


def state_in_dtype(state: TrapezoidState, dtype: torch.dtype) -> TrapezoidState:
    """The state with all but the last input in `dtype`."""
    return TrapezoidState(state.phi.to(dtype), state.ssm.to(dtype), state.k.to(dtype), state.v)


def default_parameters(
    sizes: dict[str, int],
    B_bias: Tensor | None,
    C_bias: Tensor | None,
    D: Tensor | None,
    x_rank: Tensor | None,
    x: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Biases, D and x_rank in `dtype`, with zeros and ones for absent ones."""
    nheads, rank = sizes["h"], sizes["r"]
    bias = x.new_zeros(nheads, rank, sizes["n"], dtype=dtype)
    return (
        bias if B_bias is None else B_bias.to(dtype),
        bias if C_bias is None else C_bias.to(dtype),
        x.new_zeros(nheads, dtype=dtype) if D is None else D.to(dtype),
        x.new_ones(nheads, rank, sizes["p"], dtype=dtype) if x_rank is None else x_rank.to(dtype),
    )


def _with_first(state: TrapezoidState, beta: Tensor, x_rank: Tensor) -> Tensor:
    """The matrix state with the first position's share of the last input."""
    v = state.v.to(state.ssm.dtype)[:, None] * x_rank.transpose(0, 1)
    return state.ssm + beta[..., None, None] * (v[..., None] * state.k[..., None, :]).sum(1)


def _turned(ssm: Tensor, phi: Tensor, half: bool) -> Tensor:
    """A matrix state (b, h, p, n) turned by angles (b, h, s)."""
    return rotate(ssm, phi.cos()[:, :, None], phi.sin()[:, :, None], half)


def _with_last(state: TrapezoidState, x: Tensor, B: Tensor, bias: Tensor, half: bool) -> TrapezoidState:
    """The state with the key of the last B, (b, r, g, n), and the last x, (b, h, p)."""
    cos, sin = state.phi.cos(), state.phi.sin()
    keys = B.to(state.phi.dtype).repeat_interleave(x.shape[1] // B.shape[2], dim=2) + bias
    return state._replace(k=rotate(keys, cos[:, None], sin[:, None], half), v=x.clone())
