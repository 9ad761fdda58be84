"""LoRA on the denoiser's attention, and on the text encoders' where asked, by PEFT (arXiv 2106.09685).

A bank is a named PEFT adapter. Banks are switched by each layer's list of active adapters. With none of ours in it a
layer returns its base layer's output untouched, and adapters of other people's on the same layers stay as they were.
"""

import json
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, Self

import torch
from diffusers.utils import recurse_remove_peft_layers
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from agsm_rl.adapters.lora_config import METADATA_KEY, LoraScale, check_alpha, module_names, options_by_part
from agsm_rl.adapters.lora_files import NEGATIVE_PREFIX
from agsm_rl.adapters.text_layers import layers_that_act
from agsm_rl.errors import UserError
from agsm_rl.interfaces import Backbone, Bank, Banks

BANKS: tuple[Bank, Bank] = ("positive", "negative")
MAX_RANK = 4096
"""Wider than the layers themselves; a slip of the finger would ask for all memory."""
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""CLIP's attention projections, as in diffusers' own training scripts."""
TEXT_PREFIX = "text_encoder"


class LoRA:
    """Low-rank additions (alpha / rank)·B·A to linear layers; B begins at 0, so training begins at the base model.

    Args:
        rank: Rank of the additions, 1 or more.
        alpha: Scale times rank. Null is the rank: a scale of 1, as in diffusers' own training scripts.
        banks: 1, which serves under both names, or 2, which gives the negative prompts a bank of their own.
        target_modules: Ends of the names of the denoiser's modules that are changed. The default is the attention
            projections, as in diffusers' scripts and DDPO. SD3's text stream has others of its own (add_q_proj,
            add_k_proj, add_v_proj, to_add_out), which are not among them.
        text_encoders: Also change the attention projections of the CLIPs, with the same rank and alpha. Prompts are
            then encoded anew for each prediction. Layers that have no say (the last of SDXL's first CLIP) are left out.
            SD3's T5 stays as it is: `pipe.load_lora_weights` has no place for a LoRA of it.
        seed: Seed of the initial A, drawn from N(0, 1 / rank²).
    """

    kind: ClassVar[str] = "lora"
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
        self.bank: Bank | Banks | None = None
        self._backbone: Backbone | None = None
        self._text_of_export: dict[str, tuple[str, ...]] = {}
        self._text_targets: dict[str, tuple[str, ...]] = {}
        self._models: dict[str, Any] = {}
        self._layers: dict[str, Any] = {}
        self._names: list[str] = []
        self._active: str | None = None

    @classmethod
    def from_export(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Self:
        """An adapter of the shape of an export, to be attached and then given it by `load_export`."""
        configs = _configs(metadata)
        targets = {
            part: module_names(config.get("target_modules"), f"LoRA: {part}.target_modules")
            for part, config in configs.items()
        }
        denoisers = {*targets} & {"unet", "transformer"}
        if len(denoisers) != 1:
            raise UserError(
                f"LoRA: the file's metadata describes {', '.join(map(repr, targets)) or 'nothing'}; one denoiser, "
                "unet or transformer, is needed."
            )
        rank, alpha = _rank_and_alpha(tensors, configs)
        banks = 2 if any(name.startswith(NEGATIVE_PREFIX) for name in tensors) else 1
        found = cls(
            rank=rank,
            alpha=alpha,
            banks=banks,
            target_modules=targets.pop(denoisers.pop()),
            text_encoders=bool(targets),
        )
        found._text_of_export = targets
        return found

    def attach(self, backbone: Backbone) -> None:
        """Add a PEFT adapter a bank; UserError if no module's name ends with one of `target_modules`."""
        if self._backbone is not None:
            raise RuntimeError("this LoRA is attached already; detach it first")
        self._models = self._find_models(backbone)
        taken = {name for model in self._models.values() for name in getattr(model, "peft_config", {})}
        self._names = [_free_name(bank, taken) for bank in BANKS[: self.banks]]
        # For a base without memory, PEFT would leave them on the CPU.
        place = torch.device("meta") if backbone.device.type == "meta" else nullcontext()
        with torch.random.fork_rng(devices=[]), place:
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
        """The models to be changed by their names in the pipeline, the denoiser first."""
        denoiser = backbone.denoiser
        if not any(_ends_with(name, self.target_modules) for name, _ in denoiser.named_modules()):
            raise UserError(
                f"lora.target_modules: no module of the {type(denoiser).__name__} is called "
                f"{', '.join(self.target_modules[:8])}; its attention projections are to_q, to_k, to_v, to_out.0."
            )
        there = backbone.text_encoders
        if self.changes_text:
            self._text_targets = self._text_of_export or {
                name: layers_that_act(backbone, name, TEXT_TARGETS) for name in there
            }
        if self.changes_text and not ({*self._text_targets} <= {*there} and there):
            raise UserError(
                f"lora.text_encoders: wanted {', '.join(self._text_targets) or 'some'}; those of this base that take a "
                f"LoRA: {', '.join(there) or 'none'}."
            )
        return {_denoiser_name(backbone): denoiser} | {name: there[name] for name in self._text_targets}

    def _add(self, model: Any, targets: tuple[str, ...]) -> None:
        """Our adapters on one model, all switched off; everyone else's as they were."""
        active = {name: list(layer.active_adapters) for name, layer in _tuner_layers(model)}
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        config = {"r": self.rank, "lora_alpha": self.alpha, "target_modules": list(targets)}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are meant
            for name in self._names:
                model.add_adapter(LoraConfig(**config, init_lora_weights="gaussian"), adapter_name=name)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for name, layer in _tuner_layers(model):  # PEFT has just switched everyone else's off
            _set_active(layer, active.get(name, []))

    def detach(self) -> None:
        """Delete our adapters; when no others are left, put the original modules back."""
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
        """`<bank>.<module>.lora_A` (rank, in) and `….lora_B` (out, rank); text encoders' modules begin with theirs."""
        for bank, peft_name in zip(BANKS, self._names, strict=False):
            for name, layer in self._layers.items():
                yield f"{bank}.{name}.lora_A", layer.lora_A[peft_name].weight
                yield f"{bank}.{name}.lora_B", layer.lora_B[peft_name].weight

    @contextmanager
    def using(self, bank: Bank | Banks | None) -> Iterator[None]:
        """Add this bank's part within the block; None adds nothing. ValueError for a bank a row (`mixes_banks`)."""
        previous = self.bank
        self._switch(bank)
        try:
            yield
        finally:
            self._switch(previous)

    def recall(self) -> AbstractContextManager[None]:
        """A context, to be entered later, with the bank of now."""
        return self.using(self.bank)

    def _switch(self, bank: Bank | Banks | None) -> None:
        if isinstance(bank, tuple):
            raise ValueError("PEFT's active adapters are those of all rows: a LoRA's bank is one for all")
        wanted = None if bank is None else self._names[BANKS.index(bank) % self.banks]
        if wanted != self._active:
            ours = [] if wanted is None else [wanted]
            for layer in self._layers.values():
                _set_active(layer, [name for name in layer.active_adapters if name not in self._names] + ours)
        self._active, self.bank = wanted, bank

    def export(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The positive bank as `pipe.load_lora_weights` takes it, with its alpha; a second bank under `negative.`."""
        if self._backbone is None:
            raise RuntimeError("only an attached LoRA can be exported")
        part = _denoiser_name(self._backbone)
        tensors = {_exported(name, part): tensor.detach().cpu().clone() for name, tensor in self.named_parameters()}
        targets = {part: self.target_modules} | self._text_targets
        return tensors, describe_lora(
            targets, rank=self.rank, alpha=self.alpha, banks=self.banks, base=self._backbone.name
        )

    def load_export(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Fill the parameters; UserError if the layers, the rank, alpha or the shapes are not the same."""
        if self._backbone is None:
            raise RuntimeError("only an attached LoRA can be filled")
        part = _denoiser_name(self._backbone)
        places = {_exported(name, part): parameter for name, parameter in self.named_parameters()}
        if odd := sorted(set(places) ^ set(tensors)):
            where = "the file" if odd[0] in places else "this base"
            raise UserError(f"LoRA: {len(odd)} layers do not match; {where} has no '{odd[0]}'. It is for another base.")
        for name, parameter in places.items():
            if tensors[name].shape != parameter.shape:
                got, wanted = tuple(tensors[name].shape), tuple(parameter.shape)
                raise UserError(f"LoRA: '{name}' has shape {got} in the file, {wanted} here (another rank or base).")
        if METADATA_KEY in metadata:
            _, alpha = _rank_and_alpha(tensors, _configs(metadata))
            if alpha != self.alpha:
                raise UserError(
                    f"LoRA: alpha is {alpha:g} in the file, {self.alpha:g} here: its weights would act at "
                    f"{self.alpha / alpha:g} times their strength. Set `alpha: {alpha:g}`."
                )
        for name, parameter in places.items():
            parameter.data.copy_(tensors[name])


def describe_lora(
    targets: Mapping[str, Sequence[str]], *, rank: int, alpha: float, banks: int, base: str
) -> dict[str, str]:
    """The metadata of an export: by each changed part of a pipeline (unet, text_encoder, …) its target modules.

    `base` is the name of the backbone that it is for. diffusers reads rank, alpha and targets from there.
    """
    configs = {
        f"{part}.{name}": value
        for part, modules in targets.items()
        for name, value in {"r": rank, "lora_alpha": alpha, "target_modules": list(modules)}.items()
    }
    return {"kind": LoRA.kind, "banks": str(banks), "base": base, METADATA_KEY: json.dumps(configs)}


def _configs(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """PEFT's options of each part of a pipeline, as an export's metadata gives them."""
    if METADATA_KEY not in metadata:
        raise UserError(f"LoRA: the file's metadata '{METADATA_KEY}' is missing.")
    return options_by_part(metadata[METADATA_KEY], where=f"LoRA: the file's metadata '{METADATA_KEY}'")


def _rank_and_alpha(tensors: Mapping[str, Tensor], configs: Mapping[str, Mapping[str, Any]]) -> tuple[int, float]:
    """The rank and alpha of all layers of an export; UserError where they differ, or contradict the metadata."""
    ranks = {len(tensor) if tensor.ndim else 0 for name, tensor in tensors.items() if name.endswith("lora_A.weight")}
    where = "LoRA: the file's metadata"
    scales = [LoraScale.from_options(config, where=f"{where}, {part}") for part, config in configs.items()]
    alphas = {alpha for scale in scales for alpha in (scale.alpha_of(""), *scale.alpha_pattern.values())}
    if len(ranks) != 1 or len(alphas) != 1:
        raise UserError(
            f"LoRA: the file's ranks are {sorted(ranks)}, its alphas {sorted(alphas)}; one of each for all layers "
            "is supported."
        )
    told = {rank for scale in scales for rank in (scale.rank, *scale.rank_pattern.values())}
    if told != ranks:
        raise UserError(f"LoRA: the rank of the file's tensors is {ranks.pop()}, of its metadata {sorted(told)}.")
    return ranks.pop(), alphas.pop()


def _tuner_layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def _delete(model: Any, names: list[str]) -> None:
    """Delete PEFT adapters; when no others are left, put the original modules back."""
    if isinstance(model, PreTrainedModel):
        model.delete_adapter(names)
        if not getattr(model, "peft_config", None):
            recurse_remove_peft_layers(model)
        return
    model.delete_adapters(names)
    if not getattr(model, "peft_config", None):
        model.unload_lora()


def _set_active(layer: Any, names: list[str]) -> None:
    """PEFT's switch without its side effect on requires_grad: gradients of all banks are wanted at once."""
    flags = [(parameter, parameter.requires_grad) for parameter in layer.parameters()]
    layer.set_adapter(names)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


def _ends_with(name: str, targets: tuple[str, ...]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _free_name(bank: str, taken: Collection[str]) -> str:
    number = 1
    while (name := bank if number == 1 else f"{bank}_{number}") in taken:
        number += 1
    return name


def _denoiser_name(backbone: Backbone) -> str:
    return "unet" if getattr(backbone.pipeline, "unet", None) is backbone.denoiser else "transformer"


def _parameter_name(part: str, model: nn.Module, name: str) -> str:
    """A layer's name: the denoiser's as it is; a text encoder's as files have it, in every version of transformers."""
    if not part.startswith(TEXT_PREFIX):
        return name
    return f"{part}.{name}" if hasattr(model, "text_model") else f"{part}.text_model.{name}"


def _exported(name: str, part: str) -> str:
    bank, _, rest = name.partition(".")
    rest = rest if rest.startswith(TEXT_PREFIX) else f"{part}.{rest}"
    return f"{NEGATIVE_PREFIX if bank == 'negative' else ''}{rest}.weight"
