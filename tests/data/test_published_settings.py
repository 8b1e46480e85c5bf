"""`experiment=mqar_zoology` and its arms are what Zoology's configuration of figure 2 says."""

import pytest

from longmix.config import TrainConfig, build, course_of, read, resolved
from longmix.data.tokens.tokenizers import ByteTokenizer
from longmix.training.run import check_config
from longmix.training.schedules import schedule_of

ARMS = {
    "mqar_zoology": (64, 4),
    "mqar_zoology_128": (128, 8),
    "mqar_zoology_256": (256, 16),
    "mqar_zoology_512": (512, 64),
}
BATCH = {64: 512, 128: 512, 256: 256, 512: 128}
EPOCHS, EXAMPLES, TEST_EXAMPLES = 64, 100_000, 3_000


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_has_the_published_data_and_budget(compose_config, name):
    length, pairs = ARMS[name]
    composed = compose_config(f"experiment={name}", "mixer=flash")
    config = read(TrainConfig, composed)
    assert (config.seq_len, config.batch_size, config.max_tokens) == (length, BATCH[length], None)
    assert course_of(config).total_steps * config.batch_size == EPOCHS * EXAMPLES
    assert config.loop.validate_every == EXAMPLES // config.batch_size
    assert (config.loop.stop_at_recall, config.loop.gradient_clip) == (0.99, None)
    node = resolved(composed)
    data = build(node["data"], "data", tokenizer=ByteTokenizer(), seq_len=length, batch_size=BATCH[length], seed=0)
    assert len(data.train_windows) == EXAMPLES
    assert len(data.evaluation_windows("validation", length, data.validation_tokens)) == TEST_EXAMPLES
    task = data.task
    assert (task.vocabulary, task.pairs, task.power, task.random_non_queries) == (8192, pairs, 0.01, False)
    model, optimizer = node["model"], node["optimizer"]
    assert (model["num_layers"], model["num_heads"], model["tie_head"], model["embedding_dropout"]) == (2, 1, True, 0.1)
    assert optimizer["_target_"].endswith(".adamw") and optimizer["betas"] == [0.9, 0.999]
    assert optimizer["weight_decay"] == 0.1
    schedule, steps = schedule_of(course_of(config)), course_of(config).total_steps
    assert schedule(0, steps) == 1 and schedule(steps - 1, steps) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("mixer", ["flash", "rwkv7", "gated_deltanet", "mlstm_tfla"])
def test_mixers_fit_into_it(compose_config, mixer):
    words = [] if mixer in ("flash", "rwkv7") else ["mixer.num_heads=1", "mixer.key_factor=1"]
    check_config(read(TrainConfig, compose_config("experiment=mqar_zoology", f"mixer={mixer}", *words)))
