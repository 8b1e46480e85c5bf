"""The model that another one learns from."""

from pathlib import Path

from longmix.checkpoints.contents import load_model_state
from longmix.checkpoints.verify import weights_digest
from longmix.config import TrainConfig
from longmix.errors import CheckpointError
from longmix.model.backbone import LanguageModel
from longmix.model.build import model_from_checkpoint


def teacher_of(config: TrainConfig) -> LanguageModel:
    """The model of the checkpoint that a run began from: in evaluation, without gradients.

    Args:
        config: of a run with `checkpoint`, whose `origin` says what that meant when the run began.

    Raises:
        CheckpointError: the checkpoint is gone, is damaged, or has other weights by now.
    """
    if config.origin is None:
        raise CheckpointError(f"the teacher that checkpoint={config.checkpoint} meant when the run began is not known.")
    folder = Path(config.origin.checkpoint)
    if not folder.is_dir():
        raise CheckpointError(f"the teacher in {folder} is gone; a run that still learns from it needs it there.")
    if weights_digest(folder) != config.origin.weights:
        raise CheckpointError(f"the teacher in {folder} has other weights than when the run began; restore them.")
    return model_from_checkpoint(load_model_state(folder)).eval().requires_grad_(False)
