"""The second stage of the scenes world: text encoders that learn to read words and what belongs together, then frozen.

The contrastive training of text.py needs pictures, and most of an hour. Here linear layers on the encoder's states,
which are thrown away, must tell each word at its own place; at each shape, its number, size and colour; and from the
pooled embedding the whole requirement. Padding must say nothing, and cues mean nothing yet, as in text.py.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch import Tensor, nn

from agsm_rl.shapes.scenes import RELATIONS, Requirement
from agsm_rl.shapes.scenes_world.splits import COLORS, PLACES, SHAPES, SIZES
from agsm_rl.shapes.train_base.stages import Settings, run_stage
from agsm_rl.shapes.train_base.text import SHARED, Reader, tokenize

BATCH = 128
OF_A_GROUP = (("1", "2", "3", "4"), ("", *SIZES), ("", *COLORS))
"""What the state of a shape's word must tell."""
OF_A_CAPTION = (
    *(part for _ in range(2) for part in (("", *SHAPES), *OF_A_GROUP)),
    ("", *RELATIONS),
    ("", *PLACES),
)
"""What the pooled embedding must tell: two groups, their relation, and the place."""


class Lesson(nn.Module):
    """Cross-entropy of several answers to one state, each a name of its list."""

    def __init__(self, width: int, answers: tuple[tuple[str, ...], ...]) -> None:
        super().__init__()
        self.sizes = [len(names) for names in answers]
        self.layer = nn.Linear(width, sum(self.sizes))

    def forward(self, states: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss and the share of right answers; states [N, width], right [N, number of lists]."""
        parts = self.layer(states).split(self.sizes, dim=1)
        losses = [F.cross_entropy(part, right[:, index]) for index, part in enumerate(parts)]
        hits = torch.stack([part.argmax(1) == right[:, index] for index, part in enumerate(parts)])
        return torch.stack(losses).mean(), hits.all(0).float().mean()


def answers(requirement: Requirement) -> tuple[list[list[int]], list[int]]:
    """The right answers of each group, and of the caption."""
    groups = []
    for group in requirement.groups:
        names = (str(group.count), group.size or "", group.color or "")
        groups.append([names_of.index(name) for names_of, name in zip(OF_A_GROUP, names, strict=True)])
    shapes = [OF_A_CAPTION[0].index(group.shape) for group in requirement.groups]
    parts = [[shape, *group] for shape, group in zip(shapes, groups, strict=True)]
    parts += [[0, 0, 0, 0]] * (2 - len(parts))
    ends = [OF_A_CAPTION[-2].index(requirement.relation or ""), OF_A_CAPTION[-1].index(requirement.place or "")]
    return groups, [*parts[0], *parts[1], *ends]


def train_by_words(settings: Settings, work: Path, name: str, reader: type[Reader], tokenizer: Any) -> Any:
    """`name` is the stage's and seeds it. The frozen encoder."""
    torch.manual_seed(settings.seed + sum(name.encode()))
    world, student = settings.world, reader(tokenizer)
    lessons = {
        "read": nn.Linear(student.width, len(tokenizer)),
        "group": Lesson(student.width, OF_A_GROUP),
        "caption": Lesson(SHARED, OF_A_CAPTION),
    }
    model = nn.ModuleDict({"student": student, **lessons})
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = get_cosine_schedule_with_warmup(optimizer, 100, settings.text_steps)
    shapes = torch.tensor(sorted(_tokens_of_shapes(tokenizer)))

    def step(number: int) -> dict[str, float]:
        rng = np.random.default_rng((settings.seed, 3, number))
        asked = [world.draw_requirement(rng) for _ in range(BATCH)]
        captions = [world.describe(requirement, rng) for requirement in asked]
        cued = rng.random(BATCH) < 0.6
        captions = [
            f"{text}, {rng.choice(world.cues)}" if cue else text for text, cue in zip(captions, cued, strict=True)
        ]
        right = [answers(requirement) for requirement in asked]
        ids = tokenize(tokenizer, captions)
        read = student(ids)
        reading = F.cross_entropy(model["read"](read.states[read.words]), ids[read.words])
        padding = read.states[read.padding]
        spread = (padding - padding.mean(0)).square().mean()
        groups = torch.tensor([group for groups, _ in right for group in groups])
        grouping, _ = model["group"](read.states[torch.isin(ids, shapes)], groups)
        whole, accuracy = model["caption"](read.pooled, torch.tensor([caption for _, caption in right]))
        (reading + spread + grouping + whole).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        figures = {"loss": whole, "accuracy": accuracy, "reading": reading, "spread": spread, "grouping": grouping}
        return {name: value.item() for name, value in figures.items()}

    run_stage(name, work, settings.text_steps, {"model": model, "optimizer": optimizer, "schedule": schedule}, step)
    return student.encoder.requires_grad_(False).eval()


def _tokens_of_shapes(tokenizer: Any) -> set[int]:
    """The tokens of the shapes' names, singular and plural: one each."""
    words = [word for shape in SHAPES for word in (shape, f"{shape}s", f"{shape}es")]
    read = [tokenizer(word, add_special_tokens=False).input_ids for word in words]
    return {ids[0] for ids in read if len(ids) == 1}
