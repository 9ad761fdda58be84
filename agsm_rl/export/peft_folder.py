"""PEFT's own form: OUT/unet (or OUT/transformer) with adapter_config.json and adapter_model.safetensors.

`PeftModel.from_pretrained(pipe.unet, OUT/unet)` reads it. It is the only form of other tools that holds every kind of
adapter that PEFT has, such as OFT; like them it holds one set of weights, the positive bank.
"""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from agsm_rl.adapters.lora_config import PARTS
from agsm_rl.adapters.lora_export import TEXT_PREFIX, export_configs, layers_of, name_in_file
from agsm_rl.adapters.lora_files import CONFIG_FILE
from agsm_rl.adapters.lora_names import PEFT_PREFIX
from agsm_rl.errors import UserError
from agsm_rl.export.attach import write_export
from agsm_rl.files import write_text

WEIGHTS = "adapter_model.safetensors"


def write_peft(tensors: dict[str, Tensor], metadata: dict[str, str], folder: Path) -> list[Path]:
    """Write the positive bank of an exported LoRA, LoKr, LoHa or OFT; the files.

    UserError for text encoders, and if the folder holds another adapter's parts, which would be read with it.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"OUT {folder}: this is a file; with --to peft it must be a folder.")
    configs = export_configs(metadata, title=metadata["kind"])
    if others := [part for part in PARTS if part not in configs and (folder / part / CONFIG_FILE).exists()]:
        raise UserError(
            f"OUT {folder}: holds {', '.join(others)} of another adapter, which this one does not change. Delete it, "
            "or choose another folder."
        )
    if text := [part for part in configs if part.startswith(TEXT_PREFIX)]:
        raise UserError(
            f"--to peft: the adapter changes {', '.join(text)} too, whose layers have other names in each version of "
            "transformers, and PEFT passes over those that it does not find. agsm_rl.attach() takes the adapter as is."
        )
    files = []
    for part, options in configs.items():
        target = folder / part
        target.mkdir(parents=True, exist_ok=True)
        named = {
            f"{PEFT_PREFIX}{name_in_file(f'{layer}.{role}').removeprefix(f'{part}.')}": tensor
            for layer, roles in layers_of(tensors).items()
            if layer.partition(".")[0] == part
            for role, tensor in roles.items()
        }
        write_text(
            target / CONFIG_FILE, json.dumps(_config(metadata["kind"], options), indent=2, sort_keys=True) + "\n"
        )
        write_export(target / WEIGHTS, named, {"format": "pt"})
        files += [target / CONFIG_FILE, target / WEIGHTS]
    return files


def _config(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """The description that PEFT itself would write: all of its options."""
    import peft

    kinds = {"lora": peft.LoraConfig, "lokr": peft.LoKrConfig, "loha": peft.LoHaConfig, "oft": peft.OFTConfig}
    described = kinds[kind](**options).to_dict()
    return {name: sorted(value) if isinstance(value, set) else value for name, value in described.items()}
