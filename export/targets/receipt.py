"""The receipt of a graph: in which precision its target really computes each weight."""

from pathlib import Path

from cnngru_edge.export.targets.base import CPU
from cnngru_edge.export.targets.cpu_receipt import Feed, onnxruntime_coverage
from cnngru_edge.export.targets.trt.build import BuildConfig, build
from cnngru_edge.models.receipt import Coverage
from cnngru_edge.runtime.backends.trt import library as trt_library


def coverage(path: Path, target: str, feed: Feed | None = None) -> Coverage | None:
    """The receipt of an ONNX file for one of quantize.TARGETS, if it can be had here.

    On a CPU it is run on `feed`, or else on inputs of zeros.
    """
    if target == CPU:
        return onnxruntime_coverage(path, feed)
    if not trt_library.is_installed("tensorrt_rtx"):
        return None
    return build(path, BuildConfig("tensorrt_rtx")).coverage
