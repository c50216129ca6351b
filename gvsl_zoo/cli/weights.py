"""Commands that list, get, keep, check and give weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ArgumentError, RegistryError
from .common import DEFAULT_MODEL, main, progress_bar, show, with_json

if TYPE_CHECKING:
    from ..registry import ModelEntry

SHOWN = 7  # candidates of a ranking


@main.command("list")
@click.argument("pattern", default="*")
@click.option("--ndim", type=click.Choice(["2", "3"]), help="Spatial axes.")
@click.option("--modality", help="CT, MR or X-ray.")
@click.option("--task", help="backbone, segmentation, classification, registration or pretraining.")
@click.option("--available/--missing", default=None, help="Only models of a known hash, or only the others.")
@with_json
def list_command(
    pattern: str, ndim: str | None, modality: str | None, task: str | None, available: bool | None, as_json: bool
) -> None:
    """List the models, all or those that match PATTERN (as in 'gvsl-*')."""
    from ..registry import list_models, model_info

    names = list_models(pattern, ndim=int(ndim) if ndim else None, modality=modality, task=task, available=available)
    entries = [model_info(name) for name in names]
    if as_json:
        click.echo(json.dumps([entry.to_dict() for entry in entries], indent=2))
        return
    width = max((len(e.name) for e in entries), default=0)
    for e in entries:
        parameters = f"{e.parameters / 1e6:.1f}M"
        click.echo(
            f"{e.name:<{width}} {e.status:<10} {e.ndim}D {e.modality:<6} {e.objective:<7} {parameters:>6}  {e.summary}"
        )


@main.command("info")
@click.argument("name")
@with_json
def info_command(name: str, as_json: bool) -> None:
    """Say all that the registry knows of the model NAME, or the weights of a path know of themselves."""
    import yaml

    known = entry_of_name_or_path(name)
    entry = known.to_dict() | {"tasks": list(known.tasks)}
    click.echo(json.dumps(entry, indent=2) if as_json else yaml.safe_dump(entry, sort_keys=False, width=100).rstrip())


def entry_of_name_or_path(name: str) -> ModelEntry:
    """An entry; only one of a path needs PyTorch."""
    from ..registry import model_info

    try:
        return model_info(name)
    except RegistryError:
        from ..sources import is_path, open_path
        from ..zoo import entry_of

        if not is_path(name):
            raise
        return entry_of(open_path(Path(name)).file)


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
    from .. import hub, sources
    from ..registry import model_info

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
    from ..conversion import convert

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
    from .. import sources

    if output.suffix == ".onnx":
        from ..integrations.onnx import export_onnx
        from ..zoo import load

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
    from .. import sources

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
@click.option("--private", is_flag=True, help="Make a new repository private.  [default: as its organisation says]")
@click.option("--branch", help="Default main.")
@click.option("--message", help="Of the commit.")
@with_json
def push_command(name: str, repo: str, private: bool, branch: str | None, message: str | None, as_json: bool) -> None:
    """Put the model NAME (or a path) into the repository REPO (org/repo) of the Hub, with its card.

    From a folder go its own README.md, LICENSE and pictures.
    """
    from dataclasses import asdict

    import torch

    from ..hub import PREFIX
    from ..registry import model_info
    from ..sources import is_path
    from ..zoo import check_publishable, load, push_to_hub, widest_task

    if not (is_path(name) or name.startswith(PREFIX)):
        check_publishable(model_info(name))  # before it is downloaded
    model = load(name, task=widest_task(load(name).entry))
    stored = getattr(torch, str(model.load_report.stored_dtype), torch.float32)
    path = Path(name).expanduser() if is_path(name) else None
    beside = path if path and path.is_dir() else None
    report = push_to_hub(
        model, repo, private=private, branch=branch, commit_message=message, dtype=stored, beside=beside
    )
    if as_json:
        show(asdict(report), True)
    else:
        click.echo(f"pushed to {report.repo}; for a registry:\n{report.registry_lines}")


@main.command("verify")
@click.argument("names", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Every model of the registry that is on this machine.")
@click.option("--maths", is_flag=True, help="Also compute: the outputs on formula images against the model's proof.")
@click.option("--device", help="With --maths: cpu (default), cuda, cuda:N or mps.")
@click.option("--bf16", is_flag=True, help="With --maths: compute in bfloat16.")
@with_cache_dir
@with_json
def verify_command(
    names: tuple[str, ...],
    everything: bool,
    maths: bool,
    device: str | None,
    bf16: bool,
    cache_dir: Path | None,
    as_json: bool,
) -> None:
    """Read models NAMES (or paths) anew: bytes against the hash, tensors against the module. No network."""
    from ..doctor import verify
    from ..proof import verify_maths
    from ..registry import list_models
    from ..sources import Access

    if bool(names) == everything:
        raise ArgumentError("verify needs names, or --all", "for instance gvsl-zoo verify gvsl-unet-ct-nano")
    if not maths and (device or bf16):
        raise ArgumentError("--device and --bf16 go with --maths", "add it, or leave them out")
    access, checks = Access(cache_dir), []
    for name in names or list_models():
        found = verify(name, access)
        checks += found
        if maths and any(check.verdict == "PASS" for check in found):
            checks.append(verify_maths(name, access, device=device or "cpu", bf16=bf16))
    if everything:
        checks = [check for check in checks if check.verdict != "WARN"]
    show_checks(checks, as_json, fail_on=("FAIL", "WARN"))


@main.command("doctor")
@click.option("-i", "--input", "scan", type=click.Path(path_type=Path), help="A scan or film, instead of the machine.")
@click.option("--model", "name", help="With --input: registry name or path of the model that it is for.")
@click.option("--infer-preprocessing", is_flag=True, help="With --input: find which input the model was trained with.")
@with_cache_dir
@with_json
def doctor_command(
    scan: Path | None, name: str | None, infer_preprocessing: bool, cache_dir: Path | None, as_json: bool
) -> None:
    """Say what works on this machine and how to mend what does not, or whether a scan is right for a model."""
    from ..doctor import diagnose

    if scan is None:
        if name or infer_preprocessing:
            raise ArgumentError("--model and --infer-preprocessing go with --input", "name a scan")
        show_checks(diagnose(cache_dir), as_json, fail_on=("FAIL",))
    elif infer_preprocessing:
        _show_conventions(scan, name or DEFAULT_MODEL, cache_dir, as_json)
    else:
        from ..autopsy import autopsy

        show_checks(autopsy(scan, entry_named(name or DEFAULT_MODEL, cache_dir)), as_json, fail_on=("FAIL",))


def entry_named(name: str, cache_dir: Path | None) -> Any:
    """The entry of a model: of the registry without its weights, otherwise of the file."""
    from ..hub import PREFIX
    from ..registry import model_info
    from ..sources import is_path
    from ..zoo import load

    return load(name, cache_dir=cache_dir).entry if is_path(name) or name.startswith(PREFIX) else model_info(name)


def _show_conventions(scan: Path, name: str, cache_dir: Path | None, as_json: bool) -> None:
    """Rank the conventions that a model may have been trained with, a table a question."""
    from ..convention import infer_preprocessing, whole_module
    from ..sources import Access

    model = whole_module(name, Access(cache_dir))
    with progress_bar("conventions") as progress:
        rankings = infer_preprocessing(scan, model, progress=progress)
    if as_json:
        facts: dict[str, Any] = {}
        for ranking in rankings:
            rows = [
                {"choice": one.choice, "gain_db": one.gain, "behind_db": one.behind(ranking.candidates[0])}
                | {"declared": one.declared}
                for one in ranking.candidates
            ]
            facts[ranking.question] = {"alike": [one.choice for one in ranking.alike], "candidates": rows}
        click.echo(json.dumps(facts, indent=2))
        return
    for ranking in rankings:
        best, alike = ranking.candidates[0], ranking.alike
        verdict = "sure" if len(alike) == 1 else f"open: {len(alike)} of {len(ranking.candidates)} are alike"
        doubt = ", doubtful: even the best undoes no damage" if best.gain <= 0 else ""
        click.echo(f"{ranking.question}: {verdict}{doubt}")
        for one in ranking.candidates:
            if one in ranking.candidates[:SHOWN] or one.declared:
                less, error = one.behind(best)
                behind = "" if one is best else f", {less:.1f} +- {error:.1f} behind"
                note = " (as the model says)" if one.declared else ""
                click.echo(f"  {one.choice}: {one.gain:+.1f} dB{behind}{note}")


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
    from ..doctor import cached_models

    models = cached_models(cache_dir)
    show_cached(models, as_json)


@cache_group.command("remove")
@click.argument("name")
@with_cache_dir
@with_json
def cache_remove_command(name: str, cache_dir: Path | None, as_json: bool) -> None:
    """Remove the model NAME, as 'cache list' calls it, from the caches."""
    from ..doctor import remove_cached

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
