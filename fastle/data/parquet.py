"""Parquet files that hold encoded images, one in each row, as Hugging Face's datasets write them."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from fastle.errors import DataError

from .header import download_fault


def open_parquet(shard: str) -> Any:
    """Opens a parquet file, to be closed by the caller.

    Raises:
        DataError: Pyarrow is not installed, or it is no parquet file.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(f'{shard} needs pyarrow: pip install "fastle[parquet]"') from None
    with Path(shard).open("rb") as file:
        fault = download_fault(file.read(256))
    try:
        return pyarrow.parquet.ParquetFile(shard)
    except pyarrow.ArrowInvalid:
        raise DataError(f"{shard} {fault or 'is damaged or not a parquet file: download it again'}") from None


def image_column(parquet: Any, shard: str) -> str:
    """The path of the column of encoded images: "NAME.bytes" of an image, or NAME of plain bytes.

    Raises:
        DataError: There is none, or there are several and none is called "image".
    """
    binary = ("BYTE_ARRAY",)
    columns = [
        column.path
        for column in parquet.schema
        if column.physical_type in binary and column.logical_type.type != "STRING"
    ]
    candidates = [path for path in columns if path.endswith(".bytes") and path.count(".") == 1] or [
        path for path in columns if "." not in path
    ]
    named = [path for path in candidates if path in ("image.bytes", "image")]
    if len(candidates) != 1 and len(named) != 1:
        every = ", ".join(column.path for column in parquet.schema) if not candidates else ", ".join(candidates)
        wanted = "no column" if not candidates else "several columns"
        raise DataError(f'{shard}: {wanted} of image bytes ({every[:200]}): name the one to take "image"')
    return (named or candidates)[0]


def read_labels(shard: str) -> list[str]:
    """The class of each row, from the column "label": a text, or a number that `datasets` has a name for.

    Raises:
        DataError: There is no such column, or a row has no class.
    """
    with open_parquet(shard) as parquet:
        schema = parquet.schema_arrow
        if "label" not in schema.names:
            raise DataError(f'{shard} has no column "label" of classes ({", ".join(schema.names)[:200]}): name it so')
        values = parquet.read(columns=["label"])["label"].to_pylist()
    about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    names = about.get("info", {}).get("features", {}).get("label", {}).get("names")
    if names is not None:
        values = [names[value] if isinstance(value, int) and 0 <= value < len(names) else None for value in values]
    for row, value in enumerate(values):
        if not isinstance(value, (int, str)):
            raise DataError(f'{shard}: row {row} has no class in the column "label": leave such rows out')
    return [str(value) for value in values]


def read_row(shard: str, column: str, group: int, row: int) -> bytes:
    """The encoded image of a row of a row group; empty for a null, which is reported as an empty file is."""
    return _row_group(shard, column, group)[row].as_py() or b""


# reading a row reads its whole row group (100 images in Hugging Face's files), so the last few groups are kept for the
# neighbouring rows
@lru_cache(maxsize=4)
def _row_group(shard: str, column: str, group: int) -> Any:
    with open_parquet(shard) as parquet:
        values = parquet.read_row_group(group, columns=[column])[column.removesuffix(".bytes")].combine_chunks()
        return values.field("bytes") if "." in column else values
