"""PEFT's description of a LoRA is read as data: a switch is a boolean, not any text."""

import pytest

from agsm_rl.adapters.lora_config import LoraScale
from agsm_rl.errors import UserError


@pytest.mark.parametrize("value", ["false", "true", 1, [False]])
def test_a_switch_that_is_no_boolean_is_refused(value):
    with pytest.raises(UserError, match="W: use_rslora is .*; it must be true or false"):
        LoraScale.from_options({"r": 4, "lora_alpha": 4, "use_rslora": value}, where="W")


@pytest.mark.parametrize(("value", "alpha"), [(True, 8.0), (False, 4.0), (None, 4.0)])
def test_rank_stabilised_lora_divides_by_the_root_of_the_rank(value, alpha):
    scale = LoraScale.from_options({"r": 4, "lora_alpha": 4, "use_rslora": value}, where="W")
    assert scale.alpha_of("to_q") == alpha
