"""Large stores and many ranks; the page on scaling says what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.scale import PAGE, SHAPE, Assumed, Indices, cost, index_of, span, tables, with_tables, workers
from benchmarks.timing import RESULTS
from gvsl_zoo.pretrain.data import Numbers
from gvsl_zoo.pretrain.store import Format, Store, format_facts

MEASURED = json.loads((RESULTS / "scale.json").read_text())
GIVEN = {
    "prepare_raw_MB": 200.0,
    "prepare": {"2": {"store_GB_a_scan": 0.01, "MB_a_second": 50.0}},  # 4 s a scan
    "nano_step_seconds": 0.5,
    "nano_batch": 1,
}


@pytest.mark.parametrize(("batch_size", "accumulate"), [(2, 1), (3, 2)])
def test_64_ranks_take_every_pairs_number_once(batch_size, accumulate):
    ranks = [Numbers(5, 105, batch_size, accumulate, 64, rank) for rank in range(64)]
    taken = sorted(number for rank in ranks for batch in rank for number in batch)
    a_step = batch_size * accumulate * 64
    assert taken == list(range(5 * a_step, 105 * a_step))


def test_costs_are_those_computed_by_hand():
    costs = cost(3600, GIVEN, Assumed(step_seconds=0.1, batch=2, steps=9000, processes=(1, 16, 1000), devices=(1, 8)))
    assert costs["store_GB"] == {"2": pytest.approx(36.0)}
    assert costs["prepare_seconds"] == {1: 14400, 16: 900, 1000: 16}  # 1,000 processes take 4 turns
    assert costs["nano_pass_seconds"] == 1800
    assert costs["pass_seconds"] == {1: pytest.approx(180), 8: pytest.approx(22.5)}
    assert costs["passes"] == {1: 5, 8: 40}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.5, "0.5 s"), (99, "99 s"), (720, "12 min"), (25000, "6.9 h"), (864000, "10 days")]
)
def test_spans_are_in_units_that_one_can_read(seconds, text):
    assert span(seconds) == text


def test_the_page_holds_the_tables_of_the_measurements():
    page = PAGE.read_text()
    assert with_tables(page, MEASURED) == page, "run python -m benchmarks.scale --table"
    assert all(table in page for table in tables(MEASURED, Assumed()).values())


def test_what_was_measured_is_exact_where_it_has_to_be():
    for ranks in MEASURED["ranks"].values():
        assert ranks["each_number_once"] and 0.9 < ranks["strata_chi2_per_dof"] < 1.1


def test_pairs_of_20000_volumes_are_two_subjects_of_one_stratum(tmp_path: Path):
    index = index_of(20_000, np.random.default_rng(0))
    (tmp_path / "store.json").write_text(json.dumps(format_facts(Format(3, "HU", 2.0), "test")))
    np.save(tmp_path / "index.npy", index)
    pairs, generator = Indices(Store(tmp_path), SHAPE, 2.0), torch.Generator().manual_seed(0)
    fixed, moving = (index[list(drawn)] for drawn in zip(*(pairs.draw(generator) for _ in range(5000)), strict=True))
    assert (fixed["stratum"] == moving["stratum"]).all() and (fixed["subject"] != moving["subject"]).all()
    assert len(np.unique(fixed["stratum"])) == len(np.unique(index["stratum"])) == 50


def test_workers_that_keep_a_device_busy_are_those_computed_by_hand():
    assert workers(0.06, Assumed(step_seconds=0.05, batch=2)) == 3  # 120 ms of drawing in 50 ms
