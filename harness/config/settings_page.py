"""Write the page of all settings, `configs/README.md`; `scripts/settings` calls this."""

from __future__ import annotations

import dataclasses

from harness.config.schema import Config
from harness.config.table import class_of, settings, written


def markdown() -> str:
    """Return `configs/README.md`."""
    sections = {field.name: class_of(field) for field in dataclasses.fields(Config)}
    lines = [HEAD]
    section = ""
    for of in settings():
        if (begins := of.name.partition(".")[0]) != section:
            section = begins
            about = (sections[section].__doc__ or "").partition("\n")[0]
            lines += [
                f"\n## `{section}`\n",
                about,
                "",
                "| setting | in Python | default | meaning | allowed |",
            ]
            lines.append("|---|---|---|---|---|")
        argument = f"`{of.argument}=`" if of.argument else ""
        default = f"`{written(of.default)}`"
        cells = (f"`{of.name}`", argument, default, of.meaning, of.allowed)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


HEAD = """\
# Settings

The YAML files of this folder are whole configurations: `digits.yaml` (the default task),
`bytes.yaml` (a small GPT) and `gan.yaml` (two networks, two optimizers). A `key=value` on the
command line overrides the file, which overrides the defaults:

```sh
harness launch --nproc-per-node 2 --config configs/digits.yaml run.dir=runs/a train.epochs=10
```

Every problem is named at once, with what is allowed and the nearest known name, before anything
starts (exit code 78). A setting that would change the model is refused when it differs from that of
the checkpoint; `resume.accept=[config]` insists. Names that end in `_s` are seconds. A value
`${oc.env:NAME}` is taken from the environment, and stored unresolved. "In Python" is the argument
of `harness.init`, `run.batches` or `run.steps` that means the same.

This page is made from `harness/config/schema.py` and `schema_services.py` by `scripts/settings`."""
