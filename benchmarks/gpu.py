"""Streaming step and clip on a GPU: TensorRT's own GRU, ours in FP16 and INT8, torch, ONNX Runtime.

    python benchmarks/gpu.py prepare build/gpu     # needs torch, no GPU
    python benchmarks/gpu.py measure build/gpu --markdown tables.md

`measure` takes what is installed and says what is not: TensorRT or TensorRT-RTX with cuda-bindings,
torch with CUDA, ONNX Runtime with its CUDA provider. One run, one after the other, on one machine.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from cnngru_edge.export.chain.engine import write_engine
from cnngru_edge.export.graph import files as onnx_graph
from cnngru_edge.export.targets.trt.build import BuildConfig, can_build, target_of
from cnngru_edge.models.errors import BackendMissing, EdgeError
from cnngru_edge.models.spec.stream import ModelSpec
from cnngru_edge.models.spec.whole import streamable
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.backends.trt.cuda import Cuda
from cnngru_edge.runtime.bench import Times, bench
from cnngru_edge.runtime.session import initial_state

MODELS = ("kws12", "large")
BATCHES = (1, 64)
SECONDS = 1.0
RUNS = 500


def prepare(folder: Path, models: Sequence[str]) -> None:
    """Write every graph of these models; the large one has random weights."""
    import torch

    from cnngru_edge.calibration.corpus.read import CALIB, DEMO, read_corpus
    from cnngru_edge.calibration.ranges.choose import CalibrateConfig
    from cnngru_edge.calibration.ranges.collect import calibrate
    from cnngru_edge.export.lower.recurrent import lower_recurrent
    from cnngru_edge.export.quantize.run import quantize_onnx
    from cnngru_edge.export.targets.base import TENSORRT, TENSORRT_FP16
    from cnngru_edge.export.trace.model import export_onnx
    from cnngru_edge.models.nets.checkpoint import PRETRAINED, load_checkpoint, save_checkpoint
    from cnngru_edge.models.nets.cnn_gru import CnnGru

    kws12 = load_checkpoint(PRETRAINED / "kws12.safetensors")
    torch.manual_seed(0)
    large = CnnGru(ModelSpec(kws12.spec.labels, hidden_size=512, num_layers=3)).eval()
    clips = [clip.path for clip in read_corpus(DEMO).of(CALIB)]
    for name, model in zip(MODELS, (kws12, large), strict=True):
        if name not in models:
            continue
        out = folder / name
        out.mkdir(parents=True, exist_ok=True)
        save_checkpoint(model, out / "model.safetensors")
        export_onnx(model.for_export(), out / "native.clip.onnx")
        ranges, _ = calibrate(out / "native.clip.onnx", clips, CalibrateConfig())
        ranges.save(out / "ranges.json")
        chunk = streamable(model.spec).chunk_length
        for form, frames in (("clip", None), ("step", 1)):
            native = onnx_graph.load(out / "native.clip.onnx")
            explicit = onnx_graph.load(out / "native.clip.onnx")
            if frames:
                fix_length(native, chunk)
                fix_length(explicit, chunk)
                onnx_graph.save(native, out / "native.step.onnx")
            lower_recurrent(explicit, frames)
            onnx_graph.drop_unused(explicit)
            onnx_graph.save(explicit, out / f"cell.{form}.onnx")
            for target in (TENSORRT.name, TENSORRT_FP16.name):
                path = out / f"int8.{target}.{form}.onnx"
                quantize_onnx(out / "native.clip.onnx", out / "ranges.json", path, target, frames)
        print(f"{out}: {len(list(out.glob('*.onnx')))} graphs")


def fix_length(model: ir.Model, samples: int) -> None:
    """One frame at a time; the batch stays free."""
    sizes = {"S": samples, "T": 1}
    for value in (*model.graph.inputs, *model.graph.outputs):
        assert value.shape is not None
        value.shape = ir.Shape(
            sizes.get(str(size.value), size) if isinstance(size, ir.SymbolicDim) else size
            for size in value.shape
        )


def measure(folder: Path) -> list[str]:
    """Rows of a table in Markdown: every backend that is here, with every model, form and batch."""
    gpu = Cuda().gpu
    rows = [
        f"{gpu.name} (compute capability {gpu.capability}), driver for CUDA {gpu.driver}; median "
        "and 99th percentile in microseconds, samples in to logits out.",
        "",
        "| model | form | batch | backend | p50 | p99 | GPU compute p50 | enqueue p50 | INT8 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model in sorted(path.parent for path in folder.glob("*/model.safetensors")):
        for form in ("step", "clip"):
            for batch in BATCHES:
                head = f"| {model.name} | {form} | {batch} |"
                for row in (
                    *tensorrt_rows(model, form, batch),
                    *torch_rows(model, form, batch),
                    *onnxruntime_rows(model, form, batch),
                ):
                    rows.append(f"{head} {row} |")
                    print(rows[-1], flush=True)
    return rows


def tensorrt_rows(model: Path, form: str, batch: int) -> list[str]:
    """The GRU as TensorRT imports it, the explicit cell in floats, and INT8."""
    rows = []
    for library in ("tensorrt", "tensorrt_rtx"):
        if not can_build(library):
            continue
        for name, graph, fp16 in (
            ("native GRU, FP32", f"native.{form}.onnx", False),
            ("native GRU, FP16", f"native.{form}.onnx", True),
            ("cell, FP32", f"cell.{form}.onnx", False),
            ("cell, FP16", f"cell.{form}.onnx", True),
            ("cell, INT8", f"int8.{target_of(library)}.{form}.onnx", True),
        ):
            capabilities = (Cuda().gpu.capability,) if library == "tensorrt_rtx" else ()
            config = BuildConfig(
                library,
                batch=batch,
                fp16=fp16,
                capabilities=capabilities,
                max_seconds=SECONDS if form == "clip" else None,
            )
            out = model / f"{graph}.{batch}.{fp16}.engine"
            label = f"{library} {name}"
            try:
                manifest, _ = write_engine(model / graph, out, config, min_coverage=0)
                found = bench(out, batch=batch, seconds=SECONDS, duration_s=2)
            except EdgeError as e:
                rows.append(f"{label} | failed: {e} | | | |")
                continue
            if fp16 and "FP16" in name and not manifest.builder.flags:
                continue  # strongly typed: the graph is in FP32, and so is the engine
            timing = next(t for t in found.timings if t.what == form)
            assert timing.compute_ms is not None
            assert timing.enqueue_ms is not None
            typing = f"{manifest.builder.typing} typing"
            graph_note = "graph" if timing.cuda_graph else "no graph"
            rows.append(
                f"{label} ({manifest.builder.version}, {typing}, {graph_note}) | "
                f"{us(timing.host_ms)} | {1000 * timing.compute_ms.median:.0f} | "
                f"{1000 * timing.enqueue_ms.median:.0f} | {manifest.coverage.weights_int8:.0%}"
            )
    return rows


def torch_rows(model: Path, form: str, batch: int) -> list[str]:
    """Eager and compiled, in FP32; the state stays on the GPU."""
    try:
        import torch

        from cnngru_edge.models.nets.checkpoint import load_checkpoint
        from cnngru_edge.models.nets.cnn_gru import CnnGru
    except ImportError as e:
        return [f"torch | not installed ({e}) | | | |"]
    if not torch.cuda.is_available():
        return ["torch | without CUDA | | | |"]
    loaded = load_checkpoint(model / "model.safetensors")
    assert isinstance(loaded, CnnGru)
    module, spec = loaded.for_export().cuda(), loaded.spec
    samples = spec.chunk_length if form == "step" else seconds_of(spec)
    host = torch.randn(batch, samples).pin_memory()
    rows = []
    for name, run in (("eager", module), ("compiled", torch.compile(module, mode="max-autotune"))):
        state = [s.cuda() for s in module.initial_state(batch)]

        def step(run: Callable[..., Any] = run, state: list[Any] = state) -> None:
            with torch.inference_mode():
                logits, state[:] = run(host.cuda(non_blocking=True), tuple(state))
            state[:] = [s.clone() for s in state]  # a compiled graph writes them again
            logits.cpu()

        try:
            rows.append(f"torch {torch.__version__} {name}, FP32 | {us(repeat(step))} | | | 0%")
        except Exception as e:  # a compiler may fail in any way; the row says so
            reason = " ".join(str(e).split())[:200]
            rows.append(f"torch {name} | failed: {reason} | | | |")
    return rows


def onnxruntime_rows(model: Path, form: str, batch: int) -> list[str]:
    """The float graph with its GRU, on the CUDA provider."""
    import onnxruntime

    provider = "CUDAExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        return ["onnxruntime | without CUDA | | | |"]
    with open_session(model / "native.clip.onnx") as session:
        spec = streamable(session.spec)
    gpu = onnxruntime.InferenceSession(model / "native.clip.onnx", providers=[provider])
    samples = spec.chunk_length if form == "step" else seconds_of(spec)
    feed = {"audio": np.zeros((batch, samples), np.float32), **initial_state(spec, batch)}
    times = repeat(lambda: gpu.run(None, feed))
    return [f"onnxruntime {onnxruntime.__version__} CUDA, FP32 | {us(times)} | | | 0%"]


def repeat(step: Callable[[], object]) -> Times:
    """Milliseconds, after a warm-up."""
    for _ in range(20):
        step()
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        step()
        times.append(1000 * (time.perf_counter() - start))
    return Times.of(times)


def us(times: Times) -> str:
    """Median and 99th percentile, two cells."""
    return f"{1000 * times.median:.0f} | {1000 * times.p99:.0f}"


def seconds_of(spec: ModelSpec) -> int:
    """Samples of a clip, in whole chunks."""
    return round(SECONDS * spec.features.sample_rate / spec.chunk_length) * spec.chunk_length


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=("prepare", "measure"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="to prepare")
    parser.add_argument("--markdown", type=Path, help="also write the measured table here")
    arguments = parser.parse_args()
    if arguments.stage == "prepare":
        prepare(arguments.folder, arguments.models)
        return
    try:
        rows = measure(arguments.folder)
    except BackendMissing as e:
        parser.exit(1, f"gpu.py: {e}\n")
    if arguments.markdown:
        arguments.markdown.write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
