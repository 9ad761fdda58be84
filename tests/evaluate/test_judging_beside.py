"""While a GPU draws a batch, a thread judges the one before, with the same result; batches as large as memory holds."""

import threading
from types import SimpleNamespace

import pytest
import torch

from agsm_rl.doctor.memory.drawing import bytes_of_one
from agsm_rl.evaluate.batch_size import MOST, BatchSizes, fitting, shared_out
from agsm_rl.evaluate.draw_folder import DrawingSettings
from agsm_rl.evaluate.measure import draw_and_judge
from agsm_rl.evaluate.measured import entries_of
from agsm_rl.evaluate.suite import Suite
from agsm_rl.recipe.parts import Parts
from agsm_rl.recipe.schema import UNKNOWN_BATCH, Block, Evaluate

HOW = DrawingSettings(guidance=1.0, num_steps=1, batch_size=2)


class Grey(Suite):
    """Draws a picture of its seed's grey, and judges how dark it is."""

    name, num_images = "grey", 5

    def __init__(self) -> None:
        self.judged_in: set[str] = set()
        self.drawn = 0

    def prompts(self):
        return {index: {"prompt": f"prompt {index}"} for index in range(5)}

    def draw(self, backbone, prompts, seeds, metadata, *, guidance, num_steps):
        self.drawn += 1
        return torch.tensor(seeds)[:, None, None, None].expand(-1, 3, 4, 4) / 255

    def judge(self, images, prompts, metadata):
        self.judged_in.add(threading.current_thread().name)
        return [
            {"grey": image.getpixel((0, 0))[0], "prompt": prompt} for image, prompt in zip(images, prompts, strict=True)
        ]

    def result(self, judged):
        raise NotImplementedError


def on(device: str) -> SimpleNamespace:
    return SimpleNamespace(device=torch.device(device))


def test_a_batch_is_judged_while_the_next_one_is_drawn_and_the_rows_are_the_same():
    class Waits(Grey):
        def __init__(self) -> None:
            super().__init__()
            self.second = threading.Event()

        def draw(self, *arguments, **options):
            if self.drawn == 1:
                self.second.set()
            return super().draw(*arguments, **options)

        def judge(self, *arguments):
            assert self.second.wait(60)  # the first batch is judged in the time of the second one's drawing
            return super().judge(*arguments)

    done: list[int] = []
    beside, at_once = Waits(), Grey()
    drawn = draw_and_judge(on("meta"), [beside], HOW, advance=done.append)
    assert drawn == draw_and_judge(on("cpu"), [at_once], HOW)
    assert [row.row["grey"] for row in drawn.judged[0]] == [0, 1, 2, 3, 4] and done == [2, 2, 1]
    assert beside.judged_in == {"judge"} and at_once.judged_in == {threading.current_thread().name}


def test_what_a_judge_raises_beside_ends_the_evaluation():
    class Fails(Grey):
        def judge(self, *arguments):
            raise ValueError("no judgement")

    with pytest.raises(ValueError, match="no judgement"):
        draw_and_judge(on("meta"), [Fails()], HOW)


def test_an_interruption_is_raised_after_what_is_being_judged():
    looks = []

    def check() -> None:
        looks.append(1)
        if len(looks) == 2:
            raise KeyError("a signal")

    suite = Grey()
    with pytest.raises(KeyError, match="a signal"):
        draw_and_judge(on("meta"), [suite], HOW, check=check)
    assert suite.drawn == 1


@pytest.mark.parametrize(("free", "size"), [(0, 1), (9.9, 4), (10.1, 8), (19, 8), (20.1, 16), (1e9, MOST)])
def test_the_batch_is_the_largest_power_of_two_that_fits_a_share_of_the_free_memory(free, size):
    assert fitting(1.0, free) == size


@pytest.mark.parametrize(("processes", "size"), [(1, 64), (4, 64), (5, 32), (16, 8), (1000, 1)])
def test_there_is_a_batch_for_each_process(processes, size):
    assert shared_out(64, 200, processes) == size


def test_on_a_cpu_the_batch_is_the_given_or_the_usual_one():
    parts = Parts(where="test")
    sizes = BatchSizes(Block.model_validate({"use": "stable_diffusion"}), parts)

    def choose(**given) -> int:
        options = Evaluate.model_validate(given)
        return sizes.choose(options, on("cpu"), entries_of(options, parts)[0], 1.0)

    assert choose() == UNKNOWN_BATCH and choose(batch_size=3) == 3


def test_where_memory_cannot_be_predicted_the_usual_batch_is_taken_and_said_once(caplog):
    parts, options = Parts(where="test"), Evaluate()
    sizes = BatchSizes(Block.model_validate({"use": "without_a_device"}), parts)
    backbone, (entry,) = SimpleNamespace(device=torch.device("cuda"), resolution=64), entries_of(options, parts)
    assert [sizes.choose(options, backbone, entry, 1.0) for _ in range(2)] == [UNKNOWN_BATCH] * 2
    assert caplog.text.count("memory cannot be predicted") == 1


def test_each_picture_s_memory_grows_with_its_size_and_with_guidance(tiny_checkpoint):
    block = Block.model_validate({"use": "stable_diffusion", "checkpoint": str(tiny_checkpoint), "device": None})
    parts = Parts(where="test")
    small, guided, large = (bytes_of_one(block, parts, size, g) for size, g in ((32, 1.0), (32, 2.0), (64, 1.0)))
    assert 0 < small <= guided and large > 3 * small
