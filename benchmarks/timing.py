"""Times contestants in turns, so that a slow moment of the machine falls on all of them."""

import platform
import random
import re
import statistics
import time
from pathlib import Path

import torch


def machine(device):
    """Return the name of the GPU or of the processor, or its architecture where it has no name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    told = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", told.read_text()) if told.exists() else None
    return named[1] if named else platform.processor() or platform.machine()


def turns(contestants, device, seconds):
    """Return a list of each contestant's times in seconds, one a turn; contestants is a dict."""

    def once(function, calls):
        if warm:
            function()  # after another contestant the first call finds caches cold: it counts not
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls

    warm = False
    for function in contestants.values():
        function()
    estimate = {name: once(function, 1) for name, function in contestants.items()}
    calls = {name: max(1, int(0.02 / max(t, 1e-7))) for name, t in estimate.items()}
    warm = max(calls.values()) > 1
    one_round = sum(max(estimate[name], 0.02) for name in contestants)
    rounds = max(3, min(51, int(seconds / one_round)))
    times, order, drawn = {name: [] for name in contestants}, [*contestants], random.Random(0)
    for _ in range(rounds):
        drawn.shuffle(order)  # what ran just before leaves its mark on caches
        for name in order:
            times[name].append(once(contestants[name], calls[name]))
    return times


def medians(contestants, device, seconds):
    """Return each contestant's median time in seconds; contestants is a dict of functions."""
    return middle(turns(contestants, device, seconds))


def middle(times):
    """Return the median of each list of times, a dictionary."""
    return {name: statistics.median(values) for name, values in times.items()}


def ratio(above, below):
    """Return the median of the quotients, turn by turn: what slows both in a turn cancels."""
    return statistics.median(a / b for a, b in zip(above, below))
