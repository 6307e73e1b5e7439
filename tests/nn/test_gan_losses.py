from __future__ import annotations

import pytest
import torch

from lalia.nn.gan_losses import (
    discriminator_loss,
    duration_discriminator_loss,
    duration_generator_loss,
    feature_loss,
    generator_loss,
    masked_mean,
)


def test_least_squares_by_hand():
    real, fake = (
        [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5]])],
        [torch.tensor([[0.0, 2.0]]), torch.tensor([[0.5]])],
    )
    total, real_parts, fake_parts = discriminator_loss(real, fake)
    assert [p.item() for p in real_parts] == [0.5, 0.25] and [p.item() for p in fake_parts] == [2.0, 0.25]
    assert total.item() == 3.0
    total, parts = generator_loss(fake)
    assert [p.item() for p in parts] == [1.0, 0.25] and total.item() == 1.25


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_the_batch_is_averaged_not_summed(batch):
    zeros, mask = torch.zeros(batch, 4, 1), torch.ones(batch, 1, 4)
    assert discriminator_loss([zeros], [zeros])[0].item() == 1.0
    assert generator_loss([zeros])[0].item() == 1.0
    assert duration_discriminator_loss(zeros, [zeros, zeros], mask)[0].item() == 1.0
    assert duration_generator_loss([zeros, zeros], mask)[0].item() == 1.0


def test_a_bare_tensor_is_refused_because_it_would_be_walked_along_the_batch():
    scores, mask = torch.zeros(3, 4, 1), torch.ones(3, 1, 4)
    for call in (
        lambda: discriminator_loss(scores, [scores]),
        lambda: generator_loss(scores),
        lambda: feature_loss([[scores]], scores),
        lambda: duration_discriminator_loss(scores, scores, mask),
        lambda: duration_generator_loss(scores, mask),
    ):
        with pytest.raises(TypeError, match="list"):
            call()


def test_feature_loss_is_twice_the_distance_and_only_teaches_the_fake():
    real, fake = torch.ones(2, 3, requires_grad=True), torch.zeros(2, 3, requires_grad=True)
    loss = feature_loss([[real, real], [real]], [[fake, fake], [fake]])
    assert loss.item() == 6.0
    loss.backward()
    assert real.grad is None and fake.grad.abs().sum() > 0


def test_losses_are_float32():
    half = torch.full((2, 5), 0.3, dtype=torch.bfloat16)
    for loss in (discriminator_loss([half], [half])[0], generator_loss([half])[0], feature_loss([[half]], [[half]])):
        assert loss.dtype == torch.float32


def test_duration_losses_ignore_padding():
    mask = torch.tensor([[[1.0, 1.0, 1.0]], [[1.0, 0.0, 0.0]]])
    real, fake = torch.rand(2, 3, 1), torch.rand(2, 3, 1)
    valid = mask.transpose(1, 2).bool()
    total, real_part, fake_part = duration_discriminator_loss(real, [fake], mask)
    torch.testing.assert_close(real_part, (1 - real[valid]).square().mean())
    torch.testing.assert_close(fake_part, fake[valid].square().mean())
    garbage = torch.where(valid, fake, 9.0)
    torch.testing.assert_close(duration_discriminator_loss(real, [garbage], mask)[0], total)
    torch.testing.assert_close(duration_generator_loss([garbage], mask)[0], (1 - fake[valid]).square().mean())


def test_two_predictors_each_keep_their_own_target():
    mask, one = torch.ones(1, 1, 2), torch.ones(1, 2, 1)
    # adding two scores before the loss would put the optimum at one half each
    assert duration_generator_loss([one, one], mask)[0].item() == 0.0
    assert duration_generator_loss([one / 2, one / 2], mask)[0].item() == 0.25


def test_a_given_count_makes_rank_gradients_add_up():
    values, mask = torch.rand(4, 5, 1), (torch.rand(4, 5, 1) > 0.4).float()
    halves = [masked_mean(values[i : i + 2], mask[i : i + 2], mask.sum() / 2) for i in (0, 2)]
    torch.testing.assert_close(torch.stack(halves).mean(), masked_mean(values, mask))
    with pytest.raises(ValueError, match="shape"):
        masked_mean(values, mask.transpose(1, 2))
