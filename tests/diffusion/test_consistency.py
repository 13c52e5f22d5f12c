"""How much of several gradients is common to all."""

import pytest
import torch

from diffusion_align.diffusion.consistency import common_share


def test_it_is_the_mean_product_of_pairs_over_the_mean_square():
    gradients = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pairs = [float(gradients[i] @ gradients[j]) for i in range(5) for j in range(i)]
    expected = sum(pairs) / len(pairs) / gradients.square().sum(1).mean().item()
    assert common_share(gradients.split(1)).share == pytest.approx(expected, rel=1e-12)


def test_it_is_one_where_all_are_alike_and_none_where_nothing_is_common():
    one = torch.randn(40, generator=torch.Generator().manual_seed(1))
    assert common_share([[one]] * 6).share == pytest.approx(1)
    stream = torch.Generator().manual_seed(2)
    shares = [common_share(torch.randn(16, 40, generator=stream).split(1)) for _ in range(200)]
    mean, spread = (sum(f) / 200 for f in ([s.share for s in shares], [s.share**2 for s in shares]))
    assert abs(mean) < 4 * (spread / 200) ** 0.5
    assert spread**0.5 == pytest.approx(sum(s.stderr for s in shares) / 200, rel=0.2)


def test_the_gradients_stay_what_they_are():
    gradients = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    given = gradients.clone()
    assert common_share([[given[0], given[1]]] * 3).share == pytest.approx(1)
    common_share([[row[:4], row[4:]] for row in given])
    assert torch.equal(given, gradients)


def test_a_half_common_one_is_half():
    stream = torch.Generator().manual_seed(3)
    common = torch.randn(400, generator=stream)
    found = common_share((common + torch.randn(64, 400, generator=stream)).split(1))
    assert found.share == pytest.approx(0.5, abs=0.06)


def test_one_gradient_cannot_be_compared():
    with pytest.raises(ValueError, match="two or more"):
        common_share([[torch.ones(3)]])
    assert common_share([[torch.zeros(3)]] * 2).share == 0
