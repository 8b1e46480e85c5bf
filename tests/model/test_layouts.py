"""What documents fix for all layers is made once and changes no bit; packed ones reach FlashAttention on a GPU."""

import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch._dynamo as dynamo
from small_mixers import small_mixer
from torch._dynamo.utils import counters
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode

from longmix.config import ModelConfig, resolved
from longmix.data.loaders import document_starts
from longmix.mixers import flash
from longmix.mixers.flash import Flash
from longmix.mixers.parts.layout import LayoutNeeds, layouts
from longmix.mixers.parts.rotary import Rotary
from longmix.mixers.sliding_window import SlidingWindow
from longmix.model import backbone
from longmix.model.backbone import LanguageModel
from longmix.model.build import build_model
from longmix_kernels.attention import packed, row_bounds
from longmix_kernels.runtime import assumed_device

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels/attention"))
from varlen_stand_in import VarlenStandIn

FILES = sorted(path.stem for path in (Path(__file__).parents[2] / "configs/mixer").glob("*.yaml"))
SMALL = ("model.num_layers=2", "model.d_model=32", "model.num_heads=2", "model.mlp_hidden=16")
VOCABULARY = 47


def ids_of(*rows: tuple[int, ...]) -> torch.Tensor:
    """Documents of these lengths."""
    return torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)).int() for row in rows])


def starts_of(ids: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(document_starts(ids.numpy()))


def outputs(model: LanguageModel, tokens: torch.Tensor, ids: torch.Tensor | None, **options) -> list[torch.Tensor]:
    """Losses and all gradients."""
    model.zero_grad()
    output = model(tokens, tokens, document_ids=ids, **options)
    (output.token_losses.mean() + sum(output.losses.values())).backward()
    return [output.token_losses.detach(), *(x.grad.clone() for x in model.parameters() if x.grad is not None)]


PACKED = ids_of((20, 1, 43), (64,), (16, 32, 16))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("ids", [None, PACKED], ids=["plain", "packed"])
@pytest.mark.parametrize("name", FILES)
def test_layers_that_share_a_layout_compute_what_each_computes_alone(name, ids, compose_config, monkeypatch):
    node = resolved(compose_config(f"mixer={name}", *SMALL))
    node["mixer"] = small_mixer(node["mixer"], 16)
    torch.manual_seed(0)
    model = build_model(ModelConfig.of(node), VOCABULARY).eval()
    tokens = torch.randint(VOCABULARY, (3, 64), generator=torch.Generator().manual_seed(0))
    shared = outputs(model, tokens, ids)
    monkeypatch.setattr(LanguageModel, "_layouts", lambda self, *_: [None] * len(self.blocks))
    for one, other in zip(shared, outputs(model, tokens, ids), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("window", [None, 1, 7, 500])
def test_first_keys_are_those_of_the_bounds(window):
    need = LayoutNeeds(Rotary(10_000.0, 8), window)
    made = layouts({need}, torch.zeros(3, 64), PACKED)[need]
    wanted, _ = row_bounds(64, 64, window=window, document_ids=PACKED)
    assert torch.equal(made.first_key, wanted) and made.first_key.dtype == torch.int32


def test_starts_are_those_of_all_rows():
    need = LayoutNeeds(Rotary(10_000.0, 8))
    starts = layouts({need}, torch.zeros(3, 64), PACKED, starts_of(PACKED))[need].starts
    assert starts.dtype == torch.int32
    assert starts.tolist() == [0, 20, 21, 64, 64, 128, 128, 128, 128, 144, 176, 192, 192]


class Counted(TorchDispatchMode):
    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names, self.found, self.kinds = names, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name.removeprefix("aten::") in self.names:
            self.found += 1
            self.kinds.add(args[0].dtype)
        return function(*args, **(kwargs or {}))


def flash_model(layers: int, kind: type = Flash, **options) -> LanguageModel:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "num_heads": 2, "mlp_hidden": 16}
    return LanguageModel(lambda shape, index: kind(shape, index, **options), VOCABULARY, num_layers=layers, **sizes)


@pytest.mark.parametrize("kind", [Flash, SlidingWindow])
def test_positions_and_angles_are_made_once_whatever_the_number_of_layers(kind):
    tokens = torch.zeros(3, 64, dtype=torch.int64)
    counts = []
    for layers in (1, 4):
        with Counted("sin", "cos", "searchsorted.Tensor", "searchsorted") as mode, torch.no_grad():
            flash_model(layers, kind)(tokens, document_ids=PACKED)
        counts.append(mode.found)
    assert counts == [3, 3]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("mixer", ["sparse_flash", "sparse_flash_drop", "hyper", "routing", "scatterbrain_content"])
@pytest.mark.parametrize("ids", [None, PACKED], ids=["plain", "packed"])
def test_nothing_wider_than_16_bits_is_sorted(mixer, ids, compose_config):
    node = resolved(compose_config(f"mixer={mixer}", *SMALL))
    node["mixer"] = small_mixer(node["mixer"], 16)
    model = build_model(ModelConfig.of(node), VOCABULARY)
    with Counted("sort") as sorts, torch.no_grad():
        model(torch.zeros(3, 64, dtype=torch.int64), document_ids=ids)
    assert sorts.found >= 2 and max(kind.itemsize for kind in sorts.kinds) <= 2


class Older(Flash):
    """A subclass whose `forward` has no `layout`."""

    def forward(self, x, *, state=None, document_ids=None):
        return super().forward(x, state=state, document_ids=document_ids)


def test_a_subclass_may_do_without_a_layout():
    tokens = torch.zeros(3, 64, dtype=torch.int64)
    for one, other in zip(*(outputs(flash_model(2, kind), tokens, PACKED) for kind in (Older, Flash)), strict=True):
        assert torch.equal(one, other)


def test_rows_of_one_document_take_the_plain_path_where_that_costs_no_wait(monkeypatch):
    model, given = flash_model(1), []

    def layouts(needs, tokens, ids, *_):
        given.append(ids)
        raise InterruptedError

    monkeypatch.setattr(backbone, "layouts", layouts)
    one = torch.full((2, 8), 5, dtype=torch.int32)
    for ids in (None, one, torch.tensor([[0] * 8, [0] * 7 + [1]], dtype=torch.int32)):
        with pytest.raises(InterruptedError):
            model(torch.zeros(2, 8, dtype=torch.int64), document_ids=ids)
    assert given[:2] == [None, None] and given[2] is not None


@pytest.fixture
def gpu(monkeypatch):
    """Calls as a GPU would get them, computed here by a stand-in."""
    made = VarlenStandIn()
    monkeypatch.setattr(varlen, "varlen_attn", made)
    with assumed_device("cuda"):
        yield made


def cpu_kernels() -> VarlenStandIn:
    """Give torch's operator kernels for the CPU, which has none; what they are called with."""
    made = VarlenStandIn()

    def forward(query, key, value, starts, other_starts, longest, other_longest, causal=False, scale=None, *_):
        output = made(query, key, value, starts, other_starts, longest, other_longest, scale=scale)
        return output, query.new_zeros(query.shape[1], len(query), dtype=torch.float32), torch.zeros(2).to(torch.uint64)

    def backward(
        grad, query, key, value, output, logsumexp, starts, other_starts, longest, other, causal, rng, scale, *_
    ):
        gradients = [torch.zeros_like(x) for x in (query, key, value)]
        for begin, end in pairwise(starts.tolist()):
            rows = slice(begin, end)
            q, k, v, grad_rows = (x[rows].float().transpose(0, 1) for x in (query, key, value, grad))
            factor = q.shape[-1] ** -0.5 if scale is None else scale
            later = torch.ones(end - begin, end - begin, dtype=torch.bool).triu(1)
            weights = (factor * q @ k.mT).masked_fill(later, -torch.inf).softmax(-1)
            of_weights = grad_rows @ v.mT
            of_scores = factor * weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True))
            for made, part in zip(gradients, (of_scores @ k, of_scores.mT @ q, weights.mT @ grad_rows), strict=True):
                made[rows] = part.transpose(0, 1)
        return tuple(gradients)

    varlen._varlen_attn.register_kernel("cpu")(forward)
    varlen._varlen_attn_backward.register_kernel("cpu")(backward)
    return made


LONG = ids_of((300, 212), (512,), (100, 156, 256))


@pytest.mark.parametrize("checkpointing", ["none", "block"])
def test_flash_hands_packed_documents_to_flash_attention(gpu, checkpointing):
    model = flash_model(2, num_kv_heads=1).bfloat16()
    model.activation_checkpointing = checkpointing
    tokens = torch.randint(VOCABULARY, LONG.shape, generator=torch.Generator().manual_seed(0))
    ours = outputs(model, tokens, LONG, document_starts=starts_of(LONG))
    assert len(gpu.calls) == (4 if checkpointing == "block" else 2)
    assert all(torch.equal(call["starts"], gpu.calls[0]["starts"]) for call in gpu.calls)
    assert gpu.calls[0]["starts"].unique().tolist() == [0, 300, 512, 1024, 1124, 1280, 1536]
    gpu.calls.clear()
    with assumed_device("cpu"):
        exact = outputs(model.double(), tokens, LONG, document_starts=starts_of(LONG))
    assert not gpu.calls
    for one, other in zip(ours, exact, strict=True):
        assert (one.double() - other).norm() < 0.05 * other.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_keep_the_engine(gpu, dtype, monkeypatch):
    given = []
    monkeypatch.setattr(flash, "attention", lambda query, key, value, **bounds: given.append(bounds) or value)
    tokens = torch.zeros(LONG.shape, dtype=torch.int64)
    outputs(flash_model(1).to(dtype), tokens, LONG, document_starts=starts_of(LONG))
    assert not gpu.calls
    assert list(given[0]) == ["lo"] and torch.equal(given[0]["lo"], row_bounds(512, 512, document_ids=LONG)[0])


def test_autocast_takes_flash_attention(gpu):
    with torch.autocast("cpu", torch.bfloat16):
        outputs(flash_model(1), torch.zeros(LONG.shape, dtype=torch.int64), LONG, document_starts=starts_of(LONG))
    assert len(gpu.calls) == 1


@pytest.mark.sampled(2)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_blocks_share_one_graph_whatever_the_number_of_documents(backend, monkeypatch):
    """The operator of torch itself, whose kernels for the CPU are made here."""
    monkeypatch.setattr(sys.modules[packed.__module__], "ROWS_PER_SEQUENCE", 16)
    stand_in = cpu_kernels()
    dynamo.reset()
    counters.clear()
    model = flash_model(3, num_heads=1).bfloat16()
    tokens = torch.zeros(1, 512, dtype=torch.int64)
    some = (ids_of((300, 212)), ids_of((1, 500, 11)), ids_of((512,)))  # rows without a boundary among them
    with assumed_device("cuda"):
        wanted = [outputs(model, tokens, ids, document_starts=starts_of(ids)) for ids in some]
        for block in model.blocks:
            block.compile(backend=backend)
        assert len(stand_in.calls) == 9
        for ids, expected in zip(some, wanted, strict=True):
            for one, other in zip(outputs(model, tokens, ids, document_starts=starts_of(ids)), expected, strict=True):
                assert torch.equal(one, other)
        assert len(stand_in.calls) == 18
        assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
        many = ids_of((*[16] * 32,))
        outputs(model, tokens, many, document_starts=starts_of(many))
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    dynamo.reset()
