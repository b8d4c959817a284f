"""Configurations and names of the published families, for `checkpoints`: read into options of our models, and back."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .blocks import Residual
from .masked_model import MaskedModel
from .mixers import Attention, Hydra, Mamba, Mamba2, Mamba3
from .sequence_model import SequenceModel

# Entries of configurations that say how to train, run or decode, and nothing of the weights.
_IRRELEVANT = re.compile(
    r"^(_.*|architectures|torch_dtype|dtype|transformers_version|model_type|use_cache|.*_token_id|initializer_.*|"
    r"rescale_prenorm_residual|return_dict|output_.*|use_mambapy|use_associative_scan|fused_add_norm|"
    r"time_step_(scale|min|max|init_scheme|floor)|chunk_size_feed_forward|id2label|label2id|is_encoder_decoder|"
    r"problem_type|name_or_path|intermediate_size|norm_before_gate|rms_norm_fused)$"
)


@dataclass(frozen=True)
class Family:
    """One published layout.

    Attributes:
        names: Pairs (ours, theirs) of name patterns with `{}` for a number, tried in order; what is behind stays.
        read: Their configuration and further options to arguments of our model.
        write: Our model to their configuration.
        masked: Whether the model is a `MaskedModel`.
        ignored: Pattern of their names that are no weights of ours.
        prefix: Pattern of what wrappers put in front of their names.
    """

    names: Sequence[tuple[str, str]]
    read: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]
    write: Callable[[Any], dict[str, Any]]
    masked: bool = False
    ignored: str = r"(?!)"
    prefix: str = ""

    def ours(self, name: str) -> str:
        """Our name of one of theirs; as it is if it has none."""
        return _renamed(re.sub(f"^{self.prefix}", "", name), [(theirs, ours) for ours, theirs in self.names])

    def theirs(self, name: str) -> str:
        """Their name of one of ours."""
        return _renamed(name, self.names)


def _renamed(name: str, pairs: Sequence[tuple[str, str]]) -> str:
    for old, new in pairs:
        found = re.match(re.escape(old).replace(r"\{\}", r"(\d+)") + r"(.*)$", name)
        if found:
            *numbers, rest = found.groups()
            return new.format(*numbers) + rest
    return name


def _entry(config: Mapping[str, Any], name: str) -> Any:
    if name not in config:
        raise ValueError(f"the configuration lacks `{name}`.")
    return config[name]


def _refuse_unknown(config: Mapping[str, Any], known: set[str], what: str) -> None:
    unknown = sorted(key for key in config if key not in known and not _IRRELEVANT.match(key))
    if unknown:
        raise ValueError(
            f"{what} has entries of unknown meaning: {', '.join(unknown)}; known: {', '.join(sorted(known))}."
        )


def _mixer_of(model: SequenceModel | MaskedModel, kinds: tuple[type[nn.Module], ...], family: str) -> Any:
    """The first mixer, after a look at all."""
    for index, block in enumerate(model.stack.blocks):
        if not isinstance(block.mixer, kinds) or (isinstance(block, Residual) and block.mlp is not None):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(
                f"family {family!r} holds {names} layers without MLP, layer {index} is a {type(block.mixer).__name__}"
                f"{' with MLP' if block.mlp is not None else ''}."
            )
    return model.stack.blocks[0].mixer


def _expand(mixer: Any) -> float | int:
    return _whole(mixer.d_inner / mixer.d_model)


def _whole(number: float) -> float | int:
    return int(number) if number == int(number) else number


# state-spaces/mamba

_STATE_SPACES_TOP = {
    "d_model", "n_layer", "d_intermediate", "vocab_size", "ssm_cfg", "attn_layer_idx", "attn_cfg", "rms_norm",
    "residual_in_fp32", "pad_vocab_size_multiple", "tie_embeddings", "norm_epsilon",
}  # fmt: skip
_COMMON_SSM = ("d_state", "expand", "dt_min", "dt_max", "dt_init_floor")
_SSM: dict[str, tuple[str, tuple[str, ...]]] = {
    "Mamba1": ("mamba", (*_COMMON_SSM, "d_conv", "dt_rank", "dt_init", "dt_scale", "conv_bias", "bias")),
    "Mamba2": (
        "mamba2",
        (*_COMMON_SSM, "d_conv", "conv_init", "headdim", "d_ssm", "ngroups", "A_init_range", "D_has_hdim", "rmsnorm",
         "norm_before_gate", "dt_limit", "bias", "conv_bias", "chunk_size", "learnable_init_states"),
    ),
    "Mamba3": (
        "mamba3",
        (*_COMMON_SSM, "headdim", "ngroups", "rope_fraction", "A_floor", "chunk_size", "a_activation", "rotation"),
    ),
}  # fmt: skip
_NO_WEIGHTS = {"layer", "use_fast_path", "use_mem_eff_path", "process_group", "sequence_parallel", "dropout"}


def _read_state_spaces(config: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    _refuse_unknown(config, _STATE_SPACES_TOP, "the configuration")
    ssm = {**(config.get("ssm_cfg") or {}), **options}
    kind = ssm.get("layer", "Mamba1")
    if kind not in _SSM:
        raise ValueError(f"`ssm_cfg.layer` must be one of {', '.join(_SSM)}, got {kind!r}.")
    mixer, known = _SSM[kind]
    chosen = {key: value for key, value in ssm.items() if key in known}
    if chosen.get("dt_rank") == "auto":
        del chosen["dt_rank"]
    rest = set(ssm) - set(known) - _NO_WEIGHTS
    if kind == "Mamba3":
        if ssm.get("is_mimo"):
            chosen["rank"] = ssm.get("mimo_rank", 4)
        chosen["outproj_norm"] = bool(ssm.get("is_outproj_norm", False))
        rest -= {"is_mimo", "mimo_rank", "is_outproj_norm"}
        if "a_activation" not in ssm:
            raise ValueError(
                "Mamba-3 checkpoints are of two kinds, which nothing in them tells apart: pass "
                "options={'a_activation': 'heavy_tail'}, or 'softplus' for those made before the change."
            )
    if rest:
        raise ValueError(f"`ssm_cfg` has entries of unknown meaning: {', '.join(sorted(rest))}.")
    width = _entry(config, "d_model")
    hidden = config.get("d_intermediate") or 0
    attention = _read_attention(config.get("attn_cfg") or {})
    layers: list[dict[str, Any]] = []
    for index in range(_entry(config, "n_layer")):
        own = {"mixer": "attention", **attention} if index in (config.get("attn_layer_idx") or ()) else None
        layers.append({**(own or {"mixer": mixer, **chosen}), "mlp": hidden > 0})
    return {
        "d_model": width,
        "layers": layers,
        "vocab_size": _entry(config, "vocab_size"),
        "pad_vocab_multiple": config.get("pad_vocab_size_multiple", 8),
        "tie_embeddings": config.get("tie_embeddings", True),
        "mlp_hidden": 128 * -(-hidden // 128) or None,
        "norm": "rms" if config.get("rms_norm", True) else "layer",
        "eps": config.get("norm_epsilon", 1e-5),
        "residual_in_fp32": config.get("residual_in_fp32", True),
    }


_ATTENTION = {
    "num_heads": "nheads", "num_heads_kv": "kv_heads", "head_dim": "headdim", "qkv_proj_bias": "qkv_bias",
    "out_proj_bias": "out_bias", "softmax_scale": "scale", "causal": "causal", "d_conv": "d_conv",
    "rotary_emb_base": "rotary_base", "rotary_emb_dim": "rotary_dim",
}  # fmt: skip


def _read_attention(config: Mapping[str, Any]) -> dict[str, Any]:
    _refuse_unknown(config, {*_ATTENTION, "mlp_dim", "rotary_emb_interleaved"}, "`attn_cfg`")
    defaults = {"qkv_proj_bias": True, "out_proj_bias": True, "causal": False}
    options = {_ATTENTION[key]: value for key, value in {**defaults, **config}.items() if key in _ATTENTION}
    # The published layer rounds the width of its MLP slice up.
    options["mlp_dim"] = math.ceil(config.get("mlp_dim", 0) / 256) * 256
    options["rotation"] = "interleaved" if config.get("rotary_emb_interleaved") else "half"
    return options


def _write_state_spaces(model: SequenceModel) -> dict[str, Any]:
    blocks: list[Any] = list(model.stack.blocks)
    attention = [index for index, block in enumerate(blocks) if isinstance(block.mixer, Attention)]
    others = [block.mixer for index, block in enumerate(blocks) if index not in attention]
    kinds = {type(mixer) for mixer in others}
    if len(kinds) != 1 or (not kinds <= {Mamba, Mamba2, Mamba3}):
        names = ", ".join(sorted(kind.__name__ for kind in kinds)) or "none"
        raise ValueError(f"family 'state_spaces' holds one of Mamba, Mamba2 and Mamba3 beside attention, got {names}.")
    with_mlp = {block.mlp is not None for block in blocks}
    if len(with_mlp) != 1 or model.stack.blocks[0].norm_position != "pre":
        raise ValueError("family 'state_spaces' has norms in front, and an MLP in all layers or in none.")
    embedding: Any = model.embedding
    rows, vocabulary = embedding.weight.shape[0], model.vocab_size or 0
    multiple = next((m for m in (1, 8, 16) if -(-vocabulary // m) * m == rows), rows)
    return {
        "d_model": model.d_model,
        "d_intermediate": blocks[0].mlp.fc2.in_features if True in with_mlp else 0,
        "n_layer": len(blocks),
        "vocab_size": vocabulary,
        "ssm_cfg": _write_ssm(others[0]),
        "attn_layer_idx": attention,
        "attn_cfg": _write_attention(blocks[attention[0]].mixer) if attention else {},
        "rms_norm": not isinstance(blocks[0].norm, nn.LayerNorm),
        "norm_epsilon": blocks[0].norm.eps,
        "residual_in_fp32": blocks[0].residual_in_fp32,
        "pad_vocab_size_multiple": multiple,
        "tie_embeddings": model.tied,
    }


def _write_ssm(mixer: Any) -> dict[str, Any]:
    config: dict[str, Any] = {"d_state": mixer.d_state, "expand": _expand(mixer)}
    if isinstance(mixer, Mamba3):
        config |= {"layer": "Mamba3", "headdim": mixer.headdim, "ngroups": mixer.ngroups, "A_floor": mixer.A_floor}
        config |= {"rope_fraction": 2 * mixer.angles / mixer.d_state, "is_outproj_norm": mixer.norm is not None}
        config |= {"is_mimo": mixer.rank > 1, "mimo_rank": mixer.rank, "a_activation": mixer.a_activation}
        return config | {"rotation": mixer.rotation}
    config |= {"d_conv": mixer.conv1d.kernel_size[0], "conv_bias": mixer.conv1d.bias is not None}
    config["bias"] = mixer.in_proj.bias is not None
    if not isinstance(mixer, Mamba2):
        return config | {"layer": "Mamba1", "dt_rank": mixer.dt_rank}
    if mixer.mup_vector is not None or (mixer.in_multiplier, mixer.out_multiplier) != (1, 1):
        raise ValueError("family 'state_spaces' has no multipliers; the model's Mamba2 layers have some.")
    config |= {"layer": "Mamba2", "headdim": mixer.headdim, "ngroups": mixer.ngroups, "d_ssm": mixer.d_ssm}
    config |= {"D_has_hdim": mixer.D.shape[0] != mixer.nheads, "rmsnorm": mixer.norm is not None}
    config |= {"norm_before_gate": mixer.norm is not None and mixer.norm.norm_before_gate}
    config |= {"learnable_init_states": "init_states" in dict(mixer.named_parameters())}
    return config | ({} if mixer.dt_limit == (0.0, math.inf) else {"dt_limit": list(mixer.dt_limit)})


def _write_attention(mixer: Attention) -> dict[str, Any]:
    if mixer.window != (None, 0 if mixer.causal else None) or mixer.mlp_dim % 256:
        raise ValueError("family 'state_spaces' has no windows, and MLP slices of multiples of 256 alone.")
    return {
        "num_heads": mixer.nheads,
        "num_heads_kv": mixer.kv_heads,
        "head_dim": mixer.headdim,
        "qkv_proj_bias": mixer.in_proj.bias is not None,
        "out_proj_bias": mixer.out_proj.bias is not None,
        "softmax_scale": mixer.scale,
        "causal": mixer.causal,
        "d_conv": mixer.d_conv,
        "rotary_emb_base": mixer.rotary_base,
        "rotary_emb_dim": mixer.rotary_dim,
        "rotary_emb_interleaved": mixer.rotation == "interleaved",
        "mlp_dim": mixer.mlp_dim,
    }


# transformers

_HF_MAMBA = {
    "vocab_size", "hidden_size", "state_size", "num_hidden_layers", "layer_norm_epsilon", "expand", "conv_kernel",
    "use_bias", "use_conv_bias", "hidden_act", "residual_in_fp32", "time_step_rank", "tie_word_embeddings",
}  # fmt: skip
# Left over from the configuration that an exported checkpoint had before; they say again what others say.
_HF_REPEATED = {"d_model", "d_inner", "n_layer", "rms_norm", "ssm_cfg", "pad_vocab_size_multiple"}
_HF_MAMBA2 = _HF_MAMBA | {"num_heads", "head_dim", "n_groups", "time_step_limit", "chunk_size"}


def _read_hf(kind: str) -> Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]:
    second, falcon = kind == "mamba2", kind == "falcon_mamba"

    def read(config: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        known = _HF_MAMBA2 if second else _HF_MAMBA | ({"mixer_rms_eps"} if falcon else set())
        _refuse_unknown(config, known | _HF_REPEATED, "the configuration")
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"`hidden_act` must be 'silu', got {config['hidden_act']!r}.")
        width, depth = _entry(config, "hidden_size"), _entry(config, "num_hidden_layers")
        expand = config.get("expand", 2)
        if not second and "intermediate_size" in config:  # what these are built with, whatever `expand` says
            expand = _whole(config["intermediate_size"] / width)
        repeated = {"d_model": width, "d_inner": int(expand * width), "n_layer": depth, "rms_norm": True, "ssm_cfg": {}}
        for name, value in repeated.items():
            if config.get(name, value) != value:
                raise ValueError(f"`{name}` must be {value!r} as the other entries say, got {config[name]!r}.")
        eps = config.get("layer_norm_epsilon", 1e-5)
        chosen: dict[str, Any] = {
            "d_state": config.get("state_size", 128 if second else 16),
            "d_conv": config.get("conv_kernel", 4),
            "expand": expand,
            "bias": config.get("use_bias", False),
            "conv_bias": config.get("use_conv_bias", True),
        }
        if second:
            limit = [float(_number(value)) for value in config.get("time_step_limit", (0.0, math.inf))]
            chosen |= {"headdim": config.get("head_dim", 64), "ngroups": config.get("n_groups", 8), "norm_eps": eps}
            chosen |= {"dt_limit": limit, "chunk_size": config.get("chunk_size")}
        else:
            rank = config.get("time_step_rank", "auto")
            chosen["dt_rank"] = None if rank == "auto" else rank
        if falcon:
            chosen |= {"use_bcdt_rms": True, "bcdt_eps": config.get("mixer_rms_eps", 1e-6)}
        return {
            "d_model": width,
            "layers": depth,
            "mixer": "mamba2" if second else "mamba",
            "mixer_options": {**chosen, **options},
            "vocab_size": _entry(config, "vocab_size"),
            "pad_vocab_multiple": 1,
            "tie_embeddings": config.get("tie_word_embeddings", not second),
            "eps": eps,
            "residual_in_fp32": config.get("residual_in_fp32", True),
        }

    return read


def _number(value: Any) -> Any:
    """A number of JSON, in which infinity may be spelled {"__float__": "Infinity"}."""
    return value["__float__"] if isinstance(value, Mapping) else value


def _write_hf(kind: str) -> Callable[[SequenceModel], dict[str, Any]]:
    second, falcon = kind == "mamba2", kind == "falcon_mamba"

    def write(model: SequenceModel) -> dict[str, Any]:
        mixer = _mixer_of(model, (Mamba2,) if second else (Mamba,), f"hf_{kind}")
        embedding: Any = model.embedding
        block: Any = model.stack.blocks[0]
        if isinstance(block.norm, nn.LayerNorm) or block.norm_position != "pre":
            raise ValueError(f"family 'hf_{kind}' has RMS norms in front of its layers.")
        config = {
            "model_type": kind,
            "architectures": [
                {"mamba": "Mamba", "mamba2": "Mamba2", "falcon_mamba": "FalconMamba"}[kind] + "ForCausalLM"
            ],
            "vocab_size": embedding.weight.shape[0],
            "hidden_size": model.d_model,
            "state_size": mixer.d_state,
            "num_hidden_layers": len(model.stack.blocks),
            "layer_norm_epsilon": block.norm.eps,
            "expand": _expand(mixer),
            "conv_kernel": mixer.conv1d.kernel_size[0],
            "use_bias": mixer.in_proj.bias is not None,
            "use_conv_bias": mixer.conv1d.bias is not None,
            "residual_in_fp32": block.residual_in_fp32,
            "tie_word_embeddings": model.tied,
        }
        if not second:
            if mixer.use_bcdt_rms != falcon:
                raise ValueError(
                    f"norms on B, C and dt are of 'hf_falcon_mamba' and of no other family, not 'hf_{kind}'."
                )
            return config | {"time_step_rank": mixer.dt_rank} | ({"mixer_rms_eps": mixer.bcdt_eps} if falcon else {})
        plain = mixer.norm is not None and not mixer.norm.norm_before_gate and mixer.D.shape[0] == mixer.nheads
        if not plain or mixer.d_ssm != mixer.d_inner or mixer.mup_vector is not None:
            raise ValueError(
                "family 'hf_mamba2' has the gate before the norm, one D per head, no d_ssm, no multipliers."
            )
        config |= {"num_heads": mixer.nheads, "head_dim": mixer.headdim, "n_groups": mixer.ngroups}
        return config | {"time_step_limit": list(mixer.dt_limit), "chunk_size": mixer.chunk_size or 256}

    return write


# alxndrTL/mamba.py, whose `LM` has no vocabulary in its configuration: `vocab_size` is added to it

_MAMBAPY = {"d_model", "n_layers", "vocab_size", "d_state", "expand_factor", "d_conv", "dt_rank", "bias", "conv_bias"}
_MAMBAPY_TRAINING = {"dt_min", "dt_max", "dt_init", "dt_scale", "base_std", "mup_base_width", "pscan", "use_cuda"}


def _read_mambapy(config: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    derived = {"d_inner", "dt_init_floor", "mup_width_mult"}
    known = _MAMBAPY | _MAMBAPY_TRAINING | derived | {"rms_norm_eps", "mup", "inner_layernorms"}
    _refuse_unknown(config, known, "the configuration")
    for name in ("mup", "inner_layernorms"):
        if config.get(name, False):
            raise ValueError(f"`{name}` must be false: our layers have none of it.")
    chosen = {key: config[key] for key in ("d_state", "d_conv", "dt_rank", "bias", "conv_bias") if key in config}
    if chosen.get("dt_rank") == "auto":
        del chosen["dt_rank"]
    return {
        "d_model": _entry(config, "d_model"),
        "layers": _entry(config, "n_layers"),
        "mixer": "mamba",
        "mixer_options": {**chosen, "expand": config.get("expand_factor", 2), **options},
        "vocab_size": _entry(config, "vocab_size"),
        "pad_vocab_multiple": 1,
        "tie_embeddings": False,
        "eps": config.get("rms_norm_eps", 1e-5),
        "residual_in_fp32": False,
    }


def _write_mambapy(model: SequenceModel) -> dict[str, Any]:
    mixer = _mixer_of(model, (Mamba,), "mambapy")
    block: Any = model.stack.blocks[0]
    if model.tied or mixer.use_bcdt_rms or isinstance(block.norm, nn.LayerNorm) or block.norm_position != "pre":
        raise ValueError("family 'mambapy' has a head of its own, RMS norms in front of its layers and none inside.")
    return {
        "d_model": model.d_model,
        "n_layers": len(model.stack.blocks),
        "vocab_size": model.embedding.weight.shape[0],
        "d_state": mixer.d_state,
        "expand_factor": _expand(mixer),
        "d_conv": mixer.conv1d.kernel_size[0],
        "dt_rank": mixer.dt_rank,
        "bias": mixer.in_proj.bias is not None,
        "conv_bias": mixer.conv1d.bias is not None,
        "rms_norm_eps": block.norm.eps,
    }


# goombalab/hydra


def _read_hydra(config: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    # A BERT configuration is full of entries that this model does not have; only what matters is looked at.
    if config.get("use_position_embeddings", False):
        raise ValueError("`use_position_embeddings` must be false; Hydra's models have none.")
    if config.get("matrix_mixer_type", "hydra") != "hydra":
        raise ValueError(f"`matrix_mixer_type` must be 'hydra', got {config['matrix_mixer_type']!r}.")
    if config.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"`hidden_act` must be 'gelu', got {config['hidden_act']!r}.")
    chosen = {key: config[key] for key in ("d_state", "d_conv", "expand", "headdim") if key in config}
    return {
        "d_model": _entry(config, "hidden_size"),
        "layers": _entry(config, "num_hidden_layers"),
        "mixer": "hydra",
        "mixer_options": {**chosen, **options},
        "vocab_size": _entry(config, "vocab_size"),
        "segments": config.get("type_vocab_size", 2),
        "norm_position": "pre" if config.get("is_prenorm", False) else "post",
        "embedding_eps": config.get("layer_norm_eps", 1e-12),
    }


def _write_hydra(model: MaskedModel) -> dict[str, Any]:
    mixer = _mixer_of(model, (Hydra,), "hydra_bert")
    block: Any = model.stack.blocks[0]
    return {
        "matrix_mixer_type": "hydra",
        "hidden_size": model.d_model,
        "num_hidden_layers": len(model.stack.blocks),
        "vocab_size": model.vocab_size,
        "type_vocab_size": model.segment.num_embeddings,
        "d_state": mixer.d_state,
        "d_conv": mixer.conv1d.kernel_size[0],
        "expand": _expand(mixer),
        "headdim": mixer.headdim,
        "is_prenorm": block.norm_position == "pre",
        "layer_norm_eps": model.embedding_norm.eps,
        "use_position_embeddings": False,
    }


def _names(embedding: str) -> list[tuple[str, str]]:
    return [
        ("embedding.", f"backbone.{embedding}."),
        ("stack.blocks.{}.mlp_norm.", "backbone.layers.{}.norm2."),
        ("stack.blocks.{}.", "backbone.layers.{}."),
        ("stack.norm.", "backbone.norm_f."),
        ("head.", "lm_head."),
    ]


FAMILIES: dict[str, Family] = {
    "state_spaces": Family(_names("embedding"), _read_state_spaces, _write_state_spaces),
    "hf_mamba": Family(_names("embeddings"), _read_hf("mamba"), _write_hf("mamba")),
    "hf_mamba2": Family(_names("embeddings"), _read_hf("mamba2"), _write_hf("mamba2")),
    "hf_falcon_mamba": Family(_names("embeddings"), _read_hf("falcon_mamba"), _write_hf("falcon_mamba")),
    "mambapy": Family(
        [
            ("stack.blocks.{}.", "mamba.layers.{}."),
            ("stack.norm.", "norm_f."),
            ("head.", "lm_head."),
        ],
        _read_mambapy,
        _write_mambapy,
    ),
    "hydra_bert": Family(
        [
            ("embedding.", "bert.embeddings.word_embeddings."),
            ("segment.", "bert.embeddings.token_type_embeddings."),
            ("embedding_norm.", "bert.embeddings.LayerNorm."),
            ("stack.blocks.{}.", "bert.encoder.layer.{}.layer."),
            ("stack.norm.", "bert.encoder.norm_f."),
            ("dense.", "cls.predictions.transform.dense."),
            ("head_norm.", "cls.predictions.transform.LayerNorm."),
            ("head.", "cls.predictions.decoder."),
        ],
        _read_hydra,
        _write_hydra,
        masked=True,
        ignored=r"(\.pooler\.|\.position_ids$|token_type_ids$)",
        prefix=r"model\.",
    ),
}
