"""All vision models: sizes, and what timm expects of a model, on small ones of every family."""

import math

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm import set_scriptable
from timm.layers import get_notrace_functions, get_notrace_modules
from timm.optim import param_groups_weight_decay
from torchvision.models.feature_extraction import create_feature_extractor

from omnissm import vision

PARAMETERS = {
    "hydra_vit_tiny_patch16_224": 7_119_064,
    "hydra_vit_small_patch16_224": 25_025_992,
    "hydra_vit_base_patch16_224": 93_353_896,
    "vim_tiny_patch16_224": 7_148_008,
    "vim_small_patch16_224": 25_796_584,
    "vim_base_patch16_224": 97_598_440,
    "lbvim_tiny_patch16_224": 6_419_560,
    "lbvim_300_patch16_224": 14_897_200,
    "lbvim_small_patch16_224": 23_897_320,
    "chimera_vit_tiny_patch16_224": 7_148_112,
    "chimera_vit_small_patch16_224": 24_410_256,
    "chimera_vit_base_patch16_224": 89_457_936,
    "plainmamba_l1_patch16_224": 7_551_656,
    "plainmamba_l2_patch16_224": 26_145_832,
    "plainmamba_l3_patch16_224": 50_956_456,
    "a2mamba_nano": 4_195_052,
    "a2mamba_tiny": 15_365_506,
    "a2mamba_small": 30_672_834,
    "a2mamba_base": 51_134_464,
    "a2mamba_large": 93_737_376,
    "segman_t": 3_506_014,
    "segman_s": 25_507_582,
    "segman_b": 45_020_682,
    "segman_l": 80_985_272,
    "vim2_tiny": 20_095_760,
    "vim2_small": 42_839_748,
    "vim2_base": 73_647_940,
    "vmamba_tiny_s1l8": 30_249_064,
    "vmamba_tiny_s2l5": 30_705_832,
    "vmamba_small_s1l20": 49_012_840,
    "vmamba_small_s2l15": 50_147_752,
    "vmamba_base_s1l20": 86_614_504,
    "vmamba_base_s2l15": 88_557_800,
    "vmamba_v0_tiny": 22_893_448,
    "vmamba_v0_small": 44_417_416,
    "vmamba_v0_base": 76_254_056,
    "mambavision_tiny": 31_794_248,
    "mambavision_tiny2": 35_104_008,
    "mambavision_small": 50_140_584,
    "mambavision_base": 97_685_288,
    "mambavision_large": 227_961_048,
    "mambavision_large2": 241_554_824,
}
TOKENS = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4}
SMALL = {
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
    },
    "segman_t": {
        "dims": (8, 8, 12, 16),
        "depths": (1, 1, 1, 1),
        "num_heads": (1, 2, 3, 2),
        "window_size": (5, 3, 3, 3),
        "head_dim": 16,
    },
    "vim2_tiny": {"dim": 8, "depths": (1, 2, 1, 1), "d_state": 4},
    "vmamba_tiny_s1l8": {"dim": 8, "depths": (1, 1, 2, 1)},
    "vmamba_v0_tiny": {"dim": 8, "depths": (1, 1, 1, 1), "d_state": 4},
    "mambavision_base": {
        "dim": 8,
        "stem_dim": 8,
        "depths": (1, 1, 2, 2),
        "num_heads": (1, 1, 2, 2),
        "window_size": (8, 8, 4, 2),
    },
}
FAMILIES = sorted(SMALL)
PYRAMIDS = [name for name in FAMILIES if "patch" not in name]
TOKEN_MODELS = [name for name in FAMILIES if "patch" in name]


def small(name, **options):
    torch.manual_seed(0)
    return vision.create_model(name, **{**SMALL[name], **options}).eval()


def images(batch=2, height=32, width=None, channels=3):
    return torch.randn(batch, channels, height, width or height, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_parameter_counts(name):
    model = vision.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    state, cfg = model.state_dict(), model.default_cfg
    assert f"{cfg['first_conv']}.weight" in state
    assert f"{cfg['classifier']}.weight" in state
    assert not cfg["url"]
    assert not cfg.get("hf_hub_id")


def test_every_model_is_registered_and_counted():
    assert set(vision.list_models()) == set(PARAMETERS)
    assert set(PARAMETERS) <= set(timm.list_models())
    assert not set(PARAMETERS) & set(timm.list_models(pretrained=True))
    assert vision.list_models("vmamba_v0_*") == ["vmamba_v0_base", "vmamba_v0_small", "vmamba_v0_tiny"]


def test_unknown_names_and_options():
    with pytest.raises(ValueError, match="Did you mean 'hydra_vit_tiny_patch16_224'"):
        vision.create_model("hydra_vit_tny_patch16_224")
    with pytest.raises(ValueError, match="list_models"):
        vision.create_model("qqqqqqqq")
    with pytest.raises(TypeError):
        small("vim_tiny_patch16_224", colour=3)
    with pytest.raises(TypeError):
        small("vmamba_tiny_s1l8", colour=3)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_gets_a_gradient(name):
    model = small(name, num_classes=42).train()
    y = model(images())
    assert y.shape == (2, 42)
    y.mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_do_not_depend_on_the_batch_or_the_call(name):
    model, x = small(name), images(3)
    with torch.no_grad():
        y = model(x)
        assert torch.equal(y, model(x))
        torch.testing.assert_close(model(x[1:2]), y[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_heads(name):
    model, x = small(name), images()
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    assert features.shape[-1 if features.dim() == 3 else 1] == model.num_features
    torch.testing.assert_close(model(x), model.forward_head(features))
    assert model.get_classifier().out_features == model.num_classes == 1000
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    model.reset_classifier(0)
    assert model.num_classes == 0
    torch.testing.assert_close(model(x), pooled)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), features)
    assert small(name, num_classes=0, global_pool="")(x).shape == features.shape
    with pytest.raises(ValueError, match="global_pool"):
        model.reset_classifier(0, "max")


@pytest.mark.parametrize("name", FAMILIES)
def test_features(name):
    model, x = small(name, features_only=True), images()
    channels, reductions = model.feature_info.channels(), model.feature_info.reduction()
    maps = model(x)
    assert len(maps) == len(channels) >= 3
    for y, channel, reduction in zip(maps, channels, reductions, strict=True):
        assert y.shape == (2, channel, math.ceil(32 / reduction), math.ceil(32 / reduction))
    assert len(small(name, features_only=True, out_indices=(0, 1, 2), feature_cls="getter")(x)) == 3


@pytest.mark.parametrize("name", FAMILIES)
def test_forward_intermediates(name):
    model, x = small(name), images()
    with torch.no_grad():
        final, maps = model.forward_intermediates(x)
        torch.testing.assert_close(final, model.forward_features(x))
        assert len(maps) == len(model.feature_info)
        last = model.forward_intermediates(x, indices=[-1], norm=True, intermediates_only=True)[0]
        if final.dim() == 4:
            torch.testing.assert_close(last, final)
        early = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
        torch.testing.assert_close(early[0], maps[1])
        with pytest.raises(ValueError, match="output_fmt"):
            model.forward_intermediates(x, output_fmt="HWC")
        with pytest.raises(ValueError, match="not there"):
            model.forward_intermediates(x, indices=[9])
        kept = model.prune_intermediate_layers([1])
        assert kept == [1]
        torch.testing.assert_close(model.forward_intermediates(x, indices=[1], intermediates_only=True)[0], maps[1])


@pytest.mark.parametrize("name", TOKEN_MODELS)
def test_class_tokens_are_kept_apart_from_the_maps(name):
    model, x = small(name), images()
    _, found = model.forward_intermediates(x, indices=[0], return_prefix_tokens=True, output_fmt="NLC")
    patches, tokens = found[0]
    assert patches.shape == (2, 16, 16)
    assert tokens.shape == (2, 1 if name.startswith("vim") else 0, 16)


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointing_changes_nothing(name):
    model, x = small(name).train(), images()
    model.eval()
    y = model(x)
    y.sum().backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    model.set_grad_checkpointing()
    assert model.grad_checkpointing
    again = model(x)
    torch.testing.assert_close(again, y, rtol=1e-4, atol=1e-5)
    again.sum().backward()
    for key, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_groups_and_decay(name):
    model = small(name)
    groups = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    assert set(groups) == set(dict(model.named_parameters()))
    first, last = (
        groups[f"{model.default_cfg['first_conv']}.weight"],
        groups[f"{model.default_cfg['classifier']}.weight"],
    )
    assert first == 0
    assert last == max(groups.values())
    exempt = model.no_weight_decay()
    for key, _ in model.named_parameters():
        if key.rpartition(".")[2] in ("A_log", "A_b_log", "A_logs", "dt_projs_bias", "pos_embed", "cls_token"):
            assert key in exempt, key
    split = param_groups_weight_decay(model, 0.1, no_weight_decay_list=exempt)
    decayed = {id(p) for group in split if group["weight_decay"] for p in group["params"]}
    assert not decayed & {id(p) for key, p in model.named_parameters() if key in exempt}


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("name", FAMILIES)
def test_other_channels(name, channels):
    assert small(name, in_chans=channels)(images(channels=channels)).shape == (2, 1000)


@pytest.mark.parametrize("size", [(96, 96), (100, 132), (128, 64), (224, 224)], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_other_image_sizes(name, size):
    model = small(name) if name in PYRAMIDS else small(name, dynamic_img_size=True)
    with torch.no_grad():
        assert torch.isfinite(model(images(1, *size))).all()
        _, maps = model.forward_intermediates(images(1, *size))
    for y, info in zip(maps, model.feature_info, strict=True):
        assert y.shape[2:] == tuple(math.ceil(side / info["reduction"]) for side in size)


@pytest.mark.parametrize("name", TOKEN_MODELS)
def test_fixed_sizes(name):
    with pytest.raises(ValueError, match=r"32 x 32, got 48 x 48.*dynamic_img_size"):
        small(name)(images(1, 48))
    assert small(name, img_size=(48, 64))(images(1, 48, 64)).shape == (1, 1000)
    with pytest.raises(ValueError, match="smaller than one patch"):
        small(name, img_size=4)
    with pytest.raises(ValueError, match="patches and their distance take at least one pixel, got 0"):
        small(name, patch_size=0)
    dynamic, fixed = small(name, dynamic_img_size=True), small(name)
    torch.testing.assert_close(dynamic(images(1)), fixed(images(1)))


@pytest.mark.parametrize("name", FAMILIES)
def test_device_and_dtype(name):
    meta = small(name, device="meta")
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    narrow = small(name, dtype=torch.bfloat16)
    assert {p.dtype for p in narrow.parameters()} <= {torch.bfloat16, torch.float32}
    with torch.no_grad():
        assert torch.isfinite(narrow(images().bfloat16())).all()
    assert small(name, dtype=torch.float64)(images().double()).dtype == torch.float64


@pytest.mark.parametrize("name", FAMILIES)
def test_autocast_stays_close(name):
    model, x = small(name), images()
    with torch.no_grad():
        y = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            narrow = model(x)
    assert (narrow.float() - y).abs().max() < 0.2 * y.abs().max()


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_from_a_file(name, tmp_path):
    """Safetensors without network; another number of classes leaves the classifier as it is drawn."""
    model, x = small(name), images()
    path = str(tmp_path / "weights.safetensors")
    save_file(model.state_dict(), path)
    torch.manual_seed(5)
    again = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": path}, **SMALL[name]).eval()
    torch.testing.assert_close(again(x), model(x))
    other = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay={"file": path}, num_classes=3, in_chans=1, **SMALL[name]
    )
    assert other.eval()(images(channels=1)).shape == (2, 3)
    wrapped = {"model": {f"module.{key}": value for key, value in model.state_dict().items()}}
    torch.save(wrapped, tmp_path / "weights.pth")
    loaded = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "weights.pth")}, **SMALL[name]
    )
    torch.testing.assert_close(loaded.eval()(x), model(x))


@pytest.mark.parametrize("name", ["hydra_vit_tiny_patch16_224", "vim_tiny_patch16_224"])
def test_position_tables_are_resampled(name, tmp_path):
    model = small(name)
    path = str(tmp_path / "weights.safetensors")
    save_file(model.state_dict(), path)
    larger = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay={"file": path}, **{**SMALL[name], "img_size": (48, 64)}
    )
    token = name.startswith("vim")
    assert larger.pos_embed.shape[1] == 48 + token
    if token:  # the class token's position stays with it
        torch.testing.assert_close(larger.pos_embed[:, 24], model.pos_embed[:, 8])


def traced(model):
    options = {"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions()}
    nodes = {"head" if "head" in dict(model.named_children()) else "fc": "y"}
    return create_feature_extractor(model, nodes, tracer_kwargs={**options, "param_shapes_constant": True})


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_fx_and_script(name):
    with set_scriptable(True):
        model, x = small(name), images()
    with torch.no_grad():
        y = model(x)
        assert torch.equal(traced(model)(x)["y"], y)
        torch.testing.assert_close(torch.jit.script(model)(x), y)


EXPORTED_QUICKLY = ("hydra_vit_tiny_patch16_224", "vim_tiny_patch16_224")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in EXPORTED_QUICKLY else pytest.mark.slow) for n in FAMILIES]
)
def test_export_with_any_batch(name):
    model = small(name)
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (images(3),), dynamic_shapes=({0: batch},))
        torch.testing.assert_close(program.module()(images(5)), model(images(5)))
