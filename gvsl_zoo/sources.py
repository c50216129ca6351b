"""Where a model's bytes come from, in this order: embedded, a file, our cache, a mirror, the Hub, Google Drive.

What comes from anywhere is checked before it is used: against the registry's hash, or for an authors' file without one
tensor by tensor (conversion.py) and against the hash that was seen first.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from . import bundle, cache, hub
from .card import model_card
from .conversion import checked_entry, convert
from .download import SPARE_BYTES
from .errors import ArgumentError, GvslZooError, SourceError, WeightsError, short
from .registry import ModelEntry, Source, is_file, list_models, mirrors, model_info
from .weights import WEIGHTS_NAME, WeightsFile, check_content, open_weights, write_whole

EMBEDDED = Path(__file__).parent / "embedded"
OFFLINE = "allow it (local_files_only, HF_HUB_OFFLINE), or bring a bundle: gvsl-zoo export there, import here"
RECORD = "record.json"  # beside a converted checkpoint: the file that it came from


class SourceNotice(UserWarning):
    """Something to know of where a model came from: its licence, or that a first choice failed."""


class NotHere(SourceError):
    """Bytes that are not on this machine, while the network is not allowed or has nothing to do with it."""


@dataclass(frozen=True)
class Access:
    """How sources may be reached.

    Args:
        cache_dir: a Hub cache of one's own; default the Hub's.
        local_files_only: no network.
        token: for private or gated repositories; default the one that the Hub's client knows.
    """

    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False
    token: str | bool | None = field(default=None, repr=False)

    @property
    def offline(self) -> bool:
        return self.local_files_only or cache.offline()


ANYWHERE = Access()


class Found(NamedTuple):
    """An opened, checked file, and its sha256."""

    file: WeightsFile
    sha256: str


def is_path(name: str) -> bool:
    """Whether a model is named by its file or folder: it ends in .safetensors, or has a separator."""
    if name.startswith(hub.PREFIX):
        return False
    return name.endswith(".safetensors") or "/" in name or os.sep in name or name in (".", "..")


def open_path(path: Path) -> Found:
    """The checked file of a path, or of the `model.safetensors` in a folder."""
    with suppress(OSError, RuntimeError):  # what is too long for a name is refused below
        path = path.expanduser()
        path = path / WEIGHTS_NAME if path.is_dir() else path
    return _checked(path, None)


def locate(entry: ModelEntry, access: Access = ANYWHERE) -> Found:
    """The checked weights of a registry entry.

    Raises: SourceError that names every place tried and its cause; WeightsError where a single place has a bad file.
    """
    if entry.status == "planned":
        raise planned(entry)
    failures: list[tuple[str, GvslZooError]] = []
    for where, get in candidates(entry, access):
        try:
            found = get()
        except (SourceError, WeightsError) as error:
            failures.append((where, error))
            continue
        if failures:
            causes = "; ".join(_said(failed, error) for failed, error in failures)
            warnings.warn(f"{entry.name} came from {where} ({causes})", SourceNotice, stacklevel=3)
        return found
    if len(failures) == 1 and isinstance(failures[0][1], WeightsError):
        raise failures[0][1]
    causes = "; ".join(_said(failed, error) for failed, error in failures)
    remedies = dict.fromkeys(error.remedy for _, error in failures if error.remedy)
    if entry.instead:
        remedies[_instead(entry)] = None
    raise SourceError(f"{entry.name} could not be had ({causes})", "; ".join(remedies))


def _said(where: str, error: GvslZooError) -> str:
    return error.cause if error.cause.startswith(where) else f"{where}: {error.cause}"


def candidates(entry: ModelEntry, access: Access) -> Iterator[tuple[str, Callable[[], Found]]]:
    """Every place that may have the weights, with the way to get them; remote ones last."""
    pinned = dict.fromkeys(source.sha256 for source in entry.sources if source.sha256)
    for source in entry.sources:
        if source.kind in ("embedded", "file"):
            path = EMBEDDED / str(source.file) if source.kind == "embedded" else Path(str(source.path))
            yield source.kind, lambda path=path, sha=source.sha256: _on_disk(path, sha)  # type: ignore[misc]
    for sha256 in pinned:
        if is_file(path := cache.stored_path(sha256, access.cache_dir)):
            yield "cache", lambda path=path, sha=sha256: _checked(path, sha)  # type: ignore[misc]
    for folder in mirrors():
        if entry.status == "upstream" and _converted(cache.upstream_folder(entry.name, access.cache_dir)):
            break  # it is here already: `_from_drive` takes it, without network
        if is_file(path := folder / f"{entry.name}.safetensors"):
            yield f"mirror {folder}", lambda path=path: _from_mirror(path, entry, access)  # type: ignore[misc]
    for kind, where, get in (("hub", hub.WHERE, _from_hub), ("gdrive", "Google Drive", _from_drive)):
        for source in entry.sources:
            if source.kind == kind:
                yield where, lambda get=get, source=source: get(entry, source, access)  # type: ignore[misc]


def planned(entry: ModelEntry) -> SourceError:
    """That a model has no weights anywhere, and what to use instead."""
    return SourceError(f"{entry.name} is planned: {entry.summary.rstrip('.')}", _instead(entry))


def _instead(entry: ModelEntry) -> str:
    if not entry.instead:
        return "see gvsl_zoo.list_models(available=True)"
    return f"the nearest is {entry.instead!r} ({model_info(entry.instead).status})"


def _on_disk(path: Path, sha256: str) -> Found:
    if not is_file(path):
        remedy = f"bring it back, or from a clone of gvsl-zoo: gvsl-zoo import weights/{path.name}"
        raise NotHere(f"there is no file {path}", remedy)
    return _checked(path, sha256)


def _from_mirror(path: Path, entry: ModelEntry, access: Access) -> Found:
    """The weights of a mirror's bundle: brought into our cache or, where that cannot be written, as they lie in it."""
    found, content, _ = _vouched(_checked(path, None), entry.name)
    try:
        return _keep(content, entry, access.cache_dir)
    except SourceError:
        if content.record and content.sha256 not in _pinned(entry):
            _check_first_seen(entry, content.record["sha256"], cache.upstream_folder(entry.name, access.cache_dir))
        return found


def _checked(path: Path, sha256: str | None) -> Found:
    file = open_weights(path)
    return Found(file, check_content(file, sha256))


# --- The Hub ------------------------------------------------------------------------------------------------------


def from_hub_name(name: str, revision: str | None, access: Access) -> Found:
    """The checked `model.safetensors` of `hf-hub:org/repo@revision`.

    A branch or tag is asked for anew each time; without an answer its cached state is used, and a notice says so.
    """
    wanted = hub.parse_name(name, WEIGHTS_NAME, revision)
    path = hub.cached(wanted, access.cache_dir)
    if path is not None and (access.offline or hub.COMMIT.fullmatch(wanted.revision)):
        try:
            return _from_blob(path)
        except WeightsError:  # the cached file is damaged
            if access.offline:
                raise
    if access.offline:
        raise NotHere(f"{wanted} is not in the cache, and the network is not allowed", OFFLINE)
    try:
        path = hub.fetch(wanted, _from_blob, cache_dir=access.cache_dir, token=access.token)
    except SourceError as error:
        if path is None:
            raise
        warnings.warn(f"{wanted}: the cached state is used ({error.cause})", SourceNotice, stacklevel=4)
    return _from_blob(path)


def _from_blob(path: Path) -> Found:
    return _checked(path, hub.announced_sha256(path))


def _from_hub(entry: ModelEntry, source: Source, access: Access) -> Found:
    wanted = hub.HubFile(str(source.repo), str(source.file), str(source.revision))

    def check(path: Path) -> Found:
        return _checked(path, source.sha256)

    path = hub.cached(wanted, access.cache_dir)
    if path is not None:
        try:
            return check(path)
        except WeightsError:  # the cached file is damaged
            if access.offline:
                raise
    elif access.offline:
        raise NotHere(f"{wanted} is not in the cache, and the network is not allowed", OFFLINE)
    path = hub.fetch(wanted, check, most_bytes=source.bytes, cache_dir=access.cache_dir, token=access.token)
    return check(path)


# --- The authors' own files -----------------------------------------------------------------------------------------


def _from_drive(entry: ModelEntry, source: Source, access: Access) -> Found:
    folder = cache.upstream_folder(entry.name, access.cache_dir)
    if found := _converted(folder):
        return found
    checkpoint = folder / str(source.file)
    if access.offline and not checkpoint.is_file():
        if (folder / WEIGHTS_NAME).exists():
            raise WeightsError(f"{folder / WEIGHTS_NAME} is damaged, and the network is not allowed", OFFLINE)
        raise NotHere(f"{entry.name} is not in the cache, and the network is not allowed", OFFLINE)
    from . import drive  # late: its import opens a socket (urllib3 tries IPv6), which a cached model must not

    with cache.locked(folder):
        if found := _converted(folder):  # by the process that held the lock
            return found
        if not checkpoint.is_file():
            drive.fetch(str(source.id), checkpoint, int(source.bytes or 0) + SPARE_BYTES)
        try:
            found = _convert_upstream(entry, source, checkpoint, folder)
        except WeightsError:
            checkpoint.unlink(missing_ok=True)
            raise
        checkpoint.unlink(missing_ok=True)
    warnings.warn(f"{entry.name}: {source_notice(entry)}", SourceNotice, stacklevel=5)
    return found


def source_notice(entry: ModelEntry) -> str:
    """Whose file it is and under which terms, for the moment when it arrives."""
    return f"the authors' own file, not ours. Licence of the weights: {entry.licence.weights}. Cite: {entry.citation}"


def _record(folder: Path) -> dict[str, Any]:
    """The record of a converted checkpoint; empty where there is none that can be read."""
    try:
        record = json.loads((folder / RECORD).read_bytes())
        return record if isinstance(record, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def _converted(folder: Path) -> Found | None:
    """The converted checkpoint of a folder, if it is there and is what its record says."""
    try:
        return _checked(folder / WEIGHTS_NAME, str(_record(folder).get("safetensors")))
    except WeightsError:
        return None


def _check_first_seen(entry: ModelEntry, sha256: str, folder: Path) -> None:
    first = _record(folder)
    if first.get("sha256", sha256) != sha256:
        when = short(str(first.get("first_seen")))
        raise WeightsError(
            f"the file of {entry.name} has sha256 {sha256}; the one seen first ({when}) had {first['sha256']}",
            f"ask its authors; to accept the new file, run gvsl-zoo cache remove {entry.name}",
        )


def _convert_upstream(entry: ModelEntry, source: Source, checkpoint: Path, folder: Path) -> Found:
    """Convert the authors' file, unless it is another than the one expected or seen first; the folder is locked."""
    sha256 = cache.sha256_of(checkpoint)
    if source.sha256 not in (None, sha256):
        raise WeightsError(f"{checkpoint} has sha256 {sha256}, expected {source.sha256}", "download it again")
    _check_first_seen(entry, sha256, folder)
    report = convert(checkpoint, folder / WEIGHTS_NAME, name=entry.name, overwrite=True)
    record = {
        "sha256": sha256,
        "bytes": checkpoint.stat().st_size,
        "first_seen": _record(folder).get("first_seen", time.strftime("%Y-%m-%d")),
        "safetensors": report.sha256,
    }
    _write(folder / RECORD, json.dumps(record, indent=2).encode())
    return _checked(folder / WEIGHTS_NAME, report.sha256)


# --- By hand ----------------------------------------------------------------------------------------------------------


def adopt(entry: ModelEntry, path: Path, access: Access = ANYWHERE) -> Found:
    """Take a file that was downloaded by hand (browser, Baidu) as the weights of an entry.

    A checkpoint of the authors (.pth) is converted; a safetensors file must have the registry's hash.
    """
    if entry.status == "planned":
        raise planned(entry)
    try:
        with path.open("rb") as file:
            packed = file.read(4) == b"PK\x03\x04"
    except (OSError, ValueError) as error:
        cause = f"{path} cannot be read: {getattr(error, 'strerror', None) or error}"
        raise WeightsError(cause, "check the path and its permissions") from None
    if packed:
        upstream = [source for source in entry.sources if source.kind == "gdrive"]
        if not upstream:
            raise ArgumentError(f"{entry.name} has no checkpoint of its authors", "give its .safetensors file")
        folder = cache.upstream_folder(entry.name, access.cache_dir)
        with cache.locked(folder):
            return _convert_upstream(entry, upstream[0], path, folder)
    pinned, (_, sha256) = _pinned(entry), _checked(path, None)
    if sha256 not in pinned:
        raise WeightsError(f"{path} has sha256 {sha256}; {entry.name} is {_expected(pinned)}", "download it again")
    return _store(sha256, [path.read_bytes()], access.cache_dir)


def import_bundle(path: Path, cache_dir: cache.CacheDir = None, name: str | None = None) -> tuple[str, Found]:
    """Put the weights of a bundle into our cache, where `load` finds them under their registry name.

    Any other weights file will do if the registry knows its hash.

    Args:
        name: the model that it must be; default the one that the bundle names.

    Returns: the name, and the stored file.
    Raises: RegistryError for a name that the registry lacks, WeightsError for other bytes than the registry's.
    """
    found = _checked(path, None)
    known = [model for model in list_models() if name in (None, model) and found.sha256 in _pinned(model_info(model))]
    if known:
        return known[0], _store(found.sha256, [path.read_bytes()], cache_dir)
    _, content, entry = _vouched(found, name)
    return entry.name, _keep(content, entry, cache_dir)


def _vouched(found: Found, name: str | None) -> tuple[Found, bundle.Content, ModelEntry]:
    """The original in a bundle, for which the registry's hash or the record of the authors' checkpoint vouches."""
    path, content = found.file.path, bundle.read(found.file)
    if name not in (None, content.name):
        raise WeightsError(f"{path} holds {short(content.name)}, not {name}", "rename it, or export it again")
    entry = model_info(content.name)
    pinned = _pinned(entry)
    if content.sha256 not in pinned and (pinned or content.record is None or entry.status != "upstream"):
        cause = f"{path} holds sha256 {content.sha256}; {entry.name} is {_expected(pinned)}"
        raise WeightsError(cause, "export it again")
    original = bundle.original_in(found.file, content)
    if content.sha256 not in pinned:
        from .zoo import entry_of  # late: it imports this module

        try:
            checked_entry(entry, entry_of(original))
        except WeightsError as error:
            raise WeightsError(f"what {path} holds as {entry.name} {error.cause}", "ask where it comes from") from None
    return found._replace(file=original), content, entry


def _keep(content: bundle.Content, entry: ModelEntry, cache_dir: cache.CacheDir) -> Found:
    """Put the content of a bundle into our cache."""
    if content.record is None or content.sha256 in _pinned(entry):
        return _store(content.sha256, content.parts, cache_dir)
    folder = cache.upstream_folder(entry.name, cache_dir)
    with cache.locked(folder):
        _check_first_seen(entry, content.record["sha256"], folder)
        _write(folder / WEIGHTS_NAME, *content.parts)
        _write(folder / RECORD, json.dumps(content.record, indent=2).encode())
        return _checked(folder / WEIGHTS_NAME, content.sha256)


def export_bundle(name: str, output: Path, access: Access = ANYWHERE, *, overwrite: bool = False) -> Path:
    """Write the weights of a model, with its card, as a bundle.

    Args:
        name: of the registry.
        output: a .safetensors file, or a folder: there the file is NAME.safetensors, as a mirror has it.

    Returns: the bundle's path.
    """
    entry = model_info(name)
    path = output / f"{name}.safetensors" if output.is_dir() else output
    if path.suffix != ".safetensors":
        raise ArgumentError(f"{output} is no folder and does not end in .safetensors", "give one or the other")
    if path.exists() and not overwrite:
        raise WeightsError(f"{path} exists already", "choose another name, or pass overwrite=True (--overwrite)")
    if not path.parent.is_dir():
        raise WeightsError(f"the folder {path.parent} does not exist", "make it first")
    file, _ = locate(entry, access)
    if path.exists() and path.samefile(file.path):
        raise WeightsError(f"{path} is the file that is to be exported", "choose another place")
    record = _record(cache.upstream_folder(name, access.cache_dir)) if entry.status == "upstream" else None
    original = None
    if bundle.ORIGINAL_KEY in (opened := open_weights(file.path)).metadata:  # of a mirror, read where it lies
        content = bundle.read(opened)
        record, original = content.record, content.original
    try:
        bundle.write(path, file, entry.portable(), model_card(entry), record, original)
    except OSError as error:
        raise SourceError(f"cannot write {path}: {error.strerror}", "choose another place") from None
    return path


def _pinned(entry: ModelEntry) -> set[str]:
    """The hashes that a safetensors file of the entry may have."""
    return {source.sha256 for source in entry.sources if source.sha256 and source.kind != "gdrive"}


def _expected(pinned: set[str]) -> str:
    return " or ".join(sorted(pinned)) or "a checkpoint of its authors (.pth)"


def _store(sha256: str, parts: Iterable[bytes | memoryview], cache_dir: cache.CacheDir) -> Found:
    path = cache.stored_path(sha256, cache_dir)
    with cache.locked(path.parent):
        _write(path, *parts)
    return _checked(path, sha256)


def _write(path: Path, *parts: bytes | memoryview) -> None:
    with cache.writing(path.parent):
        write_whole(path, *parts)
