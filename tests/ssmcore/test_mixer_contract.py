"""Every sequence mixer by name keeps the contract, with its options."""

import pytest
import torch

from omnissm.ssmcore import create_mixer
from omnissm.ssmcore.mixers import MIXERS
from omnissm.ssmcore.mixers.common import ConvSSMState, MixingMatrix
from omnissm.ssmcore.testing import SEQUENCE_CHECKS, check_compile, check_export

D_MODEL = 8
# Small sizes, and sets of options that change what is computed.
OPTIONS = {
    "attention": [
        {"nheads": 2},
        {"nheads": 4, "kv_heads": 2, "rotary_dim": 2, "d_conv": 3, "window": 6, "mlp_dim": 4},
        {"nheads": 2, "causal": False, "rotary_dim": 4},
    ],
    "bidirectional": [
        {"mixer_options": {"d_state": 4, "headdim": 4}},
        {"mixer": "mamba", "mixer_options": {"d_state": 3}, "combine": "concat", "tie": "projections"},
        {"mixer": "mamba", "mixer_options": {"d_state": 3}, "combine": "gate", "tie": "all"},
    ],
    "discrete_mamba2": [
        {"d_state": 4, "nheads": 2},
        {"d_state": 3, "nheads": 4, "ngroups": 2, "expand": 2, "bias": True, "d_conv": 2},
    ],
    "h3": [{"d_state": 4}, {"d_state": 4, "headdim": 2}],
    "hax": [
        {"d_state": 4, "headdim": 4, "key_dim": 4, "budget": 1024},
        {"d_state": 4, "headdim": 4, "key_dim": 3, "budget": 4, "num_hash": 2},
        {"d_state": 4, "headdim": 4, "key_dim": 4, "budget": 2, "num_hash": 1, "sources": ("lsh",)},
    ],
    "hydra": [
        {"d_state": 4, "headdim": 4},
        {"d_state": 4, "headdim": 4, "ngroups": 2, "learnable_init_states": True, "dt_limit": (0.0, 0.09), "d_conv": 3},
    ],
    "lbmamba": [{"d_state": 3, "window": 4}, {"d_state": 3, "window": 64}],
    "mamba": [
        {"d_state": 3},
        {"d_state": 3, "dt_rank": 2, "d_conv": 2, "use_bcdt_rms": True, "bias": True},
    ],
    "mamba3": [
        {"d_state": 8, "headdim": 4},
        {"d_state": 8, "headdim": 4, "ngroups": 2, "rank": 2, "rope_fraction": 1.0, "outproj_norm": True},
    ],
    "mambamixer": [
        {"causal": True, "d_state": 3, "n_layer": 2, "channel_width": 2},
        {"d_state": 3, "n_layer": 2, "max_len": 256},
    ],
    "long_conv": [{"max_len": 16}, {"max_len": 16, "bidirectional": True}],
    "monarch": [
        {"max_len": 16, "order": 8},
        {"max_len": 64, "order": 8, "residual_conv": False},
        {"max_len": 16, "order": 8, "bidirectional": True},
    ],
    "paragru": [{"headdim": 4}, {"headdim": 8, "expand": 2, "d_conv": 2, "bound": 1.5}],
    "paralstm": [{"headdim": 4}, {"headdim": 8, "expand": 2, "d_conv": 2, "bound": 1.5}],
    "quasiseparable": [{"headdim": 8, "qk_dim": 2}],
    "seqboat": [
        {"n_ema": 2, "qk_dim": 3, "window": 4},
        {"n_ema": 2, "qk_dim": 3, "window": 3, "activation": "softmax", "d_hidden": 6},
        {"n_ema": 2, "qk_dim": 3, "window": 4, "bidirectional": True},
    ],
    "s4": [
        {"d_state": 4},
        {"d_state": 4, "init": "legt", "n_ssm": 2},
        {"d_state": 4, "init": "ptd"},
        {"bidirectional": True},
    ],
    "s4d": [{"d_state": 4}, {"d_state": 6, "n_ssm": 2, "discretization": "bilinear"}, {"bidirectional": True}],
    "s5": [{"d_state": 4}, {"d_state": 8, "blocks": 2, "discretization": "bilinear"}, {"bidirectional": True}],
    "mamba2": [
        {"d_state": 4, "headdim": 4},
        {"d_state": 4, "headdim": 4, "ngroups": 4, "D_has_hdim": True, "dt_limit": (0.002, 0.05), "dt_max": 0.2},
        {"d_state": 3, "headdim": 4, "ngroups": 2, "d_ssm": 8, "learnable_init_states": True, "bias": True},
        {"d_state": 4, "headdim": 4, "rmsnorm": False, "d_conv": 1, "conv_bias": False, "chunk_size": 4},
        {"d_state": 4, "headdim": 4, "norm_before_gate": True, "mup_vector": (0.5, 2.0, 1.5, 0.7, 1.2)},
    ],
}
for menu in ("cauchy", "dense", "low_rank", "softmax_mixer", "toeplitz", "vandermonde"):
    sizes = {"headdim": 8, "qk_dim": 3, "max_len": 256}
    OPTIONS[menu] = [sizes, *([sizes | {"data_dependent": False, "d_conv": 3}] if menu != "dense" else [])]
SEQUENCE_MIXERS = [name for name, mixer in MIXERS.items() if hasattr(mixer, "state_type")]


def build(name, options, **factory):
    torch.manual_seed(0)
    mixer = create_mixer(name, D_MODEL, **options, **factory)
    with torch.no_grad():
        for parameter in mixer.parameters():  # what starts at a constant must be able to matter
            if parameter.numel() > 1 and (parameter == parameter.flatten()[0]).all():
                parameter.add_(0.3 * torch.randn_like(parameter))
        if name == "seqboat":
            mixer.hx_proj.bias[:2] = 0  # some tokens are active and some are not, and those see each other
            mixer.distance_bias.add_(0.1)
    return mixer


def cases():
    """All checks for all options; most of those that trace code are slow, and left to the slow run."""
    found = []
    for check in SEQUENCE_CHECKS:
        for name in SEQUENCE_MIXERS:
            for number, options in enumerate(OPTIONS.get(name, [{}])):
                if name == "hax" and number and check.__name__ == "check_dtypes":
                    continue  # rounding to 16 bits makes other choices of few keys; with all keys it is checked
                slow = (number and check is check_export) or ((number or name != "mamba2") and check is check_compile)
                marks = [pytest.mark.slow] if slow else []
                found.append(pytest.param(name, options, check, marks=marks, id=f"{check.__name__}-{name}-{number}"))
    return found


@pytest.mark.parametrize(("name", "options", "check"), cases())
def test_contract(name, options, check, device):
    check(build(name, options, device=device, dtype=torch.float64))


class Careless(torch.nn.Module):
    """A running mean that gets wrong what caches usually get wrong."""

    causal, linear_in_x, varlen, state_type = True, True, True, ConvSSMState

    def __init__(self):
        super().__init__()
        self.d_model = 4
        self.scale, self.unused = torch.nn.Parameter(torch.ones(4).double()), torch.nn.Parameter(torch.ones(1))

    def forward(self, x, *, mask=None, seq_idx=None):
        return self.scale.to(x.dtype) * (x.cumsum(1) + 0.1 * x.mean(1, keepdim=True))[..., :4]

    def prefill(self, x, state=None, *, mask=None, seq_idx=None, reset=None):
        y = self.forward(x)
        return y, ConvSSMState(y[:, -1:], y[:, -1])

    def step(self, x, state):
        state.ssm.add_(x)
        return self.scale * state.ssm, state

    def init_state(self, batch, *, device=None, dtype=None):
        return ConvSSMState(torch.zeros(batch, 1, 4).double(), torch.zeros(batch, 4).double())

    def mixing_matrix(self, x, *, state=None):
        matrix = torch.ones(1, 4, x.shape[1], x.shape[1], dtype=x.dtype).tril()
        return MixingMatrix(matrix, x[..., None], self.forward(x)[..., None])

    def flops(self, l, *, mode="prefill"):  # noqa: E741
        return 2 * l

    def state_numel(self):
        return 5


@pytest.mark.parametrize(
    ("check", "reason"),
    [
        ("check_declared", r"state_numel\(\) is not the size"),
        ("check_sequence_shape", "wrong width must raise"),
        ("check_cuts", r"pieces \(20, 1\) differ from one call"),
        ("check_padding", "outputs at padding are not zero"),
        ("check_packing", "packed sequences differ"),
        ("check_reset", "resets differ from sequences apart"),
        ("check_all_at_once", "row 0 differs from its steps"),
        ("check_no_future", "depends on later positions"),
        ("check_sequence_gradients", "`unused` gets no gradient"),
        ("check_dtypes", "bfloat16 autocast give torch.float32"),
        ("check_mixing_matrix", "matrix times inputs is not the outputs"),
        ("check_state_methods", "was changed in place"),
    ],
)
def test_the_contract_can_fail(check, reason):
    (found,) = (c for c in SEQUENCE_CHECKS if c.__name__ == check)
    with pytest.raises(AssertionError, match=reason):
        found(Careless())


def test_half_causal_mixers_are_told_apart():
    mixer = Careless()
    mixer.causal = False
    with pytest.raises(AssertionError, match="states a state"):
        SEQUENCE_CHECKS[0](mixer)
