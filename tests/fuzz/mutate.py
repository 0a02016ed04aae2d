"""Changing JSON so that it stays JSON, mostly: what a fuzzer of bytes alone takes for ever to find."""

from __future__ import annotations

import json
import random
from typing import Any

from tests.fuzz.targets import HEAD, pack
from tests.hostile.cases import LIES, OBJECTS

_VALUES: list[Any] = [
    *(text for name, text in LIES.items() if name not in {"10000-digits", "long-string", "4000-digits"}),
    *(json.dumps(value) for value in OBJECTS.values() if len(str(value)) < 2000),
    *(str(number) for number in (0, 1, 2, 3, 7, 8, 64, 127, 4096, 65536, 131072, 10**6, 2**31, 2**53)),
    "[[0, 1]]",
    "[0, 0]",
    '"float32"',
    '"bfloat16"',
    '"uint8"',
    '"rank-00000-of-00001.h5"',
    '"0000000001-00000000"',
]
_MARK = "\0mark%d"


def mutate(data: bytes, rng: random.Random, target: str, longest: int = 16_000) -> bytes:
    """Change some bytes or some JSON in an input of a target."""
    if target in {"index", "shard"} and len(data) > HEAD.size:
        head, table = HEAD.unpack_from(data)
        body = data[HEAD.size :]
        parts = [body[:head], body[head : head + table], body[head + table :]]
        which = rng.choice((0, 0, 0, 0, 1, 2))
        if which == 0:
            parts[0] = _json(parts[0], rng)
        elif which == 1:
            blocks = rng.randrange(-3, 4) * 8
            parts[1] = parts[1][:blocks] if blocks < 0 else parts[1] + bytes(blocks)
        else:
            parts[2] = _bytes(parts[2], rng)
        if max(len(parts[0]), len(parts[1])) < 65536:
            return pack(*parts)
        return data
    if target == "manifest":
        return _json(b"{" + data, rng)[1:][:longest]
    return _json(data, rng)[:longest]


def _json(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.15:
        return _bytes(data, rng)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return _bytes(data, rng)
    marks: list[str] = []
    holder = [value]
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        _change(holder, rng, marks)
    try:
        text = json.dumps(holder[0] if holder else None)
    except (ValueError, RecursionError):
        return data
    for number, mark in enumerate(marks):
        text = text.replace(json.dumps(_MARK % number), mark)
    return text.encode()


def _change(value: Any, rng: random.Random, marks: list[str]) -> None:
    """Walk down at random, and replace, remove, double or exchange something."""
    node: Any = value
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = rng.choice(keys)
        child = node[key]
        if isinstance(child, dict | list) and child and rng.random() < 0.8:
            node = child
            continue
        break
    kind = rng.randrange(6)
    if kind <= 2:
        number = child if type(child) is int else None
        if number is not None and rng.random() < 0.5:
            node[key] = number + rng.choice((-1, 1, 8, -8, number, 2**32))
            return
        marks.append(rng.choice(_VALUES))
        node[key] = _MARK % (len(marks) - 1)
    elif kind == 3:
        del node[key]
    elif kind == 4:
        other = rng.choice(keys)
        node[key], node[other] = node[other], node[key]
    elif isinstance(node, list):
        node.insert(rng.randrange(len(node) + 1), child)
    else:
        node[rng.choice((f"{key}+", "", "a", "$dict"))] = child


def _bytes(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return bytes([rng.randrange(256)])
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(changed))
        kind = rng.randrange(4)
        if kind == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at : at + rng.randrange(1, 16)] = b""
        elif kind == 2:
            changed[at:at] = changed[at : at + rng.randrange(1, 64)]
        else:
            changed[at] = rng.choice(b'[]{}",:0-.eE\\\0\xff$')
        if not changed:
            break
    return bytes(changed)
