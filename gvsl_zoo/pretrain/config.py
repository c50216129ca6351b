"""Settings of a pre-training run, and the presets."""

from __future__ import annotations

import json
import math
import types
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ..errors import ArgumentError

Objective = Literal["gvsl", "restoration", "matching", "no-affine", "gemini"]
Architecture = Literal["unet", "xmorpher"]
PairMode = Literal["self", "cross", "mixed"]
Unit = Literal["HU", "arbitrary", "grey"]
UNITS: dict[int, tuple[Unit, ...]] = {3: ("HU", "arbitrary"), 2: ("grey", "arbitrary")}  # by axes; the first is default
SHARES = ("synthetic_share", "damage_share", "views", "apart", "bent")  # of pairs
WEIGHTS = ("ncc", "smoothness", "restoration", "deformation", "positive", "displacement", "affine", "contrast")
LONGEST_RAMP = 3000  # steps, unless told otherwise
MEANINGS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "null"}
Config = TypeVar("Config", bound="RunConfig")


@dataclass(frozen=True)
class RunConfig:
    """What the settings of every run have.

    seed: decides every draw. save_every: steps between checkpoints; keep_last: how many of these stay.
    """

    steps: int
    seed: int = 0
    save_every: int = 250
    keep_last: int = 2

    @classmethod
    def from_dict(cls: type[Config], values: dict[str, Any]) -> Config:
        """Settings as JSON has them: tuples are lists there.

        Raises: ArgumentError for a name that there is not, or a value of another type than the field's.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(values.keys() - known):
            near = [match for name in unknown for match in get_close_matches(name, known, 1)]
            remedy = f"did you mean {', '.join(near)}?" if near else "they may be of a newer gvsl-zoo: upgrade it"
            raise ArgumentError(f"unknown settings {', '.join(unknown)}", remedy)
        plain: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        kinds = get_type_hints(cls)
        for key, value in plain.items():
            if not _fits(value, kinds[key]):
                raise ArgumentError(f"{key} {value!r} in the settings of a run", f"give {_meaning(kinds[key])}")
        try:
            return cls(**plain)
        except TypeError as error:
            raise ArgumentError(f"settings of the wrong kind ({error})", f"see {cls.__name__}") from None


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is what a field's annotation says; a whole number is a float too, a bool is no number."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return value in args
    if origin is tuple:
        return isinstance(value, tuple) and value != () and all(_fits(item, args[0]) for item in value)
    return type(value) is kind or (kind is float and type(value) is int)


def _meaning(kind: Any) -> str:
    """What a field takes, in words."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_meaning, args))
    if origin is Literal:
        return " or ".join(args)
    return f"a list of {_meaning(args[0]).removeprefix('a ')}s" if origin is tuple else MEANINGS[kind]


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """One run; the defaults are sized for a CPU.

    objective: gvsl; or one of its ablations: restoration alone (Models Genesis), matching alone, no affine head; or
        gemini, which matches both ways without an affine head and takes a second update of each step to restore.
    backbone: unet; or xmorpher, whose width is a multiple of 16, and whose images see each other in no pass
        (pair_mode self), in all (cross), or in half of them (mixed), where two are matched, except by gemini; where
        weights are used or validated an image is alone. window: of its attention, default 2 tokens.
    crop: voxels of `spacing_mm` an axis, (D, H, W), or (H, W) for films.
    unit: of the scans: "HU" (the default) or "arbitrary" (MR); of films "grey" (the default) or "arbitrary".
    batch_size: pairs a process and forward pass; accumulate: forward passes a step.
    synthetic_share: share of pairs from synthetic anatomy while scans are given too; without scans all are synthetic.
    ramp_steps: over these the task hardens: synthetic subjects go from alike to fully varied, and scans come in among
        them (with synthetic_share 0 all pairs are of scans from the first step on). Default a quarter of the steps, at
        most 3000; 0 for none.
    damage_share: share of pairs whose fixed image is damaged; the others are matched and restored as they are. GEMINI
        matches all as they are, and restores all.
    ncc, smoothness, restoration, deformation, positive: weights of the terms, in units of the paper's: all 1 in GVSL
        (He et al. 2023, sec. 3.1), `losses.GEMINI_WEIGHTS` in GEMINI, which alone has the last two.
    ema: decay of the averaged weights, which are then the ones that are kept; 0 for none.
    displacement, affine, contrast: weights of what pairs can teach besides whose common anatomy is known, which are
        those of synthetic subjects, and two views of one scan.
    views: share of the pairs of scans that are two views of one scan, in poses of their own.
    apart: share of the other pairs whose images have poses of their own, as if nobody had laid them alike.
    bent: share of pairs whose images show other contrasts, each along a curve of its own; of those images one in ten
        stays as it is, as in the damage.
    scales: resolutions in which images are compared, from full to 1 / 2^(scales - 1); the mean is the term `ncc`.
    """

    objective: Objective = "gvsl"
    ndim: int = 3
    backbone: Architecture = "unet"
    width: int = 8
    window: int | None = None
    pair_mode: PairMode = "mixed"
    affine_width: int | None = 48
    crop: tuple[int, ...] = (48, 48, 48)
    spacing_mm: float = 4.0
    unit: Unit | None = None
    batch_size: int = 1
    accumulate: int = 1
    synthetic_share: float = 0.5
    ramp_steps: int | None = None
    damage_share: float = 0.5
    ncc: float = 1.0
    smoothness: float = 1.0
    restoration: float = 1.0
    deformation: float = 1.0
    positive: float = 1.0
    displacement: float = 0.0
    affine: float = 0.0
    contrast: float = 0.0
    views: float = 0.0
    apart: float = 0.0
    bent: float = 0.0
    scales: int = 1
    learning_rate: float = 2e-3  # peak; cosine to zero
    warmup_steps: int = 100
    clip_norm: float = 1.0
    ema: float = 0.0
    bf16: bool = True
    checkpointing: bool = False  # of activations: memory for time
    compile: bool = False

    def __post_init__(self) -> None:
        for wrong, what in (
            (self.objective not in get_args(Objective), f"objective {self.objective!r}"),
            (self.backbone not in get_args(Architecture), f"backbone {self.backbone!r}"),
            (self.pair_mode not in get_args(PairMode), f"pair_mode {self.pair_mode!r}"),
            (self.backbone == "unet" and self.window is not None, f"window {self.window} with a U-Net"),
            (self.ndim != len(self.crop) or min(self.crop) < 16, f"crop {self.crop} with ndim {self.ndim}"),
            (min(self.steps, self.batch_size, self.accumulate, self.save_every, self.keep_last) < 1, "a count below 1"),
            ((self.ramp_steps or 0) < 0, f"ramp_steps {self.ramp_steps}"),
            (self.warmup_steps < 0, f"warmup_steps {self.warmup_steps}"),
            (self.window is not None and self.window < 1, f"window {self.window}"),
            (
                self.affine_width is not None and (self.affine_width < 8 or self.affine_width % 8 > 0),
                f"affine_width {self.affine_width}",
            ),
            (not 0 < self.spacing_mm < math.inf, f"spacing_mm {self.spacing_mm}"),
            (not 0 <= self.learning_rate < math.inf, f"learning_rate {self.learning_rate}"),
            (not self.clip_norm > 0, f"clip_norm {self.clip_norm}"),
            (not 0 <= self.ema < 1, f"ema {self.ema}"),
            *((not 0 <= getattr(self, n) <= 1, f"{n} {getattr(self, n)}") for n in SHARES),
            *((not 0 <= getattr(self, n) < math.inf, f"{n} {getattr(self, n)}") for n in WEIGHTS),
            (not 1 <= self.scales <= 4, f"scales {self.scales}"),
            (self.unit not in (None, *UNITS.get(self.ndim, ())), f"unit {self.unit!r} with ndim {self.ndim}"),
            (self.objective == "gemini" and self.known, "displacement, affine or contrast with objective 'gemini'"),
            (self.objective == "gemini" and self.scales > 1, "scales with objective 'gemini'"),
        ):
            if wrong:
                raise ArgumentError(f"{what} in the settings of a run", "see gvsl_zoo.pretrain.config.PretrainConfig")

    @property
    def steps_of_ramp(self) -> int:
        """Steps over which the task hardens."""
        return min(self.steps // 4, LONGEST_RAMP) if self.ramp_steps is None else self.ramp_steps

    @property
    def known(self) -> bool:
        """Whether a term needs the known anatomy of synthetic pairs."""
        return max(self.displacement, self.affine, self.contrast) > 0

    @property
    def cross_share(self) -> float:
        """Share of forward passes in which two images see each other."""
        pairs = self.backbone == "xmorpher" and self.objective not in ("restoration", "gemini")
        return {"self": 0.0, "mixed": 0.5, "cross": 1.0}[self.pair_mode] if pairs else 0.0

    @property
    def scan_unit(self) -> Unit:
        """What the scans are measured in."""
        return self.unit or UNITS[self.ndim][0]


GEMINI_RECIPE: dict[str, Any] = {  # He et al. 2025
    "objective": "gemini",
    "width": 32,
    "affine_width": None,
    "synthetic_share": 0.0,
    "ramp_steps": 0,
    "learning_rate": 1e-4,
    "clip_norm": 1e9,  # never
    "save_every": 2000,
}

PRESETS: dict[str, dict[str, Any]] = {
    "nano": {},
    "small": {
        "width": 16,
        "affine_width": None,
        "crop": (96, 96, 96),
        "spacing_mm": 2.0,
        "batch_size": 2,
        "learning_rate": 1e-3,
        "ema": 0.999,
        "save_every": 2000,
    },
    "base": {
        "width": 32,
        "affine_width": None,
        "crop": (128, 128, 128),
        "spacing_mm": 1.0,
        "batch_size": 2,
        "learning_rate": 3e-4,
        "ema": 0.999,
        "save_every": 2000,
    },
    "gemini-brain": GEMINI_RECIPE | {"unit": "arbitrary", "crop": (128, 128, 128), "spacing_mm": 1.0},
    "gemini-xray": GEMINI_RECIPE | {"ndim": 2, "crop": (512, 512), "spacing_mm": 0.75, "batch_size": 5},
}
XMORPHER_WIDTH = {8: 16, 16: 32, 32: 48}  # whose local features are as wide as those of the U-Net of that width
FILMS: dict[str, Any] = {"ndim": 2, "crop": (256, 256), "spacing_mm": 1.5}  # what a preset becomes with ndim 2


def settings_of(
    base: Mapping[str, Any], steps: int, named: dict[str, Any], others: tuple[str, ...] = ()
) -> PretrainConfig:
    """The settings of a preset or a recipe with changes: `named` ones (None leaves those of `base`; `crop` may be one
    number for all axes) and `others` as text, "name=value".
    """
    values = {**base, "steps": steps}
    changes = {key: value for key, value in named.items() if value is not None} | parse_settings(others)
    if named.get("ndim") == 2 and values.get("ndim") != 2:
        values |= FILMS
    if changes.get("backbone") == "xmorpher" != values.get("backbone"):
        values["width"] = XMORPHER_WIDTH.get(values.get("width", 8), values.get("width"))
    values |= changes
    if isinstance(values.get("crop"), int):
        values["crop"] = (values["crop"],) * (2 if values.get("ndim") == 2 else 3)
    return PretrainConfig.from_dict(values)


def parse_settings(texts: tuple[str, ...]) -> dict[str, Any]:
    """Settings written as "name=value", the value as JSON or as Python has it (.5, True), or a word."""
    values: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        values[name] = value
        for read in (float, json.loads):  # what JSON knows it tells better: whole numbers
            with suppress(ValueError):
                values[name] = read(value.lower() if value in ("True", "False") else value)
        if not equals:
            raise ArgumentError(f"{text!r} is no setting", "write name=value")
    return values
