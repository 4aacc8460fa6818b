"""A convolution and its batch norm, and how the one is folded into the other."""

import copy
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

Module = TypeVar("Module", bound=nn.Module)


class ConvNorm(nn.Module):
    """Conv2d and batch norm."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.norm: nn.Module = nn.BatchNorm2d(conv.out_channels)

    def normalized(self, x: Tensor) -> Tensor:
        """(N, C, ...) to the convolution's output with zero mean and unit variance, rescaled."""
        normalized: Tensor = self.norm(self.conv(x))
        return normalized

    def fold_batch_norm(self) -> None:
        """Put the batch norm's scale and shift into the convolution (Jacob et al. 2018, 3.2)."""
        if isinstance(self.norm, nn.BatchNorm2d):
            self.conv = fuse_conv_bn_eval(self.conv, self.norm)
            self.norm = nn.Identity()


def folded(model: Module) -> Module:
    """A copy in evaluation mode with every batch norm folded into its convolution."""
    model = copy.deepcopy(model).eval()
    for block in model.modules():
        if isinstance(block, ConvNorm):
            block.fold_batch_norm()
    return model
