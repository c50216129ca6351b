"""Films: grey PNG and DICOM pictures, as arrays and as volumes of one slice, and what a 2D model expects of them.

A film's world is its own plane: x along the columns, y down the rows, from the middle of the first pixel; in
millimetres where the file says how large a pixel is, else in pixels, which count as 1 mm. A NIfTI file of one slice
keeps the world of its affine, but i is the column and j the row all the same, whatever the affine says of up and left.
"""

from __future__ import annotations

import io
import math
import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from .errors import ArgumentError, VolumeError
from .transforms import Affine
from .volume import (
    SLICED,
    Prepared,
    Preprocessing,
    Volume,
    check_output,
    is_dicom,
    own_locale,
    prepare,
    read_volume,
    write_volume,
)
from .weights import write_whole

EIGHT_BITS = 255
FRAME_MM = 400.0  # of a film's longer axis where it does not say: chest films are 350 to 430 mm long
MATCHED_PIXELS = 512  # along the longer axis of the grid that films are matched on; the size of He et al. 2025
SPACING_TAGS = ("0028|0030", "0018|1164", "0018|2010")  # PixelSpacing, ImagerPixelSpacing, NominalScannedPixelSpacing


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
    """Bring a film, a volume of one slice, onto a model's grid: image (1, 1, 1, H, W), j down and i along it.

    One that looks scaled already, of values up to 1 for a window beyond it, is warned about as `prepare` does.

    Errors: VolumeError for a volume of several slices.
    """
    width, height, _ = one_slice(film).shape
    H, W = recipe.size or (height, width)
    x, y, z = film.spacing_mm
    window = (None, None) if (film.data > EIGHT_BITS).any() else recipe.window
    spacing = (z, y * height / H, x * width / W)
    flat = own_plane(film)
    prepared = prepare(flat, Preprocessing(spacing, unit="arbitrary", window=window, scale=recipe.scale))
    to_world = film.affine @ np.linalg.inv(flat.affine)
    return replace(prepared, affine=to_world @ prepared.affine, source=film)


def read_film(path: str | os.PathLike[str], *, fill: float | None = None) -> Volume:
    """A .png or DICOM picture, or a .nii file of one slice, as a volume: i is the column, j the row.

    A picture's pixels are taken as 1 mm wide, whatever they are. fill: see `read_volume`.

    Errors: VolumeError for a file that cannot be read, or a volume of several slices.
    """
    path = Path(path)
    if path.suffix.lower() != ".png" and not is_dicom(path):
        return one_slice(read_volume(path, fill=fill))
    try:
        pixels = read_pixels(path)
    except (OSError, RuntimeError, SyntaxError) as error:  # ITK's own has several lines, the cause in the last
        cause = f"{str(path)!r} cannot be read: {str(error).strip().splitlines()[-1]}"
        raise VolumeError(cause, "give a grey PNG or DICOM file") from None
    except VolumeError as error:
        raise VolumeError(f"{str(path)!r}: {error.cause}", error.remedy) from None
    return Volume(pixels.T[:, :, None], np.eye(4), path=path)


def is_film(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a .png, or a DICOM file that is no slice of a volume: its modality is none of `SLICED`."""
    path = Path(path)
    return path.suffix.lower() == ".png" or _dicom_spacing(path) is not None


def read_scan(path: str | os.PathLike[str], *, fill: float | None = None) -> Volume:
    """A film in the millimetres that it knows, as a volume of one slice, or else a volume. Errors: VolumeError.

    fill: see `read_volume`.
    """
    if not is_film(path):
        return read_volume(path, fill=fill)
    x, y = _dicom_spacing(Path(path)) or (1.0, 1.0)
    return replace(read_film(path), affine=np.diag([x, y, 1.0, 1.0]))


def read_labels(labels: Volume | str | os.PathLike[str]) -> Volume:
    """A label map, given or read: whole numbers from 0 on, NaN being 0; a film's is a volume of one slice.

    Errors: VolumeError for a file that cannot be read, or holds something else.
    """
    volume = labels if isinstance(labels, Volume) else read_scan(labels, fill=0.0)
    data, name = volume.data, repr(str(volume.path)) if volume.path else "the label map"
    if data.dtype.kind == "f" and not (data == np.round(data)).all():
        raise VolumeError(f"{name} holds fractions, not labels", "give a whole number a voxel")
    if data.dtype.kind not in "ub" and data.min() < 0:
        raise VolumeError(f"{name} holds the label {data.min():g}", "give labels from 0 on")
    return volume


def read_for(
    scan: Volume | str | os.PathLike[str], recipe: Preprocessing | FilmPreprocessing, *, fill: float | None = None
) -> Volume:
    """A film or a volume, given or read, as the model wants it. fill: see `read_volume`.

    Errors: VolumeError for a file that cannot be read, or a volume for a model of films; ArgumentError for a film for a
        model of volumes.
    """
    if isinstance(recipe, FilmPreprocessing):
        return one_slice(scan if isinstance(scan, Volume) else read_scan(scan, fill=fill))
    if not isinstance(scan, Volume) and Path(scan).is_file() and is_film(scan):
        remedy = "choose a 2D model: gvsl_zoo.list_models(ndim=2)"
        raise ArgumentError(f"{str(scan)!r} is a film, the model one of volumes", remedy)
    return scan if isinstance(scan, Volume) else read_volume(scan, fill=fill)


def prepare_scan(scan: Volume | str | os.PathLike[str], recipe: Preprocessing | FilmPreprocessing) -> Prepared:
    """A film or a volume, given or read, on the grid of the model. Errors: those of `read_for` and `prepare`."""
    volume = read_for(scan, recipe)
    return prepare_film(volume, recipe) if isinstance(recipe, FilmPreprocessing) else prepare(volume, recipe)


def own_plane(film: Volume) -> Volume:
    """The film in the world of its own plane: x along i, the columns, y along j, the rows."""
    return replace(film, affine=np.diag([*film.spacing_mm, 1.0]))


def on_film(picture: Volume, film: Volume) -> Volume:
    """A mask or label map of a film's pixels in the place of the film; VolumeError for another size."""
    if picture.shape != film.shape:
        cause = f"a mask or label map of {picture.shape[:2]} pixels for a film of {film.shape[:2]} (columns, rows)"
        raise VolumeError(cause, "give one with a value for every pixel of the film")
    return replace(picture, affine=film.affine)


def write_film(film: Volume, path: str | os.PathLike[str], *, like: np.dtype, overwrite: bool = False) -> None:
    """Write a film as .png, of 8 bits where `like` has no more and else of 16, rounded; another name as `write_volume`.

    Errors: VolumeError for values that a PNG does not hold, and for what cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        write_volume(film, path, overwrite=overwrite)
        return
    check_output(path, film.path, overwrite)
    try:
        from PIL import Image
    except ImportError:
        raise VolumeError("a .png file needs Pillow", "pip install 'gvsl-zoo[io]'") from None
    if like.kind == "f":
        raise VolumeError(f"a PNG has no place for {like} pixels", "end the output in .nii.gz")
    kind = np.uint8 if like.itemsize == 1 else np.uint16
    pixels = np.round(film.data[:, :, 0].T)
    if pixels.min() < 0 or pixels.max() > np.iinfo(kind).max:
        cause = f"values from {pixels.min():g} to {pixels.max():g} have no place in a PNG of {np.dtype(kind)}"
        raise VolumeError(cause, "end the output in .nii.gz")
    content = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels, kind)).save(content, "png")
    try:
        write_whole(path, content.getvalue())
    except OSError as error:
        raise VolumeError(f"cannot write {str(path)!r}: {error.strerror}", "check permissions and free space") from None


def known_size(film: Volume) -> bool:
    """Whether a film says how large its pixels are: one of exactly 1 mm is of unknown size."""
    return film.spacing_mm[:2] != (1.0, 1.0)


def together(fixed: Volume, moving: Volume) -> tuple[Affine, Affine]:
    """From the worlds of two films to one in which they lie frame on frame: centre on centre, and in millimetres.

    Unless both films know the size of their pixels, the longer axis of each is taken to span `FRAME_MM`.
    """
    known, affines = known_size(fixed) and known_size(moving), []
    for film in (fixed, moving):
        plane = own_plane(film).affine
        scale = 1.0 if known else FRAME_MM / (np.array(film.shape[:2]) * film.spacing_mm[:2]).max()
        matrix = np.diag([scale, scale, 1.0, 1.0]) @ plane @ np.linalg.inv(film.affine)
        middle = film.affine @ [*((n - 1) / 2 for n in film.shape), 1.0]
        matrix[:3, 3] -= (matrix @ middle)[:3]
        affines.append(Affine(matrix))
    return affines[0], affines[1]


class Laid(NamedTuple):
    """Two films on the grids that they are matched on, and `together` of them."""

    fixed: Prepared
    moving: Prepared
    together: tuple[Affine, Affine]


def lay_frames(fixed: Volume, moving: Volume, recipe: FilmPreprocessing) -> Laid:
    """Lay a film over another, frame on frame.

    The grid is the model's size, or else of square pixels of one size in both films, `MATCHED_PIXELS` along the longer
    axis of the fixed one at most.

    Errors: VolumeError for a volume of several slices.
    """
    films = one_slice(fixed), one_slice(moving)
    affines = together(*films)
    pixels = [  # mm of a column and of a row in the frame
        np.linalg.norm((affine.matrix @ film.affine)[:3, :2], axis=0)
        for film, affine in zip(films, affines, strict=True)
    ]
    extents = [pixel * film.shape[:2] for film, pixel in zip(films, pixels, strict=True)]
    pixel_mm = max(pixels[0].min(), extents[0].max() / MATCHED_PIXELS)
    prepared = []
    for film, extent in zip(films, extents, strict=True):
        width, height = (max(1, round(float(side) / pixel_mm)) for side in extent)
        prepared.append(prepare_film(film, replace(recipe, size=recipe.size or (height, width))))
    return Laid(prepared[0], prepared[1], affines)


def flattened(x: Tensor, recipe: Preprocessing | FilmPreprocessing) -> Tensor:
    """(..., 1, H, W) as (..., H, W) for a model of films; as it is for one of volumes."""
    return x.squeeze(-3) if isinstance(recipe, FilmPreprocessing) else x


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
def _dicom_spacing(path: Path) -> tuple[float, float] | None:
    """Millimetres of a pixel along x and y of a DICOM film, 1 where it does not say; None for anything else."""
    if not is_dicom(path):
        return None
    with suppress(ImportError, RuntimeError):
        import SimpleITK as sitk

        sitk.ProcessObject.SetGlobalWarningDisplay(False)
        reader = sitk.ImageFileReader()
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
        if reader.HasMetaDataKey("0008|0060") and reader.GetMetaData("0008|0060").strip() in SLICED:
            return None
        for tag in filter(reader.HasMetaDataKey, SPACING_TAGS):
            with suppress(ValueError):
                row, column = map(float, reader.GetMetaData(tag).split("\\"))
                if min(row, column) > 0 and max(row, column) < math.inf:
                    return column, row
        return 1.0, 1.0
    return None


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
    if (low := pixels.min()) < 0:  # such as signed ones that were turned
        pixels = pixels.astype(np.int64 if pixels.dtype.kind == "i" else np.float64) - low
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
    if not wide and path.read_bytes()[24] == 16:  # the bits that its first chunk tells of
        raise VolumeError("16 bits in colour or with transparency, of which Pillow reads 8", "save it as grey alone")
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
