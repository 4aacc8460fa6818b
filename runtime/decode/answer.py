"""What a model says to a clip, of any family; and the texts of a stream, partial and final."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from cnngru_edge.models.spec.stream import ModelSpec, is_of_words
from cnngru_edge.models.spec.whole import Spec
from cnngru_edge.runtime.decode.ctc import DecodeConfig, Transcript, decoder_of, frame_s
from cnngru_edge.runtime.decode.label import clip_scores, softmax
from cnngru_edge.runtime.session import Array


def clip_answer(spec: Spec, logits: Array) -> str:
    """What a model answers to a clip, logits (T, C): a label, or the text of the best path."""
    if spec.writes_text:
        return clip_transcript(spec, logits).text
    return spec.labels[int(clip_scores(spec, logits).argmax())]


def clip_lead(spec: Spec, logits: Array) -> float:
    """How sure the answer to a clip is: by how much the best probability exceeds the second.

    Of a text, in that frame where this is least of those in which the second label, in place of the
    best, would write another text.
    """
    if not spec.writes_text:
        second, best = np.sort(clip_scores(spec, logits))[-2:]
        return float(best - second)
    probabilities = softmax(logits.astype(np.float64))
    seconds, path = np.argsort(probabilities, 1)[:, -2:].T.tolist()
    ordered = np.sort(probabilities, 1)
    leads = ordered[:, -1] - ordered[:, -2]
    text = _written(spec, path)
    for frame in np.argsort(leads).tolist():
        other = [*path[:frame], seconds[frame], *path[frame + 1 :]]
        if _written(spec, other) != text:
            return float(leads[frame])
    return 1.0


def _written(spec: Spec, path: Sequence[int]) -> str:
    """The text of a label for each frame."""
    text = "".join(spec.labels[label] for label, _ in groupby(path) if label)
    return " ".join(text.split())


def clip_transcript(spec: Spec, logits: Array, config: DecodeConfig | None = None) -> Transcript:
    """The text of a clip, logits (T, C)."""
    decoder = decoder_of(spec, config or DecodeConfig())
    decoder.push(logits)
    return decoder.transcript


@dataclass(frozen=True)
class Said:
    """A text in a stream, which grows until it is final."""

    transcript: Transcript
    is_final: bool


class Transcriber:
    """Texts out of a stream of logits: each is final after `spec.endpoint.silence_s` of silence.

    Silence is that blank or space is the most probable label. One that goes on for `longest_s` is
    final with the next space, so that a stream without an end takes no more and more memory and
    time. The decoder then begins anew; the model's state goes on.
    """

    def __init__(self, spec: ModelSpec, config: DecodeConfig | None = None) -> None:
        self._decoder = decoder_of(spec, config or DecodeConfig())
        self._quiet = {0} | {i for i, label in enumerate(spec.labels) if label == " "}
        self._is_of_words = is_of_words(spec.labels)
        self._needed = max(1, round(spec.endpoint.silence_s / frame_s(spec)))
        self._longest = round(spec.endpoint.longest_s / frame_s(spec))
        self.reset()

    def reset(self) -> None:
        """Begin a stream."""
        self._frame = 0
        self._begin()

    def _begin(self) -> None:
        self._decoder.reset(self._frame)
        self._silent = 0  # frames in a row
        self._spoken = 0  # frames from the first character on
        self._shown = ""  # of what is not final

    def push(self, logits: Array) -> list[Said]:
        """The texts that have become final in the next frames, logits (T, C), and what there is."""
        said: list[Said] = []
        for row in logits:
            self._decoder.push(row[None])
            self._frame += 1
            best = int(row.argmax())
            is_quiet = best in self._quiet
            self._silent = self._silent + 1 if is_quiet else 0
            self._spoken += bool(self._spoken) or not is_quiet
            is_between = is_quiet and (best > 0 or self._is_of_words)
            limit = self._longest if is_between else 2 * self._longest
            if self._silent >= self._needed or self._spoken >= limit:
                said += self.end() if self._spoken else []
                self._begin()  # where nothing was said too: in a beam, rare characters add up
        if self._spoken:
            transcript = self._decoder.transcript
            if transcript.text not in ("", self._shown):
                self._shown = transcript.text
                said.append(Said(transcript, is_final=False))
        return said

    def end(self) -> list[Said]:
        """What there is is final."""
        transcript = self._decoder.transcript
        self._begin()
        return [Said(transcript, is_final=True)] if transcript.text else []
