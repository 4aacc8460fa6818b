"""Whether a float model of others answers so badly that its spec is to be doubted."""

from cnngru_edge.export.verdict.compare import Comparison

_LEAST_CLIPS = 10
"""Of a class, from which it is told that it stands in another's place."""
_ASK = (
    "are the labels of the spec in the order that it was trained with, and are layout and features "
    "of [input] those of its training?"
)


def doubt_about(found: Comparison) -> str | None:
    """What to check in a spec, if its float model knows nothing of these recordings.

    Labels in another order and features of another kind fit every shape: INT8 then answers as
    wrongly as float does, and the two are equal.
    """
    if found.error_rates is not None:
        wer = found.error_rates.conditions[0].rates.reference_wer
        if wer < 1:
            return None
        return f"the float model has a WER of {wer:.0%} here, and to write nothing 100%; {_ASK}"
    if len(found.by_class) < 2:  # of one alone nothing is seen
        return None
    commonest = max(found.by_class, key=lambda one: one.clips)
    right, share = found.clean.reference_accuracy, commonest.clips / found.clips
    if right > share:
        return _doubt_about_order(found)
    return (
        f"the float model is right on {right:.1%} here, and always to answer {commonest.group!r} "
        f"would be on {share:.1%}; {_ASK}"
    )


def _doubt_about_order(found: Comparison) -> str | None:
    """The first class that is called by another's name, which is not called so itself.

    A model that answers one label to everything calls that label's own clips by it too.
    """
    rows = found.confusion["reference"]
    for true, row in enumerate(rows):
        most = max(range(len(row)), key=row.__getitem__)
        clips = sum(row)
        if clips < _LEAST_CLIPS or most == true or 2 * row[most] <= clips:
            continue
        if 2 * rows[most][most] < sum(rows[most]):
            return (
                f"the float model answers {found.labels[most]!r} to {row[most]} of {clips} clips "
                f"of {found.labels[true]!r}; {_ASK}"
            )
    return None
