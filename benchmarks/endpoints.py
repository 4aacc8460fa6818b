"""How long a silence ends a text: strings that are cut in two or run together, and the delay.

    python benchmarks/endpoints.py --engine build/ctc/model.int8.onnx --data SC --task sc12

Evaluation strings of benchmarks/connected_words.py in streams, 1 to 3 s of silence after each.
Between the words of a string lie up to 0.5 s, and the margins of
export.training.connected.speech_edges on top. The delay is from the end of a string's last word to
its final text, the computing not included. Prints Markdown.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np
from connected_words import strings_of
from torchaudio.functional import edit_distance

from cnngru_edge.calibration.corpus.read import EVAL, read_corpus
from cnngru_edge.export.training.connected import Utterance, speech_edges
from cnngru_edge.models.spec.stream import EndpointSpec, ModelSpec
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.decode.answer import Transcriber
from cnngru_edge.runtime.decode.ctc import Transcript, frame_s
from cnngru_edge.runtime.inputs.audio import Samples, pad_to_multiple
from cnngru_edge.runtime.session import Array
from cnngru_edge.runtime.stream import Stream

PAUSE_S = (1.0, 3.0)
_STRINGS = 50  # in a stream


@dataclass(frozen=True)
class Said:
    """A string in a stream, in seconds from its beginning."""

    text: str
    start: float
    end: float  # of its speech


@dataclass(frozen=True)
class Final:
    """A final text, and when it came."""

    transcript: Transcript
    time: float


def streams_of(
    strings: Sequence[Utterance], rate: int, rng: np.random.Generator
) -> list[tuple[Samples, list[Said]]]:
    """The strings in a row, a pause after each."""
    streams = []
    for start in range(0, len(strings), _STRINGS):
        pieces: list[Samples] = []
        said, position = [], 0
        for string in strings[start : start + _STRINGS]:
            end = position + speech_edges(string.samples, rate)[1]
            said.append(Said(string.text, position / rate, end / rate))
            pause = np.zeros(round(rng.uniform(*PAUSE_S) * rate), np.float32)
            pieces += [string.samples, pause]
            position += len(string.samples) + len(pause)
        streams.append((np.concatenate(pieces), said))
    return streams


def finals_of(spec: ModelSpec, logits: Array) -> list[Final]:
    """The final texts of a stream."""
    transcriber, found = Transcriber(spec), []
    for frame, row in enumerate(logits, start=1):
        for said in transcriber.push(row[None]):
            if said.is_final:
                found.append(Final(said.transcript, frame * frame_s(spec)))
    last = len(logits) * frame_s(spec)
    return found + [Final(said.transcript, last) for said in transcriber.end()]


@click.command()
@click.option("--engine", type=click.Path(path_type=Path), required=True)
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--task")
@click.option("--seed", type=int, default=0)
def main(engine: Path, data: Path, task: str | None, seed: int) -> None:
    """Print a row for each length of silence."""
    with open_session(engine) as session:
        spec = session.spec
        rate = spec.features.sample_rate
        strings = strings_of(read_corpus(data, task), EVAL, (1, 6), seed)
        streams = streams_of(strings, rate, np.random.default_rng(seed))
        logits = []
        for samples, _ in streams:
            with Stream(session) as stream:
                logits.append(stream.push(pad_to_multiple(samples, spec.chunk_length)[None])[0])
    count = sum(" " in string.text for string in strings)
    print(f"{len(strings)} strings, {count} of more than a word\n")
    print("| silence, s | strings cut | run together | WER, % | delay, median / 95 %, s |")
    print("|---|---|---|---|---|")
    for silence_s in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2):
        timed = replace(spec, endpoint=EndpointSpec(silence_s))
        cut = together = edits = words = 0
        delays: list[float] = []
        for (_, said), frames in zip(streams, logits, strict=True):
            finals = finals_of(timed, frames)
            heard = " ".join(final.transcript.text for final in finals).split()
            true = " ".join(string.text for string in said).split()
            edits, words = edits + edit_distance(true, heard), words + len(true)
            starts = np.array([string.start for string in said])
            spans = [
                {int(np.searchsorted(starts, word.start, "right")) for word in f.transcript.words}
                for f in finals
            ]
            together += sum(len(span) > 1 for span in spans)
            for i, string in enumerate(said, start=1):
                mine = [f.time for f, span in zip(finals, spans, strict=True) if i in span]
                cut += len(mine) > 1
                delays += [time - string.end for time in mine[-1:]]
        middle, late = np.percentile(delays, (50, 95))
        print(
            f"| {silence_s:g} | {100 * cut / count:.1f} % | {together} | {100 * edits / words:.1f} "
            f"| {middle:.2f} / {late:.2f} |"
        )


if __name__ == "__main__":
    main()
