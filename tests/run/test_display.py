"""What a person sees while a run works: on a terminal of 80 columns, and in a log."""

import signal
from io import StringIO
from types import SimpleNamespace

import pytest

from agsm_rl.evaluate.progress import progress
from agsm_rl.run.callbacks import GracefulStop, ProgressBar
from agsm_rl.run.display import RunDisplay, duration, make_bar
from agsm_rl.run.records import EventsFile
from agsm_rl.run.screen import make_console, only_what_matters, tell
from agsm_rl.training.anomalies import Event
from agsm_rl.training.stages import Stage, shown_by, stage


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def a_display(clock=None, **options):
    console = make_console(file=StringIO(), width=80, **options)
    return RunDisplay(console, **({"clock": clock} if clock else {}))


def printed(display):
    return display.console.file.getvalue().splitlines()


def screen(display):
    """The lines that a terminal of 80 columns shows."""
    console = make_console(file=(out := StringIO()), width=80)
    console.print(display.render())
    return out.getvalue().splitlines()


class Term:
    def __init__(self, name, source):
        self.name, self.source = name, source


class Source:
    def __init__(self, **metrics):
        self._metrics = metrics

    def metrics(self):
        return self._metrics


SCORES = {"reward/shapes": 0.5, "reward/sharpness": 0.25, "reward/human_preference_v2": 0.2788, "reward": 1.0}
"""What a draw of rollouts that are scored by three rewards logs."""


@pytest.fixture
def trainer():
    rollouts = Source(**SCORES)
    terms = [Term("agsm", Source()), Term("ddpo", rollouts), Term("diffusion_nft", rollouts)]
    return SimpleNamespace(terms=terms, sources={"agsm": terms[0].source, "sources.own_images": rollouts})


def step_metrics(loss, *, rollouts=True, seconds=1.5):
    metrics = {"loss": loss, "agsm/loss": loss, "agsm/grad_norm": 1.0, "seconds": seconds}
    for name in ("ddpo", "diffusion_nft") if rollouts else ():
        metrics |= {f"{name}/loss": 2 * loss} | {f"{name}/{key}": value for key, value in SCORES.items()}
    return metrics


def test_at_80_columns_the_bar_all_losses_and_all_rewards_are_on_the_screen(trainer, clock):
    display = a_display(clock, force_terminal=True)
    bar = ProgressBar(display, steps=4000, done=0, clock=clock)
    with bar:
        clock.now = 6.0
        bar.on_step(trainer, 2000, step_metrics(0.123456))
        with shown_by(display), stage("drawing images", total=64, unit="images") as advance:
            advance(16)
            lines = screen(display)
    assert all(len(line) <= 80 for line in lines)
    assert lines[0] == "training  ━━━━━━━━━─────────  2000/4000 steps  1.5 s/step  6 s left"
    shown = " ".join(lines[1:])
    for figure in ("agsm/loss 0.1235", "ddpo/loss 0.2469", "diffusion_nft/loss 0.2469", "loss 0.1235"):
        assert figure in shown
    for figure in ("reward/shapes 0.5", "reward/sharpness 0.25", "reward/human_preference_v2 0.2788"):
        assert shown.count(figure) == 1, "terms that share rollouts share their rewards"
    assert lines[-1].startswith("drawing images") and "16/64 images" in lines[-1]


def test_the_bar_stays_on_the_terminal_with_its_figures_when_the_training_has_ended(trainer, clock):
    display = a_display(clock, force_terminal=True, color_system=None)
    with display, ProgressBar(display, steps=2, done=0, clock=clock) as bar:
        for step in (1, 2):
            bar.on_step(trainer, step, step_metrics(0.5))
    last = display.console.file.getvalue().split("training")[-1]
    assert "2/2 steps" in last and "agsm/loss 0.5" in last and "\x1b[1A\x1b[2K" not in last


def test_a_log_line_averages_losses_and_keeps_each_reward_in_steps_without_rollouts(trainer, clock):
    display = a_display(clock)
    bar = ProgressBar(display, steps=40, done=0, clock=clock)
    for step, (loss, rollouts) in enumerate([(1.0, True), (0.2, False), (0.4, False)], 1):
        clock.now += 2.0
        bar.on_step(trainer, step, step_metrics(loss, rollouts=rollouts))
    first, second = printed(display)[0], printed(display)[1]
    assert len(printed(display)) == 2, "the first step, then every second one"
    assert first.startswith("step 1/40  loss 1  agsm/loss 1  ddpo/loss 2")
    clock.now += 2.0
    bar.on_step(trainer, 4, step_metrics(0.6, rollouts=False))
    second, third = printed(display)[1:]
    assert second.startswith("step 2/40  loss 0.2  agsm/loss 0.2  ddpo/loss 2")
    assert third.startswith("step 4/40  loss 0.5  agsm/loss 0.5  ddpo/loss 2"), "the mean of steps 3 and 4"
    assert "  reward/shapes 0.5  reward/sharpness 0.25  " in third and "(of step 1)" in third and "(of" not in first
    assert third.endswith("1.5 s/step  1 min left")


def test_a_resumed_run_tells_the_time_left_from_its_own_steps(trainer, clock):
    display = a_display(clock)
    bar = ProgressBar(display, steps=20, done=10, clock=clock)
    clock.now = 3.0
    bar.on_step(trainer, 11, step_metrics(1.0))
    assert printed(display)[0].endswith("27 s left")


def test_a_log_gets_a_line_after_five_silent_minutes(trainer, clock):
    display = a_display(clock)
    bar = ProgressBar(display, steps=4000, done=0, clock=clock)
    for step in range(1, 8):
        clock.now += 100.0
        bar.on_step(trainer, step, step_metrics(1.0))
    assert [line.split()[1] for line in printed(display)] == ["1/4000", "4/4000", "7/4000"]


def test_rewards_of_the_same_name_from_two_sources_are_told_apart(trainer, clock):
    trainer.terms.append(Term("flow_grpo", Source(**{"reward/shapes": 0.1, "reward": 0.1})))
    trainer.sources["flow_grpo"] = trainer.terms[-1].source
    display = a_display(clock)
    metrics = step_metrics(1.0) | {"flow_grpo/loss": 1.0, "flow_grpo/reward/shapes": 0.1, "flow_grpo/reward": 0.1}
    ProgressBar(display, steps=40, done=0, clock=clock).on_step(trainer, 1, metrics)
    line = printed(display)[0]
    assert "own_images: reward/shapes 0.5" in line and "flow_grpo: reward/shapes 0.1" in line
    assert "  reward/sharpness 0.25" in line and line.count("(weighted sum)") == 1


def test_an_announced_stage_is_in_a_log_at_once_and_the_time_left_once_it_is_known(clock):
    display = a_display(clock)
    with shown_by(display), stage("evaluating base: guidance 7", total=600, unit="images", announce=True) as advance:
        assert printed(display) == ["evaluating base: guidance 7, 0/600 images"]
        clock.now = 60.0
        advance(150)
        display.tell_if_due()
        assert printed(display)[1:] == ["evaluating base: guidance 7, 150/600 images, 3 min left"]
        clock.now = 240.0
        advance(450)
    assert printed(display)[2:] == ["evaluating base: guidance 7, 600/600 images after 4 min"]


def test_a_stage_that_takes_short_is_not_mentioned_in_a_log_and_one_that_takes_long_ever_less_often(clock):
    display = a_display(clock)
    with shown_by(display):
        with stage("waiting for rewards: hpsv2"):
            clock.now = 9.0
            display.tell_if_due()
        assert printed(display) == []
        with stage("waiting for rewards: hpsv2"):
            for _ in range(3600):
                clock.now += 1
                display.tell_if_due()
    assert printed(display)[0] == "waiting for rewards: hpsv2, 10 s so far"
    assert 10 < len(printed(display)) < 25
    assert printed(display)[-1] == "waiting for rewards: hpsv2, ended after 1 h"


def test_an_inner_stage_moves_the_outer_one_and_is_told_with_it(clock):
    display = a_display(clock, force_terminal=True)
    with shown_by(display), stage("evaluating base: guidance 7", total=100, unit="images") as advance:
        advance(0)
        with stage("denoising", total=30, unit="steps", worth=50) as inner:
            clock.now = 30.0
            inner(15)
            lines = screen(display)
        with stage("judging", worth=50):
            judging = screen(display)
    assert "0/100 images  2 min left" in lines[0], "25 of 100 images' worth of work took 30 s"
    assert lines[0].count("━") == 4 and lines[1] == "  denoising, 15/30 steps, 30 s left"
    assert judging[0].count("━") == 9, "they are drawn, and not taken back while they are judged"


def test_images_that_an_earlier_command_drew_do_not_shorten_the_time_left(clock):
    display = a_display(clock, force_terminal=True)
    with shown_by(display), stage("drawing x", total=100, done=90, unit="images") as advance:
        clock.now = 5.0
        advance(5)
        assert "95/100 images  5 s left" in screen(display)[0]


def test_a_long_name_is_shortened_and_leaves_room_for_the_figures(clock):
    display = a_display(clock, force_terminal=True)
    with shown_by(display), stage("drawing " + "a/very/long/path/" * 9, total=100, unit="images") as advance:
        advance(10)
        clock.now = 1.0
        (line,) = screen(display)
    assert len(line) <= 80 and line.startswith("drawing a/very")
    assert line.endswith("━─────────────────  10/100 images  9 s left")


def test_a_stage_that_was_counted_stays_on_the_terminal_and_one_that_was_not_goes(clock):
    display = a_display(clock, force_terminal=True, color_system=None)
    with display, shown_by(display):
        with stage("loading the base"):
            pass
        with stage("evaluating base", total=4, unit="images") as advance:
            advance(4)
    seen = display.console.file.getvalue()
    assert "4/4 images" in seen.split("loading")[-1]
    assert seen.rstrip().endswith("images") or seen.rstrip().endswith("\x1b[?25h")


def test_without_a_display_stages_are_silent(capsys):
    with stage("loading the base", announce=True) as advance:
        advance(1)
    assert capsys.readouterr() == ("", "")


def test_a_display_of_another_process_or_of_a_quiet_command_shows_nothing(trainer, clock):
    for display in (RunDisplay(make_console(file=StringIO()), enabled=False), a_display(terse=True)):
        bar = ProgressBar(display, steps=1, done=0)
        with display, shown_by(display), bar, stage("loading the base", announce=True):
            bar.on_step(trainer, 1, step_metrics(1.0))
        assert printed(display) == []


def test_quiet_leaves_what_is_important(capsys):
    with only_what_matters():
        console = make_console(stderr=True)
        tell(console, "continuing after step 3")
        tell(console, "the reward is constant", important=True)
        with progress("drawing x", total=1) as advance:
            advance(1)
        make_console().print("the table")
    assert capsys.readouterr() == ("the table\n", "the reward is constant\n")
    tell(make_console(stderr=True), "seen again")
    assert capsys.readouterr().err == "seen again\n"


def test_a_signal_is_answered_at_once_on_a_terminal_and_once_in_a_log(trainer, clock):
    terminal, log = a_display(clock, force_terminal=True), a_display(clock)
    for display in (terminal, log):
        with GracefulStop(display) as stop:
            signal.raise_signal(signal.SIGINT)
        assert stop.received == signal.SIGINT
    assert screen(terminal) == ["stopping soon, with a checkpoint; another Ctrl-C stops at once"]
    for _ in range(3):
        log.tell_if_due()
    assert printed(log) == screen(terminal)


def test_a_long_warning_is_broken_between_words_on_a_terminal_and_not_at_all_in_a_log(tmp_path):
    message = "the reward is the same for all images of a draw, and nothing can be learned from it " * 2
    for options, count in (({}, 1), ({"force_terminal": True, "color_system": None}, 3)):
        console = make_console(file=StringIO(), width=80, **options)
        EventsFile(tmp_path / f"{count}.jsonl", console).add(Event(3, "constant_reward", "x", 1.0, "warn", message))
        lines = console.file.getvalue().splitlines()
        assert len(lines) == count and " ".join(line.strip() for line in lines) == message.strip()


def test_durations_are_short():
    assert [duration(s) for s in (0, 59, 60, 3599, 3600, 4800, 86400, 97200)] == [
        "0 s", "59 s", "1 min", "1 h", "1 h", "1 h 20 min", "1 d", "1 d 3 h",
    ]  # fmt: skip


def test_a_bar_is_told_from_its_rest_without_colours_and_in_ascii():
    assert make_bar(0.5, 6).plain == "━━━───" and make_bar(0.5, 6, ascii_only=True).plain == "===---"
    assert make_bar(2.0, 4).plain == "━━━━" and make_bar(0.3, 0).plain == ""


def test_a_progress_is_shown_on_the_display_of_the_run_that_it_is_part_of(clock):
    display = a_display(clock)
    with shown_by(display), progress("measuring fid", total=5, console=make_console(file=(other := StringIO()))):
        assert printed(display) == ["measuring fid, 0/5 images"]
    assert other.getvalue() == ""
    assert Stage("x", 5, 2).done_before == 2
