"""Hints on common mistakes with saved models, printed below the PyTorch error that they cause."""

from __future__ import annotations

LOADS = "harness.load_weights(model, path)"
# Pairs of a part of the error message and the hint; the first match is used.
HINTS = (
    (
        "Expected state_dict to be dict-like",
        f"load_state_dict takes what torch.load returns, not a path: {LOADS} takes the path",
    ),
    (
        "in loading state_dict for",
        "the weights are of another architecture, or their names have changed: "
        f"{LOADS} shows which",
    ),
    (
        "cannot pickle 'generator' object",
        "model.parameters() cannot be saved: save model.state_dict(), "
        "or let run.track(model=…) do it",
    ),
    (
        "on a CUDA device but torch.cuda.is_available() is False",
        f"load to the CPU first, map_location='cpu', then place; {LOADS} does",
    ),
    (
        "Tried to step",
        "a OneCycleLR is at its end: resumed, it has the total_steps of the checkpoint; "
        "resume.override=[scheduler] takes those as built",
    ),
    (
        "Weights only load failed",
        "the file wants to run code when it is loaded: "
        "`harness show FILE` names what, and runs nothing",
    ),
    (
        "Can't get attribute",
        "a pickled module needs the very code that it was saved with: "
        "save and load state_dict() instead",
    ),
    (
        "Expected all tensors to be on the same device",
        "batches are on run.device: model.to(run.device), before its optimizer is made",
    ),
    (
        ") and weight type (",
        "batches are on run.device, the model is not: model.to(run.device), "
        "before its optimizer is made",
    ),
)


def hint(error: BaseException) -> str | None:
    """Return the hint for a common error, or None if there is none."""
    text = str(error)
    return next((advice for fragment, advice in HINTS if fragment in text), None)
