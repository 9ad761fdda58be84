"""`python -m agsm_rl` is `agsm-rl`, with the current folder taken off the import path.

`python -m`, and so `accelerate launch -m`, puts the current folder first. It may hold a stranger's files, and a module
of theirs could pass for any that is imported later. `--allow-import` brings the folder back where the user asks for it.
"""

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:  # python -P and PYTHONSAFEPATH leave it out themselves
        del sys.path[0]

    from agsm_rl.cli.commands import app

    app(prog_name="agsm-rl")
