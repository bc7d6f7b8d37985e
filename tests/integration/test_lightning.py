"""Lightning's Trainer over our loader: nothing changes but the import, and checkpoints go on in mid-epoch."""

from itertools import chain

import pytest
from tests.support.ranks import run_ranks

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

FIT = "tests.integration.lightning_jobs:fit"
N = 101


@pytest.fixture(scope="module")
def url(packed):
    return str(packed(N))


def fit(python, url, folder, **arguments):
    """What each process found."""
    n_processes = arguments.get("n_processes", 1)
    return run_ranks(python, FIT, n_processes, folder / "job", {"url": url, "folder": str(folder), **arguments})


def served(answers, first=0, last=None):
    return sorted(chain.from_iterable(chain.from_iterable(answer["seen"][first:last] for answer in answers)))


def test_a_trainer_takes_the_loader_as_it_is_and_a_checkpoint_in_mid_epoch_goes_on_at_the_next_batch(
    warm_python, url, tmp_path
):
    (whole,) = fit(warm_python, url, tmp_path)
    assert whole["is_ours"]
    assert whole["samples"] == 2 * N
    assert served([whole], last=13) == served([whole], first=13) == list(range(N))
    for step in (3, 12, 21):
        (rest,) = fit(warm_python, url, tmp_path, resume=f"step={step}.ckpt")
        assert rest["seen"] == whole["seen"][step:]
        assert rest["samples"] == 2 * N - sum(map(len, whole["seen"][:step]))


def test_two_processes_share_an_epoch_by_the_native_path(warm_python, url, tmp_path):
    two = {"n_processes": 2, "options": {"use_distributed_sampler": False}}
    answers = fit(warm_python, url, tmp_path, **two)
    assert all(answer["is_ours"] for answer in answers)
    n_steps = len(answers[0]["seen"]) // 2
    assert served(answers, last=n_steps) == served(answers, first=n_steps) == list(range(N))
    rest = fit(warm_python, url, tmp_path, resume="step=3.ckpt", **two)
    assert [answer["seen"] for answer in rest] == [answer["seen"][3:] for answer in answers]


def test_two_processes_by_the_sampler_that_lightning_puts_in(warm_python, url, tmp_path):
    answers = fit(warm_python, url, tmp_path, n_processes=2)
    assert not any(answer["is_ours"] for answer in answers)
    assert all("from sampler" in answer["loader"] for answer in answers)  # made again, and native still
    n_steps = len(answers[0]["seen"]) // 2
    assert set(served(answers, last=n_steps)) == set(served(answers, first=n_steps)) == set(range(N))
    assert len(served(answers, last=n_steps)) == N + 1
    for step in (3, 9):  # of the first epoch and of the second
        rest = fit(warm_python, url, tmp_path, n_processes=2, resume=f"step={step}.ckpt")
        assert [answer["seen"] for answer in rest] == [answer["seen"][step:] for answer in answers]
