"""Rows in slices, one to a process, give what one process gives: outputs, losses and every gradient."""

from pathlib import Path

import pytest
from pool import SIZES
from sliced import Case, cut_off, in_one_process, in_slices, largest_error, together
from small_mixers import small_mixer

from longmix.distributed.slices import check_slices
from longmix.errors import ConfigError

VARIANTS = {
    "flash": "flash num_kv_heads=1",
    "window": "sliding_window window=4",
    "window-longer-than-a-slice": "sliding_window window=27",
    "simple-gla": "simple_gla convolution=3",
    "simple-gla-mixture": "simple_gla num_heads=4 heads_shared=1 heads_kept=2",
    "mlstm-sig": "mlstm_tfla input_bias=-1 num_heads=2",
    "mlstm-exp": "mlstm_tfla gate=exp input_bias=1 num_heads=2",
    "gated-deltanet": "gated_deltanet num_heads=2 convolution=14",  # which reaches across a whole slice
    "gated-deltanet-mixture": "gated_deltanet num_heads=4 heads_kept=2",
    "hash-shared": "sparse_flash buckets=4 shared_qk=true rounds=2",
    "drop": "sparse_flash_drop window=3",
    "hyper": "hyper buckets=4 window=3 sample=0.4",
    "blocks": "block_sparse block=16 local=1",
    "forget": "sliding_window window=15 bias=forget num_kv_heads=1",
    "moba": "moba block=4 top_k=2 num_kv_heads=1",
    "moba-fourier-sinks": "moba block=4 top_k=2 bias=fourier bias_rank=2 sink_logits=true position=context",
    "parallax": "parallax probe_std=0.3 num_kv_heads=1",
    "parallax-window": "parallax probe_std=0.3 window=6",
    "nsa": "nsa block=4 compress_block=4 compress_stride=2 blocks=3 local=1 window=5 num_kv_heads=1",
    "nsa-context-sinks": "nsa block=4 compress_block=4 compress_stride=2 blocks=3 local=1 window=5 position=context "
    "sink_logits=true",
    "routing": "routing clusters=3 window=4 local_window=5",
    "routing-separate": "routing clusters=3 window=4 shared_qk=false",
    "routing-full": "routing clusters=3 window=4 mode=argmax_full",
    "routing-prefix": "routing clusters=3 window=4 mode=prefix_topk block=6",
    "routing-threshold": "routing clusters=3 window=4 mode=threshold",
    "dilated": "sliding_window window=3 dilation=[1,4]",
    "strided": "sliding_window window=4 stride=3 dilation=2",
    "no-positions": "flash rotary_base=null",
    "yarn": "sliding_window window=7 rotary_fraction=0.5 rotary_scaling=yarn rotary_factor=4 rotary_original_length=16",
    "context-fourier-sinks": "flash position=context bias=fourier bias_rank=2 sink_logits=true num_kv_heads=1",
    "context-alibi-gates": "routing clusters=3 window=4 local_window=5 bias=alibi position=context output_gate=head",
    "window-mixture": "sliding_window window=7 bias=alibi heads_shared=1 heads_kept=1 sink_logits=true",
    "gain": "flash gain=fourier bias_rank=2 bias=alibi sink_logits=true num_kv_heads=1",
    "scatterbrain": "scatterbrain block=3 num_features=16",
    "scatterbrain-near-as-slices": "scatterbrain block=6 num_features=16",  # 11 exact keys are remembered
    "scatterbrain-near-beyond-slices": "scatterbrain block=8 num_features=16",
    "scatterbrain-long-blocks": "scatterbrain block=30 num_features=16 sinks=1",
    "scatterbrain-single-tokens": "scatterbrain block=1 past_blocks=0 num_features=16",
    "scatterbrain-own-block": "scatterbrain block=4 past_blocks=0 num_features=0",
    "scatterbrain-summaries": "scatterbrain block=4 num_features=0 summaries=true",
    "sparsek": "sparsek block=3 keep=5 past_blocks=1",
    "sparsek-alibi-context": "sparsek block=3 keep=5 past_blocks=1 bias=alibi position=context sink_logits=true",
    "sparsek-beyond-slices": "sparsek block=8 keep=30 past_blocks=1",
    "sparsek-single-tokens": "sparsek block=1 keep=3 past_blocks=0",
    "content": "scatterbrain_content block=3 num_features=16 window=3",
}


FILES = sorted(path.stem for path in (Path(__file__).parents[2] / "configs/mixer").glob("*.yaml"))


def check(pool, node, tuned=False):
    """Plain and packed rows, in all numbers of slices."""
    for packed in (False, True):
        case = Case(node, packed, tuned)
        wanted = in_one_process(case)
        for size in SIZES:
            error, name = largest_error(together(pool.run(size, in_slices, case)), wanted)
            assert error <= 1e-12, f"{name} in {size} slices{', packed' if packed else ''}"


@pytest.mark.sampled(5)
@pytest.mark.parametrize("words", VARIANTS.values(), ids=VARIANTS)
def test_slices_equal_one_process(pool, node_of, words):
    check(pool, node_of(words))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", FILES)
def test_every_file_takes_slices(pool, node_of, name):
    node = node_of(name)
    node["model"]["d_model"] = 32
    node["mixer"] = small_mixer(node["mixer"], 4)
    if "input_bias" in node["mixer"]:
        node["mixer"]["input_bias"] = -1  # at -10 what is read is as small as rounding
    check(pool, node)


@pytest.mark.parametrize(
    "words", ["flash", "rwkv7 head_dim=12", "mlstm_tfla num_heads=2", "sliding_window", "scatterbrain block=3"]
)
def test_the_comparison_sees_what_is_not_exchanged(pool, node_of, words):
    case = Case(node_of(words))
    wanted, found = in_one_process(case), together(pool.run(2, cut_off, case))
    changed = [name for name, x in wanted.items() if largest_error({name: found[name]}, {name: x})[0] > 1e-6]
    assert {"output", "losses", "embedding.weight"} <= set(changed)


def test_a_mixer_that_knows_nothing_of_slices(pool, node_of):
    node = node_of("flash")
    check(pool, {**node, "mixer": {"_target_": "moving.Moving"}})


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "block", "selective"])
def test_a_hybrid_with_values_of_its_first_layer(pool, node_of, checkpointing):
    """Layers of several kinds, and with activation checkpointing, which exchanges again in the backward pass."""
    members = {"rwkv7": "head_dim=12", "mlstm_tfla": "num_heads=2", "sliding_window": "window=5"}
    nodes = {name: node_of(f"{name} {setting}") for name, setting in members.items()}
    node, mixers = nodes["rwkv7"], {name: nodes[name]["mixer"] for name in members}
    node["mixer"] = {"pattern": ["rwkv7", "mlstm_tfla", "rwkv7", "sliding_window"], **mixers}
    node["model"] |= {"num_layers": 4, "activation_checkpointing": checkpointing, "logit_penalty": 1e-2}
    check(pool, node)


@pytest.mark.parametrize("words", ["kda num_heads=2", "gla num_heads=2", "mlstm_tfla gate=exp num_heads=2"])
def test_documents_that_begin_from_tuned_states(pool, node_of, words):
    check(pool, node_of(words), tuned=True)


@pytest.mark.parametrize("words", ["kda num_heads=2", "mlstm_tfla gate=exp num_heads=2", "scatterbrain block=3"])
def test_mixed_precision_loses_no_more_in_slices(pool, node_of, words):
    node = node_of(words)
    exact, mixed = (in_one_process(Case(node, mixed=mixed)) for mixed in (False, True))
    found = together(pool.run(4, in_slices, Case(node, mixed=True)))
    for name in mixed:
        ours, theirs = ((x[name] - exact[name]).norm() for x in (found, mixed))
        assert ours <= 1.5 * theirs, name


def test_the_published_routing_is_refused(pool, node_of):
    case = Case(node_of("routing clusters=3 window=4 mode=sequence_topk"))
    with pytest.raises(RuntimeError, match=r"ConfigError: mixer\.mode=sequence_topk .* slice by slice"):
        pool.run(2, in_slices, case)


@pytest.mark.parametrize("seq_len", [2, 45, 46])
def test_slices_of_unequal_length_are_refused(seq_len):
    with pytest.raises(ConfigError, match=f"seq_len={seq_len} does not divide into slices for 4 processes"):
        check_slices(seq_len, 4)
    check_slices(48, 4)
