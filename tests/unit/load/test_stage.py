"""The queue of the stages of decoding and of transforms."""

from __future__ import annotations

import threading

import pytest

from tiercache.load.decode import _DecodeQueue, _Job
from tiercache.load.pipeline import StageQueue
from tiercache.load.transform_workers import Job, JobQueue
from tiercache.waiting import wait_for


def decoding():
    queue = _DecodeQueue(ahead=4)
    jobs = [_Job({}, number, columns=(None,), n_rows=1) for number in range(3)]
    return queue, jobs, lambda job: queue.done(job, 0, None, 1)


def transforming():
    queue = JobQueue(inputs=None, least=4, most=4, memory_bytes=0)
    return (
        queue,
        [Job(None, number, n_rows=1, n_left=1) for number in range(3)],
        lambda job: queue.done(job, {}, None, 1),
    )


@pytest.fixture(params=[decoding, transforming])
def stage(request):
    queue, jobs, end = request.param()
    for job in jobs:
        queue.add(job)
    yield queue, jobs, end
    queue.close()


def test_batches_come_in_order_whichever_is_done_first(stage):
    queue, jobs, end = stage
    for job in reversed(jobs):
        with pytest.raises(TimeoutError):
            queue.next_done(0.0)
        end(job)
    assert [queue.next_done(0.0) for _ in jobs] == jobs
    assert (queue.n_taken, queue.busy_ns) == (3, 3)


def test_every_waiting_consumer_gets_a_batch(stage):
    queue, jobs, end = stage
    taken = []
    consumers = [threading.Thread(target=lambda: taken.append(queue.next_done(20))) for _ in jobs]
    for consumer in consumers:
        consumer.start()
    wait_for(lambda: len(queue._ready._waiters) == len(jobs), 20)
    for job in (jobs[1], jobs[2], jobs[0]):  # the last one makes all of them ready at once
        end(job)
    for consumer in consumers:
        consumer.join(20)
    assert sorted(job.number for job in taken) == [0, 1, 2]


def test_an_error_comes_after_the_batches_that_were_done(stage):
    queue, jobs, end = stage
    end(jobs[0])
    queue.fail(OSError("lost"))
    assert queue.next_done(0.0) is jobs[0]
    for _ in range(2):
        assert str(queue.next_done(0.0).error) == "lost"
    assert not queue.wait_for_room()


def test_closing_wakes_everybody():
    queue, ended = StageQueue(ahead=0), []

    def consume():
        with pytest.raises(RuntimeError, match="closed"):
            queue.next_done(None)
        ended.append("consumer")

    def add():
        assert not queue.wait_for_room()
        ended.append("stage")

    threads = [threading.Thread(target=run) for run in (consume, add)]
    for thread in threads:
        thread.start()
    wait_for(lambda: queue._ready._waiters and queue._room._waiters, 20)
    queue.close()
    for thread in threads:
        thread.join(20)
    assert sorted(ended) == ["consumer", "stage"]
