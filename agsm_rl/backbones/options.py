"""The options that every backbone has: declared here alone; nothing of diffusers is imported for it.

A new one is a field of `Options` with its text, a line in `FrozenPipeline` (or `load_pipeline`) that heeds it, and its
first default (recipe/first_defaults.yaml). Options of a single kind are arguments of that kind's constructor; null is
their default, and means what is usual for the kind.
"""

from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator

from agsm_rl.training.sizes import PictureSize


def check_device(device: str | torch.device) -> str | torch.device:
    """`device` if torch knows such a device; ValueError otherwise. Whether this machine has one is not checked."""
    try:
        torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"'{device}' is not a device; use cpu, cuda, cuda:1 or mps, or leave it out") from error
    return device


Device = Annotated[str | torch.device, AfterValidator(check_device)]


@dataclass(frozen=True)
class Options:
    """Where a backbone comes from and how it is loaded.

    Args:
        checkpoint: A pipeline folder, a hub id, a single .safetensors file, or a builtin base (`builtin:shapes-sd15`).
            A folder's files may all be of one variant, such as fp16.
        resolution: Pixels per side, or [height, width]. Null is the checkpoint's own (512 for SD1.5, 1024 for SDXL and
            SD3).
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
        memory_format: U-Nets only: `channels_last` lays out the convolutions of the U-Net and the VAE as a GPU's tensor
            cores take them in half precision, with the same results within rounding. Null is torch's own layout.
        scheduler: U-Nets only: `ddim` draws pictures by DDIM on the checkpoint's noise schedule, as AGSM's authors do.
            Null is the checkpoint's scheduler (PNDM for SD1.5, Euler for SDXL). Rollouts are drawn by DDIM either way.
        quantize: Keeps the linear layers of the denoiser's blocks and of the text encoders in few bits: `int8` or `fp8`
            (8 bits, by torchao), or `nf4` (about 4.1 bits, by bitsandbytes, on a CUDA GPU only). Adapters are trained
            in float32 on top. Needs `pip install 'agsm-rl[quantize]'` (docs/models.md).
        compile: torch.compile's mode for the denoiser, or `regional`: its repeated blocks one by one (diffusers'
            compile_repeated_blocks), which compiles much faster, and also works with gradient_checkpointing.
            `reduce-overhead` uses CUDA graphs (not yet tried on a GPU). It pays on long runs: the first steps take
            minutes. Where nothing can be compiled (a CPU without a C++ compiler), a warning says so and the option is
            ignored. A draw and the step that learns from it round differently: for a policy gradient in half precision,
            let the rollouts `keep_graph`.
        text: `{keep: load | offload | cache}`. `load`: the text encoders stay on the device. `offload`: they wait on
            the CPU while they are not in use. `cache`: besides, each prompt is encoded once and kept on the disk, and
            their weights are dropped as soon as no new prompts come. Null is `load`. Not with a LoRA on text encoders.
        cpu_offload: `model`: the VAE and the text encoders wait on the CPU while they are not in use (as in diffusers'
            enable_model_cpu_offload; the denoiser stays).
        vae_slicing: Encode and decode image by image (diffusers' enable_slicing): less memory.
        vae_tiling: Encode and decode large images tile by tile (diffusers' enable_tiling): much less memory; the tiles'
            seams are blended, so images differ slightly.
        attention: The attention kernel of the denoiser by diffusers' name, such as `flash`, `_flash_3`, `xformers` or
            `native`. Null is torch's own choice. `agsm-rl check` tries it on this machine.
        allow_tf32: Multiply float32 matrices in TF32 on GPUs that can: faster, with 10 bits in place of 23. It holds
            for the whole process.
    """

    checkpoint: str
    _: KW_ONLY
    resolution: PictureSize | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    gradient_checkpointing: bool = False
    device: Device | None = None
    local_files_only: bool = False
    unet: str | None = None
    transformer: str | None = None
    lora: str | None = None
    config: str | None = None
    memory_format: Literal["channels_last"] | None = None
    scheduler: Literal["ddim"] | None = None
    quantize: Literal["nf4", "int8", "fp8"] | None = None
    compile: Literal["default", "reduce-overhead", "regional"] | None = None
    text: dict[Literal["keep"], Literal["load", "offload", "cache"]] | None = None
    cpu_offload: str | None = None
    vae_slicing: bool = False
    vae_tiling: bool = False
    attention: str | None = None
    allow_tf32: bool = False
