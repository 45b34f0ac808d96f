"""What every rewritten operation needs: the gradients asked for, and nodes without a graph."""

import torch


class Asked:
    """Which gradients the rewritten operations of one call of the critic are asked for.

    The engine does not tell a node written in Python which of its gradients anyone wants. But the
    penalty's first pass wants that of x alone, and what comes after it wants all others.
    """

    def __init__(self, x):
        self.x, self.first_pass = x, None  # None while the critic runs and may ask for any

    def of(self, needed, x, w, b):
        """Return which gradients of an operation on x with weight w and bias b are wanted.

        `needed` tells which of the three require one.
        """
        need_x, need_w, need_b = needed
        if self.first_pass is None:
            return need_x, need_w, need_b
        if self.first_pass:
            return need_x, *(
                need and any(leaf is self.x for leaf in leaves(t))
                for need, t in ((need_w, w), (need_b, b))
            )
        return need_x and any(leaf is not self.x for leaf in leaves(x)), need_w, need_b


def leaves(tensor):
    """Yield the leaves of the graph that tensor, which requires grad, stands on."""
    if tensor.grad_fn is None:
        yield tensor
        return
    seen, stack = set(), [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if hasattr(node, "variable"):
            yield node.variable
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)


def node(function, *args):
    """Apply function; where no gradient will be asked for, without the cost of a graph node."""
    return function.apply(*args) if torch.is_grad_enabled() else function.compute(*args)


def expand(value, n):
    """Return a size, or a list of one or n of them, as a list of n."""
    value = [*value] if isinstance(value, (list, tuple)) else [value]
    return value * n if len(value) == 1 else value
