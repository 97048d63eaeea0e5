"""The front of a run: ``run_pipeline`` takes jobs to their ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from espmedsam_edge.runtime.run.controls import Adjustable, Controls
from espmedsam_edge.runtime.run.jobs import Job, Limits, RunProgress, RunReport
from espmedsam_edge.runtime.run.scheduler import Run
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.runtime.sinks.sink import Sink


def run_pipeline(
    segmenter: Segmenter,
    jobs: Sequence[Job],
    shared: Sequence[Sink] = (),
    on_progress: Callable[[RunProgress], None] | None = None,
    controls: Controls | None = None,
    limits: Limits = Limits(),
    stop: threading.Event | None = None,
    segmenter_of: Callable[[str], Segmenter] | None = None,
) -> RunReport:
    """Segment every frame of every job, in order, and hand each to the job's sinks and to the shared ones.

    Files are done one after the other and every frame of them; live sources run at the same time, next to each other
    and to the files, and each gives its newest frame. With a live source, Ctrl-C (a first time) ends the reading, and
    sinks finish what the live sources gave. Reading, segmenting and writing overlap, in memory that
    ``lanes.READ_AHEAD_BYTES`` bounds.

    A source or a sink that fails, or a frame too large for the GPU that was asked for, becomes a failure in the report,
    and the rest is done. The calling thread only waits:
    Ctrl-C there, or an error in any stage, stops all stages, and sinks then remove what is not finished.

    Args:
        segmenter: what runs; a graph with a batch gets frames in groups, of two jobs only where one is live.
        jobs: not yet entered.
        shared: sinks for all jobs, entered by the caller; an error in one ends the run.
        on_progress: called after each frame, from another thread.
        controls: asked before each group of frames; None: nothing changes while it runs.
        limits: when to end.
        stop: does what Ctrl-C does once it is set, from any thread.
        segmenter_of: what segments frames that were recognised (``SourceFrame.modality``); asked before each of their
            groups, which are of one modality. None: ``segmenter`` does.

    Raises:
        UserError: a shared sink or the backend failed.
        KeyboardInterrupt: Ctrl-C or ``stop``, once everything has stopped.
    """
    return Run(segmenter, jobs, shared, on_progress, controls or Adjustable(), limits, segmenter_of).run(stop)
