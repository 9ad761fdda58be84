"""LoRA on the denoiser's attention and, optionally, on the text encoders', through PEFT (arXiv 2106.09685).

A bank is a named PEFT adapter; switching banks sets each layer's list of active adapters. With none of ours active, a
layer returns its base layer's output unchanged. Other people's adapters on the same layers are left as they are.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from agsm_rl.adapters.lora_config import METADATA_KEY, check_alpha, module_names
from agsm_rl.adapters.lora_export import (
    KIND,
    TEXT_PREFIX,
    describe_lora,
    export_configs,
    exported_name,
    rank_and_alpha,
)
from agsm_rl.adapters.lora_files import NEGATIVE_PREFIX
from agsm_rl.adapters.text_layers import layers_that_act
from agsm_rl.errors import UserError
from agsm_rl.interfaces import Backbone, Bank, Banks
from agsm_rl.training.guidance import GuidanceBank, GuidancePrompt, check_form
from agsm_rl.training.names import free_name

BANKS: tuple[Bank, Bank] = ("positive", "negative")
MAX_RANK = 4096
"""Wider than the layers themselves; a typo here would allocate all memory."""
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""CLIP's attention projections, as in diffusers' own training scripts."""


class LoRA:
    """Low-rank additions (alpha / rank)·B·A to linear layers; B starts at 0, so training starts from the base model.

    Args:
        rank: Rank of the additions, 1 or more.
        alpha: Scale times rank. Null means the rank: a scale of 1, as in diffusers' own training scripts.
        banks: 1 uses the same bank for positive and negative prompts; 2 gives the negative prompts a separate bank.
        target_modules: Name suffixes of the denoiser's modules to change. The default is the attention projections, as
            in diffusers' scripts and DDPO. It leaves out those of SD3's text stream (add_q_proj, add_k_proj,
            add_v_proj, to_add_out).
        text_encoders: Also change the attention projections of the CLIPs, with the same rank and alpha. Prompts are
            then re-encoded for each prediction. Layers that do not affect the output (the last of SDXL's first CLIP)
            are left out. SD3's T5 is never changed: `pipe.load_lora_weights` cannot load a LoRA for it.
        seed: Seed of the initial A, drawn from N(0, 1 / rank²).
        guidance_bank: Bank of guidance's unconditional branch wherever pictures are drawn with this LoRA; kept in the
            exported file. `negative` needs `banks: 2`, and is not for `text_encoders: true`.
        guidance_prompt: Prompt of that branch, `empty`, or with `guidance_bank: negative` also the `same` prompt.
    """

    kind: ClassVar[str] = KIND
    mixes_banks: ClassVar[bool] = False

    def __init__(
        self,
        *,
        rank: int = 8,
        alpha: float | None = None,
        banks: int = 1,
        target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0"),
        text_encoders: bool = False,
        seed: int = 0,
        guidance_bank: GuidanceBank = "positive",
        guidance_prompt: GuidancePrompt = "empty",
    ) -> None:
        if not 1 <= rank <= MAX_RANK:
            raise UserError(f"lora.rank: {rank}; allowed: 1 to {MAX_RANK}.")
        if alpha is not None:
            check_alpha(alpha, "lora.alpha")
        if banks not in (1, 2):
            raise UserError(f"lora.banks: {banks}; allowed: 1, 2.")
        self.rank, self.alpha, self.banks = rank, rank if alpha is None else alpha, banks
        self.target_modules, self.seed = tuple(target_modules), seed
        self.changes_text = text_encoders
        self.guidance_bank, self.guidance_prompt = guidance_bank, guidance_prompt
        check_form(guidance_bank, guidance_prompt, self, where="lora.")
        self.bank: Bank | Banks | None = None
        self._backbone: Backbone | None = None
        self._text_of_export: dict[str, tuple[str, ...]] = {}
        self._text_targets: dict[str, tuple[str, ...]] = {}
        self._models: dict[str, Any] = {}
        self._layers: dict[str, Any] = {}
        self._names: list[str] = []
        self._active: tuple[str, ...] = ()
        self._row_hooks: list[Any] = []

    @classmethod
    def from_export(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Self:
        """An adapter with an export's shape: attach it, then fill it with `load_export`."""
        configs = export_configs(metadata)
        targets = {
            part: module_names(config.get("target_modules"), f"LoRA: {part}.target_modules")
            for part, config in configs.items()
        }
        denoisers = {*targets} & {"unet", "transformer"}
        if len(denoisers) != 1:
            raise UserError(
                f"LoRA: the file's metadata describes {', '.join(map(repr, targets)) or 'nothing'}; it should "
                "describe one denoiser: unet or transformer."
            )
        rank, alpha = rank_and_alpha(tensors, configs)
        banks = 2 if any(name.startswith(NEGATIVE_PREFIX) for name in tensors) else 1
        lora = cls(
            rank=rank,
            alpha=alpha,
            banks=banks,
            target_modules=targets.pop(denoisers.pop()),
            text_encoders=bool(targets),
            guidance_bank=cast(GuidanceBank, metadata.get("guidance_bank", "positive")),
            guidance_prompt=cast(GuidancePrompt, metadata.get("guidance_prompt", "empty")),
        )
        lora._text_of_export = targets
        return lora

    def attach(self, backbone: Backbone) -> None:
        """Add one PEFT adapter per bank; UserError if no module's name ends with one of `target_modules`."""
        if self._backbone is not None:
            raise RuntimeError("this LoRA is already attached; detach it first")
        self._models = self._find_models(backbone)
        taken = {name for model in self._models.values() for name in getattr(model, "peft_config", {})}
        self._names = [free_name(bank, taken) for bank in BANKS[: self.banks]]
        # PEFT would put the adapters of a meta-device base on the CPU.
        device = torch.device("meta") if backbone.device.type == "meta" else nullcontext()
        with torch.random.fork_rng(devices=[]), device:
            torch.random.default_generator.manual_seed(self.seed)
            for part, model in self._models.items():
                self._add(model, self._text_targets.get(part, self.target_modules))
        self._layers = {
            _parameter_name(part, model, name): layer
            for part, model in self._models.items()
            for name, layer in _tuner_layers(model)
            if self._names[0] in layer.lora_A
        }
        self._backbone = backbone
        for _, parameter in self.named_parameters():
            parameter.data = parameter.data.float()  # trained in float32 on a base of any dtype
            parameter.requires_grad_(True)
        self._switch("positive")
        backbone.adapters.append(self)

    def _find_models(self, backbone: Backbone) -> dict[str, Any]:
        """The models to change, by their names in the pipeline; the denoiser comes first."""
        denoiser = backbone.denoiser
        if not any(_ends_with(name, self.target_modules) for name, _ in denoiser.named_modules()):
            raise UserError(
                f"lora.target_modules: no module of the {type(denoiser).__name__} is called "
                f"{', '.join(self.target_modules[:8])}; its attention projections are to_q, to_k, to_v, to_out.0."
            )
        text_encoders = backbone.text_encoders
        if self.changes_text:
            self._text_targets = self._text_of_export or {
                name: layers_that_act(backbone, name, TEXT_TARGETS) for name in text_encoders
            }
        if self.changes_text and not ({*self._text_targets} <= {*text_encoders} and text_encoders):
            raise UserError(
                f"lora.text_encoders: got {', '.join(self._text_targets) or 'true'}; text encoders of this base that "
                f"can take a LoRA: {', '.join(text_encoders) or 'none'}."
            )
        return {_denoiser_name(backbone): denoiser} | {name: text_encoders[name] for name in self._text_targets}

    def _add(self, model: Any, targets: tuple[str, ...]) -> None:
        """Add our adapters to one model, all switched off; everyone else's stay as they were."""
        from peft import LoraConfig  # here and below: a recipe is checked before PEFT is loaded, which takes seconds

        active = {name: list(layer.active_adapters) for name, layer in _tuner_layers(model)}
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        config = {"r": self.rank, "lora_alpha": self.alpha, "target_modules": list(targets)}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are intended
            for name in self._names:
                model.add_adapter(LoraConfig(**config, init_lora_weights="gaussian"), adapter_name=name)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for name, layer in _tuner_layers(model):  # PEFT has just switched everyone else's off
            _set_active(layer, active.get(name, []))

    def detach(self) -> None:
        """Delete our adapters; if no others remain, restore the original modules."""
        if self._backbone is None:
            return
        self._switch(None)
        for model in self._models.values():
            _delete(model, self._names)
        self._backbone.adapters.remove(self)
        self._backbone, self._layers, self._models = None, {}, {}

    def places(self, backbone: Backbone) -> list[str]:
        """The modules whose names end with one of `target_modules`."""
        return [name for name, _ in backbone.denoiser.named_modules() if _ends_with(name, self.target_modules)]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """`<bank>.<module>.lora_A` (rank, in) and `….lora_B` (out, rank); text encoders' begin with theirs."""
        for bank, peft_name in zip(BANKS, self._names, strict=False):
            for name, layer in self._layers.items():
                yield f"{bank}.{name}.lora_A", layer.lora_A[peft_name].weight
                yield f"{bank}.{name}.lora_B", layer.lora_B[peft_name].weight

    @contextmanager
    def using(self, bank: Bank | Banks | None) -> Iterator[None]:
        """Apply this bank within the block, or each row's; None applies none.

        With one bank per row, both are computed for all rows; ValueError for a LoRA on text encoders, which see
        prompts in place of rows.
        """
        previous = self.bank
        self._switch(bank)
        try:
            yield
        finally:
            self._switch(previous)

    def recall(self) -> AbstractContextManager[None]:
        """A context manager to enter later that restores the current bank."""
        return self.using(self.bank)

    def _switch(self, bank: Bank | Banks | None) -> None:
        if isinstance(bank, tuple) and self.changes_text:
            raise ValueError("text encoders see prompts in place of rows, so their LoRA cannot use one bank per row")
        for hook in self._row_hooks:
            hook.remove()
        banks = bank if isinstance(bank, tuple) else () if bank is None else (bank,)
        by_row = [self._names[BANKS.index(each) % self.banks] for each in banks]
        selected = tuple(dict.fromkeys(by_row))
        if selected != self._active:
            for layer in self._layers.values():
                _set_active(layer, [*(name for name in layer.active_adapters if name not in self._names), *selected])
        # PEFT adds up its active adapters for all rows; those that are not in a bank get 0 of it.
        self._row_hooks = [
            layer.lora_A[name].register_forward_hook(_only(torch.tensor([each == name for each in by_row])))
            for name in (selected if len(selected) > 1 else ())
            for layer in self._layers.values()
        ]
        self._active, self.bank = selected, bank

    def export(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The positive bank as `pipe.load_lora_weights` takes it, with its alpha; a second bank under `negative.`."""
        if self._backbone is None:
            raise RuntimeError("attach the LoRA before exporting it")
        part = _denoiser_name(self._backbone)
        tensors = {exported_name(name, part): tensor.detach().cpu().clone() for name, tensor in self.named_parameters()}
        targets = {part: self.target_modules} | self._text_targets
        described = describe_lora(targets, rank=self.rank, alpha=self.alpha, banks=self.banks, base=self._backbone.name)
        if self.guidance_bank == "negative":
            described |= {"guidance_bank": self.guidance_bank, "guidance_prompt": self.guidance_prompt}
        return tensors, described

    def load_export(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Fill the parameters; UserError if the layers, rank, alpha or shapes differ."""
        if self._backbone is None:
            raise RuntimeError("attach the LoRA before loading an export")
        part = _denoiser_name(self._backbone)
        parameters = {exported_name(name, part): parameter for name, parameter in self.named_parameters()}
        if odd := sorted(set(parameters) ^ set(tensors)):
            lacking = "the file" if odd[0] in parameters else "this base"
            raise UserError(
                f"LoRA: {len(odd)} layers do not match; {lacking} has no '{odd[0]}'. The file is for another base."
            )
        for name, parameter in parameters.items():
            if tensors[name].shape != parameter.shape:
                got, expected = tuple(tensors[name].shape), tuple(parameter.shape)
                raise UserError(f"LoRA: '{name}' has shape {got} in the file, {expected} here (another rank or base).")
        if METADATA_KEY in metadata:
            _, alpha = rank_and_alpha(tensors, export_configs(metadata))
            if alpha != self.alpha:
                raise UserError(
                    f"LoRA: alpha is {alpha:g} in the file, {self.alpha:g} here: its weights would be applied at "
                    f"{self.alpha / alpha:g} times their strength. Set `alpha: {alpha:g}`."
                )
        for name, parameter in parameters.items():
            parameter.data.copy_(tensors[name])


def _only(rows: Tensor) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """A hook that puts 0 in the place of all rows of a module's output but these, [B]."""

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if len(output) != len(rows):
            raise ValueError(f"{len(rows)} banks for {len(output)} rows")
        return output * rows.to(output).view(-1, *[1] * (output.ndim - 1))

    return keep


def _tuner_layers(model: nn.Module) -> list[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def _delete(model: Any, names: list[str]) -> None:
    """Delete PEFT adapters; if no others remain, restore the original modules."""
    from diffusers.utils import recurse_remove_peft_layers
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        model.delete_adapter(names)
        if not getattr(model, "peft_config", None):
            recurse_remove_peft_layers(model)
        return
    model.delete_adapters(names)
    if not getattr(model, "peft_config", None):
        model.unload_lora()


def _set_active(layer: Any, names: list[str]) -> None:
    """PEFT's switch without its side effect on requires_grad: all banks need gradients at once."""
    flags = [(parameter, parameter.requires_grad) for parameter in layer.parameters()]
    layer.set_adapter(names)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


def _ends_with(name: str, targets: tuple[str, ...]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _denoiser_name(backbone: Backbone) -> str:
    return next(name for name, part in backbone.pipeline.components.items() if part is backbone.denoiser)


def _parameter_name(part: str, model: nn.Module, name: str) -> str:
    """A layer's name: the denoiser's unchanged; a text encoder's as in files, in every version of transformers."""
    if not part.startswith(TEXT_PREFIX):
        return name
    return f"{part}.{name}" if hasattr(model, "text_model") else f"{part}.text_model.{name}"
