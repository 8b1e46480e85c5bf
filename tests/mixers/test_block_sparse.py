"""Blocks belong to documents: a document mixes packed, behind padding and in pieces as it does alone."""

import pytest
import torch

from longmix.mixers.block_sparse import BlockSparse
from longmix.mixers.parts.base import ModelShape

SHAPE = ModelShape(d_model=32, num_layers=1, num_heads=2)
LAYOUTS = {
    "first-and-latest": {"layout": "sink_local", "sink": 1, "local": 1},
    "latest-alone": {"layout": "sink_local", "sink": 0, "local": 2},
    "many-first": {"layout": "sink_local", "sink": 3, "local": 2},
    "stripes": {"layout": "stripe", "local": 1, "stride": 2, "num_kv_heads": 1},
    "wide-stripes": {"layout": "stripe", "local": 3, "stride": 4},
    "butterfly": {"layout": "butterfly"},
}
LENGTHS = [(40, 1, 70, 89), (5, 130, 16, 49)]


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS)
def mixer(request) -> BlockSparse:
    torch.manual_seed(1)
    return BlockSparse(SHAPE, 0, block=16, **request.param).double()


def tokens(length: int = 200) -> torch.Tensor:
    return torch.randn(2, length, SHAPE.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def packed() -> torch.Tensor:
    return torch.stack([torch.repeat_interleave(torch.arange(4), torch.tensor(row)) for row in LENGTHS]).int()


def alone(mixer: BlockSparse, x: torch.Tensor) -> torch.Tensor:
    """Every document of `packed` as a row of its own."""
    rows = [torch.cat([mixer(part[None]).y[0] for part in row.split(n)]) for row, n in zip(x, LENGTHS, strict=True)]
    return torch.stack(rows)


def test_a_packed_document_mixes_as_alone(mixer):
    torch.testing.assert_close(mixer(tokens(), document_ids=packed()).y, alone(mixer, tokens()), rtol=0, atol=1e-12)


def test_gradients_of_packed_documents_are_those_of_each_alone(mixer):
    weight = torch.linspace(-1, 1, SHAPE.d_model, dtype=torch.float64)
    found = []
    for run in (lambda x: mixer(x, document_ids=packed()).y, lambda x: alone(mixer, x)):
        x = tokens().requires_grad_()
        (run(x).sin() * weight).sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pieces", [(1,) * 200, (17, 90, 1, 1, 91)], ids=["steps", "pieces"])
def test_packed_documents_in_pieces_mix_as_alone(mixer, pieces):
    x, ids, state, found = tokens(), packed(), mixer.init_state(2), []
    with torch.no_grad():
        for part, part_ids in zip(x.split(pieces, 1), ids.split(pieces, 1), strict=True):
            output = mixer(part, state=state, document_ids=part_ids)
            found.append(output.y)
            state = output.state
        torch.testing.assert_close(torch.cat(found, 1), alone(mixer, x), rtol=0, atol=1e-12)


def test_a_row_behind_padding_goes_on_as_alone(mixer):
    """The padding is a document of its own, and as long as the longer row beside it asks for."""
    x = tokens(110)
    ids = torch.zeros(2, 70, dtype=torch.int32)
    ids[0, 30:] = 1
    with torch.no_grad():
        output = mixer(x[:, :70], state=mixer.init_state(2), document_ids=ids)
        found = [output.y[:, 69]]
        for step in range(70, 110):
            output = mixer(x[:, step : step + 1], state=output.state)
            found.append(output.y[:, 0])
        found = torch.stack(found, 1)
        torch.testing.assert_close(found[0], mixer(x[:1, 30:]).y[0, 39:], rtol=0, atol=1e-12)
        torch.testing.assert_close(found[1], mixer(x[1:]).y[0, 69:], rtol=0, atol=1e-12)
