"""The folder of a run, of pre-training or fine-tuning: its settings, log, checkpoints and lock.

RUN/
    config.json              settings; batch_size and accumulate as of the last checkpoint
    log.jsonl                a line a step
    checkpoints/00000250/    model, optimizer, ema (averaged weights), best (on validation) as safetensors; state.json:
                             their hashes
    README.md, registry.yaml card of the finished model, and a registry that lists it; LICENSE, preprocessor_config.json
    tensorboard/             the log once more, where TensorBoard is installed
    curves.png, pair.png     learning curves, and what the model makes of a held-out pair
    model.safetensors        of the last checkpoint, with its entry: what `load(RUN)` opens
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .. import __version__
from ..cache import sha256_of
from ..errors import ArgumentError, TrainingError, WeightsError
from ..registry import ModelEntry
from ..weights import METADATA_KEY, WEIGHTS_NAME, open_weights, write_weights, write_whole
from .config import RunConfig

STATE_VERSION = 1
STATE, LOG, SETTINGS = "state.json", "log.jsonl", "config.json"
PUBLISHED = ("README.md", "LICENSE", "registry.yaml", "preprocessor_config.json")
DEALT = ("batch_size", "accumulate")  # free when a run goes on, as the number of processes is: `pairs_a_step` stays
Tensors = Mapping[str, Tensor]  # by name
Record = dict[str, float]  # what is logged of a step


class State(NamedTuple):
    """What a checkpoint holds, tensors by file and name: model, optimizer, perhaps ema and best; the model's entry.

    data: what tells the data that the run learned from; None where nothing does.
    """

    step: int
    pairs_a_step: int
    tensors: dict[str, Tensors]
    entry: ModelEntry
    data: str | None = None


class Run:
    """A run's folder, open for one process group at a time."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.folder, self.config = folder, config
        self.checkpoints = folder / "checkpoints"
        self.held = False  # by this process

    def check(self) -> None:
        """Raise, before any work, the ArgumentErrors of `locked`."""
        self._check_origin()
        self._check_settings()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """The sole right to write here.

        Raises: TrainingError if another run has it; ArgumentError for settings other than those of the run so far, and
            for a folder with files that no run has written.
        """
        from filelock import FileLock, Timeout

        self._check_origin()
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / ".lock", timeout=0):
                self._check_settings()
                if not (self.folder / SETTINGS).exists():
                    self._write_settings()
                for old in self.checkpoints.glob(".*.old"):  # killed while a checkpoint was replaced
                    with suppress(OSError):  # the new one is in its place
                        old.rename(self.checkpoints / old.name.split(".")[1])
                for orphan in (*self.checkpoints.glob(".*.partial"), *self.checkpoints.glob(".*.old")):
                    shutil.rmtree(orphan, ignore_errors=True)
                self.held = True
                try:
                    yield
                finally:
                    self.held = False
        except Timeout:
            raise TrainingError(f"another run is writing to {self.folder}", "wait for it, or choose a folder") from None

    def _check_origin(self) -> None:
        """Refuse a folder whose files a run would replace and no run has written."""
        if (path := self.folder / SETTINGS).exists():
            ours = bool(_read_json(path).keys() & asdict(self.config).keys())
            there = [] if ours else [SETTINGS]
        else:
            there = [name for name in PUBLISHED if os.path.lexists(self.folder / name)]
        if there:
            cause = f"{self.folder} holds files of other origin: {', '.join(there)}"
            raise ArgumentError(cause, "choose another folder")

    def _check_settings(self) -> None:
        path, given = self.folder / SETTINGS, asdict(self.config)
        if path.exists():
            defaults = {field.name: field.default for field in fields(self.config) if field.default is not MISSING}
            given, before = (json.loads(json.dumps(values)) for values in (given, defaults))
            before |= _read_json(path)  # an earlier version knew fewer
            changed = [key for key, value in given.items() if before.get(key) != value and key not in DEALT]
            if changed:
                listed = ", ".join(f"{key} {before.get(key)} -> {given[key]}" for key in changed)
                same = " ".join(f"--set {key}={shlex.quote(json.dumps(before.get(key)))}" for key in changed)
                raise ArgumentError(
                    f"{self.folder} holds a run with other settings: {listed}", f"give {same}, or use another folder"
                )

    def _write_settings(self) -> None:
        write_whole(self.folder / SETTINGS, json.dumps(asdict(self.config), indent=2).encode())

    def latest(self) -> State | None:
        """The newest checkpoint that is whole, or None; a damaged one is passed over, which is said.

        Its model is put where `load` looks.
        """
        for folder in sorted(self.checkpoints.glob("[0-9]*"), reverse=True):
            try:
                state = _read_checkpoint(folder)
                if self.held:  # a run that was killed behind a checkpoint may not have come to this
                    self._publish(folder / f"{_kept(state.tensors)}.safetensors")
                return state
            except (WeightsError, OSError, ValueError, KeyError, TypeError) as error:
                cause = getattr(error, "cause", None) or f"{type(error).__name__}: {error}"
                warnings.warn(f"the checkpoint {folder} is passed over: {cause}", stacklevel=2)
        return None

    def save(self, state: State) -> None:
        """Write a checkpoint under a temporary name and rename it; then let go of the oldest and of damaged ones.

        The model that `load` opens is the best, else the averaged one, where there are such.
        """
        name = f"{state.step:08d}"
        partial = self.checkpoints / f".{name}.partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            if (self.folder / LOG).exists():
                _sync(self.folder / LOG)  # a checkpoint goes on from what was logged before it
            metadata = {"format": "pt", METADATA_KEY: json.dumps(state.entry.to_dict())}
            for part, tensors in state.tensors.items():
                write_weights(tensors, partial / f"{part}.safetensors", {} if part == "optimizer" else metadata)
            hashes = {path.name: sha256_of(path) for path in partial.iterdir()}
            facts = {"version": STATE_VERSION, "made_by": __version__, "step": state.step, "files": hashes}
            facts |= {"pairs_a_step": state.pairs_a_step} | ({"data": state.data} if state.data else {})
            write_whole(partial / STATE, json.dumps(facts, indent=2).encode())
            _sync(partial)
            final, old = self.checkpoints / name, self.checkpoints / f".{name}.old"
            if final.exists():
                final.rename(old)
            partial.rename(final)
            _sync(self.checkpoints)
            shutil.rmtree(old, ignore_errors=True)
            self._write_settings()
            self._publish(final / f"{_kept(state.tensors)}.safetensors")
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise self._unwritten(f"the checkpoint of step {state.step}", error) from error
        folders = sorted(self.checkpoints.glob("[0-9]*"))
        good = [folder for folder in folders if folder.name <= name]  # from a later one the run would have gone on
        for folder in folders:
            if folder not in good[-self.config.keep_last :]:
                shutil.rmtree(folder, ignore_errors=True)

    def _unwritten(self, what: str, error: OSError) -> TrainingError:
        cause = f"{what} cannot be written to {self.folder}: {error.strerror or error}"
        return TrainingError(cause, "free space; the run goes on from the checkpoint before")

    def _publish(self, path: Path) -> None:
        """Put a checkpoint's model where `load` looks, as a second name of the same file if the disk knows such."""
        link = self.folder / f".{WEIGHTS_NAME}.partial"
        link.unlink(missing_ok=True)
        try:
            os.link(path, link)
        except OSError:
            shutil.copyfile(path, link)
        link.replace(self.folder / WEIGHTS_NAME)

    def log(self, record: Record) -> None:
        """Add a line to the log."""
        try:
            with (self.folder / LOG).open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise self._unwritten("the log", error) from error

    def truncate_log(self, step: int, instead: Record | None = None) -> list[Record]:
        """Forget what was logged after the checkpoint of `step`: those steps run again. What stays is returned.

        Args:
            instead: of what was logged of `step` itself.
        """
        path = self.folder / LOG
        if not path.exists():
            return []
        try:
            lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            records = [record for line in lines if (record := json.loads(line))["step"] <= step]
            if instead:
                records = [*(record for record in records if record["step"] < step), instead]
            write_whole(path, "".join(json.dumps(record) + "\n" for record in records).encode())
        except OSError as error:
            raise self._unwritten("the log", error) from error
        return records


def _kept(parts: Mapping[str, Any]) -> str:
    """The part of a checkpoint that the run is for."""
    return next(part for part in ("best", "ema", "model") if part in parts)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path} cannot be read: {error}", "restore it, or choose another folder") from None
    if not isinstance(data, dict):
        raise TrainingError(f"{path} holds no settings", "restore it, or choose another folder")
    return data


def _read_checkpoint(folder: Path) -> State:
    facts = json.loads((folder / STATE).read_bytes())
    if facts["version"] > STATE_VERSION:
        raise TrainingError(f"{folder} was written by gvsl-zoo {facts['made_by']}", "upgrade gvsl-zoo to go on from it")
    tensors: dict[str, Tensors] = {}
    metadata: dict[str, Mapping[str, str]] = {}
    for name, sha256 in facts["files"].items():
        path = folder / name
        if sha256_of(path) != sha256:
            raise WeightsError(f"{path} is no longer what was written", "")
        file = open_weights(path)
        tensors[path.stem] = {slot: file.tensor(slot) for slot in file.slots}
        metadata[path.stem] = file.metadata
    entry = ModelEntry.from_dict(json.loads(metadata["model"][METADATA_KEY]), folder)
    return State(int(facts["step"]), int(facts["pairs_a_step"]), tensors, entry, facts.get("data"))


def _sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk; where folders cannot be opened (Windows) that is the
    system's affair.
    """
    with suppress(PermissionError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def finished(out: Path) -> dict[str, Any]:
    """What a run ended with: its last record, and where its files are."""
    return {"run": str(out), "weights": str(out / WEIGHTS_NAME)} | last_record(out)


def last_record(out: Path) -> dict[str, Any]:
    """What the last step of a run logged."""
    last: dict[str, Any] = json.loads(log_lines(out)[-1])
    return last


def log_lines(out: Path) -> list[str]:
    """What a run logged, a line a step.

    Raises: TrainingError where that is lost.
    """
    path = out / LOG
    if lines := path.read_text().splitlines() if path.exists() else []:
        return lines
    cause = f"{path} is lost, and with it what the run measured; the weights ({WEIGHTS_NAME}) are whole and load"
    raise TrainingError(cause, "restore it, or give another folder to train anew")
