"""Our AGSM step against one with the published trainer's cost model (published_agsm.py).

    python benchmarks/agsm_step.py [--size embedded | sd15] [--device cpu | cuda]

Both learn the same soft tokens from the same images and prompts. The script first checks, in float32, that their losses
and gradients agree, and then times their steps in turn. Peak memory is measured in a separate process for each.
`--agsm` and `--pairs` pass options (`key=value`) to our objective and source, to measure what makes a run faster.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import measure
import torch
import typer
from bases import Size, make_pipeline, options_of, resolution_of
from published_agsm import PublishedAGSM
from torch import Tensor

from agsm_rl import Policy, Term, Trainer
from agsm_rl.adapters.soft_tokens import SoftTokens
from agsm_rl.backbones import backbone_of
from agsm_rl.backbones.compiling import compile_denoiser
from agsm_rl.interfaces import PairBatch
from agsm_rl.objectives.agsm import AGSM
from agsm_rl.shapes import data
from agsm_rl.sources.latents import fit
from agsm_rl.sources.pairs import Pairs
from agsm_rl.training.randomness import Draw

EPOCH = 4
"""Steps of an epoch; two epochs are read before timing, so that latents are held, as in all epochs but the first."""
TOLERANCES = {"cpu": 1e-4, "cuda": 1e-3}
"""Relative, for the loss and the gradient's largest entry: float32 results depend on the order of summation."""


def make_policy(size: Size, device: str, **options: Any) -> Policy:
    """Our side: soft tokens with two banks on a base in float32, with the EMA slightly off the live values."""
    resolution = options.pop("resolution", None) or resolution_of(size, device)
    backbone = backbone_of(make_pipeline(size, device), resolution=resolution, **options)
    policy = Policy(backbone, {"tokens": SoftTokens(num_tokens=4)})
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.parameters().values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(device)
    return policy


def make_published(policy: Policy, pipeline: Any, *, group_size: int) -> PublishedAGSM:
    """The other side: its own pipeline with the policy's tokens."""
    state = {
        which: {name.removeprefix("tokens."): value for name, value in tokens.items()}
        for which, tokens in policy.state_dict().items()
    }
    return PublishedAGSM(pipeline, state["live"], state["ema"], group_size=group_size)


def captioned_images(count: int, resolution: int) -> tuple[Tensor, list[str]]:
    """Images [B, 3, H, W] in [0, 1], and captions that are all different."""
    images: dict[str, Tensor] = {}
    for row in data.pairs("train", 4 * count, seed=0):
        images.setdefault(row["caption"], fit(row["image"], resolution))
    chosen = list(images)[:count]
    return torch.stack([images[caption] for caption in chosen]), chosen


def disagreement(policy: Policy, published: PublishedAGSM, objective: AGSM, count: int) -> dict[str, float]:
    """The relative differences of loss and token gradients between the two sides over `count` images, in float32."""
    backbone = policy.backbone
    images, prompts = captioned_images(count, backbone.resolution)
    batch = PairBatch(prompts, torch.arange(count), backbone.encode_images(images.to(backbone.device)))
    policy.draw = Draw(0, "agsm", 0)
    parameters = list(policy.parameters().values())
    total, gradients = 0.0, [torch.zeros_like(parameter) for parameter in parameters]
    for part, share in objective.split(batch):
        loss, _ = objective.loss(policy, part)
        total += share * loss.item()
        for sum_, value in zip(gradients, torch.autograd.grad(loss * share, parameters), strict=True):
            sum_ += value
    t = policy.draw.shared_t(1, backbone.device)
    timestep = int(backbone.timesteps(t))
    theirs = published.loss(images, prompts, noise=policy.draw.noise_like(batch.latents, batch.rows), timestep=timestep)
    expected = torch.autograd.grad(theirs, published.parameters)
    differences = {"loss": abs(total - theirs.item()) / abs(theirs.item())}
    for name, value, other in zip(policy.parameters(), gradients, expected, strict=True):
        differences[name] = float((value - other).abs().max() / other.abs().max())
    return differences


class Sides:
    """Both trainers on a model of the same size, ready to step; with `only`, just one of them."""

    def __init__(
        self, size: Size, device: str, images: int, group_size: int, only: str | None = None, **options: Any
    ) -> None:
        self.policy = make_policy(size, device, **options["backbone"])
        objective = AGSM(group_size=group_size, **options["agsm"])
        on_gpu = device.startswith("cuda")
        if only != "ours":
            # Alone, it may use the policy's pipeline; beside ours, it needs another.
            pipeline = make_pipeline(size, device) if only is None else _freed(self.policy)
            self.published = make_published(self.policy, pipeline, group_size=group_size)
            self.pixels, self.prompts = captioned_images(images, self.policy.backbone.resolution)
        if only is None:
            few = size == "sd15"
            # With all negatives: with some, ours learns the same only on average.
            checked = AGSM(group_size=2 if few else group_size, **options["agsm"] | {"negatives": None})
            self.disagreement = self._checked(checked, 2 if few else images)
            self.published.group_size = group_size
        if only != "published":
            source = Pairs("builtin:shapes", images, **({"num_images": EPOCH * images} | options["pairs"]))
            self.trainer = Trainer(self.policy, [Term(objective, source, name="agsm")], steps=1)
        if on_gpu and only != "ours":
            self.published.to_half()
        if only != "published" and (on_gpu or options["half"]):
            self.policy.backbone.pipeline.to(torch.bfloat16)
        if only != "published" and "num_images" not in options["pairs"]:
            for _ in range(2 * EPOCH):
                source.next(self.policy)

    def _checked(self, objective: AGSM, count: int) -> dict[str, float]:
        """The differences between the two; RuntimeError unless both learn the same."""
        self.published.group_size = objective.groups.size
        with torch.backends.cudnn.flags(allow_tf32=False):
            differences = disagreement(self.policy, self.published, objective, count)
        if max(differences.values()) > TOLERANCES[self.policy.backbone.device.type]:
            raise RuntimeError(
                f"the two sides learn different things, so their speed cannot be compared: {differences}"
            )
        return differences

    def compile(self, mode: str) -> None:
        """Compile our denoiser, as `backbone.compile` does."""
        backbone: Any = self.policy.backbone
        checkpointed = bool(getattr(backbone.denoiser, "is_gradient_checkpointing", False))
        backbone.compiled = compile_denoiser(
            backbone.denoiser, mode, backbone.device, gradient_checkpointing=checkpointed
        )

    def run(self, name: str) -> Any:
        """A step of `ours` or `published`."""
        return self.trainer.run_step() if name == "ours" else self.published.step(self.pixels, self.prompts)


def _freed(policy: Policy) -> Any:
    """The policy's pipeline, without its adapters."""
    for adapter in list(policy.backbone.adapters):
        adapter.detach()
    return policy.backbone.pipeline


def main(
    size: Size = "embedded",
    device: Literal["cpu", "cuda"] = "cpu",
    images: Annotated[int, typer.Option(min=2, help="images per step")] = 4,
    group_size: Annotated[int, typer.Option(min=2, help="prompts per image")] = 4,
    resolution: Annotated[int | None, typer.Option(help="default: the model's own, but 64 for sd15 on a CPU")] = None,
    agsm: Annotated[list[str], typer.Option(help="key=value for our objective")] = [],  # noqa: B006 — typer's way
    pairs: Annotated[list[str], typer.Option(help="key=value for our source")] = [],  # noqa: B006
    gradient_checkpointing: Annotated[bool, typer.Option(help="for our side only")] = False,
    half: Annotated[bool, typer.Option(help="run our side in bfloat16 on a CPU too, as it always is on a GPU")] = False,
    compile: Annotated[str | None, typer.Option(help="backbone.compile of our side; needs more --warmup")] = None,
    memory: Annotated[bool, typer.Option(help="measure peak memory too, in two more processes")] = True,
    tag: Annotated[str, typer.Option(help="suffix of the result's name, for measurements with other options")] = "",
    repeats: Annotated[int, typer.Option(min=1)] = 25,
    warmup: Annotated[int, typer.Option(min=0)] = 2,
    results: Path = measure.RESULTS,
    memory_of: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure and record."""
    options: dict[str, Any] = {
        "backbone": {"resolution": resolution, "gradient_checkpointing": gradient_checkpointing},
        "agsm": options_of(agsm),
        "pairs": options_of(pairs),
        "half": half,
    }
    if memory_of is not None:
        peak_memory = measure.PeakMemory(device)
        side = Sides(size, device, images, group_size, only=memory_of, **options)
        if compile is not None and memory_of == "ours":
            side.compile(compile)
        for _ in range(2):
            side.run(memory_of)
        found = {"resident": peak_memory.bytes()}
        if not device.startswith("cuda"):
            found["allocated"] = measure.allocator_peak(lambda: side.run(memory_of))
        print(json.dumps(found))
        return
    names = ("ours", "published")
    peaks = {name: measure.in_fresh_process("--memory-of", name) for name in names if memory}
    sides = Sides(size, device, images, group_size, **options)
    flops = {name: measure.flops_of(lambda name=name: sides.run(name)) for name in names}  # not seen once compiled
    if compile is not None:
        sides.compile(compile)
    taken = measure.interleave(
        {name: measure.timed(lambda name=name: sides.run(name), device) for name in names},
        repeats=repeats,
        warmup=warmup,
    )
    step = measure.compare_seconds(taken["ours"], taken["published"])
    comparisons = {
        "step": step,
        "flops": measure.compare_amounts(flops["ours"], flops["published"], unit="FLOPs", of="other/ours"),
    }
    for key, name in {"resident": "memory", "allocated": "allocated"}.items():
        if memory and key in peaks["ours"]:
            comparisons[name] = measure.compare_amounts(peaks["ours"][key], peaks["published"][key], unit="bytes")
    achieved = flops["ours"] / step["ours"]
    peak = measure.peak_flops(device)
    if peak is not None:
        comparisons["peak"] = measure.compare_amounts(achieved, peak, unit="FLOPs a second")
    measure.write_result(
        f"agsm_step_{size}_{device}{tag}",
        what=f"AGSM, {images} images x {group_size} prompts, {sides.policy.backbone.resolution} px",
        device=device,
        results=results,
        comparisons=comparisons,
        figures={"flops_a_second": round(achieved)},
        disagreement=sides.disagreement,
    )


if __name__ == "__main__":
    typer.run(main)
