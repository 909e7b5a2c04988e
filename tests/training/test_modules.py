"""Facts about what one process holds of its modules: names, ties, buffers, element types, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.testing._internal.two_tensor import TwoTensor

from elastickpt.errors import StructureConflict, ValueNotCarried
from elastickpt.format.arrays import ArrayId, Box
from elastickpt.format.values import DtypeValue
from elastickpt.training.dtensors import JobView
from elastickpt.training.elements import dtype_name, torch_dtype
from elastickpt.training.modules import HeldModule, hold_module, hold_tensor, is_model
from elastickpt.training.parameters import Identities

ALONE = JobView(rank=0, world_size=1)


def held(model: object, *, item: str = "model", identities: Identities | None = None) -> HeldModule:
    return hold_module(item, model, job=ALONE, identities=identities or Identities())


def names(model: object) -> list[str]:
    return [array.spec.id.name for array in held(model).arrays]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("mask", torch.ones(3), persistent=False)
        self.register_buffer("absent", None)


class Counted(nn.Linear):
    """Has extra state, as FP8 layers do."""

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}

    def set_extra_state(self, state: object) -> None: ...


class Packed(nn.Module):
    """Keeps its weight where no name leads to, as torch's quantised layers do."""

    def _save_to_state_dict(self, destination: dict[str, object], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "packed"] = torch.ones(2)


def test_an_array_is_whole_shares_memory_and_is_this_ranks_alone() -> None:
    model = nn.Linear(3, 2)
    weight, bias = held(model).arrays
    assert weight.spec.id == ArrayId("params", "model", "weight", "value")
    assert (weight.spec.shape, weight.spec.dtype, weight.box) == ((2, 3), "float32", Box((0, 0), (2, 3)))
    assert (weight.role, weight.sharing, weight.replicas) == ("parameter", "declared", (0,))
    assert not weight.tensor.requires_grad
    weight.tensor.fill_(7.0)
    assert model.weight.eq(7.0).all()
    assert bias.tensor.data_ptr() == model.bias.data_ptr()


def test_parameters_persistent_buffers_and_frozen_parameters_are_held_and_nothing_else() -> None:
    block = Block()
    block.inner.weight.requires_grad_(requires_grad=False)
    assert [(array.spec.id.name, array.role) for array in held(block).arrays] == [
        ("scale", "buffer"),
        ("inner.weight", "parameter"),
        ("inner.bias", "parameter"),
    ]


def test_wrappers_leave_no_trace_and_names_that_look_like_theirs_stay() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.ModuleDict({"_orig_mod": nn.Linear(1, 1, bias=False)})
            self._checkpoint_wrapped_module = checkpoint_wrapper(Block())

    expected = ["module._orig_mod.weight"]
    expected += [f"_checkpoint_wrapped_module.{name}" for name in ("scale", "inner.weight", "inner.bias")]
    model = Named()
    assert names(model) == expected
    assert names(torch.compile(model)) == expected
    assert names(nn.DataParallel(checkpoint_wrapper(torch.compile(model)))) == expected
    assert held(torch.compile(model)).item.type == "Named"


def test_any_name_that_torch_takes_is_kept_as_it_is() -> None:
    strange = ["a/b", "two words", "größe・重み", "x" * 300, "W", "w", "%2F", "\n"]
    model = nn.Module()
    for name in strange:
        model.register_parameter(name, nn.Parameter(torch.ones(1)))
    assert names(model) == strange


def test_a_name_over_1024_bytes_is_refused() -> None:
    model = nn.Module()
    model.register_parameter("é" * 513, nn.Parameter(torch.ones(1)))
    with pytest.raises(ValueNotCarried, match="1026 bytes, expected at most 1024"):
        held(model)


def test_tied_tensors_are_held_once_under_their_first_name_across_items_too() -> None:
    embedding, head = nn.Embedding(4, 2), nn.Linear(2, 4, bias=False)
    head.weight = embedding.weight
    shared = nn.Linear(2, 2, bias=False)
    model = nn.ModuleDict({"e": embedding, "a": shared, "b": shared, "h": head})
    identities = Identities()
    first = held(model, identities=identities)
    assert [array.spec.id.name for array in first.arrays] == ["e.weight", "a.weight"]
    assert list(first.names) == ["e.weight", "a.weight", "b.weight", "h.weight"]
    again = held(head, item="head", identities=identities)
    assert again.arrays == ()
    assert hold_tensor("extra", "x/0", shared.weight, job=ALONE, identities=identities) == ()
    assert identities.tied() == (
        (("model", "e.weight"), ("model", "h.weight"), ("head", "weight")),
        (("model", "a.weight"), ("model", "b.weight"), ("extra", "x/0")),
    )
    known = identities.find(head.weight)
    assert known is not None
    assert (known.item, known.name, known.held) == ("model", "e.weight", first.arrays[:1])
    assert identities.find(torch.ones(4, 2)) is None


def test_a_parametrisation_is_held_as_its_originals() -> None:
    model = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    assert names(model) == [
        "bias",
        "parametrizations.weight.original0",
        "parametrizations.weight.original1",
    ]


def test_parts_of_a_model_have_disjoint_names_or_the_same_tensors() -> None:
    first, second = nn.ModuleDict({"0": nn.Linear(1, 1)}), nn.ModuleDict({"1": nn.Linear(1, 1)})
    assert names([first, second]) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert names((first, first)) == ["0.weight", "0.bias"]
    with pytest.raises(StructureConflict, match=r"part 0 \(ModuleDict\) and part 1 \(Sequential\) both have .*'0.weight'"):
        held([first, nn.Sequential(nn.Linear(1, 1))])


def test_what_counts_as_a_model() -> None:
    layer = nn.Linear(1, 1)
    assert [is_model(value) for value in (layer, [layer], (layer, layer), nn.ModuleList())] == [True] * 4
    assert [is_model(value) for value in ([], {}, {"a": layer}, [layer, 1], layer.weight)] == [False] * 5


def test_extra_state_stands_at_the_pointer_of_its_module_once() -> None:
    layer = Counted(1, 1)
    states = held(nn.ModuleDict({"a/b": layer, "again": layer}), item="m~").extra_states
    assert [(state.pointer, state.module) for state in states] == [("/m~0/a~1b", layer)]


def test_what_only_a_modules_own_state_dict_has_is_an_own_entry_of_it() -> None:
    (part,) = held(nn.Sequential(Packed())).parts
    (entry,) = part.entries
    assert (entry.key, entry.owner, dict(part.loaders)) == ("0.packed", "module '0' (Packed)", {})


NAMED = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.bool, torch.complex64, torch.complex128),
)


def test_every_element_type_that_zarr_knows_is_held_under_its_name() -> None:
    tensors = [torch.empty(2, 3, dtype=dtype) for dtype in NAMED]
    arrays = [array for t in tensors for array in hold_tensor("x", str(t.dtype), t, job=ALONE, identities=Identities())]
    assert [f"torch.{array.spec.dtype}" for array in arrays] == [str(dtype) for dtype in NAMED]
    assert [array.tensor.data_ptr() for array in arrays] == [tensor.data_ptr() for tensor in tensors]
    assert [array.tensor.dtype for array in arrays] == list(NAMED)
    assert [torch_dtype(dtype_name(dtype) or "") for dtype in NAMED] == list(NAMED)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize(
    ("dtype", "tail"), [(torch.complex32, (4,)), (torch.float4_e2m1fn_x2, ()), (torch.uint4, ()), (torch.bits16, (2,))]
)
@pytest.mark.parametrize("shape", [(), (2, 3), (0, 3)])
def test_other_element_types_are_held_as_their_bytes(dtype: torch.dtype, tail: tuple[int, ...], shape: tuple[int, ...]) -> None:
    tensor = torch.empty(shape, dtype=dtype)
    (array,) = hold_tensor("x", "", tensor, job=ALONE, identities=Identities())
    assert (array.spec.shape, array.spec.dtype) == ((*shape, *tail), "uint8")
    assert array.attributes == (("stored_as", str(dtype).removeprefix("torch.")),)
    array.tensor.fill_(0x5A)
    assert bytes(tensor.untyped_storage()) == b"\x5a" * tensor.nbytes


def test_scalars_empty_and_non_contiguous_tensors_are_held_in_place() -> None:
    model = nn.Module()
    model.register_buffer("scalar", torch.tensor(3))
    model.register_buffer("empty", torch.empty(4, 0, 2))
    model.register_buffer("strided", torch.arange(12.0).reshape(3, 4).t()[::2])
    scalar, empty, strided = held(model).arrays
    assert (scalar.box, empty.box) == (Box((), ()), Box((0, 0, 0), (4, 0, 2)))
    assert strided.tensor.tolist() == [[0.0, 4.0, 8.0], [2.0, 6.0, 10.0]]
    assert strided.tensor.stride() == (2, 4)


@pytest.mark.filterwarnings("ignore")
def test_what_has_no_place_in_an_array_is_refused_by_name() -> None:
    quantised = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    refused = {
        "is not initialised yet": nn.LazyLinear(2).weight,
        "is on the meta device": torch.empty(2, device="meta"),
        "layout torch.sparse_csr": torch.eye(2).to_sparse_csr(),
        "is quantised": quantised,
        "is a nested tensor": torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
        "is a lazy conjugate": torch.ones(2, dtype=torch.complex64).conj(),
    }
    for reason, tensor in refused.items():
        with pytest.raises(ValueNotCarried, match=f"extra/state/a/b {reason}|extra/state/a/b has {reason}"):
            hold_tensor("state", "a/b", tensor, job=ALONE, identities=Identities())
    with pytest.raises(ValueNotCarried, match=r"params/model/0\.weight/value is not initialised"):
        held(nn.Sequential(nn.LazyLinear(2)))


def test_a_composite_tensor_is_one_array_for_each_tensor_inside() -> None:
    model = nn.Module()
    codes, nested = torch.ones(2, 3), TwoTensor(torch.zeros(2, 3), torch.zeros(2, 3))
    model.register_buffer("q", TwoTensor(codes, nested))
    arrays = held(model).arrays
    assert [array.spec.id.state for array in arrays] == ["value.a", "value.b.a", "value.b.b"]
    attributes = [dict(array.attributes)["composition"] for array in arrays]
    assert [attribute.pop("part") for attribute in attributes] == [["a"], ["b", "a"], ["b", "b"]]
    two = "torch.testing._internal.two_tensor.TwoTensor"
    inner = {
        "class": two,
        "shape": [2, 3],
        "dtype": DtypeValue("float32"),
        "context": None,
        "parts": [["a", None], ["b", None]],
    }
    assert attributes == [{**inner, "parts": [["a", None], ["b", inner]]}] * 3
    arrays[0].tensor.fill_(5.0)
    assert codes.eq(5.0).all()
    extra = hold_tensor("state", "x", TwoTensor(codes, codes), job=ALONE, identities=Identities())
    assert [array.spec.id.name for array in extra] == ["x/a", "x/b"]
