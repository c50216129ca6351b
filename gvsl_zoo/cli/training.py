"""Commands that make models and say what they are worth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from ..errors import ArgumentError
from ..pretrain.config import PRESETS
from .common import DEFAULT_MODEL, main, progress_bar, show, with_json

with_overlap = click.option("--allow-overlap", is_flag=True, help="Score cases seen in training too, and say which.")
TERMS = ("ncc", "smoothness", "restoration", "cross_entropy", "soft_dice_loss")  # shown while training


@main.command("prepare")
@click.option("-i", "--input", "source", required=True, type=click.Path(path_type=Path), help="Folder of scans.")
@click.option("-o", "--output", required=True, help="The store: a folder; or a URL, to copy a store to.")
@click.option("--spacing-mm", type=float, default=1.0, show_default=True, help="Isotropic; not used in 2D.")
@click.option("--own-spacing", is_flag=True, help="Keep each scan's own spacing instead.")
@click.option("--unit", type=click.Choice(["HU", "arbitrary", "grey"]), help="Default HU in 3D, grey in 2D.")
@click.option("--ndim", type=click.Choice(["2", "3"]), default="3", show_default=True, help="2: films, .png or DICOM.")
@click.option("--size", type=click.IntRange(1), help="Of films: pixels an axis to resize to.  [default: as they are]")
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
    size: int | None,
    table: Path | None,
    workers: int,
    cluster: str | None,
    as_json: bool,
) -> None:
    """Bring a folder of scans into a store to pre-train on. Run it again to go on, or after scans were added.

    With a URL as --output (s3://bucket/store), the store --input is copied there as it is; only --workers counts.
    """
    from ..pretrain.bucket import is_url
    from ..pretrain.prepare import prepare_store
    from ..pretrain.upload import upload_store

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
            size=size,
            table=table,
            workers=workers,
            cluster=cluster,
            progress=progress,
        )
    show(report.to_dict(), as_json)


@main.command("pretrain")
@click.option("--data", default="synthetic", show_default=True, help="synthetic, a store or its URL, or a scan folder.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder of the run.")
@click.option("--steps", type=click.IntRange(1), help="Steps of the whole run.  [default: the recipe's]")
@click.option("--preset", type=click.Choice(list(PRESETS)), help="[default: nano]")
@click.option("--recipe", metavar="NAME", help="In place of a preset: train as this model was, from where it started.")
@click.option("--ndim", type=click.IntRange(2, 3), help="2: films.  [default: 3]")
@click.option("--backbone", type=click.Choice(["unet", "xmorpher"]), help="[default: unet]")
@click.option("--objective", help="gvsl, restoration, matching, no-affine or gemini.  [default: gvsl]")
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
    steps: int | None,
    preset: str | None,
    recipe: str | None,
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

    A recipe of two runs gives the settings of the first; with --init those of the second.
    torchrun --nproc_per_node N -m gvsl_zoo pretrain ... trains on N devices.
    """
    from ..memory import keep_freed_memory
    from ..pretrain.config import settings_of
    from ..pretrain.data import is_first, open_data
    from ..pretrain.estimate import estimate
    from ..pretrain.loop import pretrain
    from ..pretrain.run import finished
    from ..recipes import read_recipe
    from ..zoo import load

    if preset and recipe:
        raise ArgumentError("both --preset and --recipe", "give one")
    keep_freed_memory()
    known = read_recipe(recipe) if recipe else None
    if known:
        made = known.settings if init else known.runs[0]
        base, init = asdict(made), init or known.start
        steps = steps or made.steps
        if made.ramp_steps is not None:
            base["ramp_steps"] = made.ramp_steps * steps // made.steps
    elif steps:
        base = PRESETS[preset or "nano"]
    else:
        raise click.UsageError("a run takes --steps, or a --recipe, which has its own")
    config = settings_of(base, steps, named, others)
    if (out / "checkpoints").exists() and not (resume or dry_run):
        raise ArgumentError(f"{out} holds a run", "add --resume to go on with it, or choose another folder")
    with progress_bar("prepare") as progress:
        size = known.film_size if known else None
        folder = None if dry_run else out
        real = open_data(data, config, folder, film_size=size, workers=workers, progress=progress)
    start: Any = partial(load, init, task="pretraining") if init else None
    if dry_run:
        show(estimate(config, real, device, workers, start), as_json)
        return
    with training_bar(config.steps) as progress:
        pretrain(config, out, real, device=device, workers=workers, init=start, progress=progress)
    if is_first():
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
    from ..pretrain.data import is_first
    from ..pretrain.run import finished
    from ..transfer.cases import read_cases
    from ..transfer.config import settings_of
    from ..transfer.finetune import best_record, finetune, read_log

    config = settings_of(steps, named, others)
    if (out / "checkpoints").exists() and not resume:
        raise ArgumentError(f"{out} holds a run", "add --resume to go on with it, or choose another folder")
    cases = read_cases(data, task=config.task, labels=parse_labels(labels))
    with training_bar(config.steps) as progress:
        finetune(cases, config, out, device=device, workers=workers, progress=progress)
    if is_first():
        show(finished(out) | best_record(read_log(out), config), as_json)


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


@main.command("evaluate")
@click.option("--predictions", required=True, type=click.Path(path_type=Path), help="Label file, folder of them, CSV.")
@click.option("--references", required=True, type=click.Path(path_type=Path), help="Likewise, or a data set.")
@click.option("--labels", metavar="NAME=VALUE,...", help="Labels to score.  [default: the data set's, or all]")
@click.option(
    "--task", type=click.Choice(["segmentation", "classification"]), default="segmentation", show_default=True
)
@click.option("--tolerance-mm", type=float, default=2.0, show_default=True, help="Of the surface Dice.")
@click.option("--model", help="Whose predictions they are: refuse cases that it saw in training. Name or path.")
@with_overlap
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the tables.")
@with_json
def evaluate_command(
    predictions: Path,
    references: Path,
    labels: str | None,
    task: str,
    tolerance_mm: float,
    model: str | None,
    allow_overlap: bool,
    output: Path,
    as_json: bool,
) -> None:
    """Score predictions: Dice, HD95 and surface Dice a case and label, or accuracy and AUC of classes."""
    from ..transfer.evaluate import WRITTEN, evaluate, lines

    for given in (predictions, references):
        if given.resolve() in [(output / name).resolve() for name in WRITTEN]:
            raise ArgumentError(f"the scores would replace the input {str(given)!r}", "choose another folder for them")
    with progress_bar("evaluate") as progress:
        found = evaluate(
            predictions,
            references,
            task=task,
            labels=parse_labels(labels),
            tolerance_mm=tolerance_mm,
            model=model,
            allow_overlap=allow_overlap,
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
@click.option(
    "--steps", type=click.IntRange(1), default=200, show_default=True, help="Of a training; a head alone: four times."
)
@click.option("--unit", type=click.Choice(["HU", "arbitrary", "grey"]), help="Of the scans, if not the models'.")
@click.option("--spacing-mm", type=float, help="Grid of the scans, isotropic.  [default: the models']")
@click.option("--crop", type=click.IntRange(1), help="Voxels an axis of a patch.  [default: 64; films 256]")
@click.option("--set", "others", multiple=True, metavar="NAME=VALUE", help="Any other setting of FinetuneConfig.")
@with_overlap
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
    allow_overlap: bool,
    device: str,
    as_json: bool,
    **named: Any,
) -> None:
    """Say whether zoo weights help on your task: against scratch, at several numbers of labelled scans."""
    from ..transfer.bench import bench
    from ..transfer.cases import read_cases
    from ..transfer.config import settings_of

    if counts and not all(count.strip().isdecimal() for count in counts.split(",")):
        raise ArgumentError(f"--counts {counts!r}", "write numbers of scans, as in 1,3,5")
    config = settings_of(steps, named, others)
    report = bench(
        read_cases(data, task=config.task, labels=parse_labels(labels)),
        [name.strip() for name in names.split(",")],
        config,
        out,
        counts=[int(count) for count in counts.split(",")] if counts else None,
        seeds=seeds,
        modes=[mode.strip() for mode in modes.split(",")],
        device=device,
        allow_overlap=allow_overlap,
        say=lambda line: click.echo(line, err=True),
    )
    if as_json:
        show(report.to_dict(), True)
    else:
        click.echo("\n".join([*report.lines(), f"every number: {out / 'results.json'}"]))


@main.command("reproduce")
@click.argument("name")
@click.option("--data", type=click.Path(path_type=Path), help="Folder of the recipe's scans.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder of the run; a run in it goes on.")
@click.option("--check", is_flag=True, help="Measure the weights that there are instead, without data and training.")
@click.option("--dry-run", is_flag=True, help="Say what it takes, check the files, and train nothing.")
@click.option("--steps", type=click.IntRange(1), help="Take only so many steps, to try it: there is no verdict then.")
@click.option("--threads", type=click.IntRange(1), help="Of the CPU.  [default: all]")
@click.option("--workers", type=click.IntRange(0), default=1, show_default=True, help="Processes that draw ahead.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@with_json
def reproduce_command(
    name: str,
    data: Path | None,
    out: Path | None,
    check: bool,
    dry_run: bool,
    steps: int | None,
    threads: int | None,
    workers: int,
    device: str,
    as_json: bool,
) -> None:
    """Make the weights of the model NAME again as its recipe says, and compare them with what it claims.

    Exit code 1 if a number is not reached.
    """
    import torch

    from .. import recipes
    from ..memory import keep_freed_memory
    from ..pretrain.data import is_first
    from ..pretrain.run import finished

    keep_freed_memory()
    if threads:
        torch.set_num_threads(threads)
    recipe = recipes.read_recipe(name)
    if dry_run:
        found = recipes.check_files(recipe, data) if data else []
        show(recipe.needs | {"found": len(found), "files": recipe.origins}, as_json)
        return
    if check:
        result = recipes.check(name, device=device)
    else:
        if out is None:
            raise ArgumentError("no folder for the run", "give --out, or --check to measure the weights that there are")
        if is_first() and not as_json:
            show(recipe.needs, False)
        if steps:
            before = replace(recipe.before, steps=steps) if recipe.before else None
            recipe = replace(recipe, settings=replace(recipe.settings, steps=steps), before=before)
        with training_bar(recipe.steps) as progress:
            options: dict[str, Any] = {"device": device, "workers": workers, "progress": progress}
            if steps:
                recipes.train(recipe, out, data, **options)
                if is_first():
                    show(finished(out), as_json)
                return
            result = recipes.reproduce(name, out, data, **options)
    if is_first() and as_json:
        show(result.to_dict(), True)
    elif is_first():
        click.echo("\n".join(result.lines()))
    if not result.reached:
        click.get_current_context().exit(1)


def parse_labels(text: str | None) -> dict[str, int] | None:
    """`liver=1,heart=2` as values by name."""
    if text is None:
        return None
    pairs = [[word.strip() for word in part.split("=")] for part in text.split(",")]
    if not all(len(pair) == 2 and pair[0] and pair[1].isdecimal() for pair in pairs):
        raise ArgumentError(f"--labels {text!r}", "write NAME=VALUE,NAME=VALUE, with the values of the label files")
    named = {name: int(value) for name, value in pairs}
    if len(named) < len(pairs):
        raise ArgumentError(f"--labels {text!r} gives a name twice", "give each of them one value")
    return named
