"""Weight surgery: put a model's tensors into any torch module, and say exactly which found a place."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from .errors import ArgumentError, listed
from .models.backbone import Backbone
from .zoo import load

MIN_CONVOLUTIONS = 3  # two of equal shape, one after the other, are found in most networks
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

Match = tuple[dict[str, str], dict[str, str]]  # {name in the source: name in the target}, {name: why it has no place}


@dataclass(frozen=True)
class TransplantReport:
    """What `transplant` did.

    Args:
        matched_by: "name", or "structure" (the order and shapes of the convolutions).
        placed: (name in the source, name in the target).
        spread: the source's input convolution where it was divided among the target's input channels.
        left: (name in the source, why it has no place).
        kept: names of the target whose values stayed as they were: train them.
    """

    matched_by: str
    placed: tuple[tuple[str, str], ...]
    spread: str | None
    left: tuple[tuple[str, str], ...]
    kept: tuple[str, ...]

    def __str__(self) -> str:
        total = len(self.placed) + len(self.left)
        lines = [f"{len(self.placed)} of {total} tensors placed, matched by {self.matched_by}:"]
        lines += [f"  {source} -> {target}" for source, target in self.placed]
        if self.spread:
            lines.append(f"  ({self.spread} divided among the target's input channels)")
        for reason, group in groupby(sorted(self.left, key=lambda pair: pair[1]), key=lambda pair: pair[1]):
            lines.append(f"left out, {reason}: {', '.join(name for name, _ in group)}")
        lines.append(f"as they were in the target: {', '.join(self.kept) or 'none'}")
        return "\n".join(lines)


def transplant(model: nn.Module | Mapping[str, Tensor] | str | os.PathLike[str], into: nn.Module) -> TransplantReport:
    """Copy what fits of a model's tensors into another network.

    First by name: the pair of prefixes ("unet.", "encoder.backbone.", none) under which most tensors agree in name and
    shape. Where names tell nothing, by structure: the encoder's convolutions are aligned with the target's in order,
    by shape, and those are placed that every best alignment places alike, if the input's convolution is among them.
    An input convolution of one channel is divided among the target's channels: copies of one give its response.

    Args:
        model: what `load` returns or takes (a name, a path); or a state dict, which is matched by name only.
        into: any module; keeps its dtype and device. Untouched unless all has been decided.

    Returns: which tensors were placed, left out, and kept by the target.
    Errors: ArgumentError where fewer than three convolutions fit, or where they fit in several places.
    """
    if not isinstance(into, nn.Module):
        raise ArgumentError(f"a {type(into).__name__} to transplant into", "give the network itself, a torch module")
    source = load(model) if isinstance(model, str | os.PathLike) else model
    tensors = dict(source.state_dict() if isinstance(source, nn.Module) else source)
    if not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ArgumentError("a mapping that holds more than tensors", "give the state dict inside the checkpoint")
    target = dict(_unique_tensors(into))
    if any(tensor.is_meta for tensor in (*tensors.values(), *target.values())):
        raise ArgumentError("tensors on the meta device have no values", "give both networks real memory first")
    (pairs, left), matched_by = _by_name(tensors, target), "name"
    if not pairs and isinstance(source, nn.Module) and (aligned := _by_structure(source, tensors, into))[0]:
        (pairs, left), matched_by = aligned, "structure"
    if not pairs:
        reasons = [f"{name} {reason}" for name, reason in left.items() if _is_kernel(tensors[name])]
        raise ArgumentError(
            f"{type(into).__name__} has no place for {MIN_CONVOLUTIONS} of the convolutions: {listed(reasons, '; ')}",
            "the target needs the model's kernels, widths and number of axes",
        )
    values = {ours: _fitted(tensors[ours], target[theirs]) for ours, theirs in pairs.items()}
    with torch.no_grad():
        for ours, theirs in pairs.items():
            target[theirs].copy_(values[ours])
    spread = next((ours for ours, value in values.items() if value.shape != tensors[ours].shape), None)
    kept = tuple(name for name in target if name not in set(pairs.values()))
    return TransplantReport(matched_by, tuple(pairs.items()), spread, tuple(left.items()), kept)


def _unique_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, each under its first name: some networks hold their encoder twice."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def _is_kernel(tensor: Tensor) -> bool:
    return tensor.ndim >= 3


def _fits(given: Tensor, wanted: Tensor, is_first: bool) -> bool:
    """Whether a tensor has the wanted shape and kind, or is an input convolution of one channel that can have it."""
    given_shape = list(given.shape)
    if is_first and given.ndim == wanted.ndim and given_shape[1] == 1:
        given_shape[1] = wanted.shape[1]
    return given_shape == list(wanted.shape) and given.is_floating_point() == wanted.is_floating_point()


def _fitted(given: Tensor, wanted: Tensor) -> Tensor:
    return given if given.shape == wanted.shape else given.float().expand(wanted.shape) / wanted.shape[1]


# --- By name ------------------------------------------------------------------------------------------------------


def _by_name(tensors: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Match:
    """The tensors that agree in name and shape under the pair of prefixes where most do.

    Errors: ArgumentError where two pairs of prefixes do equally well and differ in what they place.
    """
    ours_first, their_first = (
        next((name for name, tensor in each.items() if _is_kernel(tensor)), None) for each in (tensors, target)
    )
    ours_by_ending = defaultdict(list)
    for name in tensors:
        for prefix, ending in _endings(name):
            ours_by_ending[ending].append((prefix, name))
    namesakes: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for theirs in target:
        for their_prefix, ending in _endings(theirs):
            for our_prefix, ours in ours_by_ending[ending]:
                namesakes[our_prefix, their_prefix][ours] = theirs

    def placed(names: Mapping[str, str]) -> dict[str, str]:
        pairs = {
            ours: theirs
            for ours, theirs in names.items()
            if _fits(tensors[ours], target[theirs], ours == ours_first or theirs == their_first)
        }
        return pairs if sum(_is_kernel(tensors[name]) for name in pairs) >= MIN_CONVOLUTIONS else {}

    ranked = sorted(((placed(names), names) for names in namesakes.values()), key=lambda two: (*map(len, two),))
    pairs, names = ranked[-1] if ranked else ({}, {})
    rivals = [other for other, _ in ranked if len(other) == len(pairs) and other != pairs]
    if rivals:
        places = [next(iter(found.values())) for found in (*rivals, pairs)]
        raise ArgumentError(
            f"the tensors fit in several places, among them {' and '.join(places[-2:])}",
            "give the module that you mean: into=network.encoder",
        )
    left = {}
    for name, tensor in tensors.items():
        if name in names and name not in pairs:
            there = names[name]
            left[name] = f"is {tuple(tensor.shape)}, not {tuple(target[there].shape)} as {there}"
        elif name not in pairs:
            left[name] = "has no namesake"
    return pairs, left


def _endings(name: str) -> Iterator[tuple[str, str]]:
    """(prefix, ending) for every ending of a name that holds a module and a tensor."""
    parts = name.split(".")
    for i in range(len(parts) - 1):
        yield "".join(f"{part}." for part in parts[:i]), ".".join(parts[i:])


# --- By structure -------------------------------------------------------------------------------------------------


def _by_structure(source: nn.Module, tensors: Mapping[str, Tensor], into: nn.Module) -> Match:
    """The encoder's convolutions aligned with the target's, in order and by shape, where there is one way to do it."""
    ours = [name for name in _encoder_convolutions(source) if f"{name}.weight" in tensors]
    theirs = [(name, module) for name, module in into.named_modules() if isinstance(module, CONVOLUTIONS)]
    fits = [
        [_fits(tensors[f"{name}.weight"], module.weight, i == 0 == j) for j, (_, module) in enumerate(theirs)]
        for i, name in enumerate(ours)
    ]
    certain, doubtful = alignment(fits)
    if 0 not in certain or len(certain) < MIN_CONVOLUTIONS:
        certain = {}  # without the input's convolution the others would sit at other levels than their own
    pairs, left = {}, dict.fromkeys(tensors, "is no convolution of the encoder")
    for i, name in enumerate(ours):
        weight, bias = f"{name}.weight", f"{name}.bias"
        left[weight] = "fits in several places" if i in doubtful else "has no counterpart of its shape in its order"
        left[bias] = left[weight]
        if i in certain:
            there, module = theirs[certain[i]]
            pairs[weight] = f"{there}.weight"
            if module.bias is not None:
                pairs[bias] = f"{there}.bias"
            left[bias] = "belongs to a convolution that has no bias there"
    return pairs, {name: reason for name, reason in left.items() if name not in pairs}


def _encoder_convolutions(source: nn.Module) -> list[str]:
    """Names of the convolutions of a model's encoder in the order in which they are applied."""
    found = next(((name, part) for name, part in source.named_modules() if isinstance(part, Backbone)), None)
    if found is None:
        return []
    prefix, backbone = found
    return [
        ".".join(filter(None, (prefix, level.module, name)))
        for level in backbone.feature_info
        for name, part in backbone.get_submodule(level.module).named_modules()
        if isinstance(part, CONVOLUTIONS)
    ]


def alignment(fits: Sequence[Sequence[bool]]) -> tuple[dict[int, int], set[int]]:
    """What all longest common subsequences of two sequences agree on.

    Every longest one has exactly one k-th pair, so that a pair is in all of them if it is the only possible k-th one.

    Args:
        fits: whether item i of the first sequence fits item j of the second.

    Returns: the pairs {i: j} in every longest one, and the other items i that some longest one pairs.
    """
    rows, columns = len(fits), len(fits[0]) if fits else 0
    before = [[0] * (columns + 1) for _ in range(rows + 1)]  # longest among the first i and j items
    behind = [[0] * (columns + 1) for _ in range(rows + 1)]  # longest from items i and j on
    for i in range(rows):
        for j in range(columns):
            before[i + 1][j + 1] = max(before[i][j + 1], before[i + 1][j], before[i][j] + fits[i][j])
    for i in reversed(range(rows)):
        for j in reversed(range(columns)):
            behind[i][j] = max(behind[i + 1][j], behind[i][j + 1], behind[i + 1][j + 1] + fits[i][j])
    possible = defaultdict(list)  # k -> the pairs that are the k-th of a longest one
    for i in range(rows):
        for j in range(columns):
            if fits[i][j] and before[i][j] + 1 + behind[i + 1][j + 1] == before[rows][columns]:
                possible[before[i][j]].append((i, j))
    certain = dict(pairs[0] for pairs in possible.values() if len(pairs) == 1)
    return certain, {i for pairs in possible.values() for i, _ in pairs} - certain.keys()
