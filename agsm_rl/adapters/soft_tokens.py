"""Soft text tokens (AGSM, arXiv 2605.30038; SoftREPA): learned rows in the text that the denoiser's attention sees.

The backbone says where they go (token_places.py). They depend on the bank in use and on the noise level, which a hook
on the denoiser records at each call; both are restored when gradient checkpointing runs a block again.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, ClassVar, Literal, Self, cast, get_args

import torch
from torch import Tensor, nn

from agsm_rl.adapters.token_places import PUBLISHED_PLACES, UNetPlace, check_places, uncompiled
from agsm_rl.errors import UserError, unknown_name
from agsm_rl.interfaces import Backbone, Bank, Banks
from agsm_rl.training.compiled import is_compiled
from agsm_rl.training.guidance import GuidanceBank, GuidancePrompt, check_form

TIME_ROWS = 100
"""Of equal length in t; each is 10 of the published models' 1000 timesteps."""
NEARLY = 1e-9
"""Added before rounding down, in rows: t = 290/1000 in float64 may lie just below row 29."""
MAX_TOKENS = 1024
"""Far beyond what has been tried; a typo here would allocate all memory."""
INITIAL_STD = 0.02
Init = Literal["bos", "normal"]


class SoftTokens:
    """Soft tokens in one or two banks (0 positive ψ⁺, 1 negative ψ⁻), plus a time row that all tokens share.

    Args:
        num_tokens: Tokens per bank, n. Published: 4.
        banks: 2, as published, or 1 for SoftREPA, which uses one bank for positive and negative prompts.
        time_tokens: Add row ⌊timestep / 10⌋ of a learned (100, D) table to every token, as published (SD3: (100, L·D)).
        init: Initial values of the tokens. `bos`: the text encoder's BOS embedding of the empty prompt, as AGSM's
            authors begin on SD1.5 (U-Nets only). `normal`: drawn from N(0, 0.02²), as they begin on SDXL and SD3. Null:
            `bos` for U-Nets, `normal` for SD3. Tokens that begin as BOS are equal, get equal gradients and stay equal:
            n of them are one learned row that attention counts n times. So it is in the authors' SD1.5 tokens, which
            start where the text encoder's own rows lie; `normal`, or `jitter` above 0, gives n different rows.
        jitter: Standard deviation of noise added to the tokens' initial values. Published: 0.
        layers: Number of SD3's joint blocks that get tokens, each its own. Null means 5, as published. Not for U-Nets.
        places: Blocks of a U-Net that see the tokens, a list of `down`, `mid` and `up`; kept in the exported file. Null
            means down and mid, as published for AGSM and for SoftREPA on SDXL; SoftREPA's SD1.5 has `[down]`.
        seed: Seed of the initial values. Time rows are drawn from N(0, 0.02²).
        guidance_bank: Bank of guidance's unconditional branch wherever pictures are drawn with these tokens; kept in
            the exported file. The conditional branch uses ψ⁺. Published: `positive`, but `negative` for SDXL.
        guidance_prompt: Prompt of that branch: `empty`, as published, or with `guidance_bank: negative` also the `same`
            prompt, so that guidance steers from ψ⁻ to ψ⁺.
    """

    kind: ClassVar[str] = "soft_tokens"
    mixes_banks: ClassVar[bool] = True
    changes_text = False  # the rows are added after the text encoders

    def __init__(
        self,
        *,
        num_tokens: int = 4,
        banks: int = 2,
        time_tokens: bool = True,
        init: Init | None = None,
        jitter: float = 0.0,
        layers: int | None = None,
        places: Sequence[UNetPlace] | None = None,
        seed: int = 0,
        guidance_bank: GuidanceBank = "positive",
        guidance_prompt: GuidancePrompt = "empty",
    ) -> None:
        if not 1 <= num_tokens <= MAX_TOKENS:
            raise UserError(f"soft_tokens.num_tokens: {num_tokens}; allowed: 1 to {MAX_TOKENS} (published: 4).")
        if banks not in (1, 2):
            raise UserError(f"soft_tokens.banks: {banks}; allowed: 1, 2.")
        if not 0 <= jitter < float("inf"):
            raise UserError(f"soft_tokens.jitter: {jitter}; it must be 0 or more.")
        self.guidance_bank, self.guidance_prompt = guidance_bank, guidance_prompt
        self.num_tokens, self.banks, self.time_tokens, self.jitter = num_tokens, banks, time_tokens, jitter
        check_form(guidance_bank, guidance_prompt, self, where="soft_tokens.")
        if init not in (None, *get_args(Init)):
            raise unknown_name("soft_tokens.init", str(init), "a way to begin", get_args(Init))
        self.layers, self.seed, self.init = layers, seed, init
        self.unet_places = None if places is None else check_places(places)
        self.bank: Bank | Banks | None = None
        self._backbone: Backbone | None = None
        self._parameters: dict[str, nn.Parameter] = {}
        self._hooks: list[Any] = []
        self._t: Tensor | None = None

    @classmethod
    def from_export(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Self:
        """An adapter with an export's shape: attach it, then fill it with `load_export`."""
        shape = tuple(tensors["soft_tokens"].shape) if "soft_tokens" in tensors else ()
        if len(shape) not in (3, 4):
            raise UserError(
                "soft tokens: the file holds no tensor 'soft_tokens' of shape (banks, tokens, width), or (banks, "
                "layers, tokens, width) for SD3."
            )
        layers = shape[1] if len(shape) == 4 else None
        return cls(
            num_tokens=shape[-2],
            banks=shape[0],
            layers=layers,
            time_tokens="time_tokens" in tensors,
            places=cast(list[UNetPlace], metadata["places"].split(",")) if "places" in metadata else None,
            guidance_bank=cast(GuidanceBank, metadata.get("guidance_bank", "positive")),
            guidance_prompt=cast(GuidancePrompt, metadata.get("guidance_prompt", "empty")),
        )

    def attach(self, backbone: Backbone) -> None:
        """Create the parameters and hook the blocks that see tokens; UserError for a denoiser without such blocks."""
        if self._backbone is not None:
            raise RuntimeError("these soft tokens are already attached; detach them first")
        places = backbone.token_places(layers=self.layers, places=self.unet_places)
        generator = torch.Generator().manual_seed(self.seed)
        values = {}
        if self.time_tokens:
            width = places.width * (places.layers or 1)
            values["time_tokens"] = torch.randn(TIME_ROWS, width, generator=generator) * INITIAL_STD
        if places.layers is not None and self.init == "bos":
            raise UserError(
                "soft_tokens.init: bos, but this model's tokens are in no text encoder's space; use normal."
            )
        if places.layers is None and self.init != "normal":
            with ExitStack() as base:
                for adapter in backbone.adapters:  # one may change the text encoders
                    base.enter_context(adapter.using(None))
                # A space stands for the empty prompt: "" itself is all zeros on SDXL.
                begin = backbone.encode_text([" "]).embeds[0, 0].float().cpu()
            tokens = begin.expand(self.banks, self.num_tokens, -1).clone()
        else:
            layers = () if places.layers is None else (places.layers,)
            shape = (self.banks, *layers, self.num_tokens, places.width)
            tokens = torch.randn(shape, generator=generator) * INITIAL_STD
        values["soft_tokens"] = tokens + self.jitter * torch.randn(tokens.shape, generator=generator)
        self._parameters = {name: nn.Parameter(values[name].to(backbone.device)) for name in sorted(values)}
        note_level = uncompiled(backbone.denoiser).register_forward_pre_hook(self._note_level, with_kwargs=True)
        self._hooks = [note_level, *places.hook(self)]
        self._layers = places.layers
        self._backbone, self.bank = backbone, "positive"
        backbone.adapters.append(self)
        _forget_compiled(backbone.denoiser)

    def detach(self) -> None:
        """Remove the hooks; nothing else was changed."""
        if self._backbone is None:
            return
        for hook in self._hooks:
            hook.remove()
        self._backbone.adapters.remove(self)
        _forget_compiled(self._backbone.denoiser)
        self._hooks, self._backbone, self._t, self.bank = [], None, None, None

    def places(self, backbone: Backbone) -> list[str]:
        """The blocks that see tokens."""
        blocks = {id(block) for block in backbone.token_places(layers=self.layers, places=self.unet_places).blocks}
        return [name for name, module in backbone.denoiser.named_modules() if id(module) in blocks]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """`soft_tokens` (banks, n, D), or (banks, L, n, D) on SD3, and `time_tokens` (100, D), or (100, L·D)."""
        yield from self._parameters.items()

    @contextmanager
    def using(self, bank: Bank | Banks | None) -> Iterator[None]:
        """Insert this bank's tokens within the block, or each row's own bank's; None inserts nothing."""
        previous, self.bank = self.bank, bank
        try:
            yield
        finally:
            self.bank = previous

    def recall(self) -> AbstractContextManager[None]:
        """A context manager to enter later that restores the current bank and noise level."""
        return self._as_at(self.bank, self._t)

    @contextmanager
    def _as_at(self, bank: Bank | Banks | None, t: Tensor | None) -> Iterator[None]:
        previous, self._t = self._t, t
        try:
            with self.using(bank):
                yield
        finally:
            self._t = previous

    def export(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The parameters by name, and the metadata, which names the base."""
        tensors = {name: parameter.detach().cpu().clone() for name, parameter in self._parameters.items()}
        metadata = describe_tokens(tensors, base=self._backbone.name if self._backbone else "")
        form = {"guidance_bank": self.guidance_bank, "guidance_prompt": self.guidance_prompt}
        places = {} if self.unet_places is None else {"places": ",".join(self.unet_places)}
        return tensors, metadata | form | places

    def load_export(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Fill the parameters; UserError if their width or number differs."""
        if self._layers is None:
            trained_at = check_places(metadata.get("places", ",".join(PUBLISHED_PLACES)).split(","))
            if trained_at != (self.unet_places or PUBLISHED_PLACES):
                raise UserError(
                    f"soft tokens: these were trained in the {' and '.join(trained_at)} blocks; set `places: "
                    f"[{', '.join(trained_at)}]`."
                )
        theirs, ours = metadata.get("base", ""), self._backbone.name if self._backbone else ""
        for name, parameter in self._parameters.items():
            if name not in tensors:
                raise UserError(f"soft tokens: the file holds no tensor '{name}'; it holds: {', '.join(tensors)}.")
            got, expected = tuple(tensors[name].shape), tuple(parameter.shape)
            if name == "soft_tokens" and got[-1:] != expected[-1:]:
                raise UserError(
                    f"soft tokens: these are {got[-1]} wide{_named(theirs)}; this base's are {expected[-1]} wide"
                    f"{_named(ours)}. Tokens work only on the base they were trained on."
                )
            if got != expected:
                raise UserError(
                    f"soft tokens: '{name}' has shape {got} in the file, {expected} here (banks, tokens, width)."
                )
        if extra := set(tensors) - set(self._parameters):
            raise UserError(
                f"soft tokens: the file also holds {', '.join(sorted(extra))}, which this adapter does not have."
            )
        if theirs and ours and theirs != ours:  # two kinds may be equally wide
            raise UserError(f"soft tokens: these were trained on a {theirs}, this is a {ours}.")
        for name, parameter in self._parameters.items():
            parameter.data.copy_(tensors[name])

    def is_on(self) -> bool:
        """Whether the blocks currently get tokens."""
        return self.bank is not None

    def rows_for(self, text: Tensor, layer: int) -> Tensor | None:
        """The tokens of a layer, for each row of `text` [B, S, D]: [B, n, D]; None while switched off."""
        if self.bank is None:
            return None
        # Read at each call: using the EMA copy swaps the parameters' data.
        # On the text's device: `pipe.to` moves only the pipeline's own parts.
        values = self._parameters["soft_tokens"].to(text.device)
        values = values if self._layers is None else values[:, layer]
        if isinstance(self.bank, tuple) and self.banks == 2:
            is_negative = torch.tensor([bank == "negative" for bank in self.bank])
            # Copied without waiting for the GPU to finish its queue.
            is_negative = is_negative.to(text.device, non_blocking=True)[:, None, None]
            tokens = torch.where(is_negative, values[1], values[0])
        else:
            tokens = values[1 if self.bank == "negative" and self.banks == 2 else 0][None]
        if self.time_tokens:
            assert self._t is not None
            t = self._t.to(text.device).reshape(-1)
            rows = (t * TIME_ROWS + NEARLY).long().clamp(0, TIME_ROWS - 1)
            times = self._parameters["time_tokens"].to(text.device)[rows]
            tokens = tokens + times.unflatten(-1, (self._layers or 1, -1))[:, layer, None]
        return tokens.to(text.dtype).expand(len(text), -1, -1)

    def _note_level(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self._backbone is not None
        self._t = self._backbone.level_of_call(args, kwargs)


def describe_tokens(tensors: Mapping[str, Tensor], *, base: str) -> dict[str, str]:
    """The metadata of an export: its shape, and the name of the backbone it belongs to."""
    shape = tensors["soft_tokens"].shape
    layers = {"layers": str(shape[1])} if len(shape) == 4 else {}
    return {
        "kind": SoftTokens.kind,
        "banks": str(shape[0]),
        **layers,
        "num_tokens": str(shape[-2]),
        "base": base,
        "width": str(shape[-1]),
    }


def _named(base: str) -> str:
    """A base's name, in brackets where there is one."""
    return f" ({base})" if base else ""


def _forget_compiled(denoiser: Any) -> None:
    """torch.compile misses hooks added or removed after the first call, so reset it."""
    if is_compiled(denoiser):
        torch.compiler.reset()
