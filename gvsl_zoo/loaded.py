"""What a loaded model carries beside its parameters, for type checkers: `zoo` puts it there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os
    from pathlib import Path

    from torch import Tensor

    from .film import FilmPreprocessing
    from .registry import ModelEntry
    from .volume import Preprocessing, Volume
    from .zoo import LoadReport, PushReport


class Loaded:
    """Base of the models. One that `load` did not return can be saved and pushed, but has none of the rest."""

    entry: ModelEntry
    load_report: LoadReport
    preprocessing: Preprocessing | FilmPreprocessing
    preprocess: Callable[[Volume | str | os.PathLike[str]], Tensor]
    cite: Callable[[], str]
    save_pretrained: Callable[..., Path]
    push_to_hub: Callable[..., PushReport]
