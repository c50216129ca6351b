"""Checkpoints of the released code -> safetensors that `load` opens: which model a file holds, and its description."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from .cache import sha256_of
from .checkpoint import DOWNLOAD_AGAIN, Claim, outline, read_archive, read_tensors
from .errors import SourceError, WeightsError, listed, short
from .models.gemini import GEMINI
from .models.gvsl import GVSL
from .models.unet import UNet
from .registry import OBJECTIVE_HEADS, Head, Input, Intensity, Licence, ModelEntry, model_info
from .weights import METADATA_KEY, SAVE_AGAIN, check_content, open_weights, write_weights

MAX_WIDTH = 1024  # of a U-Net; 32 is the released one
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network")  # keys that say which of several is the model
PREFIXES = (  # of DistributedDataParallel, torch.compile, FSDP and its checkpointing
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
)
LEVELS = "inc|down[1-4]|up[1-4]"  # of a U-Net
ROOTS = f"unet|swin|{LEVELS}"  # names of ours, which are no prefix even where all tensors of a file share one
COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel
HEAD_OF: dict[str, Head] = {  # part of the whole module -> head, as released
    **dict.fromkeys(("f_conv", "fc_rot", "fc_scl", "fc_trans", "fc_shear"), "affine"),
    **dict.fromkeys(("sp_conv", "out_flow"), "deformable"),
    "deformer": "deformer",
    "res_conv": "restoration",
}
OTHER_MODEL = "only the U-Net of GVSL and GEMINI with its heads and the released XMorpher network are converted"
MATCHING = {"affine", "deformable"}  # heads whose numbers say another geometry in the released code
UNKNOWN = (
    "Research only, not a medical device. The file does not say its modality (the one given here is a guess), the "
    "intensities and the spacing that it expects, the data that it was trained on, or its licence."
)


@dataclass(frozen=True)
class ConversionReport:
    """What was converted.

    width: of the U-Net; None for XMorpher. layout: the key of the state dict, and the prefixes taken from its names.
    left_out: what the file holds beside the model, such as an optimiser's state.
    """

    source: str
    source_sha256: str
    destination: str
    sha256: str
    architecture: str
    ndim: int
    width: int | None
    objective: str
    heads: tuple[str, ...]
    tensors: int
    parameters: int
    layout: tuple[str, ...]
    left_out: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        data: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return data

    def __str__(self) -> str:
        width = f" of width {self.width}" if self.width else ""
        heads = f"heads {', '.join(self.heads)}" if self.heads else "no heads"
        text = (
            f"{self.source} -> {self.destination}: {self.ndim}D {self.architecture}{width}, objective {self.objective}"
            f", {heads}, {self.tensors} tensors, {self.parameters:,} parameters, sha256 {self.sha256}"
        )
        if self.layout:
            text += f"; layout: {', '.join(self.layout)}"
        return text + (f"; left out: {listed(self.left_out)}" if self.left_out else "")


def convert(
    src: str | os.PathLike[str], dst: str | os.PathLike[str], *, name: str | None = None, overwrite: bool = False
) -> ConversionReport:
    """Convert a PyTorch checkpoint to a safetensors file that carries its entry, as `load(dst)` needs it.

    Accepted are state dicts, alone or in a dict: under one of WRAPPERS, or under the only key that holds tensors.
    PREFIXES, and any prefix that all names share, are taken from the names. They may hold the U-Net of any width (with
    or without `unet.`), alone or with whole heads of GVSL or GEMINI, or the released XMorpher network.

    Args:
        src: the .pth file.
        dst: the .safetensors file, written whole or not at all.
        name: a model of the registry, which the file must be; its description is written into the file.
        overwrite: replace an existing `dst`.

    Raises: WeightsError for a file that is damaged, holds code or is another model, RegistryError for an unknown name,
        SourceError where `dst` cannot be written.
    """
    source, target = Path(src).expanduser(), Path(dst).expanduser()
    entry = None if name is None else model_info(name)
    with _explained(source):
        _check_target(source, target, overwrite)
        wrapper, state, left_out = _find_state(outline(*read_archive(source)))
        if COUNTER in state:
            del state[COUNTER]
            left_out.append(COUNTER)
        names, shared = _canonical(state)
        claims = {ours: state[theirs] for ours, theirs in names.items()}
        content = _recognise(claims)
        entry = checked_entry(entry, content) if entry else _generic_entry(source, content)
        tensors = read_tensors(source, wrapper, names, claims)
        source_sha256 = sha256_of(source)
    if MATCHING & set(content.heads):
        doubt = f"{source.name}: matching heads that the released code trained answer in its own axes and units"
        warnings.warn(f"{doubt}, which register() does not know; those of this package are fine", stacklevel=2)
    layout = ([short(wrapper)] if wrapper else []) + [f"{prefix}." for prefix in PREFIXES if _has_part(state, prefix)]
    layout += [f"{short(part)}." for part in shared]
    if content.architecture == "unet" and not content.heads:
        layout += ["unet."] * _has_part(state, "unet")
        tensors = {ours.removeprefix("unet."): tensor for ours, tensor in tensors.items()}
    entry = replace(entry, heads=content.heads, parameters=sum(tensor.numel() for tensor in tensors.values()))
    try:
        write_weights(tensors, target, {"format": "pt", METADATA_KEY: json.dumps(entry.to_dict())})
    except (OSError, ValueError) as error:  # the latter: a NUL in the path
        cause = f"{target} cannot be written: {getattr(error, 'strerror', None) or error}"
        raise SourceError(cause, "free space, or choose another folder") from None
    return ConversionReport(
        source=str(source),
        source_sha256=source_sha256,
        destination=str(target),
        sha256=check_content(open_weights(target)),
        architecture=content.architecture,
        ndim=content.ndim,
        width=content.config.get("width"),
        objective=entry.objective,
        heads=content.heads,
        tensors=len(tensors),
        parameters=entry.parameters,
        layout=tuple(layout),
        left_out=tuple(left_out),
    )


@contextmanager
def _explained(source: Path) -> Iterator[None]:
    """Say of which file an error speaks, and that a parser's failure is the file's."""
    try:
        yield
    except WeightsError as error:
        raise WeightsError(f"{source} {error.cause}", error.remedy) from None
    except OSError as error:
        cause = f"{error.filename or source} cannot be read: {error.strerror or error}"
        raise WeightsError(cause, "check the path and its permissions") from None
    except Exception as error:
        cause = f"{source} cannot be read: {type(error).__name__}: {str(error)[:200]}"
        raise WeightsError(cause, DOWNLOAD_AGAIN) from None


def _check_target(source: Path, target: Path, overwrite: bool) -> None:
    for wrong, why in (
        (target.suffix != ".safetensors", "a name that does not end in .safetensors"),
        (not target.parent.is_dir(), "in a folder that does not exist"),
        (target.is_dir(), "which is a folder"),
        (target.exists() and source.exists() and target.samefile(source), "the same file"),
        (os.path.lexists(target) and not overwrite, "which exists already (overwrite=True replaces it)"),
    ):
        if wrong:
            raise WeightsError(f"cannot become {target}, {why}", "choose another name for the new file")


def _has_part(names: Iterable[str], part: str) -> bool:
    return any(part in name.split(".") for name in names)


# --- Which model it is -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Content:
    """objective: None where the U-Net alone does not tell it. config: construction arguments."""

    architecture: Literal["unet", "xmorpher"]
    ndim: Literal[2, 3]
    objective: str | None
    config: dict[str, Any]
    heads: tuple[Head, ...] = ()


def _find_state(top: Any) -> tuple[str | None, dict[str, Claim], list[str]]:
    """The key that the state dict lies under, its tensors by their names, and the names of what else there is."""

    def tensors(of: Any) -> dict[str, Claim]:
        items = of.items() if isinstance(of, dict) else ()
        return {key: value for key, value in items if isinstance(key, str) and isinstance(value, Claim)}

    wrapped = [key for key in top if isinstance(key, str) and tensors(top[key])] if isinstance(top, dict) else []
    wrappers = [key for key in WRAPPERS if key in wrapped] or ([] if tensors(top) else wrapped)
    if len(wrappers) > 1:
        several = listed([*map(short, wrappers)])
        raise WeightsError(f"holds several state dicts: {several}", "save the one that is meant")
    wrapper = wrappers[0] if wrappers else None
    inner = top[wrapper] if wrapper else top
    state = tensors(inner)
    if not state:
        raise WeightsError("holds no state dict, neither on its own nor under a key", SAVE_AGAIN)
    beside = [key for key in top if key != wrapper] if wrapper else []
    return wrapper, state, [short(key) for key in (*beside, *(key for key in inner if key not in state))]


def _canonical(state: Mapping[str, Claim]) -> tuple[dict[str, str], list[str]]:
    """The released names of the whole module -> the names in the file, and the prefixes that all of these share."""
    parts = {theirs: [part for part in theirs.split(".") if part not in PREFIXES] for theirs in state}
    shared: list[str] = []
    for first, *others in zip(*(kept[:-1] for kept in parts.values()), strict=False):
        if re.fullmatch(ROOTS, first) or {first} != {first, *others}:
            break
        shared.append(first)
    names: dict[str, str] = {}
    for theirs, kept in parts.items():
        ours = ".".join(kept[len(shared) :])
        if re.match(rf"({LEVELS})\.", ours):
            ours = f"unet.{ours}"
        if ours in names:
            raise WeightsError(f"holds {short(ours)} twice", "save one model without prefixes")
        names[ours] = theirs
    return names, shared


def _recognise(claims: Mapping[str, Claim]) -> _Content:
    """The model whose tensors these are, all of them.

    Raises: WeightsError listing what is missing, left over, misshapen or of another dtype.
    """
    shapes = {name: claim.shape for name, claim in claims.items()}
    if "swin.patch_embed.proj.weight" in shapes:
        content, expected = _Content("xmorpher", 3, "registration", {"ndim": 3, "window": 2}), xmorpher_shapes()
    else:
        content, expected = _recognise_unet(shapes)
    wrong = [f"{name} is missing" for name in expected.keys() - shapes.keys()]
    wrong += [f"{short(name)} has no place" for name in shapes.keys() - expected.keys()]
    for name in expected.keys() & shapes.keys():
        if shapes[name] != expected[name]:
            wrong.append(f"{name} is {shapes[name]}, not {expected[name]}")
        elif not claims[name].dtype.is_floating_point:
            wrong.append(f"{name} is {claims[name].dtype}, not a floating-point tensor")
    if wrong:
        raise WeightsError(f"is not a whole {content.architecture}: {listed(sorted(wrong))}", OTHER_MODEL)
    return content


def _recognise_unet(shapes: Mapping[str, tuple[int, ...]]) -> tuple[_Content, dict[str, tuple[int, ...]]]:
    first = shapes.get(f"unet.{UNet.input_weight}", ())
    ndim: Literal[2, 3] = 2 if len(first) == 4 else 3
    if len(first) not in (4, 5) or 0 in first or first[0] > MAX_WIDTH or first[0] % 8:
        raise WeightsError(f"holds no U-Net: {UNet.input_weight} is {first or 'missing'}", OTHER_MODEL)
    width, in_chans = first[:2]
    [affine_width, *_] = shapes.get("f_conv.double_conv.0.weight") or (0,)
    module = GVSL(
        UNet(ndim, width, in_chans, device="meta"),
        affine_width=None if affine_width % 8 else affine_width,
        device="meta",
    )
    found = {HEAD_OF[part] for name in shapes if (part := name.split(".")[0]) in HEAD_OF}
    known = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()} | deformer_shapes(ndim, width)
    expected = {name: shape for name, shape in known.items() if HEAD_OF.get(name.split(".")[0]) in {None, *found}}
    objective = "gemini" if "deformer" in found else "gvsl" if found & {"affine", "deformable"} else None
    config = {"ndim": ndim, "width": width}
    if in_chans != 1:
        config["in_chans"] = in_chans
    if "affine" in found and affine_width != 8 * width:  # half the bottleneck's, the default
        config["affine_width"] = affine_width
    heads = tuple(head for head in dict.fromkeys(HEAD_OF.values()) if head in found)
    return _Content("unet", ndim, objective, config, heads), expected


def deformer_shapes(ndim: int, width: int) -> dict[str, tuple[int, ...]]:
    """Tensors of GEMINI's deformer beside a U-Net of `width`."""
    module = GEMINI(UNet(ndim, width, device="meta"), device="meta")
    return {f"deformer.{name}": tuple(tensor.shape) for name, tensor in module.deformer.state_dict().items()}


def xmorpher_shapes() -> dict[str, tuple[int, ...]]:
    """Tensors of the released 3D registration network, 378 (Shi et al. 2022, released code)."""
    widths = (48, 96, 192, 384)
    weights: dict[str, tuple[int, ...]] = {
        "swin.patch_embed.proj": (48, 1, 4, 4, 4),
        "swin.norm": (384,),
        "swin.norm2": (96,),
        "swin.reverse_patch_embedding": (96, 24, 4, 4, 4),
        "out_conv": (3, 24, 3, 3, 3),
    }
    for stages, depths, channels in (("layers", (2, 2, 6, 2), widths), ("up_layers", (2, 6, 2, 2), widths[::-1])):
        for i, (depth, c) in enumerate(zip(depths, channels, strict=True)):
            stage = f"swin.{stages}.{i}"
            for j in range(depth):
                block = {"norm1": (c,), "norm2": (c,), "mlp.fc1": (4 * c, c), "mlp.fc2": (c, 4 * c)}
                block |= {"cross_attn.q": (c, c), "cross_attn.kv": (2 * c, c), "cross_attn.proj": (c, c)}
                weights |= {f"{stage}.blocks.{j}.{name}": shape for name, shape in block.items()}
            down, to = f"{stage}.downsample", 2 * c if stages == "layers" else c // 2
            if i < 3 and stages == "layers":
                weights |= {f"{down}.down_conv": (to, c, 2, 2, 2), f"{down}.norm": (to,)}
            elif i < 3:
                weights |= {f"{down}.up_conv": (c, to, 2, 2, 2), f"{down}.norm": (to,)}
            if stages == "up_layers":
                weights[f"swin.concat_back_dim.{i}"] = (c, 2 * c)
    return dict(_with_biases(weights))


def _with_biases(weights: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, shape in weights.items():
        transposed = name.endswith(("up_conv", "reverse_patch_embedding"))
        yield f"{name}.weight", shape
        yield f"{name}.bias", (shape[1 if transposed else 0],)


# --- Its description -------------------------------------------------------------------------------------------------


def checked_entry(entry: ModelEntry, content: _Content | ModelEntry) -> ModelEntry:
    """The registry's entry with what was found in a file; WeightsError, without its name, for one of another model."""
    if entry.status == "planned":
        raise WeightsError(f"cannot be {entry.name}, of which no weights exist", "convert it without a name")
    told = (entry.architecture, entry.ndim, entry.config.get("width", 32) if entry.architecture == "unet" else None)
    found = (content.architecture, content.ndim, content.config.get("width"))
    for what, ours, theirs in zip(("architecture", "ndim", "width"), told, found, strict=True):
        if ours != theirs:
            raise WeightsError(f"has {what} {theirs}, {entry.name} has {ours}", "convert it without a name")
    known_heads = OBJECTIVE_HEADS.get(entry.objective, set())
    if content.objective not in (None, entry.objective) or not set(content.heads) <= known_heads:
        theirs = f"objective {content.objective} and heads {', '.join(content.heads) or 'none'}"
        raise WeightsError(f"has {theirs}, {entry.name} has objective {entry.objective}", "convert it without a name")
    kept = {key: value for key, value in entry.config.items() if key not in ("in_chans", "affine_width")}
    return replace(entry, config=kept | content.config)


def _generic_entry(source: Path, content: _Content) -> ModelEntry:
    """An entry for a file of which nothing else is known."""
    words = "-".join(re.findall("[a-z0-9]+", source.stem.lower()))
    if len(words) < 6:  # a short one could be a device's name on Windows, such as con
        words = f"{content.architecture}-{words}".rstrip("-")
    return ModelEntry(
        name=words,
        summary=f"Converted from {''.join(filter(str.isprintable, source.name))}",
        status="available",
        architecture=content.architecture,
        config=content.config,
        ndim=content.ndim,
        modality="CT" if content.ndim == 3 else "X-ray",
        objective=content.objective or "gvsl",
        parameters=0,
        input=Input("zyx" if content.ndim == 3 else "yx", Intensity("arbitrary", (None, None), (0.0, 1.0))),
        licence=Licence("not stated", "not stated", "not stated"),
        citation="not stated",
        limits=UNKNOWN,
    )
