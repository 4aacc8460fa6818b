"""The intent of a phrase: token ids in, logits of one label out.

Convolutions of several widths over word embeddings are those of Kim 2014; a GRU reads what they
find in its order, where Kim keeps only the maximum over time.
"""

from typing import Any

import torch
from torch import Tensor, nn

from cnngru_edge.models.errors import SpecError
from cnngru_edge.models.nets.conv_norm import folded
from cnngru_edge.models.nets.layers import check_layers, size_in, sizes_in
from cnngru_edge.models.nets.whole import WholeModel
from cnngru_edge.models.spec.whole import TEXT, TokenInput, WholeSpec

TEXT_LAYERS = {
    "embedding_size": 48,
    "kernel_sizes": [1, 3, 5],
    "channels": 48,  # of each kernel size
    "hidden_size": 64,  # of each direction
}
"""What a text model is where nothing else is asked for."""

_WHY_WHOLE = "its GRU is bidirectional: it reads the phrase from the end as well"


def text_spec(labels: tuple[str, ...], vocabulary: tuple[str, ...], **layers: Any) -> WholeSpec:
    """The spec of a text model, with TEXT_LAYERS where `layers` say nothing else."""
    return WholeSpec(
        labels,
        TokenInput(vocabulary),
        family=TEXT,
        why_whole=_WHY_WHOLE,
        layers=TEXT_LAYERS | layers,
    )


class TextCnnGru(WholeModel):
    """Embedding, parallel Conv1d, a bidirectional GRU and a linear head, after `spec`."""

    def __init__(self, spec: WholeSpec, *, dropout: float = 0.0) -> None:
        super().__init__()
        check_layers(spec, TEXT, TEXT_LAYERS)
        if not isinstance(spec.input, TokenInput) or spec.writes_text:
            raise SpecError("a text model takes tokens and answers a label")
        kernel_sizes = sizes_in(spec, "kernel_sizes")
        if even := [size for size in kernel_sizes if size % 2 == 0]:
            # Padded alike on both sides, an even kernel would give another number of frames.
            raise SpecError(f"layers: kernel_sizes need to be odd, got {even[0]}")
        self.spec = spec
        embedding_size, hidden_size = size_in(spec, "embedding_size"), size_in(spec, "hidden_size")
        channels = size_in(spec, "channels")
        self.embedding = nn.Embedding(len(spec.input.vocabulary), embedding_size)
        self.convs = nn.ModuleList(
            nn.Conv1d(embedding_size, channels, size, padding=size // 2) for size in kernel_sizes
        )
        # A single word, or the odd one at the end, is a maximum of its own.
        self.pool = nn.MaxPool1d(2, ceil_mode=True)
        self.gru = nn.GRU(channels * len(kernel_sizes), hidden_size, bidirectional=True)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(2 * hidden_size, len(spec.labels))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (N, 1, C) of token ids (N, L), int64, L at least 1."""
        x = self.dropout(self.embedding(tokens)).transpose(1, 2)  # (N, embedding_size, L)
        x = torch.cat([torch.relu(conv(x)) for conv in self.convs], dim=1)
        x = self.pool(x).permute(2, 0, 1)  # (ceil(L / 2), N, channels), as GRUs read it
        _, hidden = self.gru(self.dropout(x))  # (2, N, hidden_size): of both directions, the last
        x = torch.cat([hidden[0], hidden[1]], dim=1)[:, None]  # (N, 1, 2 * hidden_size)
        logits: Tensor = self.head(self.dropout(x))
        return logits

    def for_export(self) -> "TextCnnGru":
        """A copy in evaluation mode; there is no batch norm to fold."""
        return folded(self)
