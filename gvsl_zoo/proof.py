"""Proofs: numbers that a model's outputs have on images from a formula, so that whoever loads it can check its maths.

A hash says that the bytes are right; a proof says that bytes, code, preprocessing and device together compute what they
did when the weights were made. It needs no file: the images are sums of sines, stored like scans with turned axes, and
go through the model's own preprocessing.
"""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .doctor import Check
from .errors import ArgumentError, GvslZooError, WeightsError, listed
from .film import FilmPreprocessing
from .inference.features import prepare_for, recipe_of, repeated
from .models.backbone import Backbone
from .models.gemini import GEMINI, WholeModule
from .models.heads import HeadedModel
from .registry import Digest, Proof
from .sources import ANYWHERE, Access
from .spatial import MATRIX_PRODUCTS, exact
from .volume import Preprocessing, Volume
from .zoo import load, resolve_device, widest_task

FORMULA = "sines-1"
SIZES = {"cube": (16, 16, 16), "odd": (27, 19, 22)}  # voxels (i, j, k); the odd one has 2 voxels an axis at stride 16
CYCLES = ((0.9, 0.4, -0.3), (-0.5, 1.1, 0.6), (0.3, -0.7, 1.3), (2.3, 1.9, -1.7))  # along x, y, z in `WAVE` voxels
WAVE = 16.0
HU, GREY, MR = (0.0, 1200.0), (127.5, 140.0), (350.0, 450.0)  # middle and reach: a little beyond every usual window
PRIME = 2_147_483_647  # chirps are counted modulo it, exactly, in integers of 64 bits
RATES = (1_327_217_885, 506_952_113, 1_834_170_001, 929_887_697)  # of the chirps: its multiples by the golden ratio
TOLERANCE = 2e-5  # SDs; float32 against float64 came to 3e-6 at most, whatever the threads
LEAST_SD = 1e-6  # of an output that hardly changes
BF16_MARGIN, LEAST_BF16 = 4.0, 0.01  # tolerance: so many times what bfloat16 was off on the machine that proved
MENDING = "gvsl-zoo verify checks the bytes; if they are right, the preprocessing, the code or the device is not"


# --- The images ---------------------------------------------------------------------------------------------------


def formula_scan(image: str, spacing_mm: tuple[float, float, float], unit: str, moving: bool = False) -> Volume:
    """The image "cube" or "odd" of the formula; both are scans of one world, the moving one shifted a little.

    Args:
        spacing_mm: along x, y, z. The odd image has other spacings and axes (i to the back, j to the head, k to the
            left), so that reading it right takes a resampling and a reorientation.
        unit: "HU", or "arbitrary" (MR).
    """
    shape = SIZES[image]
    x, y, z = spacing_mm
    affine = np.diag([x, y, z, 1.0])
    if image == "odd":
        affine = np.array([[0, 0, -1.25 * x, 0], [-0.8 * y, 0, 0, 0], [0, z, 0, 0], [0, 0, 0, 1.0]])
    middle = affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    affine[:3, 3] = -middle
    index = np.indices(shape).reshape(3, -1)
    points = (affine[:3, :3] @ index + affine[:3, 3:]) / np.array([[x], [y], [z]])  # in voxels of `spacing_mm`
    middle_value, reach = HU if unit == "HU" else MR
    values = np.rint(middle_value + reach * _waves(points, moving)).astype(np.int16)  # whole numbers, everywhere alike
    return Volume(values.reshape(shape), affine)


def formula_film(image: str, moving: bool = False) -> Volume:
    """The film "cube" or "odd" of the formula, 8 bits, a volume of one slice (columns, rows, 1)."""
    width, height, _ = SIZES[image]
    index = np.indices((width, height)).reshape(2, -1) - np.array([[width / 2], [height / 2]])
    points = np.concatenate([index, np.zeros((1, index.shape[1]))])
    values = np.rint(np.clip(GREY[0] + GREY[1] * _waves(points, moving), 0, 255)).astype(np.uint8)
    return Volume(values.reshape(width, height, 1), np.eye(4))


def _waves(points: np.ndarray, moving: bool) -> np.ndarray:
    """Four sines in [-1, 1] at points (3, N) in voxels, alike under no flip or exchange of axes."""
    points = points + moving * np.array([[1.3], [-0.8], [0.6]])
    phases = 2 * math.pi / WAVE * (np.array(CYCLES) @ points) + np.arange(1, 5)[:, None]
    return np.sin(phases).mean(0)


# --- The digests --------------------------------------------------------------------------------------------------


def digest(output: Tensor) -> tuple[float, ...]:
    """Mean, SD and weighted sums over the square root of the size, of an output of any shape.

    The weights are chirps, cos(2 pi r i^2 / p) of the index i: their spectrum is flat, so that a change of any part of
    the output shows in the sums with its full root mean square.
    """
    values = output.detach().double().cpu().flatten().numpy()
    index = np.arange(len(values), dtype=np.int64)
    numbers = [values.mean(), values.std()]
    for rate in RATES:
        turns = index * index % PRIME * rate % PRIME / PRIME
        numbers.append(float(math.sqrt(2 / len(values)) * (np.cos(2 * math.pi * turns) @ values)))
    return tuple(float(f"{number:.9g}") for number in numbers)


def _digests(model: nn.Module, spacing_mm: tuple[float, ...] | None, *, bf16: bool = False) -> tuple[Digest, ...]:
    device, digests = next(model.parameters()).device, []
    convolutions = torch.backends.cudnn.conv, torch.backends.mkldnn.conv  # type: ignore[attr-defined]
    in_full = exact(*convolutions, *MATRIX_PRODUCTS)  # the proof sees TF32
    with torch.inference_mode(), in_full, torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for image in SIZES:
            fixed, moving = (_prepared(model, image, spacing_mm, one).to(device) for one in (False, True))
            digests += [Digest(image, name, digest(out)) for name, out in _outputs(model, fixed, moving).items()]
    return tuple(digests)


def _prepared(model: nn.Module, image: str, spacing_mm: tuple[float, ...] | None, moving: bool) -> Tensor:
    recipe = recipe_of(model)
    if isinstance(recipe, FilmPreprocessing):
        return repeated(prepare_for(formula_film(image, moving), model).image[:, :, 0], model)
    x, y, z = spacing_mm or (1.0, 1.0, 1.0)
    with warnings.catch_warnings():  # sines are no scan
        warnings.simplefilter("ignore")
        return repeated(prepare_for(formula_scan(image, (x, y, z), recipe.unit, moving), model).image, model)


def _outputs(model: nn.Module, fixed: Tensor, moving: Tensor) -> dict[str, Tensor]:
    """What a model says of the pair, by name; everything that its tensors take part in."""
    if isinstance(model, HeadedModel):
        return _outputs(model.backbone, fixed, moving) | {"logits": model(fixed)}
    if isinstance(model, Backbone):
        found = model.forward_features(fixed)
        return {"bottleneck": found.bottleneck, "local": found.local}
    answer = model(fixed, moving)
    if isinstance(model, GEMINI):
        names = {"displacement-ab": answer.displacement_ab, "displacement-ba": answer.displacement_ba}
        return _outputs(model.unet, fixed, moving) | names | {"restored": model.restore(fixed)}
    names = {"affine": answer.affine, "displacement": answer.displacement, "restored": answer.restored}
    return _outputs(model.unet, fixed, moving) | names  # type: ignore[arg-type]


# --- Making and checking ------------------------------------------------------------------------------------------


def prove(
    model: nn.Module, recipe: Preprocessing | FilmPreprocessing | None = None, *, stored: torch.dtype = torch.float32
) -> Proof:
    """The proof of a model, computed in float32 on the CPU; the model itself stays as it is.

    Args:
        model: a backbone, a whole module or a trained head.
        recipe: what it expects of its input; default its own `preprocessing`.
        stored: the type that its tensors are, or will be, stored in.

    Errors: ArgumentError for a model of another kind, or that does not say what input it expects.
    """
    if not isinstance(model, Backbone | WholeModule | HeadedModel):
        remedy = "give a backbone, a whole module or a trained head"
        raise ArgumentError(f"a {type(model).__name__} cannot be proved", remedy)
    copied = copy.deepcopy(model).to("cpu", stored).float().eval()
    copied.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # as from a file: sums round alike
    copied.preprocessing = recipe or recipe_of(model)
    spacing_mm = None
    if isinstance(copied.preprocessing, Preprocessing):
        z, y, x = copied.preprocessing.spacing_mm or (1.0, 1.0, 1.0)
        spacing_mm = (x, y, z)
    digests = _digests(copied, spacing_mm)
    off = max(errors(digests, _digests(copied, spacing_mm, bf16=True)).values())
    tolerance_bf16 = float(f"{max(LEAST_BF16, BF16_MARGIN * off):.2g}")
    return Proof(FORMULA, digests, TOLERANCE, tolerance_bf16, spacing_mm)


def check(model: nn.Module, proof: Proof, *, bf16: bool = False) -> dict[str, float]:
    """The largest difference of each output ("local of odd") from the proof, in SDs; infinite where it is missing.

    A copy computes, in evaluation mode, on the model's own device, in float32 without TF32, or in bfloat16 (autocast).
    """
    if proof.input != FORMULA:
        raise WeightsError(f"a proof by the formula {proof.input!r}, which this version lacks", "upgrade gvsl-zoo")
    return errors(proof.digests, _digests(copy.deepcopy(model).float().eval(), proof.spacing_mm, bf16=bf16))


def errors(proved: tuple[Digest, ...], seen: tuple[Digest, ...]) -> dict[str, float]:
    """The largest difference of each proved digest, in SDs of its output; infinite where it was not seen or is NaN."""
    found = {(one.image, one.output): one.numbers for one in seen}
    out = {}
    for one in proved:
        numbers = found.get((one.image, one.output), (math.nan,) * len(one.numbers))
        scale = max(one.numbers[1], LEAST_SD)
        worst = max(
            abs(a - b) / scale if math.isfinite(b) else math.inf for a, b in zip(one.numbers, numbers, strict=True)
        )
        out[f"{one.output} of {one.image}"] = worst
    return out


def verify_maths(name: str, access: Access = ANYWHERE, *, device: str = "cpu", bf16: bool = False) -> Check:
    """Whether a model on this machine computes what its entry's proof says; a warning for one without a proof.

    Args:
        name: of the registry, hf-hub:org/repo, or a path.
        device: where it computes: cpu, cuda, cuda:N or mps.
    """
    resolve_device(device)
    what = f"{name} (maths, {device} {'bfloat16' if bf16 else 'float32'})"
    settings: dict[str, Any] = {"cache_dir": access.cache_dir, "local_files_only": True, "token": access.token}
    try:
        entry: Any = load(name, **settings).entry
        if entry.proof is None:
            return Check(what, "WARN", "its entry carries no proof", "save it with save_pretrained, which writes one")
        model = load(name, task=widest_task(entry), device=device, **settings)
        found = check(model, entry.proof, bf16=bf16)
    except GvslZooError as error:
        return Check(what, "FAIL", error.cause, error.remedy)
    tolerance = entry.proof.tolerance_bf16 if bf16 else entry.proof.tolerance
    where, worst = max(found.items(), key=lambda item: item[1])
    seen = f"largest error {worst:.1e} SD ({where}), tolerance {tolerance:.1e}, {len(found)} outputs"
    if worst <= tolerance:
        return Check(what, "PASS", seen)
    bad = [output for output, error in found.items() if error > tolerance]
    return Check(what, "FAIL", f"{seen}; off: {listed(bad)}", MENDING)
