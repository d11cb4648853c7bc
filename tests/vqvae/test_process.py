"""The process that trains: device, seeds, process group."""

import pytest
import torch

from data.config import ConfigError
from vqvae.training.config import LoopConfig, TrainingError
from vqvae.training.process import TrainingProcess, distributed, rank, world_size


def test_cuda_is_asked_for_in_vain(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TrainingError, match="device=cuda"), TrainingProcess(LoopConfig(device="cuda")):
        pass
    with TrainingProcess(LoopConfig(device="auto")) as process:
        assert process.device == torch.device("cpu")


def test_the_seed_decides_the_random_numbers():
    drawn = []
    for seed in (3, 3, 4):
        with TrainingProcess(LoopConfig(seed=seed, device="cpu")):
            drawn.append(float(torch.rand(())))
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_process_alone_joins_no_group():
    with TrainingProcess(LoopConfig(device="cpu")):
        assert (distributed(), rank(), world_size()) == (False, 0, 1)


def test_torchruns_group_is_left_on_errors_too(monkeypatch, unused_tcp_port):
    addresses = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(unused_tcp_port)}
    for name, value in addresses.items():
        monkeypatch.setenv(name, value)

    def fail() -> None:
        with TrainingProcess(LoopConfig(device="cpu")):
            assert (distributed(), rank(), world_size()) == (True, 0, 1)
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert not distributed()


def test_a_batch_that_cannot_be_shared_out(monkeypatch):
    with pytest.raises(ConfigError, match="batch_size=8 is not a multiple of accumulate x processes = 3"):
        TrainingProcess(LoopConfig(batch_size=8, accumulate=3)).__enter__()
    monkeypatch.setattr("vqvae.training.process.world_size", lambda: 3)
    with pytest.raises(ConfigError, match="= 6"):
        TrainingProcess(LoopConfig(batch_size=8, accumulate=2)).__enter__()


@pytest.fixture
def unused_tcp_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
