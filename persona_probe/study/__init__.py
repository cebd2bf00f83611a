"""A study: its object and stages."""


def __getattr__(name: str):
    from persona_probe.study import study

    return getattr(study, name)
