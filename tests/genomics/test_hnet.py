"""H-Nets against published numbers, sizes, configuration files, and themselves under cuts, padding and packing."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from omnissm.genomics.models import create_model, from_pretrained, list_models, load_hnet, save_pretrained
from omnissm.genomics.models.hnet import HNet, check_layout
from omnissm.genomics.models.official import cast_weights, from_official, to_official
from omnissm.ssmcore import account
from omnissm.ssmcore.cache import load_state, save_state
from omnissm.ssmcore.chunking import ratio_loss
from omnissm.ssmcore.generate import generate

SIZES = {
    "hnet_tiny": 234_869,
    "dnahnet_debug": 1_436_848,
    "dnahnet_small": 34_596_448,
    "dnahnet_base": 215_030_976,
    "hnet_hg38_t15": 64_488_016,
    "hnet_hg38_m15": 65_706_016,
    "mamba2_debug": 1_454_388,
    "transformer_debug": 1_426_752,
    "mamba2_small": 34_664_896,
    "transformer_small": 35_597_824,
    "mamba2_hg38": 33_197_536,
    "transformer_hg38": 29_173_248,
}


def official(layout, widths, hidden):
    """Configuration in the keys of the published files."""
    stages = len(widths)
    attention = {
        "num_heads": [16] * stages,
        "rotary_emb_dim": [32] * stages,
        "window_size": [1023] * (stages - 1) + [-1],
    }
    return {
        "arch_layout": layout,
        "d_model": widths,
        "d_intermediate": hidden,
        "vocab_size": 256,
        "ssm_cfg": {"chunk_size": 256, "d_conv": 4, "d_state": 128, "expand": 2},
        "attn_cfg": attention,
        "tie_embeddings": False,
    }


PUBLISHED = {
    "1stage_L": (
        official(["m4", ["T22"], "m4"], [1024, 1536], [0, 4096]),
        679_405_312,
    ),
    "2stage_L": (
        official(["m4", ["T1m4", ["T26"], "m4T1"], "m4"], [1024, 1024, 1536], [0, 2816, 4096]),
        874_315_264,
    ),
    "2stage_XL": (
        official(["m4", ["T1m4", ["T27"], "m4T1"], "m4"], [1024, 1536, 2048], [0, 4096, 5504]),
        1_603_492_224,
    ),
}


def ids(*shape, seed=0):
    letters = torch.tensor(list(b"ACGT"))
    return letters[torch.randint(4, shape, generator=torch.Generator().manual_seed(seed))]


def tiny(**overrides):
    """Two stages, 0.1 M parameters, weights larger than at the start so that boundaries vary."""
    model = HNet(
        **{
            "arch_layout": ["m1", ["T1m1", ["T1"], "m1T1"], "m1"],
            "d_model": [32, 32, 64],
            "d_intermediate": [None, 128, 128],
            "ssm_cfg": {"d_state": 8},
            "attn_cfg": {"num_heads": [2, 2, 2], "rotary_emb_dim": [8, 8, 16], "window_size": [5, 5, -1]},
            "target_ratios": [3.0, 2.0],
        }
        | overrides
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (1 if "emb" in name else 0.15))
    return model.eval()


# -- published numbers


@pytest.mark.parametrize(("name", "targets"), [("hnet_1stage_tiny", (3,)), ("hnet_2stage_tiny", (3, 2))])
@pytest.mark.parametrize("layout", ["padded", "flat"])
def test_golden(name, targets, layout, shared_data):
    """Logits, boundaries, losses and all gradients of the published definition, run elsewhere."""
    folder = shared_data / "genomics" / "hnet_golden"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}")
    config = json.loads((folder / f"{name}.config.json").read_text())
    model = load_hnet(folder / f"{name}.weights.safetensors", config | {"layout": layout})
    expected = load_file(folder / f"{name}.io.safetensors")
    tokens = expected["input_ids"]
    hidden, found = model.hidden(tokens)
    logits = model.lm_head(hidden)
    assert rms(logits, expected["logits"]) < 1e-5
    for s, boundaries in enumerate(found):
        real = torch.ones_like(boundaries.mask) if boundaries.real is None else boundaries.real
        assert torch.equal(boundaries.mask[real], expected[f"boundary_mask.{s}"].bool())
        torch.testing.assert_close(boundaries.prob[real], expected[f"boundary_prob.{s}"], atol=1e-6, rtol=0)
    cross_entropy = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    ratios = torch.stack([ratio_loss(b, n) for b, n in zip(found, targets)])
    torch.testing.assert_close(cross_entropy, expected["loss_ce"][0], atol=1e-5, rtol=0)
    torch.testing.assert_close(ratios, expected["ratio_losses"], atol=1e-5, rtol=0)
    (cross_entropy + 0.02 * ratios.sum()).backward()
    published = {tensor.data_ptr(): name for name, tensor in to_official(model).items()}
    gradients = {published[p.data_ptr()]: p.grad for p in model.parameters()}
    assert sum(name.startswith("grad_norm.") for name in expected) == len(gradients)
    for key, value in expected.items():
        kind, _, weight = key.partition(".")
        if kind == "grad":
            assert rms(gradients[weight], value) < 1e-3, weight
        elif kind == "grad_norm":
            assert gradients[weight].norm().item() == pytest.approx(value.item(), rel=1e-3), weight
    for row in range(2):  # each row alone
        assert rms(model(tokens[row : row + 1]), expected["logits"][row : row + 1]) < 1e-5


def rms(got, expected):
    return ((got - expected).square().mean() / expected.square().mean()).sqrt().item()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_and_names(name):
    config, size = PUBLISHED[name]
    model = HNet(**config, device="meta")
    assert sum(p.numel() for p in model.parameters()) == size
    names = to_official(model)
    assert "backbone.main_network.encoder.layers.0.mixer.in_proj.weight" not in names or name.startswith("2stage")
    inner = "backbone." + "main_network." * (len(config["d_model"]))
    for expected in (
        "embeddings.weight",
        "backbone.encoder.layers.3.mixer.conv1d.weight",
        "backbone.encoder.layers.0.mixer.norm.weight",
        "backbone.decoder.rmsnorm.weight",
        "backbone.routing_module.q_proj_layer.weight",
        "backbone.residual_proj.bias",
        f"{inner}layers.0.mixer.Wqkv.weight",
        f"{inner}layers.21.norm2.weight",
        f"{inner}layers.0.mlp.fc1.weight",
        f"{inner}rmsnorm.weight",
    ):
        assert expected in names, expected
    assert set(from_official(names)) == set(model.state_dict())


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
    assert sum(p.numel() for p in create_model(name, device="meta").parameters()) == SIZES[name]


# -- behaviour


def test_padded_batch_packed_row_and_single_sequences_agree():
    model = tiny()
    parts = [ids(1, n, seed=n) for n in (40, 17, 1)]
    alone = torch.cat([model(part)[0] for part in parts])
    real = torch.arange(40) < torch.tensor([[40], [17], [1]])
    rows = torch.cat([F.pad(part, (0, 40 - part.shape[1])) for part in parts])
    assert rms(model(rows, mask=real)[real], alone) < 1e-5
    left = torch.cat([F.pad(part, (40 - part.shape[1], 0)) for part in parts])
    assert rms(model(left, mask=real.flip(1))[real.flip(1)], alone) < 1e-5
    numbers = torch.arange(3).repeat_interleave(torch.tensor([40, 17, 1]))[None]
    for layout in ("padded", "flat"):
        for level in model.backbone.levels():
            level.layout = layout
        assert rms(model(torch.cat(parts, 1), seq_idx=numbers)[0], alone) < 1e-5


@pytest.mark.parametrize("sizes", [[1, 30, 33], [7] * 9 + [1], [31, 33], [32, 32], [64]], ids=str)
def test_any_cut_gives_the_same_logits_and_state(sizes):
    model, tokens = tiny(), ids(2, 64)
    whole, end = model.prefill(tokens)
    assert rms(whole, model(tokens)) < 1e-5
    state, logits = None, []
    for piece in tokens.split(sizes, dim=1):
        part, state = model.prefill(piece, state)
        logits.append(part)
    assert rms(torch.cat(logits, 1), whole) < 1e-5
    assert state.count.tolist() == end.count.tolist()
    after = ids(2, 9, seed=5)
    assert rms(model.prefill(after, state)[0], model.prefill(after, end)[0]) < 1e-5


@pytest.mark.parametrize("dense", [False, True])
def test_step_is_the_full_pass_for_rows_that_cut_at_different_places(dense):
    model, tokens = tiny(), ids(3, 40)
    whole = model(tokens)
    stage = model.boundaries(tokens)[0].mask
    assert (stage.any(0) & ~stage.all(0)).any()
    logits, state = model.prefill(tokens[:, :11])
    assert rms(logits, whole[:, :11]) < 1e-5
    for t in range(11, 40):
        logits, state = model.step(tokens[:, t], state, dense=dense)
        assert rms(logits, whole[:, t]) < 1e-5
    picked = state.select(torch.tensor([2, 0]))
    assert picked.batch_size == 2
    more = ids(2, seed=9)
    both, _ = model.step(more, picked)
    for row, source in enumerate((2, 0)):
        alone, _ = model.step(more[row : row + 1], state.select(torch.tensor([source])))
        assert rms(both[row : row + 1], alone) < 1e-5


def test_no_logit_depends_on_what_comes_later():
    model, tokens = tiny(), ids(1, 30)
    embedded = model.embeddings(tokens).detach().requires_grad_()
    for t in (0, 13, 28):
        (gradient,) = torch.autograd.grad(model.lm_head(model.backbone(embedded)[0])[:, t].sum(), embedded)
        assert not gradient[:, t + 1 :].any()
        assert gradient[:, : t + 1].any()
    other = tokens.clone()
    other[0, 20] = ord("A") if other[0, 20] != ord("A") else ord("C")
    for a, b in zip(model.boundaries(tokens), model.boundaries(other)):
        assert torch.equal(a.mask[:, :20], b.mask[:, :20])


def test_boundaries_stand_at_bases():
    """An inner boundary stands where the stage outside began that chunk; shares multiply to the whole."""
    model, tokens = tiny(), ids(2, 50)
    real = torch.arange(50) < torch.tensor([[50], [23]])
    _, found = model.hidden(tokens, mask=real)
    outer, inner = model.boundaries(tokens, mask=real)
    assert torch.equal(outer.mask, found[0].mask)
    assert torch.equal(outer.eligible, real)
    assert torch.equal(inner.eligible, outer.mask)
    assert not (inner.mask & ~outer.mask).any()
    assert inner.mask[:, 0].all()
    for row in range(2):
        positions = outer.mask[row].nonzero()[:, 0]
        chosen = positions[found[1].mask[row, : len(positions)]]
        assert torch.equal(inner.mask[row].nonzero()[:, 0], chosen)
        torch.testing.assert_close(inner.prob[row, positions], found[1].prob[row, : len(positions)])
    assert create_model("mamba2_debug").boundaries(tokens) == []


def test_layers_say_where_their_chunks_begin():
    model, tokens = tiny(), ids(2, 50)
    assert model.layers() == [
        "embedding", "stage0.encoder", "stage1.encoder", "inner", "stage1.decoder", "stage0.decoder",
    ]  # fmt: skip
    stages = model.boundaries(tokens)
    for name, where in (("stage1.encoder", stages[0].mask), ("inner", stages[1].mask)):
        x, start, real = model.layer(tokens, name)
        assert x.shape[:2] == start.shape == real.shape
        for row in range(2):
            assert torch.equal(start[row][real[row]], where[row].nonzero()[:, 0])
    last = model.layer(tokens, "stage0.decoder")
    torch.testing.assert_close(model.lm_head(last.x), model(tokens))
    with pytest.raises(ValueError, match=r"unknown layer 'decoder'; this model has embedding, stage0\.encoder"):
        model.layer(tokens, "decoder")


def test_operations_follow_the_rates():
    """Outer layers always, inner ones with the share of positions that reach them; as counted part by part."""
    model = tiny()
    whole = account(model, 600, mode="prefill")
    assert model.flops(600, rates=[1.0, 1.0]) == whole.flops
    part = {s: sum(p.flops for p in whole.parts if model.stage_of(f"{p.name}.") == s) for s in range(3)}
    assert part[0] < model.flops(600) < whole.flops
    linear = model.flops(600, rates=[0.5, 1e-9])
    assert part[0] + 0.3 * part[1] < linear < part[0] + 0.6 * part[1] + part[2]
    assert model.flops(600, mode="train") == 3 * model.flops(600)
    assert model.flops(600, mode="decode") < model.flops(600) / 500
    with pytest.raises(ValueError, match="2 stages need as many rates, got 1"):
        model.flops(600, rates=[0.5])


def test_state_is_a_file_and_fixed_slots_hold_it(tmp_path):
    model, tokens = tiny(), ids(2, 30)
    whole = model(tokens)
    state = model.init_state(2, slots=40)
    _, state = model.prefill(tokens[:, :20], state)
    save_state(state, tmp_path / "s.safetensors")
    state = load_state(tmp_path / "s.safetensors")
    for t in range(20, 30):
        logits, state = model.step(tokens[:, t], state)
        assert rms(logits, whole[:, t]) < 1e-5
    half = state.to(dtype=torch.bfloat16)
    assert half.dechunk.dtype == torch.float32
    assert half.router.last.dtype == torch.bfloat16
    assert half.encoder.layers[0].ssm.dtype == torch.float32


def test_generation_of_the_core_works():
    model, prompts = tiny(), ids(2, 12)
    new = generate(model, prompts, 8)
    tokens = prompts
    for _ in range(8):
        tokens = torch.cat([tokens, model(tokens)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(new, tokens[:, 12:])


def test_fresh_rates_are_near_the_target():
    """A fresh router cuts about every second to third base of random DNA."""
    model = create_model("dnahnet_debug")
    rate = model.boundaries(ids(2, 512))[0].mask.float().mean().item()
    assert 0.2 < rate < 0.8


def test_initial_values():
    torch.manual_seed(0)
    model = create_model("dnahnet_small", arch_layout=["m1", ["T1m1", ["T1"], "m1T1"], "m1"])
    levels = model.backbone.levels()
    assert model.embeddings.weight.std().item() == pytest.approx(1, rel=0.02)
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.02)
    for level, branches in zip(levels, (2, 2 + 6, 2 + 6 + 2)):
        stack = level.encoder if level.n_stages else level.main_network
        block = stack.blocks[0]
        assert block.mixer.out_proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(branches), rel=0.03)
        assert block.mixer.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert torch.equal(levels[0].routing_module.q_proj_layer.weight, torch.eye(256))
    assert not levels[1].residual_proj.weight.any()
    assert not levels[1].pad_dimension.any()
    assert model.lr_multipliers() == pytest.approx([math.sqrt(6 * 2), math.sqrt(2 * 512 / 384), 1])


def test_stage_of_every_parameter():
    model = tiny()
    stages = {name: model.stage_of(name) for name, _ in model.named_parameters()}
    assert stages["embeddings.weight"] == stages["lm_head.weight"] == 0
    assert stages["backbone.routing_module.q_proj_layer.weight"] == 0
    assert stages["backbone.main_network.encoder.blocks.0.norm.weight"] == 1
    assert stages["backbone.main_network.main_network.pad_dimension"] == 2
    assert stages["backbone.main_network.main_network.main_network.norm.weight"] == 2
    assert create_model("mamba2_debug", device="meta").stage_of("backbone.main_network.norm.weight") == 0


# -- files and errors


def test_model_folder_round_trip(tmp_path):
    model, tokens = tiny(), ids(1, 20)
    save_pretrained(model, tmp_path / "model")
    again = from_pretrained(tmp_path / "model")
    assert torch.equal(again(tokens), model(tokens))
    assert again.config == model.config
    assert json.loads((tmp_path / "model" / "vocabulary.json").read_text())["bases"]["G"] == ord("G")
    half = from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert half.embeddings.weight.dtype == torch.bfloat16
    assert half.backbone.residual_proj.weight.dtype == torch.float32
    assert half.backbone.encoder.blocks[0].mixer.A_log.dtype == torch.float32
    assert half(tokens).isfinite().all()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "note.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not a model folder"):
        save_pretrained(model, tmp_path / "other")
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        from_pretrained(tmp_path / "other")


def test_official_checkpoint_round_trip(tmp_path):
    model = tiny()
    save_file({name: t.clone() for name, t in to_official(model).items()}, tmp_path / "w.safetensors")
    (tmp_path / "c.json").write_text(json.dumps({k: v for k, v in model.config.items() if k != "layout"}))
    again = load_hnet(tmp_path / "w.safetensors", tmp_path / "c.json")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    torch.save(to_official(model), tmp_path / "w.pt")
    with pytest.raises(ValueError, match="is a pickle file"):
        load_hnet(tmp_path / "w.pt", model.config)
    assert rms(load_hnet(tmp_path / "w.pt", model.config, allow_pickle=True)(ids(1, 9)), model(ids(1, 9))) < 1e-6
    save_file({"lm_head.weight": torch.zeros(256, 16)}, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match=r"`lm_head.weight` is \(256, 16\), expected \(256, 32\).*is missing"):
        load_hnet(tmp_path / "part.safetensors", model.config)


def test_sixteen_bits():
    model, tokens = tiny(), ids(1, 40)
    expected = model(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.boundaries(tokens)[0].eligible, torch.ones_like(tokens, dtype=torch.bool))
        assert model(tokens).isfinite().all()
    half = cast_weights(tiny(), torch.bfloat16)
    assert half.backbone.encoder.blocks[0].mixer.A_log.dtype == torch.float32
    assert half(tokens).float().isfinite().all()
    assert expected.dtype == torch.float32


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (["m4", ["T2"]], r"arch_layout must be \[pattern\] or \[encoder, inner, decoder\], got 2 entries"),
        (["m4", ["T2", ["q1"], "m1"], "m4"], r"arch_layout\[1\]\[1\]\[0\] must be a pattern .* got 'q1'"),
        ("m4", r"arch_layout must be .* got 'm4'"),
        (["m4", "T2", "m4"], r"arch_layout\[1\] must be"),
    ],
)
def test_layouts_are_checked_at_their_place(layout, message):
    with pytest.raises(ValueError, match=message):
        check_layout(layout)


def test_errors_name_the_way_out():
    with pytest.raises(ValueError, match=r"Unknown genomics model 'hnet_tniy'\. Did you mean 'hnet_tiny'\?"):
        create_model("hnet_tniy")
    with pytest.raises(TypeError, match=r"no option 'd_modle'\. Did you mean 'd_model'\?"):
        create_model("hnet_tiny", d_modle=[1])
    with pytest.raises(TypeError, match=r"`ssm_cfg` has no entry 'd_sate'; it takes chunk_size, d_conv"):
        tiny(ssm_cfg={"d_sate": 8})
    with pytest.raises(ValueError, match="`d_model` needs 3 entries, one per stage of the layout, got 2"):
        tiny(d_model=[32, 32])
    with pytest.raises(ValueError, match="`target_ratios` needs 2 entries"):
        tiny(target_ratios=[3.0])
    with pytest.raises(ValueError, match="num_heads"):
        tiny(attn_cfg={})
    with pytest.raises(ValueError, match="vocabulary 'byte' has 256 ids, got vocab_size=16"):
        tiny(vocab_size=16)
    assert "dnahnet_small" in list_models("dna*")
    assert list_models("nothing*") == []
