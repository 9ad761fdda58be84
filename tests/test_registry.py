"""Names: what may be used, where it comes from, and what is refused."""

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from agsm_rl import registry
from agsm_rl.errors import UserError


class Distribution:
    """The package of an entry point, as far as the registry looks at it."""

    def __init__(self, name: str) -> None:
        self.name = name


def install(monkeypatch: pytest.MonkeyPatch, *points: tuple[str, str, str]) -> None:
    """Pretend that packages register objectives: (name, target, package) each."""
    found = []
    for name, target, package in points:
        point = EntryPoint(name, target, "agsm_rl.objectives")
        vars(point).update(dist=Distribution(package))
        found.append(point)
    monkeypatch.setattr(registry, "_installed", lambda group, path: found if group == "agsm_rl.objectives" else ())


@pytest.mark.parametrize("kind", registry.KINDS)
def test_every_built_in_name_can_be_imported(kind):
    for name, target in registry.BUILTIN[kind].items():
        assert registry.load(kind, name, where="test").__name__ == target.partition(":")[2]


def test_a_package_adds_an_objective_by_an_entry_point(monkeypatch):
    install(monkeypatch, ("mine", "fractions:Fraction", "their-package"))
    assert registry.load("objectives", "mine", where="test").__name__ == "Fraction"
    assert registry.available("objectives")["mine"].package == "their-package"


def test_two_packages_with_one_name_are_refused_and_both_are_named(monkeypatch):
    install(monkeypatch, ("mine", "one:A", "first-package"), ("mine", "two:B", "second-package"))
    with pytest.raises(UserError, match="'mine'.*first-package.*second-package"):
        registry.available("objectives")


def test_a_package_cannot_take_over_a_built_in_name(monkeypatch):
    install(monkeypatch, ("agsm", "theirs:A", "their-package"))
    with pytest.raises(UserError, match="agsm-rl .*their-package"):
        registry.load("objectives", "agsm", where="test")


def test_an_unknown_name_is_reported_with_the_allowed_and_the_nearest_name():
    with pytest.raises(
        UserError, match=r"here: 'ddppo' is not an objective; allowed: agsm, .*ddpo.*Did you mean 'ddpo'\?"
    ):
        registry.load("objectives", "ddppo", where="here")


def test_unregistered_code_is_neither_imported_nor_run(tmp_path, monkeypatch):
    (tmp_path / "intruder.py").write_text("raise SystemExit('run!')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="--allow-import intruder"):
        registry.load("objectives", "intruder:Objective", where="here")
    assert "intruder" not in sys.modules


def test_an_allowed_module_of_the_working_folder_can_be_used(tmp_path, monkeypatch):
    (tmp_path / "my_objective_file.py").write_text("class Mine: ...")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    loaded = registry.load("objectives", "my_objective_file:Mine", where="here", allow_imports={"my_objective_file"})
    assert loaded.__name__ == "Mine"
    assert sys.path[-1] == str(tmp_path), "first on the path, its files would shadow installed modules"


def test_allowing_a_module_does_not_allow_others_with_the_same_prefix():
    with pytest.raises(UserError, match="--allow-import osx"):
        registry.load("objectives", "osx:Mine", where="here", allow_imports={"os"})


def test_listing_names_imports_no_torch():
    code = "import sys; from agsm_rl.registry import available; available('objectives'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_full_fine_tuning_is_refused_with_what_to_do_instead():
    for name in ("full", "full_finetune"):
        with pytest.raises(UserError, match=r"adapters.x.use: .* out of scope.*rank: 128.*backbone.unet"):
            registry.load("adapters", name, where="adapters.x.use")
