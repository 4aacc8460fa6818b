import csv
import io
import os
import re
import signal
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner

from cnngru_edge.calibration.corpus.read import DEMO, read_corpus
from cnngru_edge.export.cli import main
from cnngru_edge.models.spec.stream import (
    BLANK,
    CTC,
    METADATA_KEY,
    ConvSpec,
    FeatureSpec,
    ModelSpec,
)

# torch and onnx are imported where they are used: the tests of the runtime run without them too.

TINY_SPEC = ModelSpec(
    labels=("silence", "unknown", "yes", "no"),
    features=FeatureSpec(n_fft=128, win_length=100, hop_length=80, n_mels=8),
    convs=(ConvSpec(4, (3, 3), (2, 2)), ConvSpec(6, (3, 3), (1, 2))),
    hidden_size=5,
    num_layers=2,
)

NO_SPEC = (
    f"no model spec inside (metadata '{METADATA_KEY}'), so it was not written by cnngru-edge; "
    "make one with 'cnngru-edge export'"
)
UNREADABLE = r"not readable as audio \(.+\); WAV, FLAC and Ogg are"

_STAGES = "audit|trace|calibrate|plan|quantize|build|compare|stream|evidence|measure"
_BAR = re.compile(rf"({_STAGES}) +[━╸╺ ]* +\d+/\d+ .*\n")


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="run GPU tests; without a GPU they fail")
    parser.addoption("--slow", action="store_true", help="run tests that take minutes")


def pytest_collection_modifyitems(config, items):
    reasons = {
        "gpu": "needs a GPU: pass --gpu (make test-gpu)",
        "slow": "takes minutes: pass --slow (make test-slow)",
    }
    for name, reason in reasons.items():
        if config.getoption(f"--{name}"):
            continue
        for item in items:
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True, scope="session")
def interruptible():
    """Let programs that tests start hear Ctrl-C, also where the tests run in the background.

    A shell starts what it puts there with SIGINT ignored, and an ignored signal is inherited.
    """
    before = signal.getsignal(signal.SIGINT)
    if before == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def seed_torch():
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)  # it begins with another seed in each process
        sys.modules["torch"].set_num_threads(1)  # models this small are slower with more


@pytest.fixture(autouse=True, scope="module")
def seeded_for_the_fixtures_of_a_module():
    seed_torch()


@pytest.fixture(autouse=True)
def seeded():
    seed_torch()


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def demo():
    return read_corpus(DEMO)


@pytest.fixture(scope="session")
def kws12_checkpoint():
    from cnngru_edge.models.nets.checkpoint import PRETRAINED

    return PRETRAINED / "kws12.safetensors"


@pytest.fixture(scope="session")
def kws12(kws12_checkpoint):
    from cnngru_edge.models.nets.checkpoint import load_checkpoint

    return load_checkpoint(kws12_checkpoint)


@pytest.fixture(scope="session")
def exported(tmp_path_factory, demo):
    """The folder that `cnngru-edge export` writes for the model that comes with the package."""
    if "CNNGRU_EDGE_EXPORTED" in os.environ:  # where there is no torch to export with
        return Path(os.environ["CNNGRU_EDGE_EXPORTED"])
    from cnngru_edge.calibration.ranges.choose import CalibrateConfig
    from cnngru_edge.export.chain import pipeline
    from cnngru_edge.models.nets.checkpoint import PRETRAINED

    out = tmp_path_factory.mktemp("kws12")
    pipeline.export(PRETRAINED / "kws12.safetensors", demo, out, CalibrateConfig())
    return out


@pytest.fixture
def tiny():
    """A model of four labels with random weights and lively batch norms."""
    import torch

    from cnngru_edge.models.nets.cnn_gru import CnnGru

    torch.manual_seed(1)
    model = CnnGru(TINY_SPEC).eval()
    for block in model.convs:
        block.norm.running_mean.normal_()
        block.norm.running_var.uniform_(0.5, 2.0)
        block.norm.bias.data.normal_()
    model.feature_mean.fill_(-5.0)
    model.feature_std.fill_(3.0)
    return model


@pytest.fixture
def tiny_checkpoint(tiny, tmp_path):
    from cnngru_edge.models.nets.checkpoint import save_checkpoint

    path = tmp_path / "tiny.safetensors"
    save_checkpoint(tiny, path)
    return path


@pytest.fixture
def tiny_text():
    """A text model of three labels and random weights, for phrases of any length."""
    import torch

    from cnngru_edge.models.nets.text_cnn_gru import TextCnnGru, text_spec
    from cnngru_edge.models.spec.whole import PADDING, UNKNOWN_WORD

    torch.manual_seed(1)
    words = ("the", "light", "on", "off", "turn", "what", "time", "is", "it")
    spec = text_spec(
        ("light_on", "light_off", "ask_time"),
        (PADDING, UNKNOWN_WORD, *words),
        embedding_size=6,
        kernel_sizes=[1, 3],
        channels=4,
        hidden_size=5,
    )
    return TextCnnGru(spec).eval()


@pytest.fixture
def tiny_crnn():
    """A CRNN for lines 8 pixels high, with random weights and lively batch norms."""
    import torch

    from cnngru_edge.models.nets.crnn import Crnn, crnn_spec

    torch.manual_seed(1)
    pools = [[2, 2], [2, 2], [2, 1]]
    spec = crnn_spec(height=8, channels=[4, 6, 6], pools=pools, hidden_size=5, num_layers=2)
    model = Crnn(spec).eval()
    for block in model.convs:
        block.norm.running_mean.normal_(std=0.3)
        block.norm.running_var.uniform_(0.5, 2.0)
        block.norm.bias.data.normal_()
    return model


@pytest.fixture
def wav(tmp_path):
    """Write samples as a file below tmp_path; the path."""

    def write(name, samples, sample_rate=16_000, **options):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, samples, sample_rate, **options)
        return path

    return write


# For the tests of wrong input.


class Outcome:
    def __init__(self, exit_code, stdout, stderr):
        self.exit_code = exit_code
        self.stdout = stdout
        self.stderr = _BAR.sub("", stderr)  # without the progress bars


@pytest.fixture
def cli(tmp_path, monkeypatch, capfd):
    """Run a command to its end: no traceback, nothing written around Python's stdout and stderr."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    before = {stop: signal.getsignal(stop) for stop in (signal.SIGINT, signal.SIGTERM)}

    def run(*args):
        capfd.readouterr()
        result = CliRunner().invoke(main, [str(arg) for arg in args])
        assert result.exception is None or isinstance(result.exception, SystemExit)
        assert capfd.readouterr() == ("", "")
        assert list(temporary.iterdir()) == []
        return Outcome(result.exit_code, result.stdout, result.stderr)

    yield run
    for stop, handler in before.items():
        signal.signal(stop, handler)


@pytest.fixture
def refused(cli, tmp_path):
    """What a command ends with after `Error: `, its only line; it leaves all files as they were."""

    def run(*args):
        before = contents(tmp_path)
        result = cli(*args)
        assert (result.exit_code, result.stdout) == (1, "")
        assert contents(tmp_path) == before
        assert re.fullmatch("Error: .+\n", result.stderr)
        return result.stderr.removeprefix("Error: ").removesuffix("\n")

    return run


@pytest.fixture
def old(tmp_path):
    """A folder with an older export in it."""
    out = tmp_path / "old"
    out.mkdir()
    for name in ("model.ts", "model.fp32.onnx", "model.int8.onnx", "ranges.json", "other.txt"):
        (out / name).write_text(f"the old {name}")
    return out


@pytest.fixture
def manifest(tmp_path):
    """Write the rows of a manifest.csv; the folder."""

    def write(*rows):
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        with (folder / "manifest.csv").open("w", newline="") as f:
            csv.writer(f).writerows(rows)
        return folder

    return write


@pytest.fixture
def tiny_onnx(tiny, tmp_path):
    from cnngru_edge.export.trace.model import export_onnx

    path = tmp_path / "tiny.onnx"
    export_onnx(tiny.for_export(), path)
    return path


@pytest.fixture
def tiny_ctc(tiny):
    """A CTC model with random weights, whose labels come and go with the loudness."""
    import torch

    from cnngru_edge.models.nets.cnn_gru import CnnGru

    torch.manual_seed(1)
    spec = replace(TINY_SPEC, labels=(BLANK, " ", "a", "b", "c"), family=CTC)
    model = CnnGru(spec).eval()
    model.convs, model.feature_mean, model.feature_std = (
        tiny.convs,
        tiny.feature_mean,
        tiny.feature_std,
    )
    loud = torch.repeat_interleave(torch.rand(1, 100) ** 4, 160, 1)
    logits, _ = model(torch.randn(1, 16_000) * loud, model.initial_state(1))
    deviation, mean = torch.std_mean(logits[0].detach(), 0)
    model.head.bias.data = 3 * (model.head.bias.data - mean) / deviation
    model.head.weight.data *= 3 / deviation[:, None]
    return model


@pytest.fixture
def tiny_ctc_onnx(tiny_ctc, tmp_path):
    from cnngru_edge.export.trace.model import export_onnx

    path = tmp_path / "ctc.onnx"
    export_onnx(tiny_ctc.for_export(), path)
    return path


@pytest.fixture
def loose(demo, tmp_path):
    """A folder of so many recordings without labels."""

    def link(count):
        folder = tmp_path / "loose"
        folder.mkdir()
        for clip in demo.of("calib")[:count]:
            (folder / f"{clip.label}_{clip.path.name}").symlink_to(clip.path)
        return folder

    return link


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if path.name != ".ses"  # ONNX Runtime's telemetry, in the folder for temporary files
    }


def half_of(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def with_head_times(factor, source, target):
    """Write a graph whose last linear layer has other weights."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(source)
    weight = next(i for i in model.graph.initializer if i.name.startswith("head.weight"))
    values = numpy_helper.to_array(weight)
    times = (values * factor).astype(values.dtype)  # numpy 1 makes a scalar float64
    weight.CopyFrom(numpy_helper.from_array(times, weight.name))
    onnx.save(model, target)
    return target


def traced(model, example):
    """TorchScript of a module of one input."""
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.jit")
        warnings.filterwarnings("ignore", message="Converting a tensor to a Python boolean")
        return torch.jit.trace(model, example)


def exported_to_onnx(model, example, axes):
    """An ONNX Runtime session of a module whose one input has these free axes."""
    import onnxruntime
    import torch

    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="`torch.jit")
        warnings.filterwarnings("ignore", message="Converting a tensor to a Python boolean")
        warnings.filterwarnings("ignore", message="Exporting a model to ONNX with a batch_size")
        warnings.filterwarnings("ignore", message="Constant folding")
        torch.onnx.export(
            model,
            (example,),
            buffer,
            dynamo=False,
            opset_version=17,
            input_names=["x"],
            output_names=["logits"],
            dynamic_axes={"x": axes, "logits": {0: "N", 1: "T"}},
        )
    return onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])


def make_nothing(path):
    pass


def make_noise(path):
    path.write_bytes(np.random.default_rng(0).bytes(5000))


def make_other_onnx(path):
    import onnx
    from onnx import TensorProto, helper

    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "other", [x], [y])
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), path)
