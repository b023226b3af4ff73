"""Small files with 16 bits per channel in colour, which Pillow silently reads as 8 bits."""

import struct
import zlib


def rgb16_png() -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 8, 6, 16, 2, 0, 0, 0)
    pixels = zlib.compress((b"\0" + bytes(6 * 8)) * 6)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def rgb16_tiff() -> bytes:
    """A TIFF of 8 x 6 pixels with three samples of 16 bits: header, pixels, BitsPerSample, directory."""
    pixels = bytes(8 * 6 * 6)
    bits_at = 8 + len(pixels)
    tags = [(256, 3, 1, 8), (257, 3, 1, 6), (258, 3, 3, bits_at), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 8)]
    tags += [(277, 3, 1, 3), (278, 3, 1, 6), (279, 4, 1, len(pixels))]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return b"II*\0" + struct.pack("<I", bits_at + 6) + pixels + struct.pack("<HHH", 16, 16, 16) + directory


def rgb16_ppm() -> bytes:
    """A binary PPM of 8 x 6 pixels with 16 bits per channel."""
    return b"P6 8 6 65535\n" + bytes(8 * 6 * 6)
