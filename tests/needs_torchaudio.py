"""Imported first by tests of what needs torchaudio: training, and that ours equals it.

Where torchaudio does not load, as beside a torch that is not its own, they are skipped; all other
tests must pass there.
"""

import pytest

pytest.importorskip(
    "torchaudio",
    reason="torchaudio is not installed, or does not load beside this torch",
    exc_type=Exception,  # RuntimeError where it is for another CUDA than torch
)
