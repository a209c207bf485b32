"""The Arrow schemas of the store: a contract, versioned, never inferred."""

import pyarrow as pa

from svdmerge.storage.layout import SCHEMA_VERSION as VERSION

_FLOATS = pa.large_list(pa.field("item", pa.float32(), nullable=False))

# One row per rank-one component. A batch holds rows of one matrix only: its lists have one length.
SHARD = pa.schema(
    [
        pa.field("parameter", pa.string(), nullable=False),
        pa.field("index", pa.int32(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),  # svd | flat | merged | learngene | tailor
        pa.field("class_group", pa.int32()),  # of a tailor
        pa.field("s", pa.float32(), nullable=False),
        pa.field("u", _FLOATS, nullable=False),
        pa.field("vh", _FLOATS, nullable=False),
    ],
    metadata={"svdmerge_schema": f"shard/{VERSION}"},
)

# One row per matrix: what selection needs, 4 bytes a component.
SPECTRUM = pa.schema(
    [
        pa.field("parameter", pa.string(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),  # of the source's bytes of this matrix
        pa.field("m", pa.int64(), nullable=False),
        pa.field("n", pa.int64(), nullable=False),
        pa.field("fro", pa.float64(), nullable=False),  # Frobenius norm of the difference
        pa.field("base_fro", pa.float64()),  # and of the base's matrix, where that was read
        pa.field("bound", pa.float64(), nullable=False),  # on every singular value not listed
        pa.field("noise", pa.float64(), nullable=False),  # values up to it may be noise alone
        pa.field("first", pa.int32(), nullable=False),  # index of the first value listed
        pa.field("solver", pa.string(), nullable=False),  # what found the values listed
        pa.field("s", _FLOATS, nullable=False),
    ],
    metadata={"svdmerge_schema": f"spectrum/{VERSION}"},
)

# One row per kept component, best first within its matrix: a selection is a list of ids.
SELECTION = pa.schema(
    [
        pa.field("parameter", pa.string(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("source", pa.string(), nullable=False),  # revision
        pa.field("index", pa.int32(), nullable=False),
        pa.field("s", pa.float32(), nullable=False),
        pa.field("salience", pa.float64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
    ],
    metadata={"svdmerge_schema": f"selection/{VERSION}"},
)

PROVENANCE = pa.schema(
    [
        pa.field("parameter", pa.string(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("model", pa.string(), nullable=False),  # as the recipe names it
        pa.field("source", pa.string(), nullable=False),
        pa.field("weight", pa.float64(), nullable=False),
        pa.field("index", pa.int32(), nullable=False),
        pa.field("s", pa.float32(), nullable=False),
        pa.field("salience", pa.float64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
    ],
    metadata={"svdmerge_schema": f"provenance/{VERSION}"},
)
