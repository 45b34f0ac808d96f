"""What every rewritten operation needs: the gradients asked for, and nodes without a graph."""

import torch


class Asked:
    """Which gradients the rewritten operations of one call of the critic are asked for.

    The engine does not tell a node written in Python which of its gradients anyone wants. But the
    penalty's first pass wants that of x alone, and what comes after it wants all others.
    """

    def __init__(self, x):
        self.x, self.first_pass = x, None  # None while the critic runs and may ask for any

    def input(self, tensor):
        """Whether the gradient of an operation's input is wanted."""
        return self.first_pass is not False or _leads(tensor, lambda leaf: leaf is not self.x)

    def weight(self, tensor):
        """Whether the gradient of an operation's weight or bias is wanted."""
        return not self.first_pass or (
            tensor.grad_fn is not None and _leads(tensor, lambda leaf: leaf is self.x)
        )


def _leads(tensor, to):
    """Whether the graph below tensor has a leaf for which to(leaf) holds."""
    if tensor.grad_fn is None:
        return to(tensor)
    seen, stack = set(), [tensor.grad_fn]
    while stack:
        node = stack.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None and to(leaf):
            return True
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)
    return False


def node(function, *args):
    """Apply function; where no gradient will be asked for, without the cost of a graph node."""
    return function.apply(*args) if torch.is_grad_enabled() else function.compute(*args)


def expand(value, n):
    """Return a size, or a list of one or n of them, as a list of n."""
    return [value] * n if isinstance(value, int) else [*value] * (n if len(value) == 1 else 1)
