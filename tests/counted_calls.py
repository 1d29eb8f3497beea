"""Whether something is called."""


def count_calls(monkeypatch, owner, name):
    """A list that grows by one with each call of a function of a module or a class, which still does its work."""
    counted, original = [], getattr(owner, name)

    def counting(*arguments, **options):
        counted.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, counting)
    return counted
