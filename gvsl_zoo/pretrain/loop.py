"""The pre-training loop: draw pairs, pose them, damage the fixed image, match and restore, step."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from ..errors import ArgumentError, TrainingError
from ..models.gvsl import GVSL
from ..models.unet import UNet
from ..report import curves_picture
from .config import PretrainConfig
from .data import Numbers, Pair, Pairs, PairSource, seeded
from .entry import describe, finish
from .objective import Pretraining, make_batch
from .run import LOG, Run, State
from .validate import draw_validation, validate

STOPPED = 143  # exit code of a run that SIGTERM ended, with its checkpoint written
Record = dict[str, float]


def pretrain(
    config: PretrainConfig,
    out: Path,
    real: PairSource | None = None,
    *,
    device: str = "auto",
    workers: int = 0,
    init: GVSL | None = None,
    progress: Callable[[Record], None] | None = None,
) -> GVSL:
    """Train GVSL on synthetic anatomy and, if given, on real scans; return the module, in evaluation mode.

    One process, or one of several that `torchrun` or `accelerate launch` started. A run whose folder holds a checkpoint
    goes on from it: on the CPU bit for bit.

    Args:
        out: the run's folder; see run.py for what it holds.
        real: pairs of real scans.
        device: auto, cpu or cuda.
        workers: processes that draw pairs ahead; 0 draws them in between.
        init: a module of the same size whose weights are the start.
        progress: called after every step with what the log receives.

    Raises: TrainingError for a loss that is not finite, a folder in use or a full disk; ArgumentError for other
        settings than those of the run so far. SystemExit(143) after SIGTERM, with a checkpoint written.
    """
    accelerator = make_accelerator(device)
    model = build(config, init)
    task = Pretraining(model, config).to(accelerator.device).train()
    task.to(memory_format=torch.channels_last_3d if config.ndim == 3 else torch.channels_last)  # type: ignore[call-overload]
    model.unet.set_grad_checkpointing(config.checkpointing)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema)) if config.ema else None
    kept: GVSL = model if averaged is None else averaged.module  # type: ignore[assignment]
    optimizer = torch.optim.Adam([p for p in task.parameters() if p.requires_grad], lr=config.learning_rate)
    pairs_a_step = config.batch_size * config.accumulate * accelerator.num_processes
    main, run = accelerator.is_main_process, Run(out, config)
    entry = describe(config, out.name, model)

    with run.locked() if main else nullcontext(), stop_signals() as stopping:
        accelerator.wait_for_everyone()
        step = restore(run.latest(), pairs_a_step, model, averaged, optimizer)
        if main:
            run.truncate_log(step)
        parallel = accelerator.prepare(torch.compile(task) if config.compile else task)
        batches = draw(config, real, step, workers, accelerator)
        board = tensorboard(out, step) if main else None
        while step < config.steps:
            started = time.perf_counter()
            terms = backward(parallel, batches, config, step, accelerator)
            norm = torch.nn.utils.clip_grad_norm_(task.parameters(), config.clip_norm).item()
            record, stop = agree(accelerator, terms, norm, stopping.is_set())
            check_finite(record, step, out)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            optimizer.step()
            optimizer.zero_grad()
            if averaged is not None:
                averaged.update_parameters(model)
            step += 1

            record = {"step": step} | record | {"seconds": time.perf_counter() - started}
            saving = step % config.save_every == 0 or step == config.steps
            if main:
                if saving:
                    record |= validated(kept, config)
                run.log(record)
                if board is not None:
                    for name, value in record.items():
                        board.add_scalar(name, value, step)
                if saving or stop:
                    run.save(State(step, pairs_a_step, snapshot(model, averaged, optimizer)), entry)
                if saving:
                    draw_run(kept, config, out)
                if progress:
                    progress(record)
                if step == config.steps:
                    finish(out, entry, record)
            if stop:
                raise SystemExit(STOPPED)
        accelerator.wait_for_everyone()
    return kept.eval()


# --- A step -----------------------------------------------------------------------------------------------------


def draw(
    config: PretrainConfig, real: PairSource | None, step: int, workers: int, accelerator: Any
) -> Iterator[tuple[list[int], list[Pair]]]:
    """The pairs of this process, a list a forward pass, with their numbers, from `step` to the end of the run."""
    processes, rank = accelerator.num_processes, accelerator.process_index
    numbers = Numbers(step, config.steps, config.batch_size, config.accumulate, processes, rank)
    pairs = Pairs(config, real, config.batch_size * config.accumulate * processes)
    loader = DataLoader(pairs, batch_sampler=numbers, num_workers=workers, collate_fn=list)
    return zip(numbers, loader, strict=True)


def backward(
    task: torch.nn.Module,
    batches: Iterator[tuple[list[int], list[Pair]]],
    config: PretrainConfig,
    step: int,
    accelerator: Any,
) -> Record:
    """Sum the gradients of a step's forward passes; return the means of the loss's terms."""
    device, sums = accelerator.device, Counter[str]()
    torch.manual_seed(seeded("cpu", config.seed, 2, step, accelerator.process_index).initial_seed())
    for forward in range(config.accumulate):
        numbers, pairs = next(batches)
        batch = make_batch(pairs, numbers, config, device)
        last = forward == config.accumulate - 1
        with nullcontext() if last else accelerator.no_sync(task):
            terms = task(batch, seeded(device, config.seed, 3, numbers[0]))
            accelerator.backward(sum(terms.values(), torch.zeros((), device=device)) / config.accumulate)
        sums.update({name: term.item() / config.accumulate for name, term in terms.items()})
    return dict(sums)


# --- What is trained ----------------------------------------------------------------------------------------


def build(config: PretrainConfig, init: GVSL | None) -> GVSL:
    """The module of a run, drawn from its seed, or a copy of `init`."""
    generator = torch.Generator().manual_seed(config.seed)
    unet = UNet(config.ndim, config.width, generator=generator)
    model = GVSL(unet, affine_width=config.affine_width, generator=generator)
    if init is not None:
        ours, theirs = ({name: t.shape for name, t in m.state_dict().items()} for m in (model, init))
        if ours != theirs:
            raise ArgumentError(
                f"the start has other tensors than a run of width {config.width}, affine_width {config.affine_width}",
                "give the run the settings of the model that it starts from",
            )
        model.load_state_dict(init.state_dict())
    return model


def learning_rate(config: PretrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return config.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def tensorboard(out: Path, step: int) -> Any:
    """A writer for TensorBoard that goes on after `step`, or None where it is not installed."""
    if find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)


def draw_run(model: GVSL, config: PretrainConfig, out: Path) -> None:
    """Renew curves.png and pair.png, where matplotlib is installed."""
    if find_spec("matplotlib") is None:
        return
    log = [json.loads(line) for line in (out / LOG).read_text().splitlines()]
    curves_picture(log, out / "curves.png", title=f"{out.name}: {config.objective}")
    if config.ndim == 3:
        model.eval()
        draw_validation(model, config, out / "pair.png")
        model.train()


def validated(model: GVSL, config: PretrainConfig) -> Record:
    model.eval()
    numbers = validate(model, config)
    model.train()
    return numbers


# --- What all processes do together -------------------------------------------------------------------------


def make_accelerator(device: str) -> Any:
    """Processes and device; the pairs are dealt out by number, so accelerate only carries model and gradients."""
    try:
        from accelerate import Accelerator
    except ImportError:
        raise ArgumentError("pre-training needs accelerate", "pip install gvsl-zoo[train]") from None
    if device not in ("auto", "cpu", "cuda"):
        raise ArgumentError(f"device {device!r} for a run", "give auto, cpu or cuda; torchrun deals out several")
    if device == "cuda" and not torch.cuda.is_available():
        raise ArgumentError("this machine has no CUDA device", "give auto or cpu")
    return Accelerator(cpu=device == "cpu")


def agree(accelerator: Any, terms: Record, norm: float, stop: bool) -> tuple[Record, bool]:
    """The terms' means over the processes, their sum, the gradient's norm, and whether any process is to stop."""
    if accelerator.num_processes > 1:
        numbers = torch.tensor([*terms.values(), norm, float(stop)], device=accelerator.device)
        *means, norm, stopping = accelerator.reduce(numbers, "mean").tolist()
        terms, stop = dict(zip(terms, means, strict=True)), stopping > 0
    return {"loss": sum(terms.values())} | terms | {"gradient": norm}, stop


def check_finite(record: Record, step: int, out: Path) -> None:
    if not (math.isfinite(record["loss"]) and math.isfinite(record["gradient"])):
        raise TrainingError(
            f"loss became {record['loss']} and its gradient {record['gradient']} at step {step}",
            f"the last checkpoint in {out} is from before and good; lower the learning rate",
        )


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, as Slurm, Kubernetes and torchrun send it before they kill."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)


# --- Checkpoints --------------------------------------------------------------------------------------------


def snapshot(
    model: GVSL, averaged: AveragedModel | None, optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, Tensor]]:
    """Everything that a run goes on from; learning rate, pairs and draws are functions of the step."""
    moments = {
        f"{index}.{key}": value
        for index, values in optimizer.state_dict()["state"].items()
        for key, value in values.items()
    }
    parts = {"model": model.state_dict(), "optimizer": moments}
    if averaged is not None:
        parts["ema"] = averaged.module.state_dict()
    return parts


def restore(
    state: State | None,
    pairs_a_step: int,
    model: GVSL,
    averaged: AveragedModel | None,
    optimizer: torch.optim.Optimizer,
) -> int:
    """Put a checkpoint back; return its step, 0 without one."""
    if state is None:
        return 0
    if state.pairs_a_step != pairs_a_step:
        raise ArgumentError(
            f"the run took {state.pairs_a_step} pairs a step, these processes take {pairs_a_step}",
            "keep processes x batch_size x accumulate the same, so that the order of the data is",
        )
    model.load_state_dict(state.tensors["model"])
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state.tensors["optimizer"].items():
        index, key = name.split(".", 1)
        moments.setdefault(int(index), {})[key] = tensor.clone()
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    if averaged is not None:
        averaged.module.load_state_dict(state.tensors["ema"])
        averaged.n_averaged.fill_(state.step)
    return state.step
