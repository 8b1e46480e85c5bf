"""What every mixer must keep, checked for each entry of one table; a new file in configs/mixer is one by itself."""

import pytest
import torch
from mixer_table import MIXERS, SHAPE, scatterbrain
from torch.utils.flop_counter import FlopCounterMode

from longmix.analysis.causality import audit, mixer_function
from longmix.errors import ConfigError
from longmix.mixers.block_sparse import BlockSparse
from longmix.mixers.flash import Flash
from longmix.mixers.hyper import Hyper
from longmix.mixers.mlstm_tfla import MLSTMTFLA
from longmix.mixers.moba import MoBA
from longmix.mixers.nsa import NSA
from longmix.mixers.parallax import Parallax
from longmix.mixers.parts.base import Mixer, ModelShape
from longmix.mixers.parts.by_label import LabelAttention
from longmix.mixers.parts.gated_memory import GatedMemory
from longmix.mixers.parts.head_decay import HeadDecay
from longmix.mixers.parts.recurrent import RecurrentMixer
from longmix.mixers.parts.states import held_bytes
from longmix.mixers.routing import Routing
from longmix.mixers.rwkv7 import RWKV7
from longmix.mixers.scatterbrain_content import ScatterbrainContent
from longmix.mixers.sliding_window import SlidingWindow
from longmix.mixers.sparse_flash import SparseFlash
from longmix.mixers.sparse_flash_drop import SparseFlashDrop

SPLITS = {"whole": (29,), "steps": (1,) * 29, "mixed": (5, 1, 1, 13, 1, 8)}


@pytest.fixture(params=MIXERS)
def mixer(request) -> Mixer:
    torch.manual_seed(1)
    return MIXERS[request.param]().double()


def inputs(length: int = 29) -> torch.Tensor:
    return torch.randn(2, length, SHAPE.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def packed_ids() -> torch.Tensor:
    lengths = [(4, 1, 17, 7), (20, 6, 2, 1)]
    return torch.stack([torch.repeat_interleave(torch.arange(4), torch.tensor(row)) for row in lengths]).int()


@pytest.mark.sampled(5)
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_prefill_and_steps_equal_one_pass(mixer, split, packed):
    x, ids = inputs(), packed_ids() if packed else None
    whole = mixer(x, document_ids=ids).y
    state, pieces, start = mixer.init_state(2), [], 0
    for length in split:
        piece = slice(start, start + length)
        output = mixer(x[:, piece], state=state, document_ids=None if ids is None else ids[:, piece])
        state, start = output.state, start + length
        pieces.append(output.y)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-12)


def test_ids_left_out_continue_the_last_document(mixer):
    x, ids = inputs(), packed_ids()
    ids[:, 20:] = ids[:, 20:21]
    first = mixer(x[:, :21], state=mixer.init_state(2), document_ids=ids[:, :21])
    second = mixer(x[:, 21:], state=first.state)
    whole = mixer(x, document_ids=ids).y
    torch.testing.assert_close(torch.cat((first.y, second.y), dim=1), whole, rtol=0, atol=1e-12)


def test_later_tokens_never_change_earlier_outputs(mixer):
    """Bit for bit; else up to rounding.

    Where rows are sorted, the tiles that a row falls into depend on other rows; and where decays have no bound, the
    steepest one of a chunk tells how it is computed.
    """
    x = inputs()
    before = mixer(x).y
    for cut in (0, 11, 27):
        changed = x.clone()
        changed[:, cut + 1 :] = 1e4 * torch.randn_like(changed[:, cut + 1 :])
        after = mixer(changed).y[:, : cut + 1]
        steep = isinstance(mixer, GatedMemory) and mixer.decay is not None
        if steep or isinstance(mixer, LabelAttention | MoBA | NSA | Routing | ScatterbrainContent):
            torch.testing.assert_close(after, before[:, : cut + 1], rtol=0, atol=1e-12)
        else:
            assert torch.equal(after, before[:, : cut + 1])


@pytest.mark.sampled(3)
def test_a_document_changes_nothing_in_another(mixer):
    x, ids = inputs(), packed_ids()
    before = mixer(x, document_ids=ids).y
    for document in range(4):
        changed = torch.where((ids == document).unsqueeze(-1), 1e4 * torch.randn_like(x), x)
        after = mixer(changed, document_ids=ids).y
        others = ids != document
        torch.testing.assert_close(after[others], before[others], rtol=0, atol=1e-12)


def test_a_packed_document_equals_the_document_alone(mixer):
    x, ids = inputs(), packed_ids()
    packed = mixer(x, document_ids=ids).y
    for row in range(2):
        for document in range(4):
            place = (ids[row] == document).nonzero()[:, 0]
            alone = mixer(x[row : row + 1, place]).y
            torch.testing.assert_close(packed[row : row + 1, place], alone, rtol=0, atol=1e-12)


@pytest.mark.sampled(6)
def test_the_audit_finds_no_leak(mixer):
    found = audit(mixer_function(mixer.eval()), inputs(37))
    assert not [finding for finding in found if finding.leaks]
    assert {finding.kind for finding in found} <= {"none", "placement" if isinstance(mixer, BlockSparse) else "none"}


def test_every_parameter_gets_a_gradient(mixer):
    mixer(inputs(), document_ids=packed_ids()).y.square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, name
        # one visible key has weight 1 whatever its score: but for rounding, nothing reaches query and key
        unreached = isinstance(mixer, SlidingWindow) and mixer.window == 1 and name.startswith(("query", "key"))
        assert bool(parameter.grad.abs().max() > 1e-9) != unreached, name


def test_without_a_state_none_is_returned(mixer):
    assert mixer(inputs()).state is None


def test_state_bytes_are_what_the_state_holds(mixer):
    output = mixer(inputs(), state=mixer.init_state(2))
    held, _ = held_bytes(output.state)
    assert held == 2 * mixer.state_bytes(29)
    if isinstance(mixer, RecurrentMixer):
        assert mixer.state_bytes(29) == mixer.state_bytes(10**6)


def test_flops_equal_the_counted_matrix_products():
    mixer = Flash(SHAPE, 0).double()
    with FlopCounterMode(display=False) as counter:
        mixer(inputs())
    counts = counter.get_flop_counts()["Global"]
    projections = sum(count for operator, count in counts.items() if "scaled_dot_product" not in str(operator)) // 2
    pairs = 29 * 30 // 2
    assert mixer.flops(29) == projections + 4 * SHAPE.d_model * pairs


@pytest.mark.parametrize(("window", "length", "pairs"), [(1, 5, 5), (3, 5, 12), (5, 5, 15), (9, 5, 15)])
def test_visible_pairs_of_a_window(window, length, pairs):
    assert SlidingWindow(SHAPE, 0, window=window).visible_pairs(length) == pairs


def delta(**changes) -> GatedMemory:
    return GatedMemory(SHAPE, 0, **{"decay": "head", "output_gate": "silu", **changes})


REFUSED = {
    "heads": (lambda: Flash(SHAPE, 0, num_heads=5), "mixer.num_heads=5 does not divide model.d_model=48"),
    "model-heads": (lambda: Flash(ModelShape(48, 2, 5), 0), "model.num_heads=5 does not divide"),
    "kv-heads": (lambda: Flash(SHAPE, 0, num_kv_heads=2), "mixer.num_kv_heads=2 does not divide model.num_heads=3"),
    "zero-heads": (lambda: Flash(SHAPE, 0, num_heads=0), "mixer.num_heads=0"),
    "odd-head": (lambda: Flash(SHAPE, 0, num_heads=16), "even"),
    "base": (lambda: Flash(SHAPE, 0, rotary_base=1.0), "mixer.rotary_base"),
    "window": (lambda: SlidingWindow(SHAPE, 0, window=0), "mixer.window=0"),
    "odd-buckets": (lambda: SparseFlash(SHAPE, 0, buckets=5), "mixer.buckets=5 must be even"),
    "rounds": (lambda: SparseFlash(SHAPE, 0, buckets=4, rounds=0), "mixer.rounds=0"),
    "negative-window": (lambda: SparseFlash(SHAPE, 0, buckets=4, window=-1), "mixer.window=-1"),
    "shared-grouped": (
        lambda: SparseFlash(SHAPE, 0, buckets=4, shared_qk=True, num_kv_heads=1),
        "mixer.shared_qk=true .* mixer.num_kv_heads=1 must be .* 3",
    ),
    "window-without-self": (
        lambda: SparseFlash(SHAPE, 0, buckets=4, see_self=False, window=4),
        "mixer.see_self=false contradicts mixer.window=4",
    ),
    "keep": (lambda: SparseFlashDrop(SHAPE, 0, keep=1.0), "mixer.keep=1.0"),
    "score": (lambda: SparseFlashDrop(SHAPE, 0, keep=0.5, score="norm"), "mixer.score=norm is unknown"),
    "balance": (lambda: SparseFlashDrop(SHAPE, 0, keep=0.5, balance=-1.0), "mixer.balance=-1.0"),
    "hyper-window": (lambda: Hyper(SHAPE, 0, buckets=4, window=0, sample=0.5), "mixer.window=0"),
    "hyper-sample": (lambda: Hyper(SHAPE, 0, buckets=4, window=4, sample=0.0), "mixer.sample=0.0"),
    "pattern": (lambda: BlockSparse(SHAPE, 0, layout="ring"), "mixer.layout=ring is unknown"),
    "block": (lambda: BlockSparse(SHAPE, 0, layout="stripe", block=24), "mixer.block=24"),
    "moba-block": (lambda: MoBA(SHAPE, 0, block=0), "mixer.block=0 must be at least 1"),
    "moba-top": (lambda: MoBA(SHAPE, 0, top_k=0), "mixer.top_k=0 must be at least 1"),
    "parallax-window": (lambda: Parallax(SHAPE, 0, window=0), "mixer.window=0 must be at least 1"),
    "parallax-std": (lambda: Parallax(SHAPE, 0, probe_std=-0.1), "mixer.probe_std=-0.1 must be at least 0"),
    "nsa-stride": (
        lambda: NSA(SHAPE, 0, compress_stride=6, compress_block=12),
        "mixer.compress_stride=6 must divide mixer.block=64",
    ),
    "nsa-blocks": (lambda: NSA(SHAPE, 0, blocks=2), "mixer.blocks=2 must exceed mixer.local=2"),
    "nsa-window": (lambda: NSA(SHAPE, 0, window=0), "mixer.window=0 must be at least 1"),
    "scatterbrain-block": (lambda: scatterbrain(block=0), "mixer.block=0 must be at least 1"),
    "scatterbrain-past": (lambda: scatterbrain(past_blocks=-1), "mixer.past_blocks=-1 must be at least 0"),
    "scatterbrain-radius": (lambda: scatterbrain(radius=0.0), "mixer.radius=0.0 must be above 0"),
    "scatterbrain-sinks": (lambda: scatterbrain(sinks=-1), "mixer.sinks=-1 must be at least 0"),
    "scatterbrain-summaries": (
        lambda: scatterbrain(summaries=True),
        "mixer.summaries=true and mixer.num_features=8 would count far keys twice; set mixer.num_features=0",
    ),
    "scatterbrain-features": (lambda: scatterbrain(features="relu"), "mixer.features=relu is unknown; use one of"),
    "scatterbrain-no-such": (lambda: scatterbrain(features="relu", num_features=0), "mixer.features=relu is unknown"),
    "scatterbrain-odd": (lambda: scatterbrain(num_features=7), "mixer.num_features=7 must be even"),
    "scatterbrain-negative": (
        lambda: scatterbrain(features="elu", num_features=-1),
        "mixer.num_features=-1 must be at least 0",
    ),
    "gate": (lambda: MLSTMTFLA(SHAPE, 0, gate="relu"), "mixer.gate=relu is unknown"),
    "gate-cap": (lambda: MLSTMTFLA(SHAPE, 0, gate_cap=0.0), "mixer.gate_cap=0.0"),
    "forget-bias": (lambda: MLSTMTFLA(SHAPE, 0, forget_bias=(3.0,)), "mixer.forget_bias"),
    "mlstm-heads": (lambda: MLSTMTFLA(SHAPE, 0, num_heads=7), "mixer.num_heads=7 does not divide model.d_model=48"),
    "key-heads": (lambda: MLSTMTFLA(SHAPE, 0, num_heads=16), "mixer.num_heads=16 does not divide mixer.key_factor"),
    "norm": (lambda: MLSTMTFLA(SHAPE, 0, norm="batch"), "mixer.norm=batch is unknown"),
    "convolution": (lambda: MLSTMTFLA(SHAPE, 0, convolution=1), "mixer.convolution=1"),
    "decay": (lambda: HeadDecay(SHAPE, 0, decay="fast"), "mixer.decay=fast is unknown"),
    "activation": (lambda: HeadDecay(SHAPE, 0, decay="alibi", activation="relu"), "mixer.activation=relu"),
    "decayed-base": (lambda: HeadDecay(SHAPE, 0, decay="alibi", rotary_base=0.5), "mixer.rotary_base=0.5"),
    "delta-decay": (lambda: delta(decay="fast"), "mixer.decay=fast is unknown; use none, head, channel or sigmoid"),
    "delta-gate": (
        lambda: delta(output_gate="relu"),
        "mixer.output_gate=relu is unknown; use none, silu, sigmoid or low_rank",
    ),
    "delta-heads": (lambda: delta(num_heads=7), "mixer.num_heads=7 does not divide mixer.key_factor"),
    "delta-values": (
        lambda: delta(num_heads=16, value_factor=0.5),
        r"mixer.num_heads=16 does not divide mixer.value_factor \* model.d_model=24",
    ),
    "delta-convolution": (lambda: delta(convolution=1), "mixer.convolution=1 must be 0, .* or at least 2 tokens"),
    "delta-decay-rank": (lambda: delta(decay="channel", decay_rank=0), "mixer.decay_rank=0 must be at least 1"),
    "delta-no-decay-rank": (
        lambda: delta(decay_rank=4),
        "mixer.decay_rank=4 is the rank of channel or sigmoid, not of head; use null",
    ),
    "delta-gate-rank": (lambda: delta(output_gate="low_rank", gate_rank=-2), "mixer.gate_rank=-2 must be at least 1"),
    "delta-no-gate-rank": (lambda: delta(gate_rank=4), "mixer.gate_rank=4 is the rank of low_rank, not of silu"),
    "delta-key-factor": (lambda: delta(key_factor=0.0), "mixer.key_factor=0.0 must be positive"),
    "delta-value-factor": (lambda: delta(value_factor=-1.0), "mixer.value_factor=-1.0 must be positive"),
    "rwkv7-heads": (lambda: RWKV7(SHAPE, 0), "mixer.head_dim=64 does not divide model.d_model=48"),
    "rwkv7-rank": (lambda: RWKV7(SHAPE, 0, head_dim=16, value_rank=0), "mixer.value_rank=0 must be at least 1"),
    "stride": (lambda: BlockSparse(SHAPE, 0, layout="stripe", stride=0), "stride=0"),
}


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_impossible_settings_are_refused_by_name(make, words):
    with pytest.raises(ConfigError, match=words):
        make()
