"""The model that a converted one learns from."""

from pathlib import Path

from longmix.checkpoints.contents import load_model_state
from longmix.checkpoints.verify import weights_digest
from longmix.config import TrainConfig
from longmix.errors import CheckpointError
from longmix.model.backbone import LanguageModel
from longmix.model.build import model_from_checkpoint


def teacher_of(config: TrainConfig) -> LanguageModel:
    """The model of the checkpoint that a run began from, without gradients."""
    assert config.origin is not None
    folder = Path(config.origin.checkpoint)
    if not folder.is_dir() or weights_digest(folder) != config.origin.weights:
        raise CheckpointError(f"the teacher in {folder} is gone or has changed.")
    return model_from_checkpoint(load_model_state(folder)).eval().requires_grad_(False)
