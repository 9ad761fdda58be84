"""`agsm-rl eval`: measure a target, print the tables, write the figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from agsm_rl.errors import UserError
from agsm_rl.evaluate.draw_folder import DrawingSettings, pinned
from agsm_rl.evaluate.table import print_table
from agsm_rl.evaluate.target import Target
from agsm_rl.files import write_text
from agsm_rl.recipe.options import explain
from agsm_rl.recipe.schema import Evaluate
from agsm_rl.run.evaluation import measure, to_json


def evaluate_in_memory(target: Target, *, compare: bool, json_file: Path | None, **how: Any) -> None:
    """Measure a target on the shapes suite; with `compare` its base too, on the same prompts and noise.

    `how`: num_images, split, bank, prompt_suffix, seed, batch_size; guidance and num_steps (None: the target's own).
    """
    own = {"guidance": target.guidance, "num_steps": target.num_steps}
    try:
        options = Evaluate.model_validate({key: own.get(key) if value is None else value for key, value in how.items()})
    except ValidationError as error:
        raise explain(error, where="eval: ") from error
    if compare and target.handle is None:
        raise UserError("--compare: the target is a base itself; give a run folder or an exported adapter.")
    guidance = options.guidance[0]
    with target.using(options.bank):
        found = measure(target.backbone, options, guidance, {})
    if compare and target.handle is not None:
        target.handle.detach()
        base = measure(target.backbone, options, guidance, {})
        print_table(base.result, found.result)
        content = to_json([(base, found)], options)
    else:
        print_table(found.result)
        content = to_json([(None, found)], options)
    drawn = DrawingSettings(options.seed, guidance, options.num_steps, options.batch_size, options.prompt_suffix)
    content["drawing"] = pinned(target, drawn)
    if json_file is not None:
        write_text(json_file, json.dumps(content, indent=1) + "\n")
