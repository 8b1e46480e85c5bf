"""How much the delta rule has to compute and to move, in chunks: counted, never measured.

FLOPs are those of the recurrence, per token and head: 2 Dk Dv to add k v^T to the state and 2 Dk Dv to read it with q,
and as much again to read what is to be removed and to remove it. Each product has two gradients, so that the backward
pass takes twice that. What a chunk computes on top grows with its size and is not counted; neither are decays.

Bytes are those of a design in which every tensor is read and written once a step, and nothing stays on the chip between
steps. A chunk of C tokens takes an entering state S to diag(kept) S + E S + R, and its outputs are O + Q S, with E [Dk,
Dk] and what has the columns of keys or values in the dtype of those; states, R [Dk, Dv], decays and kept [Dk] are
float32:

    prepare       q, k, v, a, b, decays -> E, R, Q, O, kept
    scan          E, R, Q, O, kept -> states, y                                          forward ends here
    scan_back     E, Q, kept, dy -> gradients of states
    gradients     q, k, v, a, b, decays, dy, both states -> dq, dk, dv, da, db, gradients of decays

Without a low-rank part there are neither a, b nor E. Published designs move several times this; that of
flash-linear-attention some 20,000 bytes per token and head of 64/64, this one 5,600.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.comparison import FORWARD, PASSES, TRAINING

BACKWARD_FACTOR = 2
"""FLOPs of the backward pass for one of the forward pass: each product has two gradients."""

EXACT_BYTES = 4
"""Of a number of a state or a decay: they are float32 for 16-bit inputs."""


@dataclass(frozen=True)
class Step:
    """What a step of the design reads and writes.

    Attributes:
        keys: matrices of Dk columns per token: q, k, Q and their gradients.
        low_rank: those that only a low-rank part has: a, b and their gradients.
        values: matrices of Dv columns per token: v, O, y and their gradients.
        decays: how often every decay is read or written.
        states: matrices like the state for each chunk: states, R, and gradients.
        transitions: how often every E is read or written.
        kept: how often the decay of each whole chunk is.
    """

    keys: int
    low_rank: int
    values: int
    decays: int
    states: int
    transitions: int
    kept: int


PREPARE = Step(keys=3, low_rank=2, values=2, decays=1, states=1, transitions=1, kept=1)
SCAN = Step(keys=1, low_rank=0, values=2, decays=0, states=2, transitions=1, kept=1)
SCAN_BACK = Step(keys=1, low_rank=0, values=1, decays=0, states=1, transitions=1, kept=1)
GRADIENTS = Step(keys=4, low_rank=4, values=3, decays=2, states=2, transitions=0, kept=0)

STEPS = {FORWARD: (PREPARE, SCAN), TRAINING: (PREPARE, SCAN, SCAN_BACK, GRADIENTS)}


def design_chunk(dim: int) -> int:
    """Tokens of a chunk of the design: what fits on the chip."""
    return 64 if dim <= 64 else 32


def recurrence_flops(rows: int, dim: int, value_dim: int, *, low_rank: bool) -> dict[str, float]:
    """Floating-point operations by pass, for `rows` tokens times heads."""
    forward = (8.0 if low_rank else 4.0) * rows * dim * value_dim
    return {FORWARD: forward, TRAINING: forward * (1 + BACKWARD_FACTOR)}


def moved_bytes(
    sequences: int, length: int, dim: int, value_dim: int, chunk: int, *, decays: int, low_rank: bool, size: int
) -> Mapping[str, float]:
    """Bytes that have to be moved, by pass.

    Args:
        sequences: batch times heads.
        length: tokens of each.
        dim, value_dim: columns of keys and of values.
        chunk: tokens of a chunk.
        decays: numbers that the decay of a token has: `dim`, or 1 for a head.
        low_rank: whether transitions have a low-rank part.
        size: bytes of a number of query, key, value and output.
    """
    chunks = -(-length // chunk)

    def step_bytes(step: Step) -> float:
        columns = (step.keys + low_rank * step.low_rank) * dim + step.values * value_dim
        tokens = columns * size + step.decays * decays * EXACT_BYTES
        states = (step.states * dim * value_dim + step.kept * dim) * EXACT_BYTES
        return sequences * (length * tokens + chunks * (states + low_rank * step.transitions * dim * dim * size))

    return {direction: sum(map(step_bytes, STEPS[direction])) for direction in PASSES}
