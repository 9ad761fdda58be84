"""Read a LoRA or DoRA file from anywhere as low-rank additions: every tensor is used, or the file is refused.

Diffusers and PEFT ignore tensors that fit no layer, import what a file's metadata names, and run its
patterns as regular expressions. Here the file is read as data; rank and alpha that contradict each other are refused.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from agsm_rl.adapters.lora_config import METADATA_KEY, PARTS, LoraScale, check_alpha, options_by_part
from agsm_rl.adapters.lora_names import PEFT_PREFIX, LayerNames, method_of, split_name
from agsm_rl.adapters.tensor_files import MAX_JSON, parse_json, read_safetensors
from agsm_rl.errors import UserError

log = logging.getLogger(__name__)

NEGATIVE_PREFIX = "negative."
"""Prefix of the second bank's tensors in an agsm-rl export."""
CONFIG_FILE = "adapter_config.json"
"""PEFT's description, beside its adapter_model.safetensors."""
NAMED = 3
"""Layers that a message names one by one."""


@dataclass(frozen=True)
class Addition:
    """(alpha / rank)·up·down to one module's weight: down [rank, in, …], up [out, rank, …], float32.

    With DoRA's magnitude [n], the rows of the changed weight (side 0) or its columns (side 1) get these lengths.
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None
    side: int = 0

    @property
    def rank(self) -> int:
        """The number of rows of `down`."""
        return len(self.down)

    def applied(self, weight: Tensor) -> Tensor:
        """A weight [out, in] or a convolution's [out, in, height, width] with the addition, in float32."""
        added = self.up.flatten(1) @ self.down.flatten(1) * (self.alpha / self.rank)
        changed = weight.float() + added.reshape(weight.shape).to(weight.device)
        if self.magnitude is None:
            return changed
        others = tuple(side for side in range(weight.ndim) if side != self.side)
        lengths = torch.linalg.vector_norm(changed, dim=others, keepdim=True)
        return changed * (self.magnitude.to(weight.device).reshape(lengths.shape) / lengths)


@dataclass
class LoraFile:
    """The layers of a LoRA file, by the names the file uses."""

    file: Path
    layers: dict[str, Addition]
    second_bank: bool = False
    """Whether the file also has a bank for negative prompts, which `layers` leaves out."""

    def place(self, parts: Mapping[str, nn.Module], *, where: str) -> dict[str, dict[str, Addition]]:
        """The additions by part of the pipeline and module; UserError unless each has a module of its shape.

        parts: the models by their names in the pipeline. `where` begins the message.
        """
        names = LayerNames(parts)
        placed: dict[str, dict[str, Addition]] = {}
        unmatched = []
        for layer, addition in self.layers.items():
            match = names.find(layer)
            if match is None:
                unmatched.append(layer)
                continue
            part, module = match
            if module in placed.setdefault(part, {}):
                raise UserError(f"{where}: {part}.{module} appears twice, the second time as '{layer}'.")
            _check_shape(addition, parts[part].get_parameter(f"{module}.weight"), f"{where}: '{layer}'")
            placed[part][module] = addition
        if unmatched:
            raise UserError(
                f"{where}: this base has no layer for {len(unmatched)} of the file's {len(self.layers)}: "
                f"{_first(unmatched)}. Its layers are called {_first(names.examples)}. The LoRA is for another base "
                "or in a form that is not supported."
            )
        return placed


def read_lora(file: Path, *, where: str) -> LoraFile:
    """Read a LoRA in any form of lora_names.py; `where` begins each message.

    A layer's scale comes from an `alpha` tensor, the file's metadata or PEFT's adapter_config.json next to the file;
    without any of these, alpha is the rank, as in diffusers and kohya's scripts.
    UserError for tensors of other methods (LoHa, LoKr, …), incomplete layers, numbers that are not finite, and ranks or
    alphas that contradict each other.
    """
    try:
        tensors, metadata = read_safetensors(file)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    first_bank = {name: tensor for name, tensor in tensors.items() if not name.startswith(NEGATIVE_PREFIX)}
    second_bank = len(first_bank) < len(tensors)
    if second_bank and "kind" not in metadata:
        raise UserError(f"{where}: the file has '{NEGATIVE_PREFIX}…' tensors but was not exported by agsm-rl.")
    parts = _by_layer(first_bank, where)
    scales = _Scales(file, metadata, peft=any(layer.startswith(PEFT_PREFIX) for layer in parts), where=where)
    layers = {layer: _addition(layer, roles, scales, where) for layer, roles in parts.items()}
    scales.warn_of_unused(layers)
    return LoraFile(file, layers, second_bank)


def _by_layer(tensors: Mapping[str, Tensor], where: str) -> dict[str, dict[str, Tensor]]:
    """layer → role → tensor; UserError for a tensor that is not part of a LoRA, and for an incomplete layer."""
    layers: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for name, tensor in tensors.items():
        split = split_name(name)
        if split is None:
            unknown.append(name)
            continue
        layer, role = split
        if role in layers.setdefault(layer, {}):
            raise UserError(f"{where}: the file holds several adapters: '{layer}' has two '{role}' tensors.")
        layers[layer][role] = tensor
    if methods := {method for name in tensors if (method := method_of(name))}:
        raise UserError(
            f"{where}: the file is not a LoRA but holds {', '.join(sorted(methods))} "
            f"({_first(name for name in tensors if method_of(name))}); this is not supported. Fuse it into a base with "
            "the tool it was made with, and give that base as the checkpoint."
        )
    if unknown or not layers:
        raise UserError(
            f"{where}: the file holds {_first(unknown) or 'no tensors'}, which {'are' if unknown else 'is'} not a "
            "LoRA's; those are called ….lora_A.weight and ….lora_B.weight, or ….lora_down.weight and ….lora_up.weight."
        )
    if incomplete := [layer for layer, roles in layers.items() if not {"down", "up"} <= {*roles}]:
        raise UserError(f"{where}: half of a layer's weights is missing for {_first(incomplete)}.")
    return layers


def _addition(layer: str, roles: Mapping[str, Tensor], scales: "_Scales", where: str) -> Addition:
    down, up = roles["down"].float(), roles["up"].float()
    rank = len(down) if down.ndim else 0
    if rank < 1 or down.ndim not in (2, 4) or up.ndim not in (2, 4) or up.shape[1] != rank:
        raise UserError(
            f"{where}: '{layer}' has weights of shapes {tuple(down.shape)} and {tuple(up.shape)}; they must be "
            "(rank, in) and (out, rank), with a rank of 1 or more."
        )
    scales.check_dora(layer, bool({"magnitude", "dora_scale"} & {*roles}))
    stated = None
    if "alpha" in roles:
        if roles["alpha"].numel() != 1:
            raise UserError(
                f"{where}: '{layer}.alpha' has shape {tuple(roles['alpha'].shape)}; it must be a single number."
            )
        stated = check_alpha(roles["alpha"].item(), f"{where}: '{layer}.alpha'")
    magnitude, side = _magnitude(layer, roles, where)
    return Addition(down, up, scales.alpha(layer, rank, stated), magnitude, side)


def _magnitude(layer: str, roles: Mapping[str, Tensor], where: str) -> tuple[Tensor | None, int]:
    """DoRA's lengths [n] of a layer's rows (side 0) or columns (side 1), if it has any.

    PEFT writes those of rows, as [out] or [1, out, 1, …]. LyCORIS and kohya write rows as [out, 1, …] and columns as
    [1, in, …].
    """
    lengths = roles.get("magnitude", roles.get("dora_scale"))
    if lengths is None:
        return None, 0
    rows, columns = len(roles["up"]), roles["down"].shape[1]
    of_peft = ([rows], [1, rows, *[1] * (lengths.ndim - 2)])
    of_kohya = ([rows, *[1] * (lengths.ndim - 1)],)
    if list(lengths.shape) in (of_peft if "magnitude" in roles else of_kohya):
        return lengths.float().flatten(), 0
    if "dora_scale" in roles and list(lengths.shape) == [1, columns, *[1] * (lengths.ndim - 2)]:
        return lengths.float().flatten(), 1
    raise UserError(
        f"{where}: '{layer}' has DoRA lengths of shape {tuple(lengths.shape)}; they must be those of its weight's "
        f"rows, {(rows, 1)}, or columns, {(1, columns)}."
    )


class _Scales:
    """The ranks and alphas that a file and the description next to it state."""

    def __init__(self, file: Path, metadata: Mapping[str, str], *, peft: bool, where: str) -> None:
        self._where = where
        self._kohya = metadata.get("ss_network_alpha")
        self._descriptions: list[tuple[str, dict[str, LoraScale]]] = []
        if METADATA_KEY in metadata:
            source = f"the metadata '{METADATA_KEY}'"
            parts = options_by_part(metadata[METADATA_KEY], where=f"{where}: {source}")
            scales = {
                part: LoraScale.from_options(options, where=f"{where}: {source}{f', {part}' if part else ''}")
                for part, options in parts.items()
            }
            self._descriptions.append((source, scales))
        config = file.with_name(CONFIG_FILE)
        if config.is_file():
            options = _read_config(config, where)
            self._descriptions.append(
                (CONFIG_FILE, {"": LoraScale.from_options(options, where=f"{where}: {CONFIG_FILE}")})
            )
        elif peft and not self._descriptions:
            raise UserError(
                f"{where}: PEFT wrote this file, and its {CONFIG_FILE}, which says the LoRA's scale (lora_alpha), is "
                f"not next to it. Copy it to {file.absolute().parent}."
            )

    def alpha(self, layer: str, rank: int, stated: float | None) -> float:
        """A layer's alpha: from its own tensor, else from a description, else the rank."""
        alphas = [] if stated is None else [("its alpha tensor", stated)]
        for source, parts in self._descriptions:
            scale, module = _of_part(parts, layer.removeprefix(PEFT_PREFIX))
            if scale is None:
                raise UserError(f"{self._where}: {source} does not give the scale of '{layer}'.")
            if scale.rank_of(module) != rank:
                raise UserError(
                    f"{self._where}: '{layer}' has rank {rank}, but {source} says rank {scale.rank_of(module)}."
                )
            alphas.append((source, scale.alpha_of(module)))
        for source, alpha in alphas[1:]:
            if not math.isclose(alpha, alphas[0][1], rel_tol=1e-6):
                raise UserError(
                    f"{self._where}: the alpha of '{layer}' is {alphas[0][1]:g} by {alphas[0][0]}, and {alpha:g} by "
                    f"{source}. Remove the one that is wrong."
                )
        if not alphas:
            self._check_kohya(layer, rank)
        return alphas[0][1] if alphas else float(rank)

    def check_dora(self, layer: str, has_lengths: bool) -> None:
        """UserError if a description says that a layer is DoRA's, and its lengths are missing."""
        for source, parts in self._descriptions:
            scale, _ = _of_part(parts, layer.removeprefix(PEFT_PREFIX))
            if scale is not None and scale.dora and not has_lengths:
                raise UserError(
                    f"{self._where}: use_dora is True in {source}, but '{layer}' has no lora_magnitude_vector."
                )

    def warn_of_unused(self, layers: Iterable[str]) -> None:
        """Warn of ranks and alphas that a description gives to layers that the file does not have."""
        names = [layer.removeprefix(PEFT_PREFIX) for layer in layers]
        for source, parts in self._descriptions:
            for scale in parts.values():
                modules = [module for found, module in (_of_part(parts, name) for name in names) if found is scale]
                if unused := scale.unused(modules):
                    log.warning(
                        "%s: %s gives a rank or an alpha to layers that the file does not have; no effect: %s",
                        self._where,
                        source,
                        ", ".join(unused[:NAMED]) + (f", and {len(unused) - NAMED} more" if unused[NAMED:] else ""),
                    )

    def _check_kohya(self, layer: str, rank: int) -> None:
        """UserError if kohya's metadata contradicts the alpha that a missing alpha tensor implies."""
        if self._kohya in (None, "None"):
            return
        if check_alpha(self._kohya, f"{self._where}: the metadata 'ss_network_alpha'") != rank:
            raise UserError(
                f"{self._where}: '{layer}' has no alpha tensor, which means {rank}, its rank; but the metadata "
                f"'ss_network_alpha' says {self._kohya}."
            )


def _of_part(parts: Mapping[str, LoraScale], layer: str) -> tuple[LoraScale | None, str]:
    """The scale that covers a layer, and the layer's name without its part."""
    part, _, module = layer.partition(".")
    if part in PARTS:
        return parts.get(part, parts.get("")), module
    return parts.get("", next(iter(parts.values())) if len(parts) == 1 else None), layer


def _read_config(config: Path, where: str) -> dict[str, Any]:
    try:
        if config.stat().st_size > MAX_JSON:
            raise UserError(f"{where}: {CONFIG_FILE} has more than {MAX_JSON} bytes.")
        text = config.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: {CONFIG_FILE} cannot be read: {error}.") from error
    return parse_json(text, f"{where}: {CONFIG_FILE}")


def _check_shape(addition: Addition, weight: Tensor, where: str) -> None:
    inputs, kernel = addition.down.shape[1:], addition.up.shape[2:]
    same = inputs == weight.shape[1:] or (
        inputs.numel() == weight[0].numel() and {*inputs[1:], *weight.shape[2:]} <= {1}
    )
    if len(addition.up) != len(weight) or not same or kernel.numel() != 1:
        raise UserError(
            f"{where} has weights of shapes {tuple(addition.down.shape)} and {tuple(addition.up.shape)}, which do not "
            f"fit this base's {tuple(weight.shape)}; the LoRA is for another base."
        )


def _first(names: Iterable[str]) -> str:
    """The first three names, for a message."""
    listed = list(names)
    return ", ".join(name if len(name) <= 100 else f"{name[:100]}…" for name in listed[:3]) + (
        " …" if len(listed) > 3 else ""
    )
