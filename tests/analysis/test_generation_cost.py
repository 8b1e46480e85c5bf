"""What a generation costs, against sums of single steps and against exact sums for models of published sizes."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from longmix.analysis.cost_model import step_cost
from longmix.analysis.generation_cost import break_even, coverage, generation_cost, samples_for
from longmix.config import ModelConfig
from longmix.errors import ConfigError
from longmix.mixers.parts.projections import weight_count
from longmix.model.build import build_model

KINETICS = json.loads((Path(__file__).parents[1] / "fixtures/inference_side/kinetics.json").read_text())
"""Costs of dense attention and of budgets, summed step by step, in numbers of cached elements; from Kinetics' sizes."""


@dataclass(frozen=True)
class Budget:
    """At most `most` tokens of a layer, `token_bytes` each; each sample chooses its own."""

    most: int
    token_bytes: int

    def bytes(self, length: int) -> int:
        return min(length, self.most) * self.token_bytes

    def step_bytes(self, length: int) -> int:
        return self.seen_keys(length) * self.token_bytes

    def seen_keys(self, length: int) -> int:
        return min(length + 1, self.most)


@dataclass(frozen=True)
class Packed:
    """Every token in a quarter of the bytes; the prompt's are read once for all samples."""

    token_bytes: int

    def bytes(self, length: int) -> int:
        return length * self.token_bytes // 4

    def step_bytes(self, length: int) -> int:
        return self.bytes(length + 1)

    def shared_bytes(self, prompt: int, steps: int) -> int:
        return steps * self.bytes(prompt)


def sized(case: dict) -> torch.nn.Module:
    """A model without memory, in bfloat16, whose attention has the sizes of a case: heads of 128 channels."""
    dim = 128
    layers, heads = case["head_dim_times_layers"] // dim, case["query_heads"]
    options = {"num_heads": heads, "num_kv_heads": case["kv_heads"]}
    sizes = {"d_model": heads * dim, "num_layers": layers, "num_heads": heads, "mlp_hidden": 256}
    mixer = {"_target_": "longmix.mixers.flash.Flash", **options}
    model = {"_target_": "longmix.model.backbone.LanguageModel", **sizes}
    with torch.device("meta"):
        return build_model(ModelConfig.of({"mixer": mixer, "model": model}), 100).to(torch.bfloat16)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("case", KINETICS["cost"], ids=lambda case: f"{case['context']}-{case['samples']}")
def test_costs_of_published_sizes(case):
    model, exact = sized(case), case["exact_sums"]
    prompt, new, samples = case["context"], case["generated"], case["samples"]
    shared = generation_cost(model, prompt, new, samples)
    alone = generation_cost(model, prompt, new, samples, shared_prompt=False)
    products = 2 * case["parameters"] * new * samples  # the published count of weights is not of this model
    assert shared.mixing_flops == alone.mixing_flops == exact["dense_flops"] - products
    assert shared.state_bytes == 2 * exact["dense_kv_elements_prefix_shared"]
    assert alone.state_bytes == 2 * exact["dense_kv_elements_unshared"]
    assert shared.parameter_flops == 2 * weight_count(model.modules()) * new * samples
    own_tokens = alone.held_bytes - shared.held_bytes
    element = 2 * 2 * case["kv_heads"] * case["head_dim_times_layers"]
    assert own_tokens == (samples - 1) * prompt * element and alone.held_bytes == samples * (prompt + new) * element

    token_bytes = 2 * 2 * case["kv_heads"] * 128
    chosen = generation_cost(model, prompt, new, samples, Budget(case["budget"], token_bytes))
    assert chosen.mixing_flops == exact["topk_flops"] - products
    assert chosen.state_bytes == 2 * exact["topk_kv_elements"]
    blocks = Budget(case["block"] * case["block_topk"] + case["local"], token_bytes)
    selected = generation_cost(model, prompt, new, 1, blocks)
    assert selected.state_bytes == exact["block_selected"] * element


@pytest.mark.sampled(3)
@pytest.mark.parametrize("case", KINETICS["cost"], ids=lambda case: f"{case['context']}-{case['samples']}")
def test_what_kinetics_integrates_lacks_half_a_token_each_step(case):
    samples, new = case["samples"], case["generated"]
    cost = generation_cost(sized(case), case["context"], new, samples)
    width = case["head_dim_times_layers"]
    arithmetic, memory = (1e12 * number for number in case["authors"]["dense"])
    missing = 2 * new * width * case["query_heads"], 2 * new * width * case["kv_heads"]
    products = 2 * case["parameters"] * new * samples
    assert cost.mixing_flops + products == pytest.approx(arithmetic + samples * missing[0], rel=1e-12)
    assert case["intensity"] * cost.state_bytes == pytest.approx(
        memory + case["intensity"] * samples * missing[1], rel=1e-12
    )


@pytest.mark.parametrize("name", ["flash", "sliding_window", "rwkv7", "sliding_window+mlstm_tfla", "nsa"])
def test_a_generation_is_the_sum_of_its_steps(small_model, name):
    model, prompt, new = small_model(name, dtype=torch.bfloat16), 37, 53
    steps = [step_cost(model, context, batch=4) for context in range(prompt, prompt + new)]
    cost = generation_cost(model, prompt, new, batch=4)
    for field in ("parameter_flops", "mixing_flops", "weight_bytes", "state_bytes"):
        assert getattr(cost, field) == sum(getattr(step, field) for step in steps), field
    assert cost.held_bytes == model.state_bytes(prompt + new)
    assert cost.total(7) == pytest.approx(sum(step.total(7) for step in steps), rel=1e-12)


def test_samples_share_weights_and_the_prompt_but_no_state(small_model):
    model = small_model("flash+rwkv7", dtype=torch.bfloat16)
    one, many = (generation_cost(model, 40, 9, samples) for samples in (1, 5))
    assert many.parameter_flops == 5 * one.parameter_flops and many.mixing_flops == 5 * one.mixing_flops
    assert many.weight_bytes == one.weight_bytes
    prompt = 40 * 2 * 64 * 2  # keys and values of the one layer of flash
    assert many.state_bytes == 5 * one.state_bytes - 4 * 9 * prompt
    assert many.held_bytes == 5 * one.held_bytes - 4 * prompt
    assert generation_cost(model, 40, 9, 5, shared_prompt=False).held_bytes == 5 * one.held_bytes


@pytest.mark.parametrize("new", [3, 20])
def test_samples_hold_once_what_is_left_of_the_prompt_in_a_window(small_model, new):
    model, window = small_model("sliding_window", "mixer.window=8", dtype=torch.bfloat16), 8
    one, many = (generation_cost(model, 40, new, samples) for samples in (1, 5))
    left, row = max(0, window - 1 - new), 2 * 2 * 64 * 2  # in two layers
    assert one.held_bytes == (window - 1) * row
    assert many.held_bytes == 5 * one.held_bytes - 4 * left * row
    read = sum(max(0, window - 1 - step) for step in range(new))
    assert many.state_bytes == 5 * one.state_bytes - 4 * read * row


def test_caches_stand_in_for_layers_of_flash(small_model):
    model = small_model("flash+rwkv7", dtype=torch.bfloat16)
    plain, packed = (generation_cost(model, 40, 9, 5, cache) for cache in (None, Packed(2 * 64 * 2)))
    flash = 5 * 256 * sum(41 + step for step in range(9)) - 4 * 9 * 40 * 256
    assert plain.state_bytes - packed.state_bytes == flash * 3 / 4
    assert packed.mixing_flops == plain.mixing_flops
    with pytest.raises(ConfigError, match=r"no layer takes a cache.*RWKV7"):
        generation_cost(small_model("rwkv7"), 40, 9, cache=Packed(8))


def test_a_budget_that_is_never_reached_is_the_whole_cache(small_model):
    model = small_model("flash", "mixer.num_kv_heads=2", dtype=torch.bfloat16)
    whole = generation_cost(model, 40, 9, 3, shared_prompt=False)
    assert generation_cost(model, 40, 9, 3, Budget(49, 2 * 32 * 2)) == whole
    smaller = generation_cost(model, 40, 9, 3, Budget(48, 2 * 32 * 2))
    pairs = 2 * 4 * 2 * 16 * 3  # of one key less in the last step, in 2 layers of 4 heads of 16 channels, 3 samples
    assert whole.mixing_flops - smaller.mixing_flops == 2 * pairs
    assert whole.state_bytes - smaller.state_bytes == 2 * 3 * 2 * 32 * 2


def test_the_context_from_which_something_is_cheaper_is_exact():
    asked = []

    def at_least(context: int) -> bool:
        asked.append(context)
        return context >= 5000

    assert break_even([1024, 4096, 8192], at_least) == 5000 and len(asked) < 20
    assert break_even([5000, 8192], at_least) == 5000 and break_even([8192], at_least) == 5000
    assert break_even([1024, 4096], at_least) is None
    assert break_even([1024, 4096], lambda context: True) == 1
    assert break_even([1024, 4096], lambda context: context < 2000) is None


def test_a_window_beats_all_keys_from_its_own_length_on(small_model):
    models = [small_model(*words) for words in (("sliding_window", "mixer.window=8"), ("flash",))]

    def cheaper(context: int) -> bool:
        window, every = (generation_cost(model, context, 3).total(1.0) for model in models)
        return window < every

    assert break_even([2, 1024], cheaper) == 6  # whose last step is the first to see 9 keys


@pytest.mark.parametrize("case", KINETICS["coverage"])
def test_coverage_of_published_scores(case):
    right, attempts = sum(case["scores"]), len(case["scores"])
    for samples, wanted in zip(case["samples"], case["coverage"], strict=True):
        assert coverage([right], attempts, samples) == pytest.approx(wanted, abs=1e-12)
        fewest = samples_for([right], attempts, wanted - 1e-12)
        assert coverage([right], attempts, fewest) == pytest.approx(wanted, abs=1e-12)
        assert fewest == 1 or coverage([right], attempts, fewest - 1) < wanted - 1e-6


def test_coverage_is_the_mean_over_questions():
    assert coverage([0, 8, 2], 8, 1) == pytest.approx((0 + 1 + 1 / 4) / 3, abs=1e-15)
    assert samples_for([0, 8], 8, 0.5) == 1 and samples_for([0, 8], 8, 0.51) is None
    for arguments in (([], 8, 1), ([9], 8, 1), ([-1], 8, 1), ([1], 8, 9), ([1], 8, 0)):
        with pytest.raises(ValueError, match="attempts"):
            coverage(*arguments)
