"""What the verbs ask of a model, whichever it is: log-probabilities, embeddings, boundaries, from lists of sequences.

Any `nn.Module` that maps ids (b, l) to logits (b, l, V) of the next id (causal) or of each id (masked) can be used; one
with a method `log_prob(tokens, mask) -> (b, l)` is asked directly.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..ssmcore.chunking import padding_behind
from .sequence import Vocabulary, encode, vocabulary
from .sums import Arriving, Floats, RangeSum, RunningSums

log = logging.getLogger(__name__)

Counts = npt.NDArray[np.int64]
Ranges = Sequence[Sequence[tuple[int, int]]]

BATCH_TOKENS = 65_536
BATCH_TOKENS_ON_GPU = 1_048_576  # enough work for each of the many kernels of a pass; too large a batch is halved
WHOLE = 65_536  # longest sequence that a model with states reads at once
PIECE = 16_384  # positions of a piece of a longer one: memory peaks near a piece, however long the sequence


@runtime_checkable
class LogProbModel(Protocol):
    """A model that scores sequences itself."""

    def log_prob(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """(b, l) natural log-probability of each token given the ones before it; the first has no context."""
        ...


class Stage(NamedTuple):
    """Boundaries of one stage over the bases of one sequence.

    Attributes:
        mask: (l,) bool, where a chunk begins.
        eligible: (l,) bool, where one could begin: for an inner stage the boundaries of the stage outside.
        prob: (l,) float32 probability of a boundary.
        confidence: (l,) float32 probability of what was decided.
    """

    mask: npt.NDArray[np.bool_]
    eligible: npt.NDArray[np.bool_]
    prob: npt.NDArray[np.float32]
    confidence: npt.NDArray[np.float32]


P = ParamSpec("P")
T = TypeVar("T")
Read = Callable[Concatenate["Scorer", Sequence[bytes], P], list[T]]


def _halved(method: Read[P, T]) -> Read[P, T]:
    """A method with one result for each sequence that reads a batch without room on the device as two halves."""

    @functools.wraps(method)
    def read(self: Scorer, sequences: Sequence[bytes], *args: P.args, **kwargs: P.kwargs) -> list[T]:
        try:
            return method(self, sequences, *args, **kwargs)
        except torch.OutOfMemoryError as error:
            if len(sequences) < 2:
                raise
            log.warning("a batch of %d has no room, its halves are read, which is slower: %s", len(sequences), error)
        half = len(sequences) // 2  # outside of `except`, whose error holds on to all that the batch had made
        return read(self, sequences[:half], *args, **kwargs) + read(self, sequences[half:], *args, **kwargs)

    return read


class Scorer:
    """A model ready to score DNA.

    Args:
        model: Network with attributes `vocabulary` (name or `Vocabulary`; "byte" where it has none), `is_causal`
            (True), `strands` ("one" or "equivariant"), `max_length` (None) and `bos` (True: sequences begin with that
            id).
        device: Where it runs; None leaves it where it is.
        dtype: Type of its weights; None leaves it.
        restrict: "acgt" renormalises the probabilities over the four bases; None uses all ids.
        batch_tokens: Most positions of a batch, padding included; a longer sequence makes a batch of its own. None:
            65,536 on a CPU, 1,048,576 on a GPU.
        name: What output headers call it; the model's own name where it is empty.
        share_prefix: Read what several sequences begin with once, where the model has `prefill`. None: on a CPU; a GPU
            has sooner read large batches whole.

    Raises:
        ValueError: for an unknown vocabulary or restriction, or batches of less than a position.

    Attributes:
        continues: Whether the model goes on from a state, so that `sums_after` can be used.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        restrict: str | None = None,
        batch_tokens: int | None = None,
        name: str = "",
        share_prefix: bool | None = None,
    ) -> None:
        if restrict not in (None, "acgt"):
            raise ValueError(f"expected restrict 'acgt' or None, got {restrict!r}")
        if batch_tokens is not None and batch_tokens < 1:
            raise ValueError(f"expected batch_tokens of at least 1, got {batch_tokens}")
        self.model = model.eval()
        if device is not None:
            self.model.to(device)
        if dtype is not None:
            self.model.to(dtype)
        first = next((t for t in (*model.parameters(), *model.buffers())), None)
        self.device = first.device if first is not None else torch.device("cpu")
        self.dtype = str(first.dtype).removeprefix("torch.") if first is not None else "float32"
        self.vocabulary: Vocabulary = vocabulary(getattr(model, "vocabulary", "byte"))
        self.is_causal = bool(getattr(model, "is_causal", True))
        self.strands = str(getattr(model, "strands", "one"))
        self.max_length: int | None = getattr(model, "max_length", None)
        self.bos = bool(getattr(model, "bos", True)) and self.is_causal
        default = BATCH_TOKENS if self.device.type == "cpu" else BATCH_TOKENS_ON_GPU
        self.restrict, self.batch_tokens = restrict, default if batch_tokens is None else batch_tokens
        self.name = name or str(getattr(model, "name", type(model).__name__))
        parameters = inspect.signature(model.forward).parameters
        self._takes_mask = "mask" in parameters
        self._own = isinstance(model, LogProbModel)
        self._states = self.is_causal and hasattr(model, "prefill") and not (self._own and not restrict)
        share_prefix = self.device.type == "cpu" if share_prefix is None else share_prefix
        self.continues = self._states and self.bos and share_prefix
        prefill = inspect.signature(model.prefill).parameters if self._states else {}  # type: ignore[arg-type]
        self._last: dict[str, Any] = {"with_state": False} if "with_state" in prefill else {}
        self._bases = torch.as_tensor(self.vocabulary.bases, device=self.device)

    def digest(self) -> str:
        """SHA-256 of names and values of all weights."""
        total = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            total.update(
                tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
            )
        return total.hexdigest()

    def batches(self, sequences: Sequence[bytes]) -> list[list[int]]:
        """Indices of sequences in batches of at most `batch_tokens` positions, similar lengths together."""
        order = sorted(range(len(sequences)), key=lambda k: (-len(sequences[k]), k))
        found: list[list[int]] = []
        for k in order:
            width = len(sequences[found[-1][0]]) if found else 0
            if found and (len(found[-1]) + 1) * (width + 1) <= self.batch_tokens:
                found[-1].append(k)
            else:
                found.append([k])
        return found

    def tokens(self, sequences: Sequence[bytes], *, bos: bool = False) -> tuple[Tensor, Tensor]:
        """Ids (b, l) int64 and mask (b, l) bool of sequences, padded on the right, on the model's device."""
        ids, counts = self._encode(sequences, bos=bos)
        return self._put(ids).long(), self._mask(counts, ids.shape[1])

    def _encode(self, sequences: Sequence[bytes], *, bos: bool = False) -> tuple[npt.NDArray[np.uint8], Counts]:
        """Ids (b, l), padded on the right, and how many of each row are none, (b,)."""
        counts = np.array([len(sequence) for sequence in sequences], np.int64)
        width = int(counts.max())
        ids = np.empty((len(sequences), width + bos), np.uint8)
        ids[:, :bos] = self.vocabulary.bos
        text = b"".join(sequence.ljust(width) for sequence in sequences)
        ids[:, bos:] = encode(text, self.vocabulary).reshape(len(sequences), width)
        if counts.min() < width:
            ids[:, bos:][np.arange(width) >= counts[:, None]] = self.vocabulary.pad
        return ids, counts + bos

    def _put(self, values: npt.NDArray[Any]) -> Tensor:
        """An array on the model's device, without a wait for what that still has to do."""
        tensor = torch.from_numpy(values)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _mask(self, counts: Counts, width: int) -> Tensor:
        return padding_behind(self._put(counts), width)

    def logits(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(b, l, V) log-probabilities in float32 that the model gives at each position."""
        out: Any = self.model(tokens, mask=mask) if self._takes_mask else self.model(tokens)
        out = getattr(out, "logits", out)
        return self._log_softmax(out[0] if isinstance(out, tuple) else out)

    def _log_softmax(self, logits: Tensor) -> Tensor:
        if self.restrict:
            kept = torch.full_like(logits, float("-inf"), dtype=torch.float32)
            kept[..., self._bases] = logits[..., self._bases].float()
            logits = kept
        return logits.log_softmax(dim=-1, dtype=torch.float32)

    @_halved
    @torch.inference_mode()
    def log_probs(self, sequences: Sequence[bytes]) -> list[Floats]:
        """Log-probability of every base given those before it, for one batch of sequences.

        Args:
            sequences: Upper-case bases; taken as one batch, see `batches`.

        Returns:
            For each sequence (l,) float64 in nats; NaN where nothing is scored: letters other than A, C, G, T, and the
            first base of a model that is not told where a sequence begins.

        Raises:
            ValueError: if the model is not causal.
        """
        found, ids = self._whole(sequences)
        values = found.double().cpu().numpy()
        scored = self.vocabulary.is_base[ids]
        result = []
        for row, sequence in enumerate(sequences):
            scores = np.full(len(sequence), np.nan)
            skip = ids.shape[1] - values.shape[1]
            scores[skip:] = values[row, : max(len(sequence) - skip, 0)]
            scores[~scored[row, : len(sequence)]] = np.nan
            result.append(scores)
        return result

    @torch.inference_mode()
    def sums(self, sequences: Sequence[bytes], ranges: Ranges) -> Callable[[], list[list[RangeSum]]]:
        """Begin to sum the log-probabilities that `log_probs` gives over ranges of bases.

        Args:
            sequences: Upper-case bases; one batch.
            ranges: For each sequence pairs (start, end) of positions.

        Returns:
            What waits for the device and gives the sums of each sequence. Between the two calls another batch can be
            begun, so that the device always has work.

        Raises:
            ValueError: if the model is not causal.
        """
        found, ids = self._whole(sequences)
        coming = Arriving(found)

        def finish() -> list[list[RangeSum]]:
            running = RunningSums(coming.numpy(), self.vocabulary.is_base[ids])
            return [[running.between(row, *span) for span in spans] for row, spans in enumerate(ranges)]

        return finish

    @torch.inference_mode()
    def sums_after(
        self, prefixes: Sequence[bytes], rests: Sequence[tuple[int, bytes]], ranges: Ranges
    ) -> Callable[[], list[list[RangeSum]]]:
        """Like `sums` of sequences that begin alike: each prefix is read once, and its rests go on from there.

        Args:
            prefixes: Upper-case bases; may be empty.
            rests: Number of the prefix, and the bases after it, at least one.
            ranges: For each rest pairs (start, end) of positions, counted from the prefix's first base.
        """
        first, counts = self._encode(prefixes, bos=True)
        before, after, state = self._read(self._put(first).long(), counts)
        parents = np.array([parent for parent, _ in rests])
        second, length = self._encode([rest for _, rest in rests])
        index, tokens = self._put(parents), self._put(second).long()
        found = after[index].gather(-1, tokens[:, :1])
        if tokens.shape[1] > 1:
            # A rest's last base is a target alone: what comes after it is not asked.
            following, _, _ = self._read(tokens, length - 1, state.select(index), with_state=False)
            found = torch.cat([found, following], dim=1)
        coming = Arriving(before), Arriving(found)

        def finish() -> list[list[RangeSum]]:
            is_base = self.vocabulary.is_base
            shared = RunningSums(coming[0].numpy(), is_base[first[:, 1:]])
            own = RunningSums(coming[1].numpy(), is_base[second])
            result: list[list[RangeSum]] = []
            for row, (parent, spans) in enumerate(zip(parents, ranges)):
                here = int(counts[parent]) - 1
                result.append([])
                for start, end in spans:
                    early = shared.between(parent, min(start, here), min(end, here))
                    late = own.between(row, max(start - here, 0), max(end - here, 0))
                    result[-1].append(RangeSum(early.nats + late.nats, early.scored + late.scored))
            return result

        return finish

    def _whole(self, sequences: Sequence[bytes]) -> tuple[Tensor, npt.NDArray[np.uint8]]:
        """Log-probabilities (b, k) of the last k bases of each row, given those before, and the ids (b, l) of all."""
        if not self.is_causal:
            raise ValueError(f"{self.name} is a masked model, which gives no likelihood of a sequence")
        own = self._own and not self.restrict
        ids, counts = self._encode(sequences, bos=self.bos and not own)
        tokens = self._put(ids).long()
        if own:
            return self.model.log_prob(tokens, self._mask(counts, ids.shape[1])), ids  # type: ignore[operator]
        if self._states and ids.shape[1] > WHOLE:
            found, _, _ = self._read(tokens, counts, with_state=False)
        else:
            mask = self._mask(np.minimum(counts, ids.shape[1] - 1), ids.shape[1] - 1)
            found = self.logits(tokens[:, :-1], mask).gather(-1, tokens[:, 1:, None])[..., 0]
        return found, ids[:, 1:] if self.bos else ids

    def _read(
        self, tokens: Tensor, counts: Counts, state: Any = None, *, with_state: bool = True
    ) -> tuple[Tensor, Tensor, Any]:
        """Go on from a state over the first `counts` (b,) of tokens (b, l), in pieces.

        Returns:
            (b, l - 1) log-probability of each token but the first, (b, V) log-probabilities after the last counted
            token, and the state there. The last column is read where it is counted.
        """
        found: list[Tensor] = []
        after: Tensor | None = None
        total = int(counts.max(initial=0))
        for start in range(0, total, PIECE):
            width = min(PIECE, total - start)
            own = np.clip(counts - start, 0, width)
            mask = None if (own == width).all() else self._mask(own, width)
            options = self._last if not with_state and start + width == total else {}
            piece = tokens[:, start : start + width]
            logits, state = self.model.prefill(piece, state, mask=mask, **options)  # type: ignore[operator]
            log_p = self._log_softmax(logits)
            asked = tokens[:, start + 1 : start + width + 1, None]
            found.append(log_p[:, : asked.shape[1]].gather(-1, asked)[..., 0])
            place = self._put(np.maximum(own - 1, 0))[:, None, None].expand(-1, 1, log_p.shape[-1])
            last = log_p.gather(1, place)[:, 0]
            after = last if after is None else torch.where(self._put(own > 0)[:, None], last, after)
        empty = torch.zeros(len(tokens), 0, device=tokens.device)
        return torch.cat([empty, *found], dim=1), empty if after is None else after, state

    @torch.inference_mode()
    def masked_log_probs(self, sequences: Sequence[bytes], places: Sequence[Sequence[int]]) -> list[Floats]:
        """Log-probabilities of the four bases at places that are masked together.

        Args:
            sequences: Upper-case bases; one batch.
            places: For each sequence the 0-based positions to mask.

        Returns:
            For each sequence (number of places, 4) float64, columns A, C, G, T.
        """
        tokens, mask = self.tokens(sequences)
        for row, where in enumerate(places):
            tokens[row, torch.as_tensor(where, device=tokens.device)] = self.vocabulary.mask
        logits = self.logits(tokens, mask)[..., self._bases]
        return [logits[row, list(where)].double().cpu().numpy() for row, where in enumerate(places)]

    @torch.inference_mode()
    def embeddings(self, sequences: Sequence[bytes], layer: str | None = None) -> list[npt.NDArray[np.float32]]:
        """(l, d) embeddings of every base, for one batch; a chunk's stands at all its bases. The start id is left out.

        Args:
            sequences: Upper-case bases; one batch.
            layer: One of the model's `layers()`; None takes the last.

        Raises:
            ValueError: if the model gives none, or none of that name.
        """
        found = []
        for sequence, (values, start) in zip(sequences, self.chunks(sequences, layer)):
            place = np.searchsorted(start, np.arange(len(sequence)), side="right") - 1
            found.append(values[np.maximum(place, 0)])
        return found

    @_halved
    @torch.inference_mode()
    def chunks(
        self, sequences: Sequence[bytes], layer: str | None = None
    ) -> list[tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]]:
        """For each sequence the vectors (m, d) of a layer and the base (m,) where each begins; one batch.

        The vector of the start id is left out, unless it is a chunk that reaches into the sequence: that begins at -1.
        """
        self.check_layer(layer)
        tokens, mask = self.tokens(sequences, bos=self.bos)
        name = layer or self.model.layers()[-1]  # type: ignore[operator]
        x, start, real = self.model.layer(tokens, name, mask=mask)  # type: ignore[operator]
        values, places, known = x.float().cpu().numpy(), start.cpu().numpy() - self.bos, real.cpu().numpy()
        result = []
        for row in range(len(sequences)):
            kept = known[row].copy()
            alone = len(places[row]) > 1 and places[row, 1] == 0
            if self.bos and (alone or kept.sum() == 1 == len(sequences[row])):
                kept[0] = False
            result.append((values[row][kept], places[row][kept]))
        return result

    def check_layer(self, layer: str | None) -> None:
        """Refuse what `embeddings` cannot give.

        Raises:
            ValueError: if the model gives none, or none of that name.
        """
        if not hasattr(self.model, "layers"):
            raise ValueError(f"{self.name} gives no embeddings")
        names = self.model.layers()  # type: ignore[operator]
        if layer is not None and layer not in names:
            raise ValueError(f"{self.name} has no layer {layer!r}; it has {', '.join(names)}")

    @torch.inference_mode()
    def boundaries(self, sequences: Sequence[bytes]) -> list[list[Stage]]:
        """For each sequence and stage of a hierarchical model where chunks begin, stage 0 first; one batch.

        Raises:
            ValueError: if the model has no stages.
        """
        if not hasattr(self.model, "boundaries"):
            raise ValueError(f"{self.name} has no chunk boundaries")
        tokens, mask = self.tokens(sequences, bos=self.bos)
        found = self.model.boundaries(tokens, mask=mask)  # type: ignore[operator]
        stages = [[t.cpu().numpy() for t in (s.mask, s.eligible, s.prob, s.confidence)] for s in found]
        return [
            [Stage(*(values[row, self.bos : self.bos + len(sequence)] for values in stage)) for stage in stages]
            for row, sequence in enumerate(sequences)
        ]
