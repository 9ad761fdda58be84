"""Rewards in other processes: whatever happens over there, a batch has its right scores, or there is a clear error."""

import os
import random
import signal
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from agsm_rl_rewards.worker.reward import WorkerReward
from running_workers import QUICK, images

from agsm_rl.errors import UserError

MEAN = """
    class Mean:
        def __call__(self, images, prompts):
            return images.mean(axis=(1, 2, 3)) + [len(prompt) for prompt in prompts]
    serve(Mean)
"""


def test_a_script_of_the_users_own_scores_exactly(script):
    pictures = torch.rand(3, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    reward = script(MEAN)
    assert reward.name == "my_reward"
    expected = pictures.mean(dim=(1, 2, 3)) + torch.tensor([1.0, 2.0, 0.0])
    torch.testing.assert_close(reward(pictures, ["a", "ü€", ""]), expected)


def test_a_script_gets_the_prompts_other_columns_if_it_takes_them(script):
    reward = script(
        """
        class Counted:
            def __call__(self, images, prompts, metadata):
                return [len(row) + row.get("stars", 0) for row in metadata]
        serve(Counted)
    """
    )
    rows = [{"stars": 3, "include": [{"class": "tv"}]}, {}]
    assert reward(images(2), ["a", "b"], rows).tolist() == [5.0, 0.0]
    assert reward(images(2), ["a", "b"]).tolist() == [0.0, 0.0]
    with pytest.raises(UserError, match="reward 'my_reward': a prompt's metadata cannot be sent as JSON"):
        reward(images(1), ["a"], [{"odd": {1, 2}}])


def test_columns_are_not_sent_to_a_worker_that_does_not_take_them(script):
    reward = script(MEAN)
    assert reward(images(1), ["a"], [{"odd": {1, 2}}]).tolist() == [1.0]


def test_the_example_of_hpsv3_gives_the_means_of_what_its_package_predicts(tmp_path, closing, monkeypatch):
    """With a package in its place that scores by pictures' first pixels: the real one needs a GPU and its weights."""
    (tmp_path / "hpsv3.py").write_text(
        textwrap.dedent(
            """
            import torch
            class HPSv3RewardInferencer:
                def __init__(self, device):
                    assert device == "cpu"
                def reward(self, image_paths, prompts):
                    assert len(image_paths) == len(prompts) <= 2
                    return torch.tensor([[image.getpixel((0, 0))[0], 99.0] for image in image_paths])
            """
        )
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    example = Path(__file__).parents[2] / "examples" / "hpsv3_worker.py"
    command, options = [sys.executable, str(example)], {"device": "cpu", "batch_size": 2}
    reward = closing(WorkerReward(command=command, options=options, **QUICK))
    assert reward(images(3) / 255, ["a", "b", "c"]).tolist() == [0.0, 1.0, 2.0]
    assert set(reward.packages) == {"hpsv3", "transformers", "torch"}


def test_pictures_go_over_as_pil_images_of_eight_bits(script):
    reward = script(
        """
        class Corner:
            images = "pil"
            def __init__(self, *, scale):
                self.scale = scale
            def __call__(self, images, prompts):
                assert all(image.size == (4, 2) and image.mode == "RGB" for image in images)
                return [self.scale * image.getpixel((3, 1))[2] for image in images]
        serve(Corner)
    """,
        options={"scale": 2},
    )
    pictures = torch.zeros(2, 3, 2, 4)
    pictures[1, 2, 1, 3] = 0.5
    assert reward(pictures, ["", ""]).tolist() == [0.0, 256.0]


def test_all_that_a_reward_prints_goes_to_its_stderr(script):
    reward = script("""
        import os, subprocess, sys
        print("while it is imported")
        class Loud:
            def __init__(self):
                print("while it loads", flush=True)
            def __call__(self, images, prompts):
                sys.stdout.write("in a call\\n")
                sys.stdout.flush()
                os.write(1, b"from C code\\n")
                subprocess.run(["echo", "from a child"], check=True)
                return [1.0] * len(prompts)
        serve(Loud)
    """)
    for _ in range(3):
        assert reward(images(), ["", ""]).tolist() == [1.0, 1.0]
    assert "in a call | from C code | from a child" in reward._link.last_words()


def test_prints_before_the_first_frame_are_passed_over(faulty, tmp_path):
    (tmp_path / "noise_first").touch()
    # It prints the magic too, which no banner does: the first start is lost, and told.
    with pytest.raises(UserError, match="not a frame"):
        faulty(retries=0)(images(), ["right:0", ""])
    (tmp_path / "noise_first").unlink()
    assert faulty()(images(), ["right:1", ""]).tolist() == [0.0, 1.0]


def test_a_banner_before_the_worker_takes_stdout_over_is_passed_over(script):
    reward = script("import subprocess, os\nos.write(1, b'Welcome!\\n' * 1000)\n" + textwrap.dedent(MEAN))
    assert reward(images(1, 12.0), [""]).tolist() == [1.0]


PASSING = [
    "crash", "killed", "hang", "half", "half_hang", "quiet_end", "garbage", "oversized", "oversized_header", "no_json",
    "deep_json", "other_op", "old_answer", "wrong_length", "wrong_shape", "wrong_type", "nan", "infinite",
    "out_of_range", "no_scores", "error", "late", "noise",
]  # fmt: skip


SLOW = {"hang", "half_hang", "late"}


@pytest.mark.parametrize("fault", PASSING)
def test_after_a_fault_the_batch_is_tried_again_and_right(faulty, fault):
    reward = faulty(timeout=1.0 if fault in SLOW else 10.0)
    assert reward(images(2, 4.0), [f"{fault}:0", "x"]).tolist() == [4.0, 5.0]


LASTING = {
    "crash": "ended with exit code 7",
    "killed": r"was killed \(SIGKILL\), as happens when memory runs out",
    "hang": "no answer within 0.5 s",
    "late": "no answer within 0.5 s",
    "half": "ended with exit code 0",
    "quiet_end": "closed its pipes|was ended|no answer",
    "garbage": "its answer is not a frame",
    "oversized": "over the limit",
    "oversized_header": "over the limit",
    "no_json": "its header is not JSON",
    "deep_json": "its header is not JSON",
    "old_answer": "answered question 1 where 2 was asked",
    "wrong_length": r"answered with \('float32', \(3,\)\)",
    "wrong_shape": r"answered with \('float32', \(2, 1\)\)",
    "wrong_type": "answered with .'uint8'",
    "nan": "its score is nan for the prompt 'nan:0:always'",
    "infinite": "its score is inf",
    "out_of_range": r"its score is 1000000.0, outside of its range -1 to 100, for",
    "no_scores": "answered with None",
    "error": "ValueError: no luck",
}


@pytest.mark.parametrize("fault", LASTING)
def test_a_lasting_fault_is_told_after_the_tries(faulty, fault):
    reward = faulty(timeout=0.5 if fault in SLOW else 10.0, retries=1)
    with pytest.raises(
        UserError, match=rf"reward 'python[\d.]*': no scores after 2 tries; at last: .*{LASTING[fault]}"
    ):
        reward(images(), [f"{fault}:0:always", "x"])
    assert reward(images(2, 3.0), ["right:1", "x"]).tolist() == [3.0, 4.0]


def test_a_worker_killed_from_outside_in_a_call_is_started_again(script, tmp_path):
    reward = script(f"""
        import time
        from pathlib import Path
        inside = Path({str(tmp_path / "inside")!r})
        class Slow:
            def __call__(self, images, prompts):
                if "wait" in prompts and not inside.exists():
                    inside.touch()
                    time.sleep(600)
                return [5.0] * len(prompts)
        serve(Slow)
    """, timeout=60.0)  # fmt: skip
    assert reward(images(), ["", ""]).tolist() == [5.0, 5.0]
    first = reward._link.pid

    def kill_in_the_call():
        while not (tmp_path / "inside").exists():
            time.sleep(0.01)
        os.kill(first, signal.SIGKILL)

    threading.Thread(target=kill_in_the_call, daemon=True).start()
    assert reward(images(), ["wait", ""]).tolist() == [5.0, 5.0]
    assert reward._link.pid != first


def test_running_out_of_memory_starts_the_worker_afresh(script, tmp_path):
    reward = script(f"""
        from pathlib import Path
        class Full:
            def __call__(self, images, prompts):
                if not Path({str(tmp_path / "was")!r}).exists():
                    Path({str(tmp_path / "was")!r}).touch()
                    raise MemoryError("40 GB")
                return [2.0] * len(prompts)
        serve(Full)
    """)
    assert reward(images(), ["", ""]).tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("[1.0]", r"ValueError: the reward returned list, but one score per image is needed: 2 numbers"),
        ("images[:, 0]", r"the reward returned \(2, 2, 2\)|returned \[\["),
        ("[1.0, None]", "the reward returned None as a score"),
        ("[1.0, 'good']", "the reward returned 'good' as a score"),
        ("3.0", "the reward returned float"),
        ("1 / 0", "ZeroDivisionError"),
        ("exit(0)", "SystemExit: 0"),
        ("[1.0, float('nan')]", "its score is nan for the prompt 'second'"),
    ],
)
def test_what_a_reward_must_not_return_is_named(script, returned, message):
    reward = script(
        f"""
        class Odd:
            def __call__(self, images, prompts):
                return {returned}
        serve(Odd)
    """,
        retries=1,
    )
    with pytest.raises(UserError, match=message):
        reward(images(), ["first", "second"])


def test_what_a_worker_refuses_is_told_at_once(script):
    reward = script(
        """
        class Missing:
            def __init__(self, *, path):
                raise Refused(f"the weights {path} are not there; fetch them")
        serve(Missing)
    """,
        options={"path": "x.pt"},
        retries=50,
        backoff=60.0,
    )
    with pytest.raises(UserError, match=r"reward 'my_reward': the weights x.pt are not there; fetch them"):
        reward(images(), ["", ""])


def test_a_worker_that_does_not_start_is_told_with_its_last_words(script):
    reward = script("import nowhere_to_be_found\n", retries=0)
    with pytest.raises(UserError, match="ended with exit code 1.*No module named 'nowhere_to_be_found'"):
        reward(images(), ["", ""])
    with pytest.raises(UserError, match="cannot be started.*no_such_program"):
        WorkerReward(command=["no_such_program"], retries=0)(images(), ["", ""])


def test_another_version_of_the_protocol_is_refused(script):
    reward = script("import agsm_rl_worker\nagsm_rl_worker.PROTOCOL = 2\n" + textwrap.dedent(MEAN))
    with pytest.raises(UserError, match=r"the worker speaks version 2 of the protocol, the client \[1\]"):
        reward(images(), ["", ""])


def test_a_slow_start_has_a_limit_of_its_own(faulty):
    assert faulty(options={"sleep": 2.0}, timeout=1.5)(images(1, 3.0), ["right:0"]).tolist() == [3.0]
    with pytest.raises(UserError, match="no answer within 0.2 s"):
        faulty(options={"sleep": 20.0}, start_timeout=0.2, retries=0)(images(1), ["right:1"])


def test_a_batch_that_is_no_batch_is_named_before_anything_starts(faulty):
    reward = faulty()
    with pytest.raises(UserError, match=r"got \(2, 1, 2, 2\) and 2 prompts"):
        reward(torch.zeros(2, 1, 2, 2), ["", ""])
    with pytest.raises(UserError, match="2 images|and 1 prompts"):
        reward(images(), [""])
    with pytest.raises(UserError, match="not finite"):
        reward(images() * float("nan"), ["", ""])
    assert reward._link.pid is None


def test_a_batch_larger_than_a_pipe_goes_through_both_ways(script):
    reward = script(MEAN)
    pictures = torch.rand(64, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    prompts = ["x" * 10_000] * 64
    torch.testing.assert_close(reward(pictures, prompts), pictures.mean(dim=(1, 2, 3)) + 10_000)


def test_a_thousand_calls_under_random_faults_are_all_right_or_an_error(faulty):
    """Seeded; one call in 25 meets a fault, of which one in five lasts; those that cost a timeout are rarer."""
    draw = random.Random(0)
    weights = [0.2 if fault in SLOW else 1.0 for fault in PASSING]
    reward = faulty(timeout=1.5, retries=2)
    wrong, errors, faults = [], 0, 0
    for number in range(1000):
        prompt, lasting = "right", False
        if draw.random() < 0.04:
            prompt, lasting, faults = draw.choices(PASSING, weights)[0], draw.random() < 0.2, faults + 1
        count = draw.randint(1, 4)
        first = float(draw.randint(0, 50))
        name = f"{prompt}:{number}" + (":always" if lasting else "")
        try:
            scores = reward(images(count, first), [name] * count)
        except UserError:
            errors += 1
            if not lasting or prompt == "noise":
                wrong.append((name, "an error without need"))
            continue
        if scores.tolist() != [first + row for row in range(count)]:
            wrong.append((name, scores))
    assert wrong == []
    assert errors > 0 and faults > 25


@pytest.mark.parametrize(
    ("processes", "rank", "visible", "wanted"),
    [("1", "0", None, None), ("2", "1", None, "1"), ("2", "1", "4,6", "6"), ("2", "0", "GPU-7", "GPU-7")],
)
def test_workers_of_several_processes_take_their_process_s_gpu(script, monkeypatch, processes, rank, visible, wanted):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    reward = script("""
        import os
        class Told:
            def __call__(self, images, prompts):
                raise Refused("sees " + str(os.environ.get("CUDA_VISIBLE_DEVICES")))
        serve(Told)
    """)
    with pytest.raises(UserError, match=f"sees {wanted}$"):
        reward(images(), ["", ""])
