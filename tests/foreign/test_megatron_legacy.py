"""The legacy layout of Megatron-LM, read from a real checkpoint."""

from __future__ import annotations

import numpy as np

from elastickpt.foreign.folder import open_folder
from elastickpt.foreign.formats import find_source, read_foreign
from elastickpt.foreign.tensor_bytes import read_tensor


def test_a_real_checkpoint_lists_all_ranks_in_order(megatron_case) -> None:
    found = read_foreign(find_source(open_folder(megatron_case.folder / "checkpoint")))
    assert [rank.coordinate for rank in found.ranks] == [(("pp", p), ("tp", t)) for p in (0, 1) for t in (0, 1)]
    assert (found.step, found.constants["num_query_groups"], found.constants["params_dtype"]) == (3, 4, "float32")
    assert [one.name for one in found.not_carried] == ["rng_state"]
    assert [len(group.members) for group in found.ranks[-1].groups] == [9, 5]


def test_the_bytes_of_a_real_checkpoint_are_those_of_its_truth(megatron_case) -> None:
    """A vector that every tensor rank holds, and a matrix of which the ranks hold halves of the rows."""
    folder = open_folder(megatron_case.folder / "checkpoint")
    found = read_foreign(find_source(folder))
    folder = open_folder(found.folder)
    stored = {(rank.coordinate, one.name): one.stored for rank in found.ranks for one in rank.tensors if one.item == "model"}
    halves = []
    for tp in (0, 1):
        at = (("pp", 1), ("tp", tp))
        for name in ("decoder.final_layernorm.weight", "output_layer.weight"):
            with folder.opened(stored[at, name].storage.file) as archive:
                halves.append(read_tensor(archive.reader, stored[at, name]).view("<f4").reshape(stored[at, name].shape))
    np.testing.assert_array_equal(halves[0], megatron_case.truth["decoder.final_layernorm.weight|value"])
    np.testing.assert_array_equal(halves[2], halves[0])
    whole = np.concatenate([halves[1], halves[3]])
    np.testing.assert_array_equal(whole[:101], megatron_case.truth["output_layer.weight|value"])
    assert whole.shape == (128, 32)
