"""Benchmarks' published forms of questions become ours; rows that are not in the published form are named."""

import json
import subprocess
import sys

import pytest
from agsm_rl_rewards.question_list import questions_of

from agsm_rl.errors import UserError
from agsm_rl.evaluate.question_files import read_question_file

DPG_HEADER = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language"
)


def test_geneval_2_gives_each_atom_its_answer_and_skill(tmp_path):
    row = {"prompt": "two red cups", "atom_count": 3, "skills": ["count", "attribute"]}
    row["vqa_list"] = [["How many cups are in the image?", "two"], ["Are the cups red?", "Yes"]]
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    (made,) = read_question_file("geneval2", tmp_path / "data.jsonl")
    assert (made["prompt"], made["atom_count"]) == ("two red cups", 3)
    assert [(one.text, one.answer, one.category) for one in questions_of(made, "")] == [
        ("How many cups are in the image?", "two", "count"),
        ("Are the cups red?", "Yes", "attribute"),
    ]


def test_dpg_bench_s_propositions_are_grouped_with_what_they_depend_on(tmp_path):
    rows = [
        'COCOval_1,"A crate, old.",,1,0,entity,whole,entity - whole (crate),Is there a crate?',
        'COCOval_1,,,2,1,attribute,state,"attribute - state (crate, old)",Is the crate old?',
        'COCOval_1,,,3,"1, 2",relation,spatial,"relation - spatial (crate, shelf, on)",Is the crate on a shelf?',
        'drawtext,A word.,,1,0,other,text,"other - text (sign, ""hello"")",Does it say hello?',
    ]
    (tmp_path / "dpg_bench.csv").write_text("\n".join([DPG_HEADER, *rows]))
    first, second = read_question_file("dpg_bench", tmp_path / "dpg_bench.csv")
    assert (first["prompt"], first["item_id"], second["prompt"]) == ("A crate, old.", "COCOval_1", "A word.")
    questions = questions_of(first, "")
    assert [one.category for one in questions] == ["entity - whole", "attribute - state", "relation - spatial"]
    assert [one.requires for one in questions] == [(), (0,), (0, 1)]
    assert {one.answer for one in questions} == {"yes"}


@pytest.mark.parametrize(
    ("language", "keys"), [("en", ("Testpoints", "Testpoint Description")), ("zh", ("考点", "考点对应描述"))]
)
def test_unigenbench_asks_for_each_test_point_with_its_description(tmp_path, language, keys):
    cell = json.dumps(dict(zip(keys, (["Style", "Attribute - Color"], ["ink", "a red hat"]), strict=True)))
    quoted = cell.replace('"', '""')
    text = f'index,prompt_{language},sub_dims_{language}\n0,"A hat, in ink","{quoted}"\n'
    (tmp_path / "test_prompts.csv").write_text(text, encoding="utf-8")
    (made,) = read_question_file("unigenbench", tmp_path / "test_prompts.csv")
    first, second = questions_of(made, "")
    assert "'A hat, in ink'" not in first.text and "A hat, in ink" in first.text
    assert "'Attribute - Color', namely: a red hat?" in second.text
    assert [first.category, second.category] == ["Style", "Attribute - Color"]


@pytest.mark.parametrize(
    ("form", "name", "text", "message"),
    [
        ("geneval3", "a.jsonl", "{}", "'geneval3' is not a form of questions.*Did you mean 'geneval2'"),
        ("geneval2", "none.jsonl", None, "there is no such file; fetch it from .*GenEval2"),
        ("geneval2", "a.txt", "x", "a geneval2 file is a table"),
        ("geneval2", "a.jsonl", "", "it has no rows"),
        ("geneval2", "a.jsonl", '{"prompt": "x"}', "it has no `vqa_list`.*facebookresearch/GenEval2"),
        (
            "geneval2",
            "a.jsonl",
            '{"prompt": "x", "vqa_list": [["a", "b"]], "skills": ["c", "d"]}',
            "row 0: its `vqa_list`",
        ),
        ("dpg_bench", "a.csv", f"{DPG_HEADER}\nx,y,,1,7,a,b,c (d),e?", "line 2: its `dependency` names 7"),
        ("dpg_bench", "a.csv", f"{DPG_HEADER}\nx,y,,one,0,a,b,c (d),e?", "line 2: 'one' is not a proposition's number"),
        ("dpg_bench", "a.csv", f"{DPG_HEADER}\nx,,,1,0,a,b,c (d),e?", "the item 'x' has no `text`"),
        ("unigenbench", "a.csv", "index,prompt\n0,x", "no column `prompt_en` or `prompt_zh`"),
        ("unigenbench", "a.csv", "prompt_en,sub_dims_en\nx,[", "line 2: its `sub_dims_en` is not JSON"),
        ("unigenbench", "a.csv", "prompt_en,sub_dims_en\nx,{}", "line 2: it has no `Testpoints`"),
    ],
)
def test_what_is_not_in_the_published_form_is_named_with_its_place(tmp_path, form, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_question_file(form, tmp_path / name)


def test_the_command_writes_prompts_with_questions(tmp_path):
    row = {"prompt": "a cup", "vqa_list": [["Is there a cup?", "Yes"]], "skills": ["object"]}
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    command = [sys.executable, "-m", "agsm_rl.evaluate.question_files", "geneval2"]
    done = subprocess.run([*command, "data.jsonl", "out.jsonl"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "out.jsonl: 1 prompts, 1 questions\n"), done.stderr
    assert questions_of(json.loads((tmp_path / "out.jsonl").read_text()), "")[0].text == "Is there a cup?"
    wrong = subprocess.run([*command, "none.jsonl", "out.jsonl"], cwd=tmp_path, capture_output=True, text=True)
    assert wrong.returncode == 2 and "there is no such file" in wrong.stderr
