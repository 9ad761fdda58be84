"""The base classes of all that acts on a policy: sources, views and objectives.

Sources draw batches from a policy, views select from a batch, objectives turn a batch into a loss. A class that
inherits from Source, View or Objective defines only what differs from their defaults; any other class is given the
defaults that it lacks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from agsm_rl.interfaces import Backbone, Bank, Batch, Metrics, Shard
from agsm_rl.training.old_policy import OldPolicy

if TYPE_CHECKING:
    from agsm_rl.policy import Policy


class Source:
    """Where batches come from. On-policy sampling is just a source."""

    gives: type[Batch]
    batch_size: int | None = None
    """Rows of a batch over all processes; None if it is not known beforehand."""
    cache: Literal["latents", "all"] | None = None
    """Which encodings are kept: latents, or all (the text too)."""
    images_per_prompt: int | None = None
    """Images drawn for each prompt; None for a source that draws none."""
    updates: int = 1
    """Steps that learn from one draw, each from its share of the images."""
    keep_means: bool | None = None
    """Whether its rollouts keep their steps' means; None for a source that does not say."""
    noise: Literal["flow_sde", "cps", "ddim"] | None = None
    """Form of its steps' noise; None for a source that does not say, or that follows the backbone."""
    rewards: Sequence[Any] = ()
    """The WeightedRewards by which it scores what it draws."""
    guidance_bank: Bank | None = None
    guidance_prompt: Literal["empty", "same"] | None = None
    """The form of guidance in which it draws (training/guidance.py); None: as the adapters say."""

    def bind(self, name: str, seed: int, shard: Shard) -> None:
        """Called once before the first batch: the source's name in the run, the run's seed, this process's share."""
        raise NotImplementedError

    def fit_to(self, backbone: Backbone) -> None:
        """Called once after `bind`: choose sizes that the backbone draws; UserError where an option asks for others."""

    def next(self, policy: Policy) -> Batch:
        """This process's share of the next batch; with no rows, in all processes alike, the term sits this step out."""
        raise NotImplementedError

    def metrics(self) -> dict[str, float]:
        """Figures of the newest batch, such as its rewards; none by default."""
        return {}

    def prompt_texts(self) -> list[str] | None:
        """All prompts that it can give, once it is bound; None, the default, where they are not known beforehand."""
        return None

    def unlearned(self) -> int:
        """Shares of the newest draw that have not been learned from yet.

        A checkpoint is written by one process and does not hold the other processes' shares.
        """
        return 0

    def images_drawn(self) -> int | None:
        """Images drawn since the run began, over all processes; None for a source that draws none."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """All that an exact continuation needs: tensors and plain values only."""
        raise NotImplementedError

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        raise NotImplementedError


class View:
    """What one term sees of a batch that several terms share: some of its rows, or another batch made from them."""

    consumes: ClassVar[type[Batch]]
    gives: ClassVar[type[Batch]]

    def check(self, source: Source) -> None:
        """UserError for a source that would always leave the view empty; by default, any source works."""

    def batch_size(self, total: int) -> int | None:
        """Rows that remain of `total`; None, the default, if that depends on the batch."""
        return None

    def __call__(self, batch: Any) -> Batch:
        """This process's part, seen through the view; with no rows, the term sits this step out."""
        raise NotImplementedError


class Objective:
    """What is learned: a batch in, a 0-d loss with gradients and 0-d metrics out."""

    consumes: ClassVar[type[Batch]]
    draws_t: ClassVar[bool] = True
    """Whether it takes noise levels from `policy.draw`; if not, a term's `t` is refused."""
    rewards: Sequence[Any] = ()
    """The WeightedRewards that it scores images by itself."""
    teacher: str | None = None
    """The run, exported adapters or checkpoint whose prediction `policy.teacher` gives under that name."""
    old: OldPolicy | None = None
    """How its old policy follows the trained parameters; None: `policy.old` is the EMA."""

    def check(self, batch_size: int) -> None:
        """UserError if a batch of this many rows cannot be used; called when the recipe is read."""

    def check_source(self, source: Source) -> None:
        """UserError for a source whose batches lack what is learned from; called when the recipe is read."""

    def check_prompts(self, prompts: list[str], backbone: Backbone) -> None:
        """UserError where nothing can be learned from a source of these prompts; called before the first step."""

    def split(self, batch: Any) -> list[tuple[Any, float]]:
        """Parts to learn from one after another, each with its share of the loss (they add up to 1)."""
        return [(batch, 1.0)]

    detach_unconditional: bool = False
    """Whether gradients of guided predictions flow through the conditional branch alone."""

    def takes_graph(self, rows: int) -> bool:
        """Whether it learns from the graph of a draw of so many rows, where one was kept, as it would without."""
        return False

    def step_of(self, part: Any) -> int | None:
        """The denoising step that a part is of, for comparing the steps' gradients; None: of no single one."""
        return None

    def loss(self, policy: Policy, batch: Any) -> tuple[Tensor, Metrics]:
        """The loss over a part of a batch."""
        raise NotImplementedError
