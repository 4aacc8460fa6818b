"""A keyword model as a repository has it, which knows nothing of cnngru-edge.

Convolution, bidirectional GRUs, linear layers: Arik et al. 2017, "Convolutional Recurrent Neural
Networks for Small-Footprint Keyword Spotting".
"""

import torch
from torch import Tensor, nn


class KeywordCrnn(nn.Module):
    """Log-mel features (N, 1, T, M) to logits (N, n_classes)."""

    def __init__(self, n_classes: int = 12, n_mels: int = 40, hidden: int = 48) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 24, (5, 5), stride=(2, 2))
        self.bn1 = nn.BatchNorm2d(24)
        self.conv2 = nn.Conv2d(24, 32, (5, 3), stride=(2, 2))
        self.bn2 = nn.BatchNorm2d(32)
        bins = ((n_mels - 5) // 2 + 1 - 3) // 2 + 1
        self.gru = nn.GRU(32 * bins, hidden, num_layers=2, bidirectional=True, batch_first=True)
        self.dropout = nn.Dropout(0.3)
        self.dense = nn.Linear(2 * hidden, 64)
        self.out = nn.Linear(64, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of each class."""
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        x = x.permute(0, 2, 1, 3).flatten(2)
        x, _ = self.gru(x)
        x = self.dropout(x.mean(dim=1))
        logits: Tensor = self.out(torch.relu(self.dense(x)))
        return logits
