"""Listings of real files of other libraries, held against the truth that was gathered where they were written."""

from __future__ import annotations

from dense import bits, whole_of

from elastickpt.foreign.folder import open_folder
from elastickpt.foreign.formats import find_source, read_foreign
from elastickpt.foreign.listing import ForeignCheckpoint, TiedName
from elastickpt.storage.ranges import LocalReader


def read(path) -> ForeignCheckpoint:
    return read_foreign(find_source(open_folder(path)))


def arrays(found: ForeignCheckpoint) -> dict[str, tuple[tuple[int, ...], bytes]]:
    return {f"{one.name}|{one.state}": bits(whole_of(found, one)) for one in found.wholes if one.state}


def truth(case) -> dict[str, tuple[tuple[int, ...], bytes]]:
    return {name: bits(array) for name, array in case.truth.items()}


def test_dcp_every_array_is_the_truths(dcp_case) -> None:
    found = read(dcp_case.folder / "checkpoint")
    assert arrays(found) == truth(dcp_case)
    assert (found.format, found.step, found.not_carried) == ("dcp", 3, ())
    (group,) = found.groups
    trained = {name.partition("|")[0] for name in dcp_case.truth if name.endswith("|exp_avg")}
    assert set(group.members) == trained
    assert group.options["betas"] == (0.9, 0.95)


def test_safetensors_every_array_is_the_truths(hf_case) -> None:
    found = read(hf_case.folder / "model")
    assert arrays(found) == truth(hf_case)
    assert found.constants["num_key_value_heads"] == 2
    assert found.constants["rope_parameters.rope_theta"] == 10000.0


def test_torch_every_array_is_the_truths(plain_case) -> None:
    """Without names in the file an optimizer's states go by number; the prefix of DDP stays."""
    found = read(plain_case.folder / "checkpoint.pt")
    names = plain_case.facts.get("optimizer_index_to_parameter", {})
    names = {int(index): name for index, name in names.items()} if isinstance(names, dict) else dict(enumerate(names))
    aliases = {one.name: one.alias for one in found.tied}
    made = {}
    for one in found.wholes:
        if not one.state:
            continue
        name = names.get(one.name, one.name) if isinstance(one.name, int) else one.name.removeprefix("module.")
        for known in {name, aliases.get(name, name)} if one.state == "value" else {name}:
            made[f"{known}|{one.state}"] = bits(whole_of(found, one))
    assert made == truth(plain_case)


def test_torch_tied_names_and_values_are_said(plain_case) -> None:
    """[FOR-34, FOR-36]"""
    found = read(plain_case.folder / "checkpoint.pt")
    if plain_case.folder.name == "single":
        assert found.tied == (TiedName("model", "head.weight", "embed.weight"),)
        assert [one.item for one in found.wholes if not one.state] == ["rng"]
        assert found.constants["vocab"] == 101
        assert {"/step", "/epoch", "/best", "/config", "/scheduler"} == set(found.values)
    else:
        assert found.groups[0].members[0] == "module.stem.weight"
    assert found.step == 3


def test_a_listing_reads_no_tensor(plain_case, monkeypatch) -> None:
    """But for small ones among plain values, of which these files have none. [FOR-1]"""
    ranges: list[tuple[int, int]] = []
    read_into = LocalReader.read_into

    def noted(self: LocalReader, offset: int, into: memoryview) -> None:
        ranges.append((offset, offset + len(into)))
        read_into(self, offset, into)

    monkeypatch.setattr(LocalReader, "read_into", noted)
    found = read(plain_case.folder / "checkpoint.pt")
    assert ranges
    for one in found.wholes:
        for piece in one.pieces:
            storage = piece.stored.storage
            assert not [pair for pair in ranges if pair[0] < storage.start + storage.nbytes and pair[1] > storage.start]
