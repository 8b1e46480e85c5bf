"""How much scalar-gated linear attention has to compute and to move, in chunks: counted, never measured.

FLOPs are those of the recurrence, per token and head 4 Dk Dv forward: 2 Dk Dv to add k v^T to the state and 2 Dk Dv to
read it with q. Each product has two gradients, so that the backward pass takes twice that. What a chunk computes on top
grows with its size and is not counted; neither are decays and normalisers.

Bytes are those of the design: a step reads and writes each of its tensors once, and nothing stays on the chip between
steps. The state that enters each chunk, ceil(T / L) of [Dk, Dv] for a head, is stored by one step and read by another:

    states        k, v -> states
    output        q, k, v, states -> y                                                  forward ends here
    states        again, since to keep them would take more memory than all the rest
    grad_states   q, dy -> gradient of the states                                       with a normaliser also y
    gradients     q, k, v, dy, both states -> dq, dk, dv

Besides, every step reads the gates and the last one writes their gradients. A normaliser adds Dk numbers to a state,
and per row a log scale, a denominator and its gradient. An implementation that splits the last step moves more;
`longmix_kernels.linear.cost` counts what ours do.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.comparison import FORWARD, PASSES, TRAINING

BACKWARD_FACTOR = 2
"""FLOPs of the backward pass for one of the forward pass: each of both products has two gradients."""

EXACT_BYTES = 4
"""Of a number of a state, a gate, a log scale or a denominator: they are float32 for 16-bit inputs."""


@dataclass(frozen=True)
class Step:
    """What a step of the design reads and writes.

    Attributes:
        keys: matrices of Dk columns per token: q, k and their gradients.
        values: matrices of Dv columns per token: v, y and their gradients.
        gates: how often every gate is read or written.
        states: states of each chunk, or their gradients.
        rows: numbers per token that only a normaliser needs.
        normalized_values: matrices of Dv columns that only a normaliser needs.
    """

    keys: int
    values: int
    gates: int
    states: int
    rows: int = 0
    normalized_values: int = 0


STATES = Step(keys=1, values=1, gates=1, states=1)
OUTPUT = Step(keys=2, values=2, gates=1, states=1, rows=2)
GRAD_STATES = Step(keys=1, values=1, gates=1, states=1, rows=3, normalized_values=1)
GRADIENTS = Step(keys=4, values=3, gates=2, states=2, rows=3)

STEPS = {FORWARD: (STATES, OUTPUT), TRAINING: (STATES, OUTPUT, STATES, GRAD_STATES, GRADIENTS)}


def recurrence_flops(rows: int, dim: int, value_dim: int) -> dict[str, float]:
    """Floating-point operations by pass, for `rows` tokens times heads."""
    forward = 4.0 * rows * dim * value_dim
    return {FORWARD: forward, TRAINING: forward * (1 + BACKWARD_FACTOR)}


def moved_bytes(
    sequences: int, length: int, dim: int, value_dim: int, chunk: int, *, gates: int, normalize: bool, size: int
) -> Mapping[str, float]:
    """Bytes that have to be moved, by pass.

    Args:
        sequences: batch times heads.
        length: tokens of each.
        dim, value_dim: columns of keys and of values.
        chunk: tokens of a chunk.
        gates: gates that each token has: none with a constant decay.
        normalize: whether outputs are divided by a normaliser.
        size: bytes of a number of query, key, value and output.
    """
    chunks = -(-length // chunk)

    def step_bytes(step: Step) -> float:
        values = step.values + normalize * step.normalized_values
        columns = step.keys * dim + values * value_dim
        exact = step.gates * gates + normalize * step.rows
        state = dim * value_dim + normalize * dim
        return sequences * (
            length * (columns * size + exact * EXACT_BYTES) + step.states * chunks * state * EXACT_BYTES
        )

    return {direction: sum(map(step_bytes, STEPS[direction])) for direction in PASSES}
