"""How much better does a base draw when its prompt ends in a cue? `python benchmarks/headroom.py builtin:scenes-sd3`

Prints, as Markdown, the share of pictures that are exactly right for plain validation prompts and for the same prompts
and noise with the cue, by tag, and the share with each fault. Prompts of one requirement differ in wording only, so the
intervals (95 %) are bootstrapped over requirements, within tags.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from agsm_rl.backbones import load_backbone
from agsm_rl.evaluate.draw_folder import DrawingSettings
from agsm_rl.evaluate.measure import draw_and_judge
from agsm_rl.evaluate.suites.scenes import Scenes, ScenesResult
from agsm_rl.evaluate.suites.shapes import ImageVerdict
from agsm_rl.shapes.judge import FAULTS
from agsm_rl.shapes.scenes_world.splits import key_of
from agsm_rl.shapes.worlds import SCENES

CUE = ", verified"
RESAMPLES = 2000


def main(
    base: str,
    guidance: list[float] = [1.0, 3.0],  # noqa: B006 (typer wants a list)
    num_images: int = 600,
    num_steps: int = 20,
    seed: int = 0,
    out: Annotated[Path | None, typer.Option(help="file for every verdict, as JSON")] = None,
) -> None:
    """Draw, judge and print."""
    torch.set_num_threads(1)
    options = {"t5_length": SCENES.text_length} if "sd3" in base else {}
    backbone = load_backbone(base, **options)
    suite = Scenes(split="validation", num_images=num_images, seed=seed)
    print(f"| guidance | prompt | overall | {' | '.join(SCENES.tags)} |\n|---|---|---|{'---|' * len(SCENES.tags)}")
    results: dict[tuple[float, str], ScenesResult] = {}
    for scale in guidance:
        for kind, cue in (("plain", ""), ("cued", CUE)):
            how = DrawingSettings(guidance=scale, num_steps=num_steps, batch_size=100, seed=seed, prompt_suffix=cue)
            result = suite.result(draw_and_judge(backbone, [suite], how).judged[0])
            assert isinstance(result, ScenesResult)
            results[scale, kind] = result
            print(f"| {scale:g} | {kind} | {' | '.join(cells(result))} |", flush=True)
        plain, cued = results[scale, "plain"], results[scale, "cued"]
        print(f"| {scale:g} | cued − plain | {' | '.join(difference(plain, cued))} |", flush=True)
    print(f"\n| guidance | prompt | {' | '.join(FAULTS)} |\n|---|---|{'---|' * len(FAULTS)}")
    for (scale, kind), result in results.items():
        scores = result.scores()
        print(f"| {scale:g} | {kind} | {' | '.join(f'{100 * scores[fault].value:.1f}' for fault in FAULTS)} |")
    if out is not None:
        content = {f"{scale:g} {kind}": result.to_json() for (scale, kind), result in results.items()}
        out.write_text(json.dumps(content), encoding="utf-8")


def cells(result: ScenesResult) -> list[str]:
    """Percent exactly right: overall, and by tag."""
    shares = result.shares(strict=True)
    return [f"{100 * share.value:.1f}" for share in (shares.overall, *(shares.tags[tag] for tag in SCENES.tags))]


def difference(before: ScenesResult, after: ScenesResult) -> list[str]:
    """After minus before in points with intervals: overall, and by tag."""
    rng = np.random.default_rng(0)
    values, draws = [], []
    for tag in SCENES.tags:
        pairs = [(a, b) for a, b in zip(before.verdicts, after.verdicts, strict=True) if a.tag == tag]
        value, drawn = bootstrapped(pairs, rng)
        values.append(value)
        draws.append(drawn)
    overall = (float(np.mean(values)), np.mean(draws, axis=0))
    return [shown(*part) for part in (overall, *zip(values, draws, strict=True))]


def bootstrapped(
    pairs: Sequence[tuple[ImageVerdict, ImageVerdict]], rng: np.random.Generator
) -> tuple[float, np.ndarray]:
    """The mean difference of strict verdicts, and of resamples whose units are requirements."""
    clusters: dict[object, list[int]] = {}
    for a, b in pairs:
        clusters.setdefault(key_of(SCENES.parse(a.prompt)), []).append(int(b.strict) - int(a.strict))
    sums = np.array([sum(part) for part in clusters.values()])
    counts = np.array([len(part) for part in clusters.values()])
    chosen = rng.integers(0, len(sums), (RESAMPLES, len(sums)))
    return float(sums.sum() / counts.sum()), sums[chosen].sum(axis=1) / counts[chosen].sum(axis=1)


def shown(value: float, draws: np.ndarray) -> str:
    """A difference in points with its interval."""
    low, high = np.quantile(draws, (0.025, 0.975))
    return f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


if __name__ == "__main__":
    typer.run(main)
