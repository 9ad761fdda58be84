"""A pipeline folder of a published model's size without its weights: enough for `agsm-rl check`, which reads none.

The configurations are those of the published repositories. Tokenizers are the shapes world's, filled up to the
published vocabularies with words that occur in no prompt, so that embeddings have their real size.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerBase


def write_folder(pipeline: Any, folder: Path) -> Path:
    """Write the configurations of a pipeline on the meta device, and weight files that hold nothing."""
    pipeline.save_config(folder)
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            of_diffusers = hasattr(part, "save_config")
            if of_diffusers:
                part.save_config(folder / name)
            else:
                part.config.save_pretrained(folder / name)
            file = "diffusion_pytorch_model.safetensors" if of_diffusers else "model.safetensors"
            save_file({"nothing": torch.zeros(0)}, folder / name / file)
        elif part is not None:
            part.save_pretrained(folder / name)
        if isinstance(part, PreTrainedTokenizerBase):
            encoder = getattr(pipeline, name.replace("tokenizer", "text_encoder"))
            fill_vocabulary(folder / name / "tokenizer.json", encoder.get_input_embeddings().num_embeddings)
    return folder


def fill_vocabulary(file: Path, size: int) -> None:
    """Add words to a saved tokenizer until it has `size`."""
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    taken = {token["id"] for token in content["added_tokens"]}
    if isinstance(vocabulary, list):
        vocabulary += [[f"filler{number}", -1e4] for number in range(len(vocabulary), size)]
    else:
        taken |= set(vocabulary.values())
        vocabulary |= {f"filler{number}": number for number in range(size) if number not in taken}
    file.write_text(json.dumps(content), encoding="utf-8")
