"""Pictures of scans, features and matches: PNG files 1920 pixels wide; matplotlib is imported only to draw one."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ArgumentError, GvslZooError, needs
from .film import known_size, own_plane, together
from .registry import Label
from .transforms import Affine, Grid, warp_volume
from .volume import Prepared, Volume, canonical_view
from .weights import write_whole

if TYPE_CHECKING:
    from .inference.register import Registration
    from .transfer.bench import Bench
    from .transfer.evaluate import Evaluation

WIDTH, DPI = 12.8, 150  # inches; 1920 pixels
MARGIN, GAP, TITLE, HEADING, CAPTION, BAR = 0.3, 0.1, 0.4, 0.42, 0.26, 0.62  # inches
LONGEST_TITLE = 80  # letters
TALLEST = 7.0  # inches of one row: a whole-body scan stays on a screen
INK, FAINT, ACCENT = "#1b2733", "#5d6b78", "#1f77b4"
PLANES = ("axial", "coronal", "sagittal")
PRETRAINING_PANELS = {
    "matching held-out pairs": ("ncc_before", "ncc_after", "dice_before", "dice_affine", "dice_after"),
    "signs of life, and folding": ("affine_sd", "bottleneck_sd", "folded"),
}
# Canonical arrays (z, y, x) grow to the head, the front and the patient's right. Radiological convention: seen from
# the feet and from the front, so that the patient's right is on the left of the picture; sagittal with the front left.
LETTERS = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI"}  # at left, right, top, bottom; a film has none
FILM = "film"  # the plane of a film, which lies as one looks at it


LABEL_OPACITY = 0.6
LATTICE_MM, CHECKER_MM = 20, 30  # of the pictures of registrations
LONGEST_NAME, MORE = 20, 1.0  # letters of a label in a legend, and inches for "and 12 more": it is one line
Colour = tuple[float, float, float]  # red, green, blue in [0, 1]
LABEL_COLOURS: tuple[Colour, ...] = (  # of labels without one: Tableau's ten without the grey
    (0.84, 0.15, 0.16),
    (0.12, 0.47, 0.71),
    (0.17, 0.63, 0.17),
    (1.00, 0.50, 0.05),
    (0.58, 0.40, 0.74),
    (0.09, 0.75, 0.81),
    (0.74, 0.74, 0.13),
    (0.89, 0.47, 0.76),
    (0.55, 0.34, 0.29),
)


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
    """Panels at one scale of millimetres, under a heading, a line that explains it, and names in their colours."""

    heading: str
    note: str
    panels: Sequence[Panel]
    legend: Sequence[tuple[str, Colour]] = ()


def features_picture(
    prepared: Prepared, components: Tensor, path: str | os.PathLike[str], *, film: bool = False, title: str = ""
) -> None:
    """A scan in three orthogonal planes and, below, its first three feature components as red, green and blue; a film
    with its components beside it.

    Args:
        prepared: the scan on the model's grid.
        components: (3, D, H, W) in [0, 1] on that grid, from `principal_components`.
        path: the PNG file; written whole or not at all, replaced if it is there.
        film: whether it is one, for a model of films; a volume of one slice is shown as a volume.

    Errors: ArgumentError for components on another grid; GvslZooError when matplotlib is missing or the file cannot be
        written.
    """
    draw(scan_rows(prepared, components, film=film), title or "Dense features of a scan", path)


def scan_rows(prepared: Prepared, components: Tensor, *, film: bool = False) -> list[Row]:
    """Two rows: the scan, and its feature components; of a film one row of both."""
    if components.shape != (3, *prepared.shape):
        raise ArgumentError(f"components of shape {tuple(components.shape)}", f"expected {(3, *prepared.shape)}")
    image = prepared.image[0, 0]
    components = components * _without_specks((components > 0).any(0))
    limits, planes, colours = display_range(image), [], []
    said = "first three principal components as red, green and blue"
    if film:
        scale, size = known_size(prepared.source), " × ".join(map(str, reversed(image.shape[1:])))
        planes = [
            _panel(image, FILM, 0, prepared.spacing_mm, "film", limits, scale=scale),
            _panel(components, FILM, 0, prepared.spacing_mm, "components"),
        ]
        return [Row("Film and features", f"{size} pixels (columns, rows); {said} (dark background left out)", planes)]
    for axis, (name, index) in enumerate(zip(PLANES, middle(image), strict=True)):
        caption = f"{name}, slice {index + 1} of {image.shape[axis]}"
        planes.append(_panel(image, name, index, prepared.spacing_mm, caption, limits, scale=not axis))
        colours.append(_panel(components, name, index, prepared.spacing_mm, f"components, {name}"))
    spacing, shape = (" × ".join(f"{n:.3g}" for n in reversed(v)) for v in (prepared.spacing_mm, prepared.shape))
    return [
        Row("Scan", f"{shape} voxels (x, y, z) of {spacing} mm; patient's right on the left", planes),
        Row("Features", f"{said} (air left out)", colours),
    ]


def _without_specks(mask: Tensor) -> Tensor:
    """The mask (D, H, W) where most of the voxels around are in it too: those of noisy air are alone."""
    kernel = [3 if n > 2 else 1 for n in mask.shape]
    share = F.avg_pool3d(mask[None].float(), kernel, 1, [n // 2 for n in kernel], count_include_pad=False)[0]
    return mask & (share > 0.5)


def labels_picture(
    scan: Volume,
    found: Volume,
    labels: Sequence[Label],
    path: str | os.PathLike[str],
    *,
    film: bool = False,
    title: str = "",
) -> None:
    """A scan in the three orthogonal planes that cut most of its labels and, below, the labels over it; a film with its
    labels beside it.

    Args:
        found: the label map of `scan`, on its grid.
        labels: their names and colours; the first is the background.
        path: the PNG file; written whole or not at all, replaced if it is there.
        film: whether it is one, of a model of films; a volume of one slice is shown as a volume.

    Errors: ArgumentError for labels on another grid; GvslZooError when matplotlib is missing or the file cannot be
        written.
    """
    if found.shape != scan.shape:
        raise ArgumentError(f"labels of shape {found.shape} for a scan of {scan.shape}", "give labels on its grid")
    (image, spacing), (classes, _) = canonical_view(scan), canonical_view(found)
    thin = tuple(slice(None, None, max(1, n // 128)) for n in image.shape)
    limits = display_range(torch.from_numpy(image[thin].astype(np.float32)))
    inside = classes[thin] != labels[0].value
    colours = {label.value: _colour(label, number) for number, label in enumerate(labels[1:])}
    planes, overlays = [], []
    for axis, name in enumerate((FILM,) if film else PLANES):
        counts = inside.sum(tuple({0, 1, 2} - {axis}))
        index = int(counts.argmax()) * thin[axis].step if counts.any() else image.shape[axis] // 2
        size = " × ".join(map(str, reversed(image.shape[1:])))
        caption = f"{size} pixels (columns, rows)" if film else f"{name}, slice {index + 1} of {image.shape[axis]}"
        row, column = (s for other, s in enumerate(spacing) if other != axis)
        grey, values = (array.take(index, axis)[_turned(name)] for array in (image, classes))
        shown = ((grey.astype(np.float32) - limits[0]) / (limits[1] - limits[0])).clip(0, 1)[..., None].repeat(3, 2)
        scale, letters = known_size(scan) if film else not axis, LETTERS.get(name, "")
        planes.append(Panel(shown, (row, column), caption, letters=letters, scale=scale))
        for value, colour in colours.items():
            shown = np.where((values == value)[..., None], _over(shown, colour), shown)
        overlays.append(Panel(shown, (row, column), "labels" if film else f"labels, {name}", letters=letters))
    legend = [
        (label.name, colours[label.value]) for label in labels[1:] if (inside & (classes[thin] == label.value)).any()
    ]
    spacing_text, shape = (" × ".join(f"{n:.3g}" for n in reversed(v)) for v in (spacing, image.shape))
    said = "" if legend else "none found"
    rows = [
        Row("Scan", f"{shape} voxels (x, y, z) of {spacing_text} mm; patient's right on the left", planes),
        Row("Labels", said, overlays, legend),
    ]
    rows = [Row("Film and labels", said, [*planes, *overlays], legend)] if film else rows
    draw(rows, title or f"Labels of a {'film' if film else 'scan'}", path)


def _turned(plane: str) -> tuple[slice, slice]:
    """Rows and columns of a canonical plane as a radiologist looks at it; a film lies so already."""
    step = 1 if plane == FILM else -1
    return slice(None, None, step), slice(None, None, step)


def _over(shown: np.ndarray, colour: Colour) -> np.ndarray:
    return (1 - LABEL_OPACITY) * shown + LABEL_OPACITY * np.array(colour, np.float32)


def _colour(label: Label, number: int) -> Colour:
    if label.colour is None:
        return LABEL_COLOURS[number % len(LABEL_COLOURS)]
    red, green, blue = (value / 255 for value in label.colour)
    return red, green, blue


def restoration_row(images: Mapping[str, Tensor], spacing_mm: Sequence[float], note: str, *, film: bool = False) -> Row:
    """Middle axial slices and errors of the images "original", "damaged", "restored", each (D, H, W) in [0, 1].

    Of films, (1, H, W), the films themselves.
    """
    index = images["original"].shape[0] // 2
    plane = FILM if film else "axial"
    panels = [
        _panel(images[name], plane, index, spacing_mm, name, scale=name == "original")
        for name in ("original", "damaged", "restored")
    ]
    for name in ("damaged", "restored"):
        error = (images[name] - images["original"]).abs()
        bar = "" if name == "damaged" else "share of the range"
        caption = f"|{name} − original|"
        panels.append(_panel(error, plane, index, spacing_mm, caption, (0, 0.5), colours="inferno", bar=bar))
    return Row("Restoration", note, panels)


def matching_row(images: Mapping[str, Tensor], spacing_mm: Sequence[float], note: str) -> Row:
    """Coronal slices of "fixed", "moving", "warped", each (D, H, W), and of "displacement", (3, D, H, W) in voxels.

    Of films, (1, H, W), the films themselves, with displacements (2, 1, H, W).
    """
    fixed, moving, warped = (images[name] for name in ("fixed", "moving", "warped"))
    name, index = (FILM, 0) if len(images["displacement"]) == 2 else ("coronal", middle(fixed)[1])
    limits = display_range(fixed)
    panels = [
        _panel(image, name, index, spacing_mm, caption, limits, scale=caption == "fixed")
        for image, caption in ((fixed, "fixed"), (moving, "moving"), (warped, "moving, warped"))
    ]
    for image, when, bar in ((moving, "before", ""), (warped, "after", "share of the range")):
        caption = f"difference {when}"
        panels.append(_panel(image - fixed, name, index, spacing_mm, caption, (-0.5, 0.5), colours="RdBu_r", bar=bar))
    offsets = images["displacement"]
    length = (offsets * torch.tensor(spacing_mm[-len(offsets) :]).view(-1, 1, 1, 1)).norm(dim=0)
    top = max(1.0, float(length.max()))
    panels.append(_panel(length, name, index, spacing_mm, "displacement", (0, top), colours="viridis", bar="mm"))
    return Row("Matching", note, panels)


def registration_picture(
    fixed: Volume,
    moving: Volume,
    found: Registration,
    path: str | os.PathLike[str],
    *,
    film: bool = False,
    title: str = "",
) -> None:
    """Two scans or films before and after registration, a checkerboard, and a lattice of the moving one's millimetres.

    In a film whose pixels are of unknown size the squares have a twentieth of its longer axis.

    Args:
        path: the PNG file; written whole or not at all, replaced if it is there.
        film: whether they are films; volumes of one slice are shown as volumes.

    Errors: GvslZooError when matplotlib is missing or the file cannot be written.
    """
    grid = found.displacement_mm.grid
    unmoved = _as_headers_say(moving, fixed, film)
    seen = own_plane(moving).affine @ np.linalg.inv(moving.affine) if film else np.eye(4)
    places = [Volume(mm, grid.affine) for mm in _moved_mm(found, seen).transpose(3, 0, 1, 2)]
    (still, spacing), *others = (
        canonical_view(own_plane(volume) if film else volume) for volume in (fixed, unmoved, found.warped, *places)
    )
    before, after, *along = (array for array, _ in others)
    points = along[::-1]  # where each voxel lies in the moving scan, mm along z, y, x
    image = torch.from_numpy(np.ascontiguousarray(still, np.float32))
    limits, centre = display_range(image), middle(image)
    rows = []
    step = LATTICE_MM if found.report["unit"] == "mm" else max(1, max(fixed.shape) // 20)
    for axis, name in ((0, FILM),) if film else ((1, "coronal"), (0, "axial")):
        index = centre[axis]
        turned = _turned(name)
        row, column = (s for other, s in enumerate(spacing) if other != axis)
        a, b, c = (array.take(index, axis)[turned].astype(np.float32) for array in (still, before, after))
        lattice = np.ones_like(a)
        for other in {0, 1, 2} - {axis}:
            place = points[other].take(index, axis)[turned] % step
            lattice[np.minimum(place, step - place) < max(row, column, max(a.shape) * row / 300) / 2] = 0
        tiles = np.indices(a.shape) // max(1, round(CHECKER_MM / LATTICE_MM * step / max(row, column)))
        board = np.where(tiles.sum(0) % 2, c, a)
        shown = {"fixed": a, "moving, before": b, "moving, after": c, "fixed and moving, after": board}
        panels = [
            Panel(pixels, (row, column), caption, limits, LETTERS.get(name, ""), scale=caption == "fixed" and not film)
            for caption, pixels in shown.items()
        ]
        panels.append(
            Panel(
                lattice, (row, column), f"every {step} {found.report['unit']} of moving", letters=LETTERS.get(name, "")
            )
        )
        rows.append(Row(name.capitalize(), _registration_note(found) if axis or film else "", panels))
    draw(rows, title or "Registration", path)


def _as_headers_say(moving: Volume, fixed: Volume, film: bool) -> Volume:
    """The moving scan on the fixed grid where its header has it, a film frame on frame; empty where that is nowhere."""
    start = np.eye(4)
    if film:
        still, moved = together(fixed, moving)
        start = np.linalg.inv(moved.matrix) @ still.matrix
    try:
        return warp_volume(moving, Affine(start), Grid.of(fixed))
    except ArgumentError:
        return Volume(np.full(fixed.shape, moving.data.min(), np.float32), fixed.affine)


def _moved_mm(found: Registration, seen: np.ndarray) -> np.ndarray:
    """Where each voxel of the fixed scan lies in the moving one, in a world that `seen` (4, 4) leads to from its own:
    (i, j, k, 3), float32 millimetres.
    """
    grid = found.displacement_mm.grid
    places = found.displacement_mm.field_mm @ seen[:3, :3].T.astype(np.float32)
    index = np.ogrid[tuple(slice(float(n)) for n in grid.shape)]
    for axis, (*slopes, shift) in enumerate((seen @ grid.affine)[:3]):
        places[..., axis] += np.float32(shift)
        for slope, along in zip(slopes, index, strict=True):
            places[..., axis] += (slope * along).astype(np.float32)
    return places


def _registration_note(found: Registration) -> str:
    numbers = found.report
    return (
        f"local correlation {numbers['ncc_before']:.2f} → {numbers['ncc_after']:.2f}; "
        f"mean displacement {numbers['displacement_mm']:.0f} {numbers['unit']}; folded {100 * numbers['folded']:.2g} %"
    )


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
    cut = array.select(-3, index) if name == FILM else array.select(PLANES.index(name) - 3, index).flip(-2, -1)
    pixels = cut.float().cpu().numpy()
    return pixels if pixels.ndim == 2 else np.moveaxis(pixels, 0, -1)


def _panel(
    array: Tensor,
    name: str,
    index: int,
    spacing_mm: Sequence[float],
    caption: str,
    limits: tuple[float, float] = (0.0, 1.0),
    **style: Any,
) -> Panel:
    across = 0 if name == FILM else PLANES.index(name)
    row, column = (s for axis, s in enumerate(spacing_mm) if axis != across)
    return Panel(plane(array, name, index), (row, column), caption, limits, LETTERS.get(name, ""), **style)


def check_drawing() -> None:
    """Refuse, before the work for a picture, to draw without matplotlib."""
    needs("viz", "a picture", "matplotlib")


def draw(rows: Sequence[Row], title: str, path: str | os.PathLike[str]) -> None:
    """Lay the rows out on one page, each panel in true proportions, and write it as a PNG file."""
    check_drawing()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

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

    def write(x: float, y: float, text: str, size: float, color: str | Colour = INK, **style: Any) -> Any:
        """Text hung at (x, y) inches from the page's lower left corner; a dollar sign is no formula."""
        return figure.text(x / WIDTH, y / page, text, size=size, color=color, va="top", parse_math=False, **style)

    write(MARGIN, page - MARGIN, _cut(title, LONGEST_TITLE), 17, weight="bold")
    top = page - MARGIN - TITLE
    for row, scale, height in zip(rows, scales, heights, strict=True):
        heading = write(MARGIN, top - 0.1, row.heading, 12, weight="bold")
        note = write(heading.get_window_extent(renderer).x1 / DPI + 0.15, top - 0.125, row.note, 10, FAINT)
        right = note.get_window_extent(renderer).x1 / DPI
        hidden = len(row.legend)
        for name, colour in row.legend:
            named = write(right, top - 0.125, f"■ {_cut(name, LONGEST_NAME)}", 10, colour, weight="bold")
            end = named.get_window_extent(renderer).x1 / DPI + 0.2
            if end > WIDTH - MARGIN - MORE:
                named.remove()
                break
            right, hidden = end, hidden - 1
        if hidden:
            write(right, top - 0.125, f"and {hidden} more", 10, FAINT)
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


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def curves_picture(
    log: Sequence[Mapping[str, float]],
    path: str | os.PathLike[str],
    *,
    title: str = "",
    panels: Mapping[str, Sequence[str]] = PRETRAINING_PANELS,
) -> None:
    """Learning curves of a run: the terms of the loss, and what validation measured.

    Args:
        log: the run's records, all or some, in order.
        panels: names of what was measured, by the title under which they are drawn.
    """
    figure = _figure(4.4, title or "A pre-training run")
    left, *others = np.atleast_1d(figure.subplots(1, 1 + len(panels)))
    measured = {name for names in panels.values() for name in names}
    beside = {"step", "gradient", "seconds", *measured}
    terms = [key for key in log[0] if key not in beside and all(key in record for record in log)]
    window = max(1, len(log) // 100)
    for term in terms:
        values = np.convolve([record[term] for record in log], np.ones(window) / window, "valid")
        left.plot([record["step"] for record in log[window - 1 :]], values, label=term, lw=1.4)
    steps = round(window * log[-1]["step"] / len(log))  # of a long run not every step is given
    left.set(title=f"loss, mean over {steps} steps", yscale="log")
    for axes, (what, names) in zip(others, panels.items(), strict=True):
        for name in names:
            points = [(record["step"], record[name]) for record in log if name in record]
            if not points:  # a head that this model lacks
                continue
            style = "--" if name.endswith("before") else "-"
            axes.plot(*zip(*points, strict=True), style, marker=".", label=name.replace("_", " "), lw=1.4)
        axes.set(title=what)
    for axes in (left, *others):
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, fontsize=8, frameon=False)
    _save(figure, Path(path))


def scores_picture(evaluation: Evaluation, path: str | os.PathLike[str]) -> None:
    """Dice, HD95 and surface Dice of every label: a dot a case, cases missed or invented hollow, mean and interval."""
    labels, summary = evaluation.labels, evaluation.summary
    figure = _figure(1.8 + 0.42 * len(labels), f"{summary['cases']} cases, mean and 95 % interval")
    titles = ("Dice", "HD95, mm", f"surface Dice at {summary['tolerance_mm']:g} mm")
    for axes, metric, title in zip(
        figure.subplots(1, 3, sharey=True), ("dice", "hd95_mm", "surface_dice"), titles, strict=True
    ):
        for row, label in enumerate(labels):
            overlaps = [score.overlap for score in evaluation.scores if score.label == label]
            shown = [(getattr(o, metric), o.found == "both") for o in overlaps if getattr(o, metric) is not None]
            for index, (value, both) in enumerate(shown):
                height = row + 0.3 * ((index + 0.5) / len(shown) - 0.5)  # beside each other, in the order of the cases
                axes.plot(value, height, "o", ms=4, mfc=ACCENT if both else "white", mec=ACCENT, alpha=0.6)
            _interval_mark(axes, summary["labels"][label][metric], row + 0.28)
        axes.set(title=title, yticks=range(len(labels)), yticklabels=labels, ylim=(len(labels) - 0.4, -0.6))
        axes.set_xlim(0 if metric == "hd95_mm" else -0.02, None if metric == "hd95_mm" else 1.02)
        axes.grid(axis="x", alpha=0.25)
    _save(figure, Path(path))


def bench_picture(report: Bench, path: str | os.PathLike[str]) -> None:
    """Learning curves over numbers of labelled scans, a dot a seed; below, what zoo weights add, with its interval."""
    modes = list(dict.fromkeys(row.mode for row in report.comparisons))
    arms = list(dict.fromkeys(cell["arm"] for cell in report.cells))
    counts = sorted({row.count for row in report.comparisons})
    figure = _figure(7.2, f"Zoo weights against scratch, {len(report.settings['test'])} test cases")
    grid = figure.subplots(2, len(modes), sharex=True, sharey="row", squeeze=False, height_ratios=(3, 2))
    for mode, curves, differences in zip(modes, *grid, strict=True):
        for arm in arms:
            colour = FAINT if arm.startswith("scratch") else f"C{arms.index(arm)}"
            points = [
                (counts.index(cell["count"]), float(np.mean(list(cell["scores"].values()))))
                for cell in report.cells
                if (cell["arm"], cell["mode"]) == (arm, mode)
            ]
            places = sorted({place for place, _ in points})
            means = [np.mean([value for at, value in points if at == place]) for place in places]
            curves.plot(places, means, "--" if colour == FAINT else "-", color=colour, label=arm, lw=1.8)
            curves.plot(*zip(*points, strict=True), "o", color=colour, ms=4, alpha=0.6)
            rows = [row for row in report.comparisons if (row.model, row.mode) == (arm, mode)]
            shift = 0.06 * (arms.index(arm) - 1)  # intervals beside each other
            for row in rows:
                at = counts.index(row.count) + shift
                differences.errorbar(at, row.difference, row.half, fmt="o", ms=5, color=colour, capsize=4, lw=1.6)
        differences.axhline(0, color=FAINT, lw=1)
        curves.set(title=mode)
        curves.legend(fontsize=9, framealpha=0.8, edgecolor="none")
        differences.set(xlabel="labelled scans", xticks=range(len(counts)), xticklabels=counts)
        differences.set_xlim(-0.5, len(counts) - 0.5)
        for axes in (curves, differences):
            axes.grid(alpha=0.25)
    metric = "Dice" if report.task == "segmentation" else "accuracy"
    grid[0, 0].set_ylabel(f"{metric}, %")
    grid[1, 0].set_ylabel("zoo − scratch, 95 % interval")
    _save(figure, Path(path))


def embedding_picture(
    panels: Mapping[str, np.ndarray],
    classes: np.ndarray,
    names: Sequence[str],
    path: str | os.PathLike[str],
    *,
    title: str = "",
) -> None:
    """Points of two dimensions in the colours of their classes, an embedding a panel.

    Args:
        panels: points (N, 2) by the title of their panel.
        classes: of the points, (N,), indices of `names`.
    """
    from matplotlib import colormaps

    figure = _figure(6.0, title)
    for axes, (what, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for index, name in enumerate(names):
            colour = colormaps["tab20"](index % 20)
            axes.scatter(*points[classes == index].T, s=9, color=colour, label=name, lw=0)
        axes.set_title(what, size=11)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color("#c9d1d9")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7, fontsize=9, frameon=False, markerscale=2.2)
    _save(figure, Path(path))


def _interval_mark(axes: Any, interval: Mapping[str, Any], height: float) -> None:
    if interval["mean"] is None:
        axes.text(0.01, height, "in no case", size=8, color=FAINT, va="center", transform=axes.get_yaxis_transform())
        return
    if interval["low"] is not None:
        axes.plot([interval["low"], interval["high"]], [height, height], color=INK, lw=1.6)
    axes.plot(interval["mean"], height, "D", color=INK, ms=4.5)


def classes_picture(evaluation: Evaluation, path: str | os.PathLike[str]) -> None:
    """ROC curve of each class against the others, and how often each class was taken for which."""
    labels, summary = evaluation.labels, evaluation.summary
    truth = np.array([labels.index(true) for true, _ in evaluation.probabilities.values()])
    values = np.array([row for _, row in evaluation.probabilities.values()])
    accuracy = summary["accuracy"]
    text = f"{summary['cases']} cases, accuracy {accuracy['mean']:.2f} [{accuracy['low']:.2f}, {accuracy['high']:.2f}]"
    figure = _figure(5.2, text)
    left, right = figure.subplots(1, 2)
    for index, label in enumerate(labels):
        area = summary["labels"][label]["auc"]
        if area["mean"] is None:
            continue
        order = np.argsort(-values[:, index], kind="stable")
        last = np.append(np.diff(values[order, index]) != 0, True)  # cases of one probability are one step
        hits, alarms = (np.cumsum(which[order])[last] for which in (truth == index, truth != index))
        left.plot(
            np.append(0, alarms / alarms[-1]),
            np.append(0, hits / hits[-1]),
            lw=1.6,
            label=f"{label}: AUC {area['mean']:.2f} [{area['low']:.2f}, {area['high']:.2f}]",
        )
    left.plot([0, 1], [0, 1], "--", color=FAINT, lw=1)
    left.set(title="each class against the others", aspect="equal")
    left.set(xlabel="false positive rate", ylabel="true positive rate")
    if left.get_legend_handles_labels()[0]:
        left.legend(fontsize=8, loc="lower right")
    table = np.zeros((len(labels), len(labels)), int)
    np.add.at(table, (truth, values.argmax(1)), 1)
    right.imshow(table, cmap="Blues")
    for (row, column), count in np.ndenumerate(table):
        right.text(column, row, count, ha="center", va="center", color="white" if count > table.max() / 2 else INK)
    ticks = range(len(labels))
    right.set(title="cases", xlabel="predicted", ylabel="true")
    right.set(xticks=ticks, xticklabels=labels, yticks=ticks, yticklabels=labels)
    _save(figure, Path(path))


def _figure(height: float, title: str) -> Any:
    """A figure of the usual width and `height` inches, or a GvslZooError without matplotlib."""
    check_drawing()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((WIDTH, height), dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, size=15, weight="bold", color=INK, parse_math=False)
    return figure


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
