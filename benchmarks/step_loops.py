"""The training loops that `benchmarks.step` compares longmix with: plain PyTorch, and Hugging Face's Trainer.

`python -m benchmarks.step_loops NAME --settings FILE` takes the steps that a file of `benchmarks.step` describes, and
writes the seconds of each lap. A process of its own takes the steps of each loop, as for longmix itself.
"""

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.decode_providers import exported
from longmix.composing import composed
from longmix.config import ModelConfig
from longmix.model.backbone import LanguageModel
from longmix.model.build import build_model
from longmix.training.schedules import WarmupCosine

PLAIN, TRAINER = "plain PyTorch", "transformers Trainer"


@dataclass(frozen=True)
class Settings:
    """What all loops have in common.

    Attributes:
        words: of the model and the optimizer, as `train.py` takes them.
        seq_len, batch_size: of a step.
        steps: in all; a multiple of `lap`.
        lap: steps after which the loss is read and the time is noted.
    """

    words: tuple[str, ...]
    seq_len: int
    batch_size: int
    steps: int
    lap: int

    @property
    def content(self) -> dict[str, Any]:
        """The configuration that the words give."""
        return composed("train", self.words).content

    def model(self, vocabulary: int) -> tuple[LanguageModel, ModelConfig]:
        """The model with its first weights, and its configuration."""
        torch.manual_seed(0)
        config = ModelConfig.of(self.content)
        return build_model(config, vocabulary), config

    def batches(self, tokens: Tensor) -> Iterator[Tensor]:
        """Rows int64 [B, T + 1] from random places of the text."""
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.steps):
            places = torch.randint(len(tokens) - self.seq_len, (self.batch_size,), generator=generator)
            yield torch.stack([tokens[place : place + self.seq_len + 1] for place in places]).long()


class Layer(nn.Module):
    """A layer of the plain model: attention and SwiGLU behind norms."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.mixer_norm, self.mlp_norm = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        square: dict[str, nn.Module] = {
            name: nn.Linear(width, width, bias=False) for name in ("query", "key", "value", "output")
        }
        norms = {name: nn.RMSNorm(width // heads, eps=1e-6) for name in ("query_norm", "key_norm")}
        self.mixer = nn.ModuleDict(square | norms)
        wide = {name: nn.Linear(width, hidden, bias=False) for name in ("gate", "up")}
        self.mlp = nn.ModuleDict(wide | {"down": nn.Linear(hidden, width, bias=False)})

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The layer's output for x [B, T, D], turned by cos and sin [T, d]."""
        normed, mixer = self.mixer_norm(x), self.mixer
        query, key, value = (mixer[name](normed).unflatten(-1, (self.heads, -1)) for name in ("query", "key", "value"))
        query, key = (turned(mixer[f"{n}_norm"](y), cos, sin) for n, y in (("query", query), ("key", key)))
        query, key, value = (y.transpose(1, 2) for y in (query, key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)
        x = x + mixer["output"](mixed)
        normed = self.mlp_norm(x)
        return x + self.mlp["down"](F.silu(self.mlp["gate"](normed)) * self.mlp["up"](normed))


class PlainModel(nn.Module):
    """The model of `mixer=flash` as one would write it by hand; parameters have the same names."""

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Layer(width, heads, hidden) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width, eps=1e-6), nn.Linear(width, vocabulary, bias=False)
        self.head_dim = width // heads

    @classmethod
    def of(cls, model: LanguageModel, config: ModelConfig) -> "PlainModel":
        """With the weights of a model of longmix."""
        sizes = cast(Mapping[str, int], config.model.settings)
        width, layers, heads, hidden = (sizes[name] for name in ("d_model", "num_layers", "num_heads", "mlp_hidden"))
        plain = cls(model.embedding.num_embeddings, width, layers, heads, hidden)
        plain.load_state_dict(model.state_dict())
        return plain.to(model.head.weight.dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """The mean loss of predicting each token of int64 [B, T + 1] from those before it."""
        x = self.embedding(tokens[:, :-1])
        rates = 10000.0 ** (-torch.arange(0, self.head_dim, 2) / self.head_dim)
        angles = (torch.arange(x.shape[1])[:, None] * rates).repeat(1, 2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), tokens[:, 1:].flatten())


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions of x [B, T, H, d]."""
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


class Both(torch.optim.Optimizer):
    """Several optimizers as one, for loops that take one."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers
        super().__init__([{"params": group["params"]} for each in optimizers for group in each.param_groups], {})
        self.param_groups = [group for each in optimizers for group in each.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take a step of each."""
        for each in self.optimizers:
            each.step(closure)


def optimizer_of(model: nn.Module, content: dict[str, Any]) -> torch.optim.Optimizer:
    """torch's fused AdamW for all parameters, or its Muon for hidden matrices and AdamW for the rest."""
    own = dict(content["optimizer"])
    target, betas = own["_target_"].rpartition(".")[2], tuple(own["betas"])
    if target == "adamw":
        rates = {"lr": own["learning_rate"], "weight_decay": own["weight_decay"]}
        return torch.optim.AdamW(model.parameters(), betas=betas, eps=own["eps"], fused=True, **rates)
    hidden = {id(w): w for n, w in model.named_parameters() if w.ndim == 2 and "embed" not in n and "head" not in n}
    others = [w for w in model.parameters() if id(w) not in hidden]
    matrices = torch.optim.Muon(
        list(hidden.values()),
        lr=own["learning_rate"],
        weight_decay=own["weight_decay"],
        momentum=own["momentum"],
        adjust_lr_fn="match_rms_adamw",
    )
    rest = torch.optim.AdamW(others, lr=own["adamw_learning_rate"], betas=betas, eps=own["eps"], fused=True)
    return Both([matrices, rest])


def plain_laps(settings: Settings, tokens: Tensor) -> list[float]:
    """Seconds of each lap of the plain loop."""
    content = settings.content
    model = PlainModel.of(*settings.model(int(tokens.max()) + 1))
    optimizer, schedule = optimizer_of(model, content), WarmupCosine()
    peaks, laps, began = [group["lr"] for group in optimizer.param_groups], [], time.perf_counter()
    for step, rows in enumerate(settings.batches(tokens)):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * schedule(step, settings.steps)
        loss = model(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % settings.lap == 0:
            if not math.isfinite(loss.item()):
                raise RuntimeError(f"the loss of step {step + 1} is not finite")
            laps.append(time.perf_counter() - began)
            began = time.perf_counter()
    return laps


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The same batches, row by row, as the Trainer takes them."""

    def __init__(self, settings: Settings, tokens: Tensor) -> None:
        self.rows = [row[:-1] for row in itertools.chain.from_iterable(settings.batches(tokens))]

    def __len__(self) -> int:
        """Rows of all steps."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """A row; the Trainer's model moves the labels by one token itself."""
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def trainer_laps(settings: Settings, tokens: Tensor, folder: Path) -> list[float]:
    """Seconds of each lap of the Trainer on the exported model."""
    from transformers import Trainer, TrainerCallback, TrainingArguments, get_cosine_schedule_with_warmup

    ends: list[float] = []

    class Noted(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if state.global_step % settings.lap == 0:
                ends.append(time.perf_counter())

    model = exported(*settings.model(int(tokens.max()) + 1)).train()
    optimizer = optimizer_of(model, settings.content)
    warmup = round(0.05 * settings.steps)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch_size,
        max_steps=settings.steps,
        logging_steps=settings.lap,
        max_grad_norm=1.0,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, settings.steps)
    trainer = Trainer(
        model, arguments, train_dataset=Rows(settings, tokens), optimizers=(optimizer, schedule), callbacks=[Noted()]
    )
    began = time.perf_counter()
    trainer.train()
    return [end - begin for begin, end in itertools.pairwise([began, *ends])]


def main() -> None:
    """Take the steps of one loop."""
    parser = argparse.ArgumentParser(description="Take the steps of one loop that benchmarks.step compares.")
    parser.add_argument("loop", choices=("plain", "trainer"))
    parser.add_argument("--settings", type=Path, required=True, help="file that benchmarks.step wrote")
    options = parser.parse_args()
    given = json.loads(options.settings.read_text())
    tokens = torch.load(given.pop("tokens"), weights_only=True)
    settings = Settings(**given | {"words": tuple(given["words"])})
    folder = options.settings.parent
    laps = plain_laps(settings, tokens) if options.loop == "plain" else trainer_laps(settings, tokens, folder)
    (folder / f"{options.loop}.json").write_text(json.dumps(laps))


if __name__ == "__main__":
    main()
