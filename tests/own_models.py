"""Modules as they are found in tutorials and repositories, written for nothing here."""

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class Conv2dGru(nn.Module):
    """Conv2d, batch norm and pooling over (mel, time), a GRU over time, its last frame."""

    def __init__(self, n_classes=12, n_mels=40, hidden=48, layers=1):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 24, kernel_size=3, padding=1),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.MaxPool2d((2, 1)),
        )
        self.gru = nn.GRU(24 * (n_mels // 4), hidden, layers, batch_first=True)
        self.fc = nn.Linear(hidden, n_classes)

    def forward(self, x):  # (N, 1, M, T)
        x = self.conv(x)
        n, c, m, t = x.size()
        x = x.permute(0, 3, 1, 2).contiguous().view(n, t, c * m)
        out, _ = self.gru(x)
        return self.fc(out[:, -1, :])


class Conv1dGru3(nn.Module):
    """Conv1d over time, three GRU layers with dropout, a leaky ReLU between two linear layers."""

    def __init__(self, n_classes=12, n_mfcc=40):
        super().__init__()
        self.conv1 = nn.Conv1d(n_mfcc, 48, 5, stride=2, padding=2)
        self.bn1 = nn.BatchNorm1d(48)
        self.conv2 = nn.Conv1d(48, 48, 3, padding=1, groups=4)
        self.bn2 = nn.BatchNorm1d(48)
        self.drop = nn.Dropout(0.3)
        self.rnn = nn.GRU(48, 40, num_layers=3, dropout=0.2)
        self.fc1 = nn.Linear(40, 32)
        self.fc2 = nn.Linear(32, n_classes)

    def forward(self, x):  # (N, M, T)
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.drop(torch.relu(self.bn2(self.conv2(x))))
        x = x.permute(2, 0, 1)
        _, h = self.rnn(x)
        return self.fc2(nn.functional.leaky_relu(self.fc1(h[-1])))


class AttentionGru(nn.Module):
    """A bidirectional GRU whose frames are weighed by attention and summed."""

    def __init__(self, n_classes=12, n_mels=40, hidden=32):
        super().__init__()
        self.conv = nn.Conv1d(n_mels, 48, 3, padding="same")
        self.gru = nn.GRU(48, hidden, batch_first=True, bidirectional=True)
        self.attention = nn.Sequential(nn.Linear(2 * hidden, 24), nn.Tanh(), nn.Linear(24, 1))
        self.head = nn.Linear(2 * hidden, n_classes)

    def forward(self, x):  # (N, T, M)
        x = torch.relu(self.conv(x.transpose(1, 2))).transpose(1, 2)
        h, _ = self.gru(x)
        weights = torch.softmax(self.attention(h), dim=1)
        return self.head((weights * h).sum(dim=1)), weights


class KeywordCrnn(nn.Module):
    """Conv with a stride, two bidirectional GRU layers, linear layers (Arik et al. 2017)."""

    def __init__(self, n_classes=12, n_mels=40):
        super().__init__()
        self.conv = nn.Conv2d(1, 16, (20, 5), stride=(8, 2))
        rows = (n_mels - 5) // 2 + 1
        self.gru = nn.GRU(16 * rows, 32, num_layers=2, bidirectional=True)
        self.dense = nn.Linear(64, 32)
        self.out = nn.Linear(32, n_classes)

    def forward(self, x):  # (N, 1, T, M)
        x = torch.relu(self.conv(x))
        x = x.permute(2, 0, 1, 3).flatten(2)
        x, _ = self.gru(x)
        return self.out(torch.relu(self.dense(x[-1])))


class ConvLstm(nn.Module):
    """The same with an LSTM, frames averaged."""

    def __init__(self, n_classes=12, n_mels=40, hidden=40):
        super().__init__()
        self.features = nn.Sequential(nn.Conv1d(n_mels, 48, 5, padding=2), nn.BatchNorm1d(48))
        self.lstm = nn.LSTM(48, hidden, num_layers=2, batch_first=True)
        self.classifier = nn.Linear(hidden, n_classes)

    def forward(self, x):  # (N, M, T)
        x = torch.relu(self.features(x)).transpose(1, 2)
        out, _ = self.lstm(x)
        return self.classifier(out.mean(1))


class WaveformGru(nn.Module):
    """Convolutions over the waveform itself."""

    def __init__(self, n_classes=12):
        super().__init__()
        self.conv1 = nn.Conv1d(1, 24, 80, stride=16)
        self.bn1 = nn.BatchNorm1d(24)
        self.pool1 = nn.MaxPool1d(4)
        self.conv2 = nn.Conv1d(24, 32, 3)
        self.bn2 = nn.BatchNorm1d(32)
        self.pool2 = nn.MaxPool1d(4)
        self.gru = nn.GRU(32, 32, batch_first=True)
        self.fc = nn.Linear(32, n_classes)

    def forward(self, x):  # (N, 1, S)
        x = self.pool1(torch.relu(self.bn1(self.conv1(x))))
        x = self.pool2(torch.relu(self.bn2(self.conv2(x))))
        out, _ = self.gru(x.transpose(1, 2))
        return torch.log_softmax(self.fc(out[:, -1]), dim=-1)


class PackedGru(nn.Module):
    """Lengths of the clips in a batch, packed."""

    def __init__(self, n_classes=12, n_mels=40, hidden=32):
        super().__init__()
        self.conv = nn.Conv1d(n_mels, 32, 3, padding=1)
        self.gru = nn.GRU(32, hidden, batch_first=True)
        self.fc = nn.Linear(hidden, n_classes)

    def forward(self, x, lengths):  # (N, T, M), (N,)
        x = torch.relu(self.conv(x.transpose(1, 2))).transpose(1, 2)
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out, h = self.gru(packed)
        out, _ = pad_packed_sequence(out, batch_first=True)
        return self.fc(h[-1])


class CellGru(nn.Module):
    """A GRU cell in a loop over frames."""

    def __init__(self, n_classes=12, n_mels=40, hidden=24):
        super().__init__()
        self.conv = nn.Conv1d(n_mels, 24, 5, stride=4)
        self.cell = nn.GRUCell(24, hidden)
        self.fc = nn.Linear(hidden, n_classes)
        self.hidden = hidden

    def forward(self, x):  # (N, M, T)
        x = torch.relu(self.conv(x))
        h = x.new_zeros(x.size(0), self.hidden)
        for t in range(x.size(2)):
            h = self.cell(x[:, :, t], h)
        return self.fc(h)


class BatchAsTime(nn.Module):
    """The common mistake: a clip is flattened, and the batch becomes the GRU's time."""

    def __init__(self, n_classes=12, n_mels=40):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(4)
        self.gru = nn.GRU(8 * (n_mels // 4) * 25, 32, batch_first=True)
        self.fc = nn.Linear(32, n_classes)

    def forward(self, x):  # (N, 1, M, T)
        x = self.pool(torch.relu(self.conv(x)))
        x = x.view(x.size(0), -1).unsqueeze(0)
        out, _ = self.gru(x)
        return self.fc(out.squeeze(0))


class NotTraceable(nn.Module):
    """Goes through numpy, in a way that depends on what is heard."""

    def __init__(self, n_classes=12, n_mels=40):
        super().__init__()
        self.gru = nn.GRU(n_mels, 16, batch_first=True)
        self.fc = nn.Linear(16, n_classes)

    def forward(self, x):  # (N, T, M)
        energy = x.mean(2).numpy()
        first = int(energy[0].argmax())
        out, _ = self.gru(x[:, first // 2 :])
        return self.fc(out[:, -1])


class NamedLikeOurs(nn.Module):
    """Layers that are called as our front-end is."""

    def __init__(self, n_classes=12, n_mels=40):
        super().__init__()
        self.log_mel = nn.Linear(n_mels, 32)
        self.fc = nn.Linear(32, n_classes)

    def forward(self, x):  # (N, T, M)
        return self.fc(torch.relu(self.log_mel(x)).mean(1))


class WaveformNamedLikeOurs(nn.Module):
    """The same, of the waveform."""

    def __init__(self, n_classes=12):
        super().__init__()
        self.log_mel = nn.Conv1d(1, 32, 400, stride=160)
        self.fc = nn.Linear(32, n_classes)

    def forward(self, x):  # (N, 1, S)
        return self.fc(torch.relu(self.log_mel(x)).mean(2))


class LogarithmInside(nn.Module):
    """Convolutions over the waveform, and a logarithm at their end."""

    def __init__(self, n_classes=12):
        super().__init__()
        self.conv1 = nn.Conv1d(1, 32, 64, stride=32)
        self.conv2 = nn.Conv1d(32, 64, 9, stride=4)
        self.fc = nn.Linear(64, n_classes)

    def forward(self, x):  # (N, 1, S)
        x = nn.functional.relu6(self.conv2(nn.functional.relu6(self.conv1(x))))
        return self.fc(torch.log(x.mean(2) + 0.1))


class Spectrogram(nn.Module):
    """A front-end of its own: a Fourier transform, filters and a logarithm before a GRU."""

    def __init__(self, n_classes=12, n_mels=24):
        super().__init__()
        self.register_buffer("window", torch.hann_window(256))
        angle = torch.arange(256)[:, None] * torch.arange(129) * (2 * torch.pi / 256)
        kernel = torch.cat([angle.cos(), angle.sin()], 1) * self.window[:, None]
        self.fourier = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        self.fourier.weight.data = kernel.T[:, None].clone()
        self.mel = nn.Linear(129, n_mels, bias=False)
        self.mel.weight.data.uniform_(0, 0.1)
        self.gru = nn.GRU(n_mels, 24, batch_first=True)
        self.fc = nn.Linear(24, n_classes)

    def forward(self, x):  # (N, 1, S)
        real, imaginary = self.fourier(x).chunk(2, 1)
        power = real.square() + imaginary.square()
        x = torch.log(self.mel(power.transpose(1, 2)).clamp(min=1e-4))
        return self.fc(self.gru(x)[0][:, -1])
