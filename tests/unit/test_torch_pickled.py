"""TorchFile: what torch.save writes is read exactly, and nothing that a file asks for is ever run."""

import io
import os
import random
import re
import struct
import tarfile
import time
import warnings
import zipfile

import ml_dtypes
import numpy as np
import pytest

from converters.readers.torch import archive as torch_archive
from converters.readers.torch import pickled
from converters.readers.torch.archive import TorchFile
from llmjax.errors import CheckpointError

MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."


# Opcodes, as the pickle module's protocol 2 and 4 write them.


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value):
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def tup(*items):
    return b"(" + b"".join(items) + b"t"


def numbers(values):
    return tup(*map(number, values))


def glob(name):
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def storage(key="0", kind="torch.FloatStorage", numel=12):
    return tup(text("storage"), glob(kind), text(key), text("cpu"), number(numel)) + b"Q"


def ordered_dict():
    return glob("collections.OrderedDict") + b")R"


def tensor(size=(3, 4), stride=(4, 1), offset=0, of=None, extra=b""):
    parts = (of or storage(), number(offset), numbers(size), numbers(stride), b"\x89", ordered_dict(), extra)
    return glob("torch._utils._rebuild_tensor_v2") + tup(*parts) + b"R"


def mapping(items):
    return b"}(" + b"".join((k if isinstance(k, bytes) else text(k)) + v for k, v in items.items()) + b"u"


def program(body):
    return b"\x80\x02" + body + b"."


VALUES = np.arange(12, dtype=np.float32)
ENTRIES = {"m/byteorder": b"little", "m/data/0": VALUES.tobytes()}


def archive(pickled, entries=None, method=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as file:
        warnings.simplefilter("ignore")
        file.writestr("m/data.pkl", pickled)
        for name, data in (ENTRIES if entries is None else entries).items():
            file.writestr(name, data, compress_type=method)
    return buffer.getvalue()


@pytest.fixture
def load(tmp_path):
    def load(body, entries=None, *, raw=False):
        """Opens a file with this pickle's body, or with these bytes."""
        path = tmp_path / "pytorch_model.bin"
        path.write_bytes(body if raw else archive(program(body), entries))
        return TorchFile(path)

    return load


@pytest.fixture
def refused(load, tmp_path):
    def refused(body, message, entries=None, *, raw=False):
        with pytest.raises(CheckpointError, match=message) as caught:
            load(body, entries, raw=raw)
        assert str(caught.value).startswith(f"{tmp_path / 'pytorch_model.bin'}: ")
        assert len(str(caught.value)) < 1000

    return refused


def test_views_of_the_map(load):
    file = load(mapping({"b": tensor(), "a": tensor((4,), (1,), 8)}))
    assert file.names() == ["b", "a"]
    spec = file.spec("b")
    assert (spec.name, spec.shape, spec.dtype, spec.nbytes, spec.file) == ("b", (3, 4), "F32", 48, file.path)
    value = file.read("b")
    np.testing.assert_array_equal(value, VALUES.reshape(3, 4))
    np.testing.assert_array_equal(file.read("a"), VALUES[8:])
    assert not value.flags.owndata and not value.flags.writeable
    file.release("b")
    np.testing.assert_array_equal(file.read("b"), VALUES.reshape(3, 4))


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        ((4, 3), (1, 4), 0),
        ((2, 2), (4, 2), 5),
        ((3,), (5,), 1),
        ((1, 4), ((1 << 48) - 1, 1), 8),
        ((), (), 11),
        ((2, 2), (1, 1), 3),
    ],
)
def test_strides(load, size, stride, offset):
    file = load(mapping({"a": tensor(size, stride, offset)}))
    expected = [VALUES[offset + np.dot(index, stride).astype(int)] for index in np.ndindex(*size)]
    np.testing.assert_array_equal(file.read("a"), np.reshape(expected, size))
    assert file.read("a").flags.c_contiguous
    file.release("a")


@pytest.mark.parametrize("size", [(0,), (3, 0), (0, 1 << 40)])
def test_empty_tensors(load, size):
    file = load(mapping({"a": tensor(size, (1,) * len(size), 12)}))
    assert file.read("a").shape == size and file.spec("a").nbytes == 0
    file.release("a")


@pytest.mark.parametrize(
    ("kind", "name", "dtype"),
    [
        ("Float", "F32", np.float32),
        ("Half", "F16", np.float16),
        ("BFloat16", "BF16", ml_dtypes.bfloat16),
        ("Double", "F64", np.float64),
        ("Long", "I64", np.int64),
        ("Int", "I32", np.int32),
        ("Short", "I16", np.int16),
        ("Char", "I8", np.int8),
        ("Byte", "U8", np.uint8),
        ("Bool", "BOOL", np.bool_),
    ],
)
def test_types(load, kind, name, dtype):
    data = np.array([0, 1, 1, 0, 1]).astype(dtype)
    body = mapping({"a": tensor((5,), (1,), of=storage(kind=f"torch.{kind}Storage", numel=5))})
    file = load(body, {"m/data/0": data.tobytes()})
    assert file.spec("a").dtype == name and file.spec("a").nbytes == data.nbytes
    assert file.read("a").dtype == dtype
    np.testing.assert_array_equal(file.read("a"), data)


def test_every_opcode_of_the_list(load):
    parts = [
        b"N",
        b"\x88",
        b"\x89",
        b"G" + struct.pack(">d", 0.5),
        b"M\x00\x01",
        number(-5),
        number(1 << 40),
        b"\x8c\x01x",
        b"\x8d" + struct.pack("<Q", 1) + b"x",
        b"]K\x01a(K\x02K\x03e",
        b"(K\x01l",
        b"(" + text("k") + b"K\x01d",
        b"}" + text("k") + b"K\x01s",
        b"K\x01\x85",
        b"K\x01K\x02\x86",
        b"K\x01K\x02K\x03\x87",
        b"\x95" + struct.pack("<Q", 1) + b"N",
        b"N\x94q\x05h\x05\x86r\x06\x00\x00\x00j\x06\x00\x00\x00\x86",
        b"\x8c\x0bcollections\x8c\x0bOrderedDict\x93)R",
    ]
    body = mapping({"state_dict": mapping({"a": tensor()}), **{f"x{i}": part for i, part in enumerate(parts)}})
    assert load(body).names() == ["a"]


def test_parameters_metadata_and_old_style_dicts(load):
    parameter = glob("torch._utils._rebuild_parameter") + tup(tensor(), b"\x88", ordered_dict()) + b"R"
    state = mapping({"_metadata": ordered_dict() + b"(" + text("") + mapping({"version": number(1)}) + b"u"})
    body = ordered_dict() + b"(" + text("a") + parameter + text("b") + tensor(extra=b"N") + b"u" + state + b"b"
    file = load(body)
    assert file.names() == ["a", "b"]
    np.testing.assert_array_equal(file.read("a"), file.read("b"))


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_nested_state_dict(load, refused, key):
    other = {"epoch": number(3), "args": mapping({"lr": b"N"})}
    assert load(mapping({key: mapping({"a": tensor()}), **other})).names() == ["a"]
    optimizer = mapping({"state": mapping({number(0): mapping({"exp_avg": tensor()})})})
    refused(mapping({key: mapping({"a": tensor()}), "optimizer": optimizer}), f"tensors in '{key}' alone.*optimizer")


@pytest.mark.parametrize("value", [number(3), b"N", b"G" + bytes(8), text("x"), b"}", b"]", storage()])
def test_entries_that_are_no_tensors(refused, value):
    refused(mapping({"a": tensor(), "step": value}), r"expected tensors only, found 'step' \(\w+\)")


def test_roots_and_keys(refused):
    refused(tensor(), "expected a dict of tensors, found Tensor")
    refused(b"]", "expected a dict of tensors, found list")
    refused(mapping({number(7): tensor()}), "expected names of tensors, found 7")
    refused(mapping({b"N": tensor()}), "key of a dict, found NoneType")
    refused(mapping({b")": tensor()}), "key of a dict, found tuple")
    refused(mapping({number(1 << 61): tensor()}), "key of a dict, found int")
    refused(b"}(" + (text("a") + tensor()) * 2 + b"u", "the key 'a' is there twice")


def canary(path):
    return f"touch {path}"


EVIL = ["os.system", "posix.system", "builtins.getattr", "builtins.eval", "torch.load", "torch._utils.__dict__",
        "torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v3", "numpy.core.multiarray._reconstruct",
        "torch.storage.UntypedStorage", "collections.OrderedDict.__init__"]  # fmt: skip


@pytest.mark.parametrize("name", EVIL)
def test_globals_are_refused_by_name_and_never_run(refused, tmp_path, name):
    argument = tup(text(canary(tmp_path / "pwned")))
    message = re.escape(f"'{name}' is none of the names")
    refused(mapping({"a": glob(name) + argument + b"R"}), "GLOBAL at byte.*" + message)
    module, _, attribute = name.rpartition(".")
    refused(mapping({"a": text(module) + text(attribute) + b"\x93" + argument + b"R"}), "STACK_GLOBAL.*" + message)
    assert not os.path.exists(tmp_path / "pwned")


REBUILD = glob("torch._utils._rebuild_tensor_v2")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"(" + text("x") + b"ios\nsystem\n", "INST at byte .*: an opcode"),
        (b"(" + glob("collections.OrderedDict") + b"o", "OBJ at byte .*: an opcode"),
        (glob("collections.OrderedDict") + b")\x81", "NEWOBJ at byte"),
        (glob("collections.OrderedDict") + b")}\x92", "NEWOBJ_EX at byte"),
        (b"\x82\x01", "EXT1 at byte"),
        (b"\x83\x01\x00", "EXT2 at byte"),
        (b"\x84\x01\x00\x00\x00", "EXT4 at byte"),
        (b"\x97", "NEXT_BUFFER at byte"),
        (b"Pid\n", "PERSID at byte"),
        (b"I1\n", "INT at byte"),
        (b"\x8b\x01\x00\x00\x00\x01", "LONG4 at byte"),
        (b"B\x01\x00\x00\x00a", "BINBYTES at byte"),
        (b"N2", "DUP at byte"),
        (b"\xff", "0xff at byte"),
        (b"\x80\x06", "pickle protocol above 5"),
        (b"}}b", "BUILD at byte .*: expected a value of type OrderedDict, found dict"),
        (tensor() + b"}b", "BUILD at byte .* found Tensor"),
        (glob("torch.FloatStorage") + b"}b", "BUILD at byte .* found Global"),
        (glob("torch.FloatStorage") + b")R", "expected one of PyTorch's functions, found torch.FloatStorage"),
        (text("os.system") + b")R", "expected one of PyTorch's functions, found str"),
        (glob("collections.OrderedDict") + b"NR", "expected a tuple of arguments, found NoneType"),
        (glob("collections.OrderedDict") + tup(b"]") + b"R", r"OrderedDict: unexpected arguments \(list\)"),
        (REBUILD + b")R", r"_rebuild_tensor_v2: unexpected arguments \(\)"),
        (REBUILD + tup(*[b"N"] * 6) + b"R", r"_rebuild_tensor_v2: unexpected arguments \(NoneType, NoneType"),
        (tensor(extra=mapping({"conj": b"\x88"})), "a tensor with metadata"),
        (glob("torch._utils._rebuild_parameter") + tup(b"N", b"N", b"N") + b"R", "_rebuild_parameter: unexpected"),
        (number(1) + text("x") + b"\x93", "STACK_GLOBAL at byte .*: expected two strings, found int and str"),
        (b"NQ", r"expected \('storage', type, key, location, size\), found another NoneType"),
        (tup(text("module"), *[b"N"] * 4) + b"Q", "BINPERSID at byte .* found another tuple"),
        (storage(kind="collections.OrderedDict"), "BINPERSID at byte .* found another tuple"),
        (storage(numel=-1), "storage '0': expected from 0 to 2.48 values"),
        (storage(numel=1 << 2000), "storage '0': expected from 0 to 2.48 values"),
        (storage(numel=True), "storage '0': expected from 0 to 2.48 values"),
        (storage(numel=1 << 40), "entry 'm/data/0': expected 4398046511104 bytes .*, found 48"),
        (storage(numel=11), "entry 'm/data/0': expected 44 bytes for 11 values of F32, found 48"),
        (storage(kind="torch.HalfStorage"), "expected 24 bytes for 12 values of F16, found 48"),
        (storage(key="7"), "entry 'm/data/7': expected a torch.FloatStorage of 12 values, found no such entry"),
        (storage(key="../byteorder"), r"found no such entry"),
        (b"h\x07", "BINGET at byte .*: expected something stored as 7, found nothing"),
        (b"j\xff\xff\xff\xff", "LONG_BINGET .*: expected something stored as 4294967295"),
        (b"Nr\xff\xff\xff\xff0", "POP at byte"),
        (b"\x95" + b"\xff" * 8, "FRAME at byte .*: a frame of 18446744073709551615 bytes, 1 are left"),
        (b"\x8d" + b"\xff" * 8, "BINUNICODE8 at byte .*: truncated: needs 18446744073709551615 bytes, 1 are left"),
        (b"X\xff\xff\xff\xff", "BINUNICODE at byte .*: truncated"),
        (b"\x8c\x02\xff\xfe", "a string that is not UTF-8"),
        (b"cos", "GLOBAL at byte .*: truncated: expected the end of a name"),
        (b"c" + b"a" * 300 + b"\nb\n", "expected the end of a name within 256 bytes"),
        (b"t", "TUPLE at byte .*: expected a mark"),
        (b"q\x00", "BINPUT at byte .*: expected a value on the stack, found none"),
        (b"(", "STOP at byte .*: expected a value on the stack"),
        (b"}(Nu", "SETITEMS at byte .*: expected pairs, found 1 values"),
        (b"](NNu", "SETITEMS at byte .*: expected a value of type dict, found list"),
        (b"}Na", "APPEND at byte .*: expected a value of type list, found dict"),
    ],
)
def test_pickles_that_are_refused(refused, body, message):
    refused(body, message)


def test_a_huge_memo_index_is_only_a_number(load):
    assert load(b"Nr\xff\xff\xff\xff" + b"\x85" + mapping({"a": tensor()})).names() == ["a"]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (dict(offset=1), r"offset 1, size \[3, 4\], stride \[4, 1\]: needs 13 values, storage '0' has 12"),
        (dict(offset=1 << 47), "values, storage '0' has 12"),
        (dict(offset=13, size=(0,), stride=(1,)), "needs 13 values, storage '0' has 12"),
        (dict(stride=(5, 1)), "needs 14 values, storage '0' has 12"),
        (dict(size=(4, 4)), "needs 16 values, storage '0' has 12"),
        (dict(size=(13,), stride=(0,)), "at most the 12 values of its storage, found an expanded tensor"),
        (dict(size=(1 << 40,), stride=(0,)), "found an expanded tensor"),
        (dict(size=(1 << 40, 1 << 40), stride=(0, 0)), "expected fewer than 2.48 values"),
        (dict(size=(0, 1 << 40, 1 << 40), stride=(0, 0, 0)), "expected fewer than 2.48 values"),
        (dict(size=(-3, -4)), "expected integers from 0 to 2.48"),
        (dict(offset=-1), "expected integers from 0 to 2.48"),
        (dict(offset=11, size=(2,), stride=(-1,)), "expected integers from 0 to 2.48"),
        (dict(size=(1 << 2000, 1)), "expected integers from 0 to 2.48"),
        (dict(size=(True, 1)), "expected integers from 0 to 2.48"),
        (dict(size=(3,)), "1 sizes and 2 strides, expected as many of both"),
        (dict(size=(1,) * 33, stride=(1,) * 33), "33 sizes and 33 strides, .* at most 32"),
    ],
)
def test_headers_outside_the_storage(refused, header, message):
    refused(mapping({"a": tensor(**header)}), f"tensor 'a': .*{message}")


def test_every_truncation_of_the_pickle(refused):
    whole = program(mapping({"a": tensor()}))
    for size in range(len(whole)):
        refused(archive(whole[:size]), "data.pkl: ", raw=True)


@pytest.mark.parametrize(
    "nested",
    [
        b"(" * 30_000 + b"t" * 30_000,
        b")" + b"\x85" * 30_000,
        b"(" * 30_000 + b"l" * 30_000,
        # Each level holds the one below twice: 2^1000 leaves.
        b")q\x00" + b"h\x00\x86q\x00" * 1000,
        # A list that holds itself.
        b"]q\x00h\x00a",
    ],
)
def test_deep_and_shared_nesting(load, refused, nested):
    start = time.perf_counter()
    refused(nested, "expected a dict of tensors")
    refused(mapping({nested: tensor()}), "key of a dict")
    refused(mapping({"a": nested}), "expected tensors only, found 'a'")
    refused(nested + b"Q", "found another")
    refused(glob("collections.OrderedDict") + nested + b"\x85R", "unexpected arguments")
    refused(tensor(extra=nested), "a tensor with metadata")
    assert load(mapping({"model": mapping({"a": tensor()}), "x": nested})).names() == ["a"]
    assert time.perf_counter() - start < 60


def test_names_of_any_length(refused, load):
    """A name is made anew for each tensor of a file."""
    long = "m" * 1100
    refused(mapping({"a": tensor()}), r"entry 'mmm.*expected a name of at most 1024 char", {f"{long}/data/0": b""})
    assert load(mapping({"a": tensor()}), ENTRIES | {long[:1000]: b""}).names() == ["a"]


def test_limits(refused, monkeypatch):
    assert pickled._MAX_OPCODES <= 1_000_000  # some seconds
    monkeypatch.setattr(pickled, "_MAX_OPCODES", 1000)
    refused(b"N" * 1000, "more than 1000 opcodes")
    monkeypatch.setattr(torch_archive, "_MAX_PICKLE", 100)
    refused(b"N" * 100, "entry 'm/data.pkl' has 103 bytes, expected at most 100")


# The zip file.


GOOD = mapping({"a": tensor()})


@pytest.mark.parametrize("name", ["../m/data/0", "/m/data/1", "m/../x", "m\\..\\x", "m/data/.."])
def test_names_that_leave_the_directory(refused, name):
    refused(GOOD, "expected a relative path without '..'", {**ENTRIES, name: b""})


def test_two_pickles_or_none(refused):
    refused(GOOD, r"expected one entry \*/data.pkl, found 2", {**ENTRIES, "n/data.pkl": b""})
    refused(GOOD, "entry 'm/data.pkl' is there twice", {**ENTRIES, "m/data.pkl": b""})
    refused(
        archive(program(GOOD)).replace(b"data.pkl", b"data.pkk"), r"expected one entry \*/data.pkl, found 0", raw=True
    )


def test_compressed_entries(refused):
    refused(archive(program(GOOD), method=zipfile.ZIP_DEFLATED), "expected stored .*, found zip method 8", raw=True)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("m/data.pkl", program(GOOD))
    refused(buffer.getvalue(), "entry 'm/data.pkl': expected stored", raw=True)


def patched(name, field, code, value, *, local=False):
    """A good file with one field of an entry's header in the central directory, or before the data, changed."""
    data = bytearray(archive(program(GOOD)))
    at = data.index(name.encode()) - 30 if local else data.rindex(name.encode()) - 46
    assert data[at : at + 4] == (b"PK\x03\x04" if local else b"PK\x01\x02")
    struct.pack_into(code, data, at + field, value)
    return bytes(data)


def test_zip_headers(refused):
    for local, field in ((False, 8), (True, 6)):
        refused(patched("m/data/0", field, "<H", 1, local=local), "entry 'm/data/0' is encrypted", raw=True)
    refused(patched("m/data/0", 8, "<H", 8, local=True), "found zip method 8", raw=True)
    refused(patched("m/data/0", 24, "<I", 1000), "48 bytes in the file for 1000", raw=True)
    refused(patched("m/data/0", 42, "<I", 10_000), "its header at 10000 is outside|damaged", raw=True)
    refused(patched("m/data/0", 42, "<I", 1), "expected a zip header at offset 1, found b'K", raw=True)
    refused(patched("m/data/0", 26, "<H", 60_000, local=True), "run past the end of the file", raw=True)
    data = bytearray(patched("m/data/0", 20, "<I", 4000))
    struct.pack_into("<I", data, data.rindex(b"m/data/0") - 46 + 24, 4000)
    refused(bytes(data), "its 4000 bytes at .* run past the end of the file", raw=True)


def test_byte_order(refused, load):
    refused(
        GOOD, "entry 'm/byteorder': expected byte order b'little', found b'big'", {**ENTRIES, "m/byteorder": b"big"}
    )
    assert load(GOOD, {"m/data/0": VALUES.tobytes()}).names() == ["a"]


def test_other_forms(refused):
    refused(MAGIC + bytes(100), "form from before 1.6, .*torch.save's default", raw=True)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        file.addfile(tarfile.TarInfo("sys_info"))
    refused(buffer.getvalue(), "a tar file, .*torch.save's default", raw=True)
    refused(b"version https://git-lfs.github.com", "expected a zip file, .*, found b'version https:/", raw=True)
    refused(b"P", "expected a zip file", raw=True)
    refused(b"", "empty", raw=True)
    refused(archive(program(GOOD))[:-30], "damaged or truncated zip file", raw=True)


@pytest.mark.parametrize("target", ["file", "pickle"])
def test_damaged_files_are_refused_or_read(tmp_path, target):
    """Whatever bytes change: a CheckpointError, or tensors that can be read, and never another error."""
    generator = random.Random(20)
    path = tmp_path / "pytorch_model.bin"
    parts = {"a": tensor(), "b": tensor((4, 3), (1, 4)), "c": tensor((5,), (2,), 1)}
    pickled = program(ordered_dict() + mapping(parts)[1:] + b"}b")
    whole = pickled if target == "pickle" else archive(pickled)
    outcomes = set()
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(generator.choice((1, 1, 2, 8))):
            data[generator.randrange(len(data))] = generator.choice((0, 1, 0x7F, 0x80, 0xFF, generator.randrange(256)))
        if generator.random() < 0.2:
            del data[generator.randrange(len(data)) :]
        if generator.random() < 0.1:
            at = generator.randrange(len(data) + 1)
            data[at:at] = data[: generator.randrange(64)]
        path.write_bytes(archive(bytes(data)) if target == "pickle" else bytes(data))
        try:
            file = TorchFile(path)
            for name in file.names():
                value = file.read(name)
                assert value.shape == file.spec(name).shape and value.nbytes == file.spec(name).nbytes <= 48
                file.release(name)
            outcomes.add("read")
        except CheckpointError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


# torch itself.


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_what_torch_saves(tmp_path, protocol):
    torch = pytest.importorskip("torch")
    path = tmp_path / "pytorch_model.bin"
    base = torch.randn(6, 8)
    saved = {
        "base": base,
        "strided": base[1:5:2, 3:],
        "transposed": base.T,
        "shared": base[2],
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(3, 2)),
        "bf16": torch.randn(5, 3).to(torch.bfloat16),
        "f16": torch.randn(5, 3).half(),
        "i64": torch.arange(5),
        "bool": torch.tensor([True, False]),
        "u8": torch.arange(5, dtype=torch.uint8),
    }
    torch.save(saved, path, pickle_protocol=protocol)
    file = TorchFile(path)
    assert file.names() == list(saved)
    for name, value in saved.items():
        value = value.detach()
        if value.dtype == torch.bfloat16:
            expected = value.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        else:
            expected = value.numpy()
        read = file.read(name)
        assert read.dtype == expected.dtype and file.spec(name).nbytes == read.nbytes
        np.testing.assert_array_equal(read, expected)
        file.release(name)


def test_modules_and_legacy_files_of_torch(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "pytorch_model.bin"
    layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    state = layers.state_dict()
    for wrapped in (state, {"state_dict": state, "epoch": 3, "best": 0.5, "args": {"lr": 1e-3}}, {"model": state}):
        torch.save(wrapped, path)
        file = TorchFile(path)
        assert file.names() == list(state)
        for name, value in state.items():
            np.testing.assert_array_equal(file.read(name), value.numpy())
    torch.save(state, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="form from before 1.6"):
        TorchFile(path)
    torch.save(layers, path)
    with pytest.raises(CheckpointError, match=r"'torch.nn.modules.container.Sequential' is none of the names"):
        TorchFile(path)
    torch.save({"a": torch.zeros(3).to(torch.float8_e4m3fn)}, path)
    with pytest.raises(CheckpointError, match="is none of the names"):
        TorchFile(path)
    torch.save({"a": torch.zeros(1).expand(5)}, path)
    with pytest.raises(CheckpointError, match="tensor 'a': .*expanded tensor; call .contiguous"):
        TorchFile(path)
