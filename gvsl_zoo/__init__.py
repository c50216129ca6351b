"""gvsl-zoo: pre-trained backbones for medical volumes. Names are resolved when they are first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .conversion import ConversionReport as ConversionReport
    from .conversion import convert as convert
    from .errors import ArgumentError as ArgumentError
    from .errors import GvslZooError as GvslZooError
    from .errors import RegistryError as RegistryError
    from .errors import SourceError as SourceError
    from .errors import TrainingError as TrainingError
    from .errors import VolumeError as VolumeError
    from .errors import WeightsError as WeightsError
    from .inference.correspond import Correspondence as Correspondence
    from .inference.correspond import Matcher as Matcher
    from .inference.correspond import correspond as correspond
    from .inference.features import features as features
    from .inference.features import pooled_features as pooled_features
    from .inference.register import Registration as Registration
    from .inference.register import register as register
    from .inference.segment import segment as segment
    from .inference.support import fit_support as fit_support
    from .registry import ModelEntry as ModelEntry
    from .registry import list_models as list_models
    from .registry import model_info as model_info
    from .registry import register_registry as register_registry
    from .surgery import TransplantReport as TransplantReport
    from .surgery import transplant as transplant
    from .transfer.cases import read_cases as read_cases
    from .transfer.classify import classify as classify
    from .transfer.config import FinetuneConfig as FinetuneConfig
    from .transfer.finetune import finetune as finetune
    from .transforms import Affine as Affine
    from .transforms import Chain as Chain
    from .transforms import Displacement as Displacement
    from .transforms import Grid as Grid
    from .transforms import read_transform as read_transform
    from .transforms import to_displacement as to_displacement
    from .transforms import warp_volume as warp_volume
    from .transforms import write_transform as write_transform
    from .volume import Volume as Volume
    from .volume import read_volume as read_volume
    from .volume import write_volume as write_volume
    from .zoo import from_pretrained as from_pretrained
    from .zoo import load as load
    from .zoo import push_to_hub as push_to_hub
    from .zoo import save_pretrained as save_pretrained

_HOMES = {
    "conversion": ("ConversionReport", "convert"),
    "errors": (
        "ArgumentError",
        "GvslZooError",
        "RegistryError",
        "SourceError",
        "TrainingError",
        "VolumeError",
        "WeightsError",
    ),
    "inference.correspond": ("Correspondence", "Matcher", "correspond"),
    "inference.features": ("features", "pooled_features"),
    "inference.segment": ("segment",),
    "inference.support": ("fit_support",),
    "inference.register": ("Registration", "register"),
    "registry": ("ModelEntry", "list_models", "model_info", "register_registry"),
    "surgery": ("TransplantReport", "transplant"),
    "transforms": (
        "Affine",
        "Chain",
        "Displacement",
        "Grid",
        "read_transform",
        "to_displacement",
        "warp_volume",
        "write_transform",
    ),
    "transfer.cases": ("read_cases",),
    "transfer.classify": ("classify",),
    "transfer.config": ("FinetuneConfig",),
    "transfer.finetune": ("finetune",),
    "volume": ("Volume", "read_volume", "write_volume"),
    "zoo": ("from_pretrained", "load", "push_to_hub", "save_pretrained"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted([*_HOME_OF, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
