"""Batches ahead of their use: threads that read and augment while the network computes, in the sampler's order.

Threads and not processes: OpenCV and torch let go of Python's lock, one cache serves all, nothing has to be pickled,
and a batch depends on its plan alone, so the number of threads changes nothing but the speed.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import cv2
import torch

from espmedsam_edge.training.data.dataset import Batch
from espmedsam_edge.training.data.sampler import BatchPlan, ModalityBatchSampler


class BatchMaker(Protocol):
    """Where batches come from: a ``TrainingSet``, or a ``DeviceStock``."""

    def batch(self, plan: BatchPlan) -> Batch:
        """The batch that a plan describes; the same plan gives the same batch."""


class BatchLoader:
    """The rest of the sampler's epoch as batches.

    Each batch is counted with ``sampler.advance()`` when it is handed out, so a state saved while it is being trained
    on resumes with the one after it.

    Args:
        images: where batches are made.
        sampler: which batches, in which order.
        workers: threads; 0 makes each batch when it is asked for.
        ahead: batches in the making a thread.

    Attributes:
        waited: seconds that the training spent waiting for batches since the loader was made.
    """

    def __init__(self, images: BatchMaker, sampler: ModalityBatchSampler, workers: int = 2, ahead: int = 2) -> None:
        self.images = images
        self.sampler = sampler
        self.workers = workers
        self.ahead = ahead
        self.waited = 0.0

    def __len__(self) -> int:
        """Batches left in this epoch."""
        return self.sampler.batches - self.sampler.position

    def __iter__(self) -> Iterator[Batch]:
        """Batches to the end of the epoch.

        Raises:
            UserError: an image of the next batch cannot be read; names the file. Batches before it were handed out.
        """
        if self.workers == 0:
            for plan in self.sampler:
                begin = time.perf_counter()
                batch = self.images.batch(plan)
                self.waited += time.perf_counter() - begin
                self.sampler.advance()
                yield batch
            return
        pool, opencv = _pool(self.workers), cv2.getNumThreads()
        cv2.setNumThreads(1)  # in all threads: each makes images of its own
        pending: deque[Future[Batch]] = deque()
        plans = iter(self.sampler)
        try:
            for plan in plans:
                pending.append(pool.submit(self.images.batch, plan))
                if len(pending) > self.workers * self.ahead:
                    yield self._next(pending)
            while pending:
                yield self._next(pending)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            cv2.setNumThreads(opencv)

    def _next(self, pending: deque[Future[Batch]]) -> Batch:
        begin = time.perf_counter()
        batch = pending.popleft().result()
        self.waited += time.perf_counter() - begin
        self.sampler.advance()
        return batch


def _pool(workers: int) -> ThreadPoolExecutor:
    """Threads in which torch computes alone, as in the processes of torch's own loader; this thread keeps its number.

    Otherwise each would start a team as large as the training's, and all would wait for one another at every step.
    ``set_num_threads`` counts for the calling thread and for those to come, so this one sets its own anew at the end.
    """
    own = torch.get_num_threads()
    ready = threading.Barrier(workers + 1)

    def compute_alone() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # a thread takes its number at its first use of torch: now
        ready.wait()

    pool = ThreadPoolExecutor(workers, thread_name_prefix="batch", initializer=compute_alone)
    for _ in range(workers):  # a thread starts for each, as none is idle before the barrier opens
        pool.submit(int)
    ready.wait()
    torch.set_num_threads(own)
    return pool
