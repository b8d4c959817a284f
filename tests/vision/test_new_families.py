"""PlainMamba, A2Mamba, ViM2 and SegMAN: loops over cells as their definition, published names, released quirks."""

import cmath
import re

import pytest
import torch
import torch.nn.functional as F

from omnissm import vision
from omnissm.vision.models import a2mamba, plainmamba, segman
from omnissm.vision.models.a2mamba import A2Attention
from omnissm.vision.models.attentive import resampled_table
from omnissm.vision.models.plainmamba import SnakeMixer
from omnissm.vision.models.segman import SegMANAttention
from omnissm.vision.models.vim2 import ChannelScan

SIZES = {
    "plainmamba_l1_patch16_224": {"img_size": (32, 48), "patch_size": 8, "embed_dim": 16, "depth": 2, "d_state": 3},
    "a2mamba_nano": {
        "img_size": (96, 64),
        "dims": (8, 8, 16, 16),
        "depths": (1, 1, 1, 1),
        "num_heads": (2, 2, 2, 4),
        "window_size": (5, 3, 3, 3),
        "head_dim": 16,
    },
    "vim2_tiny": {"dim": 8, "depths": (1, 3, 1, 1), "d_state": 4},
    "segman_t": {
        "img_size": (96, 64),
        "dims": (8, 8, 12, 16),
        "depths": (1, 1, 1, 1),
        "num_heads": (1, 2, 3, 2),
        "window_size": (5, 3, 3, 3),
        "head_dim": 16,
    },
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
        again = build(name)  # the order goes with the weights
        again.load_state_dict(other.state_dict())
        assert again.blocks[0].mixer.order_all is expected
        torch.testing.assert_close(again(x), other(x))
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


def window_weights(q, k, bias, window, dilation):
    """Attention weights over all cells, (b, h, l, l), 0 outside the windows; a row of cells is wide enough here."""
    rows, columns = q.shape[2:4]
    scores = torch.full((*q.shape[:2], rows * columns, rows * columns), -torch.inf, dtype=q.dtype)
    for s in range(rows * columns):
        (i, j), seen = divmod(s, columns), []
        for t, length in ((i, rows), (j, columns)):
            step = max(1, min(length // window, dilation))
            own = list(range(t % step, length, step))
            start = min(max(own.index(t) - window // 2, 0), len(own) - window)
            seen.append([(cell, (cell - t) // step + window - 1) for cell in own[start : start + window]])
        for y, by_row in seen[0]:
            for x, by_column in seen[1]:
                product = (q[:, :, i, j] * k[:, :, y, x]).sum(-1)
                scores[:, :, s, y * columns + x] = product + bias[:, by_row, by_column]
    return scores.softmax(-1)


def turned_pairs(x):
    """Rotary positions on (b, h, i, j, c) as products with complex numbers."""
    x = x.clone()
    width = x.shape[-1]
    count = width // 4
    for i in range(x.shape[2]):
        for j in range(x.shape[3]):
            for pair in range(width // 2):
                rate = 10000 ** -((pair % count) / max(1, count - 1))
                factor = cmath.exp(1j * rate * (i if pair < count else j))
                a, b = x[:, :, i, j, 2 * pair].clone(), x[:, :, i, j, 2 * pair + 1].clone()
                x[:, :, i, j, 2 * pair] = factor.real * a - factor.imag * b
                x[:, :, i, j, 2 * pair + 1] = factor.imag * a + factor.real * b
    return x


def channel_norm(x, norm):
    centred = x - x.mean(1, keepdim=True)
    unit = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    return unit * norm.weight[:, None, None] + norm.bias[:, None, None]


def heads_of(mixer, x):
    """Queries, keys and values as they enter attention, and the local term of the values."""
    qkv = mixer.qkv(x)
    q, k, v = qkv.unflatten(1, (3, mixer.num_heads, -1)).movedim(3, -1).unbind(1)
    width = q.shape[-1]
    return turned_pairs(q) / width**0.5, turned_pairs(k), v, mixer.lepe(qkv[:, 2 * x.shape[1] :])


def a2_loop(mixer, x):
    """The mixer of A2Mamba with dense weights and the scan cell by cell."""
    batch, dim, rows, columns = x.shape
    q, k, v, local = heads_of(mixer, x)
    half, window = mixer.num_heads // 2, mixer.window
    near = window_weights(q[:, :half], k[:, :half], mixer.bias_table, window, 1)
    far = window_weights(q[:, half:], k[:, half:], mixer.bias_table, window, window)
    v = v.flatten(2, 3)
    first = near @ v[:, :half]
    values = torch.cat([first, far @ (first + v[:, half:])], dim=1)  # (b, h, l, c)
    if mixer.is_global:
        scores = q.flatten(2, 3) @ k.flatten(2, 3).mT + mixer.global_table
        y = (scores.softmax(-1) @ values).mT.flatten(1, 2)
    else:
        ssm = mixer.ssm
        u = F.silu(ssm.conv2d(values.mT.flatten(1, 2).unflatten(2, (rows, columns)))).flatten(2)
        low = ssm.x_proj_weight @ u
        dt = F.softplus(ssm.dt_projs_weight @ low[:, :-2] + ssm.dt_projs_bias[:, None])
        state, states = x.new_zeros(batch, dim, 1), []
        for t in range(rows * columns):
            state = scan_step(state, u[..., t], dt[..., t], -ssm.A_logs.exp(), low[:, -2, t, None])
            states.append(state[..., 0])
        by_head = torch.stack(states, -1).unflatten(1, (mixer.num_heads, -1)).mT
        gathered = torch.cat([near @ by_head[:, :half], far @ by_head[:, half:]], dim=1)
        mixed = ssm.state_fusion(gathered.mT.flatten(2, 3)[..., None]).squeeze(-1).unflatten(2, (dim // (2 * half), -1))
        y = mixed.flatten(1, 2) * low[:, -1:] + ssm.Ds[:, None] * u
    y = channel_norm(y.unflatten(2, (rows, columns)), mixer.norm) + local
    return mixer.proj[1](channel_norm(y * mixer.gate(x), mixer.proj[0]))


@pytest.mark.parametrize("grid", [None, (4, 7)], ids=["scan", "global"])
def test_a2_attention_is_its_loop(grid):
    torch.manual_seed(0)
    mixer = shaken(A2Attention(16, 4, 3, grid, dtype=torch.float64)).eval()
    x = noise(2, 16, 4, 7)  # distance 1 along rows, 2 along columns
    torch.testing.assert_close(mixer(x), a2_loop(mixer, x))


A2_NAMES = (
    (r"^stem\.", "patch_embed."),
    (r"^stages\.(\d)\.blocks", lambda m: f"layers.{2 * int(m[1])}.blocks"),
    (r"^stages\.(\d)\.downsample", lambda m: f"layers.{2 * int(m[1]) - 1}"),
    (r"(blocks\.\d+)\.norm\.", r"\1.norm1."),
    (r"(blocks\.\d+)\.mlp_norm\.", r"\1.norm2."),
    (r"\.mlp_place\.", ".cpe2."),
    (r"\.place\.", ".cpe1."),
    (r"(blocks\.\d+)\.mixer\.", r"\1.token_mixer."),
    (r"(blocks\.\d+)\.scale\.", r"\1.layer_scale1."),
    (r"(blocks\.\d+)\.mlp_scale\.", r"\1.layer_scale2."),
    (r"\.bias_table$", ".rpb.0"),
    (r"^head\.project\.", "classifier."),
    (r"^head\.fc\.", "classifier.4."),
)


def published(state, table):
    """Names and shapes of released weights of A2Mamba and SegMAN; `table` is the name of the table of pairs."""
    found = {"layers.0.rope.angle": torch.zeros(4)}
    for key, value in state.items():
        key = key.replace(".global_table", f".{table}")
        for pattern, replacement in A2_NAMES:
            key = re.sub(pattern, replacement, key)
        if key == "classifier.4.weight":
            value = value[:, :, None, None]
        if "layer_scale" in key and key.endswith("weight"):
            value = value[:, None, None, None]
        found[key] = value[None] if table == "rpb.2" and key.endswith(table) else value
    return found


def test_published_names_of_a2mamba():
    options = {"layer_scale": (None, 1.0, 0.5, 0.5), "scale_stream": (False, False, True, True)}
    model, x = build("a2mamba_nano", **options), noise(1, 3, 96, 64)
    state = published(model.state_dict(), "rpb.2")
    state["layers.6.blocks.0.token_mixer.rpb.1"] = state["layers.6.blocks.0.token_mixer.rpb.0"]  # the same one twice
    assert {"layers.1.0.weight", "layers.6.blocks.0.layer_scale2.weight", "classifier.1.running_mean"} <= set(state)
    found = a2mamba.checkpoint_filter_fn({"state_dict": state}, model)
    assert set(found) == set(model.state_dict())
    torch.manual_seed(7)
    other = vision.create_model("a2mamba_nano", **{**SIZES["a2mamba_nano"], **options}, num_classes=5).double().eval()
    other.load_state_dict(found)
    torch.testing.assert_close(other(x), model(x))


def test_tables_of_pairs_follow_the_image():
    """By the grid a product of an image of queries and one of keys stays the product of both, resized."""
    queries, keys = noise(2, 1, 4, 6)
    table = (queries.flatten()[:, None] * keys.flatten())[None]
    assert resampled_table(table, 4, 6, 4, 6, False) is table
    resized = (F.interpolate(image[None], size=(7, 5), mode="bicubic").flatten() for image in (queries, keys))
    expected = next(resized)[:, None] * next(resized)
    torch.testing.assert_close(resampled_table(table, 4, 6, 7, 5, False)[0], expected)
    assert resampled_table(table, 4, 6, 3, 4, True).shape == (1, 12, 12)
    square = {**SIZES["a2mamba_nano"], "img_size": 96}
    small = vision.create_model("a2mamba_nano", **square)
    larger = vision.create_model("a2mamba_nano", **{**square, "img_size": (128, 160)})
    shaken(small)
    state = a2mamba.checkpoint_filter_fn(small.state_dict(), larger)
    larger.load_state_dict(state)  # a file for another image size
    x = noise(1, 3, 128, 160).float()
    torch.testing.assert_close(larger.eval()(x), small.eval()(x))


def test_settings_of_a2mamba():
    for options, message in (
        ({"num_heads": (1, 2, 2, 4)}, "even, got 1"),
        ({"num_heads": (4, 2, 2, 4)}, "multiple of 4, got 4"),
        ({"window_size": (4, 3, 3, 3)}, "odd"),
        ({"table_resize": "none"}, "'grid' or 'image'"),
        ({"dims": (8, 8, 16)}, "one entry for each of 4"),
    ):
        with pytest.raises(ValueError, match=message):
            build("a2mamba_nano", **options)


@pytest.mark.parametrize("name", ["a2mamba_nano", "segman_t"])
@pytest.mark.parametrize("size", [(32, 32), (33, 96), (224, 64)], ids=str)
def test_below_the_windows(size, name):
    """Grids smaller than the published windows, where released code fails."""
    model = build(name, window_size=(11, 9, 7, 7))
    assert torch.isfinite(model(noise(1, 3, *size))).all()


def segman_loop(mixer, x):
    """The mixer of SegMAN with dense weights and the four scans cell by cell."""
    batch, dim, rows, columns = x.shape
    q, k, v, local = heads_of(mixer, x)
    seen = window_weights(q, k, mixer.bias_table, mixer.window, 1) @ v.flatten(2, 3)
    if mixer.is_global:
        scores = q.flatten(2, 3) @ k.flatten(2, 3).mT + mixer.global_table
        y = (scores.softmax(-1) @ seen).mT.flatten(1, 2).unflatten(2, (rows, columns))
    else:
        ssm = mixer.ssm
        maps = seen.mT.flatten(1, 2).unflatten(2, (rows, columns))
        u = F.silu(mixer.dwconv(maps))
        scanned = torch.zeros_like(u)
        by_rows = [(i, j) for i in range(rows) for j in range(columns)]
        by_columns = [(i, j) for j in range(columns) for i in range(rows)]
        A, D = -ssm.A_logs.exp().view(4, dim, 1), ssm.Ds.view(4, dim)
        for o, walk in enumerate((by_rows, by_columns, by_rows[::-1], by_columns[::-1])):
            state = x.new_zeros(batch, dim, 1)
            for i, j in walk:
                low = u[:, :, i, j] @ ssm.x_proj_weight[o].T
                dt = F.softplus(low[:, :-2] @ ssm.dt_projs_weight[o].T + ssm.dt_projs_bias[o])
                state = scan_step(state, u[:, :, i, j], dt, A[o], low[:, -2, None])
                scanned[:, :, i, j] += state[..., 0] * low[:, -1:] + D[o] * u[:, :, i, j]
        y = channel_norm(scanned, mixer.norm) + maps
    return mixer.proj(y + local)


@pytest.mark.parametrize("grid", [None, (4, 5)], ids=["scans", "global"])
def test_segman_attention_is_its_loop(grid):
    torch.manual_seed(0)
    mixer = shaken(SegMANAttention(24, 3, 3, grid, dtype=torch.float64)).eval()
    x = noise(2, 24, 4, 5)
    torch.testing.assert_close(mixer(x), segman_loop(mixer, x))


def test_published_names_of_segman():
    model, x = build("segman_t", layer_scale=(0.5,) * 4), noise(1, 3, 96, 64)
    state = published(model.state_dict(), "rpb.1")
    for key, value in state.items():
        if key.endswith("x_proj_weight"):
            state[key] = value.flatten(0, 1)[..., None]  # stored as a grouped convolution
    assert "layers.6.blocks.0.token_mixer.rpb.1" in state
    found = segman.checkpoint_filter_fn({"state_dict_ema": state}, model)
    assert set(found) == set(model.state_dict())
    torch.manual_seed(7)
    other = vision.create_model("segman_t", **SIZES["segman_t"], layer_scale=(1.0,) * 4, num_classes=5).double()
    other.load_state_dict(found)
    torch.testing.assert_close(other.eval()(x), model(x))
    with pytest.raises(ValueError, match="multiple of 4, got 5"):
        build("segman_t", num_heads=(1, 2, 5, 2))


def channel_loop(mixer, x):
    """Scans along the channels of one cell after another, (cells, d)."""
    scan, found = mixer.scan, []
    for cell in x:
        u, z = (mixer.lift(cell[:, None]) @ scan.in_proj.weight.T).chunk(2, dim=-1)  # (d, inner)
        total = torch.zeros_like(u)
        for end in ("", "_b"):
            walk = u.flip(0) if end else u
            conv, low, steps = (getattr(scan, f"{name}{end}") for name in ("conv1d", "x_proj", "dt_proj"))
            A = -(scan.A_b_log if end else scan.A_log).exp()
            D = scan.D_b if end else scan.D
            state, ys = torch.zeros_like(A)[None], []
            for t in range(len(walk)):
                seen = [walk[t - k] * conv.weight[:, 0, 3 - k] for k in range(4) if t >= k]
                v = F.silu(sum(seen) + conv.bias)
                dt, B, C = low(v).split([scan.dt_rank, scan.d_state, scan.d_state])
                state = scan_step(state, v[None], F.softplus(steps(dt))[None], A, B[None])
                ys.append((state[0] * C).sum(-1) + D * v)
            total += torch.stack(ys).flip(0) if end else torch.stack(ys)
        found.append(mixer.drop((total * F.silu(z) / 2) @ scan.out_proj.weight.T)[:, 0])
    return torch.stack(found)


def test_channel_scan_is_its_loop():
    mixer = shaken(ChannelScan(3, 2, dtype=torch.float64))
    x = noise(1, 2, 3, 9)
    torch.testing.assert_close(mixer(x).flatten(0, 2), channel_loop(mixer, x.flatten(0, 2)))


def test_stages_of_vim2_weigh_all_earlier_outputs():
    model = build("vim2_tiny")
    stage, x = model.stages[1], noise(2, 8, 6, 5)
    tokens = [stage.downsample(x).permute(0, 2, 3, 1)]
    channels = tokens[:]
    for k, block in enumerate(stage.blocks, start=1):
        w, p = block.to_tokens.weights, block.to_channels.weights
        assert (len(w), len(p)) == (2 * k, 2 * k + 1)
        read = sum(w[i] * tokens[i] + w[k + i] * channels[i] for i in range(k))
        tokens.append(block.tokens(block.norm(read)))
        read = sum(p[i] * tokens[i] for i in range(k + 1)) + sum(p[k + 1 + i] * channels[i] for i in range(k))
        channels.append(block.channels(block.channel_norm(read)))
    weights = stage.merge.weights
    out = sum(weight * part for weight, part in zip(weights, tokens + channels, strict=True))
    torch.testing.assert_close(stage(x), out.permute(0, 3, 1, 2))


def test_stages_of_vim2_start_as_residual_networks():
    stage = vision.create_model("vim2_tiny", **SIZES["vim2_tiny"]).double().stages[1]
    x = noise(1, 8, 6, 5)
    stream = stage.downsample(x).permute(0, 2, 3, 1)
    for block in stage.blocks:
        stream = stream + block.tokens(block.norm(stream))
        stream = stream + block.channels(block.channel_norm(stream))
    torch.testing.assert_close(stage(x), stream.permute(0, 3, 1, 2))
    matcher = build("vim2_tiny").group_matcher()
    assert any(re.match(pattern, "stages.1.merge.weights") for pattern, _ in matcher["blocks"])
