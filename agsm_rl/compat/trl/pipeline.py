"""TRL's pipeline object: a diffusers pipeline, loaded by name, with the adapter that a trainer trains."""

import copy
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError, safe_open
from torch import nn

from agsm_rl.adapters.lora import LoRA
from agsm_rl.adapters.lora_files import read_lora
from agsm_rl.backbones import backbone_of
from agsm_rl.backbones.fused_lora import lora_parts
from agsm_rl.backbones.loading import check_finite, find_checkpoint, load_pipeline
from agsm_rl.compat.trl.whole_denoiser import WholeDenoiser
from agsm_rl.errors import UserError
from agsm_rl.export.attach import LORA_FILE, save_adapters
from agsm_rl.interfaces import Adapter, Backbone
from agsm_rl.policy import Policy

RANK = 4
"""TRL's LoRA: rank and alpha 4, on the attention projections."""


class DDPOStableDiffusionPipeline:
    """The base of TRL's pipelines, for imports and annotations; trainers take `DefaultDDPOStableDiffusionPipeline`."""


class DefaultDDPOStableDiffusionPipeline(DDPOStableDiffusionPipeline):
    """The diffusers pipeline `sd_pipeline`, which draws with the trained weights.

    A `pytorch_lora_weights.safetensors` beside the pipeline is loaded and trained further (`use_lora` is then true, as
    in TRL). Weights are read from safetensors only.

    Args:
        pretrained_model_name: A hub id, a pipeline folder or `builtin:…`, of any kind that our backbones support.
        pretrained_model_revision: The revision on the hub.
        use_lora: Train a LoRA of rank 4 instead of the whole denoiser.

    Attributes:
        policy: What a trainer trains; None until a trainer is constructed.

    Raises UserError if the pipeline cannot be loaded or is of an unsupported kind.
    """

    def __init__(
        self, pretrained_model_name: str, *, pretrained_model_revision: str = "main", use_lora: bool = True
    ) -> None:
        self.pretrained_model, self.pretrained_revision = pretrained_model_name, pretrained_model_revision
        source = find_checkpoint(pretrained_model_name, "pretrained_model_name")
        self.sd_pipeline: Any = _load(source, pretrained_model_revision)
        self._backbone: Backbone = backbone_of(self.sd_pipeline)
        self._lora = _load_lora(self.sd_pipeline, self._backbone.denoiser, source, pretrained_model_revision)
        self.use_lora = use_lora or self._lora is not None
        self.policy: Policy | None = None

    def prepare(self, device: torch.device, dtype: torch.dtype, *, seed: int) -> Policy:
        """Move the pipeline to `device`, cast its frozen weights to `dtype`, and attach the adapter (float32)."""
        if self.policy is not None:
            raise UserError("sd_pipeline: already belongs to another trainer; load it again for this one")
        adapter: Adapter = LoRA(rank=RANK, alpha=RANK, seed=seed) if self.use_lora else WholeDenoiser()
        if self._lora is not None:
            adapter = LoRA(**self._lora[0], seed=seed)
        denoiser = self._backbone.denoiser
        for module in self.sd_pipeline.components.values():
            if isinstance(module, nn.Module):
                module.to(device)
                if dtype != torch.float32 and (self.use_lora or module is not denoiser):
                    module.to(dtype)
        self._backbone = backbone_of(self.sd_pipeline)
        self.policy = Policy(self._backbone, {"lora" if self.use_lora else "denoiser": adapter}, ema_decay=0.0)
        if self._lora is not None:
            adapter.load_export(self._lora[1], {})
            self.policy.update_ema(1)
        return self.policy

    @property
    def unet(self) -> nn.Module:
        """The denoiser (a transformer in SD3)."""
        return self._backbone.denoiser

    @property
    def vae(self) -> Any:
        """The autoencoder."""
        return self.sd_pipeline.vae

    @property
    def tokenizer(self) -> Any:
        """The (first) tokenizer."""
        return self.sd_pipeline.tokenizer

    @property
    def text_encoder(self) -> Any:
        """The (first) text encoder."""
        return self.sd_pipeline.text_encoder

    @property
    def scheduler(self) -> Any:
        """The pipeline's own scheduler; images for training are drawn with the backbone's sampler instead."""
        return self.sd_pipeline.scheduler

    def set_progress_bar_config(self, *args: Any, **kwargs: Any) -> None:
        """Configure the bar of `sd_pipeline`; training has none."""
        self.sd_pipeline.set_progress_bar_config(*args, **kwargs)

    def save_lora(self, output_dir: str | os.PathLike[str]) -> None:
        """Write `pytorch_lora_weights.safetensors` for `load_lora_weights(output_dir)`; does nothing without a LoRA."""
        if self.policy is not None and self.use_lora:
            save_adapters(self.policy.adapters, output_dir, metadata={"checkpoint": self.pretrained_model})

    def save_pretrained(self, output_dir: str | os.PathLike[str]) -> None:
        """Save the whole pipeline without the LoRA, and the LoRA beside it."""
        self.save_lora(output_dir)
        denoiser: Any = self.unet
        name = _denoiser_name(self.sd_pipeline, denoiser)
        plain: Any = denoiser
        if self.policy is not None and self.use_lora:
            plain = copy.deepcopy(denoiser)
            plain.unload_lora()
        try:
            setattr(self.sd_pipeline, name, plain)
            self.sd_pipeline.save_pretrained(output_dir)
        finally:
            setattr(self.sd_pipeline, name, denoiser)


def _load(source: str, revision: str) -> Any:
    """Load and check the pipeline in the same way as a recipe's base."""
    key = "pretrained_model_name"
    try:
        pipeline = load_pipeline(source, dtype=torch.float32, revision=revision, key=key)
    except UserError as error:
        if _is_injected(Path(source)):
            raise UserError(
                f"{key}: '{source}': its U-Net was saved with LoRA layers inside, so it cannot be loaded as a base. "
                f"Copy its {LORA_FILE} into a copy of the original base's folder, and give that folder"
            ) from error
        raise
    check_finite(pipeline, f"{key}: '{source}'")
    return pipeline


def _is_injected(folder: Path) -> bool:
    """Whether TRL's `save_pretrained` wrote LoRA's layers into the U-Net of this folder."""
    with suppress(OSError, SafetensorError):
        for file in folder.glob("unet/*.safetensors"):
            if file.is_file():
                with safe_open(file, framework="pt") as content:
                    if any(".base_layer." in name for name in content.keys()):  # noqa: SIM118 — not a dict
                        return True
    return False


def _load_lora(
    pipeline: Any, denoiser: nn.Module, source: str, revision: str
) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
    """Options and weights of the LoRA beside the pipeline's weights, in any form that lora_names.py knows."""
    file = _lora_beside(source, revision)
    if file is None:
        return None
    where = f"pretrained_model_name: '{source}': {LORA_FILE}"
    placed = read_lora(file, where=where).place(lora_parts(pipeline), where=where)
    part = _denoiser_name(pipeline, denoiser)
    if {*placed} != {part}:
        raise UserError(f"{where}: changes {', '.join(sorted(placed))}; only one of the {part} alone can be trained.")
    shapes = {(addition.rank, addition.alpha) for addition in placed[part].values()}
    if len(shapes) > 1:
        raise UserError(f"{where}: its layers differ in (rank, alpha): {sorted(shapes)}; they must all be equal.")
    weights = {}
    for module, addition in placed[part].items():
        weights[f"{part}.{module}.lora_A.weight"] = addition.down
        weights[f"{part}.{module}.lora_B.weight"] = addition.up
    rank, alpha = shapes.pop()
    return {"rank": rank, "alpha": alpha, "target_modules": tuple(placed[part])}, weights


def _lora_beside(source: str, revision: str) -> Path | None:
    """The LoRA of a pipeline's folder, or of a hub's repository; None where there is none."""
    if Path(source).is_file():
        return None
    if Path(source).is_dir():
        file = Path(source) / LORA_FILE
        return file if file.is_file() else None
    try:
        return Path(hf_hub_download(source, LORA_FILE, revision=revision))
    except (OSError, HTTPError):  # the pipeline itself has just been read from there
        return None


def _denoiser_name(pipeline: Any, denoiser: nn.Module) -> str:
    return "unet" if getattr(pipeline, "unet", None) is denoiser else "transformer"
