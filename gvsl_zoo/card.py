"""Model cards: a registry entry as the files that lie beside its weights on the Hub or in a folder."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, distribution

from . import __version__
from .errors import RegistryError
from .registry import Evaluation, InputStatistics, ModelEntry, Proof, model_info

LIBRARY = "gvsl-zoo"
HERE = "path/to/this/folder"  # how a card calls the folder that it lies in
HUB_LICENCES = {  # the Hub's names, which are those of SPDX in small letters; it knows more
    *("apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0"),
    *("cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "openrail"),
}
PICTURES = {  # beside the card, as NAME-KIND.png: what scripts/card_pictures.py draws
    "features": "A scan, and the first three principal components of its features as red, green and blue.",
    "voxels": "Features of labelled voxels, by t-SNE: without training on the left, of this model on the right.",
    "matches": "Fixed and moving anatomy, and the moving one as the model brings it onto the fixed.",
    "curves": "Learning curves.",
}
TASK_TYPES = {"segmentation": "image-segmentation", "classification": "image-classification"}  # the Hub's names


def card_files(entry: ModelEntry, repo: str | None = None, pictures: Collection[str] = ()) -> dict[str, str]:
    """config.json, preprocessor_config.json, LICENSE and README.md (the card), by their names.

    Args:
        repo: the repository on the Hub for which they are made, to tell how to load it from there.
        pictures: names of the files that lie beside the card; of them it shows those that it knows (`PICTURES`).
    """
    config = {"library_name": LIBRARY, "library_version": __version__, "entry": entry.to_dict()}
    return {
        "config.json": json.dumps(config, indent=2) + "\n",
        "preprocessor_config.json": json.dumps(entry.to_dict()["input"], indent=2) + "\n",
        "LICENSE": licence_text(entry),
        "README.md": model_card(entry, repo, pictures),
    }


def licence_text(entry: ModelEntry) -> str:
    """The Apache licence where the weights have it, otherwise what is known of their terms."""
    if entry.licence.weights == "Apache-2.0":
        try:
            text = distribution(LIBRARY).read_text("licenses/LICENSE")
        except PackageNotFoundError:
            text = None
        if text:
            return text
    terms = entry.licence
    return f"Weights: {terms.weights}\nCode: {terms.code}\nTraining data: {terms.data}\n"


def model_card(entry: ModelEntry, repo: str | None = None, pictures: Collection[str] = ()) -> str:
    """The card in Markdown, with the Hub's metadata in front; the arguments are those of `card_files`."""
    known, proof = entry.input_statistics, entry.proof
    shown = [(name, text) for kind, text in PICTURES.items() if (name := f"{entry.name}-{kind}.png") in pictures]
    sections = [
        f"# {entry.name}\n\n{entry.summary}",
        f"Research use only: not a medical device.\n\n{_usage(entry, repo)}",
        f"## Input\n\n{_input(entry)}",
        *([f"What the training images were:\n\n{_statistics(known, entry)}"] if known else []),
        *([f"## Labels\n\n{_labels(entry)}"] if entry.labels else []),
        f"## Model\n\n{_model(entry)}",
        f"## Training\n\n{_training(entry)}",
        f"## Evaluation\n\n{_evaluation(entry)}",
        *(["## Pictures\n\n" + "\n\n".join(f"![{text}]({name})\n\n{text}" for name, text in shown)] if shown else []),
        *([f"## Proof\n\n{_proof(proof, repo)}"] if proof else []),
        f"## Limits\n\n{entry.limits or 'None stated.'}",
        f"## Licence\n\n{_licence(entry)}",
        f"## Citation\n\n{entry.citation}",
    ]
    return f"---\n{_metadata(entry)}\n---\n\n" + "\n\n".join(sections) + "\n"


def _metadata(entry: ModelEntry) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    licence = entry.licence.weights.lower()
    results = [
        EvalResult(
            task_type=TASK_TYPES.get(e.task, e.task),
            dataset_type=re.sub("[^a-z0-9]+", "-", e.data.lower()).strip("-"),
            dataset_name=e.data,
            metric_type=re.sub("[^a-z0-9]+", "-", e.metric.lower()).strip("-"),
            metric_name=e.metric,
            metric_value=e.value,
        )
        for e in entry.evaluation
        if e.command  # what the papers say is no measurement of these bytes
    ]
    data = ModelCardData(
        license=licence if licence in HUB_LICENCES else "other",
        license_name=None if licence in HUB_LICENCES else "see-license",
        license_link=None if licence in HUB_LICENCES else "LICENSE",
        library_name=LIBRARY,
        pipeline_tag=TASK_TYPES.get(entry.trained_head or "", "image-feature-extraction"),
        datasets=list(entry.datasets) or None,
        base_model=_base_on_hub(entry),
        tags=["medical-imaging", f"{entry.ndim}d", entry.modality, entry.objective, entry.architecture],
        model_name=entry.name if results else None,
        eval_results=results or None,
    )
    return data.to_yaml().rstrip()


def _base_on_hub(entry: ModelEntry) -> str | None:
    """The repository of the model that this one was made from, which is all that the Hub takes as a base."""
    if entry.base_model is None or "/" in entry.base_model:
        return entry.base_model
    try:
        sources = model_info(entry.base_model).sources
    except RegistryError:  # of another registry than this machine's
        return None
    return next((source.repo for source in sources if source.kind == "hub"), None)


def _place(repo: str | None) -> str:
    return f"hf-hub:{repo}" if repo else HERE


def _usage(entry: ModelEntry, repo: str | None) -> str:
    scan = "scan.nii.gz" if entry.ndim == 3 else "film.png"
    task = f', task="{entry.trained_head}"' if entry.trained_head else ""
    result = "logits" if entry.trained_head else "features"
    lines = f'net = load("{_place(repo)}"{task})\n{result} = net(net.preprocess("{scan}"))'
    return f"```python\nfrom gvsl_zoo import load\n\n{lines}\n```"


def _input(entry: ModelEntry) -> str:
    given, unit = entry.input, entry.input.intensity
    rows = [f"- axes: {given.axes}" + (f", orientation {given.orientation}" if given.orientation else "")]
    if given.spacing_mm:
        rows.append(f"- spacing: {' x '.join(f'{mm:g}' for mm in given.spacing_mm)} mm")
    if given.size:
        rows.append(f"- size: {' x '.join(map(str, given.size))}")
    if given.window:
        rows.append(f"- window: {' x '.join(map(str, given.window))} voxels at once, as in training")
    low, high = ("the image's own extreme" if end is None else f"{end:g}" for end in unit.window)
    rows.append(
        f"- intensity: {unit.unit}, clipped to {low} .. {high}, mapped to {unit.scale[0]:g} .. {unit.scale[1]:g}"
    )
    return "\n".join(rows)


def _statistics(known: InputStatistics, entry: ModelEntry) -> str:
    unit = entry.input.intensity.unit
    values = ", ".join(f"{value:g}" for value in known.percentiles)
    rows = [f"- {known.images} images; 0.5th, 5th, 50th, 95th and 99.5th percentile: {values} ({unit})"]
    if known.air:
        rows.append(f"- voxels below -200 HU: {100 * known.air[0]:.0f} to {100 * known.air[1]:.0f} %")
    for what, pair in (("spacing", known.spacing_mm), ("field of view", known.field_of_view_mm)):
        if pair:
            least, most = (" x ".join(f"{mm:g}" for mm in end) for end in pair)
            rows.append(f"- {what} along x, y, z: {least} to {most} mm")
    if known.orientations:
        rows.append(f"- stored as {', '.join(known.orientations)}")
    return "\n".join(rows)


def _proof(proof: Proof, repo: str | None) -> str:
    outputs = ", ".join(dict.fromkeys(one.output for one in proof.digests))
    return (
        f"`gvsl-zoo verify --maths {_place(repo)}` computes {outputs} on images of the formula {proof.input} and "
        f"compares them with {len(proof.digests)} digests that this entry carries: within {proof.tolerance:g} SD in "
        f"float32, {proof.tolerance_bf16:g} in bfloat16."
    )


def _labels(entry: ModelEntry) -> str:
    rows = ["| channel | name | value in label files |", "|---|---|---|"]
    return "\n".join(rows + [_line(str(i), label.name, str(label.value)) for i, label in enumerate(entry.labels)])


def _line(*cells: str) -> str:
    """A line of a table in Markdown."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _model(entry: ModelEntry) -> str:
    config = ", ".join(f"{key} {value}" for key, value in entry.config.items())
    return (
        f"{entry.architecture}, {entry.ndim}D ({config}), {entry.parameters / 1e6:.1f} M parameters; objective "
        f"{entry.objective}; heads: {', '.join(entry.heads) or 'none'}; serves {', '.join(entry.tasks)}."
    )


def _training(entry: ModelEntry) -> str:
    if entry.training is None:
        return "Not stated."
    known = entry.training
    text = f"{known.recipe}; {known.data}; {known.steps} steps"
    text += f" in {known.seconds:.0f} s on {known.hardware}." if known.seconds and known.hardware else "."
    if entry.base_model:
        text += f" Made from {entry.base_model}."
    if f"recipes/{entry.name}.yaml" in known.recipe:
        text += f"\n\nTo repeat it: `gvsl-zoo reproduce {entry.name} --data DATA --out RUN`."
    return text


def _evaluation(entry: ModelEntry) -> str:
    if not entry.evaluation:
        return "Nothing has been measured."
    rows = ["| task | data | metric | value | scratch | seeds | measured by |", "|---|---|---|---|---|---|---|"]
    rows += [_row(e) for e in entry.evaluation]
    return "\n".join(rows) + "\n\nWeights that were rounded to float16 or bfloat16 keep these numbers."


def _row(e: Evaluation) -> str:
    scratch = "" if e.scratch is None else f"{e.scratch:g}"
    source = f"`{e.command}`" if e.command else "the paper"
    return _line(e.task, e.data, e.metric, f"{e.value:g}", scratch, ", ".join(map(str, e.seeds)), source)


def _licence(entry: ModelEntry) -> str:
    return f"- weights: {entry.licence.weights}\n- code: {entry.licence.code}\n- data: {entry.licence.data}"
