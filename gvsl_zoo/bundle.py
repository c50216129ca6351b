"""Bundles: one model as one file for machines without network.

A bundle is a safetensors file with the model's entry and card in its metadata, so that `load(path)` opens it as it is.
It also keeps the header of the file that it was made from: header and data together are that very file, byte for byte,
and have the hash that the registry knows.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from .errors import WeightsError
from .registry import ModelEntry
from .weights import METADATA_KEY, WeightsFile, header_bytes, read_header, write_whole

SHA256 = re.compile("[0-9a-f]{64}")
CARD_KEY, ORIGINAL_KEY, RECORD_KEY = "gvsl_zoo_card", "gvsl_zoo_original", "gvsl_zoo_record"


@dataclass(frozen=True)
class Content:
    """What a bundle holds.

    Args:
        name: of the model.
        original: header of the file that the bundle was made from; data: its tensors.
        record: for an authors' checkpoint, the file that it was converted from.
    """

    name: str
    original: bytes
    data: memoryview
    record: dict[str, Any] | None

    @property
    def parts(self) -> tuple[bytes, bytes, memoryview]:
        """The original file."""
        return len(self.original).to_bytes(8, "little"), self.original, self.data

    @cached_property
    def sha256(self) -> str:
        """Of the original file."""
        digest = hashlib.sha256()
        for part in self.parts:
            digest.update(part)
        return digest.hexdigest()


def write(
    path: Path,
    file: WeightsFile,
    entry: ModelEntry,
    card: str,
    record: dict[str, Any] | None = None,
    original: bytes | None = None,
) -> None:
    """Write the weights of `file` as a bundle, whole or not at all.

    original: header of the file; default its own, which for a bundle is that of the bundle.
    """
    metadata = {
        "format": "pt",
        METADATA_KEY: json.dumps(entry.to_dict()),
        CARD_KEY: card,
        ORIGINAL_KEY: (original or file.header).decode(),
    }
    if record:
        metadata[RECORD_KEY] = json.dumps(record)
    table = json.loads(file.header)
    table.pop("__metadata__", None)
    write_whole(path, header_bytes(table, metadata), file.data)


def read(file: WeightsFile) -> Content:
    """The content of an opened bundle.

    Raises: WeightsError for a file that is no bundle.
    """
    try:
        record = json.loads(file.metadata.get(RECORD_KEY, "null"))
        entry = json.loads(file.metadata[METADATA_KEY])
        original = file.metadata[ORIGINAL_KEY].encode()
        content = Content(str(entry["name"]), original, file.data, record)
        if record is not None and not (SHA256.fullmatch(record["sha256"]) and record["safetensors"] == content.sha256):
            raise ValueError("a record of another file")
        return content
    except (KeyError, ValueError, TypeError, RecursionError):
        remedy = "make one with gvsl-zoo export; load(path) opens any other weights file"
        raise WeightsError(f"{file.path} is no bundle", remedy) from None


def original_in(file: WeightsFile, content: Content) -> WeightsFile:
    """The original of an opened bundle, read where it lies: tensors and metadata are those that its own header tells.

    Raises: WeightsError for a header that does not fit the data.
    """
    try:
        slots, metadata = read_header(file.path, content.original, 8 + len(content.original) + len(content.data))
    except WeightsError as error:
        raise WeightsError(f"{file.path} holds a damaged file", "export it again") from error
    shift = len(file.header) - len(content.original)
    slots = {name: replace(slot, start=slot.start + shift, end=slot.end + shift) for name, slot in slots.items()}
    return replace(file, slots=slots, metadata=metadata)
