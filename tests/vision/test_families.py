"""What each family must do beside what all models do: symmetries, published names, traps, golden outputs."""

import math
import re

import pytest
import torch
import torch.nn.functional as F

from omnissm import vision
from omnissm.kernels import available_backends, hydra_blocks, use_backend
from omnissm.kernels.testing import relative_error
from omnissm.ssmcore import Hydra
from omnissm.vision.models import hydra_vit, mambavision, vim, vmamba
from omnissm.vision.models.chimera_vit import GridSSM
from omnissm.vision.models.hydra_vit import TokenHydra
from omnissm.vision.models.mambavision import HalfScan
from omnissm.vision.models.vim import VimMixer
from omnissm.vision.models.vmamba import SS2D
from omnissm.vision.tasks import normalized

TOKENS = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_classes": 5}
SIZES = {
    "hydra_vit_tiny_patch16_224": {**TOKENS, "headdim": 8, "d_state": 4},
    "vim_tiny_patch16_224": {**TOKENS, "d_state": 4},
    "lbvim_tiny_patch16_224": {**TOKENS, "d_state": 4},
    "chimera_vit_tiny_patch16_224": {**TOKENS, "headdim": 8, "d_state": 4},
    "plainmamba_l1_patch16_224": {**TOKENS, "d_state": 4},
    "a2mamba_nano": {
        "dims": (8, 8, 16, 16),
        "depths": (1, 1, 1, 1),
        "num_heads": (2, 2, 2, 4),
        "window_size": (5, 3, 3, 3),
        "head_dim": 16,
        "num_classes": 5,
    },
    "segman_t": {
        "dims": (8, 8, 12, 16),
        "depths": (1, 1, 1, 1),
        "num_heads": (1, 2, 3, 2),
        "window_size": (5, 3, 3, 3),
        "head_dim": 16,
        "num_classes": 5,
    },
    "vim2_tiny": {"dim": 8, "depths": (1, 2, 1, 1), "d_state": 4, "num_classes": 5},
    "vmamba_tiny_s1l8": {"dim": 8, "depths": (1, 1, 1, 1), "num_classes": 5},
    "vmamba_v0_tiny": {"dim": 8, "depths": (1, 1, 1, 1), "d_state": 4, "num_classes": 5},
    "mambavision_base": {
        "dim": 8,
        "stem_dim": 8,
        "depths": (1, 1, 2, 2),
        "num_heads": (1, 1, 2, 2),
        "window_size": (8, 8, 4, 2),
        "num_classes": 5,
    },
}
GOLDEN = {
    "a2mamba_nano": [-0.09128595, 0.21232565, 0.24988134, -0.00013891, -0.15294109],
    "chimera_vit_tiny_patch16_224": [-0.01128708, -0.18762463, -0.08163299, 0.21325641, 0.27486789],
    "hydra_vit_tiny_patch16_224": [-0.00735348, -0.19516188, -0.14503112, 0.02538063, 0.05884518],
    "lbvim_tiny_patch16_224": [0.02664053, 0.00820628, 0.0846936, 0.08880423, -0.06084543],
    "mambavision_base": [-1.90535554, 0.23154022, 2.23248479, 2.83800092, 1.66330114],
    "plainmamba_l1_patch16_224": [1.09159232, -0.26472089, -1.16757855, -0.11575229, 1.2322293],
    "segman_t": [0.52342307, 0.34725961, -0.31004318, -0.36240766, 0.25989879],
    "vim2_tiny": [-0.08023031, -0.90736384, -1.15043105, -0.65024026, 0.27500797],
    "vim_tiny_patch16_224": [-0.22075854, 1.23759654, 0.62101784, -1.09370311, -1.12843699],
    "vmamba_tiny_s1l8": [0.33709137, 2.97652718, 3.74462532, 2.16131662, -0.77440676],
    "vmamba_v0_tiny": [0.02308195, 0.22109707, 0.28976318, 0.1911935, -0.01427492],
}

VARIANTS = [
    ("chimera_vit_tiny_patch16_224", {"gate": "add"}, [-0.02382537, -0.18199593, -0.06680939, 0.21364624, 0.26020256]),
    ("hydra_vit_tiny_patch16_224", {"mlp_ratio": 2.0}, [0.1973347, -0.15475009, -0.27612084, -0.04121712, 0.14706386]),
    (
        "hydra_vit_tiny_patch16_224",
        {"pos_embed": "none"},
        [0.01417031, -0.19551192, -0.16669704, 0.01693411, 0.07708172],
    ),
    ("lbvim_tiny_patch16_224", {"segment": 8}, [0.02664138, 0.00820835, 0.08469358, 0.08880215, -0.06084626]),
    ("vim_tiny_patch16_224", {"class_token": "head"}, [-0.52583488, 0.93289586, 0.80238274, -0.71536652, -1.15619356]),
    (
        "vim_tiny_patch16_224",
        {"class_token": "double"},
        [-0.56718351, 0.20446608, 0.54798179, -0.09022599, -0.64797947],
    ),
    ("vim_tiny_patch16_224", {"class_token": "none"}, [0.00295047, -0.08646724, -0.0540131, -0.01932207, -0.06615427]),
]


def formula(model):
    """Weights by a formula, so that golden numbers do not hang on a random generator."""
    with torch.no_grad():
        for k, (name, p) in enumerate(sorted(model.named_parameters())):
            wave = torch.sin(torch.arange(p.numel(), dtype=torch.float64) * 0.7 + k).view(p.shape)
            if p.dim() >= 2 and "A_log" not in name:
                p.copy_(wave / math.sqrt(p[0].numel()))
            else:
                p.add_(0.1 * wave)
    return model.eval()


def build(name, **options):
    torch.manual_seed(0)
    return vision.create_model(name, **{**SIZES[name], **options}).eval()


def images(size=32):
    grid = torch.arange(3 * size * size, dtype=torch.float32).view(1, 3, size, size)
    return torch.sin(grid * 0.37) + torch.cos(grid * 0.011)


@pytest.mark.parametrize(
    ("name", "options", "golden"), [*((name, {}, GOLDEN[name]) for name in sorted(SIZES)), *VARIANTS]
)
def test_golden_outputs(name, options, golden):
    model = build(name, **options)
    # initial steps are drawn; the formula needs fixed ones
    with torch.no_grad():
        for key, p in model.named_parameters():
            if re.search(r"(dt_bias|dt_proj(_b)?\.bias|dt_projs_bias)$", key):
                p.fill_(-3.0)
        y = formula(model.double())(images().double())[0]
        torch.testing.assert_close(y, torch.tensor(golden, dtype=y.dtype), rtol=1e-6, atol=1e-6)
        assert relative_error(model.float()(images())[0], y) < 1e-5


@pytest.mark.parametrize(
    ("mixer", "low", "high", "rates"),
    [
        (lambda: TokenHydra(32, headdim=8), 1e-3, 0.1, None),
        (lambda: VimMixer(32), 1e-3, 0.1, 16),
        (lambda: VimMixer(32, bidirectional=False, window=4), 1e-3, 0.1, 16),
        (lambda: SS2D(32, d_state=3), 1e-3, 0.1, 3),
        (lambda: HalfScan(32), 1e-3, 0.1, 8),
        (lambda: GridSSM(32, headdim=8), 7e-3, 0.7, None),
    ],
)
def test_initial_steps_and_rates(mixer, low, high, rates):
    """Also in whole models, where released code overwrites them by a general initialisation."""
    check_steps(mixer(), low, high, rates)


@pytest.mark.parametrize("name", sorted(SIZES))
def test_models_keep_initial_steps(name):
    low, high = (7e-3, 0.7) if "chimera" in name else (1e-3, 0.1)
    check_steps(build(name), low, high, None)


def check_steps(module, low, high, rates):
    found = 0
    for key, p in module.named_parameters():
        if re.search(r"(dt_bias|dt_proj(_b)?\.bias|dt_projs_bias)$", key):
            steps = F.softplus(p)
            assert low * 0.999 <= steps.min() <= steps.max() <= high * 1.001, key
            found += 1
        if re.search(r"A(_b)?_logs?$", key) and p.dim() == 2:
            torch.testing.assert_close(p, torch.arange(1.0, p.shape[1] + 1).log().expand_as(p))
            assert rates in (None, p.shape[1])
        if re.search(r"dt_projs?(_b)?[._]weight$", key):
            bound = p.shape[-1] ** -0.5
            assert p.abs().max() <= bound
            assert p.std() > (0.4 if p.numel() > 16 else 0.1) * bound  # uniform, not overwritten by 0.02
    assert found


def test_token_hydra_is_hydra():
    torch.manual_seed(0)
    mixer = TokenHydra(16, headdim=8, d_state=4)
    x = torch.randn(2, 15, 16)
    torch.testing.assert_close(mixer(x), Hydra.forward(mixer, x))


def test_hydra_with_joined_sums_and_norms():
    torch.manual_seed(0)
    model = vision.create_model("hydra_vit_tiny_patch16_224", **SIZES["hydra_vit_tiny_patch16_224"]).eval()
    x = torch.randn(2, 5, model.embed_dim)
    with torch.no_grad():
        assert not model.blocks.joinable(x)
        expected = x
        for block in model.blocks:
            expected = block(expected)
        torch.testing.assert_close(model.blocks.joined(x), expected, rtol=1e-6, atol=1e-6)
        with torch.autocast("cpu", torch.bfloat16):
            assert model.blocks.joinable(x)
            block = model.blocks[0]
            for module in (block, block.norm, block.scale, block.drop_path):
                for register in (module.register_forward_hook, module.register_forward_pre_hook):
                    hook = register(lambda *_: None)
                    assert not model.blocks.joinable(x)
                    hook.remove()
            hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
            assert not model.blocks.joinable(x)
            hook.remove()
            block.drop_path.train()
            assert not model.blocks.joinable(x)
            block.drop_path.eval()
            assert model.blocks.joinable(x)
            assert not type(model.blocks)().joinable(x)


def test_hydra_without_data():
    model = vision.create_model("hydra_vit_tiny_patch16_224", **SIZES["hydra_vit_tiny_patch16_224"]).eval().to("meta")
    size = model.patch_embed.img_size
    with torch.no_grad():
        assert model(torch.zeros(2, 3, *size, device="meta")).shape == (2, model.num_classes)


def test_hydra_turned_by_half_a_turn():
    """The image turned by 180 degrees reverses the tokens; with directions exchanged the logits are the same."""
    name = "hydra_vit_tiny_patch16_224"
    model, turned = build(name), build(name)
    with torch.no_grad():
        turned.patch_embed.proj.weight.copy_(model.patch_embed.proj.weight.flip(2, 3))
        turned.pos_embed.copy_(model.pos_embed.flip(1))
        for block in turned.blocks:
            mixer = block.mixer
            inner, maps, heads = mixer.d_inner, 2 * mixer.d_state, mixer.nheads
            for tensor in (mixer.in_proj.weight, mixer.conv1d.weight, mixer.conv1d.bias):
                start = 2 * inner if tensor is mixer.in_proj.weight else inner
                own = tensor.clone()
                tensor[start : start + maps] = own[start + maps : start + 2 * maps]
                tensor[start + maps : start + 2 * maps] = own[start : start + maps]
                if tensor is mixer.in_proj.weight:
                    tensor[-2 * heads :] = own[-2 * heads :].roll(heads, 0)
            mixer.conv1d.weight.copy_(mixer.conv1d.weight.flip(2).clone())
        torch.testing.assert_close(turned(images().flip(2, 3)), model(images()), rtol=1e-4, atol=1e-4)


def test_vim_turned_by_half_a_turn():
    """The same for Vim: the weights of the two ends change places."""
    name = "vim_tiny_patch16_224"
    model = build(name)
    state = dict(model.state_dict())
    swapped = {}
    for key, value in state.items():
        other = key.replace("A_b_log", "A_log") if "A_b_log" in key else key.replace("A_log", "A_b_log")
        if "A_" not in key:
            other = key.replace("_b.", ".") if "_b." in key else re.sub(r"(conv1d|x_proj|dt_proj)\.", r"\1_b.", key)
            other = re.sub(r"\.D$", ".D_b", key) if key.endswith(".D") else re.sub(r"\.D_b$", ".D", other)
        swapped[key] = state.get(other, value)
    swapped["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].flip(2, 3)
    swapped["pos_embed"] = state["pos_embed"].flip(1)
    turned = build(name)
    turned.load_state_dict(swapped)
    with torch.no_grad():
        torch.testing.assert_close(turned(images().flip(2, 3)), model(images()), rtol=1e-4, atol=1e-4)


def test_chimera_turned_by_half_a_turn():
    """Corners 0 and 3, 1 and 2 change places; the sets of B and C stay."""
    name = "chimera_vit_tiny_patch16_224"
    model, turned = build(name), build(name)
    with torch.no_grad():
        turned.patch_embed.proj.weight.copy_(model.patch_embed.proj.weight.flip(2, 3))
        for block in turned.blocks:
            mixer = block.mixer
            mixer.conv2d.weight.copy_(mixer.conv2d.weight.flip(2, 3).clone())
            steps = mixer.in_proj.weight[-8 * mixer.nheads :].view(mixer.nheads, 4, 2, -1)
            steps.copy_(steps.flip(1).clone())
        torch.testing.assert_close(turned(images().flip(2, 3)), model(images()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("turn", "orders"), [("half", [2, 3, 0, 1]), ("transposed", [1, 0, 3, 2])])
def test_four_ways_turned(turn, orders):
    """A grid turned by 180 degrees, or its transpose, with the orders exchanged and the filters turned alike."""
    torch.manual_seed(0)
    mixer, turned = (SS2D(8, d_state=3, gated=True, conv_bias=True).double() for _ in range(2))
    state = dict(mixer.state_dict())
    swap = [(1, 2), (2, 3)]

    def moved(x, dims):
        return x.flip(dims) if turn == "half" else x.transpose(*dims)

    state["conv2d.weight"] = moved(state["conv2d.weight"], swap[1])
    for name in ("x_proj_weight", "dt_projs_weight", "dt_projs_bias"):
        state[name] = state[name][orders]
    for name in ("A_logs", "Ds"):
        state[name] = state[name].unflatten(0, (4, -1))[orders].flatten(0, 1)
    turned.load_state_dict(state)
    x = torch.randn(2, 4, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(moved(turned(moved(x, swap[0])), swap[0]), mixer(x))


def test_vim_flags():
    x = images()
    assert build("vim_tiny_patch16_224", class_token="none").global_pool == "avg"
    tokens = {place: build("vim_tiny_patch16_224", class_token=place) for place in ("head", "middle", "double")}
    assert [m.pos_embed.shape[1] for m in tokens.values()] == [17, 17, 18]
    for model in tokens.values():
        features = model.forward_features(x)
        place = {"head": [0], "middle": [8], "double": [0, 17]}[model.class_token]
        torch.testing.assert_close(model.forward_head(features, pre_logits=True), features[:, place].mean(1))
        rest = [k for k in range(features.shape[1]) if k not in place]
        model.reset_classifier(0, "avg")  # pooling says what it does, with a class token too
        torch.testing.assert_close(model(x), features[:, rest].mean(1))
    overlapping = build("vim_tiny_patch16_224", patch_stride=4)
    assert overlapping.patch_embed.grid_size == (7, 7)
    assert sum(p.numel() for p in vision.create_model("vim_tiny_patch16_224", patch_stride=8).parameters()) == 7_250_344
    whole, half = build("vim_tiny_patch16_224", divide=False), build("vim_tiny_patch16_224")
    half.load_state_dict({k: 2 * v if "out_proj" in k else v for k, v in whole.state_dict().items()})
    torch.testing.assert_close(half(x), whole(x))


def test_vim_blocks_with_hooks():
    model, x = build("vim_tiny_patch16_224"), torch.randn(2, 9, 16)
    block = model.blocks[0]
    with torch.no_grad():
        block.norm.weight.uniform_(0.5, 2)
        expected = x + block.mixer(block.norm(x))
        joined = block.joined(x)
        assert joined is not None
        torch.testing.assert_close(x + joined, expected, rtol=1e-5, atol=1e-6)
        for module in (block.norm, block.mixer, block.mixer.in_proj):
            seen = []
            hook = module.register_forward_hook(lambda *_, seen=seen: seen.append(True))
            torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-6)
            hook.remove()
            assert seen == [True]
        seen = []
        hook = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
        block(x)
        hook.remove()
        assert block.norm in seen
        assert block.mixer in seen
        block.norm = torch.nn.RMSNorm(16, elementwise_affine=False)
        assert block.joined(x) is None


def test_lbvim_reads_from_alternating_ends():
    """With one scan and no local look back, position t of block 0 depends on s <= t, of block 1 on s >= t."""
    model = build("lbvim_tiny_patch16_224", segment=1)
    for block, seen in zip(model.blocks, (slice(9, None), slice(None, 8)), strict=True):
        x = torch.randn(1, 16, 16, requires_grad=True)
        block(x)[0, 8].sum().backward()
        assert x.grad[0, seen].abs().max() == 0
    assert [vim.segment(torch.zeros(1, n, 1), 0) for n in (128, 196, 257)] == [4, 8, 16]


def published_vim(state):
    return {re.sub(r"^blocks\.", "layers.", re.sub(r"^norm\.", "norm_f.", key)): value for key, value in state.items()}


def test_published_names_of_vim():
    model = build("vim_tiny_patch16_224")
    published = published_vim(model.state_dict())
    assert "layers.0.mixer.A_b_log" in published
    assert "layers.1.mixer.conv1d_b.weight" in published
    found = vim.checkpoint_filter_fn({"model": published}, model)
    model.load_state_dict(found)
    assert set(found) == set(model.state_dict())


def test_published_names_of_vmamba():
    parts = {"stem.conv1": "patch_embed.0", "stem.norm1": "patch_embed.2"}
    parts |= {"stem.conv2": "patch_embed.5", "stem.norm2": "patch_embed.7"}
    for name in ("vmamba_tiny_s1l8", "vmamba_v0_tiny"):
        model = build(name)
        published = {}
        for key, value in model.state_dict().items():
            for ours, theirs in parts.items():
                key = key.replace(ours, theirs) if key.startswith(ours) else key
            key = re.sub(r"^stages\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key)
            key = re.sub(r"^stages", "layers", key).replace(".mixer.", ".op.").replace(".mlp_norm.", ".norm2.")
            if name == "vmamba_tiny_s1l8":
                key = key.replace("downsample.conv", "downsample.1").replace("downsample.norm", "downsample.3")
            key = re.sub(r"^norm\.", "classifier.norm.", re.sub(r"^head\.fc", "classifier.head", key))
            one_by_one = key.endswith(("in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight"))
            published[key] = value[:, :, None, None] if one_by_one else value
        found = vmamba.checkpoint_filter_fn({"model": published}, model)
        assert set(found) == set(model.state_dict())
        other = build(name)
        other.load_state_dict(found)
        torch.testing.assert_close(other(images()), model(images()))


def test_older_names_of_vmamba():
    """`ln_1`, `self_attention`, `patch_embed.proj`, and norm and head without `classifier`."""
    model = build("vmamba_v0_tiny")
    published = {}
    for key, value in model.state_dict().items():
        key = re.sub(r"^stages\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key)
        key = re.sub(r"^stages(.*blocks\.\d+)\.norm\.", r"layers\1.ln_1.", key)
        key = re.sub(r"^stages", "layers", key).replace(".mixer.", ".self_attention.").replace("head.fc.", "head.")
        key = key.replace("stem.conv1", "patch_embed.proj").replace("stem.norm1", "patch_embed.norm")
        published[key] = value
    assert {"head.weight", "norm.weight", "patch_embed.norm.bias"} < set(published)
    assert sum("ln_1" in key for key in published) == 8
    other = build("vmamba_v0_tiny")
    other.load_state_dict(vmamba.checkpoint_filter_fn(published, other))
    torch.testing.assert_close(other(images()), model(images()))


def test_published_names_of_mambavision():
    model = build("mambavision_base")
    names = {"stem.conv1": "patch_embed.conv_down.0", "stem.norm1": "patch_embed.conv_down.1"}
    names |= {"stem.conv2": "patch_embed.conv_down.3", "stem.norm2": "patch_embed.conv_down.4", "head.fc": "head"}
    published = {}
    for key, value in model.state_dict().items():
        for ours, theirs in names.items():
            key = re.sub(rf"^{re.escape(ours)}\.", f"{theirs}.", key)
        key = re.sub(r"^stages\.(\d)\.downsample", lambda m: f"levels.{int(m[1]) - 1}.downsample.reduction.0", key)
        key = re.sub(r"^stages", "levels", key)
        key = re.sub(r"(levels\.[23]\.blocks\.\d+)\.norm\.", r"\1.norm1.", key).replace(".mlp_norm.", ".norm2.")
        key = key.replace(".mlp_scale.gamma", ".gamma_2").replace(".scale.gamma", ".gamma_1")
        published[key] = value / 2 if key.endswith("dt_proj.bias") else value  # added twice there
    found = mambavision.checkpoint_filter_fn({"state_dict": published}, model)
    assert set(found) == set(model.state_dict())
    other = build("mambavision_base")
    other.load_state_dict(found)
    torch.testing.assert_close(other(images()), model(images()))


def test_windows_keep_to_themselves():
    """Before padding and cropping: what enters a window comes out of it."""
    x = torch.randn(2, 8, 12, 3)
    windows = mambavision.into_windows(x, 4)
    assert windows.shape == (12, 16, 3)
    torch.testing.assert_close(windows[1].view(4, 4, 3), x[0, :4, 4:8])
    back = mambavision.out_of_windows(windows, x, x.permute(0, 3, 1, 2)[:, :, :7, :11], 4)
    torch.testing.assert_close(back, x.permute(0, 3, 1, 2)[:, :, :7, :11])


def test_merging_of_the_first_generation():
    merge = vmamba.MergeDown(1)
    merge.norm, merge.reduction = torch.nn.Identity(), Keep()
    x = torch.arange(9.0).view(1, 1, 3, 3)
    y = merge(x)
    assert y.shape == (1, 4, 2, 2)
    assert y[0, :, 0, 0].tolist() == [0, 3, 1, 4]  # rows first
    assert y[0, :, 1, 1].tolist() == [8, 0, 0, 0]


class Keep(torch.nn.Module):
    weight = torch.zeros(1)

    def forward(self, x):
        return x


@pytest.mark.parametrize("name", sorted(SIZES))
def test_sixteen_bits_train(name):
    """A few steps in bfloat16 autocast stay finite, with recurrences in float32."""
    model = build(name, drop_path_rate=0.1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(5):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(torch.randn(4, 3, 32, 32))
        loss = F.cross_entropy(y.float(), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert torch.isfinite(loss)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_normalisation_follows_the_model():
    model = build("vmamba_tiny_s1l8")
    x = torch.rand(1, 3, 4, 4)
    mean, std = (torch.tensor(model.default_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(normalized(x, model), (x - mean) / std)
    model.default_cfg = {**model.default_cfg, "mean": (0.0,) * 3, "std": (0.5,) * 3}
    torch.testing.assert_close(normalized(x, model), x / 0.5)
    with pytest.raises(TypeError, match="divide bytes by 255"):
        normalized(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), model)
    with pytest.raises(ValueError, match="in_chans=1"):
        normalized(x[:, :1], model)


@pytest.mark.parametrize("name", sorted(SIZES))
def test_a_model_in_sixteen_bits_keeps_its_rates(name):
    """Rates and skips stay float32 in a model of bfloat16, which runs."""
    model = build(name, dtype=torch.bfloat16)
    own = {n: p.dtype for n, p in model.named_parameters() if n.rsplit(".", 1)[-1] in RATES}
    assert set(own.values()) <= {torch.float32}
    y = model(torch.randn(2, 3, 32, 32).bfloat16())
    assert y.dtype == torch.bfloat16
    assert torch.isfinite(y).all()


RATES = {"A_log", "A_b_log", "A_logs", "D", "D_b", "Ds", "dt_projs_bias", "dt_bias"}


@pytest.fixture
def hydra(monkeypatch):
    """A model whose blocks note whether they are one call; its loss in each way and its gradients."""
    if reason := available_backends("cpu")["triton"]:
        pytest.skip(reason)
    name, together = "hydra_vit_tiny_patch16_224", []
    torch.manual_seed(0)
    sizes = {"img_size": 32, "embed_dim": 16, "depth": 2, "d_state": 4, "headdim": 16, "num_classes": 3}
    model = vision.create_model(name, **sizes, drop_path_rate=0.5)

    def noted(*arguments, **options):
        y = hydra_blocks(*arguments, **options)
        together.append(y is not None)
        return y

    monkeypatch.setattr(hydra_vit, "hydra_blocks", noted)
    return model, together


def hydra_loss(model, **options):
    torch.manual_seed(1)
    x = torch.randn(4, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16, **options):
        return model(x).float().square().mean()


@pytest.mark.slow
def test_hydra_blocks_in_one_call(hydra):
    model, together = hydra
    for training in (False, True):
        model.train(training)
        expected = hydra_loss(model, enabled=False)
        expected.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        model.zero_grad()
        with use_backend("triton"):
            loss = hydra_loss(model)
            loss.backward()
            assert together.pop()
        torch.testing.assert_close(loss, expected, rtol=3e-2, atol=0)
        assert relative_error(torch.cat([p.grad.flatten() for p in model.parameters()]), gradients) < 2e-2
        model.zero_grad()
    model.eval()
    with use_backend("triton"), torch.no_grad():
        loss = hydra_loss(model)
        assert together.pop()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(hydra_loss(compiled), loss)


@pytest.mark.parametrize("part", ["mixer", "mixer.norm", "drop_path"])
def test_hydra_blocks_with_hooks(hydra, part):
    model, together = hydra
    seen = []
    hook = model.blocks[1].get_submodule(part).register_full_backward_hook(lambda *_: seen.append(part))
    with use_backend("triton"):
        hydra_loss(model.train()).backward()
    hook.remove()
    assert seen
    assert True not in together


@pytest.mark.parametrize("change", ["parametrized", "other", "sharded"])
def test_hydra_blocks_of_other_parts(hydra, change):
    model, together = hydra
    block = model.blocks[1]
    match change:
        case "parametrized":
            torch.nn.utils.parametrize.register_parametrization(block.norm, "weight", torch.nn.Identity())
        case "other":
            block.mixer.out_proj = torch.nn.Sequential(block.mixer.out_proj)
        case "sharded":
            weight = block.mixer._parameters.pop("A_log")
            block.mixer.A_log = weight.detach()
    with use_backend("triton"), torch.no_grad():
        expected = hydra_loss(model.eval(), enabled=False)
        torch.testing.assert_close(hydra_loss(model), expected, rtol=3e-2, atol=0)
    assert True not in together
