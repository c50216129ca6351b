"""Write the proof of a model, and statistics of its training images, into the registry: python scripts/prove.py NAME

With --images also `input_statistics`. Other lines of the file stay as they are.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gvsl_zoo.autopsy import input_statistics, read_all
from gvsl_zoo.proof import prove
from gvsl_zoo.registry import InputStatistics, Proof
from gvsl_zoo.zoo import load, widest_task

REGISTRY = Path(__file__).parent.parent / "weights_registry.yaml"


def lines_of(record: Proof | InputStatistics) -> str:
    """The record as lines of a registry, a digest a line."""
    lines = []
    for key, value in asdict(record).items():
        if key == "digests":
            lines.append("      digests:")
            lines += [f"        - {{{', '.join(f'{k}: {plain(v)}' for k, v in row.items())}}}" for row in value]
        elif value is not None and value != ():
            lines.append(f"      {key}: {plain(value)}")
    return "\n".join(lines)


def plain(value: Any) -> str:
    return f"[{', '.join(map(plain, value))}]" if isinstance(value, list | tuple) else str(value)


def with_field(text: str, name: str, field: str, record: Proof | InputStatistics) -> str:
    """The registry's text with one field of one model replaced, or added at its end."""
    start = text.index(f"\n  {name}:\n") + 1
    following = re.search(r"\n+ {0,2}[^ \n]", text[start + 1 :])
    end = start + 1 + following.start() if following else len(text.rstrip())
    entry = re.sub(rf"\n    {field}:.*(\n {{5,}}.*)*", "", text[start:end])
    return text[:start] + f"{entry}\n    {field}:\n{lines_of(record)}" + text[end:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--images", type=Path, nargs="+", help="the files that pre-training saw")
    parser.add_argument("--registry", type=Path, default=REGISTRY)
    options = parser.parse_args()
    entry: Any = load(options.name).entry
    text = options.registry.read_text()
    if options.images:
        images = read_all(options.images, entry.ndim)
        text = with_field(text, options.name, "input_statistics", input_statistics(images, entry.input.intensity.unit))
    proof = prove(load(options.name, task=widest_task(entry)))
    options.registry.write_text(with_field(text, options.name, "proof", proof))
    print(f"{options.registry}: {len(proof.digests)} digests of {options.name}")


if __name__ == "__main__":
    main()
