"""What the options of all backbones mean, and what a device may be; nothing of diffusers is imported for it."""

from inspect import cleandoc
from typing import Annotated, Any, TypeVar

import torch
from pydantic import AfterValidator

Documented = TypeVar("Documented", bound=Any)

OPTIONS = """
Args:
    checkpoint: A pipeline folder, a hub id, a single .safetensors file, or a builtin base (`builtin:shapes-sd15`).
        A folder's files may all be of one variant, such as fp16.
    resolution: Pixels per side. Null is the checkpoint's own (512 for SD1.5, 1024 for SDXL and SD3).
    dtype: Data type of the frozen weights. Latents and predictions keep the caller's, float32, which the losses
        need.
    gradient_checkpointing: Compute activations again in the backward pass instead of keeping them: slower, less
        memory.
    device: Null is the first GPU where there is one, else the CPU. `meta`: shapes alone, no weights are read.
    local_files_only: Never ask the hub.
    unet, transformer: A folder or hub id whose denoiser replaces the checkpoint's (of a denoiser, or of a
        pipeline).
    lora: A file, folder or hub id that `pipe.load_lora_weights` takes. It is fused into the weights, and so frozen.
    config: For a single file, the pipeline folder or hub id of its configuration; null is the hub's usual one. Text
        encoders that an SD3 file leaves out are taken from there too.
    t5_length: SD3 only: tokens that the T5 reads, padding included (diffusers' max_sequence_length). Null is 256,
        diffusers' own. Fewer are faster; a plain pipeline must be given the same number to draw the same picture.
    memory_format: U-Nets only: `channels_last` lays out the convolutions of the U-Net and the VAE as a GPU's tensor
        cores take them in half precision, with the same results within rounding. Null is torch's own layout.
    scheduler: U-Nets only: `ddim` draws pictures by DDIM on the checkpoint's noise schedule, as AGSM's authors do.
        Null is the checkpoint's scheduler (PNDM for SD1.5, Euler for SDXL). Rollouts are drawn by DDIM either way.
    compile: torch.compile's mode for the denoiser; `reduce-overhead` uses CUDA graphs (not yet tried on a GPU). It
        pays on long runs: the first steps take minutes. Where nothing can be compiled (a CPU without a C++
        compiler), a warning says so and the option is ignored. Not with gradient_checkpointing. A draw and the step
        that learns from it round differently: for a policy gradient in half precision, let the rollouts
        `keep_graph`.
"""


def with_options(documented: Documented) -> Documented:
    """The same class or function, with the options in its docstring."""
    documented.__doc__ = f"{cleandoc(documented.__doc__ or '')}\n{OPTIONS}"
    return documented


def check_device(device: str | torch.device) -> str | torch.device:
    """`device` if torch knows such a device; ValueError otherwise. Whether this machine has one is not checked."""
    try:
        torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"'{device}' is not a device; use cpu, cuda, cuda:1 or mps, or leave it out") from error
    return device


Device = Annotated[str | torch.device, AfterValidator(check_device)]
