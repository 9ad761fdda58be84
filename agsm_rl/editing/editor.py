"""Edit images with a backbone as it is, adapters on or off, by the method that goes with its kind of model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

import torch
from torch import Tensor

from agsm_rl.editing.flow_edit import Noise, check_steps, flow_edit
from agsm_rl.editing.inversion import PredictAt, invert, redraw
from agsm_rl.errors import UserError, unknown_name
from agsm_rl.interfaces import Backbone
from agsm_rl.training.guidance import predict_in_form
from agsm_rl.training.limits import MAX_SAMPLING_STEPS
from agsm_rl.training.randomness import stream
from agsm_rl.training.sampling import guided
from agsm_rl.training.sizes import size_of
from agsm_rl.training.stages import Advance, stage

Method = Literal["inversion", "flowedit"]
METHODS: tuple[Method, ...] = ("inversion", "flowedit")
NUM_STEPS = 50
FLOWEDIT_GUIDANCE = 13.5
FLOWEDIT_SOURCE_GUIDANCE = 3.5
FLOWEDIT_STRENGTH = 0.66


@dataclass(frozen=True, kw_only=True)
class EditSettings:
    """How images are edited. None is the default of the method, which by default is the model's.

    Args:
        method: `inversion` (any model), or `flowedit` (arXiv 2412.08629; flow models such as SD3, where it is the
            default).
        num_steps: Steps of the noise schedule. Default: 50, as published for both.
        strength: Share of the steps, in (0, 1], that an edit goes through; less keeps more of the source. Default:
            1 for inversion; 0.66 for FlowEdit, its published n_max of 33 of 50 steps.
        guidance: Classifier-free guidance under the target prompt. Default: what the target is drawn with; FlowEdit's
            published 13.5.
        source_guidance: The same under the source prompt. Default: 1 for inversion, where more gives back another
            image; FlowEdit's published 3.5.
        n_min: FlowEdit: last steps that are drawn in the ordinary way, from under noise. Default: 0.
        n_avg: FlowEdit: noises that each step averages over. Default: 1.
    """

    method: Method | None = None
    num_steps: int | None = None
    strength: float | None = None
    guidance: float | None = None
    source_guidance: float | None = None
    n_min: int | None = None
    n_avg: int | None = None

    def complete(self, backbone: Backbone, *, guidance: float | None = None) -> CompleteSettings:
        """These settings for a model, defaults filled in; `guidance` is what the model is drawn with.

        UserError for a method that the model cannot be edited by, for an option of the other method, and out of range.
        """
        method = self.method or ("flowedit" if is_flow(backbone) else "inversion")
        if method not in METHODS:
            raise unknown_name("method", method, "a method of editing", METHODS)
        if method == "flowedit" and not is_flow(backbone):
            raise UserError(
                f"method: flowedit needs a model that predicts a flow, such as SD3; a {backbone.name} predicts noise. "
                "Use inversion."
            )
        for name in ("n_min", "n_avg"):
            if method == "inversion" and getattr(self, name) is not None:
                raise UserError(f"{name}: belongs to FlowEdit, but the method is inversion; leave it out.")
        drawn = backbone.drawing[0] if guidance is None else guidance
        by_inversion = method == "inversion"
        settings = CompleteSettings(
            method=method,
            num_steps=_or(self.num_steps, NUM_STEPS),
            strength=_or(self.strength, 1.0 if by_inversion else FLOWEDIT_STRENGTH),
            guidance=_or(self.guidance, drawn if by_inversion else FLOWEDIT_GUIDANCE),
            source_guidance=_or(self.source_guidance, 1.0 if by_inversion else FLOWEDIT_SOURCE_GUIDANCE),
            n_min=_or(self.n_min, 0),
            n_avg=_or(self.n_avg, 1),
        )
        settings.check()
        return settings


@dataclass(frozen=True, kw_only=True)
class CompleteSettings:
    """EditSettings without a gap."""

    method: Method
    num_steps: int
    strength: float
    guidance: float
    source_guidance: float
    n_min: int
    n_avg: int

    @property
    def n_max(self) -> int:
        """How many of the last steps an edit goes through, at least one."""
        return max(1, round(self.strength * self.num_steps))

    @property
    def passes(self) -> int:
        """How often the model predicts, each time for all images and, with guidance, for both branches."""
        if self.method == "inversion":
            return 2 * self.n_max
        return 2 * self.n_avg * (self.n_max - self.n_min) + self.n_min

    def check(self) -> None:
        """UserError for numbers out of range."""
        if not 1 <= self.num_steps <= MAX_SAMPLING_STEPS:
            raise UserError(f"num_steps: got {self.num_steps}; 1 to {MAX_SAMPLING_STEPS} is allowed.")
        if not 0 < self.strength <= 1:
            raise UserError(f"strength: got {self.strength}; it should be above 0, and 1 at most.")
        check_steps(self.num_steps, n_max=self.n_max, n_min=self.n_min, n_avg=self.n_avg)


def is_flow(backbone: Backbone) -> bool:
    """Whether the model predicts a flow: x_t = (1 − t)·x0 + t·noise, with the target noise − x0."""
    one = torch.ones(1, 1, 1, 1, device=backbone.device)
    none, t = torch.zeros_like(one), torch.full((1,), 0.25, device=backbone.device)
    found = [
        part(*pair, t).item() for part in (backbone.add_noise, backbone.target) for pair in ((one, none), (none, one))
    ]
    return all(abs(value - wanted) < 1e-3 for value, wanted in zip(found, (0.75, 0.25, -1.0, 1.0), strict=True))


@torch.no_grad()
def edit(
    backbone: Backbone,
    images: Tensor,
    source_prompts: Sequence[str],
    target_prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    settings: EditSettings | CompleteSettings | None = None,
) -> Tensor:
    """The edited images [B, 3, H, W] in [0, 1], on the CPU; H and W are the backbone's resolution.

    Adapters take part as they are switched, in guidance's unconditional branch too (training/guidance.py).

    Args:
        backbone: The model.
        images: The source images [B, 3, H, W] in [0, 1].
        source_prompts: What each of them shows.
        target_prompts: What each should show instead.
        seeds: One for each image, which fixes FlowEdit's noise; inversion draws none.
        settings: How; by default, the defaults of the model.

    UserError as in `EditSettings.complete`, and for an edit that is not finite. ValueError where numbers or sizes do
    not agree.
    """
    size = (3, *size_of(backbone.resolution))
    counts = {len(images), len(source_prompts), len(target_prompts), len(seeds)}
    if images.shape[1:] != size or len(counts) != 1:
        raise ValueError(
            f"images {tuple(images.shape)}, {len(source_prompts)} and {len(target_prompts)} prompts and {len(seeds)} "
            f"seeds: as many of each are needed, and images of {size}"
        )
    latents = backbone.encode_images(images.float().to(backbone.device))
    edited = edit_latents(backbone, latents, source_prompts, target_prompts, seeds=seeds, settings=settings)
    drawn = backbone.decode(edited).float().cpu()
    if not drawn.isfinite().all():
        raise UserError(
            "edit: the edited image is not finite; lower guidance and source_guidance, or use another dtype."
        )
    return drawn


@torch.no_grad()
def edit_latents(
    backbone: Backbone,
    latents: Tensor,
    source_prompts: Sequence[str],
    target_prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    settings: EditSettings | CompleteSettings | None = None,
) -> Tensor:
    """`edit` between latents [B, C, h, w], scaled as `backbone.encode_images` gives them."""
    if not isinstance(settings, CompleteSettings):
        settings = (settings or EditSettings()).complete(backbone)
    sampler = backbone.sampler(settings.num_steps)
    with stage(f"editing {len(latents)} images", total=settings.passes, unit="passes", worth=len(latents)) as advance:
        source = _predictor(backbone, source_prompts, settings.source_guidance, advance)
        target = _predictor(backbone, target_prompts, settings.guidance, advance)
        if settings.method == "inversion":
            start = settings.num_steps - settings.n_max
            return redraw(target, sampler, invert(source, sampler, latents, start=start), start=start)
        sigmas = torch.cat([sampler.t, sampler.t.new_zeros(1)])
        numbers = {"n_max": settings.n_max, "n_min": settings.n_min, "n_avg": settings.n_avg}
        return flow_edit(source, target, latents, sigmas, _noise(seeds, latents), **numbers)


def _predictor(backbone: Backbone, prompts: Sequence[str], guidance: float, advance: Advance) -> PredictAt:
    """Predictions under the prompts, guided, with the adapters as they are switched now."""
    cond, uncond = backbone.encode_text(list(prompts)), backbone.encode_text([""])
    predict = partial(predict_in_form, backbone, backbone.adapters)

    def predict_at(x: Tensor, t: Tensor) -> Tensor:
        prediction = guided(predict, x, t.to(x).expand(len(x)), cond, uncond, guidance)
        advance(1)
        return prediction

    return predict_at


def _noise(seeds: Sequence[int], like: Tensor) -> Noise:
    def noise(k: int, n: int) -> Tensor:
        rows = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(int(stream(seed, "flowedit", k, n).integers(2**63)))
            rows.append(torch.randn(like.shape[1:], generator=generator))
        return torch.stack(rows).to(like)

    return noise


Value = TypeVar("Value")


def _or(value: Value | None, default: Value) -> Value:
    return default if value is None else value
