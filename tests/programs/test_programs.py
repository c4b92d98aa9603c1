"""Every program runs, and does what it is for."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from tests.programs import (
    adversarial,
    classifier,
    decoding,
    fine_tuning,
    hypergradient,
    many_seeds,
    per_example_gradients,
    recurrent_network,
    regression,
    residual_network,
    tied_weights,
    variational_autoencoder,
)


def test_classifier_learns():
    assert classifier.main() > 0.93


def test_regression_finds_the_sine():
    assert regression.main() < 0.01


def test_variational_autoencoder_improves_its_bound():
    losses = variational_autoencoder.main()
    assert losses[-1] < 0.9 * losses[0]
    assert losses[-1] < 30


def test_adversarial_training_moves_the_generated_points_to_the_real_ones():
    np.testing.assert_allclose(adversarial.main(), [2.0, -1.0], atol=0.3)


def test_tied_weights_are_one_matrix_and_learn():
    params, loss = tied_weights.main()
    assert params == ["body", "embed"]
    assert loss < 1.2  # what one letter tells of the next; an untrained network has log(28) = 3.3


def test_residual_network_of_20_layers_learns():
    assert residual_network.main() > 0.93


def test_the_recurrent_carry_is_what_makes_the_task_possible():
    kept, dropped = recurrent_network.main()
    assert kept < 0.1
    assert dropped > 0.4  # 4 of 5 answers in each piece cannot be known: log(2) * 4/5 = 0.55


def test_decoding_from_the_cache_gives_what_the_whole_sequence_gives():
    cached, whole = decoding.main()
    np.testing.assert_array_equal(cached, whole)
    np.testing.assert_array_equal(cached, (7 + jnp.arange(24)) % 12)


def test_private_training_learns():
    assert per_example_gradients.main() > 0.7


def test_hypergradient_equals_finite_differences():
    gradient, differences = hypergradient.main()
    # The central difference has an error of h² f'''/6 and rounding of some 1e-7/h = 1e-4.
    assert gradient == pytest.approx(differences, rel=2e-2, abs=1e-3)
    assert abs(gradient) > 0.1


def test_sixteen_seeds_in_one_program():
    accuracies = many_seeds.main()
    assert accuracies.shape == (16,)
    assert len(set(accuracies.tolist())) > 4  # the seeds are different runs
    assert accuracies.mean() > 0.85


def test_fine_tuning_learns_the_head_and_leaves_the_rest():
    accuracy, same = fine_tuning.main()
    assert accuracy > 0.85
    assert same
