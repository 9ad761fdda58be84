"""The policy, which is trained: a frozen backbone, its adapters, and a shadow of their parameters (their EMA).

The base classes of what acts on it, in bases.py, can be imported from here too.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from agsm_rl.backbones.same_space import check_same_space
from agsm_rl.bases import Objective as Objective
from agsm_rl.bases import Source as Source
from agsm_rl.bases import View as View
from agsm_rl.errors import UserError, unknown_name
from agsm_rl.interfaces import Adapter, Backbone, Bank, Banks, Cond, PairBatch
from agsm_rl.training.guidance import predict_in_form
from agsm_rl.training.randomness import Draw


@contextmanager
def using(adapters: Collection[Adapter], bank: Bank | None) -> Iterator[None]:
    """Within the block, these adapters use this bank; None switches them off."""
    with ExitStack() as stack:
        for adapter in adapters:
            stack.enter_context(adapter.using(bank))
        yield


def check_bank(bank: Bank, adapters: Collection[Adapter], *, where: str) -> None:
    """UserError for the negative bank ψ⁻ if no adapter has two: it would silently be the positive one."""
    if bank == "negative" and not any(adapter.banks == 2 for adapter in adapters):
        raise UserError(
            f"{where}: negative, but no adapter here has a negative bank; adapters trained with `banks: 2` have one."
        )


def check_text_can_wait(backbone: Backbone, adapters: Collection[Adapter]) -> None:
    """UserError when an adapter changes text encoders that do not stay loaded."""
    waiting = [name for name in getattr(backbone, "waiting", ()) if name.startswith("text_encoder")]
    if waiting and any(adapter.changes_text for adapter in adapters):
        raise UserError(
            "backbone.text: an adapter changes the text encoders, so that prompts must be encoded anew at each step; "
            "leave out `text` (and `cpu_offload`), or train the denoiser only (`text_encoders: false`)"
        )


class Noised(NamedTuple):
    """Images under noise: `x_t` [B, C, h, w] at noise levels `t` [B], the regression `target` of its shape, `cond`."""

    x_t: Tensor
    t: Tensor
    target: Tensor
    cond: Cond


class Recorded(NamedTuple):
    """A prediction that was made: its noise levels [B], itself [B, C, h, w], and whether it `follows` from others.

    It follows from others where its x_t has a gradient, as along a path of sampling steps.
    """

    t: Tensor
    prediction: Tensor
    follows: bool


class Policy:
    """A backbone with adapters attached; `live`, `ema` and `reference` are its three predictions.

    `ema_decay` in [0, 1) is the share of the shadow that is kept at each update (published: 0.9999). With `ema_warm_up`
    it is at most (1 + n) / (10 + n) after n steps; `ema_every` k updates the shadow every k steps.
    The shadow begins as a copy of the parameters. AGSM's released trainer keeps a second denoiser for the EMA instead,
    whose tokens begin at random values of their own; the two agree once those are forgotten (some ten thousand steps).
    """

    def __init__(
        self,
        backbone: Backbone,
        adapters: Mapping[str, Adapter],
        *,
        ema_decay: float = 0.9999,
        ema_warm_up: bool = False,
        ema_every: int = 1,
    ) -> None:
        if not adapters:
            raise UserError(
                "adapters: the section is empty, so nothing would be trained; add soft_tokens, lora, or both"
            )
        check_text_can_wait(backbone, adapters.values())
        self.backbone = backbone
        self.adapters = dict(adapters)
        self.ema_decay, self.ema_warm_up, self.ema_every = ema_decay, ema_warm_up, ema_every
        self.draw = Draw()
        """Where objectives take their noise from; the trainer sets it for each term and step."""
        for adapter in self.adapters.values():
            adapter.attach(backbone)
        self._shadow = self._copy()
        self._old: dict[str, dict[str, Tensor]] = {}
        """The old policies, by the names of the terms that have one."""
        self._recorded: list[Recorded] | None = None
        self._in_reference: list[str] = []
        self.reference_parameters: dict[str, Tensor] = {}
        """The parameters of the adapters that the reference has, as `keep_reference` found them."""
        self.referred = False
        """Whether anything has asked for the reference."""
        self._teachers: dict[str, list[Adapter] | Backbone] = {}
        self._always_off = ExitStack()
        self.acting_for: str | None = None
        """The term whose old policy `old` and `old_weights` mean; the trainer sets it."""
        self.graph_for: Objective | None = None
        """What learns in this step from the graph of a source's draw, if anything does; the trainer sets it."""

    def _copy(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters().items()}

    def keep_old(self, term: str) -> None:
        """Give a term an old policy of its own; it begins as the parameters are."""
        self._old[term] = self._copy()

    @torch.no_grad()
    def update_old(self, term: str, decay: float) -> None:
        """old ← decay · old + (1 − decay) · parameter, for the old policy of a term."""
        for name, parameter in self.parameters().items():
            self._old[term][name].lerp_(parameter.detach(), 1 - decay)

    def parameters(self, adapters: list[str] | None = None) -> dict[str, nn.Parameter]:
        """The adapters' parameters by "adapter.parameter", of the named adapters or of all."""
        chosen = list(self.adapters) if adapters is None else adapters
        found: dict[str, nn.Parameter] = {}
        for name in chosen:
            if name not in self.adapters:
                raise unknown_name("trains", name, "an adapter of this run", self.adapters)
            found |= {f"{name}.{key}": parameter for key, parameter in self.adapters[name].named_parameters()}
        return found

    def noised(self, batch: PairBatch, *, t: Tensor | None = None, purpose: str = "noise") -> Noised:
        """The batch's images under one noise and one noise level per image, both from `draw`, and its prompts encoded.

        The rows' numbers fix noise and level: other images under the same `rows` are noised alike. `t` [B] gives the
        levels in place of drawn ones; another `purpose` gives other noise.
        """
        noise = self.draw.noise_like(batch.latents, batch.rows, purpose=purpose)
        t = self.draw.t(batch.rows, batch.latents.device) if t is None else t.to(batch.latents.device)
        return Noised(
            x_t=self.backbone.add_noise(batch.latents, noise, t),
            t=t,
            target=self.backbone.target(batch.latents, noise, t),
            cond=batch.encode_text(self.backbone),
        )

    def live(self, x_t: Tensor, t: Tensor, cond: Cond, *, bank: Bank | Banks = "positive") -> Tensor:
        """The prediction being trained, [B, C, h, w]; `bank` is one for all rows or one per row."""
        return self._predict(x_t, t, cond, bank)

    @torch.no_grad()
    def ema(self, x_t: Tensor, t: Tensor, cond: Cond, *, bank: Bank | Banks = "positive") -> Tensor:
        """The prediction under the EMA parameters; no gradient."""
        with self.ema_weights():
            return self._predict(x_t, t, cond, bank)

    @torch.no_grad()
    def old(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The prediction of the term's old policy, which is the EMA if it has none of its own; no gradient."""
        with self.old_weights():
            return self._predict(x_t, t, cond, "positive")

    @torch.no_grad()
    def base(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The base model's prediction, all adapters off; no gradient."""
        with self.switched_off():
            return self._predict_as_now(x_t, t, cond)

    @torch.no_grad()
    def reference(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The prediction that terms measure from: the base's, or that of what `keep_reference` kept; no gradient."""
        self.referred = True
        if not self._in_reference:
            return self.base(x_t, t, cond)
        kept = [self.adapters[name] for name in self._in_reference]
        others = [adapter for adapter in self.adapters.values() if adapter not in kept]
        with using(others, None), using(kept, "positive"), self._holding(self.reference_parameters):
            return self._predict_as_now(x_t, t, cond)

    def keep_reference(self, adapters: Collection[str]) -> None:
        """From now on `reference` is the model with the named adapters as they are now (a copy), all others off."""
        self._in_reference = list(adapters)
        named = self.parameters(self._in_reference)
        self.reference_parameters = {name: parameter.detach().clone() for name, parameter in named.items()}

    def add_teacher(self, name: str, adapters: Collection[Adapter]) -> None:
        """Keep attached adapters for `teacher` alone: everywhere else they are off, and they are not trained."""
        check_text_can_wait(self.backbone, adapters)
        self._teachers[name] = list(adapters)
        for adapter in adapters:
            self._always_off.enter_context(adapter.using(None))

    def add_teacher_base(self, name: str, backbone: Backbone) -> None:
        """Keep another checkpoint for `teacher` alone; UserError where it is not of this base's latents and noise."""
        check_same_space(self.backbone, backbone)
        self._teachers[name] = backbone

    def backbones(self) -> list[Backbone]:
        """The base and the checkpoints that teach."""
        return [self.backbone, *(taught for taught in self._teachers.values() if not isinstance(taught, list))]

    def backbone_of_teacher(self, name: str) -> Backbone:
        """What encodes texts for that teacher: the checkpoint itself, or the base that its adapters are on."""
        taught = self._teachers[name]
        return self.backbone if isinstance(taught, list) else taught

    @torch.no_grad()
    def teacher(self, name: str, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """A teacher's prediction, of texts that `backbone_of_teacher` encoded: of a checkpoint, or of the base with the
        teacher's adapters in place of this policy's; no gradient.
        """
        taught = self._teachers[name]
        if not isinstance(taught, list):
            return taught.predict(x_t, t, cond)
        with self.switched_off(), using(taught, "positive"):
            return self._predict_as_now(x_t, t, cond, taught)

    def _predict(self, x_t: Tensor, t: Tensor, cond: Cond, bank: Bank | Banks) -> Tensor:
        """In one pass, or one per bank if rows use different banks and an adapter cannot mix them."""
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

    def _predict_as_now(
        self, x_t: Tensor, t: Tensor, cond: Cond, adapters: Collection[Adapter] | None = None
    ) -> Tensor:
        """The backbone's prediction; prompts are encoded again if an adapter, by default any of ours, changes texts."""
        adapters = self.adapters.values() if adapters is None else adapters
        if any(adapter.changes_text for adapter in adapters):
            if len(cond.prompts) != len(cond):
                raise ValueError("a Cond without its prompts: encode_text gives one, indexing and cat keep them")
            # `cond` was encoded by whichever bank was in use then, without gradients.
            encoded = self.backbone.encode_text(list(cond.prompts), gradients=True)
            cond = replace(
                encoded,
                unconditional_first=cond.unconditional_first,
                unconditional_detached=cond.unconditional_detached,
                crops=cond.crops,
            )
        prediction = predict_in_form(self.backbone, adapters, x_t, t, cond)
        if self._recorded is not None:
            self._recorded.append(Recorded(t, prediction, follows=x_t.requires_grad))
        return prediction

    @contextmanager
    def recording(self) -> Iterator[list[Recorded]]:
        """Within the block, the list grows by each prediction that is made."""
        self._recorded, before = [], self._recorded
        try:
            yield self._recorded
        finally:
            self._recorded = before

    def using(self, bank: Bank | None) -> AbstractContextManager[None]:
        """Within the block, all adapters use this bank; None switches them off."""
        return using(self.adapters.values(), bank)

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """Within the block, the backbone is the base model, exactly."""
        with self.using(None):
            yield

    def ema_weights(self) -> AbstractContextManager[None]:
        """Within the block, the adapters hold the EMA parameters; not for use around a backward pass."""
        return self._holding(self._shadow)

    def old_weights(self) -> AbstractContextManager[None]:
        """The same for the term's old policy, which is the EMA if it has none of its own."""
        return self._holding(self._shadow if self.acting_for is None else self._old.get(self.acting_for, self._shadow))

    @contextmanager
    def _holding(self, shadow: dict[str, Tensor]) -> Iterator[None]:
        self._swap(shadow)
        try:
            yield
        finally:
            self._swap(shadow)

    def exported(self, which: Literal["live", "ema"]) -> AbstractContextManager[None]:
        """Within the block, the adapters hold what a run exports: the live parameters, or their EMA."""
        return self.ema_weights() if which == "ema" else nullcontext()

    def _swap(self, shadow: dict[str, Tensor]) -> None:
        # Autocast keeps low-precision copies by parameter object; they would outlive the swap.
        torch.clear_autocast_cache()
        parameters = self.parameters()
        for name in shadow:
            parameters[name].data, shadow[name] = shadow[name], parameters[name].data

    @torch.no_grad()
    def restart_ema(self) -> None:
        """shadow ← parameter, after parameters were loaded."""
        for name, parameter in self.parameters().items():
            self._shadow[name].copy_(parameter.detach())

    @torch.no_grad()
    def update_ema(self, step: int) -> None:
        """shadow ← decay · shadow + (1 − decay) · parameter, after optimiser step number `step` (counted from 1)."""
        if step % self.ema_every:
            return
        decay = min(self.ema_decay, (1 + step) / (10 + step)) if self.ema_warm_up else self.ema_decay
        for name, parameter in self.parameters().items():
            self._shadow[name].lerp_(parameter.detach(), 1 - decay)

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and their shadows, themselves and not copies, by names for messages."""
        live = {f"'{name}'": parameter.detach() for name, parameter in self.parameters().items()}
        old = {
            f"{term}'s old policy of '{name}'": tensor
            for term, shadow in self._old.items()
            for name, tensor in shadow.items()
        }
        return live | {f"the EMA of '{name}'": shadow for name, shadow in self._shadow.items()} | old

    def state_dict(self) -> dict[str, Any]:
        """Parameters and shadow, by name, and where there are any the reference's and the old policies'."""
        shadow = {name: tensor.clone() for name, tensor in self._shadow.items()}
        state: dict[str, Any] = {"live": self._copy(), "ema": shadow}
        if self._in_reference:
            kept = {name: tensor.clone() for name, tensor in self.reference_parameters.items()}
            state |= {"reference": kept, "in_reference": list(self._in_reference), "referred": self.referred}
        if not self._old:
            return state
        old = {term: {name: value.clone() for name, value in shadow.items()} for term, shadow in self._old.items()}
        return state | {"old": old}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a `state_dict`; UserError if it is for other adapters."""
        parameters = self.parameters()
        if set(state["live"]) != set(parameters):
            missing = sorted(set(state["live"]) ^ set(parameters))
            raise UserError(f"checkpoint: its adapters are not the recipe's; they differ in {', '.join(missing[:4])}")
        for name, parameter in parameters.items():
            if state["live"][name].shape != parameter.shape:
                got, wanted = tuple(state["live"][name].shape), tuple(parameter.shape)
                raise UserError(
                    f"checkpoint: {name} has shape {got}, the recipe's adapter {wanted}; same recipe and base?"
                )
            if not torch.isfinite(state["live"][name]).all() or not torch.isfinite(state["ema"][name]).all():
                raise UserError(f"checkpoint: {name} is not finite; delete that checkpoint to resume from an older one")
            parameter.data.copy_(state["live"][name])
            self._shadow[name].copy_(state["ema"][name])
        if "reference" in state:
            self._in_reference, self.referred = list(state["in_reference"]), state["referred"]
            self.reference_parameters = {n: one.to(parameters[n], copy=True) for n, one in state["reference"].items()}
        for term, shadow in self._old.items():
            for name, tensor in shadow.items():
                tensor.copy_(state["old"][term][name])
