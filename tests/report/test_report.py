"""What a report says equals what the run folders hold; names are only text."""

import hashlib
import json
import re
from html.parser import HTMLParser
from importlib.resources import files
from statistics import mean

import pytest
import yaml
from making_runs import TAGS, by_geneval, not_evaluated, write_run, write_sweep
from PIL import Image
from typer.testing import CliRunner

from agsm_rl.cli.commands import app
from agsm_rl.errors import UserError
from agsm_rl.report.load import load
from agsm_rl.report.page import render, write_report


class Page(HTMLParser):
    """A page's data, its visible text, its scripts, and what its elements refer to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts, self.references, self.words, self.policy = [], [], [], ""
        self._inside = ""
        self.feed(text)
        (content,) = [content for attributes, content in self.scripts if attributes.get("id") == "data"]
        self.data = json.loads(content)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self._inside = tag
        if tag == "script":
            self.scripts.append([found, ""])
        if found.get("http-equiv") == "Content-Security-Policy":
            self.policy = found["content"]
        self.references += [value for name, value in attributes if name in ("src", "href", "srcset", "action")]

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1][1] += data
        elif self._inside != "style":
            self.words.append(data)


def page(*paths) -> Page:
    return Page(render(load(list(paths))))


def share(entry: dict, verdict: str = "strict") -> float:
    """Share right as the mean over tags, from the verdicts themselves."""
    by_tag = {tag: [row[verdict] for row in entry["images"] if row["tag"] == tag] for tag in TAGS}
    return mean(mean(marks) for marks in by_tag.values())


def entries(run) -> dict[float, dict]:
    content = json.loads((run / "eval.json").read_text())
    return {entry["guidance"]: entry for entry in [content, *content.get("other_guidances", [])]}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Two variants over two seeds at two guidances, one cell failed and one running."""
    low, high = {1.0: (0.3, 0.4), 2.0: (0.4, 0.45)}, {1.0: (0.3, 0.6), 2.0: (0.4, 0.55)}
    variants = {"weak": {"scores": low, "terms": ("agsm",)}, "strong": {"scores": high, "rank": 4}}
    states = {"weak-seed2": "failed", "strong-seed2": "running"}
    return write_sweep(tmp_path_factory.mktemp("sweeps") / "study", variants, range(3), states)


def test_every_score_equals_the_mean_over_tags_and_seeds_of_the_verdicts(sweep):
    found = page(sweep).data["scores"]
    assert len(found) == 2 * 2 * 3  # verdicts, guidances, models
    for one in found:
        name = "weak" if one["base"] else one["model"]
        runs = [entries(sweep / "cells" / f"{name}-seed{seed}")[one["guidance"]] for seed in (0, 1)]
        scores = [share(run["base"] if one["base"] else run, one["verdict"]) for run in runs]
        assert one["overall"][0] == pytest.approx(mean(scores), abs=1e-6)
        assert one["by_seed"] == pytest.approx(scores[: 1 if one["base"] else 2], abs=1e-6)


def test_every_difference_equals_that_of_the_verdicts_image_by_image(sweep):
    found = page(sweep).data["differences"]
    assert len(found) == 2 * 2 * 3  # verdicts, guidances, pairs of models
    for one in found:
        by_seed = []
        for seed in (0, 1):
            trained = entries(sweep / "cells" / f"{one['model']}-seed{seed}")[one["guidance"]]
            other = entries(sweep / "cells" / f"{one['minus'] if not one['base'] else one['model']}-seed{seed}")
            other = other[one["minus_guidance"]]
            by_seed.append(
                share(trained, one["verdict"]) - share(other["base"] if one["base"] else other, one["verdict"])
            )
        assert one["by_seed"] == pytest.approx(by_seed, abs=2e-6)
        value, low, high = one["overall"]
        assert value == pytest.approx(mean(by_seed), abs=2e-6) and low <= value <= high


def test_with_one_seed_the_report_repeats_eval_json_and_says_that_intervals_are_over_images(tmp_path):
    run = write_run(tmp_path / "mine", scores={1.0: (0.3, 0.6)})
    content = json.loads((run / "eval.json").read_text())
    # As watching.py adds it; written here from the verdicts alone.
    found = page(run)
    (strict,) = [one for one in found.data["scores"] if one["verdict"] == "strict" and not one["base"]]
    kept = content["strict"]
    assert strict["overall"] == pytest.approx([kept["overall"], kept["low"], kept["high"]], abs=1e-6)
    for tag, row in kept["tags"].items():
        assert strict["tags"][tag] == pytest.approx([row["score"], row["low"], row["high"]], abs=1e-6)
    assert "1 training seed" in found.text and "over images only" in found.text
    told = f"from {100 * content['base']['strict']['overall']:.1f} to {100 * kept['overall']:.1f} %"
    assert "mine raises the share of images that are exactly right " + told in found.text


def test_without_validation_no_guidance_is_called_best_and_all_are_shown(sweep):
    found = page(sweep)
    assert [view["key"] for view in found.data["views"]] == ["1", "2"]
    assert "No guidance is called the best" in found.text
    assert "guidance 1" in found.text and "guidance 2" in found.text


def test_each_models_guidance_is_chosen_on_the_validation_prompts_alone(tmp_path):
    # On the held-out prompts 2 is better for the trained model; on validation, 1 is. The base's own is 2.
    scores, chosen = {1.0: (0.3, 0.5), 2.0: (0.4, 0.7)}, {1.0: (0.2, 0.8), 2.0: (0.6, 0.5)}
    run = write_run(tmp_path / "mine", scores=scores, validation=chosen)
    found = page(run)
    own = found.data["views"][0]
    assert own["key"] == "own" and own["guidance"] == {"base": 2.0, "variants": {"mine": 1.0}}
    (change,) = [
        one
        for one in found.data["differences"]
        if (one["verdict"], one["guidance"], one["minus_guidance"]) == ("strict", 1.0, 2.0)
    ]
    measured = entries(run)
    assert change["overall"][0] == pytest.approx(share(measured[1.0]) - share(measured[2.0]["base"]), abs=2e-6)
    assert "prompts, mine (at guidance 1, the base at 2)" in found.text


def test_a_leader_is_named_by_the_validation_prompts_not_by_these(tmp_path):
    same = {1.0: (0.3, 0.5)}
    one = write_run(tmp_path / "lucky", scores={1.0: (0.3, 0.7)}, validation=same)
    other = write_run(tmp_path / "better", scores=same, validation={1.0: (0.3, 0.7)}, rank=4)
    assert page(one, other).text.count("On held-out prompts, better (at guidance 1, the base at 1) raises") == 1


@pytest.mark.parametrize("how", [{"split": "train"}, {"seed": 3}, {"prompt_suffix": ", verified"}])
def test_no_guidance_is_chosen_where_validations_are_not_alike(tmp_path, how):
    same = {1.0: (0.3, 0.5), 2.0: (0.3, 0.6)}
    one = write_run(tmp_path / "one", scores=same, validation=same)
    other = write_run(tmp_path / "other", scores=same, validation=same, rank=4)
    assert page(one, other).data["views"][0]["key"] == "own"
    content = json.loads((other / "eval-validation.json").read_text())
    (other / "eval-validation.json").write_text(json.dumps(content | how))
    found = page(one, other)
    assert [view["key"] for view in found.data["views"]] == ["1", "2"]
    assert "because the runs' own were not alike" in found.text


def test_cells_that_are_not_done_are_told_and_not_counted(sweep):
    found = page(sweep)
    assert "2 of 6 cells of the sweep are not in these figures" in found.text
    assert "weak-seed2 weak 2 failed not in the report : the loss is not finite" in found.text.replace(
        "report:", "report :"
    )
    assert "strong-seed2 strong 2 running not in the report" in found.text
    assert [one["seeds"] for one in found.data["variants"]] == [[0, 1], [0, 1]]


def test_a_finished_cell_that_was_not_evaluated_is_told(tmp_path):
    folder = write_sweep(tmp_path / "study", {"one": {}}, [0, 1])
    (folder / "cells" / "one-seed1" / "eval.json").unlink()
    found = page(folder)
    assert "1 of 2 cells of the sweep is not in these figures" in found.text and "has no eval.json" in found.text


def test_runs_of_one_recipe_are_one_variant_over_seeds(tmp_path):
    runs = [write_run(tmp_path / f"agsm-seed{seed}", seed=seed) for seed in (0, 1)]
    runs.append(write_run(tmp_path / "ddpo", terms=("ddpo",)))
    found = page(*runs)
    assert [(one["name"], one["seeds"]) for one in found.data["variants"]] == [("agsm", [0, 1]), ("ddpo", [0])]
    change = next(one for one in found.data["differences"] if not one["base"])
    assert len(change["by_seed"]) == 1  # only seed 0 is common


def test_the_first_screen_names_the_text_appended_to_the_prompts(tmp_path):
    run = write_run(tmp_path / "agsm-seed0")
    content = json.loads((run / "eval.json").read_text())
    (run / "eval.json").write_text(json.dumps(content | {"prompt_suffix": ", verified"}))
    assert "prompts with “, verified” appended, the same noise" in page(run).text


def test_a_run_that_evaluates_nothing_has_its_curves_and_samples(tmp_path):
    found = page(not_evaluated(write_run(tmp_path / "mine")), not_evaluated(write_run(tmp_path / "other", rank=4)))
    assert "How 2 variants learned." in found.text and "agsm-rl eval" in found.text
    assert found.data["views"] == found.data["scores"] == found.data["differences"] == []
    assert [run["curves"]["step"][-1] for run in found.data["runs"]] == [40, 40]
    assert sum(str(one).startswith("data:image/webp") for one in found.references) == 2


def test_what_geneval_judged_is_compared_as_the_own_suite_is(tmp_path):
    runs = [
        by_geneval(write_run(tmp_path / f"mine-seed{seed}", seed=seed), trained=0.8, seed=seed) for seed in (0, 1)
    ] + [by_geneval(write_run(tmp_path / "other-seed0", rank=4), trained=0.5, seed=2)]
    found = page(*runs)
    assert found.data["verdicts"] == {"correct": "right (by GenEval's rules)"}
    assert "96 images of 24 GenEval prompts" in found.text
    scores = {one["model"]: one["overall"][0] for one in found.data["scores"]}
    contents = [json.loads((run / "eval.json").read_text()) for run in runs]
    assert scores["mine"] == pytest.approx(mean(content["overall"] for content in contents[:2]), abs=1e-6)
    assert scores["other"] == pytest.approx(contents[2]["overall"], abs=1e-6)
    # One prompt of each tag after the other, so that pictures show all tags.
    assert [row["tag"] for row in found.data["pictures"]["prompts"][:6]] == list(TAGS)
    assert all(found.data["pictures"]["shown"]["4"]["variants"]["mine"])


def test_pictures_outside_a_run_s_folder_are_not_taken(tmp_path):
    run = by_geneval(write_run(tmp_path / "mine"), trained=0.8)
    (run / "geneval").rename(tmp_path / "elsewhere")
    content = (run / "eval.json").read_text()
    (run / "eval.json").write_text(content.replace(str(run / "geneval"), str(tmp_path / "elsewhere")))
    assert page(run).data["pictures"]["images"] == {}


def test_a_link_out_of_a_run_s_folder_is_not_followed(tmp_path):
    run, other = write_run(tmp_path / "mine"), not_evaluated(write_run(tmp_path / "other"))
    Image.new("RGB", (8, 8)).save(tmp_path / "private.png")
    for picture in [*run.rglob("0*.png"), *other.rglob("*.png")]:
        picture.unlink()
        picture.symlink_to(tmp_path / "private.png")
    assert page(run).data["pictures"]["images"] == {}
    assert not any(str(one).startswith("data:image") for one in page(other).references)


@pytest.mark.parametrize("harm", ["null byte", "not all", "a verdict of another suite"])
def test_what_is_odd_in_an_evaluation_by_geneval_costs_pictures_at_most(tmp_path, harm):
    run = by_geneval(write_run(tmp_path / "mine"), trained=0.8)
    content = json.loads((run / "eval.json").read_text())
    for row in [*content["images"], *content["base"]["images"]]:
        row |= {"filename": "a\0b"} if harm == "null byte" else {"strict": True} if harm.startswith("a verdict") else {}
    if harm == "not all":
        del content["images"][3]["filename"]
    (run / "eval.json").write_text(json.dumps(content))
    found = page(run).data
    assert list(found["verdicts"]) == ["correct"]
    assert bool(found["pictures"]["shown"].get("4", {}).get("variants")) is harm.startswith("a verdict")


def test_a_run_that_went_on_after_it_was_measured_is_told(tmp_path):
    run = by_geneval(write_run(tmp_path / "mine"), trained=0.8)
    content = json.loads((run / "eval.json").read_text())
    (run / "adapter").mkdir()
    (run / "adapter" / "tokens.safetensors").write_bytes(b"of step 2")
    digests = {"tokens.safetensors": hashlib.sha256(b"of step 2").hexdigest()}
    (run / "eval.json").write_text(json.dumps(content | {"drawing": {"adapters": digests}}))
    assert load([run]).evaluated
    (run / "adapter" / "tokens.safetensors").write_bytes(b"of step 3")
    with pytest.raises(UserError, match="gone on since"):
        load([run])


def test_curves_have_steps_seconds_and_images_so_far(tmp_path):
    run = write_run(tmp_path / "mine", steps=40)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')  # a line torn by a kill
    (found,) = page(run).data["runs"]
    curves = found["curves"]
    assert curves["step"] == list(range(1, 41))
    assert curves["seconds"][-1] == 20 and curves["images"][-1] == 64 * 20
    assert curves["metrics"]["ddpo/reward"][9] == pytest.approx(0.5)
    assert found["rewards"]["shapes"] == pytest.approx([0.425, 0.785])  # first and last four steps
    assert [(row["step"], round(row["strict"], 6)) for row in found["evaluations"]] == [
        (0, round(share(entries(run)[1.0]["base"]), 5)),
        (20, 0.45),
        (40, round(share(entries(run)[1.0]), 5)),
    ]


def test_a_reward_that_is_only_watched_is_not_called_trained(tmp_path):
    run = write_run(tmp_path / "mine")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line | {"ddpo/reward/watched": 1.0, "ddpo/reward/half": 1.0} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    rewards = {"shapes": 1.0, "watched": {"weight": 0.0}, "half": {"weight": 0.5}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"sources": {"own": {"rewards": rewards}}}))
    assert list(page(run).data["runs"][0]["rewards"]) == ["shapes", "half"]


def test_each_image_stands_with_its_own_verdict_and_equal_images_are_kept_once(sweep):
    found = page(sweep).data["pictures"]
    run = sweep / "cells" / "strong-seed0"
    rows = found["shown"]["2"]["variants"]["strong"]
    for number, shot in enumerate(rows[:2]):
        verdict = entries(run)[2.0]["images"][number]
        assert (shot["strict"], shot["correct"], shot["reason"]) == tuple(
            verdict[k] for k in ("strict", "correct", "reason")
        )
        assert found["images"][shot["image"]].startswith("data:image/png;base64,")
    assert rows[2] is None  # only two were kept
    assert len(found["images"]) == 4  # base and trained, two each, the same at all guidances


def test_recipes_are_there_with_what_differs(sweep):
    text = page(sweep).text
    assert "adapters.lora.rank 8 4" in text
    assert "objectives.ddpo – {name: ddpo, use: ddpo}" in text
    assert text.count("checkpoint: builtin:shapes-sd15") == 2


# ---- the file -------------------------------------------------------------------------------------------------------


def test_the_command_writes_the_report_beside_a_run_or_here_or_where_it_is_told(tmp_path, sweep, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "mine")
    done = CliRunner().invoke(app, ["report", str(run)])
    assert done.exit_code == 0 and (run / "report.html").is_file()
    other = write_run(tmp_path / "other", rank=4)
    done = CliRunner().invoke(app, ["report", str(run), str(other)])
    assert done.exit_code == 0 and done.output.strip() == "report.html" and (tmp_path / "report.html").is_file()
    done = CliRunner().invoke(app, ["report", str(run), str(other), "-o", str(tmp_path / "a.html")])
    assert done.exit_code == 0 and done.output.strip() == str(tmp_path / "a.html")
    assert CliRunner().invoke(app, ["report", str(sweep), "-o", str(tmp_path / "b.html")]).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}", "{run}"], "the same run twice"),
        (["{run}", "-o", "{run}"], "give a file"),
        (["{run}", "-o", "{run}/no/a.html"], "there is no folder"),
        (["{run}/samples"], "is no run folder"),
    ],
)
def test_a_wrong_command_is_one_message_and_exit_code_2(arguments, message, tmp_path):
    run = write_run(tmp_path / "mine")
    done = CliRunner().invoke(app, ["report", *(one.format(run=run) for one in arguments)])
    assert done.exit_code == 2 and message in " ".join(done.output.split())


def test_the_same_runs_give_the_same_file(tmp_path, sweep):
    for name in ("a.html", "b.html"):
        write_report([sweep], tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_the_page_refers_to_nothing_outside_and_runs_only_its_own_scripts(sweep):
    found = page(sweep)
    assert all(reference.startswith(("#", "data:")) for reference in found.references)
    scripts = [content for attributes, content in found.scripts if attributes.get("type") != "application/json"]
    assert len(scripts) == 3 and "default-src 'none'" in found.policy
    import base64

    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in found.policy


HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>{{ 7 * 7 }}"


def test_names_and_prompts_are_text_and_never_markup(tmp_path):
    folder = hostile_sweep(tmp_path)
    found = page(folder)
    assert len(found.scripts) == 4 and len(found.references) == len(page_of_plain_names(tmp_path).references)
    assert found.data["pictures"]["prompts"][0]["prompt"] == f"{HOSTILE} 0"
    assert found.data["variants"][0]["name"] == HOSTILE
    assert HOSTILE in found.text


def hostile_sweep(tmp_path):
    """A sweep whose variant, prompts and errors are an attack."""
    prompts = [f"{HOSTILE} {number}" for number in range(12)]
    folder = write_sweep(tmp_path / "study", {"one": {"prompts": prompts}}, [0, 1], {"one-seed1": "failed"})
    content = json.loads((folder / "sweep.json").read_text())
    for cell in content["cells"]:
        cell |= {"variant": HOSTILE, "error": HOSTILE}
    (folder / "sweep.json").write_text(json.dumps(content | {"name": HOSTILE}))
    return folder


def page_of_plain_names(tmp_path):
    return page(write_sweep(tmp_path / "plain", {"one": {}}, [0, 1], {"one-seed1": "failed"}))


PUBLISHED = {
    "d3.min.js": ("7.9.2", "912111098ea99503a6f4967361d2bbdc9dbf58cf9c678c8e27e5b02d1a07f0c1"),
    "plot.umd.min.js": ("0.6.17", "4358086467740777dd788d6b27a95cebdbaefdd50c730a3060117073bd7134cb"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_embedded_libraries_are_the_published_files_with_their_licence(name):
    version, digest = PUBLISHED[name]
    assets = files("agsm_rl.report") / "assets"
    assert hashlib.sha256((assets / name).read_bytes()).hexdigest() == digest
    licences = (assets / "LICENSES.txt").read_text()
    assert (
        re.search(rf"{version} \({re.escape(name)}\)", licences)
        and "permission notice appear in all copies" in licences
    )


ODD_FIGURES = [float("nan"), float("inf"), 1e308, 10**400, True, "text", None, [1]]


def test_figures_that_cannot_be_shown_leave_the_page_whole(tmp_path):
    run = write_run(tmp_path / "mine", scores={1.0: (0.3, 0.5)})
    content = json.loads((run / "eval.json").read_text())
    content["rewards"] = {"a": float("nan"), "b": 0.5}
    content["base"]["rewards"] = {"a": 0.0, "b": float("inf")}
    (run / "eval.json").write_text(json.dumps(content))
    with (run / "metrics.jsonl").open("a") as file:
        for step, odd in enumerate(ODD_FIGURES, start=41):
            row = {"step": step, "loss": odd, "seconds": odd, "images": odd, "ddpo/reward/shapes": odd, "odd": odd}
            file.write(json.dumps(row) + "\n")
    with (run / "evaluations.jsonl").open("a") as file:
        for step, odd in enumerate(ODD_FIGURES):
            file.write(json.dumps({"step": step, "guidance": odd}) + "\n")
            file.write(json.dumps({"step": step, "guidance": 1.0, "strict": odd, "reward/shapes": odd}) + "\n")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    odd_keys = {"list": [1, {2: 3, "x": float("nan")}], "mixed": {0: 1, "a": 2}, "text": "half \ud800"}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe | odd_keys))
    write_report([run, write_run(tmp_path / "other", rank=4)], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    found = json.loads(re.search('id="data">(.*?)</script>', text, re.S)[1], parse_constant=pytest.fail)
    curves = found["runs"][0]["curves"]
    assert curves["seconds"] is None and curves["images"] is None, "an axis has every step or is left out"
    assert "odd" not in curves["metrics"]
    assert {row["step"]: row["strict"] for row in found["runs"][0]["evaluations"]}[2] is None
    rewards = [row["rewards"] for row in found["runs"][0]["evaluations"] if row["step"] in (0, 40)]
    assert rewards == [{"a": 0.0}, {"b": 0.5}]
