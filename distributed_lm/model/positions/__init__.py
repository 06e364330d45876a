"""Position methods, one small file each. ``build_position`` finds them by name.

To add your own, write a subclass of ``PositionMethod`` (``base.py`` says what it may override) and
either list it in ``METHODS`` or set ``model.position: your_package.your_module:YourClass``. The
parity tests run over ``METHODS``.
"""

import importlib

from distributed_lm.config import ModelConfig
from distributed_lm.errors import ConfigError
from distributed_lm.model.positions.alibi import Alibi
from distributed_lm.model.positions.base import HeadSlice, PositionMethod
from distributed_lm.model.positions.learned import Learned
from distributed_lm.model.positions.rotary import Rotary
from distributed_lm.model.positions.sinusoidal import Sinusoidal
from distributed_lm.model.positions.t5 import T5

METHODS: dict[str, type[PositionMethod]] = {
    "alibi": Alibi,
    "learned": Learned,
    "none": PositionMethod,  # the causal mask alone (Haviv et al. 2022)
    "rotary": Rotary,
    "sinusoidal": Sinusoidal,
    "t5": T5,
}


def build_position(model: ModelConfig, heads: HeadSlice) -> PositionMethod:
    """The position method of ``model``, for the heads that this rank holds.

    Raises:
        ConfigError: if ``model.position`` names nothing that can be used.
    """
    name = model.position
    method = METHODS.get(name) or _import_method(name)
    return method(model, heads)


def _import_method(name: str) -> type[PositionMethod]:
    module, _, attribute = name.partition(":")
    known = f"use one of {', '.join(sorted(METHODS))}, or package.module:Class"
    if not attribute:
        raise ConfigError(f"model.position={name}: no such method; {known}")
    try:
        method = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(f"model.position={name}: {error}; {known}") from None
    if not (isinstance(method, type) and issubclass(method, PositionMethod)):
        raise ConfigError(f"model.position={name}: not a subclass of PositionMethod; {known}")
    return method
