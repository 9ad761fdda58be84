"""Write the tables in README.md from results/*.json: `python benchmarks/table.py`.

Measurements that have not been made yet have empty cells. `python benchmarks/table.py RESULT.json` prints one result.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BEGIN, END = "<!-- made by table.py -->", "<!-- end -->"


@dataclass(frozen=True)
class Row:
    """A comparison in a result, and the ratio it should reach."""

    result: str
    comparison: str
    words: str
    goal: str = ""


ROWS = (
    Row("agsm_step_embedded_cpu", "step", "AGSM step, embedded base, CPU: times faster", "≥ 1.3"),
    Row("agsm_step_embedded_cpu_cache", "step", "— ours from the encoding cache"),
    Row("agsm_step_embedded_cpu_options", "step", "— ours from the cache, in bfloat16, compiled"),
    Row("agsm_step_embedded_cpu", "flops", "— its FLOPs: times fewer"),
    Row("agsm_step_embedded_cpu", "memory", "— its peak memory: share of the published", "≤ 0.7"),
    Row("agsm_step_embedded_cpu", "allocated", "— what its step allocates at the peak, without weights: share"),
    Row("agsm_step_embedded_cpu_compiled", "step", "— with `compile: default`: times faster", "≥ 1.3"),
    Row("agsm_step_embedded_cpu_images_per_pass_2", "step", "— with `images_per_pass: 2`: times faster"),
    Row("agsm_step_embedded_cpu_images_per_pass_2", "memory", "— with `images_per_pass: 2`, its peak memory", "≤ 0.7"),
    Row(
        "agsm_step_embedded_cpu_images_per_pass_2", "allocated", "— with `images_per_pass: 2`, what its step allocates"
    ),
    Row("agsm_step_embedded_cpu_negatives_1", "step", "— with `negatives: 1`: times faster", "≥ 2"),
    Row("agsm_step_embedded_cpu_negatives_1", "memory", "— with `negatives: 1`, its peak memory: share"),
    Row("ceiling_embedded_cpu", "float32, 2 threads", "— its products: share of this machine's ceiling", "≥ 0.8"),
    Row("ceiling_embedded_cpu", "float32, 2 threads: reachable", "— a step of nothing but its products: times faster"),
    Row("ceiling_embedded_cpu", "float32, 1 thread", "— its products: share of one core's ceiling, one thread"),
    Row(
        "ceiling_embedded_cpu",
        "float32, 1 thread: reachable",
        "— a step of nothing but its products, one thread: times faster",
    ),
    Row("ceiling_embedded_cpu", "float32, 2 threads: cores busy", "— processor cores busy: share of the published"),
    Row(
        "ceiling_embedded_cpu_negatives_1",
        "float32, 2 threads",
        "— with `negatives: 1`, its products: share of the ceiling",
        "≥ 0.8",
    ),
    Row(
        "ceiling_embedded_cpu_negatives_1",
        "float32, 2 threads: reachable",
        "— with `negatives: 1`, a step of nothing but its products: times faster",
    ),
    Row(
        "ceiling_embedded_cpu",
        "float32, 1 thread: shapes",
        "— its products at best: share of a large product's rate, one thread",
    ),
    Row("ceiling_sd15_cpu", "float32, 1 thread: shapes", "— the same for SD1.5 at 512 px"),
    Row("agsm_step_sd15_cpu", "step", "AGSM step, SD1.5's size, small latents, CPU: times faster"),
    Row("agsm_step_sd15_cpu", "memory", "— its peak memory: share of the published"),
    Row("agsm_step_sd15_cuda", "step", "AGSM step, SD1.5's size, 512 px, GPU: times faster", "≥ 2"),
    Row("agsm_step_sd15_cuda", "memory", "— its peak memory: share of the published", "≤ 0.55"),
    Row("agsm_step_sd15_cuda", "peak", "— its share of the GPU's bf16 peak", "≥ 0.5"),
    Row("ceiling_sd15_cuda", "bfloat16", "— its products: share of this GPU's ceiling"),
    Row("agsm_step_sd15_cuda_regional", "step", "— with `compile: regional`: times faster"),
    Row("agsm_step_sd15_cuda_regional", "peak", "— with `compile: regional`, its share of the GPU's bf16 peak"),
    Row("agsm_step_sd15_cuda_graphs", "step", "— with `compile: reduce-overhead` (CUDA graphs): times faster"),
    Row("agsm_step_sd15_cuda_graphs", "peak", "— with `compile: reduce-overhead`, its share of the GPU's bf16 peak"),
    Row("agsm_step_sd15_cuda_negatives_1", "step", "— with `negatives: 1`: times faster"),
    Row("ddpo_step_embedded_cpu", "step", "DDPO, embedded base, CPU: times TRL's images per second", "≥ 1.5"),
    Row("ddpo_step_embedded_cpu", "memory", "— its peak memory: share of TRL's"),
    Row("ddpo_step_embedded_cpu_keep_graph", "step", "— with `keep_graph`: times TRL's images per second"),
    Row("ddpo_step_embedded_cpu_keep_graph", "memory", "— with `keep_graph`, its peak memory: share of TRL's"),
    Row("ddpo_step_embedded_cuda", "step", "DDPO, embedded base, GPU: times TRL's images per second"),
    Row("flow_grpo_step_embedded_cpu", "step", "Flow-GRPO, embedded base, CPU: times its authors' loop", "≥ 1.5"),
    Row("flow_grpo_step_embedded_cpu", "flops", "— its FLOPs: times fewer"),
    Row("sampling_embedded_cpu", "sampling", "Sampling with soft tokens, embedded base, CPU: times as long", "≤ 1.02"),
    Row("sampling_sd15_cuda", "sampling", "Sampling with soft tokens, SD1.5's size, GPU: times as long", "≤ 1.02"),
    Row("busy_neighbour", "quiet", "Following free cores, quiet machine: times as long as torch by itself", "≤ 1.05"),
    Row("busy_neighbour", "busy", "— beside one busy process: times as long as torch by itself when quiet", "≤ 2.5"),
    Row("busy_neighbour", "busy, before", "— torch by itself, beside one busy process: times as long as when quiet"),
    Row("stack_embedded_cpu", "rollouts", "AGSM + DDPO sharing rollouts: share of the sum of the two", "≤ 0.8"),
    Row("stack_embedded_cpu", "pairs", "AGSM on pairs + DDPO, nothing shared: share of the sum of the two"),
    Row("main_job_cpu", "main job", "The main job, `recipes/agsm_plus_ddpo.yaml`, base evaluated too", "≤ 360 s"),
    Row("check_cpu", "check", "`agsm-rl check` on it", "≤ 3 s"),
)
FULL_SIZES = tuple(f"full_size_{kind}_{device}" for kind in ("sd15", "sdxl", "sd3") for device in ("cpu", "cuda"))
SHALLOW = tuple(f"full_size_{kind}_cuda" for kind in ("flux", "flux_2", "z_image", "qwen_image", "sana"))
"""Newer kinds, two blocks deep."""


def make_tables(results: Path) -> str:
    """The tables as Markdown."""
    lines = ["| | goal | ratio [95 %] | ours | other | machine |", "|---|---|---|---|---|---|"]
    for row in ROWS:
        lines.append(_line([row.words, row.goal, *_cells(_read(results, row.result), row.comparison)]))
    heads = ("full size", "term", "seconds", "peak GiB", "predicted GiB", "predicted/allocated", "what", "machine")
    lines += ["", _line(list(heads)), "|" + "---|" * len(heads)]
    for name in FULL_SIZES + SHALLOW:
        lines += _full_size(name, _read(results, name))
    return "\n".join(lines) + "\n"


def goals(results: Path, *, since: float = 0.0) -> list[str]:
    """A line for each measurement that has a goal and was made `since`: what it reached, and whether that is enough."""
    lines = []
    for row in ROWS:
        file = results / f"{row.result}.json"
        if file.is_file() and file.stat().st_mtime < since:
            continue
        figures = (_read(results, row.result) or {}).get("comparisons", {}).get(row.comparison)
        if row.goal and figures is not None:
            value = figures.get("ratio", figures["ours"])
            sign, limit = row.goal.split()[:2]
            reached = value >= float(limit) if sign == "≥" else value <= float(limit)
            lines.append(f"{'reached    ' if reached else 'NOT reached'} {value:8.3g} {row.goal:8} {row.words}")
    return lines


def _read(results: Path, name: str) -> dict[str, Any] | None:
    file = results / f"{name}.json"
    return json.loads(file.read_text()) if file.is_file() else None


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cells(result: dict[str, Any] | None, comparison: str) -> list[str]:
    """Ratio, ours, other, machine."""
    figures = (result or {}).get("comparisons", {}).get(comparison)
    if result is None or figures is None:
        return [""] * 4
    interval = f" [{figures['low']:.3g}, {figures['high']:.3g}]" if "low" in figures else ""
    amounts = [_amount(figures[side], figures["unit"]) if side in figures else "" for side in ("ours", "other")]
    return [f"{figures['ratio']:.3g}{interval}" if "ratio" in figures else "", *amounts, result["machine"]]


def _amount(number: float, unit: str) -> str:
    if unit == "bytes":
        return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"
    if unit == "FLOPs":
        return f"{number / 1e9:.4g} GFLOPs"
    if unit == "FLOPs a second":
        return f"{number / 1e12:.4g} TFLOPs per second" if number >= 1e12 else f"{number / 1e9:.3g} GFLOPs per second"
    return f"{number:.3g} {unit}"


def _full_size(name: str, result: dict[str, Any] | None) -> list[str]:
    label = ", ".join(name.removeprefix("full_size_").rsplit("_", 1))
    if result is None:
        return [_line([label, *[""] * 7])]
    lines = []
    for term, step in result["steps"].items():
        memory = [_number(step.get(key)) for key in ("peak_gib", "predicted_gib", "predicted/allocated")]
        lines.append(_line([label, term, _number(step["seconds"]), *memory, result["what"], result["machine"]]))
    return lines


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def put_in(text: str, tables: str) -> str:
    """`text` with the part between the marks replaced."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{tables}{END}{rest.split(END)[1]}"


def say(file: Path) -> str:
    """A result in a few lines."""
    result = json.loads(file.read_text())
    lines = [f"  {file.stem}"]
    for name in result.get("comparisons", {}):
        ratio, ours, other, _ = _cells(result, name)
        lines.append(f"    {name or 'share'}: {ratio} ({ours}, other {other or 'none'})")
    for name, step in result.get("steps", {}).items():
        share = step.get("predicted/allocated", "not compared")
        lines.append(f"    {name}: {step['seconds']:g} s, {step['peak_gib']:g} GiB; predicted/allocated: {share}")
    return "\n".join(lines)


def main() -> None:
    """Rewrite README.md, or print a result."""
    if len(sys.argv) == 2:
        print(say(Path(sys.argv[1])))
        return
    readme = HERE / "README.md"
    readme.write_text(put_in(readme.read_text(), make_tables(HERE / "results")))


if __name__ == "__main__":
    main()
