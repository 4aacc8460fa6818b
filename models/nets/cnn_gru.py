"""The CNN-GRU: waveform and state in, logits and state out, everything in time causal."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cnngru_edge.models.nets.conv_norm import ConvNorm, folded
from cnngru_edge.models.nets.log_mel import LogMel
from cnngru_edge.models.spec.stream import ConvSpec, ModelSpec


class ConvBlock(ConvNorm):
    """Conv2d, batch norm and ReLU over (time, frequency); the past is carried, not padded."""

    def __init__(self, in_channels: int, spec: ConvSpec) -> None:
        conv = nn.Conv2d(
            in_channels,
            spec.out_channels,
            spec.kernel_size,
            spec.stride,
            padding=(0, spec.kernel_size[1] // 2),
            bias=False,
        )
        super().__init__(conv)
        self.context = spec.context

    def forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(N, C, T, F) and the frames before it, to the block's output and the next context."""
        if context is not None:
            x = torch.cat([context, x], dim=2)
            context = x[:, :, -self.context :]
        return torch.relu(self.normalized(x)), context


class CnnGru(nn.Module):
    """CNN-GRU after `spec`. A clip is a stream that starts from `initial_state`.

    Any way of cutting the audio into multiples of `spec.chunk_length` gives the same logits.
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, spec: ModelSpec, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.spec = spec
        self.log_mel = LogMel(spec.features)
        # Of the training set; they bring every mel bin to zero mean and unit variance.
        self.register_buffer("feature_mean", torch.zeros(spec.features.n_mels))
        self.register_buffer("feature_std", torch.ones(spec.features.n_mels))
        self.convs = nn.ModuleList(
            ConvBlock(channels, conv)
            for conv, (channels, _) in zip(spec.convs, spec.conv_shapes[:-1], strict=True)
        )
        # One module a layer: each has its own state, its own name in the graph, its own ranges.
        self.grus = nn.ModuleList(
            nn.GRU(spec.hidden_size if i else spec.gru_input_size, spec.hidden_size)
            for i in range(spec.num_layers)
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(spec.hidden_size, len(spec.labels))

    def initial_state(self, batch: int = 1) -> tuple[Tensor, ...]:
        """Zeros in the order and shapes of `spec.state`."""
        return tuple(torch.zeros(batch, *state.shape) for state in self.spec.state)

    def extract(self, audio: Tensor, audio_tail: Tensor) -> tuple[Tensor, Tensor]:
        """(N, S) audio to normalized log-mel features (N, S / hop_length, M), and the next tail."""
        features, audio_tail = self.log_mel(audio, audio_tail)
        return (features - self.feature_mean) / self.feature_std, audio_tail

    def classify(
        self, features: Tensor, state: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Normalized features to logits (N, T, C); `state` and its successor without the tail."""
        carried = iter(state)
        state_next: list[Tensor] = []
        x = features[:, None]  # (N, 1, frames, M)
        for block in self.convs:
            x, context = block(x, next(carried) if block.context else None)
            if context is not None:
                state_next.append(context)
        x = x.transpose(1, 2).flatten(2).transpose(0, 1)  # (T, N, channels * F), as GRUs read it
        for gru in self.grus:
            x, hidden = gru(self.dropout(x), next(carried)[None])
            state_next.append(hidden[0])
        return self.head(self.dropout(x)).transpose(0, 1), tuple(state_next)

    def forward(
        self, audio: Tensor, state: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Logits of every output frame, and the state after the last.

        Args:
            audio: (N, S) float32 at the spec's sample rate, S a multiple of `spec.chunk_length`.
            state: tensors in the order of `spec.state`, first axis N.

        Returns:
            logits (N, S / chunk_length, C); the next state.
        """
        features, audio_tail = self.extract(audio, state[0])
        logits, state_next = self.classify(features, state[1:])
        return logits, (audio_tail, *state_next)

    def for_export(self) -> "CnnGru":
        """A copy in evaluation mode with every batch norm folded into its convolution."""
        return folded(self)
