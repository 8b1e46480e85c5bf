import pytest
import torch
import torch.nn.functional as F

from longmix.model import head
from longmix_kernels.runtime import assumed_device


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 11, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(13, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    targets = torch.randint(13, (3, 11), generator=generator)
    targets[0, :4] = head.IGNORE_INDEX
    return hidden, weight, targets


@pytest.mark.parametrize("slice_elements", [1, 13, 40, 13 * 33, 1 << 20])
def test_losses_and_gradients_equal_the_plain_ones(problem, slice_elements, monkeypatch):
    monkeypatch.setattr(head, "SLICE_ELEMENTS", slice_elements)
    hidden, weight, targets = problem
    upstream = torch.randn(3, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = head.token_losses(hidden, weight, targets)
    plain = F.cross_entropy((hidden @ weight.T).transpose(1, 2), targets, reduction="none")
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-13)
    assert (ours[0, :4] == 0).all()
    grads = torch.autograd.grad((ours * upstream).sum(), (hidden, weight))
    expected = torch.autograd.grad((plain * upstream).sum(), (hidden, weight))
    torch.testing.assert_close(grads, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kept", [0, 2, 33])
@pytest.mark.parametrize("slice_elements", [13, 1 << 20])
def test_without_logits_of_ignored_targets_all_is_the_same(problem, kept, slice_elements, monkeypatch):
    monkeypatch.setattr(head, "SLICE_ELEMENTS", slice_elements)
    hidden, weight, targets = problem
    targets.view(-1)[kept:] = head.IGNORE_INDEX
    generator = torch.Generator().manual_seed(1)
    taught = torch.randn(3, 11, 8, dtype=torch.float64, generator=generator)
    soft = head.SoftTargets(taught, torch.randn(13, 8, dtype=torch.float64, generator=generator), None, 2.0)
    found = []
    for skip in (True, False):
        asked = {"with_normalisers": True, "with_hits": True, "soft": soft}
        part = head.scored(hidden, weight, targets, 3.0, **asked, skip_ignored=skip)
        columns = part.losses, part.log_normalisers, part.divergences
        total = sum((column * (number + 1)).sum() for number, column in enumerate(columns))
        found.append((*columns, *torch.autograd.grad(total, (hidden, weight))))
        assert part.hits.dtype == torch.bool
        assert torch.equal(part.hits, (hidden @ weight.T).argmax(-1) == targets)
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch before 2.13")
def test_losses_equal_torchs_own_operator(problem):
    hidden, weight, targets = problem
    options = torch.nn.LinearCrossEntropyOptions()
    theirs = F.linear_cross_entropy(hidden.flatten(0, 1), weight, targets.flatten(), reduction="none", options=options)
    torch.testing.assert_close(head.token_losses(hidden, weight, targets).flatten(), theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("slice_elements", [40, 1 << 20])
def test_peaks_are_the_largest_logits_and_their_gradient_is_theirs(problem, slice_elements, monkeypatch):
    monkeypatch.setattr(head, "SLICE_ELEMENTS", slice_elements)
    hidden, weight, targets = problem
    found = head.scored(hidden, weight, targets, with_peaks=True)
    losses, peaks = found.losses, found.peaks
    largest = (hidden @ weight.T).amax(-1)
    torch.testing.assert_close(peaks, largest, rtol=0, atol=1e-13)
    torch.testing.assert_close(losses, head.token_losses(hidden, weight, targets), rtol=0, atol=1e-13)
    grads = torch.autograd.grad(peaks.square().mean() + losses.sum(), (hidden, weight))
    plain = F.cross_entropy((hidden @ weight.T).transpose(1, 2), targets, reduction="none")
    expected = torch.autograd.grad(largest.square().mean() + plain.sum(), (hidden, weight))
    torch.testing.assert_close(grads, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 2.5])
@pytest.mark.parametrize("with_peaks", [False, True])
@pytest.mark.parametrize("slice_elements", [40, 1 << 20])
def test_normalisers_and_capped_logits_and_their_gradients(problem, slice_elements, with_peaks, softcap, monkeypatch):
    monkeypatch.setattr(head, "SLICE_ELEMENTS", slice_elements)
    hidden, weight, targets = problem
    logits = hidden @ weight.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    assert softcap is None or (hidden @ weight.T).abs().max() > 2 * softcap  # far within the curve
    valid = targets != head.IGNORE_INDEX
    plain = {
        "losses": F.cross_entropy(logits.transpose(1, 2), targets, reduction="none"),
        "log_normalisers": torch.where(valid, logits.logsumexp(-1), 0.0),
        **({"peaks": logits.amax(-1)} if with_peaks else {}),
    }
    found = head.scored(hidden, weight, targets, softcap, with_peaks=with_peaks, with_normalisers=True)
    together, expected = 0, 0
    for number, (name, values) in enumerate(plain.items(), 1):
        torch.testing.assert_close(getattr(found, name), values, rtol=0, atol=1e-13)
        together = together + number * getattr(found, name).square().sum()
        expected = expected + number * values.square().sum()
    grads = [torch.autograd.grad(total, (hidden, weight)) for total in (together, expected)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(head.token_losses(hidden, weight, targets, softcap), plain["losses"], rtol=0, atol=1e-13)


SLICES = [  # tokens, vocabulary, device, slices
    (2 * 16384, 50_304, "cuda", 13),
    (2 * 16384, 50_304, "cpu", 99),
    (2 * 16384, 8_192, "cuda", 2),
    (65_536, 128_256, "cuda", 63),
    (4_096, 256, "cpu", 1),
    (3, 1 << 30, "cuda", 3),
]


@pytest.mark.parametrize(("tokens", "vocabulary", "device", "slices"), SLICES)
def test_slices_are_as_large_as_the_device_likes(tokens, vocabulary, device, slices, monkeypatch):
    hidden, weight = torch.empty(1, tokens, 1, device="meta"), torch.empty(vocabulary, 1, device="meta")
    rows = []

    def losses(piece, *_):
        rows.append(piece.shape[0])
        return [piece[:, 0]]

    monkeypatch.setattr(head, "_slice_losses", losses)
    with assumed_device(device):
        head.token_losses(hidden, weight, torch.empty(1, tokens, dtype=torch.int64, device="meta"))
    assert len(rows) == slices and sum(rows) == tokens


def test_no_tensor_as_large_as_the_logits_is_made(monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return result

    monkeypatch.setattr(head, "SLICE_ELEMENTS", 1 << 14)
    hidden, weight = torch.randn(1, 4096, 16, requires_grad=True), torch.randn(512, 16, requires_grad=True)
    targets = torch.randint(512, (1, 4096))
    with Largest() as largest:
        head.token_losses(hidden, weight, targets).sum().backward()
    assert largest.elements == 4096 * 16  # the hidden states; the logits would be 4096 * 512


def test_bf16_losses_are_formed_in_float32():
    hidden, weight = torch.randn(1, 6, 8).bfloat16(), torch.randn(20, 8).bfloat16()
    assert head.token_losses(hidden, weight, torch.zeros(1, 6, dtype=torch.int64)).dtype == torch.float32
