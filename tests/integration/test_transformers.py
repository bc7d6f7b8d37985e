"""Hugging Face's Trainer over our data set, and with our loader by the native path."""

from itertools import chain

import pytest
from tests.distributed.ranks import run_ranks

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

TRAIN = "tests.integration.transformers_jobs:train"
N = 101
BOTH = pytest.mark.parametrize("native", [False, True], ids=["the data set alone", "by the native path"])


@pytest.fixture(scope="module")
def url(packed):
    return str(packed(N))


def train(url, folder, n_processes=1, **arguments):
    """What each process found."""
    return run_ranks(TRAIN, n_processes, folder / "job", {"url": url, "folder": str(folder / "run"), **arguments})


def served(answers, first=0, last=None):
    return sorted(chain.from_iterable(chain.from_iterable(answer["seen"][first:last] for answer in answers)))


@BOTH
def test_an_epoch_serves_each_record_once_and_a_checkpoint_goes_on_in_its_middle(url, tmp_path, native):
    (whole,) = train(url, tmp_path, native=native)
    assert served([whole], last=13) == served([whole], first=13) == list(range(N))
    for step in (3, 21):
        (rest,) = train(url, tmp_path, native=native, resume=f"checkpoint-{step}")
        assert rest["seen"] == whole["seen"][step:]


@BOTH
def test_two_processes_share_an_epoch_and_go_on_in_its_middle(url, tmp_path, native):
    answers = train(url, tmp_path, 2, native=native)
    assert {answer["steps"] for answer in answers} == {14}
    assert set(served(answers, last=7)) == set(served(answers, first=7)) == set(range(N))
    rest = train(url, tmp_path, 2, native=native, resume="checkpoint-3")
    assert [answer["seen"] for answer in rest] == [answer["seen"][3:] for answer in answers]


def test_columns_that_the_model_does_not_take_need_not_be_removed_record_by_record(url, tmp_path):
    (whole,) = train(url, tmp_path, remove_unused_columns=False)
    assert served([whole], last=13) == list(range(N))
