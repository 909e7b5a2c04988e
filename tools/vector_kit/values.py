"""Vectors of typed JSON. `expect.type` is Python's name of the decoded type; a valid text is also its own encoding."""

from __future__ import annotations

from collections.abc import Iterator

from tools.vector_kit.kit import Vector, as_base64, canonical

_VALID: tuple[tuple[str, str, str, str, str], ...] = (
    ("null", "Nothing.", "UCF-50", "null", "NoneType"),
    ("true", "A boolean is no integer.", "UCF-50", "true", "bool"),
    ("one", "An integer is no boolean.", "UCF-50", "1", "int"),
    ("one-float", "A float is no integer.", "UCF-54", "1.0", "float"),
    ("negative-zero", "The sign of zero stays.", "UCF-54", "-0.0", "float"),
    ("small-float", "Scientific below 1e-4.", "UCF-42", "1e-05", "float"),
    ("large-float", "Scientific from 1e16 on.", "UCF-42", "1.5e+16", "float"),
    ("denormal", "The smallest float.", "UCF-42", "5e-324", "float"),
    ("largest-plain", "2^53 is still plain.", "UCF-53", "9007199254740992", "int"),
    ("big", "2^53 + 1 is not.", "UCF-53", '{"$int":"9007199254740993"}', "int"),
    ("big-negative", "Nor is -2^53 - 1.", "UCF-53", '{"$int":"-9007199254740993"}', "int"),
    ("nan", "Not a number.", "UCF-54", '{"$float":"nan"}', "float"),
    ("minus-infinity", "Minus infinity.", "UCF-54", '{"$float":"-inf"}', "float"),
    ("text", "Beyond U+FFFF: a surrogate pair.", "UCF-42", '"\\u00e9\\ud83d\\ude00\\u2028\\u0001\\n"', "str"),
    ("bytes", "Three bytes.", "UCF-57", '{"$bytes":"AAEC"}', "bytes"),
    ("bytes-padded", "One byte.", "UCF-57", '{"$bytes":"/w=="}', "bytes"),
    ("list", "A list is no tuple.", "UCF-50", "[1,[2,[]]]", "list"),
    ("tuple", "A tuple is no list.", "UCF-50", '{"$tuple":[1,{"$tuple":[]}]}', "tuple"),
    ("object", "Text keys, in order.", "UCF-50", '{"b":1,"a":2,"":3}', "dict"),
    ("map-integers", "Integer keys.", "UCF-55", '{"$map":[[1,"a"],[0,"b"]]}', "dict"),
    ("map-dollar", "A key that begins with a dollar.", "UCF-55", '{"$map":[["$a",1]]}', "dict"),
    ("map-mixed", '1 and "1" are two keys.', "UCF-55", '{"$map":[[1,"a"],["1","b"]]}', "dict"),
    ("map-tuple", "A tuple as key.", "UCF-55", '{"$map":[[{"$tuple":[0,1]},2]]}', "dict"),
    ("counter", "MultiStepLR's milestones.", "UCF-55", '{"$counter":[[30,1],[80,1]]}', "Counter"),
    ("ordered", "An OrderedDict.", "UCF-55", '{"$odict":[["b",1],["a",2]]}', "OrderedDict"),
    ("set", "Sorted by text: 10 before 9.", "UCF-56", '{"$set":[10,9]}', "set"),
    ("frozenset", "A frozenset in a set.", "UCF-56", '{"$set":[{"$frozenset":["a","b"]}]}', "set"),
    ("complex", "A complex number with NaN.", "UCF-50", '{"$complex":[1.5,{"$float":"nan"}]}', "complex"),
    (
        "array",
        "Two int64, little-endian.",
        "UCF-57",
        canonical({"$array": {"dtype": "int64", "shape": [2], "data": as_base64(bytes(16)), "origin": "torch"}}),
        "ArrayValue",
    ),
    (
        "array-no-axes",
        "A bfloat16 without axes.",
        "UCF-57",
        '{"$array":{"dtype":"bfloat16","shape":[],"data":"gD8=","origin":"torch"}}',
        "ArrayValue",
    ),
    (
        "tensor",
        "A tensor that stands elsewhere.",
        "UCF-50",
        '{"$tensor":{"item":"loader","name":"perm/0"}}',
        "ArrayReference",
    ),
    ("deep", "16 deep.", "UCF-92", "[" * 16 + "]" * 16, "list"),
)

_INVALID: tuple[tuple[str, str, str, str, str], ...] = (
    ("tag-unknown", "A tag of the future.", "UCF-51", "unsupported", '{"$date":"2026"}'),
    ("tag-pickle", "Never.", "UCF-51", "unsupported", '{"$pickle":"gASVAAAA"}'),
    ("tag-beside", "A tag beside a member.", "UCF-52", "malformed", '{"$tuple":[],"a":1}'),
    ("tag-twice", "Two tags.", "UCF-52", "malformed", '{"$tuple":[],"$set":[]}'),
    ("member-twice", "One key twice.", "UCF-43", "malformed", '{"a":1,"a":2}'),
    ("int-large", "Beyond 2^53, plain.", "UCF-53", "malformed", "9007199254740993"),
    ("int-small", "Within 2^53, tagged.", "UCF-53", "malformed", '{"$int":"5"}'),
    ("int-zeros", "A leading zero.", "UCF-53", "malformed", '{"$int":"09007199254740993"}'),
    ("int-plus", "A plus sign.", "UCF-53", "malformed", '{"$int":"+9007199254740993"}'),
    ("int-underscore", "Python's underscores.", "UCF-53", "malformed", '{"$int":"9_007_199_254_740_993"}'),
    ("int-number", "No text.", "UCF-44", "malformed", '{"$int":9007199254740993}'),
    ("int-long", "5,000 digits.", "UCF-98", "limit-exceeded", canonical({"$int": "1" * 5000})),
    ("float-large", "Beyond binary64.", "UCF-54", "malformed", "1e400"),
    ("float-name", "Upper case.", "UCF-54", "malformed", '{"$float":"NaN"}'),
    ("float-finite", "A finite float, tagged.", "UCF-54", "malformed", '{"$float":"1.0"}'),
    ("constant", "NaN as a number.", "UCF-43", "malformed", "NaN"),
    ("surrogate", "Half a surrogate pair.", "UCF-44", "malformed", '"\\ud83d"'),
    ("surrogate-key", "The same in a key.", "UCF-44", "malformed", '{"\\ud83d":1}'),
    ("bytes-alphabet", "Not base64.", "UCF-57", "malformed", '{"$bytes":"AA*C"}'),
    ("bytes-unpadded", "No padding.", "UCF-57", "malformed", '{"$bytes":"/w"}'),
    ("bytes-loose-bits", "Bits that say nothing.", "UCF-57", "malformed", '{"$bytes":"/x=="}'),
    ("map-needless", "An object says the same.", "UCF-50", "malformed", '{"$map":[["a",1]]}'),
    ("map-empty", "{} says the same.", "UCF-50", "malformed", '{"$map":[]}'),
    ("map-twice", "One key twice.", "UCF-55", "malformed", '{"$map":[[1,2],[1,3]]}'),
    ("map-equal", "1 and 1.0 are one key.", "UCF-55", "malformed", '{"$map":[[1,2],[1.0,3]]}'),
    ("map-list-key", "A list as key.", "UCF-55", "malformed", '{"$map":[[[],1]]}'),
    ("map-triple", "Three in a pair.", "UCF-44", "malformed", '{"$map":[[1,2,3]]}'),
    ("odict-twice", "One key twice.", "UCF-55", "malformed", '{"$odict":[["a",1],["a",2]]}'),
    ("set-order", "9 before 10.", "UCF-56", "malformed", '{"$set":[9,10]}'),
    ("set-twice", "One element twice.", "UCF-56", "malformed", '{"$set":[1,1]}'),
    ("set-equal", "1 and true are one element.", "UCF-56", "malformed", '{"$set":[1,true]}'),
    ("set-list", "A list in a set.", "UCF-56", "malformed", '{"$set":[[]]}'),
    ("complex-integer", "A part that is no float.", "UCF-44", "malformed", '{"$complex":[1,0.0]}'),
    ("complex-three", "Three parts.", "UCF-44", "malformed", '{"$complex":[1.0,0.0,0.0]}'),
    (
        "array-short",
        "15 bytes for two int64.",
        "UCF-57",
        "malformed",
        canonical({"$array": {"dtype": "int64", "shape": [2], "data": as_base64(bytes(15)), "origin": "torch"}}),
    ),
    (
        "array-dtype",
        "An element type that is not known.",
        "UCF-20",
        "unsupported",
        '{"$array":{"dtype":"object","shape":[],"data":"","origin":"numpy"}}',
    ),
    (
        "array-origin",
        "Neither torch nor numpy.",
        "UCF-57",
        "malformed",
        '{"$array":{"dtype":"int8","shape":[],"data":"AA==","origin":"jax"}}',
    ),
    (
        "array-member",
        "A member more.",
        "UCF-44",
        "malformed",
        '{"$array":{"dtype":"int8","shape":[],"data":"AA==","origin":"torch","order":"F"}}',
    ),
    (
        "array-large",
        "65,537 bytes.",
        "UCF-98",
        "limit-exceeded",
        canonical({"$array": {"dtype": "int8", "shape": [65537], "data": as_base64(bytes(65537)), "origin": "torch"}}),
    ),
    ("tensor-member", "A member is missing.", "UCF-44", "malformed", '{"$tensor":{"item":"a"}}'),
    ("deep", "17 deep.", "UCF-92", "limit-exceeded", "[" * 17 + "]" * 17),
    ("deep-map", "17 deep through maps.", "UCF-92", "limit-exceeded", '{"$map":[[1,' * 17 + "0" + "]]}" * 17),
    ("trailing", "Two values.", "UCF-43", "malformed", "1 2"),
    ("empty", "No value.", "UCF-43", "malformed", ""),
)


def vectors() -> Iterator[Vector]:
    for name, about, rule, text, kind in _VALID:
        yield Vector("values/valid", name, about, tuple(rule.split()), {"text": text}, expect={"type": kind})
    for name, about, rule, error, text in _INVALID:
        yield Vector("values/invalid", name, about, tuple(rule.split()), {"text": text}, error=error)
