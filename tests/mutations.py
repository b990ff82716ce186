"""Seeded damage to files: cut, flipped, spliced, and numbers overwritten by huge ones; within containers, too."""

import gzip
import io
import re
import struct
import zipfile
import zlib

import numpy as np

NUMBERS = (0, 1, 2, 2**7, 2**8 - 1, 2**15 - 1, 2**16 - 1, 10**6, 10**9, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
WORDS = ("-1", "0", "1e999", "-1e400", "NaN", "Infinity", "null", "true", '"x"', "[]", "{}", "1" * 400, "[" * 20_000)
WORDS += ('"\\ud800"', '"\\u0000"', '"../../x"', "99999999999999999999", "2.5", "", ",", "\n", "\t", "\0", '"', "inf")
HEAD = 600  # bytes from the beginning on, where most formats have their lengths


def mutated(content, name, kind, number):
    """A file with seeded damage, and whether it was only cut.

    Args:
        content: bytes of the whole file.
        name: its name, whose suffix says what lies within it.
        kind: text to seed with.
        number: of the example; the first two are the file cut to nothing and to its half.
    """
    if number < 2:
        return content[: number * len(content) // 2], True
    rng = np.random.default_rng([zlib.crc32(kind.encode()), number])
    if rng.random() < 0.5:  # what lies within, under a new checksum, else checksums would stop nearly everything
        if name.endswith(".gz"):
            return gzip.compress(_damaged(gzip.decompress(content), rng), mtime=0), False
        if name.endswith(".png"):
            return _in_png(content, rng), False
        if name.endswith((".npz", ".keras")):
            return _in_zip(content, rng), False
    if name.endswith((".json", ".csv", ".tsv")) and rng.random() < 0.7:
        return _in_text(content, rng), False
    if rng.random() < 0.2:
        return content[: rng.integers(len(content))], True
    return _damaged(content, rng), False


def _damaged(content, rng):
    content = bytearray(content)
    if not content:
        return bytes(content)
    for _ in range(rng.integers(1, 4)):
        most = min(HEAD, len(content)) if rng.random() < 0.7 else len(content)
        at, length = int(rng.integers(most)), int(rng.integers(1, 65))
        way = rng.integers(5)
        if way == 0:
            content[at] ^= 1 << rng.integers(8)
        elif way == 1:
            content[at] = rng.integers(256)
        elif way == 2:  # a piece of itself over another one
            source = int(rng.integers(len(content)))
            piece = content[source : source + length]
            content[at : at + len(piece)] = piece
        elif way == 3:
            del content[at : at + length]
        else:
            width, order = int(rng.choice([1, 2, 4, 8])), str(rng.choice(["little", "big"]))
            at -= at % min(width, 4) if rng.random() < 0.7 else 0
            value = NUMBERS[rng.integers(len(NUMBERS))] % 2 ** (8 * width)
            content[at : at + width] = value.to_bytes(width, order)
        if not content:
            break
    return bytes(content)


def _in_text(content, rng):
    """One of the text's numbers or words is another thing, or one of its lines comes twice or not at all."""
    if rng.random() < 0.2:
        lines = content.split(b"\n")
        at = rng.integers(len(lines))
        lines[at : at + 1] = [lines[at]] * int(rng.choice([0, 2]))
        return b"\n".join(lines)
    places = list(re.finditer(rb'"[^"]*"|[-\w.]+|[\[\]{},:\t]', content))
    place = places[rng.integers(len(places))]
    word = WORDS[rng.integers(len(WORDS))].encode()
    return content[: place.start()] + word + content[place.end() :]


def _in_png(content, rng):
    """A chunk is damaged, or comes twice; all have their right checksums."""
    chunks, at = [], 8
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    number = int(rng.integers(len(chunks)))
    name, data = chunks[number]
    within = name == b"IDAT" and rng.random() < 0.5
    data = zlib.compress(_damaged(zlib.decompress(data), rng)) if within else _damaged(data, rng)
    chunks[number : number + 1] = [(name, data)] * int(rng.choice([1, 1, 1, 2]))
    packed = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return content[:8] + b"".join(packed)


def _in_zip(content, rng):
    """A member is damaged, missing, packed or there twice; all have their right checksums."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(out, "w") as changed:
        names = archive.namelist()
        chosen = names[rng.integers(len(names))]
        way = rng.integers(8)
        for name in names:
            data = archive.read(name)
            if name == chosen and way > 1:
                data = _in_text(data, rng) if name.endswith(".json") and way > 3 else _damaged(data, rng)
            if name != chosen or way != 0:
                packing = zipfile.ZIP_DEFLATED if way == 1 and name == chosen else zipfile.ZIP_STORED
                changed.writestr(name, data, compress_type=packing)
    return out.getvalue()
