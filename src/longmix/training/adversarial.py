"""Attention adversarial training: some steps have a second pass, under the worst small change of attention scores.

    loss = L(r = 0) + weight * L(r = xi g / |g|)            see `longmix.model.adversarial` for g

The gradient g comes with the backward pass that every step has, so that an attacked step costs twice a usual one. It is
that of all that is trained, auxiliary losses included. Dropout draws anew in the second pass.
"""

from dataclasses import dataclass

from longmix.config import TrainConfig
from longmix.errors import ConfigError
from longmix.model.adversarial import Adversary, attacked_mixers
from longmix.model.backbone import LanguageModel
from longmix.training.hardware import TrainerSettings


@dataclass(frozen=True)
class AttackedSteps:
    """Which steps have an attack, and what it counts.

    Attributes:
        adversary: finds the attack.
        every: steps from one to the next; which step it is decides, so that a run that goes on attacks the same steps.
        weight: of the loss under attack.
    """

    adversary: Adversary
    every: int
    weight: float

    def are_due(self, step: int) -> bool:
        """Whether a step, counted from 1, has an attack."""
        return step % self.every == 0


def attacked_steps(config: TrainConfig, model: LanguageModel) -> AttackedSteps | None:
    """The attacks that `adversarial` asks for; None for none.

    Raises:
        ConfigError: see `attacked_mixers`.
    """
    words = config.adversarial
    if words.xi is None:
        return None
    named = f"adversarial.xi={words.xi:g}" if words.layers is None else "adversarial.layers"
    mixers = attacked_mixers(model, words.layers, named)
    return AttackedSteps(Adversary(mixers, words.xi), words.every, words.weight)


def check_adversarial(config: TrainConfig, model: LanguageModel, settings: TrainerSettings) -> None:
    """Refuse attacks that have no meaning in this run.

    Args:
        config, settings: of the run.
        model: it may be without memory.

    Raises:
        ConfigError: naming the words.
    """
    words = config.adversarial
    if words.xi is None:
        given = {"layers": words.layers is not None, "every": words.every != 1, "weight": words.weight != 1.0}
        for name in (name for name, is_given in given.items() if is_given):
            raise ConfigError(f"adversarial.{name} has no effect without adversarial.xi, the size of the attack.")
        return
    attacked_steps(config, model)
    reasons = {
        "trainer.compile=true": (settings.compiles, "a compiled block would be compiled anew for every attack"),
        f"trainer.context_parallel={settings.slices}": (
            settings.slices > 1,
            "the length of an attack is that of a whole document, of which a process has a slice",
        ),
        "loop.carry_state=true": (
            config.loop.carry_state,
            "keys that a window leaves to the next would keep the column of the attack",
        ),
    }
    for other, (is_given, reason) in reasons.items():
        if is_given:
            raise ConfigError(f"adversarial.xi={words.xi:g} cannot be had with {other}: {reason}; leave one out.")
