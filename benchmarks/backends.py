"""What peers.py measures: our INT8 model, and what each peer makes of the same weights."""

import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime
import safetensors.torch
import torch
from torch import nn

from cnngru_edge.calibration.ranges.choose import CalibrateConfig
from cnngru_edge.calibration.ranges.collect import FRONTEND_NODES, calibrate
from cnngru_edge.export.artefacts import FLOAT, INT8, RANGES, TORCHSCRIPT
from cnngru_edge.export.chain.inspection import inspect
from cnngru_edge.export.quantize.run import quantize_onnx
from cnngru_edge.models.nets.cnn_gru import CnnGru
from cnngru_edge.models.spec.stream import ModelSpec
from cnngru_edge.runtime.inputs.audio import pad_to_multiple, read_audio
from cnngru_edge.runtime.session import Array, Feed, initial_state

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
    """A backend's artefact, loaded."""

    spec: ModelSpec
    file_bytes: int
    weights_int8: float
    bind: Callable[[int], Bound]  # to a length of audio

    def run(self, feed: Feed) -> Arrays:
        """All outputs by name."""
        inputs, outputs, call = self.bind(feed["audio"].shape[1])
        for name, array in inputs.items():
            array[...] = feed[name]
        if isinstance(returned := call(), tuple):
            outputs = dict(zip(outputs, (returned[0], *returned[1]), strict=True))
        return {name: np.asarray(value).copy() for name, value in outputs.items()}


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
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor")
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
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.")
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
