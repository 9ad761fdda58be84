"""What `agsm-rl list` and `agsm-rl check` cost before anything is trained: seconds of CPU time and of the clock.

    python benchmarks/cli_startup.py

CPU time (user + system, over all threads) is what counts on a machine that is busy with other things; on an idle one
the clock shows about the same. Each command is started anew, and the fastest of a few starts is kept. `imports` is what
loading torch, diffusers, transformers and PEFT alone takes, which `check` cannot do without: it builds the network.
The figures go to benchmarks/results/cli_startup.json.
"""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from measure import write_result

ROOT = Path(__file__).parents[1]
IMPORTS = "import peft; from diffusers import StableDiffusionPipeline, UNet2DConditionModel"
COMMANDS = {
    "python": ["-c", "pass"],
    "list": ["-m", "agsm_rl", "list"],
    "imports": ["-c", IMPORTS],
    "check a recipe with a misspelt key": ["-m", "agsm_rl", "check", "recipes/agsm.yaml", "--set", "stepz=1"],
    "check": ["-m", "agsm_rl", "check", "recipes/agsm.yaml"],
    "check, two terms": ["-m", "agsm_rl", "check", "recipes/agsm_plus_ddpo.yaml"],
}


def cost(arguments: list[str]) -> dict[str, float]:
    """One start of Python with these arguments, in seconds and MiB."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, check=False)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu_seconds": round(cpu, 2), "wall_seconds": round(wall, 2)}


def main(repeats: Annotated[int, typer.Option(min=1, help="Starts of each command.")] = 3) -> None:
    """Measure and record."""
    found = {
        name: min((cost(arguments) for _ in range(repeats)), key=lambda one: one["cpu_seconds"])
        for name, arguments in COMMANDS.items()
    }
    what = f"the fastest of {repeats} starts of each command, one thread"
    write_result("cli_startup", what=what, device="cpu", commands=found)


if __name__ == "__main__":
    typer.run(main)
