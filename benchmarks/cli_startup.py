"""The CPU and wall-clock seconds that `agsm-rl list` and `agsm-rl check` take.

    python benchmarks/cli_startup.py

On a busy machine, look at the CPU time (user + system, over all threads); on an idle one, the wall clock shows about
the same. Each command is started several times, and the fastest start counts. `imports` is the time to load only torch,
diffusers, transformers and PEFT, which `check` needs because it builds the network; `imports, no garbage looked for` is
the same as commands load them (agsm_rl/cli/loading.py). A missing base is refused when torch is
loaded, but not diffusers. The figures go to benchmarks/results/cli_startup.json.
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
CHECK = ["-m", "agsm_rl", "check", "recipes/agsm.yaml"]
COMMANDS = {
    "python": ["-c", "pass"],
    "list": ["-m", "agsm_rl", "list"],
    "help": ["-m", "agsm_rl", "train", "--help"],
    "torch": ["-c", "import torch"],
    "imports": ["-c", IMPORTS],
    "imports, no garbage looked for": ["-c", f"import gc; gc.disable(); {IMPORTS}"],
    "check a recipe with a misspelt key": [*CHECK, "--set", "stepz=1"],
    "check a recipe with a misspelt objective": [*CHECK, "--set", "objectives.0.use=agsn"],
    "check a recipe with a misspelt option": [*CHECK, "--set", "objectives.0.temprature=1"],
    "check a recipe of a missing base": [*CHECK, "--set", "backbone.checkpoint=./gone", "--set", "evaluate=null"],
    "check": CHECK,
    "check, two terms": ["-m", "agsm_rl", "check", "recipes/agsm_plus_ddpo.yaml"],
}


def cost(arguments: list[str]) -> dict[str, float]:
    """The seconds that one start of Python with these arguments takes."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, check=False)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu_seconds": round(cpu, 2), "wall_seconds": round(wall, 2)}


def main(repeats: Annotated[int, typer.Option(min=1, help="Starts of each command.")] = 3) -> None:
    """Measure and record."""
    commands = {
        name: min((cost(arguments) for _ in range(repeats)), key=lambda start: start["cpu_seconds"])
        for name, arguments in COMMANDS.items()
    }
    what = f"the fastest of {repeats} starts of each command, one thread"
    write_result("cli_startup", what=what, device="cpu", commands=commands)


if __name__ == "__main__":
    typer.run(main)
