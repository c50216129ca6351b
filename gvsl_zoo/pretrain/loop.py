"""The pre-training loop: draw pairs, pose them, damage the fixed image, match and restore, step."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..ledger import joined
from ..models.backbone import Backbone
from ..models.gemini import GEMINI, WholeModule
from ..models.gvsl import GVSL
from ..models.unet import UNet
from ..models.xmorpher import XMorpher
from ..registry import Ledger, ModelEntry
from ..report import curves_picture
from .config import PretrainConfig
from .data import Numbers, Pair, Pairs, PairSource, StorePairs, seeded
from .entry import describe, finish
from .learner import Learner, Stop, Taken, drawn, make_accelerator, schedule, stop_signals
from .objective import Batch, make_batch, tasks_of
from .run import Record, Run, State, last_record, log_lines
from .validate import draw_validation, validate

CURVE_RECORDS = 2000  # of the log that are drawn, beside those of a validation
VALIDATED = '"ncc_after"'  # in the lines of these
Start = WholeModule | Callable[[], WholeModule] | None


def pretrain(
    config: PretrainConfig,
    out: Path,
    real: PairSource | None = None,
    *,
    device: str = "auto",
    workers: int = 0,
    init: Start = None,
    progress: Callable[[Record], None] | None = None,
) -> WholeModule:
    """Train GVSL or GEMINI on synthetic anatomy and, if given, real scans; return the module, in evaluation mode.

    One process, or one of several that `torchrun` or `accelerate launch` started. A run whose folder holds a checkpoint
    goes on from it: on the CPU bit for bit.

    Args:
        out: the run's folder; see run.py for what it holds.
        real: pairs of real scans.
        device: auto, cpu or cuda.
        workers: processes that draw pairs ahead; 0 draws them in between.
        init: a module of the same size whose weights are the start; or what makes one, for a run that does not go on.
        progress: called after every step with what the log receives.

    Raises: TrainingError for a loss that is not finite, a folder in use, a full disk or a worker that was killed;
        ArgumentError for other settings or data than those of the run so far. SystemExit(143) after SIGTERM and
        SystemExit(130) after SIGINT, with a checkpoint written; KeyboardInterrupt, without one, after a second SIGINT.
    """
    accelerator = make_accelerator(device)
    pairs_a_step = config.batch_size * config.accumulate * accelerator.num_processes
    main, run, data = accelerator.is_main_process, Run(out, config), fingerprint_of_pairs(real)
    start = None if any(run.checkpoints.glob("[0-9]*")) else made(init)
    learner = make_learner(build(config, start), config, accelerator)

    with stop_signals() as stop, run.locked() if main else nullcontext():
        accelerator.wait_for_everyone()
        state = run.latest()
        if init and not (state or start):  # no checkpoint is whole
            start = made(init)
            learner = make_learner(build(config, start), config, accelerator)
        first = learner.restore(state, pairs_a_step, data)
        entry = describe(config, out.name, learner.model)
        entry = replace(state.entry, training=entry.training) if state else with_start(entry, start)
        entry = with_data(entry, real)
        tasks = [
            accelerator.prepare(torch.compile(task) if config.compile else task) for task in learner.task.children()
        ]
        with (
            torch.random.fork_rng([accelerator.device] if accelerator.device.type == "cuda" else []),
            draw(config, real, first, workers, accelerator) as batches,
            tensorboard(out, first) if main else nullcontext() as board,
        ):
            journal = Journal(run, config, learner, entry, pairs_a_step, data, board, progress, stop)
            if main:
                run.truncate_log(first)
            take = partial(forward_backward, tasks, batches, config, accelerator)
            for taken in learner.steps(take, first, config, stop):
                if main:
                    journal.note(taken)
        if main:
            finish(out, entry, last_record(out))
        accelerator.wait_for_everyone()
    return learner.kept.eval()


# --- A step -------------------------------------------------------------------------------------------------


def draw(
    config: PretrainConfig, real: PairSource | None, first: int, workers: int, accelerator: Any
) -> AbstractContextManager[Iterator[tuple[list[int], list[Pair]]]]:
    """The pairs of this process, a list a forward pass, with their numbers, from step `first` to the end of the run."""
    processes, rank = accelerator.num_processes, accelerator.process_index
    numbers = Numbers(first, config.steps, config.batch_size, config.accumulate, processes, rank)
    pairs = Pairs(config, real, config.batch_size * config.accumulate * processes)
    return drawn(pairs, numbers, workers, accelerator.device)


def forward_backward(
    tasks: Sequence[torch.nn.Module],
    batches: Iterator[tuple[list[int], list[Pair]]],
    config: PretrainConfig,
    accelerator: Any,
    step: int,
) -> Iterator[dict[str, Tensor]]:
    """For each task sum the gradients of a step's forward passes; yield the means of its terms, on the device."""
    device = accelerator.device
    made: list[Batch] = []
    torch.manual_seed(seeded("cpu", config.seed, 2, step, accelerator.process_index).initial_seed())
    for task in tasks:
        means: dict[str, Tensor] = {}
        for forward in range(config.accumulate):
            if forward == len(made):
                numbers, pairs = next(batches)
                made.append(make_batch(pairs, numbers, config, device))
            last = forward == config.accumulate - 1
            with nullcontext() if last else accelerator.no_sync(task):
                terms = task(made[forward])
                shares = {name: term / config.accumulate for name, term in terms.items()}
                sum(shares.values(), torch.zeros((), device=device)).backward()
            means = {name: means.get(name, 0.0) + share.detach() for name, share in shares.items()}
        yield means


# --- What is trained ----------------------------------------------------------------------------------------


def build(config: PretrainConfig, init: WholeModule | None) -> WholeModule:
    """The module of a run, drawn from its seed, or a copy of `init`."""
    generator = torch.Generator().manual_seed(config.seed)
    backbone: Backbone
    if config.backbone == "xmorpher":
        backbone = XMorpher(config.ndim, config.width, window=config.window or 2, generator=generator)
    else:
        backbone = UNet(config.ndim, config.width, generator=generator)
    model: WholeModule
    if config.objective == "gemini":
        model = GEMINI(backbone, generator=generator)
    else:
        model = GVSL(backbone, affine_width=config.affine_width, generator=generator)
    if init is not None:
        ours, theirs = ({name: t.shape for name, t in m.state_dict().items()} for m in (model, init))
        if ours != theirs:
            names = ("objective", "ndim", "backbone", "width", "affine_width")
            shape = ", ".join(f"{name} {getattr(config, name)}" for name in names)
            cause = f"the start has other tensors than a run of {shape}"
            raise ArgumentError(cause, "give the run the settings of the model that it starts from")
        model.load_state_dict(init.state_dict())
    return model


def made(init: Start) -> WholeModule | None:
    """The module that a run starts from."""
    return init if isinstance(init, WholeModule | None) else init()


def with_start(entry: ModelEntry, init: WholeModule | None) -> ModelEntry:
    """The entry of a run that has seen nothing yet but what its start had seen."""
    base: Any = getattr(init, "entry", None)
    if base is None:
        return replace(entry, ledger=Ledger(complete=init is None))
    weights = f"not stated; made from {base.name} ({base.licence.weights})"
    licence = replace(entry.licence, weights=weights, data=f"not stated; {base.name}: {base.licence.data}")
    return replace(entry, ledger=base.ledger, base_model=base.name, licence=licence)


def with_data(entry: ModelEntry, real: PairSource | None) -> ModelEntry:
    """The entry of a run that sees these scans too, and films of this size."""
    entry = replace(entry, ledger=joined(entry.ledger, ledger_of_pairs(real)))
    size = real.store.format.size if isinstance(real, StorePairs) else None
    return replace(entry, input=replace(entry.input, size=(size, size))) if size else entry


def ledger_of_pairs(real: PairSource | None) -> Ledger:
    """All scans of a store; of others it is not known which they are."""
    return real.store.ledger if isinstance(real, StorePairs) else Ledger(complete=real is None)


def fingerprint_of_pairs(real: PairSource | None) -> str | None:
    """What tells whether a run goes on with the data that it learned from; None where nothing does."""
    return real.store.fingerprint if isinstance(real, StorePairs) else "synthetic" if real is None else None


def make_learner(model: WholeModule, config: PretrainConfig, accelerator: Any) -> Learner[WholeModule]:
    """The module on its device, with the paper's optimizer, one for all tasks."""
    task = torch.nn.ModuleList(tasks_of(model, config)).to(accelerator.device).train()
    task.to(memory_format=torch.channels_last_3d if config.ndim == 3 else torch.channels_last)  # type: ignore[call-overload]
    model.unet.set_grad_checkpointing(config.checkpointing)
    trained = [parameter for parameter in task.parameters() if parameter.requires_grad]
    return Learner(
        model,
        task,
        torch.optim.Adam(trained, lr=config.learning_rate, fused=True),
        accelerator,
        rate=partial(schedule, steps=config.steps, warmup_steps=config.warmup_steps),
        clip_norm=config.clip_norm,
        ema=config.ema,
    )


# --- What is written ----------------------------------------------------------------------------------------


@dataclass
class Journal:
    """What the main process writes of a run: log, checkpoints, curves and pictures."""

    run: Run
    config: PretrainConfig
    learner: Learner[WholeModule]
    entry: ModelEntry
    pairs_a_step: int
    data: str | None
    board: Any
    progress: Callable[[Record], None] | None
    stop: Stop

    def note(self, taken: Taken) -> None:
        """Write a step down; where its weights are to be saved, validate and draw first, unless that has to wait."""
        record, model, step = taken.record, self.learner.kept, int(taken.record["step"])

        def hurried() -> bool:
            return self.stop.asked and step < self.config.steps

        if taken.saving:
            record |= validated(model, self.config, hurried)
        self.run.log(record)
        show(self.board, record)
        if taken.saving:
            self.run.save(State(step, self.pairs_a_step, self.learner.snapshot(), self.entry, self.data))
        if taken.saving and not hurried():
            draw_run(model, self.config, self.run.folder)
        if self.progress:
            self.progress(record)


def validated(model: WholeModule, config: PretrainConfig, hurried: Callable[[], bool]) -> Record:
    model.eval()
    numbers = validate(model, config, hurried)
    model.train()
    return numbers


@contextmanager
def tensorboard(out: Path, first: int) -> Iterator[Any]:
    """A writer for TensorBoard that goes on after step `first`, or None where it is not installed.

    That a disk is full the log and the checkpoints tell.
    """
    if find_spec("tensorboard") is None:
        yield None
        return
    from torch.utils.tensorboard import SummaryWriter

    board: Any = SummaryWriter(str(out / "tensorboard"), purge_step=first + 1)
    try:
        yield board
    finally:
        with suppress(OSError):
            board.close()


def show(board: Any, record: Record) -> None:
    """Hand the numbers of a step to TensorBoard, where it is installed."""
    if board is not None:
        with suppress(OSError):
            for name, value in record.items():
                board.add_scalar(name, value, int(record["step"]))


def draw_run(model: WholeModule, config: PretrainConfig, out: Path) -> None:
    """Renew curves.png and pair.png, where matplotlib is installed."""
    if find_spec("matplotlib") is None:
        return
    lines = log_lines(out)
    every = 1 + len(lines) // CURVE_RECORDS
    log = [json.loads(text) for number, text in enumerate(lines) if number % every == 0 or VALIDATED in text]
    curves_picture(log, out / "curves.png", title=f"{out.name}: {config.objective}")
    if config.ndim == 3:
        model.eval()
        draw_validation(model, config, out / "pair.png")
        model.train()
