"""How every benchmark measures: contestants in turn, A B C A B C ..., medians, the machine named beside the numbers."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def alternate(contestants: dict[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict[str, float]:
    """Median seconds of each contestant over `rounds`, the contestants taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(warmup + rounds):
        for name, run in contestants.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def report(name: str, medians: dict[str, float], reference: str, *, device: str = "cpu", **facts: Any) -> None:
    """Print milliseconds and ratios against `reference`, and write them to results/NAME.json (on CUDA NAME_cuda)."""
    name += f"_{device}" * (device != "cpu")
    print(f"\n{name}")
    for contestant, seconds in medians.items():
        print(f"  {contestant:<46} {1e3 * seconds:10.2f} ms   x{medians[reference] / seconds:.2f}")
    for key, value in facts.items():
        print(f"  {key}: {value}")
    RESULTS.mkdir(exist_ok=True)
    content = {
        "milliseconds": {k: round(1e3 * v, 3) for k, v in medians.items()},
        "faster_than_reference": {k: round(medians[reference] / v, 2) for k, v in medians.items()},
        "reference": reference,
        **facts,
        "machine": machine(),
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def add_device(parser: argparse.ArgumentParser) -> None:
    there = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    parser.add_argument("--device", choices=there, default="cpu")


def machine() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": platform.machine(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
