"""How any run takes its steps: without waiting for the device, alike in all processes, until it is asked to stop."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.sharedctypes import RawValue
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..errors import ArgumentError, GvslZooError, TrainingError, needs
from .config import RunConfig
from .data import Numbers
from .run import Record, State, Tensors

Item = TypeVar("Item")
Model = TypeVar("Model", bound=nn.Module)
PATIENCE = timedelta(hours=6)  # of processes with the first one, which alone validates; launchers see one that died
BEHIND = {"cuda": 1}  # steps that run on a device while the numbers of the step before them are read


class Taken(NamedTuple):
    """A step: what the log receives, and whether the weights are to be saved now, because it is time or to stop."""

    record: Record
    saving: bool


class Learner(Generic[Model]):
    """A module in training; every process holds the same.

    Args:
        model: what is saved.
        task: calls the model and gives the terms of the loss by name, each a scalar, float32.
        optimizer: with `fused=True`, the only kind that leaves out a step without being told by the host.
        rate: share of its peak that the learning rate has at a step.
        ema: decay of the averaged weights, which are then the ones that are kept; 0 for none.
    """

    def __init__(
        self,
        model: Model,
        task: nn.Module,
        optimizer: torch.optim.Optimizer,
        accelerator: Any,
        *,
        rate: Callable[[int], float],
        clip_norm: float,
        ema: float = 0.0,
    ) -> None:
        self.model, self.task, self.optimizer, self.accelerator = model, task, optimizer, accelerator
        self.rate, self.clip_norm, self.ema = rate, clip_norm, ema
        self.averaged = deepcopy(model) if ema else None
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        self.spoilt = torch.zeros((), device=accelerator.device)  # 1 from the first number on that is not finite

    @property
    def kept(self) -> Model:
        """The module whose weights the run is for."""
        return self.model if self.averaged is None else self.averaged

    def steps(
        self,
        forward_backward: Callable[[int], Iterable[Mapping[str, Tensor]]],
        first: int,
        config: RunConfig,
        stop: Stop,
    ) -> Iterator[Taken]:
        """Take the steps from `first` to the end; yield each in its turn.

        On CUDA a step is yielded while the next one runs, but not one whose weights are to be saved.

        Args:
            forward_backward: for each update of a step, leaves its gradients and gives the terms of its loss, on the
                device; only then comes the next one.

        Raises: TrainingError for a loss or gradient that is not finite. The weights are then those before that update.
            SystemExit where any process is asked to stop, after a step whose weights were to be saved.
        """
        unread: deque[Callable[[], tuple[Record, bool]]] = deque()
        started = time.perf_counter()
        for step in range(first, config.steps):
            unread.append(self._update(forward_backward(step), step, stop))
            last = step + 1 == config.steps
            saving = last or (step + 1) % config.save_every == 0
            while len(unread) > (0 if saving else BEHIND.get(self.accelerator.device.type, 0)):
                record, asked = unread.popleft()()
                stop.asked = stop.asked or asked
                saving = saving or asked
                seconds = time.perf_counter() - started
                yield Taken(record | {"seconds": seconds}, saving and not unread)
                started = time.perf_counter()
            if saving and not last:
                self.heed(stop)

    def heed(self, stop: Stop) -> None:
        """End all processes at one place if any of them is asked to stop; called where their weights are saved."""
        asked = torch.tensor(float(stop.asked), device=self.accelerator.device)
        if self.accelerator.reduce(asked, "sum") > 0:
            raise SystemExit(stop.code)

    def _update(
        self, updates: Iterable[Mapping[str, Tensor]], step: int, stop: Stop
    ) -> Callable[[], tuple[Record, bool]]:
        """Queue a step; what is returned waits for its numbers, and says whether any process is to stop."""
        names: list[str] = []
        parts: list[Callable[[], list[float]]] = []
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * self.rate(step)
        for terms in updates:
            norm = nn.utils.clip_grad_norm_(self.task.parameters(), self.clip_norm)
            numbers = torch.stack([*terms.values(), norm, norm.new_full((), float(stop.asked))]).detach()
            numbers = self.accelerator.reduce(numbers, "mean")
            self.spoilt.masked_fill_(~numbers.isfinite().all(), 1.0)
            names += terms
            parts.append(copied(numbers))
            self.optimizer.found_inf = self.spoilt  # type: ignore[attr-defined]  # as torch.amp.GradScaler hands it over
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.averaged is not None:
            new = 1 - self.ema if step else 1.0
            with torch.no_grad():
                torch._foreach_lerp_(list(self.averaged.parameters()), list(self.model.parameters()), new)

        def read() -> tuple[Record, bool]:
            numbers = [part() for part in parts]
            values = [value for *terms, _, _ in numbers for value in terms]
            loss, gradient = sum(values), math.hypot(*(norm for *_, norm, _ in numbers))
            if not (math.isfinite(loss) and math.isfinite(gradient)):
                raise TrainingError(
                    f"loss became {loss} and its gradient {gradient} at step {step + 1}",
                    "the checkpoints are from before and good; lower the learning rate",
                )
            by_name = dict(zip(names, values, strict=True))
            asked = any(asked > 0 for *_, asked in numbers)
            return {"step": step + 1, "loss": loss} | by_name | {"gradient": gradient}, asked

        return read

    def snapshot(self) -> dict[str, Tensors]:
        """Everything that a run goes on from; learning rate, data and draws are functions of the step."""
        moments = {
            f"{index}.{key}": value
            for index, values in self.optimizer.state_dict()["state"].items()
            for key, value in values.items()
        }
        parts: dict[str, Tensors] = {"model": self.model.state_dict(), "optimizer": moments}
        return parts if self.averaged is None else parts | {"ema": self.averaged.state_dict()}

    def restore(self, state: State | None, items_a_step: int, data: str | None = None) -> int:
        """Put a checkpoint back; return its step, 0 without one.

        Args:
            data: what the run learns from, as `State` has it.

        Raises: ArgumentError if its steps took another number of pairs or patches, or learned from other data.
        """
        if state is None:
            return 0
        if state.pairs_a_step != items_a_step:
            raise ArgumentError(
                f"the run took {state.pairs_a_step} pairs a step, these processes take {items_a_step}",
                "keep processes x batch_size x accumulate the same, so that the order of the data is",
            )
        if None not in (state.data, data) and state.data != data:
            raise ArgumentError(
                "the run learned from other data",
                "give the same --data; to go on with other scans, start another run with --init RUN",
            )
        self.model.load_state_dict(state.tensors["model"])
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in state.tensors["optimizer"].items():
            index, key = name.split(".", 1)
            like = parameters[int(index)] if tensor.ndim else tensor  # a fused step takes the layout to be the same
            moments.setdefault(int(index), {})[key] = torch.empty_like(like).copy_(tensor)
        self.optimizer.load_state_dict({"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]})
        if self.averaged is not None:
            self.averaged.load_state_dict(state.tensors["ema"])
        return state.step


def copied(numbers: Tensor) -> Callable[[], list[float]]:
    """Start a copy of a tensor to the host; what is returned waits for that, but not for what was queued since."""
    if not numbers.is_cuda:
        return numbers.tolist
    host = numbers.to("cpu", non_blocking=True)  # into pinned memory
    done = torch.cuda.Event()
    done.record()

    def arrived() -> list[float]:
        done.synchronize()
        return host.tolist()

    return arrived


def schedule(step: int, steps: int, warmup_steps: int) -> float:
    """The share of its peak that a learning rate has: linear warm-up, and a cosine to zero."""
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    return warmup * 0.5 * (1 + math.cos(math.pi * step / steps))


# --- Processes ----------------------------------------------------------------------------------------------


def make_accelerator(device: str) -> Any:
    """Processes and device; the data are dealt out by number, so accelerate only carries model and gradients.

    A loss goes backward without it: by its launcher's settings it would divide or scale the loss.
    """
    needs("train", "training", "accelerate")
    from accelerate import Accelerator
    from accelerate.utils import DistributedType, InitProcessGroupKwargs

    if device not in ("auto", "cpu", "cuda"):
        raise ArgumentError(f"device {device!r} for a run", "give auto, cpu or cuda; torchrun deals out several")
    if device == "cuda" and not torch.cuda.is_available():
        raise ArgumentError("this machine has no CUDA device", "give auto or cpu")
    cpu = device == "cpu" or not torch.accelerator.is_available()
    waiting = InitProcessGroupKwargs(timeout=PATIENCE)
    try:  # no mixed precision, whatever its launcher says
        accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[waiting])
    except ValueError:  # a process has one state, and this one's is of other settings
        accelerator = None
    if accelerator is None or (accelerator.device.type == "cpu") != cpu:
        cause = f"device {device!r} where this process has used accelerate with another device or precision"
        raise ArgumentError(cause, "start the run in a process of its own")
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ArgumentError(
            f"accelerate is to shard the model ({accelerator.distributed_type.value}), and a run cannot",
            "start it with torchrun, or without sharding in accelerate's configuration",
        )
    return accelerator


class Delivered(Dataset[Any]):
    """Items by their number, and in place of one the package's own error: a worker's would arrive as a traceback."""

    def __init__(self, items: Dataset[Any]) -> None:
        self.items = items

    def __getitem__(self, number: int) -> Any:
        try:
            return self.items[number]
        except GvslZooError as error:
            return error


@contextmanager
def drawn(
    items: Dataset[Item], numbers: Numbers, workers: int, device: torch.device
) -> Iterator[Iterator[tuple[list[int], list[Item]]]]:
    """The items of a process, a list a forward pass, with their numbers, drawn ahead by `workers` processes.

    These live as long as the context, whatever signals reach them. An error of the package that one of them meets is
    raised where its item is asked for, as it is.

    Raises: TrainingError where one of them has died; what asks for items or does the steps is interrupted then.
    """
    ended = RawValue("b", 0)
    loader = DataLoader(
        Delivered(items),
        batch_sampler=numbers,
        num_workers=workers,
        collate_fn=list,
        pin_memory=device.type == "cuda",
        worker_init_fn=partial(outlast_signals, ended),
        generator=torch.Generator(),  # its own: a step's draws do not depend on which step was the first
    )

    def delivered() -> Generator[tuple[list[int], list[Item]], None, None]:
        for batch, found in zip(numbers, loader, strict=True):
            for item in found:
                if isinstance(item, GvslZooError):
                    raise item
            yield batch, found

    with closing(delivered()) as batches:
        try:
            yield batches
        except (RuntimeError, EOFError, ConnectionError) as error:
            if not (workers and tells_of_a_death(error)):
                raise
            told = str(error).strip(" .") or type(error).__name__
            raise TrainingError(
                f"a process that draws ahead has died: {told}",
                "if memory was short, give fewer --workers; --resume goes on from the last checkpoint",
            ) from error
        finally:
            ended.value = 1  # before the loader goes, and terminates those that are late


def tells_of_a_death(error: Exception) -> bool:
    """Whether an error is PyTorch's word on a DataLoader worker that has died, or what is left of a broken pipe to it.

    An error that a living worker met says "Caught ...".
    """
    text = str(error)
    return "DataLoader worker (pid" in text if isinstance(error, RuntimeError) else not text.startswith("Caught ")


def outlast_signals(ended: Any, _worker: int) -> None:
    """Let a worker leave signals to the run: one that died of a SIGTERM to all processes would take the run with it.

    Once `ended` is 1, SIGTERM ends it: so the loader and Python's exit get rid of a worker that does not listen. One
    whose run was killed sees that by itself, within seconds.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if ended.value else None)


@dataclass
class Stop:
    """Whether the run is to save and end, and the exit code that says by which signal."""

    asked: bool = False
    code: int = 128 + signal.SIGTERM  # also where another process received it


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Notes SIGTERM, as Slurm, Kubernetes and torchrun send it before they kill, and the first SIGINT (Ctrl-C).

    The second SIGINT is a KeyboardInterrupt again.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, _frame: Any) -> None:
        stop.asked, stop.code = True, 128 + number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, before[signal.SIGINT])

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
