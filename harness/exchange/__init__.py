"""Files for others, and from others: what people do with a saved model beside training on.

    what                                      command                     in Python
    use a trained model                                                   harness.load_model(RUN, which="best")
    give it away                              harness export              harness.export(RUN, "model.pt", "weights")
    go on with somebody else's checkpoint     harness import              harness.import_checkpoint("theirs.pth", RUN, settings=[…])
    begin with somebody else's weights        init.from=… init.rename=…   harness.load_weights(model, "theirs.pth", strict=False)
    see what is in a file                     harness show                print(harness.describe("theirs.pth"))
    see what differs                          harness diff                harness.compare(A, B)

* A file is what its bytes say, not its name. Its outline is read before it is: what claims more than it holds is not tried.
* Nothing from outside is executed: `weights_only=True`, or no pickle at all. What wants more is refused with the names of the classes
  that it wants; `trust` insists.
* Everything is loaded to the CPU, whatever it was saved on, and placed afterwards.
* All of what fits is taken, or nothing; what does not fit is shown in a table.
* What is written is read back and compared before it appears under its name.

Modules: `files` (which format, read safely), `headers` (formats that are not torch's), `content` (what is what in a file), `fit` (into a
module; warm start), `rebuild` (a run's model), `export`, `program` (TorchScript, torch.export), `importing`, `describe`, `compare`.
"""
