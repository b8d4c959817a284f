"""The samples that a message names are those of the batch."""

import numpy as np
import torch

from omnissm.genomics.data import SyntheticDNA
from omnissm.genomics.sequence import encode, reverse_complement
from omnissm.ssmcore.training.data import batch_samples
from omnissm.timeseries.data import Synthetic
from omnissm.vision.data import SyntheticImages


def test_windows_of_series():
    data = Synthetic(length=100, variate_count=2, lookback=8, horizon=2, batch_size=4, seed=3)
    data.setup()
    loader = data.train_dataloader()
    times = loader.dataset.times()
    for number, batch in enumerate(loader):
        expected = [f"0 from {times[int(origin) - 7]}" for origin in batch.origin]
        assert batch_samples(loader, number) == ", ".join(expected)


def test_windows_of_genomes_also_after_a_stop_inside_an_epoch():
    data = SyntheticDNA(bases=4000, length=32, batch_size=2, epoch_size=12)
    data.setup()
    loader = data.train_dataloader()
    loader.sampler.set_epoch(1)
    batches = list(loader)
    names = [batch_samples(loader, number) for number in range(6)]
    for batch, named in zip(batches, names, strict=True):
        for row, name in zip(batch.tokens, named.split(", "), strict=True):
            contig, _, place = name.partition(":")
            first, last = (int(part) for part in place.split("-"))
            bases = data.genome(contig).fetch(contig, first - 1, last)
            read = [encode(bases, data.words), encode(reverse_complement(bases), data.words)]
            assert any(np.array_equal(row[-32:], ids) for ids in read)
    loader.sampler.set_epoch(1, start=4)
    assert [batch_samples(loader, number) for number in range(2, 6)] == names[2:]


def test_images():
    data = SyntheticImages(image_size=8, train_samples=20, val_samples=4, batch_size=6, seed=1)
    data.setup()
    loader = data.train_dataloader()
    for number, batch in enumerate(loader):
        named = batch_samples(loader, number, most=3)
        assert named.endswith(" and 3 more")
        rows = [loader.dataset.part.names.index(name) for name in named.removesuffix(" and 3 more").split(", ")]
        assert [loader.dataset.part.labels[row] for row in rows] == batch.label[:3].tolist()


def test_other_loaders_have_no_names():
    loader = torch.utils.data.DataLoader(torch.arange(4), batch_size=2)
    assert batch_samples(loader, 0) == ""
    assert batch_samples(None, 0) == ""
