"""What a user's loop calls: the methods and attributes of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

import harness.run.usage_checks as usage_checks
from harness.run.epochs import Batches, by_epoch
from harness.run.loop import Loop
from harness.run.work import DataArguments


class Run(Loop):
    """One training job, as seen from one rank of its present attempt.

    Attributes that a user's loop reads: `rank`, `world_size`, `device`; `step`, the number of the
    step that is being made, from 1 on (after the loop: of the last one); `epoch`, from 0 on;
    `state`, plain values that are saved with each checkpoint; `weights`, the factors for the mean
    loss of each micro-batch; `finished`, True once training is complete.
    """

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of the last evaluation."""
        return self._metric_buffer.metrics

    @property
    def batch(self) -> int:
        """The number of the present batch, from 0 on: within its epoch in `by_epoch`, else in all.

        At the head of an epoch it is that of the first batch to come.
        """
        if not (self._in_epochs and self._looping):
            return self._counter.made
        return self._position.sample // (self._work.data["global_batch_size"] or 1)

    @property
    def is_writer(self) -> bool:
        """Whether this rank is the writer (rank 0), which writes and prints."""
        return self.world.is_writer

    def track(self, **objects: Any) -> Run:
        """Track objects whose state must survive a restart.

        These are modules, optimizers, schedulers, generators of random numbers, and any object with
        `state_dict` and `load_state_dict`. If the run has a checkpoint, the state of each object is
        restored here, bit for bit. Call it after wrapping modules in DistributedDataParallel and
        before the loop.

        Collective: every rank must call it.

        Returns:
            The run.

        Raises:
            UsageError: An object cannot be tracked, or the checkpoint does not fit it.
        """
        late = self._looping or self.finished
        with self._goodput.during("restore"):
            for line in self._kept_state.track(self.tracked, objects, self._payload, is_late=late):
                self.say(f"harness: {line}")
        return self

    def batches(
        self,
        dataset: Any,
        global_batch_size: int | None = None,
        *,
        accumulate: int = 1,
        epochs: int,
        max_steps: int | None = None,
        shuffle: bool = True,
        drop_last: bool = True,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_workers: int = 0,
        order: Callable[[int], Sequence[int]] | None = None,
        beside: Mapping[str, Any] | None = None,
        check_stream: bool = True,
    ) -> Iterator[Any]:
        """Yield this rank's samples of each optimizer step, on `run.device`.

        The steps run from the resume point to the end of the run. Loop once, over all epochs. When
        a stop is requested, the state is saved and SystemExit(0) is raised: code after the loop
        runs only when training is complete.

        Collective: every rank must call it.

        Args:
            dataset: A dataset with `__len__` and `__getitem__`, an iterable dataset with
                `state_dict` and `load_state_dict` (a stream), or a DataLoader. A DataLoader is
                given without `global_batch_size`, `collate_fn`, `num_workers` and `order`: its
                dataset is sharded by its own settings, and its batch size is that of a micro-batch
                on one rank.
            global_batch_size: Samples in one optimizer step, over all ranks and micro-batches.
                Required for a dataset; None for a DataLoader.
            accumulate: Micro-batches in one step of one rank. 1 (default): a step yields one batch.
                More: a step yields a list of that many micro-batches.
            epochs: Total number of epochs of the run, over all attempts.
            max_steps: Total number of steps after which the run ends even if epochs are left. None:
                no limit.
            shuffle: Shuffle the samples of each epoch anew, as a function of the seed and the
                epoch. False: the order of the dataset.
            drop_last: Leave out the last batch of an epoch if it is not whole. False: use it, and
                multiply the mean loss of each micro-batch by its entry of `run.weights`.
            collate_fn: Function from a list of samples to a batch. None: the default of PyTorch.
            num_workers: Number of processes that load samples for this rank. 0: samples are loaded
                in this process.
            order: Function from an epoch to its sample numbers, in the order to use them, in place
                of a shuffle. None: see `shuffle`.
            beside: Further datasets or DataLoaders by name, as in {"unlabelled": other}. Each has
                epochs of its own and yields whole batches only: a step yields
                (batch, {"unlabelled": batch}). A dataset has the global batch size of the main
                data. None: no further data.
            check_stream: Before training, test in copies whether the state of a stream restores
                exactly what it would have read next. False: skip the test.

        Raises:
            UsageError: An argument is invalid, the run cannot resume with this data exactly, or a
                batch is requested after an error has ended the loop.
            SaveError: The last checkpoint could not be committed.
            StorageError: The last checkpoint is not in the remote store.
            NonFiniteError: A parameter is not finite when a checkpoint is made.
            SupersededError: A newer attempt of the run has begun.
        """
        arguments = DataArguments(
            global_batch_size,
            accumulate,
            epochs,
            max_steps,
            shuffle,
            drop_last,
            collate_fn,
            num_workers,
            order,
            beside or {},
            check_stream,
        )
        return Batches(
            lambda: self._work_builder.of_data(
                dataset, arguments, (self._payload or {}).get("data")
            ),
            self._loop,
            lambda: self.step,
        )

    def by_epoch(self, batches: Iterator[Any]) -> Iterator[tuple[int, Iterator[Any]]]:
        """Yield each epoch with its batches, for a loop over epochs around a loop over batches.

        The code of the outer loop after the inner loop (a scheduler's step, an evaluation) belongs
        to the last step of the epoch and is saved with it. The epoch in which a run resumes yields
        only the rest of its batches: count with `run.enumerate`, not `enumerate`. The code of the
        outer loop before the inner loop runs again there. What it changes of the state that a
        checkpoint holds, also of samplers, is put back when the first batch is requested, because
        the checkpoint contains the change already; plain variables keep what it sets, and what it
        computes from the model is that of the resumed step: keep it in a tracked copy, or in
        `run.state`. Run the inner loop to its end. An iterator of your own goes around the inner
        one, `for batch in mixed(batches)`: with one around `run.batches`, the first batch of an
        epoch is loaded before the epoch is yielded.

        Collective: every rank must call it.

        Raises:
            UsageError: The inner loop was left before its end, or the batches are not those of
                `batches`; otherwise as `batches`.
            SaveError, StorageError, NonFiniteError, SupersededError: As `batches`.
        """
        self._in_epochs = True
        self._work_builder.check_batches(batches)
        return by_epoch(
            batches, lambda: self._share, self._at_head, self._put_back, lambda: self.step
        )

    def enumerate(self, batches: Iterable[Any], start: int = 0) -> Iterator[tuple[int, Any]]:
        """Yield each batch after `start` plus its number, which is `run.batch`.

        It counts on where a run resumes, as `enumerate` does not: `batches` is what `Run.batches`
        returns or what `by_epoch` yields.
        """
        # A generator would be over, and the run look complete, after an error.
        return map(lambda batch: (start + self.batch, batch), batches)  # noqa: C417

    def steps(self, max_steps: int) -> Iterator[int]:
        """Yield the rest of `range(max_steps)`, for a loop that produces its own data.

        The loop must produce its data anew in each step, from tracked objects or from the global
        generators of Python, NumPy and torch, which are saved for each rank. A value that one step
        leaves to the next in a variable is lost at a restart. Otherwise as `batches`.

        Collective: every rank must call it.
        """
        return Batches(
            lambda: self._work_builder.of_own(max_steps, lambda: self.step - 1),
            self._loop,
            lambda: self.step,
        )

    def due(self, every_steps: int | None) -> bool:
        """Return True every `every_steps` steps, and always in the last step of the run.

        A step in which `finish` was called is the last one, too.

        Raises:
            UsageError: It was called before the loop, or with what is no number.
        """
        usage_checks.check_due(
            every_steps,
            self._looping or self.finished or self._checkpointer.attempt is not None,
        )
        is_last = self.finished or self._finish or self._share.last or self.step == self._end_step
        return is_last or bool(every_steps and self.step % every_steps == 0)

    def finish(self) -> None:
        """End the run as complete after this step (early stopping).

        Collective: every rank must call it in the same step.
        """
        self._finish = True

    def log(self, **values: Any) -> None:
        """Log numbers of this step. Every rank should log the same names.

        Several calls in a step are merged; of a name that is logged twice, the last value counts. A
        tensor is read from the device only when it is printed or saved.

        Raises:
            UsageError: A value is not one number, or its name is one that every event has.
        """
        self._metric_buffer.log(values)

    def keep(self, name: str | PathLike[str], data: bytes) -> None:
        """Write a small file (a picture, a table) atomically to every store, as `files/NAME`.

        Only the writer writes; other ranks do nothing. `name` may have subfolders; an existing file
        of this name is replaced. A write that fails does not stop training: it is printed, and
        recorded as an event.

        Raises:
            UsageError: The name leads out of `files`, `data` is not bytes, or it was called outside
                the loop.
            SupersededError: A newer start of the run has begun.
        """
        self._checkpointer.keep(name, data)

    def evaluate(
        self,
        dataset: Any,
        fn: Callable[[Any], Mapping[str, Any]],
        *,
        batch_size: int = 256,
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> dict[str, float]:
        """Evaluate on all ranks, each sample once; the means over all samples go to `run.metrics`.

        All ranks evaluate with the writer's buffers. Afterwards each rank has its own again. The
        modes of the modules and the generators are restored, also if `fn` raises.

        Collective: every rank must call it.

        Args:
            dataset: A dataset with `__len__` and `__getitem__`. Of a DataLoader, the dataset, batch
                size, collate function and workers are taken; each sample is evaluated once.
            fn: Function from a batch to sums over its samples: {"val_loss": …, "val_acc": …}. It is
                called without gradients and with all tracked modules in eval mode.
            batch_size: Samples in one batch of one rank.
            collate_fn: Function from a list of samples to a batch. None: the default of PyTorch.

        Returns:
            The means over all samples, by name.
        """
        self._traces.point("evaluation", self.step)
        with self._goodput.during("evaluation"):
            tracked, beat = list(self.tracked.values()), self._step_timeouts.evaluation
            means = self._evaluate(tracked, dataset, fn, batch_size, collate_fn, beat)
        self._step_timeouts.evaluated() if self._looping else self._step_timeouts.rest()
        self._metric_buffer.evaluated(means)
        self._checkpointer.note("evaluated", step=self.step, **means)
        return means

    def best_checkpoint(self) -> str | None:
        """Return the path or URL of the best checkpoint so far, or None if there is none.

        The metric is the argument `best` of `harness.init`.

        Collective: every rank must call it.

        Raises:
            StorageError: A store cannot be listed or read.
        """
        return self._checkpointer.best_file()
