"""What CLIPScore and PickScore share: a reward computed from one CLIP's cosine between image and prompt."""

from collections.abc import Hashable

from agsm_rl_rewards.clip_model import CLIPScorer, clip_files, read_clip
from agsm_rl_rewards.native import NativeReward, Way
from agsm_rl_rewards.preprocessing import ShortestSideCrop


class CLIPReward(NativeReward):
    """Loads the CLIP at `path` and prepares its pixels; a subclass turns the cosine into a score in `score`.

    Args:
        path: Folder or hub id of the CLIP.
    """

    def __init__(self, path: str, preprocessing: Way) -> None:
        super().__init__(preprocessing)
        self.files = clip_files(self.name, "path", path, with_text=True)
        for file in self.files:
            file.check()

    def identity(self) -> Hashable:
        """The location of the weights."""
        return tuple(self.files)

    def load(self) -> CLIPScorer:
        """The CLIP."""
        return read_clip(self.files)

    def pixels(self) -> ShortestSideCrop:
        """The middle square, as transformers' image processor cuts it."""
        return ShortestSideCrop(self.network.image_size, processor=True)
