"""PEFT's description of an adapter, in a file's metadata or in adapter_config.json, read as data.

PEFT itself imports what such a description names (`megatron_core`, `auto_mapping`) and runs its patterns as regular
expressions. Nothing is passed on to PEFT here: we read the scale, refuse options that change what the weights mean,
and ignore the rest.
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from agsm_rl.adapters.tensor_files import parse_json
from agsm_rl.errors import UserError

METADATA_KEY = "lora_adapter_metadata"
"""Key in a .safetensors file's metadata: PEFT's options as JSON, as diffusers and we write them."""
PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
"""The parts of a pipeline that a LoRA may change."""
LITERAL = re.compile(r"\^?[\w.-]+")
"""A pattern that is a module's name or the end of one, not any other regular expression."""
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base's weights alone; PiSSA and its like change them."""
CHANGES_MEANING = (
    "use_qalora",
    "use_bdlora",
    "fan_in_fan_out",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "modules_to_save",
    "alora_invocation_tokens",
    "arrow_config",
    "monteclora_config",
    "kasa_config",
    "velora_config",
)
"""Options under which the weights mean neither (alpha / rank)·B·A nor DoRA; they must be off."""


@dataclass(frozen=True)
class LoraScale:
    """The rank and alpha that a description gives each layer; patterns are ends of module names."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False

    @classmethod
    def from_options(
        cls, options: Mapping[str, Any], *, where: str, kind: str = "LORA", alpha: str = "lora_alpha"
    ) -> Self:
        """Read PEFT's options for one part of a pipeline. `where` begins the messages.

        kind: PEFT's name of the adapter's type. alpha: the name of alpha among its options.
        UserError for options that are not supported, and if rank or alpha is missing, not finite or not above 0.
        """
        if options.get("peft_type", kind) != kind:
            raise UserError(f"{where}: peft_type is {options['peft_type']!r}; only {kind} is supported.")
        for name in CHANGES_MEANING:
            if options.get(name):
                raise UserError(f"{where}: {name} is {options[name]!r}; only plain LoRA is supported.")
        if options.get("bias", "none") != "none":
            raise UserError(f"{where}: bias is {options['bias']!r}; only LoRA without biases is supported.")
        start = options.get("init_lora_weights", True)
        if start not in PLAIN_STARTS:
            raise UserError(
                f"{where}: init_lora_weights is {start!r}, which changes the base's weights too. Convert it to a plain "
                "LoRA (PEFT: save_pretrained with path_initial_model_for_weight_conversion)."
            )
        for name in ("use_rslora", "use_dora"):
            if not isinstance(options.get(name) or False, bool):
                raise UserError(f"{where}: {name} is {_shown(options[name])}; it must be true or false.")
        return cls(
            rank=check_rank(options.get("r"), f"{where}: r"),
            alpha=check_alpha(options.get(alpha), f"{where}: {alpha}"),
            rank_pattern=rank_pattern(options.get("rank_pattern"), where),
            alpha_pattern=alpha_pattern(options.get("alpha_pattern"), where),
            rslora=bool(options.get("use_rslora")),
            dora=bool(options.get("use_dora")),
        )

    def rank_of(self, layer: str) -> int:
        """The rank of a layer, by its module's name."""
        return _matching(self.rank_pattern, layer, self.rank)

    def alpha_of(self, layer: str) -> float:
        """Rank times scale of a layer; rank-stabilised LoRA, which divides by √rank, is converted."""
        alpha = _matching(self.alpha_pattern, layer, self.alpha)
        return alpha * math.sqrt(self.rank_of(layer)) if self.rslora else alpha

    def unused(self, layers: Collection[str]) -> list[str]:
        """The patterns that are the end of none of these layers' names."""
        patterns = [*self.rank_pattern, *self.alpha_pattern]
        return [name for name in dict.fromkeys(patterns) if not any(_matching({name: True}, x, False) for x in layers)]


def options_by_part(text: str, *, where: str) -> dict[str, dict[str, Any]]:
    """PEFT's options by part of a pipeline, from JSON such as `{"unet.r": 4, …}`; a single model's are under ''."""
    parts: dict[str, dict[str, Any]] = {}
    for name, value in parse_json(text, where).items():
        part, _, option = name.partition(".")
        if part not in PARTS or not option:
            part, option = "", name
        parts.setdefault(part, {})[option] = value
    if len(parts) > 1:  # options outside the parts apply to no layer
        parts.pop("", None)
    return parts


def check_alpha(value: Any, what: str) -> float:
    """Alpha as a float; UserError unless it is a number above 0 that float32 can hold."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 < number <= 3.4e38:
        raise UserError(f"{what} is {_shown(value)}; it must be a finite number above 0.")
    return number


def module_names(value: Any, what: str) -> tuple[str, ...]:
    """A list of module names; UserError for anything else, such as a regular expression."""
    if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
        raise UserError(f"{what} is {_shown(value)}; it must be a list of module names.")
    return tuple(value)


def check_rank(value: Any, what: str) -> int:
    """A rank; UserError unless it is an integer, 1 or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{what} is {_shown(value)}; it must be an integer, 1 or more.")
    return value


def rank_pattern(value: Any, where: str) -> dict[str, int]:
    """Ranks by the names of modules or ends of them; UserError for anything else."""
    patterns = _patterns(value, "rank_pattern", where)
    return {name: check_rank(rank, f"{where}: rank_pattern['{name}']") for name, rank in patterns.items()}


def alpha_pattern(value: Any, where: str) -> dict[str, float]:
    """Alphas by the names of modules or ends of them; UserError for anything else."""
    patterns = _patterns(value, "alpha_pattern", where)
    return {name: check_alpha(alpha, f"{where}: alpha_pattern['{name}']") for name, alpha in patterns.items()}


def _patterns(value: Any, name: str, where: str) -> Mapping[str, Any]:
    patterns = value or {}
    if not isinstance(patterns, Mapping):
        raise UserError(f"{where}: {name} is {_shown(patterns)}; it must be an object of module names.")
    for pattern in patterns:
        if not LITERAL.fullmatch(pattern):
            raise UserError(
                f"{where}: {name} has {_shown(pattern)}; module names are supported, regular expressions are not."
            )
    return patterns


def _matching(patterns: Mapping[str, Any], layer: str, default: Any) -> Any:
    """The value of the first pattern that is the layer's name or an end of it, as in PEFT."""
    if not patterns:
        return default
    parts = layer.split(".")
    ends = {f"^{layer}", *(".".join(parts[start:]) for start in range(len(parts)))}
    if parts[0] in PARTS:
        ends.add(f"^{layer.partition('.')[2]}")
    return next((value for pattern, value in patterns.items() if pattern in ends), default)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
