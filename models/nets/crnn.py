"""A line of text in an image: a grey image in, logits of each column out, read by CTC.

Shi et al. 2015, "An End-to-End Trainable Neural Network for Image-based Sequence Recognition".
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from cnngru_edge.models.errors import SpecError
from cnngru_edge.models.nets.conv_norm import ConvNorm, folded
from cnngru_edge.models.nets.layers import check_layers, pairs_in, size_in, sizes_in
from cnngru_edge.models.nets.whole import WholeModel
from cnngru_edge.models.spec.stream import BLANK
from cnngru_edge.models.spec.whole import CRNN, TEXT_ANSWER, ImageInput, WholeSpec

CRNN_LAYERS: dict[str, Any] = {
    "channels": [8, 16, 32, 48, 64],
    "pools": [[2, 2], [2, 2], [2, 1], [2, 1], [2, 1]],  # (height, width): 32 rows to 1
    "hidden_size": 64,  # of each direction
    "num_layers": 2,
}
"""What a CRNN is where nothing else is asked for."""

DIGITS = (BLANK, *"0123456789")
"""The labels of a model that reads numbers."""

_WHY_WHOLE = "its GRU is bidirectional: it reads the line from the right as well"
_MOST_SHRINK = 4
"""Pixels to a column. Each character, and the blank between equal ones, needs a column."""


def crnn_spec(labels: tuple[str, ...] = DIGITS, height: int = 32, **layers: Any) -> WholeSpec:
    """The spec of a CRNN, with CRNN_LAYERS where `layers` say nothing else."""
    layers = CRNN_LAYERS | layers
    return WholeSpec(
        labels,
        ImageInput(height, least_width=math.prod(width for _, width in layers["pools"])),
        answers=TEXT_ANSWER,
        family=CRNN,
        why_whole=_WHY_WHOLE,
        layers=layers,
    )


class PooledConv(ConvNorm):
    """Conv2d, batch norm, ReLU and max pooling."""

    def __init__(self, in_channels: int, out_channels: int, pool: tuple[int, int]) -> None:
        super().__init__(nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False))
        self.pool = nn.MaxPool2d(pool)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to a smaller one."""
        pooled: Tensor = self.pool(torch.relu(self.normalized(x)))
        return pooled


class Crnn(WholeModel):
    """Convolutions until the height is 1, bidirectional GRUs and a linear head, after `spec`."""

    def __init__(self, spec: WholeSpec, *, dropout: float = 0.0) -> None:
        super().__init__()
        channels, pools = _check(spec)
        self.spec = spec
        hidden_size = size_in(spec, "hidden_size")
        self.convs = nn.ModuleList(
            PooledConv(before, after, pool)
            for before, after, pool in zip((1, *channels), channels, pools, strict=False)
        )
        # One module a layer: each has its own name in the graph and its own ranges.
        self.grus = nn.ModuleList(
            nn.GRU(2 * hidden_size if i else channels[-1], hidden_size, bidirectional=True)
            for i in range(size_in(spec, "num_layers"))
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(2 * hidden_size, len(spec.labels))

    def forward(self, image: Tensor) -> Tensor:
        """Logits (N, T, C) of images (N, 1, H, W) from 0, black, to 1, white; T = W / 4."""
        x = image
        for block in self.convs:
            x = block(x)
        x = x.squeeze(2).permute(2, 0, 1)  # (T, N, channels), as GRUs read it
        for gru in self.grus:
            x, _ = gru(self.dropout(x))
        logits: Tensor = self.head(self.dropout(x))
        return logits.transpose(0, 1)

    def for_export(self) -> "Crnn":
        """A copy in evaluation mode with every batch norm folded into its convolution."""
        return folded(self)


def _check(spec: WholeSpec) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    check_layers(spec, CRNN, CRNN_LAYERS)
    if not isinstance(spec.input, ImageInput) or not spec.writes_text:
        raise SpecError("a CRNN takes images and answers a text")
    channels, pools = sizes_in(spec, "channels"), pairs_in(spec, "pools")
    if len(channels) != len(pools):
        raise SpecError(f"layers: {len(channels)} channels for {len(pools)} pools")
    height = spec.input.height
    for pooled, _ in pools:
        height //= pooled
    if height != 1:
        raise SpecError(f"layers: pools leave {height} of {spec.input.height} rows, expected 1")
    shrink = math.prod(width for _, width in pools)
    if shrink > _MOST_SHRINK:
        raise SpecError(f"layers: pools make a column of {shrink} pixels, at most {_MOST_SHRINK}")
    if spec.input.least_width < shrink:
        raise SpecError(
            f"input: least_width is {spec.input.least_width}, and a column takes {shrink} pixels"
        )
    return channels, pools
