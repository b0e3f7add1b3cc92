"""The GGUF reader: values against the gguf package, and headers no writer would write."""

import struct
import time
import tracemalloc

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, quants

from converters.readers import gguf as reader
from converters.readers.gguf import GgufSource
from converters.readers.opening import open_source
from llmjax.errors import CheckpointError

# All that the gguf package can decode; BF16 is among them, but is not expanded.
QUANTIZED = sorted((t for t in quants._type_traits if t != GGMLQuantizationType.BF16), key=lambda t: t.name)


def text(value):
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def pair(key, kind, data):
    return text(key) + struct.pack("<I", kind) + data


def string_pair(key, value):
    return pair(key, 8, text(value))


def entry(name, shape=(4,), kind=0, offset=0):
    return text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}QIQ", *shape, kind, offset)


def header(version, tensors, pairs):
    return struct.pack("<4sIQQ", b"GGUF", version, tensors, pairs)


def build(pairs=(), entries=(), data=b"", version=3):
    head = header(version, len(entries), len(pairs)) + b"".join(pairs) + b"".join(entries)
    return head + bytes(-len(head) % 32) + data


@pytest.fixture
def opened(tmp_path):
    def opened(content):
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        return GgufSource(path)

    return opened


@pytest.fixture
def refused(opened, tmp_path):
    def refused(content, message):
        with pytest.raises(CheckpointError, match=message) as caught:
            opened(content)
        assert str(caught.value).startswith(str(tmp_path / "model.gguf"))
        assert str(caught.value).isprintable() or "\n  " in str(caught.value)

    return refused


def write(path, add):
    writer = GGUFWriter(path, "llama")
    add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufSource(path)


def test_demo_model_is_read_as_the_gguf_package_reads_it(smollm2_path):
    times = []
    for _ in range(3):
        start = time.process_time()
        source = GgufSource(smollm2_path)
        times.append(time.process_time() - start)
    assert min(times) < 0.25
    assert len(source.metadata["tokenizer.ggml.tokens"]) == 49152
    assert source.metadata["tokenizer.ggml.token_type"].dtype == np.int32
    assert source.metadata["general.architecture"] == "llama"
    # One tensor of each type of the file: the whole comparison takes seconds.
    by_type = {source.spec(name).dtype: name for name in source.names() if "embd" not in name}
    assert {"Q4_1", "F32"} <= set(by_type)
    for name in by_type.values():
        spec = source.spec(name)
        kind = GGMLQuantizationType[spec.dtype]
        blocks = source.raw(name).reshape(*spec.shape[:-1], -1)
        expected = quants.dequantize(blocks, kind)
        read = source.read(name)
        assert read.dtype == np.float32 and read.shape == spec.shape == expected.shape
        assert read.tobytes() == expected.tobytes()


@pytest.mark.parametrize("chunk", [1 << 22, 512, 256])
@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda t: t.name)
def test_every_type_is_expanded_as_the_gguf_package_does(tmp_path, monkeypatch, kind, chunk):
    """In one piece, in several rows at a time, and with rows wider than a piece."""
    monkeypatch.setattr(reader, "_CHUNK_VALUES", chunk)
    block, size = GGML_QUANT_SIZES[kind]
    shape = (3, 5, 512 // block * size)
    packed = np.random.default_rng(kind).integers(0, 256, shape, np.uint8)
    source = write(tmp_path / "a.gguf", lambda w: w.add_tensor("a", packed, raw_dtype=kind))
    official = gguf.GGUFReader(tmp_path / "a.gguf").tensors[0]
    with np.errstate(all="ignore"):
        expected = quants.dequantize(np.array(official.data), kind)
    assert source.spec("a").shape == (3, 5, 512) and source.spec("a").dtype == kind.name
    assert source.spec("a").nbytes == packed.nbytes
    np.testing.assert_array_equal(source.raw("a"), packed.ravel())
    read = source.read("a")
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, expected)


def test_unquantized_types_keep_their_bytes(tmp_path):
    values = np.random.default_rng(0).standard_normal((3, 5))
    arrays = {
        "f32": values.astype(np.float32),
        "f16": values.astype(np.float16),
        "f64": values,
        "i8": np.arange(-4, 4, dtype=np.int8),
        "i16": np.arange(4, dtype=np.int16),
        "i32": np.arange(4, dtype=np.int32),
        "i64": np.arange(4, dtype=np.int64),
        "scalar": np.array(2.5, np.float32),
    }
    bf16 = values.astype(ml_dtypes.bfloat16)

    def add(writer):
        for name, array in arrays.items():
            writer.add_tensor(name, array)
        writer.add_tensor("bf16", bf16.view(np.uint8), raw_dtype=GGMLQuantizationType.BF16)

    source = write(tmp_path / "a.gguf", add)
    assert source.names() == [*arrays, "bf16"]
    for name, array in {**arrays, "bf16": bf16}.items():
        read = source.read(name)
        assert read.dtype == array.dtype and read.shape == array.shape and not read.flags.writeable
        assert read.tobytes() == array.tobytes()
        assert source.spec(name).nbytes == array.nbytes
        source.release(name)
        assert source.read(name).tobytes() == array.tobytes()


def test_metadata_values(tmp_path):
    def add(writer):
        writer.add_string("s", "naïve\n\x00 ▁")
        writer.add_bool("b", True)
        writer.add_uint64("u", 2**64 - 1)
        writer.add_int8("i", -3)
        writer.add_float64("d", 0.1)
        writer.add_float32("f", 0.1)
        writer.add_array("strings", ["a", "", "é"])
        writer.add_array("flags", [True, False])
        writer.add_array("floats", [0.5, -1.5])
        writer.add_array("nested", [[1, 2], [3]])
        writer.add_custom_alignment(64)

    metadata = write(tmp_path / "a.gguf", add).metadata
    assert metadata["s"] == "naïve\n\x00 ▁" and metadata["b"] is True and metadata["u"] == 2**64 - 1
    assert metadata["i"] == -3 and metadata["d"] == 0.1 and metadata["f"] == float(np.float32(0.1))
    assert metadata["strings"] == ["a", "", "é"]
    assert metadata["flags"].dtype == bool and metadata["flags"].tolist() == [True, False]
    assert metadata["floats"].dtype == np.float32 and metadata["floats"].tolist() == [0.5, -1.5]
    assert [a.tolist() for a in metadata["nested"]] == [[1, 2], [3]]
    assert metadata["general.alignment"] == 64


def test_alignment_moves_the_data(tmp_path):
    values = np.arange(5, dtype=np.float32)

    def add(writer):
        writer.add_custom_alignment(256)
        writer.add_tensor("a", values)
        writer.add_tensor("b", values + 1)

    source = write(tmp_path / "a.gguf", add)
    np.testing.assert_array_equal(source.read("a"), values)
    np.testing.assert_array_equal(source.read("b"), values + 1)


def test_version_2_and_names_in_any_order(opened):
    data = np.arange(16, dtype=np.float32).tobytes()
    source = opened(build(entries=[entry("b", (4,), offset=32), entry("a", (2, 4))], data=data, version=2))
    assert source.names() == ["b", "a"]
    np.testing.assert_array_equal(source.read("a"), np.arange(8, dtype=np.float32).reshape(4, 2))
    np.testing.assert_array_equal(source.read("b"), [8, 9, 10, 11])


def test_expanding_holds_no_several_fold_copies(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "_CHUNK_VALUES", 1 << 16)
    packed = np.zeros((1024, 2048 // 32 * 18), np.uint8)
    source = write(tmp_path / "a.gguf", lambda w: w.add_tensor("a", packed, raw_dtype=GGMLQuantizationType.Q4_0))
    source.read("a")  # imports
    tracemalloc.start()
    try:
        nbytes = source.read("a").nbytes
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert nbytes == 8 << 20
    assert peak < 1.3 * nbytes


def test_a_type_that_cannot_be_expanded_is_listed_and_refused_when_read(opened):
    source = opened(build(entries=[entry("a", (256,), kind=GGMLQuantizationType.Q8_K)], data=bytes(292)))
    assert source.spec("a").dtype == "Q8_K" and source.raw("a").shape == (292,)
    with pytest.raises(CheckpointError, match="tensor a: .* cannot decode type Q8_K"):
        source.read("a")


@pytest.fixture
def parts(tmp_path):
    """As the gguf package cuts a file up, the first part without tensors; what it holds."""
    arrays = {name: np.full((2, 40), i, np.float32) for i, name in enumerate("abcde")}
    writer = GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2, small_first_shard=True)
    writer.add_uint32("llama.block_count", 7)
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [tmp_path / f"m-0000{i}-of-00004.gguf" for i in (1, 2, 3, 4)], arrays


def test_parts_of_a_file_are_one_checkpoint(parts, tmp_path):
    paths, arrays = parts
    for named in (paths[0], tmp_path, tmp_path / "m-*.gguf"):
        source = open_source(named)
        assert source.path == paths[0] and source.metadata["llama.block_count"] == 7
        assert [stamp.path for stamp in source.files] == list(map(str, paths))
        assert source.names() == list(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(source.read(name), array)
            source.release(name)
        assert source.spec("e").file == paths[3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p[2].unlink(), "m-00001-of-00004.gguf: parts of a GGUF split in 4 are missing: m-00003-of-00004"),
        (lambda p: p[2].write_bytes(p[3].read_bytes()), "m-00003-of-00004.gguf: not part 3 of the GGUF that begins w"),
        (lambda p: p[3].write_bytes(build()), "m-00004-of-00004.gguf: not part 4"),
        (
            lambda p: p[3].write_bytes(p[3].read_bytes().replace(b"\x01\0\0\0\0\0\0\0e", b"\x01\0\0\0\0\0\0\0a")),
            "not part 4",
        ),
        (lambda p: p[0].write_bytes(p[1].read_bytes()), "part 2 of a GGUF split in 4, .* -00002-of-00004.gguf"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts, change, message):
    paths, _ = parts
    change(paths)
    with pytest.raises(CheckpointError, match=message):
        open_source(paths[0])


def test_a_later_part_names_the_first(parts):
    with pytest.raises(CheckpointError, match="part 3 of a GGUF split in 4; name m-00001-of-00004.gguf"):
        open_source(parts[0][2])


def test_without_the_first_part_the_others_are_no_several_files(parts, tmp_path):
    parts[0][0].unlink()
    for named in (tmp_path, tmp_path / "m-*.gguf", parts[0][1]):
        with pytest.raises(CheckpointError, match="part 2 of a GGUF split in 4; the first, m-00001-of-00004.*is mis"):
            open_source(named)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"GG", "expected it to begin with 'GGUF', found b'GG'"),
        (b"PK\x03\x04" + bytes(60), "expected it to begin with 'GGUF'"),
        (b"GGUF", "the version needs 4 bytes at offset 4, the file ends at 4"),
        (header(1, 0, 0), "version 2 or 3, found version 1;"),
        (header(4, 0, 0), "version 2 or 3, found version 4;"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), r"found a big-endian file \(version 3\)"),
        (header(3, 0, 0)[:-1], "the metadata count needs 8 bytes"),
        (header(3, 2**63, 0), "the header counts 9223372036854775808 tensors in a file of 24 bytes"),
        (header(3, 0, 2**40), "the header counts 1099511627776 metadata entries"),
        (header(3, 0, 1) + b"\xff" * 16, "a metadata key needs 18446744073709551615 bytes"),
        (build([string_pair("k", b"\xff")]), "metadata k at offset .* is not UTF-8"),
        (build([string_pair(b"\xff", "")]), "a metadata key at offset .* is not UTF-8"),
        (build([pair("k", 13, b"")]), "metadata k: unknown value type 13"),
        (build([pair("k", 8, struct.pack("<Q", 2**62))]), "metadata k needs 4611686018427387904 bytes"),
        (build([pair("k", 9, struct.pack("<IQ", 0, 2**62))]), "metadata k needs 4611686018427387904 bytes"),
        (build([pair("k", 9, struct.pack("<IQ", 12, 2**61))]), "metadata k needs 18446744073709551616 bytes"),
        (build([pair("k", 9, struct.pack("<IQ", 8, 2**61))]), "metadata k needs 18446744073709551616 bytes"),
        (build([pair("k", 9, struct.pack("<IQ", 8, 1) + b"\xff" * 8)]), "a string in metadata k needs 1844674"),
        (build([pair("k", 9, struct.pack("<IQ", 8, 2) + text("a"))]), "metadata k needs 16 bytes|a string in metad"),
        (build([pair("k", 9, struct.pack("<IQ", 8, 2) + text("a") + text(b"\xff"))]), "string 1 at offset .* UTF-8"),
        (build([pair("k", 9, struct.pack("<IQ", 9, 2**16 + 1))]), "at most 4 levels of arrays, and 65536 inner"),
        (build([pair(k, 9, struct.pack("<IQ", 9, 40000) + bytes(12) * 40000) for k in "ab"]), "metadata b: .* 65536"),
        (build([pair("k", 9, struct.pack("<IQ", 9, 1) * 1000)]), "at most 4 levels of arrays"),
        (build([pair("k", 9, struct.pack("<IQ", 9, 1000))]), "metadata k"),
        (build([string_pair("k", "a"), string_pair("k", "b")]), "metadata k appears twice"),
        (build([pair("\x1b[31m", 13, b"")]), r"metadata \\x1b\[31m: unknown"),
        (build([string_pair("split.count", "2")]), "split.count: expected an integer"),
        (build([pair("split.count", 2, b"\x03\x00")]), "part 1 of a GGUF split in 3, .* end in -00001-of-00003.gguf"),
        (build([pair("general.alignment", 4, b"\x18\0\0\0")]), "expected a power of two, found 24"),
        (build([pair("general.alignment", 4, b"\0\0\0\0")]), "expected a power of two, found 0"),
        (build([string_pair("general.alignment", "32")]), "expected a power of two, found 32"),
        (build(entries=[entry("a", (1,) * 5)]), "tensor a: expected at most 4 dimensions, found 5"),
        (build(entries=[text("a") + b"\xff" * 4]), "tensor a: expected at most 4 dimensions, found 4294967295"),
        (build(entries=[entry("a", kind=999)]), "tensor a: type 999 is not known to the gguf package"),
        (build(entries=[entry("a", kind=4)]), "tensor a: type 4 is not known"),
        (build(entries=[entry("a", (33,), kind=2)]), r"tensor a: shape \[33\] does not fit type Q4_0"),
        (build(entries=[entry("a", (), kind=2)]), r"tensor a: shape \[\] does not fit type Q4_0"),
        (build(entries=[entry("a", (4, 0))]), r"tensor a: shape \[0, 4\] does not fit type F32"),
        (build(entries=[entry("a")] * 2, data=bytes(64)), "tensor a appears twice"),
        (build(entries=[entry("a")], data=bytes(15)), "tensor a ends at .*, the file at"),
        (build(entries=[entry("a", offset=2**64 - 32)], data=bytes(64)), "tensor a ends at 18446744073709"),
        (build(entries=[entry("a", (2**63, 2**63))], data=bytes(64)), "tensor a ends at"),
        (build(entries=[entry("a", offset=4)], data=bytes(64)), "tensor a begins at .*, not a multiple of 32"),
        (build(entries=[entry("a", (16,)), entry("b", offset=32)], data=bytes(64)), "tensors a and b overlap"),
        (build(entries=[entry("a"), entry("b")], data=bytes(64)), "tensors a and b overlap"),
    ],
)
def test_damaged_headers(refused, content, message):
    refused(content, message)


def test_problems_of_several_tensors_come_together(refused):
    bad = [entry("a", kind=999), entry("b", (33,), kind=2), entry("c"), entry("c")]
    refused(
        build(entries=bad), r"(?s)tensors that cannot be read:\n  tensor a: .*\n  tensor b.*\n  tensor c appears twice"
    )


def test_every_truncation(opened, refused):
    pairs = [string_pair("s", "x"), pair("a", 9, struct.pack("<IQ", 8, 2) + text("a") + text("b"))]
    whole = build([*pairs, pair("n", 4, bytes(4))], [entry("a")], bytes(16))
    assert opened(whole).read("a").tolist() == [0] * 4
    for size in range(len(whole)):
        refused(whole[:size], "truncated|empty|expected it to begin")
