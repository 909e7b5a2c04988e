"""Labels of dimensions, by which a number in a name chooses what a stacked tensor has of one array."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from elastickpt.language import tree as t


def labels_of(dims: object) -> Iterator[str]:
    """The labels of dimensions that stand alone in parentheses: `(e=experts/ep)`."""
    for factor in dims if isinstance(dims, tuple) else ():
        if isinstance(factor, t.Sum):
            for part in factor.parts:
                if part.label is not None and len(factor.parts) == 1:
                    yield part.label
                yield from labels_of(part.factors)
        elif isinstance(factor, t.Cut | t.Deal):
            yield from labels_of((factor.inner,))


def labelled(label: str, dims: Sequence[t.Factor]) -> t.Factor:
    """The labelled part of dimensions, as a factor."""
    for factor in dims:
        if isinstance(factor, t.Sum):
            for part in factor.parts:
                if part.label == label:
                    return t.Sum((t.Product(part.factors),))
                inner = [one for one in part.factors if label in set(labels_of((one,)))]
                if inner:
                    return labelled(label, inner)
        elif isinstance(factor, t.Cut | t.Deal) and label in set(labels_of((factor.inner,))):
            return labelled(label, (factor.inner,))
    raise KeyError(label)
