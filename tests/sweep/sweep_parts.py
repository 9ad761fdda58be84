"""Recipe blocks that the sweep tests share."""

PAIRS = {"use": "pairs", "dataset": "builtin:shapes", "batch_size": 4, "num_images": 16}
ROLLOUTS = {"use": "rollouts", "prompts": "builtin:shapes-prompts", "rewards": {"brightness": 1.0}, "num_prompts": 2}
ROLLOUTS |= {"images_per_prompt": 2, "num_steps": 2, "guidance": 1.0, "updates": 2}
EVALUATE = [
    {"split": split, "guidance": [1.0], "num_images": 6, "num_steps": 1} for split in ("validation", "held_out")
]
