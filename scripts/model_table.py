"""Write the README's tables from the registry and from benchmarks/results: python scripts/model_table.py"""

from __future__ import annotations

import json
import re
from pathlib import Path

from gvsl_zoo import list_models, model_info

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


def transfer_table(task: str) -> str:
    """Dice from scratch and from zoo weights, and the gain with half of its interval, bold where it is sure."""
    comparisons = json.loads((ROOT / f"benchmarks/results/transfer_{task}.json").read_text())["comparisons"]
    counts = sorted({c["count"] for c in comparisons})
    rows = [
        f"| Dice, % | {' | '.join(f'{n} scan' + 's' * (n > 1) for n in counts)} |",
        "|---" * (1 + len(counts)) + "|",
    ]
    for mode, what in (("full", "whole network"), ("linear", "head alone")):
        cells = [c for n in counts for c in comparisons if (c["mode"], c["count"]) == (mode, n)]
        gains = [f"{c['difference']:+.1f} +- {c['half']:.1f}" for c in cells]
        bold = [
            f"**{gain}**" if c["effect"] in ("helps", "hurts") else gain for gain, c in zip(gains, cells, strict=True)
        ]
        for name, values in (
            ("scratch", [f"{c['scratch']:.1f}" for c in cells]),
            ("pre-trained", [f"{c['zoo']:.1f}" for c in cells]),
            ("gain", bold),
        ):
            rows += [f"| {what}, {name} | " + " | ".join(values) + " |"] if cells else []
    return "\n".join(rows)


def with_tables(readme: str) -> str:
    """The README with its generated parts written anew."""
    tables = {"models": model_table(), "load": load_table()}
    tables |= {f"transfer_{task}": transfer_table(task) for task in ("ct_lungs", "hippocampus")}
    for name, table in tables.items():
        pattern = rf"(<!-- {name}: [^>]*-->\n).*?(<!-- /{name} -->)"
        readme, count = re.subn(pattern, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", readme, flags=re.DOTALL)
        assert count == 1, f"README.md lacks the marks of the table {name!r}"
    return readme


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_tables(path.read_text()))
