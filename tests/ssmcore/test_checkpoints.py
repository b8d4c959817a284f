"""Published checkpoints: the logits and symbols of the publisher's code, and every name and shape accounted for."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from omnissm.ssmcore import SequenceModel
from omnissm.ssmcore.checkpoint_configs import FAMILIES
from omnissm.ssmcore.checkpoints import (
    detect_family,
    from_checkpoint,
    load_checkpoint,
    save_checkpoint,
    to_checkpoint,
)
from omnissm.ssmcore.generate import generate
from omnissm.ssmcore.masked_model import MaskedModel

HF = {
    "hf_mamba": {
        "model_type": "mamba", "vocab_size": 37, "hidden_size": 24, "state_size": 6, "num_hidden_layers": 3,
        "conv_kernel": 4, "expand": 2, "time_step_rank": 3, "use_bias": True,
    },
    "hf_mamba2": {
        "model_type": "mamba2", "vocab_size": 37, "hidden_size": 24, "state_size": 8, "num_hidden_layers": 3,
        "num_heads": 6, "head_dim": 8, "n_groups": 2, "chunk_size": 16, "time_step_limit": [0.001, 0.08],
        "layer_norm_epsilon": 1e-4,
    },
    "hf_falcon_mamba": {
        "model_type": "falcon_mamba", "vocab_size": 37, "hidden_size": 24, "state_size": 6, "num_hidden_layers": 2,
        "conv_kernel": 4, "expand": 2, "time_step_rank": 3, "mixer_rms_eps": 1e-5,
    },
}  # fmt: skip
STATE_SPACES = {
    "Mamba1": {"d_model": 24, "n_layer": 2, "vocab_size": 37, "ssm_cfg": {"d_state": 6}},
    "Mamba2": {
        "d_model": 24, "n_layer": 3, "d_intermediate": 40, "vocab_size": 37, "pad_vocab_size_multiple": 16,
        "ssm_cfg": {"layer": "Mamba2", "d_state": 8, "headdim": 8, "d_ssm": 32, "D_has_hdim": True},
        "attn_layer_idx": [1], "tie_embeddings": False,
        "attn_cfg": {"num_heads": 4, "num_heads_kv": 2, "head_dim": 8, "causal": True, "d_conv": 4,
                     "rotary_emb_dim": 4},
    },
    "Mamba3": {
        "d_model": 24, "n_layer": 2, "vocab_size": 37, "rms_norm": False,
        "ssm_cfg": {"layer": "Mamba3", "d_state": 8, "headdim": 8, "is_mimo": True, "mimo_rank": 2,
                    "is_outproj_norm": True, "a_activation": "softplus"},
    },
}  # fmt: skip
MAMBAPY = {"d_model": 24, "n_layers": 2, "vocab_size": 37, "d_state": 6, "rms_norm_eps": 1e-4, "bias": True}
HYDRA = {
    "matrix_mixer_type": "hydra", "vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 2, "d_state": 4,
    "d_conv": 7, "expand": 2, "headdim": 8, "chunk_size": 16, "is_prenorm": False, "hidden_act": "gelu",
    "type_vocab_size": 2, "layer_norm_eps": 1e-12, "use_position_embeddings": False, "hidden_dropout_prob": 0.1,
}  # fmt: skip


def built(family, config):
    torch.manual_seed(0)
    empty = {"hydra_bert": MaskedModel}.get(family, SequenceModel)
    with pytest.raises(ValueError, match="do not fit") as error:
        from_checkpoint({}, config, family)
    assert "is missing" in str(error.value)
    return empty(**FAMILIES[family].read(dict(config), {}))


CASES = [
    *HF.items(),
    *(("state_spaces", config) for config in STATE_SPACES.values()),
    ("mambapy", MAMBAPY),
    ("hydra_bert", HYDRA),
]
IDS = [*HF, *STATE_SPACES, "mambapy", "hydra"]


@pytest.mark.parametrize(("family", "config"), CASES, ids=IDS)
def test_round_trip_is_bit_for_bit(family, config, tmp_path):
    model = built(family, config)
    ids = torch.randint(37, (2, 11))
    expected = model(ids)
    state, written = to_checkpoint(model, family)
    assert detect_family(written) == family
    again = from_checkpoint(state, written)
    assert torch.equal(again(ids), expected)
    second, rewritten = to_checkpoint(again, family)
    assert rewritten == written
    assert list(second) == list(state)
    assert all(torch.equal(second[name], state[name]) for name in state)
    save_checkpoint(model, tmp_path / "copy", family)
    assert torch.equal(load_checkpoint(tmp_path / "copy")(ids), expected)
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == ["config.json", "model.safetensors"]


def test_configurations_with_entries_of_an_earlier_format():
    """Exported checkpoints carry those of the code they came from."""
    plain = HF["hf_mamba"]
    exported = {**plain, "d_model": 24, "d_inner": 48, "n_layer": 3, "rms_norm": True, "ssm_cfg": {},
                "pad_vocab_size_multiple": 8, "fused_add_norm": True, "intermediate_size": 48}  # fmt: skip
    read = FAMILIES["hf_mamba"].read
    assert read(exported, {}) == read(dict(plain), {})
    assert read({**exported, "d_inner": 72, "intermediate_size": 72}, {})["mixer_options"]["expand"] == 3
    for name, value in (("d_model", 32), ("d_inner", 24), ("n_layer", 2), ("rms_norm", False)):
        with pytest.raises(ValueError, match=f"`{name}` must be .* as the other entries say, got {value}"):
            read({**exported, name: value}, {})


@pytest.mark.parametrize(
    ("family", "mixer", "layers", "message"),
    [
        ("state_spaces", "mamba", {"use_bcdt_rms": True}, "use_bcdt_rms` True would be read as False"),
        ("state_spaces", "mamba3", {"headdim": 8, "dt_limit": (0.0, 0.1)}, r"dt_limit` \(0.0, 0.1\) would be read as"),
        ("hydra_bert", "hydra", {"headdim": 8, "dt_limit": (0.0, 0.1)}, r"dt_limit` \(0.0, 0.1\) would be read as"),
        ("hydra_bert", "hydra", {"headdim": 8, "ngroups": 2}, "ngroups` 2 would be read as 1"),
        ("hf_mamba2", "mamba2", {"headdim": 8, "norm_eps": 1e-3}, "norm.eps` 0.001 would be read as 1e-05"),
        ("hf_mamba2", "mamba2", {"headdim": 8, "out_multiplier": 2.0}, "out_multiplier` 2.0 would be read as 1.0"),
        ("hf_mamba2", "mamba2", {"headdim": 8, "learnable_init_states": True}, "init_states` .* would be read as None"),
        ("hf_mamba", "mamba", [{"d_state": 4}, {"d_state": 6}], r"blocks.1.mixer.d_state` 6 would be read as 4"),
    ],
)
def test_what_a_family_cannot_say_is_refused(family, mixer, layers, message):
    layers = layers if isinstance(layers, list) else 2 * [layers]
    kind = MaskedModel if family == "hydra_bert" else SequenceModel
    model = kind(16, [{"mixer": mixer, **options} for options in layers], vocab_size=16)
    with pytest.raises(ValueError, match=f"family '{family}' cannot hold the model: .*{message}"):
        to_checkpoint(model, family)


def test_published_names():
    names = {name: list(to_checkpoint(built(family, config), family)[0]) for (family, config), name in zip(CASES, IDS)}
    assert "backbone.embedding.weight" in names["Mamba1"]
    assert "backbone.layers.1.mixer.x_proj.weight" in names["Mamba1"]
    assert {"backbone.layers.0.norm2.weight", "backbone.layers.2.mlp.fc2.weight"} <= set(names["Mamba2"])
    assert {"backbone.layers.1.mixer.in_proj.bias", "backbone.layers.1.mixer.conv1d.weight"} <= set(names["Mamba2"])
    assert {"backbone.norm_f.bias", "backbone.layers.0.mixer.mimo_o", "lm_head.weight"} <= set(names["Mamba3"])
    assert "backbone.embeddings.weight" in names["hf_mamba"]
    hydra = {"bert.encoder.layer.1.layer.mixer.fc_D.weight", "bert.encoder.layer.0.layer.norm.bias"}
    assert hydra | {"cls.predictions.transform.LayerNorm.weight", "cls.predictions.decoder.bias"} <= set(names["hydra"])


@pytest.mark.parametrize("family", HF)
def test_transformers_gives_the_same(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = dict(HF[family])
    if family == "hf_mamba2" and tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):
        config["n_groups"] = 1  # 5.17 shares B and C among the wrong heads where there are more groups
    peer_config = transformers.AutoConfig.for_model(**config)
    torch.manual_seed(0)
    peer = transformers.AutoModelForCausalLM.from_config(peer_config).eval().float()
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if "norm" in name or name.endswith(".D"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    peer.save_pretrained(tmp_path)
    model = load_checkpoint(tmp_path)
    ids = torch.randint(1, 37, (2, 21))
    with torch.no_grad():
        expected = peer(ids).logits
        got = model(ids)
    assert (got - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max().item())
    # Their step ignores the limit of the steps, see https://github.com/huggingface/transformers; without it, all agree.
    if family == "hf_mamba2":
        config.pop("time_step_limit")
        peer_config.time_step_limit = (0.0, math.inf)
        peer = type(peer)(peer_config).eval()
        model = from_checkpoint(peer.state_dict(), json.loads(peer_config.to_json_string()))
    peer.generation_config.pad_token_id = 0
    peer.generation_config.eos_token_id = None
    symbols = peer.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(generate(model, ids, 12), symbols[:, 21:])
    # And back.
    state, _ = to_checkpoint(model, family)
    theirs = peer.state_dict()
    assert set(theirs) <= set(state)
    assert all(torch.equal(state[name], theirs[name]) for name in theirs)


def test_mambapy_gives_the_same():
    mamba = pytest.importorskip("mambapy.mamba")
    torch.manual_seed(0)
    config = mamba.MambaConfig(**{key: value for key, value in MAMBAPY.items() if key != "vocab_size"})
    # Their language model needs a CUDA package on import; this is what it puts together.
    parts = {
        "embedding": torch.nn.Embedding(37, config.d_model),
        "mamba": mamba.Mamba(config),
        "norm_f": mamba.RMSNorm(config.d_model, config.rms_norm_eps),
        "lm_head": torch.nn.Linear(config.d_model, 37, bias=False),
    }
    peer = torch.nn.Sequential()
    for name, part in parts.items():
        peer.add_module(name, part)
    model = from_checkpoint(peer.state_dict(), MAMBAPY)
    ids = torch.randint(37, (2, 19))
    assert (model(ids) - peer(ids)).abs().max() < 1e-5
    state, _ = to_checkpoint(model, "mambapy")
    theirs = peer.state_dict()
    assert set(state) == set(theirs)
    assert all(torch.equal(state[name], theirs[name]) for name in theirs)


# What transformers 5.23 gives for the weights of `formula` at the last of 12 symbols 7 i mod 37: the first four logits,
# and the sum of all at all positions.
GOLDEN = {
    "hf_mamba": ([-0.233940, 0.280810, -0.024786, -0.257973], -0.02874),
    "hf_mamba2": ([0.149442, -0.093041, -0.063718, 0.151748], 0.51277),
    "hf_falcon_mamba": ([-0.136301, -0.194475, 0.315482, -0.096197], -0.00293),
}


def formula(state):
    """Weights that anyone can write down: 0.3 sin(0.7 i + 1.3 k + 0.1), k the place of the name, 1 more for norms."""
    for k, name in enumerate(sorted(state)):
        wave = torch.sin(0.7 * torch.arange(state[name].numel(), dtype=torch.float64) + 1.3 * k + 0.1)
        state[name] = (float("norm" in name) + 0.3 * wave).view_as(state[name])
    return state


@pytest.mark.parametrize("family", HF)
def test_golden_logits(family):
    state, config = to_checkpoint(built(family, HF[family]), family)
    if config["tie_word_embeddings"]:
        del state["lm_head.weight"]
    logits = from_checkpoint(formula(state), config, dtype=torch.float64)((torch.arange(12) * 7 % 37)[None])
    assert logits[0, -1, :4].tolist() == pytest.approx(GOLDEN[family][0], abs=5e-6)
    assert logits.sum().item() == pytest.approx(GOLDEN[family][1], abs=1e-4)


def test_all_differences_are_listed_at_once():
    model = built("hf_mamba2", HF["hf_mamba2"])
    state, config = to_checkpoint(model, "hf_mamba2")
    state = {name: tensor.clone() for name, tensor in state.items()}
    del state["backbone.layers.0.mixer.A_log"], state["backbone.norm_f.weight"]
    state["backbone.layers.7.mixer.D"] = torch.ones(3)
    state["backbone.layers.1.mixer.D"] = torch.ones(5)
    state["backbone.embeddings.weight"] = torch.ones(40, 24)
    with pytest.raises(ValueError, match="do not fit the configuration in 5 places") as error:
        from_checkpoint(state, config)
    for part in (
        "`backbone.layers.0.mixer.A_log` is missing",
        "`backbone.norm_f.weight` is missing",
        "`backbone.layers.7.mixer.D` is not in the model",
        "`backbone.layers.1.mixer.D` is (5,), expected (6,)",
        "`backbone.embeddings.weight` is (40, 24), expected (37, 24) (the configuration says 37 symbols)",
    ):
        assert part in str(error.value)


def test_tied_weights_must_be_equal():
    state, config = to_checkpoint(built("hf_mamba", HF["hf_mamba"]), "hf_mamba")
    assert torch.equal(
        from_checkpoint({k: v for k, v in state.items() if k != "lm_head.weight"}, config).head.weight,
        state["lm_head.weight"],
    )
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    with pytest.raises(ValueError, match="differs from the weight that it is tied to"):
        from_checkpoint(state, config)


def test_pickles_are_refused_unless_asked_for(tmp_path):
    model = built("state_spaces", STATE_SPACES["Mamba1"])
    state, config = to_checkpoint(model, "state_spaces")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match="no weights in"):
        load_checkpoint(tmp_path)
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="allow_pickle"):
        load_checkpoint(tmp_path)
    ids = torch.randint(37, (1, 5))
    assert torch.equal(load_checkpoint(tmp_path, allow_pickle=True)(ids), model(ids))


def test_weights_in_parts(tmp_path):
    model = built("state_spaces", STATE_SPACES["Mamba1"])
    save_checkpoint(model, tmp_path, "state_spaces")
    state = load_file(tmp_path / "model.safetensors")
    names = sorted(state)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for part, inside in parts.items():
        save_file({name: state[name] for name in inside}, tmp_path / part)
    (tmp_path / "model.safetensors").unlink()
    index = {name: part for part, inside in parts.items() for name in inside}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    ids = torch.randint(37, (1, 5))
    assert torch.equal(load_checkpoint(tmp_path)(ids), model(ids))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../b.safetensors"}}))
    with pytest.raises(ValueError, match="outside its folder"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: from_checkpoint({}, {}), ValueError, "of no known family; name one"),
        (
            lambda: from_checkpoint({}, {}, "hf_mamba3"),
            ValueError,
            "Unknown checkpoint family 'hf_mamba3'. Did you mean",
        ),
        (lambda: from_checkpoint({}, {"d_model": 8, "n_layer": 1, "widht": 3}), ValueError, "unknown meaning: widht"),
        (lambda: from_checkpoint({}, {"d_model": 8, "n_layer": 1}), ValueError, "lacks `vocab_size`"),
        (
            lambda: from_checkpoint({}, {**STATE_SPACES["Mamba3"], "ssm_cfg": {"layer": "Mamba3"}}),
            ValueError,
            "pass options={'a_activation': 'heavy_tail'}",
        ),
        (
            lambda: from_checkpoint({}, {**STATE_SPACES["Mamba1"], "ssm_cfg": {"layer": "S4"}}),
            ValueError,
            "must be one of Mamba1, Mamba2, Mamba3, got 'S4'",
        ),
        (
            lambda: to_checkpoint(SequenceModel(8, "s1", vocab_size=3), "hf_mamba"),
            ValueError,
            "holds Mamba layers without MLP, layer 0 is a S4D",
        ),
        (lambda: to_checkpoint(torch.nn.Linear(2, 2), "hf_mamba"), TypeError, "holds a SequenceModel, got Linear"),
        (lambda: load_checkpoint("nowhere"), FileNotFoundError, "no configuration at"),
    ],
)
def test_wrong_requests(call, error, message):
    with pytest.raises(error, match=message):
        call()
