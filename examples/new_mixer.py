"""A new mixer, trained without touching longmix: python examples/new_mixer.py [WORD=VALUE...]."""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

import longmix
from longmix.mixers import Mixer, MixerOutput, ModelShape


class Fading(Mixer):
    """y_t = W m_t with m_t = a m_{t-1} + (1 - a) x_t: a mean that forgets, at a rate of its own in each channel.

    For rows of one document; docs/add_a_mixer.md has a mixer that keeps documents apart.
    """

    def __init__(self, shape: ModelShape, layer_index: int, *, tokens: float = 8.0) -> None:
        super().__init__()
        self.output = nn.Linear(shape.d_model, shape.d_model, bias=False)
        self.log_tokens = nn.Parameter(torch.full((shape.d_model,), tokens).log())

    def forward(self, x: Tensor, *, state: Tensor | None = None, document_ids: Tensor | None = None) -> MixerOutput:
        """See `Mixer.forward`."""
        keep = torch.exp(-torch.exp(-self.log_tokens))
        mean, means = self.init_state(len(x)) if state is None else state, []
        for token in x.unbind(1):
            mean = keep * mean + (1 - keep) * token
            means.append(mean)
        return MixerOutput(self.output(torch.stack(means, 1)), None if state is None else mean)

    def init_state(self, batch: int) -> Tensor:
        """The mean [B, D] before the first token."""
        return self.log_tokens.new_zeros(batch, len(self.log_tokens))

    def state_bytes(self, length: int) -> int:
        """One vector, however long the row."""
        return len(self.log_tokens) * self.log_tokens.element_size()

    def flops(self, length: int) -> int:
        """The matrix, whose multiply-adds count twice, and the mean."""
        return length * (2 * self.output.weight.numel() + 4 * len(self.log_tokens))


if __name__ == "__main__":
    words = dict(word.split("=", 1) for word in sys.argv[1:])
    own = {"mixer": {"_target_": "new_mixer.Fading", "tokens": 4.0}, "data": "parity", "logger": "none"}
    with TemporaryDirectory() as folder:
        run = longmix.train({**own, "seq_len": 32, "max_steps": 50, **words}, folder=Path(folder) / "fading")
        print(f"recall {run.summary['validation']['recall']:.3f}")
        print(longmix.load(run.folder, trust=["new_mixer.Fading"]))
