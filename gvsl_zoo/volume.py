"""Volumes: the only room that knows NIfTI, DICOM, millimetres and Hounsfield units; the way in and the exact way back.

Axes: a file's voxels are (i, j, k), in whatever direction it stores them; the world is (x, y, z), RAS+ millimetres;
a model's tensor is (z, y, x) on the canonical grid: the file's axes permuted and flipped to the nearest RAS+ directions
(an oblique angle stays in the affine), then resampled so that the edges of the field of view coincide.
"""

from __future__ import annotations

import gzip
import itertools
import locale
import math
import os
import struct
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import nibabel as nib
import numpy as np
import torch
from nibabel.spatialimages import HeaderDataError
from torch.nn import functional as F

from .errors import ArgumentError, GvslZooError, VolumeError, listed
from .weights import whole_file

CT_WINDOW_HU = (-1024.0, 1024.0)  # official fine-tune loader: (HU + 1024) / 2048, clipped to [0, 1]
MAX_BYTES = 4 * 2**30  # largest array that one volume may take in memory; `max_bytes` raises it
MAX_SCORES = 2**20  # brought onto a scan's grid at once; more is no faster
MAX_EXTENSION_BYTES = 64 * 2**20  # header extensions in the wild (DICOM headers, XML) stay far below
COMMENT = 6  # ecode of an extension that holds text
MAX_DEFLATE_RATIO = 1032  # zlib's theoretical limit
SPACING_LIMITS_MM = (1e-4, 1e3)  # from microscopy to nonsense
MAX_SCALING = 1e10  # |slope|, |intercept|; quantitative maps stay below 1e7
MAX_VALUE = 1e30  # beyond it the difference of two voxels overflows float32
SINGULAR = 1e-6  # determinant of an affine with unit columns; voxel spacings may differ freely
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
GRID_TOLERANCE = 0.1  # of a voxel: what rounding in headers may do to a grid
SLICED = ("CT", "MR", "PT", "NM")  # modalities whose DICOM files are slices of volumes
SLICE_TOLERANCE = 0.2  # of the slices' distance: what rounded positions may lie off their places; a gap is 0.5 or more
SAME_GEOMETRY = 1e-3  # of direction cosines and of pixels: what rounding may make of one number
NOT_NIFTI = "give a NIfTI-1 or NIfTI-2 file (.nii, .nii.gz), or a DICOM series: its folder, or one file of it"
TO_NIFTI = "convert the series to NIfTI with dcm2niix"
GIVE_AFFINE = "give 4 x 4 finite numbers that can be inverted, the last row 0 0 0 1; a file, as its sform or qform"
READ_AGAIN = "the file is damaged: copy or export it again from its source"
_MM_PER_UNIT = {0: 1.0, 1: 1e3, 2: 1.0, 3: 1e-3}  # xyzt_units: unknown, metre, millimetre, micron
_ORDERS: tuple[Literal["little", "big"], ...] = ("little", "big")
OF_THE_SCAN = (  # fields of its header that are not true of what is made from it
    *("cal_min", "cal_max", "intent_code", "intent_name", "intent_p1", "intent_p2", "intent_p3", "aux_file"),
    *("dim_info", "slice_code", "slice_start", "slice_end", "slice_duration", "toffset"),
)
_DTYPE_CODES = (2, 4, 8, 16, 64, 256, 512, 768, 1024, 1280)  # the real scalar types that numpy has everywhere
_Gzip: Any = gzip.GzipFile
_GZIP_ERRORS: tuple[Any, ...] = (EOFError, gzip.BadGzipFile, zlib.error)
with suppress(ImportError):  # Intel's ISA-L unpacks three times as fast, with the same checks, and packs five times
    from isal import igzip, isal_zlib

    _Gzip, _GZIP_ERRORS = igzip.IGzipFile, (*_GZIP_ERRORS, isal_zlib.error)


class InputWarning(UserWarning):
    """An image that can be used but looks unlike what was expected."""


@dataclass(frozen=True, eq=False)
class Volume:
    """Voxels and where they lie in the world.

    Args:
        data: (i, j, k), or (i, j, k, C) for several channels, in the file's own axis order; scaling applied.
        affine: (4, 4) float64, voxel (i, j, k) -> world (x, y, z) in RAS+ millimetres.
        header: the NIfTI header read, kept so that outputs carry its units and qform/sform codes; None after DICOM.
        path: the file or the DICOM folder read; `write_volume` refuses to overwrite it.
        notes: what was repaired or is doubtful.
        comment: text kept in the header's extension (NIfTI's ecode 6); label maps have their labels there, in JSON.

    Errors: VolumeError for other numbers of axes, an empty axis, or an affine that is not finite and invertible.
    """

    data: np.ndarray
    affine: np.ndarray
    header: Any = None
    path: Path | None = None
    notes: tuple[str, ...] = ()
    comment: str = ""

    def __post_init__(self) -> None:
        if self.data.ndim not in (3, 4) or 0 in self.data.shape:
            raise VolumeError(f"data has shape {self.data.shape}", "give (i, j, k) or (i, j, k, C), all at least 1")
        object.__setattr__(self, "affine", checked_affine(self.affine))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along i, j, k."""
        return self.data.shape[0], self.data.shape[1], self.data.shape[2]

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Millimetres between voxels along i, j, k."""
        i, j, k = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return i, j, k

    def carrying(self, data: np.ndarray) -> Volume:
        """Something else on the same grid, such as labels: without what header and comment say of the voxels."""
        header = self.header
        if header is not None:
            header = header.copy()
            for field in OF_THE_SCAN:
                header[field] = np.zeros_like(header[field])
        return replace(self, data=data, header=header, comment="")


# ---- the way in: a file is believed only after its claims have been checked, and before anything large is allocated


def read_volume(
    path: str | os.PathLike[str], *, channels: bool = False, fill: float | None = None, max_bytes: int = MAX_BYTES
) -> Volume:
    """Read a .nii or .nii.gz file (NIfTI-1 or -2, either byte order) to its last byte, checksum included.

    A folder is read as the DICOM series in it, a DICOM file as the series that it belongs to: see `read_dicom`.
    An uncompressed file without scaling is memory-mapped (private pages: changing `data` never changes the file).
    NaN and infinite voxels become `fill`; this and every doubt is in `notes` and warned about.

    Args:
        channels: accept a 4-D file as (i, j, k, C); otherwise only one volume, whose extra axes are dropped.
        fill: default the smallest finite value, the air of an image; of labels and masks 0.
        max_bytes: the most memory that the voxels may take.

    Errors: VolumeError for whatever cannot be read or trusted.
    """
    path = Path(path)
    with _typed("read", path):
        if path.is_dir() or is_dicom(path):
            return _dicom_volume(path, max_bytes)
        if not path.is_file():
            raise VolumeError("no such file", "check the path")
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"  # the content decides, not the name
            file.seek(0)
            stream: Any = _Gzip(fileobj=file) if packed else file
            header, comment = _read_header(stream)
            shape = _checked_shape(header, channels)
            affine, notes = _checked_geometry(header)
            slope, inter = _checked_scaling(header)
            dtype, start = header.get_data_dtype(), stream.tell()
            mapped = not packed and dtype.isnative and (slope, inter) == (1, 0)
            _check_size(shape, dtype, start, path.stat().st_size, packed, math.inf if mapped else max_bytes)
            if mapped:
                data = np.asarray(np.memmap(path, dtype, mode="c", offset=start, shape=shape, order="F"))
            else:
                raw = _read_exactly(stream, math.prod(shape) * dtype.itemsize)
                data = _scaled(raw.view(dtype).reshape(shape, order="F"), slope, inter)
        data, filled = _fill_nonfinite(data, fill)
        notes += filled
    _warn(f"{path.name}: {note}" for note in notes)
    return Volume(data, affine, header, path, tuple(notes), comment)


def _read_header(stream: Any) -> tuple[Any, str]:
    """The header and the first comment among its extensions, others dropped; `stream` is left at the first voxel."""
    start = stream.read(348)
    if not start:
        raise VolumeError("the file is empty", READ_AGAIN)
    order = next((o for o in _ORDERS if int.from_bytes(start[:4], o) in (348, 540)), None)
    if order is None:
        raise VolumeError(f"not a NIfTI file: it begins with {start[:16]!r}", NOT_NIFTI)
    kind = nib.Nifti1Header if int.from_bytes(start[:4], order) == 348 else nib.Nifti2Header
    start += stream.read(kind.sizeof_hdr - len(start))
    if len(start) < kind.sizeof_hdr:
        raise VolumeError(f"the header ends after {len(start)} of {kind.sizeof_hdr} bytes: truncated", READ_AGAIN)
    header = kind(start, endianness=order, check=False)
    if not bytes(header["magic"]).startswith(b"n+"):
        raise VolumeError(f"magic {bytes(header['magic'])!r} is not that of a single-file NIfTI", NOT_NIFTI)
    room = (float(header["vox_offset"]) or kind.single_vox_offset) - kind.single_vox_offset  # 0: after the header
    if not 0 <= room <= MAX_EXTENSION_BYTES or room % 1:
        raise VolumeError(f"vox_offset {float(header['vox_offset']):g} is absurd", READ_AGAIN)
    flag, extensions, position, comment = stream.read(4), stream.read(int(room)), 0, ""
    if len(flag) + len(extensions) < 4 + room:
        raise VolumeError("the file ends before its first voxel: truncated", READ_AGAIN)
    while flag[0] and position + 8 <= room:
        length = int.from_bytes(extensions[position : position + 4], order, signed=True)
        if length == 0:  # padding after the last one
            break
        if length < 8 or position + length > room:
            raise VolumeError(f"a header extension claims {length} of {int(room) - position} bytes", READ_AGAIN)
        if int.from_bytes(extensions[position + 4 : position + 8], order) == COMMENT:
            comment = comment or extensions[position + 8 : position + length].rstrip(b"\0").decode(errors="replace")
        position += length
    return header, comment


def _checked_shape(header: Any, channels: bool) -> tuple[int, ...]:
    """(i, j, k) or (i, j, k, C) as claimed."""
    ndim, *dims = (int(n) for n in header["dim"])
    dims = dims[: max(0, ndim)]
    if not 1 <= ndim <= 7 or min(dims) < 1:
        raise VolumeError(f"the header claims {ndim} dimensions, shape {tuple(dims)}", READ_AGAIN)
    if ndim < 3:
        remedy = "give a volume of three dimensions, a film as one slice: (i, j, 1)"
        raise VolumeError(f"a {ndim}-D image of shape {tuple(dims)}", remedy)
    several = [n for n in dims[3:] if n > 1]
    if len(several) > 1 or (several and not channels):
        cause = f"{math.prod(several)} volumes in one file, shape {tuple(dims)}"
        raise VolumeError(cause, "choose one, for example with nibabel: image.slicer[..., 0]")
    return (*dims[:3], *several)


def _checked_geometry(header: Any) -> tuple[np.ndarray, list[str]]:
    """The affine in millimetres, and what is doubtful about it; sform before qform, as nibabel and most tools do."""
    zooms, notes = header["pixdim"][1:4].astype(np.float64), []
    if not (np.isfinite(zooms).all() and (zooms > 0).all()):
        raise VolumeError(f"voxel spacing {_numbers(zooms)}", "write the true spacing in mm into the header (pixdim)")
    if header["pixdim"][0] not in (-1, 1):
        header["pixdim"][0] = 1  # qfac: the standard's reading of 0
    sform, qform = int(header["sform_code"]) != 0, int(header["qform_code"]) != 0
    if not sform and not qform:
        notes.append("sform and qform codes are both 0: orientation unknown, assumed x to the left, y front, z head")
    try:
        affine = checked_affine(header.get_best_affine())
    except (HeaderDataError, ValueError) as error:
        raise VolumeError(f"the qform is invalid: {error}", GIVE_AFFINE) from error
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    shape = tuple(int(n) for n in header["dim"][1:4])
    if not np.allclose(spacing, zooms, rtol=0.01):
        notes.append(f"pixdim says {_numbers(zooms)}, the affine {_numbers(spacing)} spacing: the affine is used")
    if sform and qform:
        try:
            apart = _apart_mm(affine, header.get_qform(), shape)
        except (HeaderDataError, ValueError):  # a quaternion longer than 1
            apart = math.nan
        if not apart <= 0.1 * spacing.min():  # a NaN also counts
            notes.append(f"sform and qform disagree by up to {apart:.3g} mm: sform is used")
    unit = _MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, 1.0)
    if unit != 1:
        notes.append(f"lengths were in units of {unit:g} mm and are now in millimetres")
        affine[:3] *= unit
    return _in_reach(affine), notes


def checked_affine(affine: np.ndarray, refusal: type[GvslZooError] = VolumeError) -> np.ndarray:
    """A float64 copy of a usable affine, (4, 4); `refusal` for one that is not finite, affine and invertible."""
    affine = np.array(affine, dtype=np.float64)
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or not np.allclose(affine[3], (0, 0, 0, 1), rtol=0):
        cause = f"the affine is not 4 x 4 finite numbers with the last row 0 0 0 1: {affine.tolist()}"
        raise refusal(cause, GIVE_AFFINE)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not spacing.all() or abs(np.linalg.det(affine[:3, :3] / spacing)) < SINGULAR:
        raise refusal(f"the affine is singular: {affine.tolist()}", GIVE_AFFINE)
    return affine


def laid_on(volume: Volume, role: str, other: Volume, other_role: str) -> Volume:
    """A mask or label map, its axes turned and swapped to be those of another volume: NIfTI and DICOM order them apart.

    Errors: those of `check_grid`, where it does not lie voxel on voxel then.
    """
    own, wanted = (nib.orientations.io_orientation(one.affine) for one in (volume, other))
    turn = nib.orientations.ornt_transform(own, wanted)
    if (own != wanted).any() and volume.data.ndim == 3:
        data = nib.orientations.apply_orientation(volume.data, turn)
        affine = volume.affine @ nib.orientations.inv_ornt_aff(turn, volume.shape)
        volume = replace(volume, data=data, affine=affine)
    check_grid(volume, role, other, other_role)
    return volume


def check_grid(volume: Volume, role: str, other: Volume, other_role: str) -> None:
    """VolumeError, which names both by role and file, unless two volumes lie voxel on voxel, up to a tenth of one."""
    a, b = (f"{role} {one.path.name!r}" if one.path else role for one, role in ((volume, role), (other, other_role)))
    remedy = f"resample {role} onto the grid of {other_role} (same shape and affine)"
    if volume.data.shape != other.data.shape:
        raise VolumeError(f"{a} has {volume.data.shape} voxels, {b} {other.data.shape}", remedy)
    apart = _apart_mm(volume.affine, other.affine, volume.shape)
    if apart > GRID_TOLERANCE * min(other.spacing_mm):
        axes, other_axes = ("".join(nib.orientations.aff2axcodes(one.affine)) for one in (volume, other))
        where = (
            f"has the axes {axes}, {b} {other_axes}" if axes != other_axes else f"lies up to {apart:.3g} mm beside {b}"
        )
        raise VolumeError(f"{a} {where}", remedy)


def _apart_mm(affine: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> float:
    """How far apart along an axis of the world two affines put the corners of a grid."""
    corners = np.array([(*corner, 1) for corner in itertools.product(*((0, n - 1) for n in shape))]).T
    return float(np.abs((affine - other) @ corners).max())


def _in_reach(affine: np.ndarray) -> np.ndarray:
    """A file's affine, checked, whose spacing is that of an image."""
    spacing = np.linalg.norm(checked_affine(affine)[:3, :3], axis=0)
    if not SPACING_LIMITS_MM[0] <= spacing.min() <= spacing.max() <= SPACING_LIMITS_MM[1]:
        raise VolumeError(f"the affine's voxel spacing is {_numbers(spacing)}", "write the true affine into the header")
    return affine


def _checked_scaling(header: Any) -> tuple[float, float]:
    """(slope, intercept) of a real voxel type; a stored slope of 0 means no scaling (NIfTI-1 standard)."""
    code = int(header["datatype"])
    if code not in _DTYPE_CODES:
        name = nib.nifti1.data_type_codes.label.get(code, "unknown")
        raise VolumeError(f"voxel type {name} (code {code})", "give one integer, float32 or float64 a voxel")
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0:
        return 1.0, 0.0
    if not (abs(slope) <= MAX_SCALING and abs(inter) <= MAX_SCALING):  # a NaN also fails
        raise VolumeError(f"scl_slope {slope:g} and scl_inter {inter:g}", "set them to 1 and 0, or to the true scaling")
    return slope, inter


def _check_size(shape: tuple[int, ...], dtype: np.dtype, start: int, size: int, packed: bool, max_bytes: float) -> None:
    """Compare what the header claims with the file's size and with the memory allowed, before any is taken."""
    claimed = math.prod(shape) * dtype.itemsize
    what = f"shape {' x '.join(map(str, shape))} of {dtype.name} is {claimed} bytes"
    if (start + claimed) > size * (MAX_DEFLATE_RATIO if packed else 1):
        raise VolumeError(f"{what}, but the file has only {size}: truncated, or a wrong header", READ_AGAIN)
    if not packed and start + claimed < size:
        raise VolumeError(f"{what}, but {size - start} follow the header: a wrong header", READ_AGAIN)
    if claimed > max_bytes:
        raise VolumeError(f"{what}, more than {max_bytes / 2**30:.3g} GiB", "crop the image, or raise max_bytes")


def _read_exactly(stream: Any, count: int) -> np.ndarray:
    """`count` bytes, and then the end of the stream, where gzip compares checksum and length."""
    raw, done = np.empty(count, np.uint8), 0  # pages become real only as the file fills them
    while got := stream.readinto(raw[done : done + 2**20]):
        done += got
    if done < count:
        raise VolumeError(f"the file ends after {done} of {count} bytes of voxels: truncated", READ_AGAIN)
    if stream.read(1):
        raise VolumeError(f"the file goes on after the {count} bytes that its header claims", READ_AGAIN)
    return raw


def _scaled(data: np.ndarray, slope: float, inter: float) -> np.ndarray:
    """data * slope + inter, computed in float64 slice by slice; without scaling the same numbers, in native order."""
    if (slope, inter) == (1, 0):
        return data if data.dtype.isnative else data.byteswap(inplace=True).view(data.dtype.newbyteorder("="))
    small = data.dtype.itemsize <= 2 or data.dtype.str[1:] == "f4"
    out = np.empty(data.shape, np.float32 if small else np.float64, order="F")
    for index in range(data.shape[2]):
        part = data[:, :, index]
        if data.dtype.itemsize == 8 and data.dtype.kind != "f" and max(int(part.max()), -int(part.min())) > 2**53:
            raise VolumeError("integers beyond 2^53 with a scaling lose digits", "store them without scaling")
        out[:, :, index] = part.astype(np.float64) * slope + inter
    return out


def _fill_nonfinite(data: np.ndarray, fill: float | None = None, *, copy: bool = False) -> tuple[np.ndarray, list[str]]:
    """Replace NaN and infinity, by default by the smallest finite value, in place unless `copy`."""
    if data.dtype.kind != "f":
        return data, []
    bad, low, high = 0, math.inf, -math.inf
    for index in range(data.shape[2]):
        part = data[:, :, index]
        finite = np.isfinite(part)
        values = part if finite.all() else part[finite]
        bad += part.size - values.size
        low, high = min(low, float(values.min(initial=math.inf))), max(high, float(values.max(initial=-math.inf)))
    if low > high:
        raise VolumeError("no voxel has a finite value", READ_AGAIN)
    if max(-low, high) > MAX_VALUE:
        raise VolumeError(f"values from {low:g} to {high:g} are beyond any image", READ_AGAIN)
    if not bad:
        return data, []
    data = data.copy(order="K") if copy else data
    value, told = (low, f"{low:g}, the smallest value") if fill is None else (fill, f"{fill:g}")
    for index in range(data.shape[2]):
        part = data[:, :, index]
        part[~np.isfinite(part)] = value
    return data, [f"{bad} of {data.size} voxels were NaN or infinite and are now {told}"]


# ---- DICOM


def is_dicom(path: Path) -> bool:
    """By the suffix; a name without one, or that is a UID, by the four letters behind the preamble."""
    suffix = path.suffix.lower()
    if suffix in DICOM_SUFFIXES or (suffix and not suffix[1:].isdigit()) or path.name == "DICOMDIR":
        return suffix in DICOM_SUFFIXES
    with suppress(OSError), path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"
    return False


def dicom_files(folder: Path) -> list[Path]:
    """The DICOM files in a folder, by name; not those below it, nor hidden ones."""
    return sorted(path for path in folder.iterdir() if path.name[0] != "." and path.is_file() and is_dicom(path))


@contextmanager
def own_locale() -> Iterator[None]:
    """Keep the process's locale: SimpleITK sets that of C when it opens DICOM, and Python then reads text as ASCII."""
    before = locale.setlocale(locale.LC_ALL)
    try:
        yield
    finally:
        locale.setlocale(locale.LC_ALL, before)


def read_dicom(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> Volume:
    """Read a DICOM series, slope and intercept of each slice applied, its slices in the order of their positions.

    Files beside it that are no slices (segmentations, doses, reports) are left out. A single slice is as thick as it
    says; one that does not say counts as 1 mm, with a note.

    Args:
        path: a folder that holds one series, or a file of the series wanted.
        max_bytes: the most memory that the voxels may take.

    Errors: VolumeError for several series or none; for damaged or missing slices, two at one place, and unevenly spaced
        or sheared ones (gantry tilt); for slices that do not say where they lie, or of different sizes, spacings or
        directions; for colours, several frames a file and MONOCHROME1; and without SimpleITK.
    """
    with _typed("read", Path(path)):
        return _dicom_volume(Path(path), max_bytes)


@own_locale()
def _dicom_volume(path: Path, max_bytes: int) -> Volume:
    if not path.exists():
        raise VolumeError("no such file", "check the path")
    try:
        import SimpleITK as sitk
    except ImportError:
        raise VolumeError("a DICOM series needs SimpleITK", "pip install 'gvsl-zoo[io]'") from None
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    slices, affine, notes = _in_place(_series(sitk, path))
    kinds = {one.kind for one in slices}
    kind = kinds.pop() if len(kinds) == 1 else sitk.sitkFloat64  # ITK would cut every slice to the type of the first
    voxel = sitk.GetArrayViewFromImage(sitk.Image([1, 1], kind)).nbytes
    if (size := math.prod(slices[0].size) * len(slices) * voxel) > max_bytes:
        cause = f"{len(slices)} slices take {size} bytes, more than {max_bytes / 2**30:.3g} GiB"
        raise VolumeError(cause, "choose fewer slices, or raise max_bytes")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(one.path) for one in slices])
    reader.SetOutputPixelType(kind)
    try:
        data, filled = _fill_nonfinite(sitk.GetArrayFromImage(reader.Execute()).T)
    except RuntimeError as error:  # ITK's own: several lines, the cause in the last
        raise VolumeError(str(error).strip().splitlines()[-1], READ_AGAIN) from None
    notes += filled
    _warn(f"{path.name}: {note}" for note in notes)
    return Volume(data, affine, path=path, notes=tuple(notes))


TAGS = {
    "SOPClassUID": "0008|0016",
    "Modality": "0008|0060",
    "SliceThickness": "0018|0050",
    "SpacingBetweenSlices": "0018|0088",
    "SeriesInstanceUID": "0020|000e",
    "ImagePositionPatient": "0020|0032",
    "ImageOrientationPatient": "0020|0037",
    "PhotometricInterpretation": "0028|0004",
    "PixelSpacing": "0028|0030",
}


class _Slice(NamedTuple):
    """A DICOM file and what its header says; `kind` is ITK's voxel type, which follows from slope and intercept."""

    path: Path
    size: tuple[int, ...]
    kind: int
    components: int
    tags: dict[str, str]

    def says(self, keyword: str) -> str:
        """The text of a tag; "" where there is none."""
        return self.tags.get(TAGS[keyword], "").strip()

    def numbers(self, keyword: str, count: int) -> np.ndarray:
        """The numbers of a tag; VolumeError where there are not so many."""
        with suppress(ValueError):
            values = np.array([float(text) for text in self.says(keyword).split("\\")])
            if len(values) == count and np.isfinite(values).all():
                return values
        raise VolumeError(f"{self.path.name} has no {keyword}, or one that is not {count} numbers", TO_NIFTI)


def _series(sitk: Any, path: Path) -> list[_Slice]:
    """The slices of the series that a folder holds or a file belongs to, by name."""
    files = dicom_files(path) if path.is_dir() else sorted({path, *dicom_files(path.parent)})
    header = sitk.ImageFileReader()
    header.SetImageIO("GDCMImageIO")
    found: dict[str, list[_Slice]] = {}
    bad = []
    for file in files:
        header.SetFileName(str(file))
        try:
            header.ReadImageInformation()
        except RuntimeError:
            bad.append(file)
            continue
        tags = {tag: header.GetMetaData(tag) for tag in TAGS.values() if header.HasMetaDataKey(tag)}
        one = _Slice(file, header.GetSize(), header.GetPixelID(), header.GetNumberOfComponents(), tags)
        found.setdefault(one.says("SeriesInstanceUID"), []).append(one)
    series = list(found.values())
    if path.is_dir():
        series = [slices for slices in series if slices[0].says("Modality") in SLICED] or series
    else:
        series = [slices for slices in series if any(one.path == path for one in slices)]
    if len(series) > 1:
        remedy = "give each series a folder of its own, or give one file of the series wanted"
        raise VolumeError(f"{len(series)} DICOM series in one folder", remedy)
    if not series:
        listing = f": {listed([file.name for file in bad])} cannot be read as an image" if bad else ""
        raise VolumeError(f"it holds no DICOM series{listing}", READ_AGAIN if bad else NOT_NIFTI)
    [slices] = series
    if damaged := [file.name for file in bad if _sop_class(file) in ("", slices[0].says("SOPClassUID"))]:
        cause = f"{len(damaged)} of {len(files)} DICOM files are damaged: {listed(damaged)}"
        raise VolumeError(cause, "copy them again")
    return slices


def _sop_class(path: Path) -> str:
    """What a DICOM file says it is (MediaStorageSOPClassUID), even where ITK cannot read it; "" where it does not."""
    with path.open("rb") as file:
        _, found, rest = file.read(1024).partition(b"\x02\x00\x02\x00UI")
    return rest[2 : 2 + int.from_bytes(rest[:2], "little")].strip(b"\0 ").decode("ascii", "replace") if found else ""


def _in_place(slices: list[_Slice]) -> tuple[list[_Slice], np.ndarray, list[str]]:
    """The slices of a series in the order of their places, voxel -> world in RAS+, and notes."""
    for one in slices:
        if one.components != 1 or math.prod(one.size[2:]) != 1:
            raise VolumeError(f"{one.path.name} is not one grey slice", TO_NIFTI)
        if one.says("PhotometricInterpretation") == "MONOCHROME1":
            raise VolumeError(f"{one.path.name} is MONOCHROME1, whose values SimpleITK turns upside down", TO_NIFTI)
    _common(slices, "size", [np.array(one.size[:2]) for one in slices])
    directions, spacing = (
        _common(slices, keyword, [one.numbers(keyword, count) for one in slices])
        for keyword, count in (("ImageOrientationPatient", 6), ("PixelSpacing", 2))
    )
    (row, column), (down, right) = directions.reshape(2, 3), spacing
    normal = np.cross(row, column)
    length = np.linalg.norm(normal)
    if abs(length - 1) > 0.01 or spacing.min() <= 0:
        what = f"ImageOrientationPatient {directions.tolist()} and PixelSpacing {spacing.tolist()}"
        raise VolumeError(f"{slices[0].path.name} has {what}", "give unit vectors at right angles, and millimetres")
    normal /= length
    places = np.array([one.numbers("ImagePositionPatient", 3) for one in slices])
    order = np.argsort(places @ normal, kind="stable")
    slices, places = [slices[k] for k in order], places[order]
    step, notes = _thickness(slices[0]) if len(slices) == 1 else (_step(slices, places, normal), [])
    affine = np.eye(4)
    affine[:3] = np.stack([row * right, column * down, normal * step, places[0]], 1)
    affine[:2] *= -1  # LPS -> RAS
    return slices, _in_reach(affine), notes


def _common(slices: Sequence[_Slice], what: str, values: Sequence[np.ndarray]) -> np.ndarray:
    """What all slices have; VolumeError where one differs."""
    for one, value in zip(slices, values, strict=True):
        if not np.allclose(value, values[0], rtol=0, atol=SAME_GEOMETRY):
            cause = f"{slices[0].path.name} has the {what} {values[0].tolist()}, {one.path.name} {value.tolist()}"
            raise VolumeError(cause, "give the slices that belong together a folder of their own")
    return values[0]


def _thickness(one: _Slice) -> tuple[float, list[str]]:
    """Millimetres that a single slice stands for."""
    for keyword in ("SpacingBetweenSlices", "SliceThickness"):
        with suppress(VolumeError):
            [mm] = one.numbers(keyword, 1)
            if mm > 0:
                return float(mm), []
    return 1.0, ["one slice that does not say how thick it is: 1 mm is assumed"]


def _step(slices: Sequence[_Slice], places: np.ndarray, normal: np.ndarray) -> float:
    """Millimetres between slices, which lie evenly along the normal; places (N, 3) in that order, LPS mm."""
    numbers = np.arange(len(places))[:, None]
    step = float((places[-1] - places[0]) @ normal / (len(places) - 1))
    if np.linalg.norm(places - places[0] - numbers * step * normal, axis=1).max() < SLICE_TOLERANCE * step:
        return step
    along = np.diff(places, axis=0) @ normal
    usual = float(np.median(along))
    close = along.min() <= SLICE_TOLERANCE * usual
    k = int(along.argmin() if close else np.abs(along - usual).argmax())
    pair = f"{slices[k].path.name} and {slices[k + 1].path.name}"
    if close:
        cause = f"{pair} lie at one place, {along[k]:.3g} mm apart"
        raise VolumeError(cause, f"keep one of two copies or time points, or {TO_NIFTI}")
    aside = float(np.linalg.norm(places[-1] - places[0] - along.sum() * normal))
    if aside > SLICE_TOLERANCE * step:
        degrees = math.degrees(math.atan2(aside, along.sum()))
        raise VolumeError(f"the slices are sheared by {degrees:.3g} degrees (gantry tilt)", TO_NIFTI)
    cause = f"the slices are unevenly spaced: {pair} lie {along[k]:.4g} mm apart, others {usual:.4g} mm"
    raise VolumeError(cause, f"add what is missing, or {TO_NIFTI}")


# ---- the way out


def write_volume(volume: Volume, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write a .nii or .nii.gz file: all of it or nothing (temporary file beside it, fsync, rename).

    Errors: VolumeError when the file exists (without `overwrite`) or is the one `volume` was read from, when the folder
    does not exist, for a voxel type that NIfTI has not, and when the disk is full; then nothing is left behind.
    """
    path = Path(path)
    check_output(path, volume.path, overwrite)
    with _typed("write", path):
        if not path.name.endswith((".nii", ".nii.gz")):
            raise VolumeError("the name does not end in .nii or .nii.gz", "choose such a name")
        data, header, extensions = _encoded(volume)
        with nifti_stream(path) as stream:
            stream.write(header.binaryblock + extensions)
            for index in np.ndindex(*data.T.shape[:-2]):  # a mapped volume is never whole in memory
                stream.write(data.T[index].astype(header.get_data_dtype(), copy=False).tobytes())


@contextmanager
def nifti_stream(path: Path) -> Iterator[Any]:
    """A .nii or .nii.gz file to write to, whole or not at all; what is written is packed where the name says so."""
    with whole_file(path) as file:
        if path.suffix != ".gz":
            yield file
            return
        with _Gzip("", "wb", 1, file, mtime=0) as stream:
            yield stream


def check_output(path: Path, source: Path | None, overwrite: bool) -> None:
    """Refuse an output that could not be written, would replace a file unasked, or is the input itself.

    Errors: VolumeError. Called before long work, and by `write_volume`.
    """
    with _typed("write", path):
        if not path.parent.is_dir():
            raise VolumeError(f"the folder {str(path.parent)!r} does not exist", "make it first")
        if not os.access(path.parent, os.W_OK):
            raise VolumeError(f"the folder {str(path.parent)!r} may not be written to", "choose another folder")
        if path.exists():
            if source is not None and source.exists() and path.samefile(source):
                raise VolumeError("it is the input itself", "choose another output name")
            if not overwrite or not path.is_file():
                raise VolumeError("it exists already", "choose another name, or pass overwrite=True (--overwrite)")


def check_outputs(outputs: Iterable[Path | None], inputs: Iterable[Path | None], overwrite: bool) -> None:
    """Refuse outputs as `check_output` does, each against every input, and two that are one file; None is no file.

    Errors: VolumeError; ArgumentError for two outputs of one name.
    """
    sources = [path for path in inputs if path]
    places: set[Path] = set()
    for path in filter(None, outputs):
        for source in sources:
            check_output(path, source, overwrite=True)  # an input is called one even where nothing is to be replaced
        check_output(path, None, overwrite)
        if (place := path.resolve()) in places:
            raise ArgumentError(f"two outputs are {str(path)!r}", "give each its own name")
        places.add(place)


def _encoded(volume: Volume) -> tuple[np.ndarray, Any, bytes]:
    """Voxels in a type that NIfTI has, the little-endian single-file header that describes them, and its extensions."""
    data, header = volume.data, volume.header
    if data.dtype.kind == "b" or data.dtype == np.float16:
        data = data.astype(np.uint8 if data.dtype.kind == "b" else np.float32)
    if data.dtype.kind not in "iuf" or data.dtype.itemsize > 8:
        raise VolumeError(f"NIfTI has no place for {data.dtype} voxels", "convert them to an integer or float type")
    millimetres = header is not None and _MM_PER_UNIT.get(int(header["xyzt_units"]) & 7) == 1
    header = nib.Nifti1Header() if header is None else header.as_byteswapped("<")
    header.set_data_dtype(data.dtype)
    header.set_data_shape(data.shape)
    header["pixdim"][4:] = 1  # channels, not time
    text = volume.comment.encode()
    length = -(-(8 + len(text)) // 16) * 16 if text else 0  # the standard wants multiples of 16
    extensions = b"\0\0\0\0"
    if text:
        extensions = b"\1\0\0\0" + struct.pack("<ii", length, COMMENT) + text.ljust(length - 8, b"\0")
    header["vox_offset"], header["magic"] = header.single_vox_offset + length, header.single_magic
    header.set_slope_inter(1, 0)
    if not millimetres:
        header.set_xyzt_units("mm")
    if not millimetres or not np.allclose(header.get_best_affine(), volume.affine, rtol=1e-6, atol=1e-5):
        code = max(int(header["sform_code"]), int(header["qform_code"])) or 2  # 2: aligned to something else
        header.set_qform(volume.affine, code=code)
        header.set_sform(volume.affine, code=code)
    return data, header, extensions


# ---- between a file's grid and a model's


@dataclass(frozen=True)
class Preprocessing:
    """What a model expects of its input.

    Args:
        spacing_mm: voxel spacing (z, y, x); None keeps the scan's own.
        orientation: only "RAS": x to the right, y to the front, z to the head.
        unit: "HU" (CT) or "arbitrary" (MR: negative values become 0).
        window: (low, high) in `unit`, clipped to; an end that is None is the scan's own extreme.
            None is (-1024, 1024) for HU and (None, None), min-max, for arbitrary units.
        scale: what low and high become.
    """

    spacing_mm: tuple[float, float, float] | None = None
    orientation: str = "RAS"
    unit: str = "HU"
    window: tuple[float | None, float | None] | None = None
    scale: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.window is None:
            object.__setattr__(self, "window", CT_WINDOW_HU if self.unit == "HU" else (None, None))
        spacing, window = self.spacing_mm, self.window or (None, None)
        if spacing is not None and (len(spacing) != 3 or not all(0 < s < math.inf for s in spacing)):
            raise ArgumentError(f"spacing_mm {spacing}", "give three positive millimetres (z, y, x), or None")
        if self.orientation != "RAS":
            raise ArgumentError(f"orientation {self.orientation!r}", "only 'RAS' is supported")
        if self.unit not in ("HU", "arbitrary"):
            raise ArgumentError(f"unit {self.unit!r}", "give 'HU' or 'arbitrary'")
        for low, high in (window, self.scale):
            if low is not None and high is not None and not -math.inf < low < high < math.inf:
                raise ArgumentError(f"window {window} and scale {self.scale}", "give finite (low, high), low < high")


@dataclass(frozen=True, eq=False)
class Prepared:
    """A volume as a model wants it, and the way back.

    Args:
        image: (1, 1, D, H, W) float32, canonical RAS+ axes as (z, y, x), windowed and scaled (to [0, 1] by default).
        affine: (4, 4) float64, tensor index (z, y, x) -> world (x, y, z) in RAS+ millimetres: `affine @ (z, y, x, 1)`.
        source: the volume given.
        warnings: the source's notes and what looks unlike the model's input, with numbers.
    """

    image: torch.Tensor
    affine: np.ndarray
    source: Volume
    warnings: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(D, H, W) of the canonical grid."""
        D, H, W = self.image.shape[2:]
        return D, H, W

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Millimetres between voxels along (z, y, x)."""
        z, y, x = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return z, y, x

    def bring_labels(self, labels: np.ndarray, count: int) -> np.ndarray:
        """Bring labels from the source's own grid onto the canonical one: in every voxel the one that fills most of it.

        Shares are what `prepare` would make of each label's mask; only the box that holds a label is looked at.

        Args:
            labels: (i, j, k) whole numbers from 0 to `count` - 1.

        Returns: (D, H, W), of the same type; of equal shares the smallest label.
        """
        order, flips = self._way_back()
        source = labels.transpose(order)[flips]
        weights = [
            _interpolate(np.eye(n, dtype=np.float32)[None], (new, n))[0]
            for n, new in zip(source.shape, self.shape, strict=True)
        ]
        most, found = np.zeros(self.shape, np.float32), np.zeros(self.shape, labels.dtype)
        for label, box in enumerate(_boxes(source, count)):
            if box is None:
                continue
            inner = [own[:, part] for own, part in zip(weights, box, strict=True)]
            rows = [np.flatnonzero(own.any(1)) for own in inner]
            out = tuple(slice(row[0], row[-1] + 1) for row in rows)
            mask = source[box] == label
            if mask.size > source.size / 4:  # then these products cost more than all of the volume at once
                share = _resample(source == label, self.shape)[out]
            else:
                z, y, x = (own[part] for own, part in zip(inner, out, strict=True))
                share = np.tensordot(z, y @ (mask.astype(np.float32) @ x.T), 1)
            wins = share > most[out]
            found[out][wins] = label
            np.maximum(most[out], share, out=most[out])
        return found

    def restore(self, array: torch.Tensor | np.ndarray, *, nearest: bool = False) -> Volume:
        """Bring an array from the canonical grid onto the source's own grid: its axes, shape, affine and header.

        Args:
            array: (D, H, W) or (C, D, H, W), any device; (1, C, D, H, W) is taken as (C, D, H, W).
            nearest: take the nearest voxel and keep the type (labels); otherwise interpolate linearly to float32.

        Errors: ArgumentError for another shape, or for integers without `nearest`.
        """
        array = self._on_grid(array)
        if not nearest and array.dtype.kind != "f":
            raise ArgumentError(f"labels ({array.dtype}) cannot be interpolated", "pass nearest=True, or a float array")
        order, flips = self._way_back()
        size = tuple(self.source.shape[axis] for axis in order)
        channels = array if array.ndim == 4 else array[None]
        out = np.empty((*self.source.shape, len(channels)), array.dtype if nearest else np.float32, order="F")
        for index, channel in enumerate(channels):
            target = out[..., index].transpose(order)[flips]  # (z, y, x) view of the file's own axes
            target[...] = _nearest(channel, size) if nearest else _resample(channel, size)
        return self._volume(out if array.ndim == 4 else out[..., 0], self.source.affine)

    def restore_labels(self, slabs: Iterable[tuple[int, torch.Tensor]], values: Sequence[int]) -> Volume:
        """Bring class scores onto the source's own grid slab by slab, linearly, and keep the class that wins there.

        The same as `restore` of all scores and then the argmax, in the memory of one slab.

        Args:
            slabs: (first index along z, scores (K, depth, H, W)) on the canonical grid, in order and without gaps.
            values: of the K classes in the label map; the first wins a tie.

        Returns: labels, uint8, or uint16 when a value is above 255.
        Errors: ArgumentError for another number of classes, or values that no label map holds.
        """
        if min(values) < 0 or max(values) > np.iinfo(np.uint16).max or len(set(values)) < len(values):
            raise ArgumentError(f"label values {listed([str(v) for v in values])}", "give different ones, 0 to 65535")
        own_values = np.array(values, np.uint8 if max(values) < 256 else np.uint16)
        order, flips = self._way_back()
        size = tuple(self.source.shape[axis] for axis in order)
        out = np.empty(self.source.shape, own_values.dtype, order="F")
        target = out.transpose(order)[flips]  # (z, y, x) view of the file's own axes
        along_z = _interpolate(np.eye(self.shape[0], dtype=np.float32)[None], (size[0], self.shape[0]))[0]
        first = (along_z != 0).argmax(1)  # of the slices that a slice of the source is made of
        stop = self.shape[0] - (along_z[:, ::-1] != 0).argmax(1)
        step = max(1, MAX_SCORES // (len(values) * max(size[1] * size[2], self.shape[1] * self.shape[2])))
        held, held_from, done = torch.empty(0), 0, 0
        for start, slab in _parts(slabs, step):
            if len(slab) != len(values):
                raise ArgumentError(f"scores of {len(slab)} classes for {len(values)} labels", "give a label a class")
            needed = first[min(done, len(first) - 1)]
            kept = held[:, needed - held_from :] if start else slab[:, :0]
            held, held_from = torch.cat([kept, slab], 1), start - kept.shape[1]
            ready = int(np.searchsorted(stop, start + slab.shape[1], "right"))
            for low in range(done, ready, step):
                high = min(low + step, ready)
                inside = slice(first[low] - held_from, stop[high - 1] - held_from)
                weights = torch.from_numpy(along_z[low:high, first[low] : stop[high - 1]]).to(held.device)
                scores = (weights @ held[:, inside].flatten(2)).view(-1, *self.shape[1:])  # (K * slices, H, W)
                full = _interpolated(scores, size[1:]).view(len(values), -1, *size[1:])
                target[low:high] = own_values[full.max(0).indices.cpu().numpy()]  # argmax is 50 times slower
            done = ready
        return self._volume(out, self.source.affine)

    def place(self, array: torch.Tensor | np.ndarray) -> Volume:
        """The same array as a Volume on the canonical grid itself, axes (x, y, z): nothing is resampled."""
        array = self._on_grid(array)
        array = np.moveaxis(array, 0, -1).transpose(2, 1, 0, 3) if array.ndim == 4 else array.transpose(2, 1, 0)
        return self._volume(array, self.affine[:, [2, 1, 0, 3]])

    def _on_grid(self, array: torch.Tensor | np.ndarray) -> np.ndarray:
        if isinstance(array, torch.Tensor):
            array = array.detach().cpu()
            array = (array.float() if array.dtype == torch.bfloat16 else array).numpy()
        array = array[0] if array.ndim == 5 and len(array) == 1 else array
        if array.ndim not in (3, 4) or array.shape[-3:] != self.shape:
            D, H, W = self.shape
            raise ArgumentError(f"an array of shape {array.shape}", f"expected ({D}, {H}, {W}) or (C, {D}, {H}, {W})")
        return array

    def _way_back(self) -> tuple[tuple[int, int, int], tuple[slice, slice, slice]]:
        """The source's axes that z, y, x of the image run along, and the slices that turn them."""
        to_source = np.linalg.inv(self.source.affine)[:3, :3] @ self.affine[:3, :3]
        z, y, x = (int(axis) for axis in np.abs(to_source).argmax(0))
        i, j, k = (slice(None, None, int(np.sign(to_source[own, n]))) for n, own in enumerate((z, y, x)))
        return (z, y, x), (i, j, k)

    def _volume(self, data: np.ndarray, affine: np.ndarray) -> Volume:
        return replace(self.source.carrying(data), affine=affine)


def prepare(volume: Volume, preprocessing: Preprocessing, *, max_bytes: int = MAX_BYTES) -> Prepared:
    """Bring a volume onto the canonical grid at the model's spacing, windowed and scaled.

    An axis of n voxels becomes max(1, round(n * spacing / target)) voxels over exactly the same millimetres; one whose
    number stays is untouched bit for bit. What looks unlike the model's input is in `Prepared.warnings`, and is warned
    about (InputWarning).

    Errors: VolumeError for several channels, or when the result would take more than `max_bytes`.
    """
    if volume.data.ndim != 3:
        raise VolumeError(f"{volume.data.shape[3]} channels", "prepare one at a time")
    data, filled = _fill_nonfinite(volume.data, copy=True)
    order, flips = _canonical(volume.affine)
    source = data.transpose(order)[flips]  # (z, y, x), a view
    spacing = [volume.spacing_mm[axis] for axis in order]
    wanted = preprocessing.spacing_mm or spacing
    size = tuple(max(1, round(n * own / new)) for n, own, new in zip(source.shape, spacing, wanted, strict=True))
    if 4 * math.prod(size) > max_bytes:
        cause = f"{_numbers(spacing)} resampled to {_numbers(wanted)} takes {4 * math.prod(size) / 2**30:.3g} GiB"
        raise VolumeError(cause, "check the header's spacing, crop the image, or raise max_bytes")
    extremes = float(data.min()), float(data.max())
    found = filled + _doubts(data, extremes, preprocessing)
    _warn(f"{volume.path.name}: {text}" if volume.path else text for text in found)
    image = torch.from_numpy(_resample(source, size))
    _to_scale(image, extremes, preprocessing)
    return Prepared(image[None, None], _canonical_affine(volume, order, flips, size), volume, (*volume.notes, *found))


def canonical_view(volume: Volume) -> tuple[np.ndarray, tuple[float, float, float]]:
    """The voxels as (z, y, x), or (z, y, x, C), in RAS+ directions, a view of the same memory, and their spacing in mm
    along z, y, x.
    """
    order, flips = _canonical(volume.affine)
    z, y, x = (volume.spacing_mm[axis] for axis in order)
    return volume.data.transpose(*order, *range(3, volume.data.ndim))[flips], (z, y, x)


def _canonical(affine: np.ndarray) -> tuple[tuple[int, int, int], tuple[slice, slice, slice]]:
    """The file's axes that run nearest to z, y, x, and the slices that turn them to RAS+."""
    axes = nib.orientations.io_orientation(affine)  # a row an own axis: the world axis nearest to it, +-1
    own = {int(world): index for index, (world, _) in enumerate(axes)}
    z, y, x = own[2], own[1], own[0]
    i, j, k = (slice(None, None, int(axes[axis, 1])) for axis in (z, y, x))
    return (z, y, x), (i, j, k)


def _canonical_affine(volume: Volume, order: Sequence[int], flips: Sequence[slice], size: Sequence[int]) -> np.ndarray:
    """Tensor index (z, y, x) -> world; the source's index is (index + 1/2) * ratio - 1/2, from the turned end."""
    own = np.zeros((4, 4))  # tensor index -> the file's own voxel index
    own[3, 3] = 1
    for axis, (n_out, from_axis, turn) in enumerate(zip(size, order, flips, strict=True)):
        n_in = volume.shape[from_axis]
        ratio, start = n_in / n_out, (n_in / n_out - 1) / 2
        own[from_axis, axis] = turn.step * ratio
        own[from_axis, 3] = start if turn.step > 0 else n_in - 1 - start
    return volume.affine @ own


def _resample(source: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Linear interpolation, (D, H, W) of any type -> float32 of `size`, a copy.

    Where an axis gets coarser, a triangle filter as wide as an output voxel; the weights inside the image sum to 1.
    x and y first, in slabs of z, so that only slabs of a mapped or integer source become float32 at its own resolution.
    """
    D, H, W = source.shape
    plane = np.empty((D, size[1], size[2]), np.float32)
    step = max(1, 2**22 // (H * W))  # small slabs cost more in threads than they save
    for start in range(0, D, step):
        plane[start : start + step] = _interpolate(
            np.array(source[start : start + step], np.float32, order="C"), size[1:]
        )
    return _interpolate(plane.reshape(1, D, -1), (size[0], size[1] * size[2])).reshape(tuple(size))


def _boxes(labels: np.ndarray, count: int) -> list[tuple[slice, slice, slice] | None]:
    """The smallest box that holds each label from 0 to `count` - 1 in (D, H, W); None of one that does not occur."""
    seen = [np.zeros((size, count), bool) for size in labels.shape]
    firsts = [count * np.arange(size) for size in labels.shape]
    for index, part in enumerate(labels):
        held = np.bincount((part + firsts[1][:, None]).ravel(), minlength=seen[1].size).reshape(-1, count) > 0
        seen[0][index] = held.any(0)
        seen[1] |= held
        seen[2] |= np.bincount((part + firsts[2]).ravel(), minlength=seen[2].size).reshape(-1, count) > 0
    boxes: list[tuple[slice, slice, slice] | None] = []
    for label in range(count):
        z, y, x = (np.flatnonzero(own[:, label]) for own in seen)
        box = (slice(z[0], z[-1] + 1), slice(y[0], y[-1] + 1), slice(x[0], x[-1] + 1)) if len(z) else None
        boxes.append(box)
    return boxes


def _parts(slabs: Iterable[tuple[int, torch.Tensor]], depth: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Slabs (first index, (K, depth, H, W)) cut into thinner ones."""
    for start, slab in slabs:
        for part in slab.split(depth, 1):
            yield start, part
            start += part.shape[1]


def _interpolate(planes: np.ndarray, size: Sequence[int]) -> np.ndarray:
    return _interpolated(torch.from_numpy(planes), size).numpy()


def _interpolated(planes: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Planes of float32, (N, H, W) -> (N, *size); those that keep their size are handed through."""
    if planes.shape[1:] == tuple(size):
        return planes
    if planes.shape[2] == size[1] == 1:  # which PyTorch's kernel repeats its first row in
        return _interpolated(planes.transpose(1, 2).contiguous(), (1, size[0])).transpose(1, 2)
    return F.interpolate(planes[None], tuple(size), mode="bilinear", antialias=True)[0]


def _nearest(source: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """The nearest voxel, (D, H, W) -> `size`, in the same type; in integers, so that ties never depend on rounding."""
    for axis in (2, 1, 0):  # the costly gather along x while the array is small
        n, new = source.shape[axis], size[axis]
        source = source if n == new else source.take((2 * np.arange(new) + 1) * n // (2 * new), axis)
    return source


def _to_scale(image: torch.Tensor, extremes: tuple[float, float], preprocessing: Preprocessing) -> None:
    """Clip to the window and map it onto the scale, in place; a constant image becomes the scale's lower end.

    The extremes are the source's: resampling would blur them, and make a range out of rounding errors.
    """
    floor = 0.0 if preprocessing.unit == "arbitrary" else -math.inf
    low, high = (
        max(floor, extreme) if end is None else end
        for end, extreme in zip(preprocessing.window or (None, None), extremes, strict=True)
    )
    if high > low:
        image.clamp_(low, high).sub_(low).div_(high - low)
    else:
        image.zero_()
    if preprocessing.scale != (0.0, 1.0):
        bottom, top = preprocessing.scale
        image.mul_(top - bottom).add_(bottom)


def _doubts(data: np.ndarray, extremes: tuple[float, float], preprocessing: Preprocessing) -> list[str]:
    """What does not look like the unit and window expected, with the numbers and a way out."""
    low, high = extremes
    _, top = preprocessing.window or (None, None)
    if low == high:
        return [f"every voxel is {low:g}: an empty image"]
    span = f"values span {low:g} to {high:g}"
    thin = data[tuple(slice(None, None, max(1, n // 64)) for n in data.shape)]
    dark = 100 * float((thin < -200).mean())
    scaled = max(-low, high) <= 1
    if preprocessing.unit == "arbitrary":
        if scaled and top is not None and top > 1:
            return [f"expected values up to {top:g}, but {span}: already scaled? Give the original"]
        return [f"expected MR, but {span} and {dark:.0f} % lie below -200: CT in HU?"] if dark > 1 else []
    if scaled:
        return [f"expected HU, but {span}: already scaled? Give the original scan"]
    if low >= 0 and high <= 255:
        return [f"expected HU, but {span}: an 8-bit picture, or MR? Give the original scan, or choose a model for MR"]
    if low >= 0:
        return [f"expected HU, but {span}: shifted by 1024 (then subtract it), or MR (then choose a model for MR)?"]
    if low > -200 or dark == 0:
        return [f"expected HU, but {span} with next to nothing below -200 (air): MR, or already windowed?"]
    return []


# ---- errors and warnings


@contextmanager
def _typed(action: str, path: Path) -> Iterator[None]:
    """Every failure that a file can cause becomes a VolumeError that names the file."""
    what = f"cannot {action} {str(path)!r}"
    try:
        yield
    except VolumeError as error:
        raise VolumeError(f"{what}: {error.cause}", error.remedy) from error.__cause__
    except _GZIP_ERRORS as error:
        raise VolumeError(f"{what}: the gzip stream is damaged ({error})", READ_AGAIN) from error
    except MemoryError as error:
        raise VolumeError(f"{what}: not enough memory", "crop the image or free memory") from error
    except OSError as error:
        cause = f"{what}: {error.strerror or error}"
        raise VolumeError(cause, "check the path, the permissions and the free space") from error
    except (HeaderDataError, ValueError, TypeError, ArithmeticError, KeyError) as error:
        raise VolumeError(f"{what}: {error}", NOT_NIFTI if action == "read" else "") from error


def _numbers(values: Iterable[float]) -> str:
    return " x ".join(f"{float(v):.4g}" for v in values) + " mm"


def _warn(messages: Iterable[str]) -> None:
    for message in messages:
        warnings.warn(message, InputWarning, stacklevel=3)
