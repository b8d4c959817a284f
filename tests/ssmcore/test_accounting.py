"""Parameters, operations and states against formulas, torch's counter and the tensors themselves."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from omnissm.ssmcore import SequenceModel, Stack, create_mixer
from omnissm.ssmcore.accounting import account


def formula(name, d, N, G=1, P=64, K=4, r=None):
    """Parameters of one layer in closed form, no bias in the projections."""
    c = 2 * d
    H = c // P
    if name == "mamba":
        return 2 * d * c + 5 * c + c * (r + 2 * N) + r * c + c + c * N + c + c * d
    if name == "mamba2":
        channels = c + 2 * G * N
        return d * (2 * c + 2 * G * N + H) + (K + 1) * channels + 3 * H + c + c * d
    channels = c + 4 * G * N
    return d * (2 * c + 4 * G * N + 2 * H) + (K + 1) * channels + 3 * H + H * c + c + c * d


@pytest.mark.parametrize(
    ("name", "options", "constants"),
    [
        ("mamba", {}, {"N": 16, "r": 12}),
        ("mamba", {"d_state": 5, "dt_rank": 7}, {"N": 5, "r": 7}),
        ("mamba2", {}, {"N": 128}),
        ("mamba2", {"ngroups": 3, "d_state": 8, "headdim": 32, "d_conv": 2}, {"N": 8, "G": 3, "P": 32, "K": 2}),
        ("hydra", {}, {"N": 64, "K": 7}),
        ("hydra", {"ngroups": 2, "d_state": 8, "d_conv": 3}, {"N": 8, "G": 2, "K": 3}),
    ],
)
def test_parameters(name, options, constants):
    mixer = create_mixer(name, 192, device="meta", **options)
    assert (
        account(mixer, 10).parameters == sum(p.numel() for p in mixer.parameters()) == formula(name, 192, **constants)
    )


@pytest.mark.parametrize(
    ("d", "layers", "mamba", "mamba2"),
    [
        (768, 24, 129.135, 128.990),
        (1024, 48, 371.516, 368.347),
        (1536, 48, 793.204, 780.161),
        (2048, 48, 1372.178, 1343.757),
        (2560, 64, 2768.346, 2702.600),
    ],
)
def test_published_sizes(d, layers, mamba, mamba2):
    """Millions: layers with one norm each, a final norm and a tied embedding of 50,280 (50,288) symbols."""
    for name, vocabulary, expected in (("mamba", 50280, mamba), ("mamba2", 50288, mamba2)):
        mixer = create_mixer(name, d, device="meta")
        per_layer = sum(p.numel() for p in mixer.parameters()) + d
        assert round((layers * per_layer + d + vocabulary * d) / 1e6, 3) == expected


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mamba", {"d_state": 4}),
        ("lbmamba", {"d_state": 4}),
        ("mamba2", {"d_state": 8, "headdim": 16, "ngroups": 2}),
        ("discrete_mamba2", {"d_state": 8, "nheads": 4}),
        ("hydra", {"d_state": 8, "headdim": 16}),
    ],
)
def test_projections_are_what_torch_counts(name, options):
    """Scans and convolution are no products to torch's counter; they are told apart by `flops_parts`."""
    mixer = create_mixer(name, 32, **options)
    x = torch.randn(1, 24, 32)
    parts = mixer.flops_parts(24)
    assert set(parts) == {"projections", "convolution", "scan"}
    assert mixer.flops(24) == sum(parts.values())
    assert mixer.flops(24, mode="train") == 3 * mixer.flops(24)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        mixer(x)
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if "conv" not in str(op))
    assert parts["projections"] == products
    assert parts["convolution"] == 24 * 2 * mixer.conv1d.weight.numel()


def test_scans():
    mamba = create_mixer("mamba", 32, d_state=4)
    assert mamba.flops_parts(10)["scan"] == 10 * (7 * 64 * 4 + 3 * 64)
    assert create_mixer("lbmamba", 32, d_state=4).flops_parts(10)["scan"] == 20 * (7 * 64 * 4 + 3 * 64)
    mamba2 = create_mixer("mamba2", 32, d_state=8, headdim=16, ngroups=2, chunk_size=16)
    assert mamba2.flops_parts(64)["scan"] == 64 * (2 * 16 * 8 * 2 + 4 * (2 * 16 * 16 + 4 * 16 * 8))
    assert mamba2.flops_parts(5)["scan"] == 5 * (2 * 5 * 8 * 2 + 4 * (2 * 5 * 16 + 4 * 16 * 8))
    assert mamba2.flops_parts(64, mode="decode")["scan"] == 4 * (5 * 8 * 16 - 16)
    assert mamba2.flops_parts(64, mode="decode")["projections"] == mamba2.flops_parts(1)["projections"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states(dtype):
    """32 wide: convolution states of 64 + 2 G N channels, three inputs each; recurrent states in float32."""
    for name, options, conv, ssm in (
        ("mamba", {"d_state": 4}, 64 * 3, 64 * 4),
        ("mamba2", {"d_state": 8, "headdim": 16, "ngroups": 2}, (64 + 32) * 3, 64 * 8),
        ("hydra", {"headdim": 16}, 0, 0),
    ):
        mixer = create_mixer(name, 32, **options)
        (part,) = account(mixer, 50, dtype=dtype).parts
        assert part.state_numel == mixer.state_numel() == conv + ssm
        assert part.state_bytes == conv * dtype.itemsize + 4 * ssm
    attention = create_mixer("attention", 32, nheads=4, kv_heads=2, headdim=8)
    (part,) = account(attention, 50, mode="decode", dtype=dtype).parts
    assert part.state_numel == 2 * 50 * 2 * 8
    assert part.state_bytes == part.state_numel * dtype.itemsize
    assert part.intensity == part.flops / (2 * part.state_bytes)


def test_a_model_part_by_part():
    model = SequenceModel(32, "m1M1", vocab_size=10, mixer_options={"d_state": 8, "headdim": 16})
    found = account(model, 16, mode="train")
    assert found.parameters == sum(p.numel() for p in model.parameters())
    by_name = {part.name: part for part in found.parts}
    mixers = [part for part in found.parts if part.kind == "Mamba2"]
    assert len(mixers) == 2
    assert mixers[0].flops == create_mixer("mamba2", 32, d_state=8, headdim=16).flops(16, mode="train")
    (mlp,) = (part for part in found.parts if part.kind == "GatedMLP")
    assert mlp.flops == 3 * 16 * 2 * mlp.parameters
    head = model.get_parameter("embedding.weight")  # tied: counted as parameters once
    assert sum(part.parameters == head.numel() for part in found.parts) == 1
    linear = 3 * 16 * 2 * head.numel()
    assert found.flops == sum(part.flops for part in mixers) + mlp.flops + linear
    assert found.state_numel == 2 * mixers[0].state_numel
    assert str(found).count("\n") == len(found.parts) + 2
    assert f"{found.parameters:,}" in str(found).splitlines()[-1]
    assert by_name.keys() == {part.name for part in found.parts}


def test_wrong_questions():
    stack = Stack(32, "m1h1", mixer_options=None, device="meta")
    with pytest.raises(ValueError, match="`mode` must be 'train', 'prefill' or 'decode', got 'infer'"):
        account(stack, 10, mode="infer")
    with pytest.raises(ValueError, match="at least 1 position, got 0"):
        account(stack, 0)
    with pytest.raises(TypeError, match="Hydra sees both directions"):
        account(stack, 10, mode="decode")
