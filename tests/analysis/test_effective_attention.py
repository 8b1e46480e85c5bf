"""The matrix of every mixer: it reproduces what the mixer computes, it is causal, and it is what the equations say."""

from pathlib import Path

import pytest
import torch

from longmix.analysis.effective_attention import engine_call, layer_inputs, mixing, recorded_calls
from longmix.batch import Batch
from longmix.mixers.flash import Flash
from longmix.mixers.mlstm_tfla import MLSTMTFLA
from longmix.mixers.parts.base import Mixer, MixerOutput, ModelShape
from longmix.mixers.parts.gated_memory import GatedMemory
from longmix.mixers.parts.norms import HeadwiseNorm
from longmix.mixers.parts.recurrent import RecurrentMixer
from longmix.mixers.parts.rotary import rotary_angles, rotate
from longmix.mixers.parts.softmax import SoftmaxAttention
from longmix.mixers.rwkv7 import RWKV7
from longmix.mixers.scatterbrain import Scatterbrain
from longmix.model.blocks import SwiGLU

NAMES = sorted(path.stem for path in (Path(__file__).parents[2] / "configs/mixer").glob("*.yaml"))
NOT_LINEAR = {
    "nsa": "compressed values go through a network",
    "tensor": "values of pairs are products, channel by channel",
}
"""Mixers of configs/mixer whose output is no matrix times their values, each with the reason."""

CHANGED_BEFORE_THE_NORM = {"mamba2": "a skip of the values, and the output gate"}
"""Recurrent mixers whose norm is given more than what was read from the state."""

LENGTH = 45
SHAPE = ModelShape(d_model=48, num_layers=2, num_heads=3)


def tokens() -> torch.Tensor:
    return torch.randint(20, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def packed_ids() -> torch.Tensor:
    return torch.stack(
        [torch.repeat_interleave(torch.arange(3), torch.tensor(row)) for row in ((20, 1, 24), (5, 33, 7))]
    )


def inputs() -> torch.Tensor:
    return torch.randn(2, LENGTH, SHAPE.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def mixed(matrix: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """matrix [B, H, T, T] times value [B, T, Hv, W], whose heads serve H / Hv heads each."""
    shared = value.repeat_interleave(matrix.shape[1] // value.shape[2], 2)
    return torch.einsum("bhij,bjhw->bihw", matrix, shared)


def assert_close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-10) -> None:
    assert (found - wanted).abs().max() <= tolerance * wanted.square().mean().sqrt()


def can_be_looked_into(mixer: Mixer, x: torch.Tensor, **options) -> bool:
    """Whether it says between which layers, or in which call, it mixes; every recurrent and softmax mixer must."""
    with recorded_calls(mixer) as calls:
        mixer(x, **options)
    return mixer.value_path() is not None or len(calls) == 1


def is_gated(mixer: SoftmaxAttention, x: torch.Tensor) -> bool:
    """Whether rows sum to less than one."""
    query, key, _ = mixer.project(x)
    chosen = mixer.select(x, query, key, torch.arange(LENGTH)[None])
    return chosen is not None and chosen.query_gate is not None


def read_of(mixer: RecurrentMixer, x: torch.Tensor, **options) -> torch.Tensor | None:
    """What the head-wise norm is given, seen from outside; None without one."""
    seen = []
    norm = next((module for module in mixer.modules() if isinstance(module, HeadwiseNorm)), None)
    if norm is None:
        return None
    handle = norm.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    mixer(x, **options)
    handle.remove()
    return seen[0]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_mixer_has_a_causal_matrix_that_reproduces_it(small_model, name, packed):
    model = small_model(name)
    ids = packed_ids().int() if packed else None
    for mixer, (x, options) in zip(
        model.mixers(), layer_inputs(model, Batch(tokens=tokens(), targets=tokens(), document_ids=ids)), strict=True
    ):
        assert can_be_looked_into(mixer, x, **options) is (name not in NOT_LINEAR)
        if name in NOT_LINEAR:
            continue
        found = mixing(mixer, x, **options)
        matrix = found.matrix()
        assert matrix.shape == (2, found.output.shape[2], LENGTH, LENGTH)
        value, output = found.value, found.output
        several = value.shape[2] > output.shape[2]
        if several:  # values of a token, each with its own weight; alike here
            value = value[:, :, : output.shape[2]]
            output = found.run(value.repeat(1, 1, found.value.shape[2] // value.shape[2], 1))
        assert_close(mixed(matrix, value) + found.offset, output)
        read = read_of(mixer, x, **options) if isinstance(mixer, RecurrentMixer) else None
        if read is not None and name not in CHANGED_BEFORE_THE_NORM:
            own = found.output if several else mixed(matrix, found.value)
            assert_close(own.flatten(2), read.flatten(2))  # a norm may be of all heads at once
        if isinstance(mixer, SoftmaxAttention):
            value = mixer.value(x).unflatten(-1, (-1, mixer.head_dim))
            assert_close(mixer.output(mixed(matrix, value).flatten(2)), mixer(x, **options).y)
            rows = matrix.sum(-1)
            assert matrix.min() >= 0 or name == "parallax", "weights of Parallax alone may be negative"
            if is_gated(mixer, x):
                assert rows.max() < 1 and rows.max() > 0.01
            else:
                assert torch.all(((rows - 1).abs() < 1e-12) | (rows == 0)) and (rows > 0).double().mean() > 0.5
        assert torch.equal(matrix, matrix.tril())
        if packed:
            strangers = (ids[:, :, None] != ids[:, None]).unsqueeze(1)
            assert not matrix.masked_select(strangers).any()
        assert matrix.diagonal(dim1=-2, dim2=-1).any() and matrix.diagonal(-1, -2, -1).any()


@torch.no_grad()
def test_flash_has_its_softmax():
    torch.manual_seed(0)
    mixer, x = Flash(SHAPE, 0, num_kv_heads=1).double(), inputs()
    angles = rotary_angles(torch.arange(LENGTH)[None], mixer.rotary)
    query, key, _ = mixer.project(x)
    query, key = (rotate(heads, *angles).transpose(1, 2) for heads in (query, key))
    scores = (query @ key.mT) * mixer.head_dim**-0.5
    wanted = scores.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -torch.inf).softmax(-1)
    assert_close(mixing(mixer, x).matrix(), wanted, 1e-12)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: RWKV7(SHAPE, 0, head_dim=16), id="rwkv7"),
        pytest.param(lambda: GatedMemory(SHAPE, 0, decay="channel", output_gate="none", num_heads=3), id="kda"),
        pytest.param(lambda: GatedMemory(SHAPE, 0, decay="sigmoid", output_gate="none", delta=False), id="gla"),
    ],
)
@torch.no_grad()
def test_a_delta_rule_has_its_products_of_transitions(make):
    """a_ij = s q_i . G_i ... G_{j+1} k_j with G = diag(exp(g)) + b a^T, multiplied out token by token."""
    torch.manual_seed(0)
    mixer, x = make().double().eval(), inputs()
    call = engine_call(mixer, x)
    query, key, decay = call.query * call.options.get("scale", 1.0), call.key, call.options["log_decay"].exp()
    read, write = call.options["low_rank_read"], call.options["low_rank_write"]
    wanted = torch.zeros(2, query.shape[2], LENGTH, LENGTH, dtype=torch.float64)
    for j in range(LENGTH):
        state = key[:, j]
        for i in range(j, LENGTH):
            if i > j:
                taken = 0 if read is None else write[:, i] * (read[:, i] * state).sum(-1, keepdim=True)
                state = decay[:, i] * state + taken
            wanted[:, :, i, j] = (query[:, i] * state).sum(-1)
    assert_close(mixing(mixer, x).matrix(), wanted)


@torch.no_grad()
def test_an_mlstm_has_its_decayed_products_over_the_normaliser():
    torch.manual_seed(0)
    mixer, x = MLSTMTFLA(SHAPE, 0, gate="exp", num_heads=3, input_bias=1.0).double(), inputs()
    query, key = mixer.query_and_key(x, torch.arange(LENGTH)[None])
    log_decay, log_input = mixer.gates(x)
    total = log_decay.cumsum(1).transpose(1, 2)
    weights = (total[..., :, None] - total[..., None, :] + log_input.transpose(1, 2)[..., None, :]).exp().tril()
    products = torch.einsum("bihd,bjhd->bhij", query, key) * mixer.key_dim**-0.5 * weights
    wanted = products / products.sum(-1, keepdim=True).abs().clamp(min=1)
    assert_close(mixing(mixer, x).matrix(), wanted)


def tuned() -> MLSTMTFLA:
    mixer = MLSTMTFLA(SHAPE, 0, num_heads=3, input_bias=1.0)
    mixer.tune_states()
    return mixer


@pytest.mark.parametrize(
    "make", [lambda: Scatterbrain(SHAPE, 0, block=4, num_features=8, sinks=2), tuned], ids=["sinks", "tuned state"]
)
@torch.no_grad()
def test_what_no_value_causes_is_the_offset(make):
    torch.manual_seed(0)
    mixer, x = make().double().eval(), inputs()
    for parameter in mixer.parameters():
        if not parameter.abs().max() > 0:
            parameter.normal_()
    found = mixing(mixer, x)
    assert found.offset.abs().max() > 0.1
    assert_close(mixed(found.matrix(), found.value) + found.offset, found.output)


def test_a_mixer_without_known_values_is_refused():
    with pytest.raises(ValueError, match=r"SwiGLU neither calls its engine by `call_engine` nor has a `value_path`"):
        mixing(SwiGLU(SHAPE, 8).double(), inputs())


class Twice(MLSTMTFLA):
    """Asks its engine twice."""

    def forward(self, x, **options) -> MixerOutput:
        super().forward(x, **options)
        return super().forward(x, **options)


def test_a_mixer_that_asks_its_engine_twice_is_refused():
    with pytest.raises(ValueError, match="Twice made 2 calls"):
        mixing(Twice(SHAPE, 0, num_heads=3).double(), inputs())


def test_nobody_watches_any_more_even_after_an_error():
    mixer = MLSTMTFLA(SHAPE, 0, num_heads=3).double()
    with pytest.raises(RuntimeError, match="in between"), recorded_calls(mixer) as calls:
        mixer(inputs())
        raise RuntimeError("in between")
    assert len(calls) == 1 and mixer.watch is None
    mixer(inputs())
    assert len(calls) == 1


@torch.no_grad()
def test_the_model_computes_the_same_while_it_is_looked_at(small_model):
    model = small_model("rwkv7")
    before = model(tokens()).hidden
    given = layer_inputs(model, Batch(tokens=tokens(), targets=tokens(), document_ids=None))
    assert len(given) == 2 and given[0][1]["value_residual"] is None and given[1][1]["value_residual"] is not None
    mixing(model.mixers()[1], given[1][0], **given[1][1]).matrix()
    assert torch.equal(model(tokens()).hidden, before)
    assert not model.mixers()[0]._forward_pre_hooks
