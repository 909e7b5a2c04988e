"""`trainable`: the part of a model that training changes, as an entry of `state`."""

from __future__ import annotations


class Trainable:
    """What `trainable` returns. `model` is a module, a pipeline stage, or a list of these."""

    __slots__ = ("model",)

    def __init__(self, model: object) -> None:
        self.model = model

    def __repr__(self) -> str:
        return f"trainable({type(self.model).__name__})"


def trainable(model: object) -> Trainable:
    """Those parameters of a model that require gradients, as an entry of `state`, under the model's own names: adapters, for
    example.

    Which they are is looked at in each save and load. Frozen parameters, buffers and extra state are left out: on loading
    they are as the program made them. A checkpoint of the whole model under the same key loads into it with
    `strict="missing"`.

    Args:
        model: A module, a pipeline stage, or a list of these.

    Returns:
        The entry.

    Raises:
        LayoutUnsupported: When it is saved: `model` is no module.

    Examples:
        >>> info = ek.save({"model": ek.trainable(model)}, "out/adapters")
        >>> sorted(name for _, name in ek.open("out/adapters").parameters)
        ['layers.0.bias', 'layers.0.weight']
    """
    return Trainable(model)
