"""Commands that use a model on scans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..errors import ArgumentError
from .common import check_ending, check_picture, load_for_registration, main, progress_bar, show, with_json, with_model


@main.command("features")
@click.option("-i", "--input", "scan", required=True, type=click.Path(path_type=Path), help="Scan: NIfTI or DICOM.")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help=".nii.gz; with --pool .npz, .json."
)
@click.option("--pool", is_flag=True, help="One mean vector of the bottleneck and of the local features.")
@click.option("--mask", type=click.Path(path_type=Path), help="With --pool: average over this mask, not over the body.")
@click.option("--picture", type=click.Path(path_type=Path), help="PNG of the first three principal components.")
@click.option(
    "--grid", type=click.Choice(["scan", "model"]), default="scan", show_default=True, help="Grid of the output."
)
@click.option("--precision", type=click.Choice(["float32", "bf16"]), default="float32", show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace an output that exists.")
@with_model
@with_json
def features_command(
    scan: Path,
    output: Path,
    pool: bool,
    mask: Path | None,
    picture: Path | None,
    grid: str,
    precision: str,
    overwrite: bool,
    name: str,
    device: str,
    as_json: bool,
) -> None:
    """Compute the features of a scan: dense on its grid, or pooled."""
    from ..film import FilmPreprocessing
    from ..inference import features as room
    from ..report import features_picture
    from ..volume import check_outputs, write_volume
    from ..zoo import load

    if (mask and not pool) or (picture and pool):
        raise ArgumentError("--mask goes with --pool, --picture without it", "leave one of them out")
    check_ending(output, *((".npz", ".json") if pool else (".nii", ".nii.gz")))
    check_picture(picture)
    check_outputs((output, picture), (scan, mask), overwrite)
    model = load(name, device=device)
    with progress_bar("features") as progress:
        if pool:
            pooled = room.pooled_features(scan, model, mask=mask, precision=precision, progress=progress)
            room.save_pooled(pooled, output)
            show({"output": str(output), "bottleneck": len(pooled.bottleneck), "local": len(pooled.local)}, as_json)
            return
        prepared = room.prepare_for(scan, model)
        dense = room.dense_features(prepared, model, grid=grid, precision=precision, progress=progress)
    volume = prepared.restore(dense) if grid == "scan" else prepared.place(dense)
    write_volume(volume, output, overwrite=overwrite)
    facts = {"output": str(output), "shape": list(volume.data.shape), "model": str(name)}
    if picture:
        components = room.principal_components(dense, room.body(prepared, model))
        film = isinstance(room.recipe_of(model), FilmPreprocessing)
        features_picture(prepared, components, picture, film=film, title=f"{scan.name}, {name}")
        facts["picture"] = str(picture)
    show(facts, as_json)


@main.command("segment")
@click.option(
    "-i",
    "--input",
    "scans",
    required=True,
    multiple=True,
    type=click.Path(path_type=Path),
    help="Scan (.nii, .nii.gz, DICOM series), or a folder of scans; once a channel.",
)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help=".nii.gz, or a folder.")
@click.option(
    "--support",
    "supports",
    nargs=2,
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="SCAN LABELS",
    help="A labelled scan, whose labels a model without a trained head carries over; as often as you like.",
)
@click.option(
    "--atlas",
    "atlases",
    nargs=2,
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="SCAN LABELS",
    help="Instead: a labelled scan to register onto this one, whose labels it takes over; as often as you like.",
)
@click.option("--mirror", is_flag=True, help="Average over mirror images: eight times the work, of films four.")
@click.option("--precision", type=click.Choice(["float32", "bf16"]), default="float32", show_default=True)
@click.option("--picture", type=click.Path(path_type=Path), help="PNG of the labels over the scan.")
@click.option("--overwrite", is_flag=True, help="Replace outputs that exist; a folder goes on without them otherwise.")
@click.option("--cluster", help="A dask scheduler (tcp://HOST:PORT), whose workers segment the folder.")
@with_model
@with_json
def segment_command(
    scans: tuple[Path, ...],
    output: Path,
    supports: tuple[tuple[Path, Path], ...],
    atlases: tuple[tuple[Path, Path], ...],
    mirror: bool,
    precision: str,
    picture: Path | None,
    overwrite: bool,
    cluster: str | None,
    name: str,
    device: str,
    as_json: bool,
) -> None:
    """Segment a scan, or every scan below a folder, with a fine-tuned model; or from labelled scans, without training:
    by the model's features (--support) or by registration (--atlas).
    """
    from ..film import FilmPreprocessing, own_plane, read_scan
    from ..inference import segment as room
    from ..inference.atlas import segment_by_atlas
    from ..inference.features import recipe_of
    from ..inference.support import fit_support
    from ..report import labels_picture
    from ..volume import check_outputs, dicom_files, read_volume, write_volume
    from ..zoo import load

    folder = scans[0] if len(scans) == 1 and scans[0].is_dir() and not dicom_files(scans[0]) else None
    if (folder and picture) or (cluster and not folder):
        raise ArgumentError("--picture goes with one scan, --cluster with a folder of scans", "leave it out")
    if atlases and (folder or supports or mirror or len(scans) > 1):
        raise ArgumentError("--atlas goes with one scan, without --support and --mirror", "leave one of them out")
    labelled = [path for pair in (*supports, *atlases) for path in pair]
    if folder and overwrite and any(output.resolve() in path.resolve().parents for path in labelled):
        raise ArgumentError(
            f"--overwrite with a labelled scan in {str(output)!r}", "leave it out, or keep that elsewhere"
        )
    if not folder:
        if not output.name.endswith((".nii", ".nii.gz")):
            raise ArgumentError(f"the output {output.name!r} is no label map", "end the name in .nii.gz or .nii")
        check_picture(picture)
        check_outputs((output, picture), (*scans, *labelled), overwrite)
        if not atlases:
            room.check_record(output, overwrite)
    backbone = load(name, device=device)
    film = isinstance(recipe_of(backbone), FilmPreprocessing)
    if labelled and film:
        remedy = "choose a 3D model, or fine-tune this one: gvsl-zoo finetune"
        raise ArgumentError("labels are carried over between volumes, and this is a model of films", remedy)
    if supports:
        model: Any = fit_support(supports, backbone, precision=precision)
    elif atlases:
        model = load_for_registration(name, device)
    else:
        room.trained_labels(backbone)
        model = load(name, task="segmentation", device=device)
    settings: dict[str, Any] = {"precision": precision, "mirror": mirror}
    records: list[dict[str, Any]]
    with progress_bar("segment") as progress:
        if atlases:
            carried = segment_by_atlas(scans[0], atlases, model, precision=precision, progress=progress)
            write_volume(carried, output, overwrite=overwrite)
            labels = room.label_volumes(carried, room.comment_labels(carried))
            records = [{"input": str(scans[0]), "output": str(output), "model": name, "labels": labels}]
        elif folder:
            records = room.segment_folder(
                folder, output, model, overwrite=overwrite, cluster=cluster, progress=progress, **settings
            )
        else:
            job = room.Job(scans, output)
            records = [room.segment_file(job, model, overwrite=overwrite, progress=progress, **settings)]
    if picture:
        shown, laid = read_scan(scans[0]), read_volume(output)
        shown, laid = (own_plane(shown), own_plane(laid)) if film else (shown, laid)
        title = f"{scans[0].name}, {name}"
        labels_picture(shown, laid, room.comment_labels(laid), picture, film=film, title=title)
    if as_json:
        click.echo(json.dumps(records if folder else records[0], indent=2))
    for record in () if as_json else records:
        found = [f"{label['name']} {label['ml']:.4g} ml" for label in record.get("labels", ())[1:] if label["voxels"]]
        done = "done before" if "skipped" in record else ", ".join(found) or "nothing found"
        if "error" not in record:
            click.echo(f"{record['output']}: {done}")
    bad = [record for record in records if "error" in record]
    for record in bad:
        click.echo(f"error: {record['input']}: {record['error']}", err=True)
    if bad:
        click.echo(f"error: {len(bad)} of {len(records)} scans failed; the others are done", err=True)
        click.get_current_context().exit(1)


@main.command("classify")
@click.option(
    "-i",
    "--input",
    "source",
    required=True,
    type=click.Path(path_type=Path, exists=True),
    help="A scan or film, a folder of them, or a data set's CSV, of which the test cases count if there are any.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="CSV of a row a case, as `evaluate` takes it.")
@click.option("--overwrite", is_flag=True, help="Replace an output that exists.")
@with_model
@with_json
def classify_command(source: Path, output: Path | None, overwrite: bool, name: str, device: str, as_json: bool) -> None:
    """Classify scans or films with a fine-tuned model: the probability of every class."""
    from ..transfer.classify import classify_all, scans_at, table_of, trained_classes
    from ..volume import check_outputs
    from ..weights import write_whole
    from ..zoo import load

    check_ending(output, ".csv")
    check_outputs([output], [source], overwrite)
    backbone: Any = load(name)
    labels = trained_classes(backbone)
    model = load(name, task="classification", device=device)
    scans = scans_at(source, films=backbone.ndim == 2, channels=backbone.in_chans)
    with progress_bar("classify") as progress:
        found, failed = classify_all(scans, model, progress=progress)
    if output and found:
        write_whole(output, table_of(found, labels).encode(errors="surrogateescape"))
    if as_json:
        click.echo(json.dumps(found, indent=2))
    for case, probabilities in () if as_json else found.items():
        click.echo(f"{case}: {', '.join(f'{label} {p:.3f}' for label, p in probabilities.items())}")
    for case, cause in failed.items():
        click.echo(f"error: {case}: {cause}", err=True)
    if failed:
        click.echo(f"error: {len(failed)} of {len(scans)} cases failed; the others are done", err=True)
        click.get_current_context().exit(1)


@main.command("demo")
@click.option(
    "-i",
    "--input",
    "scan",
    type=click.Path(path_type=Path),
    help="A scan, or a film for a model of films; default synthetic.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("demo"),
    show_default=True,
    help="Folder; the files of an earlier demonstration in it are replaced.",
)
@with_model
@with_json
def demo_command(scan: Path | None, output: Path, name: str, device: str, as_json: bool) -> None:
    """Show what a model does: features, restoration and matching, in one picture."""
    from ..demo import run_demo
    from ..film import read_for
    from ..inference.features import recipe_of
    from ..zoo import load

    model = load(name, task="pretraining", device=device)
    say = None if as_json else lambda line: click.echo(line, err=True)
    given = read_for(scan, recipe_of(model)) if scan else None
    result = run_demo(model, output, given, say)
    facts = {k: str(v) if isinstance(v, Path) else v for k, v in result._asdict().items()}
    show(facts, as_json)
