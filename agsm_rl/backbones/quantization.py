"""`backbone.quantize`: a frozen base in few bits, through diffusers' and transformers' quantization configurations.

The linear layers of the denoiser's blocks and of the text encoders are quantised as they are loaded; adapters are
trained in float32 on top. Everything is weight-only: activations keep their precision, so that a picture does not
depend on the others in its batch (bitsandbytes' LLM.int8 picks its outliers by batch, and is not offered for that
reason).

What stays as it is: the VAE, convolutions, norms, embeddings of time, text and latents, and the last projection; in
`nf4`, also what transformers keeps in float32 (T5's `wo`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, Literal, get_args

import diffusers
import torch
import transformers
from torch import nn

from agsm_rl.backbones.model_index import models_of
from agsm_rl.backbones.quantized_layers import count_as_quantized
from agsm_rl.errors import UserError, unknown_name

Quantize = Literal["nf4", "int8", "fp8"]
LIBRARIES: dict[str, tuple[str, tuple[int, int]]] = {
    "nf4": ("bitsandbytes", (0, 46)),
    "int8": ("torchao", (0, 16)),
    "fp8": ("torchao", (0, 16)),
}
"""What quantises in each way, and from which version on."""
IN_A_BLOCK = re.compile(r"\.\d+\.")
KEPT = ("time_emb_proj",)
"""Layers within the denoiser's blocks that are not quantised: a U-Net's time embeddings."""


@dataclass(frozen=True)
class Quantization:
    """How a pipeline's linear layers are stored.

    Args:
        kind: `nf4` (4 bits and an eighth, bitsandbytes), `int8` or `fp8` (8 bits, torchao).
        dtype: The data type of what is not quantised, in which quantised layers compute.
    """

    kind: Quantize
    dtype: torch.dtype

    def covers(self, part: str) -> bool:
        """Whether a part of a pipeline is quantised: the denoiser and the text encoders are."""
        return part.startswith(("unet", "transformer", "text_encoder"))

    def config(self, model_class: Any, empty_model: nn.Module) -> Any:
        """The quantization configuration of diffusers, or of transformers for a model of theirs.

        `empty_model`: the same model without data.
        """
        of_diffusers = issubclass(model_class, diffusers.ModelMixin)
        library = diffusers if of_diffusers else transformers
        kept = self._kept(empty_model) if of_diffusers else None
        if self.kind == "nf4":
            return library.BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=self.dtype,
                bnb_4bit_use_double_quant=True,
                llm_int8_skip_modules=kept,
            )
        return library.TorchAoConfig(self._torchao(), modules_to_not_convert=kept)

    def _torchao(self) -> Any:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

        made = Int8WeightOnlyConfig if self.kind == "int8" else Float8WeightOnlyConfig
        return made(set_inductor_config=False)  # which would change settings of the whole process

    def _kept(self, denoiser: nn.Module) -> list[str]:
        """The denoiser's linear layers that are not quantised, as the library wants them named.

        torchao takes parameters' names. bitsandbytes compares a name with the last part of all others: FLUX's last
        projection cannot be kept without those of its blocks (`proj_out`), and is quantised with them, as in the
        published NF4 checkpoints.
        """
        linear = [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)]
        quantised = [name for name in linear if _is_in_a_block(name)]
        kept = sorted({*linear} - {*quantised})
        if self.kind != "nf4":
            return [f"{name}.weight" for name in kept]
        leaves = {name.rpartition(".")[2] for name in quantised}
        return [name for name in kept if name not in leaves]

    def names(self, model: nn.Module) -> list[str]:
        """The layers that are quantised in a model without data."""
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        if isinstance(model, transformers.PreTrainedModel):
            from transformers.quantizers.base import HfQuantizer
            from transformers.quantizers.quantizers_utils import should_convert_module

            kept = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
            suffix = "" if self.kind == "nf4" else ".weight"  # which is what each library's loader compares
            return [name for name in linear if should_convert_module(name + suffix, kept)]
        kept = [name.removesuffix(".weight") for name in self._kept(model)]
        return [name for name in linear if name not in kept]

    def empty(self, model: nn.Module) -> None:
        """Make the layers of a model on the meta device as large as quantised ones."""
        count_as_quantized(model, self.names(model), self.kind)


def read_quantization(kind: str | None, *, dtype: torch.dtype, device: torch.device) -> Quantization | None:
    """The quantisation that a recipe asks for; UserError if it is not possible here."""
    if kind is None:
        return None
    if kind not in get_args(Quantize):
        raise unknown_name("backbone.quantize", kind, "a quantisation", get_args(Quantize))
    if device.type != "meta":
        _check_installed(kind, device)
    return Quantization(kind, dtype)  # type: ignore[arg-type]


def check_loadable(quantization: Quantization, *, single_file: bool, lora: str | None) -> None:
    """UserError where weights would have to be quantised after they are loaded."""
    kind = quantization.kind
    if lora is not None:
        raise UserError(
            f"backbone.quantize: weights in {kind} cannot be changed, so backbone.lora ('{lora}') cannot be fused into "
            "them. Fuse it first (pipe.load_lora_weights, pipe.fuse_lora, pipe.unload_lora_weights, "
            "pipe.save_pretrained), and give that folder as backbone.checkpoint."
        )
    if single_file:
        raise UserError(
            f"backbone.quantize: {kind} needs the folder or hub id of a pipeline, got a single file. Convert it first: "
            "pipe = THE_PIPELINES_CLASS.from_single_file(…), then pipe.save_pretrained(FOLDER)."
        )


def pipeline_config(kind: Quantize, checkpoint: str, *, dtype: torch.dtype) -> diffusers.PipelineQuantizationConfig:
    """The `quantization_config` with which `DiffusionPipeline.from_pretrained` loads the base that `quantize` means.

    The pipeline is the same, bit for bit: exported adapters can be attached to it. `checkpoint`: the pipeline's folder
    or hub id; `dtype`: that of the pipeline.
    """
    quantization = Quantization(kind, dtype)
    parts = {name: part for name, part in models_of(checkpoint).items() if quantization.covers(name)}
    return diffusers.PipelineQuantizationConfig(
        quant_mapping={name: quantization.config(type(part), part) for name, part in parts.items()}
    )


def _check_installed(kind: str, device: torch.device) -> None:
    package, lowest = LIBRARIES[kind]
    least = ".".join(map(str, lowest))
    try:
        got = version(package)
    except PackageNotFoundError:
        got = ""
    numbers = tuple(int(number) for number in re.findall(r"\d+", got)[:2])
    if not got or numbers < lowest or find_spec(package) is None:
        others = [name for name, (other, _) in LIBRARIES.items() if other != package and find_spec(other)]
        instead = f", or use `quantize: {others[0]}`, whose {LIBRARIES[others[0]][0]} is installed" if others else ""
        raise UserError(
            f"backbone.quantize: {kind} needs {package} {least} or newer; {got or 'none'} is installed. "
            f"pip install 'agsm-rl[quantize]' (or '{package}>={least}'){instead}."
        )
    if kind == "nf4" and device.type != "cuda":
        raise UserError(
            f"backbone.quantize: nf4 needs a CUDA GPU, because diffusers loads bitsandbytes' 4-bit weights on GPUs "
            f"only; got device {device.type}. Use `quantize: int8`, which runs here, or a machine with a GPU."
        )


def _is_in_a_block(name: str) -> bool:
    return bool(IN_A_BLOCK.search(name)) and not name.endswith(KEPT)
