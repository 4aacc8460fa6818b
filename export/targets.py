"""What an export can be asked for, free of libraries so that the command line starts fast."""

CPU = "cpu"

MIN_COVERAGE = 0.95
"""Share of the weights behind the front-end that has to compute in INT8."""

MAX_FRAMES = 8
"""Of a graph without loops: the most that TensorRT's compiler unrolls by itself as well."""
