"""What objectives, their parts and architectures are worth: arms pre-trained alike, their frozen features probed:
python -m benchmarks.ablation DATA OUT [--arms gvsl no-affine ...]

Every arm starts from the same seed, sees the same pairs for as many steps, and is compared, head alone, with its own
architecture from scratch on the tasks of benchmarks.transfer. DATA is as there. OUT keeps what was done: the same call
goes on.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import RESULTS, machine
from benchmarks.transfer import TASKS, write_cases
from gvsl_zoo.memory import keep_freed_memory
from gvsl_zoo.pretrain.config import XMORPHER_WIDTH, PretrainConfig
from gvsl_zoo.pretrain.data import ScanPairs
from gvsl_zoo.pretrain.loop import pretrain
from gvsl_zoo.pretrain.run import last_record
from gvsl_zoo.recipes import read_recipe, training_scans
from gvsl_zoo.transfer.bench import bench
from gvsl_zoo.transfer.cases import read_cases

ARMS: dict[str, dict[str, Any]] = {
    "gvsl": {},
    "no-affine": {"objective": "no-affine"},
    "restoration": {"objective": "restoration"},
    "gemini": {"objective": "gemini", "affine_width": None},
    "xmorpher-self": {"backbone": "xmorpher", "width": XMORPHER_WIDTH[8], "pair_mode": "self"},
    "xmorpher-cross": {"backbone": "xmorpher", "width": XMORPHER_WIDTH[8], "pair_mode": "cross"},
    "xmorpher-mixed": {"backbone": "xmorpher", "width": XMORPHER_WIDTH[8], "pair_mode": "mixed"},
}
LEARNING_RATE = 1e-3  # one for all arms, half of the default
VALIDATED = ("ncc_before", "ncc_after", "dice_before", "dice_after", "folded", "psnr_damaged", "psnr_restored")


def train(name: str, config: PretrainConfig, data: Path, out: Path) -> dict[str, float]:
    """Pre-train an arm, or what is left of it; its last validation."""

    def say(record: dict[str, float]) -> None:
        if record["step"] % 100 == 0:
            print(f"{name}, step {record['step']}: loss {record['loss']:.3f}", flush=True)

    if not (out / "README.md").exists():  # a finished run has its card
        recipe = replace(read_recipe("gvsl-unet-ct-nano"), settings=config)
        pairs = ScanPairs(training_scans(recipe, data), config.crop)
        pretrain(config, out, pairs, device="cpu", progress=say)
    record = last_record(out)
    return {key: round(record[key], 4) for key in VALIDATED if key in record}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3, help="of the probes")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    data = options.data.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    os.chdir(options.out)  # arms are named by their folders
    say: Callable[[str], None] = partial(print, flush=True)
    base: dict[str, Any] = {"steps": options.steps, "ramp_steps": options.steps // 2, "learning_rate": LEARNING_RATE}
    trained = {arm: train(arm, PretrainConfig.from_dict(base | ARMS[arm]), data, Path(arm)) for arm in options.arms}
    probed = {}
    for name, task in TASKS.items():
        cases = read_cases(write_cases(name, data, Path(f"{name}.csv")), labels=task.labels)
        arms = [f"./{arm}" for arm in options.arms]
        report = bench(
            cases,
            arms,
            task.config,
            Path(f"probe-{name}"),
            counts=task.counts,
            seeds=options.seeds,
            modes=["linear"],
            device="cpu",
            say=say,
        )
        print("\n".join(report.lines()))
        probed[name] = report.to_dict()
    content = {"arms": {a: ARMS[a] for a in options.arms}, "steps": options.steps, "validated": trained}
    text = json.dumps(content | {"probed": probed, "machine": machine()}, indent=2)
    (RESULTS / "ablation.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
