import subprocess
import sys

import pytest

HEAVY = {"torch", "torchaudio", "onnx", "onnx_ir", "safetensors", "scipy", "tensorrt"}


def loaded_by(code):
    code += "\nimport sys; print(*{name.split('.')[0] for name in sys.modules})"
    return set(subprocess.check_output([sys.executable, "-c", code], text=True).split())


@pytest.mark.parametrize(
    "module",
    ["export.cli", "runtime.recognize", "runtime.ort_session", "calibration.ranges", "models.spec"],
)
def test_a_device_needs_no_torch(module):
    assert not loaded_by(f"import cnngru_edge.{module}") & HEAVY


def test_the_command_line_starts_without_a_backend():
    assert "onnxruntime" not in loaded_by("import cnngru_edge.export.cli")


def test_running_a_model_needs_no_torch(exported, demo):
    arguments = ["run", "--engine", str(exported / "model.int8.onnx"), str(demo.clips[0].path)]
    code = f"from cnngru_edge.export.cli import main; main({arguments}, standalone_mode=False)"
    assert not loaded_by(code) & HEAVY
