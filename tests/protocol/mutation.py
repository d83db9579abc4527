"""Messages damaged at random, for the parsers on either side."""

import random

from obfuscatune.protocol.messages import HEADER_BYTES


def mutated(data: bytes, dice: random.Random) -> bytes:
    """One to four changes, half of them in the header: bits flipped, bytes set, a part cut out, doubled or put in."""
    changed = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(min(HEADER_BYTES, len(changed)) if dice.random() < 0.5 else len(changed))
        kind = dice.randrange(5)
        if kind == 0:
            changed[at] ^= 1 << dice.randrange(8)
        elif kind == 1:
            changed[at] = dice.choice([0, 1, 0x7F, 0x80, 0xFF])
        elif kind == 2 and len(changed) > 16:
            del changed[at : at + dice.randint(1, 8)]
        elif kind == 3:
            changed[at:at] = changed[at : at + dice.randint(1, 8)]
        else:
            changed[at:at] = dice.randbytes(dice.randint(1, 8))
    return bytes(changed)
