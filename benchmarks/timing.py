"""Times contestants in turn, so that a slow moment of the machine falls on all of them."""

import statistics
import time

import torch


def medians(contestants, device, seconds):
    """Return each contestant's median time in seconds; contestants is a dict of functions."""

    def once(function, calls):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls

    for function in contestants.values():
        function()
    estimate = {name: once(function, 1) for name, function in contestants.items()}
    calls = {name: max(1, int(0.02 / max(t, 1e-7))) for name, t in estimate.items()}
    one_round = sum(max(estimate[name], 0.02) for name in contestants)
    rounds = max(3, min(51, int(seconds / one_round)))
    times = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, function in contestants.items():
            times[name].append(once(function, calls[name]))
    return {name: statistics.median(values) for name, values in times.items()}
