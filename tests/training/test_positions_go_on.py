"""Positions of a document that windows cut: they begin anew in each part, or with `data.positions_go_on` go on."""

import numpy as np
import pytest
import torch

from longmix.checkpoints import load_checkpoint
from longmix.config import TrainConfig, read
from longmix.data.loaders import collate
from longmix.data.packing import Packing
from longmix.errors import ConfigError
from longmix.model.build import check_model
from longmix.training.positions import check_positions


class Tokens:
    """A token file of three documents, whose tokens say their place in the document."""

    lengths = (7, 30, 11)
    tokens = np.concatenate([np.arange(length) for length in lengths]).astype(np.uint16)
    offsets = np.cumsum([0, *lengths])
    shards = (48,)
    num_tokens, num_documents, separator_id = 48, 3, 99


@pytest.mark.parametrize("packing, most", [("stream", None), ("best_fit", None), ("stream", 9), ("aligned", 9)])
def test_a_token_knows_how_much_of_its_document_came_before(packing, most):
    windows = Packing(packing, most, positions_go_on=True).windows(Tokens(), 8, seed=3)
    batch = collate([windows.sample(index) for index in range(windows.windows_per_epoch)], positions_go_on=True)
    ids, before = batch["document_ids"].numpy(), batch["positions_before"].numpy()
    starts = np.stack([np.searchsorted(row, row) for row in ids])
    real = batch["tokens"].numpy() != Tokens.separator_id
    positions = before + np.arange(8) - starts
    assert (positions == batch["tokens"].numpy())[real].all()
    assert before.max() > 0
    assert "positions_before" not in collate([windows.sample(0)])


def test_a_cut_document_has_the_angles_of_the_whole(small_model):
    """NoPE layers see no difference; rotary ones that of positions moved within rows, which full attention forgets."""
    model = small_model("flash", "mixer.rotary_fraction=0.5")
    tokens = torch.randint(0, 20, (2, 12))
    before = torch.tensor([[0] * 12, [0] * 4 + [5] * 8], dtype=torch.int32)
    ids = torch.tensor([[0] * 12, [0] * 4 + [1] * 8], dtype=torch.int32)
    (layout, *_), (plain, *_) = (model._layouts(tokens, None, ids, None, moved) for moved in (before, None))
    assert torch.equal(layout.positions, plain.positions)
    assert torch.equal(layout.first_row, plain.first_row)
    assert torch.equal(layout.cosine[0], plain.cosine[0])
    long = model._layouts(torch.zeros(1, 40, dtype=torch.int64), None, None, None, None)[0]
    assert torch.equal(layout.cosine[1, 4:], long.cosine[0, 5:13])
    found, wanted = (model(tokens, document_ids=ids, positions_before=moved).hidden for moved in (before, None))
    torch.testing.assert_close(found, wanted)  # rotations say only how far tokens of a document are apart


WORDS = ["seq_len=64", "data.positions_go_on=true", "mixer=flash"]


@pytest.mark.parametrize(
    "words, says",
    [
        (["loop.carry_state=true", "data.order=contiguous"], "states carry the positions"),
        (["mixer=rwkv7", "model.d_model=64"], "RWKV7 has no rotary positions"),
        (["mixer.rotary_base=null"], "Flash has no rotary positions"),
    ],
)
def test_it_is_refused_where_it_changes_nothing(words, says, compose_config):
    config = read(TrainConfig, compose_config(*WORDS, *words))
    model = check_model(config)
    with pytest.raises(ConfigError, match=rf"data\.positions_go_on=true.*{says}"):
        check_positions(model, config, 1)


@pytest.mark.parametrize("words", [{"document_mask": False}, {"packing": "aligned"}])
def test_packings_without_parts_of_documents_refuse_it(words):
    with pytest.raises(ConfigError, match=rf"data\.positions_go_on=true .*data\.{next(iter(words))}="):
        Packing(**words, positions_go_on=True)


def test_a_run_trains_with_it_and_resumes(run_training, tiny_overrides):
    words = [*tiny_overrides, *WORDS, "max_steps=4", "loop.checkpoint_every=2", "loop.keep_checkpoints=9"]
    run = run_training(*words, "data.packing=best_fit")
    again = run_training(*words, "data.packing=best_fit", f"resume={run / 'checkpoints/step-00000002'}")
    one, other = (load_checkpoint(each / "checkpoints/step-00000004")["model"] for each in (run, again))
    assert all(torch.equal(other[name], weight) for name, weight in one.items())
