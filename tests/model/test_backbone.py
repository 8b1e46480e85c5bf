import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from longmix.batch import IGNORE_INDEX
from longmix.errors import ConfigError
from longmix.mixers.flash import Flash
from longmix.mixers.sliding_window import SlidingWindow
from longmix.model.backbone import LanguageModel
from longmix.recipe import recipe_of

SIZES = {"d_model": 32, "num_layers": 3, "num_heads": 2, "mlp_hidden": 48}


def hybrid(shape, index):
    return SlidingWindow(shape, index, window=5) if index % 2 == 0 else Flash(shape, index, num_kv_heads=1)


def model(**changes) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(hybrid, 50, **{**SIZES, **changes}).double()


def tokens(length: int = 40) -> torch.Tensor:
    return torch.randint(50, (2, length), generator=torch.Generator().manual_seed(3))


def test_the_whole_model_is_causal_bit_for_bit():
    net, first = model(), tokens()
    before = net.logits(net(first).hidden)
    for cut in range(0, 39, 6):
        changed = first.clone()
        changed[:, cut + 1 :] = (changed[:, cut + 1 :] + 7) % 50
        after = net.logits(net(changed).hidden)
        assert torch.equal(after[:, : cut + 1], before[:, : cut + 1])
        assert not torch.equal(after[:, cut + 1 :], before[:, cut + 1 :])


def test_documents_do_not_see_each_other():
    net, packed = model(), tokens()
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor([11, 1, 28])).expand(2, -1).int()
    together = net(packed, document_ids=ids).hidden
    for document in range(3):
        place = ids[0] == document
        torch.testing.assert_close(together[:, place], net(packed[:, place]).hidden, rtol=0, atol=1e-12)


def test_prefill_and_decode_equal_one_pass_in_a_hybrid_stack():
    net, first = model(), tokens()
    state, pieces, start = net.init_state(2), [], 0
    for length in (7, 1, 1, 20, 1, 10):
        output = net(first[:, start : start + length], state=state)
        state, start = output.state, start + length
        pieces.append(output.hidden)
    torch.testing.assert_close(torch.cat(pieces, dim=1), net(first).hidden, rtol=0, atol=1e-12)
    assert net.state_bytes(40) == sum((s.mixer.key.nbytes + s.mixer.value.nbytes) // 2 for s in state)


def test_activation_checkpointing_changes_no_gradient():
    gradients = []
    for choice in ("none", "block", "selective"):
        net = model(activation_checkpointing=choice)
        net(tokens(), tokens()).token_losses.mean().backward()
        gradients.append({name: weight.grad for name, weight in net.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
        assert torch.equal(gradient, gradients[2][name]), name


@pytest.mark.parametrize("tied", [False, True])
def test_parameter_count_is_exact(tied):
    net = model(tie_head=tied)
    mixers = [2 * 32 * 32 + 2 * 32 * 32 + 2 * 16, 32 * 32 * 2 + 2 * 32 * 16 + 2 * 16] * 2
    expected = sum(mixers[:3]) + 3 * (3 * 32 * 48 + 2 * 32) + 32 + 50 * 32 * (1 if tied else 2)
    counts = net.parameter_counts()
    assert counts == {"total": expected, "embedding": 1600, "non_embedding": expected - 1600}


def test_flop_count_equals_the_counted_matrix_products():
    net = LanguageModel(Flash, 50, **SIZES)
    with FlopCounterMode(display=False) as counter:
        net(tokens(), tokens())
    counted = counter.get_flop_counts()["Global"]
    dense = sum(count for operator, count in counted.items() if "scaled_dot_product" not in str(operator)) // 2
    attention = 3 * 4 * 32 * (40 * 41 // 2)
    assert net.flops(40) == dense + attention


def test_head_and_embedding_take_no_decay_and_no_matrix_optimizer():
    net = model()
    for table in (net.embedding.weight, net.head.weight):
        assert recipe_of(table).role == "embedding"
        assert not recipe_of(table).weight_decay
    assert recipe_of(net.blocks[0].mlp.up.weight).role == "matrix"
    assert recipe_of(net.norm.weight).role == "scalar"
    assert not recipe_of(net.norm.weight).weight_decay


def test_the_penalty_pulls_at_the_largest_logits_in_training_alone():
    """RWKV's: 1e-4 / (B T) times the largest logit is added to that logit's gradient."""
    net, plain, first = model(logit_penalty=1e-4), model(), tokens()
    output, without = net(first, first), plain(first, first)
    assert torch.equal(output.token_losses, without.token_losses) and not without.losses
    logits = plain.logits(without.hidden).detach().requires_grad_()
    peaks, places = logits.max(-1, keepdim=True)
    added = torch.zeros_like(logits).scatter(-1, places, 1e-4 / first.numel() * peaks)
    (found,) = torch.autograd.grad(output.losses["logit_penalty"], net.head.weight)
    torch.testing.assert_close(found, added.flatten(0, 1).T @ without.hidden.flatten(0, 1), rtol=0, atol=1e-15)
    assert not net.eval()(first, first).losses


@pytest.mark.parametrize("key", SIZES)
def test_sizes_below_one_are_refused_by_name(key):
    with pytest.raises(ConfigError, match=f"model.{key}=0"):
        model(**{key: 0})


@pytest.mark.slow
def test_compiled_model_equals_the_eager_one():
    net, first = model().float(), tokens()
    ids = torch.repeat_interleave(torch.arange(2), torch.tensor([15, 25])).expand(2, -1).int()
    expected = net(first, first, document_ids=ids).token_losses
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(first, first, document_ids=ids).token_losses, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_hits_come_from_the_logits_of_the_losses(training):
    net, first = model().train(training), tokens()
    targets = torch.where(torch.rand(first.shape) < 0.3, first, IGNORE_INDEX)
    searches = []
    for net.measures_hits in (False, True):
        with torch.autograd.profiler.profile() as profile:
            output = net(first, targets)
        searches.append(sum(event.name == "aten::nonzero" for event in profile.function_events))
    assert searches[1] == searches[0] + 1  # a search for the targets that count, which waits for a GPU
    likeliest = net.logits(output.hidden).argmax(-1)
    assert torch.equal(output.hits, likeliest == targets)
