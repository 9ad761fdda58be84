"""Models without data, on torch's meta device, from their configurations alone."""

from collections.abc import Mapping
from typing import Any

import diffusers
import torch


def on_meta(
    model_class: Any, source: str, name: str | None, where: Mapping[str, Any], *, dtype: torch.dtype = torch.float32
) -> Any:
    """A model from its configuration; `name`: its folder in that of a pipeline."""
    folder = {} if name is None else {"subfolder": name}
    if issubclass(model_class, diffusers.ModelMixin):
        config = model_class.load_config(source, **folder, **where)
        with torch.device("meta"):
            model = model_class.from_config(config).to(dtype)
    else:
        config = model_class.config_class.from_pretrained(source, **folder, **where)
        with torch.device("meta"):
            model = model_class(config).to(dtype)
    return model


def config_of(model_class: Any, source: str, name: str, where: Mapping[str, Any]) -> dict[str, Any]:
    """A model's configuration, as its files have it."""
    if issubclass(model_class, diffusers.ModelMixin):
        return dict(model_class.load_config(source, subfolder=name, **where))
    config, _ = model_class.config_class.get_config_dict(source, subfolder=name, **where)
    return dict(config)
