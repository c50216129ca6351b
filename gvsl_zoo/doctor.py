"""Care of what is on this machine: what the caches hold, whether it is still whole, and what ails an installation."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from . import __version__, cache, drive, hub, sources
from .download import READ_SECONDS
from .errors import ArgumentError, GvslZooError, RegistryError, SourceError, WeightsError
from .registry import ModelEntry, list_models, model_info
from .sources import ANYWHERE, Access, Found, NotHere
from .weights import METADATA_KEY, WEIGHTS_NAME, open_weights
from .zoo import check_fit, entry_of, resolve_device

PACKAGES = ("torch", "numpy", "nibabel", "safetensors", "huggingface_hub", "requests")
OLDEST_TORCH = (2, 10)  # before it, reading a checkpoint can corrupt memory (CVE-2026-24747)
LITTLE_SPACE = 2**30
Verdict = Literal["PASS", "WARN", "FAIL"]


# --- The caches -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cached:
    """Something in a cache. `name` is what `load` takes; `kind` is hub, upstream or imported."""

    name: str
    kind: str
    bytes: int
    path: Path


def cached_models(cache_dir: cache.CacheDir = None) -> list[Cached]:
    """Models in our folder, and those in the Hub's cache that the registry lists or that carry an entry of ours."""
    entries = [model_info(name) for name in list_models()]
    by_sha256 = {source.sha256: entry.name for entry in entries for source in entry.sources if source.sha256}
    own = cache.own_folder(cache_dir)
    found = [
        Cached(by_sha256.get(path.stem, path.stem), "imported", path.stat().st_size, path)
        for path in sorted((own / "weights").glob("*.safetensors"))
    ]
    for folder in sorted(path for path in (own / "upstream").glob("*") if path.is_dir()):
        if size := sum(f.stat().st_size for f in folder.iterdir()):  # a download that failed leaves an empty lock
            found.append(Cached(folder.name, "upstream", size, folder))
    registered = {
        (source.repo, source.revision, source.file): entry.name
        for entry in entries
        for source in entry.sources
        if source.kind == "hub"
    }
    for repo, revision in _hub_revisions(cache_dir):
        for file in revision.files:
            name = registered.get((repo.repo_id, revision.commit_hash, file.file_name))
            if name is None and file.file_name == WEIGHTS_NAME and _is_ours(file.file_path):
                name = f"{hub.PREFIX}{repo.repo_id}@{revision.commit_hash}"
            if name:
                found.append(Cached(name, "hub", file.size_on_disk, file.file_path))
    return found


def remove_cached(name: str, cache_dir: cache.CacheDir = None) -> list[Cached]:
    """Remove a model from the caches; returns what was removed.

    Raises: ArgumentError for a name that is not cached.
    """
    models = cached_models(cache_dir)
    gone = [one for one in models if name in (one.name, one.name.partition("@")[0])]
    if not gone:
        held = ", ".join(sorted({one.name for one in models})) or "nothing"
        raise ArgumentError(f"{name!r} is not in the caches", f"they hold {held}")
    try:
        for one in gone:
            if one.kind == "hub":
                folder, _, commit, *_ = one.path.relative_to(cache.hub_folder(cache_dir).resolve()).parts
                scan = _scan(cache_dir)
                own = frozenset(repo for repo in scan.repos if repo.repo_path.name == folder)  # copies share commits
                replace(scan, repos=own).delete_revisions(commit).execute()
            elif one.kind == "upstream":
                shutil.rmtree(one.path)
            else:
                one.path.unlink()
    except OSError as error:
        raise SourceError(f"{one.path} cannot be removed: {error.strerror}", "mend its permissions") from None
    return gone


def _scan(cache_dir: cache.CacheDir) -> Any:
    from huggingface_hub import scan_cache_dir

    return scan_cache_dir(cache.hub_folder(cache_dir))


def _hub_revisions(cache_dir: cache.CacheDir) -> Iterator[tuple[Any, Any]]:
    from huggingface_hub.errors import CacheNotFound

    with suppress(CacheNotFound, ValueError, OSError):
        for repo in sorted(_scan(cache_dir).repos, key=lambda repo: repo.repo_id):
            for revision in sorted(repo.revisions, key=lambda revision: revision.commit_hash):
                yield repo, revision


def _is_ours(path: Path) -> bool:
    try:
        return METADATA_KEY in open_weights(path).metadata
    except WeightsError:
        return False


# --- Whole or not ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """One finding: what was looked at, the verdict, what was seen, and what to do about it."""

    what: str
    verdict: Verdict
    seen: str
    fix: str = ""


def verify(name: str, access: Access = ANYWHERE) -> list[Check]:
    """Read every copy of a model on this machine anew: its bytes against the hash, its tensors against the module.

    Args:
        name: of the registry, or a path.

    Returns: a finding a copy; for a model of which there is none, a single warning.
    """
    local = Access(access.cache_dir, True, access.token)
    if name.startswith(hub.PREFIX):
        return [_verified(name, hub.WHERE, lambda: sources.from_hub_name(name, None, local))]
    if sources.is_path(name):
        return [_verified(name, "path", lambda: sources.open_path(Path(name)))]
    entry = model_info(name)
    if entry.status == "planned":
        planned = sources.planned(entry)
        return [Check(name, "WARN", planned.cause, planned.remedy)]
    checks = [_verified(name, where, get, entry) for where, get in sources.candidates(entry, local)]
    there = [check for check in checks if check.verdict != "WARN"]
    return there or [Check(name, "WARN", "not on this machine", f"gvsl-zoo download {name}")]


def _verified(name: str, where: str, get: Callable[[], Found], entry: ModelEntry | None = None) -> Check:
    what = f"{name} ({where})"
    try:
        file, sha256 = get()
        if cache.sha256_of(file.path) != sha256:
            raise WeightsError(f"{file.path} is no longer what its hash says", _remedy(name, where, file.path))
        own = entry if entry and entry.status != "upstream" else entry_of(file)
        report = check_fit(own, file)
        return Check(what, "PASS", f"{report.loaded} tensors, sha256 {sha256}")
    except NotHere:
        return Check(what, "WARN", "not on this machine", f"gvsl-zoo download {name}")
    except GvslZooError as error:
        return Check(what, "FAIL", error.cause, error.remedy or "get it again from its source")
    except OSError as error:
        return Check(what, "FAIL", str(error), "mend its permissions, or remove it")


def _remedy(name: str, where: str, path: Path) -> str:
    """How to be rid of a rotten file."""
    if where in ("path", "embedded", "file"):
        return "get it again from its source"
    if name.startswith(hub.PREFIX):
        name = f"{name.partition('@')[0]}@{path.parent.name}"  # its commit
    return f"gvsl-zoo cache remove {name}"


# --- An installation ----------------------------------------------------------------------------------------------


def diagnose(cache_dir: cache.CacheDir = None) -> list[Check]:
    """What works here and what does not: versions, devices, registry, caches, models on this machine, reachability."""
    known = _registry()
    checks = [*_versions(), _devices(), known, *_cache(cache_dir)]
    if known.verdict != "FAIL":
        access = Access(cache_dir, local_files_only=True)
        for name in list_models():
            checks += [check for check in verify(name, access) if check.verdict != "WARN"]
    checks.append(_reachable(hub.endpoint(), hub.WHERE))
    checks.append(_reachable(drive.ORIGIN, drive.WHERE))
    return checks


def _versions() -> Iterator[Check]:
    yield Check("gvsl-zoo", "PASS", f"{__version__}, Python {platform.python_version()}, {platform.platform()}")
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    old = tuple(int(part) for part in versions["torch"].split(".")[:2]) < OLDEST_TORCH
    seen = ", ".join(f"{name} {version}" for name, version in versions.items())
    fix = "install torch 2.10 or later: earlier ones can be harmed by a checkpoint" if old else ""
    yield Check("packages", "FAIL" if old else "PASS", seen, fix)


def _devices() -> Check:
    best = resolve_device("auto")
    if best.type == "cuda":
        return Check("device", "PASS", f"{best}: {torch.cuda.get_device_name(best)}")
    if torch.version.cuda and not torch.cuda.is_available():
        return Check("device", "WARN", "CUDA's torch, but no CUDA device", "check the driver (nvidia-smi)")
    return Check("device", "PASS", f"{best}, {torch.get_num_threads()} threads")


def _registry() -> Check:
    try:
        return Check("registry", "PASS", f"{len(list_models())} models, {len(list_models(available=True))} available")
    except RegistryError as error:
        fix = error.remedy or "mend that file, or take it out of GVSL_ZOO_REGISTRY"
        return Check("registry", "FAIL", error.cause, fix)


def _cache(cache_dir: cache.CacheDir) -> Iterator[Check]:
    own, theirs = cache.own_folder(cache_dir), cache.hub_folder(cache_dir)
    try:
        left = [*own.glob("*/.*.partial"), *own.glob("*/*/.*.partial"), *theirs.glob("*/blobs/*.incomplete")]
        size = sum(path.stat().st_size for path in left) / 1e6
    except OSError as error:
        yield Check("cache", "FAIL", f"{error.filename}: {error.strerror}", "check its permissions, or set HF_HOME")
        return
    if left:
        yield Check(
            "leftovers",
            "WARN",
            f"{len(left)} partial files, {size:.1f} MB",
            "the next download of the same model sweeps them",
        )
    try:
        with cache.locked(own):
            free = shutil.disk_usage(own).free
    except SourceError as error:
        yield Check("cache", "FAIL", error.cause, error.remedy)
        return
    little = free < LITTLE_SPACE
    yield Check(
        "cache",
        "WARN" if little else "PASS",
        f"{own}, {free / 1e9:.1f} GB free",
        "free space, or set HF_HOME to a larger disk" if little else "",
    )


def _reachable(url: str, where: str) -> Check:
    import requests

    if cache.offline():
        return Check(where, "WARN", "not asked: HF_HUB_OFFLINE is set", "unset it to allow the network")
    try:
        requests.head(url, timeout=READ_SECONDS, allow_redirects=False)
        return Check(where, "PASS", f"{hub.shown(url)} answers")
    except requests.RequestException as error:
        fix = "without network, use cached models or bundles (gvsl-zoo import)"
        return Check(where, "WARN", f"{hub.shown(url)} does not answer ({type(error).__name__})", fix)
