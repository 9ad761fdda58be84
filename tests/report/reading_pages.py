"""A report's page as tests read it: its data, its visible text, its scripts and what it refers to."""

import json
from html.parser import HTMLParser
from statistics import mean

from making_runs import TAGS, write_sweep

from agsm_rl.report.load import load
from agsm_rl.report.page import render


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

    @property
    def suite(self) -> dict:
        """What the page has of the first suite."""
        return self.data["suites"][0]

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


HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>{{ 7 * 7 }}"


def hostile_sweep(tmp_path):
    """A sweep whose variant, prompts and errors are an attack."""
    prompts = [f"{HOSTILE} {number}" for number in range(12)]
    folder = write_sweep(tmp_path / "study", {"one": {"prompts": prompts}}, [0, 1], {"one-seed1": "failed"})
    content = json.loads((folder / "sweep.json").read_text())
    for cell in content["cells"]:
        cell |= {"variant": HOSTILE, "error": HOSTILE}
    (folder / "sweep.json").write_text(json.dumps(content | {"name": HOSTILE}))
    return folder
