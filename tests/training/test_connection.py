import pytest
import torch.distributed as dist

from longmix.distributed.ranks import Ranks
from longmix.errors import ProcessLost
from longmix.training import connection

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] "
LOST = {
    "closed": (RuntimeError(GLOO + "Connection closed by peer [127.0.0.1]:1. GLHF!"), "another process is gone"),
    "reset": (RuntimeError(GLOO + "Read error [::1]:1: Connection reset by peer. This"), "another process is gone"),
    "silent": (RuntimeError(GLOO + "Timed out waiting 8000ms for recv operation to complete"), "trainer.timeout=8 sec"),
    "refused": (RuntimeError(GLOO + "timed out connecting: Connection refused"), "another process is gone"),
    "meeting": (dist.DistStoreError("wait timeout after 8000ms, keys: /store_based_barrier"), "trainer.timeout=8 sec"),
    "nccl": (dist.DistBackendError("NCCL communicator was aborted on rank 1."), "another process is gone"),
    "group": (dist.DistNetworkError("Connection reset by peer"), "another process is gone (Connection reset by peer)"),
}
OWN = [
    dist.DistNetworkError("The server socket has failed to listen on any local network address. EADDRINUSE"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    RuntimeError("DataLoader timed out after 5 seconds"),
    RuntimeError("ProcessGroupGloo does not support alltoall"),
    ValueError(GLOO + "Connection closed by peer"),
]


@pytest.fixture(autouse=True)
def ranks(monkeypatch):
    monkeypatch.setattr(connection, "own_ranks", lambda: Ranks(1, 2, 1, 2, "torchrun"))


@pytest.mark.parametrize(("error", "what"), LOST.values(), ids=LOST)
def test_what_a_transport_raises_becomes_one_message(error, what, tmp_path):
    (tmp_path / "checkpoints/step-00000003").mkdir(parents=True)
    with pytest.raises(ProcessLost) as raised, connection.losses_explained(8, tmp_path):
        raise error
    text = str(raised.value)
    assert text.startswith("process 1 of 2: another process")
    assert what in text
    assert "third_party" not in text
    assert text.endswith(
        "checkpoints/step-00000003; run the same command with resume=auto to continue. With other settings, such as a "
        f"lower optimizer.learning_rate, it goes on with resume={tmp_path}."
    )


def test_it_is_found_below_what_it_led_to():
    with pytest.raises(ProcessLost, match="Connection closed by peer"), connection.losses_explained(8):
        try:
            raise LOST["closed"][0]
        except RuntimeError:
            raise RuntimeError("teardown failed")  # noqa: B904, as code that cleans up does


@pytest.mark.parametrize("error", OWN, ids=str)
def test_other_errors_stay_as_they_are(error):
    with pytest.raises(type(error)) as raised, connection.losses_explained(8):
        raise error
    assert raised.value is error


def test_one_process_explains_nothing(monkeypatch):
    monkeypatch.setattr(connection, "own_ranks", lambda: None)
    with pytest.raises(RuntimeError, match="closed by peer"), connection.losses_explained(8):
        raise LOST["closed"][0]
