"""The commands that a device needs: run, bench, doctor. They import no torch and no onnx."""

import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource
from rich.console import Console

from cnngru_edge.models.errors import InputError, SessionError
from cnngru_edge.models.spec.stream import ModelSpec
from cnngru_edge.models.spec.whole import Spec, streamable
from cnngru_edge.runtime.check.golden import GOLDEN
from cnngru_edge.runtime.check.shadow import MAX_FLIPS, Shadow, ShadowConfig

if TYPE_CHECKING:
    from cnngru_edge.runtime.decode.ctc import DecodeConfig
    from cnngru_edge.runtime.inputs.audio import Samples
    from cnngru_edge.runtime.inputs.microphone import RingBuffer
    from cnngru_edge.runtime.inputs.read import Source, Tokens
    from cnngru_edge.runtime.live import Event, TextEvent
    from cnngru_edge.runtime.session import Session

FILE = click.Path(path_type=Path)

as_json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON for other programs."
)


_LATE_AFTER_S = 2.0  # of audio: the first chunks are slower than the rest


def _list_devices(context: click.Context, option: click.Parameter, is_asked: bool) -> None:
    if is_asked and not context.resilient_parsing:
        from cnngru_edge.runtime.inputs.microphone import devices

        click.echo(devices())
        context.exit()


@click.command()
@click.option("--engine", type=FILE, required=True, help="Artefact to run (.onnx, .engine or .ts).")
@click.option("--reference", type=FILE, help="Check each answer against this float artefact.")
@click.option(
    "--shadow",
    "share",
    type=click.FloatRange(0, 1, min_open=True),
    help="Let the reference check this share only, of the clips or of the stream, in the "
    "background; exit 1 if a limit was crossed.",
)
@click.option(
    "--min-agreement",
    type=click.FloatRange(0, 1),
    default=ShadowConfig.min_agreement,
    help="With --shadow: share of the clips, or of the frames of a stream or a ctc model, with the "
    "reference's label; crossed when it is proven to be less.",
)
@click.option(
    "--min-sqnr",
    type=float,
    default=ShadowConfig.min_sqnr_db,
    metavar="DB",
    help="With --shadow: signal-to-quantization-noise ratio of the logits of each clip, or of each "
    "second of a stream.",
)
@click.option(
    "--save-flips",
    type=FILE,
    metavar="DIR",
    help="With --shadow: keep the audio of what the two answer differently, or that crosses "
    f"--min-sqnr, as WAV; no more than {MAX_FLIPS} files in DIR.",
)
@click.option(
    "--beam",
    type=click.IntRange(1),
    help="Search for the text with so many beginnings at a time (ctc models).  [default: the best "
    "path; with --words or --lm 16]",
)
@click.option(
    "--words", type=FILE, help="Write only the words in this file, one on each line (ctc)."
)
@click.option("--lm", type=FILE, help="Weigh words by an n-gram model in the ARPA format (ctc).")
@click.option(
    "--stream",
    "is_stream",
    is_flag=True,
    help="Take one FILE as a stream, and print each word or text as it is said. It is audio, "
    "or - for a WAV or raw 16-bit mono samples at the model's rate from standard input, or mic.",
)
@click.option("--device", help="With --stream mic: number or part of the name of a microphone.")
@click.option(
    "--list-devices",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_devices,
    help="Show the microphones that there are.",
)
@click.option(
    "--text",
    "phrases",
    multiple=True,
    help="A phrase, for a model that reads phrases; may be given several times.",
)
@click.option(
    "--tokens",
    multiple=True,
    metavar="IDS",
    help="The same as token ids with spaces between, for a tokenizer of one's own.",
)
@as_json_option
@click.argument("files", metavar="[FILE]...", type=FILE, nargs=-1)
def run(
    engine: Path,
    reference: Path | None,
    share: float | None,
    min_agreement: float,
    min_sqnr: float,
    save_flips: Path | None,
    beam: int | None,
    words: Path | None,
    lm: Path | None,
    is_stream: bool,
    device: str | None,
    phrases: tuple[str, ...],
    tokens: tuple[str, ...],
    as_json: bool,
    files: tuple[Path, ...],
) -> None:
    """Say what a model answers to FILEs, audio or images: label or text, score and latency."""
    sources: list[Source] = [*files, *phrases, *map(_tokens, tokens)]
    if not sources:
        raise click.UsageError("give a FILE, --text or --tokens")
    if device and not (is_stream and str(sources[0]) == "mic"):
        raise click.UsageError("--device is for --stream mic")
    config = None
    if share is not None:
        if reference is None:
            raise click.UsageError("--shadow needs a --reference")
        config = ShadowConfig(reference, share, min_agreement, min_sqnr, save_flips)
        reference = None  # not in the foreground
    elif unused := given("min_agreement", "min_sqnr", "save_flips"):
        raise click.UsageError(f"{unused} needs --shadow")
    if is_stream:
        if len(files) != 1 or len(sources) != 1 or reference:
            raise click.UsageError("--stream takes one FILE, and --reference only with --shadow")
        _run_stream(engine, str(files[0]), device, config, (beam, words, lm), as_json)
        return
    from cnngru_edge.runtime.backends.open import open_session
    from cnngru_edge.runtime.recognize import recognize

    errors: list[InputError] = []
    notes: dict[str, int] = {}
    width = max(len(str(source)) for source in sources)
    with ExitStack() as stack:
        session = stack.enter_context(open_session(engine))
        shadow = stack.enter_context(_shadow(session, config))
        decode = _decode_config(session.spec, engine, beam, words, lm)
        checked = stack.enter_context(open_session(reference)) if reference else None
        if checked and checked.spec != session.spec:
            raise SessionError(
                f"{reference}: of another model than {engine}; give its own float one"
            )
        for source in sources:
            try:
                result = recognize(session, source, checked, shadow, decode)
            except InputError as e:
                errors.append(e)
                continue
            for note in result.notes:
                notes[note] = notes.get(note, 0) + 1
            click.echo(result.to_json() if as_json else result.to_line(width))
    for note, count in notes.items():
        click.echo(f"note: {count} of {len(sources)} {note}", err=True)
    report_skipped(errors)
    _exit_if_failed(shadow)


def _tokens(text: str) -> "Tokens":
    from cnngru_edge.runtime.inputs.read import Tokens

    try:
        return Tokens(tuple(int(part) for part in text.replace(",", " ").split()))
    except ValueError as e:
        raise click.UsageError(f"--tokens takes whole numbers, got {text!r}") from e


def given(*names: str) -> str | None:
    """The first of these options that was given."""
    context = click.get_current_context()
    found = (n for n in names if context.get_parameter_source(n) is not ParameterSource.DEFAULT)
    return next((f"--{name.replace('_', '-')}" for name in found), None)


@contextmanager
def _shadow(session: "Session", config: ShadowConfig | None) -> Iterator[Shadow | None]:
    """What checks a run, if anything; its summary at the end, whichever end that is."""
    if config is None:
        yield None
        return

    if not isinstance(session.spec, ModelSpec):
        raise SessionError(
            "--shadow is for models that can be streams; --reference alone checks every answer"
        )

    def warn(line: str) -> None:
        click.echo(f"warning: {line}", err=True)

    with Shadow(session.spec, config, warn) as shadow:
        try:
            yield shadow
        finally:
            shadow.close()
            click.echo(shadow.summary.text, err=True)


def _exit_if_failed(shadow: Shadow | None) -> None:
    if shadow is not None and not shadow.summary.passed:
        sys.exit(1)


def _decode_config(
    spec: Spec, engine: Path, beam: int | None, words: Path | None, lm: Path | None
) -> "DecodeConfig":
    """How the texts of a ctc model are searched for."""
    from cnngru_edge.runtime.decode.ctc import DecodeConfig
    from cnngru_edge.runtime.decode.ngram import read_arpa, read_words

    if not spec.writes_text and (beam or words or lm):
        raise click.UsageError(
            f"--beam, --words and --lm are for models that write text, not for {engine}"
        )
    return DecodeConfig(
        beam,
        words=read_words(words, spec) if words else None,
        ngram=read_arpa(lm, spec) if lm else None,
    )


def _run_stream(
    engine: Path,
    audio: str,
    device: str | None,
    config: ShadowConfig | None,
    search: tuple[int | None, Path | None, Path | None],
    as_json: bool,
) -> None:
    from cnngru_edge.runtime.backends.open import open_session
    from cnngru_edge.runtime.live import FINAL, Event, StreamSession

    count = 0

    def show(events: Iterable["Event | TextEvent"]) -> None:
        nonlocal count
        for event in events:
            count += isinstance(event, Event) or event.type == FINAL
            _show_event(event, as_json)

    with ExitStack() as held:
        session = held.enter_context(open_session(engine))
        spec = streamable(session.spec)
        rate, blocks, buffer = _source(held, audio, device, spec.features.sample_rate)
        shadow = held.enter_context(_shadow(session, config))
        decode = _decode_config(session.spec, engine, *search)
        stream = held.enter_context(StreamSession(session, rate, shadow, decode))
        lost, is_late = 0, False
        try:
            for block in blocks:
                if buffer is not None and buffer.dropped > lost:
                    stream.lose((buffer.dropped - lost) / rate)
                    lost = buffer.dropped
                show(stream.push(block))
                if stream.factor > 1 and stream.pushed_s > _LATE_AFTER_S and not is_late:
                    is_late = True
                    late = "what does not fit is dropped" if buffer else "the input has to wait"
                    late = f"by a factor of {stream.factor:.2f}; {late}"
                    click.echo(f"warning: slower than real time {late}", err=True)
            show(stream.flush())
        except (KeyboardInterrupt, SystemExit):
            _rewrite("")
            click.echo("stopped", err=True)  # an end like any other of a live stream
        dropped = f", {lost / rate:.1f} s dropped" if lost else ""
        what = "texts" if session.spec.writes_text else "words"
        click.echo(
            f"{stream.pushed_s:.1f} s of audio{dropped}, {count} {what}, real-time factor "
            f"{stream.factor:.4f}",
            err=True,
        )
    _exit_if_failed(shadow)


def _show_event(event: "Event | TextEvent", as_json: bool) -> None:
    from cnngru_edge.runtime.live import PARTIAL, Event

    if as_json:
        click.echo(json.dumps(asdict(event)))
    elif isinstance(event, Event):
        click.echo(f"{event.time:9.2f} s  {event.label:<10} {event.score:6.1%}")
    elif event.type == PARTIAL:
        _rewrite(event.text)
    else:
        _rewrite("")
        click.echo(f"{event.start:9.2f} s  {event.text}")


def _rewrite(text: str) -> None:
    """Show the end of a text that still grows, in place of what was there; on a terminal only."""
    if sys.stderr.isatty():
        columns = shutil.get_terminal_size().columns
        click.echo(f"\r\x1b[K{text[-(columns - 1) :]}", nl=False, err=True)


def _source(
    held: ExitStack, audio: str, device: str | None, sample_rate: int
) -> tuple[int, Iterator["Samples"], "RingBuffer | None"]:
    """Sample rate and blocks of a stream, and the buffer that drops what comes too fast."""
    from cnngru_edge.runtime.inputs.audio import file_blocks, pipe_blocks

    if audio == "-":
        return *pipe_blocks(sys.stdin.buffer, sample_rate), None
    if audio == "mic":
        from cnngru_edge.runtime.inputs.microphone import microphone

        name = int(device) if device and device.isdigit() else device
        rate, buffer, blocks = held.enter_context(microphone(name, sample_rate))
        return rate, blocks, buffer
    return *file_blocks(Path(audio)), None


@click.command()
@click.argument("artefact", type=FILE)
@click.option("--batch", type=click.IntRange(1), default=1, help="Streams at a time.")
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    help="Length of a clip, for an artefact that takes any.",
)
@click.option(
    "--duration",
    type=click.FloatRange(0),
    default=3.0,
    help="Seconds to measure each kind of step for.",
)
@click.option("--warm-up", type=click.FloatRange(0), default=0.2, help="Seconds before that.")
@click.option("--threads", type=click.IntRange(1), default=1, help="CPU threads.")
@click.option("--cuda-graph/--no-cuda-graph", default=True, help="Launch a captured graph.")
@as_json_option
def bench(
    artefact: Path,
    batch: int,
    seconds: float,
    duration: float,
    warm_up: float,
    threads: int,
    cuda_graph: bool,
    as_json: bool,
) -> None:
    """Measure how fast an ARTEFACT is here, as a stream and as a clip."""
    from cnngru_edge.runtime.bench import bench as measure
    from cnngru_edge.runtime.bench import print_bench

    found = measure(
        artefact,
        batch=batch,
        seconds=seconds,
        duration_s=duration,
        warm_up_s=warm_up,
        threads=threads,
        cuda_graph=cuda_graph,
    )
    if as_json:
        click.echo(found.to_json())
    else:
        print_bench(found, Console(markup=False))


@click.command()
@click.option(
    "--engine", type=FILE, required=True, help="Artefact to test (.onnx, .engine or .ts)."
)
@click.option(
    "--golden",
    type=FILE,
    help=f"Clips and the float model's answers, of its export.  [default: {GOLDEN} beside it]",
)
@as_json_option
def selftest(engine: Path, golden: Path | None, as_json: bool) -> None:
    """Let an artefact answer the golden clips of its export, here; exit 1 if it does not pass."""
    from cnngru_edge.runtime.check.golden import selftest as run_selftest

    found = run_selftest(engine, golden or engine.with_name(GOLDEN))
    for line in [found.to_json()] if as_json else found.lines:
        click.echo(line)
    if not found.passed:
        sys.exit(1)


@click.command()
@as_json_option
def doctor(as_json: bool) -> None:
    """Say what this machine is, what it can build and run, and what to install for the rest."""
    from cnngru_edge.runtime.machine.doctor import diagnose, print_diagnosis
    from cnngru_edge.runtime.machine.survey import look

    diagnosis = diagnose(look())
    if as_json:
        click.echo(json.dumps(diagnosis.to_json()))
    else:
        print_diagnosis(diagnosis, Console(markup=False))


def report_skipped(errors: Sequence[InputError]) -> None:
    """Name the inputs that were left out; having any is a failure, after all else is done."""
    if len(errors) == 1:
        raise errors[0]
    for error in errors:
        click.echo(f"skipped {error}", err=True)
    if errors:
        raise click.ClickException(f"recordings left out: {len(errors)}, see above")
