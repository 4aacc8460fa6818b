"""Where a model comes from: a checkpoint of ours, a module and its weights, or an ONNX file."""

from dataclasses import dataclass, fields, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cnngru_edge.runtime.cli import FILE

if TYPE_CHECKING:
    from cnngru_edge.export.chain.pipeline import Model
    from cnngru_edge.models.own.wrapper import OwnModel


@dataclass(frozen=True)
class Source:
    """What was typed: a checkpoint of ours, or a module or a file that is not ours."""

    checkpoint: Path | None = None
    module: str | None = None
    weights: Path | None = None
    onnx: Path | None = None
    spec: Path | None = None


def source_options(command: Any) -> Any:
    """The argument and the options that say which model is meant, as one argument `source`."""

    @wraps(command)
    def with_source(**options: Any) -> Any:
        source = Source(**{one.name: options.pop(one.name) for one in fields(Source)})
        return command(source=source, **options)

    decorated: Any = with_source
    for option in (
        click.option(
            "--spec",
            type=FILE,
            help="With --model or --onnx: a TOML file with the labels, and what the input is.",
        ),
        click.option("--onnx", type=FILE, help="A float ONNX file of any exporter."),
        click.option("--checkpoint", "weights", type=FILE, help="With --model: its weights."),
        click.option(
            "--model",
            "module",
            metavar="PACKAGE.MODULE:CLASS",
            help="A torch module of your own; its code is run.",
        ),
        click.argument("checkpoint", type=FILE, required=False),
    ):
        decorated = option(decorated)
    return decorated


def load_source(source: Source) -> tuple["Model", str, list[str]]:
    """The model, its name, and what should be known of it.

    Raises:
        SpecError: it cannot be loaded, or does not run as its spec says.
    """
    checkpoint, module, weights = source.checkpoint, source.module, source.weights
    onnx, spec = source.onnx, source.spec
    if onnx and (module or checkpoint or weights):
        raise click.UsageError("--onnx is all of a model; leave --model and CHECKPOINT out")
    if not (module or onnx):
        if spec or weights:
            raise click.UsageError("--spec and --checkpoint are for --model, --spec for --onnx too")
        from cnngru_edge.models.nets.checkpoint import PRETRAINED, load_checkpoint

        checkpoint = checkpoint or PRETRAINED / "kws12.safetensors"
        return load_checkpoint(checkpoint), checkpoint.stem, []
    if spec is None:
        raise click.UsageError(
            "--model and --onnx need a --spec: labels, and what the input is (see the README)"
        )
    from cnngru_edge.models.own.weights import load_own
    from cnngru_edge.models.own.wrapper import OwnSpec

    own = OwnSpec.load(spec)
    if onnx:
        from cnngru_edge.export.trace.own_onnx import load_onnx

        model: OwnModel = load_onnx(onnx, own)
        return model, onnx.stem, _file_looked_at(onnx, model)
    assert module is not None
    if weights and checkpoint:
        raise click.UsageError("two checkpoints; --checkpoint is the same as CHECKPOINT")
    weights = weights or checkpoint
    if weights is None:
        raise click.UsageError("--model needs its weights: --checkpoint")
    model = load_own(module, weights, own)
    return model, weights.stem, _looked_at(model)


def _file_looked_at(path: Path, model: "OwnModel") -> list[str]:
    """The same of a file, which may be damaged by the exporter that wrote it."""
    import onnx_ir as ir

    from cnngru_edge.export.trace.faults import frozen_time_of, wrong_answers_of
    from cnngru_edge.models.errors import SpecError

    file = ir.load(path)
    try:
        known = _looked_at(model)
    except SpecError as e:
        if why := frozen_time_of(file):
            raise SpecError(f"{e}; {why}") from e
        raise
    return [*filter(None, [wrong_answers_of(file)]), *known]


def _looked_at(model: "OwnModel") -> list[str]:
    """Run it once, and say in its spec what keeps it from being a stream."""
    import torch

    from cnngru_edge.models.own.checks import check_runs, warnings_about, why_whole
    from cnngru_edge.runtime.inputs.read import example_input

    given = torch.from_numpy(example_input(model.spec)[None])
    check_runs(model, given)
    model.spec = replace(model.spec, why_whole=why_whole(model))
    return list(warnings_about(model, given))
