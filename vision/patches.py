"""Patches of an image times filters of their size: a convolution that a GPU computes faster as a matrix product."""

# No postponed annotations here: TorchScript reads those of the functions that it leaves alone.

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function
from torch import Tensor, nn


class PatchConv2d(nn.Conv2d):
    """A convolution whose stride is the size of its filters, which a GPU computes as a matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) -> (batch, d, i, j)."""
        return patch_product(x, self.weight, self.bias)


@register_notrace_function
@torch.jit.ignore
def patch_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Product of patches that do not overlap with filters of their size; pixels that fill no patch are left out.

    Args:
        x: Images (batch, channels, height, width).
        weight: (d, channels, p, q).
        bias: (d,).

    Returns:
        (batch, d, i, j), on a GPU with channels last in memory.
    """
    height, width = weight.shape[2:]
    if x.device.type != "cuda":
        return F.conv2d(x, weight, bias, stride=(height, width))
    rows, columns = x.shape[2] // height, x.shape[3] // width
    x = x[:, :, : rows * height, : columns * width].unflatten(3, (columns, width)).unflatten(2, (rows, height))
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    x = x.permute(0, 2, 4, 1, 3, 5).to(dtype, memory_format=torch.contiguous_format).flatten(3)
    return F.linear(x, weight.flatten(1), bias).permute(0, 3, 1, 2)
