"""Soft text tokens (AGSM, arXiv 2605.30038; SoftREPA): learned rows in the text that cross-attention sees.

[BOS, soft × n, rest of the prompt] goes to the down and mid blocks of a U-Net, the plain prompt to its up blocks. It is
done by hooks around whole blocks, outside of what gradient checkpointing recomputes; no forward is copied.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from agsm_rl.errors import UserError
from agsm_rl.interfaces import Backbone, Bank

TIME_ROWS = 100
TIMESTEPS_A_ROW = 10
TIME_STD = 0.02
BASE_OF_WIDTH = {768: "SD1.5", 2048: "SDXL", 1536: "SD3"}


class SoftTokens:
    """`num_tokens` soft tokens in `banks` banks (0 positive ψ⁺, 1 negative ψ⁻), plus a time row that all of them share.

    num_tokens: 4, as published for U-Nets. banks: 2, as published; 1 for SoftREPA, whose bank serves under both names.
    time_tokens: add row ⌊timestep / 10⌋ of a (100, D) table to every token, as published.
    jitter: standard deviation of noise added to the tokens' initial values. Published: 0, so that all n of a bank
    begin equal, get equal gradients and stay equal; above 0 they can come to differ.
    layers: for SD3's joint blocks only. seed: of the time rows' initial values, N(0, 0.02²), and of the jitter; tokens
    begin as the text encoder's BOS embedding of the empty prompt.
    """

    kind: ClassVar[str] = "soft_tokens"

    def __init__(
        self,
        *,
        num_tokens: int = 4,
        banks: int = 2,
        time_tokens: bool = True,
        jitter: float = 0.0,
        layers: int | None = None,
        seed: int = 0,
    ) -> None:
        if num_tokens < 1:
            raise UserError(f"soft_tokens.num_tokens: {num_tokens}; at least 1 is needed.")
        if banks not in (1, 2):
            raise UserError(f"soft_tokens.banks: {banks}; allowed: 1, 2.")
        if not 0 <= jitter < float("inf"):
            raise UserError(f"soft_tokens.jitter: {jitter}; it must be 0 or more.")
        self.num_tokens, self.banks, self.time_tokens, self.jitter = num_tokens, banks, time_tokens, jitter
        self.layers, self.seed = layers, seed
        self.bank: Bank | None = None
        self._backbone: Backbone | None = None
        self._parameters: dict[str, nn.Parameter] = {}
        self._hooks: list[Any] = []
        self._timestep: Any = None

    @classmethod
    def from_export(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Self:
        """An adapter of the shape of an export, to be attached and then given it by `load_export`."""
        if "soft_tokens" not in tensors or tensors["soft_tokens"].ndim != 3:
            raise UserError("soft tokens: the file holds no tensor 'soft_tokens' of the shape (banks, tokens, width).")
        banks, num_tokens, _ = tensors["soft_tokens"].shape
        return cls(num_tokens=num_tokens, banks=banks, time_tokens="time_tokens" in tensors)

    def attach(self, backbone: Backbone) -> None:
        """Create the parameters and hook the down and mid blocks that have cross-attention."""
        if self._backbone is not None:
            raise RuntimeError("these soft tokens are attached already; detach them first")
        blocks = _blocks_with_text(backbone.denoiser)
        if self.layers is not None:
            raise UserError("soft_tokens.layers: only SD3's joint blocks have a number of layers; leave it out here.")
        begin = backbone.encode_text([""]).embeds[0, 0].float()
        values = {"soft_tokens": begin.expand(self.banks, self.num_tokens, -1).clone()}
        generator = torch.Generator().manual_seed(self.seed)
        if self.time_tokens:
            values["time_tokens"] = torch.randn(TIME_ROWS, len(begin), generator=generator) * TIME_STD
        noise = torch.randn(values["soft_tokens"].shape, generator=generator)
        values["soft_tokens"] += self.jitter * noise.to(begin.device)
        self._parameters = {name: nn.Parameter(value.to(backbone.device)) for name, value in values.items()}
        self._hooks = [backbone.denoiser.register_forward_pre_hook(self._note_timestep, with_kwargs=True)]
        for block in blocks:
            insert = partial(self._insert, positions=_positions(block))
            self._hooks.append(block.register_forward_pre_hook(insert, with_kwargs=True))
        self._timestep_position = _positions(backbone.denoiser)["timestep"]
        self._backbone, self.bank = backbone, "positive"
        backbone.adapters.append(self)

    def detach(self) -> None:
        """Remove the hooks; nothing else was changed."""
        if self._backbone is None:
            return
        for hook in self._hooks:
            hook.remove()
        self._backbone.adapters.remove(self)
        self._hooks, self._backbone, self._timestep, self.bank = [], None, None, None

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """`soft_tokens` (banks, n, D) and `time_tokens` (100, D)."""
        yield from self._parameters.items()

    @contextmanager
    def using(self, bank: Bank | None) -> Iterator[None]:
        """Insert this bank's tokens within the block; None inserts nothing."""
        previous, self.bank = self.bank, bank
        try:
            yield
        finally:
            self.bank = previous

    def export(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """`soft_tokens` (banks, n, D), `time_tokens` (100, D), and what base they are for."""
        tensors = {name: parameter.detach().cpu().clone() for name, parameter in self._parameters.items()}
        width = tensors["soft_tokens"].shape[-1]
        metadata = {
            "kind": self.kind,
            "banks": str(self.banks),
            "num_tokens": str(self.num_tokens),
            "base": self._backbone.name if self._backbone else "",
            "width": str(width),
        }
        return tensors, metadata

    def load_export(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Fill the parameters; UserError if their width or number is another one."""
        for name, parameter in self._parameters.items():
            if name not in tensors:
                raise UserError(f"soft tokens: the file holds no tensor '{name}'; it holds: {', '.join(tensors)}.")
            got, wanted = tuple(tensors[name].shape), tuple(parameter.shape)
            if got[-1:] != wanted[-1:]:
                raise UserError(
                    f"soft tokens: these are {_base(got[-1])}; this base's text is {_base(wanted[-1])}."
                    " Tokens work only on the base that they were trained on."
                )
            if got != wanted:
                raise UserError(
                    f"soft tokens: '{name}' has shape {got} in the file, {wanted} here (banks, tokens, width)."
                )
        if extra := set(tensors) - set(self._parameters):
            raise UserError(f"soft tokens: the file also holds {', '.join(sorted(extra))}; there is no place for it.")
        for name, parameter in self._parameters.items():
            parameter.data.copy_(tensors[name])

    def _note_timestep(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._timestep = kwargs["timestep"] if "timestep" in kwargs else args[self._timestep_position]

    def _tokens(self, device: torch.device) -> Tensor:
        # Read at each call: the EMA copy is used by swapping the parameters' data.
        number = 1 if self.bank == "negative" and self.banks == 2 else 0
        tokens = self._parameters["soft_tokens"][number][None]
        if self.time_tokens:
            timestep = torch.as_tensor(self._timestep, device=device).reshape(-1)
            rows = (timestep.long() // TIMESTEPS_A_ROW).clamp(0, TIME_ROWS - 1)
            tokens = tokens + self._parameters["time_tokens"][rows][:, None]
        return tokens

    def _insert(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, positions: dict[str, int]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The block's arguments with soft tokens after BOS; unchanged arguments (None) when switched off."""
        if self.bank is None:
            return None
        call = _Call(list(args), dict(kwargs), positions)
        text = call.get("encoder_hidden_states")
        tokens = self._tokens(text.device).to(text.dtype).expand(len(text), -1, -1)
        call.set("encoder_hidden_states", torch.cat([text[:, :1], tokens, text[:, 1:]], dim=1))
        mask = call.get("encoder_attention_mask")
        if mask is not None:
            # By now the mask is a bias [B, 1, S] added to the attention scores: 0 is "seen".
            seen = mask.new_zeros(*mask.shape[:-1], self.num_tokens)
            call.set("encoder_attention_mask", torch.cat([mask[..., :1], seen, mask[..., 1:]], dim=-1))
        return tuple(call.args), call.kwargs


class _Call:
    """A call's arguments by name, whether they were given by position or by keyword."""

    def __init__(self, args: list[Any], kwargs: dict[str, Any], positions: dict[str, int]) -> None:
        self.args, self.kwargs, self.positions = args, kwargs, positions

    def get(self, name: str) -> Any:
        position = self.positions[name]
        return self.args[position] if position < len(self.args) else self.kwargs.get(name)

    def set(self, name: str, value: Any) -> None:
        position = self.positions[name]
        if position < len(self.args):
            self.args[position] = value
        else:
            self.kwargs[name] = value


def _positions(module: nn.Module) -> dict[str, int]:
    return {name: number for number, name in enumerate(inspect.signature(module.forward).parameters)}


def _blocks_with_text(denoiser: Any) -> list[nn.Module]:
    if not hasattr(denoiser, "down_blocks"):
        raise UserError(f"soft_tokens: {type(denoiser).__name__} has no down blocks; supported: U-Nets (SD1.5, SDXL).")
    blocks = [block for block in (*denoiser.down_blocks, denoiser.mid_block) if _sees_text(block)]
    if not blocks:
        raise UserError(f"soft_tokens: no down or mid block of this {type(denoiser).__name__} has cross-attention.")
    return blocks


def _sees_text(block: nn.Module | None) -> bool:
    return getattr(block, "has_cross_attention", False)


def _base(width: int) -> str:
    return f"{width} wide ({BASE_OF_WIDTH[width]})" if width in BASE_OF_WIDTH else f"{width} wide"
