"""What is printed: other people's text changes nothing, and a screen that cannot show it ends nothing."""

import os
import subprocess
import sys
from io import BytesIO, StringIO, TextIOWrapper

import pytest
from rich.console import Console
from rich.table import Table

from agsm_rl.evaluate.progress import progress
from agsm_rl.run.screen import make_console, plain, say, steady_screen, styled, tell

STEERING = "\x1b[31mred\x1b]0;title\x07 \x9b2J \u202eback \r over \udcff"


def test_control_characters_are_escaped_but_line_breaks_stay():
    assert plain("a\tb\nψ 图 “ü”") == "a\tb\nψ 图 “ü”"
    assert plain(STEERING) == r"\x1b[31mred\x1b]0;title\x07 \x9b2J \u202eback \r over \udcff"


def shown(print_on, **options):
    out = StringIO()
    print_on(make_console(file=out, width=60, **options))
    return out.getvalue()


@pytest.mark.parametrize("text", ["a [/b] tag", "[red]x[/red]", "[link=http://a]b", ":smile: 12 'x'"])
def test_markup_and_emoji_codes_are_text(text):
    table = Table(title=text)
    table.add_column(text)
    table.add_row(text)
    for print_on in (lambda console: console.print(text), lambda console: tell(console, text)):
        assert shown(print_on) == f"{text}\n"
        assert shown(print_on, force_terminal=True, color_system="truecolor") == f"{text}\n"
    assert shown(lambda console: console.print(table)).count(text) == 3
    assert text in shown(lambda console: console.rule(text))
    out = StringIO()
    tell(Console(file=out), text)
    assert out.getvalue() == f"{text}\n", "a console with markup shows it as it is, too"


def test_a_progress_bar_shows_its_name_as_it_is():
    console = make_console(file=(out := StringIO()), force_terminal=True, width=100)
    with progress("drawing x[/b] {y}\x1b", total=2, console=console) as advance:
        advance(2)
    assert r"drawing x[/b] {y}\x1b" in out.getvalue()


def test_no_control_character_reaches_a_terminal_through_a_console():
    for print_on in (lambda c: c.print(STEERING), lambda c: c.print(styled(STEERING)), lambda c: c.rule(STEERING)):
        out = shown(print_on, force_terminal=True, color_system=None)
        assert "\x1b" not in out and "\x9b" not in out and "\x07" not in out


@pytest.mark.parametrize(("encoding", "seen"), [("ascii", "psi- -> +-- \\u56fe"), ("cp1252", "psi- -> ±– \\u56fe")])
def test_characters_that_an_encoding_lacks_are_escaped(encoding, seen, monkeypatch):
    stream = TextIOWrapper(BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    with steady_screen():
        say("ψ⁻ → ±– 图")
        make_console(width=8).rule("ψ")
    assert sys.stdout is stream and stream.errors == "strict"
    first, second = stream.buffer.getvalue().decode(encoding).splitlines()
    assert (first, second) == (seen, "-- psi ---")


@pytest.fixture
def run(tmp_path):
    """Run code under a steady screen in a process of its own; its exit code and what it says was lost."""

    def run(code, **options):
        file = tmp_path / "lost"
        code = f"import os\nfrom agsm_rl.run.screen import *\nwith steady_screen() as lost:\n    {code}"
        code += f"\nwith open({str(file)!r}, 'w') as file: file.write(repr(lost))"
        done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL, timeout=60, **options)
        return done.returncode, file.read_text()

    return run


def test_a_full_disk_behind_stdout_is_remembered_and_raises_nothing(run):
    with open("/dev/full", "w") as full:
        code, lost = run("[say('x' * 100) for _ in range(2000)]; make_console().print('y')", stdout=full)
    assert code == 0 and "No space left on device" in lost


def test_a_closed_reader_of_stdout_ends_nothing(run):
    reading, writing = os.pipe()
    os.close(reading)
    code = "[say('x' * 100) for _ in range(2000)]; make_console().print('y'); print('z')"
    assert run(code, stdout=writing) == (0, "[]")
    os.close(writing)


def test_the_number_of_a_closed_stdout_is_not_reused_for_the_next_file(run, tmp_path):
    file = tmp_path / "data"
    code = f"file = open({str(file)!r}, 'w'); file.write('mine'); say('not this'); os.write(1, b'nor this')"
    assert run(code, preexec_fn=lambda: os.close(1)) == (0, "[]")
    assert file.read_text() == "mine"
