"""Our INT8 model beside what the peers make of the same weights, on one thread, in one run.

    python benchmarks/peers.py [--data DIR] [--task NAME] [--json FILE] [--markdown FILE]

For the shipped model and one with a larger GRU: the latency of a step (one chunk, the state in and
out) and of a clip (1 s), the size of the file, the share of the weights that it holds in INT8, and
the accuracy. All that calibrate do so on the same recordings of DIR. The rows of OpenVINO need
`pip install openvino nncf`; what is not installed is left out.
"""

import copy
import json
import platform
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime
import safetensors.torch
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from cnngru_edge.calibration.collect import FRONTEND_NODES, calibrate
from cnngru_edge.calibration.corpus import DEMO, EVAL, calibration_clips, match_labels, read_corpus
from cnngru_edge.calibration.ranges import MIN_CLIPS, CalibrateConfig
from cnngru_edge.export.compare import answer
from cnngru_edge.export.inspection import inspect
from cnngru_edge.export.pipeline import FLOAT, INT8, RANGES, TORCHSCRIPT, parity_clips, trace
from cnngru_edge.export.quantize import quantize_onnx
from cnngru_edge.models.checkpoint import PRETRAINED, load_checkpoint
from cnngru_edge.models.cnn_gru import CnnGru
from cnngru_edge.models.spec import ModelSpec
from cnngru_edge.runtime.audio import Samples, pad_to_multiple, read_audio
from cnngru_edge.runtime.session import Array, Feed, TensorInfo, initial_state
from cnngru_edge.runtime.stream import clip_logits, flushed

CALLS = {"step": 50, "clip": 10}  # in a row, in each round
UNCACHED = 2**28  # bytes that no cache holds
WARMUP_CALLS = 3  # bring a backend's weights back into the cache, as in a stream of its own
SQNR_CLIPS = 8
Arrays = dict[str, Array]
Bound = tuple[Arrays, Arrays, Callable[[], Any]]
"""Inputs, outputs and a call that reads and writes them in place; torch's call returns its own."""


@dataclass(frozen=True)
class Case:
    """What every backend is given."""

    name: str
    model: CnnGru  # batch norms folded
    folder: Path  # with the model's TorchScript and float ONNX; backends write theirs here
    calibration: Sequence[Path]

    @property
    def weights(self) -> list[int]:
        """How many each convolution, each matrix of a GRU and the head has."""
        return [p.numel() for p in self.model.parameters() if p.dim() > 1]

    def int8_share(self, sizes: Iterable[int]) -> float:
        """Of the weights, given the sizes of INT8 constants; those of the front-end fit none."""
        return sum(size for size in sizes if size in self.weights) / sum(self.weights)

    def feeds(self) -> Iterator[Feed]:
        """The calibration clips for tools that do not carry a state: each from zeros."""
        spec = self.model.spec
        for path in self.calibration:
            samples = read_audio(path, spec.features.sample_rate).samples
            audio = pad_to_multiple(samples, spec.chunk_length)[None]
            yield {"audio": audio, **initial_state(spec, 1)}

    def buffers(self, length: int) -> tuple[Arrays, Arrays]:
        """Inputs and outputs for so many samples of one stream."""
        spec, state = self.model.spec, initial_state(self.model.spec, 1)
        logits = np.empty((1, length // spec.chunk_length, len(spec.labels)), np.float32)
        state_next = {s.next_name: np.empty_like(state[s.name]) for s in spec.state}
        inputs = {"audio": np.zeros((1, length), np.float32), **state}
        return inputs, {"logits": logits, **state_next}


@dataclass(frozen=True)
class Engine:
    """A backend's artefact, loaded; has of a Session what a Stream uses."""

    spec: ModelSpec
    file_bytes: int
    weights_int8: float
    bind: Callable[[int], Bound]  # to a length of audio
    inputs: tuple[TensorInfo, ...] = (TensorInfo("audio", "float", (1, "S")),)

    def run(self, feed: Feed) -> Arrays:
        """All outputs by name."""
        inputs, outputs, call = self.bind(feed["audio"].shape[1])
        for name, array in inputs.items():
            array[...] = feed[name]
        if isinstance(returned := call(), tuple):
            outputs = dict(zip(outputs, (returned[0], *returned[1]), strict=True))
        return {name: np.asarray(value).copy() for name, value in outputs.items()}


@dataclass(frozen=True)
class Row:
    """One backend's figures for one model in one form."""

    model: str
    form: str
    backend: str
    latency_us: float
    file_bytes: int
    weights_int8: float
    accuracy: float
    accuracy_unit: str  # fraction: of right answers; sqnr_db: at the logits


def onnx_engine(case: Case, path: Path, weights_int8: float, chunk: Path | None = None) -> Engine:
    """A graph in ONNX Runtime; with another one for chunks, if there is one."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    whole, step = (
        onnxruntime.InferenceSession(form, options, providers=["CPUExecutionProvider"])
        for form in (path, chunk or path)
    )

    @cache
    def bind(length: int) -> Bound:
        session = step if length == case.model.spec.chunk_length else whole
        inputs, outputs = case.buffers(length)
        binding = session.io_binding()
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        return inputs, outputs, partial(session.run_with_iobinding, binding)

    return Engine(case.model.spec, path.stat().st_size, weights_int8, bind)


def ours(case: Case) -> Engine:
    """What `cnngru-edge export` makes."""
    source, ranges, target = (case.folder / name for name in (FLOAT, RANGES, INT8))
    calibrate(source, case.calibration, CalibrateConfig(min_clips=1))[0].save(ranges)
    quantize_onnx(source, ranges, target)
    chunk = case.folder / "chunk.onnx"
    quantize_onnx(source, ranges, chunk, frames=1)
    share = min(our_int8_share(path) for path in (target, chunk))
    return onnx_engine(case, target, share, chunk)


def our_int8_share(path: Path) -> float:
    """As `cnngru-edge inspect` reads it from the file."""
    share: float = inspect(path)["coverage"]["weights_int8"]
    return share


def onnx_quantize_static(case: Case, *, exclude: str | None = None) -> Engine:
    """ONNX Runtime's own quantizer."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        feeds = case.feeds()

        def get_next(self) -> Feed | None:
            return next(self.feeds, None)

    source, target = case.folder / FLOAT, case.folder / f"static_{bool(exclude)}.onnx"
    if not exclude:
        # As its documentation asks for: what the front-end computes from constants is quantized in
        # every call otherwise. With the front-end excluded, it only stores what is folded anyway.
        source = case.folder / "preprocessed.onnx"
        quant_pre_process(case.folder / FLOAT, source)
    names = [node.name for node in onnx.load(source).graph.node]
    # Its defaults, int8 activations and a scale a tensor, are half as fast and no more accurate.
    quantize_static(
        source,
        target,
        Reader(),
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        nodes_to_exclude=[name for name in names if exclude and name.startswith(exclude)],
    )
    int8_types = {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
    constants = [c for c in onnx.load(target).graph.initializer if c.data_type in int8_types]
    return onnx_engine(case, target, case.int8_share(int(np.prod(c.dims)) for c in constants))


def torch_engine(case: Case, module: nn.Module, file_bytes: int, weights_int8: float) -> Engine:
    """A module, called as it is."""

    @cache
    def bind(length: int) -> Bound:
        inputs, outputs = case.buffers(length)
        audio, *state = (torch.from_numpy(array) for array in inputs.values())
        return inputs, outputs, partial(module, audio, tuple(state))

    return Engine(case.model.spec, file_bytes, weights_int8, bind)


def torch_float(case: Case) -> Engine:
    """The model as it is in Python."""
    file = safetensors.torch.save(case.model.state_dict())
    return torch_engine(case, case.model, len(file), 0.0)


def torch_dynamic(case: Case) -> Engine:
    """INT8 weights in the GRU and the head, activations quantized in each call."""
    from torch.ao.nn.quantized import dynamic
    from torch.ao.quantization import quantize_dynamic

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.ao.quantization is deprecated")
        model = quantize_dynamic(case.model, {nn.GRU, nn.Linear})
    weights = [m.weight() for m in model.modules() if isinstance(m, dynamic.Linear)]
    for gru in (m for m in model.modules() if isinstance(m, dynamic.GRU)):
        weights += gru.get_weight().values()
    share = case.int8_share(w.numel() for w in weights if w.dtype == torch.qint8)
    torch.save(model.state_dict(), path := case.folder / "dynamic.pt")
    return torch_engine(case, model, path.stat().st_size, share)


def torchscript(case: Case) -> Engine:
    """The TorchScript file, frozen, so that its constants are folded."""
    path = case.folder / TORCHSCRIPT
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.", category=DeprecationWarning)
        module = torch.jit.freeze(torch.jit.load(path).eval())
    return torch_engine(case, module, path.stat().st_size, 0.0)


def openvino_engine(case: Case, quantize: Callable[[Any], Any] = lambda model: model) -> Engine:
    """The float graph in OpenVINO, after `quantize`; compiled for each length of audio."""
    import openvino

    core = openvino.Core()
    # What is quantized stays so with this hint; the rest could be bfloat16 without it.
    config = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    config["INFERENCE_NUM_THREADS"] = "1"
    model = core.read_model(case.folder / FLOAT)
    states = {state.name: [1, *state.shape] for state in case.model.spec.state}
    model.reshape({"audio": [1, -1], **states})
    path = Path(tempfile.mkdtemp(dir=case.folder)) / "model.xml"
    openvino.save_model(quantize(model), path, compress_to_fp16=False)

    @cache
    def bind(length: int) -> Bound:
        inputs, outputs = case.buffers(length)
        model = core.read_model(path)
        model.reshape({name: list(array.shape) for name, array in inputs.items()})
        request = core.compile_model(model, "CPU", config).create_infer_request()
        for name, array in (inputs | outputs).items():
            request.set_tensor(name, openvino.Tensor(array, shared_memory=True))
        return inputs, outputs, partial(request.infer, share_outputs=True)

    model = core.read_model(path)
    int8_types = {openvino.Type.i8, openvino.Type.u8}
    constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
    int8 = (int(np.prod(c.shape)) for c in constants if c.get_element_type() in int8_types)
    size = sum(file.stat().st_size for file in path.parent.iterdir())
    return Engine(case.model.spec, size, case.int8_share(int8), bind)


def openvino_nncf(case: Case, *, exclude: str | None = None) -> Engine:
    """NNCF's post-training quantization with its defaults."""
    import nncf

    nncf.set_log_level("ERROR")
    feeds = list(case.feeds())
    scope = nncf.IgnoredScope(patterns=[f"{exclude}.*"]) if exclude else None

    def quantize(model: Any) -> Any:
        data = nncf.Dataset(feeds)
        with redirect_stdout(sys.stderr):  # its progress
            return nncf.quantize(model, data, subset_size=len(feeds), ignored_scope=scope)

    return openvino_engine(case, quantize)


OURS, FLOAT_ONNX, EXCLUDED = "cnngru-int8", "onnxruntime-fp32", " (front-end excluded)"
PEERS: dict[str, Callable[[Case], Engine]] = {
    OURS: ours,
    FLOAT_ONNX: lambda case: onnx_engine(case, case.folder / FLOAT, 0.0),
    "onnxruntime-quantize_static": onnx_quantize_static,
    f"onnxruntime-quantize_static{EXCLUDED}": partial(onnx_quantize_static, exclude=FRONTEND_NODES),
    "torch-fp32": torch_float,
    "torch-dynamic-int8": torch_dynamic,
    "torchscript": torchscript,
    "openvino-fp32": openvino_engine,
    "openvino-nncf-int8": openvino_nncf,
    f"openvino-nncf-int8{EXCLUDED}": partial(openvino_nncf, exclude=FRONTEND_NODES),
}


def large(model: CnnGru) -> CnnGru:
    """The same front-end and convolutions, three GRU layers of 512 with random weights."""
    torch.manual_seed(0)
    larger = CnnGru(replace(model.spec, hidden_size=512, num_layers=3)).eval()
    kept = {k: v for k, v in model.state_dict().items() if not k.startswith(("grus.", "head."))}
    larger.load_state_dict(kept, strict=False)
    return larger


TRAINED = "kws12"
MODELS: dict[str, Callable[[CnnGru], CnnGru]] = {TRAINED: lambda model: model, "large": large}


def build(case: Case, peers: Iterable[str]) -> dict[str, Engine]:
    """The backends that are installed."""
    engines = {}
    for name in peers:
        try:
            engines[name] = PEERS[name](case)
        except ImportError as e:
            click.echo(f"{name}: skipped, {e}", err=True)
    return engines


def accuracy(
    case: Case, engine: Engine, clips: Sequence[Samples], truth: Sequence[str]
) -> tuple[float, str]:
    """The share of right answers; for random weights, the SQNR at the logits.

    That is against torch in float64, so that float32 has a figure too.
    """
    if case.name == TRAINED:
        right = [answer(engine, c) == t for c, t in zip(clips, truth, strict=True)]
        return sum(right) / len(right), "fraction"
    exact = copy.deepcopy(case.model).double()
    signal, noise = 0.0, 0.0
    for clip in clips[:: max(1, len(clips) // SQNR_CLIPS)]:
        audio = torch.from_numpy(flushed(engine.spec, clip))[None].double()
        expected = exact(audio, tuple(s.double() for s in exact.initial_state()))[0][0].numpy()
        signal += float(np.sum(expected**2))
        noise += float(np.sum((clip_logits(engine, clip) - expected) ** 2))
    return 10 * float(np.log10(signal / noise)), "sqnr_db"


def latencies_us(
    engines: dict[str, Engine], feed: Feed, calls: int, rounds: int
) -> dict[str, float]:
    """Median over the rounds of a call's mean; every backend has its turn in each of them."""
    means: dict[str, list[float]] = {name: [] for name in engines}
    for engine in engines.values():
        engine.run(feed)
    for _ in range(1 + rounds):
        for name, engine in engines.items():
            call = engine.bind(feed["audio"].shape[1])[2]
            for _ in range(WARMUP_CALLS):
                call()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            means[name].append((time.perf_counter() - start) / calls)
    return {name: 1e6 * median(values[1:]) for name, values in means.items()}


def read_us(size: int) -> tuple[float, float]:
    """Time to read so many bytes once on one thread: from the caches, and from memory.

    The fastest of three ways to read the same bytes again and again; and the median over bytes that
    were not read before, from a block that no cache holds.
    """
    best = float("inf")
    block = np.random.default_rng(0).integers(1, 127, size=(UNCACHED // size + 1, size), dtype="i1")
    memory = block[0].tobytes()
    words = torch.from_numpy(block[0, : size // 8 * 8].copy()).view(torch.int64)
    for read in (lambda: memory.find(b"\x00"), block[0].max, words.sum) * 100:
        start = time.perf_counter()
        read()
        best = min(best, time.perf_counter() - start)
    cold = []
    for row in block[1:]:
        start = time.perf_counter()
        row.max()
        cold.append(time.perf_counter() - start)
    return 1e6 * best, 1e6 * median(cold)


def measure(
    case: Case,
    engines: dict[str, Engine],
    clips: Sequence[Samples],
    truth: Sequence[str],
    rounds: int,
) -> Iterator[Row]:
    """All figures of a model."""
    spec = case.model.spec
    scores = {name: accuracy(case, engine, clips, truth) for name, engine in engines.items()}
    second = pad_to_multiple(clips[0], spec.features.sample_rate)[: spec.features.sample_rate]
    middle = len(second) // 2 // spec.chunk_length * spec.chunk_length
    heard = {"step": second[middle : middle + spec.chunk_length], "clip": second}
    for form, samples in heard.items():
        feed = {"audio": samples[None], **initial_state(spec, 1)}
        for name, latency_us in latencies_us(engines, feed, CALLS[form], rounds).items():
            size, int8 = engines[name].file_bytes, engines[name].weights_int8
            yield Row(case.name, form, name, latency_us, size, int8, *scores[name])


def table(rows: Sequence[Row]) -> Table:
    """One model in one form."""
    by_name = {row.backend: row for row in rows}

    def ratio(row: Row, reference: str, attribute: str) -> str:
        if reference not in by_name:
            return "-"
        return f"{getattr(row, attribute) / getattr(by_name[reference], attribute):.2f}"

    made = Table(box=box.MARKDOWN)
    made.add_column("backend")
    for header in ("latency, us", f"/ {OURS}", "file, KB", "/ fp32 ONNX", "in INT8", "accuracy"):
        made.add_column(header, justify="right")
    for row in rows:
        fraction = row.accuracy_unit == "fraction"
        made.add_row(
            row.backend,
            f"{row.latency_us:.0f}",
            ratio(row, OURS, "latency_us"),
            f"{row.file_bytes / 1000:.0f}",
            ratio(row, FLOAT_ONNX, "file_bytes"),
            f"{row.weights_int8:.1%}",
            f"{row.accuracy:.1%}" if fraction else f"{row.accuracy:.1f} dB",
        )
    return made


def report(rows: Sequence[Row], floors_us: dict[str, tuple[float, float]]) -> str:
    """All tables, as Markdown, with what they were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    found = [*names[:1], platform.machine(), "one thread"]
    for package in ("onnxruntime", "torch", "openvino", "nncf"):
        with suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    console = Console(width=160)
    with console.capture() as capture:
        console.print(f"# Benchmarks\n\n{', '.join(found)}.\n")
        console.print(f"    python benchmarks/peers.py {shlex.join(sys.argv[1:])}")
        for model, (cached, uncached) in floors_us.items():
            for form in CALLS:
                chosen = [row for row in rows if (row.model, row.form) == (model, form)]
                console.print(f"\n## {model}, {form}", table(chosen))
                steps = [row.latency_us for row in chosen if row.backend == OURS]
                for step in steps if form == "step" else ():
                    console.print(
                        f"To read the INT8 weights once takes {cached:.0f} us where caches hold "
                        f"them, {uncached:.0f} us from memory: a step of {OURS} takes "
                        f"{step / cached:.2f} and {step / uncached:.2f} times that.",
                        soft_wrap=True,
                    )
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


@click.command()
@click.option("--data", type=click.Path(path_type=Path), default=DEMO)
@click.option("--task")
@click.option("--models", type=click.Choice(list(MODELS)), multiple=True, default=list(MODELS))
@click.option("--peers", type=click.Choice(list(PEERS)), multiple=True, default=list(PEERS))
@click.option("--rounds", type=click.IntRange(1), default=15, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
@click.option("--markdown", type=click.Path(path_type=Path))
def main(
    data: Path,
    task: str | None,
    models: Sequence[str],
    peers: Sequence[str],
    rounds: int,
    json_file: Path | None,
    markdown: Path | None,
) -> None:
    """Print a table for each model and form."""
    torch.set_num_threads(1)
    trained = load_checkpoint(PRETRAINED / f"{TRAINED}.safetensors")
    corpus = read_corpus(data, task)
    calibration = calibration_clips(corpus, MIN_CLIPS)
    truth = match_labels(corpus.of(EVAL), trained.spec.labels)
    clips = [read_audio(path, trained.spec.features.sample_rate).samples for path in truth]
    rows: list[Row] = []
    floors_us: dict[str, tuple[float, float]] = {}
    for name in models:
        with tempfile.TemporaryDirectory() as folder:
            model = MODELS[name](trained)
            trace(model, Path(folder), parity_clips(calibration, model.spec))
            paths = [clip.path for clip in calibration]
            case = Case(name, model.for_export(), Path(folder), paths)
            engines = build(case, peers)
            with torch.inference_mode():
                rows += measure(case, engines, clips, list(truth.values()), rounds)
            floors_us[name] = read_us(sum(case.weights))  # a byte each
    text = report(rows, floors_us)
    print(text, end="")
    if markdown:
        markdown.write_text(text)
    if json_file:
        json_file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
