"""Films: grey PNG and DICOM pictures, as arrays and as volumes of one slice, and what a 2D model expects of them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from .errors import VolumeError
from .volume import Prepared, Preprocessing, Volume, is_dicom, own_locale, prepare, read_volume

EIGHT_BITS = 255


@dataclass(frozen=True)
class FilmPreprocessing:
    """What a 2D model expects of its input.

    Args:
        size: (H, W) that a film is resized to; None keeps its own.
        window: (low, high) clipped to; an end that is None is the film's own extreme, as both are where a film has more
            than the 8 bits of the window.
        scale: what low and high become.
    """

    size: tuple[int, int] | None = None
    window: tuple[float | None, float | None] = (0.0, EIGHT_BITS)
    scale: tuple[float, float] = (0.0, 1.0)


def prepare_film(film: Volume, recipe: FilmPreprocessing) -> Prepared:
    """Bring a film, a volume of one slice, onto a model's grid: image (1, 1, 1, H, W).

    Errors: VolumeError for a volume of several slices.
    """
    width, height, _ = one_slice(film).shape
    H, W = recipe.size or (height, width)
    x, y, z = film.spacing_mm
    window = recipe.window if film.data.max() <= EIGHT_BITS else (None, None)
    spacing = (z, y * height / H, x * width / W)
    return prepare(film, Preprocessing(spacing, unit="arbitrary", window=window, scale=recipe.scale))


def read_film(path: str | os.PathLike[str]) -> Volume:
    """A .png or DICOM picture, or a .nii file of one slice, as a volume: i is the column, j the row.

    A picture's pixels are taken as 1 mm wide, whatever they are.

    Errors: VolumeError for a file that cannot be read, or a volume of several slices.
    """
    path = Path(path)
    if path.suffix.lower() != ".png" and not is_dicom(path):
        return one_slice(read_volume(path))
    try:
        pixels = read_pixels(path)
    except (OSError, RuntimeError, SyntaxError) as error:  # ITK's own has several lines, the cause in the last
        cause = f"{str(path)!r} cannot be read: {str(error).strip().splitlines()[-1]}"
        raise VolumeError(cause, "give a grey PNG or DICOM file") from None
    except VolumeError as error:
        raise VolumeError(f"{str(path)!r}: {error.cause}", error.remedy) from None
    return Volume(pixels.T[:, :, None], np.eye(4), path=path)


def one_slice(volume: Volume) -> Volume:
    """The volume itself; VolumeError if it has several slices."""
    if volume.shape[2] > 1:
        cause = f"a volume of {volume.shape[2]} slices for a model of films"
        raise VolumeError(cause, "give a film, or choose a 3D model: gvsl_zoo.list_models(ndim=3)")
    return volume


def read_pixels(path: Path, unit: str = "arbitrary") -> np.ndarray:
    """A grey PNG or DICOM picture, (H, W), bright where the film is; colours are taken if all three are the same.

    unit: "grey" (8 bits, more are refused) or "arbitrary".
    """
    return _dicom_pixels(path, unit) if is_dicom(path) else _png_pixels(path, unit)


@own_locale()
def _dicom_pixels(path: Path, unit: str) -> np.ndarray:
    try:
        import SimpleITK as sitk
    except ImportError:
        raise VolumeError("a DICOM file needs SimpleITK", "pip install 'gvsl-zoo[io]'") from None
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    frames = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))  # ITK turns those that are white where they are lowest
    if len(frames) != 1 or frames.ndim != 3:
        raise VolumeError(f"pictures in colour, or several, of shape {frames.shape}", "give grey films, one a file")
    pixels = frames[0]
    if unit == "grey" and not 0 <= pixels.min() <= pixels.max() <= EIGHT_BITS:
        raise VolumeError("a picture of more than 8 bits", "choose the unit 'arbitrary'")
    return pixels


def _png_pixels(path: Path, unit: str) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError:
        raise VolumeError("a .png file needs Pillow", "pip install 'gvsl-zoo[io]'") from None
    with Image.open(path, formats=["PNG"]) as image:
        image.verify()  # checksums, which reading alone passes over
    with Image.open(path, formats=["PNG"]) as image:
        wide = image.mode.startswith("I")  # 16 bits
        pixels = np.asarray(image if wide else image.convert("RGB"))
    if wide:
        if unit == "grey":
            raise VolumeError("a picture of 16 bits", "choose the unit 'arbitrary'")
        return pixels
    if (pixels != pixels[..., :1]).any():
        raise VolumeError("a picture in colour", "give grey films")
    return pixels[..., 0]


def resized(image: Tensor, size: tuple[int, ...] | None) -> Tensor:
    """A film (C, H, W) of another size, linearly, smoothed where it shrinks; None leaves it."""
    if size is None or image.shape[1:] == size:
        return image
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
