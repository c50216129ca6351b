"""The fine-tuning loop: draw patches about labels, pose them, Dice and cross-entropy, step; keep what validates best.

A run's folder is that of pre-training (pretrain/run.py), with cases.json, which says what was trained and validated on.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ArgumentError, listed
from ..inference.features import WINDOW
from ..inference.sliding import evaluate, ready_copy, sliding_window
from ..ledger import LeakageWarning, joined, ledger_of, seen
from ..losses import dice_loss
from ..models.backbone import Backbone
from ..models.heads import HeadedModel
from ..pretrain.data import Numbers, seeded
from ..pretrain.learner import Learner, Stop, Taken, drawn, make_accelerator, schedule, stop_signals
from ..pretrain.loop import show, tensorboard
from ..pretrain.run import Record, Run, State, Tensors, log_lines
from ..registry import Label, Ledger, ModelEntry
from ..report import curves_picture
from ..weights import values_hash, write_whole
from ..zoo import HEADED, load
from .cases import Cases, Split, files_hash, split_cases
from .config import FinetuneConfig
from .data import Cache, Example, Patch, Patches, cached, make_batch, middle_box, prepare_cases
from .entry import MEASURED, describe, finish
from .validate import SCORE, validate

CASES = "cases.json"
HEAD_RATE = 10  # of the peak, while the head learns alone


def finetune(
    data: Cases,
    config: FinetuneConfig,
    out: str | os.PathLike[str],
    *,
    device: str = "auto",
    workers: int = 0,
    progress: Callable[[Record], None] | None = None,
    cache: Cache | None = None,
) -> nn.Module:
    """Train a head, and with mode full its backbone, on labelled scans; return the model as `load(out, task=...)` does.

    One process, or one of several that `torchrun` or `accelerate launch` started. A run whose folder holds a checkpoint
    goes on from it: on the CPU bit for bit.

    Args:
        data: see `read_cases`; test cases are left alone.
        out: the run's folder.
        device: auto, cpu or cuda.
        workers: processes that draw patches ahead; 0 draws them in between.
        progress: called after every step with what the log receives.
        cache: an empty dictionary, to be given to several calls: scans and frozen features are then made only once.

    Raises: VolumeError for a scan or label file that cannot be used; ArgumentError for settings or data that do not fit
        together, or that are not those of the run so far; TrainingError for a loss that is not finite, a folder in use,
        a full disk, a lost log or a worker that was killed. SystemExit(143) after SIGTERM and SystemExit(130) after
        SIGINT, with a checkpoint written.
    """
    if data.task != config.task:
        raise ArgumentError(f"cases of a {data.task} for the task {config.task}", "read them with the same task")
    if len(data.labels) < 2:
        raise ArgumentError(f"the classes {[label.name for label in data.labels]}", "two at least make a task")
    out, labels = Path(out), data.labels
    accelerator = make_accelerator(device)
    split = split_cases(data, seed=config.seed, validation=config.validation, subjects=config.subjects)
    chans = len(split.train[0].images)
    model = build(config, len(labels), chans)
    base: Any = model.backbone.entry
    low, high = base.input.intensity.scale
    if (low, high) != (0, 1):
        raise ArgumentError(f"{base.name} takes images from {low:g} to {high:g}", "fine-tuning knows only 0 to 1")
    entry = describe(config, out.name, base, labels, split, chans)
    ledger = seen_by_run(split, Ledger(complete=True) if config.from_scratch else base.ledger)
    entry = replace(entry, parameters=sum(parameter.numel() for parameter in model.parameters()), ledger=ledger)
    ndim = model.backbone.ndim
    crop = entry.input.size if ndim == 2 and config.task == "classification" else config.crop_for(ndim)
    assert crop is not None
    main, run = accelerator.is_main_process, Run(out, config)
    run.check()
    cache = {} if cache is None else cache
    train, val = (
        prepare_cases(cases, labels, entry.input, out, complete=data.complete, cache=cache)
        for cases in (split.train, split.val)
    )
    check_classes(train, labels)
    model.to(accelerator.device)
    if config.mode == "linear":
        train, val = (frozen_features(model, examples, config, crop, out, cache) for examples in (train, val))

    with stop_signals() as stop, run.locked() if main else nullcontext():
        if main:
            note_cases(out, split, labels, None if config.from_scratch else values_hash(model.backbone))
        accelerator.wait_for_everyone()
        learner = make_learner(model, config, accelerator)
        state = run.latest()
        first = learner.restore(state, config.batch_size * accelerator.num_processes)
        task = accelerator.prepare(learner.task)
        with (
            torch.random.fork_rng([accelerator.device] if accelerator.device.type == "cuda" else []),
            draw(Patches(train, config, crop), config, first, workers, accelerator) as batches,
            tensorboard(out, first) if main else nullcontext() as board,
        ):
            log = run.truncate_log(first) if main else []
            best = state.tensors.get("best") if state else None
            validation = Validation(val, labels, config, crop, best, best_record(log, config))
            journal = Journal(run, learner, entry, validation, board, progress, stop)
            if main and first:
                log_lines(out)  # which tell what was best so far
                journal.make_up(first, log[-1])
            if 0 < first < config.steps:
                learner.heed(stop)
            take = partial(forward_backward, learner, task, batches, config, crop)
            for taken in learner.steps(take, first, config, stop):
                if main:
                    journal.note(taken)
        if main:
            log = read_log(out)
            finish(out, entry, best_record(log, config), split)
            draw_run(out, config, log)
        accelerator.wait_for_everyone()
    return load(out, task=config.task, device=accelerator.device)


# --- A step -------------------------------------------------------------------------------------------------


def draw(
    patches: Patches, config: FinetuneConfig, first: int, workers: int, accelerator: Any
) -> AbstractContextManager[Iterator[tuple[list[int], list[Patch]]]]:
    """The patches of this process with their numbers, a list a step, from step `first` to the end of the run."""
    processes, rank = accelerator.num_processes, accelerator.process_index
    numbers = Numbers(first, config.steps, config.batch_size, 1, processes, rank)
    return drawn(patches, numbers, workers, accelerator.device)


def forward_backward(
    learner: Learner[HeadedModel],
    parallel: nn.Module,
    batches: Iterator[tuple[list[int], list[Patch]]],
    config: FinetuneConfig,
    crop: Sequence[int],
    step: int,
) -> Iterator[dict[str, Tensor]]:
    """Leave the gradients of a step; yield the terms of its loss, on the device.

    Args:
        parallel: the learner's task as all processes share it, which wants the gradients of all that learns; while the
            head learns alone, the task itself is called.
    """
    accelerator = learner.accelerator
    *body, head = learner.optimizer.param_groups
    alone = step < config.steps_of_head
    for group in body:
        for parameter in group["params"]:
            parameter.requires_grad_(not alone)
    numbers, patches = next(batches)
    torch.manual_seed(seeded("cpu", config.seed, 14, step, accelerator.process_index).initial_seed())  # of drop-path
    task = learner.task if alone else parallel
    terms: dict[str, Tensor] = task(*make_batch(patches, numbers, config, crop, accelerator.device))
    sum(terms.values(), torch.zeros((), device=accelerator.device)).backward()
    if alone:
        for parameter in head["params"]:
            parameter.grad = accelerator.reduce(parameter.grad, "mean")
    yield terms


# --- What is trained ----------------------------------------------------------------------------------------


class Supervised(nn.Module):
    """A network and its loss, as one module, so that parallel wrappers see a single forward pass.

    forward(images, targets) -> the terms of the loss by name, scalar, float32.
    """

    def __init__(self, net: nn.Module, config: FinetuneConfig) -> None:
        super().__init__()
        self.net, self.segments = net, config.task == "segmentation"
        self.bf16 = config.bf16 and config.mode == "full"

    def forward(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.net(images)
        terms = {"cross_entropy": F.cross_entropy(logits.float(), targets)}
        return terms | {"soft_dice_loss": dice_loss(logits, targets)} if self.segments else terms


def build(config: FinetuneConfig, num_classes: int, chans: int) -> HeadedModel:
    """The backbone that the settings name, or one of its shape drawn from the seed, with a head drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeded("cpu", config.seed, 12).initial_seed())
        backbone = load(config.model, in_chans=chans, pretrained=not config.from_scratch)
    assert isinstance(backbone, Backbone)
    model = HEADED[config.task](backbone, num_classes, generator=seeded("cpu", config.seed, 13))
    if config.mode == "linear":
        backbone.freeze()
    elif config.task == "classification":  # the decoder gets no gradient
        for level in backbone.levels[backbone.encoder_levels :]:
            for parameter in backbone.level_parameters(level):
                parameter.requires_grad_(False)
    return model


def trained(model: HeadedModel, config: FinetuneConfig) -> nn.Module:
    """What runs in a step: the model, or the head alone on features that are there already."""
    return model.head if config.mode == "linear" else model


def make_learner(model: HeadedModel, config: FinetuneConfig, accelerator: Any) -> Learner[HeadedModel]:
    """The model on its device, with AdamW; pre-trained levels learn slower, level by level towards the input."""
    task = Supervised(trained(model, config), config).train()
    layout = torch.channels_last_3d if model.backbone.ndim == 3 else torch.channels_last
    task.to(memory_format=layout)  # type: ignore[call-overload]
    model.backbone.set_grad_checkpointing(config.checkpointing)
    decay = 1.0 if config.from_scratch else config.layer_decay
    peak = config.peak_rate(model.backbone.feature_info.channels()[-1])
    groups = [group for group in model.parameter_groups(peak, decay) if group["params"]]
    return Learner(
        model,
        task,
        torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True),
        accelerator,
        rate=partial(rate, config=config),
        clip_norm=config.clip_norm,
        ema=config.ema,
    )


def rate(step: int, config: FinetuneConfig) -> float:
    """The share of its peak that a learning rate has: a warm-up and a cosine of the head alone, then of all."""
    first, warmup = config.steps_of_head, config.warmup_steps
    if step < first:
        return HEAD_RATE * schedule(step, first, warmup)
    return schedule(step - first, config.steps - first, warmup)


@torch.no_grad()
def frozen_features(
    model: HeadedModel,
    examples: Sequence[Example],
    config: FinetuneConfig,
    crop: Sequence[int],
    folder: Path,
    cache: Cache,
) -> list[Example]:
    """The examples with features in place of images: what a head sees when its backbone does not change.

    Dense ones, (C, *shape) float32, for a segmentation; the pooled bottleneck of the middle box, (C,), otherwise.
    """
    backbone, device = ready_copy(model.backbone), next(model.parameters()).device
    report: Any = model.backbone.load_report
    weights = report.sha256 or (config.model, config.seed)

    def dense(example: Example) -> Tensor:
        window = WINDOW[: backbone.ndim]
        return sliding_window(example.image[None], backbone, window=window, device=device)[0]

    def pooled(example: Example) -> Tensor:
        def function(x: Tensor) -> Tensor:
            return backbone.forward_intermediates(x, [-1])[0].flatten(2).mean(2)

        return evaluate(function, middle_box(example.image, crop)[None].to(device))[0].cpu()

    make = dense if config.task == "segmentation" else pooled
    return [
        cached(cache, (id(example), weights, tuple(crop)), folder, lambda e=example: replace(e, image=make(e)))  # type: ignore[misc]
        for example in examples
    ]


def seen_by_run(split: Split, start: Ledger) -> Ledger:
    """The ledger of a run from weights with the ledger `start`; warn of validation on what these or training see."""
    before = ledger_of((path for case in split.train for path in case.images), start)
    if again := seen({case.name: case.images for case in split.val}, before):
        text = f"validation on scans that training sees, or the weights saw before: {listed(again)}"
        warnings.warn(text, LeakageWarning, stacklevel=3)
    return joined(before, ledger_of(path for case in split.val for path in case.images))


def check_classes(examples: Sequence[Example], labels: Sequence[Label]) -> None:
    """Refuse a class that no training case holds: it could not be learnt."""
    found = {0} if examples[0].target.ndim else set()
    for example in examples:
        found |= example.places.keys() if example.target.ndim else {int(example.target)}
    missing = ", ".join(label.name for k, label in enumerate(labels) if k not in found)
    if missing and not examples[0].target.ndim:
        cause = f"none of {len(examples)} training cases is of the class {missing}"
        raise ArgumentError(cause, "train on more subjects, or add cases of it")
    if missing:
        cause = f"none of {len(examples)} training cases holds {missing} on the model's grid"
        remedy = "leave the label out (--labels), take a finer grid, or train on more cases that hold it"
        raise ArgumentError(cause, remedy)


# --- What is written ----------------------------------------------------------------------------------------


class Validation:
    """Held-out cases, and the weights that were best on them, with what was measured then."""

    def __init__(
        self,
        examples: Sequence[Example],
        labels: Sequence[Label],
        config: FinetuneConfig,
        crop: Sequence[int],
        best: Tensors | None,
        measured: Record,
    ) -> None:
        self.examples, self.labels, self.config, self.crop, self.best = examples, labels, config, crop, best
        self.score: float = measured.get(SCORE[config.task], 0.0)

    def of(self, model: HeadedModel, hurried: Callable[[], bool]) -> Record:
        """The scores of a model, whose weights are remembered if none were better before; none without cases.

        Nothing happens where it is `hurried` before the end.
        """
        if not self.examples:
            return {}
        model.eval()
        scores = validate(trained(model, self.config), self.examples, self.labels, self.config, self.crop, hurried)
        model.train()
        if not scores:
            return {}
        if self.best is None or scores[SCORE[self.config.task]] >= self.score:
            self.score = scores[SCORE[self.config.task]]
            self.best = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        return scores


@dataclass
class Journal:
    """What the main process writes of a run: log and checkpoints."""

    run: Run
    learner: Learner[HeadedModel]
    entry: ModelEntry
    validation: Validation
    board: Any
    progress: Callable[[Record], None] | None
    stop: Stop

    def note(self, taken: Taken) -> None:
        """Write a step down; where its weights are to be saved, validate first, unless that has to wait."""
        record, step = taken.record, int(taken.record["step"])
        last = step == self.validation.config.steps
        if taken.saving:
            record |= self.validation.of(self.learner.kept, lambda: self.stop.asked and not last)
        self.run.log(record)
        show(self.board, record)
        if taken.saving:
            self.save(step)
        if self.progress:
            self.progress(record)

    def make_up(self, step: int, record: Record) -> None:
        """Validate the weights that the run goes on from, where that had to wait when it was interrupted.

        Args:
            record: what was logged of their step.
        """
        config = self.validation.config
        if step % config.save_every or SCORE[config.task] in record:
            return
        if scores := self.validation.of(self.learner.kept, lambda: self.stop.asked):
            self.save(step)  # before the log says that these are the best
            self.run.truncate_log(step, record | scores)
            show(self.board, {"step": step} | scores)

    def save(self, step: int) -> None:
        """Write a checkpoint."""
        parts = self.learner.snapshot()
        if self.validation.best is not None:
            parts["best"] = self.validation.best
        patches = self.validation.config.batch_size * self.learner.accelerator.num_processes
        self.run.save(State(step, patches, parts, self.entry))


# --- The run's folder ---------------------------------------------------------------------------------------


def note_cases(out: Path, split: Split, labels: Sequence[Label], base: str | None) -> None:
    """Write down which cases are for what, and hashes of their files and of the weights that the run starts from;
    refuse others than those of the run so far.
    """
    uses: dict[str, Any] = {use: [case.name for case in cases] for use, cases in split._asdict().items()}
    given = uses | {"labels": [asdict(label) for label in labels], "files": files_hash((*split.train, *split.val))}
    given["base"] = base
    text = json.dumps(given, indent=2)
    path = out / CASES
    before = json.loads(path.read_bytes()) if path.exists() else {}
    changed = [name for name, value in json.loads(text).items() if before.get(name, value) != value]
    if changed == ["files"]:
        cause = f"images or labels have changed since the run in {out} began"
        raise ArgumentError(cause, "give them as they were, or another folder")
    if changed == ["base"]:
        cause = f"the weights that the run in {out} started from have changed"
        raise ArgumentError(cause, "give them as they were, or another folder")
    if changed:
        raise ArgumentError(f"{out} holds a run on other cases or labels ({CASES})", "give the same, or another folder")
    write_whole(path, text.encode())


def read_log(out: Path) -> list[Record]:
    """What every step of a run logged."""
    return [json.loads(line) for line in log_lines(out)]


def best_record(log: Sequence[Record], config: FinetuneConfig) -> Record:
    """What was measured on the weights that are kept: of equal scores the last; nothing without a validation."""
    score = SCORE[config.task]
    return max((record for record in reversed(log) if score in record), key=lambda record: record[score], default={})


def draw_run(out: Path, config: FinetuneConfig, log: list[Record]) -> None:
    """Learning curves, where matplotlib is installed."""
    if find_spec("matplotlib") is None:
        return
    names = [name for name in best_record(log, config) if name.partition("_")[0] in MEASURED]
    title = f"{out.name}: {config.task}, {'from scratch' if config.from_scratch else config.mode}"
    curves_picture(log, out / "curves.png", title=title, panels={"held-out cases": names} if names else {})
