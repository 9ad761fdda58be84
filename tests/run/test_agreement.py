"""Whether terms agreed, in words: from metrics whose cosines are known."""

import pytest

from agsm_rl.run.agreement import agreements, agreements_to_json


def metrics(*cosines):
    return [{"step": step} | ({} if value is None else {"cosine/a/b": value}) for step, value in enumerate(cosines)]


@pytest.mark.parametrize(
    ("cosines", "words"),
    [
        ([0.5, 0.6, 0.55, 0.5], "agreed"),
        ([-0.5, -0.6, -0.55, -0.5], "in conflict"),
        ([0.02, -0.02, 0.01, -0.01], "orthogonal"),
        ([0.9, -0.9, 0.8, -0.8], "no clear agreement or conflict"),
    ],
)
def test_the_cosines_of_a_run_are_summarised_in_words(cosines, words):
    (found,) = agreements(metrics(*cosines))
    assert words in str(found)
    assert found.cosine == pytest.approx(sum(cosines) / len(cosines))
    assert found.low < found.cosine < found.high


def test_only_steps_on_which_both_terms_ran_are_counted():
    (found,) = agreements(metrics(None, 0.5, None, 0.6))
    assert found.steps == 2
    assert "over 2 common steps" in agreements_to_json([found])[0]["sentence"]


def test_terms_that_never_ran_together_are_not_judged():
    assert agreements(metrics(None, 0.5)) == []
