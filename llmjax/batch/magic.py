"""What files are that are no text in UTF-8, by their first bytes."""

_MAGIC = {
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"Obj\x01": "an Avro file",
    b"PK\x03\x04": "a zip archive or a spreadsheet",
    b"SQLite format 3": "an SQLite database",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ\x00": "an xz file",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}


def binary_kind(begin: bytes) -> str:
    """Of a file that begins so; empty where it may be text."""
    for magic, kind in _MAGIC.items():
        if begin.startswith(magic):
            return kind
    return "UTF-16 text without a byte order mark, or a binary file" if b"\0" in begin[:2] else ""
