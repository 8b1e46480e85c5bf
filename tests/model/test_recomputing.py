"""Selective checkpointing: what it keeps, and that gradients are those of no checkpointing, to the bit."""

import copy
import logging
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy

from longmix.mixers.hyper import Hyper
from longmix.mixers.parts.base import Mixer, MixerOutput
from longmix.mixers.routing import Routing
from longmix.mixers.sliding_window import SlidingWindow
from longmix.model.backbone import LanguageModel
from longmix.model.build import build_model
from longmix.model.recomputing import ADVICE, COMPILER, keeping_products, policy, silence_advice
from longmix.planning.arguments import read
from longmix_kernels.attention import attention

SIZES = {"d_model": 32, "num_layers": 2, "num_heads": 2, "mlp_hidden": 48}
TOKENS = torch.randint(50, (2, 40), generator=torch.Generator().manual_seed(1))
IDS = (torch.arange(40) >= 13).int().expand(2, -1).contiguous()

aten = torch.ops.aten
x = torch.zeros(6, 32)


def weight(inputs: int, outputs: int) -> torch.Tensor:
    return torch.zeros(inputs, outputs)


qkv = (torch.zeros(1, 2, 6, 16),) * 3
CASES = {
    "a-product": (aten.mm.default, (x, weight(32, 96)), {}, True),
    "with-a-bias": (aten.addmm.default, (torch.zeros(96), x, weight(32, 96)), {}, True),
    "of-few-channels": (aten.mm.default, (torch.zeros(6, 8), weight(8, 32)), {}, False),
    "the-last": (aten.mm.default, (torch.zeros(6, 48), weight(48, 32)), {}, False),
    "of-activations": (aten.bmm.default, (x[None], weight(32, 96)[None]), {}, False),
    "an-engine": (torch.ops.longmix.attention_blocked.default, (), {}, True),
    "sdpa": (aten._scaled_dot_product_flash_attention.default, (*qkv, 0.0, True), {}, True),
    "sdpa-by-default": (aten._scaled_dot_product_flash_attention_for_cpu.default, qkv, {}, True),
    "sdpa-that-drops": (aten._scaled_dot_product_flash_attention.default, (*qkv, 0.1, True), {}, False),
    "dropout-as-a-word": (aten._scaled_dot_product_cudnn_attention.default, qkv, {"dropout_p": 0.1}, False),
    "a-norm": (aten.rsqrt.default, (x,), {}, False),
}


@pytest.mark.parametrize(("operator", "arguments", "options", "kept"), CASES.values(), ids=CASES)
def test_what_is_kept(operator, arguments, options, kept):
    assert attention is not None  # the engine's operators exist
    found = policy(32, (48, 32), None, operator, *arguments, **options)
    assert found == (CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE)


class Dropping(Mixer):
    """Attention that drops weights, and dropout before and behind it."""

    def __init__(self, shape, layer_index: int) -> None:
        super().__init__()
        self.project = torch.nn.Linear(shape.d_model, 3 * shape.d_model)

    def forward(self, x, *, state=None, document_ids=None) -> MixerOutput:
        query, key, value = self.project(F.dropout(x, 0.2)).unsqueeze(1).chunk(3, -1)
        read = F.scaled_dot_product_attention(query, key, value, dropout_p=0.3, is_causal=True)
        return MixerOutput(F.dropout(read.squeeze(1), 0.2))


def model(kind, **options) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(kind, 50, **{**SIZES, **options})


def trained(net: LanguageModel) -> tuple[dict[str, torch.Tensor], int]:
    """The gradients, and the bytes that autograd's hooks saw in the forward pass."""
    torch.manual_seed(1)
    seen: dict[int, int] = {}

    def pack(saved: torch.Tensor) -> torch.Tensor:
        seen[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with saved_tensors_hooks(pack, lambda saved: saved):
        output = net(TOKENS, TOKENS, document_ids=IDS)
    (output.token_losses.mean() + sum(output.losses.values())).backward()
    return {name: each.grad for name, each in net.named_parameters()}, sum(seen.values())


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    for name, gradient in wanted.items():
        assert (found[name] is None and gradient is None) or torch.equal(found[name], gradient), name


@pytest.mark.parametrize("kind", ["block", "selective"])
def test_dropout_draws_the_same_again(kind):
    wanted, _ = trained(model(Dropping))
    assert_same(trained(model(Dropping, activation_checkpointing=kind))[0], wanted)


def test_statistics_of_a_recomputed_pass_change_no_operator():
    """A mixer observes a second time, after it has observed already."""
    hyper = partial(Hyper, buckets=4, window=8, sample=0.3)
    nets = [model(hyper, activation_checkpointing=kind) for kind in ("none", "selective")]
    for _ in range(2):  # micro-batches of one step
        wanted, found = (trained(net)[0] for net in nets)
    assert_same(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["kda", "scatterbrain", "mlstm_tfla", "block_sparse"])
def test_mixers_have_the_same_gradients(mixer):
    sizes = ("gpu=cpu", "model.d_model=64", "model.num_layers=2", "model.mlp_hidden=96", "seq_len=40")
    config = read([*sizes, f"mixer={mixer}"]).config
    torch.manual_seed(0)
    net = build_model(config, 50)
    again = copy.deepcopy(net)
    again.activation_checkpointing = "selective"
    assert_same(trained(again)[0], trained(net)[0])


@pytest.mark.slow
@torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True)
def test_compiled_blocks_keep_less_and_have_the_same_gradients():
    """Of a compiled block autograd's hooks see all that is kept."""

    def kind(shape, index):
        return Routing(shape, index, clusters=3, window=4) if index else SlidingWindow(shape, index, window=7)

    found = []
    for checkpointing in ("none", "selective"):
        torch._dynamo.reset()
        counters.clear()
        net = model(kind, activation_checkpointing=checkpointing)
        for block in net.blocks:
            block.compile(backend="aot_eager")
        found.append(trained(net))
        assert not counters["graph_break"]
    torch._dynamo.reset()
    assert_same(found[1][0], found[0][0])
    assert found[1][1] < 0.8 * found[0][1]


@pytest.mark.slow
@pytest.mark.parametrize("silent", [False, True])
def test_advice_about_in_place_operators_is_silenced_and_nothing_else(silent, caplog):
    """Without it, torch gives it: else the test would see nothing of it either way."""
    logger = logging.getLogger(COMPILER)
    before = logger.filters[:]
    torch._logging.warning_once.cache_clear()
    torch._dynamo.reset()
    try:
        logger.filters[:] = []
        if silent:
            silence_advice()
            silence_advice()
            assert len(logger.filters) == 1
        layer = nn.Linear(8, 8)
        run = torch.compile(lambda x: keeping_products(lambda y: layer(y).sin(), 8, None, x), backend="aot_eager")
        with caplog.at_level(logging.WARNING, COMPILER):
            run(torch.randn(2, 8, requires_grad=True)).sum().backward()
            logger.warning("something else")
    finally:
        logger.filters[:] = before
    given = [record.getMessage() for record in caplog.records if record.name == COMPILER]
    assert [ADVICE in message for message in given] == ([False] if silent else [True, False])
    assert given[-1] == "something else"
