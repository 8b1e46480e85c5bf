"""`data.positions_go_on`: where it has a meaning."""

from longmix.config import TrainConfig
from longmix.errors import ConfigError
from longmix.mixers.parts.layout import needs_of
from longmix.model.backbone import LanguageModel


def check_positions(model: LanguageModel, config: TrainConfig, context_parallel: int) -> None:
    """Refuse `data.positions_go_on=true` where it would change nothing, or states carry positions already.

    Args:
        model: it may be without memory.
        config: that of a run, or of one of its stages.
        context_parallel: processes that share a row.

    Raises:
        ConfigError: naming the words.
    """
    if not config.data.settings.get("positions_go_on"):
        return
    if config.loop.carry_state:
        raise ConfigError(
            "data.positions_go_on=true with loop.carry_state=true: states carry the positions of a document that goes "
            "on already. Leave data.positions_go_on out."
        )
    rotating = [mixer for mixer in model.mixers() if (need := needs_of(mixer)) is not None and need.rotary is not None]
    names = ", ".join(dict.fromkeys(type(mixer).__name__ for mixer in model.mixers()))
    if not rotating:
        raise ConfigError(f"data.positions_go_on=true changes nothing: {names} has no rotary positions.")
    whole = [type(mixer).__name__ for mixer in rotating if not mixer.sliced]
    if context_parallel > 1 and whole:
        raise ConfigError(
            f"data.positions_go_on=true: {whole[0]} mixes whole rows with trainer.context_parallel={context_parallel}, "
            "and would begin its positions anew; leave one of them out, or set `sliced` in it."
        )
