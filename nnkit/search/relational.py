"""Optuna's storage in a database, with what a search does to every trial made cheap."""

from __future__ import annotations

import contextlib
import functools
import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sql
from optuna.distributions import (
    BaseDistribution,
    check_distribution_compatibility,
    distribution_to_json,
    json_to_distribution,
)
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

__all__ = ["Relational"]

Execute = Callable[..., Any]


class Relational(RDBStorage):
    """The same tables, transactions and errors as Optuna's, for SQLite and PostgreSQL.

    Optuna goes through SQLAlchemy's objects row by row, which for a small network takes as long as its
    training; these are the same statements, prepared. Connections are closed with the storage.
    """

    def __init__(self, url: str, engine_kwargs: dict[str, Any]):
        try:
            super().__init__(url, engine_kwargs=engine_kwargs)
        except BaseException:
            if hasattr(self, "engine"):
                self.engine.dispose()
            raise
        weakref.finalize(self, self.engine.dispose)

    def __setstate__(self, state: dict[Any, Any]) -> None:
        super().__setstate__(state)
        weakref.finalize(self, self.engine.dispose)

    def get_trial(self, trial_id: int) -> FrozenTrial:
        which = {"of": trial_id}
        with self._transaction() as execute:
            found = execute(_TRIAL, which).one_or_none()
            if found is None:
                raise KeyError(models.NOT_FOUND_MSG)
            params, values, reports, user, system = [execute(query, which).all() for query in _PARTS]
        spread = {name: _distribution(text) for _, name, _, text in params}
        return FrozenTrial(
            number=found.number,
            state=found.state,
            value=None,
            values=[_value(value, kind) for _, value, kind in values] or None,
            datetime_start=_local(found.datetime_start),
            datetime_complete=_local(found.datetime_complete),
            params={name: spread[name].to_external_repr(value) for _, name, value, _ in params},
            distributions=spread,
            user_attrs={key: json.loads(text) for _, key, text in user},
            system_attrs={key: json.loads(text) for _, key, text in system},
            intermediate_values={step: _report(value, kind) for step, value, kind in reports},
            trial_id=trial_id,
        )

    def check_trial_is_updatable(self, trial_id: int, trial_state: TrialState) -> None:
        # Optuna's reads the trial for its number, here over another connection, which waits for this one.
        if trial_state.is_finished():
            raise UpdateFinishedTrialError(f"the trial with id {trial_id} has already finished")

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._set_attr(_USER, trial_id, key, value)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._set_attr(_SYSTEM, trial_id, key, value)

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        with self._transaction() as execute:
            before = self._locked_state(execute, trial_id)
            for objective, value in enumerate(values or ()):
                stored, kind = models.TrialValueModel.value_to_stored_repr(value)
                row = {"trial_id": trial_id, "objective": objective, "value": stored, "value_type": kind}
                execute(self._upsert(_VALUES, "objective", "value", "value_type"), row)
            if state == TrialState.RUNNING and before != TrialState.WAITING:
                return False
            changes: dict[str, Any] = {"state": state}
            if state == TrialState.RUNNING:
                changes["datetime_start"] = _utc_now()
            if state.is_finished():
                changes["datetime_complete"] = _utc_now()
            execute(_CHANGE, {"of": trial_id, **changes})
        return True

    def _create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> FrozenTrial:
        new = template_trial
        if new is not None and (new.state != TrialState.RUNNING or new.params or new.intermediate_values):
            return super()._create_new_trial(study_id, new)
        start, which = _utc_now(), {"of": study_id}
        if new is not None and new.datetime_start is not None:
            start = new.datetime_start.astimezone(UTC).replace(tzinfo=None)
        attrs = [
            (_USER, {} if new is None else new.user_attrs),
            (_SYSTEM, {} if new is None else new.system_attrs),
        ]
        with self._transaction() as execute:
            # Numbers are counted, so trials of a study are made one after the other.
            if execute(_STUDY, which).one_or_none() is None:
                raise KeyError(models.NOT_FOUND_MSG)
            row = {"study_id": study_id, "state": TrialState.RUNNING, "datetime_start": start}
            (trial_id,) = execute(_CREATE, row).inserted_primary_key
            number = execute(_COUNT, {**which, "before": trial_id}).scalar_one()
            execute(_CHANGE, {"of": trial_id, "number": number})
            for table, contents in attrs:
                for key, value in contents.items():
                    row = {"trial_id": trial_id, "key": key, "value_json": json.dumps(value)}
                    execute(self._upsert(table, "key", "value_json"), row)
        return FrozenTrial(
            number=number,
            state=TrialState.RUNNING,
            value=None,
            datetime_start=_local(start),
            datetime_complete=None,
            params={},
            distributions={},
            user_attrs=dict(attrs[0][1]),
            system_attrs=dict(attrs[1][1]),
            intermediate_values={},
            trial_id=trial_id,
        )

    def _set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
        previous_distribution: BaseDistribution | None,
    ) -> None:
        if previous_distribution is None:  # Seldom: the cache above remembers the distribution of a name.
            super()._set_trial_param(trial_id, param_name, param_value_internal, distribution, None)
            return
        row = {
            "trial_id": trial_id,
            "param_name": param_name,
            "param_value": param_value_internal,
            "distribution_json": distribution_to_json(distribution),
        }
        # One that is there already stays, as Optuna has it.
        with contextlib.suppress(IntegrityError), self._transaction() as execute:
            self._locked_state(execute, trial_id)
            check_distribution_compatibility(previous_distribution, distribution)
            execute(_PARAM, row)

    def _set_attr(self, table: Any, trial_id: int, key: str, value: Any) -> None:
        row = {"trial_id": trial_id, "key": key, "value_json": json.dumps(value)}
        with self._transaction() as execute:
            self._locked_state(execute, trial_id)
            execute(self._upsert(table, "key", "value_json"), row)

    def _locked_state(self, execute: Execute, trial_id: int) -> TrialState:
        """The state of a trial that may be changed, and that nobody else changes until the transaction ends."""
        state = execute(_STATE, {"of": trial_id}).scalar_one_or_none()
        if state is None:
            raise KeyError(models.NOT_FOUND_MSG)
        self.check_trial_is_updatable(trial_id, state)
        return state

    def _upsert(self, table: Any, key: str, *columns: str) -> Any:
        return _upsert(self.engine.dialect.name, table, key, columns)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Execute]:
        try:
            with self.engine.begin() as connection:
                yield connection.execute
        except IntegrityError:
            raise
        except SQLAlchemyError as error:
            raise StorageInternalError(f"a transaction of the storage failed: {error}") from error


_TRIALS = models.TrialModel.__table__
_PARAMS = models.TrialParamModel.__table__
_VALUES = models.TrialValueModel.__table__
_REPORTS = models.TrialIntermediateValueModel.__table__
_USER = models.TrialUserAttributeModel.__table__
_SYSTEM = models.TrialSystemAttributeModel.__table__
_STUDIES = models.StudyModel.__table__
_OF: Any = sql.bindparam("of")


def _part(table: Any, *columns: str) -> Any:
    """The rows of a trial in the order of the first column."""
    found = [table.c[name] for name in columns]
    return sql.select(*found).where(table.c.trial_id == _OF).order_by(found[0])


_TRIAL = sql.select(_TRIALS).where(_TRIALS.c.trial_id == _OF)
_PARTS = (
    _part(_PARAMS, "param_id", "param_name", "param_value", "distribution_json"),
    _part(_VALUES, "objective", "value", "value_type"),
    _part(_REPORTS, "step", "intermediate_value", "intermediate_value_type"),
    _part(_USER, "trial_user_attribute_id", "key", "value_json"),
    _part(_SYSTEM, "trial_system_attribute_id", "key", "value_json"),
)
_STATE = sql.select(_TRIALS.c.state).where(_TRIALS.c.trial_id == _OF).with_for_update()
_STUDY = sql.select(_STUDIES.c.study_id).where(_STUDIES.c.study_id == _OF).with_for_update()
_COUNT = sql.select(sql.func.count(_TRIALS.c.trial_id)).where(
    _TRIALS.c.study_id == _OF, _TRIALS.c.trial_id < sql.bindparam("before")
)
_CREATE = sql.insert(_TRIALS)
_PARAM = sql.insert(_PARAMS)
_CHANGE = sql.update(_TRIALS).where(_TRIALS.c.trial_id == _OF)


@functools.cache
def _upsert(dialect: str, table: Any, key: str, columns: tuple[str, ...]) -> Any:
    insert = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}[dialect](table)
    return insert.on_conflict_do_update(
        index_elements=[table.c.trial_id, table.c[key]],
        set_={column: insert.excluded[column] for column in columns},
    )


_value = models.TrialValueModel.stored_repr_to_value
_report = models.TrialIntermediateValueModel.stored_repr_to_intermediate_value


@functools.lru_cache(maxsize=1024)
def _distribution(text: str) -> BaseDistribution:
    return json_to_distribution(text)


def _local(utc: datetime | None) -> datetime | None:
    """Optuna's tables have UTC, its trials local time."""
    return None if utc is None else utc.replace(tzinfo=UTC).astimezone().replace(tzinfo=None)


def _utc_now() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None)
