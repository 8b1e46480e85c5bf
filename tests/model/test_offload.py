"""Offloading on a CPU that stands for a GPU: copies run as late as they may, and too late where nobody waits."""

import weakref
from functools import partial
from typing import Any

import pytest
import torch

from longmix.mixers.gated_deltanet import GatedDeltaNet
from longmix.mixers.rwkv7 import RWKV7
from longmix.mixers.sliding_window import SlidingWindow
from longmix.model import backbone, offload
from longmix.model.backbone import LanguageModel
from longmix.model.offload import Offload
from longmix.model.rwkv_blocks import RWKVBlocks

SIZES = {"d_model": 32, "num_layers": 3, "num_heads": 2, "mlp_hidden": 48}


def bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


class Copy:
    """A copy that somebody has to wait for."""

    def __init__(self, run) -> None:
        self.run, self.done = run, False

    def end(self) -> None:
        if not self.done:
            self.run()
        self.done = True


class LateLane:
    """Copies when it must. What was not waited for is NaN; what was given up before its copy ended is an error."""

    def __init__(self) -> None:
        self.copies: list[Copy] = []
        self.sent = self.fetched = 0
        self.on_device = self.most = 0

    def send(self, storage: torch.UntypedStorage) -> tuple[torch.Tensor, Copy]:
        host = torch.full((storage.nbytes(),), 255, dtype=torch.uint8)
        self.sent += storage.nbytes()
        known = weakref.ref(storage)

        def run() -> None:
            there = known()
            assert there is not None, "the memory was given up before it was copied"
            host.copy_(bytes_of(there))

        return host, self._begun(run)

    def fetch(self, sent: torch.Tensor, there: Copy) -> tuple[torch.UntypedStorage, Copy]:
        here = torch.full_like(sent, 255)
        self.fetched += sent.nbytes
        self._count(sent.nbytes)
        weakref.finalize(here.untyped_storage(), self._count, -sent.nbytes)
        storage = here.untyped_storage()
        known = weakref.ref(storage)

        def run() -> None:
            there.end()
            place = known()
            assert place is not None, "the memory was given to others while it was written"
            bytes_of(place).copy_(sent)

        return storage, self._begun(run)

    def _begun(self, run) -> Copy:
        self.copies.append(Copy(run))
        return self.copies[-1]

    def _count(self, change: int) -> None:
        self.on_device += change
        self.most = max(self.most, self.on_device)

    def wait(self, done: Copy) -> None:
        while self.copies and not done.done:  # copies of one stream end in their order
            self.copies.pop(0).end()


def mixed(shape, index):
    return GatedDeltaNet(shape, index) if index % 2 else SlidingWindow(shape, index, window=7)


def model(kind: Any = mixed, **options) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(kind, 50, **SIZES, **options)


TOKENS = torch.randint(50, (2, 32), generator=torch.Generator().manual_seed(1))
IDS = (torch.arange(32) >= 13).int().expand(2, -1).contiguous()


def gradients(net: LanguageModel, passes: int = 1) -> dict[str, torch.Tensor]:
    loss = net(TOKENS, TOKENS, document_ids=IDS).token_losses.mean()
    for number in range(passes):
        loss.backward(retain_graph=number < passes - 1)
    return {name: weight.grad for name, weight in net.named_parameters()}


@pytest.fixture
def lane(monkeypatch) -> LateLane:
    made = LateLane()
    monkeypatch.setattr(backbone, "lane_of", lambda device: made)
    monkeypatch.setattr(offload.Offload.__init__, "__defaults__", (1024,))
    return made


@pytest.mark.parametrize(("name", "checkpointing"), [("mixed", "none"), ("mixed", "selective"), ("rwkv7", "block")])
def test_gradients_are_the_same_to_the_bit(lane, name, checkpointing):
    kind, style = {"mixed": (mixed, None), "rwkv7": (partial(RWKV7, head_dim=16), RWKVBlocks())}[name]
    wanted = gradients(model(kind, block=style))
    assert lane.sent == 0
    found = gradients(model(kind, block=style, activation_checkpointing=checkpointing, activation_offload=True))
    for weight, gradient in wanted.items():
        assert torch.equal(found[weight], gradient), weight
    assert lane.sent == lane.fetched > 0 and lane.on_device == 0
    if checkpointing != "none":
        assert lane.sent == 2 * TOKENS.numel() * 32 * 4  # the input of each layer but the last
        assert lane.most == 2 * TOKENS.numel() * 32 * 4  # one in use, one on its way


def test_a_retained_graph_is_read_twice(lane):
    wanted = gradients(model(), passes=2)
    found = gradients(model(activation_offload=True), passes=2)
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())
    assert lane.fetched == 2 * lane.sent and lane.on_device == 0


def test_a_storage_travels_once_and_weights_stay(lane):
    weight = torch.nn.Linear(600, 600, bias=False)
    x = torch.randn(700, 600, requires_grad=True)
    shared = torch.randn(700, 600)
    made = Offload(lane, 2, 1024)
    with made.layer(0, weight, [shared]):
        y = x.sin() + x.view(600, 700).cos().view(700, 600) + weight(x * shared) + weight.weight.bfloat16().sum()
    with made.layer(1, weight, None):
        (y.exp().sum() + y.square().sum()).backward()
    assert lane.sent == x.nbytes + 700 * 600 * 4  # x, and its product with what is shared
    assert made._group is not None and not made._group._leaving


def test_evaluation_sends_nothing(lane):
    with torch.no_grad():
        model(activation_offload=True)(TOKENS, TOKENS)
    assert lane.sent == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_test_sees_a_missing_wait(lane, monkeypatch):
    monkeypatch.setattr(offload._Group, "let_go", lambda group: group._leaving.clear())
    with pytest.raises(AssertionError, match="given up before it was copied"):
        gradients(model(activation_offload=True))


def test_a_cuda_lane_orders_its_copies(monkeypatch):
    """What waits for what, as torch.cuda would be told it."""
    told: list[tuple] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: "Stream") -> None:
            told.append((self.name, "after", other.name))

        def wait_event(self, event: str) -> None:
            told.append((self.name, "after", event))

        def record_event(self) -> str:
            told.append((self.name, "noted"))
            return f"event of {self.name}"

        def __enter__(self) -> None:
            told.append((self.name, "copies"))

        def __exit__(self, *_: object) -> None:
            pass

    names = iter(["away", "back"])
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(next(names)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    plain = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, pin_memory=False, **options: plain(*sizes, **options))
    lane = offload.CudaLane(torch.device("cpu"))
    x = torch.arange(5.0)
    sent, there = lane.send(x.untyped_storage())
    storage, here = lane.fetch(sent, there)
    lane.wait(here)
    assert told == [
        ("away", "after", "main"),
        ("away", "copies"),
        ("away", "noted"),
        ("back", "after", "main"),
        ("back", "after", "event of away"),
        ("back", "copies"),
        ("back", "noted"),
        ("main", "after", "event of back"),
    ]
    assert torch.equal(torch.empty(0).set_(storage), x)
    assert offload.lane_of(torch.device("cpu")) is None
