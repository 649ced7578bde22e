"""The types that travel between the input, the models and the losses."""

from typing import NamedTuple

import numpy as np


class TextBatch(NamedTuple):
    """Tokenised text, int32 `[rows, length]` each.

    Attributes:
      ids: token ids, padded.
      mask: 1 where there is a token, 0 where there is padding.
      positions: position of each token within its text.
      segments: number of the text within its row (1, 2, ...), 0 for padding; one text a row unless packed.
    """

    ids: np.ndarray
    mask: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
