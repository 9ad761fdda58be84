"""Published token files: read, written back, refused where they hold more; and what `convert` writes and says."""

import math
import os
import resource
from contextlib import contextmanager

import pytest
import torch
from diffusers import AutoPipelineForText2Image
from drawing import draw
from kohya_files import MID, kohya_layer
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from agsm_rl.adapters.soft_tokens import SoftTokens
from agsm_rl.cli.commands import app
from agsm_rl.errors import UserError
from agsm_rl.export.attach import attach, read_export, write_export
from agsm_rl.export.convert import BACKBONES, convert, read_published

BASES = {"SD1.5": 768, "SDXL": 2048, "SD3": 1536}


def test_tokens_written_as_agsm_publishes_them_come_back_exactly(exported, tmp_path):
    files = convert(exported, tmp_path / "published", "agsm")
    assert [file.name for file in files] == ["soft_tokens.pth", "soft_t_tokens.pth"]
    (back,) = convert(tmp_path / "published", tmp_path / "back.safetensors", "agsm-rl")
    before, after = read_export(exported / "adapter" / "tokens.safetensors"), read_export(back)
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    same = ("kind", "banks", "num_tokens", "width", "layers")
    assert all(before[1].get(name) == after[1].get(name) for name in same)


def test_softrepa_gets_the_positive_bank_and_pictures_are_the_same(exported, tmp_path, each_checkpoint):
    files = convert(exported, tmp_path / "published", "softrepa")
    assert [file.name for file in files] == ["dc_tokens.pth", "dc_t_tokens.pth"]
    with torch.serialization.safe_globals([nn.Embedding]):
        tokens, times = (torch.load(file, weights_only=True) for file in files)
    assert isinstance(tokens, nn.Parameter) and isinstance(times, nn.Embedding)
    convert(files[0], tmp_path / "back.safetensors", "agsm-rl")
    pipeline = AutoPipelineForText2Image.from_pretrained(each_checkpoint)
    base = draw(pipeline)
    handle = attach(pipeline, exported / "adapter" / "tokens.safetensors")
    wanted = draw(pipeline)
    handle.detach()
    attach(pipeline, tmp_path / "back.safetensors")
    assert torch.equal(draw(pipeline), wanted) and not torch.equal(wanted, base)


def test_tokens_without_time_rows_are_one_file_and_the_command_says_so_in_a_line(tmp_path):
    torch.save(nn.Parameter(torch.ones(4, 32)), tmp_path / "sd1.5_dc_tokens.pth")
    assert list(read_published(tmp_path)) == ["soft_tokens"]
    done = CliRunner().invoke(app, ["convert", str(tmp_path), str(tmp_path / "out.safetensors")])
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path / 'out.safetensors'}\n")
    assert done.stderr.splitlines() == [
        f"{tmp_path / 'sd1.5_dc_tokens.pth'}: there is no sd1.5_dc_t_tokens.pth beside it; converted without time rows."
    ]
    torch.save(nn.Embedding(100, 32), tmp_path / "sd1.5_dc_t_tokens.pth")
    done = CliRunner().invoke(app, ["convert", str(tmp_path), str(tmp_path / "out.safetensors")])
    assert (done.exit_code, done.stderr) == (0, "")


def test_what_a_form_has_no_place_for_is_named(exported, tmp_path):
    told = []
    convert(exported, tmp_path / "published", "softrepa", tell=told.append)
    assert len(told) == 2
    assert "pytorch_lora_weights.safetensors: is left out (lora)" in told[0] and "has two banks" in told[1]
    told.clear()
    convert(exported, tmp_path / "both_banks", "agsm", tell=told.append)
    assert len(told) == 1 and "is left out (lora)" in told[0]


@pytest.mark.parametrize(("base", "width"), BASES.items())
def test_tokens_of_a_known_width_belong_to_their_base(base, width, backbone, tmp_path):
    """Named and shaped as SoftREPA's files."""
    layers = (5,) if base == "SD3" else ()
    torch.save(nn.Parameter(torch.ones(*layers, 4, width)), tmp_path / f"{base}_dc_tokens.pth")
    torch.save(nn.Embedding(100, width * math.prod(layers)), tmp_path / f"{base}_dc_t_tokens.pth")
    file = tmp_path / "tokens.safetensors"
    convert(tmp_path / f"{base}_dc_tokens.pth", file, "agsm-rl")
    tensors, metadata = read_export(file)
    assert tensors["soft_tokens"].shape == (1, *layers, 4, width)
    assert tensors["time_tokens"].shape == (100, width * math.prod(layers))
    assert metadata["base"] == BACKBONES[base]
    told = "on another kind of model, such as SD3" if base == "SD3" else rf"{width} wide \({BACKBONES[base]}\)"
    with pytest.raises(UserError, match=told):
        attach(backbone.pipeline, file)


class Malicious:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("name", ["dc_tokens.pth", "dc_t_tokens.pth"])
def test_a_pickle_with_more_in_it_is_refused_and_nothing_in_it_runs(name, tmp_path):
    mark = tmp_path / "mark"
    torch.save(torch.ones(4, 32), tmp_path / "dc_tokens.pth")
    torch.save(Malicious(mark), tmp_path / name)
    with pytest.raises(UserError, match=rf"{name}: refused, and nothing in it was run.*{os.name}.mkdir") as refused:
        convert(tmp_path, tmp_path / "out.safetensors", "agsm-rl")
    assert "weights_only" not in str(refused.value)  # torch advises to load it all the same
    assert not mark.exists() and not (tmp_path / "out.safetensors").exists()


def embedding(rows, width):
    return nn.Embedding(rows, width)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "0 files of soft tokens"),
        ({"dc_tokens.pth": torch.ones(4, 8), "soft_tokens.pth": torch.ones(2, 4, 8)}, "2 files of soft tokens"),
        ({"soft_tokens.pth": torch.ones(4, 8)}, r"shape \(4, 8\); it must be \(banks, n, D\)"),
        ({"soft_tokens.pth": torch.ones(3, 4, 8)}, "banks 1 or 2"),
        ({"dc_tokens.pth": torch.ones(8)}, r"it must be \(n, D\) or \(L, n, D\)"),
        ({"dc_tokens.pth": torch.ones(4, 8).long()}, "a floating-point tensor"),
        ({"dc_tokens.pth": {"weight": torch.ones(4, 8)}}, "holds a dict"),
        ({"dc_tokens.pth": torch.full((4, 8), float("nan"))}, "not finite"),
        ({"dc_tokens.pth": torch.full((4, 8), 1e300, dtype=torch.float64)}, "not finite, or too large for float32"),
        ({"dc_tokens.pth": torch.ones(4, 8).to(torch.float8_e4m3fn)}, "is float8_e4m3fn; allowed"),
        ({"dc_tokens.pth": torch.ones(4, 8).to_sparse()}, "is a sparse"),
        ({"dc_tokens.pth": torch.ones(4, 8, device="meta")}, r"empty \(meta\)"),
        (
            {"dc_tokens.pth": torch.ones(4, 8), "dc_t_tokens.pth": embedding(100, 9)},
            r"dc_t_.*\(100, 9\); it must be \(100, 8\)",
        ),
        ({"dc_tokens.pth": torch.ones(5, 4, 8), "dc_t_tokens.pth": embedding(100, 8)}, r"it must be \(100, 40\)"),
        ({"dc_tokens.pth": nn.Linear(1, 1)}, r"this file wants torch.nn.modules.linear.Linear\.$"),
        ({"dc_tokens.pth": b"version https://git-lfs.github.com/spec/v1"}, r"something else, or it is damaged\.$"),
        ({"dc_tokens.pth": b""}, r"cannot be read.*EOFError"),
        ({"dc_tokens.pth": b"PK\x03\x04"}, "cannot be read"),
    ],
)
def test_other_files_are_the_user_s_error(files, message, tmp_path):
    for name, content in files.items():
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            torch.save(content, tmp_path / name)
    with pytest.raises(UserError, match=message):
        read_published(tmp_path)


def tokens_file(folder, num_tokens, *, times=True):
    tensors = {"soft_tokens": torch.full((2, num_tokens, 32), float(num_tokens))}
    tensors |= {"time_tokens": torch.zeros(100, 32)} if times else {}
    write_export(folder / f"{num_tokens}.safetensors", tensors, {"kind": "soft_tokens"})
    return folder / f"{num_tokens}.safetensors"


@contextmanager
def files_of_at_most(size):
    """A write beyond so many bytes fails, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_fills_up_leaves_both_token_files_as_they_were(tmp_path):
    out = tmp_path / "out"
    files = convert(tokens_file(tmp_path, 4), out, "agsm")
    before, more = {file: file.read_bytes() for file in files}, tokens_file(tmp_path, 200)
    for limit in (5_000, 20_000):  # the time rows alone, and both, are too large
        with (
            files_of_at_most(limit),
            pytest.raises(UserError, match=r"OUT .*out: cannot be written \(File too large\)"),
        ):
            convert(more, out, "agsm")
        assert {file: file.read_bytes() for file in out.iterdir()} == before


def test_what_cannot_be_written_is_one_message(tmp_path):
    source, kohya = tokens_file(tmp_path, 4), tmp_path / "kohya.safetensors"
    save_file(kohya_layer(f"{MID}q"), kohya)
    (tmp_path / "taken.safetensors").mkdir()
    (tmp_path / "out" / "soft_tokens.pth").mkdir(parents=True)
    for given, out in ((kohya, "kohya.safetensors/x.safetensors"), (kohya, "taken.safetensors"), (source, "out")):
        done = CliRunner().invoke(app, ["convert", str(given), str(tmp_path / out)])
        assert done.exit_code == 2 and done.stderr.startswith(f"agsm-rl: OUT {tmp_path / out}: cannot be written")
    assert not (tmp_path / "out" / "soft_t_tokens.pth").exists()


def test_a_link_in_the_place_of_the_result_is_replaced_and_not_written_through(tmp_path):
    kohya, precious = tmp_path / "kohya.safetensors", tmp_path / "precious"
    save_file(kohya_layer(f"{MID}q"), kohya)
    precious.write_text("mine")
    (tmp_path / "out.safetensors").symlink_to(precious)
    convert(kohya, tmp_path / "out.safetensors")
    assert precious.read_text() == "mine" and read_export(tmp_path / "out.safetensors")[1]["kind"] == "lora"


def test_tokens_without_time_rows_are_not_put_beside_the_time_rows_of_others(tmp_path):
    convert(tokens_file(tmp_path, 4), tmp_path / "out", "agsm")
    with pytest.raises(UserError, match="holds soft_t_tokens.pth, the time rows of other tokens"):
        convert(tokens_file(tmp_path, 5, times=False), tmp_path / "out", "agsm")
    assert len(read_published(tmp_path / "out")["soft_tokens"][0]) == 4


def test_our_own_export_is_not_converted_to_itself(exported, tmp_path):
    with pytest.raises(
        UserError, match=r"already in agsm-rl's form, which attach\(\) takes; other forms: agsm, softrepa, kohya"
    ):
        convert(exported / "adapter" / "tokens.safetensors", tmp_path / "out.safetensors")


def test_the_command_tells_what_it_wrote_and_what_it_cannot(exported, tmp_path):
    runner = CliRunner()
    done = runner.invoke(app, ["convert", str(exported), str(tmp_path / "pth"), "--to", "agsm"])
    assert done.exit_code == 0 and done.stdout.split() == [
        str(tmp_path / "pth" / name) for name in ("soft_tokens.pth", "soft_t_tokens.pth")
    ]
    with pytest.raises(UserError, match=r"this must be a file whose name ends in .safetensors"):
        convert(exported, tmp_path / "x", "kohya")
    with pytest.raises(UserError, match="this is a file; with --to"):
        convert(exported, tmp_path / "pth" / "soft_tokens.pth", "softrepa")
    (exported / "adapter" / "tokens.safetensors").unlink()
    with pytest.raises(UserError, match=r"0 adapters of kind 'soft_tokens'.*pytorch_lora_weights.safetensors \(lora\)"):
        convert(exported, tmp_path / "pth", "agsm")


def test_without_a_form_the_name_and_the_banks_say_which(exported, tmp_path):
    def converted(source, out):
        done = CliRunner().invoke(app, ["convert", str(tmp_path / source), str(tmp_path / out)])
        assert done.exit_code == 0, done.output
        return [line.removeprefix(f"{tmp_path}/") for line in done.stdout.split()]

    assert converted("run", "two") == ["two/soft_tokens.pth", "two/soft_t_tokens.pth"]
    assert converted("two", "two.safetensors") == ["two.safetensors"]
    convert(exported, tmp_path / "one", "softrepa")
    assert converted("one", "one.safetensors") == ["one.safetensors"]
    assert converted("one.safetensors", "again") == ["again/dc_tokens.pth", "again/dc_t_tokens.pth"]
    before, _ = read_export(exported / "adapter" / "tokens.safetensors")
    assert torch.equal(read_published(tmp_path / "two")["soft_tokens"], before["soft_tokens"])
    assert torch.equal(read_published(tmp_path / "again")["soft_tokens"], before["soft_tokens"][:1])


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("dc_tokens.pth", (4, 768), {"places": "down"}),
        ("dc_tokens.pth", (4, 2048), {}),
        ("dc_tokens.pth", (5, 4, 1536), {}),
        ("soft_tokens.pth", (2, 4, 768), {}),
        ("soft_tokens.pth", (2, 4, 2048), {"guidance_bank": "negative"}),
        ("soft_tokens.pth", (2, 5, 4, 1536), {}),
    ],
)
def test_published_tokens_act_as_in_their_authors_code(name, shape, expected, tmp_path):
    torch.save(nn.Parameter(torch.ones(shape)), tmp_path / name)
    convert(tmp_path, tmp_path / "out.safetensors")
    tensors, metadata = read_export(tmp_path / "out.safetensors")
    assert {key: metadata[key] for key in ("places", "guidance_bank") if key in metadata} == expected
    tokens = SoftTokens.from_export(tensors, metadata)
    assert tokens.unet_places == (("down",) if "places" in expected else None)
    assert tokens.guidance_bank == expected.get("guidance_bank", "positive")


def test_tokens_that_belong_elsewhere_than_the_authors_put_them_are_reported(tmp_path):
    notes: list[str] = []
    for places, width in (("down", 768), ("down,mid", 768)):
        metadata = {"kind": "soft_tokens", "places": places}
        write_export(tmp_path / f"{places}.safetensors", {"soft_tokens": torch.ones(1, 4, width)}, metadata)
        convert(tmp_path / f"{places}.safetensors", tmp_path / places, "softrepa", tell=notes.append)
    assert len(notes) == 1 and "belong in the down,mid blocks, but the authors' code puts them in down" in notes[0]


def test_tokens_whose_guidance_the_authors_do_not_use_are_reported(tmp_path):
    notes: list[str] = []
    for number, more in enumerate(
        ({}, {"guidance_bank": "negative"}, {"guidance_bank": "negative", "guidance_prompt": "same"})
    ):
        file = tmp_path / f"{number}.safetensors"
        write_export(file, {"soft_tokens": torch.ones(2, 4, 2048)}, {"kind": "soft_tokens"} | more)
        convert(file, tmp_path / str(number), "agsm", tell=notes.append)
    assert len(notes) == 2
    assert "for `guidance_bank: positive`, but the authors' code draws with negative" in notes[0]
    assert "for `guidance_prompt: same`, but the authors' code draws with empty" in notes[1]
