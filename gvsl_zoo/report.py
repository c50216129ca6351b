"""Pictures of scans, features and matches: PNG files 1920 pixels wide; matplotlib is imported only to draw one."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import ArgumentError, GvslZooError
from .volume import Prepared
from .weights import write_whole

WIDTH, DPI = 12.8, 150  # inches; 1920 pixels
MARGIN, GAP, TITLE, HEADING, CAPTION, BAR = 0.3, 0.1, 0.4, 0.42, 0.26, 0.62  # inches
LONGEST_TITLE = 80  # letters
TALLEST = 7.0  # inches of one row: a whole-body scan stays on a screen
INK, FAINT = "#1b2733", "#5d6b78"
PLANES = ("axial", "coronal", "sagittal")
# Canonical arrays (z, y, x) grow to the head, the front and the patient's right. Radiological convention: seen from
# the feet and from the front, so that the patient's right is on the left of the picture; sagittal with the front left.
LETTERS = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI"}  # at left, right, top, bottom


@dataclass(frozen=True)
class Panel:
    """One picture of a row.

    pixels: (rows, columns) or (rows, columns, 3) in [0, 1]; spacing_mm: of rows and columns; limits: black and white.
    letters: at left, right, top, bottom, or none. bar: what the colours mean, beside a colour bar, or none.
    """

    pixels: np.ndarray
    spacing_mm: tuple[float, float]
    caption: str
    limits: tuple[float, float] = (0.0, 1.0)
    letters: str = ""
    colours: str = "gray"
    bar: str = ""
    scale: bool = False

    @property
    def size_mm(self) -> tuple[float, float]:
        return self.pixels.shape[0] * self.spacing_mm[0], self.pixels.shape[1] * self.spacing_mm[1]


@dataclass(frozen=True)
class Row:
    """Panels at one scale of millimetres, under a heading and a line that explains it."""

    heading: str
    note: str
    panels: Sequence[Panel]


def features_picture(prepared: Prepared, components: Tensor, path: str | os.PathLike[str], *, title: str = "") -> None:
    """A scan in three orthogonal planes and, below, its first three feature components as red, green and blue.

    Args:
        prepared: the scan on the model's grid.
        components: (3, D, H, W) in [0, 1] on that grid, from `principal_components`.
        path: the PNG file; written whole or not at all, replaced if it is there.

    Errors: ArgumentError for components on another grid; GvslZooError when matplotlib is missing or the file cannot be
        written.
    """
    draw(scan_rows(prepared, components), title or "Dense features of a scan", path)


def scan_rows(prepared: Prepared, components: Tensor) -> list[Row]:
    """Two rows: the scan, and its feature components."""
    if components.shape != (3, *prepared.shape):
        raise ArgumentError(f"components of shape {tuple(components.shape)}", f"expected {(3, *prepared.shape)}")
    image = prepared.image[0, 0]
    limits, planes, colours = display_range(image), [], []
    for axis, (name, index) in enumerate(zip(PLANES, middle(image), strict=True)):
        caption = f"{name}, slice {index + 1} of {image.shape[axis]}"
        planes.append(_panel(image, name, index, prepared.spacing_mm, caption, limits, scale=not axis))
        colours.append(_panel(components, name, index, prepared.spacing_mm, f"components, {name}"))
    spacing, shape = (" × ".join(f"{n:.3g}" for n in reversed(v)) for v in (prepared.spacing_mm, prepared.shape))
    return [
        Row("Scan", f"{shape} voxels (x, y, z) of {spacing} mm; patient's right on the left", planes),
        Row("Features", "first three principal components as red, green and blue (air left out)", colours),
    ]


def restoration_row(images: Mapping[str, Tensor], spacing_mm: Sequence[float], note: str) -> Row:
    """Middle axial slices and errors of the images "original", "damaged", "restored", each (D, H, W) in [0, 1]."""
    index = images["original"].shape[0] // 2
    panels = [
        _panel(images[name], "axial", index, spacing_mm, name, scale=name == "original")
        for name in ("original", "damaged", "restored")
    ]
    for name in ("damaged", "restored"):
        error = (images[name] - images["original"]).abs()
        bar = "" if name == "damaged" else "share of the range"
        caption = f"|{name} − original|"
        panels.append(_panel(error, "axial", index, spacing_mm, caption, (0, 0.5), colours="inferno", bar=bar))
    return Row("Restoration", note, panels)


def matching_row(images: Mapping[str, Tensor], spacing_mm: Sequence[float], note: str) -> Row:
    """Coronal slices of "fixed", "moving", "warped", each (D, H, W), and of "displacement", (3, D, H, W) in voxels."""
    fixed, moving, warped = (images[name] for name in ("fixed", "moving", "warped"))
    index, limits = middle(fixed)[1], display_range(fixed)
    panels = [
        _panel(image, "coronal", index, spacing_mm, caption, limits, scale=caption == "fixed")
        for image, caption in ((fixed, "fixed"), (moving, "moving"), (warped, "moving, warped"))
    ]
    for image, when, bar in ((moving, "before", ""), (warped, "after", "share of the range")):
        caption = f"difference {when}"
        panels.append(
            _panel(image - fixed, "coronal", index, spacing_mm, caption, (-0.5, 0.5), colours="RdBu_r", bar=bar)
        )
    length = (images["displacement"] * torch.tensor(spacing_mm).view(3, 1, 1, 1)).norm(dim=0)
    top = max(1.0, float(length.max()))
    panels.append(_panel(length, "coronal", index, spacing_mm, "displacement", (0, top), colours="viridis", bar="mm"))
    return Row("Matching", note, panels)


def middle(image: Tensor) -> tuple[int, int, int]:
    """(z, y, x) of the middle of the box around what is not air in (D, H, W): above 5 % of the range."""
    inside = image >= image.min() + 0.05 * (image.max() - image.min())
    z, y, x = ((int(where.min()) + int(where.max())) // 2 for where in inside.nonzero().unbind(1))
    return z, y, x


def display_range(image: Tensor) -> tuple[float, float]:
    """Black and white of a picture: 1st and 99.5th percentile of about a million voxels."""
    flat = image.flatten().float()
    low, high = torch.quantile(flat[:: -(-len(flat) // 10**6)], torch.tensor([0.01, 0.995])).tolist()
    return (low, high) if high > low else (low, low + 1)


def plane(array: Tensor, name: str, index: int) -> np.ndarray:
    """One plane of (D, H, W) or (3, D, H, W) as a radiologist looks at it, (rows, columns) or (rows, columns, 3)."""
    cut = array.select(PLANES.index(name) - 3, index).flip(-2, -1).float().cpu().numpy()
    return cut if cut.ndim == 2 else np.moveaxis(cut, 0, -1)


def _panel(
    array: Tensor,
    name: str,
    index: int,
    spacing_mm: Sequence[float],
    caption: str,
    limits: tuple[float, float] = (0.0, 1.0),
    **style: Any,
) -> Panel:
    row, column = (s for axis, s in enumerate(spacing_mm) if axis != PLANES.index(name))
    return Panel(plane(array, name, index), (row, column), caption, limits, LETTERS[name], **style)


def draw(rows: Sequence[Row], title: str, path: str | os.PathLike[str]) -> None:
    """Lay the rows out on one page, each panel in true proportions, and write it as a PNG file."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise GvslZooError("pictures need matplotlib", 'pip install "gvsl-zoo[viz]"') from error
    scales = []  # inches a millimetre
    for row in rows:
        bars = sum(BAR for panel in row.panels if panel.bar)
        room = WIDTH - 2 * MARGIN - GAP * (len(row.panels) - 1) - bars
        wide, high = sum(p.size_mm[1] for p in row.panels), max(p.size_mm[0] for p in row.panels)
        scales.append(min(room / wide, TALLEST / high))
    heights = [s * max(p.size_mm[0] for p in row.panels) for s, row in zip(scales, rows, strict=True)]
    page = 2 * MARGIN + TITLE + sum(heights) + len(rows) * (HEADING + CAPTION)

    figure = Figure((WIDTH, page), dpi=DPI, facecolor="white")
    renderer = FigureCanvasAgg(figure).get_renderer()

    def write(x: float, y: float, text: str, size: float, color: str = INK, **style: Any) -> Any:
        """Text hung at (x, y) inches from the page's lower left corner; a dollar sign is no formula."""
        return figure.text(x / WIDTH, y / page, text, size=size, color=color, va="top", parse_math=False, **style)

    title = title if len(title) <= LONGEST_TITLE else title[: LONGEST_TITLE - 1] + "…"
    write(MARGIN, page - MARGIN, title, 17, weight="bold")
    top = page - MARGIN - TITLE
    for row, scale, height in zip(rows, scales, heights, strict=True):
        heading = write(MARGIN, top - 0.1, row.heading, 12, weight="bold")
        write(heading.get_window_extent(renderer).x1 / DPI + 0.15, top - 0.125, row.note, 10, FAINT)
        top -= HEADING
        left = MARGIN
        for panel in row.panels:
            high, wide = (scale * n for n in panel.size_mm)
            bottom = top - (height + high) / 2
            axes = figure.add_axes((left / WIDTH, bottom / page, wide / WIDTH, high / page))
            picture = _show(axes, panel, wide)
            line = bottom if high < height / 2 else top - height  # captions of a row on one line, but for slabs
            write(left + wide / 2, line - 0.05, panel.caption, 9, ha="center")
            left += wide + GAP
            if panel.bar:
                bar = figure.add_axes(((left - 0.02) / WIDTH, bottom / page, 0.1 / WIDTH, high / page))
                figure.colorbar(picture, cax=bar)
                bar.tick_params(labelsize=7, colors=FAINT, length=2, pad=1.5)
                bar.set_ylabel(panel.bar, size=7.5, color=FAINT, labelpad=1)
                bar.spines["outline"].set_visible(False)
                left += BAR
        top -= height + CAPTION
    _save(figure, Path(path))


def curves_picture(log: Sequence[Mapping[str, float]], path: str | os.PathLike[str], *, title: str = "") -> None:
    """Learning curves of a run: the terms of the loss, matching before and after, and what the terms hide.

    Args: log: the run's records, in order.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise GvslZooError("pictures need matplotlib", 'pip install "gvsl-zoo[viz]"') from error
    figure = Figure((WIDTH, 4.4), dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title or "A pre-training run", size=15, weight="bold", color=INK)
    left, middle, right = figure.subplots(1, 3)
    terms = [key for key in log[0] if key not in ("step", "gradient", "seconds") and key in log[-1]]
    window = max(1, len(log) // 100)
    for term in terms:
        values = np.convolve([record[term] for record in log], np.ones(window) / window, "valid")
        left.plot([record["step"] for record in log[window - 1 :]], values, label=term, lw=1.4)
    left.set(title=f"loss, mean of {window} steps", yscale="log")
    checks = [record for record in log if "ncc_after" in record]
    steps = [record["step"] for record in checks]
    for axes, names, what in (
        (middle, ("ncc_before", "ncc_after", "dice_before", "dice_affine", "dice_after"), "matching held-out pairs"),
        (right, ("affine_sd", "bottleneck_sd", "folded"), "signs of life, and folding"),
    ):
        for name in names:
            style = "--" if name.endswith("before") else "-"
            axes.plot(
                steps, [record[name] for record in checks], style, marker=".", label=name.replace("_", " "), lw=1.4
            )
        axes.set(title=what)
    for axes in (left, middle, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, framealpha=0.8, edgecolor="none")
    _save(figure, Path(path))


def _show(axes: Any, panel: Panel, inches: float) -> Any:
    """The picture, its orientation letters and, where asked for, a scale bar."""
    from matplotlib.patheffects import withStroke

    high, wide = panel.size_mm
    picture = axes.imshow(
        panel.pixels,
        cmap=panel.colours,
        vmin=panel.limits[0],
        vmax=panel.limits[1],
        extent=(0, wide, 0, high),
        interpolation="bicubic" if panel.colours == "gray" else "nearest",  # colour maps show the voxels
        aspect="auto",  # the axes have the true proportions already
    )
    axes.set_axis_off()
    outline = [withStroke(linewidth=2, foreground="black")]
    style = {"size": 9, "weight": "bold", "color": "white", "path_effects": outline, "transform": axes.transAxes}
    pad = 0.07 / inches
    tall = pad * wide / high
    if panel.letters:
        left, right, top, bottom = tuple(panel.letters)
        axes.text(pad, 0.5, left, ha="left", va="center", **style)
        axes.text(1 - pad, 0.5, right, ha="right", va="center", **style)
        if high / wide * inches > 0.7:  # in a thin slab they would collide
            axes.text(0.5, 1 - tall, top, ha="center", va="top", **style)
            axes.text(0.5, tall, bottom, ha="center", va="bottom", **style)
    lengths = [n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500) if n <= wide / 3]
    if panel.scale and lengths:
        ends, level = (0.05 * wide, 0.05 * wide + lengths[-1]), 0.04 * high
        axes.plot(ends, (level, level), color="white", lw=2.5, path_effects=outline, solid_capstyle="butt")
        axes.text(0.05, 0.065, f"{lengths[-1]} mm", ha="left", va="bottom", **style)
        axes.set(xlim=(0, wide), ylim=(0, high))
    return picture


def _save(figure: Any, path: Path) -> None:
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})  # the same picture is the same bytes
    try:
        write_whole(path, content.getvalue())
    except OSError as error:
        cause = f"cannot write {str(path)!r}: {error.strerror or error}"
        raise GvslZooError(cause, "check the folder, the permissions and the free space") from error
