"""The command line: one thin function a sub-command. Errors are one line; exit codes 0 done, 1 failed, 2 wrong call."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from . import __version__
from .errors import ArgumentError, GvslZooError

DEFAULT_MODEL = "gvsl-unet-ct-nano"
TERMS = ("ncc", "smoothness", "restoration", "cross_entropy", "soft_dice_loss")  # shown while training


class Commands(click.Group):
    """A group whose commands fail with one line instead of a traceback, unless --debug is given."""

    def invoke(self, ctx: click.Context) -> Any:
        warnings.showwarning = lambda message, *_: click.echo(f"warning: {message}", err=True)
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if ctx.params["debug"]:
                raise
            known = isinstance(error, GvslZooError)
            text = str(error) if known else f"unexpected {type(error).__name__}: {error}; --debug shows where"
            click.echo(f"error: {text}", err=True)
            ctx.exit(2 if isinstance(error, ArgumentError) else 1)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gvsl-zoo")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Pre-trained backbones for medical volumes. Not a medical device."""


def with_json(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print facts as JSON.")(command)


def with_model(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps."),
        click.option("--model", "name", default=DEFAULT_MODEL, show_default=True, help="Registry name or path."),
    ):
        command = option(command)
    return command


@contextmanager
def progress_bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal's error stream, gone when done; nothing where there is no terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def show(facts: dict[str, Any], as_json: bool) -> None:
    """Print facts as JSON, or a line each; a pair of numbers is a before and an after."""
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    width = max(map(len, facts))
    for key, value in facts.items():
        if isinstance(value, dict):
            click.echo(key)
            show({f"  {name}": item for name, item in value.items()}, False)
        else:
            parts = value if isinstance(value, tuple) else [value]
            text = " -> ".join(f"{part:.4g}" if isinstance(part, float) else str(part) for part in parts)
            click.echo(f"{key:<{width}}  {text}")


@main.command("list")
@click.argument("pattern", default="*")
@click.option("--ndim", type=click.Choice(["2", "3"]), help="Spatial axes.")
@click.option("--modality", help="CT, MR or X-ray.")
@click.option("--task", help="backbone, segmentation, classification, registration or pretraining.")
@click.option("--available/--missing", default=None, help="Only models that load today, or only the others.")
@with_json
def list_command(
    pattern: str, ndim: str | None, modality: str | None, task: str | None, available: bool | None, as_json: bool
) -> None:
    """List the models, all or those that match PATTERN (as in 'gvsl-*')."""
    from .registry import list_models, model_info

    names = list_models(pattern, ndim=int(ndim) if ndim else None, modality=modality, task=task, available=available)
    entries = [model_info(name) for name in names]
    if as_json:
        click.echo(json.dumps([entry.to_dict() for entry in entries], indent=2))
        return
    for e in entries:
        parameters = f"{e.parameters / 1e6:.1f}M"
        click.echo(
            f"{e.name:<20} {e.status:<10} {e.ndim}D {e.modality:<6} {e.objective:<7} {parameters:>6}  {e.summary}"
        )


@main.command("info")
@click.argument("name")
@with_json
def info_command(name: str, as_json: bool) -> None:
    """Say all that the registry knows of the model NAME."""
    import yaml

    from .registry import model_info

    entry = model_info(name).to_dict() | {"tasks": list(model_info(name).tasks)}
    click.echo(json.dumps(entry, indent=2) if as_json else yaml.safe_dump(entry, sort_keys=False, width=100).rstrip())


# --- Getting, keeping and giving weights ----------------------------------------------------------------------


def with_cache_dir(command: Callable[..., Any]) -> Callable[..., Any]:
    text = "A Hub cache of your own; default the Hub's (HF_HOME, HF_HUB_CACHE)."
    return click.option("--cache-dir", type=click.Path(path_type=Path), help=text)(command)


@main.command("download")
@click.argument("name")
@click.option("--from-file", type=click.Path(path_type=Path), help="Take this file, downloaded by hand, instead.")
@click.option("--revision", help="Of an hf-hub: name: commit, branch or tag.")
@with_cache_dir
@with_json
def download_command(
    name: str, from_file: Path | None, revision: str | None, cache_dir: Path | None, as_json: bool
) -> None:
    """Bring the weights of the model NAME (or hf-hub:org/repo) into the cache, and check them."""
    from . import hub, sources
    from .registry import model_info

    access = sources.Access(cache_dir)
    if name.startswith(hub.PREFIX):
        if from_file:
            raise ArgumentError("--from-file with an hf-hub: name", "load the path of the file")
        found = sources.from_hub_name(name, revision, access)
    else:
        if revision:
            raise ArgumentError(f"--revision with the registry's {name}", f"it goes with {hub.PREFIX}org/repo")
        entry = model_info(name)
        found = sources.adopt(entry, from_file, access) if from_file else sources.locate(entry, access)
    facts = {"model": name, "file": str(found.file.path), "bytes": found.file.size, "sha256": found.sha256}
    show(facts, as_json)


@main.command("convert")
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path))
@click.argument("destination", metavar="DST", type=click.Path(path_type=Path))
@click.option("--name", help="The registry's model that SRC is: its input, licence and citation go into DST.")
@click.option("--overwrite", is_flag=True, help="Replace a DST that exists.")
@with_json
def convert_command(source: Path, destination: Path, name: str | None, overwrite: bool, as_json: bool) -> None:
    """Convert a checkpoint of the released code, SRC (.pth), to safetensors, DST."""
    from .conversion import convert

    show(convert(source, destination, name=name, overwrite=overwrite).to_dict(), as_json)


@main.command("export")
@click.argument("name")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="A .safetensors file, a folder (a mirror), or an .onnx file.",
)
@click.option("--task", help="Of an .onnx file: backbone (the default), or the task of a trained head.")
@click.option("--overwrite", is_flag=True, help="Replace an output that exists.")
@with_cache_dir
@with_json
def export_command(
    name: str, output: Path, task: str | None, overwrite: bool, cache_dir: Path | None, as_json: bool
) -> None:
    """Write the model NAME with its card as one file, for a machine without network, or as ONNX."""
    from . import sources

    if output.suffix == ".onnx":
        from .integrations.onnx import export_onnx
        from .zoo import load

        path = export_onnx(load(name, task=task or "backbone", cache_dir=cache_dir), output, overwrite=overwrite)
    elif task:
        raise ArgumentError(f"--task with {output}", "it goes with an .onnx file; other outputs hold all tasks")
    else:
        path = sources.export_bundle(name, output, sources.Access(cache_dir), overwrite=overwrite)
    show({"model": name, "output": str(path), "bytes": path.stat().st_size}, as_json)


@main.command("import")
@click.argument("bundle", type=click.Path(path_type=Path))
@with_cache_dir
@with_json
def import_command(bundle: Path, cache_dir: Path | None, as_json: bool) -> None:
    """Put the BUNDLE that 'export' wrote, or a folder of them, where models are loaded from by name."""
    from . import sources

    if bundle.is_dir() and not list(bundle.glob("*.safetensors")):
        raise ArgumentError(f"{bundle} holds no bundle", "give a folder of .safetensors files that 'export' wrote")
    paths = sorted(bundle.glob("*.safetensors")) if bundle.is_dir() else [bundle]
    facts = {}
    for path in paths:
        name, found = sources.import_bundle(path, cache_dir)
        facts[name] = {"file": str(found.file.path), "sha256": found.sha256}
    show(facts, as_json)


@main.command("push")
@click.argument("name")
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--branch", help="Default main.")
@click.option("--message", help="Of the commit.")
@with_json
def push_command(name: str, repo: str, private: bool, branch: str | None, message: str | None, as_json: bool) -> None:
    """Put the model NAME (or a path) into the repository REPO (org/repo) of the Hub, with its card."""
    from dataclasses import asdict

    import torch

    from .hub import PREFIX
    from .registry import model_info
    from .sources import is_path
    from .zoo import check_publishable, load, push_to_hub, widest_task

    if not (is_path(name) or name.startswith(PREFIX)):
        check_publishable(model_info(name))  # before it is downloaded
    model = load(name, task=widest_task(load(name).entry))  # type: ignore[arg-type]
    stored = getattr(torch, str(model.load_report.stored_dtype), torch.float32)  # type: ignore[union-attr]
    report = push_to_hub(model, repo, private=private, branch=branch, commit_message=message, dtype=stored)
    if as_json:
        show(asdict(report), True)
    else:
        click.echo(f"pushed to {report.repo}; for a registry:\n{report.registry_lines}")


@main.command("verify")
@click.argument("names", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Every model of the registry that is on this machine.")
@with_cache_dir
@with_json
def verify_command(names: tuple[str, ...], everything: bool, cache_dir: Path | None, as_json: bool) -> None:
    """Read models NAMES (or paths) anew: bytes against the hash, tensors against the module. No network."""
    from .doctor import verify
    from .registry import list_models
    from .sources import Access

    if bool(names) == everything:
        raise ArgumentError("verify needs names, or --all", "for instance gvsl-zoo verify gvsl-unet-ct-nano")
    checks = [check for name in names or list_models() for check in verify(name, Access(cache_dir))]
    if everything:
        checks = [check for check in checks if check.verdict != "WARN"]
    show_checks(checks, as_json, fail_on=("FAIL", "WARN"))


@main.command("doctor")
@with_cache_dir
@with_json
def doctor_command(cache_dir: Path | None, as_json: bool) -> None:
    """Say what works on this machine and how to mend what does not."""
    from .doctor import diagnose

    show_checks(diagnose(cache_dir), as_json, fail_on=("FAIL",))


def show_checks(checks: list[Any], as_json: bool, fail_on: tuple[str, ...]) -> None:
    """Print findings, a line each with its fix below; exit code 1 if one is of `fail_on`."""
    from dataclasses import asdict

    if as_json:
        click.echo(json.dumps([asdict(check) for check in checks], indent=2))
    for check in () if as_json else checks:
        click.echo(f"{check.verdict}  {check.what}: {check.seen}" + (f"\n      -> {check.fix}" if check.fix else ""))
    if any(check.verdict in fail_on for check in checks):
        click.get_current_context().exit(1)


@main.group("cache")
def cache_group() -> None:
    """See and clear what downloads left on this machine."""


@cache_group.command("list")
@with_cache_dir
@with_json
def cache_list_command(cache_dir: Path | None, as_json: bool) -> None:
    """List cached models, their sizes and the total."""
    from .doctor import cached_models

    models = cached_models(cache_dir)
    show_cached(models, as_json)


@cache_group.command("remove")
@click.argument("name")
@with_cache_dir
@with_json
def cache_remove_command(name: str, cache_dir: Path | None, as_json: bool) -> None:
    """Remove the model NAME, as 'cache list' calls it, from the caches."""
    from .doctor import remove_cached

    show_cached(remove_cached(name, cache_dir), as_json)


def show_cached(models: list[Any], as_json: bool) -> None:
    total = sum(model.bytes for model in models)
    if as_json:
        rows = [{"name": m.name, "kind": m.kind, "bytes": m.bytes, "path": str(m.path)} for m in models]
        click.echo(json.dumps({"models": rows, "bytes": total}, indent=2))
        return
    for m in models:
        click.echo(f"{m.bytes / 1e6:9.1f} MB  {m.kind:<8}  {m.name}")
    click.echo(f"{total / 1e6:9.1f} MB  in all")


# --- Using models -----------------------------------------------------------------------------------------------


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
    from .inference import features as room
    from .report import features_picture
    from .volume import check_output, write_volume
    from .zoo import load

    if (mask and not pool) or (picture and pool):
        raise ArgumentError("--mask goes with --pool, --picture without it", "leave one of them out")
    if picture and picture.resolve() == output.resolve():
        raise ArgumentError(f"--picture and --output are both {output}", "give each its own")
    wanted = (".npz", ".json") if pool else (".nii", ".nii.gz")
    if not output.name.endswith(wanted):
        raise ArgumentError(
            f"the output {output.name!r} has no ending for this", f"end the name in {' or '.join(wanted)}"
        )
    for path in filter(None, (output, picture)):
        check_output(path, scan, overwrite)
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
        features_picture(prepared, components, picture, title=f"{scan.name}, {name}")
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
@click.option("--mirror", is_flag=True, help="Average over mirror images: eight times the work.")
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
    from .inference import segment as room
    from .inference.atlas import segment_by_atlas
    from .inference.support import fit_support
    from .report import labels_picture
    from .volume import check_output, dicom_files, read_volume, write_volume
    from .zoo import load

    folder = scans[0] if len(scans) == 1 and scans[0].is_dir() and not dicom_files(scans[0]) else None
    if (folder and picture) or (cluster and not folder):
        raise ArgumentError("--picture goes with one scan, --cluster with a folder of scans", "leave it out")
    if atlases and (folder or supports or mirror or len(scans) > 1):
        raise ArgumentError("--atlas goes with one scan, without --support and --mirror", "leave one of them out")
    if not folder:
        if not output.name.endswith((".nii", ".nii.gz")):
            raise ArgumentError(f"the output {output.name!r} is no label map", "end the name in .nii.gz or .nii")
        for path in filter(None, (output, picture)):
            check_output(path, scans[0], overwrite)
    backbone = load(name, device=device)
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
            records = [room.segment_file(room.Job(scans, output), model, progress=progress, **settings)]
    if picture:
        labels_picture(
            read_volume(scans[0]),
            (shown := read_volume(output)),
            room.comment_labels(shown),
            picture,
            title=f"{scans[0].name}, {name}",
        )
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


@main.command("demo")
@click.option(
    "-i", "--input", "scan", type=click.Path(path_type=Path), help="A CT, .nii or .nii.gz; default synthetic."
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=Path("demo"), show_default=True, help="Folder."
)
@with_model
@with_json
def demo_command(scan: Path | None, output: Path, name: str, device: str, as_json: bool) -> None:
    """Show what a model does: features, restoration and matching, in one picture."""
    from .demo import run_demo
    from .volume import read_volume
    from .zoo import load

    model = load(name, task="pretraining", device=device)
    say = None if as_json else lambda line: click.echo(line, err=True)
    result = run_demo(model, output, read_volume(scan) if scan else None, say)  # type: ignore[arg-type]
    facts = {k: str(v) if isinstance(v, Path) else v for k, v in result._asdict().items()}
    show(facts, as_json)


# --- Making models ----------------------------------------------------------------------------------------------


@main.command("prepare")
@click.option("-i", "--input", "source", required=True, type=click.Path(path_type=Path), help="Folder of scans.")
@click.option("-o", "--output", required=True, help="The store: a folder; or a URL, to copy a store to.")
@click.option("--spacing-mm", type=float, default=1.0, show_default=True, help="Isotropic; not used in 2D.")
@click.option("--own-spacing", is_flag=True, help="Keep each scan's own spacing instead.")
@click.option("--unit", type=click.Choice(["HU", "arbitrary", "grey"]), help="Default HU in 3D, grey in 2D.")
@click.option("--ndim", type=click.Choice(["2", "3"]), default="3", show_default=True, help="2: films, .png.")
@click.option("--table", type=click.Path(path_type=Path), help="CSV that chooses files: path, subject, stratum.")
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Processes.")
@click.option("--cluster", help="A dask scheduler (tcp://HOST:PORT), whose workers are used instead.")
@with_json
def prepare_command(
    source: Path,
    output: str,
    spacing_mm: float,
    own_spacing: bool,
    unit: str | None,
    ndim: str,
    table: Path | None,
    workers: int,
    cluster: str | None,
    as_json: bool,
) -> None:
    """Bring a folder of scans into a store to pre-train on. Run it again to go on, or after scans were added.

    With a URL as --output (s3://bucket/store), the store --input is copied there as it is; only --workers counts.
    """
    from .pretrain.bucket import is_url
    from .pretrain.prepare import prepare_store
    from .pretrain.upload import upload_store

    if is_url(output):
        with progress_bar("copy") as progress:
            copied = upload_store(source, output, workers=workers, progress=progress)
        show(copied.to_dict(), as_json)
        return
    with progress_bar("prepare") as progress:
        report = prepare_store(
            source,
            output,
            spacing_mm=None if own_spacing else spacing_mm,
            unit=unit or ("HU" if ndim == "3" else "grey"),
            ndim=int(ndim),
            table=table,
            workers=workers,
            cluster=cluster,
            progress=progress,
        )
    show(report.to_dict(), as_json)


@main.command("pretrain")
@click.option("--data", default="synthetic", show_default=True, help="synthetic, a store or its URL, or a scan folder.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder of the run.")
@click.option("--steps", required=True, type=click.IntRange(1), help="Steps of the whole run.")
@click.option("--preset", type=click.Choice(["nano", "small", "base"]), default="nano", show_default=True)
@click.option("--ndim", type=click.IntRange(2, 3), help="2: films.  [default: 3]")
@click.option("--objective", help="gvsl, restoration, matching or no-affine.  [default: gvsl]")
@click.option("--batch-size", type=click.IntRange(1), help="Pairs a process.")
@click.option("--crop", type=click.IntRange(16), help="Voxels an axis.")
@click.option("--seed", type=click.IntRange(0), help="Decides every draw.  [default: 0]")
@click.option("--save-every", type=click.IntRange(1), help="Steps between checkpoints.")
@click.option("--set", "others", multiple=True, metavar="NAME=VALUE", help="Any other setting of PretrainConfig.")
@click.option("--init", help="Start from the weights of this model: a registry name or a path.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out, if there is one.")
@click.option("--workers", type=click.IntRange(0), default=1, show_default=True, help="Processes that draw ahead.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--dry-run", is_flag=True, help="Take three steps and estimate time and memory; write nothing.")
@with_json
def pretrain_command(
    data: str,
    out: Path,
    steps: int,
    preset: str,
    others: tuple[str, ...],
    init: str | None,
    resume: bool,
    workers: int,
    device: str,
    dry_run: bool,
    as_json: bool,
    **named: Any,
) -> None:
    """Pre-train a backbone by matching anatomy, on synthetic anatomy and on scans of your own.

    torchrun --nproc_per_node N -m gvsl_zoo pretrain ... trains on N devices.
    """
    from .memory import keep_freed_memory
    from .pretrain.config import settings_of
    from .pretrain.data import open_data
    from .pretrain.estimate import estimate
    from .pretrain.loop import pretrain
    from .pretrain.run import finished
    from .zoo import load

    keep_freed_memory()
    config = settings_of(preset, steps, named, others)
    if (out / "checkpoints").exists() and not (resume or dry_run):
        raise ArgumentError(f"{out} holds a run", "add --resume to go on with it, or choose another folder")
    real = open_data(data, config, None if dry_run else out)
    start = load(init, task="pretraining") if init else None
    if dry_run:
        show(estimate(config, real, device, workers), as_json)
        return
    with training_bar(config.steps) as progress:
        pretrain(config, out, real, device=device, workers=workers, init=start, progress=progress)  # type: ignore[arg-type]
    show(finished(out), as_json)


@main.command("finetune")
@click.option("--data", required=True, type=click.Path(path_type=Path), help="nnU-Net folder, images/ + labels/, CSV.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder of the run.")
@click.option("--steps", required=True, type=click.IntRange(1), help="Steps of the whole run.")
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help="Registry name or path.")
@click.option(
    "--task", type=click.Choice(["segmentation", "classification"]), default="segmentation", show_default=True
)
@click.option("--mode", type=click.Choice(["full", "linear"]), help="linear: the head alone.  [default: full]")
@click.option("--from-scratch", is_flag=True, help="The same network with weights drawn at random.")
@click.option("--labels", metavar="NAME=VALUE,...", help="Labels to learn.  [default: the data set's, or all]")
@click.option("--unit", type=click.Choice(["HU", "arbitrary", "grey"]), help="Of the scans, if not the model's.")
@click.option("--spacing-mm", type=float, help="Grid of the scans, isotropic.  [default: the model's]")
@click.option("--crop", type=click.IntRange(1), help="Voxels an axis of a patch.  [default: 64; films 256]")
@click.option("--seed", type=click.IntRange(0), help="Decides every draw.  [default: 0]")
@click.option("--set", "others", multiple=True, metavar="NAME=VALUE", help="Any other setting of FinetuneConfig.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out, if there is one.")
@click.option("--workers", type=click.IntRange(0), default=0, show_default=True, help="Processes that draw ahead.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@with_json
def finetune_command(
    data: Path,
    out: Path,
    steps: int,
    labels: str | None,
    others: tuple[str, ...],
    resume: bool,
    workers: int,
    device: str,
    as_json: bool,
    **named: Any,
) -> None:
    """Train a head, and with mode full its backbone, on labelled scans; what validates best on held-out subjects stays.

    The run's folder is a model: load(OUT, task=TASK). Label files say 0 where there is background.
    """
    from .pretrain.run import finished
    from .transfer.cases import read_cases
    from .transfer.config import settings_of
    from .transfer.finetune import best_record, finetune

    config = settings_of(steps, named, others)
    if (out / "checkpoints").exists() and not resume:
        raise ArgumentError(f"{out} holds a run", "add --resume to go on with it, or choose another folder")
    cases = read_cases(data, task=config.task, labels=parse_labels(labels))
    with training_bar(config.steps) as progress:
        finetune(cases, config, out, device=device, workers=workers, progress=progress)
    show(finished(out) | best_record(out, config), as_json)


@contextmanager
def training_bar(steps: int) -> Iterator[Callable[[dict[str, float]], None]]:
    """A bar with the terms of the loss, steps a second and the time left; nothing where there is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=steps)

        def advance(record: dict[str, float]) -> None:
            terms = [f"{name} {record[name]:.3f}" for name in TERMS if name in record]
            text = f"{', '.join(terms)}, {1 / record['seconds']:.1f} steps/s"
            bar.update(task, completed=record["step"], description=text)

        yield advance


# --- Is it any good? --------------------------------------------------------------------------------------------


@main.command("evaluate")
@click.option("--predictions", required=True, type=click.Path(path_type=Path), help="Label file, folder of them, CSV.")
@click.option("--references", required=True, type=click.Path(path_type=Path), help="Likewise, or a data set.")
@click.option("--labels", metavar="NAME=VALUE,...", help="Labels to score.  [default: the data set's, or all]")
@click.option(
    "--task", type=click.Choice(["segmentation", "classification"]), default="segmentation", show_default=True
)
@click.option("--tolerance-mm", type=float, default=2.0, show_default=True, help="Of the surface Dice.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the tables.")
@with_json
def evaluate_command(
    predictions: Path,
    references: Path,
    labels: str | None,
    task: str,
    tolerance_mm: float,
    output: Path,
    as_json: bool,
) -> None:
    """Score predictions: Dice, HD95 and surface Dice a case and label, or accuracy and AUC of classes."""
    from .transfer.evaluate import evaluate, lines

    with progress_bar("evaluate") as progress:
        found = evaluate(
            predictions,
            references,
            task=task,
            labels=parse_labels(labels),
            tolerance_mm=tolerance_mm,
            progress=progress,
        )
    found.write(output)
    if as_json:
        show(found.to_dict(), True)
    else:
        click.echo("\n".join([*lines(found), f"cases and labels one by one: {output / 'scores.csv'}"]))
    if found.missing:
        click.echo(f"error: {len(found.missing)} cases without a prediction: {', '.join(found.missing)}", err=True)
        click.get_current_context().exit(1)


@main.command("bench")
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Labelled scans: see finetune.")
@click.option("--model", "names", default=DEFAULT_MODEL, show_default=True, help="Names or paths: NAME[,NAME...].")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder; a bench in it goes on.")
@click.option(
    "--task", type=click.Choice(["segmentation", "classification"]), default="segmentation", show_default=True
)
@click.option("--labels", metavar="NAME=VALUE,...", help="Labels to learn.  [default: the data set's, or all]")
@click.option("--counts", help="Labelled subjects to train on.  [default: 1,3,5,10 as far as there are]")
@click.option("--seeds", type=click.IntRange(3), default=3, show_default=True, help="Repeats of every training.")
@click.option("--modes", default="full,linear", show_default=True, help="Of training: full, linear or both.")
@click.option("--steps", type=click.IntRange(1), default=200, show_default=True, help="Of every training.")
@click.option("--unit", type=click.Choice(["HU", "arbitrary", "grey"]), help="Of the scans, if not the models'.")
@click.option("--spacing-mm", type=float, help="Grid of the scans, isotropic.  [default: the models']")
@click.option("--crop", type=click.IntRange(1), help="Voxels an axis of a patch.  [default: 64; films 256]")
@click.option("--set", "others", multiple=True, metavar="NAME=VALUE", help="Any other setting of FinetuneConfig.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@with_json
def bench_command(
    data: Path,
    names: str,
    out: Path,
    labels: str | None,
    counts: str | None,
    seeds: int,
    modes: str,
    steps: int,
    others: tuple[str, ...],
    device: str,
    as_json: bool,
    **named: Any,
) -> None:
    """Say whether zoo weights help on your task: against scratch, at several numbers of labelled scans."""
    from .transfer.bench import bench
    from .transfer.cases import read_cases
    from .transfer.config import settings_of

    if counts and not all(count.strip().isdecimal() for count in counts.split(",")):
        raise ArgumentError(f"--counts {counts!r}", "write numbers of scans, as in 1,3,5")
    config = settings_of(steps, named, others)
    report = bench(
        read_cases(data, task=config.task, labels=parse_labels(labels)),
        names.split(","),
        config,
        out,
        counts=[int(count) for count in counts.split(",")] if counts else None,
        seeds=seeds,
        modes=modes.split(","),
        device=device,
        say=lambda line: click.echo(line, err=True),
    )
    if as_json:
        show(report.to_dict(), True)
    else:
        click.echo("\n".join([*report.lines(), f"every number: {out / 'results.json'}"]))


def parse_labels(text: str | None) -> dict[str, int] | None:
    """`liver=1,heart=2` as values by name."""
    if text is None:
        return None
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name.strip() and value.strip().isdecimal() for name, _, value in pairs):
        raise ArgumentError(f"--labels {text!r}", "write NAME=VALUE,NAME=VALUE, with the values of the label files")
    return {name.strip(): int(value) for name, _, value in pairs}


# --- Matching scans ---------------------------------------------------------------------------------------------


@main.command("register")
@click.option("--fixed", required=True, type=click.Path(path_type=Path), help="Scan that stays.")
@click.option("--moving", required=True, type=click.Path(path_type=Path), help="Scan that is brought onto it.")
@click.option("--warped-out", type=click.Path(path_type=Path), help="Moving scan on the fixed one's grid, .nii.gz.")
@click.option("--transform-out", type=click.Path(path_type=Path), help="The whole transform for ITK and ANTs, .nii.gz.")
@click.option("--affine-out", type=click.Path(path_type=Path), help="Its affine part, .tfm or .mat.")
@click.option("--save-inverse", type=click.Path(path_type=Path), help="Its inverse on the moving scan's grid, .nii.gz.")
@click.option("--jacobian-out", type=click.Path(path_type=Path), help="Local volume change, .nii.gz.")
@click.option("--picture", type=click.Path(path_type=Path), help="PNG: before, after, checkerboard, lattice.")
@click.option("--fixed-mask", type=click.Path(path_type=Path), help="Only there the fixed scan counts.")
@click.option("--moving-mask", type=click.Path(path_type=Path), help="Only there the moving scan counts.")
@click.option("--moving-labels", type=click.Path(path_type=Path), help="Label map of the moving scan to bring along.")
@click.option("--labels-out", type=click.Path(path_type=Path), help="Where it goes, .nii.gz.")
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
    """Register the scan --moving onto --fixed, and say how well they agree."""
    import numpy as np

    from .inference.register import register
    from .report import registration_picture
    from .transforms import Affine, Grid, to_displacement, warp_volume, write_transform
    from .volume import check_output, read_volume, write_volume

    if bool(moving_labels) != bool(labels_out):
        raise ArgumentError("--moving-labels and --labels-out go together", "give both")
    for path, endings in (
        (warped_out, (".nii", ".nii.gz")),
        (transform_out, (".nii", ".nii.gz", ".h5")),
        (affine_out, (".tfm", ".txt", ".mat")),
        (save_inverse, (".nii", ".nii.gz", ".h5")),
        (jacobian_out, (".nii", ".nii.gz")),
        (labels_out, (".nii", ".nii.gz")),
        (picture, (".png",)),
    ):
        if path and not path.name.endswith(endings):
            raise ArgumentError(f"the output {path.name!r} has no ending for this", f"end it in {' or '.join(endings)}")
        if path:
            check_output(path, fixed, overwrite)
            check_output(path, moving, overwrite)
    still, moved = read_volume(fixed), read_volume(moving)
    model = load_for_registration(name, device)
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
    grid = Grid.of(still)
    if warped_out:
        write_volume(found.warped, warped_out, overwrite=overwrite)
    if transform_out:
        write_transform(found.displacement_mm, transform_out, overwrite=overwrite)
    if affine_out:
        write_transform(found.affine, affine_out, overwrite=overwrite)
    if save_inverse:
        inverse = to_displacement(found.displacement_mm.inverse(), Grid.of(moved))
        write_transform(inverse, save_inverse, overwrite=overwrite)
    if jacobian_out:
        write_volume(found.jacobian, jacobian_out, overwrite=overwrite)
    if moving_labels and labels_out:
        labels = warp_volume(read_volume(moving_labels), found.displacement_mm, grid, nearest=True)
        write_volume(labels, labels_out, overwrite=overwrite)
    if picture:
        before = warp_volume(moved, Affine(np.eye(4)), grid)
        registration_picture(still, before, found, picture, title=f"{moving.name} on {fixed.name}")
    outputs = (warped_out, transform_out, affine_out, save_inverse, jacobian_out, labels_out, picture)
    show(found.report | {"outputs": [str(path) for path in outputs if path]}, as_json)


def load_for_registration(name: str, device: str) -> Any:
    """A model with its matching heads, or its backbone where it has none."""
    from .zoo import load

    entry: Any = load(name).entry
    return load(name, task="registration" if "registration" in entry.tasks else "backbone", device=device)


@main.command("warp")
@click.option("-i", "--input", "scan", type=click.Path(path_type=Path), help="Moving scan or label map.")
@click.option("--points", type=click.Path(path_type=Path), help="Instead: a CSV with columns x, y, z in RAS+ mm.")
@click.option("--fixed", type=click.Path(path_type=Path), help="Scan whose grid is wanted; with --points optional.")
@click.option(
    "--transform", "paths", required=True, multiple=True, type=click.Path(path_type=Path), help="Of ITK, ANTs or ours."
)
@click.option("--inverse", is_flag=True, help="Invert the transform, or the whole chain.")
@click.option("--labels", is_flag=True, help="Take the nearest voxel and keep the type.")
@click.option("--lps", is_flag=True, help="The points are in LPS, as ITK's and ANTs' are.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help=".nii.gz; with --points .csv.")
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
    from .transforms import Chain, Grid, read_points, read_transform, warp_volume, write_points
    from .volume import check_output, read_volume, write_volume

    if bool(scan) == bool(points) or (scan and (lps or not fixed)) or (points and labels):
        raise ArgumentError(
            "warp needs -i with --fixed [--labels], or --points [--fixed] [--lps]", "see gvsl-zoo warp --help"
        )
    wanted = (".nii", ".nii.gz") if scan else (".csv",)
    if not output.name.endswith(wanted):
        raise ArgumentError(f"the output {output.name!r} has no ending for this", f"end it in {' or '.join(wanted)}")
    check_output(output, scan or points, overwrite)
    transforms = [read_transform(path) for path in reversed(paths)]
    transform = transforms[0] if len(transforms) == 1 else Chain(tuple(transforms))
    transform = transform.inverse() if inverse else transform
    grid = Grid.of(read_volume(fixed)) if fixed else None
    if scan and grid:
        volume = warp_volume(read_volume(scan), transform, grid, nearest=labels)
        write_volume(volume, output, overwrite=overwrite)
        show({"output": str(output), "shape": list(volume.shape)}, as_json)
    elif points:
        table = read_points(points, lps=lps)
        moved = transform.map(table.points_mm)
        write_points(table._replace(points_mm=moved.points_mm), output, lps=lps, overwrite=overwrite)
        facts = {"output": str(output), "points": len(table.rows)}
        doubts = {"beyond the displacement": moved.beyond, "without an inverse": moved.unsolved}
        if grid:
            on_fixed = moved.points_mm if inverse else table.points_mm
            doubts["outside the fixed scan"] = ~grid.contains(grid.index(on_fixed))
        show(facts | {what: (rows.nonzero()[0] + 1).tolist() for what, rows in doubts.items()}, as_json)
