"""Looking into mixers: their matrices on given inputs, how far tokens reach each other, and pictures of both.

    found = mixing_matrices(stack, x)                       one `MixingMatrix` per layer that has one
    draw_matrix(found[0].matrix[0], "layer 0").savefig("layer0.png")
    reach = token_jacobian(mixer, x)                        any mixer, linear in its input or not
    block_ranks(found[0].matrix);  token_norms(stack, x);  retrieval_probe(stack, vectors, pairs=8)

Ali, Zimerman & Wolf (2024), "The Hidden Attention of Mamba Models", for the matrices.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .blocks import Stack
from .mixers.common import MixingMatrix

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@torch.no_grad()
def mixing_matrices(stack: Stack, x: Tensor) -> dict[int, MixingMatrix]:
    """The matrix of each layer on what reaches it when the stack runs on x.

    Args:
        stack: Any `Stack`.
        x: Input, (b, l, d).

    Returns:
        By number of the layer; layers whose mixer has no matrix are left out.
    """
    inputs: dict[int, Tensor] = {}

    def keep(index: int) -> Any:
        def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            inputs[index] = arguments[0]

        return hook

    hooks = [block.mixer.register_forward_pre_hook(keep(index)) for index, block in enumerate(stack.blocks)]  # type: ignore[union-attr]
    try:
        stack(x)
    finally:
        for hook in hooks:
            hook.remove()
    mixers: list[Any] = [block.mixer for block in stack.blocks]
    return {
        index: mixers[index].mixing_matrix(seen)
        for index, seen in sorted(inputs.items())
        if getattr(mixers[index], "linear_in_x", False)
    }


def token_jacobian(mixer: nn.Module, x: Tensor, *, probes: int | None = None, seed: int = 0) -> Tensor:
    """How strongly each output depends on each input: the Frobenius norm of dy_t / dx_s, (b, l, l) with t first.

    Args:
        mixer: Any module (b, l, d) -> (b, l, e) whose rows do not see each other.
        x: Where to look, (b, l, d).
        probes: Estimate from so many random directions per position, l * probes backward passes instead of l * e; the
            square is estimated without bias, with a relative standard deviation of about sqrt(2 / probes) at most.
        seed: Of the directions.

    Raises:
        ValueError: if `probes` is below 1.
    """
    if probes is not None and probes < 1:
        raise ValueError(f"`probes` must be at least 1, got {probes}.")
    x = x.detach().requires_grad_()
    y = mixer(x)
    length, width = y.shape[1:]
    if probes is None:
        directions = torch.eye(width, dtype=y.dtype, device=y.device)
    else:
        directions = torch.randn(probes, width, generator=torch.Generator().manual_seed(seed)).to(y)
    rows = []
    for t in range(length):
        total = torch.zeros(x.shape[:2], dtype=y.dtype, device=y.device)
        for direction in directions:
            (dx,) = torch.autograd.grad((y[:, t] * direction).sum(), x, retain_graph=True)
            total = total + dx.square().sum(-1)
        rows.append((total / (probes or 1)).sqrt())
    return torch.stack(rows, dim=1)


def span_rank(matrix: Tensor, *, tolerance: float = 1e-6) -> Tensor:
    """Dimension of the space that the heads' matrices span: how many of them are no combination of others.

    Args:
        matrix: (b, h, l, l).
        tolerance: Singular values below this share of the largest count as zero.

    Returns:
        (b,) integers up to h.
    """
    values = torch.linalg.svdvals(matrix.flatten(2))
    return (values > tolerance * values[:, :1]).sum(-1)


def block_ranks(matrix: Tensor, *, upper: bool = False, tolerance: float = 1e-6) -> Tensor:
    """Rank of every off-diagonal block of mixing matrices: how many numbers the past hands to the future.

        rank of M[k:, :k],    or of M[:k, k:] with `upper`,    for k = 1 .. l - 1

    For a matrix from a state of n numbers per channel (`ssd` and all that is made of it) none exceeds n; softmax has no
    such limit.

    Args:
        matrix: (..., l, l), float64 for reliable ranks.
        upper: Blocks above the diagonal, of mixers that look ahead.
        tolerance: Singular values below this share of a block's largest count as zero.

    Returns:
        (..., l - 1) integers.

    Raises:
        ValueError: if the matrices are not square.

    Dao & Gu (2024), "Transformers are SSMs", section 3.2: such matrices are semiseparable.
    """
    if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"`matrix` must be (..., l, l), got shape {tuple(matrix.shape)}.")
    ranks = []
    for cut in range(1, matrix.shape[-1]):
        block = matrix[..., :cut, cut:] if upper else matrix[..., cut:, :cut]
        values = torch.linalg.svdvals(block)
        ranks.append((values > tolerance * values[..., :1]).sum(-1))
    empty = torch.zeros(*matrix.shape[:-2], 0, dtype=torch.int64, device=matrix.device)
    return torch.stack(ranks, dim=-1) if ranks else empty


@torch.no_grad()
def token_norms(stack: Stack, x: Tensor, **arguments: Any) -> Tensor:
    """Length of each token's vector in the residual stream as it passes through the layers.

    Args:
        stack: Any `Stack`; of a `SequenceModel` its `stack`, on its embeddings.
        x: Input, (b, l, d).
        **arguments: For the mixers, such as `mask`.

    Returns:
        (layers + 1, b, l): of the input, and after each layer. Whether lengths shrink or grow with depth tells the
        regimes of Vo et al. (2024), "Demystifying the Token Dynamics of Deep Selective State Space Models", apart.
    """
    return torch.stack([torch.linalg.vector_norm(one, dim=-1) for one in _streams(stack, x, arguments)])


class Recall(NamedTuple):
    """Sequences of pairs, and one key whose value is asked.

    Attributes:
        ids: key, value, key, value, ..., key: (b, 2 pairs + 1) int64, keys from 0 on and values behind them.
        answer: The value that stood behind the last key, (b,).
    """

    ids: Tensor
    answer: Tensor


def key_value_recall(
    rows: int, pairs: int, *, keys: int = 32, values: int = 32, generator: torch.Generator | None = None
) -> Recall:
    """Draw a recall task: what stood behind this key?

    Args:
        rows: b.
        pairs: Pairs of a row, whose keys differ.
        keys: Symbols 0 to keys - 1.
        values: Symbols keys to keys + values - 1.
        generator: Source of random numbers.

    Raises:
        ValueError: if there are fewer keys than pairs, or a size is below 1.

    Arora et al. (2024), "Zoology" (associative recall).
    """
    if min(rows, pairs, values) < 1 or keys < pairs:
        raise ValueError(
            "expected at least one row, pair and value, and as many keys as pairs, "
            f"got rows={rows}, pairs={pairs}, values={values} and keys={keys}."
        )
    chosen = torch.rand(rows, keys, generator=generator).argsort(1)[:, :pairs]
    stored = keys + torch.randint(values, (rows, pairs), generator=generator)
    asked = torch.randint(pairs, (rows, 1), generator=generator)
    ids = torch.stack([chosen, stored], dim=-1).flatten(1)
    return Recall(torch.cat([ids, chosen.gather(1, asked)], dim=1), stored.gather(1, asked)[:, 0])


def linear_probe(features: Tensor, labels: Tensor, *, train_share: float = 0.5, ridge: float = 1e-3) -> float:
    """How well a linear map reads labels from features: its accuracy on rows it was not fitted to.

    Args:
        features: (b, d).
        labels: (b,) integers.
        train_share: Share of the rows, the first ones, that the map is fitted to (ridge regression on indicators).
        ridge: Penalty, as a share of the mean variance of the features.

    Returns:
        Accuracy on the other rows.

    Raises:
        ValueError: if a part has no rows, or the numbers of rows differ.
    """
    fitted = int(train_share * len(features))
    if len(features) != len(labels) or not 0 < fitted < len(features):
        raise ValueError(
            f"expected as many labels as features and rows in both parts, got {len(labels)} labels, {len(features)} "
            f"features and train_share={train_share}."
        )
    x = features.double()
    x = x - x[:fitted].mean(0)
    x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    targets = torch.nn.functional.one_hot(labels - labels.min()).double()
    gram = x[:fitted].mT @ x[:fitted]
    penalty = ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    weight = torch.linalg.solve(gram + penalty, x[:fitted].mT @ targets[:fitted])
    guess = (x[fitted:] @ weight).argmax(-1) + labels.min()
    return float((guess == labels[fitted:]).double().mean())


@torch.no_grad()
def retrieval_probe(
    stack: Stack, embedding: Tensor, pairs: int, *, keys: int = 32, rows: int = 2000, seed: int = 0
) -> list[float]:
    """After which layer the stream at the last position holds the value that a key asks for.

    Args:
        stack: Causal, or seeing both directions.
        embedding: Vectors of keys and values, (n, d); the first `keys` are keys, the others values.
        pairs: Pairs of a sequence, see `key_value_recall`.
        keys: How many are keys.
        rows: Sequences; half of them fit the probe.
        seed: Of the sequences.

    Returns:
        Accuracy of a linear probe on the stream before the first layer, and after each of them.

    Raises:
        ValueError: if there are no values, or fewer keys than pairs.
    """
    task = key_value_recall(
        rows, pairs, keys=keys, values=len(embedding) - keys, generator=torch.Generator().manual_seed(seed)
    )
    x = embedding[task.ids.to(embedding.device)]
    labels = task.answer.to(embedding.device)
    return [linear_probe(stream[:, -1], labels) for stream in _streams(stack, x, {})]


def _streams(stack: Stack, x: Tensor, arguments: dict[str, Any]) -> list[Tensor]:
    """The residual stream before the first layer and after each one, (b, l, d)."""
    found = [x]
    handles = [
        block.register_forward_hook(lambda _, __, y: found.append(y[0] if isinstance(y, tuple) else y))
        for block in stack.blocks
    ]
    try:
        stack(x, **arguments)
    finally:
        for handle in handles:
            handle.remove()
    return found


def draw_matrix(matrix: Tensor, title: str = "", *, heads: int = 8, floor: float = 1e-4) -> Figure:
    """Picture of a layer's matrices: one panel per head, rows are outputs, colours the logarithm of the magnitude.

    Args:
        matrix: (h, l, l) or (l, l).
        title: Above the panels.
        heads: Largest number of panels; the first heads are shown.
        floor: Magnitudes below this share of the largest are drawn like zero.

    Returns:
        A matplotlib figure; `figure.savefig(path)` writes it.

    Raises:
        ValueError: if the matrix has another number of dimensions.
        ImportError: if matplotlib is not installed.
    """
    if matrix.dim() not in (2, 3) or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"`matrix` must be (h, l, l) or (l, l), got shape {tuple(matrix.shape)}.")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'omnissm[plot]'.") from error
    panels = (matrix if matrix.dim() == 3 else matrix[None]).detach().abs().double().cpu()[:heads]
    columns = min(len(panels), 4)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(2.6 * columns, 2.6 * rows + 0.4), layout="constrained")
    for index, panel in enumerate(panels):
        largest = panel.max().clamp(min=torch.finfo(panel.dtype).tiny)
        axes = figure.add_subplot(rows, columns, index + 1)
        shades = (panel / largest).clamp(min=floor).log10()
        picture = axes.imshow(shades.numpy(), vmin=math.log10(floor), vmax=0, cmap="viridis")
        axes.set(title=f"head {index}" if len(panels) > 1 else "", xlabel="input s", ylabel="output t")
    figure.colorbar(picture, ax=figure.axes, label="log10 of magnitude / largest")
    figure.suptitle(title)
    return figure


__all__ = [
    "Recall",
    "block_ranks",
    "draw_matrix",
    "key_value_recall",
    "linear_probe",
    "mixing_matrices",
    "retrieval_probe",
    "span_rank",
    "token_jacobian",
    "token_norms",
]
