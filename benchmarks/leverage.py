"""Can soft tokens change what a base draws? `python benchmarks/leverage.py BASE` distils a cue's effect into them.

The base draws better when its prompt ends in a cue of reliability. Here soft tokens learn to make plain prompts behave
like cued ones, by score distillation towards the cued base, without any measure of image quality. The share of the
cue's gain that they reach is the leverage that any objective has through them.

An image's content is decided at high noise, where predictions of the noise hardly differ, so errors are weighted as
errors of the predicted image. (Without weights, the tokens learn only what changes no verdict.)
"""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
import typer
from torch import Tensor

from agsm_rl.evaluate.suites.shapes import ShapesResult
from agsm_rl.interfaces import Backbone, Batch, Metrics, PairBatch
from agsm_rl.policy import Policy
from agsm_rl.trainer import Term, Trainer

CUE = ", verified"


class CueDistillation:
    """mean s²·(p(x_t, plain prompt, adapters on) - p(x_t, cued prompt, adapters off))²; one prompt in ten is empty.

    s·p is the part of the predicted image that a prediction p decides (`image_share`).
    """

    consumes: ClassVar[type[Batch]] = PairBatch

    def check(self, batch_size: int) -> None:
        """Accepts any batch."""

    def split(self, batch: PairBatch) -> list[tuple[PairBatch, float]]:
        """The whole batch at once."""
        return [(batch, 1.0)]

    def loss(self, policy: Policy, batch: PairBatch) -> tuple[Tensor, Metrics]:
        """The distance to the cued base; `unlearned` is its share of the distance between plain and cued base."""
        backbone, draw = policy.backbone, policy.draw
        noise, t = draw.noise_like(batch.latents, batch.rows), draw.t(batch.rows)
        x_t = backbone.add_noise(batch.latents, noise, t)
        dropped = [row % 10 == draw.step % 10 for row in batch.rows.tolist()]
        plain = ["" if drop else prompt for prompt, drop in zip(batch.prompts, dropped, strict=True)]
        cued = [prompt + CUE if prompt else "" for prompt in plain]
        teacher = policy.reference(x_t, t, backbone.encode_text(cued))
        cond = backbone.encode_text(plain)
        share = image_share(backbone, noise, t)
        loss = ((policy.live(x_t, t, cond) - teacher) * share).square().mean()
        distance = ((policy.reference(x_t, t, cond) - teacher) * share).square().mean()
        return loss, {"unlearned": loss.detach() / distance}


def image_share(backbone: Backbone, like: Tensor, t: Tensor) -> Tensor:
    """|d x0 / d prediction| at noise levels t [B], at most 100, in the shape of `like`.

    x_t = a·x0 + b·noise and target = c·x0 + d·noise give x0 = (d·x_t − b·target) / (a·d − b·c). The result is √(1/ᾱ −
    1) for a noise prediction, and t for a flow.
    """
    one, zero = torch.ones_like(like), torch.zeros_like(like)
    a, b = backbone.add_noise(one, zero, t), backbone.add_noise(zero, one, t)
    c, d = backbone.target(one, zero, t), backbone.target(zero, one, t)
    return (b / (a * d - b * c)).abs().clamp(max=100.0)


def main(
    base: str,
    adapter: Annotated[str, typer.Option(help="soft_tokens or lora")] = "soft_tokens",
    steps: int = 1000,
    learning_rate: float = 1e-2,
    num_tokens: int = 4,
    jitter: float = 0.0,
    num_images: int = 600,
    guidance: list[float] = [1.0, 3.0],  # noqa: B006 (typer wants a list)
    seed: int = 0,
    split: Annotated[
        Literal["validation", "held_out"], typer.Option(help="split whose prompts are judged")
    ] = "validation",
    out: Annotated[Path | None, typer.Option(help="folder to save the adapter in")] = None,
    t5_length: Annotated[
        int | None, typer.Option(help="SD3: number of tokens that the T5 reads; fewer are faster")
    ] = None,
) -> None:
    """Distil the cue into an adapter; print verdicts for plain and cued prompts and for the adapter."""
    from agsm_rl.adapters.lora import LoRA
    from agsm_rl.adapters.soft_tokens import SoftTokens
    from agsm_rl.backbones import load_backbone
    from agsm_rl.export.attach import save_adapters
    from agsm_rl.sources.pairs import Pairs

    trained = SoftTokens(num_tokens=num_tokens, banks=1, jitter=jitter) if adapter == "soft_tokens" else LoRA(rank=8)
    policy = Policy(load_backbone(base, t5_length=t5_length), {adapter: trained}, ema_decay=0.99)
    world = "scenes" if "scenes" in Path(base).name else "shapes"
    term = Term(CueDistillation(), Pairs(f"builtin:{world}", 32, num_images=8000), name="distillation")
    trainer = Trainer(policy, [term], steps=steps, seed=seed, learning_rate=learning_rate)
    while trainer.step < steps:
        metrics = trainer.run_step()
        if trainer.step % 100 == 0:
            print(trainer.step, {key: round(value, 5) for key, value in metrics.items()}, flush=True)
    if out is not None:
        save_adapters(policy.adapters, out, metadata={"checkpoint": base})
    for scale in guidance:
        report(policy, num_images, scale, split, adapted=steps > 0, world=world)


def report(
    policy: Policy, num_images: int, guidance: float, split: str, *, adapted: bool, world: str = "shapes"
) -> None:
    """Print table rows: strict / lenient % correct for plain and cued prompts, and for plain ones with the adapter."""
    from agsm_rl.evaluate.draw_folder import DrawingSettings
    from agsm_rl.evaluate.measure import draw_and_judge
    from agsm_rl.evaluate.suites.scenes import Scenes
    from agsm_rl.evaluate.suites.shapes import Shapes, compare

    suite = (Scenes if world == "scenes" else Shapes)(split=split, num_images=num_images)

    def judged(cue: str) -> ShapesResult:
        how = DrawingSettings(guidance=guidance, num_steps=20, batch_size=50, prompt_suffix=cue)
        return suite.result(draw_and_judge(policy.backbone, [suite], how).judged[0])

    with policy.switched_off():
        results = {"plain": judged(""), "cued": judged(CUE)}
    if adapted:
        results["adapted"] = judged("")
    for name, result in results.items():
        strict, lenient = result.shares(strict=True), result.shares(strict=False)
        tags = [f"{100 * share.value:.0f} / {100 * lenient.tags[tag].value:.0f}" for tag, share in strict.tags.items()]
        overall = f"{100 * strict.overall.value:.1f} / {100 * lenient.overall.value:.1f}"
        print(f"| {guidance:g} | {name} | {overall} | {' | '.join(tags)} |", list(strict.tags), flush=True)
        if name != "plain":
            change = compare(results["plain"], result).strict.overall
            low, high = 100 * change.low, 100 * change.high
            print(
                f"{guidance:g} {name} - plain, strict: {100 * change.value:+.1f} [{low:+.1f}, {high:+.1f}]", flush=True
            )


if __name__ == "__main__":
    typer.run(main)
