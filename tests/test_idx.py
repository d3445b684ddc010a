import gzip
import lzma
import struct

import pytest
import torch

from diffedu import idx

# the format by hand: two zeros, 8 for unsigned bytes, two dimensions, 2 rows, 3 columns, the values
SMALL = bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 250, 251, 255])


def packed(kind, content):
    return {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[kind](content)


def test_a_file_written_by_hand_is_read():
    array = idx.decode(SMALL, "x")
    assert (array.dtype, array.tolist()) == (torch.uint8, [[1, 2, 3], [250, 251, 255]])
    array += 1  # nobody else's memory, and no warning of torch
    assert SMALL[-1] == 255


def test_the_magic_numbers_are_those_of_the_publication():
    images, labels = idx.encode(torch.zeros(5, 28, 28, dtype=torch.uint8)), idx.encode(torch.arange(5).byte())
    assert struct.unpack(">4I", images[:16]) == (2051, 5, 28, 28)
    assert (struct.unpack(">2I", labels[:8]), labels[8:]) == ((2049, 5), bytes(range(5)))
    assert idx.encode(torch.tensor([[1, 2, 3], [250, 251, 255]], dtype=torch.uint8)) == SMALL


@pytest.mark.parametrize("shape", [(7,), (2, 3), (3, 4, 5), (0,), (0, 28, 28), (1, 1, 1, 1)])
def test_what_is_encoded_is_decoded(shape, generator):
    array = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    got = idx.decode(idx.encode(array), "x")
    assert got.dtype == torch.uint8
    assert torch.equal(got, array)
    if array.ndim > 1:
        assert torch.equal(idx.decode(idx.encode(array.mT), "x"), array.mT)


@pytest.mark.parametrize("array", [torch.zeros(3), torch.zeros(3, dtype=torch.int8), torch.tensor(1).byte()])
def test_only_rows_of_unsigned_bytes_are_encoded(array):
    with pytest.raises(ValueError, match=r"uint8 array of 1 to 255 dimensions; got torch\.\w+ of shape \("):
        idx.encode(array)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"digits\.idx is not an IDX file .*; got an empty file"),
        (SMALL[:3], "got 00 00 08$"),
        (b"\x01" + SMALL[1:], "got 01 00 08 02"),
        (b"\x00\x01" + SMALL[2:], "got 00 01 08 02"),
        (SMALL[:2] + b"\x0d" + SMALL[3:], "of unsigned bytes.*got 00 00 0d 02"),  # floats
        (SMALL[:3] + b"\x00" + SMALL[4:], "dimensions, 1 or more; got 00 00 08 00"),
        (gzip.compress(SMALL, mtime=0), r"digits\.idx is not an IDX file .*got 1f 8b"),
        (SMALL[:11], "ends within its header, which must be 12 bytes long for 2 dimensions; got 11 bytes"),
        (SMALL[:3] + b"\xff" + SMALL[4:], "must be 1024 bytes long for 255 dimensions; got 18 bytes"),
        (SMALL[:-1], r"digits\.idx must be 18 bytes long for an array of shape \(2, 3\); got 17 bytes"),
        (SMALL + b"\n", "must be 18 bytes long .*; got 19 bytes"),
        (SMALL[:3] + b"\x03" + SMALL[4:], "ends|must be"),
        (SMALL[:4] + b"\xff" * 8 + SMALL[12:], r"shape \(4294967295, 4294967295\); got 18 bytes"),
    ],
)
def test_what_is_no_such_file_is_refused_with_the_reason(content, message):
    with pytest.raises(ValueError, match=message):
        idx.decode(content, "digits.idx")


@pytest.mark.parametrize("kind", ["", ".gz", ".xz"])
def test_a_file_is_unpacked_by_its_ending(kind, tmp_path):
    file = tmp_path / f"x{kind}"
    file.write_bytes(packed(kind, SMALL))
    assert idx.unpack(file) == SMALL


@pytest.mark.parametrize("kind", [".gz", ".xz"])
def test_a_packed_file_cut_short_anywhere_is_refused(kind, tmp_path):
    file, whole = tmp_path / f"x{kind}", packed(kind, SMALL)
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        if length == 0 and kind == ".gz":
            assert idx.unpack(file) == b""  # for gzip, no member at all: `decode` refuses it
            continue
        with pytest.raises(ValueError, match=rf"x\{kind} cannot be read, or is cut short or damaged: \w"):
            idx.unpack(file)


@pytest.mark.parametrize("kind", [".gz", ".xz"])
def test_a_flipped_bit_in_a_packed_file_is_refused_or_harmless(kind, tmp_path):
    file, whole = tmp_path / f"x{kind}", packed(kind, SMALL)
    refused = 0
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        try:
            assert idx.unpack(file) == SMALL  # such as the time in gzip's header
        except ValueError as error:
            assert f"x{kind} cannot be read" in str(error)  # noqa: PT017
            refused += 1
    assert refused > 0.7 * 8 * len(whole)


def test_what_is_not_there_is_refused_by_name(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ValueError, match=rf"{path} cannot be read"):
            idx.unpack(path)
