"""Words of messages that depend on a number."""


def counted(count: int, noun: str, plural: str = "") -> str:
    """A number with its noun: "1 window", "2,000 windows".

    Args:
        count: how many.
        noun: of one.
        plural: of several; `noun` and "s" if not given.
    """
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"
