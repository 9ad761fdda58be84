"""Sources before the first step: each is bound once, and what its prompts and shares cannot be used for is refused."""

from collections.abc import Mapping, Sequence

from agsm_rl.backbones.text_cache import text_cache_of
from agsm_rl.errors import UserError
from agsm_rl.interfaces import Backbone
from agsm_rl.policy import Source
from agsm_rl.term import Term
from agsm_rl.training.processes import Processes
from agsm_rl.training.prompt_lengths import warn_of_cut_prompts
from agsm_rl.training.stages import stage


def bind_sources(terms: Sequence[Term], seed: int, backbone: Backbone, processes: Processes) -> dict[str, Source]:
    """Each source once, under its own name or that of the first term that learns from it."""
    names = [term.name for term in terms]
    if len(set(names)) < len(names):
        raise UserError(f"objectives: two terms have the same name ({', '.join(names)}); give each a different one")
    sources: dict[str, Source] = {}
    for term in terms:
        if not any(term.source is known for known in sources.values()):
            name = f"sources.{term.source_name}" if term.source_name else term.name
            term.source.bind(name, seed, processes)
            term.source.fit_to(backbone)
            sources[name] = term.source
        _check_share(term, processes.count)
    return sources


def check_prompts(
    terms: Sequence[Term], sources: Mapping[str, Source], backbone: Backbone, processes: Processes
) -> set[int]:
    """UserError for a term that could learn nothing from its source's prompts; a warning where prompts are cut.

    Returns the ids of the sources whose prompts are not known before they come.
    """
    unread: set[int] = set()
    known = {id(source): source.prompt_texts() for source in sources.values()}
    for term in terms:
        prompts = known[id(term.source)]
        if prompts is None:
            continue
        try:
            term.objective.check_prompts(prompts, backbone)
        except UserError as error:
            raise UserError(f"{term.name}: {error}") from error
    for name, source in sources.items():
        prompts = known[id(source)]
        if prompts is None:
            unread.add(id(source))
        elif processes.index == 0:
            warn_of_cut_prompts(prompts, backbone, name=name)
    return unread


def encode_prompts(sources: Mapping[str, Source], backbone: Backbone, processes: Processes) -> None:
    """Encode all prompts of the sources beforehand, where the text encoders do not stay loaded; the processes share."""
    cache = text_cache_of(backbone)
    if cache is None:
        return
    asking = [source for source in sources.values() if source.cache != "all"]  # the others bring their text along
    with stage("encoding the prompts"):
        cache.fill(backbone, [text for source in asking for text in source.prompt_texts() or ()], processes)
    processes.wait()


def _check_share(term: Term, count: int) -> None:
    """UserError if a process's share of the batch cannot be used, although the whole batch could."""
    total = term.source.batch_size
    share = None if total is None else total // count
    if share is not None and term.view is not None:
        share = term.view.batch_size(share)
    if count == 1 or share is None:
        return
    try:
        term.objective.check(share)
    except UserError as error:
        raise UserError(
            f"{term.name}: on {count} processes each learns from {share} rows, a share of the batch of {total}: "
            f"{error}; or start fewer processes"
        ) from error
