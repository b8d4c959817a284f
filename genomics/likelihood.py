"""What the verbs ask of a model, whichever it is: log-probabilities, embeddings, boundaries, from lists of sequences.

Any `nn.Module` that maps ids (b, l) to logits (b, l, V) of the next id (causal) or of each id (masked) can be used; one
with a method `log_prob(tokens, mask) -> (b, l)` is asked directly.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from .sequence import Vocabulary, encode, vocabulary

Floats = npt.NDArray[np.float64]
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


class Scorer:
    """A model ready to score DNA.

    Args:
        model: Network with attributes `vocabulary` (name or `Vocabulary`; "byte" where it has none), `is_causal`
            (True), `strands` ("one" or "equivariant"), `max_length` (None) and `bos` (True: sequences begin with that
            id).
        device: Where it runs; None leaves it where it is.
        dtype: Type of its weights; None leaves it.
        restrict: "acgt" renormalises the probabilities over the four bases; None uses all ids.
        batch_tokens: Most positions of a batch, padding included; a longer sequence makes a batch of its own.
        name: What output headers call it; the model's own name where it is empty.
        share_prefix: Read what several sequences begin with once, where the model has `prefill`.

    Raises:
        ValueError: for an unknown vocabulary or restriction.

    Attributes:
        continues: Whether the model goes on from a state, so that `log_probs_after` can be used.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        restrict: str | None = None,
        batch_tokens: int = 65_536,
        name: str = "",
        share_prefix: bool = True,
    ) -> None:
        if restrict not in (None, "acgt"):
            raise ValueError(f"expected restrict 'acgt' or None, got {restrict!r}")
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
        self.restrict, self.batch_tokens = restrict, batch_tokens
        self.name = name or str(getattr(model, "name", type(model).__name__))
        parameters = inspect.signature(model.forward).parameters
        self._takes_mask = "mask" in parameters
        self._own = isinstance(model, LogProbModel)
        self._states = self.is_causal and hasattr(model, "prefill") and not (self._own and not restrict)
        self.continues = self._states and self.bos and share_prefix

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
        length = max(len(sequence) for sequence in sequences) + bos
        ids = np.full((len(sequences), length), self.vocabulary.pad, np.int64)
        mask = np.zeros((len(sequences), length), bool)
        for row, sequence in enumerate(sequences):
            ids[row, :bos] = self.vocabulary.bos
            ids[row, bos : bos + len(sequence)] = encode(sequence, self.vocabulary)
            mask[row, : bos + len(sequence)] = True
        return torch.from_numpy(ids).to(self.device), torch.from_numpy(mask).to(self.device)

    def logits(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(b, l, V) log-probabilities in float32 that the model gives at each position."""
        out: Any = self.model(tokens, mask=mask) if self._takes_mask else self.model(tokens)
        out = getattr(out, "logits", out)
        return self._log_softmax(out[0] if isinstance(out, tuple) else out)

    def _log_softmax(self, logits: Tensor) -> Tensor:
        out = logits.float()
        if self.restrict:
            bases = torch.as_tensor(self.vocabulary.bases, device=out.device)
            kept = torch.full_like(out, float("-inf"))
            kept[..., bases] = out[..., bases]
            out = kept
        return out.log_softmax(dim=-1)

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
        if not self.is_causal:
            raise ValueError(f"{self.name} is a masked model, which gives no likelihood of a sequence")
        skip = 0
        if self._own and not self.restrict:
            tokens, mask = self.tokens(sequences)
            found = self.model.log_prob(tokens, mask)  # type: ignore[operator]
        else:
            tokens, mask = self.tokens(sequences, bos=self.bos)
            if self._states and tokens.shape[1] > WHOLE:
                found, _, _ = self._read(tokens, mask)
            else:
                found = self.logits(tokens[:, :-1], mask[:, :-1]).gather(-1, tokens[:, 1:, None])[..., 0]
            skip = 0 if self.bos else 1
        values = found.double().cpu().numpy()
        result = []
        for row, sequence in enumerate(sequences):
            scores = np.full(len(sequence), np.nan)
            scores[skip:] = values[row, : len(sequence) - skip]
            result.append(self._of_bases(sequence, scores))
        return result

    @torch.inference_mode()
    def log_probs_after(self, prefixes: Sequence[bytes], rests: Sequence[tuple[int, bytes]]) -> list[Floats]:
        """Like `log_probs` of sequences that begin alike: each prefix is read once, and its rests go on from there.

        Args:
            prefixes: Upper-case bases; may be empty.
            rests: Number of the prefix, and the bases after it, at least one.

        Returns:
            For each rest (l,) float64 in nats, of prefix and rest together; NaN where nothing is scored.
        """
        tokens, mask = self.tokens(prefixes, bos=True)
        before, after, state = self._read(tokens, mask)
        parents = torch.tensor([parent for parent, _ in rests], device=self.device)
        tokens, mask = self.tokens([rest for _, rest in rests])
        found = after[parents].gather(-1, tokens[:, :1])
        if tokens.shape[1] > 1:
            # A rest's last base is a target alone: what comes after it is not asked.
            following, _, _ = self._read(tokens, torch.nn.functional.pad(mask[:, 1:], (0, 1)), state.select(parents))
            found = torch.cat([found, following], dim=1)
        first, second = before.double().cpu().numpy(), found.double().cpu().numpy()
        result = []
        for row, (parent, rest) in enumerate(rests):
            sequence = prefixes[parent] + rest
            scores = np.concatenate([first[parent, : len(prefixes[parent])], second[row, : len(rest)]])
            result.append(self._of_bases(sequence, scores))
        return result

    def _read(self, tokens: Tensor, mask: Tensor, state: Any = None) -> tuple[Tensor, Tensor, Any]:
        """Go on from a state over tokens (b, l), in pieces.

        Returns:
            (b, l - 1) log-probability of each token but the first, (b, V) log-probabilities after the last real token,
            and the state there. The last column is read where the mask has it.
        """
        found: list[Tensor] = []
        after: Tensor | None = None
        for start in range(0, tokens.shape[1], PIECE):
            piece, real = tokens[:, start : start + PIECE], mask[:, start : start + PIECE]
            counts = real.sum(1)
            width = int(counts.max())
            if not width:
                break
            whole = bool((counts == width).all())
            logits, state = self.model.prefill(  # type: ignore[operator]
                piece[:, :width], state, mask=None if whole else real[:, :width]
            )
            log_p = self._log_softmax(logits)
            asked = tokens[:, start + 1 : start + width + 1, None]
            found.append(log_p[:, : asked.shape[1]].gather(-1, asked)[..., 0])
            last = log_p[torch.arange(len(piece), device=piece.device), (counts - 1).clamp(min=0)]
            after = last if after is None else torch.where(counts[:, None] > 0, last, after)
        empty = torch.zeros(len(tokens), 0, device=tokens.device)
        return torch.cat([empty, *found], dim=1), empty if after is None else after, state

    def _of_bases(self, sequence: bytes, scores: Floats) -> Floats:
        scores[~self.vocabulary.is_base[encode(sequence, self.vocabulary)]] = np.nan
        return scores

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
        logits = self.logits(tokens, mask)[..., torch.as_tensor(self.vocabulary.bases, device=tokens.device)]
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
