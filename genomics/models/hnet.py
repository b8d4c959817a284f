"""H-Net: a language model that learns where to cut its bytes, of any depth; without stages a plain stack.

    logits = lm_head(backbone(embedding(ids))),    backbone a `Hierarchy`

Hwang, Wang & Gu (2025), "Dynamic Chunking for End-to-End Hierarchical Sequence Modeling"; for DNA: Shah et al. (2026),
"dnaHNet". Sizes with the vocabulary of 256 bytes:

| name | layout | widths | parameters |
| --- | --- | --- | --- |
| hnet_tiny | m1 (T1m1) m1 | 64, 96 | 234,869 |
| dnahnet_debug | m2 (T2) m2 | 128, 192 | 1,436,848 |
| dnahnet_small | m4 (T1m4 (T6) m4T1) m4 | 256, 384, 512 | 34,596,448 |
| dnahnet_base | m4 (T1m4 (T12) m4T1) m4 | 512, 768, 1024 | 215,030,976 |
| hnet_hg38_t15 | m3T1 (T15) m4 | 512 | 64,488,016 |
| hnet_hg38_m15 | m3T1 (M15) m4 | 512 | 65,706,016 |
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ssmcore import Stack, account
from ...ssmcore.chunking import Boundaries, Hierarchy, Layout, Stage, stage_multipliers
from ..sequence import vocabulary as read_vocabulary

Mode = Literal["train", "prefill", "decode"]

LETTERS = {"m": "mamba2", "t": "attention"}

_SSM = {"chunk_size": 256, "d_conv": 4, "d_state": 128, "expand": 2}
_ATTENTION = ("num_heads", "rotary_emb_dim", "window_size", "num_kv_heads")


class StageBoundaries(NamedTuple):
    """Boundaries of one stage in coordinates of the input.

    Attributes:
        mask: Where a chunk begins, (b, l) bool.
        eligible: Where one could begin: real positions, in inner stages those where the stage outside began a chunk.
        prob: Probability of a boundary, (b, l) float32; 0 where none could be.
        confidence: Probability of what was decided, (b, l) float32; 0 where nothing was.
    """

    mask: Tensor
    eligible: Tensor
    prob: Tensor
    confidence: Tensor


class Layer(NamedTuple):
    """What a layer says about the positions or chunks that it works on.

    Attributes:
        x: (b, m, d).
        start: Position of the input where each chunk begins, (b, m) int64.
        mask: Which of them are real, (b, m) bool.
    """

    x: Tensor
    start: Tensor
    mask: Tensor


class HNet(nn.Module):
    """Embedding, hierarchy and head.

    Args:
        arch_layout: Nested list of patterns: [encoder, inner, decoder] is a stage, [pattern] the innermost stack. A
            pattern is letters with counts: m Mamba-2, t attention, upper case with an MLP.
        d_model: Width of each stage, outermost first; must not decrease.
        d_intermediate: Inner width of the MLPs of each stage, rounded up to a multiple of 128; None: 8/3 of the width.
        vocab_size: Number of ids; None: those of the vocabulary.
        ssm_cfg: Options of Mamba-2: d_conv, d_state, expand; chunk_size never changes results and is not used.
        attn_cfg: Options of attention, a list each with one entry per stage: num_heads, rotary_emb_dim, window_size
            (keys before the query that it sees; -1 is all) and num_kv_heads.
        tie_embeddings: Use the embedding as head.
        target_ratios: Elements per chunk aimed at, one per stage; None: 3 for each.
        ratio_weight: Weight of the loss on the rates of boundaries.
        router_fp32: Compute boundaries in float32, see `Router`.
        vocabulary: Name of the vocabulary of the ids.
        layout: How chunks of a batch lie, see `Hierarchy`.
        dropout: Share of what mixers and MLPs add to the stream that is dropped in training.
        device: Where to create the parameters.
        dtype: Their dtype.

    Raises:
        ValueError: if the layout, a pattern, or the number of entries of a list is wrong.
        TypeError: for unknown keys of `ssm_cfg` and `attn_cfg`.

    Attributes:
        is_causal, strands, max_length: What the verbs need to know about a model.
    """

    is_causal = True
    strands = "one"
    max_length: int | None = None
    family = "hnet"

    def __init__(
        self,
        arch_layout: Sequence[Any],
        d_model: Sequence[int],
        d_intermediate: Sequence[int | None] | None = None,
        *,
        vocab_size: int | None = None,
        ssm_cfg: Mapping[str, Any] | None = None,
        attn_cfg: Mapping[str, Any] | None = None,
        tie_embeddings: bool = False,
        target_ratios: Sequence[float] | None = None,
        ratio_weight: float = 0.02,
        router_fp32: bool = True,
        vocabulary: str = "byte",
        layout: Layout = "padded",
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"`dropout` is a share from 0 to below 1, got {dropout}.")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        depth = check_layout(arch_layout)
        ssm = _known("ssm_cfg", ssm_cfg, tuple(_SSM))
        attention = _known("attn_cfg", attn_cfg, _ATTENTION)
        inner = [None] * (depth + 1) if d_intermediate is None else list(d_intermediate)
        targets = [3.0] * depth if target_ratios is None else [float(n) for n in target_ratios]
        lists: dict[str, Sequence[Any]] = {"d_model": d_model, "d_intermediate": inner, **attention}
        for name, values in lists.items():
            if len(values) != depth + 1:
                raise ValueError(f"`{name}` needs {depth + 1} entries, one per stage of the layout, got {len(values)}.")
        if len(targets) != depth:
            raise ValueError(f"`target_ratios` needs {depth} entries, one per stage that cuts, got {len(targets)}.")
        words = read_vocabulary(vocabulary)
        vocab_size = words.size if vocab_size is None else vocab_size
        if vocab_size < words.size:
            raise ValueError(f"vocabulary {vocabulary!r} has {words.size} ids, got vocab_size={vocab_size}.")
        self.config: dict[str, Any] = {
            "arch_layout": _plain(arch_layout),
            "d_model": list(d_model),
            "d_intermediate": inner,
            "vocab_size": vocab_size,
            "ssm_cfg": _SSM | ssm,
            "attn_cfg": {name: list(values) for name, values in attention.items()},
            "tie_embeddings": tie_embeddings,
            "target_ratios": targets,
            "ratio_weight": ratio_weight,
            "router_fp32": router_fp32,
            "vocabulary": vocabulary,
            "layout": layout,
            "dropout": dropout,
        }
        self.vocabulary = vocabulary
        self.vocab_size = vocab_size
        self.d_model = d_model[0]
        self.target_ratios = targets
        self.ratio_weight = ratio_weight
        self.embeddings = nn.Embedding(vocab_size, self.d_model, **factory)
        stages, part = [], arch_layout
        for s in range(depth):
            encoder, part, decoder = part[0], part[1], part[2]
            stages.append(Stage(d_model[s], self._stack(encoder, s, factory), self._stack(decoder, s, factory)))
        innermost = self._stack(part[0], depth, factory)
        self.backbone = Hierarchy(stages, innermost, d_innermost=d_model[-1], layout=layout, **factory)
        for level in self.backbone.levels()[:depth]:
            level.routing_module.fp32 = router_fp32
        self.lm_head = nn.Linear(self.d_model, vocab_size, bias=False, **factory)
        if tie_embeddings:
            self.lm_head.weight = self.embeddings.weight
        self.reset_parameters()

    def _stack(self, pattern: str, stage: int, factory: dict[str, Any]) -> Stack:
        width, hidden = self.config["d_model"][stage], self.config["d_intermediate"][stage]
        attention = {name: values[stage] for name, values in self.config["attn_cfg"].items()}
        stack = build_stack(
            pattern, width, mlp_hidden=hidden, ssm_cfg=self.config["ssm_cfg"], attn_cfg=attention, **factory
        )
        if self.config["dropout"]:
            hook = _Dropout(self.config["dropout"])
            for name, branch in stack.named_modules():
                if re.fullmatch(r"blocks\.\d+\.(mixer|mlp)", name):
                    branch.register_forward_hook(hook)
        return stack

    def reset_parameters(self) -> None:
        """Initial values of the paper: embedding normal(1), head and linear maps normal(0.02), see `Hierarchy`."""
        self.backbone.reset_parameters()
        nn.init.normal_(self.lm_head.weight, std=0.02)
        if not self.config["tie_embeddings"]:
            nn.init.normal_(self.embeddings.weight)

    def no_decay_names(self) -> tuple[str, ...]:
        """Parameters that weight decay must leave alone."""
        return ("embeddings.weight",)

    def forward(self, tokens: Tensor, *, mask: Tensor | None = None, seq_idx: Tensor | None = None) -> Tensor:
        """Logits of the next id.

        Args:
            tokens: Ids, (b, l).
            mask: True at real positions, (b, l); contiguous in each row.
            seq_idx: Which packed sequence a position belongs to, (b, l) integers.

        Returns:
            (b, l, vocab_size); what stands at position t is about the id at t + 1.
        """
        return self.logits(self.hidden(tokens, mask=mask, seq_idx=seq_idx)[0])

    def logits(self, hidden: Tensor) -> Tensor:
        """The head, (..., d_model) to (..., vocab_size)."""
        return self.lm_head(hidden.to(self.lm_head.weight.dtype))

    def hidden(
        self, tokens: Tensor, *, mask: Tensor | None = None, seq_idx: Tensor | None = None
    ) -> tuple[Tensor, list[Boundaries]]:
        """What the head reads, (b, l, d_model), and the boundaries of each stage."""
        return self.backbone(self.embeddings(tokens), mask=mask, seq_idx=seq_idx)

    def prefill(
        self,
        tokens: Tensor,
        state: Any = None,
        *,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        with_state: bool = True,
    ) -> tuple[Tensor, Any]:
        """Logits (b, l, vocab_size) and the state after the last real position; any cut gives the same values.

        Without `with_state` the state is None, and causal stacks take less work where padding stands behind.
        """
        options: dict[str, Any] = {"mask": mask, "seq_idx": seq_idx, "with_state": with_state}
        y, state, _ = self.backbone.prefill(self.embeddings(tokens), state, **options)
        return self.logits(y), state

    def step(self, tokens: Tensor, state: Any, *, dense: bool = False) -> tuple[Tensor, Any]:
        """Logits (b, vocab_size) after one more id per row, (b,); `dense` as in `Hierarchy.step`."""
        y, state, _ = self.backbone.step(self.embeddings(tokens), state, dense=dense)
        return self.logits(y), state

    def init_state(
        self,
        batch: int,
        *,
        slots: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Any:
        """State before the first position, see `Hierarchy.init_state`."""
        weight = self.embeddings.weight
        options: dict[str, Any] = {"device": device or weight.device, "dtype": dtype or weight.dtype}
        return self.backbone.init_state(batch, slots=slots, **options)

    @torch.no_grad()
    def boundaries(
        self, tokens: Tensor, *, mask: Tensor | None = None, seq_idx: Tensor | None = None
    ) -> list[StageBoundaries]:
        """Boundaries of every stage at positions of the input (b, l); none for a model without stages."""
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        return to_input(self.hidden(tokens, mask=mask, seq_idx=seq_idx)[1], real)

    def layers(self) -> list[str]:
        """Names for `layer`: "embedding", "stage0.encoder", ..., "inner", ..., "stage0.decoder"."""
        depth = self.backbone.n_stages
        outside = [f"stage{s}.encoder" for s in range(depth)]
        return ["embedding", *outside, "inner", *(f"stage{s}.decoder" for s in reversed(range(depth)))]

    def layer(self, tokens: Tensor, name: str, *, mask: Tensor | None = None) -> Layer:
        """What one layer makes of the sequences.

        Args:
            tokens: Ids, (b, l).
            name: One of `layers()`; the last one is what the head reads.
            mask: True at real positions, (b, l).

        Raises:
            ValueError: for an unknown name.
        """
        names = self.layers()
        if name not in names:
            raise ValueError(f"unknown layer {name!r}; this model has {', '.join(names)}.")
        if self.backbone.layout != "padded":
            raise ValueError(f"layers are read in the layout 'padded', this model has {self.backbone.layout!r}.")
        module: Any = self.embeddings
        stage = 0
        if name != "embedding":
            stage = self.backbone.n_stages if name == "inner" else int(name[5 : name.index(".")])
            level = self.backbone.levels()[stage]
            module = level.main_network if name == "inner" else getattr(level, name.partition(".")[2])
        seen: list[Tensor] = []
        handle = module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        try:
            _, found = self.hidden(tokens, mask=mask)
        finally:
            handle.remove()
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        start = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        for boundaries in found[:stage]:
            start, real = first_to_front(start, boundaries.mask)
        return Layer(seen[0], start, real)

    def flops(self, length: int, *, rates: Sequence[float] | None = None, mode: Mode = "prefill") -> int:
        """Multiplications and additions for one sequence, as `omnissm.ssmcore.account` counts them.

        Args:
            length: Bases.
            rates: Share of positions that begin a chunk, of each stage; None: those aimed at.
            mode: "train" (three times the forward pass), "prefill", or "decode": one more base behind `length` others,
                inner stages weighted by how often they are reached.

        Raises:
            ValueError: if there is not one rate per stage.
        """
        rates = [1 / n for n in self.target_ratios] if rates is None else list(rates)
        if len(rates) != len(self.target_ratios):
            raise ValueError(f"{len(self.target_ratios)} stages need as many rates, got {len(rates)}.")
        total, share = self._linear_flops(self.lm_head, length, mode), 1.0
        for level, rate in zip(self.backbone.levels(), [*rates, 1.0]):
            positions = max(1, round(length * share))
            if level.n_stages:
                parts = [level.encoder, level.decoder]
                for linear in (level.residual_proj, *level.routing_module.children()):
                    total += self._reached(self._linear_flops(linear, positions, mode), share, mode)
            else:
                parts = [level.main_network]
            flops: int = sum(account(part, positions, mode=mode).flops for part in parts)
            total += self._reached(flops, share, mode)
            share *= rate
        return total

    @staticmethod
    def _linear_flops(linear: Any, positions: int, mode: Mode) -> int:
        return 2 * linear.weight.numel() * {"train": 3 * positions, "prefill": positions, "decode": 1}[mode]

    @staticmethod
    def _reached(flops: int, share: float, mode: Mode) -> int:
        return round(flops * share) if mode == "decode" else flops

    def stage_of(self, name: str) -> int:
        """Stage of a parameter by its name; embedding and head belong to stage 0, the innermost stack is the last."""
        return min(name.count("main_network."), self.backbone.n_stages)

    def lr_multipliers(self) -> list[float]:
        """Learning rates of the stages as multiples of a base rate, see `stage_multipliers`."""
        return stage_multipliers(self.backbone.widths, self.target_ratios)


class _Dropout:
    """Forward hook that drops part of a branch's output in training; names of weights stay those of published files."""

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return F.dropout(output, self.share, module.training)


def check_layout(layout: Any, path: str = "arch_layout") -> int:
    """Number of stages of a nested layout.

    Raises:
        ValueError: if a list has another length than 1 or 3, or something else than a pattern stands in it; the message
            names the place.
    """
    if isinstance(layout, str) or not isinstance(layout, Sequence) or len(layout) not in (1, 3):
        got = repr(layout) if isinstance(layout, str) or not isinstance(layout, Sequence) else f"{len(layout)} entries"
        raise ValueError(f"{path} must be [pattern] or [encoder, inner, decoder], got {got}.")
    for index in (0,) if len(layout) == 1 else (0, 2):
        pattern = layout[index]
        if not isinstance(pattern, str) or not re.fullmatch(r"([mMtT]\d+)+", pattern):
            raise ValueError(
                f"{path}[{index}] must be a pattern of m, M, t, T with counts such as 'T1m4', got {pattern!r}."
            )
    return 0 if len(layout) == 1 else 1 + check_layout(layout[1], f"{path}[1]")


def build_stack(
    pattern: str,
    d_model: int,
    *,
    mlp_hidden: int | None = None,
    ssm_cfg: Mapping[str, Any],
    attn_cfg: Mapping[str, Any],
    **factory: Any,
) -> Stack:
    """Stack from an official pattern and official options of one stage."""
    options: dict[str, dict[str, Any]] = {
        "mamba2": {name: ssm_cfg[name] for name in ("d_conv", "d_state", "expand") if name in ssm_cfg},
        "attention": {},
    }
    entries: list[dict[str, Any]] = []
    for letter, count in re.findall(r"([mMtT])(\d+)", pattern):
        mixer = LETTERS[letter.lower()]
        if mixer == "attention" and not options[mixer]:
            options[mixer] = attention_options(attn_cfg)
        entries += [{"mixer": mixer, "mlp": letter.isupper(), **options[mixer]}] * int(count)
    hidden = 128 * -(-mlp_hidden // 128) if mlp_hidden else None
    return Stack(d_model, entries, mlp_hidden=hidden, **factory)


def attention_options(attn_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `Attention` from official ones.

    Raises:
        ValueError: if the number of heads is missing.
    """
    if "num_heads" not in attn_cfg:
        raise ValueError("layers of attention (t, T) need attn_cfg with num_heads, a list with one entry per stage.")
    window = attn_cfg.get("window_size", -1)
    return {
        "nheads": attn_cfg["num_heads"],
        "kv_heads": attn_cfg.get("num_kv_heads"),
        "rotary_dim": attn_cfg.get("rotary_emb_dim", 0),
        "window": None if window < 0 else window,
    }


def to_input(found: Sequence[Boundaries], real: Tensor) -> list[StageBoundaries]:
    """Boundaries of the stages, in the padded layout, at positions of the input.

    Args:
        found: Of each stage, outermost first.
        real: Real positions of the input, (b, l).
    """
    stages: list[StageBoundaries] = []
    eligible = real
    for boundaries in found:
        # The k-th element of a stage stands where the k-th position is eligible.
        place = (eligible.cumsum(1) - 1).clamp(min=0)
        if not stages:
            place = torch.arange(real.shape[1], device=real.device).expand_as(real)
        mask = boundaries.mask.gather(1, place) & eligible
        prob, confidence = (
            (values.gather(1, place) * eligible).float() for values in (boundaries.prob, boundaries.confidence)
        )
        stages.append(StageBoundaries(mask, eligible, prob, confidence))
        eligible = mask
    return stages


def first_to_front(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Values (b, l) where `mask` is True, in order at the front of rows of the largest count, and which are real."""
    counts = mask.sum(1)
    most = int(counts.max())
    order = (~mask).int().argsort(dim=1, stable=True)[:, :most]
    return values.gather(1, order), torch.arange(most, device=mask.device) < counts[:, None]


def _known(name: str, given: Mapping[str, Any] | None, known: Sequence[str]) -> dict[str, Any]:
    for key in given or {}:
        if key not in known:
            raise TypeError(f"`{name}` has no entry {key!r}; it takes {', '.join(known)}.")
    return dict(given or {})


def _plain(layout: Sequence[Any]) -> list[Any]:
    return [entry if isinstance(entry, str) else _plain(entry) for entry in layout]


def hnet_tiny(**overrides: Any) -> HNet:
    """One stage, 64 and 96 wide: for tests and for scoring on a laptop."""
    return _preset(
        overrides,
        arch_layout=["m1", ["T1m1"], "m1"],
        d_model=[64, 96],
        d_intermediate=[None, 128],
        ssm_cfg={"d_state": 16},
        attn_cfg={"num_heads": [2, 2], "rotary_emb_dim": [16, 16], "window_size": [7, -1]},
        target_ratios=[3.0],
    )


def dnahnet_debug(**overrides: Any) -> HNet:
    """One stage, 128 and 192 wide: trains on a CPU."""
    return _preset(
        overrides,
        arch_layout=["m2", ["T2"], "m2"],
        d_model=[128, 192],
        d_intermediate=[None, 512],
        ssm_cfg={"d_state": 32},
        attn_cfg={"num_heads": [4, 4], "rotary_emb_dim": [32, 32], "window_size": [1023, -1]},
        target_ratios=[3.0],
    )


def dnahnet_small(**overrides: Any) -> HNet:
    """Two stages, 256, 384 and 512 wide, targets 3 and 2."""
    return _preset(
        overrides,
        arch_layout=["m4", ["T1m4", ["T6"], "m4T1"], "m4"],
        d_model=[256, 384, 512],
        d_intermediate=[None, 1024, 1408],
        ssm_cfg={"d_state": 64},
        attn_cfg={"num_heads": [4, 6, 8], "rotary_emb_dim": [32, 32, 32], "window_size": [1023, 1023, -1]},
        target_ratios=[3.0, 2.0],
    )


def dnahnet_base(**overrides: Any) -> HNet:
    """Two stages, 512, 768 and 1024 wide, targets 3 and 2."""
    return _preset(
        overrides,
        arch_layout=["m4", ["T1m4", ["T12"], "m4T1"], "m4"],
        d_model=[512, 768, 1024],
        d_intermediate=[None, 2048, 2816],
        ssm_cfg={"d_state": 128},
        attn_cfg={"num_heads": [8, 12, 16], "rotary_emb_dim": [32, 32, 32], "window_size": [1023, 1023, -1]},
        target_ratios=[3.0, 2.0],
    )


def hnet_hg38_t15(**overrides: Any) -> HNet:
    """The published model of the human genome with a Transformer inside."""
    return _hg38(overrides, "T15", 1408)


def hnet_hg38_m15(**overrides: Any) -> HNet:
    """The published model of the human genome with Mamba-2 inside."""
    return _hg38(overrides, "M15", 1024)


def _hg38(overrides: dict[str, Any], inner: str, hidden: int) -> HNet:
    return _preset(
        overrides,
        arch_layout=["m3T1", [inner], "m4"],
        d_model=[512, 512],
        d_intermediate=[1408, hidden],
        ssm_cfg={"d_state": 128},
        attn_cfg={"num_heads": [8, 8], "rotary_emb_dim": [32, 32], "window_size": [1023, -1]},
        target_ratios=[3.0],
    )


def _preset(overrides: dict[str, Any], **defaults: Any) -> HNet:
    return HNet(**(defaults | overrides))
