"""What every model in torch is that takes its input whole."""

import copy
from typing import Any

from torch import Tensor, nn

from cnngru_edge.models.spec.whole import WholeSpec


class WholeModel(nn.Module):
    """Recordings, token ids or images in, logits (N, T, C) out; T is 1 where it answers a label."""

    spec: WholeSpec

    def forward(self, given: Tensor) -> Tensor:
        """Logits (N, T, C) of what `spec.input` describes, first axis N."""
        raise NotImplementedError

    def for_export(self) -> Any:
        """A copy in evaluation mode, to be traced."""
        return copy.deepcopy(self).eval()
