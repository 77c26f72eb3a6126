"""Silero VAD with its real weights: is there speech in 32 ms of sound? A spectrum, convolutions and an LSTM cell."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from planish.models.base import Batch, LoadedModel
from planish.models.distance import TensorMetric
from planish.models.registry import ModelRow, package_file
from planish.program import Dim

RATE = 16000
"""Samples per second."""

CHUNK, CONTEXT = 512, 64
"""Samples of one call, and of the sound before it that the model is shown again."""


class SileroVAD(nn.Module):
    """The 16 kHz model, with the names of its weights file. Its LSTM's state goes in and comes out."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 2 * (width + 1), 2 * width, width, bias=False)
        self.conv1 = nn.Conv1d(width + 1, width, 3, 1, 1)
        self.conv2 = nn.Conv1d(width, width // 2, 3, 2, 1)
        self.conv3 = nn.Conv1d(width // 2, width // 2, 3, 2, 1)
        self.conv4 = nn.Conv1d(width // 2, width, 3, 1, 1)
        self.lstm_cell = nn.LSTMCell(width, width)
        self.final_conv = nn.Conv1d(width, 1, 1)

    def forward(self, sound: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The probability of speech, and the state for the next chunk.

        Args:
            sound: [N, 64 + 512] samples in -1..1: the end of the chunk before, then the chunk.
            state: [2, N, 128], the LSTM's h and c; zeros at the start of a recording.

        Returns:
            Probability [N, 1] and state [2, N, 128].
        """
        padded = nn.functional.pad(sound, (0, CONTEXT), mode="reflect").unsqueeze(1)
        real, imaginary = self.stft_conv(padded).chunk(2, 1)
        x = (real.square() + imaginary.square()).sqrt()
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = conv(x).relu()
        h, c = self.lstm_cell(x.squeeze(-1), (state[0], state[1]))
        speech = self.final_conv(h.relu().unsqueeze(-1)).sigmoid()
        return speech.squeeze(-1), torch.stack([h, c])


def first_state(batch: int) -> Tensor:
    """The state at the start of a recording, [2, batch, 128]."""
    return torch.zeros(2, batch, 128)


@dataclass(frozen=True)
class Sound:
    """A recording [samples] at 16 kHz, cut into chunks."""

    samples: Tensor

    def chunks(self) -> list[Tensor]:
        """Every whole chunk in order, [1, 64 + 512] each; silence comes before the first."""
        padded = nn.functional.pad(self.samples, (CONTEXT, 0))
        return list(padded.unfold(0, CONTEXT + CHUNK, CHUNK).unsqueeze(1))

    def batches(self, n_docs: int = 8, batch: int = 8, max_len: int = 0) -> list[Batch]:
        """The first ``n_docs`` chunks in batches, each as the start of a recording; all have the same length."""
        chunks = torch.cat(self.chunks()[:n_docs])
        return [{"sound": part.contiguous(), "state": first_state(len(part))} for part in chunks.split(batch)]


def vowel(seconds: float) -> Tensor:
    """A sung /a/ [samples]: harmonics of a voice around 120 Hz, louder near the vowel's formants, in four syllables a
    second. Formants after Peterson and Barney (1952)."""
    time = torch.arange(int(seconds * RATE)) / RATE
    pitch = 120 + 20 * torch.sin(2 * torch.pi * 3 * time)
    phase = torch.cumsum(2 * torch.pi * pitch / RATE, 0)
    formants = ((730, 80, 1.0), (1090, 90, 0.6), (2440, 120, 0.3))  # Hz, bandwidth in Hz, gain
    gains = [sum(gain / (1 + ((120 * k - hz) / width) ** 2) for hz, width, gain in formants) for k in range(1, 40)]
    voice = torch.stack([gain * torch.sin(k * phase) for k, gain in enumerate(gains, 1)]).sum(0)
    syllables = 0.5 + 0.5 * torch.sin(2 * torch.pi * 4 * time)
    return 0.5 * voice / voice.abs().max() * syllables


def hiss(seconds: float, seed: int) -> Tensor:
    """Faint white noise [samples]."""
    return 0.003 * torch.randn(int(seconds * RATE), generator=torch.Generator().manual_seed(seed))


def build(row: ModelRow) -> LoadedModel:
    """Load the weights; the sound is a vowel between two stretches of noise. Batch may grow to 32.

    Raises:
        MissingPackageError: a file of one of the row's packages is not there.
    """
    model = SileroVAD()
    model.load_state_dict(load_file(package_file(row, "silero_vad", "data", "silero_vad_16k.safetensors")))
    data = Sound(torch.cat([hiss(1, 0), vowel(2), hiss(1, 1)]))
    batch = Dim("batch", 1, 32)
    return LoadedModel(
        name=row.name,
        model=model.eval().requires_grad_(False),
        tokenizer=None,
        inputs=data.batches(3, 3)[0],
        dynamic={"sound": {0: batch}, "state": {1: batch}},
        data=data,
        metric=TensorMetric(),
    )
