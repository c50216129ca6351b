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


def probe_table() -> str:
    results = json.loads((ROOT / "benchmarks/results/probe.json").read_text())["results"]
    counts = list(results["scratch"])
    rows = [f"| labelled | {' | '.join(counts)} |", "|---" * (1 + len(counts)) + "|"]
    for arm, row in results.items():
        rows.append(f"| {arm} | " + " | ".join(f"{row[n]['mean']:.1f} +- {row[n]['sd']:.1f}" for n in counts) + " |")
    return "\n".join(rows)


def with_tables(readme: str) -> str:
    """The README with its generated parts written anew."""
    for name, table in (("models", model_table()), ("load", load_table()), ("probe", probe_table())):
        pattern = rf"(<!-- {name}: [^>]*-->\n).*?(<!-- /{name} -->)"
        readme, count = re.subn(pattern, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", readme, flags=re.DOTALL)
        assert count == 1, f"README.md lacks the marks of the table {name!r}"
    return readme


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_tables(path.read_text()))
