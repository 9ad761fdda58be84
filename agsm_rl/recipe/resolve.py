"""Complete a recipe and refuse what cannot work, before anything is loaded: names, options, and what goes with what.

Objectives, sources, rewards and adapters are constructed here, because their constructors check their arguments; none
of them reads data or weights until it is bound, attached or called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from agsm_rl import registry
from agsm_rl.errors import MistakesSoFar, UserError
from agsm_rl.recipe.between_blocks import check_file, mistakes_between_blocks
from agsm_rl.recipe.options import validated
from agsm_rl.recipe.parts import Parts
from agsm_rl.recipe.schema import Block, Evaluate, Optimizer, RecipeKeys, TermBlock
from agsm_rl.recipe.suites import complete_rewards, complete_suite, find_score, make_suites
from agsm_rl.training.limits import MAX_BATCH

if TYPE_CHECKING:
    from agsm_rl.interfaces import Batch
    from agsm_rl.policy import Source

Keys = TypeVar("Keys", bound=RecipeKeys)


def resolve(recipe: Keys, parts: Parts) -> Keys:
    """The recipe with every default filled in; UserError lists what cannot work, with its places."""
    completed = _completed(recipe, parts)
    mistakes = MistakesSoFar(parts.where)
    adapters: list[Any] = []
    shared: dict[str, Source] = {}
    for name, block in completed.adapters.items():
        with mistakes.collected():
            adapters.append(parts.construct("adapters", block, f"adapters.{name}", seed=completed.seed))
    for name, block in completed.sources.items():
        with mistakes.collected():
            _check_path(block, f"sources.{name}", parts)
            shared[name] = parts.construct("sources", block, f"sources.{name}", seed=completed.seed)
    if completed.evaluate is not None and not mistakes.messages:
        with mistakes.collected():
            _check_drawing(completed.evaluate, adapters, parts)
    if len(adapters) == len(completed.adapters):
        with mistakes.collected():
            _check_guidance(completed.sample, adapters, parts, "sample")
    for index, term in enumerate(completed.objectives):
        if not isinstance(term.source, str) or term.source in shared:
            with mistakes.collected():
                _check_term(completed, index, shared, adapters, parts)
    with mistakes.collected():
        _check_suites(completed, parts)
    mistakes.raise_any()
    return completed


def _completed(recipe: Keys, parts: Parts) -> Keys:
    """The recipe with the options of its blocks checked and filled in."""
    mistakes = MistakesSoFar(parts.where)
    update: dict[str, Any] = {"adapters": {}, "sources": {}}
    with mistakes.collected():
        update["backbone"] = parts.complete("backbones", recipe.backbone, "backbone")
    for kind, blocks in (("adapters", recipe.adapters), ("sources", recipe.sources)):
        for name, block in blocks.items():
            with mistakes.collected():
                update[kind][name] = parts.complete(kind, block, f"{kind}.{name}")
    with mistakes.collected():
        update["optimizer"] = _complete_optimizer(recipe.optimizer, parts)
    if recipe.evaluate is not None:
        with mistakes.collected():
            update["evaluate"] = complete_evaluation(recipe.evaluate, parts)
    update["objectives"] = _complete_terms(recipe, parts, mistakes)
    mistakes.messages += mistakes_between_blocks(recipe, parts)
    with mistakes.collected():
        _check_combiner(recipe, parts)
    mistakes.raise_any()
    return recipe.model_copy(update=update)


def _check_drawing(evaluate: Evaluate, adapters: list[Any], parts: Parts) -> None:
    """UserError for a bank or a form of guidance that the adapters do not have."""
    from agsm_rl.policy import check_bank

    check_bank(evaluate.bank, adapters, where=parts.at("evaluate.bank"))
    _check_guidance_form(evaluate, adapters, parts)


def _check_guidance_form(evaluate: Evaluate, adapters: list[Any], parts: Parts) -> None:
    """UserError for a form of guidance that the adapters do not have, or that `bank: negative` overrules."""
    if evaluate.bank == "negative" and (evaluate.guidance_bank or evaluate.guidance_prompt):
        raise UserError(
            f"{parts.at('evaluate.bank')}: negative puts both branches of guidance under the negative bank; leave it "
            "out to choose the unconditional branch alone by guidance_bank and guidance_prompt."
        )
    _check_guidance(evaluate, adapters, parts, "evaluate")


def _check_guidance(drawing: Any, adapters: list[Any], parts: Parts, place: str) -> None:
    """UserError for a form of guidance that the adapters do not have; `drawing` asks for it: grids, a source, …"""
    from agsm_rl.training.guidance import guiding

    with guiding(adapters, drawing.guidance_bank, drawing.guidance_prompt, where=parts.at(f"{place}.")):
        pass


def _complete_optimizer(given: Optimizer, parts: Parts) -> Optimizer:
    """With the own options of the optimizer and of its schedule filled in."""
    from agsm_rl.training.optimizers import OPTIMIZERS
    from agsm_rl.training.schedules import SCHEDULES

    options = _own_options(given, OPTIMIZERS, "optimizer", parts)
    schedule = _own_options(given.schedule, SCHEDULES, "optimizer.schedule", parts)
    keys = {key: getattr(given, key) for key in Optimizer.model_fields if key != "schedule"}
    if "learning_rate" not in given.model_fields_set:
        keys["learning_rate"] = OPTIMIZERS[given.use].default_rate
    completed = Optimizer(**keys, schedule=Block(use=given.schedule.use, **schedule), **options)
    rates = completed.learning_rate
    kind = OPTIMIZERS[given.use](**options)
    try:
        kind.check(rates.values() if isinstance(rates, dict) else [rates], completed.betas)
    except UserError as error:
        raise UserError(f"{parts.at('optimizer')}.{error}") from error
    return completed


def _own_options(block: Block, kinds: Mapping[str, Any], place: str, parts: Parts) -> dict[str, Any]:
    """A block's own options with their defaults, as its class in `kinds` has them."""
    from agsm_rl.training.optimizers import find_kind

    kind = find_kind(kinds, block.use, parts.at(place))
    others = [key for key in type(block).model_fields if key != "use"]
    options = validated(kind, block.options, where=parts.at(place), beside=others)
    parts.call(kind, options, place)
    return options


def complete_evaluation(evaluate: Evaluate, parts: Parts, *, place: str = "evaluate") -> Evaluate:
    """The section with its suites' and rewards' options filled in and checked."""
    if evaluate.suites is None:
        completed = evaluate.model_copy(update={"rewards": complete_rewards(evaluate, parts, place)})
    else:
        suites, mistakes = {}, MistakesSoFar(parts.where)
        for name, block in evaluate.suites.items():
            with mistakes.collected():
                suites[name] = complete_suite(block, parts, f"{place}.suites.{name}")
                _check_path(block, f"{place}.suites.{name}", parts)
        mistakes.raise_any()
        completed = evaluate.model_copy(update={"suites": suites})
    return completed


def _check_suites(recipe: RecipeKeys, parts: Parts) -> None:
    """The suites make sense on the base, and `checkpoint.best` and `stop_when` name what they measure in the run."""
    suites = [] if recipe.evaluate is None else make_suites(recipe.evaluate, parts)
    for entry in suites:
        try:
            entry.suite.check_base(recipe.backbone.options)
        except UserError as error:
            place = "evaluate" if entry.alone else f"evaluate.suites.{entry.name}"
            raise parts.refuse(place, str(error)) from error
    wanted = {"checkpoint.best": recipe.checkpoint.best} if recipe.checkpoint.best else {}
    wanted |= {f"stop_when.{name}": name for name in recipe.stop_when}
    for place, name in wanted.items():
        if recipe.evaluate is None or recipe.evaluate.every is None:
            raise parts.refuse(place, f"'{name}' is not measured while the run goes on; set evaluate.every, e.g. 50")
        key = find_score(name, suites, where=parts.at(place))
        if any(entry.final_only and key in entry.full_names() for entry in suites):
            raise parts.refuse(place, f"'{name}' is of a suite with `final_only: true`, measured at the end only")


def _complete_terms(recipe: RecipeKeys, parts: Parts, mistakes: MistakesSoFar) -> list[TermBlock]:
    terms: list[TermBlock] = []
    names = _names(recipe.objectives)
    for index, term in enumerate(recipe.objectives):
        place = f"objectives[{index}]"
        with mistakes.collected():
            done = parts.complete("objectives", term, place)
            assert isinstance(done, TermBlock)
            if done.name is None:
                done.name = names[index]
            terms.append(done)
        for key, complete in (("source", _complete_source), ("view", _complete_view)):
            with mistakes.collected():
                part = complete(recipe, term, place, parts)
                if not mistakes.messages:
                    setattr(terms[-1], key, part)
    return terms


def _complete_source(recipe: RecipeKeys, term: TermBlock, place: str, parts: Parts) -> str | Block:
    if isinstance(term.source, Block):
        return parts.complete("sources", term.source, f"{place}.source")
    return term.source


def _complete_view(recipe: RecipeKeys, term: TermBlock, place: str, parts: Parts) -> Block | None:
    return None if term.view is None else parts.complete("views", term.view, f"{place}.view")


def _names(terms: Sequence[TermBlock]) -> dict[int, str]:
    """A name for each term that has none, by its index.

    Noise depends on the name. Terms that never learn are named last, so that a term of weight 0 changes nothing.
    """
    from agsm_rl.training.names import free_name

    taken = {term.name for term in terms}
    names = {}
    for index in sorted(range(len(terms)), key=lambda index: _never_learns(terms[index])):
        if terms[index].name is None:
            names[index] = free_name(terms[index].use.rpartition(":")[2], taken)
            taken.add(names[index])
    return names


def _never_learns(term: TermBlock) -> bool:
    weights = term.weight.values() if isinstance(term.weight, dict) else [term.weight]
    return not any(weights)


def _check_term(
    recipe: RecipeKeys, index: int, shared: Mapping[str, Source], adapters: list[Any], parts: Parts
) -> None:
    """Check that a term's objective, source, view and adapters go together."""
    from agsm_rl.sources.cache import check_text_stays
    from agsm_rl.term import check_range, check_source, check_view

    place, term = f"objectives[{index}]", recipe.objectives[index]
    block, source_place = recipe.source_of(index)
    _check_path(block, source_place, parts)
    objective, source, view = parts.term(recipe, index, shared)
    check_range(term.t, objective, where=parts.at(f"{place}.t"))
    if len(adapters) == len(recipe.adapters):  # the others' mistakes are listed already
        _check_guidance(source, adapters, parts, source_place)
    if source.cache == "all":
        check_text_stays(adapters, where=parts.at(f"{source_place}.cache"))
    gives, batch_size = source.gives, source.batch_size
    if term.view is not None and view is not None:
        if not issubclass(gives, view.consumes):
            raise _mismatch(term.view.use, block, view.consumes, gives, parts, f"{place}.view")
        check_view(view, source, where=parts.at(f"{place}.view"))
        gives, batch_size = view.gives, None if batch_size is None else view.batch_size(batch_size)
    if not issubclass(gives, objective.consumes):
        raise _mismatch(term.use, term.view or block, objective.consumes, gives, parts, f"{place}.source")
    check_source(objective, source, where=f"{parts.at(place)} on {source_place}")
    if source.batch_size is not None and source.batch_size > MAX_BATCH:
        raise parts.refuse(source_place, f"a batch of {source.batch_size} rows; at most {MAX_BATCH:,} are allowed")
    if batch_size is not None:
        try:
            objective.check(batch_size)
        except UserError as error:
            raise parts.refuse(f"{place} on {source_place}", str(error)) from error


def _check_path(block: Block, place: str, parts: Parts) -> None:
    """A data set or list of prompts that can only be a path must exist; other names are for the hub to find."""
    for key in ("dataset", "prompts"):
        check_file(block.options.get(key), f"{place}.{key}", parts)


def _mismatch(use: str, block: Block, consumes: type[Batch], gives: type[Batch], parts: Parts, place: str) -> UserError:
    fitting = registry.names_that("sources", lambda found: issubclass(found.gives, consumes))
    works = f"sources that work: {', '.join(fitting)}" if fitting else "no installed source gives that"
    views = registry.names_that("views", lambda found: issubclass(found.gives, consumes))
    works += f"; views that work: {', '.join(map(_view_of, views))}" if views else ""
    return parts.refuse(
        place,
        f"'{use}' learns from a {consumes.__name__}, but '{block.use}' gives a {gives.__name__}; "
        f"{works}{consumes.given_by}.",
    )


def _view_of(view: str) -> str:
    """The view and the sources that it can be set on."""
    wanted = registry.load("views", view, where=view).consumes
    sources = registry.names_that("sources", lambda found: issubclass(found.gives, wanted))
    return f"{view} of {' or '.join(sources)}" if sources else view


def _check_combiner(recipe: RecipeKeys, parts: Parts) -> None:
    from agsm_rl.training.combine import find_combiner

    try:
        find_combiner(recipe.combine)
    except UserError as error:
        raise UserError(f"{parts.where}: {error}") from error
