"""Two learners in processes of their own, which the tests hand functions to."""

from __future__ import annotations

import os
import queue
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import multiprocessing as mp

SECONDS = 300
#: How they are started where nothing else is asked for. A fork sees what was changed in memory
#: (``mutants.py``), but torch cannot differentiate in one once it has used a CUDA device.
METHOD = None


class Ranks:
    """Processes that share a gloo group, from start to :meth:`close`; one thread each.

    Args:
        size: how many.
        folder: for the file by which they find each other.
        method: how they are started.
    """

    def __init__(self, size, folder, method="spawn"):
        context = mp.get_context(METHOD or method)
        self.tasks = [context.Queue() for _ in range(size)]
        self.answers = [context.Queue() for _ in range(size)]
        self.processes = [
            context.Process(
                target=serve,
                args=(rank, size, f"file://{folder}/meeting", self.tasks[rank], self.answers[rank]),
                daemon=True,
            )
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def __call__(self, function, *args):
        """What ``function(rank, group, *args)`` returns on each of them."""
        for task in self.tasks:
            task.put((function, args))
        answers = [answer.get(timeout=SECONDS) for answer in self.answers]
        for error, _ in answers:
            assert not error, error
        return [result for _, result in answers]

    def close(self):
        for task in self.tasks:
            task.put(None)
        for process in self.processes:
            process.join(SECONDS)


def serve(rank, size, meeting, tasks, answers):
    torch.set_num_threads(1)
    seconds = timedelta(seconds=SECONDS)
    dist.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=size, timeout=seconds
    )
    parent = os.getppid()
    while os.getppid() == parent:
        try:
            task = tasks.get(timeout=1)
        except queue.Empty:
            continue
        if task is None:
            break
        function, args = task
        try:
            answers.put((None, function(rank, dist.group.WORLD, *args)))
        except BaseException:
            answers.put((traceback.format_exc(), None))
    dist.destroy_process_group()
