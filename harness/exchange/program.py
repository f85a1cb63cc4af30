"""A model as a program of its own, without the code that it was written in: TorchScript and torch.export.

What goes into the module is seen, not guessed: the task's own `evaluate` (or `loss`) is called on a few real samples, and what it calls
the module with is the example. The program must answer to it, and to a smaller batch, as the module does.
"""

from __future__ import annotations

import contextlib
import inspect
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from harness.checkpoint.load import first_line
from harness.data.loading import is_iterable
from harness.errors import HarnessError, UsageError
from harness.task import Task
from harness.text import muted

SAMPLES = 8  # at most, in the example
RTOL, ATOL = 1e-4, 1e-5  # a program may sum in another order


@dataclass(frozen=True)
class Example:
    """What a module is called with, and the length of its first tensor: the size of the batch."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    size: int

    def smaller(self, size: int) -> Example:
        """The same with the first `size` samples of each tensor that has one entry a sample."""
        whole = (self.args, dict(self.kwargs))
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t[:size] if self.is_cut(t) else t, whole)
        return Example(args, kwargs, size)

    def is_cut(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor has one entry a sample."""
        return tensor.dim() > 0 and len(tensor) == self.size

    def tensors(self) -> list[torch.Tensor]:
        """All of them, each once."""
        leaves = pytree.tree_leaves((self.args, dict(self.kwargs)))
        return list({id(leaf): leaf for leaf in leaves if isinstance(leaf, torch.Tensor)}.values())


class _Seen(Exception):  # noqa: N818 - no error
    pass


def example(job: Task, name: str, model: nn.Module, where: str) -> Example:
    """What the task calls the module with, for a few real samples. Raises UsageError if it does not."""
    caught: list[Example] = []

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = next((t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.dim()), None)
        caught.append(Example(args, kwargs, 0 if first is None else len(first)))
        raise _Seen

    call = job.evaluate or job.loss
    if call is None:
        raise UsageError("the task has neither `evaluate` nor `loss`, so nothing tells what goes into the module", remedy="Give it one.")
    hook = model.register_forward_pre_hook(see, with_kwargs=True)
    try:
        held_out = job.eval_data is not None and (is_iterable(job.eval_data) or len(job.eval_data) > 1)
        data = job.eval_data if held_out else job.train_data
        batch = next(iter(DataLoader(data, batch_size=SAMPLES, collate_fn=job.collate)))
        with contextlib.suppress(_Seen), torch.no_grad():
            call(job.modules, batch)
    finally:
        hook.remove()
    if not caught:
        raise UsageError(f"the task's evaluation does not call {name!r}, so nothing tells what goes into it", f"found: {where}")
    return caught[0]


def script(path: Path, model: nn.Module, given: Example) -> list[str]:
    """Write TorchScript: the module's own code where it can be compiled, else what the example batch did. Returns words on it."""
    with _quiet():
        try:
            made, how = torch.jit.script(model), "scripted"
        except Exception as error:  # noqa: BLE001 - the compilers have errors of many kinds, and all mean this
            try:
                made, how = _traced(model, given), "traced, as it cannot be scripted: branches and loops are those of the example batch"
            except Exception as second:  # noqa: BLE001
                raise UsageError("the module is not for TorchScript", f"found: {first_line(second)}", "Try --format exported.") from error
        whole = io.BytesIO()  # written to a disk that is full, its writer would abort the process
        torch.jit.save(made, whole)
        back = torch.jit.load(io.BytesIO(whole.getvalue()), map_location="cpu")  # type: ignore[no-untyped-call]
        sizes = _checked(back, model, given)
    path.write_bytes(whole.getbuffer())
    return [f"{how}; {sizes}", "TorchScript is deprecated in PyTorch; its successor is --format exported."]


def _traced(model: nn.Module, given: Example) -> Any:
    if not given.kwargs:
        return torch.jit.trace(model, given.args)  # type: ignore[no-untyped-call]
    bound = inspect.signature(model.forward).bind(*given.args, **given.kwargs)  # one or the other, it does not take both
    return torch.jit.trace(model, example_kwarg_inputs=dict(bound.arguments))  # type: ignore[no-untyped-call]


def exported(path: Path, model: nn.Module, given: Example) -> list[str]:
    """Write a program of torch.export, for batches of any size where the module allows. Returns words on it."""
    shapes = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    for tensor in given.tensors():
        if given.is_cut(tensor):
            shapes[tensor] = {0: torch.export.Dim.AUTO}
    whole = io.BytesIO()
    with _quiet():
        try:
            program = torch.export.export(model, given.args, dict(given.kwargs), dynamic_shapes=shapes)  # type: ignore[arg-type]
            torch.export.save(program, whole)
        except Exception as error:
            raise UsageError(
                "the module cannot be exported by torch.export", f"found: {first_line(error)}",
                "Its shapes or branches depend on data: https://docs.pytorch.org/docs/stable/export.html tells what to change.",
            ) from error  # fmt: skip
        back = torch.export.load(io.BytesIO(whole.getvalue())).module()
        sizes = _checked(back, model, given)
    path.write_bytes(whole.getbuffer())
    return [sizes]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The compilers print pages before they raise."""
    with muted(), contextlib.redirect_stderr(io.StringIO()):
        yield


def _checked(made: Callable[..., Any], model: nn.Module, given: Example) -> str:
    """Which batches the program answers as the module does. Raises HarnessError if it answers one of them otherwise."""
    _compare(made, model, given)
    for size in sorted({1, given.size // 2 + 1} - {given.size}) if given.size else ():
        try:
            _compare(made, model, given.smaller(size))
        except (RuntimeError, AssertionError, ValueError, TypeError, IndexError):  # it says so itself, and gives no answer
            return f"checked on a real batch; it is for batches of exactly {given.size} samples"
    if given.size < 2:
        return "checked on one sample: whether it takes larger batches is not known"
    return "checked on real batches of several sizes"


def _compare(made: Callable[..., Any], model: nn.Module, given: Example) -> None:
    with torch.no_grad():
        wanted, found = (pytree.tree_leaves(each(*given.args, **given.kwargs)) for each in (model, made))
    if len(wanted) != len(found):
        raise HarnessError("the program does not answer as the module does, so it is not kept", f"found: {len(found)} values")
    try:
        torch.testing.assert_close(found, wanted, rtol=RTOL, atol=ATOL)
    except AssertionError as error:
        raise HarnessError("the program does not answer as the module does, so it is not kept", f"found: {first_line(error)}") from None
