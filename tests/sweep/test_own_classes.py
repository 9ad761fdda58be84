"""A sweep over the user's own adapter or backbone, `module:Class`, with --allow-import."""

import pytest
from own_classes import MODULE
from sweep_parts import EVALUATE

from agsm_rl.sweep import evaluations


@pytest.mark.parametrize(("part", "name"), [("adapter", "MyLoRA"), ("backbone", "MyBase")])
def test_cells_with_the_user_s_own_class_are_measured_with_it(sweep, recipe, tmp_path, monkeypatch, part, name):
    module = f"my_swept_{part}"  # a module of its own for each case: Python imports one only once
    (tmp_path / f"{module}.py").write_text(MODULE.format(module=module))
    monkeypatch.syspath_prepend(tmp_path)
    block = recipe["adapters"]["lora"] if part == "adapter" else recipe["backbone"]
    block["use"] = f"{module}:{name}"
    drawn, measure = [], evaluations.measure

    def noting(backbone, *given, **more):
        drawn.append([type(part).__name__ for part in (backbone, *backbone.adapters)])
        return measure(backbone, *given, **more)

    monkeypatch.setattr(evaluations, "measure", noting)
    board, _ = sweep(evaluate=EVALUATE[:1], allow_imports=[module])
    assert [state.error for state in board.states.values()] == [None]
    trained = ["StableDiffusion", "MyLoRA"] if part == "adapter" else ["MyBase", "LoRA"]
    assert drawn == [trained, trained[:1]]
