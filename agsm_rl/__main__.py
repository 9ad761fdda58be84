"""`python -m agsm_rl` is `agsm-rl`."""

from agsm_rl.cli.commands import app

if __name__ == "__main__":
    app(prog_name="agsm-rl")
