"""What LoRA, LoKr, LoHa and OFT share: an adapter of PEFT's on the denoiser and, optionally, on the text encoders.

A bank is a named PEFT adapter; switching banks sets each layer's list of active adapters. With none of ours active, a
layer returns its base layer's output unchanged. Other people's adapters on the same layers are left as they are.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from agsm_rl.adapters.lora_config import METADATA_KEY, LoraScale, module_names
from agsm_rl.adapters.lora_export import TEXT_PREFIX, describe_adapter, export_configs, exported_name
from agsm_rl.adapters.lora_files import NEGATIVE_PREFIX
from agsm_rl.adapters.peft_layers import (
    add,
    apply_by_row,
    layer_parameters,
    only_adds,
    remove,
    set_active,
    tuner_layers,
)
from agsm_rl.adapters.text_layers import layers_that_act
from agsm_rl.errors import UserError
from agsm_rl.interfaces import Backbone, Bank, Banks
from agsm_rl.training.guidance import GuidanceBank, GuidancePrompt, check_form
from agsm_rl.training.names import free_name

BANKS: tuple[Bank, Bank] = ("positive", "negative")
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""The default of `target_modules`: the attention projections, under the names that the backbone declares."""
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""CLIP's attention projections, as in diffusers' own training scripts."""


class PeftAdapter:
    """An adapter whose layers PEFT makes. A kind of it names itself and PEFT's class, and gives its options.

    Args:
        banks: 1 uses the same bank for positive and negative prompts; 2 gives the negative prompts a separate bank.
        target_modules: Name suffixes of the denoiser's modules to change. The default is the attention projections, as
            in diffusers' scripts and DDPO; FLUX.2 adds its fused ones, for which write longer names (attn.to_q, …) to
            leave them out. It leaves out those of SD3's text stream (add_q_proj, add_k_proj, add_v_proj, to_add_out).
        text_encoders: Also change the attention projections of the CLIPs, with the same options. Prompts are then
            re-encoded for each prediction. Layers that do not affect the output (the last of SDXL's first CLIP) are
            left out. SD3's T5 is never changed: `pipe.load_lora_weights` cannot load adapters for it.
        guidance_bank: Bank of guidance's unconditional branch wherever pictures are drawn with this adapter; kept in
            the exported file. `negative` needs `banks: 2`, and is not for `text_encoders: true`.
        guidance_prompt: Prompt of that branch, `empty`, or with `guidance_bank: negative` also the `same` prompt.
    """

    kind: ClassVar[str]
    title: ClassVar[str]
    """Its name in messages."""
    config_class: ClassVar[str]
    """The name of PEFT's class of its options."""
    seed: int = 0
    """Seed of the initial values, for kinds that draw any."""
    mixes_banks: ClassVar[bool] = False
    needs_weights: bool = False
    """Whether it makes whole weights, which a layer must have in their own shape: not packed in 4 bits."""
    only_adds: bool = True
    """Whether it adds to a layer's output, so that it shares layers with others in any order."""
    scale: LoraScale | None = None
    """Rank and alpha by layer, of the kinds that have them."""

    def __init__(
        self,
        *,
        banks: int = 1,
        target_modules: tuple[str, ...] = TARGETS,
        text_encoders: bool = False,
        guidance_bank: GuidanceBank = "positive",
        guidance_prompt: GuidancePrompt = "empty",
    ) -> None:
        if banks not in (1, 2):
            raise UserError(f"{self.kind}.banks: {banks}; allowed: 1, 2.")
        self.banks = banks
        self.target_modules = tuple(target_modules)
        self.changes_text = text_encoders
        self.guidance_bank, self.guidance_prompt = guidance_bank, guidance_prompt
        check_form(guidance_bank, guidance_prompt, self, where=f"{self.kind}.")
        self.bank: Bank | Banks | None = None
        self._backbone: Backbone | None = None
        self._of_export = False
        self._text_of_export: dict[str, tuple[str, ...]] = {}
        self._text_targets: dict[str, tuple[str, ...]] = {}
        self._denoiser_targets = self.target_modules
        self._models: dict[str, Any] = {}
        self._layers: dict[str, Any] = {}
        self._names: list[str] = []
        self._active: tuple[str, ...] = ()
        self._row_hooks: list[Any] = []

    def _config(self, part: str, targets: Sequence[str], layers: Mapping[str, str]) -> Any:
        """PEFT's options for the modules whose names end with `targets`.

        layers: those modules' names in the model, and by which name a file calls them.
        """
        import peft  # a recipe is checked before PEFT is loaded, which takes seconds

        return getattr(peft, self.config_class)(**self._described(part, targets, layers))

    def _prepared(self, layer: Any, bank: str) -> None:
        """Called for each new layer and bank, whose parameters are in float32 by then."""

    def _described(self, part: str, targets: Sequence[str], layers: Mapping[str, str]) -> dict[str, Any]:
        """PEFT's options of one part of a pipeline as an export's metadata has them; `layers` as for `_config`."""
        raise NotImplementedError

    @classmethod
    def _options(cls, tensors: Mapping[str, Tensor], configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """The constructor's own options for an export, from its metadata by part of the pipeline."""
        raise NotImplementedError

    def _check_export(self, tensors: Mapping[str, Tensor], configs: Mapping[str, Mapping[str, Any]]) -> None:
        """UserError if an export whose tensors fit means something else by them."""

    @classmethod
    def from_export(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Self:
        """An adapter with an export's shape: attach it, then fill it with `load_export`."""
        configs = export_configs(metadata, title=cls.title)
        targets = {
            part: module_names(config.get("target_modules"), f"{cls.title}: {part}.target_modules")
            for part, config in configs.items()
        }
        denoisers = {*targets} & {"unet", "transformer"}
        if len(denoisers) != 1:
            raise UserError(
                f"{cls.title}: the file's metadata describes {', '.join(map(repr, targets)) or 'nothing'}; it should "
                "describe one denoiser: unet or transformer."
            )
        options = cls._options(tensors, configs)
        common = {
            "banks": 2 if any(name.startswith(NEGATIVE_PREFIX) for name in tensors) else 1,
            "target_modules": targets.pop(denoisers.pop()),
            "text_encoders": bool(targets),
            "guidance_bank": cast(GuidanceBank, metadata.get("guidance_bank", "positive")),
            "guidance_prompt": cast(GuidancePrompt, metadata.get("guidance_prompt", "empty")),
        }
        adapter = cls(**(common | options))
        adapter._of_export, adapter._text_of_export = True, targets
        return adapter

    def attach(self, backbone: Backbone) -> None:
        """Add one PEFT adapter per bank; UserError if no module's name ends with one of `target_modules`."""
        if self._backbone is not None:
            raise RuntimeError(f"this {self.title} is already attached; detach it first")
        self._denoiser_targets = self._targets_on(backbone)
        self._models = self._find_models(backbone)
        self._check_patterns()
        self._check_sharing()
        self._check_weights()
        taken = {name for model in self._models.values() for name in getattr(model, "peft_config", {})}
        self._names = [free_name(bank, taken) for bank in BANKS[: self.banks]]
        # PEFT would put the adapters of a meta-device base on the CPU.
        device = torch.device("meta") if backbone.device.type == "meta" else nullcontext()
        with self._removed_on_error(), torch.random.fork_rng(devices=[]), device:
            torch.random.default_generator.manual_seed(self.seed)
            for part, model in self._models.items():
                add(model, partial(self._config, part, self._targets(part), self._targeted(part)), self._names)
        self._backbone = backbone
        self._layers = {
            parameter_name(part, model, name): layer
            for part, model in self._models.items()
            for name, layer in tuner_layers(model)
            if any(layer_parameters(layer, self._names[0]))
        }
        for _, parameter in self.named_parameters():
            parameter.data = parameter.data.float()  # trained in float32 on a base of any dtype
        for layer in self._layers.values():
            for name in self._names:
                self._prepared(layer, name)
        for _, parameter in self.named_parameters():
            parameter.requires_grad_(True)
        self._active = ()
        self._switch("positive")
        backbone.adapters.append(self)

    @contextmanager
    def _removed_on_error(self) -> Iterator[None]:
        """Turn PEFT's refusal of a module into a UserError, and leave the models as they were."""
        try:
            yield
        except (TypeError, ValueError) as error:
            for model in self._models.values():
                remove(model, self._names)
            raise UserError(f"{self.kind}.target_modules: PEFT cannot put a {self.title} there ({error}).") from error

    def _find_models(self, backbone: Backbone) -> dict[str, Any]:
        """The models to change, by their names in the pipeline; the denoiser comes first."""
        denoiser = backbone.denoiser
        if not any(_ends_with(name, self._denoiser_targets) for name, _ in denoiser.named_modules()):
            raise UserError(
                f"{self.kind}.target_modules: no module of the {type(denoiser).__name__} is called "
                f"{', '.join(self.target_modules[:8])}; its attention projections are "
                f"{', '.join(backbone.lora_targets[:5])}."
            )
        text_encoders = backbone.text_encoders
        if self.changes_text:
            self._text_targets = self._text_of_export or {
                name: layers_that_act(backbone, name, TEXT_TARGETS) for name in text_encoders
            }
        if self.changes_text and not ({*self._text_targets} <= {*text_encoders} and text_encoders):
            raise UserError(
                f"{self.kind}.text_encoders: got {', '.join(self._text_targets) or 'true'}; text encoders of this base "
                f"that can take a LoRA: {', '.join(text_encoders) or 'none'}."
            )
        return {_denoiser_name(backbone): denoiser} | {name: text_encoders[name] for name in self._text_targets}

    def _check_patterns(self) -> None:
        """UserError for a rank or an alpha of layers that are not changed, such as one with a typo in its name."""
        layers = [f"{part}.{name}" for part in self._models for name in self._targeted(part).values()]
        if self._of_export or self.scale is None:  # `load_export` says so of a file for another base
            return
        if unused := self.scale.unused(layers):
            option = "rank_pattern" if unused[0] in self.scale.rank_pattern else "alpha_pattern"
            raise UserError(
                f"{self.kind}.{option}: no module that the {self.title} changes has a name that ends in '{unused[0]}'; "
                f"the first of them is {layers[0]}."
            )

    def _check_sharing(self) -> None:
        """UserError for layers with another adapter if the two act differently by their order."""
        for part in self._models:
            layers = dict(tuner_layers(self._models[part]))
            for name in self._targeted(part):
                if name in layers and not (self.only_adds and only_adds(layers[name])):
                    others = ", ".join(sorted(layers[name]._get_available_adapters()))
                    raise UserError(
                        f"{self.kind}: {part}.{name} already has an adapter ({others}). DoRA and OFT do not add to a "
                        "layer's output but change it, so what they do together would depend on their order. Give one "
                        "of them other `target_modules`."
                    )

    def _check_weights(self) -> None:
        """UserError for layers whose weights are packed, if this kind of adapter cannot do with that."""
        for part, model in self._models.items() if self.needs_weights else ():
            for name in self._targeted(part):
                layer: Any = model.get_submodule(name)
                weight = getattr(layer, "weight", None)
                whole = (getattr(layer, "out_features", None), getattr(layer, "in_features", None))
                if isinstance(layer, nn.Linear) and weight is not None and tuple(weight.shape) != whole:
                    raise UserError(
                        f"{self.kind}: the weight of {part}.{name} is packed in few bits, and a {self.title} needs it "
                        "in its own shape. Use `lora` without `use_dora`, or another `backbone.quantize`."
                    )

    def _targets(self, part: str) -> tuple[str, ...]:
        return self._text_targets.get(part, self._denoiser_targets)

    def _targets_on(self, backbone: Backbone) -> tuple[str, ...]:
        """The denoiser's targets: by default those that the backbone declares."""
        return backbone.lora_targets if self.target_modules == TARGETS and not self._of_export else self.target_modules

    def _targeted(self, part: str) -> dict[str, str]:
        """The modules of a part to change, by their names in it; the values are their names in files."""
        model = self._models[part]
        names = [name for name, _ in model.named_modules() if _ends_with(name, self._targets(part))]
        return {name: parameter_name(part, model, name).removeprefix(f"{part}.") for name in names}

    def detach(self) -> None:
        """Delete our adapters; if no others remain, restore the original modules."""
        if self._backbone is None:
            return
        self._switch(None)
        for model in self._models.values():
            remove(model, self._names)
        self._backbone.adapters.remove(self)
        self._backbone, self._layers, self._models = None, {}, {}

    def places(self, backbone: Backbone) -> list[str]:
        """The denoiser's modules whose names end with one of the targets."""
        targets = self._targets_on(backbone)
        return [name for name, _ in backbone.denoiser.named_modules() if _ends_with(name, targets)]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """`<bank>.<module>.<PEFT's name>`, such as `….lora_A` (rank, in); text encoders' modules begin with theirs."""
        for bank, peft_name in zip(BANKS, self._names, strict=False):
            for name, layer in self._layers.items():
                for role, parameter in layer_parameters(layer, peft_name):
                    yield f"{bank}.{name}.{role}", parameter

    @contextmanager
    def using(self, bank: Bank | Banks | None) -> Iterator[None]:
        """Apply this bank within the block, or each row's; None applies none.

        With one bank per row, both are computed for all rows; ValueError for an adapter of text encoders, which see
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
        mixed = len(selected) > 1
        if selected != self._active:
            for layer in self._layers.values():
                others = [name for name in layer.active_adapters if name not in self._names]
                ours = selected if hasattr(layer, "lora_A") else selected[:1]
                # They are added up in this order, which must not depend on what was switched before, or a resumed run
                # would round differently. The newest first, as it was after the first switch when this was not fixed.
                set_active(layer, sorted([*others, *ours], reverse=True))
        self._row_hooks = [hook for layer in self._layers.values() if mixed for hook in apply_by_row(layer, by_row)]
        self._active, self.bank = selected, bank

    def export(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The positive bank under PEFT's names, with PEFT's options as metadata; a second bank under `negative.`."""
        if self._backbone is None:
            raise RuntimeError(f"attach the {self.title} before exporting it")
        part = _denoiser_name(self._backbone)
        tensors = {exported_name(name, part): tensor.detach().cpu().clone() for name, tensor in self.named_parameters()}
        configs = {each: self._described(each, self._targets(each), self._targeted(each)) for each in self._models}
        described = describe_adapter(self.kind, configs, banks=self.banks, base=self._backbone.name)
        if self.guidance_bank == "negative":
            described |= {"guidance_bank": self.guidance_bank, "guidance_prompt": self.guidance_prompt}
        return tensors, described

    def load_export(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Fill the parameters; UserError if the layers, rank, alpha or shapes differ."""
        if self._backbone is None:
            raise RuntimeError(f"attach the {self.title} before loading an export")
        part = _denoiser_name(self._backbone)
        parameters = {exported_name(name, part): parameter for name, parameter in self.named_parameters()}
        if odd := sorted(set(parameters) ^ set(tensors)):
            lacking = "the file" if odd[0] in parameters else "this base"
            raise UserError(
                f"{self.title}: {len(odd)} layers do not match; {lacking} has no '{odd[0]}'. The file is for another "
                "base, or has other options."
            )
        for name, parameter in parameters.items():
            if tensors[name].shape != parameter.shape:
                got, expected = tuple(tensors[name].shape), tuple(parameter.shape)
                raise UserError(
                    f"{self.title}: '{name}' has shape {got} in the file, {expected} here (another rank or base)."
                )
        if METADATA_KEY in metadata:
            self._check_export(tensors, export_configs(metadata, title=self.title))
        for name, parameter in parameters.items():
            parameter.data.copy_(tensors[name])


def _ends_with(name: str, targets: tuple[str, ...]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _denoiser_name(backbone: Backbone) -> str:
    return next(name for name, part in backbone.pipeline.components.items() if part is backbone.denoiser)


def parameter_name(part: str, model: nn.Module, name: str) -> str:
    """A layer's name: the denoiser's unchanged; a text encoder's as in files, in every version of transformers."""
    if not part.startswith(TEXT_PREFIX):
        return name
    return f"{part}.{name}" if hasattr(model, "text_model") else f"{part}.text_model.{name}"
