"""load(): a name -> its entry -> bytes -> a state dict -> a module, and back to a folder with save_pretrained()."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from . import __version__, cache, hub, sources
from .card import HERE, LIBRARY, PICTURES, card_files
from .errors import ArgumentError, RegistryError, SourceError, WeightsError, listed
from .film import FilmPreprocessing, flattened, prepare_scan
from .models.backbone import Backbone, FeatureList, whole_numbers
from .models.gemini import GEMINI, WholeModule
from .models.gvsl import GVSL
from .models.heads import ClassificationModel, HeadedModel, SegmentationModel
from .models.unet import UNet
from .models.xmorpher import XMorpher
from .registry import TASKS, Input, Ledger, Licence, ModelEntry, model_info
from .sources import Access
from .volume import Preprocessing, Volume
from .weights import (
    DTYPES,
    METADATA_KEY,
    WEIGHTS_NAME,
    WeightsFile,
    assign,
    check_content,
    open_weights,
    write_weights,
    write_whole,
)

BACKBONES: dict[str, type[UNet] | type[XMorpher]] = {"unet": UNet, "xmorpher": XMorpher}
HEADED: dict[str, type[HeadedModel]] = {"segmentation": SegmentationModel, "classification": ClassificationModel}
WHOLE_MODULE = "unet."  # prefix of the backbone's tensors in a file that holds the pre-training heads too
WHOLE_OBJECTIVES = ("gvsl", "gemini")  # whose heads this version has
BESIDE_HEAD = "backbone."  # the same in a file that holds a trained head
PARAMETER_DTYPES = [dtype for dtype in DTYPES.values() if dtype.is_floating_point]
LONGEST_ENTRY = 100_000  # characters, without the scans of its ledger
NEWER = "upgrade gvsl-zoo if a newer version wrote the file"


@dataclass(frozen=True)
class LoadReport:
    """What happened when a model was loaded.

    origin: the file, or "random initialisation". sha256: of the file. loaded: tensors taken from it.
    unused: tensors of the file that the task does not need. fresh: parameters drawn at random (a new head).
    stored_dtype: of the file's tensors; the module has float32 unless `dtype` was given.
    """

    origin: str
    sha256: str | None
    loaded: int
    unused: tuple[str, ...]
    fresh: tuple[str, ...]
    stored_dtype: str | None

    def __str__(self) -> str:
        text = f"{self.loaded} tensors from {self.origin}"
        if self.unused:
            text += f", {len(self.unused)} of the file not needed"
        if self.fresh:
            text += f", drawn at random: {listed(self.fresh)}"
        return text


@overload
def load(name: str | os.PathLike[str], *, features_only: Literal[True], **settings: Any) -> FeatureList: ...
@overload
def load(name: str | os.PathLike[str], *, task: Literal["segmentation"], **settings: Any) -> SegmentationModel: ...
@overload
def load(name: str | os.PathLike[str], *, task: Literal["classification"], **settings: Any) -> ClassificationModel: ...
@overload
def load(
    name: str | os.PathLike[str], *, task: Literal["registration", "pretraining"], **settings: Any
) -> GVSL | GEMINI: ...
@overload
def load(name: str | os.PathLike[str], *, task: Literal["backbone"] = ..., **settings: Any) -> Backbone: ...
@overload
def load(name: str | os.PathLike[str], *, task: str, **settings: Any) -> Any: ...
def load(  # type: ignore[misc]  # the settings of the overloads are these
    name: str | os.PathLike[str],
    *,
    task: str = "backbone",
    num_classes: int | None = None,
    in_chans: int | None = None,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    pretrained: bool = True,
    frozen: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> nn.Module:
    """Load a model, in evaluation mode.

    Args:
        name: a name of the registry (see `list_models`); `hf-hub:org/repo` or `hf-hub:org/repo@revision`; or the path
            of a `.safetensors` file or of a folder with `model.safetensors`, as `save_pretrained` writes them. Float32
            weights stay in the file, mapped: while they are in use, replace it by another file, as `save_pretrained`
            does, and do not write into it.
        task: "backbone" (dense features), "segmentation" or "classification" (a fresh head for `num_classes`, or
            without it the trained one of the file, with the classes `entry.labels`), "registration" or "pretraining"
            (the whole module with all its heads).
        in_chans: image channels; other than 1, the first convolution is spread over them so that copies of one
            channel give the response of that channel.
        features_only: return a list of feature maps instead, finest first; `out_indices` selects levels.
        pretrained: False draws all weights at random: the scratch baseline.
        frozen: no gradient to the backbone, which stays in evaluation mode through `train()`.
        device: where the parameters lie: "cpu", "cuda", "cuda:1", "mps", or "auto" for the best there is.
        dtype: of the parameters; default float32. `preprocess` gives float32: cast what it gives. The functions on
            whole scans (`features`, `register`, ...) compute in float32, or as their `precision` says.
        revision: commit, branch or tag of an `hf-hub:` name; default main. The registry's names have their own.
        cache_dir: a Hub cache of one's own; default the Hub's (HF_HOME, HF_HUB_CACHE).
        local_files_only: no network; so does HF_HUB_OFFLINE=1. What is cached and hashed needs none anyway.
        token: for private or gated repositories; default the one that the Hub's client knows (HF_TOKEN, hf auth login).

    Returns: the module, with `entry`, `preprocessing`, `preprocess(path_or_volume)`, `load_report`, `cite()`.
    Raises: RegistryError for an unknown name, SourceError for bytes that cannot be had, WeightsError for bytes that
        do not fit (before any parameter is touched), ArgumentError for arguments that do not.
    """
    _check_arguments(task, features_only, out_indices)
    if dtype is not None:
        _check_dtype(dtype)
    device = resolve_device(device)
    entry, file, sha256 = _find(
        name, task, num_classes, pretrained, revision, Access(cache_dir, local_files_only, token)
    )
    features = (whole_numbers(out_indices) if out_indices is not None else ()) if features_only else None
    own = entry.config.get("in_chans", 1)
    chans = own if in_chans is None else in_chans
    if file is not None and own not in (1, chans):
        raise ArgumentError(
            f"in_chans={chans} of weights for {own} input channels",
            "leave in_chans out: only weights for one channel can be spread over others",
        )
    building = "meta" if pretrained else None
    model = build(entry, task, num_classes=num_classes, in_chans=chans, features=features, device=building)
    if file is None:
        report = LoadReport("random initialisation", None, 0, (), tuple(model.state_dict()), None)
    else:
        report = _fill(model, file, sha256, own, trained=task == entry.trained_head and num_classes is None)
    if num_classes is not None and entry.labels:  # the file's labels are not those of the new head
        entry = replace(entry, heads=(), labels=())
    if frozen:
        _backbone(model).freeze()
    model.eval()
    dtype = dtype or torch.float32
    if any(p.device != device or p.dtype != dtype for p in model.parameters()):  # also by PyTorch's global defaults
        model.to(device=device, dtype=dtype)
    return _dress(model, entry, report)


def resolve_device(device: torch.device | str) -> torch.device:
    """A device of this machine by its name; "auto" is CUDA, else MPS, else the CPU."""
    available = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    available += [torch.device("mps", 0)] * torch.backends.mps.is_available() + [torch.device("cpu")]
    if device == "auto":
        return available[0]
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError):
        raise ArgumentError(f"unknown device {device!r}", "use auto, cpu, cuda, cuda:N or mps") from None
    if wanted == torch.device("cpu", 0):  # accelerate's name for it in several processes
        wanted = torch.device("cpu")
    if not any(wanted.type == a.type and wanted.index in (None, a.index) for a in available):
        raise ArgumentError(f"this machine has no device {device}", f"it has {', '.join(map(str, available))}")
    return wanted


def _check_arguments(task: str, features_only: bool, out_indices: Sequence[int] | None) -> None:
    if task not in TASKS:
        raise ArgumentError(f"unknown task {task!r}", f"choose from {', '.join(TASKS)}")
    if features_only and task != "backbone":
        raise ArgumentError(f"features_only with task {task!r}", "feature lists come from the backbone alone")
    if out_indices is not None and not features_only:
        raise ArgumentError("out_indices without features_only", "add features_only=True")


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in PARAMETER_DTYPES:
        remedy = "parameters are floating-point numbers: give torch's float32, float16 or bfloat16"
        raise ArgumentError(f"dtype {dtype!r}", remedy)


def _check_task(entry: ModelEntry, task: str) -> None:
    if task not in entry.tasks:
        heads = ", ".join(entry.heads) or "no heads"
        raise ArgumentError(
            f"{entry.name} cannot serve task {task!r}: its weights hold {heads} beside the backbone",
            f"it serves {', '.join(entry.tasks)}",
        )


def _check_classes(entry: ModelEntry, task: str, num_classes: int | None) -> None:
    if (num_classes is not None) != (task in HEADED) and not (num_classes is None and task == entry.trained_head):
        raise ArgumentError(
            f"task {task!r} with num_classes={num_classes}", "segmentation and classification need it, others refuse it"
        )


def _find(
    name: str | os.PathLike[str],
    task: str,
    num_classes: int | None,
    pretrained: bool,
    revision: str | None,
    access: Access,
) -> tuple[ModelEntry, WeightsFile | None, str | None]:
    """The entry, which serves the task, its opened and checked file, and the file's sha256."""
    text = os.fspath(name)
    on_hub = isinstance(name, str) and text.startswith(hub.PREFIX)
    if revision is not None and not on_hub:
        raise ArgumentError(f"{text!r} with revision={revision!r}", f"revisions belong to {hub.PREFIX}org/repo names")
    if on_hub or not isinstance(name, str) or sources.is_path(text):
        if on_hub:
            file, sha256 = sources.from_hub_name(text, revision, access)
        else:
            file, sha256 = sources.open_path(Path(text))
        entry = entry_of(file)
        _check_classes(entry, task, num_classes)
        _check_task(entry, task)
        return (entry, file, sha256) if pretrained else (entry, None, None)
    entry = model_info(text)
    _check_classes(entry, task, num_classes)
    if not pretrained or entry.status != "upstream":
        _check_task(entry, task)
    if not pretrained:
        return entry, None, None
    file, sha256 = sources.locate(entry, access)
    if entry.status == "upstream":  # which heads the authors' file holds is known once it has been read
        own = entry_of(file)
        entry = replace(entry, heads=own.heads, parameters=own.parameters, config=own.config)
        _check_task(entry, task)
    return entry, file, sha256


def entry_of(file: WeightsFile) -> ModelEntry:
    """The entry that a file carries; WeightsError for one without."""
    text = file.metadata.get(METADATA_KEY)
    if text is None:
        raise WeightsError(
            f"{file.path} does not say which model it belongs to",
            "save it with gvsl_zoo.save_pretrained, or list it in a registry of your own (register_registry)",
        )
    entry = _parse_entry(text, file.path)
    return replace(entry, config=dict(entry.config))


@lru_cache(maxsize=32)
def _parse_entry(text: str, path: Path) -> ModelEntry:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise WeightsError(f"{path} has an unreadable entry", "save it again with gvsl_zoo.save_pretrained") from None
    ledger = data.get("ledger") if isinstance(data, dict) else None
    scans = ledger.get("scans") if isinstance(ledger, dict) else None
    if len(text) - len(json.dumps(scans)) > LONGEST_ENTRY:
        raise WeightsError(f"{path} has an entry of {len(text)} characters", "save it again with save_pretrained")
    try:
        return ModelEntry.from_dict(data, path)
    except RegistryError as error:
        raise WeightsError(error.cause, "; ".join(filter(None, (error.remedy, NEWER)))) from None


def build(
    entry: ModelEntry,
    task: str = "backbone",
    *,
    num_classes: int | None = None,
    in_chans: int = 1,
    features: Sequence[int] | None = None,
    device: torch.device | str | None = None,
) -> nn.Module:
    """The module of an entry for a task, untrained; on the meta device without any values.

    num_classes: of a fresh head; without it a task that the entry has a trained head for gets that one's shape.
    features: levels of a feature list (empty: the encoder's), or None for a whole backbone.

    Raises: ArgumentError for what this version lacks, WeightsError for construction arguments that it does not know.
    """
    if entry.objective not in ("gvsl", "gemini", "restoration", "supervised"):
        raise ArgumentError(
            f"{entry.name} is a {entry.architecture} with the objective {entry.objective}, which this version lacks",
            "see gvsl_zoo.list_models(available=True)",
        )
    config = {key: value for key, value in entry.config.items() if key != "in_chans"}
    if task in ("registration", "pretraining") and entry.objective not in WHOLE_OBJECTIVES:
        raise ArgumentError(f"{entry.name}: this version lacks the heads of {entry.objective}", "load the backbone")
    affine_width = config.pop("affine_width", None)
    levels = () if task == "classification" and num_classes is not None else features
    architecture = BACKBONES[entry.architecture]
    decoder = levels is None or any(i >= architecture.encoder_levels for i in levels)
    try:
        backbone = architecture(**config, in_chans=in_chans, decoder=decoder, device=device)
        if features is not None:
            return FeatureList(backbone, features or None)
        if task in HEADED:
            classes = len(entry.labels) if num_classes is None else num_classes
            return HEADED[task](backbone, classes, device=device)
        if task in ("registration", "pretraining"):
            if entry.objective == "gemini":
                return GEMINI(backbone, device=device)
            return GVSL(backbone, affine_width=affine_width, device=device)
        return backbone
    except ArgumentError:
        raise
    except (TypeError, RuntimeError, ValueError) as error:
        cause = f"no {entry.architecture} can be made with the config {entry.config} of {entry.name}: {error}"
        raise WeightsError(cause, NEWER) from None


def _backbone(model: nn.Module) -> Backbone:
    backbone = model if isinstance(model, Backbone) else getattr(model, "unet", None) or model.backbone
    assert isinstance(backbone, Backbone)
    return backbone


def _fill(
    model: nn.Module, file: WeightsFile, sha256: str | None, own_chans: int, *, trained: bool = False
) -> LoadReport:
    """Put the file's tensors into a module on the meta device, and draw what no file holds: a new head.

    own_chans: image channels of the file's model. trained: the head is the file's.
    """
    target: nn.Module = model if isinstance(model, WholeModule) or trained else _backbone(model)
    ours = WHOLE_MODULE if isinstance(target, WholeModule) else BESIDE_HEAD if trained else ""
    theirs = next((p for p in (WHOLE_MODULE, BESIDE_HEAD) if any(name.startswith(p) for name in file.slots)), "")
    names = {ours + name.removeprefix(theirs): name for name in file.slots if name.startswith(theirs)}
    if ours:  # the heads keep their names
        names |= {name: name for name in file.slots if theirs and not name.startswith(theirs)}
    if not _backbone(model).has_decoder:
        names = {name: names[name] for name in target.state_dict().keys() & names.keys()}
    tensors = {name: file.tensor(slot) for name, slot in names.items()}
    if own_chans == 1:
        _spread_channels(tensors, _backbone(model), ours)
    assign(target, tensors, str(file.path))
    fresh: tuple[str, ...] = ()
    if isinstance(model, HeadedModel) and not trained:
        model.reset_head(model.num_classes)
        fresh = tuple(f"head.{name}" for name in model.head.state_dict())
    unused = tuple(sorted(set(file.slots) - set(names.values())))
    stored = sorted({str(slot.dtype).removeprefix("torch.") for slot in file.slots.values()})
    return LoadReport(str(file.path), sha256, len(tensors), unused, fresh, ", ".join(stored))


def check_fit(entry: ModelEntry, file: WeightsFile) -> LoadReport:
    """Whether a file's tensors are exactly those of the largest module that the entry serves.

    Raises: WeightsError listing what is missing, left over or misshapen.
    """
    own = entry.config.get("in_chans", 1)
    model = build(entry, widest_task(entry), in_chans=own, device="meta")
    return _fill(model, file, None, own, trained=entry.trained_head is not None)


def widest_task(entry: ModelEntry) -> str:
    """The task whose module holds most of an entry's tensors."""
    if entry.trained_head:
        return entry.trained_head
    return "pretraining" if "pretraining" in entry.tasks and entry.objective in WHOLE_OBJECTIVES else "backbone"


def _spread_channels(tensors: dict[str, Tensor], backbone: Backbone, prefix: str) -> None:
    """Divide the weights of a one-channel input among `in_chans` channels."""
    name = prefix + backbone.input_weight
    if backbone.in_chans > 1 and name in tensors and tensors[name].shape[1:2] == (1,):
        tensors[name] = tensors[name].float().repeat_interleave(backbone.in_chans, 1) / backbone.in_chans


def preprocessing(given: Input) -> Preprocessing | FilmPreprocessing:
    """What a model of this input expects of a volume or film."""
    spacing, size, intensity = given.spacing_mm, given.size, given.intensity
    if given.axes == "yx":
        return FilmPreprocessing(None if size is None else (size[0], size[1]), intensity.window, intensity.scale)
    return Preprocessing(
        spacing_mm=None if spacing is None else (spacing[0], spacing[1], spacing[2]),
        unit=intensity.unit,
        window=intensity.window,
        scale=intensity.scale,
    )


def _dress(model: nn.Module, entry: ModelEntry, report: LoadReport) -> nn.Module:
    """Give the module what a loaded model carries beside its parameters."""
    recipe = preprocessing(entry.input)
    extras: dict[str, Any] = {
        "entry": entry,
        "load_report": report,
        "preprocessing": recipe,
        "preprocess": partial(_preprocess, recipe, _backbone(model).in_chans),
        "cite": partial(str, entry.citation),
    }
    for name, value in extras.items():
        setattr(model, name, value)
    return model


def _preprocess(
    recipe: Preprocessing | FilmPreprocessing, in_chans: int, volume: Volume | str | os.PathLike[str]
) -> Tensor:
    """The input tensor (1, C, D, H, W) of a scan or (1, C, H, W) of a film, or its path, every channel the same.

    float32 on the CPU, whatever the model's: bring it to the model's device and dtype.
    """
    image = flattened(prepare_scan(volume, recipe).image, recipe)
    return image.expand(-1, in_chans, *image.shape[2:])


# --- Out again ------------------------------------------------------------------------------------------------------


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    entry: ModelEntry | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a backbone, a whole module or a trained head as a folder that `load` opens and the Hub understands.

    `model.safetensors` with its entry inside, `config.json`, `preprocessor_config.json`, the card as `README.md`, and
    `LICENSE`. The entry gets a proof of these weights (`proof.prove`). Where they are no longer those that were loaded,
    it says so and drops what was measured; rounding to another dtype counts as no change.

    Args:
        folder: made if need be; an earlier save in it is replaced, files of other origin are not.
        entry: default the one that the model was loaded with; that of a head of your own training needs `heads` and
            `labels`, and keeps no number, source or complete ledger of what was loaded.
        dtype: of the stored tensors; float16 halves the file.

    Returns: the path of the weights, written whole or not at all.
    Raises: before anything is written, ArgumentError for a model that could not be loaded again, or a folder that holds
        a README.md, LICENSE or configuration of your own; WeightsError for NaN or Inf. WeightsError where the folder
        cannot be written.
    """
    return _save(model, Path(folder).expanduser(), entry, dtype, None)[0]


def _save(
    model: nn.Module, folder: Path, entry: ModelEntry | None, dtype: torch.dtype, repo: str | None
) -> tuple[Path, ModelEntry]:
    from .proof import prove  # late: it loads what it checks

    given, entry = entry, entry or getattr(model, "entry", None)
    if entry is None or not isinstance(model, Backbone | WholeModule | HeadedModel):
        remedy = "save a backbone, a whole module or a trained head, with entry="
        for name in ("module", "_orig_mod"):  # of DataParallel and torch.compile
            if isinstance(getattr(model, name, None), nn.Module):
                remedy = f"save the model inside: model.{name}"
        without = "without an entry " if entry is None else ""
        raise ArgumentError(f"a {type(model).__name__} {without}cannot be saved", remedy)
    _check_dtype(dtype)
    if isinstance(model, HeadedModel):
        _check_head(model, entry)
    entry = entry.portable()
    chans = _backbone(model).in_chans
    if chans != entry.config.get("in_chans", 1):
        entry = replace(entry, config=entry.config | {"in_chans": chans})
    _check_tensors(model, entry)
    _check_folder(folder)
    path = folder / WEIGHTS_NAME
    tensors: Mapping[str, Tensor] = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise WeightsError(f"{name} holds NaN or Inf as {dtype}", "do not save this model")
    if (given is None or isinstance(model, HeadedModel)) and not _as_loaded(model):
        origin = model if hasattr(model, "entry") else _backbone(model)  # a head may be around what was loaded
        entry = _without_others(entry, getattr(origin, "entry", None), drawn=_drawn(origin))
    if isinstance(model, Backbone):
        entry = replace(entry, heads=(), labels=())
    count = sum(tensor.numel() for tensor in tensors.values())
    entry = replace(entry, parameters=count, proof=prove(model, preprocessing(entry.input), stored=dtype))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in card_files(entry, repo, [path.name for path in folder.glob("*.png")]).items():
            write_whole(folder / name, text.encode())
        write_weights(tensors, path, {"format": "pt", METADATA_KEY: json.dumps(entry.to_dict())})
    except OSError as error:
        raise WeightsError(f"cannot write to {folder}: {error.strerror}", "free space, or choose another") from None
    return path, entry


def _check_head(model: HeadedModel, entry: ModelEntry) -> None:
    task = next((task for task, kind in HEADED.items() if isinstance(model, kind)), None)
    if task is None or task != entry.trained_head or len(entry.labels) != model.num_classes:
        raise ArgumentError(
            f"a {type(model).__name__} whose {model.num_classes} classes have no names cannot be saved",
            f"give entry=replace(model.entry, name=..., heads=({task!r},), labels=(Label(name, value), ...))",
        )
    if not model.backbone.has_decoder:
        raise ArgumentError(
            f"a {type(model).__name__} without its backbone's decoder cannot be saved",
            "put it into a whole one: whole = ClassificationModel(load(name), num_classes); "
            "whole.load_state_dict(model.state_dict(), strict=False)",
        )


def _check_tensors(model: nn.Module, entry: ModelEntry) -> None:
    """Refuse tensors other than those that `load` will make room for."""
    task = "backbone" if isinstance(model, Backbone) else entry.trained_head or "pretraining"
    module = build(entry, task, in_chans=_backbone(model).in_chans, device="meta")
    ours, known = ({name: tuple(t.shape) for name, t in each.state_dict().items()} for each in (model, module))
    if wrong := sorted(dict(ours.items() ^ known.items())):
        raise ArgumentError(
            f"a {type(model).__name__} that could not be loaded again: in {listed(wrong)} it is not what the config "
            f"{entry.config} makes",
            "take out what was added (modules, torch.nn.utils.parametrize), or give entry= with the model's own config",
        )


def _check_folder(folder: Path) -> None:
    """Refuse to replace what no earlier save has written."""
    names = ("README.md", "LICENSE", "config.json", "preprocessor_config.json", WEIGHTS_NAME)
    try:
        ours = json.loads((folder / "config.json").read_bytes())["library_name"] == LIBRARY
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        ours = False
    if not ours and (there := [name for name in names if os.path.lexists(folder / name)]):
        raise ArgumentError(f"{folder} holds files of other origin: {', '.join(there)}", "choose another folder")


def _as_loaded(model: nn.Module) -> bool:
    """Whether the tensors are those of the file that the model was loaded from."""
    report = getattr(model, "load_report", None)
    try:
        if not report or not report.sha256:
            return False
        file = open_weights(Path(report.origin))
        check_content(file, report.sha256)
    except WeightsError:  # it went away or changed since
        return False
    names = {_own_name(name): name for name in file.slots}
    return all(
        (own := names.get(_own_name(name))) is not None
        and file.slots[own].shape == tuple(tensor.shape)
        and torch.equal(file.tensor(own).to(tensor.dtype), tensor.cpu())
        for name, tensor in model.state_dict().items()
    )


def _own_name(name: str) -> str:
    """A tensor's name in the backbone itself; that of a head stays."""
    return name.removeprefix(WHOLE_MODULE).removeprefix(BESIDE_HEAD)


def _drawn(model: nn.Module) -> bool:
    """Whether the model was made with `pretrained=False`: nothing but its shape is that of its entry."""
    report = getattr(model, "load_report", None)
    return report is not None and report.sha256 is None


def _without_others(entry: ModelEntry, loaded: ModelEntry | None, *, drawn: bool) -> ModelEntry:
    """`entry` without what it took over from `loaded` and only holds for the weights of that one."""
    if loaded is None:
        return entry
    note = (
        f"These weights are not those of {loaded.name}, from which they were made; nothing has been measured on them."
    )
    empty: dict[str, Any] = {"ledger": replace(entry.ledger, complete=False)}
    if drawn:
        note = f"These weights began at random, in the shape of {loaded.name}; nothing has been measured on them."
        unknown = Licence(entry.licence.code, "not stated", "not stated")
        empty |= {"licence": unknown, "status": "available", "ledger": Ledger(complete=False), "limits": None}
        empty |= {"training": None, "datasets": (), "base_model": None, "input_statistics": None}
    entry = replace(
        entry, **{name: value for name, value in empty.items() if getattr(entry, name) == getattr(loaded, name)}
    )
    rows = tuple(row for row in entry.evaluation if row not in loaded.evaluation)
    places = tuple(source for source in entry.sources if source not in loaded.sources)
    limits = entry.limits if rows or note in (entry.limits or "") else f"{note} {entry.limits or ''}".strip()
    return replace(entry, evaluation=rows, sources=places, limits=limits)


def from_pretrained(name: str | os.PathLike[str], **settings: Any) -> nn.Module:
    """`load` under the Hub's name: a folder that `save_pretrained` wrote, or `org/repo` on the Hub if there is none.

    Args:
        settings: those of `load`.
    """
    if isinstance(name, str) and not name.startswith((hub.PREFIX, ".", "/", "~")):
        if os.path.lexists(name):
            return load(Path(name), **settings)
        name = hub.PREFIX * (name.partition("@")[0].count("/") == 1) + name
    return load(name, **settings)


@dataclass(frozen=True)
class PushReport:
    """What was pushed. `registry_lines` are the source to write into a registry: pinned, with its hash."""

    repo: str
    revision: str
    sha256: str
    bytes: int

    @property
    def registry_lines(self) -> str:
        return (
            f"- kind: hub\n  repo: {self.repo}\n  file: {WEIGHTS_NAME}\n  revision: {self.revision}\n"
            f"  bytes: {self.bytes}\n  sha256: {self.sha256}"
        )


def check_publishable(entry: ModelEntry | None) -> None:
    """Refuse with an ArgumentError what belongs to others."""
    if entry is not None and entry.status == "upstream":
        raise ArgumentError(
            f"{entry.name} is its authors' and not for us to publish ({entry.licence.weights})",
            "carry it as a bundle (gvsl-zoo export), or publish with the authors' leave and an entry of your own",
        )


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool = False,
    branch: str | None = None,
    commit_message: str | None = None,
    entry: ModelEntry | None = None,
    dtype: torch.dtype = torch.float32,
    beside: str | os.PathLike[str] | None = None,
) -> PushReport:
    """Put what `save_pretrained` writes into a repository of the Hub, in one commit.

    Args:
        repo_id: org/repo; made if it does not exist.
        token: with the right to write; default the one that the Hub's client knows.
        private: of a repository that is made, which else is as its organisation says, mostly public; one that is public
            already is refused.
        branch: default main; made if it does not exist.
        beside: the folder that the model was loaded from; its README.md, LICENSE and pictures go along as they are.

    Raises: ArgumentError for weights whose licence does not allow it, SourceError for what goes wrong on the way.
    """
    wanted = hub.parse_name(repo_id, WEIGHTS_NAME, branch)
    branch = None if wanted.revision == "main" else wanted.revision
    check_publishable(entry or (None if _drawn(model) else getattr(model, "entry", None)))
    if cache.offline():
        raise SourceError("the network is not allowed (HF_HUB_OFFLINE)", "push from where it is")
    own = [path for path in Path(beside).iterdir() if path.is_file()] if beside else []
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for picture in own:
            if picture.name.endswith(tuple(f"-{kind}.png" for kind in PICTURES)):
                shutil.copyfile(picture, folder / picture.name)
        path, known = _save(model, folder, entry, dtype, wanted.repo)
        for text in own:
            if text.name in ("README.md", "LICENSE"):
                there = text.read_bytes().replace(HERE.encode(), f"{hub.PREFIX}{wanted.repo}".encode())
                (folder / text.name).write_bytes(there)
        message = commit_message or f"{known.name}, saved by gvsl-zoo {__version__}"
        commit = hub.push(folder, wanted.repo, token=token, private=private, branch=branch, message=message)
        return PushReport(wanted.repo, commit, cache.sha256_of(path), path.stat().st_size)


# Methods of the classes: bound ones kept in an instance would be a cycle, and `del net` would free no memory.
for _kind in (Backbone, FeatureList, HeadedModel, GVSL, GEMINI):
    _kind.save_pretrained, _kind.push_to_hub = save_pretrained, push_to_hub
