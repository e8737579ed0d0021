"""How far the parts of an export are."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from chatglm_tuning.evaluation.progress import showing_progress


@contextmanager
def part_progress(what: str, unit: str, total: int, *, show: bool) -> Iterator[Callable[[int], None]]:
    """Give a function that is told how many more are done; `show` lets it be seen."""
    if not show:
        yield lambda _count: None
        return
    with showing_progress(what, unit, total) as advance:
        yield advance


@contextmanager
def layers_progress(what: str, layers: Iterable[nn.Module], passes: int, *, show: bool) -> Iterator[None]:
    """Show how far `passes` runs through all `layers` of a model are, while they go on."""
    layers = list(layers)
    with part_progress(what, "layers", passes * len(layers), show=show) as advance:
        hooks = [layer.register_forward_hook(lambda *_: advance(1)) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
