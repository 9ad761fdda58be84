"""Drawing images step by step, with the path that led to them; and which of the steps have noise."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agsm_rl.errors import UserError, unknown_name
from agsm_rl.interfaces import Sampler, Shard
from agsm_rl.policy import Policy
from agsm_rl.training.kept_graph import KeptGraph
from agsm_rl.training.limits import MAX_SAMPLING_STEPS
from agsm_rl.training.randomness import Draw, stream
from agsm_rl.training.sampling import DDIM, has_noise, log_density, noises_of, step_distribution
from agsm_rl.training.stages import stage

PUBLISHED_LEVEL = 0.7
"""Flow-GRPO's a."""


@dataclass(frozen=True)
class StepNoise:
    """The noise of a draw's steps: its `form`, its `level` (η of `ddim`, else a), and the steps that have any."""

    form: str = DDIM
    level: float = 1.0
    window: range | None = None
    """None: all steps."""

    def at(self, k: int) -> float:
        """The level of step k: 0 outside the window."""
        return self.level if self.window is None or k in self.window else 0.0

    def noisy_steps(self, sampler: Sampler, num_steps: int) -> tuple[int, ...]:
        """The random steps (standard deviation above 0) among all `num_steps`."""
        return tuple(k for k in range(num_steps) if has_noise(sampler, k, eta=self.at(k), noise=self.form))


def check_noise(
    noise: str | None, noise_level: float | None, eta: float, num_steps: int, *, same_latent: bool = False
) -> None:
    """UserError for options that fit no backbone."""
    if num_steps > MAX_SAMPLING_STEPS:
        raise UserError(f"num_steps: got {num_steps}, but a sampler has {MAX_SAMPLING_STEPS} steps at most")
    forms = ("flow_sde", "cps", DDIM)
    if noise is not None and noise not in forms:
        raise unknown_name("noise", noise, "a form of noise", forms)
    if noise_level is not None and (noise_level <= 0 or (noise == "cps" and noise_level > 1)):
        allowed = "in (0, 1]" if noise == "cps" else "above 0"
        raise UserError(f"noise_level: got {noise_level}, but it must be {allowed} (published: {PUBLISHED_LEVEL})")
    if not 0 <= eta <= 1:
        raise UserError(f"eta: got {eta}, but it must lie in [0, 1] (published: 1)")
    if same_latent and eta == 0:
        raise UserError(
            "same_latent: true, but with `eta: 0` nothing else is random, and all images of a prompt would be the "
            "same; set `eta` above 0, or leave same_latent out"
        )


def check_has_noise(eta: float, **noise: Any) -> None:
    """UserError where an option of the noise between steps is given, and there is none."""
    for name, value in noise.items():
        if value is not None and eta == 0:
            raise UserError(
                f"{name}: {value} has no effect with `eta: 0`, which draws without noise between steps; set `eta` "
                f"above 0, or leave {name} out"
            )


def check_has_guidance(guidance: float, **unconditional: Any) -> None:
    """UserError where an option of guidance's unconditional branch is given, and there is no guidance."""
    for name, value in unconditional.items():
        if value and guidance == 1:
            raise UserError(
                f"{name}: '{value:.60}' has no effect with `guidance: 1`, which is none; raise guidance, or leave "
                f"{name} out"
            )


def choose_noise(
    sampler: Sampler,
    num_steps: int,
    *,
    noise: str | None,
    eta: float,
    noise_level: float | None,
    window: range | None,
) -> StepNoise:
    """The noise that the options of rollouts mean on a backbone with this sampler; UserError where they do not fit.

    Of `flow_sde` the last step has none, as in the authors' later code: its Gaussian is so narrow that it would carry
    more than half of a policy gradient, and its noise would stay in the image.
    """
    known = noises_of(sampler)
    form = known[0] if noise is None else noise
    if form not in known:
        raise unknown_name("noise", form, "a form of noise that this backbone's sampler has", known)
    if eta == 0:
        return StepNoise(form, 0.0)
    if form == DDIM:
        if noise_level is not None:
            raise UserError(
                f"noise_level: {noise_level} belongs to the SDEs of flow models, but the steps here are DDIM's, whose "
                "noise `eta` scales; leave noise_level out"
            )
        return StepNoise(form, eta, window)
    if eta != 1:
        raise UserError(
            f"eta: {eta} scales the noise of DDIM's steps, but this flow model draws with `noise: {form}`; set "
            f"`noise_level` instead (published: {PUBLISHED_LEVEL}), or `noise: ddim` to draw as earlier versions did"
        )
    if window is None and form == "flow_sde":
        window = range(num_steps - 1)
    return StepNoise(form, PUBLISHED_LEVEL if noise_level is None else noise_level, window)


class SDEWindow:
    """Noise in a few consecutive steps only: Flow-GRPO-Fast, and MixGRPO (arXiv 2507.21802).

    `size` steps within `range` [first, end), which the window never leaves. `move`: `random`, a place drawn for each
    draw (Flow-GRPO-Fast), or a number: one step further every so many draws, from the end back to the first
    (MixGRPO: size 4, every 25).
    """

    def __init__(self, options: Mapping[str, Any], num_steps: int) -> None:
        allowed: dict[str, Any] = {"size": 2, "range": [0, max(2, num_steps // 2)], "move": "random"}
        for name in options:
            if name not in allowed:
                raise unknown_name("sde_window", name, "one of its options", tuple(allowed))
        given = allowed | dict(options)
        size, bounds, move = given["size"], given["range"], given["move"]
        if not _is_count(size) or size < 1:
            raise UserError(f"sde_window.size: got {size!r}, but it must be a whole number of steps, 1 or more")
        if not (isinstance(bounds, list | tuple) and len(bounds) == 2 and all(_is_count(bound) for bound in bounds)):
            raise UserError(f"sde_window.range: got {bounds!r}, but it must be two steps, [first, end]")
        if not 0 <= bounds[0] <= bounds[1] - size or bounds[1] > num_steps:
            raise UserError(
                f"sde_window.range: got {list(bounds)}, but it must lie within [0, {num_steps}], the steps, and "
                f"hold the window of {size}"
            )
        if move != "random" and not (_is_count(move) and move >= 1):
            raise UserError(
                f"sde_window.move: got {move!r}, but it must be 'random', or the number of draws between two moves"
            )
        self.size, self.first, self.end, self.move = size, bounds[0], bounds[1], move

    def at(self, seed: int, name: str, draws: int) -> range:
        """The window of a source's draw number `draws`, the same in all processes and after a resume."""
        places = self.end - self.size - self.first + 1
        if self.move == "random":
            place = int(stream(seed, f"{name}/window", draws).integers(places))
        else:
            place = draws // self.move % places
        return range(self.first + place, self.first + place + self.size)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_keeps(
    keep_graph: bool, graph_memory: float, keep_means: bool, *, updates: int, drawn_by: str, eta: float
) -> None:
    """UserError if a draw's graph or means are to be kept, but there are none, or none that are learned from."""
    if drawn_by not in ("live", "ema", "old"):
        raise unknown_name("drawn_by", drawn_by, "a set of parameters", ("live", "ema", "old"))
    if not 0 <= graph_memory < 1:
        raise UserError(f"graph_memory: got {graph_memory}, but it must lie in [0, 1)")
    if keep_graph:
        _check_keeps_graph(updates=updates, drawn_by=drawn_by, eta=eta)
    if keep_means and (drawn_by != "live" or eta == 0):
        raise UserError(
            "keep_means: true, but with `eta: 0`, or `drawn_by` other than live, no path is kept whose steps have "
            "means; leave keep_means out"
        )


def _check_keeps_graph(*, updates: int, drawn_by: str, eta: float) -> None:
    """UserError if the predictions of a draw are not those that are learned from."""
    if updates > 1:
        raise UserError(
            f"keep_graph: true, but with `updates: {updates}` the later updates learn at other parameters than those "
            "that drew; set `updates: 1`, or leave keep_graph out"
        )
    if drawn_by != "live":
        raise UserError(
            f"keep_graph: true, but `drawn_by: {drawn_by}` draws by parameters that are not trained; set `drawn_by: "
            "live`, or leave keep_graph out"
        )
    if eta == 0:
        raise UserError(
            "keep_graph: true, but with `eta: 0` no path is kept, and no policy gradient can learn from it; set `eta` "
            "above 0, or leave keep_graph out"
        )


def draw_trajectories(
    policy: Policy,
    prompts: list[str],
    draw: Draw,
    rows: Tensor,
    *,
    num_steps: int,
    guidance: float,
    noise: StepNoise,
    negative_prompt: str = "",
    starts: Tensor | None = None,
    keep_path: bool = True,
    graph: KeptGraph | None = None,
    means: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample from the live policy: states [B, K + 1, C, h, w] from noise to image, and log-probabilities [B, K].

    Images begin from the noise of the rows `starts` [B], else from their own. Without `keep_path`, the finished images'
    latents alone, [B, 1, C, h, w]. Each step is added to a `graph`, with gradients from its mean to the parameters, but
    none from one step to another. Its mean is added to `means`.
    """
    backbone = policy.backbone
    sampler = backbone.sampler(num_steps)
    cond, uncond = backbone.encode_text(prompts), backbone.encode_negative(negative_prompt)
    like = torch.empty(len(prompts), *backbone.latent_shape, device=backbone.device, dtype=cond.embeds.dtype)
    states, log_probs = [draw.noise_like(like, rows if starts is None else starts, purpose="start")], []
    with stage("denoising", total=num_steps, unit="steps", worth=len(prompts)) as advance:
        for k in range(num_steps):
            x_t, level = states[-1], noise.at(k)
            with nullcontext() if graph is None else graph.recording(k, backbone.device):
                mean, std = step_distribution(
                    policy.live,
                    sampler,
                    k,
                    x_t,
                    cond,
                    uncond,
                    guidance=guidance,
                    eta=level,
                    noise=noise.form,
                    detach_uncond=graph is not None and graph.detach_uncond,
                )
            if graph is not None:
                graph.add(k, mean, std)
                mean = mean.detach()
            if means is not None:
                means.append(mean)
            added = draw.noise_like(x_t, rows, purpose=f"step {k}") if level else 0
            states.append((mean + std * added).to(x_t.dtype))
            log_probs.append(log_density(states[-1], mean, std, noise=noise.form))
            if not keep_path:
                states = states[-1:]
            advance(1)
    return torch.stack(states, dim=1), torch.stack(log_probs, dim=1)


def check_latents(latents: Tensor, prompts: list[str], shard: Shard, *, name: str, first: bool) -> float:
    """Root mean square of the largest of all processes' latents; UserError, in all alike, if some are not finite.

    `prompts` are those of all processes; `first`: nothing has been trained yet.
    """
    sizes = shard.gather(latents.float().square().flatten(1).mean(1).sqrt()).cpu()
    if not torch.isfinite(sizes).all():
        bad = (~torch.isfinite(sizes)).nonzero().flatten().tolist()
        cause = (
            "nothing has been trained yet, so the cause is the base, its scheduler or its dtype (or what "
            "`start_from` loaded). Check what `agsm-rl sample` draws from it"
            if first
            else "the trained parameters have diverged. Start a new run with a lower optimizer.learning_rate; "
            "`start_from: <a run>` starts from what that run exported"
        )
        raise UserError(
            f"{name}: {len(bad)} of the {len(sizes)} images drawn are not finite, the first for the prompt "
            f"'{prompts[bad[0]]}': {cause}"
        )
    return float(sizes.max())
