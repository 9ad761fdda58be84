"""Run folders as `agsm-rl train` leaves them, made without a model: verdicts by chance, curves by formula."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import yaml
from PIL import Image, ImageDraw

from agsm_rl.evaluate.suites.geneval import GenEvalResult, ImageResult
from agsm_rl.evaluate.suites.shapes import ImageVerdict, ShapesResult

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = {"base": "grey", "trained": "seagreen"}


def judged(prompts: list[str], share: float, noise: np.ndarray, seed: int, extra: float = 0.05) -> dict:
    """A model's entry: right where the image's own luck (`noise`) and the seed's allow it."""
    luck = 0.8 * noise + 0.2 * np.random.default_rng(seed).random(len(prompts))
    rows = []
    for number, prompt in enumerate(prompts):
        strict, correct = bool(luck[number] < share), bool(luck[number] < share + extra)
        reason = "" if strict else "an extra red star" if correct else "expected one red star, found 0"
        rows.append(ImageVerdict(prompt, TAGS[number % len(TAGS)], correct, strict, reason))
    return ShapesResult(tuple(rows)).to_json()


def evaluation(prompts: list[str], scores: dict[float, tuple[float, float]], seed: int, **how) -> dict:
    """eval.json's content; `scores` are base's and trained's chances by guidance."""
    noise = np.random.default_rng(7).random(len(prompts))
    entries = []
    for guidance, (base, trained) in scores.items():
        entry = judged(prompts, trained, noise, 100 + seed) | {"guidance": guidance, "rewards": {"shapes": trained}}
        entry["base"] = judged(prompts, base, noise, 99) | {"guidance": guidance, "rewards": {"shapes": base}}
        entries.append(entry)
    head = {"split": "held_out", "seed": 0, "num_steps": 20, "step": 40}
    more = {"other_guidances": entries[1:]} if entries[1:] else {}
    return entries[0] | head | more | how


def write_run(
    folder: Path,
    *,
    seed: int = 0,
    scores: dict[float, tuple[float, float]] | None = None,
    validation: dict[float, tuple[float, float]] | None = None,
    prompts: list[str] | None = None,
    terms: tuple[str, ...] = ("agsm", "ddpo"),
    steps: int = 40,
    images: int = 2,
    rank: int = 8,
) -> Path:
    """A finished run of `terms`, each with loss, reward and gradient norm a step."""
    scores = scores or {1.0: (0.3, 0.5)}
    prompts = prompts or [f"a drawing of number {number}" for number in range(60)]
    folder.mkdir(parents=True)
    recipe = {
        "seed": seed,
        "steps": steps,
        "backbone": {"use": "stable_diffusion", "checkpoint": "builtin:shapes-sd15"},
    }
    recipe |= {
        "adapters": {"lora": {"use": "lora", "rank": rank}},
        "objectives": [{"use": t, "name": t} for t in terms],
        "evaluate": {"suite": "shapes"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "eval.json").write_text(json.dumps(evaluation(prompts, scores, seed)))
    if validation:
        chosen = [f"validation {number}" for number in range(60)]
        content = evaluation(chosen, validation, seed, split="validation")
        (folder / "eval-validation.json").write_text(json.dumps(content))
    rng = np.random.default_rng(seed)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            row = {"step": step, "loss": 1 / step, "seconds": 0.5, "images": 64.0 * ((step + 1) // 2)}
            for term in terms:
                row |= {f"{term}/loss": 1 / step, f"{term}/grad_norm": float(rng.uniform(0.1, 1))}
            if "ddpo" in terms:
                row |= {"ddpo/reward": 0.4 + 0.01 * step, "ddpo/reward/shapes": 0.4 + 0.01 * step}
            if len(terms) > 1:
                row[f"cosine/{terms[0]}/{terms[1]}"] = float(rng.normal(0, 0.1))
            file.write(json.dumps(row) + "\n")
    with (folder / "evaluations.jsonl").open("w") as file:
        for guidance, (_, trained) in scores.items():
            row = {"step": steps // 2, "guidance": guidance, "overall": trained, "strict": trained - 0.05}
            file.write(json.dumps(row | {"reward/shapes": trained - 0.04}) + "\n")
    for guidance in scores:
        for side, color in COLORS.items():
            for number in range(images):
                path = folder / "samples" / "eval" / f"guidance-{guidance:g}" / side / f"{number:04d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture = Image.new("RGB", (32, 32), "white")
                ImageDraw.Draw(picture).ellipse((4, 4, 20 + number, 24), fill=color)
                picture.save(path)
    return folder


def not_evaluated(run: Path) -> Path:
    """Leave of a run what one has whose recipe evaluates nothing: its grid of samples, base above trained."""
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"evaluate": None}))
    (run / "eval.json").unlink()
    (run / "evaluations.jsonl").unlink()
    shutil.rmtree(run / "samples" / "eval")
    Image.new("RGB", (128, 64), "seagreen").save(run / "samples" / "before_after.png")
    return run


def by_geneval(run: Path, *, trained: float, seed: int = 0, prompts: int = 24) -> Path:
    """Put an eval.json of GenEval's suite into a run: four images a prompt, tags one after the other."""
    rng, rows = np.random.default_rng(seed), []
    for index in range(prompts):
        tag = TAGS[index * len(TAGS) // prompts]
        for number in range(4):
            place = run / "geneval" / f"{index:05d}" / "samples" / f"{number:04d}.png"
            rows.append(ImageResult(str(place), tag, f"a photo of {index}", True, "", {}, {}))
    marks = {"trained": rng.random(len(rows)) < trained, "base": rng.random(len(rows)) < 0.3}
    results = {
        side: GenEvalResult(tuple(replace(row, correct=bool(mark)) for row, mark in zip(rows, found, strict=True)))
        for side, found in marks.items()
    }
    how = {"seed": 0, "guidance": 4.0, "num_steps": 28, "prompt_suffix": "", "resolution": 1024}
    content = results["trained"].to_json() | how | {"base": results["base"].to_json() | how}
    (run / "eval.json").write_text(json.dumps(content))
    for row in rows:
        place = Path(row.filename)
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), "teal").save(place)
    return run


def rewards_entry(scores: dict[str, np.ndarray], guidance: float = 1.0) -> dict:
    """One model's entry of a rewards suite; `scores` are each reward's, [prompts, images of a prompt]."""
    count, images = next(iter(scores.values())).shape
    rows = [
        {"prompt": f"a photo of {row}", "scores": {name: values[row].tolist() for name, values in scores.items()}}
        for row in range(count)
    ]
    tags = {
        name: {"correct": None, "total": count * images, "score": float(values.mean()), "low": None, "high": None}
        for name, values in scores.items()
    }
    overall = float(sum(values.mean() for values in scores.values()))
    head = {"suite": "rewards", "num_images": count * images, "num_prompts": count, "overall": overall}
    return head | {"guidance": guidance, "tags": tags, "images": rows}


def by_rewards(seed: int = 0, *, gain: float = 0.2, prompts: int = 12, images: int = 2, guidance: float = 1.0) -> dict:
    """A rewards suite's entry, base against trained, of two rewards: one rises by about `gain`, one does not."""
    base = np.random.default_rng(99).random((prompts, images))
    luck = np.random.default_rng(seed).normal(0, 0.1, (prompts, images))
    entry = rewards_entry({"sharpness": base + gain + luck, "brightness": base + luck / 10}, guidance)
    compared = {"difference": {"value": gain, "low": 0.0, "high": 1.0}, "win_rate": {"score": 0.9}}
    entry |= {"rewards": dict.fromkeys(("sharpness", "brightness"), compared)}
    return entry | {"base": rewards_entry({"sharpness": base, "brightness": base}, guidance)}


def with_suites(run: Path, suites: dict[str, list[dict]]) -> Path:
    """Put an eval.json of several suites into a run: each suite's entries by guidance."""
    first = next(iter(suites.values()))
    how = {"seed": 0, "num_steps": 20, "bank": "positive", "prompt_suffix": "", "step": 40}
    long = {name: {"use": entries[0]["suite"], "guidances": entries} for name, entries in suites.items()}
    further = {"other_guidances": first[1:]} if first[1:] else {}
    (run / "eval.json").write_text(json.dumps(first[0] | how | further | {"suites": long}))
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    asked = {name: {"use": entries[0]["suite"]} for name, entries in suites.items()}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"evaluate": {"suites": asked}}))
    return run


def write_sweep(
    folder: Path, variants: dict[str, dict], seeds: range | list[int], states: dict[str, str] | None = None
) -> Path:
    """A sweep of `variants` (write_run's options) over seeds; `states` are the cells that are not done."""
    cells = []
    for variant, options in variants.items():
        for seed in seeds:
            name, status = f"{variant}-seed{seed}", (states or {}).get(f"{variant}-seed{seed}", "done")
            if status == "done":
                write_run(folder / "cells" / name, seed=seed, **options)
            cells.append({"cell": name, "variant": variant, "axes": {}, "seed": seed, "status": status})
            cells[-1] |= {"run": f"cells/{name}", "error": "the loss is not finite" if status == "failed" else None}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps({"format": 1, "name": folder.name, "cells": cells}))
    return folder
