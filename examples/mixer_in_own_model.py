"""A mixer of longmix inside somebody's own model: full passes for training, and one token at a time with a state."""

import torch
from torch import Tensor, nn

from longmix.mixers import MLSTMTFLA, Mixer, ModelShape


class OwnModel(nn.Module):
    """An embedding, two mixers with residual connections, and a head."""

    def __init__(self, vocab_size: int = 64, d_model: int = 64) -> None:
        super().__init__()
        shape = ModelShape(d_model, num_layers=2, num_heads=2)
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.mixers = nn.ModuleList(MLSTMTFLA(shape, index) for index in range(2))
        self.head = nn.Linear(d_model, vocab_size)

    def forward(self, tokens: Tensor, states: list | None = None) -> tuple[Tensor, list]:
        """Scores [B, T, V] of tokens int64 [B, T]; with states they go on after the tokens before."""
        x, after = self.embedding(tokens), []
        for index, mixer in enumerate(self.mixers):
            mixed = mixer(x, state=None if states is None else states[index])
            x = x + mixed.y
            after.append(mixed.state)
        return self.head(x), after


if __name__ == "__main__":
    torch.manual_seed(0)
    model = OwnModel()
    tokens = torch.randint(64, (2, 33))
    scores, _ = model(tokens[:, :-1])
    loss = nn.functional.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    print(f"loss {loss.item():.3f} nats")

    states = [mixer.init_state(2) for mixer in model.mixers if isinstance(mixer, Mixer)]
    steps = []
    for position in range(32):
        step, states = model(tokens[:, position : position + 1], states)
        steps.append(step)
    print(f"largest difference to decoding {(torch.cat(steps, 1) - scores).abs().max().item():.1e}")
