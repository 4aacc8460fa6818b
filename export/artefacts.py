"""What an export writes, by name, and what it reports."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cnngru_edge.calibration.audit.run import Audit
from cnngru_edge.export.quantize.plan import Plan
from cnngru_edge.export.targets.base import CPU, TENSORRT, TENSORRT_FP16
from cnngru_edge.export.verdict.compare import Comparison
from cnngru_edge.export.verdict.streaming import StreamingComparison
from cnngru_edge.models.errors import InputError
from cnngru_edge.models.receipt import Coverage

if TYPE_CHECKING:
    from cnngru_edge.export.trace.parity import Parity  # of torch, which a device does not have
    from cnngru_edge.export.verdict.sensitivity import (
        Sensitivity,  # of onnx, which a device may not have
    )

TORCHSCRIPT = "model.ts"
PROGRAM = "model.pt2"
FLOAT = "model.fp32.onnx"
INT8 = "model.int8.onnx"
CHUNK = "model.int8.chunk.onnx"
INT8_FORMS = {
    # file: target, and whether it is the clip form (any length) or the chunk form (a few frames)
    INT8: (CPU, True),
    CHUNK: (CPU, False),
    "model.int8.tensorrt.clip.onnx": (TENSORRT.name, True),
    "model.int8.tensorrt.chunk.onnx": (TENSORRT.name, False),
    "model.int8.tensorrt-fp16.clip.onnx": (TENSORRT_FP16.name, True),
    "model.int8.tensorrt-fp16.chunk.onnx": (TENSORRT_FP16.name, False),
}
ENGINES = {
    # file: the library that builds it, where it can here, and whether it is the clip form
    "model.int8.chunk.engine": ("tensorrt", False),
    "model.int8.chunk.rtx.engine": ("tensorrt_rtx", False),
    "model.int8.clip.engine": ("tensorrt", True),
    "model.int8.clip.rtx.engine": ("tensorrt_rtx", True),
}
"""Of a model that can be a stream the chunk form is built, of another the clip form."""
COVERAGE = "coverage.json"
RANGES = "ranges.json"
PLAN = "plan.json"
COMPARISON = "comparison.json"
STREAMING = "streaming.json"
REPORT_HTML, REPORT_JSON = "report.html", "report.json"


@dataclass
class ExportReport:
    """What an export made, how long each stage took and what it found."""

    out: Path
    forms: dict[str, tuple[str, bool]] = field(default_factory=lambda: dict(INT8_FORMS))
    comparisons: dict[str, Comparison] = field(default_factory=dict)  # by the INT8 file's name
    streaming: dict[str, StreamingComparison] = field(default_factory=dict)  # the same
    coverages: dict[str, Coverage] = field(default_factory=dict)
    plan: Plan = field(default_factory=lambda: Plan(()))
    audit: Audit | None = None
    sensitivity: "Sensitivity | None" = None
    parity: "list[Parity]" = field(default_factory=list)
    errors: list[InputError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what did not go as it should
    stage_s: dict[str, float] = field(default_factory=dict)

    @property
    def clip_forms(self) -> list[str]:
        """Those of the forms that take any length."""
        return [name for name, (_, is_clip) in self.forms.items() if is_clip]
