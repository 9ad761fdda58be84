"""The head of ImageReward and of the LAION aesthetic predictor: five linear layers with nothing between them."""

from torch import Tensor, nn


class ScoreHead(nn.Module):
    """width → 1024 → 128 → 64 → 16 → 1. The dropouts do nothing here; they keep the layers' numbers as in the files."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Scores [B] of features [B, width]."""
        return self.layers(features)[:, 0]
