"""Vectors of `checkpoint.json`."""

from __future__ import annotations

from collections.abc import Iterator

from tools.vector_kit.kit import ZEROS, Change, Json, Record, Vector, canonical, changed, manifest, sealed, setting, without

_VALID: tuple[tuple[str, str, str, Change], ...] = (
    ("plain", "The example of the specification.", "UCF-71", lambda m: None),
    ("no-step", "A checkpoint outside of training has no step.", "UCF-75", setting("step", to=None)),
    ("no-values", "Nothing replicated.", "UCF-58", setting("values", to={})),
    ("packed", "Placement packed is part of version 1.", "UCF-79", setting("placement", to="packed")),
    (
        "base",
        "Pieces may lie in another checkpoint.",
        "UCF-82",
        setting("bases", to=[{"uri": "../a", "digest": ZEROS}]),
    ),
    ("tied", "Two names of one tensor.", "UCF-83", setting("tied", to=[[["model", "embed.w"], ["model", "head.w"]]])),
    (
        "two-meshes",
        "Ranks in an order of their own, and a mesh over some of them.",
        "UCF-47",
        lambda m: m.update(
            meshes=[
                {"name": "dense", "axes": ["pp", "tp"], "sizes": [2, 2], "ranks": [[2, 3], [0, 1]]},
                {"name": "expert", "axes": ["ep"], "sizes": [2], "ranks": [[0, 0], [2, 2]]},
            ],
            layouts=[{"mesh": 1, "placements": ["S(0)"]}],
        ),
    ),
    (
        "strided",
        "FSDP2 over tensor parallelism on one dimension.",
        "UCF-77",
        lambda m: m.update(
            meshes=[{"name": "m", "axes": ["fsdp", "tp"], "sizes": [2, 2], "ranks": [[0, 3]]}],
            layouts=[{"mesh": 0, "placements": ["_S(0)", "S(0)"]}, {"mesh": 0, "placements": ["R", "S(1)"]}],
        ),
    ),
    (
        "no-arrays",
        "A checkpoint of values only has one index part without keys.",
        "UCF-80",
        lambda m: m["index"][0].update(first="", last=""),
    ),
    (
        "unicode",
        "Characters beyond ASCII are escaped, those beyond U+FFFF as surrogate pairs.",
        "UCF-42",
        setting("items", to=[{"name": "modèle 🐢", "kind": "module", "type": "Net"}]),
    ),
    (
        "two-parts",
        "An index in two parts by the order of keys.",
        "UCF-65",
        lambda m: m["index"].append(
            {"path": "index-00001.msgpack", "nbytes": 5, "digest": ZEROS, "first": "params/n", "last": "params/o"}
        ),
    ),
)

_INVALID: tuple[tuple[str, str, str, str, Change], ...] = (
    ("version-2", "A later version.", "UCF-72", "unsupported", setting("version", to=2)),
    ("version-0", "There is no version 0.", "UCF-72", "unsupported", setting("version", to=0)),
    ("version-float", "Versions are integers.", "UCF-44", "malformed", setting("version", to=1.0)),
    ("version-true", "True is no integer.", "UCF-44", "malformed", setting("version", to=True)),
    ("requires-unknown", "A feature of the future.", "UCF-73", "unsupported", setting("requires", to=["zstd"])),
    (
        "requires-two",
        "One that is known, one that is not.",
        "UCF-73",
        "unsupported",
        setting("requires", to=["axis-order", "zstd"]),
    ),
    ("other-format", "Another kind of record.", "UCF-44", "malformed", setting("format", to="elastickpt-index")),
    ("member-missing", "Members are never optional.", "UCF-44", "malformed", without("world_size")),
    ("member-unknown", "Members are never added silently.", "UCF-44", "malformed", setting("extra", to=1)),
    ("member-unknown-inside", "Nor inside.", "UCF-44", "malformed", setting("items", 0, "extra", to=1)),
    ("step-negative", "Steps count.", "UCF-75", "malformed", setting("step", to=-1)),
    ("step-true", "True is no step.", "UCF-75", "malformed", setting("step", to=True)),
    ("step-float", "100.0 is no step.", "UCF-75", "malformed", setting("step", to=100.0)),
    ("time-integer", "A time has a fraction.", "UCF-75", "malformed", setting("time", to=1763700000)),
    ("world-size-zero", "A job has a rank.", "UCF-44", "malformed", setting("world_size", to=0)),
    ("placement-unknown", "Plain or packed.", "UCF-79", "malformed", setting("placement", to="striped")),
    ("item-kind", "A kind that is none.", "UCF-76", "malformed", setting("items", 0, "kind", to="model")),
    ("item-twice", "Items are keys.", "UCF-76", "malformed", lambda m: m["items"].append(m["items"][0])),
    ("item-control", "A name with a line feed.", "UCF-30", "unsafe", setting("items", 0, "name", to="a\nb")),
    ("item-long", "A name of 1,025 bytes.", "UCF-97", "limit-exceeded", setting("items", 0, "name", to="a" * 1025)),
    ("mesh-sizes", "Two sizes for one axis.", "UCF-78", "malformed", setting("meshes", 0, "sizes", to=[2, 1])),
    ("mesh-ranks", "Three ranks on two places.", "UCF-78", "malformed", setting("meshes", 0, "ranks", to=[[0, 2]])),
    ("mesh-rank-twice", "One rank twice.", "UCF-78", "malformed", setting("meshes", 0, "ranks", to=[[1, 1], [1, 1]])),
    (
        "mesh-size-zero",
        "An axis of nobody.",
        "UCF-78",
        "malformed",
        lambda m: m["meshes"][0].update(sizes=[0], ranks=[]),
    ),
    (
        "mesh-axes-twice",
        "Axes are told apart by name.",
        "UCF-78",
        "malformed",
        lambda m: (m["meshes"][0].update(axes=["a", "a"], sizes=[2, 1]), m.update(layouts=[])),
    ),
    ("runs-backwards", "A run from 1 to 0.", "UCF-47", "malformed", setting("meshes", 0, "ranks", to=[[1, 0]])),
    (
        "runs-joined",
        "Two runs that are one.",
        "UCF-47",
        "malformed",
        setting("meshes", 0, "ranks", to=[[0, 0], [1, 1]]),
    ),
    (
        "runs-bomb",
        "A few bytes that stand for nine million ranks.",
        "UCF-91",
        "limit-exceeded",
        setting("meshes", 0, "ranks", to=[[0, 1048575]] * 9),
    ),
    ("layout-mesh", "A mesh that is not there.", "UCF-44", "malformed", setting("layouts", 0, "mesh", to=1)),
    (
        "placement-form",
        "Partial sums are no placement.",
        "UCF-77",
        "malformed",
        setting("layouts", 0, "placements", to=["P"]),
    ),
    ("placement-count", "Two on one axis.", "UCF-77", "malformed", setting("layouts", 0, "placements", to=["R", "R"])),
    ("index-empty", "No index.", "UCF-80", "malformed", setting("index", to=[])),
    ("index-order", "First key after the last.", "UCF-65", "malformed", setting("index", 0, "first", to="q")),
    (
        "index-parts-order",
        "A part that begins before the last one ends.",
        "UCF-65",
        "malformed",
        lambda m: m["index"].append({**m["index"][0], "path": "index-00001.msgpack"}),
    ),
    ("path-absolute", "An absolute path.", "UCF-38", "unsafe", setting("fragments", 0, "path", to="/etc/passwd")),
    ("path-parent", "A path out of the tree.", "UCF-38", "unsafe", setting("fragments", 0, "path", to="a/../../b")),
    ("path-dot", "A path with a dot component.", "UCF-38", "unsafe", setting("fragments", 0, "path", to="./a")),
    ("path-empty-component", "Two slashes.", "UCF-38", "unsafe", setting("fragments", 0, "path", to="a//b")),
    ("path-empty", "An empty path.", "UCF-38", "unsafe", setting("fragments", 0, "path", to="")),
    ("path-backslash", "Windows' separator.", "UCF-38", "unsafe", setting("fragments", 0, "path", to="a\\..\\b")),
    ("path-drive", "Windows' drive.", "UCF-38", "unsafe", setting("fragments", 0, "path", to="c:/a")),
    ("path-nul", "A NUL.", "UCF-38", "unsafe", setting("fragments", 0, "path", to="a\0b")),
    ("path-unicode", "Keys are ASCII.", "UCF-38", "unsafe", setting("fragments", 0, "path", to="fragmènts/0")),
    (
        "path-long",
        "A path of 4,097 bytes.",
        "UCF-39",
        "limit-exceeded",
        setting("index", 0, "path", to="a/" * 2048 + "a"),
    ),
    ("component-long", "A component of 256.", "UCF-39", "limit-exceeded", setting("index", 0, "path", to="a" * 256)),
    (
        "path-twice",
        "One file as two writers'.",
        "UCF-81",
        "malformed",
        lambda m: m["fragments"][1].update(m["fragments"][0]),
    ),
    ("nbytes-negative", "A length below zero.", "UCF-44", "malformed", setting("fragments", 0, "nbytes", to=-1)),
    ("nbytes-huge", "A length beyond 2^63.", "UCF-44", "malformed", setting("fragments", 0, "nbytes", to=2**63)),
    ("digest-upper", "Upper-case hex.", "UCF-40", "malformed", setting("fragments", 0, "digest", to="A" * 32)),
    ("digest-short", "A short digest.", "UCF-40", "malformed", setting("fragments", 0, "digest", to="0" * 31)),
    (
        "base-chained",
        "A chained URL.",
        "UCF-82",
        "unsafe",
        setting("bases", to=[{"uri": "zip::file://a", "digest": ZEROS}]),
    ),
    ("tied-alone", "One name is not tied.", "UCF-83", "malformed", setting("tied", to=[[["model", "w"]]])),
    ("values-pointer", "No slash before it.", "UCF-58", "malformed", setting("values", to={"scheduler": 1})),
    ("values-list", "No object.", "UCF-58", "malformed", setting("values", to=[1])),
)


def _body(change: Change) -> str:
    return canonical(changed(manifest(), change))


def _expect(record: Record) -> Json:
    kept = ("attempt", "step", "time", "world_size", "placement", "requires", "values")
    return {
        **{name: record[name] for name in kept},
        "items": [item["name"] for item in record["items"]],
        "ranks": [[rank for low, high in mesh["ranks"] for rank in range(low, high + 1)] for mesh in record["meshes"]],
        "fragments": [file["path"] for file in record["fragments"]],
    }


def _broken_text() -> Iterator[tuple[str, str, str, str, str]]:
    whole = sealed(canonical(manifest()))
    swapped = whole.replace('"step":100', '"step":101')
    yield "flipped", "One digit of the step was changed.", "UCF-74", "checksum-mismatch", swapped
    yield "cut", "The last byte is missing.", "UCF-71", "malformed", whole[:-1]
    yield "empty", "No byte.", "UCF-71", "malformed", ""
    yield "trailing", "A line feed too many.", "UCF-71", "malformed", whole + "\n"
    yield "no-digest", "The digest is missing.", "UCF-71", "malformed", canonical(manifest()) + "\n"
    body = canonical(manifest())
    twice = body.replace('"step":100', '"step":100,"step":100')
    yield "member-twice", "Which one counts?", "UCF-43", "malformed", sealed(twice)
    yield "nan", "NaN is no JSON.", "UCF-43", "malformed", sealed(body.replace("1763700000.5", "NaN"))
    yield "infinity", "1e999 is beyond binary64.", "UCF-75", "malformed", sealed(body.replace("1763700000.5", "1e999"))
    yield "not-json", "A comma too many.", "UCF-43", "malformed", sealed(body.replace("[[0,1]]", "[[0,1],]"))
    deep = body.replace('{"last_epoch":100}', "[" * 17 + "]" * 17)
    yield "deep", "Lists 17 deep.", "UCF-92", "limit-exceeded", sealed(deep)
    deeper = body.replace('{"last_epoch":100}', "[" * 20000 + "]" * 20000)
    yield "deeper", "Lists 20,000 deep.", "UCF-92", "limit-exceeded", sealed(deeper)


def vectors() -> Iterator[Vector]:
    for name, about, rule, change in _VALID:
        record = changed(manifest(), change)
        text = {"text": sealed(canonical(record))}
        yield Vector("manifests/valid", name, about, tuple(rule.split()), text, expect=_expect(record))
    for name, about, rule, kind, change in _INVALID:
        yield Vector("manifests/invalid", name, about, tuple(rule.split()), {"text": sealed(_body(change))}, error=kind)
    for name, about, rule, kind, text_of in _broken_text():
        yield Vector("manifests/invalid", name, about, tuple(rule.split()), {"text": text_of}, error=kind)
