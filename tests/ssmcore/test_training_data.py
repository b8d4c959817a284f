"""Order of samples: a function of seed and epoch, complete, the same for any number of workers or ranks."""

import pytest
import torch

from omnissm.ssmcore.training import EpochSampler, SSMData


class Numbers(torch.utils.data.Dataset):
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index


def order(epoch=0, **options):
    sampler = EpochSampler(Numbers(11), **options)
    sampler.set_epoch(epoch)
    found = list(sampler)
    assert len(found) == len(sampler)
    return found


def test_order_depends_on_seed_and_epoch_alone():
    first = order(shuffle=True, seed=3)
    torch.rand(1)
    assert order(shuffle=True, seed=3) == first
    assert sorted(first) == list(range(11))
    others = [order(shuffle=True, seed=3, epoch=1), order(shuffle=True, seed=4), order(shuffle=True, seed=2, epoch=1)]
    assert len({tuple(o) for o in [first, *others]}) == 4
    assert order(shuffle=False, epoch=5) == list(range(11))


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_share_one_order(world_size):
    whole = order(shuffle=True, seed=1, epoch=2)
    parts = [order(shuffle=True, seed=1, epoch=2, rank=r, world_size=world_size) for r in range(world_size)]
    assert len({len(part) for part in parts}) == 1  # ranks take equally many steps
    dealt = [part[k] for k in range(len(parts[0])) for part in parts]
    assert dealt[:11] == whole
    assert dealt[11:] == whole[: len(dealt) - 11]
    evaluated = [order(shuffle=False, rank=r, world_size=world_size) for r in range(world_size)]
    assert sorted(index for part in evaluated for index in part) == list(range(11))  # nothing twice


@pytest.mark.parametrize("size", [1, 2, 3])
def test_fewer_samples_than_ranks_are_repeated(size):
    parts = [list(EpochSampler(Numbers(size), shuffle=True, rank=r, world_size=8)) for r in range(8)]
    assert [len(part) for part in parts] == [1] * 8
    assert {part[0] for part in parts} == set(range(size))


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_order_for_any_number_of_workers(workers):
    data = SSMData()
    data.seed = 5
    loader = data.create_loader(Numbers(11), 4, shuffle=True, num_workers=workers)
    state = torch.get_rng_state()
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        assert torch.cat(list(loader)).tolist() == order(shuffle=True, seed=5, epoch=epoch)
    assert torch.equal(torch.get_rng_state(), state)  # iterating leaves the global state alone


def test_base_has_no_state():
    assert SSMData().state() == {}
