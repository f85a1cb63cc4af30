"""Exchange model files with other tools: everything done with a saved model besides training.

Uses, with the command or setting and the Python function for each:

* Use a trained model: `harness.load_model(RUN, which="best")`.
* Export a model: `harness export`, or `harness.export(RUN, "model.pt", "weights")`.
* Continue training from somebody else's checkpoint: `harness import`, or
  `harness.import_checkpoint("theirs.pth", RUN, settings=[…])`.
* Start training from somebody else's weights: `init.from=… init.rename=…`, or
  `harness.load_weights(model, "theirs.pth", strict=False)`.
* Show what a file contains: `harness show`, or `print(harness.describe("theirs.pth"))`.
* Show how two files differ: `harness diff`, or `harness.compare(A, B)`.

Rules:

* The format of a file is determined by its bytes, not by its name. The outline of a file (its
  tensors without their data) is read first; a file that claims more data than it holds is not
  loaded.
* No code from outside is executed: files are read with `weights_only=True`, or without unpickling.
  A file that needs more is refused, and the error names the classes that it needs; `trust`
  overrides the refusal.
* Everything is loaded to the CPU, whatever device it was saved on, and placed afterwards.
* Loading is all or nothing: everything that fits is loaded, or nothing is. A table shows what does
  not fit.
* A written file is read back and compared before it appears under its final name.

Modules: `files` (read any file safely), `formats` (detect, outline and write the file formats),
`single_read` (fetch each byte range once), `safe_unpickle` (read pickles without their classes),
`recognise` (find the parts of a file), `weights` (load weights into a module; warm start),
`rebuild` (build a run's model), `export`, `program` (pickled module, TorchScript, torch.export),
`importing`, `training_state` (optimizers, schedulers), `describe` (also: the epoch and the step),
`compare`.
"""
