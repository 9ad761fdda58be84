"""Model cards, and sending them with the adapters to a hub: a local server that answers as the real one does."""

import base64
import json
import os
import stat
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from agsm_rl import UserError, attach, save_adapters
from agsm_rl.export.model_card import MARK, PAPERS, write_card
from agsm_rl.export.push import push_to_hub
from agsm_rl.registry import BUILTIN

SECRET = "hf_thisisasecretthatnobodysees"
RECIPE = {
    "seed": 3,
    "steps": 40,
    "backbone": {"use": "stable_diffusion", "checkpoint": "stable-diffusion-v1-5/stable-diffusion-v1-5"},
    "adapters": {"lora": {"use": "lora", "rank": 2}},
    "sources": {"own": {"use": "rollouts", "prompts": "/home/me/prompts.txt", "rewards": {"sharpness": 1.0}}},
    "objectives": [{"use": "ddpo", "source": "own", "weight": 1.0, "clip_range": 1e-4}],
    "optimizer": {"use": "adamw", "learning_rate": 1e-4, "weight_decay": 0.0},
}
ENTRY = {"suite": "rewards", "guidance": 5.0, "overall": 0.4567, "low": 0.41, "high": 0.5}
EVALUATION = ENTRY | {
    "tags": {"sharpness": {"score": 0.4}},
    "base": {"overall": 0.25, "tags": {"sharpness": {"score": 0.2}}},
}


@pytest.fixture
def run(policy, tmp_path):
    """A run's folder with a LoRA, an evaluation and a grid, and no weights trained."""
    folder = tmp_path / "mine"
    save_adapters({"lora": policy.adapters["lora"]}, folder / "adapter", metadata={})
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (folder / "eval.json").write_text(json.dumps(EVALUATION))
    (folder / "samples").mkdir()
    Image.new("RGB", (8, 8), "red").save(folder / "samples/step-00000040.png")
    return folder


def test_a_card_says_what_the_hub_and_a_reader_want_to_know(run):
    file = write_card(run)
    assert file == run / "adapter/README.md"
    card = ModelCard.load(file)
    assert card.data.base_model == RECIPE["backbone"]["checkpoint"] and card.data.library_name == "diffusers"
    assert card.data.license == "creativeml-openrail-m"
    assert {"lora", "ddpo", "text-to-image", f"base_model:adapter:{card.data.base_model}"} <= set(card.data.tags)
    for words in (
        "# mine",
        "A LoRA of rank 2",
        "pipe.load_lora_weights",
        "arxiv.org/abs/2305.13301",
        "clip_range: 0.0001",
    ):
        assert words in card.text
    assert "| rewards | 5.0 | overall | 0.25 | 0.4567 [0.41, 0.5] |" in card.text
    assert "| rewards | 5.0 | sharpness | 0.2 | 0.4 |" in card.text
    assert "![Pictures during the training](pictures.png)" in card.text and (run / "adapter/pictures.png").is_file()
    assert "prompts.txt" in card.text and "/home/me" not in card.text


def test_a_card_says_what_a_second_stage_began_from_and_what_it_left_alone(run):
    ddpo = RECIPE["objectives"][0] | {"trains": ["lora"]}
    stage = {
        "start_from": "/home/me/runs/agsm",
        "reference": "start_from",
        "adapters": {"tokens": {"use": "soft_tokens", "num_tokens": 4}, "lora": {"use": "lora", "rank": 2}},
        "objectives": [ddpo, ddpo | {"use": "anchor"}],
    }
    (run / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | stage))
    text = ModelCard.load(write_card(run)).text
    assert "began from the adapters of agsm; tokens was not trained further. An anchor" in text
    assert "| [ddpo](https://arxiv.org/abs/2305.13301) | lora | rollouts of prompts.txt |" in text
    (run / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    assert "began from" not in ModelCard.load(write_card(run)).text


def test_a_card_says_what_else_the_base_was_trained_with_and_what_it_leaves_out(run):
    block = RECIPE["backbone"] | {"unet": "mhdang/dpo-sd1.5-text2image-v1", "lora": "/home/me/style", "quantize": None}
    (run / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"backbone": block, "export": "ema"}))
    tags = {f"tag {number}": {"score": 0.5} for number in range(41)}
    (run / "eval.json").write_text(json.dumps(ENTRY | {"tags": tags, "base": {"tags": {}}}))
    text = ModelCard.load(write_card(run)).text
    assert "with `unet: mhdang/dpo-sd1.5-text2image-v1`, `lora: style`. Load and set the same" in text
    assert "moving average (EMA)" in text and "2 more rows are left out." in text
    (run / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    text = ModelCard.load(write_card(run)).text
    assert "Load and set the same" not in text and "EMA" not in text


def test_a_base_on_this_machine_is_named_without_its_path_and_not_as_one_of_the_hub(run, tiny_checkpoint):
    content = RECIPE | {"backbone": {"use": "stable_diffusion", "checkpoint": str(tiny_checkpoint)}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(content))
    card = ModelCard.load(write_card(run, licence="mit"))
    assert card.data.base_model is None and card.data.license == "mit"
    assert tiny_checkpoint.name in card.text and str(tiny_checkpoint) not in str(card)


def test_a_card_that_was_changed_by_its_owner_is_kept(run):
    file = write_card(run)
    write_card(run)  # ours is replaced
    mine = file.read_text().replace(MARK, "") + "\nMy words.\n"
    file.write_text(mine)
    with pytest.raises(UserError, match="not overwritten"):
        write_card(run)
    assert file.read_text() == mine


def test_what_is_no_run_is_refused(run, tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        write_card(run / "adapter")
    with pytest.raises(UserError, match="not a repository's name"):
        push_to_hub(run, "mine")


@pytest.mark.parametrize("name", BUILTIN["objectives"])
def test_a_card_names_the_paper_that_the_readme_names(name):
    readme = Path(__file__).parents[2].joinpath("README.md").read_text(encoding="utf-8")
    (row,) = [line for line in readme.splitlines() if line.startswith("|") and f"[`{name}`]" in line]
    assert PAPERS[name] in row


def test_a_licence_for_a_card_that_is_not_ours_is_refused(run):
    (run / "adapter/README.md").write_text("My own words.\n")
    with pytest.raises(UserError, match="--license: .* is your own card"):
        push_to_hub(run, "me/mine", licence="mit")


def test_a_name_that_the_hub_does_not_allow_is_refused_before_it_is_asked(run, monkeypatch):
    monkeypatch.setattr("agsm_rl.export.push.hub_is_forbidden", lambda: False)
    with pytest.raises(UserError, match="REPO 'me/mi--ne': "):
        push_to_hub(run, "me/mi--ne", token=SECRET)


def test_a_handle_is_shown_on_a_line(run, backbone):
    handle = attach(backbone.pipeline, run)
    assert repr(handle) == "<Handle of pytorch_lora_weights: lora>"
    handle.detach()
    assert repr(handle) == "<Handle, detached>"


def test_exports_can_be_read_by_whom_the_umask_lets(policy, tmp_path):
    before = os.umask(0o022)
    try:
        (file,) = save_adapters({"lora": policy.adapters["lora"]}, tmp_path / "open", metadata={})
        os.umask(0o077)
        (closed,) = save_adapters({"lora": policy.adapters["lora"]}, tmp_path / "closed", metadata={})
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o644 and stat.S_IMODE(closed.stat().st_mode) == 0o600


class Hub(BaseHTTPRequestHandler):
    """What of the hub's API an upload uses."""

    def answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((self.path, self.headers.get("Authorization"), body))
        address = f"http://127.0.0.1:{self.server.server_port}"
        if self.server.refuses:
            self.answer({"error": "You are not allowed to write here"}, 403)
        elif self.path == "/api/repos/create":
            self.answer({"url": f"{address}/me/mine"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            self.answer({"files": modes})
        elif "/commit/" in self.path:
            self.answer({"commitUrl": f"{address}/me/mine/commit/1", "commitOid": "1", "hookOutput": ""})
        else:
            self.answer({"errors": [], "warnings": []})

    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get("Authorization"), b""))
        self.answer({"error": "not found"}, 404)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = HTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.refuses = [], False
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def push(hub, *given, token=SECRET, **environment):
    own = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0", "HF_HOME": "/nonexistent"}
    own |= {"HF_TOKEN": token} if token else {}
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    command = [sys.executable, "-m", "agsm_rl", "push", *map(str, given)]
    return subprocess.run(command, env=kept | own | environment, capture_output=True, text=True, timeout=300)


def test_adapters_card_and_picture_are_sent_with_the_token_that_is_never_shown(hub, run):
    (run / "adapter/notes.txt").write_text("mine alone")
    done = push(hub, run, "me/mine", "--private", "--revision", "trial")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"http://127.0.0.1:{hub.server_port}/me/mine/commit/1"
    assert SECRET not in done.stdout + done.stderr
    written = {
        path: token for path, token, _ in hub.asked if "create" in path or "/branch/" in path or "/commit/" in path
    }
    assert len(written) == 3 and {*written.values()} == {f"Bearer {SECRET}"}
    asked = {path: body for path, _, body in hub.asked}
    made = json.loads(asked["/api/repos/create"])
    assert (made.get("visibility") == "private" or made.get("private")) and any(
        path.endswith("/branch/trial") for path in asked
    )
    (committed,) = [body for path, body in asked.items() if path.partition("?")[0].endswith("/commit/trial")]
    sent = [json.loads(line)["value"] for line in committed.splitlines()]
    files = {value["path"]: base64.b64decode(value["content"]) for value in sent if "path" in value}
    assert set(files) == {"README.md", "pictures.png", "pytorch_lora_weights.safetensors"}
    for name, content in files.items():
        assert content == (run / "adapter" / name).read_bytes()


def test_a_push_that_cannot_be_is_one_message(hub, run):
    for given, words in {
        "no token": "no token; run `hf auth login`",
        "offline": "HF_HUB_OFFLINE is set",
        "refused": "the hub refused",
        "gone": "cannot be reached",
    }.items():
        hub.refuses = given == "refused"
        environment = {"offline": {"HF_HUB_OFFLINE": "1"}, "gone": {"HF_ENDPOINT": "http://127.0.0.1:9"}}.get(given, {})
        done = push(hub, run, "me/mine", token=None if given == "no token" else SECRET, **environment)
        assert (done.returncode, done.stdout) == (2, ""), (given, done.stderr)
        assert words in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert SECRET not in done.stderr
