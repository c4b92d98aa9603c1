"""The variational autoencoder: its bound, its likelihood, and what a run leaves."""

from __future__ import annotations

import csv
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import vae

SMALL = vae.Config(latent=2, channels=(4, 8), hidden=16, epochs=2, samples=8)


@pytest.fixture(scope="module")
def nets():
    return vae.autoencoder((8, 8, 1), SMALL)


@pytest.fixture(scope="module")
def params(nets):
    keys = jax.random.split(jax.random.key(0))
    inputs = {"encoder": jnp.zeros((1, 8, 8, 1)), "decoder": jnp.zeros((1, 2))}
    made = {name: nets[name].init(key, inputs[name])[0] for name, key in zip(nets, keys, strict=True)}
    return jax.tree.map(lambda p: 2 * p, made)  # so that mean and variance of the codes differ from 0 and 1


X = jnp.asarray(np.random.default_rng(0).random((3, 8, 8, 1)), jnp.float32)


def test_the_divergence_is_that_of_the_two_normal_distributions(nets, params):
    (mean, log_var), _ = nets["encoder"].apply(params["encoder"], {}, X, train=False)
    _, kl = vae.bound(nets, params, X, jax.random.key(0))
    z = mean + jnp.exp(log_var / 2) * jax.random.normal(jax.random.key(1), (200_000, *mean.shape))
    norm = jax.scipy.stats.norm
    ratio = norm.logpdf(z, mean, jnp.exp(log_var / 2)) - norm.logpdf(z)
    # Four standard errors of the mean over 200,000 draws.
    error = 4 * ratio.sum(-1).std(0) / np.sqrt(200_000)
    assert bool((jnp.abs(ratio.sum(-1).mean(0) - kl) < error).all())
    assert float(kl.min()) > 0.01


def test_one_sample_gives_the_bound_and_many_give_the_likelihood(nets, params):
    heads = params["encoder"]["branch_0"]
    wide = {"kernel": 0 * heads["log_var"]["kernel"], "bias": jnp.full(2, 0.7)}
    heads = {"mean": jax.tree.map(lambda p: 0.2 * p, heads["mean"]), "log_var": wide}
    params = {**params, "encoder": {**params["encoder"], "branch_0": heads}}
    keys = jax.random.split(jax.random.key(2), 4000)
    bounds = -jax.vmap(lambda key: sum(vae.bound(nets, params, X, key)))(keys)
    single = jax.vmap(lambda key: vae.log_likelihood(nets, params, X, key, 1))(keys)
    error = 5 * (bounds.std(0) + single.std(0)) / np.sqrt(4000)
    assert bool((jnp.abs(bounds.mean(0) - single.mean(0)) < error).all())
    # log p(x) as the integral of p(x | z) N(z; 0, 1) over the plane of codes.
    step = 0.1
    line = jnp.arange(-6, 6, step)
    z = jnp.stack(jnp.meshgrid(line, line), -1).reshape(-1, 2)
    logits, _ = nets["decoder"].apply(params["decoder"], {}, z, train=False)
    pixels = -jnp.stack([vae._pixels(logits, jnp.broadcast_to(x, logits.shape)) for x in X], -1)
    prior = jax.scipy.stats.norm.logpdf(z).sum(-1)
    exact = jax.nn.logsumexp(pixels + prior[:, None], axis=0) + 2 * np.log(step)
    many = vae.log_likelihood(nets, params, X, jax.random.key(4), 20_000)
    # The weights are bounded, for the codes spread wider than the prior; 20,000 of them leave 0.01.
    np.testing.assert_allclose(many, exact, atol=0.04)
    assert bool((many > bounds.mean(0)).all())


def test_a_run_leaves_its_folder(tmp_path, capsys):
    config = dataclasses.replace(SMALL, runs=tmp_path)
    assert vae.main(config) == 0
    folder = tmp_path / "vae-digits-seed0"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "checkpoints", "config.json", "metrics.csv", "metrics.jsonl", "model.npz", "reconstructions.png",
        "result.json", "samples.png",
    }  # fmt: skip
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    assert float(rows[1]["loss"]) < float(rows[0]["loss"])
    assert float(rows[1]["loss"]) == pytest.approx(
        float(rows[1]["reconstruction"]) + float(rows[1]["kl"]), rel=1e-5
    )
    found = json.loads((folder / "result.json").read_text())
    assert found["test_bound"] == pytest.approx(-float(rows[1]["val_loss"]))
    assert found["test_log_likelihood"] == pytest.approx(
        found["test_bound"], rel=0.01
    )  # still almost untrained
    assert "nats an image" in capsys.readouterr().out


def test_images_that_cannot_be_halved_twice_are_refused():
    with pytest.raises(ValueError, match="sides that 4 divides, got 6 by 8"):
        vae.autoencoder((6, 8, 1), SMALL)


@pytest.mark.parametrize("changes", [{"epochs": 0}, {"samples": 0}, {"latent": 0}], ids=str)
def test_numbers_below_1_are_one_line_and_no_folder(changes, tmp_path, capsys):
    assert vae.main(dataclasses.replace(SMALL, runs=tmp_path / "runs", **changes)) == 1
    assert f"{next(iter(changes))} must be at least 1, got 0" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
