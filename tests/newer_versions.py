"""Registered classes as a later version of agsm-rl might have them: with more options, or with other defaults."""

import inspect

from agsm_rl import registry


def change_options(monkeypatch, kind, name, **options):
    """Give a registered class these options with these defaults; what is new to it is taken and does nothing."""
    made = registry.load(kind, name, where=name)
    signature = inspect.signature(made)
    parameters = dict(signature.parameters)
    for option, default in options.items():
        new = inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=float)
        parameters[option] = parameters[option].replace(default=default) if option in parameters else new

    def known(given):
        return {key: value for key, value in given.items() if key in signature.parameters}

    if inspect.isclass(made):

        def make(self, **given):
            made.__init__(self, **known(given))

        newer = type(made.__name__, (made,), {"__init__": make})
        own = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    else:

        def make(**given):
            return made(**known(given))

        newer, own = make, []
    make.__signature__ = signature.replace(parameters=[*own, *parameters.values()])
    attribute = f"newer_{kind}_{name}"
    monkeypatch.setitem(globals(), attribute, newer)
    monkeypatch.setitem(registry.BUILTIN[kind], name, f"{__name__}:{attribute}")
