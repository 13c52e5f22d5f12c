"""How batches of fixed samples are divided among processes; without a second one."""

from types import SimpleNamespace

import pytest

from diffusion_align.training.sharing import batches_of, own_batches, sample_together


@pytest.mark.parametrize(("count", "batch_size"), [(1, 8), (8, 8), (9, 4), (16, 3), (5, 1)])
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_whole_batches_are_divided_evenly_and_in_order(count, batch_size, processes):
    shares = [
        own_batches(count, batch_size, SimpleNamespace(count=processes, index=index)) for index in range(processes)
    ]
    assert [batch for share in shares for batch in share] == batches_of(count, batch_size)
    assert [i for batch in batches_of(count, batch_size) for i in batch] == list(range(count))
    sizes = [len(share) for share in shares]
    assert max(sizes) <= -(-len(batches_of(count, batch_size)) // processes)


def test_a_failure_ends_the_own_batches_and_is_reported_to_the_others():
    told, sampled = [], []

    def sample(batch):
        sampled.append(batch.start)
        if batch.start == 2:
            raise ValueError("no")
        return batch

    def raise_together(failure, kind):
        told.append((str(failure), kind))
        raise failure

    processes = SimpleNamespace(count=1, index=0, raise_together=raise_together)
    with pytest.raises(ValueError, match="no"):
        sample_together(8, 2, sample, processes, error=RuntimeError)
    assert sampled == [0, 2]
    assert told == [("no", RuntimeError)]
