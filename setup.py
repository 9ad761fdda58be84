"""Which folders are which packages: two of the repository's folders are installed under longer names."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["agsm_rl", "agsm_rl.*"]),
        "agsm_rl_recipes",
        *(f"agsm_rl_{name}" for name in find_packages(include=["rewards", "rewards.*"])),
    ],
    package_dir={"agsm_rl_recipes": "recipes", "agsm_rl_rewards": "rewards"},
)
