"""The one door to all backends: the suffix of a file says which."""

from pathlib import Path

from cnngru_edge.models.errors import SessionError
from cnngru_edge.runtime.session import Session


def open_session(path: Path, *, threads: int = 1, cuda_graph: bool = True) -> Session:
    """Open a `.onnx` (ONNX Runtime), `.engine` (TensorRT) or `.ts` (TorchScript) artefact.

    Args:
        path: the file; its suffix says which backend.
        threads: CPU threads. One is fastest for models this small, frame by frame.
        cuda_graph: whether an engine's work is captured once and then launched as a whole.

    Raises:
        SessionError: no such file, not one of ours, or not to be opened here.
        BackendMissing: the library that it needs is not installed.
    """
    if not path.is_file():
        raise SessionError(f"{path}: no such file")
    if path.suffix == ".onnx":
        from cnngru_edge.runtime.backends.onnx import OrtSession

        return OrtSession(path, threads=threads)
    if path.suffix == ".ts":
        from cnngru_edge.runtime.backends.torchscript import TorchSession

        return TorchSession(path, threads=threads)
    if path.suffix == ".engine":
        from cnngru_edge.runtime.backends.trt.session import TrtSession

        return TrtSession(path, cuda_graph=cuda_graph)
    if path.suffix == ".pt2":
        raise SessionError(
            f"{path}: torch.export.load may run code that a file holds, so it is not opened here; "
            "run the .onnx or .ts file beside it"
        )
    raise SessionError(
        f"{path}: expected a .onnx, .engine or .ts file; 'cnngru-edge export' writes them"
    )
