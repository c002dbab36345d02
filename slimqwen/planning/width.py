"""Which channels of the residual stream stay (method.md section 3)."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def kept_channels(scores: "Tensor", keep: int) -> list[int]:
    """Return the `keep` highest of `scores` `[hidden]`, in ascending order: one index set for the whole model.

    On a tie the lower channel stays.
    """
    values = scores.tolist()
    assert 1 <= keep <= len(values)
    ranked = sorted(range(len(values)), key=lambda channel: -values[channel])  # stable: the lower channel wins a tie
    return sorted(ranked[:keep])
