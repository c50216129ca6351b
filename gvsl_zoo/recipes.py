"""Recipes: recipes/NAME.yaml says what repeats the making of a model's weights, and the numbers that these reach."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .cache import sha256_of
from .errors import ArgumentError, TrainingError, listed
from .film import FilmPreprocessing, prepare_film, read_film
from .ledger import ledger_of
from .models.gemini import WholeModule
from .pretrain.config import PretrainConfig
from .pretrain.data import Scan, ScanPairs, is_first
from .pretrain.entry import publish
from .pretrain.loop import pretrain
from .pretrain.run import last_record
from .pretrain.validate import validate
from .proof import prove
from .registry import Count, Evaluation, Name, Sha256, Word, home_of, model_info, read_record, relative_path
from .volume import Preprocessing, prepare, read_volume
from .weights import METADATA_KEY, WEIGHTS_NAME, write_weights
from .zoo import load, preprocessing

FOLDER = "recipes"  # beside the registry
BEFORE = "before"  # in the folder of a run, the one before it
VALIDATION = "8 held-out synthetic pairs"


@dataclass(frozen=True)
class Scans:
    """Scans to train on that have one origin and may be paired with each other.

    stratum: which scans may be paired: those of one. licence: of the data. origin: where they can be had.
    files: sha256 by path below the data folder.
    """

    stratum: Word
    licence: str
    origin: str
    files: dict[str, Sha256]

    def __post_init__(self) -> None:
        for path in self.files:
            relative_path(path)


@dataclass(frozen=True)
class Number:
    """What a repetition reaches: `value`, up to `spread`."""

    value: float
    spread: float

    def __post_init__(self) -> None:
        if self.spread < 0:
            raise ValueError(f"expected a spread of 0 or more, got {self.spread}")


@dataclass(frozen=True)
class Recipe:
    """All that repeats one set of weights; the file's fields are these.

    settings: of the run, those that are not the defaults.
    hardware, seconds: on which it took how long.
    numbers: of the validation at the end of the run (see `validate`), which needs no data.
    spreads: where the spreads of these come from.
    data: empty for synthetic anatomy alone.
    film_size: pixels an axis that films are resized to; default as they are.
    start: the model of a registry whose weights are the start; default weights drawn from the run's seed.
    before: the settings of a run on the same data, whose weights are the start of this one.
    """

    settings: PretrainConfig
    hardware: str
    seconds: float
    numbers: dict[str, Number]
    spreads: str
    data: tuple[Scans, ...] = ()
    film_size: Count | None = None
    start: Name | None = None
    before: PretrainConfig | None = None

    def __post_init__(self) -> None:
        if not self.numbers:
            raise ValueError("expected numbers to reach")
        if len(self.files) < sum(len(scans.files) for scans in self.data):
            raise ValueError("a file is listed twice")
        if self.before and _made_by(self.before) != _made_by(self.settings):
            raise ValueError("the run before has another network, spacing or unit than the run")

    @property
    def files(self) -> dict[str, str]:
        """sha256 of every file by its path below the data folder."""
        return {path: sha256 for scans in self.data for path, sha256 in scans.files.items()}

    @property
    def origins(self) -> dict[str, str]:
        """Where every file can be had, and under which licence."""
        return {path: f"{scans.origin}; {scans.licence}" for scans in self.data for path in scans.files}

    @property
    def runs(self) -> tuple[PretrainConfig, ...]:
        """The settings of all runs, in order."""
        return (self.before, self.settings) if self.before else (self.settings,)

    @property
    def steps(self) -> int:
        """Of all runs."""
        return sum(config.steps for config in self.runs)

    @property
    def needs(self) -> dict[str, Any]:
        """What a repetition takes."""
        facts: dict[str, Any] = {"hardware": self.hardware, "hours": self.seconds / 3600}
        facts |= {"steps": self.steps, "scans": len(self.files) or "none: synthetic anatomy"}
        return facts | ({"start": self.start} if self.start else {})


def _made_by(config: PretrainConfig) -> tuple[Any, ...]:
    """What the shape of a run's tensors and the grid of its scans depend on."""
    module = (
        config.objective == "gemini",
        config.ndim,
        config.backbone,
        config.width,
        config.window,
        config.affine_width,
    )
    return *module, config.spacing_mm, config.scan_unit


def recipe_path(name: str) -> Path:
    """Where the recipe of a model is looked for: beside the registry that lists it."""
    return home_of(name) / FOLDER / f"{name}.yaml"


def read_recipe(name: str) -> Recipe:
    """The recipe of a model of the registry.

    Errors: RegistryError for an unknown name, or a file that is no recipe; ArgumentError for a model without one.
    """
    path = recipe_path(name)
    if not path.exists():
        raise ArgumentError(f"{name} has no recipe: no {path}", "weights made with this package have one")
    return read_record(Recipe, path)


# --- The data -------------------------------------------------------------------------------------------------------


def check_files(recipe: Recipe, data: str | os.PathLike[str] | None) -> list[Path]:
    """The recipe's files below the folder `data`, all there and the same to the byte.

    Errors: ArgumentError without a folder, TrainingError that names files that are missing or other, and where to get
        them.
    """
    if data is None:
        if recipe.files:
            raise ArgumentError(f"the recipe has {len(recipe.files)} scans", "give the folder of them (--data)")
        return []
    problems, paths = [], []
    for scans in recipe.data:
        for name, sha256 in scans.files.items():
            path = Path(data) / name
            paths.append(path)
            if not path.is_file():
                problems.append(f"{name} is missing ({scans.origin})")
            elif (found := sha256_of(path)) != sha256:
                problems.append(f"{name} is another file: {found[:12]}..., not {sha256[:12]}... ({scans.origin})")
    if problems:
        cause = f"{len(problems)} of {len(paths)} files are not those of the recipe: {listed(problems, '; ')}"
        raise TrainingError(cause, f"put them below {data}")
    return paths


def training_scans(recipe: Recipe, data: str | os.PathLike[str]) -> list[Scan]:
    """The recipe's scans on the grid of its run, in the order of the recipe; hashes are not looked at."""
    return [Scan(_image(Path(data) / name, recipe), scans.stratum) for scans in recipe.data for name in scans.files]


def _image(path: Path, recipe: Recipe) -> torch.Tensor:
    """A scan (1, D, H, W) or a film (1, H, W), in [0, 1]."""
    config = recipe.settings
    if config.ndim == 3:
        unit = config.scan_unit
        return prepare(read_volume(path), Preprocessing((config.spacing_mm,) * 3, unit=unit)).image[0]
    size = (recipe.film_size, recipe.film_size) if recipe.film_size else None
    window = (0.0, 255.0) if config.scan_unit == "grey" else (None, None)
    return prepare_film(read_film(path), FilmPreprocessing(size, window)).image[0, :, 0]


# --- Again ----------------------------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """A number of the recipe beside the one that was measured; None where there is none."""

    name: str
    value: float
    spread: float
    measured: float | None

    @property
    def reached(self) -> bool:
        return self.measured is not None and abs(self.measured - self.value) <= self.spread  # a NaN is not


@dataclass(frozen=True)
class Reproduction:
    """What came out. weights: the file measured. commands: those that measure the rest of the model's claims."""

    name: str
    weights: str
    verdicts: tuple[Verdict, ...]
    spreads: str
    commands: tuple[str, ...]

    @property
    def reached(self) -> bool:
        """Whether every number is the recipe's."""
        return all(verdict.reached for verdict in self.verdicts)

    def lines(self) -> list[str]:
        """A table, and what is to be known of it."""
        width = max(len(verdict.name) for verdict in self.verdicts)
        out = [f"{self.name}: {self.weights}", f"{'':<{width}}  {'recipe':<20}  measured"]
        for row in self.verdicts:
            wanted = f"{row.value:.4g} +- {row.spread:.2g}"
            told = "none" if row.measured is None else f"{row.measured:.4g}"
            out.append(f"{row.name:<{width}}  {wanted:<20}  {told:<10}  {'reached' if row.reached else 'NOT REACHED'}")
        out.append(f"+-: {self.spreads}")
        return out + ["the rest is measured by", *(f"  {command}" for command in self.commands)] * bool(self.commands)

    def to_dict(self) -> dict[str, Any]:
        rows = [verdict._asdict() | {"reached": verdict.reached} for verdict in self.verdicts]
        facts = {"model": self.name, "weights": self.weights, "reached": self.reached, "numbers": rows}
        return facts | {"spreads": self.spreads, "commands": list(self.commands)}


def check(name: str, *, device: str = "auto") -> Reproduction:
    """Measure a model's weights as at the end of their run, and compare them with the recipe: no data, no training."""
    recipe = read_recipe(name)
    model: Any = load(name, task="pretraining", device=device)
    return _compared(name, recipe, model.load_report.origin, validate(model, recipe.settings))


def reproduce(
    name: str, out: str | os.PathLike[str], data: str | os.PathLike[str] | None = None, **options: Any
) -> Reproduction:
    """Make a model's weights again as its recipe says, and compare them with it; called again, go on.

    The run's folder becomes a model with the registry's entry, but the evaluation and the ledger of the run. Of several
    processes the first one writes it.

    Args:
        out: the run's folder.
        data: the folder of the recipe's files; None where it has none.
        options: of `train`.

    Errors: those of `train`.
    """
    recipe, out = read_recipe(name), Path(out)
    model = train(recipe, out, data, **options)
    measured = last_record(out)
    result = _compared(name, recipe, str(out / WEIGHTS_NAME), measured)
    if not is_first():
        return result
    entry = model_info(name)
    rows = tuple(
        Evaluation("registration", VALIDATION, v.name, round(v.measured, 4), command=f"gvsl-zoo reproduce {name}")
        for v in result.verdicts
        if v.measured is not None
    )
    training = replace(entry.training, hardware=None, seconds=None) if entry.training else None
    ledger = ledger_of(check_files(recipe, data), model_info(recipe.start).ledger if recipe.start else None)
    entry = replace(entry, status="available", instead=None, sources=(), training=training, ledger=ledger)
    proof = prove(model, preprocessing(entry.input), stored=torch.float16)
    entry = replace(entry, evaluation=rows, proof=proof)
    tensors = {key: tensor.half() for key, tensor in model.state_dict().items()}  # as the package ships its own
    write_weights(tensors, out / WEIGHTS_NAME, {"format": "pt", METADATA_KEY: json.dumps(entry.to_dict())})
    publish(out, entry)
    return result


def train(
    recipe: Recipe,
    out: str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    *,
    device: str = "auto",
    workers: int = 0,
    progress: Callable[[dict[str, float]], None] | None = None,
) -> WholeModule:
    """The run of a recipe, or what is left of it, after the one before it, if there is one, in OUT/before.

    Args:
        out, data: see `reproduce`.
        device, workers, progress: see `pretrain`; steps are counted over both runs.

    Errors: ArgumentError without the data folder, TrainingError for files that are not the recipe's; those of
        `pretrain`.
    """
    check_files(recipe, data)
    scans = training_scans(recipe, data) if data and recipe.files else []
    model: Any = load(recipe.start, task="pretraining") if recipe.start else None
    done = 0
    for config in recipe.runs:
        folder = Path(out) if config is recipe.settings else Path(out) / BEFORE
        pairs = ScanPairs(scans, config.crop) if scans else None
        note = partial(_counted, progress, done) if progress else None
        model = pretrain(config, folder, pairs, device=device, workers=workers, init=model, progress=note)
        done += config.steps
    return model


def _counted(progress: Callable[[dict[str, float]], None], done: int, record: dict[str, float]) -> None:
    progress(record | {"step": done + record["step"]})


def _compared(name: str, recipe: Recipe, weights: str, measured: Mapping[str, float]) -> Reproduction:
    rows = tuple(Verdict(key, known.value, known.spread, measured.get(key)) for key, known in recipe.numbers.items())
    commands = (row.command for row in model_info(name).evaluation if row.command)
    others = dict.fromkeys(command for command in commands if not command.startswith("gvsl-zoo reproduce "))
    return Reproduction(name, weights, rows, recipe.spreads, tuple(others))
