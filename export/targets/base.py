"""What an export can be asked for, free of libraries so that the command line starts fast."""

from dataclasses import dataclass

MIN_COVERAGE = 0.95
"""Share of the weights behind the front-end that has to compute in INT8."""

MAX_FRAMES = 8
"""Of a graph without loops: the most that TensorRT's compiler unrolls by itself as well."""

CPU = "cpu"


@dataclass(frozen=True)
class Target:
    """A kind of TensorRT: what its graphs are made as, and what the lint's rules depend on."""

    name: str
    max_opset: int
    max_ir: int
    strongly_typed: bool  # a type in the graph is the type in the engine


TENSORRT = Target("tensorrt", 17, 8, strongly_typed=False)
"""TensorRT 8.6 to 10.x: the last opset in 8.6's operator table, and the IR version of its time."""

TENSORRT_FP16 = Target("tensorrt-fp16", 19, 9, strongly_typed=True)
"""TensorRT 10.12 and later, TensorRT-RTX: QuantizeLinear-19 is the first with FP16 scales.

All of them read it, and nothing here needs a later one.
"""

TARGETS = {CPU: None, **{target.name: target for target in (TENSORRT, TENSORRT_FP16)}}
"""What a graph can be quantized for, and what a builder for it asks."""
