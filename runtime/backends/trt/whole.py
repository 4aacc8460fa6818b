"""One input whole through a TensorRT engine: a phrase, an image or a clip."""

import math
from typing import Any, Protocol

import numpy as np

from cnngru_edge.models.errors import SessionError
from cnngru_edge.models.spec.whole import WholeSpec
from cnngru_edge.runtime.backends.trt.cuda import Cuda, SharedBuffer
from cnngru_edge.runtime.session import Array

_FLOAT = np.dtype(np.float32)


class OpenEngine(Protocol):
    """What running an input takes of the session that has opened the engine."""

    cuda: Cuda
    log: Any  # a logger of the library
    stream: Any  # of CUDA
    max_batch: int | None
    max_samples: int | None

    def input_dtype(self, name: str) -> np.dtype[Any]:
        """In which the engine takes an input."""
        ...

    def new_context(self) -> Any:
        """Another execution context of the engine."""
        ...

    def failure(self, what: str) -> SessionError:
        """An error with what the library said last."""
        ...


class TrtWhole:
    """An execution context with memory for inputs and logits, which grows with them."""

    def __init__(self, session: OpenEngine, spec: WholeSpec) -> None:
        self._session, self._name = session, spec.input.name
        self._dtype = session.input_dtype(self._name)
        self._context = session.new_context()
        self._given, self._logits = self._buffer(1), self._buffer(1)

    def run(self, given: Array) -> Array:
        """Logits (N, T, C) of inputs (N, ...)."""
        session, context = self._session, self._context
        session.log.start()
        if not context.set_input_shape(self._name, given.shape):
            built = f"built for {session.max_batch} of {session.max_samples} at most"
            raise session.failure(f"does not take {self._name} of shape {given.shape}, {built}")
        shape = tuple(context.get_tensor_shape("logits"))
        given = np.ascontiguousarray(given, self._dtype)
        if given.nbytes > self._given.host.nbytes:
            self._given.close()
            self._given = self._buffer(given.nbytes)
        size = math.prod(shape) * _FLOAT.itemsize
        if size > self._logits.host.nbytes:
            self._logits.close()
            self._logits = self._buffer(size)
        self._given.host.view(self._dtype)[: given.size] = given.ravel()
        for name, buffer in ((self._name, self._given), ("logits", self._logits)):
            if not context.set_tensor_address(name, buffer.device):
                raise session.failure(f"has no tensor {name}")
        self._given.to_device(given.nbytes, session.stream)
        if not context.execute_async_v3(session.stream):
            raise session.failure("does not run the engine")
        self._logits.to_host(size, session.stream)
        session.cuda.synchronize(session.stream)
        return self._logits.host.view(_FLOAT)[: math.prod(shape)].reshape(shape).copy()

    def free(self) -> None:
        """Give back what it holds."""
        self._given.close()
        self._logits.close()
        del self._context

    def _buffer(self, size: int) -> SharedBuffer:
        whole = -(-size // 4096) * 4096  # of any item size
        return SharedBuffer(self._session.cuda, whole)
