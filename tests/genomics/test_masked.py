"""Bidirectional models: strands, padding, both treatments of halves, hybrids; sizes."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from omnissm.genomics.models import create_model, from_pretrained, load_caduceus, save_pretrained
from omnissm.genomics.models.masked import reverse_complement

SIZES = {
    "caduceus_ph_1k": 470_702,
    "caduceus_ps_131k": 7_725_312,
    "hydra_dna_small": 3_795_392,
    "hybridna_tiny": 195_250,
    "hybridna_300m": 297_526_496,
}


def build(mixer="mamba", strands="equivariant", **options):
    torch.manual_seed(0)
    state = {"d_state": 4} if mixer == "mamba" else {"d_state": 4, "headdim": 8}
    model = create_model(
        "masked_dna", d_model=16, n_layer=3, mixer=mixer, strands=strands, mixer_options=state, **options
    )
    with torch.no_grad():
        model.embeddings.weight.normal_()
        for parameter in model.stack.parameters():  # norms too: their weights must be mirrored as well
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval().double()


def ids(*shape, seed=0):
    return torch.randint(7, 12, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mixer", ["mamba", "hydra"])
@pytest.mark.parametrize("swap", [False, True])
def test_predictions_of_the_two_strands_agree(mixer, swap):
    model, tokens = build(mixer, swap_halves=swap), ids(2, 21)
    other = reverse_complement(tokens, model.complement)
    assert torch.equal(reverse_complement(other, model.complement), tokens)
    expected = model(tokens)
    torch.testing.assert_close(model(other).flip(1)[..., model.complement], expected)
    assert expected.std() > 0.1
    one = build(mixer, "one")
    assert not torch.allclose(one(other).flip(1)[..., one.complement], one(tokens), atol=1e-3)


def test_hidden_of_the_other_strand_is_the_mirror_image():
    model, tokens = build(), ids(1, 13)
    other = reverse_complement(tokens, model.complement)
    torch.testing.assert_close(model.hidden(other)[0], model.hidden(tokens)[0].flip(1, 2))
    here, there = model.sides(model.hidden(tokens)[0]), model.sides(model.hidden(other)[0])
    torch.testing.assert_close(here[0], there[1])
    torch.testing.assert_close(here[1], there[0])


def test_equivariant_model_is_the_block_form():
    """wrap(f)(x) = cat(f(x_1), R f(R x_2)) around every norm and mixer, on doubled channels."""
    model, tokens = build(), ids(2, 11)

    def mirror(x):
        return x.flip(1, 2)

    x = torch.cat(
        [model.embeddings(tokens), mirror(model.embeddings(reverse_complement(tokens, model.complement)))], dim=-1
    )

    def wrap(function, x):
        first, second = x.chunk(2, dim=-1)
        return torch.cat([function(first), mirror(function(mirror(second)))], dim=-1)

    for block in model.stack.blocks:
        x = x + wrap(block.mixer, wrap(block.norm, x))
    x = wrap(model.stack.norm, x)
    weight = model.embeddings.weight
    first, second = x.chunk(2, dim=-1)
    logits = first @ weight.T + second.flip(-1) @ weight[model.complement].T
    torch.testing.assert_close(model(tokens), logits)


def test_swapped_halves_are_the_fused_blocks():
    """The norm reads the second half and writes the first one, and the residual goes with it."""
    model, tokens = build(swap_halves=True), ids(1, 9)

    def mirror(x):
        return x.flip(1, 2)

    first = model.embeddings(tokens)
    second = mirror(model.embeddings(reverse_complement(tokens, model.complement)))
    for block in model.stack.blocks:
        first, second = second, first
        first, second = (
            first + block.mixer(block.norm(first)),
            second + mirror(block.mixer(block.norm(mirror(second)))),
        )
    first, second = model.stack.norm(first), mirror(model.stack.norm(mirror(second)))
    torch.testing.assert_close(model.hidden(tokens)[0], torch.cat([first, second], dim=-1))


@pytest.mark.parametrize("mixer", ["mamba", "hydra"])
@pytest.mark.parametrize("options", [{"strands": "one"}, {}, {"swap_halves": True}], ids=str)
def test_padding_and_packing_change_nothing(mixer, options):
    model = build(mixer, **options)
    parts = [ids(1, n, seed=n) for n in (12, 5)]
    alone = torch.cat([model(part)[0] for part in parts])
    rows = torch.cat([F.pad(part, (0, 12 - part.shape[1]), value=4) for part in parts])
    mask = torch.arange(12) < torch.tensor([[12], [5]])
    torch.testing.assert_close(model(rows, mask=mask)[mask], alone)
    numbers = torch.arange(2).repeat_interleave(torch.tensor([12, 5]))[None]
    torch.testing.assert_close(model(torch.cat(parts, 1), seq_idx=numbers)[0], alone)


def test_every_base_sees_both_sides():
    model, tokens = build(strands="one"), ids(1, 9)
    x = model.embeddings(tokens).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model.stack(x)[:, 4].sum(), x)
    assert gradient.abs().sum(-1).gt(0).all()


def test_directions_share_their_projections():
    model = build(strands="one")
    names = [name for name, _ in model.stack.blocks[0].mixer.named_parameters()]
    assert sum(name.endswith("in_proj.weight") for name in names) == 1
    assert sum(name.endswith("x_proj.weight") for name in names) == 2


def test_layers():
    model, tokens = build(strands="one"), ids(2, 9)
    assert model.layers() == ["embedding", "layer0", "layer1", "layer2", "stack"]
    torch.testing.assert_close(model.stack.norm(model.layer(tokens, "layer2").x), model.layer(tokens, "stack").x)
    torch.testing.assert_close(model.logits(model.layer(tokens, "stack").x), model(tokens))
    assert build().layer(tokens, "stack").x.shape == (2, 9, 32)
    with pytest.raises(ValueError, match="unknown layer 'inner'; this model has embedding, layer0"):
        model.layer(tokens, "inner")


def test_folder_round_trip(tmp_path):
    model, tokens = build(swap_halves=True).float(), ids(1, 9)
    save_pretrained(model, tmp_path / "m")
    torch.testing.assert_close(from_pretrained(tmp_path / "m")(tokens), model(tokens))


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
    assert sum(p.numel() for p in create_model(name, device="meta").parameters()) == SIZES[name]


def test_hybrid_is_causal_and_steps():
    torch.manual_seed(0)
    model, tokens = create_model("hybridna_tiny").eval(), ids(2, 20)
    whole = model(tokens)
    logits, state = model.prefill(tokens[:, :13])
    torch.testing.assert_close(logits, whole[:, :13], atol=1e-5, rtol=1e-4)
    for t in range(13, 20):
        logits, state = model.step(tokens[:, t], state)
        torch.testing.assert_close(logits, whole[:, t], atol=1e-5, rtol=1e-4)
    assert model.lm_head.weight is model.embeddings.weight
    assert model.vocab_size == 16


@pytest.mark.parametrize("strands", ["one", "equivariant"])
def test_published_names_and_configuration(strands, tmp_path):
    """Weights under the published names come back as they were; fused equivariant ones swap halves."""
    model = build(strands=strands, swap_halves=strands == "equivariant").float()
    inner, head, norm = (".submodule", ".lm_head", "") if strands == "equivariant" else ("", "", "")
    word = "word_embeddings.embedding" if strands == "equivariant" else "word_embeddings"
    state = {f"caduceus.backbone.embeddings.{word}.weight": model.embeddings.weight}
    state[f"lm_head{head}.weight"] = model.embeddings.weight.clone()
    state["caduceus.backbone.norm_f.weight"] = model.stack.norm.weight
    for i, block in enumerate(model.stack.blocks):
        layer = f"caduceus.backbone.layers.{i}"
        state[f"{layer}.norm{norm}.weight"] = block.norm.weight
        for name, tensor in block.mixer.ahead.state_dict().items():
            state[f"{layer}.mixer{inner}.mamba_fwd.{name}"] = tensor
            shared = name.split(".")[0] in ("in_proj", "out_proj")
            state[f"{layer}.mixer{inner}.mamba_rev.{name}"] = (
                tensor.clone() if shared else block.mixer.back.state_dict()[name]
            )
    if strands == "equivariant":
        state["lm_head.complement_map"] = model.complement
    save_file({name: tensor.detach().contiguous() for name, tensor in state.items()}, tmp_path / "w.safetensors")
    config = {
        "d_model": 16, "n_layer": 3, "vocab_size": 12, "pad_vocab_size_multiple": 8, "rcps": strands == "equivariant",
        "bidirectional": True, "bidirectional_strategy": "add", "bidirectional_weight_tie": True,
        "fused_add_norm": True, "ssm_cfg": {"d_state": 4, "d_conv": 4, "dt_rank": "auto", "use_fast_path": True},
    }  # fmt: skip
    again = load_caduceus(tmp_path / "w.safetensors", config).eval()
    tokens = ids(1, 9)
    assert again.config["swap_halves"] == model.swap_halves
    torch.testing.assert_close(again(tokens), model(tokens))
    with pytest.raises(ValueError, match="bidirectional_strategy 'ew_multiply'"):
        load_caduceus(tmp_path / "w.safetensors", config | {"bidirectional_strategy": "ew_multiply"})


def test_options_are_checked():
    with pytest.raises(ValueError, match="`swap_halves` needs strands='equivariant'"):
        build(strands="one", swap_halves=True)
    with pytest.raises(ValueError, match="'one' or 'equivariant', got 'both'"):
        build(strands="both")
    with pytest.raises(ValueError, match="'mamba' or 'hydra', got 'mamba2'"):
        build(mixer="mamba2")
