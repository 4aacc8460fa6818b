import os
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from cnngru_edge.calibration.corpus import DEMO, read_corpus
from cnngru_edge.models.spec import ConvSpec, FeatureSpec, ModelSpec

# torch and onnx are imported where they are used: the tests of the runtime run without them too.

TINY_SPEC = ModelSpec(
    labels=("silence", "unknown", "yes", "no"),
    features=FeatureSpec(n_fft=128, win_length=100, hop_length=80, n_mels=8),
    convs=(ConvSpec(4, (3, 3), (2, 2)), ConvSpec(6, (3, 3), (1, 2))),
    hidden_size=5,
    num_layers=2,
)


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="run GPU tests; without a GPU they fail")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--gpu"):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU: pass --gpu (make test-gpu)"))


@pytest.fixture(autouse=True)
def seeded():
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
        sys.modules["torch"].set_num_threads(1)  # models this small are slower with more


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def demo():
    return read_corpus(DEMO)


@pytest.fixture(scope="session")
def kws12_checkpoint():
    from cnngru_edge.models.checkpoint import PRETRAINED

    return PRETRAINED / "kws12.safetensors"


@pytest.fixture(scope="session")
def kws12(kws12_checkpoint):
    from cnngru_edge.models.checkpoint import load_checkpoint

    return load_checkpoint(kws12_checkpoint)


@pytest.fixture(scope="session")
def exported(tmp_path_factory, demo):
    """The folder that `cnngru-edge export` writes for the model that comes with the package."""
    if "CNNGRU_EDGE_EXPORTED" in os.environ:  # where there is no torch to export with
        return Path(os.environ["CNNGRU_EDGE_EXPORTED"])
    from cnngru_edge.calibration.ranges import CalibrateConfig
    from cnngru_edge.export import pipeline
    from cnngru_edge.models.checkpoint import PRETRAINED

    out = tmp_path_factory.mktemp("kws12")
    pipeline.export(PRETRAINED / "kws12.safetensors", demo, out, CalibrateConfig())
    return out


@pytest.fixture
def tiny():
    """A model of four labels with random weights and lively batch norms."""
    import torch

    from cnngru_edge.models.cnn_gru import CnnGru

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
    from cnngru_edge.models.checkpoint import save_checkpoint

    path = tmp_path / "tiny.safetensors"
    save_checkpoint(tiny, path)
    return path


@pytest.fixture
def wav(tmp_path):
    """Write samples as a file below tmp_path; the path."""

    def write(name, samples, sample_rate=16_000, **options):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, samples, sample_rate, **options)
        return path

    return write
