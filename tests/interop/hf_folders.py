"""Small models as Hugging Face folders, and what tests ask of them."""

from pathlib import Path

import torch

from longmix.checkpoints import find_checkpoint, load_checkpoint
from longmix.data.tokens.tokenizers import ByteTokenizer

SMALL = ("model.d_model=64", "model.num_layers=2", "model.num_heads=4", "model.mlp_hidden=40", "seq_len=48")
NO_NORM = "mixer.qk_norm=false"


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(257, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(model, ids: torch.Tensor) -> torch.Tensor:
    return model.logits(model(ids).hidden)


def loaded(folder: Path, **options):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def foreign(folder: Path, kind: str = "Llama", tokenizer=None, **settings):
    """A small model as transformers draws it, saved with a tokenizer."""
    import transformers

    from longmix.interop.huggingface.tokenizer import huggingface_tokenizer

    torch.manual_seed(2)
    sizes = {"vocab_size": 272, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32}
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **heads, **settings})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.15 * torch.randn_like(weight))
    model.save_pretrained(folder)
    huggingface_tokenizer(tokenizer or ByteTokenizer()).save_pretrained(folder)
    return model


def same_weights(checkpoint: Path, model) -> bool:
    found, own = load_checkpoint(find_checkpoint(checkpoint))["model"], model.state_dict()
    return found.keys() == own.keys() and all(
        torch.equal(found[name], own[name]) and found[name].dtype == own[name].dtype for name in own
    )
