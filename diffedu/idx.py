"""IDX files, the format in which MNIST was published: strict reading of arrays of bytes, and writing."""

import gzip
import lzma
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

UNSIGNED_BYTE = 0x08  # the type code of uint8, the only one in MNIST
SUFFIXES = ("", ".gz", ".xz")


def decode(content: bytes, name: str) -> Tensor:
    """The array in the bytes of an IDX file, uint8, of the shape that its header states.

    Two zero bytes, the type code, the number of dimensions, each dimension as a big-endian 32-bit number,
    the values in row-major order. Raises ValueError, which names the file by `name`, for any other type than
    unsigned bytes, for a file without dimensions and for one that is longer or shorter than it states.
    Source: LeCun, Cortes and Burges, The MNIST database of handwritten digits, section "file formats".
    """
    head = content[:4]
    if len(head) < 4 or head[:3] != bytes([0, 0, UNSIGNED_BYTE]) or head[3] == 0:
        raise ValueError(
            f"{name} is not an IDX file of unsigned bytes: it must begin with 00 00 08 and the number of "
            f"dimensions, 1 or more; got {head.hex(' ') or 'an empty file'}"
        )
    start = 4 + 4 * head[3]
    if len(content) < start:
        raise ValueError(
            f"{name} ends within its header, which must be {start} bytes long for {head[3]} dimensions; "
            f"got {len(content)} bytes"
        )
    shape = struct.unpack(f">{head[3]}I", content[4:start])
    want = start + math.prod(shape)
    if len(content) != want:
        raise ValueError(
            f"{name} must be {want} bytes long for an array of shape {shape}; got {len(content)} bytes"
        )
    # bytearray: a tensor over bytes that nobody may write to would warn
    values = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start) if want > start else None
    return torch.zeros(shape, dtype=torch.uint8) if values is None else values.reshape(shape)


def encode(array: Tensor) -> bytes:
    """The IDX file of a uint8 array of one dimension or more. Raises ValueError for any other."""
    if array.dtype != torch.uint8 or not 1 <= array.ndim <= 255:
        raise ValueError(
            "an IDX file here holds a uint8 array of 1 to 255 dimensions; "
            f"got {array.dtype} of shape {tuple(array.shape)}"
        )
    head = struct.pack(f">4B{array.ndim}I", 0, 0, UNSIGNED_BYTE, array.ndim, *array.shape)
    return head + array.contiguous().cpu().numpy().tobytes()


def unpack(path: Path) -> bytes:
    """The bytes of a file, decompressed where its name ends in .gz or .xz.

    Raises ValueError, which names the file, where it is not to be read, cut short or damaged.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            return gzip.decompress(content)
        return lzma.decompress(content, format=lzma.FORMAT_XZ) if path.suffix == ".xz" else content
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{path} cannot be read, or is cut short or damaged: {error}") from error
