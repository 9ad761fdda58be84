"""Guidance's unconditional branch, in the three forms of AGSM's released code (arXiv 2605.30038).

Classifier-free guidance (arXiv 2207.12598) steers from an unconditional prediction to the conditional one, which always
uses ψ⁺. The unconditional one is

| `guidance_bank` | `guidance_prompt` | it sees |
|---|---|---|
| `positive` | `empty` | the empty prompt under ψ⁺: SD1.5 and SD3 |
| `negative` | `empty` | the empty prompt under ψ⁻: SDXL's released default |
| `negative` | `same` | the same prompt under ψ⁻ |

A form belongs to an adapter with two banks (soft tokens or LoRA), which keeps it in its file. Pipelines of diffusers
predict both branches in one call, the unconditional rows first, or each in its own, the conditional one first, and
announce them to the denoiser (`cache_context("cond")`, `cache_context("uncond")`). A hook on the denoiser gives the
unconditional rows their bank and their prompt.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from agsm_rl import threads
from agsm_rl.errors import UserError, unknown_name
from agsm_rl.interfaces import Adapter, Backbone, Bank, Cond

GuidanceBank = Literal["positive", "negative"]
GuidancePrompt = Literal["empty", "same"]
BANKS: tuple[GuidanceBank, ...] = ("positive", "negative")
PROMPTS: tuple[GuidancePrompt, ...] = ("empty", "same")
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
APART = ("cond", "uncond")
"""What pipelines of diffusers call the branches that they predict in calls of their own."""


@runtime_checkable
class Guides(Protocol):
    """An adapter that has a form of guidance."""

    guidance_bank: GuidanceBank
    guidance_prompt: GuidancePrompt
    banks: int
    changes_text: bool


def check_form(bank: str, prompt: str, adapter: Guides, *, where: str) -> None:
    """UserError for a form that does not exist, that this adapter cannot have, or that makes both branches the same."""
    if bank not in BANKS:
        raise unknown_name(f"{where}guidance_bank", bank, "a bank", BANKS)
    if prompt not in PROMPTS:
        raise unknown_name(f"{where}guidance_prompt", prompt, "a prompt of the unconditional branch", PROMPTS)
    if bank == "negative" and adapter.banks != 2:
        raise UserError(
            f"{where}guidance_bank: negative, but there is only one bank; train with `banks: 2`, or use `positive`."
        )
    if bank == "negative" and adapter.changes_text:
        raise UserError(
            f"{where}guidance_bank: negative, but this adapter changes the text encoders too, and they read a prompt "
            "before its branch is known; train without `text_encoders`, or use `positive`."
        )
    if prompt == "same" and bank != "negative":
        raise UserError(
            f"{where}guidance_prompt: same, with `guidance_bank: positive`: both branches would be the same, and "
            "guidance would change nothing; set `guidance_bank: negative`, or use `empty`."
        )


def choose_form(
    adapters: Collection[Adapter], bank: GuidanceBank | None, prompt: GuidancePrompt | None, *, where: str = ""
) -> None:
    """Let the adapters with two banks guide in this form; None keeps what each adapter says.

    UserError if a form is asked for and no adapter has one, or if it does not exist for one of them.
    """
    guides: list[Any] = [adapter for adapter in adapters if isinstance(adapter, Guides)]
    if (bank or prompt) and not guides:
        raise UserError(
            f"{where}guidance_{'bank' if bank else 'prompt'}: {bank or prompt}, but no adapter here can guide so; soft "
            "tokens and a LoRA with `banks: 2` can. Leave it out."
        )
    # Beside one with two banks, an adapter with a single bank serves under both names.
    guides = [adapter for adapter in guides if adapter.banks == 2] or guides
    wanted = [(bank or adapter.guidance_bank, prompt or adapter.guidance_prompt) for adapter in guides]
    for adapter, form in zip(guides, wanted, strict=True):
        check_form(*form, adapter, where=where)
    for adapter, form in zip(guides, wanted, strict=True):
        adapter.guidance_bank, adapter.guidance_prompt = form


@contextmanager
def guiding(
    adapters: Collection[Adapter], bank: GuidanceBank | None, prompt: GuidancePrompt | None, *, where: str = ""
) -> Iterator[None]:
    """Within the block, the adapters guide in this form, as `choose_form` says."""
    guides: list[Any] = [adapter for adapter in adapters if isinstance(adapter, Guides)]
    before = [(adapter.guidance_bank, adapter.guidance_prompt) for adapter in guides]
    choose_form(adapters, bank, prompt, where=where)
    try:
        yield
    finally:
        for adapter, form in zip(guides, before, strict=True):
            adapter.guidance_bank, adapter.guidance_prompt = form


def guidance_form(adapters: Collection[Adapter]) -> tuple[GuidanceBank, GuidancePrompt]:
    """The form that adapters, as they are switched now, guide in: `positive, empty` unless one of them says otherwise.

    Adapters that are off, or that draw with ψ⁻ alone, have none.
    """
    active = acting(adapters)
    same = any(isinstance(adapter, Guides) and adapter.guidance_prompt == "same" for adapter in active)
    return "negative" if active else "positive", "same" if same else "empty"


def acting(adapters: Collection[Adapter]) -> list[Adapter]:
    """The adapters that put the unconditional rows under ψ⁻, as they are switched now."""
    return [
        adapter
        for adapter in adapters
        if isinstance(adapter, Guides) and adapter.guidance_bank == "negative" and adapter.bank == "positive"
    ]


@contextmanager
def unconditional(adapters: Collection[Adapter], rows: Sequence[bool]) -> Iterator[None]:
    """Within the block, these of a prediction's rows are the unconditional branch, under its adapters' bank."""
    banks: list[Bank] = ["negative" if row else "positive" for row in rows]
    with ExitStack() as stack:
        for adapter in acting(adapters):
            stack.enter_context(adapter.using(tuple(banks)))
        yield


def predict_in_form(backbone: Backbone, adapters: Collection[Adapter], x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """The backbone's prediction [B, C, h, w] for rows x_t at levels t [B]; prompts are as they were encoded.

    Rows that are guidance's unconditional branch (`cond.unconditional_first`) are predicted as the adapters say.
    """
    threads.adjust()
    if not cond.unconditional_first:
        return backbone.predict(x_t, t, cond)
    is_detached = cond.unconditional_detached and torch.is_grad_enabled()
    if guidance_form(adapters)[1] == "same":
        conditional = torch.arange(len(cond) // 2, len(cond))
        cond = cond[torch.cat([conditional, conditional])]
    half = len(x_t) // 2
    if is_detached:
        with torch.no_grad(), unconditional(adapters, [True] * half):
            without = backbone.predict(x_t[:half], t[:half], cond[:half])
        return torch.cat([without, backbone.predict(x_t[half:], t[half:], cond[half:])])
    with unconditional(adapters, [True] * half + [False] * half):
        return backbone.predict(x_t, t, cond)


class Branches:
    """How a pipeline gives its denoiser both branches in one call: the unconditional rows first, by keyword.

    A backbone whose pipeline does it in another way declares a subclass as `branches`.
    """

    def unconditional(self, pipeline: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[bool] | None:
        """Which rows of a call are unconditional; None if it is not a call of both branches."""
        text = kwargs.get("encoder_hidden_states")
        # Skip-layer guidance calls SD3's transformer once more for the conditional rows alone.
        if text is None or kwargs.get("skip_layers") is not None:
            return None
        return [row < len(text) // 2 for row in range(len(text))]

    def same_prompt(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """The call's arguments with the conditional rows' prompt in the unconditional rows too."""
        changed = dict(kwargs)
        for name in ("encoder_hidden_states", "pooled_projections", "encoder_attention_mask"):
            if changed.get(name) is not None:
                changed[name] = _second_half_twice(changed[name])
        added = changed.get("added_cond_kwargs")
        if added and "text_embeds" in added:
            changed["added_cond_kwargs"] = added | {"text_embeds": _second_half_twice(added["text_embeds"])}
        return args, changed


class GuidanceHook:
    """The hook on a pipeline's denoiser; `remove` takes it off. It does nothing in calls without guidance."""

    def __init__(
        self, pipeline: Any, denoiser: nn.Module, adapters: Collection[Adapter], branches: Branches | None = None
    ) -> None:
        self._pipeline, self._adapters, self._branches = pipeline, adapters, branches or Branches()
        self._inside = ExitStack()
        self._branch: str | None = None
        """The branch that the pipeline has announced, of one that predicts each in a call of its own."""
        self._is_apart = False
        self._conditional: dict[str, Any] = {}
        self._hooks: list[Any] = [
            *([_Announcements(denoiser, self._announced)] if hasattr(denoiser, "cache_context") else []),
            denoiser.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True),
            denoiser.register_forward_hook(self._end, always_call=True),
        ]

    def remove(self) -> None:
        """Take the hook off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _announced(self, branch: str | None) -> None:
        self._branch = branch
        self._is_apart |= branch in APART

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._is_apart:
            return self._begin_apart(args, kwargs)
        rows = self._branches.unconditional(self._pipeline, args, kwargs) if acting(self._adapters) else None
        if rows is None:
            return None
        if not hasattr(self._pipeline, "_guidance_scale"):
            raise UserError(
                "guidance_bank: negative works only in the pipeline that the adapter is attached to, and another one "
                "(made by from_pipe, or a call of the denoiser alone) is drawing; attach to that pipeline."
            )
        if not getattr(self._pipeline, "do_classifier_free_guidance", False):  # FLUX.1's says it by its calls alone
            return None
        prompt = guidance_form(self._adapters)[1]
        self._inside.enter_context(unconditional(self._adapters, rows))
        return self._branches.same_prompt(args, kwargs) if prompt == "same" else None

    def _begin_apart(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Begin a call for one branch alone."""
        conditional, self._conditional = self._conditional, kwargs if self._branch == "cond" else {}
        if self._branch != "uncond" or not (active := acting(self._adapters)):
            return None
        prompt = guidance_form(self._adapters)[1]
        for adapter in active:
            self._inside.enter_context(adapter.using("negative"))
        # Of the same step, so that nothing but the prompt differs between the two calls.
        return (args, conditional) if prompt == "same" else None

    def _end(self, *_: Any) -> None:
        self._inside.close()


class _Announcements:
    """Tells `announced` which branch a pipeline is about to predict, until `remove`."""

    def __init__(self, denoiser: Any, announced: Callable[[str | None], None]) -> None:
        self._denoiser, self._before = denoiser, vars(denoiser).get("cache_context")
        cache_context = denoiser.cache_context

        @contextmanager
        def noted(name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
            announced(name)
            try:
                with cache_context(name, *args, **kwargs):
                    yield
            finally:
                announced(None)

        denoiser.cache_context = noted

    def remove(self) -> None:
        del self._denoiser.cache_context
        if self._before is not None:
            self._denoiser.cache_context = self._before


def branches_of(backbone: Backbone) -> Branches | None:
    """What a backbone declares as `branches`, if it does."""
    return getattr(backbone, "branches", None)


def _second_half_twice(rows: Tensor) -> Tensor:
    half = rows[len(rows) // 2 :]
    return torch.cat([half, half])


@contextmanager
def hooked(backbone: Backbone) -> Iterator[None]:
    """Within the block, the pictures of the backbone's pipeline are guided as its adapters say."""
    if not acting(backbone.adapters):
        yield
        return
    hook = GuidanceHook(backbone.pipeline, backbone.denoiser, backbone.adapters, branches_of(backbone))
    try:
        yield
    finally:
        hook.remove()
