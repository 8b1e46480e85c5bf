"""What is particular to the mixers on scalar-gated linear attention: the published weights, gates, norms and decays."""

import math

import pytest
import torch
import torch.nn.functional as F

from longmix.mixers.mlstm_tfla import MLSTMTFLA
from longmix.mixers.parts.base import ModelShape
from longmix.mixers.parts.convolution import ShortConvolution
from longmix.mixers.parts.head_decay import HeadDecay, alibi_decay, retention_decay
from longmix.mixers.parts.norms import HeadwiseNorm
from longmix.recipe import recipe_of

SHAPE = ModelShape(d_model=64, num_layers=6, num_heads=2)


def test_the_published_initial_weights():
    torch.manual_seed(0)
    shape = ModelShape(d_model=1024, num_layers=24, num_heads=16)
    mixer = MLSTMTFLA(shape, 0)
    for projection in (mixer.query, mixer.key, mixer.value):
        assert abs(projection.weight.std() / math.sqrt(2 / (5 * 1024)) - 1) < 0.01
    assert abs(mixer.output.weight.std() / (2 / (24 * 32)) - 1) < 0.01
    for projection in (mixer.output_gate, mixer.input_gate, mixer.forget_gate):
        assert not projection.weight.any()
    assert torch.equal(mixer.input_gate.bias, torch.full((4,), -10.0))
    assert torch.equal(mixer.forget_gate.bias, torch.tensor([3.0, 4.0, 5.0, 6.0]))
    assert recipe_of(mixer.input_gate.weight).role == "scalar" and recipe_of(mixer.query.weight).role == "matrix"
    assert recipe_of(mixer.head_norm.weight).role == "scalar"
    convolved = MLSTMTFLA(shape, 0, convolution=4).convolution
    assert recipe_of(convolved.weight).role == "scalar"


@pytest.mark.parametrize(
    ("d_model", "heads", "key_dim", "value_dim"),
    [(768, 4, 96, 192), (2048, 4, 256, 512), (2560, 5, 256, 512), (4096, 8, 256, 512)],
)
def test_the_published_head_sizes(d_model, heads, key_dim, value_dim):
    with torch.device("meta"):
        mixer = MLSTMTFLA(ModelShape(d_model, 24, 16), 0)
    assert (mixer.num_heads, mixer.key_dim, mixer.value_dim) == (heads, key_dim, value_dim)


def test_seven_billion_parameters():
    """xLSTM 7B: 32 blocks of this mixer and a SwiGLU of 10944, and 50304 tokens, embedded and untied: 6.865e9."""
    with torch.device("meta"):
        mixer = MLSTMTFLA(ModelShape(4096, 32, 32), 0)
    block = sum(x.numel() for x in mixer.parameters()) + 3 * 4096 * 10944 + 2 * 4096
    assert round((32 * block + 2 * 50304 * 4096 + 4096) / 1e9, 3) == 6.865


@pytest.mark.parametrize("gate", ["sig", "exp"])
def test_gates_are_soft_capped_and_never_rounded(gate):
    mixer = MLSTMTFLA(SHAPE, 0, gate=gate)
    with torch.no_grad():
        mixer.input_gate.weight.normal_(std=100.0)
        mixer.forget_gate.weight.normal_()
    x = torch.randn(1, 50, 64)
    log_decay, log_input = mixer.gates(x)
    pre = 15 * ((x @ mixer.input_gate.weight.T - 10) / 15).tanh()
    torch.testing.assert_close(log_input, pre if gate == "exp" else F.logsigmoid(pre))
    torch.testing.assert_close(log_decay, F.logsigmoid(15 * (mixer.forget_gate(x) / 15).tanh()))
    assert (log_input.abs() <= 15.0001).all() and log_input.abs().max() > 14
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = mixer.gates(x)
    assert all(torch.equal(a, b) for a, b in zip(inside, (log_decay, log_input), strict=True))


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_each_head_is_normalised_alone(kind):
    norm, x = HeadwiseNorm(3, 8, kind, eps=1e-3), torch.randn(2, 5, 3, 8)
    with torch.no_grad():
        norm.weight.normal_()
    for head in range(3):
        one = x[:, :, head]
        wanted = F.layer_norm(one, (8,), eps=1e-3) if kind == "layer" else F.rms_norm(one, (8,), eps=1e-3)
        torch.testing.assert_close(norm(x)[:, :, head], wanted * norm.weight.view(3, 8)[head])
    tiny = 1e-4 * x.bfloat16()
    assert norm(tiny).dtype == torch.bfloat16
    torch.testing.assert_close(norm(tiny).float(), norm(tiny.float()), rtol=0.01, atol=1e-4)


def test_constant_decays_are_as_published():
    torch.testing.assert_close(retention_decay(4, 3, 12).exp(), 1 - 2.0 ** -torch.tensor([5.0, 6.0, 7.0, 8.0]))
    first, last = alibi_decay(8, 0, 12), alibi_decay(8, 11, 12)
    torch.testing.assert_close(first, -(1 + 1e-5) * 2.0 ** -torch.arange(1.0, 9.0))
    torch.testing.assert_close(last, -1e-5 * 2.0 ** -torch.arange(1.0, 9.0))
    assert "log_decay" in HeadDecay(SHAPE, 0, decay="alibi").state_dict()


def test_a_learned_decay_begins_gently_and_learns():
    torch.manual_seed(0)
    mixer, x = HeadDecay(SHAPE, 0, decay="learned"), F.rms_norm(torch.randn(2, 30, 64), (64,))
    log_decay, _ = mixer.gates(x)
    assert 0.94 < log_decay.exp().mean() < 0.97
    mixer(x).y.square().sum().backward()
    assert mixer.decay.weight.grad.abs().max() > 0


def test_a_short_convolution_reads_back_within_its_document():
    convolution = ShortConvolution(3, 4)
    x, before = torch.randn(1, 6, 3), torch.randn(1, 3, 3)
    ids = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2, 2]])
    result = convolution(x, before, ids)
    whole = torch.cat([before, x], 1)
    for t in range(6):
        total = sum(
            convolution.weight[lag] * whole[0, t + 3 - lag] for lag in range(4) if ids[0, t + 3 - lag] == ids[0, t + 3]
        )
        torch.testing.assert_close(result[0, t], F.silu(total))
    one = convolution(x, before, None)
    weights = convolution.weight.flip(0).T.unsqueeze(1)
    torch.testing.assert_close(one, F.silu(F.conv1d(whole.mT, weights, groups=3)).mT)
