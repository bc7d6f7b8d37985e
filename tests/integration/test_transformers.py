"""Hugging Face's Trainer over our data set, and with our loader by the native path."""

from itertools import chain

import pytest
from tests.support.ranks import run_ranks

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

N = 101
WAYS = pytest.mark.parametrize(
    "trainer", ["plain", "native", "bare"], ids=["the data set alone", "by the native path", "the loader as it is"]
)


@pytest.fixture(scope="module")
def url(packed):
    return str(packed(N))


def run(python, job, url, folder, n_processes=1, **arguments):
    """What each process found."""
    named = f"tests.integration.transformers_jobs:{job}"
    return run_ranks(
        python, named, n_processes, folder / "job", {"url": url, "folder": str(folder / "run"), **arguments}
    )


def train(python, url, folder, n_processes=1, **arguments):
    return run(python, "train", url, folder, n_processes, **arguments)


def served(answers, first=0, last=None):
    return sorted(chain.from_iterable(chain.from_iterable(answer["seen"][first:last] for answer in answers)))


@WAYS
def test_an_epoch_serves_each_record_once_and_a_checkpoint_goes_on_in_its_middle(warm_python, url, tmp_path, trainer):
    (whole,) = train(warm_python, url, tmp_path, trainer=trainer)
    assert served([whole], last=13) == served([whole], first=13) == list(range(N))
    for step in (3, 21):
        (rest,) = train(warm_python, url, tmp_path, trainer=trainer, resume=f"checkpoint-{step}")
        assert rest["seen"] == whole["seen"][step:]


@WAYS
def test_two_processes_share_an_epoch_and_go_on_in_its_middle(warm_python, url, tmp_path, trainer):
    answers = train(warm_python, url, tmp_path, 2, trainer=trainer)
    assert {answer["steps"] for answer in answers} == {14}
    assert set(served(answers, last=7)) == set(served(answers, first=7)) == set(range(N))
    rest = train(warm_python, url, tmp_path, 2, trainer=trainer, resume="checkpoint-3")
    assert [answer["seen"] for answer in rest] == [answer["seen"][3:] for answer in answers]


def test_a_checkpoint_of_an_epochs_last_step_goes_on_with_the_next_epoch(warm_python, url, tmp_path):
    (whole,) = train(warm_python, url, tmp_path, trainer="native", save_strategy="epoch")
    (rest,) = train(warm_python, url, tmp_path, trainer="native", save_strategy="epoch", resume="checkpoint-13")
    assert rest["seen"] == whole["seen"][13:]


def test_the_callback_refuses_what_would_serve_other_records(warm_python, url, tmp_path):
    (errors,) = run(warm_python, "refusals", url, tmp_path)
    assert "saved without LoaderStateCallback" in errors["saved without the callback"]
    assert "ignore_data_skip=True" in errors["added late"]
    assert "integrations.accelerate.prepare" in errors["another loader"]


def test_columns_that_the_model_does_not_take_need_not_be_removed_record_by_record(warm_python, url, tmp_path):
    (whole,) = train(warm_python, url, tmp_path, remove_unused_columns=False)
    assert served([whole], last=13) == list(range(N))
