"""The registry: weights_registry.yaml -> frozen ModelEntry; the only room that knows which models exist."""

from __future__ import annotations

import json
import os
import re
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from yaml.composer import Composer

from .errors import ArgumentError, RegistryError

SCHEMA_VERSION = 1
MAX_BYTES = 1_000_000  # ours has a few kB; what is larger is no registry
MAX_DEPTH = 12  # a config's list of lists lies 7 deep
FILE_NAME = "weights_registry.yaml"
HOSTS = ("arxiv.org", "doi.org", "github.com", "huggingface.co")  # the only hosts that a text may link to
NDIMS, MODALITIES = (2, 3), ("CT", "MR", "X-ray")
TASKS = ("backbone", "segmentation", "classification", "registration", "pretraining")
TRAINED_HEADS = ("segmentation", "classification")
OBJECTIVE_HEADS = {
    "gvsl": {"affine", "deformable", "restoration"},
    "gemini": {"deformer", "restoration"},
    "restoration": {"restoration"},
}
SOURCE_FIELDS = {  # what a source of each kind states; sha256 too unless it says pinned: false
    "hub": {"repo", "file", "revision", "bytes"},
    "gdrive": {"id", "file", "bytes"},
    "file": {"path"},
    "embedded": {"file"},
}

# --- The schema: the annotations below are what a registry file is read against -----------------------------


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _pattern(expression: str, meaning: str, clean: Callable[[str], str] = str) -> Callable[[str], str]:
    def check(text: str) -> str:
        if not re.fullmatch(expression, clean(text)):
            raise ValueError(f"expected {meaning}, got {_short(text)}")
        return clean(text)

    return check


def is_device_name(name: str) -> bool:
    """Whether a file cannot be called so on Windows."""
    return re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d|conin\$|conout\$) *(\..*)?", name, re.IGNORECASE) is not None


def _plain(text: str) -> str:
    """A path without traps: the same file on every system, no step upwards; a leading / or C:/ may stand."""
    for part in text[len(Path(text).anchor) :].split("/"):
        if part in ("", ".", "..") or part[-1] in ". " or re.search(r'[\\<>:"|?*\x00-\x1f]', part):
            raise ValueError(f"{_short(text)} is not a plain path: no '..', backslash, ':' or control character")
        if is_device_name(part):
            raise ValueError(f"{_short(text)} holds {part!r}, a device name on Windows")
    return text


def relative_path(text: str) -> str:
    """A plain path that starts at no root; ValueError for any other."""
    if Path(text).anchor:
        raise ValueError(f"expected a relative path, got {_short(text)}")
    return _plain(text)


def _count(number: int) -> int:
    if number < 0:
        raise ValueError(f"expected 0 or more, got {number}")
    return number


def _byte(number: int) -> int:
    if not 0 <= number <= 255:
        raise ValueError(f"expected 0 to 255, got {number}")
    return number


Name = Annotated[str, _pattern("[a-z0-9]+([-._][a-z0-9]+)*", "a lower-case name such as gvsl-unet-ct"), _plain]
Word = Annotated[str, _pattern("[a-z][a-z0-9_-]*", "one lower-case word")]
Sha256 = Annotated[str, _pattern("[0-9a-f]{64}", "a sha256 of 64 hexadecimal digits", str.lower)]
Revision = Annotated[str, _pattern("[0-9a-f]{40}", "a commit of 40 hexadecimal digits, not a branch or tag")]
Repo = Annotated[str, _pattern("[A-Za-z0-9_][A-Za-z0-9._-]*/[A-Za-z0-9_][A-Za-z0-9._-]*", "org/name")]
DriveId = Annotated[str, _pattern("[A-Za-z0-9_-]{10,100}", "a Google Drive file id")]
StoredAxes = Annotated[str, _pattern("(?=.*[RL])(?=.*[AP])(?=.*[SI]).{3}", "axis codes in any order, such as PSL")]
Count = Annotated[int, _count]
Byte = Annotated[int, _byte]
Head = Literal["affine", "deformable", "deformer", "restoration", "segmentation", "classification"]
Status = Literal["available", "upstream", "planned"]
Record = TypeVar("Record")
ConfigValue = Any  # int, float, bool, str, None or a tuple of these


@dataclass(frozen=True)
class Source:
    """Where the bytes lie. `bytes` is the exact size, or for a file without a hash the most that may arrive.

    A file's relative `path` starts at the registry's folder and is absolute once read.
    """

    kind: Literal["hub", "gdrive", "file", "embedded"]
    repo: Repo | None = None
    id: DriveId | None = None
    revision: Revision | None = None
    file: Annotated[str, relative_path] | None = None
    path: Annotated[str, _plain] | None = None
    bytes: Count | None = None
    sha256: Sha256 | None = None
    pinned: bool = True  # False: the authors' own file, for which nobody publishes a hash

    def __post_init__(self) -> None:
        needed = SOURCE_FIELDS[self.kind] | ({"sha256"} if self.pinned else set())
        stated = {name for name, value in asdict(self).items() if value is not None} - {"kind", "pinned"}
        if not self.pinned and self.kind != "gdrive":
            raise ValueError("only a gdrive source may say pinned: false")
        for names, verb in ((needed - stated, "needs"), (stated - needed, "has no")):
            if names:
                pinned = "a pinned" if self.pinned else "an unpinned"
                raise ValueError(f"{pinned} {self.kind} source {verb} {', '.join(sorted(names))}")
        if self.kind != "hub" and "/" in (self.file or ""):
            raise ValueError(f"expected a file name without a folder, got {_short(str(self.file))}")


@dataclass(frozen=True)
class Intensity:
    """Clip to `window` (in `unit`; None: the image's own extreme), then map it linearly onto `scale`."""

    unit: Literal["HU", "grey", "arbitrary"]
    window: tuple[float | None, float | None]
    scale: tuple[float, float]

    def __post_init__(self) -> None:
        for low, high in (self.window, self.scale):
            if low is not None and high is not None and not low < high:
                raise ValueError(f"expected [low, high], got [{low:g}, {high:g}]")


@dataclass(frozen=True)
class Input:
    """What the tensors expect; spacing_mm, size and window are in the order of `axes`, None leaves the image's own.

    `orientation` names the directions of x, y, z (RAS: to the right, the front, the head).
    """

    axes: Literal["zyx", "yx"]
    intensity: Intensity
    spacing_mm: tuple[float, ...] | None = None
    size: tuple[int, ...] | None = None  # voxels; for films, which have no millimetres
    window: tuple[int, ...] | None = None  # voxels seen at once in training, and best in use
    orientation: Literal["RAS"] | None = None

    def __post_init__(self) -> None:
        for given in (self.spacing_mm, self.size, self.window):
            if given is not None and (len(given) != len(self.axes) or min(given) <= 0):
                raise ValueError(f"expected {len(self.axes)} positive numbers (axes {self.axes}), got {list(given)}")


@dataclass(frozen=True)
class Label:
    """A class of a trained head: its name, its value in label files, and the colour that it is drawn in (RGB)."""

    name: str
    value: Count
    colour: tuple[Byte, Byte, Byte] | None = None


@dataclass(frozen=True)
class Licence:
    code: str
    weights: str
    data: str


@dataclass(frozen=True)
class Training:
    recipe: str
    data: str
    steps: Count
    hardware: str | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Ledger:
    """Scans that training saw, as `ledger.scan_hash` tells them; complete: whether it saw no others."""

    complete: bool
    scans: tuple[Sha256, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """One number; with a command it was measured with this package, without one it is the paper's."""

    task: str
    data: str
    metric: str
    value: float
    scratch: float | None = None
    seeds: tuple[Count, ...] = ()
    command: str | None = None


@dataclass(frozen=True)
class Digest:
    """Numbers taken from one output of a model on one formula image: mean, SD, and weighted sums (`proof.digest`)."""

    image: Word
    output: Word
    numbers: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.numbers) != 6:
            raise ValueError(f"expected 6 numbers of a digest, got {len(self.numbers)}")


@dataclass(frozen=True)
class Proof:
    """A self-test: on images from the formula `input`, with voxels of `spacing_mm`, the outputs have these digests.

    The tolerances are in SDs of each output: in float32, and in bfloat16.
    """

    input: Word
    digests: tuple[Digest, ...]
    tolerance: float
    tolerance_bf16: float
    spacing_mm: tuple[float, float, float] | None = None  # along x, y, z; films have none

    def __post_init__(self) -> None:
        if not self.digests or min(self.spacing_mm or (1,)) <= 0:
            raise ValueError("expected one digest or more, and a spacing of positive numbers")


@dataclass(frozen=True)
class InputStatistics:
    """What the training images were, before they were prepared; pairs are the least and the most of the images.

    Percentiles are the 0.5th, 5th, 50th, 95th and 99.5th, in the input's unit, means over the images. Air is the share
    of voxels below -200 HU. Spacing and field of view are along x, y, z (RAS+), whatever the files' own axes.
    """

    images: Count
    percentiles: tuple[float, float, float, float, float]
    air: tuple[float, float] | None = None
    spacing_mm: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    field_of_view_mm: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    orientations: tuple[StoredAxes, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """All that is known of a model without its bytes."""

    name: Name
    summary: str
    status: Status
    instead: Name | None = None  # a model to use while this one is missing
    architecture: Literal["unet", "xmorpher"]
    config: dict[str, ConfigValue] = field(hash=False)  # construction arguments
    ndim: Literal[2, 3]
    modality: Literal["CT", "MR", "X-ray"]
    objective: Word
    parameters: Count
    input: Input
    heads: tuple[Head, ...] = ()
    labels: tuple[Label, ...] = ()  # the classes of a trained head, in the order of its channels
    sources: tuple[Source, ...] = ()
    licence: Licence
    citation: str
    training: Training | None = None
    ledger: Ledger = Ledger(complete=False)
    evaluation: tuple[Evaluation, ...] = ()
    limits: str | None = None  # what the weights are not good for
    input_statistics: InputStatistics | None = None
    datasets: tuple[str, ...] = ()  # public ones that it was trained on, by their names
    base_model: str | None = None  # that it was fine-tuned from: of the registry, or org/repo on the Hub
    proof: Proof | None = None

    def __post_init__(self) -> None:
        if self.config.get("ndim", self.ndim) != self.ndim or len(self.input.axes) != self.ndim:
            raise ValueError(f"ndim {self.ndim} does not agree with config.ndim or input.axes")
        if self.trained_head and len(self.heads) > 1:
            raise ValueError(f"a trained {self.trained_head} head stands alone, got {', '.join(self.heads)}")
        if bool(self.labels) != bool(self.trained_head):
            raise ValueError("a trained head has labels, and nothing else has")
        for what in ("name", "value"):
            if len({getattr(label, what) for label in self.labels}) < len(self.labels):
                raise ValueError(f"two labels have one {what}")

    @property
    def trained_head(self) -> str | None:
        """The task whose trained head lies in the file beside the backbone, if there is one."""
        return next((head for head in self.heads if head in TRAINED_HEADS), None)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks that the tensors can serve; a file without heads is a backbone only."""
        heads = set(self.heads)
        registers = "deformer" in heads or {"affine", "deformable"} <= heads
        pretrains = self.objective in OBJECTIVE_HEADS and OBJECTIVE_HEADS[self.objective] <= heads
        return TASKS[:3] + ("registration",) * registers + ("pretraining",) * pretrains

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        data: dict[str, Any] = json.loads(json.dumps(asdict(self), default=lambda number: number.item()))  # NumPy's
        return data

    def portable(self) -> ModelEntry:
        """The entry as it travels beside its weights: without sources that are paths of this machine.

        Errors: RegistryError for what `from_dict` would refuse.
        """
        own = replace(self, sources=tuple(source for source in self.sources if source.kind != "file"))
        return self.from_dict(own.to_dict(), self.name)

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str | Path = "entry") -> ModelEntry:
        """The entry that `to_dict` wrote, as strictly read as a registry; `where` names it in errors."""
        reader = _Reader(where, Path.cwd())
        entry: ModelEntry = reader.build(cls, reader.compose(json.dumps(data, ensure_ascii=False)), "entry")
        return entry


# --- Reading: YAML is only composed into nodes, never constructed, so every value has a line and no magic ---


if yaml.__with_libyaml__:

    class _Loader(Composer, yaml.CSafeLoader):
        """The parser in C, several times faster, under the composer in Python."""

        def __init__(self, stream: str) -> None:
            yaml.CSafeLoader.__init__(self, stream)
            Composer.__init__(self)
else:
    _Loader = yaml.SafeLoader  # type: ignore[misc, assignment]


class _PlainLoader(_Loader):
    """Composes plain YAML only: no anchors, aliases, tags or deep nesting."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        for wrong, problem in (
            (getattr(event, "anchor", None), "anchors and aliases are not accepted"),
            (getattr(event, "tag", None), "tags are not accepted"),
            (self.depth >= MAX_DEPTH, f"nested more than {MAX_DEPTH} deep"),
        ):
            if wrong:
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_UNQUOTED: dict[type, tuple[str, Callable[[str], Any], str]] = {
    bool: ("true|false", "true".__eq__, "true or false"),
    int: ("-?(0|[1-9][0-9]{0,17})", int, "a whole number"),
    float: (r"-?[0-9]{1,30}(\.[0-9]{0,30})?([eE][-+]?[0-9]{1,2})?", float, "a number"),
}


class _Reader:
    """Builds the schema's dataclasses from YAML; every refusal names file, line and field."""

    def __init__(self, where: str | Path, folder: Path | None) -> None:
        self.where, self.folder = where, folder

    def refuse(self, at: yaml.Node | int, problem: str, remedy: str = "") -> NoReturn:
        line = at if isinstance(at, int) else at.start_mark.line + 1
        raise RegistryError(f"{self.where}:{line}: {problem}", remedy)

    def read(self, path: Path, what: str) -> yaml.Node:
        """The content of a file; `what` names its kind in errors."""
        try:
            with path.open("rb") as file:
                data = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise RegistryError(f"cannot read the {what} {path} ({error.strerror})") from error
        if len(data) > MAX_BYTES:
            self.refuse(1, f"larger than {MAX_BYTES:,} bytes, which no {what} is")
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            self.refuse(data.count(b"\n", 0, error.start) + 1, "not UTF-8 text")
        return self.compose(text)

    def compose(self, text: str) -> yaml.Node:
        if bad := _CONTROL.search(text):
            line = text.count("\n", 0, bad.start()) + 1
            self.refuse(line, f"holds the character U+{ord(bad[0]):04X}", "save it as UTF-8 without a byte order mark")
        try:
            node = yaml.compose(text, Loader=_PlainLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            self.refuse(mark.line + 1 if mark else 1, f"not plain YAML: {error.problem}")
        except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last two: escapes beyond Unicode
            self.refuse(1, f"not YAML: {error}")
        return node if node is not None else self.refuse(1, "empty", "write fields (key: value)")

    def pairs(self, node: yaml.Node, name: str) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        if not isinstance(node, yaml.MappingNode):
            self.refuse(node, f"{name}: expected fields (key: value)")
        found: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self.refuse(key, f"{name}: a key must be plain text")
            if key.value in found:
                first = found[key.value][0].start_mark.line + 1
                self.refuse(key, f"{name}: {_short(key.value)} is given twice (first in line {first})", "keep one")
            found[key.value] = key, value
        return found

    def build(self, kind: Any, node: yaml.Node, name: str) -> Any:
        """The value of type `kind` that `node` holds; `name` says in errors where it stands."""
        origin, args = get_origin(kind), get_args(kind)
        if origin is Annotated:
            value = self.build(args[0], node, name)
            with self.checking(node, name):
                for check in kind.__metadata__:
                    value = check(value)
            return value
        if origin in (Union, types.UnionType):  # the only unions are X | None
            return None if _is_null(node) else self.build(args[0], node, name)
        if origin is tuple:
            return self.sequence(args, node, name)
        if origin is dict:
            item = self.free if args[1] is ConfigValue else partial(self.build, args[1])
            return {key: item(value, f"{name}.{key}") for key, (_, value) in self.pairs(node, name).items()}
        if is_dataclass(kind):
            return self.record(kind, node, name)
        return self.scalar(kind, node, name)

    @contextmanager
    def checking(self, node: yaml.Node, name: str) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            self.refuse(node, f"{name}: {error}")

    def record(self, kind: Any, node: yaml.Node, name: str) -> Any:
        pairs = self.pairs(node, name)
        known = {item.name: item for item in fields(kind)}
        for key, (at, _) in pairs.items():
            if key not in known:
                self.refuse(at, f"{name}: unknown field {_short(key)}", f"known are {', '.join(known)}")
        for key, item in known.items():
            if key not in pairs and item.default is MISSING:
                self.refuse(node, f"{name}: the field {key!r} is missing")
        hints = get_type_hints(kind, include_extras=True)
        values = {key: self.build(hints[key], value, f"{name}.{key}") for key, (_, value) in pairs.items()}
        if kind is Source and values.get("path"):
            if self.folder is None and Path(values["path"]).is_absolute():
                self.refuse(node, f"{name}: an absolute path is for registries of your own")
            values["path"] = ((self.folder or _own_path().parent) / values["path"]).as_posix()
        with self.checking(node, name):
            return kind(**values)

    def sequence(self, args: tuple[Any, ...], node: yaml.Node, name: str) -> tuple[Any, ...]:
        if not isinstance(node, yaml.SequenceNode):
            self.refuse(node, f"{name}: expected a list")
        kinds = args[:1] * len(node.value) if args[-1] is Ellipsis else args
        if len(kinds) != len(node.value):
            self.refuse(node, f"{name}: expected {len(kinds)} values, got {len(node.value)}")
        items = enumerate(zip(kinds, node.value, strict=True))
        return tuple(self.build(kind, item, f"{name}[{i}]") for i, (kind, item) in items)

    def scalar(self, kind: Any, node: yaml.Node, name: str) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            self.refuse(node, f"{name}: expected one value")
        text: str = node.value
        if get_origin(kind) is Literal:
            options = {str(option): option for option in get_args(kind)}
            if text not in options:
                self.refuse(node, f"{name}: expected {' or '.join(options)}, got {_short(text)}")
            return options[text]
        if kind is not str:
            expression, convert, meaning = _UNQUOTED[kind]
            if node.style or not re.fullmatch(expression, text):
                self.refuse(node, f"{name}: expected {meaning}, got {_short(text)}")
            return convert(text)
        if not text.strip() or _is_null(node):
            self.refuse(node, f"{name}: expected text, got {_short(text)}")
        if bad := _CONTROL.search(text):  # an escape such as "\0"
            self.refuse(node, f"{name}: holds the character U+{ord(bad[0]):04X}")
        for scheme, host in re.findall(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/\s]*)", text):
            if scheme != "https" or host not in HOSTS:
                self.refuse(node, f"{name}: {scheme}://{host} is refused", f"links are https to {', '.join(HOSTS)}")
        return text

    def free(self, node: yaml.Node, name: str) -> ConfigValue:
        """A construction argument, whose type only the architecture knows."""
        if isinstance(node, yaml.SequenceNode):
            return tuple(self.free(item, f"{name}[{i}]") for i, item in enumerate(node.value))
        if _is_null(node):
            return None
        fits = (kind for kind, (expression, *_) in _UNQUOTED.items() if re.fullmatch(expression, str(node.value)))
        return self.scalar(str if getattr(node, "style", "") else next(fits, str), node, name)


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and not node.style and node.value in ("", "~", "null")


def _own_path() -> Path:
    """In a wheel the registry lies beside this file, in a checkout one folder up."""
    here = Path(__file__)
    return here.with_name(FILE_NAME) if here.with_name(FILE_NAME).exists() else here.parent.parent / FILE_NAME


@lru_cache
def _read(path: Path) -> dict[str, ModelEntry]:
    """The entries of one file, read once in a process."""
    own = path == _own_path()
    reader = _Reader(FILE_NAME if own else path, None if own else path.parent)
    root = reader.read(path, "registry")
    top = reader.pairs(root, "registry")
    version = reader.build(Count, top["schema_version"][1], "schema_version") if "schema_version" in top else 0
    if version > SCHEMA_VERSION:
        reader.refuse(root, f"schema_version {version} is newer than {SCHEMA_VERSION}", "upgrade gvsl-zoo")
    if version < SCHEMA_VERSION or top.keys() != {"schema_version", "models"}:
        odd = next((key for name, (key, _) in top.items() if name not in ("schema_version", "models")), root)
        reader.refuse(odd, f"expected schema_version: {SCHEMA_VERSION} and models, got {', '.join(top)[:80]}")
    entries = {}
    for name, (key, node) in reader.pairs(top["models"][1], "models").items():
        reader.pairs(node, name)
        node.value.append((yaml.ScalarNode("", "name", key.start_mark, key.end_mark), key))
        entries[name] = reader.build(ModelEntry, node, name)
        with reader.checking(key, name):
            _check_status(entries[name])
    return entries


def read_record(kind: type[Record], path: Path) -> Record:
    """A dataclass from a file of its own, read against its annotations as strictly as a registry."""
    reader, what = _Reader(path, path.parent), kind.__name__.lower()
    record: Record = reader.build(kind, reader.read(path, what), what)
    return record


def _check_status(entry: ModelEntry) -> None:
    if entry.status == "planned" and entry.sources:
        raise ValueError("a planned model has no sources yet")
    if entry.status != "planned" and not entry.sources:
        raise ValueError(f"status {entry.status}, but no source")
    if entry.status == "available" and not any(source.pinned for source in entry.sources):
        raise ValueError("an available model needs a source with a sha256")


# --- Asking ---------------------------------------------------------------------------------------------------

_added: dict[str, ModelEntry] = {}
_homes: dict[str, Path] = {}  # folders of the registries that these come from


def _entries() -> dict[str, ModelEntry]:
    """Ours, then those of GVSL_ZOO_REGISTRY, then those of register_registry()."""
    entries = dict(_read(_own_path()))
    for path in _files_of_environment():
        _add(entries, _read(path), path)
    return _add(entries, _added, "register_registry()")


def is_file(path: Path) -> bool:
    """Whether there is such a file, as far as one may look."""
    try:
        return path.is_file()
    except OSError:
        return False


def _named_by_environment() -> list[Path]:
    return [_full(path) for path in os.environ.get("GVSL_ZOO_REGISTRY", "").split(os.pathsep) if path]


def _files_of_environment() -> list[Path]:
    """Registries that GVSL_ZOO_REGISTRY names, or that lie in the folders it names."""
    named = [(path, path / FILE_NAME if path.is_dir() else path) for path in _named_by_environment()]
    return [file for path, file in named if file == path or is_file(file)]


def mirrors() -> list[Path]:
    """Folders that GVSL_ZOO_REGISTRY names: each may hold bundles, NAME.safetensors, and a registry of its own."""
    return [path for path in _named_by_environment() if path.is_dir()]


def _full(path: str | Path) -> Path:
    return Path(path).expanduser().absolute()


def _add(entries: dict[str, ModelEntry], new: dict[str, ModelEntry], origin: str | Path) -> dict[str, ModelEntry]:
    if taken := sorted(entries.keys() & new.keys()):
        raise RegistryError(f"{origin}: the name {taken[0]!r} exists already", "give yours another one")
    entries.update(new)
    return entries


def register_registry(path: str | Path) -> list[str]:
    """Put your own registry beside ours until the process ends; returns the names that it added."""
    new = _read(_full(path))
    _add(_entries(), new, path)
    _added.update(new)
    _homes.update(dict.fromkeys(new, _full(path).parent))
    return list(new)


def list_models(
    filter: str = "*",
    *,
    ndim: int | None = None,
    modality: str | None = None,
    task: str | None = None,
    available: bool | None = None,
) -> list[str]:
    """Names, sorted, of the models that fit every condition given.

    Args:
        filter: wildcard on the name, such as `gvsl-*-ct`.
        ndim: 2 or 3.
        modality: CT, MR or X-ray, in any case.
        task: what the tensors must serve, one of TASKS.
        available: True for status available (bytes with a hash), False for all others.
    """
    for what, given, known in (("ndim", ndim, NDIMS), ("modality", modality, MODALITIES), ("task", task, TASKS)):
        if given is not None and str(given).lower() not in [str(one).lower() for one in known]:
            raise ArgumentError(f"unknown {what} {given!r}", f"expected one of {', '.join(map(str, known))}")
    return sorted(
        name
        for name, entry in _entries().items()
        if fnmatchcase(name, filter)
        and ndim in (None, entry.ndim)
        and (modality is None or modality.lower() == entry.modality.lower())
        and (task is None or task in entry.tasks)
        and available in (None, entry.status == "available")
    )


def model_info(name: str) -> ModelEntry:
    """All that is known of a model; an unknown name raises with near names."""
    entries = _entries()
    if isinstance(name, str) and name in entries:
        return replace(entries[name], config=dict(entries[name].config))  # the caller may change its own copy
    tried = str(name)[:80].lower()
    near = get_close_matches(tried, entries, 3, 0.8) or get_close_matches(tried, entries, 1, 0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? See" if near else "see"
    if re.search(r"[/\\]|\.safetensors$", str(name)):
        hint = "this takes names of the registry, no path or repository: see"
    elif os.path.lexists(str(name)):
        hint = f"for the path here write './{name}'; {hint}"
    raise RegistryError(f"unknown model {_short(str(name))}", f"{hint} gvsl_zoo.list_models().")


def home_of(name: str) -> Path:
    """The folder of the registry that lists a model."""
    model_info(name)
    if name in _added:
        return _homes[name]
    return next(path.parent for path in (_own_path(), *_files_of_environment()) if name in _read(path))
