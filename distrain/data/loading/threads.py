"""Threads of a loader: on the device of the run, and one thread each for PyTorch's operations."""

from concurrent.futures import ThreadPoolExecutor
from threading import Thread

import torch


def open_pool(threads: int, name: str, device: torch.device) -> ThreadPoolExecutor:
    """Return a pool of threads that work for `device`."""
    others = torch.get_num_threads()  # here, so that the calling thread has a number of its own before any is set
    return ThreadPoolExecutor(threads, thread_name_prefix=name, initializer=_start, initargs=(device, others))


def _start(device: torch.device, others: int) -> None:
    if device.type == "cuda":
        # A thread begins on GPU 0, where pinning memory would create a context, about 0.5 GB, for every rank.
        torch.cuda.set_device(device)
    # Without this, every one of these threads has an OpenMP team of its own. PyTorch gives a thread the number that was
    # set last in any thread, when it first asks: this one has to ask before, and others find what they had before.
    torch.get_num_threads()
    torch.set_num_threads(1)
    restore = Thread(target=torch.set_num_threads, args=[others])
    restore.start()
    restore.join()
