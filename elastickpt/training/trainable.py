"""`trainable`: the part of a model that training changes, as an entry of `state`."""

from __future__ import annotations


class Trainable:
    """Stands for those parameters of a model that require gradients, under the model's own names: adapters, for example.

        state = {"model": ek.trainable(model), "optimizer": optimizer}

    Which they are is looked at in each save and load. Frozen parameters, buffers and extra state are left out: on loading
    they are as the program made them. `model` is a module, a pipeline stage, or a list of these. A checkpoint of the whole
    model under the same key loads into it with `strict="missing"`.
    """

    __slots__ = ("model",)

    def __init__(self, model: object) -> None:
        self.model = model

    def __repr__(self) -> str:
        return f"trainable({type(self.model).__name__})"


def trainable(model: object) -> Trainable:
    """The parameters of `model` that require gradients, as an entry of `state`; see `Trainable`."""
    return Trainable(model)
