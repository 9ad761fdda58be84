"""What is trained: a frozen backbone, its adapters, and a shadow of the adapters' parameters (EMA).

The published AGSM trainer keeps a second denoiser for the EMA; a shadow of the adapters alone gives the same numbers.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from agsm_rl.errors import UserError, unknown_name
from agsm_rl.interfaces import Adapter, Backbone, Bank, Banks, Cond
from agsm_rl.training.randomness import Draw


@contextmanager
def using(adapters: Collection[Adapter], bank: Bank | None) -> Iterator[None]:
    """Within the block, these adapters use this bank; None switches them off."""
    with ExitStack() as stack:
        for adapter in adapters:
            stack.enter_context(adapter.using(bank))
        yield


def check_bank(bank: Bank, adapters: Collection[Adapter], *, where: str) -> None:
    """UserError for the negative bank ψ⁻ where no adapter has two: it would be the positive one, unnoticed."""
    if bank == "negative" and not any(adapter.banks == 2 for adapter in adapters):
        raise UserError(
            f"{where}: negative, but there is no adapter with a negative bank here; those trained with `banks: 2` have "
            "one."
        )


class Policy:
    """A backbone with adapters attached; `live`, `ema` and `reference` are its three predictions.

    `ema_decay` in [0, 1) is the share of the shadow that stays at each update (published: 0.9999).
    """

    def __init__(self, backbone: Backbone, adapters: Mapping[str, Adapter], *, ema_decay: float = 0.9999) -> None:
        if not adapters:
            raise UserError("adapters: there are none, so nothing would be trained; add soft_tokens, lora, or both")
        self.backbone = backbone
        self.adapters = dict(adapters)
        self.ema_decay = ema_decay
        self.draw = Draw()
        """Where objectives take their noise from; the trainer sets it for each term and step."""
        for adapter in self.adapters.values():
            adapter.attach(backbone)
        self._shadow = {name: parameter.detach().clone() for name, parameter in self.parameters().items()}

    def parameters(self, adapters: list[str] | None = None) -> dict[str, nn.Parameter]:
        """The adapters' parameters by "adapter.parameter", of the named adapters or of all."""
        chosen = list(self.adapters) if adapters is None else adapters
        found: dict[str, nn.Parameter] = {}
        for name in chosen:
            if name not in self.adapters:
                raise unknown_name("trains", name, "an adapter of this run", self.adapters)
            found |= {f"{name}.{key}": parameter for key, parameter in self.adapters[name].named_parameters()}
        return found

    def live(self, x_t: Tensor, t: Tensor, cond: Cond, *, bank: Bank | Banks = "positive") -> Tensor:
        """The prediction being trained, [B, C, h, w]; `bank` is one for all rows or one for each."""
        return self._predict(x_t, t, cond, bank)

    @torch.no_grad()
    def ema(self, x_t: Tensor, t: Tensor, cond: Cond, *, bank: Bank | Banks = "positive") -> Tensor:
        """The prediction under the EMA parameters; no gradient."""
        with self.ema_weights():
            return self._predict(x_t, t, cond, bank)

    @torch.no_grad()
    def reference(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The base model's prediction, all adapters off; no gradient."""
        with self.switched_off():
            return self._predict_as_now(x_t, t, cond)

    def _predict(self, x_t: Tensor, t: Tensor, cond: Cond, bank: Bank | Banks) -> Tensor:
        """In one pass; in one for each bank where rows want different ones and an adapter cannot mix them."""
        if isinstance(bank, str):
            with self.using(bank):
                return self._predict_as_now(x_t, t, cond)
        if len(bank) != len(x_t):
            raise ValueError(f"{len(bank)} banks for {len(x_t)} rows")
        if len(set(bank)) == 1:
            return self._predict(x_t, t, cond, bank[0])
        if all(adapter.mixes_banks or adapter.banks == 1 for adapter in self.adapters.values()):
            with ExitStack() as stack:
                for adapter in self.adapters.values():
                    stack.enter_context(adapter.using(bank if adapter.mixes_banks else "positive"))
                return self._predict_as_now(x_t, t, cond)
        rows = {one: [row for row, its in enumerate(bank) if its == one] for one in dict.fromkeys(bank)}
        found = torch.cat([self._predict(x_t[mine], t[mine], cond[mine], one) for one, mine in rows.items()])
        order = [row for mine in rows.values() for row in mine]
        return found[sorted(range(len(order)), key=order.__getitem__)]

    def _predict_as_now(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The backbone's prediction; the prompts are encoded anew where an adapter changes the text encoders."""
        if any(adapter.changes_text for adapter in self.adapters.values()):
            if len(cond.prompts) != len(cond):
                raise ValueError("a Cond without its prompts: encode_text gives one, indexing and cat keep them")
            # `cond` was encoded by whichever bank was in use then, without gradients.
            cond = self.backbone.encode_text(list(cond.prompts), gradients=True)
        return self.backbone.predict(x_t, t, cond)

    def using(self, bank: Bank | None) -> AbstractContextManager[None]:
        """Within the block, all adapters use this bank; None switches them off."""
        return using(self.adapters.values(), bank)

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """Within the block, the backbone is the base model, exactly."""
        with self.using(None):
            yield

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Within the block, the adapters hold the EMA parameters; not for use around a backward pass."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def exported(self, which: Literal["live", "ema"]) -> AbstractContextManager[None]:
        """Within the block, the adapters hold what a run exports: the live parameters, or their EMA."""
        return self.ema_weights() if which == "ema" else nullcontext()

    def _swap(self) -> None:
        # Autocast keeps low-precision copies by parameter object; they would outlive the swap.
        torch.clear_autocast_cache()
        for name, parameter in self.parameters().items():
            parameter.data, self._shadow[name] = self._shadow[name], parameter.data

    @torch.no_grad()
    def restart_ema(self) -> None:
        """shadow ← parameter, for parameters that were filled from elsewhere."""
        for name, parameter in self.parameters().items():
            self._shadow[name].copy_(parameter.detach())

    @torch.no_grad()
    def update_ema(self) -> None:
        """shadow ← decay · shadow + (1 − decay) · parameter, after each optimiser step."""
        for name, parameter in self.parameters().items():
            self._shadow[name].lerp_(parameter.detach(), 1 - self.ema_decay)

    def state_dict(self) -> dict[str, Any]:
        """Parameters and shadow, by name."""
        live = {name: parameter.detach().clone() for name, parameter in self.parameters().items()}
        return {"live": live, "ema": {name: shadow.clone() for name, shadow in self._shadow.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back a `state_dict`; UserError if the adapters are others."""
        parameters = self.parameters()
        if set(state["live"]) != set(parameters):
            missing = sorted(set(state["live"]) ^ set(parameters))
            raise UserError(
                f"checkpoint: it holds other adapters than the recipe; they differ in {', '.join(missing[:4])}"
            )
        for name, parameter in parameters.items():
            if state["live"][name].shape != parameter.shape:
                got, wanted = tuple(state["live"][name].shape), tuple(parameter.shape)
                raise UserError(
                    f"checkpoint: {name} has shape {got}, the recipe's adapter {wanted}; same recipe and base?"
                )
            if not torch.isfinite(state["live"][name]).all() or not torch.isfinite(state["ema"][name]).all():
                raise UserError(f"checkpoint: {name} is not finite; delete that checkpoint to go on from an older one")
            parameter.data.copy_(state["live"][name])
            self._shadow[name].copy_(state["ema"][name])
