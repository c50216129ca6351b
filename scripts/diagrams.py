"""Draw the architectures and the objectives from the modules themselves: python scripts/diagrams.py [FOLDER]

Channels and sizes are those that a module says of itself (`levels`), for an image of 96 voxels an axis.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import FancyBboxPatch

from gvsl_zoo.models.backbone import Backbone
from gvsl_zoo.models.unet import UNet
from gvsl_zoo.models.xmorpher import XMorpher

DOCS = Path(__file__).parent.parent / "docs"
SIZE = 96  # voxels an axis of the image that is drawn
INK, FAINT, LINE = "#1b2733", "#5d6b78", "#8494a3"
ENCODER, DECODER, HEAD, LOSS, IMAGE = "#cfe3f7", "#d9f0dd", "#fde7c4", "#f7d4d4", "#eceff2"
STYLE = {"svg.hashsalt": "gvsl-zoo", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}


class Box(NamedTuple):
    """A box of a diagram: its middle (inches), its text, its colour and its size."""

    x: float
    y: float
    text: str
    colour: str
    width: float = 1.35
    height: float = 0.5


def draw(boxes: dict[str, Box], arrows: Sequence[tuple[str, str, str]], title: str, path: Path) -> None:
    """Boxes and arrows (from, to, what it carries) as an SVG."""
    right = max(b.x + b.width / 2 for b in boxes.values()) + 0.25
    top = max(b.y + b.height / 2 for b in boxes.values()) + 0.55
    bottom = min(b.y - b.height / 2 for b in boxes.values()) - 0.2
    with pyplot.rc_context(STYLE):
        figure = pyplot.figure(figsize=(right, top - bottom))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(0, right)
        axes.set_ylim(bottom, top)
        axes.axis("off")
        axes.text(0.25, top - 0.3, title, fontsize=12, weight="bold", color=INK, va="center")
        for box in boxes.values():
            corner = (box.x - box.width / 2, box.y - box.height / 2)
            shape = FancyBboxPatch(corner, box.width, box.height, boxstyle="round,pad=0,rounding_size=0.07")
            shape.set(facecolor=box.colour, edgecolor=LINE, linewidth=0.8)
            axes.add_patch(shape)
            axes.text(box.x, box.y, box.text, ha="center", va="center", color=INK, fontsize=8.5)
        for start, end, text in arrows:
            connect(axes, boxes[start], boxes[end], text)
        figure.savefig(path, format="svg", metadata={"Date": None})
        pyplot.close(figure)


def connect(axes: Any, start: Box, end: Box, text: str) -> None:
    """An arrow between the sides of two boxes that face each other."""
    level = abs(start.y - end.y) < (start.height + end.height) / 2
    if level or abs(start.x - end.x) > (start.width + end.width) / 2:
        side = 1 if end.x > start.x else -1
        tail, head = (start.x + side * start.width / 2, start.y), (end.x - side * end.width / 2, end.y)
    else:
        side = 1 if end.y > start.y else -1
        tail, head = (start.x, start.y + side * start.height / 2), (end.x, end.y - side * end.height / 2)
    axes.annotate("", head, tail, arrowprops={"arrowstyle": "-|>", "color": LINE, "shrinkA": 1, "shrinkB": 1})
    if text:
        middle = ((tail[0] + head[0]) / 2, (tail[1] + head[1]) / 2)
        axes.text(
            *middle,
            text,
            ha="center",
            va="center",
            fontsize=8,
            color=FAINT,
            bbox={"fc": "white", "ec": "none", "pad": 1},
        )


def architecture(backbone: Backbone, title: str, path: Path) -> None:
    """A backbone's levels: the encoder down on the left, the decoder up on the right, skips between them."""
    levels, encoder = backbone.levels, backbone.encoder_levels
    reductions = sorted({level.reduction for level in levels})
    rows = {reduction: -1.0 * row for row, reduction in enumerate(reductions)}
    boxes = {"image": Box(1.1, rows[reductions[0]] + 1, f"image\n{backbone.in_chans} x {SIZE}³", IMAGE)}
    arrows = [("image", levels[0].module, "")]
    for i, level in enumerate(levels):
        text = f"{level.module}\n{level.channels} x {SIZE // level.reduction}³"
        x, colour = (1.1, ENCODER) if i < encoder else (4.4, DECODER)
        boxes[level.module] = Box(x, rows[level.reduction], text, colour)
        if i:
            arrows.append((levels[i - 1].module, level.module, ""))
    for level in levels[encoder:]:
        twins = [twin for twin in levels[: encoder - 1] if twin.reduction == level.reduction]
        arrows += [(twin.module, level.module, "skip") for twin in twins]
    bottleneck, local = levels[encoder - 1], levels[-1]
    boxes["global"] = Box(1.1, rows[bottleneck.reduction] - 1, "bottleneck (global, f_g)", HEAD, 1.9)
    boxes["dense"] = Box(4.4, rows[local.reduction] + 1, "dense (local, f_l)", HEAD, 1.9)
    arrows += [(bottleneck.module, "global", ""), (local.module, "dense", "")]
    draw(boxes, arrows, title, path)


def gvsl(path: Path) -> None:
    """GVSL's forward pass and its losses (He et al. 2023, sec. 3)."""
    boxes = {
        "fixed": Box(0.95, 3, "fixed A", IMAGE),
        "damaged": Box(0.95, 2, "damaged A", IMAGE),
        "moving": Box(0.95, 1, "moving B", IMAGE),
        "backbone": Box(3.0, 1.5, "backbone\n(one, shared)", ENCODER, 1.5, 0.7),
        "affine": Box(5.2, 2, "affine head\non f_g of both", HEAD, 1.6),
        "flow": Box(5.2, 1, "deformable head\non f_l of both", HEAD, 1.6),
        "restored": Box(5.2, 3, "restoration head\non f_l of A", HEAD, 1.6),
        "compose": Box(7.4, 1.5, "one displacement:\nflow, then affine", DECODER, 1.7),
        "warped": Box(9.5, 1.5, "B warped onto A", IMAGE, 1.5),
        "mse": Box(9.5, 3, "MSE with A", LOSS, 1.5),
        "ncc": Box(11.5, 1.5, "1 - local NCC\nwith A, window 9", LOSS, 1.6),
        "smooth": Box(7.4, 0.3, "smoothness\nof the flow", LOSS, 1.7),
    }
    arrows = [
        ("fixed", "damaged", "pose, damage"),
        ("damaged", "backbone", ""),
        ("moving", "backbone", ""),
        ("backbone", "affine", ""),
        ("backbone", "flow", ""),
        ("backbone", "restored", ""),
        ("affine", "compose", ""),
        ("flow", "compose", ""),
        ("flow", "smooth", ""),
        ("compose", "warped", ""),
        ("warped", "ncc", ""),
        ("restored", "mse", ""),
    ]
    draw(boxes, arrows, "GVSL: match two scans, restore one", path)


def gemini(path: Path) -> None:
    """GEMINI's two updates of a step (He et al. 2025)."""
    boxes = {
        "a": Box(0.95, 3, "image A", IMAGE),
        "b": Box(0.95, 2, "image B", IMAGE),
        "damaged": Box(0.95, 0.6, "damaged A", IMAGE),
        "backbone": Box(3.0, 2.5, "backbone\n(one, shared)", ENCODER, 1.5, 0.7),
        "again": Box(3.0, 0.6, "the same backbone", ENCODER, 1.5),
        "deformer": Box(5.6, 2.5, "deformer D\nboth ways", HEAD, 1.6, 0.7),
        "restored": Box(5.6, 0.6, "restoration head", HEAD, 1.6),
        "ways": Box(7.8, 2.5, "displacements\nAB and BA", DECODER, 1.6, 0.7),
        "smo": Box(10.2, 3.6, "smoothness x 0.4", LOSS, 1.9),
        "gvs": Box(10.2, 2.85, "images: 1 - masked cc", LOSS, 1.9),
        "gss": Box(10.2, 2.1, "features: 1 - masked cosine\nx 0.8 (D), x 0.08 (backbone)", LOSS, 2.3),
        "mse": Box(10.2, 0.6, "MSE with A, x 100", LOSS, 1.9),
    }
    arrows = [
        ("a", "backbone", ""),
        ("b", "backbone", ""),
        ("backbone", "deformer", "f_l of both"),
        ("deformer", "ways", ""),
        ("ways", "smo", ""),
        ("ways", "gvs", ""),
        ("ways", "gss", ""),
        ("damaged", "again", ""),
        ("again", "restored", "f_l"),
        ("restored", "mse", ""),
    ]
    draw(boxes, arrows, "GEMINI: first update (above), second update (below)", path)


def main(folder: Path = DOCS) -> None:
    architecture(UNet(3, 32, device="meta"), "U-Net, 3D, width 32", folder / "unet.svg")
    architecture(XMorpher(3, 48, device="meta"), "XMorpher, 3D, width 48", folder / "xmorpher.svg")
    gvsl(folder / "gvsl.svg")
    gemini(folder / "gemini.svg")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
