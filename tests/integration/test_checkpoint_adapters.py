"""Adapters over `tc.Checkpoints` with the real packages: runs resume bit for bit."""

import pytest
from tests.support.ranks import run_ranks

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

N = 101


@pytest.fixture(scope="module")
def url(packed):
    return str(packed(N))


@pytest.fixture
def run(warm_python, url, tmp_path):
    """A function that runs a job in this test's folder and returns what it found."""

    def run_job(job, n_ranks=1, **arguments):
        target, folder = f"tests.integration.adapter_jobs:{job}", str(tmp_path / "run")
        answers = run_ranks(warm_python, target, n_ranks, tmp_path / "job", {"url": url, "folder": folder, **arguments})
        return answers[0] if n_ranks == 1 else answers

    return run_job


@pytest.fixture(scope="module")
def whole(warm_python, url, tmp_path_factory):
    """A function that returns what a job found that was not interrupted."""
    found = {}

    def run_once(job):
        if job not in found:
            folder = tmp_path_factory.mktemp(job)
            arguments = {"url": url, "folder": str(folder / "run")}
            (found[job],) = run_ranks(
                warm_python, f"tests.integration.adapter_jobs:{job}", 1, folder / "job", arguments
            )
        return found[job]

    return run_once


# -- Lightning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resume", "step"), [("latest", 24), ("best:score", 9), ("{folder}/runs/step=3.ckpt", 3)], ids=str
)
def test_a_lightning_run_resumes_from_a_checkpoint(run, whole, tmp_path, resume, step):
    first = run("fit")
    assert first["written"] == []
    assert [saved for saved, _ in first["listed"]] == [3, 6, 9, 12, 15, 18, 21, 24]
    rest = run("fit", resume=resume.format(folder=tmp_path / "run"))
    assert rest["seen"] == whole("fit")["seen"][step:]
    assert rest["weights"] == whole("fit")["weights"]


def test_lightning_removes_what_its_own_policy_does_not_keep(run):
    listed = run("fit", save_top_k=2)["listed"]
    assert sorted(step for step, _ in listed) == [9, 12]  # the lowest scores


# -- Hugging Face's Trainer ------------------------------------------------------------------------------------------


def test_a_trainer_resumes_bit_for_bit_and_writes_no_folder_of_its_own(run, whole):
    first = run("train", stop_after=11)
    assert first["resumed"] is None
    assert first["written"] == []
    assert [step for step, _ in first["listed"]] == [3, 6, 9]
    assert all("loss" in metrics for _, metrics in first["listed"])
    rest = run("train")
    assert rest["resumed"] == "checkpoint-9"
    assert rest["seen"] == whole("train")["seen"][9:]
    assert rest["weights"] == whole("train")["weights"]  # dropout included
    assert [step for step, _ in rest["listed"]] == [3, 6, 9, 12, 15, 18, 21, 24, 26]


# -- Accelerate ------------------------------------------------------------------------------------------------------


def test_two_processes_with_accelerate_resume_from_one_checkpoint(run):
    first = run("loop", n_ranks=2, stop_after=3)
    rest = run("loop", n_ranks=2)
    served = [record for answer in (*first, *rest) for batch in answer["seen"] for record in batch]
    assert set(served) == set(range(N))
    assert rest[0]["weights"] == rest[1]["weights"]
