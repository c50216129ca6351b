"""What a run will cost, from a few of its steps."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..errors import ArgumentError
from .config import PretrainConfig
from .data import PairSource, processes_started
from .loop import Start, build, pretrain
from .run import Record


class Enough(Exception):
    """Ends a run before the validation and the checkpoint of its last step."""


def estimate(
    config: PretrainConfig, real: PairSource | None, device: str, workers: int, init: Start = None, steps: int = 3
) -> dict[str, Any]:
    """Time and memory of a run, from a few of its steps as they are after the ramp, which are thrown away.

    Raises: ArgumentError in one of several processes.
    """
    if (processes := processes_started()) > 1:
        raise ArgumentError(f"a dry run of {processes} processes", "run it with one, without torchrun")
    seconds: list[float] = []

    def note(record: Record) -> None:
        seconds.append(record["seconds"])
        if len(seconds) == steps:
            raise Enough

    short = replace(config, steps=steps + 1, save_every=steps + 1, ramp_steps=0)
    with TemporaryDirectory() as folder, suppress(Enough):
        pretrain(short, Path(folder), real, device=device, workers=workers, init=init, progress=note)
    on_gpu = torch.cuda.is_available() and device != "cpu"
    peak = torch.cuda.max_memory_allocated() if on_gpu else peak_memory()
    step = sorted(seconds)[len(seconds) // 2]
    return {
        "parameters": sum(p.numel() for p in build(config, None).parameters()),
        "seconds_a_step": step,
        "pairs_a_second": config.batch_size * config.accumulate / step,
        "hours": step * config.steps / 3600,
        "peak_memory_GB": peak and peak / 1e9,
        "device": "cuda" if on_gpu else "cpu",
    }


def peak_memory() -> int | None:
    """The most that this process has held so far, bytes; None where the system does not tell (Windows)."""
    if sys.platform == "win32":
        return None
    import resource

    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else held * 1024
