"""A sequence model: symbols or vectors in, a stack of mixers, logits or vectors out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..kernels import TokenTree
from .blocks import Norm, NormPosition, Stack
from .drafts import StackDraft
from .patterns import Layer
from .states import StackState


class SequenceModel(nn.Module):
    """Embedding (or linear map) -> `Stack` with its final norm -> linear head.

    Args:
        d_model: Width of the stream.
        layers: As for `Stack`.
        vocab_size: Number of symbols; the input then is (b, l) integers. None: the input is (b, l, d_input).
        d_input: Size of input vectors where there is no vocabulary.
        d_output: Size of the output; None: the vocabulary's, or d_input.
        tie_embeddings: The head is the embedding transposed; only with a vocabulary and without `d_output`.
        pad_vocab_multiple: Rows of the embedding are rounded up to a multiple; the further ones are never read, and
            their logits are left out.
        head_bias: Whether the head has a bias.
        init: "default": embedding normal with 0.02, linear maps as they come, what writes to the stream smaller with
            depth. "normal": all linear maps normal with 0.02.
        mixer: As for `Stack`, like all that follow.
        attn_layers: See there.
        mlp: See there.
        mixer_options: See there.
        mlp_hidden: See there.
        norm: See there.
        norm_position: See there.
        eps: See there.
        residual_in_fp32: See there.
        device: Where to create the parameters.
        dtype: Their dtype.

    Raises:
        ValueError: if there is neither vocabulary nor d_input or both, or an option of the stack is wrong.
    """

    def __init__(
        self,
        d_model: int,
        layers: str | int | Sequence[Layer],
        *,
        vocab_size: int | None = None,
        d_input: int | None = None,
        d_output: int | None = None,
        tie_embeddings: bool = True,
        pad_vocab_multiple: int = 8,
        head_bias: bool = False,
        init: Literal["default", "normal"] = "default",
        mixer: str | None = None,
        attn_layers: Sequence[int] = (),
        mlp: bool = False,
        mixer_options: Mapping[str, Any] | None = None,
        mlp_hidden: int | None = None,
        norm: Norm = "rms",
        norm_position: NormPosition = "pre",
        eps: float = 1e-5,
        residual_in_fp32: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if (vocab_size is None) == (d_input is None):
            raise ValueError(f"name one of vocab_size (symbols) and d_input (vectors), got {vocab_size} and {d_input}.")
        if (vocab_size or d_input or 0) < 1 or pad_vocab_multiple < 1:
            raise ValueError(
                f"sizes must be at least 1, got vocab_size={vocab_size}, d_input={d_input}, "
                f"pad_vocab_multiple={pad_vocab_multiple}."
            )
        if init not in ("default", "normal"):
            raise ValueError(f"`init` must be 'default' or 'normal', got {init!r}.")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_model, self.vocab_size = d_model, vocab_size
        self.d_output = d_output or vocab_size or d_input
        self.embedding: nn.Embedding | nn.Linear
        if vocab_size is not None:
            rows = -(-vocab_size // pad_vocab_multiple) * pad_vocab_multiple
            self.embedding = nn.Embedding(rows, d_model, **factory)
            nn.init.normal_(self.embedding.weight, std=0.02)
        else:
            self.embedding = nn.Linear(d_input or 1, d_model, **factory)
        self.stack = Stack(
            d_model,
            layers,
            mixer=mixer,
            attn_layers=attn_layers,
            mlp=mlp,
            mixer_options=mixer_options,
            mlp_hidden=mlp_hidden,
            norm=norm,
            norm_position=norm_position,
            eps=eps,
            residual_in_fp32=residual_in_fp32,
            **factory,
        )
        self.tied = tie_embeddings and isinstance(self.embedding, nn.Embedding) and d_output is None
        width = self.embedding.weight.shape[0] if vocab_size is not None and d_output is None else self.d_output
        self.head = nn.Linear(d_model, int(width or 1), bias=head_bias, **factory)
        if init == "normal":
            for part in self.modules():
                if isinstance(part, nn.Linear):
                    nn.init.normal_(part.weight, std=0.02)
        if self.tied:
            self.head.weight = self.embedding.weight  # type: ignore[assignment]

    @property
    def causal(self) -> bool:
        """Whether every mixer is causal."""
        return self.stack.causal

    def forward(
        self,
        x: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Outputs at all positions.

        Args:
            x: Symbols (b, l) integers, or vectors (b, l, d_input).
            mask: True at real tokens, (b, l).
            seq_idx: Numbers of packed sequences, (b, l).
            inputs_embeds: What the stack takes in, (b, l, d_model), in place of `x`.

        Returns:
            (b, l, vocab_size or d_output).

        Raises:
            ValueError: if symbols lie outside the vocabulary (seen on a CPU), or not exactly one input is given.
        """
        given = {"mask": mask, "seq_idx": seq_idx}
        arguments = {name: value for name, value in given.items() if value is not None}
        return self._head(self.stack(self._embed(x, inputs_embeds), **arguments))

    def prefill(
        self,
        x: Tensor | None = None,
        state: StackState | None = None,
        *,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        reset: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        last_only: bool = False,
    ) -> tuple[Tensor, StackState]:
        """Like `forward`, going on from a state.

        Args:
            x: Symbols (b, l), or vectors (b, l, d_input).
            state: Of the positions before; None: none.
            mask: True at real tokens, (b, l).
            seq_idx: Numbers of packed sequences, (b, l).
            reset: True where the state is dropped first, (b, l).
            inputs_embeds: What the stack takes in, (b, l, d_model), in place of `x`.
            last_only: Return the output at each row's last real token alone, which spares the head the others.

        Returns:
            (b, l, vocab_size or d_output), or (b, ...) with `last_only`; and the state after the last real token.
        """
        y, state = self.stack.prefill(self._embed(x, inputs_embeds), state, mask=mask, seq_idx=seq_idx, reset=reset)
        if last_only:
            y = y[:, -1] if mask is None else y[torch.arange(len(y), device=y.device), _last_real(mask)]
        return self._head(y), state

    def step(self, x: Tensor, state: StackState) -> tuple[Tensor, StackState]:
        """One position: symbols (b,) or vectors (b, d_input) -> (b, vocab_size or d_output)."""
        y, state = self.stack.step(self._embed(x, None), state)
        return self._head(y), state

    def verify(self, x: Tensor, state: StackState, tree: TokenTree) -> tuple[Tensor, StackDraft]:
        """Outputs at the nodes of a tree, (b, l) symbols or (b, l, d_input), see `Stack.verify`."""
        y, draft = self.stack.verify(self._embed(x, None), state, tree)
        return self._head(y), draft

    def init_state(
        self,
        batch: int,
        *,
        slots: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> StackState:
        """State before the first position, see `Stack.init_state`."""
        return self.stack.init_state(batch, slots=slots, device=device, dtype=dtype)

    def _embed(self, x: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if x is None or inputs_embeds is not None:
            if x is not None or inputs_embeds is None:
                raise ValueError("give either `x` or `inputs_embeds`.")
            return inputs_embeds
        if self.vocab_size is None:
            return self.embedding(x)
        if x.device.type == "cpu" and x.numel() and not torch.compiler.is_compiling():
            low, high = int(x.min()), int(x.max())
            if low < 0 or high >= self.vocab_size:
                raise ValueError(
                    f"symbols must lie in 0 to {self.vocab_size - 1}, got {low if low < 0 else high}; "
                    "does the vocabulary belong to this model?"
                )
        return self.embedding(x)

    def _head(self, y: Tensor) -> Tensor:
        return self.head(y.to(self.head.weight.dtype))[..., : self.d_output]


def _last_real(mask: Tensor) -> Tensor:
    """Place of each row's last real token, (b,); the last of all in a row of padding."""
    return mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
