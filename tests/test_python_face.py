"""`from agsm_rl import …` gives the library's nouns, and importing agsm_rl itself stays light."""

import subprocess
import sys

import agsm_rl
from agsm_rl import registry


def test_every_public_name_can_be_imported_and_is_listed():
    for name in agsm_rl.__all__:
        assert getattr(agsm_rl, name).__name__ == name
        assert name in dir(agsm_rl)
    assert set(agsm_rl._MODULE_OF) == set(agsm_rl.__all__)


def test_every_registered_objective_source_adapter_and_view_has_a_public_name():
    for kind in ("objectives", "sources", "adapters", "views"):
        for target in registry.BUILTIN[kind].values():
            assert target.partition(":")[2] in agsm_rl.__all__


def test_importing_the_package_loads_neither_torch_nor_diffusers():
    code = "import sys, agsm_rl; print([name for name in ('torch', 'diffusers', 'pydantic') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
