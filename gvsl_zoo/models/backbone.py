"""What every backbone shares: feature levels, any input size, freezing, learning-rate groups, checkpointing."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import ArgumentError
from ..loaded import Loaded

if TYPE_CHECKING:
    from typing_extensions import Self


class Features(NamedTuple):
    """What a backbone sees: the bottleneck (global, f_g) and the full-resolution map (local, f_l)."""

    bottleneck: Tensor
    local: Tensor


@dataclass(frozen=True)
class FeatureLevel:
    """One feature map: its module, channels, and how many input voxels one of its voxels spans an axis.

    beside: further modules that it is the first to need, which may lie inside another level's.
    """

    module: str
    channels: int
    reduction: int
    beside: tuple[str, ...] = ()


class FeatureInfo(tuple[FeatureLevel, ...]):
    """The feature maps that a model returns, in the order in which it returns them."""

    def channels(self) -> list[int]:
        return [level.channels for level in self]

    def reduction(self) -> list[int]:
        return [level.reduction for level in self]

    def module_name(self) -> list[str]:
        return [level.module for level in self]


CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the axes of a tensor


def _pointwise(layer: nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor | None:
    """On CUDA, a convolution with a kernel of 1 as the product of matrices that it is; None for any other.

    In bf16 a kernel of cuDNN took more than half of a step: it looks like the gradient of such a weight.
    """
    if not x.is_cuda or set(layer.kernel_size + layer.stride) != {1} or any(layer.padding) or layer.groups > 1:
        return None
    return F.linear(x.movedim(1, -1), layer.weight.flatten(1), layer.bias).movedim(-1, 1)


class Conv2d(nn.Conv2d):
    """A convolution whose values come from `initialise` or from a file, never from its constructor."""

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        product = _pointwise(self, x)
        return super().forward(x) if product is None else product


class Conv3d(nn.Conv3d):
    """A convolution whose values come from `initialise` or from a file, never from its constructor."""

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        product = _pointwise(self, x)
        if product is not None:
            return product
        # PyTorch 2.13 on the CPU: the weight gradient in bf16 is uninitialised memory where the depth is 2
        half = self.weight.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
        if half and x.device.type == "cpu" and x.shape[2] == 2:
            with torch.autocast("cpu", enabled=False):
                bias = None if self.bias is None else self.bias.float()
                return self._conv_forward(x.float(), self.weight.float(), bias).to(self.weight.dtype)
        return super().forward(x)


class Linear(nn.Linear):
    """A linear layer whose values come from `initialise` or from a file, never from its constructor."""

    def reset_parameters(self) -> None:
        pass


class ConvTranspose2d(nn.ConvTranspose2d):
    """A transposed convolution whose values come from `initialise` or from a file, never from its constructor."""

    def reset_parameters(self) -> None:
        pass


class ConvTranspose3d(nn.ConvTranspose3d):
    """A transposed convolution whose values come from `initialise` or from a file, never from its constructor."""

    def reset_parameters(self) -> None:
        pass


CONV: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: Conv2d, 3: Conv3d}
CONV_TRANSPOSE: dict[int, type[nn.ConvTranspose2d] | type[nn.ConvTranspose3d]] = {
    2: ConvTranspose2d,
    3: ConvTranspose3d,
}


def initialise(module: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draw the weights of all convolutions (Kaiming normal) and linear layers (PyTorch's default), and of transposed
    convolutions whose stride is their kernel: normal, with variance 1 / fan-in because no ReLU follows, and alike over
    the kernel, so that they begin by repeating voxels and leave no pattern (Aitken et al. 2017).

    Draws come from `generator`, or from PyTorch's global one. Tensors on the meta device stay as they are.
    Source: released code of He et al. 2023.
    """
    for layer in module.modules():
        kinds = Conv2d | Conv3d | ConvTranspose2d | ConvTranspose3d | Linear
        if not isinstance(layer, kinds) or layer.weight.is_meta:
            continue
        fan_in = layer.weight[0].numel()
        if isinstance(layer, ConvTranspose2d | ConvTranspose3d):
            fan_in = layer.in_channels
            nn.init.normal_(layer.weight, std=1 / math.sqrt(fan_in), generator=generator)
            kernels = layer.weight.detach().flatten(2)
            kernels.copy_(kernels[..., :1].clone())
        elif isinstance(layer, Linear):
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
        else:
            nn.init.kaiming_normal_(layer.weight, generator=generator)
        if layer.bias is not None:
            bound = 1 / math.sqrt(fan_in)
            nn.init.uniform_(layer.bias, -bound, bound, generator=generator)


def is_released(convention: str) -> bool:
    """Whether a module is to have the released code's faults ("released") or not ("correct"); else ArgumentError."""
    if convention not in ("correct", "released"):
        raise ArgumentError(f"unknown convention {convention!r}", 'use "correct" or "released"')
    return convention == "released"


def pad_to_multiple(x: Tensor, multiple: int, *, centred: bool = True) -> tuple[Tensor, list[int]]:
    """Zero-pad the spatial axes symmetrically, the smaller half first, or at the far end; also return the offsets in
    front.
    """
    missing = [(multiple - size % multiple) % multiple for size in x.shape[2:]]
    if not (torch.compiler.is_exporting() or any(missing)):  # an exported graph takes every size
        return x, [0] * len(missing)
    front = [m // 2 if centred else 0 for m in missing]
    sides = [s for m, f in zip(reversed(missing), reversed(front), strict=True) for s in (f, m - f)]
    return F.pad(x, sides), front


def crop(x: Tensor, start: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The box of `shape` at `start` of the spatial axes."""
    if torch.compiler.is_exporting():  # comparing sizes would fix them
        ends = [first + size - given for first, size, given in zip(start, shape, x.shape[2:], strict=True)]
        return F.pad(x, [s for first, end in zip(reversed(start), reversed(ends), strict=True) for s in (-first, end)])
    for axis, (first, size) in enumerate(zip(start, shape, strict=True), start=2):
        if x.shape[axis] != size:
            x = x.narrow(axis, first, size)
    return x


class Backbone(Loaded, nn.Module):
    """Base of the backbones. A subclass gives `levels`, `stride` and `_maps`.

    levels: every feature map it can return, in the order of computation; the encoder's come first.
    stride: input voxels that one of the bottleneck spans an axis.
    multiple: what the input is padded to a multiple of, on both sides if `centred`, else at the far end.
    input_weight: name of the tensor whose second axis is the input channels.
    """

    ndim: int
    in_chans: int
    levels: FeatureInfo
    encoder_levels: int
    stride: int
    multiple: int
    centred = True
    input_weight: str

    def __init__(self) -> None:
        super().__init__()
        self._frozen = False
        self._checkpointing = False

    # -- what comes out ------------------------------------------------------------------------------------
    @property
    def feature_info(self) -> FeatureInfo:
        """The encoder's feature maps, finest first."""
        return FeatureInfo(self.levels[: self.encoder_levels])

    @property
    def has_decoder(self) -> bool:
        return len(self.levels) > self.encoder_levels

    @property
    def num_features(self) -> int:
        """Channels of the dense local features that `forward` returns."""
        return self.levels[-1].channels

    def _maps(self, x: Tensor, last: int) -> list[Tensor]:
        """Feature maps 0..last of a padded input."""
        raise TypeError(f"{type(self).__name__} does not say how its feature maps are computed")

    def _padded(self, x: Tensor) -> tuple[Tensor, list[int]]:
        if 0 in x.shape:
            raise ArgumentError(
                f"an empty input of shape {tuple(x.shape)}", "give one image or more, of a voxel or more"
            )
        if x.ndim != self.ndim + 2 or x.shape[1] != self.in_chans:
            axes = "B, C, D, H, W" if self.ndim == 3 else "B, C, H, W"
            raise ArgumentError(
                f"input has shape {tuple(x.shape)}, but this model takes ({axes}) with C = {self.in_chans}",
                "add the batch and channel axes, or load the model with in_chans=",
            )
        return pad_to_multiple(x, self.multiple, centred=self.centred)

    def forward_features(self, x: Tensor) -> Features:
        """Bottleneck (B, C, *ceil(spatial / stride)) and local features (B, C, *spatial) of x (B, C, *spatial)."""
        return self._features(x)

    def _features(self, x: Tensor, **settings: Any) -> Features:
        if not self.has_decoder:
            raise ArgumentError("this backbone was built without its decoder", "use forward_intermediates")
        padded, front = self._padded(x)
        maps = self._maps(padded, len(self.levels) - 1, **settings)
        return Features(maps[self.encoder_levels - 1], crop(maps[-1], front, x.shape[2:]))

    def forward_pair(self, first: Tensor, second: Tensor) -> tuple[Features, Features]:
        """Features of two images (B, C, *spatial) that see each other, where the architecture lets them."""
        raise ArgumentError(f"a {type(self).__name__} sees one image at a time", "take an XMorpher, or pair_mode self")

    def forward(self, x: Tensor) -> Tensor:
        """Dense local features (B, C, *spatial) of x (B, in_chans, *spatial), any spatial size."""
        return self.forward_features(x).local

    def forward_intermediates(self, x: Tensor, indices: Sequence[int] | None = None) -> list[Tensor]:
        """Feature maps at `indices` of `levels` (default: the encoder's), each (B, C, *ceil(spatial / reduction)).

        Nothing behind the last map asked for is computed. Voxel i of a map stands for voxels i * reduction onwards of
        the image, to half a voxel of the map: the padding in front may be no whole number of those.
        """
        wanted = level_indices(self.levels, self.encoder_levels, indices)
        padded, front = self._padded(x)
        maps = self._maps(padded, max(wanted))
        out = []
        for i in wanted:
            step = self.levels[i].reduction
            shape = [(s + step - 1) // step for s in x.shape[2:]]  # in an ONNX file -(-s // step) would round down
            out.append(crop(maps[i], [(2 * f + step) // (2 * step) for f in front], shape))
        return out

    # -- how it is trained ---------------------------------------------------------------------------------
    def freeze(self) -> Self:
        """Stop gradients to every parameter and keep evaluation mode, also through a later `train()`."""
        self._frozen = True
        return self.requires_grad_(False).eval()

    def unfreeze(self) -> Self:
        """Undo `freeze`; what is in evaluation mode stays in it until the next `train()`."""
        self._frozen = False
        return self.requires_grad_(True)

    def train(self, mode: bool = True) -> Self:
        return super().train(mode and not self._frozen)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' inputs for the backward pass and compute the rest again: memory for time."""
        self._checkpointing = enable

    def _run(self, block: Callable[..., Tensor], *inputs: Any) -> Tensor:
        if self._checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def level_parameters(self, level: FeatureLevel) -> list[nn.Parameter]:
        """The parameters that a level is the first to need."""

        def held(*modules: str) -> list[nn.Parameter]:
            return [p for name in modules for p in self.get_submodule(name).parameters()]

        others = {p for other in self.levels if other is not level for p in held(*other.beside)}
        return [p for p in held(*level.beside, level.module) if p not in others]

    def parameter_groups(self, lr: float, layer_decay: float = 1.0, last: int | None = None) -> list[dict]:
        """Optimiser groups, one a level: the last level learns at `lr`, each one before at `layer_decay` of it.

        Args:
            last: index into `levels` of the last one that is used; those behind get no gradient and are left out.
        """
        groups = []
        for depth, level in enumerate(reversed(self.levels[: None if last is None else last + 1])):
            parameters = [p for p in self.level_parameters(level) if p.requires_grad]
            if parameters:
                groups.append({"params": parameters, "lr": lr * layer_decay**depth, "name": level.module})
        return groups[::-1]


def level_indices(levels: FeatureInfo, encoder_levels: int, indices: Sequence[int] | None) -> list[int]:
    """Indices into `levels` (default: the encoder's), negative ones counted from the end of the encoder."""
    if indices is None:
        return list(range(encoder_levels))
    given = whole_numbers(indices)
    wanted = [i + encoder_levels if i < 0 else i for i in given]
    if not wanted or min(wanted) < 0 or max(wanted) >= len(levels):
        raise ArgumentError(
            f"feature levels {given} asked for, but this model has {len(levels)}: "
            + ", ".join(f"{i} {level.module}" for i, level in enumerate(levels)),
            "choose among those",
        )
    return wanted


def whole_numbers(indices: Sequence[int]) -> tuple[int, ...]:
    """Indices of any integer type as plain numbers; ArgumentError for anything else."""
    try:
        return tuple(map(operator.index, indices))
    except TypeError:
        raise ArgumentError(f"feature levels {indices!r}", "give a sequence of whole numbers, such as (0, 2)") from None


def whole_number(name: str, value: int) -> int:
    """A number of any integer type as a plain one; ArgumentError for anything else."""
    try:
        return operator.index(value)
    except TypeError:
        raise ArgumentError(f"{name}={value!r}", "give a whole number") from None


class OnBackbone(Loaded, nn.Module):
    """Base of the models around a backbone: what they say of training is said to it."""

    backbone: Backbone

    def freeze(self) -> Self:
        """Freeze the backbone, also through a later `train()`; heads still learn."""
        self.backbone.freeze()
        return self

    def unfreeze(self) -> Self:
        """Undo `freeze`."""
        self.backbone.unfreeze()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """The backbone's."""
        self.backbone.set_grad_checkpointing(enable)

    def _last_level(self) -> int:
        """Index of the backbone's last level that the heads see."""
        return len(self.backbone.levels) - 1

    def parameter_groups(self, lr: float, layer_decay: float = 1.0) -> list[dict]:
        """The backbone's groups with rates falling towards its input, and the heads at `lr`."""
        backbone = set(self.backbone.parameters())
        head = {"params": [p for p in self.parameters() if p not in backbone], "lr": lr, "name": "head"}
        return [*self.backbone.parameter_groups(lr * layer_decay, layer_decay, self._last_level()), head]


class FeatureList(OnBackbone):
    """A backbone whose forward pass returns a list of feature maps: what decoders of other libraries take.

    Levels of the backbone behind the last one asked for take no part and get no gradient, but keep `requires_grad`,
    because the backbone may serve elsewhere too: DistributedDataParallel wants `find_unused_parameters=True` for them.

    Args:
        backbone: its parameters are shared, not copied.
        out_indices: which levels; default the encoder's, finest first.
    """

    def __init__(self, backbone: Backbone, out_indices: Sequence[int] | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.out_indices = level_indices(backbone.levels, backbone.encoder_levels, out_indices)

    @property
    def feature_info(self) -> FeatureInfo:
        return FeatureInfo(self.backbone.levels[i] for i in self.out_indices)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Feature maps of x (B, C, *spatial), each (B, C_i, *ceil(spatial / reduction_i))."""
        return self.backbone.forward_intermediates(x, self.out_indices)

    def parameter_groups(self, lr: float, layer_decay: float = 1.0) -> list[dict]:
        """The backbone's groups up to the last level asked for, which learns at `lr`."""
        return self.backbone.parameter_groups(lr, layer_decay, max(self.out_indices))
