"""Sizes of recurrent states and statistics of gates."""

import math

import pytest
import torch

from longmix.analysis.effective_attention import engine_call
from longmix.analysis.states import gate_statistics, log_root_mean_square
from longmix.mixers.mlstm_tfla import MLSTMTFLA
from longmix.mixers.parts.attention_state import AttentionState
from longmix.mixers.parts.base import ModelShape
from longmix.mixers.parts.gated_memory import GatedMemory
from longmix.mixers.parts.looked_into import EngineCall
from longmix.mixers.parts.states import held_bytes
from longmix.mixers.rwkv7 import RWKV7
from longmix_kernels.linear import LinearState

SHAPE = ModelShape(d_model=48, num_layers=2, num_heads=3)


def inputs(length: int = 20) -> torch.Tensor:
    return torch.randn(2, length, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class TestSizes:
    def test_are_root_mean_squares(self):
        memory = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
        wanted = memory.double().square().mean((-2, -1)).sqrt()
        torch.testing.assert_close(log_root_mean_square(memory).exp(), wanted)

    def test_count_the_log_scale(self):
        memory, scale = torch.ones(1, 2, 4, 5), torch.tensor([[3.0, -200.0]])
        sizes = log_root_mean_square(LinearState(memory, torch.zeros(1, 2, 4), scale))
        torch.testing.assert_close(sizes, scale.double())

    def test_of_huge_tiny_and_no_states_are_numbers_or_minus_infinity(self):
        memory = torch.tensor([1e30, 1e-30, 0.0])[None, :, None, None].expand(1, 3, 4, 4)
        sizes = log_root_mean_square(memory)[0].tolist()
        assert sizes[:2] == pytest.approx([30 * math.log(10), -30 * math.log(10)]) and sizes[2] == -math.inf

    def test_bytes_leave_bookkeeping_apart(self):
        key = torch.zeros(2, 7, 3, 4)
        ids, position = torch.zeros(2, 7, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
        state = [AttentionState(key, key, None, ids, position), None, LinearState(key)]
        assert held_bytes(state) == (3 * key.nbytes, ids.nbytes + position.nbytes)


class TestGates:
    def call(self, **options) -> EngineCall:
        x = torch.zeros(2, 3, 2, 4)
        return EngineCall(engine_call, x, x, x, options, x)

    def test_a_constant_decay_has_its_half_life(self):
        heads = gate_statistics([self.call(log_decay=torch.tensor([math.log(0.5), 0.1 * math.log(0.5)]))])
        assert [head["half_life"] for head in heads] == pytest.approx([1.0, 10.0])
        assert heads[0] == {name: pytest.approx(1.0) for name in ("half_life_low", "half_life", "half_life_high")}

    def test_the_decay_is_a_geometric_mean_over_tokens_and_calls(self):
        first, second = torch.full((2, 3, 2), -1.0), torch.full((2, 3, 2), -3.0)
        heads = gate_statistics([self.call(log_decay=first), self.call(log_decay=second)])
        assert heads[1]["half_life"] == pytest.approx(math.log(2) / 2)

    def test_channels_give_quantiles_and_no_decay_gives_none(self):
        lives = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0], [math.inf] * 5])
        heads = gate_statistics([self.call(log_decay=(-math.log(2) / lives).expand(2, 3, 2, 5))])
        assert [heads[0][f"half_life{end}"] for end in ("_low", "", "_high")] == pytest.approx([1.4, 3.0, 4.6])
        assert heads[1]["half_life"] is None

    @torch.no_grad()
    def test_of_mixers_are_what_their_equations_say(self):
        torch.manual_seed(0)
        x = inputs()
        delta = GatedMemory(SHAPE, 0, decay="none", output_gate="none", num_heads=3).double()
        (call,) = [engine_call(delta, x)]
        strengths = (x @ delta.strength.weight.T).sigmoid().mean((0, 1))
        found = gate_statistics([call])
        assert [head["removal"] for head in found] == pytest.approx(strengths.tolist(), rel=1e-5)
        assert all(head["half_life"] is None and "input_gate" not in head for head in found)

        mlstm = MLSTMTFLA(SHAPE, 0, num_heads=3).double()
        gate = mlstm.input_gate
        wanted = (15 * ((x @ gate.weight.T + gate.bias) / 15).tanh()).sigmoid().mean((0, 1))
        found = gate_statistics([engine_call(mlstm, x)])
        assert [head["input_gate"] for head in found] == pytest.approx(wanted.tolist())
        forget = (15 * (mlstm.forget_gate.bias / 15).tanh()).sigmoid().log()
        assert [head["half_life"] for head in found] == pytest.approx((math.log(2) / -forget).tolist())

        rwkv = RWKV7(SHAPE, 0, head_dim=16).double()
        assert all(0 < head["removal"] < 1 for head in gate_statistics([engine_call(rwkv, x)]))
