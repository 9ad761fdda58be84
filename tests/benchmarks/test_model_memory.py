"""The table of models and cards is made of the recorded predictions."""

import json

import model_memory


def test_the_page_has_the_table_of_the_recorded_predictions():
    text, results = model_memory.PAGE.read_text(), json.loads(model_memory.RESULTS.read_text())
    assert text == model_memory.put_in(text, model_memory.make_table(results)), "run model_memory.py --table"


def test_a_card_is_the_smallest_that_leaves_room():
    assert [model_memory.card_for(gib) for gib in (6.9, 7.0, 69.5, 200.0)] == ["8 GB", "12 GB", "80 GB", "none"]
