"""Adapters: off, predictions equal the base's bit for bit; on, they differ, at every module that should change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from agsm_rl.doctor.finding import Finding, green, red
from agsm_rl.interfaces import Adapter, Backbone, Bank
from agsm_rl.policy import Policy

PROMPTS = ["a red circle", "two blue squares"]
LEVELS = (0.3, 0.8)
SIZE = 0.05
"""Scale of the noise added to an adapter's parameters: many start at values with no effect (LoRA's B is 0)."""


@torch.no_grad()
def base_prediction(backbone: Backbone) -> Tensor:
    """What the backbone predicts for fixed inputs, [2, C, h, w]."""
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(len(PROMPTS), *backbone.latent_shape, generator=generator).to(backbone.device)
    return backbone.predict(x_t, torch.tensor(LEVELS, device=backbone.device), backbone.encode_text(PROMPTS)).cpu()


def check_adapters(policy: Policy, base: Tensor, *, trained: bool) -> Iterator[Finding]:
    """Off ≡ base, on ≠ off (as trained, then with noise on the parameters), and every place. Alters the parameters."""
    yield _check_off(policy, base)
    if trained:
        for name, adapter in policy.adapters.items():
            yield _check_on(policy, name, adapter, "as trained", "train on, at a higher learning rate if need be")
    scatter(policy)
    for name, adapter in policy.adapters.items():
        yield _check_on(policy, name, adapter, "with noise on its parameters", "the adapter's code or its options")
        yield _check_places(policy, name, adapter)


@torch.no_grad()
def scatter(policy: Policy) -> None:
    """Add small noise to all parameters, and the same to their EMA copy."""
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.parameters().values():
        parameter.add_((SIZE * torch.randn(parameter.shape, generator=generator)).to(parameter))
    policy.restart_ema()


def _check_off(policy: Policy, base: Tensor) -> Finding:
    with policy.switched_off():
        off = base_prediction(policy.backbone)
    if torch.equal(off, base):
        return green("adapters off", "the base model, bit for bit")
    return red(
        "adapters off",
        f"predictions differ from the base's by up to {(off - base).abs().max():.3g}",
        "fix the adapter: it must leave no trace when it is switched off (Adapter.using(None))",
    )


def _check_on(policy: Policy, name: str, adapter: Adapter, how: str, remedy: str) -> Finding:
    """With all other adapters off, each bank must change the prediction and keep it finite."""
    with policy.switched_off():
        off = base_prediction(policy.backbone)
        banks: tuple[Bank, Bank] = ("positive", "negative")
        changes = {}
        for bank in banks:
            with adapter.using(bank):
                changes[bank] = float((base_prediction(policy.backbone) - off).abs().max())
    what = f"adapter '{name}' on"
    dead = [bank for bank, change in changes.items() if not 0 < change < float("inf")]
    if dead:
        return red(
            what, f"{how}, bank {dead[0]}: the prediction changes by {changes[dead[0]]:.3g}", f"not bound? {remedy}"
        )
    return green(what, f"{how}, predictions change by up to {max(changes.values()):.3g}")


@torch.no_grad()
def _check_places(policy: Policy, name: str, adapter: Adapter) -> Finding:
    """With the adapter on, each module it should change must return something else for the same inputs."""
    what, denoiser = f"adapter '{name}' bound", policy.backbone.denoiser
    modules, places = dict(denoiser.named_modules()), adapter.places(policy.backbone)
    with policy.switched_off():
        inputs = _inputs_of({place: modules[place] for place in places if place in modules}, policy.backbone)
        unbound = []
        for place in places:
            if place not in inputs:
                unbound.append(place)
                continue
            off = _run(modules[place], inputs[place])
            with adapter.using("positive"):
                on = _run(modules[place], inputs[place])
            if all(torch.equal(before, after) for before, after in zip(off, on, strict=True)):
                unbound.append(place)
    if not places or unbound:
        shown = f": {', '.join(unbound[:3])}{' …' if len(unbound) > 3 else ''}" if unbound else ""
        return red(
            what,
            f"it acts at {len(places) - len(unbound)} of the {len(places)} modules that its options name{shown}",
            "compare its options (target modules, layers) with the denoiser's modules; or another hook undoes it",
        )
    return green(what, f"it acts at all {len(places)} modules that its options name")


Call = tuple[tuple[Any, ...], dict[str, Any]]


def _inputs_of(modules: dict[str, nn.Module], backbone: Backbone) -> dict[str, Call]:
    """The arguments that each module gets in a prediction."""
    calls: dict[str, Call] = {}

    def note(place: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[place] = (args, dict(kwargs))

        return hook

    # Before the adapters' own hooks: the inputs as the denoiser gives them.
    handles = [
        module.register_forward_pre_hook(note(place), with_kwargs=True, prepend=True)
        for place, module in modules.items()
    ]
    try:
        base_prediction(backbone)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _run(module: nn.Module, call: Call) -> list[Tensor]:
    """The tensors that a module returns."""
    pending, tensors = [module(*call[0], **call[1])], []
    while pending:
        value = pending.pop()
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, list | tuple):
            pending.extend(value)
    return tensors
