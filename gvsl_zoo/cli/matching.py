"""Commands that match two scans."""

from __future__ import annotations

import itertools
import json
import signal
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import ArgumentError
from .common import check_ending, check_picture, load_for_registration, main, progress_bar, show, with_json, with_model

if TYPE_CHECKING:
    import numpy as np

    from ..transforms import Grid
    from ..volume import Volume


@main.command("register")
@click.option("--fixed", required=True, type=click.Path(path_type=Path), help="Scan or film that stays.")
@click.option("--moving", required=True, type=click.Path(path_type=Path), help="The one that is brought onto it.")
@click.option(
    "-o", "--warped-out", type=click.Path(path_type=Path), help="Moving scan on the fixed grid, .nii.gz; a film .png."
)
@click.option("--transform-out", type=click.Path(path_type=Path), help="The whole transform for ITK and ANTs, .nii.gz.")
@click.option("--affine-out", type=click.Path(path_type=Path), help="Its affine part, .tfm or .mat.")
@click.option("--save-inverse", type=click.Path(path_type=Path), help="Its inverse on the moving scan's grid, .nii.gz.")
@click.option("--jacobian-out", type=click.Path(path_type=Path), help="Local volume change, .nii.gz.")
@click.option("--picture", type=click.Path(path_type=Path), help="PNG: before, after, checkerboard, lattice.")
@click.option("--fixed-mask", type=click.Path(path_type=Path), help="Only there the fixed scan counts.")
@click.option("--moving-mask", type=click.Path(path_type=Path), help="Only there the moving scan counts.")
@click.option("--moving-labels", type=click.Path(path_type=Path), help="Label map of the moving scan to bring along.")
@click.option("--labels-out", type=click.Path(path_type=Path), help="Where it goes, .nii.gz; of a film .png.")
@click.option(
    "--refine", type=click.IntRange(0), help="Steps of fitting to this pair.  [default: 0 with heads, else 90]"
)
@click.option("--precision", type=click.Choice(["float32", "bf16"]), default="float32", show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace outputs that exist.")
@with_model
@with_json
def register_command(
    fixed: Path,
    moving: Path,
    warped_out: Path | None,
    transform_out: Path | None,
    affine_out: Path | None,
    save_inverse: Path | None,
    jacobian_out: Path | None,
    picture: Path | None,
    fixed_mask: Path | None,
    moving_mask: Path | None,
    moving_labels: Path | None,
    labels_out: Path | None,
    refine: int | None,
    precision: str,
    overwrite: bool,
    name: str,
    device: str,
    as_json: bool,
) -> None:
    """Register the scan or film --moving onto --fixed, and say how well they agree.

    Films are .png or DICOM pictures, and want a 2D model.
    """
    from ..film import FilmPreprocessing, is_film, on_film, read_for, read_scan, write_film
    from ..inference.features import recipe_of
    from ..inference.register import register
    from ..report import registration_picture
    from ..transforms import Grid, to_displacement, warp_volume, write_transform
    from ..volume import check_outputs, laid_on, write_volume

    if bool(moving_labels) != bool(labels_out):
        raise ArgumentError("--moving-labels and --labels-out go together", "give both")
    images = (".nii", ".nii.gz", ".png") if is_film(moving) else (".nii", ".nii.gz")
    for path, endings in (
        (warped_out, images),
        (transform_out, (".nii", ".nii.gz", ".h5")),
        (affine_out, (".tfm", ".txt", ".mat")),
        (save_inverse, (".nii", ".nii.gz", ".h5")),
        (jacobian_out, (".nii", ".nii.gz")),
        (labels_out, images),
    ):
        check_ending(path, *endings)
    check_picture(picture)
    outputs = (warped_out, transform_out, affine_out, save_inverse, jacobian_out, labels_out, picture)
    check_outputs(outputs, (fixed, moving, fixed_mask, moving_mask, moving_labels), overwrite)
    model = load_for_registration(name, device)
    recipe = recipe_of(model)
    still, moved = (read_for(path, recipe) for path in (fixed, moving))
    grid, back = Grid.of(still), Grid.of(moved)
    check_directions(transform_out, grid)
    check_directions(save_inverse, back)
    labels = read_scan(moving_labels) if moving_labels else None
    film = isinstance(recipe, FilmPreprocessing)
    if labels:
        labels = on_film(labels, moved) if film else laid_on(labels, "the label map", moved, "the moving scan")
    with progress_bar("register") as progress:
        found = register(
            moved,
            still,
            model,
            fixed_mask=fixed_mask,
            moving_mask=moving_mask,
            refine=refine,
            precision=precision,
            progress=progress,
        )
    if warped_out:
        write_film(found.warped, warped_out, like=moved.data.dtype, overwrite=overwrite)
    if transform_out:
        write_transform(found.displacement_mm, transform_out, overwrite=overwrite)
    if affine_out:
        write_transform(found.affine, affine_out, overwrite=overwrite)
    if save_inverse:
        inverse = to_displacement(found.displacement_mm.inverse(), back)
        write_transform(inverse, save_inverse, overwrite=overwrite)
    if jacobian_out:
        write_volume(found.jacobian, jacobian_out, overwrite=overwrite)
    if labels and labels_out:
        carried = warp_volume(labels, found.displacement_mm, grid, nearest=True)
        write_film(carried, labels_out, like=labels.data.dtype, overwrite=overwrite)
    if picture:
        title = f"{moving.name} on {fixed.name}"
        registration_picture(still, moved, found, picture, film=film, title=title)
    show(found.report | {"outputs": [str(path) for path in outputs if path]}, as_json)


def check_directions(path: Path | None, grid: Grid) -> None:
    """Refuse a displacement on a sheared grid for NIfTI before the work for it; None is no file."""
    from ..transforms import is_sheared

    if path and path.suffix != ".h5" and is_sheared(grid):
        cause = f"the output {path.name!r} has no place for the grid of a sheared scan"
        raise ArgumentError(cause, "end it in .h5, or resample the scan on axes at right angles")


@main.command("warp")
@click.option("-i", "--input", "scan", type=click.Path(path_type=Path), help="Moving scan, film or label map.")
@click.option(
    "--points", type=click.Path(path_type=Path), help="Instead: a CSV with columns x, y, z in RAS+ mm; of a film x, y."
)
@click.option("--fixed", type=click.Path(path_type=Path), help="Scan whose grid is wanted; with --points optional.")
@click.option(
    "--transform", "paths", required=True, multiple=True, type=click.Path(path_type=Path), help="Of ITK, ANTs or ours."
)
@click.option("--inverse", is_flag=True, help="Invert the transform, or the whole chain.")
@click.option("--labels", is_flag=True, help="Take the nearest voxel and keep the type.")
@click.option("--lps", is_flag=True, help="The points are in LPS, as ITK's and ANTs' are.")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help=".nii.gz, of a film .png; with --points .csv.",
)
@click.option("--overwrite", is_flag=True, help="Replace an output that exists.")
@with_json
def warp_command(
    scan: Path | None,
    points: Path | None,
    fixed: Path | None,
    paths: tuple[Path, ...],
    inverse: bool,
    labels: bool,
    lps: bool,
    output: Path,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Apply saved transforms to a scan, a label map or points; several are one resampling.

    A transform sends points of the fixed scan to the moving one, and so --points too; --inverse sends them back. The
    order of several is that of ITK's CompositeTransform: the last one is applied to a fixed point first
    (antsApplyTransforms lists them the other way round). Beyond its grid a displacement goes on with the values of its
    border, and a warning says so.
    """
    from ..film import is_film, known_size, read_scan, write_film
    from ..transforms import Chain, Displacement, Grid, read_points, read_transform, warp_volume, write_points
    from ..volume import InputWarning, check_outputs

    if bool(scan) == bool(points) or (scan and (lps or not fixed)) or (points and labels):
        raise ArgumentError(
            "warp needs -i with --fixed [--labels], or --points [--fixed] [--lps]", "see gvsl-zoo warp --help"
        )
    films = [path for path in (scan, fixed) if path and is_film(path)]
    wanted = ((".nii", ".nii.gz", ".png") if films else (".nii", ".nii.gz")) if scan else (".csv",)
    check_ending(output, *wanted)
    check_outputs([output], (scan, points, fixed, *paths), overwrite)
    transforms = [read_transform(path) for path in reversed(paths)]
    transform = transforms[0] if len(transforms) == 1 else Chain(tuple(transforms))
    transform = transform.inverse() if inverse else transform
    still = read_scan(fixed) if fixed else None
    grid = Grid.of(still) if still else None
    if scan and still and grid:
        source = read_scan(scan)
        if scan.suffix.lower() == ".png" and known_size(still):
            doubt = f"{scan.name}: the pixels of a PNG count as 1 mm, those of the fixed film are of known size"
            remedy = "labels of a DICOM film are brought along by gvsl-zoo register --moving-labels --labels-out"
            warnings.warn(f"{doubt}; {remedy}", InputWarning, stacklevel=2)
        volume = warp_volume(source, transform, grid, nearest=labels)
        write_film(volume, output, like=source.data.dtype, overwrite=overwrite)
        show({"output": str(output), "shape": list(volume.shape)}, as_json)
    elif points:
        flat = any(isinstance(one, Displacement) and one.grid.shape[2] == 1 for one in transforms)
        table = read_points(points, lps=lps, film=flat or bool(films))
        moved = transform.map(table.points_mm)
        write_points(table._replace(points_mm=moved.points_mm), output, lps=lps, overwrite=overwrite)
        facts = {"output": str(output), "points": len(table.rows)}
        doubts = {"beyond the displacement": moved.beyond, "without an inverse": moved.unsolved}
        if grid:
            on_fixed = moved.points_mm if inverse else table.points_mm
            doubts["outside the fixed scan"] = ~grid.contains(grid.index(on_fixed))
        show(facts | {what: (rows.nonzero()[0] + 1).tolist() for what, rows in doubts.items()}, as_json)


@main.command("correspond")
@click.option("--fixed", required=True, type=click.Path(path_type=Path), help="Scan or film in which the points are.")
@click.option("--moving", required=True, type=click.Path(path_type=Path), help="The one in which they are sought.")
@click.option(
    "--points", type=click.Path(path_type=Path), help="A CSV with columns x, y, z in RAS+ mm; of a film x, y."
)
@click.option(
    "--point", "single", multiple=True, metavar="X,Y,Z", help="Instead: a point; may be repeated; of a film X,Y."
)
@click.option("--lps", is_flag=True, help="Points and matches are in LPS, as ITK's and ANTs' are.")
@click.option("--transform", type=click.Path(path_type=Path), help="Of 'register': the matches are sought around it.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help=".csv: the rows, moved, with a confidence.")
@click.option("--heat", type=click.Path(path_type=Path), help="Folder for the similarity map of every point, .nii.gz.")
@click.option("--precision", type=click.Choice(["float32", "bf16"]), default="float32", show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace outputs that exist.")
@with_model
@with_json
def correspond_command(
    fixed: Path,
    moving: Path,
    points: Path | None,
    single: tuple[str, ...],
    lps: bool,
    transform: Path | None,
    output: Path | None,
    heat: Path | None,
    precision: str,
    overwrite: bool,
    name: str,
    device: str,
    as_json: bool,
) -> None:
    """Find points of one scan or film in another, each with a confidence in [0, 1]."""
    from ..film import FilmPreprocessing, is_film, read_for
    from ..inference.correspond import Matcher, match_table, parse_points
    from ..inference.features import recipe_of
    from ..transforms import read_points, read_transform, write_points
    from ..volume import check_outputs, write_volume
    from ..zoo import load

    if bool(points) == bool(single):
        raise ArgumentError("correspond needs --points or --point", "give one of the two")
    check_ending(output, ".csv")
    film = is_film(fixed)
    table = read_points(points, lps=lps, film=film) if points else parse_points(single, lps=lps, film=film)
    maps = [heat / f"point-{number}.nii.gz" for number in range(1, len(table.rows) + 1)] if heat else []
    inputs = (fixed, moving, points, transform)
    check_outputs([output], inputs, overwrite)
    model, start = load(name, device=device), read_transform(transform) if transform else None
    recipe = recipe_of(model)
    still = read_for(fixed, recipe)
    check_points(table.points_mm, still, film=isinstance(recipe, FilmPreprocessing))
    if heat:
        heat.mkdir(parents=True, exist_ok=True)  # not for a call that ends before
        check_outputs(maps, inputs, overwrite)
    with progress_bar("features") as progress:
        matcher = Matcher(still, moving, model, start=start, precision=precision, progress=progress)
    found = matcher.match(table.points_mm)
    matches = match_table(table, found)
    if output:
        write_points(matches, output, lps=lps, overwrite=overwrite)
    _, inside = matcher.fixed.checked(table.points_mm)
    for path, point, seen in zip(maps, table.points_mm, inside, strict=False):
        if seen:
            write_volume(matcher.heat(point), path, overwrite=overwrite)
    if as_json:
        click.echo(json.dumps(found.to_list(lps=lps), indent=2))
        return
    for number, match in enumerate(found.to_list(lps=lps), 1):
        place = ", ".join(f"{value:.1f}" for value in match["match_mm"]) + " mm" if match["match_mm"] else "no match"
        click.echo(f"{number:>4}  {place}  confidence {match['confidence']:.2f}")


def check_points(points_mm: np.ndarray, fixed: Volume, *, film: bool) -> None:
    """Refuse points (N, 3) that are not finite, or none of which lies in the fixed scan; a film's have no depth."""
    import numpy as np

    from ..transforms import Grid

    if not np.isfinite(points_mm).all():
        raise ArgumentError("a point that is not finite", "give its millimetres in numbers")
    grid = Grid.of(fixed)
    index = grid.index(points_mm)
    if film:
        index[:, 2] = 0
    if len(index) and not grid.contains(index).any():
        corners = np.array(list(itertools.product(*((0, n - 1) for n in grid.shape))))
        corners = corners @ grid.affine[:3, :3].T + grid.affine[:3, 3]
        spans = ", ".join(f"{a:.0f} to {b:.0f}" for a, b in zip(corners.min(0), corners.max(0), strict=True))
        raise ArgumentError("no point lies in the fixed scan", f"it spans {spans} mm along x, y, z (RAS+)")


@main.command("view")
@click.argument("fixed", type=click.Path(path_type=Path))
@click.argument("moving", type=click.Path(path_type=Path))
@click.option("--warped", type=click.Path(path_type=Path), help="MOVING on the grid of FIXED, to lay over it.")
@click.option("--transform", type=click.Path(path_type=Path), help="Of 'register'; matches are sought around it.")
@click.option("--register", "registered", is_flag=True, help="Instead: register first, with refinement.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, show_default=True, help="0: any that is free.")
@click.option("--open", "opened", is_flag=True, help="Open the page in the browser.")
@with_model
def view_command(
    fixed: Path,
    moving: Path,
    warped: Path | None,
    transform: Path | None,
    registered: bool,
    port: int,
    opened: bool,
    name: str,
    device: str,
) -> None:
    """Look at two scans side by side: choose a point in one and see its match in the other.

    A page on 127.0.0.1, for this machine only, until Ctrl-C. Its address is secret: it is the key to the scans.
    """
    import tempfile
    import webbrowser

    from ..film import is_film
    from ..inference.correspond import Matcher
    from ..inference.register import REFINING_STEPS, register
    from ..transforms import Grid, read_transform, warp_volume
    from ..view.pair import Pair
    from ..view.server import PageServer
    from ..volume import check_grid, read_volume
    from ..zoo import load

    if films := [path.name for path in (fixed, moving) if is_film(path)]:
        remedy = "look at films with gvsl-zoo register --picture, or correspond --heat"
        raise ArgumentError(f"the page shows volumes, not the film {films[0]!r}", remedy)
    if transform and registered:
        raise ArgumentError("--transform with --register", "give one of the two")
    with PageServer(port) as server, tempfile.TemporaryDirectory(prefix="gvsl-zoo-view-") as folder:
        end_as_ctrl_c_does()
        still, moved = read_volume(fixed), read_volume(moving)
        laid = read_volume(warped) if warped else None
        if laid:
            check_grid(laid, "the warped scan", still, "the fixed scan")
        start = read_transform(transform) if transform else None
        if registered:
            heads = load_for_registration(name, device)
            with progress_bar("register") as progress:
                start = register(moved, still, heads, refine=REFINING_STEPS, progress=progress).displacement_mm
        if start and not laid:
            laid = warp_volume(moved, start, Grid.of(still))
        with progress_bar("features") as progress:
            matcher = Matcher(still, moved, load(name, device=device), start=start, progress=progress)
        names = {"fixed": fixed.name, "moving": moving.name, "model": name}
        server.pair = Pair(still, moved, matcher, Path(folder), warped=laid, names=names)
        try:
            click.echo(f"open {server.url}  (Ctrl-C ends)")
            if opened:  # in a thread: a browser in this terminal would keep the server from answering it
                threading.Thread(target=webbrowser.open, args=(server.url,), daemon=True).start()
            server.serve_forever()
        except KeyboardInterrupt:
            click.echo("ended", err=True)


def end_as_ctrl_c_does() -> None:
    """Let the other signals that end a command leave no scans behind, where nobody (nohup) has set them aside."""
    for name in ("SIGTERM", "SIGHUP"):  # Windows lacks the second
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
