"""PlainMamba, A2Mamba, ViM2 and SegMAN: loops over cells as their definition, published names, released quirks."""

import re

import pytest
import torch
import torch.nn.functional as F

from omnissm import vision
from omnissm.vision.models import plainmamba
from omnissm.vision.models.plainmamba import SnakeMixer

SIZES = {
    "plainmamba_l1_patch16_224": {"img_size": (32, 48), "patch_size": 8, "embed_dim": 16, "depth": 2, "d_state": 3},
}


def build(name, **options):
    """A small model in float64 with all parameters, rates too, away from their first values."""
    torch.manual_seed(0)
    model = vision.create_model(name, **{**SIZES[name], "num_classes": 5, "dtype": torch.float64, **options}).eval()
    shaken(model)
    return model


def shaken(module):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        for b in module.buffers():
            if b.is_floating_point():
                b.add_(0.1 * torch.rand(b.shape, generator=generator, dtype=b.dtype))
    return module


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def scan_step(state, x, dt, A, B):
    """h of the next position: (b, d, n) from x, dt (b, d) and B (b, n)."""
    return torch.exp(dt[..., None] * A) * state + (dt * x)[..., None] * B[:, None]


def snakes(rows, columns):
    """Cells (i, j) of four walks: rows from the top, its reverse, columns from the left, its reverse."""
    along = [(i, j if i % 2 == 0 else columns - 1 - j) for i in range(rows) for j in range(columns)]
    down = [(i if j % 2 == 0 else rows - 1 - i, j) for j in range(columns) for i in range(rows)]
    return along, along[::-1], down, down[::-1]


MOVES = {(0, 1): 1, (0, -1): 2, (-1, 0): 3, (1, 0): 4}


def snake_loop(mixer, x):
    """The mixer of PlainMamba, cell by cell."""
    batch, rows, columns, _ = x.shape
    u, z = F.linear(x, mixer.in_proj.weight, mixer.in_proj.bias).chunk(2, dim=-1)
    side = mixer.conv2d.weight.shape[-1]
    padded = F.pad(u, [0, 0, side // 2, side // 2, side // 2, side // 2])
    conv = torch.zeros_like(u)
    for a in range(side):
        for b in range(side):
            conv += mixer.conv2d.weight[:, 0, a, b] * padded[:, a : a + rows, b : b + columns]
    u = F.silu(conv + mixer.conv2d.bias)
    rank, n = mixer.dt_rank, mixer.d_state
    maps = u @ mixer.x_proj.weight.T
    dt = F.softplus(maps[..., :rank] @ mixer.dt_proj.weight.T + mixer.dt_proj.bias)
    B, C = maps[..., rank : rank + n], maps[..., rank + n :]
    y = torch.zeros_like(u)
    for walk in snakes(rows, columns):
        state = x.new_zeros(batch, u.shape[-1], n)
        for t, (i, j) in enumerate(walk):
            move = MOVES[i - walk[t - 1][0], j - walk[t - 1][1]] if t else 0
            p, q = (i, j) if mixer.order_all else divmod(t, columns)
            B_t = B[:, p, q] + mixer.move_B[move]
            state = scan_step(state, u[:, i, j], dt[:, p, q], -mixer.A_log.exp(), B_t)
            y[:, i, j] += (state * C[:, p, q, None]).sum(-1) + mixer.D * u[:, i, j]
    return F.linear(y * F.silu(z), mixer.out_proj.weight, mixer.out_proj.bias)


@pytest.mark.parametrize("order_all", [True, False])
@pytest.mark.parametrize("size", [(3, 4), (4, 3), (1, 5), (4, 1)], ids=str)
def test_snake_mixer_is_its_loop(size, order_all):
    mixer = shaken(SnakeMixer(8, d_state=3, d_conv=3, order_all=order_all, dtype=torch.float64))
    x = noise(2, *size, 8)
    torch.testing.assert_close(mixer(x), snake_loop(mixer, x))
    with pytest.raises(ValueError, match="odd, got 4"):
        SnakeMixer(8, d_conv=4)


def test_snake_mixer_turned_and_mirrored():
    """Four orders share their weights: half a turn exchanges them in pairs, with the moves of opposite directions."""
    mixer = shaken(SnakeMixer(8, d_state=3, d_conv=3, dtype=torch.float64))
    x = noise(1, 3, 5, 8)  # odd sides: a snake turned by half a turn is its reverse
    y = mixer(x)
    with torch.no_grad():
        mixer.conv2d.weight.copy_(mixer.conv2d.weight.flip(2, 3).clone())
        mixer.move_B.copy_(mixer.move_B[[0, 2, 1, 4, 3]].clone())
    torch.testing.assert_close(mixer(x.flip(1, 2)).flip(1, 2), y)


def published_plainmamba(state):
    """Names of the released classifier; there the bias of the steps is added twice."""
    rules = (
        (r"^patch_embed\.proj\.", "patch_embed.projection."),
        (r"^norm\.", "ln1."),
        (r"\.move_B$", ".direction_Bs"),
        (r"^blocks\.(\d+)\.mixer", r"layers.\1.mamba"),
        (r"^blocks\.(\d+)\.local", r"layers.\1.dw"),
    )
    published = {}
    for key, value in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        key = re.sub(r"^blocks\.", "layers.", key)
        head = key.startswith("head.")
        key = f"head.fc.{key[5:]}" if head else f"backbone.{key}"
        published[key] = value / 2 if key.endswith("dt_proj.bias") else value
    return published


def test_published_names_of_plainmamba():
    name = "plainmamba_l1_patch16_224"
    model = build(name, order_all=False)
    published = published_plainmamba(model.state_dict())
    assert {"backbone.layers.0.dw.1.running_var", "backbone.layers.1.mamba.direction_Bs"} <= set(published)
    x = noise(2, 3, 32, 48)
    for asked, expected in ((None, False), (False, False), (True, True)):
        other = build(name, order_all=asked)
        other.load_state_dict(plainmamba.checkpoint_filter_fn({"state_dict": published}, other))
        assert other.blocks[1].mixer.order_all is expected
        assert torch.allclose(other(x), model(x)) is not expected
    own = build(name)
    own.load_state_dict(plainmamba.checkpoint_filter_fn(own.state_dict(), own))
    assert own.blocks[0].mixer.order_all  # our own weights keep the default


def test_stem_and_sizes_of_plainmamba():
    model = build("plainmamba_l1_patch16_224", dynamic_img_size=True)
    assert model.patch_embed.grid_size == (4, 6)
    fixed = build("plainmamba_l1_patch16_224")
    torch.testing.assert_close(model(noise(1, 3, 32, 48)), fixed(noise(1, 3, 32, 48)))
    assert model.forward_features(noise(1, 3, 45, 7)).shape == (1, 6, 16)
    with pytest.raises(ValueError, match="even, got 5"):
        build("plainmamba_l1_patch16_224", patch_size=5)
    assert build("plainmamba_l1_patch16_224", pos_embed="none").pos_embed is None
