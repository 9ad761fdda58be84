"""Soft tokens attached to a tiny base, its prediction, and the text that its cross-attention is given."""

from typing import Any

import torch
from torch import Tensor, nn

from agsm_rl.adapters.soft_tokens import SoftTokens
from agsm_rl.backbones.stable_diffusion import StableDiffusion

PROMPTS = ["a red circle", "two blue squares"]


def rows(count: int = 2) -> Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(7))


def predict(backbone: StableDiffusion, *, gradients: bool = False) -> Tensor:
    with torch.set_grad_enabled(gradients):
        return backbone.predict(rows(), torch.tensor([0.1234, 0.9]), backbone.encode_text(PROMPTS))


def perturb(*adapters: Any, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for adapter in adapters:
        for _, parameter in adapter.named_parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)


def attached(backbone: StableDiffusion, **options: Any) -> SoftTokens:
    tokens = SoftTokens(**options)
    tokens.attach(backbone)
    perturb(tokens)
    return tokens


def texts_seen(backbone: StableDiffusion, call: Any) -> dict[str, Tensor]:
    """What each cross-attention of the U-Net was given as text during `call`."""
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[name] = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[1]

        return hook

    hooks = [
        module.register_forward_pre_hook(note(name), with_kwargs=True)
        for name, module in backbone.denoiser.named_modules()
        if name.endswith("attn2")
    ]
    call()
    for hook in hooks:
        hook.remove()
    return seen
