"""Connectors: from patch features of the vision tower to image tokens of the language model's width.

One file per kind. A file holds the options (keys of ``model.connector``), the number of tokens and their grid, and the
module; nothing else in the project asks for a kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from data_prep.common.errors import did_you_mean, short_repr
from data_prep.common.plugins import Registry, must_subclass
from data_prep.common.validation import problems, report
from pipeline.config.schema import ConfigError, ConnectorConfig
from pipeline.model.connectors.attention_pool import AttentionPooling
from pipeline.model.connectors.average_pool import AveragePool
from pipeline.model.connectors.base import Connector, Features, Grid
from pipeline.model.connectors.cabstractor import CAbstractor
from pipeline.model.connectors.dabstractor import DAbstractor
from pipeline.model.connectors.mlp import Mlp
from pipeline.model.connectors.perceiver import Perceiver
from pipeline.model.connectors.pixel_shuffle import PixelShuffle
from pipeline.model.connectors.sva import Sva

__all__ = ["CONNECTORS", "Connector", "Features", "Grid", "read_connector", "read_saved_connector"]

_KINDS = (Perceiver, Mlp, CAbstractor, DAbstractor, PixelShuffle, AttentionPooling, AveragePool, Sva)
CONNECTORS: Registry[type[Connector]] = Registry(
    "mma.connectors",
    "connector kind",
    {connector.kind: connector for connector in _KINDS},
    must_subclass(Connector, "kind"),
)
"""Connectors by kind."""
_ONCE_SHARED = frozenset({"latents", "depth", "heads", "head_dim", "ff_mult"})
"""Options that models saved by earlier versions hold for every kind."""


def read_connector(config: ConnectorConfig) -> Connector:
    """Return the connector of a recipe. Raises ConfigError for an unknown kind or option, or a value it refuses."""
    return _read(config.kind, config.model_extra or {})


def read_saved_connector(raw: Mapping[str, Any]) -> Connector:
    """Rebuild what `Connector.to_dict` returned. Raises ConfigError as :func:`read_connector` does."""
    kind = raw["kind"]
    options = {name: value for name, value in raw.items() if name != "kind"}
    if kind in CONNECTORS:
        old = _ONCE_SHARED - set(CONNECTORS[kind].model_fields)
        options = {name: value for name, value in options.items() if name not in old}
    return _read(kind, options)


def _read(kind: Any, options: Mapping[str, Any]) -> Connector:
    if kind not in CONNECTORS:
        raise ConfigError(
            f"model.connector.kind {short_repr(kind)} is not known{did_you_mean(str(kind), CONNECTORS)}; "
            f"known: {', '.join(CONNECTORS)}"
        )
    connector = CONNECTORS[kind]
    known = list(connector.model_fields)
    for name in options:
        if name not in known:
            raise ConfigError(
                f"model.connector: kind={kind} has no option {short_repr(name)}{did_you_mean(str(name), known)}; "
                f"its options: {', '.join(known) or 'none'}"
            )
    try:
        return connector.model_validate(dict(options))
    except ValidationError as error:
        raise ConfigError(report("model", problems(error, within="connector"))) from None
