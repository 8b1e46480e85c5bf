"""The nodes of the training command that are classes of their own, such as `loop` and `match`.

`longmix.config.commands` says what such classes are for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from longmix.config.rules import (
    COUNT,
    LENGTHS,
    Rule,
    above,
    above_zero,
    at_least,
    inside_share,
    share,
    word,
)

SOME_RECALL = Rule(lambda value: 0 < value <= 1, "must be above 0 and at most 1, or null to take all steps.")

NO_TASK = Rule(
    lambda items: all(isinstance(item, str) or (isinstance(item, Mapping) and "task" in item) for item in items),
    "is no list of tasks; write it like '[needle,{task:loss,seq_len:4096}]'.",
)


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Settings of the training loop that are the same on every machine.

    Attributes:
        gradient_clip: largest allowed norm of the whole gradient; null never clips.
        log_every: steps between log rows.
        validate_every: steps between validations; null validates at the end only.
        checkpoint_every: steps between checkpoints; null saves at the end only.
        keep_checkpoints: how many checkpoints stay beside the best one.
        sharded_checkpoints: each process writes what it has; false: the first all of it to one file; null: with fsdp.
        async_checkpoints: write while training goes on, which waits for a copy in CPU memory only.
        z_loss: weight of the mean over tokens of log(Z)**2, Z being the sum of a token's exponential logits; 1e-4 in
            PaLM (arXiv 2204.02311). It is logged apart, and no loss that is reported has it.
        ema_decay: keep the exponential moving average of the weights too, of which a step keeps this share, such as
            0.999; null keeps none. Validation measures it beside, weights=ema takes it.
        stop_at_recall: of synthetic tasks: the run ends after a validation with at least this recall, such as 0.99;
            null takes all steps. The schedule goes by all steps, wherever the run ends.
        nonfinite: what a non-finite loss or gradient does: "stop" the run, or "skip" that step and count it.
        max_skips: the run stops all the same when so many steps in a row were skipped.
        spike_sigma: a loss or gradient norm so many standard deviations above the mean of the last steps is a spike, 6
            in OLMo; null looks for none.
        spike_window: how many last steps that are; the first spike may come when half of them are there.
        spike_action: what a spike does: "skip" its step and count it, or "stop" the run.
        carry_state: begin each window from the state that its row's last one ended with; takes data.order=contiguous.
        profile: a step, or a list of them, whose time is told by class of operation, with a trace; see docs/profile.md.
        tasks: tasks of evaluate.py that validations run too and log as task/NAME/...; each a name, or a dict with its
            settings such as {task:needle,seq_len:[512],needles:4}. See docs/training.md.
        tasks_every: validations between these; the last validation always has them.
    """

    gradient_clip: float | None = word(1.0, above_zero(null="never clip"))
    log_every: int = word(10, at_least(1))
    validate_every: int | None = word(200, at_least(1))
    checkpoint_every: int | None = word(200, at_least(1))
    keep_checkpoints: int = word(2, at_least(1))
    sharded_checkpoints: bool | None = None
    async_checkpoints: bool = False
    z_loss: float = word(0.0, at_least(0))
    ema_decay: float | None = word(None, inside_share(null="keep none"))
    stop_at_recall: float | None = word(None, SOME_RECALL)
    nonfinite: Literal["stop", "skip"] = "stop"
    max_skips: int = word(20, at_least(1))
    spike_sigma: float | None = word(None, above_zero(null="look for no spikes"))
    spike_window: int = word(128, at_least(2))
    spike_action: Literal["skip", "stop"] = "skip"
    carry_state: bool = False
    profile: int | list[int] | None = word(None, LENGTHS, misfit=LENGTHS.says)
    tasks: list[Any] = word([], NO_TASK, misfit=NO_TASK.says)
    tasks_every: int = word(1, at_least(1))


@dataclass(frozen=True, kw_only=True)
class TaskWords:
    """The words of an item of `loop.tasks` besides the settings of its task.

    Attributes:
        name: in the log; null is that of the task.
        seq_len: context length, or a list of them; null takes the one in training.
        max_tokens: evenly spread windows of about so many tokens; null takes as many as a validation.
        stride: see `EvaluateConfig`.
        split: train, validation or test.
        batch_size: windows at once; null takes about 16k tokens.
    """

    name: str | None = None
    seq_len: int | list[int] | None = word(None, LENGTHS, misfit=LENGTHS.says)
    max_tokens: int | None = word(None, COUNT)
    stride: int | None = word(None, COUNT)
    split: str = "validation"
    batch_size: int | None = word(None, COUNT)


@dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """What `trainable=states` trains besides the states; see `longmix.mixers.parts.state_tuning`.

    Attributes:
        features: size of a memory that each head reads through kernel features; 0 for none.
        decorrelation: how fast these features are made uncorrelated; 0 leaves them.
    """

    features: int = word(0, at_least(0))
    decorrelation: float = word(0.0, at_least(0))


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """Attention adversarial training (arXiv 2009.12064); see `longmix.training.adversarial`.

    Attributes:
        xi: length of the change of a head's scores in a document, the worst one to first order; null trains without.
        layers: numbers of the layers whose scores change, from 0, such as [0,3]; null takes all with softmax attention.
        every: steps from one with a second pass, under that change, to the next.
        weight: of the loss under that change.
    """

    xi: float | None = word(None, above_zero(null="train without attacks"))
    layers: list[int] | None = None
    every: int = word(1, at_least(1))
    weight: float = word(1.0, above(0))


@dataclass(frozen=True, kw_only=True)
class DistilConfig:
    """How objective=logits learns from the teacher's distributions; see docs/distillation.md.

    Attributes:
        temperature: the logits of teacher and student are divided by it. Beyond 100 the divergence would drown in
            float32's rounding, which its square magnifies.
        hard_share: weight of the loss on the text's own tokens; the divergence from the teacher has the rest.
    """

    temperature: float = word(1.0, Rule(lambda value: 0.01 <= value <= 100, "must lie between 0.01 and 100."))
    hard_share: float = word(0.0, share())


@dataclass(frozen=True, kw_only=True)
class MatchConfig:
    """Models of equal size whatever the mixer; see `longmix.model.matching`.

    Attributes:
        parameters: of the whole model; `model.mlp_hidden` is chosen to come nearest. null leaves it.
        tolerance: largest relative difference that is accepted.
        multiple: `model.mlp_hidden` is a multiple of it.
    """

    parameters: int | None = word(None, at_least(1))
    tolerance: float = word(0.02, share())
    multiple: int = word(8, at_least(1))
