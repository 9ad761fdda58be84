"""How an exported adapter of PEFT's describes itself: tensor names and metadata, as diffusers and PEFT read them."""

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from agsm_rl.adapters.lora_config import METADATA_KEY, options_by_part
from agsm_rl.adapters.lora_files import NEGATIVE_PREFIX
from agsm_rl.adapters.peft_layers import MAGNITUDE
from agsm_rl.errors import UserError

TEXT_PREFIX = "text_encoder"
OF_MODULES = ("lora_A", "lora_B", "oft_R")
"""PEFT's tensors that belong to modules, so that their names in files end in `.weight`."""


def describe_adapter(kind: str, configs: Mapping[str, Mapping[str, Any]], *, banks: int, base: str) -> dict[str, str]:
    """The metadata of an export: PEFT's options for each changed part of a pipeline (unet, text_encoder, …).

    `base` is the name of the backbone it belongs to. diffusers reads PEFT's options from this metadata.
    """
    options = {f"{part}.{name}": value for part, config in configs.items() for name, value in config.items()}
    return {"kind": kind, "banks": str(banks), "base": base, METADATA_KEY: json.dumps(options)}


def export_configs(metadata: Mapping[str, str], *, title: str = "LoRA") -> dict[str, dict[str, Any]]:
    """PEFT's options of each part of a pipeline, as an export's metadata gives them. `title` begins the messages."""
    if METADATA_KEY not in metadata:
        raise UserError(f"{title}: the file's metadata '{METADATA_KEY}' is missing.")
    return options_by_part(metadata[METADATA_KEY], where=f"{title}: the file's metadata '{METADATA_KEY}'")


def common_option(configs: Mapping[str, Mapping[str, Any]], name: str, expected: type, *, title: str) -> Any:
    """The value that all parts of a pipeline have for an option of PEFT's; UserError if it is not one of that type."""
    values = [config.get(name) for config in configs.values()]
    if type(values[0]) is not expected or any(value != values[0] for value in values):
        raise UserError(f"{title}: {name} is {values} in the file's metadata; it must be one {expected.__name__}.")
    return values[0]


def exported_name(name: str, part: str) -> str:
    """A parameter's name in an export: `part` is the denoiser's; text encoders' layers already begin with theirs."""
    bank, _, rest = name.partition(".")
    rest = rest if rest.startswith(TEXT_PREFIX) else f"{part}.{rest}"
    return f"{NEGATIVE_PREFIX if bank == 'negative' else ''}{name_in_file(rest)}"


def name_in_file(name: str) -> str:
    """A tensor's name in files, from `<part>.<module>.<PEFT's name>`.

    PEFT's own name of DoRA's tensor has no `.weight`, but transformers finds it in a text encoder only with it.
    """
    role = name.rpartition(".")[2]
    of_text = role == MAGNITUDE and name.startswith(TEXT_PREFIX)
    return f"{name}.weight" if role in OF_MODULES or of_text else name


def layers_of(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The positive bank of an export: layer (`unet.….to_q`) → PEFT's name (`lora_A`) → tensor."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if not name.startswith(NEGATIVE_PREFIX):
            layer, _, role = name.removesuffix(".weight").rpartition(".")
            layers.setdefault(layer, {})[role] = tensor
    return layers
