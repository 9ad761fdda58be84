"""ImageReward (arXiv 2304.05977) by the official package image-reward 1.5, in a separate environment."""

from __future__ import annotations

from agsm_rl_rewards.official.locked import HERE, LockedScriptReward, existing


class OfficialImageReward(LockedScriptReward):
    """ImageReward by the official package: scores [B], 0 is average, ±2 a lot; images are sent in 8 bits per channel.

    Args:
        path: ImageReward.pt, or a folder or hub id that contains it.
        config: med_config.json, or a folder or hub id that contains it.
        tokenizer: Folder or hub id with BERT's vocab.txt.
    """

    def __init__(
        self,
        *,
        path: str = "THUDM/ImageReward",
        config: str = "THUDM/ImageReward",
        tokenizer: str = "google-bert/bert-base-uncased",
        timeout: float = 300.0,
        start_timeout: float = 600.0,
        retries: int = 3,
        backoff: float = 1.0,
    ) -> None:
        name, places = "image_reward_official", {"path": path, "config": config, "tokenizer": tokenizer}
        super().__init__(
            HERE / "image_reward_worker.py",
            name=name,
            options={option: existing(value, reward=name, option=option) for option, value in places.items()},
            timeout=timeout,
            start_timeout=start_timeout,
            retries=retries,
            backoff=backoff,
        )
