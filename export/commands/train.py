"""The command that trains a model, of any family."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import click

from cnngru_edge.calibration.corpus.read import Corpus, read_corpus
from cnngru_edge.export.commands.options import task_option
from cnngru_edge.models.errors import CorpusError, InputError
from cnngru_edge.models.spec.stream import CTC, KWS
from cnngru_edge.models.spec.whole import CRNN, TEXT
from cnngru_edge.runtime.cli import FILE
from cnngru_edge.runtime.progress import progress_bars
from cnngru_edge.runtime.stream import FLUSH_S

CHARACTERS, WORDS = "characters", "words"

if TYPE_CHECKING:
    from cnngru_edge.export.training.ctc import CtcReport
    from cnngru_edge.export.training.keywords import EpochReport
    from cnngru_edge.export.training.whole import WholeReport
    from cnngru_edge.models.nets.checkpoint import Model

    Training: TypeAlias = tuple[Iterator[EpochReport | CtcReport | WholeReport | InputError], int]
    """Reports as they come, and of how many epochs."""


@click.command()
@click.option(
    "--family",
    type=click.Choice([KWS, CTC, TEXT, CRNN]),
    default=KWS,
    help="kws hears a word, ctc writes what it hears, text tells the intent of a phrase, crnn "
    "reads a line in an image.",
)
@click.option("--data", type=FILE, required=True, help="Folder per label, or manifest.csv.")
@click.option("--out", type=FILE, required=True, help="Checkpoint to write (.safetensors).")
@task_option
@click.option("--labels", help="Words to tell apart, with commas; other words become 'unknown'.")
@click.option(
    "--units",
    type=click.Choice([CHARACTERS, WORDS]),
    help=f"What a ctc model writes in; words are for a few dozen of them.  [default: {CHARACTERS}]",
)
@click.option(
    "--hidden-size",
    type=click.IntRange(1),
    help="Units of a GRU layer, in each direction.  [default: 128; ctc 192; text and crnn 64]",
)
@click.option(
    "--num-layers", type=click.IntRange(1), help="GRU layers.  [default: 1; ctc and crnn 2]"
)
@click.option(
    "--init",
    type=FILE,
    help="Checkpoint to go on from; it settles labels and layers. A ctc model can start from the "
    "convolutions of a keyword model.",
)
@click.option(
    "--light", is_flag=True, help="Milder noise and masking, smaller steps: to finish a model."
)
@click.option(
    "--epochs",
    type=click.IntRange(1),
    help="[default: 80; with --light 25; ctc 20, and 14 to go on; text 12; crnn 9]",
)
@click.option(
    "--read-delay",
    type=click.FloatRange(0, 1),
    help=f"Seconds after a word's end in which its label is learned.  [default: {FLUSH_S}]",
)
@click.option("--seed", type=int, default=0, help="The same seed gives the same model.")
def train(
    family: str,
    data: Path,
    out: Path,
    task: str | None,
    labels: str | None,
    units: str | None,
    light: bool,
    read_delay: float | None,
    **options: Any,
) -> None:
    """Train a model on a corpus; killed, the same command goes on."""
    if family != KWS and (labels or light or read_delay is not None):
        raise click.UsageError("--labels, --light and --read-delay are for --family kws")
    if family != CTC and units:
        raise click.UsageError("--units is for --family ctc")
    if family == TEXT and options["num_layers"]:
        raise click.UsageError("--num-layers is not for --family text, which has one")
    corpus = read_corpus(data, task)
    if family in (TEXT, CRNN):
        training = _train_whole(family, corpus, out, **options)
    elif any(clip.is_phrase for clip in corpus.clips):
        raise CorpusError(f"{corpus.root}: phrases, not recordings; --family text learns those")
    elif family == CTC:
        training = _train_ctc(corpus, out, units, **options)
    else:
        words = labels.split(",") if labels else None
        training = _train_kws(corpus, out, words, light, read_delay, **options)
    reports, epochs = training
    with progress_bars() as bar:
        bar.start()
        epoch_bar = bar.add_task("train", total=epochs)
        for report in reports:
            if isinstance(report, InputError):
                bar.console.print(f"skipped {report}", highlight=False, soft_wrap=True)
                continue
            bar.update(epoch_bar, completed=report.epoch)
            bar.console.print(report.summary)
    click.echo(out)


def _train_kws(
    corpus: Corpus,
    out: Path,
    words: list[str] | None,
    light: bool,
    read_delay: float | None,
    *,
    hidden_size: int | None,
    num_layers: int | None,
    init: Path | None,
    epochs: int | None,
    seed: int,
) -> "Training":
    import torch

    from cnngru_edge.export.training.keywords import LIGHT, choose_labels
    from cnngru_edge.export.training.keywords import train as run_training
    from cnngru_edge.export.training.run import TrainConfig
    from cnngru_edge.models.nets.cnn_gru import CnnGru
    from cnngru_edge.models.spec.stream import ModelSpec

    if init and (words or hidden_size or num_layers):
        raise click.UsageError("--init settles labels and layers; leave those options out")
    torch.manual_seed(seed)
    if init:
        model = _initial(init, KWS)
        assert isinstance(model, CnnGru)
    else:
        spec = ModelSpec(
            choose_labels(corpus, words),
            hidden_size=hidden_size or ModelSpec.hidden_size,
            num_layers=num_layers or ModelSpec.num_layers,
        )
        model = CnnGru(spec)
    config = LIGHT if light else TrainConfig()
    delay = config.streams.read_delay_s if read_delay is None else read_delay
    config = replace(
        config,
        epochs=epochs or config.epochs,
        seed=seed,
        streams=replace(config.streams, read_delay_s=delay),
    )
    return run_training(corpus, model, out, config), config.epochs


def _train_ctc(
    corpus: Corpus,
    out: Path,
    units: str | None,
    *,
    hidden_size: int | None,
    num_layers: int | None,
    init: Path | None,
    epochs: int | None,
    seed: int,
) -> "Training":
    import torch

    from cnngru_edge.export.training.ctc import (
        CTC_CONFIG,
        CTC_FURTHER,
        CTC_SPEC,
        OF_WORDS_SPEC,
        choose_alphabet,
        take_convolutions,
        train_ctc,
    )
    from cnngru_edge.models.nets.cnn_gru import CnnGru

    source = _initial(init, KWS, CTC) if init else None
    assert source is None or isinstance(source, CnnGru)
    config = CTC_CONFIG
    torch.manual_seed(seed)
    if source and source.spec.family == CTC:
        if units or hidden_size or num_layers:
            raise click.UsageError("--init settles labels and layers; leave those options out")
        model, config = source, CTC_FURTHER
    else:
        usual = OF_WORDS_SPEC if units == WORDS else CTC_SPEC
        spec = replace(
            usual,
            labels=choose_alphabet(corpus, of_words=units == WORDS),
            hidden_size=hidden_size or usual.hidden_size,
            num_layers=num_layers or usual.num_layers,
        )
        model = CnnGru(spec)
        if source:
            take_convolutions(model, source)
    config = replace(config, epochs=epochs or config.epochs, seed=seed)
    return train_ctc(corpus, model, out, config), config.epochs


def _train_whole(
    family: str,
    corpus: Corpus,
    out: Path,
    *,
    hidden_size: int | None,
    num_layers: int | None,
    init: Path | None,
    epochs: int | None,
    seed: int,
) -> "Training":
    import torch

    from cnngru_edge.export.training.whole import (
        CRNN_CONFIG,
        TEXT_CONFIG,
        choose_characters,
        choose_intents,
        choose_vocabulary,
        train_whole,
    )
    from cnngru_edge.models.nets.cnn_gru import CnnGru
    from cnngru_edge.models.nets.crnn import Crnn, crnn_spec
    from cnngru_edge.models.nets.text_cnn_gru import TextCnnGru, text_spec

    if init and (hidden_size or num_layers):
        raise click.UsageError("--init settles labels and layers; leave those options out")
    sizes = {"hidden_size": hidden_size, "num_layers": num_layers}
    layers = {name: size for name, size in sizes.items() if size}
    config = TEXT_CONFIG if family == TEXT else CRNN_CONFIG
    config = replace(config, epochs=epochs or config.epochs, seed=seed)
    torch.manual_seed(seed)
    if init:
        model = _initial(init, family)
        assert not isinstance(model, CnnGru)
    elif family == TEXT:
        vocabulary = choose_vocabulary(corpus)
        model = TextCnnGru(text_spec(choose_intents(corpus), vocabulary, **layers))
    else:
        model = Crnn(crnn_spec(choose_characters(corpus), **layers))
    return train_whole(corpus, model, out, config), config.epochs


def _initial(init: Path, *families: str) -> "Model":
    from cnngru_edge.models.nets.checkpoint import load_checkpoint

    model = load_checkpoint(init)
    if model.spec.family not in families:
        raise click.UsageError(f"--init is a model of --family {model.spec.family}")
    return model
