"""Where an AGSM step and a DDPO draw and update spend their time, and whether frozen weights get gradients.

    python benchmarks/profile_step.py [--device cpu | cuda]

Writes results/profile_embedded_<device>.txt: phases, the operators with the most self time, and the check.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal
from unittest.mock import patch

import measure
import torch
import typer
from agsm_rl_rewards.brightness import Brightness
from bases import EMBEDDED
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from agsm_rl import Policy, Term, Trainer
from agsm_rl.adapters.lora import LoRA
from agsm_rl.adapters.soft_tokens import SoftTokens
from agsm_rl.backbones import load_backbone
from agsm_rl.objectives.agsm import AGSM
from agsm_rl.objectives.ddpo import DDPO
from agsm_rl.sources.pairs import Pairs
from agsm_rl.sources.rollouts import Rollouts

WITH_MASK = (
    torch.ops.aten.convolution_backward.default,
    torch.ops.aten.native_group_norm_backward.default,
    torch.ops.aten.native_layer_norm_backward.default,
)
"""Backward operators whose last argument is a mask of the gradients to compute: input, weight, bias."""


class WeightGradients(TorchDispatchMode):
    """Counts backward calls of convolutions and norms (`calls`), and those that gave a weight's gradient (`needless`).

    No adapter trains these weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.needless = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WITH_MASK:
            self.calls += 1
            self.needless += any(args[-1][1:])
        return func(*args, **(kwargs or {}))


def backward_work(policy: Policy, rows: int = 4) -> dict[str, float]:
    """FLOPs of the live prediction of a few rows and of its backward pass, and the counts of WeightGradients.

    For activations alone, the backward pass costs about as much as the forward pass (more for attention); with
    gradients of weights, it would cost twice as much.
    """
    backbone = policy.backbone
    x_t = torch.randn(rows, *backbone.latent_shape, generator=torch.Generator().manual_seed(0)).to(backbone.device)
    t = torch.full((rows,), 0.5, device=backbone.device)
    cond = backbone.encode_text(["a red star"]).expand(rows)
    with measure.flop_counter() as forward:
        prediction = policy.live(x_t, t, cond)
    with measure.flop_counter() as backward, WeightGradients() as weights:
        torch.autograd.grad(prediction.square().sum(), list(policy.parameters().values()), allow_unused=True)
    flops = [float(counter.get_total_flops()) for counter in (forward, backward)]
    return {
        "forward": flops[0],
        "backward": flops[1],
        "backward/forward": flops[1] / flops[0],
        "calls": weights.calls,
        "needless": weights.needless,
    }


def make_trainers(device: str) -> dict[str, Trainer]:
    """AGSM over 4 images x 4 prompts with soft tokens; DDPO over 16 images x 10 steps with guidance and LoRA."""
    tokens = Policy(load_backbone(EMBEDDED, device=device), {"tokens": SoftTokens()})
    pairs = Pairs("builtin:shapes", 4, num_images=64)
    lora = Policy(load_backbone(EMBEDDED, device=device), {"lora": LoRA(rank=4)})
    drawn = Rollouts("builtin:shapes-prompts", [(Brightness(), 1.0)], num_prompts=16, images_per_prompt=1, num_steps=10)
    return {
        "AGSM, 4 images x 4 prompts, soft tokens": Trainer(tokens, [Term(AGSM(), pairs, name="agsm")], steps=1),
        "DDPO, 16 images x 10 steps, guidance 5, LoRA": Trainer(lora, [Term(DDPO(), drawn, name="ddpo")], steps=1),
    }


@contextmanager
def named_phases(trainer: Trainer) -> Iterator[None]:
    """Within the block, mark the phases of a step for the profiler; phases may be nested."""
    policy, source = trainer.policy, trainer.terms[0].source
    places = {
        "draw or read a batch": (source, "next"),
        "encode text": (policy.backbone, "encode_text"),
        "encode images": (policy.backbone, "encode_images"),
        "decode images": (policy.backbone, "decode"),
        "forward, live": (policy, "live"),
        "forward, EMA": (policy, "ema"),
        "backward": (torch.autograd, "grad"),
        "optimiser and EMA": (trainer, "_apply"),
    }

    def noted(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with record_function(f"phase: {name}"):
                return run(*args, **kwargs)

        return wrapped

    with ExitStack() as stack:
        for name, (owner, method) in places.items():
            stack.enter_context(patch.object(owner, method, noted(name, getattr(owner, method))))
        yield


def describe(title: str, trainer: Trainer, device: str, rows: int) -> str:
    """The profile of one step as text."""
    trainer.run_step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * device.startswith("cuda")
    with profile(activities=activities) as profiled, named_phases(trainer):
        seconds = measure.timed(trainer.run_step, device)()
    events = profiled.key_averages()
    phases = [event for event in events if event.key.startswith("phase: ")]
    operators = sorted(
        (event for event in events if not event.key.startswith(("phase: ", "autograd::"))),
        key=lambda event: -event.self_cpu_time_total,
    )
    # The profiler slows a step down, so look at the shares.
    inside = sum(event.self_cpu_time_total for event in operators) / 1e6
    lines = [title, "", f"{'phase (phases may be nested)':44}{'calls':>7}{'ms':>9}{'share':>8}"]
    for event in sorted(phases, key=lambda event: -event.cpu_time_total):
        lines.append(_row(event.key.removeprefix("phase: "), event.count, event.cpu_time_total, seconds.wall))
    lines += ["", f"{'operator, self time':44}{'calls':>7}{'ms':>9}{'share':>8}"]
    lines += [_row(event.key[:43], event.count, event.self_cpu_time_total, seconds.wall) for event in operators[:rows]]
    lines.append(_row("outside operators (Python, autograd)", 1, 1e6 * (seconds.wall - inside), seconds.wall))
    work = backward_work(trainer.policy)
    lines += [
        "",
        f"for 4 rows: forward {work['forward'] / 1e9:.3f} GFLOPs, backward {work['backward'] / 1e9:.3f} "
        f"({work['backward/forward']:.2f} of forward; 2 would mean gradients of weights)",
        f"{work['needless']} of {work['calls']} backward calls of convolutions and norms computed a weight's gradient",
    ]
    return "\n".join(lines)


def _row(name: str, calls: int, microseconds: float, wall: float) -> str:
    return f"{name:44}{calls:7d}{microseconds / 1e3:9.1f}{microseconds / 1e6 / wall:8.1%}"


def main(
    device: Literal["cpu", "cuda"] = "cpu",
    rows: Annotated[int, typer.Option(min=1, help="number of operators to show")] = 15,
    results: Path = measure.RESULTS,
) -> None:
    """Profile both and write the result."""
    parts = [f"{measure.machine(device)}; torch {torch.__version__}"]
    parts += [describe(title, trainer, device, rows) for title, trainer in make_trainers(device).items()]
    text = "\n\n\n".join(parts) + "\n"
    results.mkdir(parents=True, exist_ok=True)
    (results / f"profile_embedded_{device}.txt").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    typer.run(main)
