"""--space over the settings of ``nnkit train``: what can be searched, how, and what is refused."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import data
from nnkit.cli import search_program
from nnkit.cli.recipe import build_model, build_trainer, load_splits, raw_splits, together
from nnkit.cli.search_program import Program
from nnkit.cli.search_settings import SearchSettings, check_search, joined, of_record, record_of
from nnkit.cli.search_space import SEARCHED, read_space, settings_of_trial
from nnkit.cli.settings import Config, resolved

NUMBERS = ("learning_rate", "decay", "l1", "l2", "dropout", "label_smoothing")


def test_a_trial_has_its_values_in_the_place_of_the_fixed_ones():
    config = Config(dataset="mnist", l2=1e-3, hidden=(64, 32, 16))
    found = settings_of_trial(config, {"lr": 0.5, "optimizer": "sgd", "epochs": 3, "batch_size": 16})
    assert (found.learning_rate, found.optimizer, found.epochs, found.batch_size) == (0.5, "sgd", 3, 16)
    assert (found.l2, found.hidden, found.decay) == (1e-3, (64, 32, 16), 0.9)
    # What a network has by default is that of the trial's, not of the fixed one.
    assert settings_of_trial(config, {"model": "mlp_bn_dropout"}).dropout == 0.5


@pytest.mark.parametrize(
    ("values", "hidden"),
    [
        ({"width": 8}, (8, 8)),
        ({"width": 8, "depth": 3}, (8, 8, 8)),
        ({"depth": 1}, (256,)),
        ({"depth": 3}, (256, 128, 128)),
        ({"hidden": 8}, (8,)),
        ({"hidden": (8, 4)}, (8, 4)),
        ({"model": "cnn", "width": 8}, (8,)),
    ],
)
def test_hidden_layers_by_width_and_depth(values, hidden):
    assert settings_of_trial(Config(), values).hidden == hidden


@pytest.mark.parametrize("model", ["mlp", "mlp_bn_dropout", "cnn"])
def test_every_number_may_be_traced(model):
    """Among them zeros, which as plain numbers mean no penalty and no dropout."""
    assert set(NUMBERS) == {searched.field for searched in SEARCHED.values() if searched.traced}

    def of(*values):
        settings = settings_of_trial(Config(model=model), dict(zip(NUMBERS, values, strict=True)))
        trainer, rate = build_trainer(settings, build_model(settings, 10), 3)
        ts = trainer.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
        return trainer.step(ts, (jnp.zeros((4, 8, 8, 1)), jnp.zeros(4, jnp.int32)))[1], rate(3)

    metrics, rate = jax.eval_shape(of, *[jnp.float32(0)] * 6)
    assert rate.shape == ()
    assert "penalty" in metrics
    # Whole numbers too.
    jax.eval_shape(of, *[jnp.int32(0)] * 6)


def test_a_fixed_zero_is_no_penalty():
    settings = resolved(Config())
    trainer, _ = build_trainer(settings, build_model(settings, 10), 3)
    ts = jax.eval_shape(trainer.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    assert (
        "penalty"
        not in jax.eval_shape(trainer.step, ts, (jnp.zeros((4, 8, 8, 1)), jnp.zeros(4, jnp.int32)))[1]
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch=2|3", "unknown setting 'epoch'; did you mean 'epochs'"),
        ("model/width=2|3", "unknown setting 'model/width'"),
        (
            "seed=1|2",
            "seed cannot be searched, only set for all trials with --seed; what can: learning_rate, lr, ",
        ),
        ("lr=uniform:0:1", "lr must be above 0, got 0"),
        ("decay=uniform:-1:1", "decay must be above 0, got -1"),
        ("l2=uniform:-1:1", "l2 must be at least 0, got -1"),
        ("dropout=uniform:0:1", r"dropout must be in \[0, 1\), got 1"),
        ("label_smoothing=uniform:0:2", r"label_smoothing must be in \[0, 1\], got 2"),
        ("l1=a|b", "l1 must be a number, got 'a'"),
        ("batch_size=int:0:3", "batch_size must be at least 1, got 0"),
        ("batch_size=1.5|2", "batch_size must be a whole number, got 1.5"),
        ("hidden=8|8x0", "hidden must be at least 1, got 0"),
        (
            "batch_size=log:1:3",
            r"batch_size is log_uniform\(1.0, 3.0\), and what it sets is in whole numbers: write ",
        ),
        (
            "epochs=int:1:3:traced",
            "epochs is to be traced, and it shapes the program, which must know it: write ",
        ),
        (
            "hidden=int:8:16",
            r"hidden is integer\(8, 16\), and what it sets is in whole numbers: write hidden=64",
        ),
        ("model=mpl|cnn", "unknown model 'mpl'; did you mean 'mlp'"),
        ("optimizer=adam|adm", "unknown optimizer 'adm'; did you mean 'adam'"),
        ("optimizer=log:1:2", "unknown optimizer 'log_uniform"),
        ("lr=log:1e-3:1,learning_rate=log:1e-3:1", "lr is short for learning_rate: search one of them"),
        (
            "hidden=8|16,width=8|16",
            "hidden says every width and the depth: search it alone, or width and depth",
        ),
        ("l2=log:1e-5:1", "l2 is searched, and --l2 fixes it: leave one of them out"),
        ("model=mlp|resnet18,dropout=uniform:0:0.5", "the model 'resnet18' has no option 'dropout'"),
        ("lr=log:1:1e-3", r"lr=log:1:1e-3: log_uniform\(1, 0.001\) is inverted"),
        ("lr", "'lr' is no hyper-parameter: write name=log:1e-5:1 or name=a|b"),
    ],
)
def test_a_space_that_cannot_be_meant(text, message):
    with pytest.raises((ValueError, TypeError), match=message):
        read_space(text, Config(l2=0.5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": None}, "a search needs --space, as lr=log:1e-5:1,l2=log:1e-6:1e-2"),
        (
            {"guard": "skip"},
            "a search has no --guard: a trial whose loss becomes inf or NaN is recorded as diverged",
        ),
        ({"checkpoint_every": 5}, "a search has no --checkpoint-every: nnkit search resume trains"),
        ({"log": ("wandb",)}, "a search has no --log: its record is the study, which optuna-dashboard shows"),
        ({"fold": 1}, "a search has no --fold: every trial is trained on all of its --folds"),
        (
            {"folds": 3, "validation": 0.1},
            "--folds 3 shares out all but the test part, which leaves --validation 0.1",
        ),
        ({"repeats": 2}, "a search has no --repeats: --seeds trains each trial with several"),
        ({"trials": 0}, "trials must be at least 1, got 0"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        (
            {"seed": 2**32 - 1, "seeds": 2},
            r"seeds must be whole numbers from 0 to 2\*\*32 - 1, got 4294967295 and up",
        ),
        (
            {"space": "label_smoothing=uniform:0:0.2"},
            "changes what val_loss measures, so trials cannot be compared",
        ),
        ({"space": "epochs=1|2", "pruner": "median"}, "a pruner compares trials after the same epochs"),
    ],
)
def test_settings_of_a_search_that_cannot_be_meant(changes, message):
    with pytest.raises(ValueError, match=message):
        check_search(SearchSettings(**{"space": "lr=log:1e-3:1", **changes}))


def test_label_smoothing_is_searched_by_accuracy():
    settings = SearchSettings(space="label_smoothing=uniform:0:0.2", metric="val_accuracy")
    assert list(check_search(settings).dimensions) == ["label_smoothing"]


def test_settings_come_back_from_the_study_as_they_were():
    settings = SearchSettings(
        space="lr=log:1e-3:1", hidden=(8, 4), l2=1e-3, epochs=3, trials=5, seeds=2, metric="val_accuracy", at="best",
        pruner="median", batch=4, members="mapped", sampler="tpe", folds=5,
    )  # fmt: skip
    assert of_record(record_of(settings)) == settings
    default = of_record(record_of(SearchSettings(space="lr=log:1e-3:1")))
    assert (default.trials, default.sampler, default.seeds, default.metric, default.at) == (
        64, "random", 1, "val_loss", "last"
    )  # fmt: skip
    with pytest.raises(
        ValueError, match="the study was not begun by 'nnkit search': its training function is in some"
    ):
        of_record(None)


def test_who_joins_may_leave_settings_out_and_contradict_none():
    study = of_record(record_of(SearchSettings(space="lr=log:1e-3:1", epochs=3, seeds=2)))
    assert joined(SearchSettings(), study, "s") == study
    assert joined(SearchSettings(epochs=3, seeds=2, space="lr=log:0.001:1"), study, "s") == study
    assert joined(SearchSettings(trials=100, batch=2), study, "s").trials == 100
    with pytest.raises(
        ValueError, match="the study 's' has epochs 3, and --epochs 4 was given: leave it out to join"
    ):
        joined(SearchSettings(epochs=4), study, "s")
    with pytest.raises(
        ValueError, match=r"has another space: 'lr' is log_uniform.*; leave out --space to join"
    ):
        joined(SearchSettings(space="lr=log:1e-4:1"), study, "s")


def test_the_program_has_no_use_for_the_test_part(monkeypatch):
    whole = search_program.raw_splits
    monkeypatch.setattr(search_program, "raw_splits", lambda config: whole(config)._replace(test=None))
    space = read_space("lr=log:1e-3:1", Config())
    program = Program(Config(hidden=(4,), epochs=2, batch_size=500), space)
    _, history = jax.eval_shape(program.train_fn, jax.random.key(0), {"lr": jnp.float32(0.1)})
    assert history["val_loss"].shape == (2,)


def test_a_fold_in_the_program_is_that_of_a_run_with_it():
    """What a trial is trained on is what "nnkit train --folds 4 --fold 2" is, and no other fold has its examples."""
    config = Config(folds=4, seed=3, validation=0.3)
    program = Program(config, read_space("lr=log:1e-3:1", Config()))
    held_out = []
    for fold in range(4):
        splits = load_splits(resolved(dataclasses.replace(config, fold=fold)))
        for standard in (splits, program.parts(fold)[1]):
            found = jax.jit(program._of_fold)(jnp.int32(fold))
            for (x, y), part in zip(found, (standard.train, standard.validation), strict=True):
                np.testing.assert_allclose(x, part.x, rtol=1e-5, atol=1e-6)
                np.testing.assert_array_equal(y, part.y)
        held_out.append(raw_splits(resolved(dataclasses.replace(config, fold=fold))))
    seen = np.concatenate([parts.validation.x for parts in held_out]).reshape(-1, 64)
    pool = together(raw_splits(resolved(Config(seed=3, validation=0.3)))).x.reshape(-1, 64)
    left_over = len(pool) % 4
    assert len(seen) == len(pool) - left_over
    assert len(np.unique(np.vstack([seen, pool]), axis=0)) == len(np.unique(pool, axis=0))
    # The test part is the same with and without folds, and is in no fold.
    test = raw_splits(resolved(Config(seed=3, validation=0.3))).test
    for parts in held_out:
        np.testing.assert_array_equal(parts.test.x, test.x)
    assert resolved(Config(folds=4, fold=2)).name == "digits-mlp-seed0-fold2"
    with pytest.raises(ValueError, match="--fold 2 is one of --folds, which are not given"):
        raw_splits(resolved(Config(fold=2)))
    with pytest.raises(ValueError, match="fold is 4 and must be from 0 to 3, the last of 4 folds"):
        raw_splits(resolved(Config(folds=4, fold=4)))


@pytest.mark.parametrize(
    ("config", "text", "message"),
    [
        (Config(test=1.5), "lr=log:1e-3:1", "test must be a share between 0 and 1, got 1.5"),
        (Config(), "batch_size=64|2000", "batch_size is 2000 and there are 1078 examples"),
        (Config(), "batch_size=int:64:2000", "batch_size is 2000 and there are 1078 examples"),
        (Config(batch_size=2000), "lr=log:1e-3:1", "batch_size is 2000 and there are 1078 examples"),
        (
            Config(dataset="mnist", validation=0),
            "lr=log:1e-3:1",
            "a search chooses on the validation part, and --vali",
        ),
    ],
)
def test_data_with_which_nothing_can_be_searched(config, text, message, monkeypatch):
    if config.dataset == "mnist":  # a set with a test part of its own
        digits = data.load("digits").train
        monkeypatch.setattr(search_program, "raw_splits", lambda _: data.Splits(digits, None, digits))
    with pytest.raises(ValueError, match=message):
        Program(config, read_space(text, Config()))
