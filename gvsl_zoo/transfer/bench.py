"""Does it help? Zoo weights against scratch on a task of your own, at several numbers of labelled subjects.

OUT/
    settings.json        what all trainings have in common
    cells/NAME.json      one training: on which cases, and the score of every test case
    results.json         every number, the comparisons and the verdicts
    curves.png           the learning curves
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import ArgumentError, TrainingError, listed
from ..inference.segment import prepare_channels, segment, trained_window
from ..inference.sliding import device_of, evaluate, sliding_window
from ..ledger import check_unseen, ledger_of
from ..pretrain.data import processes_started
from ..report import bench_picture
from ..volume import Prepared, Volume, laid_on
from ..weights import values_hash, write_whole
from ..zoo import load
from .cases import Case, Cases, files_hash, read_labels, split_cases
from .config import FinetuneConfig
from .data import Cache, middle_box, prepare_cases
from .entry import input_of
from .finetune import build, check_classes, finetune, frozen_features
from .statistics import compare, holm, subject_means

COUNTS = (1, 3, 5, 10)
SEEDS = 3
MODES = ("full", "linear")
LONGER = {"full": 1, "linear": 4}  # times the steps: those of a head alone cost a tenth, and it is not done before
SCRATCH = "scratch"
POOL = "the data set to train on"
TEST_SHARE = 0.25  # of the subjects, where the data hold none out
TEST_SUBJECTS = 2  # at least, there: one says nothing about others
OVERLAP = 0.25  # of windows, in the test
SURE = 0.05
STATISTICS = (
    "difference +- half of its 95 % interval, and p of the paired test, over seeds x test subjects, both random and "
    "crossed (two-way mean squares, Satterthwaite; never narrower than Student's over either alone); helps or hurts: "
    f"p < {SURE} after Holm's correction for the number of comparisons; probably: before it"
)
METRIC = {"segmentation": "Dice", "classification": "accuracy"}
CELLS, SETTINGS, RESULTS, CURVES = "cells", "settings.json", "results.json", "curves.png"
JOINING = ("models", "learning rates", "scratch arms", "steps")  # settings that may grow while a bench is extended
Detail = dict[str, float | None]


@dataclass(frozen=True)
class Cell:
    """One training: from which weights (a model's, or `scratch`), in which mode, on how many subjects.

    The seed decides which subjects, and the initial values of the head and of scratch: alike for every arm.
    """

    arm: str
    mode: str
    count: int
    seed: int

    @property
    def name(self) -> str:
        """Of its files, another for every cell."""
        arm = re.sub(r"[^\w.-]+", "_", self.arm).lstrip("._")
        if arm != self.arm:
            arm += f"-{hashlib.sha256(self.arm.encode()).hexdigest()[:8]}"
        return f"{arm}-{self.mode}-{self.count}-{self.seed}"


@dataclass(frozen=True)
class Comparison:
    """Zoo weights against scratch: means over seeds and test subjects, and their difference +- half, in %.

    half: infinite where there is nothing to say it from. p_corrected: Holm's, over the whole bench.
    """

    model: str
    mode: str
    count: int
    scratch: float
    zoo: float
    difference: float
    half: float
    p: float
    p_corrected: float

    @property
    def effect(self) -> str:
        """helps or hurts, "probably" where that holds for this comparison alone, not among all; or unclear."""
        if self.p >= SURE:
            return "unclear"
        return ("probably " if self.p_corrected >= SURE else "") + ("helps" if self.difference > 0 else "hurts")

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, which knows no infinity: half is None then."""
        return asdict(self) | {"half": self.half if math.isfinite(self.half) else None, "effect": self.effect}


@dataclass(frozen=True)
class Bench:
    """What came out.

    cells: every training with its scores. comparisons: in the order of model, mode and count. seen: test cases that
    were seen in training, by the model that saw them, or `POOL`.
    """

    task: str
    settings: dict[str, Any]
    cells: tuple[dict[str, Any], ...]
    comparisons: tuple[Comparison, ...]
    seen: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def test_subjects(self) -> int:
        """How many subjects the test cases are of."""
        return len({self.settings["subjects"][name] for name in self.settings["test"]})

    @property
    def verdicts(self) -> list[str]:
        """A sentence a model and mode."""
        return [f"{model}, {mode}: {self._verdict(rows)}" for (model, mode), rows in self.groups().items()]

    def groups(self) -> dict[tuple[str, str], list[Comparison]]:
        """The comparisons by model and mode."""
        found: dict[tuple[str, str], list[Comparison]] = {}
        for row in self.comparisons:
            found.setdefault((row.model, row.mode), []).append(row)
        return found

    def _verdict(self, rows: list[Comparison]) -> str:
        metric = METRIC[self.task]
        if self.test_subjects == 1:
            return "not shown to help: one test subject says nothing about others"
        sure = [
            f"{row.effect} by {abs(row.difference):.1f} +- {row.half:.1f} {metric} at {scans(str(row.count))}"
            for row in rows
            if row.effect != "unclear"
        ]
        unclear = scans(", ".join(str(row.count) for row in rows if row.effect == "unclear"))
        if not sure:
            return f"not shown to help: no sure difference at {unclear}"
        return ", ".join(sure) + (f"; no sure difference at {unclear}" if len(sure) < len(rows) else "")

    def lines(self) -> list[str]:
        """Tables, what their numbers are, and the verdicts."""
        out, tested = [], f"{len(self.settings['test'])} test cases"
        if self.test_subjects < len(self.settings["test"]):
            tested += f" of {self.test_subjects} subject{'s' * (self.test_subjects > 1)}"
        for (model, mode), rows in self.groups().items():
            width = max(10, len(model) + 2)
            out.append(f"{mode}: mean {METRIC[self.task]} in % over {tested} and all seeds")
            out.append(f"{'scans':>6}{SCRATCH:>10}{model:>{width}}{'difference':>18}{'p':>9}{'corrected':>11}")
            for row in rows:
                means = f"{row.scratch:>10.1f}{row.zoo:>{width}.1f}{f'{row.difference:+.1f} +- {row.half:.1f}':>18}"
                out.append(f"{row.count:>6}{means}{row.p:>9.3f}{row.p_corrected:>11.3f}")
            out.append("")
        told = [f"{who} saw test cases in training: {listed(names)}" for who, names in self.seen.items()]
        return [*out, STATISTICS, "", *self.verdicts, *told]

    def to_dict(self) -> dict[str, Any]:
        return {
            "verdicts": self.verdicts,
            "metric": f"{METRIC[self.task]}, %",
            "statistics": STATISTICS,
            "comparisons": [row.to_dict() for row in self.comparisons],
            "settings": self.settings,
            "seen in training": {who: list(names) for who, names in self.seen.items()},
            "cells": list(self.cells),
        }


def scans(count: str) -> str:
    return f"{count} scan" if count == "1" else f"{count} scans"


def bench(
    data: Cases,
    models: Sequence[str],
    config: FinetuneConfig,
    out: Path,
    *,
    counts: Sequence[int] | None = None,
    seeds: int = SEEDS,
    modes: Sequence[str] = MODES,
    device: str = "auto",
    allow_overlap: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Bench:
    """Train on few subjects from zoo weights and from scratch, several times, and compare on subjects held out.

    Args:
        data: its test cases are the test; where it has none a quarter of the subjects is held out, two at least, always
            the same.
        models: names or paths as `load` takes them, none of them called scratch; each is compared with its own
            architecture from scratch.
        config: of all trainings; its model, mode, seed, from_scratch, subjects and validation are set here. A head
            alone takes four times its steps, which cost a tenth each. Nothing is chosen by validation, for which there
            are no scans: the last weights are tested.
        out: a training that ended is kept there and not repeated.
        counts: of subjects, those of one seed nested; default 1, 3, 5 and 10, as far as there are so many, in a
            classification from the number of classes on.
        seeds: of each training, at least 3.
        modes: full, linear or both. Scans, and the features of frozen backbones, are made once for all.
        allow_overlap: test on scans that a model or the training saw, and say which.
        say: called with a line about what is to do, after every training, and with the time that the others will take.

    A segmentation is scored by the mean Dice of the labels that prediction or reference hold, on the scan's own grid,
    of films on the model's; a classification by whether the most probable class is right.
    Errors: ArgumentError for what does not fit together or differs from what `out` holds, for a draw of subjects that
        lacks a label or class, before the first training, and for a test case that a model saw in pre-training, without
        labels or with them, or that is also among those to train on; those of `finetune`.
    """
    if seeds < 3 or not models or not modes or set(modes) - set(MODES):
        cause = f"{seeds} seeds, models {', '.join(models) or 'none'}, modes {', '.join(modes) or 'none'}"
        raise ArgumentError(cause, f"give at least 3 seeds, a model, and modes of {', '.join(MODES)}")
    pool, test = hold_out(data)
    subjects = len({case.subject for case in pool})
    least = len(data.labels) if data.task == "classification" else 1
    counts = sorted(set(counts or [least, *(count for count in COUNTS if least < count <= subjects)]))
    if not 1 <= counts[0] <= counts[-1] <= subjects:
        cause = f"counts {', '.join(map(str, counts))} of {subjects} labelled subjects"
        raise ArgumentError(cause, "ask for fewer, or label more")
    if processes_started() > 1:
        raise ArgumentError("a bench under torchrun", "start it in one process; several benches take several folders")
    modes = list(dict.fromkeys(modes))
    known = scratch_before(out)
    arms = scratch_arms(models, known)
    entries: dict[str, Any] = {model: load(model).entry for model in models}
    ledgers = {model: entry.ledger for model, entry in entries.items()}
    ledgers[POOL] = ledger_of(path for case in pool for path in case.images)
    seen = check_unseen({case.name: case.images for case in test}, ledgers, allow=allow_overlap)
    settings = common_settings(pool, test, models, modes, config)
    settings["scratch arms"] = {arms[model]: shape_of(model) for model in models}
    check_settings(settings, out)
    cells = [
        Cell(arm, mode, count, seed)
        for mode in modes
        for seed in range(seeds)
        for count in counts
        for arm in dict.fromkeys(name for model in models for name in (arms[model], model))
    ]
    shapes = {arms[model]: model for model in reversed(models)}
    results = Trainings(pool, test, config, shapes, out, device).run(cells, say)
    table = compared(results, settings["subjects"], arms, modes, counts, seeds)
    report = Bench(data.task, settings, tuple(asdict(cell) | result for cell, result in results.items()), table, seen)
    write_report(report, out)
    return report


def hold_out(data: Cases) -> tuple[Cases, tuple[Case, ...]]:
    """Labelled cases to train on, and those to test on; no subject is in both."""
    stated = tuple(case for case in data if case.split == "test" and case.label is not None)
    share = TEST_SHARE
    if not stated:
        subjects = len({case.subject for case in data if case.label is not None and case.split != "test"})
        share = max(share, min(TEST_SUBJECTS, subjects - 1) / max(subjects, 1))
    split = split_cases(data, validation=share)
    train, test = (split.train + split.val, stated) if stated else (split.train, split.val)
    if not test:
        raise ArgumentError("there is no labelled case to test on", "give some the split test, or add subjects")
    return replace(data, cases=tuple(replace(case, split=None) for case in train)), test


def scratch_arms(models: Sequence[str], known: Mapping[str, str]) -> dict[str, str]:
    """The arm that each model is compared with: models of one shape and input share it.

    Args:
        known: shapes by arm, of a bench that goes on.

    Errors: ArgumentError for a model that is called like one.
    """
    shapes = {shape: arm for arm, shape in known.items()}
    arms = {}
    for model in models:
        if model == SCRATCH or model.startswith(f"{SCRATCH} of"):
            raise ArgumentError(f"a model called {model!r}, as the arm without weights is", f"write ./{model}")
        arms[model] = shapes.setdefault(shape_of(model), f"{SCRATCH} of {model}" if shapes else SCRATCH)
    return arms


def shape_of(model: str) -> str:
    """What a network of the same shape and input has in common with a model."""
    entry: Any = load(model).entry
    return repr((entry.architecture, sorted(entry.config.items()), entry.input))


def scratch_before(out: Path) -> dict[str, str]:
    """The shapes by arm that a bench in a folder has trained from scratch so far."""
    with suppress(OSError, ValueError, KeyError):
        return dict(json.loads((out / SETTINGS).read_bytes())["scratch arms"])
    return {}


# --- Trainings ------------------------------------------------------------------------------------------------------


class Trainings:
    """Cells, trained and tested one after the other; what they have in common is read and computed once.

    Args:
        pool, test: cases to draw from, and to test on.
        shapes: the model whose architecture an arm from scratch has, by the arm's name.
    """

    def __init__(
        self, pool: Cases, test: Sequence[Case], config: FinetuneConfig, shapes: dict[str, str], out: Path, device: str
    ) -> None:
        self.pool, self.test, self.config, self.shapes, self.out, self.device = pool, test, config, shapes, out, device
        self.grids: dict[tuple[str, str], Prepared] = {}
        self.cache: Cache = {}
        self.drawn: tuple[tuple[str, int], Cache] = ("", 0), {}  # the frozen backbone drawn last: its features

    def run(self, cells: Sequence[Cell], say: Callable[[str], None]) -> dict[Cell, dict[str, Any]]:
        """The result of every cell, from its file where it has one."""
        folder = self.out / CELLS
        folder.mkdir(parents=True, exist_ok=True)
        paths = {cell: folder / f"{cell.name}.json" for cell in cells}
        left = [cell for cell in cells if not paths[cell].exists()]
        for cell in set(cells).difference(left):
            shutil.rmtree(folder / cell.name, ignore_errors=True)  # of a bench that was killed behind its result
        steps = steps_of(self.config, dict.fromkeys(cell.mode for cell in cells))
        told = " and ".join(f"{count} steps ({mode})" for mode, count in steps.items())
        say(f"{len(left)} trainings of {told} to do, {len(cells) - len(left)} done before")
        self._check(left)
        timed: set[str] = set()
        for cell in left:
            result = self._train(cell)
            write_whole(paths[cell], json.dumps(result, indent=2).encode())
            shutil.rmtree(folder / cell.name, ignore_errors=True)  # not before: what is half gone does not go on
            mean = np.mean(list(result["scores"].values()))
            say(f"{cell.arm}, {cell.mode}, {scans(str(cell.count))}, seed {cell.seed}: {mean:.1f} %")
            if cell.mode not in timed:
                timed.add(cell.mode)
                alike = sum(other.mode == cell.mode for other in left) - 1
                minutes = alike * result["seconds"] / 60
                say(f"this took {result['seconds']:.0f} s; {alike} more in mode {cell.mode}: about {minutes:.0f} min")
        return {cell: json.loads(path.read_bytes()) for cell, path in paths.items()}

    def _check(self, cells: Sequence[Cell]) -> None:
        """Refuse a draw that lacks a label or class now, and not after hours of training."""
        labels, complete = self.pool.labels, self.pool.complete
        draws = list(dict.fromkeys(map(self._taken, cells)))
        drawn = list(dict.fromkeys(itertools.chain.from_iterable(draws)))
        for model in dict.fromkeys(self.shapes.get(cell.arm, cell.arm) for cell in cells):
            given = input_of(self.config, load(model).entry)
            examples = prepare_cases(drawn, labels, given, self.out, complete=complete, cache=self.cache)
            example_of = dict(zip(drawn, examples, strict=True))
            for cases in draws:
                check_classes([example_of[case] for case in cases], labels)

    def _taken(self, cell: Cell) -> tuple[Case, ...]:
        """What a training is on."""
        return split_cases(self.pool, seed=cell.seed, validation=0.0, subjects=cell.count).train

    def _train(self, cell: Cell) -> dict[str, Any]:
        started = time.perf_counter()
        steps = self.config.steps * LONGER[cell.mode]
        config = replace(
            self.config,
            steps=steps,
            model=self.shapes.get(cell.arm, cell.arm),
            mode=cell.mode,  # type: ignore[arg-type]
            seed=cell.seed,
            from_scratch=cell.arm in self.shapes,
            subjects=cell.count,
            validation=0.0,
            save_every=steps,
        )
        run, cache = self.out / CELLS / cell.name, self._cache(cell)
        model = finetune(self.pool, config, run, device=self.device, cache=cache)
        details = {case.name: self._test(model, case, config, cache) for case in self.test}
        return {
            "taken": [case.name for case in self._taken(cell)],
            "scores": {case.name: self._score(case, details[case.name]) for case in self.test},
            "details": details,
            "seconds": time.perf_counter() - started,
        }

    def _cache(self, cell: Cell) -> Cache:
        """Where scans and features are kept; those of a frozen backbone from scratch only until the next is drawn."""
        if cell.mode == "full" or cell.arm not in self.shapes:
            return self.cache
        if self.drawn[0] != (cell.arm, cell.seed):
            self.drawn = (cell.arm, cell.seed), dict(self.cache)
        return self.drawn[1]

    def _test(self, model: Any, case: Case, config: FinetuneConfig, cache: Cache) -> Detail:
        """Of one case, in %: the Dice of each label, None if it is in neither; or the probability of each class."""
        labels, volumes, device = self.pool.labels, model.backbone.ndim == 3, device_of(model)
        segments, linear = config.task == "segmentation", config.mode == "linear"
        if segments and volumes and not linear:
            return self._dice(case, segment(case.images, model, labels=labels, overlap=OVERLAP))
        crop = config.crop_for(model.backbone.ndim) if segments or volumes else model.entry.input.size
        [example] = prepare_cases([case], labels, model.entry.input, self.out, complete=self.pool.complete, cache=cache)
        if linear:
            start = build(config, len(labels), len(case.images)).to(device)  # what the head was trained on
            [example] = frozen_features(start, [example], config, crop, self.out, cache)
            logits = evaluate(model.head, example.image[None].to(device))[0].cpu()
        elif segments:
            logits = sliding_window(
                example.image[None], model, window=trained_window(model)[-2:], overlap=OVERLAP, device=device
            )[0]
        else:
            logits = evaluate(model, middle_box(example.image, crop)[None].to(device))[0].cpu()
        if not segments:
            return {label.name: 100 * p for label, p in zip(labels, logits.softmax(0).tolist(), strict=True)}
        if volumes:
            found = self._grid(model, case).restore_labels([(0, logits)], [label.value for label in labels])
            return self._dice(case, found)
        classes = {label.name: index for index, label in enumerate(labels)}
        return dice_of_labels(logits.argmax(0).numpy(), example.target.numpy(), classes)

    def _dice(self, case: Case, found: Volume) -> Detail:
        assert isinstance(case.label, Path)
        truth = read_labels(case.label)
        truth = laid_on(truth, "the reference", found, "the prediction")
        return dice_of_labels(found.data, truth.data, {label.name: label.value for label in self.pool.labels})

    def _grid(self, model: Any, case: Case) -> Prepared:
        """The way from the model's grid to the scan's, without the scan's voxels."""
        key = case.name, repr(model.entry.input)
        if key not in self.grids:
            prepared = prepare_channels(case.images, model)
            image = torch.empty(()).expand(prepared.image.shape)
            data = np.broadcast_to(np.uint8(0), prepared.source.shape)
            self.grids[key] = replace(prepared, image=image, source=replace(prepared.source, data=data))
        return self.grids[key]

    def _score(self, case: Case, detail: Detail) -> float:
        if self.pool.task == "classification":
            right = next(label.name for label in self.pool.labels if label.value == case.label)
            return 100.0 * (max(detail, key=lambda name: detail[name] or 0.0) == right)
        known = [value for value in detail.values() if value is not None]
        return float(np.mean(known)) if known else 100.0  # nothing is there, and nothing was found


def dice_of_labels(found: np.ndarray, truth: np.ndarray, values: dict[str, int]) -> Detail:
    """Dice in % by name of all labels but the first, the background; None for one that is in neither."""
    out: Detail = {}
    for name, value in itertools.islice(values.items(), 1, None):
        a, b = found == value, truth == value
        size = np.count_nonzero(a) + np.count_nonzero(b)
        out[name] = 200 * np.count_nonzero(a & b) / size if size else None
    return out


# --- What came out --------------------------------------------------------------------------------------------------


def compared(
    results: dict[Cell, dict[str, Any]],
    subjects: Mapping[str, str],
    arms: dict[str, str],
    modes: Sequence[str],
    counts: Sequence[int],
    seeds: int,
) -> tuple[Comparison, ...]:
    """Every model with its scratch, paired by seed and test subject; p corrected for the number of comparisons.

    Args:
        subjects: by test case; the scores of one subject are averaged first.
    """

    def scores(arm: str, mode: str, count: int) -> np.ndarray:
        cells = [results[Cell(arm, mode, count, seed)] for seed in range(seeds)]
        return np.array([subject_means(cell["scores"], subjects) for cell in cells])

    found = []
    for model, mode, count in itertools.product(arms, modes, counts):
        scratch, zoo = scores(arms[model], mode, count), scores(model, mode, count)
        mean, half, p = compare(zoo - scratch)
        found.append(Comparison(model, mode, count, float(scratch.mean()), float(zoo.mean()), mean, half, p, p))
    corrected = holm([row.p for row in found])
    return tuple(replace(row, p_corrected=p) for row, p in zip(found, corrected, strict=True))


def write_report(report: Bench, out: Path) -> None:
    """Write results.json and, where matplotlib is installed, curves.png."""
    write_whole(out / RESULTS, (json.dumps(report.to_dict(), indent=2) + "\n").encode())
    if find_spec("matplotlib"):
        bench_picture(report, out / CURVES)


# --- Settings -------------------------------------------------------------------------------------------------------


def common_settings(
    pool: Cases, test: Sequence[Case], models: Sequence[str], modes: Sequence[str], config: FinetuneConfig
) -> dict[str, Any]:
    """What the trainings of a bench have in common, as JSON has it."""
    own = (
        "model",
        "mode",
        "seed",
        "from_scratch",
        "subjects",
        "validation",
        "learning_rate",
        "save_every",
        "keep_last",
    )
    loaded: dict[str, Any] = {model: load(model) for model in models}
    channels = {model: backbone.feature_info.channels()[-1] for model, backbone in loaded.items()}
    settings = {
        "pool": [case.name for case in pool],
        "test": [case.name for case in test],
        "subjects": {case.name: case.subject for case in (*pool, *test)},
        "files": files_hash((*pool, *test)),
        "labels": {label.name: label.value for label in pool.labels},
        "training": {name: value for name, value in asdict(config).items() if name not in own},
        "learning rates": learning_rates(config, modes, channels),
        "steps": steps_of(config, modes),
        "models": {model: values_hash(backbone) for model, backbone in loaded.items()},
    }
    return json.loads(json.dumps(settings))


def steps_of(config: FinetuneConfig, modes: Iterable[str]) -> dict[str, int]:
    """What a training of every mode takes."""
    return {mode: config.steps * LONGER[mode] for mode in modes}


def learning_rates(config: FinetuneConfig, modes: Sequence[str], channels: Mapping[str, int]) -> dict[str, float]:
    """The peak of every model and mode, which of the whole network is another from scratch.

    Args:
        channels: of the deepest level, by model.
    """
    rates = {}
    for mode, (model, wide) in itertools.product(modes, channels.items()):
        arm = replace(config, mode=mode, from_scratch=False)  # type: ignore[arg-type]
        rates[f"{model}, {mode}"] = arm.peak_rate(wide)
        if mode == "full":
            rates[f"{SCRATCH} of {model}, {mode}"] = replace(arm, from_scratch=True).peak_rate(wide)
    return rates


def check_settings(settings: dict[str, Any], out: Path) -> None:
    """Refuse to add to a bench of other settings; other models and modes may join it.

    What an older bench does not say of itself is not compared.
    """
    path = out / SETTINGS
    try:
        out.mkdir(parents=True, exist_ok=True)
        before = json.loads(path.read_bytes()) if path.exists() else settings
        joined = {group: before.get(group, {}) | settings[group] for group in JOINING}
        own = [name for name in settings if name not in JOINING]
        changed = [name for name in own if before.get(name, settings[name]) != settings[name]]
        held = [(group, name, value) for group in JOINING for name, value in before.get(group, {}).items()]
        changed += [name for group, name, value in held if joined[group][name] != value]
        if not changed:
            write_whole(path, json.dumps(settings | joined, indent=2).encode())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{path} cannot be used: {error}", "choose another folder") from error
    if changed:
        raise ArgumentError(f"{out} holds a bench with other {', '.join(changed)}", "use the same, or another folder")
