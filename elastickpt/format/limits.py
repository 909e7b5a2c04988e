"""Bounds that every reader checks before it allocates; a checkpoint beyond one is refused, not tried. [UCF-90..98]"""

from __future__ import annotations

MIB = 1 << 20

MAX_MANIFEST_NBYTES = 64 * MIB  # checkpoint.json, each index part, the root zarr.json
MAX_DOCUMENT_NBYTES = MIB  # every other zarr.json
MAX_FRAGMENTS_NBYTES = 1024 * MIB  # one writer's fragment file: 10^6 pieces and their checksums fit
MAX_DEPTH = 16  # nesting of a typed JSON value
MAX_NAME_NBYTES = 1024  # UTF-8 of an item, a name or a state
MAX_NDIM = 32
MAX_DIM = 1 << 48
MAX_CHUNK_NBYTES = 1024 * MIB
MAX_CHUNKS = 1 << 24  # of one array
MAX_ARRAYS = 1 << 21
MAX_WRITERS = 1 << 20
MAX_SMALL_ARRAY_NBYTES = 64 << 10  # of an array inside a typed JSON value
CONSOLIDATED_ARRAYS = 20_000  # the root has consolidated metadata up to this many arrays
MAX_NODES = 1 << 22  # members and elements of all containers of one JSON text or msgpack record together
MAX_EXPANDED = 1 << 23  # ranks that the runs of one record stand for, all runs together
MAX_INT_DIGITS = 4096  # of an integer inside a typed JSON value
MAX_PATH_NBYTES = 4096  # of a relative path in a record
MAX_COMPONENT_NBYTES = 255  # of one component of such a path
MIN_BLOCK_NBYTES = 64 << 10  # of a checksum block
MAX_BLOCK_NBYTES = MIB
MAX_FILE_NBYTES = 1 << 62  # of any file, offset or length in a record: sums of three stay in 64 bits
