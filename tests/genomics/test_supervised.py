"""Supervised models: Lyra and heads on language models; pooling, echo, padding, strands."""

import pytest
import torch
import torch.nn.functional as F

from omnissm.genomics.models import create_model, from_pretrained, save_pretrained
from omnissm.genomics.models.predictor import pool
from omnissm.genomics.sequence import vocabulary

BACKBONES = {
    "hnet_tiny": {},
    "hybridna_tiny": {},
    "hydra_dna_tiny": {},
    "caduceus_ps_1k": {"d_model": 16, "n_layer": 2},
}


def tokens_of(model, *shape, seed=0):
    bases = torch.from_numpy(vocabulary(model.vocabulary).bases)
    return bases[torch.randint(4, shape, generator=torch.Generator().manual_seed(seed))]


def build(backbone="hybridna_tiny", **options):
    torch.manual_seed(0)
    return create_model("predictor", model=backbone, n_outputs=3, **options).eval()


def test_pooling():
    x = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]], dtype=torch.bool)
    assert pool(x, mask, "mean").tolist() == [[1, 2], [9, 10]]
    assert pool(-x, mask, "max").tolist() == [[0, -1], [-8, -9]]
    assert pool(x, mask, "last").tolist() == [[2, 3], [10, 11]]
    assert pool(x, None, "last").tolist() == [[4, 5], [10, 11]]
    with pytest.raises(ValueError, match="mean, max, last, none, got 'sum'"):
        pool(x, None, "sum")


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("how", ["mean", "max", "last"])
def test_padding_changes_no_prediction(backbone, how):
    model = build(backbone, model_args=BACKBONES[backbone], pool=how)
    parts = [tokens_of(model, 1, n, seed=n) for n in (15, 6)]
    alone = torch.cat([model(part) for part in parts])
    assert alone.shape == (2, 3)
    mask = torch.arange(15) < torch.tensor([[15], [6]])
    rows = torch.cat([F.pad(part, (0, 15 - part.shape[1])) for part in parts])
    torch.testing.assert_close(model(rows, mask=mask), alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("echo", ["repeat", "strand"])
def test_echo_pools_the_second_copy(echo):
    model = build(echo=echo)
    tokens = tokens_of(model, 2, 9)
    again = tokens if echo == "repeat" else model.complement[tokens.flip(1)]
    both = torch.cat([tokens, torch.full((2, 1), 1), again], 1)
    hidden, _ = model.backbone.hidden(both)
    torch.testing.assert_close(model(tokens), model.head(hidden[:, 10:].mean(1)))
    short = tokens_of(model, 1, 4, seed=3)
    rows = torch.cat([tokens[:1], F.pad(short, (0, 5))])
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    expected = torch.cat([model(tokens[:1]), model(short)])
    torch.testing.assert_close(model(rows, mask=mask), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="sees both directions already"):
        build("hydra_dna_tiny", echo=echo)


def test_equivariant_backbone_makes_strand_free_predictions():
    model = build("caduceus_ps_1k", model_args=BACKBONES["caduceus_ps_1k"])
    tokens = tokens_of(model, 2, 12)
    other = model.complement[tokens.flip(1)]
    torch.testing.assert_close(model(other), model(tokens))
    plain = build("hydra_dna_tiny")
    assert not torch.allclose(plain(plain.complement[tokens.flip(1)]), plain(tokens), atol=1e-4)


def test_lyra():
    torch.manual_seed(0)
    model = create_model("lyra", n_outputs=2).eval()
    assert sum(p.numel() for p in model.parameters()) == 109_826
    parts = [tokens_of(model, 1, n, seed=n) for n in (20, 7)]
    rows = torch.cat([F.pad(part, (0, 20 - part.shape[1])) for part in parts])
    mask = torch.arange(20) < torch.tensor([[20], [7]])
    alone = torch.cat([model(part) for part in parts])
    torch.testing.assert_close(model(rows, mask=mask), alone, atol=1e-5, rtol=1e-4)
    block = model.convs[0]
    x = torch.randn(1, 6, 64)
    value, gate = block.in_norm(block.in_proj(x)).chunk(2, dim=-1)
    expected = block.out_norm(block.out_proj(gate * block.conv1d(value.mT).mT))
    torch.testing.assert_close(block(x), expected)
    with pytest.raises(ValueError, match="one sequence per row"):
        model(rows, seq_idx=torch.zeros_like(rows))


def test_lyra_fits_a_motif_in_seconds():
    torch.manual_seed(0)
    model = create_model("lyra", d_model=16, n_layer=1, n_conv=1, d_state=8, dropout=0.0)
    tokens = tokens_of(model, 256, 24)
    where = torch.arange(256) % 2 == 0
    tokens[where, 5:11] = torch.tensor([7, 4, 7, 4, 4, 7])  # TATAAT
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = F.binary_cross_entropy_with_logits(model(tokens)[:, 0], where.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_folder_round_trip_and_frozen_backbone(tmp_path):
    model = build("hnet_tiny", freeze=True)
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"head"}
    save_pretrained(model, tmp_path / "m")
    tokens = tokens_of(model, 2, 9)
    torch.testing.assert_close(from_pretrained(tmp_path / "m")(tokens), model(tokens))


def test_errors():
    with pytest.raises(ValueError, match="n_outputs of at least 1, got 0"):
        create_model("lyra", n_outputs=0)
    with pytest.raises(ValueError, match="`echo` must be one of none, repeat, strand, got 'twice'"):
        build(echo="twice")
