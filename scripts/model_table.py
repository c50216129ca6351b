"""Write tables of README and docs from the registry and from benchmarks/results: python scripts/model_table.py"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gvsl_zoo import list_models, model_info
from gvsl_zoo.models.unet import UNet
from gvsl_zoo.models.xmorpher import XMorpher

ROOT = Path(__file__).parent.parent


def model_table() -> str:
    rows = ["| model | status | data | objective | parameters | weights' licence |", "|---|---|---|---|---|---|"]
    entries = [model_info(name) for name in list_models()]
    for e in sorted(entries, key=lambda e: (["available", "upstream", "planned"].index(e.status), e.name)):
        licence = e.licence.weights.split(";")[0]
        count = f"{e.parameters / 1e6:.1f} M"
        rows.append(f"| `{e.name}` | {e.status} | {e.ndim}D {e.modality} | {e.objective} | {count} | {licence} |")
    return "\n".join(rows)


def load_table() -> str:
    result = json.loads((ROOT / "benchmarks/results/load.json").read_text())
    rows = ["| way | median | against the first |", "|---|---|---|"]
    for way, milliseconds in result["milliseconds"].items():
        rows.append(f"| {way} | {milliseconds:.1f} ms | x{result['faster_than_reference'][way]:.1f} |")
    resident = ", ".join(f"{way}: {size} MB" for way, size in result["extra_resident_MB"].items())
    return "\n".join([*rows, "", f"Extra resident memory before the first forward pass: {resident}."])


def gpu_table() -> str:
    """Milliseconds of each part of a step on a GPU, and of all."""
    result = json.loads((ROOT / "benchmarks/results/step_cuda.json").read_text())
    whole, parts = result["milliseconds"], result["parts_milliseconds"]
    rows = [f"| {result['machine']['gpu']}, ms | {' | '.join(whole)} |", "|---" * (1 + len(whole)) + "|"]
    for part in parts["released"]:
        rows.append(f"| {part} | {' | '.join(f'{own[part]:.1f}' for own in parts.values())} |")
    rows.append(f"| whole step | {' | '.join(f'{own:.1f}' for own in whole.values())} |")
    rows.append(f"| MiB beyond weights and moments | {' | '.join(map(str, result['peak_MiB'].values()))} |")
    return "\n".join(rows)


def gain_of(row: dict[str, Any]) -> str:
    """A gain with half of its interval, which may be unknown."""
    return f"{row['difference']:+.1f} +- {'?' if row['half'] is None else format(row['half'], '.1f')}"


def transfer_table(task: str) -> str:
    """Dice from scratch and from zoo weights, and the gain with half of its interval, bold where it is sure."""
    result = json.loads((ROOT / f"benchmarks/results/transfer_{task}.json").read_text())
    comparisons = result["comparisons"]
    counts = sorted({c["count"] for c in comparisons})
    rows = [
        f"| Dice, % | {' | '.join(f'{n} scan' + 's' * (n > 1) for n in counts)} |",
        "|---" * (1 + len(counts)) + "|",
    ]
    for mode, what in (("full", "whole network"), ("linear", "head alone")):
        cells = [c for n in counts for c in comparisons if (c["mode"], c["count"]) == (mode, n)]
        gains = [gain_of(c) for c in cells]
        bold = [
            f"**{gain}**" if c["effect"] in ("helps", "hurts") else gain for gain, c in zip(gains, cells, strict=True)
        ]
        for name, values in (
            ("scratch", [f"{c['scratch']:.1f}" for c in cells]),
            ("pre-trained", [f"{c['zoo']:.1f}" for c in cells]),
            ("gain", bold),
        ):
            rows += [f"| {what}, {name} | " + " | ".join(values) + " |"] if cells else []
    return "\n".join([*rows, "", trained_for(result["settings"])])


def trained_for(settings: dict[str, Any]) -> str:
    """How long the trainings of a bench took, in steps, and how fast a head alone learnt."""
    steps = settings.get("steps", {"linear": settings["training"]["steps"]})
    [rate] = {rate for name, rate in settings["learning rates"].items() if name.endswith("linear")}
    whole = f"Whole network: {steps['full']} steps; head" if "full" in steps else "Head"
    return f"{whole} alone: {steps['linear']} steps at a rate of {rate:g}."


def together_table(runs: str) -> str:
    """Dice over three pre-training seeds of one recipe, and the gain +- half of its interval, bold where it is sure."""
    columns: dict[tuple[str, int], dict[str, str]] = {}
    for task, scene in (("ct_lungs", "lungs"), ("hippocampus", "hippocampus")):
        result = json.loads((ROOT / f"benchmarks/results/transfer_{task}_{runs}.json").read_text())
        for row in result["together"]:
            what = {"full": "whole network", "linear": "head alone"}[row["mode"]]
            sure = "**" if row["effect"] in ("helps", "hurts") else ""
            cells = columns.setdefault((scene, row["count"]), {})
            cells[f"{what}, scratch"] = f"{row['scratch']:.1f}"
            cells[f"{what}, pre-trained, three runs"] = f"{row['zoo']:.1f}"
            cells[f"{what}, gain"] = f"{sure}{gain_of(row)}{sure}"
    lines = [["", *(f"{scene}, {count}" for scene, count in columns)], ["---"] * (1 + len(columns))]
    for name in dict.fromkeys(name for cells in reversed(columns.values()) for name in cells):
        lines.append([name, *(cells.get(name, "") for cells in columns.values())])
    return "\n".join([*(f"| {' | '.join(cells)} |" for cells in lines), "", trained_for(result["settings"])])


def ablation_table() -> str:
    """Dice of a head alone on the frozen features of each arm, bold where it is surely another than from scratch."""
    result = json.loads((ROOT / "benchmarks/results/ablation.json").read_text())
    columns: list[dict[str, str]] = []
    for task, name in (("ct_lungs", "lungs"), ("hippocampus", "hippocampus")):
        comparisons = result["probed"][task]["comparisons"]
        for n in sorted({c["count"] for c in comparisons}):
            cells = {"": f"{name}, {n}", "---": "---"}
            for c in (c for c in comparisons if c["count"] == n):
                arm = c["model"].removeprefix("./")
                backbone = result["arms"][arm].get("backbone", "unet")
                cells.setdefault(f"scratch, {backbone}", f"{c['scratch']:.1f}")
                sure = "**" if c["effect"] in ("helps", "hurts") else ""
                cells[arm] = f"{sure}{c['zoo']:.1f}{sure}"
            columns.append(cells)
    names = sorted(columns[0], key=lambda name: (name != "", name != "---", "scratch" not in name))
    return "\n".join(f"| {name} | {' | '.join(c[name] for c in columns)} |" for name in names)


def correspond_table() -> str:
    """How far matched points lie from where the anatomy truly is, over pairs of synthetic subjects."""
    result = json.loads((ROOT / "benchmarks/results/correspond.json").read_text())
    mean, pairs = result["mean"], result["pairs"]
    rows = ["| points | median error, mm: mean over the pairs | lowest and highest pair |", "|---|---|---|"]
    for name, key in (("left where they are", "identity"), ("matched", "matched"), ("registered", "registered")):
        values = [pair[f"{key}_mm"] for pair in pairs]
        rows.append(f"| {name} | {mean[f'{key}_mm']:.1f} | {min(values):.1f} to {max(values):.1f} |")
    return "\n".join(rows)


def architecture_table() -> str:
    """Parameters and feature channels of the released sizes, counted on modules without values."""
    rows = [
        "| backbone | parameters | channels of the encoder's maps | voxels an axis of each | dense features |",
        "|---|---|---|---|---|",
    ]
    for kind, ndim in itertools.product((UNet, XMorpher), (3, 2)):
        net: UNet | XMorpher = kind(ndim, device="meta")
        count = sum(parameter.numel() for parameter in net.parameters())
        channels, steps = net.feature_info.channels(), net.feature_info.reduction()
        cells = (
            f"{kind.__name__}, {ndim}D, width {net.width}",
            f"{count:,}",
            ", ".join(map(str, channels)),
            ", ".join(map(str, steps)),
            str(net.num_features),
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "docs/pretrain.md": {"gpu": gpu_table},
    "README.md": {
        "models": model_table,
        "load": load_table,
        "transfer_ct_lungs": partial(transfer_table, "ct_lungs"),
        "transfer_hippocampus": partial(transfer_table, "hippocampus"),
    },
    "docs/recipe_search.md": {
        "contrast_ct_lungs": partial(transfer_table, "ct_lungs_gvsl-unet-ct-nano-contrast"),
        "contrast_hippocampus": partial(transfer_table, "hippocampus_gvsl-unet-ct-nano-contrast"),
        "small_ct_lungs": partial(transfer_table, "ct_lungs_gvsl-unet-ct-small"),
        "small_hippocampus": partial(transfer_table, "hippocampus_gvsl-unet-ct-small"),
        "xmorpher_ct_lungs": partial(transfer_table, "ct_lungs_gvsl-xmorpher-ct-nano"),
        "xmorpher_hippocampus": partial(transfer_table, "hippocampus_gvsl-xmorpher-ct-nano"),
        "together": partial(together_table, "seed-0_seed-1_seed-2"),
        "together_nano": partial(together_table, "nano-seed-0_nano-seed-1_nano-seed-2"),
    },
    "docs/architectures.md": {"architectures": architecture_table},
    "docs/objectives.md": {"ablation": ablation_table},
    "docs/correspond.md": {"correspond": correspond_table},
}


def with_tables(text: str, page: str) -> str:
    """The text of a page with its generated parts written anew."""
    for name, table in TABLES[page].items():
        pattern = rf"(<!-- {name}: [^>]*-->\n).*?(<!-- /{name} -->)"
        rows = table()
        text, count = re.subn(pattern, lambda m, t=rows: f"{m[1]}{t}\n{m[2]}", text, flags=re.DOTALL)
        assert count == 1, f"{page} lacks the marks of the table {name!r}"
    return text


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    for page in TABLES:
        path = ROOT / page
        path.write_text(with_tables(path.read_text(), page))
