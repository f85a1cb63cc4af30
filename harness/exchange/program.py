"""Write a module itself, not only its weights: pickled, as TorchScript, or by torch.export.

A pickled module needs its Python code; a program of TorchScript or torch.export does not. The
example input of a program is observed, not guessed: the task's own `evaluate` (or `loss`) is called
on a few real samples, and the arguments with which it calls the module are the example. The program
must return the same outputs as the module for the example and for smaller batches.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import pickle
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
from harness.exchange.compare import check_equal
from harness.exchange.formats import save_torch
from harness.task import Task
from harness.text import muted

SAMPLES = 8  # most samples in the example
RTOL, ATOL = 1e-4, 1e-5  # a program may sum in a different order
EVAL = "model.eval()  # or Dropout and BatchNorm go on as in training, and the answers are wrong"


@dataclass(frozen=True)
class Example:
    """The arguments of one call of a module; `size` (the batch) is the first tensor's length."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    size: int

    def smaller(self, size: int) -> Example:
        """Return an example with the first `size` samples of each tensor that `is_cut` accepts."""
        whole = (self.args, dict(self.kwargs))
        args, kwargs = pytree.tree_map_only(
            torch.Tensor, lambda t: t[:size] if self.is_cut(t) else t, whole
        )
        return Example(args, kwargs, size)

    def is_cut(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor has one entry per sample."""
        return tensor.dim() > 0 and len(tensor) == self.size

    def tensors(self) -> list[torch.Tensor]:
        """Return all tensors among the arguments, each once."""
        leaves = pytree.tree_leaves((self.args, dict(self.kwargs)))
        return list({id(leaf): leaf for leaf in leaves if isinstance(leaf, torch.Tensor)}.values())


class _Seen(Exception):  # noqa: N818 - not an error
    pass


def example(job: Task, name: str, model: nn.Module, where: str) -> Example:
    """Return the arguments with which the task calls a module for a few real samples.

    Args:
        job: The task; its `evaluate`, or else its `loss`, is called.
        name: Name of the module in error messages.
        model: The module to observe.
        where: Name of the task in error messages.

    Raises:
        UsageError: The task has neither function, or the function does not call the module.
    """
    caught: list[Example] = []

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = next(
            (
                t
                for t in pytree.tree_leaves((args, kwargs))
                if isinstance(t, torch.Tensor) and t.dim()
            ),
            None,
        )
        caught.append(Example(args, kwargs, 0 if first is None else len(first)))
        raise _Seen

    call = job.evaluate or job.loss
    if call is None:
        raise UsageError(
            "the task has neither `evaluate` nor `loss`, "
            "so nothing tells what goes into the module",
            remedy="Give it one.",
        )
    hook = model.register_forward_pre_hook(see, with_kwargs=True)
    try:
        held_out = job.eval_data is not None and (
            is_iterable(job.eval_data) or len(job.eval_data) > 1
        )
        data = job.eval_data if held_out else job.train_data
        batch = next(iter(DataLoader(data, batch_size=SAMPLES, collate_fn=job.collate)))
        with contextlib.suppress(_Seen), torch.no_grad():
            call(job.modules, batch)
    finally:
        hook.remove()
    if not caught:
        raise UsageError(
            f"the task's evaluation does not call {name!r}, so nothing tells what goes into it",
            f"found: {where}",
        )
    return caught[0]


def pickled(path: Path, model: nn.Module, legacy: bool) -> list[str]:
    """Write a pickled module, in the format before PyTorch 1.6 if `legacy`.

    Returns:
        A warning and the lines of code that load the file.

    Raises:
        UsageError: The module cannot be pickled.
        HarnessError: The file does not read back as it was written.
    """
    try:
        with muted():
            save_torch(path, model, legacy)
            # Unpickling runs code, which is safe here: the file was just written by this process.
            back = torch.load(path, map_location="cpu", weights_only=False)
    except (
        pickle.PickleError,
        AttributeError,
        TypeError,
        RuntimeError,
        ValueError,
        LookupError,
    ) as error:
        raise UsageError(
            "the module cannot be pickled", f"found: {first_line(error)}", "Take --format weights."
        ) from error
    check_equal(path, model.state_dict(), back.state_dict())
    return [
        "WARNING: this file is tied to the very code that it was made with, "
        f"of {type(model).__module__}, which must be there to load it.",
        "Loading it runs whatever is in it: give it to nobody who does not trust you. "
        "--format weights has neither fault.",
        "import torch",
        'model = torch.load("OUT", weights_only=False)',
        EVAL,
    ]


def script(path: Path, model: nn.Module, given: Example) -> list[str]:
    """Write a TorchScript file: scripted if the module can be compiled, else traced on the example.

    Returns:
        Lines that report how the program was made and checked, and the code that loads it.

    Raises:
        UsageError: The module can be neither scripted nor traced.
        HarnessError: The program's outputs differ from the module's.
    """
    with _quiet():
        try:
            made, how = torch.jit.script(model), "scripted"
        except Exception as error:  # noqa: BLE001 - the compiler raises many types
            try:
                made = _traced(model, given)
                how = (
                    "traced, as it cannot be scripted: "
                    "branches and loops are those of the example batch"
                )
            except Exception as second:  # noqa: BLE001
                raise UsageError(
                    "the module is not for TorchScript",
                    f"found: {first_line(second)}",
                    "Try --format exported.",
                ) from error
        # Save to memory first: on a full disk, torch's writer would abort the process.
        whole = io.BytesIO()
        torch.jit.save(made, whole)
        back = torch.jit.load(  # type: ignore[no-untyped-call]
            io.BytesIO(whole.getvalue()),
            map_location="cpu",
        )
        sizes = _checked(back, model, given)
    path.write_bytes(whole.getbuffer())
    return [
        f"{how}; {sizes}",
        "TorchScript is deprecated in PyTorch; its successor is --format exported.",
        "import torch",
        'model = torch.jit.load("OUT")  # in eval mode; torch::jit::load in C++',
    ]


def _traced(model: nn.Module, given: Example) -> Any:
    if not given.kwargs:
        return torch.jit.trace(model, given.args)  # type: ignore[no-untyped-call]
    # `trace` takes positional or keyword arguments, not both, so all are bound to names.
    bound = inspect.signature(model.forward).bind(*given.args, **given.kwargs)
    return torch.jit.trace(  # type: ignore[no-untyped-call]
        model,
        example_kwarg_inputs=dict(bound.arguments),
    )


def exported(path: Path, model: nn.Module, given: Example) -> list[str]:
    """Write a torch.export program, for batches of any size where the module allows that.

    Returns:
        Lines that report how the program was checked, and the code that loads it.

    Raises:
        UsageError: torch.export cannot export the module.
        HarnessError: The program's outputs differ from the module's.
    """
    shapes = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    for tensor in given.tensors():
        if given.is_cut(tensor):
            shapes[tensor] = {0: torch.export.Dim.AUTO}
    whole = io.BytesIO()
    with _quiet():
        try:
            program = torch.export.export(
                model,
                given.args,
                dict(given.kwargs),
                dynamic_shapes=shapes,  # type: ignore[arg-type]
            )
            torch.export.save(program, whole)
        except Exception as error:
            raise UsageError(
                "the module cannot be exported by torch.export",
                f"found: {first_line(error)}",
                "Its shapes or branches depend on data: "
                "https://docs.pytorch.org/docs/stable/export.html tells what to change.",
            ) from error
        back = torch.export.load(io.BytesIO(whole.getvalue())).module()
        sizes = _checked(back, model, given)
    path.write_bytes(whole.getbuffer())
    return [
        sizes,
        "import torch",
        'model = torch.export.load("OUT").module()  # in eval mode, for good',
    ]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the long output that the compilers print before they raise."""
    with muted(), contextlib.redirect_stderr(io.StringIO()):
        yield


def _checked(made: Callable[..., Any], model: nn.Module, given: Example) -> str:
    """Check the program against the module; return a text on the batch sizes that were checked.

    Raises:
        HarnessError: The program's outputs differ from the module's for one of the batches.
    """
    _compare(made, model, given)
    for size in sorted({1, given.size // 2 + 1} - {given.size}) if given.size else ():
        try:
            _compare(made, model, given.smaller(size))
        except (
            RuntimeError,
            AssertionError,
            ValueError,
            TypeError,
            IndexError,
        ):  # the program rejects this size instead of returning a wrong output
            return f"checked on a real batch; it is for batches of exactly {given.size} samples"
    if given.size < 2:
        return "checked on one sample: whether it takes larger batches is not known"
    return "checked on real batches of several sizes"


def _compare(made: Callable[..., Any], model: nn.Module, given: Example) -> None:
    with torch.no_grad():
        wanted, actual = (
            pytree.tree_leaves(each(*given.args, **given.kwargs)) for each in (model, made)
        )
    if len(wanted) != len(actual):
        raise HarnessError(
            "the program does not answer as the module does, so it is not kept",
            f"found: {len(actual)} values",
        )
    try:
        torch.testing.assert_close(actual, wanted, rtol=RTOL, atol=ATOL)
    except AssertionError as error:
        raise HarnessError(
            "the program does not answer as the module does, so it is not kept",
            f"found: {first_line(error)}",
        ) from None
