"""The fuzzer for as long as you like: python tests/fuzz/long_fuzz.py --minutes 30 [--seed 0]

Runs each test of test_fuzz.py in turn on new examples, within 6 GiB of memory, and prints its counts as JSON.
It stops at the first failure, which Hypothesis shrinks and prints.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
os.environ["FUZZ_PROFILE"] = "long"  # read when the tests are defined

import test_fuzz  # noqa: E402
from hypothesis import seed  # noqa: E402


class Folders:
    """What the tests use of pytest's tmp_path_factory, emptied after each round."""

    def __init__(self, root: Path) -> None:
        self.root, self.count = root, 0

    def mktemp(self, name: str) -> Path:
        """A new folder."""
        self.count += 1
        folder = self.root / f"{name}{self.count}"
        folder.mkdir()
        return folder


def main() -> None:
    """Run until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_DATA, (6 * 2**30, 6 * 2**30))
    tests = {name: test for name, test in vars(test_fuzz).items() if name.startswith("test_")}
    counts, slowest = dict.fromkeys(tests, 0), dict.fromkeys(tests, 0.0)
    end, number = time.monotonic() + 60 * options.minutes, options.seed
    while time.monotonic() < end:
        for name, test in tests.items():
            with tempfile.TemporaryDirectory(prefix="fuzz-") as root:
                folders, began = Folders(Path(root)), time.monotonic()
                seed(number)(test)(tmp_path_factory=folders)
                counts[name] += folders.count
                slowest[name] = max(slowest[name], (time.monotonic() - began) / max(1, folders.count))
        number += 1
        mean = {name: round(value, 3) for name, value in slowest.items()}
        print(json.dumps({"rounds": number - options.seed, "examples": counts, "seconds_an_example": mean}), flush=True)


if __name__ == "__main__":
    main()
