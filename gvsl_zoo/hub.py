"""Where bytes come from: the weights embedded in the package, and files on this machine."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import SourceError
from .registry import ModelEntry, model_info

EMBEDDED = Path(__file__).parent / "embedded"
FETCH_YOURSELF = "download its model.safetensors and load the path of that file"


def is_path(name: str) -> bool:
    """Whether a model is named by its file or folder: it ends in .safetensors, or has a separator."""
    if name.startswith("hf-hub:"):
        raise SourceError(f"{name} is on the Hugging Face Hub, which this version does not fetch from", FETCH_YOURSELF)
    return name.endswith(".safetensors") or "/" in name or os.sep in name or name in (".", "..")


def locate(entry: ModelEntry) -> tuple[Path, str]:
    """The file of an entry's weights and the sha256 that it must have.

    Raises: SourceError that says what is missing, and what exists instead.
    """
    instead = "see gvsl_zoo.list_models(available=True)"
    if entry.instead:
        instead = f"the nearest is {entry.instead!r} ({model_info(entry.instead).status})"
    if entry.status == "planned":
        raise SourceError(f"{entry.name} is planned: {entry.summary.rstrip('.')}", instead)
    for source in entry.sources:
        if source.kind in ("embedded", "file") and source.sha256:
            path = EMBEDDED / str(source.file) if source.kind == "embedded" else Path(str(source.path))
            if path.is_file():
                return path, source.sha256
    tried = "; ".join(f"{source.kind}: {source.path or source.file or source.id}" for source in entry.sources)
    raise SourceError(
        f"the weights of {entry.name} are not on this machine, and this version does not download ({tried})", instead
    )
