"""When a stream tells of a word: from the end of its speech to its event, in seconds of audio.

    python benchmarks/event_delay.py --engine build/kws12/model.int8.onnx --data SC --task sc12

Evaluation words in a long stream of background at 20 dB, as benchmarks/streaming.py hears them. The
time that a chunk takes to compute comes on top (benchmarks/latency.py).
"""

from pathlib import Path

import click
import numpy as np

from cnngru_edge.calibration.corpus.read import EVAL, read_corpus
from cnngru_edge.export.verdict.long_streams import (
    EARLY_S,
    LATE_S,
    MixConfig,
    detect,
    load,
    stream_logits,
    word_streams,
)
from cnngru_edge.models.spec.whole import streamable
from cnngru_edge.runtime.backends.open import open_session


@click.command()
@click.option("--engine", type=click.Path(path_type=Path), required=True)
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--task")
def main(engine: Path, data: Path, task: str | None) -> None:
    """Print a table."""
    corpus = read_corpus(data, task)
    delays: list[float] = []
    with open_session(engine) as session:
        spec = streamable(session.spec)
        rate = spec.features.sample_rate
        clips, samples, _ = load(corpus.of(EVAL), spec)
        _, noises, _ = load(corpus.noises_of(EVAL), spec)
        streams = word_streams(
            samples,
            [clip.label for clip in clips],
            noises,
            sample_rate=rate,
            seconds=0,
            rng=np.random.default_rng(0),
            config=MixConfig(snr_db=(20.0, 20.0), gain_db=(0.0, 0.0)),
        )
        for stream, logits in zip(streams, stream_logits(session, streams), strict=True):
            found = detect(spec, logits)
            for word in stream.words:
                near = [
                    d.time - word.end_s
                    for d in found
                    if d.label == word.label and -EARLY_S <= d.time - word.end_s <= LATE_S
                ]
                delays += near[:1]
    p5, p50, p95 = 1000 * np.percentile(delays, (5, 50, 95))
    print(f"{len(delays)} words found: p5 {p5:.0f} ms, median {p50:.0f} ms, p95 {p95:.0f} ms")


if __name__ == "__main__":
    main()
