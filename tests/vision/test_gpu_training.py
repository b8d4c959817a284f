"""Every family trains under bfloat16 autocast on a GPU: 200 steps, all finite, and what is learnable is learnt."""

import pytest
import torch
import torch.nn.functional as F

from omnissm.vision import create_model

SMALLEST = {
    "hydra_vit_tiny_patch16_224": {"img_size": 96},
    "chimera_vit_tiny_patch16_224": {"img_size": 96},
    "vim_tiny_patch16_224": {"img_size": 96},
    "lbvim_tiny_patch16_224": {"img_size": 96},
    "vmamba_tiny_s1l8": {},
    "mambavision_tiny": {},
}


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", SMALLEST)
def test_200_steps_in_bfloat16(name):
    torch.manual_seed(0)
    model = create_model(name, num_classes=4, **SMALLEST[name]).cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.05)
    patterns = torch.randn(4, 3, 96, 96, device="cuda")
    losses = []
    for _ in range(200):
        labels = torch.randint(4, (32,), device="cuda")
        images = patterns[labels] + torch.randn(32, 3, 96, 96, device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(model(images).float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        losses.append(loss.detach())
        assert norm > 0
    losses = torch.stack(losses)
    assert losses.isfinite().all()
    assert losses[-20:].mean() < 0.2 < 1.0 < losses[0]
